package blockstore

import (
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"perdure/internal/vfs"
)

// TestLoggedAhead writes a disk from its beginning to its end: the activity log is
// synced seldom, up to the last extent, and a slow sync does not hold the writer up.
func TestLoggedAhead(t *testing.T) {
	fsys := vfs.NewMem()
	p := testParams()
	p.Size = 256 * ExtentSize
	if err := Create(fsys, "d", p); err != nil {
		t.Fatal(err)
	}
	s, err := Open(fsys, "d", p.ID, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Replay(); err != nil {
		t.Fatal(err)
	}
	coming := func() bool {
		s.act.mu.Lock()
		defer s.act.mu.Unlock()
		return s.act.coming
	}
	var syncs atomic.Int64
	var once sync.Once
	held, free := make(chan struct{}), make(chan struct{})
	fsys.SetHook(func(op vfs.Op) error {
		if op.Kind == "sync" && strings.HasSuffix(op.Path, ".log") && syncs.Add(1) > 5 && coming() {
			once.Do(func() { close(held); <-free })
		}
		return nil
	})
	isHot := func(no int64) bool {
		s.act.mu.Lock()
		defer s.act.mu.Unlock()
		e := s.act.find(no)
		return e != nil && e.state == exHot
	}
	b := make([]byte, BlockSize)
	b[0] = 1
	slow, done := 0, false // extents written during the slow sync; it is over
	for no := range int64(256) {
		select {
		case <-held:
			if !done && isHot(no) {
				slow++
			} else if !done {
				close(free) // the writer has come to the end of what is logged
				done = true
			}
		default:
		}
		if err := s.WriteAt(b, no*ExtentSize); err != nil {
			t.Fatal(err)
		}
		for end := time.Now().Add(10 * time.Second); coming() && time.Now().Before(end); time.Sleep(50 * time.Microsecond) {
			select {
			case <-held:
				if !done {
					end = time.Time{} // the slow one does not end by itself
				}
			default:
			}
		}
	}
	if !done || slow < 3 {
		t.Errorf("during a slow sync of the log %d extents could be written", slow)
	}
	if n := syncs.Load(); n < 7 || n > 16 {
		t.Errorf("the log was synced %d times for 256 extents", n)
	}
	fsys.SetHook(nil)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestLoggedAheadAndCrash loses the power in the middle of a sequential write:
// whatever was written lies in the log.
func TestLoggedAheadAndCrash(t *testing.T) {
	for at := range 40 {
		fsys := vfs.NewMem()
		p := testParams()
		p.Size = 64 * ExtentSize
		if err := Create(fsys, "d", p); err != nil {
			t.Fatal(err)
		}
		s, err := Open(fsys, "d", p.ID, Options{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Replay(); err != nil {
			t.Fatal(err)
		}
		first := fsys.Ops()
		fsys.SetHook(func(op vfs.Op) error {
			if op.Index >= first+at*3 {
				return vfs.ErrCrashed
			}
			return nil
		})
		b := make([]byte, BlockSize)
		b[0] = 1
		for no := int64(0); no < 64 && s.WriteAt(b, no*ExtentSize) == nil; no++ {
		}
		fsys = fsys.Crash(func() bool { return true })
		_ = s.Close() // of a host without power
		s, err = Open(fsys, "d", p.ID, Options{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Replay(); err != nil {
			t.Fatal(err)
		}
		marks, got := s.Missing(), make([]byte, BlockSize)
		for no := range int64(64) {
			if err := s.ReadAt(got, no*ExtentSize); err != nil {
				t.Fatal(err)
			}
			if got[0] != 0 && !marks.Test(no*ExtentSize/ChunkSize) {
				t.Fatalf("crash after %d operations: extent %d was written and is not in the log", at*3, no)
			}
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
