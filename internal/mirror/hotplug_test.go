package mirror

import (
	"context"
	"testing"
)

// TestChangeOfDisks: disks come and go while there is no peer; a peer then sees them under
// the numbers that both sides have.
func TestChangeOfDisks(t *testing.T) {
	a, b, c := newMem(1<<20), newMem(1<<20), newMem(1<<20)
	s := NewSource([]Replica{a, b})
	e, err := s.Add(c)
	if err != nil || s.Export(2) != e {
		t.Fatal(err)
	}
	if err := s.Remove(0, func() {
		if len(s.disks()) != 3 {
			t.Error("numbered anew before the others")
		}
	}); err != nil {
		t.Fatal(err)
	}
	if s.Export(1) != e || e.n.Load() != 1 || s.Export(0).n.Load() != 0 || len(s.disks()) != 2 {
		t.Errorf("numbers after a removal: %d %d", s.Export(0).n.Load(), e.n.Load())
	}
	big := newMem(2 << 20)
	e, err = s.Replace(1, big)
	if err != nil || s.Export(1) != e || e.Size() != 2<<20 {
		t.Errorf("replaced: %v", err)
	}
	if err := s.Join(func(...[]byte) error { return nil }, func() error { return nil }); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Add(a); err == nil {
		t.Error("a disk was added while a peer follows")
	}
	if err := s.Remove(0, func() { t.Error("others were told") }); err == nil {
		t.Error("a disk was removed while a peer follows")
	}
	if _, err := s.Replace(0, a); err == nil {
		t.Error("a disk was replaced while a peer follows")
	}
}

// TestDisksChangeBesideRequests: a request that takes long, of another disk, holds up neither the
// change of the disks nor, behind that, the requests of all others.
func TestDisksChangeBesideRequests(t *testing.T) {
	slow, b := newMem(1<<20), newMem(1<<20)
	begun, goOn := make(chan struct{}), make(chan struct{})
	slow.slow = func() { close(begun); <-goOn }
	s := NewSource([]Replica{slow, b})
	ctx := context.Background()
	stands := make(chan error, 1)
	go func() { stands <- s.Export(0).WriteAt(ctx, fill(1, 512), 0, false) }()
	<-begun
	over := make(chan error, 1)
	go func() {
		_, err := s.Add(newMem(4096))
		if err == nil {
			err = s.Export(1).WriteAt(ctx, fill(1, 512), 0, false)
		}
		if err == nil {
			_, err = s.Replace(1, newMem(2<<20))
		}
		if err == nil {
			err = s.Remove(2, func() {})
		}
		over <- err
	}()
	if err := inTime(t, over); err != nil {
		t.Error(err)
	}
	close(goOn)
	if err := inTime(t, stands); err != nil {
		t.Error(err)
	}
	if n := len(s.disks()); n != 2 || s.Export(1).Size() != 2<<20 {
		t.Errorf("%d disks, the second of %d bytes", n, s.Export(1).Size())
	}
}
