package mirror

import (
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
