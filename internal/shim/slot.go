package shim

import (
	"context"
	"sync"

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
	mu sync.RWMutex // held shared by each request from start to end
	b  servedDisk
}

// slotDisks puts a slot between QEMU and each disk.
func (i *instance) slotDisks(exports map[string]nbd.Backend) {
	for _, d := range i.cfg.Spec.Disks {
		s := &diskSlot{}
		s.b, _ = exports[d.ID].(servedDisk) // each is one
		i.slots = append(i.slots, s)
		exports[d.ID] = s
	}
}

// set changes what stands behind the slot. It waits for the requests under way.
func (s *diskSlot) set(b servedDisk) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.b = b
}

// Size implements nbd.Backend; it is the same whatever stands behind.
func (s *diskSlot) Size() int64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.b.Size()
}

// ReadAt implements nbd.Backend.
func (s *diskSlot) ReadAt(ctx context.Context, p []byte, off int64) error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.b.ReadAt(ctx, p, off)
}

// WriteAt implements nbd.Backend.
func (s *diskSlot) WriteAt(ctx context.Context, p []byte, off int64, fua bool) error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.b.WriteAt(ctx, p, off, fua)
}

// StartWrite implements nbd.Starter, where what stands behind does.
func (s *diskSlot) StartWrite(ctx context.Context, p []byte, off int64, done func(error)) bool {
	if !s.mu.TryRLock() {
		return false
	}
	b, ok := s.b.(nbd.Starter)
	if ok {
		ok = b.StartWrite(ctx, p, off, func(err error) {
			s.mu.RUnlock()
			done(err)
		})
	}
	if !ok {
		s.mu.RUnlock()
	}
	return ok
}

// Zero implements nbd.Backend.
func (s *diskSlot) Zero(ctx context.Context, off, n int64, fua, punch bool) error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.b.Zero(ctx, off, n, fua, punch)
}

// Flush implements nbd.Backend.
func (s *diskSlot) Flush(ctx context.Context) error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.b.Flush(ctx)
}

// Extent implements nbd.Allocator.
func (s *diskSlot) Extent(ctx context.Context, off, n int64) (int64, bool, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.b.Extent(ctx, off, n)
}

// Waits implements nbd.Waiter. A change may be waiting for the lock, and this must not.
func (s *diskSlot) Waits() bool {
	if !s.mu.TryRLock() {
		return true
	}
	defer s.mu.RUnlock()
	w, ok := s.b.(nbd.Waiter)
	return ok && w.Waits()
}
