package shim

import (
	"context"
	"sync"
	"sync/atomic"

	"perdure/internal/nbd"
)

// servedDisk is a disk as one level has it.
type servedDisk interface {
	nbd.Backend
	nbd.Allocator
}

// diskSlot is a disk as QEMU sees it, whatever the level: what stands behind it
// changes with the level, while QEMU stays connected. It implements nbd.Backend,
// nbd.Allocator, nbd.Waiter and nbd.Starter.
//
// Invariant: requests that began before a change have ended when it returns, so none
// escapes what the new level asks of it.
type diskSlot struct {
	change sync.Mutex // held by set and renew
	now    atomic.Pointer[slotDoor]
}

// slotDoor is a way to what stands behind a slot.
type slotDoor struct {
	mu sync.RWMutex // held shared by each request from start to end
	b  servedDisk
}

func newSlot(b servedDisk) *diskSlot {
	s := &diskSlot{}
	s.now.Store(&slotDoor{b: b})
	return s
}

// enter lets a request in; it ends with RUnlock.
func (s *diskSlot) enter() *slotDoor {
	for {
		d := s.now.Load()
		d.mu.RLock()
		if s.now.Load() == d {
			return d
		}
		d.mu.RUnlock() // renewed meanwhile
	}
}

// slotDisks puts a slot between QEMU and each disk.
func (i *instance) slotDisks(exports map[string]nbd.Backend) {
	for _, d := range i.cfg.Spec.Disks {
		b, _ := exports[d.ID].(servedDisk) // each is one
		s := newSlot(b)
		i.slots = append(i.slots, s)
		exports[d.ID] = s
	}
}

// set changes what stands behind the slot. It waits for the requests under way.
func (s *diskSlot) set(b servedDisk) {
	s.change.Lock()
	defer s.change.Unlock()
	d := s.now.Load()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.b = b
}

// renew is for a replica that was given up because it does not answer: the requests
// under way, whose client is cut off, may stand in it for ever, and are not
// waited for any more. Whatever becomes of them, they reach no other replica (see package mirror).
func (s *diskSlot) renew() {
	s.change.Lock()
	defer s.change.Unlock()
	s.now.Store(&slotDoor{b: s.now.Load().b})
}

// Size implements nbd.Backend; it is the same whatever stands behind.
func (s *diskSlot) Size() int64 {
	d := s.enter()
	defer d.mu.RUnlock()
	return d.b.Size()
}

// ReadAt implements nbd.Backend.
func (s *diskSlot) ReadAt(ctx context.Context, p []byte, off int64) error {
	d := s.enter()
	defer d.mu.RUnlock()
	return d.b.ReadAt(ctx, p, off)
}

// WriteAt implements nbd.Backend.
func (s *diskSlot) WriteAt(ctx context.Context, p []byte, off int64, fua bool) error {
	d := s.enter()
	defer d.mu.RUnlock()
	return d.b.WriteAt(ctx, p, off, fua)
}

// StartWrite implements nbd.Starter, where what stands behind does.
func (s *diskSlot) StartWrite(ctx context.Context, p []byte, off int64, done func(error)) bool {
	d := s.now.Load()
	if !d.mu.TryRLock() {
		return false
	}
	b, ok := d.b.(nbd.Starter)
	if ok && s.now.Load() == d { // else renewed meanwhile
		ok = b.StartWrite(ctx, p, off, func(err error) {
			d.mu.RUnlock()
			done(err)
		})
	} else {
		ok = false
	}
	if !ok {
		d.mu.RUnlock()
	}
	return ok
}

// Zero implements nbd.Backend.
func (s *diskSlot) Zero(ctx context.Context, off, n int64, fua, punch bool) error {
	d := s.enter()
	defer d.mu.RUnlock()
	return d.b.Zero(ctx, off, n, fua, punch)
}

// Flush implements nbd.Backend.
func (s *diskSlot) Flush(ctx context.Context) error {
	d := s.enter()
	defer d.mu.RUnlock()
	return d.b.Flush(ctx)
}

// Extent implements nbd.Allocator.
func (s *diskSlot) Extent(ctx context.Context, off, n int64) (int64, bool, error) {
	d := s.enter()
	defer d.mu.RUnlock()
	return d.b.Extent(ctx, off, n)
}

// Waits implements nbd.Waiter. A change may be waiting for the lock, and this must not.
func (s *diskSlot) Waits() bool {
	d := s.now.Load()
	if !d.mu.TryRLock() {
		return true
	}
	defer d.mu.RUnlock()
	w, ok := d.b.(nbd.Waiter)
	return ok && w.Waits()
}
