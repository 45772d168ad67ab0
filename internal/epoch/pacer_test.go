package epoch

import (
	"testing"
	"time"

	"perdure/internal/model"
)

const ms = time.Millisecond

func TestPacerRules(t *testing.T) {
	p := NewPacer(model.FTPolicy{}, Bounds{HeldBytes: 1000, DiskBytes: 1000, Pages: 1000})
	if d := p.Decide(Load{}); !d.Capture {
		t.Fatal("the first capture is due at once")
	}
	p.Captured(0, 3*ms)
	for _, c := range []struct {
		name string
		load Load
		want Decision
	}{
		{"idle", Load{Now: 4 * ms}, Decision{At: 103 * ms}},
		{"idle for long", Load{Now: 103 * ms}, Decision{Capture: true, Reason: ReasonIdle}},
		{"output too early", Load{Now: 4 * ms, Waiting: true}, Decision{At: 8 * ms}},
		{"output", Load{Now: 8 * ms, Waiting: true}, Decision{Capture: true, Reason: ReasonOutput}},
		{"held bytes at the bound", Load{Now: 4 * ms, HeldBytes: 1000}, Decision{Capture: true, Reason: ReasonBound}},
		{"disk bytes at the bound", Load{Now: 4 * ms, DiskBytes: 1000}, Decision{Capture: true, Reason: ReasonBound}},
		{"pages at the bound", Load{Now: 4 * ms, Pages: 1000}, Decision{Capture: true, Reason: ReasonBound}},
		{"one in flight", Load{Now: 200 * ms, InFlight: 1}, Decision{Capture: true, Reason: ReasonIdle}},
		{"two in flight", Load{Now: 200 * ms, InFlight: 2, Pages: 5000}, Decision{At: Never}},
	} {
		if got := p.Decide(c.load); got != c.want {
			t.Errorf("%s: %+v, want %+v", c.name, got, c.want)
		}
	}
}

// Under constant load the distance of captures grows to pause·(100/cap − 1).
func TestPacerSteadyState(t *testing.T) {
	p := NewPacer(model.FTPolicy{MaxOverheadPercent: 25, MinIntervalMS: 5}, Bounds{})
	now, last, gap := time.Duration(0), time.Duration(0), time.Duration(0)
	for range 200 {
		d := p.Decide(Load{Now: now, Waiting: true})
		if !d.Capture {
			now = d.At
		}
		gap = now - last
		p.Captured(now, now+10*ms)
		now += 10 * ms
		last = now
	}
	if gap < 29*ms || gap > 31*ms {
		t.Errorf("gap %v, want 30ms", gap)
	}
	if s := p.Share(); s < 0.24 || s > 0.26 {
		t.Errorf("share %v", s)
	}
	if p.Pause() != 10*ms {
		t.Errorf("pause %v", p.Pause())
	}
}

// A bound beyond all measure stops caring about the cap: the guest would have
// to stand still anyway.
func TestPacerAtTwiceABoundIgnoresTheCap(t *testing.T) {
	p := NewPacer(model.FTPolicy{}, Bounds{HeldBytes: 1000})
	p.Captured(0, 500*ms)
	if d := p.Decide(Load{Now: 501 * ms, HeldBytes: 1000}); d.Capture {
		t.Error("at the bound the cap counts")
	}
	if d := p.Decide(Load{Now: 501 * ms, HeldBytes: 2000}); !d.Capture || d.Reason != ReasonBound {
		t.Error("at twice the bound the cap must not count")
	}
}

func TestSlowWatch(t *testing.T) {
	w := NewSlowWatch(50*ms, time.Second)
	for _, c := range []struct {
		at, latency time.Duration
		want        bool
	}{{0, 60 * ms, false}, {900 * ms, 70 * ms, false}, {950 * ms, 40 * ms, false}, {1000 * ms, 60 * ms, false},
		{1900 * ms, 60 * ms, false}, {2000 * ms, 60 * ms, true}, {2001 * ms, 10 * ms, false}} {
		if got := w.Observe(c.at, c.latency); got != c.want {
			t.Errorf("at %v latency %v: %v", c.at, c.latency, got)
		}
	}
}
