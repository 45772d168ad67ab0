package mirror

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
)

// fillPiece is how much is copied at once while guest requests to it wait, in
// bytes; fillers is how many pieces are under way.
const (
	fillPiece = 256 << 10
	fillers   = 4
)

// ErrNotCarried refuses to refill a disk that has a whole replica here, or whose
// owner may not answer for the peer's alone.
var ErrNotCarried = errors.New("the disk is not carried by the peer")

// Refill gives a disk that is carried a replica on this side again, and copies
// into it what the peer has while the guest works. r may hold anything; it gets
// each change from the start. whole is called when all of it is durable and while
// nothing changes: it makes r good for use, durably. After an error the disk is
// carried as before, and r must not be used any more.
//
// progress is called now and then with how much was copied, in bytes.
func (s *Source) Refill(ctx context.Context, n int, r Replica, progress func(done int64), whole func() error) (err error) {
	if n < 0 || n >= len(s.disks()) {
		return fmt.Errorf("refill disk %d, there are %d", n, len(s.disks()))
	}
	e := s.disks()[n]
	if r.Size() != e.Size() {
		return fmt.Errorf("refill a disk of %d bytes with a replica of %d", e.Size(), r.Size())
	}
	filling := &local{r: r}
	s.mu.Lock()
	was := e.local.Load()
	ok := was.r == nil && s.carrying()
	if ok {
		e.local.Store(filling)
	}
	s.mu.Unlock()
	if !ok {
		return ErrNotCarried
	}
	defer func() {
		if err != nil {
			s.mu.Lock()
			e.local.CompareAndSwap(filling, &local{err: was.err, was: was.was})
			s.mu.Unlock()
		}
	}()
	if err := e.copyPeer(ctx, filling, progress); err != nil {
		return err
	}
	if err := r.Flush(ctx); err != nil { // most of it, while nobody waits
		return fmt.Errorf("make the copy durable: %w", err)
	}
	o := e.overlap.Load()
	held, err := o.lock(ctx, 0, e.Size())
	if err != nil {
		return err
	}
	defer o.unlock(held)
	if err := r.Flush(ctx); err != nil {
		return fmt.Errorf("make the copy durable: %w", err)
	}
	if err := whole(); err != nil {
		return err
	}
	return s.takeBack(e, filling)
}

// carrying is whether the peer alone may do. mu is held.
func (s *Source) carrying() bool {
	select {
	case <-s.carry:
		return true
	default:
		return false
	}
}

// takeBack makes a filled replica the one that answers. No change is under way.
func (s *Source) takeBack(e *Export, filled *local) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !e.local.CompareAndSwap(filled, &local{r: filled.r, reads: true}) {
		return fmt.Errorf("the new copy has failed: %w", e.local.Load().err)
	}
	e.inside.forgetAll() // of the replica before, which is never used again
	if len(s.Carried()) > 0 {
		return nil
	}
	// Nothing was answered since that is not here: whoever fails from now on waits
	// until the owner says anew that the peer alone is enough.
	s.setCarry(false)
	if s.owner.Back != nil {
		s.owner.Back()
	}
	return nil
}

// copyPeer copies the whole disk.
func (e *Export) copyPeer(ctx context.Context, l *local, progress func(int64)) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var next, done atomic.Int64
	var work sync.WaitGroup
	for range fillers {
		work.Go(func() {
			buf := make([]byte, fillPiece)
			for ctx.Err() == nil {
				off := next.Add(fillPiece) - fillPiece
				if off >= e.Size() {
					return
				}
				p := buf[:min(fillPiece, e.Size()-off)]
				moved, err := e.copyPiece(ctx, l, p, off)
				if pace := e.s.owner.Pace; err == nil && pace != nil {
					err = pace(ctx, int(e.n.Load()), moved)
				}
				if err != nil {
					cancel(err)
					return
				}
				progress(done.Add(int64(len(p))))
			}
		})
	}
	work.Wait()
	return context.Cause(ctx)
}

// copyPiece copies a range in which nothing changes meanwhile, and returns how many
// bytes of it were to be written.
func (e *Export) copyPiece(ctx context.Context, l *local, p []byte, off int64) (int64, error) {
	o := e.overlap.Load()
	held, err := o.lock(ctx, off, off+int64(len(p)))
	if err != nil {
		return 0, err
	}
	defer o.unlock(held)
	if e.local.Load() != l {
		return 0, fmt.Errorf("the new copy has failed: %w", e.local.Load().err)
	}
	if err := e.readPeer(ctx, p, off); err != nil {
		return 0, fmt.Errorf("read %d bytes at %d: %w", len(p), off, err)
	}
	if len(bytes.TrimLeft(p, "\x00")) > 0 {
		return int64(len(p)), l.r.WriteAt(ctx, p, off, false)
	}
	if n, hole, err := l.r.Extent(ctx, off, int64(len(p))); err == nil && hole && n == int64(len(p)) {
		return 0, nil
	}
	return 0, l.r.Zero(ctx, off, int64(len(p)), false, true)
}
