package blockstore

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"perdure/internal/model"
	"perdure/internal/vfs"
)

const testBlocks = 64

func testParams() Params {
	return Params{ID: "disk0", VM: "0b5c0b34-5b2c-4b8e-9a57-1f0d3c5e8a11", Size: testBlocks * BlockSize, Term: 3,
		Branch: "main", Run: "00112233445566778899aabbccddeeff", State: model.UpToDate}
}

// openStore opens and replays the replica in /d, made first if it is not there.
func openStore(t testing.TB, fsys vfs.FS, dir string) *Store {
	t.Helper()
	if ok, err := Exists(fsys, dir, "disk0"); err != nil {
		t.Fatal(err)
	} else if !ok {
		if err := Create(fsys, dir, testParams()); err != nil {
			t.Fatal(err)
		}
	}
	s, err := Open(fsys, dir, "disk0", Options{JournalLimit: 64 << 10, NoAutoTrim: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Replay(); err != nil {
		t.Fatal(err)
	}
	return s
}

func filled(stamp byte, n int) []byte { return bytes.Repeat([]byte{stamp}, n) }

// epochOf makes an epoch that fills blocks with a stamp.
func epochOf(stamp byte, blocks ...int64) *EpochWrites {
	l := newLayer()
	for _, n := range blocks {
		b := new(block)
		copy(b[:], filled(stamp, BlockSize))
		l.blocks[n] = b
	}
	return &EpochWrites{layer: l}
}

func stamps(t testing.TB, s *Store) []byte {
	t.Helper()
	p := make([]byte, s.Size())
	if err := s.ReadAt(p, 0); err != nil {
		t.Fatal(err)
	}
	out := make([]byte, len(p)/BlockSize)
	for i := range out {
		b := p[i*BlockSize : (i+1)*BlockSize]
		if !bytes.Equal(b, filled(b[0], BlockSize)) {
			t.Fatalf("block %d is torn", i)
		}
		out[i] = b[0]
	}
	return out
}

func TestStoreLife(t *testing.T) {
	for name, fsys := range map[string]vfs.FS{"os": vfs.OS{}, "mem": vfs.NewMem()} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			s := openStore(t, fsys, dir)
			if err := Create(fsys, dir, testParams()); !errors.Is(err, fs.ErrExist) {
				t.Fatal(err)
			}
			m := s.Meta()
			if m.VM != testParams().VM || m.Term != 3 || m.Run != testParams().Run || m.State != model.UpToDate || m.Clean {
				t.Fatalf("%+v", m)
			}
			if err := s.SetMeta(func(m *Meta) { m.Term, m.State, m.Size = 9, model.Outdated, 1 }); err != nil {
				t.Fatal(err)
			}
			if err := s.SetMeta(func(m *Meta) { m.State = "odd" }); err == nil {
				t.Fatal("unknown state accepted")
			}
			if err := s.WriteAt(filled(7, 8192), 4096); err != nil {
				t.Fatal(err)
			}
			if err := s.Zero(8192, 4096, true); err != nil {
				t.Fatal(err)
			}
			for _, off := range []int64{-1, s.Size(), s.Size() - 1} {
				if err := s.WriteAt(filled(1, 2), off); !errors.Is(err, syscall.EINVAL) {
					t.Fatal(off, err)
				}
			}
			if err := s.Append(3, 1, epochOf(5, 10)); err != nil {
				t.Fatal(err)
			}
			if err := s.Apply(1); err != nil {
				t.Fatal(err)
			}
			if err := s.Wipe(); !errors.Is(err, ErrState) {
				t.Fatal(err)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}

			s2, err := Open(fsys, dir, "disk0", Options{})
			if err != nil {
				t.Fatal(err)
			}
			if m := s2.Meta(); m.Term != 9 || m.State != model.Outdated || !m.Clean || m.Size != testBlocks*BlockSize {
				t.Fatalf("%+v", m)
			}
			if err := s2.WriteAt(filled(1, 512), 0); !errors.Is(err, ErrState) {
				t.Fatal("written before replay", err)
			}
			if n, err := s2.Replay(); n != 0 || err != nil {
				t.Fatal("a closed replica has nothing to replay", n, err)
			}
			want := make([]byte, testBlocks)
			want[1], want[10] = 7, 5
			if got := stamps(t, s2); !bytes.Equal(got, want) {
				t.Fatalf("%v", got)
			}
			if err := s2.SetMeta(func(m *Meta) { m.State = model.Inconsistent }); err != nil {
				t.Fatal(err)
			}
			if err := s2.Wipe(); err != nil {
				t.Fatal(err)
			}
			if n, hole, err := s2.Extent(0, s2.Size()); n != s2.Size() || !hole || err != nil {
				t.Fatal("not wiped", n, hole, err)
			}
			if err := s2.Close(); err != nil {
				t.Fatal(err)
			}
			if err := Remove(fsys, dir, "disk0"); err != nil {
				t.Fatal(err)
			}
			if ok, _ := Exists(fsys, dir, "disk0"); ok {
				t.Fatal("still there")
			}
			if err := Remove(fsys, dir, "disk0"); err != nil {
				t.Fatal(err)
			}
			if err := Create(fsys, dir, testParams()); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestAdoptAnImage(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "disk0.raw")
	p := testParams()
	p.Adopt = true
	if err := Create(vfs.OS{}, dir, p); !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, filled(9, int(p.Size)+512), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Create(vfs.OS{}, dir, p); err == nil {
		t.Fatal("an image larger than the disk was cut")
	}
	if err := os.WriteFile(path, filled(9, 8192), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Create(vfs.OS{}, dir, p); err != nil {
		t.Fatal(err)
	}
	s := openStore(t, vfs.OS{}, dir)
	if got := stamps(t, s); got[0] != 9 || got[1] != 9 || got[2] != 0 {
		t.Fatal(got)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestDamageIsFound(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, vfs.OS{}, dir)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	meta := filepath.Join(dir, "disk0.meta")
	good, err := os.ReadFile(meta)
	if err != nil {
		t.Fatal(err)
	}
	try := func(change func(b []byte) []byte) error {
		t.Helper()
		if err := os.WriteFile(meta, change(bytes.Clone(good)), 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := Open(vfs.OS{}, dir, "disk0", Options{})
		if err == nil {
			_ = s.closeFiles()
		}
		return err
	}
	if err := try(func(b []byte) []byte { return b[:100] }); !errors.Is(err, ErrCorrupt) {
		t.Fatal(err)
	}
	if err := try(func(b []byte) []byte { b[20], b[slotSize+20] = b[20]+1, b[slotSize+20]+1; return b }); !errors.Is(err, ErrCorrupt) {
		t.Fatal(err)
	}
	// One bad slot: the other one counts.
	newest := int(s.meta.seq % 2)
	if err := try(func(b []byte) []byte { b[newest*slotSize+20]++; return b }); err != nil {
		t.Fatal(err)
	}
	if f, err := (vfs.OS{}).Open(meta); err != nil {
		t.Fatal(err)
	} else if m, err := readMeta(f); err != nil || m.seq != s.meta.seq-1 || f.Close() != nil {
		t.Fatalf("the slot before is not there: %+v %v", m, err)
	}
	if err := try(func(b []byte) []byte {
		m := s.meta
		p := m.encode()
		p[8] = 99
		resum(p)
		copy(b[newest*slotSize:], p)
		return b
	}); !errors.Is(err, ErrVersion) {
		t.Fatal(err)
	}
	if err := try(func(b []byte) []byte { return b }); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(filepath.Join(dir, "disk0.raw"), 4096); err != nil {
		t.Fatal(err)
	}
	if err := try(func(b []byte) []byte { return b }); !errors.Is(err, ErrCorrupt) {
		t.Fatal(err)
	}
}

func TestNextData(t *testing.T) {
	s := openStore(t, vfs.NewMem(), "/d")
	for _, w := range []struct {
		stamp byte
		at, n int64
	}{{1, 3, 2}, {0, 5, 2}, {2, 7, 1}, {0, 20, 4}, {3, 30, 9}, {4, testBlocks - 1, 1}} {
		if err := s.WriteAt(filled(w.stamp, int(w.n*BlockSize)), w.at*BlockSize); err != nil {
			t.Fatal(err)
		}
	}
	got := make([]byte, testBlocks)
	buf := make([]byte, 4*BlockSize)
	read := 0
	for off := int64(0); ; {
		start, n, err := s.NextData(off, buf)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil || start < off || start%BlockSize != 0 || n <= 0 || n%BlockSize != 0 {
			t.Fatal(start, n, err)
		}
		for i := range n / BlockSize {
			got[start/BlockSize+int64(i)] = buf[i*BlockSize]
		}
		off = start + int64(n)
		read += n / BlockSize
	}
	if want := stamps(t, s); !bytes.Equal(got, want) {
		t.Fatalf("%v want %v", got, want)
	}
	if read > 2+1+9+1+2 { // the data, and zeroes only where they lie between
		t.Fatalf("%d blocks read", read)
	}
}

func TestIsZero(t *testing.T) {
	for _, n := range []int{0, 1, 7, 8, 512, 4095, 4096, 4097, 65536} {
		p := make([]byte, n)
		if !IsZero(p) {
			t.Fatal(n)
		}
		for _, i := range []int{0, n / 2, n - 1} {
			if i < 0 || i >= n {
				continue
			}
			p[i] = 1
			if IsZero(p) {
				t.Fatal(n, i)
			}
			p[i] = 0
		}
	}
}

func TestFailedSyncSticks(t *testing.T) {
	for _, path := range []string{"/d/disk0.raw", "/d/disk0.journal0", "/d/disk0.meta"} {
		m := vfs.NewMem()
		s := openStore(t, m, "/d")
		fails := 0
		m.SetHook(func(op vfs.Op) error {
			if op.Kind == "sync" && op.Path == path && fails == 0 {
				fails++
				return syscall.EIO
			}
			return nil
		})
		if err := s.Append(1, 1, epochOf(1, 1)); err != nil {
			t.Fatal(err)
		}
		if err := s.Apply(1); err != nil {
			t.Fatal(err)
		}
		err := errors.Join(s.Sync(), s.Trim())
		if !errors.Is(err, syscall.EIO) || fails != 1 {
			t.Fatal(path, err, fails)
		}
		for _, err := range []error{s.Sync(), s.Flush(), s.Err(), s.Append(1, 2, epochOf(1, 1)), s.WriteAt(filled(1, 512), 0),
			s.ReadAt(make([]byte, 512), 0), s.SetMeta(func(*Meta) {}), NewVolume(s, VolumeOptions{}).Flush(context.Background()), s.Close()} {
			if !errors.Is(err, syscall.EIO) {
				t.Fatal(path, "does not stick:", err)
			}
		}
	}
}

func TestFullDiskDoesNotStick(t *testing.T) {
	m := vfs.NewMem()
	s := openStore(t, m, "/d")
	full := true
	m.SetHook(func(op vfs.Op) error {
		if full && (op.Kind == "write" || op.Kind == "zero") && op.Path != "/d/disk0.meta" {
			return syscall.ENOSPC
		}
		return nil
	})
	w := epochOf(1, 1, 2)
	if err := s.Append(1, 1, w); !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	if err := s.WriteAt(filled(1, BlockSize), 0); !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	full = false
	if err := s.Append(1, 1, w); err != nil {
		t.Fatal(err)
	}
	full = true
	if err := s.Apply(1); !errors.Is(err, syscall.ENOSPC) || s.Pending() != 1 {
		t.Fatal(err)
	}
	full = false
	if err := s.Apply(1); err != nil || s.Pending() != 0 || stamps(t, s)[2] != 1 {
		t.Fatal(err)
	}
}

// The journal must stay bounded, and nothing be lost, over many epochs.
func TestJournalTakesTurns(t *testing.T) {
	m := vfs.NewMem()
	if err := Create(m, "/d", testParams()); err != nil {
		t.Fatal(err)
	}
	s, err := Open(m, "/d", "disk0", Options{JournalLimit: 128 << 10}) // with the trimmer
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Replay(); err != nil {
		t.Fatal(err)
	}
	want := make([]byte, testBlocks)
	for e := 1; e <= 500; e++ {
		n := int64(e * 7 % testBlocks)
		if err := s.Persist(1, model.Epoch(e), epochOf(byte(e%255+1), n)); err != nil {
			t.Fatal(err)
		}
		want[n] = byte(e%255 + 1)
		if err := s.Apply(model.Epoch(e)); err != nil {
			t.Fatal(err)
		}
	}
	for i := range s.journal.areas {
		if size, _ := s.journal.areas[i].file.Size(); size == 0 || size > 300<<10 {
			t.Fatalf("journal file %d has %d bytes", i, size)
		}
	}
	if err := s.Sync(); err != nil {
		t.Fatal(err)
	}
	s.journal.stop()
	s = openStore(t, m.Crash(func() bool { return false }), "/d")
	if got := stamps(t, s); !bytes.Equal(got, want) {
		t.Fatalf("%v want %v", got, want)
	}
}

func TestDiscard(t *testing.T) {
	m := vfs.NewMem()
	s := openStore(t, m, "/d")
	persist := func(s *Store, e model.Epoch, stamp byte) {
		t.Helper()
		w := epochOf(stamp, 1)
		w.within = true
		if err := s.Persist(1, e, w); err != nil {
			t.Fatal(err)
		}
	}
	persist(s, 1, 1)
	if err := s.Discard(); err != nil {
		t.Fatal(err)
	}
	if s.Pending() != 0 {
		t.Fatal("pending")
	}
	persist(s, 1, 2)
	m = m.Crash(func() bool { return false })
	s, err := Open(m, "/d", "disk0", Options{NoAutoTrim: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Discard(); err != nil { // instead of Replay
		t.Fatal(err)
	}
	if got := stamps(t, s); got[1] != 0 {
		t.Fatal("a discarded epoch was applied")
	}
	m = m.Crash(func() bool { return false })
	if s = openStore(t, m, "/d"); stamps(t, s)[1] != 0 {
		t.Fatal("a discarded epoch came back")
	}
}

// resum makes the checksum of a slot right again.
func resum(p []byte) {
	c := crc32.Checksum(p[:slotUsed-4], castagnoli)
	binary.LittleEndian.PutUint32(p[slotUsed-4:], c)
}

// A replica must not be called good before what was copied into it is durable.
func TestLeavingInconsistentMakesTheCopyDurable(t *testing.T) {
	m := vfs.NewMem()
	p := testParams()
	p.State = model.Inconsistent
	if err := Create(m, "/d", p); err != nil {
		t.Fatal(err)
	}
	s := openStore(t, m, "/d")
	if err := s.WriteAt(filled(5, 3*BlockSize), 0); err != nil {
		t.Fatal(err)
	}
	if err := s.SetMeta(func(m *Meta) { m.State, m.Run = model.UpToDate, "r2" }); err != nil {
		t.Fatal(err)
	}
	s = openStore(t, m.Crash(func() bool { return false }), "/d")
	if m := s.Meta(); m.State != model.UpToDate || m.Run != "r2" || stamps(t, s)[2] != 5 {
		t.Fatalf("%+v %v", m, stamps(t, s)[:4])
	}
}
