package vfs

import (
	"errors"
	"testing"
	"time"
)

func TestWatchTellsWhatIsUnderWay(t *testing.T) {
	now := 5 * time.Second
	m := NewMem()
	w := NewWatch(m, func() time.Duration { return now })
	f, err := w.Create("/d/a")
	if err != nil {
		t.Fatal(err)
	}
	if w.Oldest() != 0 {
		t.Fatal("something is under way")
	}
	held, release := make(chan bool), make(chan bool)
	m.SetHook(func(op Op) error {
		if op.Kind == "sync" {
			held <- true
			<-release
		}
		return nil
	})
	done := make(chan error)
	go func() { done <- f.Sync() }()
	<-held
	now += 3 * time.Second
	write(t, f, "x", 0)
	if got := w.Oldest(); got != 3*time.Second {
		t.Fatal(got)
	}
	close(release)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if w.Oldest() != 0 {
		t.Fatal("it has ended")
	}
}

func TestLocksEnd(t *testing.T) {
	for name, fsys := range map[string]FS{"os": OS{}, "mem": NewMem()} {
		path := t.TempDir() + "/a"
		f, err := fsys.Create(path)
		if err != nil {
			t.Fatal(name, err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		f, err = fsys.OpenLocked(path)
		if err != nil {
			t.Fatal(name, err)
		}
		if _, err := fsys.OpenLocked(path); !errors.Is(err, ErrInUse) {
			t.Fatal(name, "opened twice:", err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		if f, err = fsys.OpenLocked(path); err != nil {
			t.Fatal(name, err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		r, err := fsys.OpenRead(path)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.WriteAt([]byte("x"), 0); err == nil {
			t.Fatal(name, "written to a file open for reading")
		}
	}
}
