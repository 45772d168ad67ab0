package shim

import (
	"context"
	"testing"
	"time"
)

// standingDisk is a disk whose writes begin, and do not come back before release.
type standingDisk struct {
	servedDisk
	begun   chan struct{}
	release chan struct{}
}

func (d *standingDisk) WriteAt(context.Context, []byte, int64, bool) error {
	d.begun <- struct{}{}
	<-d.release
	return nil
}

// countDisk counts writes.
type countDisk struct {
	servedDisk
	n int
}

func (d *countDisk) WriteAt(context.Context, []byte, int64, bool) error { d.n++; return nil }

// TestSlotOfADiskThatStands: a change of level waits for requests under way, but not for
// those that stand in a replica that was given up; nor does the guest.
func TestSlotOfADiskThatStands(t *testing.T) {
	old := &standingDisk{begun: make(chan struct{}), release: make(chan struct{})}
	s := newSlot(old)
	stuck := make(chan error, 1)
	go func() { stuck <- s.WriteAt(context.Background(), nil, 0, false) }()
	<-old.begun
	next := &countDisk{}
	set := make(chan struct{})
	go func() { s.set(next); close(set) }()
	select {
	case <-set:
		t.Fatal("a request that is under way was not waited for")
	case <-time.After(50 * time.Millisecond):
	}
	close(old.release)
	<-set
	<-stuck

	old = &standingDisk{begun: make(chan struct{}), release: make(chan struct{})}
	s = newSlot(old)
	go func() { stuck <- s.WriteAt(context.Background(), nil, 0, false) }()
	<-old.begun
	s.renew()
	set = make(chan struct{})
	go func() { s.set(next); close(set) }()
	select {
	case <-set:
	case <-time.After(20 * time.Second):
		t.Fatal("the change waits for a request that stands in a replica that was given up")
	}
	if err := s.WriteAt(context.Background(), nil, 0, false); err != nil || next.n != 1 {
		t.Errorf("after the change: %v, %d writes", err, next.n)
	}
	close(old.release)
	<-stuck
}
