package blockstore

import (
	"errors"
	"testing"

	"perdure/internal/model"
	"perdure/internal/vfs"
)

// TestDigestOfHoles: a hole is not read for its digest, which is that of zeroes all
// the same; where data was, a hole is damage, and the end of an image that was cut
// under our feet is no hole.
func TestDigestOfHoles(t *testing.T) {
	const size = 2*ExtentSize + 5*BlockSize // the last chunk is a short one
	for name, plain := range map[string]bool{"checksums": false, "no checksums": true} {
		for where, fsys := range map[string]vfs.FS{"kernel": vfs.OS{}, "memory": vfs.NewMem()} {
			t.Run(name+", "+where, func(t *testing.T) {
				dir := t.TempDir()
				create := func(id string) *Store {
					t.Helper()
					if err := Create(fsys, dir, Params{ID: id, VM: "vm", Size: size, State: model.UpToDate, NoChecksums: plain}); err != nil {
						t.Fatal(err)
					}
					s, err := Open(fsys, dir, id, Options{})
					if err == nil {
						_, err = s.Replay()
					}
					if err != nil {
						t.Fatal(err)
					}
					t.Cleanup(func() { _ = s.Close() })
					return s
				}
				empty, zeroed := create("empty"), create("zeroed")
				if err := zeroed.WriteAt(make([]byte, size), 0); err != nil {
					t.Fatal(err)
				}
				want := digests(t, zeroed)
				for i, d := range digests(t, empty) {
					if d.Sum != want[i].Sum {
						t.Fatalf("chunk %d: the digest of a hole is %x, of zeroes %x", i, d.Sum, want[i].Sum)
					}
				}
				// Data, then a hole under our feet.
				if err := empty.WriteAt(filled(7, 3*ChunkSize), 0); err != nil {
					t.Fatal(err)
				}
				before := digests(t, empty)
				raw, err := fsys.Open(dir + "/empty.raw")
				if err != nil {
					t.Fatal(err)
				}
				defer raw.Close()
				if err := raw.Zero(ChunkSize, ChunkSize, true); err != nil {
					t.Fatal(err)
				}
				after := digests(t, empty)
				if after[0] != before[0] || after[2] != before[2] {
					t.Error("a hole changes the digests beside it")
				}
				if !plain && after[1].Trust != Broken || plain && after[1].Sum != want[1].Sum {
					t.Errorf("data that has become a hole: %+v", after[1])
				}
				if err := raw.Truncate(ExtentSize); err != nil {
					t.Fatal(err)
				}
				err = empty.Digest(ExtentSize/ChunkSize, ExtentSize/ChunkSize+1, func(d ChunkDigest) error {
					t.Errorf("digest behind the end of the image: %+v", d)
					return nil
				})
				if !errors.Is(err, ErrCorrupt) {
					t.Errorf("digest behind the end of the image: %v", err)
				}
			})
		}
	}
}
