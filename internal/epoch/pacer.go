package epoch

import (
	"math"
	"time"

	"perdure/internal/model"
)

// Never is the time of a decision that only another event can change.
const Never = time.Duration(math.MaxInt64)

// Bounds of what may gather before a checkpoint is forced. Zero means no bound.
// At a bound the shortest interval no longer counts; at twice a bound the cap on
// overhead no longer counts either, since the guest would have to stand still anyway.
type Bounds struct {
	HeldBytes int64 // output held, bytes
	DiskBytes int64 // disk writes held, bytes
	Pages     int64 // pages collected by background writeback since the last capture
}

// Load is what the Pacer is asked about. All times are readings of one clock.
type Load struct {
	Now       time.Duration
	Waiting   bool // output waits that no capture covers yet
	HeldBytes int64
	DiskBytes int64
	Pages     int64
	InFlight  int // captured and not acknowledged
}

// Reason says why a capture is due, for metrics.
type Reason string

// The reasons.
const (
	ReasonOutput Reason = "output" // output waits and the shortest interval has passed
	ReasonIdle   Reason = "idle"   // the longest interval has passed
	ReasonBound  Reason = "bound"  // a bound is reached
)

// Decision answers Decide: capture now, or ask again at At or after the next
// event (output, acknowledgement, growth), whichever comes first.
type Decision struct {
	Capture bool
	Reason  Reason        // if Capture
	At      time.Duration // if not: Load.Now < At; Never while too much is in flight
}

// burst is how much time of running at full cap may be spent on pauses ahead:
// one slow pause, or a few answers in a row, does not put the next answer off.
const burst = 200 * time.Millisecond

// Pacer decides when the guest is stopped for a checkpoint.
//
// The cap works as an account: a pause takes from it, running fills it at the
// rate that keeps the share of stopped time at MaxOverheadPercent. Invariant: over
// any stretch of time T, measured between ends of captures, the guest stands
// still for at most cap·T + cap·200 ms + one pause. In the steady state captures are
// therefore pause·(100/cap − 1) apart. The zero value is not usable.
type Pacer struct {
	max, min    time.Duration
	cap         float64 // share, 0 < cap < 1
	bounds      Bounds
	started     bool
	lastEnd     time.Duration
	debt        float64 // nanoseconds of pause not yet paid for by running, at lastEnd
	share       float64 // smoothed share of stopped time
	pause       float64 // smoothed pause, ns
	latency     float64 // smoothed commit latency, ns
	haveLatency bool
}

// NewPacer returns a Pacer for a policy; values out of range are brought into it.
func NewPacer(p model.FTPolicy, b Bounds) *Pacer {
	d := model.DefaultFTPolicy()
	or := func(v, def, lo, hi int) int {
		if v == 0 {
			v = def
		}
		return max(lo, min(hi, v))
	}
	minMS := or(p.MinIntervalMS, d.MinIntervalMS, 1, 1000)
	maxMS := max(minMS, or(p.MaxIntervalMS, d.MaxIntervalMS, 10, 5000))
	return &Pacer{
		min:    time.Duration(minMS) * time.Millisecond,
		max:    time.Duration(maxMS) * time.Millisecond,
		cap:    float64(or(p.MaxOverheadPercent, d.MaxOverheadPercent, 1, 90)) / 100,
		bounds: b,
	}
}

// Captured tells that the guest stood still from start to end (the last capture,
// or any other pause that protection caused).
func (p *Pacer) Captured(start, end time.Duration) {
	pause := float64(max(0, end-start))
	if p.started {
		run := float64(max(0, start-p.lastEnd))
		p.debt = max(0, p.debt-run*p.cap/(1-p.cap))
		// The share is smoothed over about a second of wall-clock time.
		w := 1 - math.Exp(-(run+pause)/float64(time.Second))
		if run+pause > 0 {
			p.share += w * (pause/(run+pause) - p.share)
		}
		p.pause += 0.125 * (pause - p.pause)
	} else {
		p.pause = pause
	}
	p.debt += pause
	p.started, p.lastEnd = true, end
}

// Committed tells how long the last epoch took from the end of its capture to
// its acknowledgement.
func (p *Pacer) Committed(latency time.Duration) {
	if !p.haveLatency {
		p.latency, p.haveLatency = float64(latency), true
		return
	}
	p.latency += 0.125 * (float64(latency) - p.latency)
}

// Share returns the smoothed share of time the guest stands still, 0 to 1.
func (p *Pacer) Share() float64 { return p.share }

// Pause returns the smoothed pause.
func (p *Pacer) Pause() time.Duration { return time.Duration(p.pause) }

// Latency returns the smoothed commit latency, 0 if unknown.
func (p *Pacer) Latency() time.Duration { return time.Duration(p.latency) }

// Decide says whether to capture now. The first capture is due at once.
func (p *Pacer) Decide(l Load) Decision {
	if l.InFlight >= MaxInFlight {
		return Decision{At: Never}
	}
	fill := p.fill(l)
	if !p.started {
		return Decision{Capture: true, Reason: ReasonIdle}
	}
	var due time.Duration
	var why Reason
	switch {
	case fill >= 1:
		due, why = p.lastEnd, ReasonBound
	case l.Waiting:
		due, why = p.lastEnd+p.min, ReasonOutput
	default:
		due, why = p.lastEnd+p.max, ReasonIdle
	}
	if fill < 2 {
		due = max(due, p.paidAt())
	}
	if l.Now >= due {
		return Decision{Capture: true, Reason: why}
	}
	return Decision{At: due}
}

// paidAt is when running has paid for the pauses up to now, but for the burst.
func (p *Pacer) paidAt() time.Duration {
	over := p.debt - p.cap*float64(burst)
	if over <= 0 {
		return p.lastEnd
	}
	return p.lastEnd + time.Duration(math.Ceil(over*(1-p.cap)/p.cap))
}

// fill is the highest share of a bound that is reached.
func (p *Pacer) fill(l Load) float64 {
	f := 0.0
	for _, b := range [...][2]int64{{l.HeldBytes, p.bounds.HeldBytes}, {l.DiskBytes, p.bounds.DiskBytes}, {l.Pages, p.bounds.Pages}} {
		if b[1] > 0 {
			f = max(f, float64(b[0])/float64(b[1]))
		}
	}
	return f
}

// SlowWatch notices a secondary that acknowledges too slowly for too long: such
// a pair is given up by rule, instead of a VM that crawls for ever.
type SlowWatch struct {
	limit, span time.Duration
	slow        bool
	since       time.Duration
}

// NewSlowWatch returns a watch that trips when every commit for span took longer than limit.
func NewSlowWatch(limit, span time.Duration) *SlowWatch {
	return &SlowWatch{limit: limit, span: span}
}

// Observe takes a commit latency, or the age of the oldest epoch in flight, as
// of now, and reports whether the secondary counts as lost.
func (w *SlowWatch) Observe(now, latency time.Duration) bool {
	if latency <= w.limit {
		w.slow = false
		return false
	}
	if !w.slow {
		w.slow, w.since = true, now
	}
	return now-w.since >= w.span
}
