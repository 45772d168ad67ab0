package mirror

import (
	"bytes"
	"context"
	"errors"
	"sync/atomic"
	"syscall"
	"testing"
)

// TestRefillPace: a filling waits for its pace and is told what it moved, holes for
// nothing; guest requests to the piece do not wait with it; an error of the pace ends it.
func TestRefillPace(t *testing.T) {
	const size = 4 << 20
	r := newRig(t, size)
	ctx := context.Background()
	var moved atomic.Int64
	hold, held := make(chan struct{}), make(chan struct{}, 64)
	var fail atomic.Bool
	errPace := errors.New("the owner has had enough")
	r.src.Own(Owner{Lost: func(int, error) bool { return true }, Pace: func(ctx context.Context, disk int, n int64) error {
		moved.Add(n)
		held <- struct{}{}
		if fail.Load() {
			return errPace
		}
		select {
		case <-hold:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}})
	r.join()
	e := r.src.Export(0)
	if err := put(ctx, e, fill(1, 1<<20), 0, false); err != nil {
		t.Fatal(err)
	}
	r.mine.failing(syscall.EIO, syscall.EIO)
	r.src.Carry(true)
	if err := put(ctx, e, fill(2, 4096), 0, false); err != nil {
		t.Fatal(err)
	}
	fail.Store(true)
	if err := r.src.Refill(ctx, 0, newMem(size), func(int64) {}, nil); !errors.Is(err, errPace) {
		t.Fatalf("the pace failed, the filling says %v", err)
	}
	fail.Store(false)
	for len(held) > 0 {
		<-held
	}
	moved.Store(0)
	fresh, ended := newMem(size), make(chan error, 1)
	go func() { ended <- r.src.Refill(ctx, 0, fresh, func(int64) {}, func() error { return nil }) }()
	for range fillers {
		<-held
	}
	answers := make(chan error, 1)
	go func() { // all over the pieces that wait
		for off := int64(0); off < size; off += 64 << 10 {
			if err := put(ctx, e, fill(3, 4096), off, false); err != nil {
				answers <- err
				return
			}
		}
		answers <- nil
	}()
	if err := inTime(t, answers); err != nil {
		t.Error(err)
	}
	close(hold)
	if err := inTime(t, ended); err != nil {
		t.Fatal(err)
	}
	if n := moved.Load(); n < 1<<20 || n > size {
		t.Errorf("the pace was told of %d bytes", n)
	}
	if !bytes.Equal(fresh.bytes(false), r.theirs.bytes(false)) {
		t.Error("the replicas differ")
	}
}
