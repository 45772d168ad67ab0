package mirror

import (
	"context"
	"errors"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// stallRig is a rig whose local replica stands still while stall is set.
type stallRig struct {
	*rig
	o       *record
	e       *Export
	stall   atomic.Bool
	entered chan struct{} // a change that stands
	release chan struct{}
}

func newStallRig(t *testing.T) *stallRig {
	r := &stallRig{rig: newRig(t, 64<<10), entered: make(chan struct{}, 8), release: make(chan struct{})}
	r.o = r.own()
	r.mine.slow = func() {
		if r.stall.Load() {
			r.entered <- struct{}{}
			<-r.release
		}
	}
	r.join()
	r.e = r.src.Export(0)
	return r
}

// giveUp has the replica stand still under a write of b at 0, gives it up, and
// returns the answer to that write.
func (r *stallRig) giveUp(ctx context.Context, b byte) <-chan error {
	r.t.Helper()
	r.stall.Store(true)
	stuck := make(chan error, 1)
	go func() { stuck <- r.e.WriteAt(ctx, fill(b, 4096), 0, false) }()
	<-r.entered
	return stuck
}

func (r *stallRig) waiting(n int) {
	r.t.Helper()
	o := r.e.overlap.Load()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		o.mu.Lock()
		have := len(o.list)
		o.mu.Unlock()
		if have >= n {
			return
		}
		if time.Now().After(end) {
			r.t.Fatalf("%d changes, want %d", have, n)
		}
	}
}

// TestGivenUpUndoesNothing: changes that waited for one that stands still are asked
// anew by the client, who goes on; they must not be carried out after that.
func TestGivenUpUndoesNothing(t *testing.T) {
	r := newStallRig(t)
	old, cut := context.WithCancel(context.Background())
	defer cut()
	stuck := r.giveUp(old, 1)
	behind := make(chan error, 1)
	go func() { behind <- r.e.WriteAt(old, fill(2, 4096), 0, false) }()
	r.waiting(2)
	if !r.src.GiveUp(0, syscall.ETIMEDOUT) {
		t.Fatal("not given up")
	}
	cut()
	r.o.wait(t, "lost 0: connection timed out")
	r.src.Carry(true)
	ctx := context.Background()
	for _, b := range []byte{1, 2, 3} { // asked anew, and something newer
		if err := r.e.WriteAt(ctx, fill(b, 4096), 0, false); err != nil {
			t.Fatal(err)
		}
	}
	close(r.release)
	if err := inTime(t, behind); err == nil {
		t.Error("a change of a client that was cut off was answered as done")
	}
	inTime(t, stuck) //nolint:errcheck // it was asked anew, nobody hears it
	if err := r.e.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	if got := r.theirs.bytes(false)[0]; got != 3 {
		t.Errorf("the peer has %d: an answered write was undone by one that was older", got)
	}
	p := make([]byte, 4096)
	if err := r.e.ReadAt(ctx, p, 0); err != nil || p[0] != 3 {
		t.Errorf("read %d, %v", p[0], err)
	}
}

// TestCutOffIsNotSent: what comes of a client that was cut off is not sent any more.
func TestCutOffIsNotSent(t *testing.T) {
	r := newRig(t, 64<<10)
	r.join()
	e := r.src.Export(0)
	cut, stop := context.WithCancel(context.Background())
	stop()
	for name, do := range map[string]func() error{
		"write": func() error { return e.WriteAt(cut, fill(1, 4096), 0, false) },
		"zero":  func() error { return e.Zero(cut, 0, 4096, false, true) },
		"flush": func() error { return e.Flush(cut) },
	} {
		if err := do(); !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if n := r.src.link.Load().next.Load(); n != 0 {
		t.Errorf("%d requests were sent", n)
	}
	if r.mine.bytes(false)[0] != 0 {
		t.Error("it was carried out here")
	}
}

// TestGivenUpHoldsUpNobody: a change that the kernel holds for ever keeps no peer from
// joining, and no disk from being changed, once a new replica has taken the place.
func TestGivenUpHoldsUpNobody(t *testing.T) {
	r := newStallRig(t)
	old, cut := context.WithCancel(context.Background())
	stuck := r.giveUp(old, 1)
	if !r.src.GiveUp(0, syscall.ETIMEDOUT) {
		t.Fatal("not given up")
	}
	cut()
	r.o.wait(t, "lost 0: connection timed out")
	r.src.Carry(true)
	ctx := context.Background()
	fresh := newMem(64 << 10)
	if err := r.src.Refill(ctx, 0, fresh, func(int64) {}, func() error { return nil }); err != nil {
		t.Fatal(err)
	}
	r.o.wait(t, "back")
	r.src.Alone()
	joined := make(chan error, 1)
	go func() { joined <- r.src.Join(r.send, func() error { return nil }) }()
	if err := inTime(t, joined); err != nil {
		t.Error(err)
	}
	if err := r.e.WriteAt(ctx, fill(3, 4096), 0, false); err != nil || fresh.bytes(false)[0] != 3 {
		t.Errorf("write after that: %v", err)
	}
	close(r.release)
	inTime(t, stuck) //nolint:errcheck // nobody hears it
	r.src.Alone()
	if _, err := r.src.Add(newMem(4096)); err != nil { // the account of who is inside is right
		t.Error(err)
	}
}

// TestLostTooLate: an error that is judged only after the peer was dropped gives
// nothing up: there is nobody to go on with, and nobody would take it back.
func TestLostTooLate(t *testing.T) {
	r := newRig(t, 64<<10)
	r.own()
	r.join()
	e, ctx := r.src.Export(0), context.Background()
	reached, goOn := make(chan struct{}), make(chan struct{})
	r.mine.slow = func() { close(reached); <-goOn }
	r.mine.failing(syscall.ENOSPC, nil)
	answer := make(chan error, 1)
	go func() { answer <- e.WriteAt(ctx, fill(1, 512), 0, false) }()
	<-reached
	r.src.Alone()
	close(goOn)
	if err := inTime(t, answer); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("the guest was told %v", err)
	}
	r.mine.slow = nil
	r.mine.failing(nil, nil)
	if err := e.WriteAt(ctx, fill(3, 512), 0, false); err != nil || r.mine.bytes(false)[0] != 3 {
		t.Errorf("with room again: %v; carried: %v", err, r.src.Carried())
	}
}

// TestFlushAcrossReturn: a FLUSH that the peer takes long for, while the replica here
// comes back, is answered.
func TestFlushAcrossReturn(t *testing.T) {
	r := newRig(t, 64<<10)
	o := r.own()
	r.join()
	e, ctx := r.src.Export(0), context.Background()
	r.src.Carry(true)
	r.mine.failing(syscall.EIO, syscall.EIO)
	if err := e.WriteAt(ctx, fill(1, 512), 0, false); err != nil {
		t.Fatal(err)
	}
	o.wait(t, "lost 0: input/output error")
	begun, goOn := make(chan struct{}, 1), make(chan struct{})
	r.theirs.slow = func() { begun <- struct{}{}; <-goOn }
	flushed := make(chan error, 1)
	go func() { flushed <- e.Flush(ctx) }()
	<-begun
	fresh := newMem(64 << 10)
	if err := r.src.Refill(ctx, 0, fresh, func(int64) {}, func() error { return nil }); err != nil {
		t.Fatal(err)
	}
	o.wait(t, "back")
	close(goOn)
	if err := inTime(t, flushed); err != nil {
		t.Error(err)
	}
}

// TestWaitingEndsWithItsContext: what waits for a range, for changes to which no answer may
// ever come, ends with its owner.
func TestWaitingEndsWithItsContext(t *testing.T) {
	r := newRig(t, 64<<10)
	o := r.own()
	r.join()
	e, ctx := r.src.Export(0), context.Background()
	r.src.Carry(true)
	r.mine.failing(syscall.EIO, syscall.EIO)
	if err := e.WriteAt(ctx, fill(1, 512), 0, false); err != nil {
		t.Fatal(err)
	}
	o.wait(t, "lost 0: input/output error")
	r.cutNow()
	wrote := make(chan error, 1)
	go func() { wrote <- e.WriteAt(ctx, fill(2, 512), 4096, false) }()
	for end := time.Now().Add(20 * time.Second); r.src.Oldest() == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("nothing waits for the peer")
		}
	}
	for name, do := range map[string]func(ctx context.Context) error{
		"verify": func(ctx context.Context) error { return r.src.Still(ctx, 0, 0, 8192, func() error { return nil }) },
		"refill": func(ctx context.Context) error {
			return r.src.Refill(ctx, 0, newMem(64<<10), func(int64) {}, func() error { return nil })
		},
	} {
		over, end := context.WithCancel(ctx)
		ended := make(chan error, 1)
		go func() { ended <- do(over) }()
		waits(t, ended, name+": a change is under way in the range")
		end()
		if err := inTime(t, ended); !errors.Is(err, context.Canceled) {
			t.Errorf("%s ended with %v", name, err)
		}
	}
	r.src.Close()
	inTime(t, wrote) //nolint:errcheck // it is closed
}
