package shim

import (
	"errors"
	"testing"
	"time"
)

// slowOutlet takes frames while the kernel's gate is open; each takes a while.
type slowOutlet struct {
	k          *kernel
	took       time.Duration
	sent, lost int
	each       func()
}

func (o *slowOutlet) Send([]byte, int) error {
	if o.k.open() {
		o.sent++
	} else {
		o.lost++
	}
	*o.k.now += o.took
	if o.each != nil {
		o.each()
	}
	return nil
}

// TestLongSendLosesNothing sends for much longer than a right lasts, while the
// secondary goes on to confirm.
func TestLongSendLosesNothing(t *testing.T) {
	g, k, now := newTestGate()
	g.setRule(ruleAcked)
	g.confirm(*now)
	out := &slowOutlet{k: k, took: 2 * time.Millisecond}
	out.each = func() { g.confirm(*now - 5*time.Millisecond) } // a tick finds the sender busy
	frame := make([]byte, 1<<10)
	ok, err := g.whileOpen(func() error {
		p := g.pieced(out)
		for range 2000 { // 4 s
			if err := p.Send(frame, 10); err != nil {
				return err
			}
		}
		return nil
	})
	if !ok || err != nil || out.lost != 0 || out.sent != 2000 {
		t.Errorf("%v, %v; sent %d, lost %d to the closed gate", ok, err, out.sent, out.lost)
	}
}

// TestLongSendWithoutRight: nothing is sent when the right has run out for good.
func TestLongSendWithoutRight(t *testing.T) {
	g, k, now := newTestGate()
	start := time.Now()
	g.now = func() time.Duration { return *now + time.Since(start) } // it waits by the clock
	g.setRule(ruleAcked)
	g.confirm(g.now())
	out := &slowOutlet{k: k, took: 0}
	_, err := g.whileOpen(func() error {
		p := g.pieced(out)
		if err := p.Send(make([]byte, pieceBytes), 10); err != nil {
			return err
		}
		*now += 400 * time.Millisecond
		return p.Send(make([]byte, 100), 10)
	})
	if !errors.Is(err, errShut) || out.sent != 1 || out.lost != 0 {
		t.Errorf("%v; sent %d, lost %d", err, out.sent, out.lost)
	}
}
