package blockstore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand"
	"sync"
	"syscall"
	"testing"

	"perdure/internal/model"
	"perdure/internal/vfs"
)

// rot changes a byte of the image under the store.
func rot(t testing.TB, m vfs.FS, off int64) {
	t.Helper()
	f, err := m.Open("/d/disk0.raw")
	if err != nil {
		t.Fatal(err)
	}
	var b [1]byte
	if _, err := f.ReadAt(b[:], off); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 0x10
	if _, err := f.WriteAt(b[:], off); err != nil {
		t.Fatal(err)
	}
}

func TestRotIsFoundAndRepaired(t *testing.T) {
	ctx := context.Background()
	m := vfs.NewMem()
	v := NewVolume(openStore(t, m, "/d"), VolumeOptions{})
	if err := v.WriteAt(ctx, filled(7, 4*BlockSize), 0, true); err != nil {
		t.Fatal(err)
	}
	rot(t, m, BlockSize+99)
	rot(t, m, 3*BlockSize)
	rot(t, m, 9*BlockSize+5) // a block never written
	p := make([]byte, 16*BlockSize)
	var bad *BlockError
	if err := v.ReadAt(ctx, p, 0); !errors.As(err, &bad) || !errors.Is(err, ErrChecksum) || bad.Off != BlockSize || bad.Len != BlockSize {
		t.Fatal(err)
	} else if v.Store().Classify(err) != BadBlocks {
		t.Fatal(v.Store().Classify(err))
	}
	if err := v.ReadAt(ctx, p[:512], 9*BlockSize+1024); !errors.As(err, &bad) || bad.Off != 9*BlockSize {
		t.Fatal("a part of a damaged block was served:", err)
	}
	if err := v.WriteAt(ctx, filled(8, 512), BlockSize, false); !errors.Is(err, ErrChecksum) {
		t.Fatal("a part was written over damage:", err)
	}
	peer := make([]byte, v.Size())
	copy(peer, filled(7, 4*BlockSize))
	asked := 0
	v.SetFetch(func(p []byte, off int64) error {
		asked++
		copy(p, peer[off:])
		return nil
	})
	if err := v.WriteAt(ctx, filled(8, 512), BlockSize, false); err != nil {
		t.Fatal(err)
	}
	copy(peer[BlockSize:], filled(8, 512))
	for range 2 {
		if err := v.ReadAt(ctx, p, 0); err != nil || !bytes.Equal(p, peer[:len(p)]) {
			t.Fatal("not repaired", err)
		}
	}
	if found, repaired := v.Store().Damage(); asked != 3 || repaired != 3 || found < 3 {
		t.Fatal(asked, found, repaired)
	}
	v.SetFetch(nil)
	if err := v.ReadAt(ctx, p, 0); err != nil {
		t.Fatal("not repaired in place:", err)
	}
	// A whole block heals what was there.
	rot(t, m, 2*BlockSize)
	if err := v.WriteAt(ctx, filled(9, BlockSize), 2*BlockSize, false); err != nil {
		t.Fatal(err)
	}
	if err := v.ReadAt(ctx, p, 0); err != nil {
		t.Fatal(err)
	}
	if err := v.Store().Close(); err != nil {
		t.Fatal(err)
	}
	// And it is found in a later life, from the file of the checksums.
	rot(t, m, 0)
	s := openStore(t, m, "/d")
	if err := s.ReadAt(p, 0); !errors.Is(err, ErrChecksum) {
		t.Fatal(err)
	}
	if d := digests(t, s); d[0].Trust != Broken || d[1].Trust != Holds {
		t.Fatal(d)
	}
}

func digests(t testing.TB, s *Store) (out []ChunkDigest) {
	t.Helper()
	if err := s.Digest(0, s.Chunks(), func(d ChunkDigest) error { out = append(out, d); return nil }); err != nil {
		t.Fatal(err)
	}
	return out
}

func TestUnreadableBlockIsAnsweredByThePeer(t *testing.T) {
	for _, sums := range []Setting{On, Off} {
		ctx := context.Background()
		m := vfs.NewMem()
		p := testParams()
		p.NoChecksums = sums == Off
		if err := Create(m, "/d", p); err != nil {
			t.Fatal(err)
		}
		v := NewVolume(openStore(t, m, "/d"), VolumeOptions{})
		if err := v.WriteAt(ctx, filled(7, 8*BlockSize), 0, true); err != nil {
			t.Fatal(err)
		}
		dead, stuck := int64(5*BlockSize), false
		m.SetHook(func(op vfs.Op) error {
			if op.Path != "/d/disk0.raw" || op.Off > dead || op.Off+op.Len <= dead {
				return nil
			}
			if op.Kind == "read" || op.Kind == "write" && stuck {
				return syscall.EIO
			}
			if op.Kind == "write" {
				dead = -1 // the device maps another sector in
			}
			return nil
		})
		got := make([]byte, 8*BlockSize)
		var bad *BlockError
		if err := v.ReadAt(ctx, got, 0); !errors.As(err, &bad) || !errors.Is(err, syscall.EIO) || bad.Off != dead {
			t.Fatal(err)
		}
		v.SetFetch(func(p []byte, _ int64) error { copy(p, filled(7, len(p))); return nil })
		stuck = true // nothing can be written there either: answered all the same
		if err := v.ReadAt(ctx, got, 0); err != nil || !bytes.Equal(got, filled(7, len(got))) {
			t.Fatal(err)
		}
		stuck = false
		if err := v.ReadAt(ctx, got, 0); err != nil || dead != -1 || !bytes.Equal(got, filled(7, len(got))) {
			t.Fatal(err, dead)
		}
	}
}

// A repair and a write to the same block never run side by side, and the write wins.
func TestRepairWaitsForWrites(t *testing.T) {
	m := vfs.NewMem()
	s := openStore(t, m, "/d")
	if err := s.WriteAt(filled(1, BlockSize), 0); err != nil {
		t.Fatal(err)
	}
	rot(t, m, 77)
	wrote := make(chan error, 1)
	err := s.Repair(0, BlockSize, func(p []byte, off int64) error {
		go func() { wrote <- s.WriteAt(filled(2, BlockSize), 0) }()
		select {
		case err := <-wrote:
			return fmt.Errorf("a write went by a repair: %w", err)
		default:
		}
		copy(p, filled(1, BlockSize))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := <-wrote; err != nil || stamps(t, s)[0] != 2 {
		t.Fatal(err)
	}
	called := false
	if err := s.Repair(0, BlockSize, func([]byte, int64) error { called = true; return nil }); err != nil || called {
		t.Fatal("a good block was repaired", err)
	}
}

// After an unclean stop checksums of what was being written are not believed, and
// computed again; others are.
func TestChecksumsAfterAnUncleanStop(t *testing.T) {
	m := vfs.NewMem()
	p := testParams()
	p.Size = 4 * ExtentSize
	if err := Create(m, "/d", p); err != nil {
		t.Fatal(err)
	}
	s := openStore(t, m, "/d")
	for _, no := range []int64{0, 3} {
		if err := s.WriteAt(filled(3, 2*BlockSize), no*ExtentSize); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = openStore(t, m, "/d")
	if s.InDoubt() != 0 || s.Activity().Extents != 0 {
		t.Fatal("an orderly end leaves no doubt")
	}
	if err := s.WriteAt(filled(4, BlockSize), 0); err != nil {
		t.Fatal(err)
	}
	m = m.Crash(func() bool { return true })
	rot(t, m, 3*ExtentSize)
	rot(t, m, BlockSize) // in the extent in doubt: nobody can tell
	s = openStore(t, m, "/d")
	buf := make([]byte, BlockSize)
	if err := s.ReadAt(buf, 3*ExtentSize); !errors.Is(err, ErrChecksum) {
		t.Fatal("a checksum outside of the log was not believed", err)
	}
	if err := s.ReadAt(buf, BlockSize); err != nil || s.InDoubt() != 1 {
		t.Fatal(err, s.InDoubt())
	}
	if d := digests(t, s); d[0].Trust != Unknown || d[3*chunksPerExtent].Trust != Broken {
		t.Fatal(d[0], d[3*chunksPerExtent])
	}
	// What is not computed before the next end stays in doubt, without a mark in the bitmap.
	s.ClearMissing(0, s.Chunks())
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = openStore(t, m, "/d")
	if s.InDoubt() != 1 || s.MissingCount() != 0 {
		t.Fatal(s.InDoubt(), s.MissingCount())
	}
	if more, err := s.Reassure(); more || err != nil {
		t.Fatal(more, err)
	}
	rot(t, m, 1)
	if err := s.ReadAt(buf, 0); !errors.Is(err, ErrChecksum) {
		t.Fatal("not known again", err)
	}
}

// The activity log follows the peer: what it did not report is in the bitmap when it is lost.
func TestDetachMarksWhatThePeerLacks(t *testing.T) {
	m := vfs.NewMem()
	p := testParams()
	p.Size = 8 * ExtentSize
	if err := Create(m, "/d", p); err != nil {
		t.Fatal(err)
	}
	s := openStore(t, m, "/d")
	s.Attach(1)
	put := func(chunk int64) {
		t.Helper()
		if err := s.WriteAt(filled(1, BlockSize), chunk*ChunkSize); err != nil {
			t.Fatal(err)
		}
	}
	put(1)
	put(70)
	s.Committed(1)
	put(2)
	put(71)
	s.Committed(2)
	s.PeerDurable(1)
	put(3) // one generation more in the same extent
	if s.MissingCount() != 0 {
		t.Fatal("marked while attached")
	}
	s.Committed(3)
	s.PeerDurable(2)
	put(4)
	s.Detach()
	got := s.Missing()
	for c, want := range map[int64]bool{3: true, 4: true, 70: false, 71: false} {
		if got.Test(c) != want {
			t.Errorf("chunk %d: %v", c, got.Test(c))
		}
	}
	put(200)
	if !s.Missing().Test(200) {
		t.Fatal("not marked while alone")
	}
	if commits := s.Activity().Commits; commits > 3 {
		t.Fatal(commits)
	}
	// Nothing was saved; the log makes up for it.
	s = openStore(t, m.Crash(func() bool { return false }), "/d")
	after := s.Missing()
	for _, c := range []int64{3, 4, 200} {
		if !after.Test(c) {
			t.Errorf("chunk %d was forgotten", c)
		}
	}
}

// A write into a cold extent waits while the log is full of what the peer has not
// reported, says so, and goes on when it has.
func TestFullLogWaitsForThePeer(t *testing.T) {
	open := func() *Store {
		m := vfs.NewMem()
		p := testParams()
		p.Size = 16 * ExtentSize
		if err := Create(m, "/d", p); err != nil {
			t.Fatal(err)
		}
		s, err := Open(m, "/d", "disk0", Options{Activity: 4, NoAutoTrim: true})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Replay(); err != nil {
			t.Fatal(err)
		}
		return s
	}
	for what, free := range map[string]func(s *Store){
		"report": func(s *Store) { s.Committed(1); s.PeerDurable(1) },
		"detach": func(s *Store) { s.Detach() },
		"fail":   func(s *Store) { s.GiveUp(errors.New("the device does not answer")) },
	} {
		s := open()
		s.Attach(1)
		for no := range int64(4) {
			if err := s.WriteAt(filled(1, BlockSize), no*ExtentSize); err != nil {
				t.Fatal(err)
			}
		}
		done := make(chan error, 1)
		go func() { done <- s.WriteAt(filled(2, BlockSize), 9*ExtentSize) }()
		<-s.PeerWanted()
		select {
		case err := <-done:
			t.Fatal(what, "did not wait:", err)
		default:
		}
		free(s)
		if err := <-done; (err != nil) != (what == "fail") {
			t.Fatal(what, err)
		}
		if what != "fail" {
			if err := s.WriteAt(filled(1, BlockSize), 0); err != nil {
				t.Fatal(err)
			}
		}
		_ = s.Close()
	}
}

// Guests, resync and checksums in doubt all at once; run it with -race.
func TestConcurrentActivity(t *testing.T) {
	dir := t.TempDir()
	p := testParams()
	p.Size = 24 * ExtentSize
	if err := Create(vfs.OS{}, dir, p); err != nil {
		t.Fatal(err)
	}
	for round := range 3 {
		s, err := Open(vfs.OS{}, dir, "disk0", Options{Activity: 6})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Replay(); err != nil {
			t.Fatal(err)
		}
		s.Attach(1)
		stop := make(chan struct{})
		var side, guests sync.WaitGroup
		side.Go(func() {
			for e := model.Epoch(1); ; e++ {
				select {
				case <-stop:
					return
				case <-s.PeerWanted():
				}
				s.Committed(e)
				s.PeerDurable(e)
			}
		})
		v := NewVolume(s, VolumeOptions{})
		for g := range int64(4) {
			guests.Go(func() {
				rng := rand.New(rand.NewSource(g + int64(round)*10))
				last := map[int64]byte{}
				for i := range 300 {
					n := rng.Int63n(24)*blocksPerExtent + rng.Int63n(4)
					off := n*BlockSize + g*1024
					stamp := byte(i%250 + 1)
					err := v.WriteAt(context.Background(), filled(stamp, 1024), off, rng.Intn(20) == 0)
					last[off] = stamp
					for o, want := range last {
						if rng.Intn(4) == 0 && err == nil {
							got := make([]byte, 1024)
							if err = v.ReadAt(context.Background(), got, o); err == nil && !bytes.Equal(got, filled(want, 1024)) {
								err = fmt.Errorf("at %d: %d, want %d", o, got[0], want)
							}
						}
						break
					}
					if err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		guests.Wait()
		close(stop)
		side.Wait()
		if round == 1 { // as if it were killed
			close(s.stopping)
			s.background.Wait()
			s.journal.stop()
			_ = s.closeFiles()
			continue
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
