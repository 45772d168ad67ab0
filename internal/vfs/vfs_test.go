package vfs

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func all() bool  { return true }
func none() bool { return false }

func write(t *testing.T, f File, s string, off int64) {
	t.Helper()
	if _, err := f.WriteAt([]byte(s), off); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, fsys FS, path string) string {
	t.Helper()
	f, err := fsys.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	n, err := f.Size()
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, n)
	if _, err := f.ReadAt(p, 0); err != nil {
		t.Fatal(err)
	}
	return string(p)
}

// TestBothFileSystems runs what the block store relies on against OS and Mem.
func TestBothFileSystems(t *testing.T) {
	for name, fsys := range map[string]FS{"os": OS{}, "mem": NewMem()} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "a")
			if _, err := fsys.Open(path); !errors.Is(err, fs.ErrNotExist) {
				t.Fatal(err)
			}
			f, err := fsys.Create(path)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := fsys.Create(path); !errors.Is(err, fs.ErrExist) {
				t.Fatal(err)
			}
			if err := f.Truncate(1 << 20); err != nil {
				t.Fatal(err)
			}
			if n, hole, err := f.Extent(4096, 8192); n != 8192 || !hole || err != nil {
				t.Fatal(n, hole, err)
			}
			page := bytes.Repeat([]byte("x"), 128<<10)
			write(t, f, string(page), 64<<10)
			if n, hole, err := f.Extent(0, 1<<20); n != 64<<10 || !hole || err != nil {
				t.Fatal(n, hole, err)
			}
			if n, hole, err := f.Extent(64<<10, 1<<20-64<<10); n != 128<<10 || hole || err != nil {
				t.Fatal(n, hole, err)
			}
			for _, punch := range []bool{false, true} {
				if err := f.Zero(64<<10+512, 96<<10, punch); err != nil {
					t.Fatal(err)
				}
				got := make([]byte, 128<<10)
				if _, err := f.ReadAt(got, 64<<10); err != nil {
					t.Fatal(err)
				}
				want := bytes.Clone(page)
				clear(want[512 : 512+96<<10])
				if !bytes.Equal(got, want) {
					t.Fatalf("zero, punch=%v", punch)
				}
			}
			if n, hole, err := f.Extent(68<<10, 4096); n != 4096 || !hole || err != nil {
				t.Fatal("not punched", n, hole, err)
			}
			if n, err := f.Size(); n != 1<<20 || err != nil {
				t.Fatal(n, err)
			}
			if _, err := f.ReadAt(make([]byte, 2), 1<<20-1); err == nil {
				t.Fatal("read beyond the end")
			}
			if err := f.Sync(); err != nil {
				t.Fatal(err)
			}
			if err := f.Close(); err != nil {
				t.Fatal(err)
			}
			for _, s := range []string{"one", "two"} {
				if err := ReplaceFile(fsys, path, []byte(s)); err != nil {
					t.Fatal(err)
				}
				if got := read(t, fsys, path); got != s {
					t.Fatal(got)
				}
			}
			if err := fsys.Remove(path); err != nil {
				t.Fatal(err)
			}
			if ok, err := fsys.Exists(path); ok || err != nil {
				t.Fatal(ok, err)
			}
		})
	}
}

// TestZeroWithoutFallocate covers file systems that can neither punch nor zero.
func TestZeroWithoutFallocate(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "a"))
	if err != nil {
		t.Fatal(err)
	}
	o := osFile{f}
	defer func() { _ = o.Close() }()
	write(t, o, "abcdefgh", 0)
	if err := o.writeZeroes(2, 3); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 8)
	if _, err := o.ReadAt(p, 0); err != nil || string(p) != "ab\x00\x00\x00fgh" {
		t.Fatalf("%q %v", p, err)
	}
	err = o.control("try", func(int) error { return unix.EIO })
	if !errors.Is(err, unix.EIO) {
		t.Fatal(err)
	}
}

func TestCrashLosesWhatWasNotSynced(t *testing.T) {
	build := func() *Mem {
		m := NewMem()
		f, err := m.Create("/d/a")
		if err != nil {
			t.Fatal(err)
		}
		write(t, f, "old", 0)
		if err := f.Sync(); err != nil {
			t.Fatal(err)
		}
		if err := m.SyncDir("/d"); err != nil {
			t.Fatal(err)
		}
		write(t, f, "new", 0)
		if _, err := m.Create("/d/b"); err != nil {
			t.Fatal(err)
		}
		return m
	}
	m := build().Crash(none)
	if got := read(t, m, "/d/a"); got != "old" {
		t.Fatal(got)
	}
	if ok, _ := m.Exists("/d/b"); ok {
		t.Fatal("name survived without SyncDir")
	}
	m = build().Crash(all)
	if got := read(t, m, "/d/a"); got != "new" {
		t.Fatal(got)
	}
	if ok, _ := m.Exists("/d/b"); !ok {
		t.Fatal("name is gone")
	}
	// Torn: every other sector.
	m = NewMem()
	f, _ := m.Create("/a")
	_ = m.SyncDir("/")
	write(t, f, string(bytes.Repeat([]byte("y"), 4*Sector)), 0)
	k := 0
	m = m.Crash(func() bool { k++; return k%2 == 0 })
	if got := read(t, m, "/a"); got[0] != 0 || got[Sector] != 'y' || got[2*Sector] != 0 {
		t.Fatal("not torn")
	}
	if _, err := f.WriteAt([]byte("x"), 0); !errors.Is(err, ErrCrashed) {
		t.Fatal(err)
	}
}

func TestFailedSyncLosesData(t *testing.T) {
	m := NewMem()
	f, _ := m.Create("/a")
	_ = m.SyncDir("/")
	write(t, f, "data", 0)
	fail := true
	m.SetHook(func(op Op) error {
		if op.Kind == "sync" && fail {
			fail = false
			return unix.EIO
		}
		return nil
	})
	if err := f.Sync(); !errors.Is(err, unix.EIO) {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil { // as the kernel does: success, and nothing is there
		t.Fatal(err)
	}
	if got := read(t, m, "/a"); got != "data" {
		t.Fatal(got)
	}
	if got := read(t, m.Crash(all), "/a"); got != "" {
		t.Fatalf("%q came back", got)
	}
}

func TestReplaceFileIsAtomic(t *testing.T) {
	build := func() *Mem {
		m := NewMem()
		if err := ReplaceFile(m, "/d/a", []byte("old")); err != nil {
			t.Fatal(err)
		}
		return m
	}
	ref := build()
	from := ref.Ops()
	if err := ReplaceFile(ref, "/d/a", []byte("newer")); err != nil {
		t.Fatal(err)
	}
	for stop := from; stop <= ref.Ops(); stop++ {
		for _, keep := range []func() bool{all, none} {
			m := build()
			m.SetHook(func(op Op) error {
				if op.Index >= stop {
					return ErrCrashed
				}
				return nil
			})
			err := ReplaceFile(m, "/d/a", []byte("newer"))
			m = m.Crash(keep)
			got := read(t, m, "/d/a")
			if got != "old" && got != "newer" || err == nil && got != "newer" {
				t.Fatalf("crash at %d, error %v: %q", stop, err, got)
			}
			if err := ReplaceFile(m, "/d/a", []byte("again")); err != nil || read(t, m, "/d/a") != "again" {
				t.Fatal("not usable after the crash", err)
			}
		}
	}
}
