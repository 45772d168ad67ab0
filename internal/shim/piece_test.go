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

// TestLongSendGivesUpOnce: when the right does not come back, all that is left
// is given up together; and at once if the rule became stricter, since the new
// right may depend on the one who waits here.
func TestLongSendGivesUpOnce(t *testing.T) {
	for _, strict := range []bool{false, true} {
		g, k, now := newTestGate()
		waits, step := 0, time.Duration(0)
		g.now = func() time.Duration { waits++; *now += step; return *now }
		g.setRule(ruleFree)
		out := &slowOutlet{k: k}
		_, err := g.whileOpen(func() error {
			p := g.pieced(out)
			if err := p.Send(make([]byte, pieceBytes), 10); err != nil {
				return err
			}
			if strict {
				g.setRule(ruleAcked)
			} else {
				g.rule, p.rule, g.openTill = ruleNone, ruleNone, 0 // closed, and not because the rule changed
			}
			waits, step = 0, 100*time.Millisecond
			var err error
			for range 1000 {
				err = p.Send(make([]byte, 100), 10)
			}
			return err
		})
		if !errors.Is(err, errShut) || out.sent != 1 || out.lost != 0 {
			t.Errorf("strict %v: %v; sent %d, lost %d", strict, err, out.sent, out.lost)
		}
		if limit := 50; waits > limit {
			t.Errorf("strict %v: looked at the clock %d times for 1,000 frames, at most %d expected", strict, waits, limit)
		}
		if strict && waits > 5 {
			t.Errorf("waited for a right that cannot come: %d looks at the clock", waits)
		}
	}
}
