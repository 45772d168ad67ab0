package epoch

import (
	"errors"
	"testing"
	"time"

	"pgregory.net/rapid"

	"perdure/internal/model"
)

// wire is what travels between the two machines in pairModel, in order.
type wire struct {
	kind  string // begin, part, end, abort, ack
	pair  Pair
	epoch model.Epoch
	full  bool
	flush bool
	tally Tally
	body  byte
}

// pairModel drives a Primary and a Secondary over two ordered channels with
// every step at a random moment, and keeps its own account of what must hold.
type pairModel struct {
	p     *Primary
	s     *Secondary
	down  []wire // to the secondary
	up    []wire // to the primary
	sendQ []wire // captured, not yet on the wire

	flush       map[model.Epoch]bool
	durableP    map[model.Epoch]bool // this host's promise, per epoch
	durableS    map[model.Epoch]bool
	complete    map[model.Epoch]bool
	acked       map[model.Epoch]bool // handed out by the secondary
	released    model.Epoch
	committed   model.Epoch
	applied     model.Epoch
	applying    []model.Epoch
	journalling []model.Epoch
	began       bool // parts of the next epoch are on the wire (background writeback)
	granted     bool // simplex granted to the secondary
	ready       bool
	acking      bool
}

func newPairModel() *pairModel {
	pr := Pair{1, "p", "s"}
	return &pairModel{p: NewPrimary(pr, 1), s: NewSecondary(pr, 1), acking: true,
		flush: map[model.Epoch]bool{}, durableP: map[model.Epoch]bool{}, durableS: map[model.Epoch]bool{},
		complete: map[model.Epoch]bool{}, acked: map[model.Epoch]bool{}}
}

// primaryActs checks and carries out what the primary was told to do.
func (m *pairModel) primaryActs(t *rapid.T, acts []Action) {
	for _, a := range acts {
		switch a.Kind {
		case Commit:
			if a.Epoch != m.committed+1 {
				t.Fatalf("commit %d after %d", a.Epoch, m.committed)
			}
			m.committed = a.Epoch
			if !m.acked[a.Epoch] || !m.complete[a.Epoch] {
				t.Fatalf("commit %d without acknowledgement", a.Epoch)
			}
		case Release:
			// Rule 2: the state that produced the output is held by the secondary, and
			// what was flushed is durable on both.
			if a.Epoch != m.released+1 {
				t.Fatalf("release %d after %d", a.Epoch, m.released)
			}
			m.released = a.Epoch
			if !m.acked[a.Epoch] || a.Epoch > m.committed {
				t.Fatalf("release %d before its commit", a.Epoch)
			}
			if m.flush[a.Epoch] && (!m.durableP[a.Epoch] || !m.durableS[a.Epoch]) {
				t.Fatalf("release %d: flushed, durable here %v, there %v", a.Epoch, m.durableP[a.Epoch], m.durableS[a.Epoch])
			}
		case Abort:
			m.down = append(m.down, wire{kind: "abort", epoch: a.Epoch, pair: a.Pair})
			m.began = false
		}
	}
}

// secondaryActs checks and carries out what the secondary was told to do.
func (m *pairModel) secondaryActs(t *rapid.T, acts []Action) {
	for _, a := range acts {
		switch a.Kind {
		case Journal:
			m.journalling = append(m.journalling, a.Epoch)
		case Ack:
			if !m.acking || m.granted {
				t.Fatalf("ack %d while acknowledging is off", a.Epoch)
			}
			if !m.complete[a.Epoch] || m.acked[a.Epoch] || (a.Epoch > 1 && !m.acked[a.Epoch-1]) {
				t.Fatalf("ack %d out of turn", a.Epoch)
			}
			if m.flush[a.Epoch] && !m.durableS[a.Epoch] {
				t.Fatalf("ack %d before the journal is durable", a.Epoch)
			}
			m.acked[a.Epoch] = true
			m.up = append(m.up, wire{kind: "ack", epoch: a.Epoch, pair: a.Pair})
		case Apply:
			if !m.complete[a.Epoch] || m.ready {
				t.Fatalf("apply %d, complete %v", a.Epoch, m.complete[a.Epoch])
			}
			m.applying = append(m.applying, a.Epoch)
		case Ready:
			if !m.granted || m.applied != a.Epoch || a.Epoch < m.released || a.Epoch < m.committed {
				t.Fatalf("ready from %d: applied %d, released %d", a.Epoch, m.applied, m.released)
			}
			m.ready = true
		}
	}
}

// TestOutputCommit: whatever the order of things, nothing is released that the
// secondary could not resume from, and a takeover is from a whole epoch that is
// not older than anything released.
func TestOutputCommit(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := newPairModel()
		t.Repeat(map[string]func(*rapid.T){
			"capture": m.capture, "void": m.void, "send": m.send, "writeback": m.writeback,
			"deliver down": m.deliverDown, "deliver up": m.deliverUp,
			"primary durable": m.primaryDurable, "secondary durable": m.secondaryDurable,
			"apply": m.apply, "stop": m.stop, "resume": m.resume, "take over": m.takeOver,
			"": func(t *rapid.T) {
				if n := m.p.InFlight(); n > MaxInFlight {
					t.Fatalf("%d in flight", n)
				}
				newest, any := m.s.Newest()
				if m.released > 0 && (!any || newest < m.released) {
					t.Fatalf("released %d, the secondary holds %d", m.released, newest)
				}
			},
		})
	})
}

func (m *pairModel) capture(t *rapid.T) {
	n, full := m.p.Next()
	c := Capture{Epoch: n, Full: full || rapid.Bool().Draw(t, "full"), Flush: rapid.Bool().Draw(t, "flush")}
	err := m.p.Captured(c)
	if errors.Is(err, ErrBusy) {
		t.Skip("busy")
	}
	if err != nil {
		t.Fatal(err)
	}
	m.flush[n] = c.Flush
	var tally Tally
	pr := m.p.Pair()
	if !m.began {
		m.sendQ = append(m.sendQ, wire{kind: "begin", pair: pr, epoch: n, full: c.Full})
	} else {
		// Begun by writeback before it was known whether it is full: only the first
		// and voided ones must be, and those are not begun early in this model.
		tally.Add(1, []byte{0})
	}
	for i := range rapid.IntRange(0, 3).Draw(t, "parts") {
		tally.Add(1, []byte{byte(i)})
		m.sendQ = append(m.sendQ, wire{kind: "part", epoch: n, body: byte(i)})
	}
	m.sendQ = append(m.sendQ, wire{kind: "end", pair: pr, epoch: n, tally: tally, flush: c.Flush})
	m.began = false
}

// writeback sends a part of the epoch that is not captured yet.
func (m *pairModel) writeback(t *rapid.T) {
	n, full := m.p.Next()
	if m.began || full || len(m.sendQ) > 0 {
		t.Skip("not now")
	}
	m.began = true
	m.down = append(m.down, wire{kind: "begin", pair: m.p.Pair(), epoch: n}, wire{kind: "part", epoch: n})
}

func (m *pairModel) void(t *rapid.T) {
	if len(m.sendQ) > 0 && m.began {
		t.Skip("not now")
	}
	m.primaryActs(t, m.p.Void(m.began))
}

func (m *pairModel) send(t *rapid.T) {
	if len(m.sendQ) == 0 {
		t.Skip("nothing")
	}
	w := m.sendQ[0]
	m.sendQ = m.sendQ[1:]
	m.down = append(m.down, w)
	if w.kind == "end" {
		if err := m.p.Sent(w.epoch); err != nil {
			t.Fatal(err)
		}
	}
}

func (m *pairModel) deliverDown(t *rapid.T) {
	if len(m.down) == 0 {
		t.Skip("nothing")
	}
	w := m.down[0]
	m.down = m.down[1:]
	var err error
	var acts []Action
	switch w.kind {
	case "begin":
		err = m.s.Begin(w.pair, w.epoch, w.full, false)
	case "part":
		err = m.s.Part(w.epoch, 1, []byte{w.body})
	case "abort":
		err = m.s.Abort(w.epoch)
	case "end":
		if w.flush {
			err = m.s.Flushed(w.epoch)
		}
		if err == nil && !m.granted {
			m.complete[w.epoch] = true
			acts, err = m.s.End(w.pair, w.epoch, w.tally)
		} else if m.granted {
			_, err = m.s.End(w.pair, w.epoch, w.tally)
		}
	}
	if m.granted {
		if err == nil {
			t.Fatalf("%s %d taken after a takeover", w.kind, w.epoch)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	m.secondaryActs(t, acts)
}

func (m *pairModel) deliverUp(t *rapid.T) {
	if len(m.up) == 0 {
		t.Skip("nothing")
	}
	w := m.up[0]
	m.up = m.up[1:]
	acts, err := m.p.Acked(w.pair, w.epoch)
	if err != nil {
		t.Fatal(err)
	}
	m.primaryActs(t, acts)
}

func (m *pairModel) primaryDurable(t *rapid.T) {
	open := m.p.Open()
	if len(open) == 0 {
		t.Skip("nothing")
	}
	n := rapid.SampledFrom(open).Draw(t, "epoch")
	for e := model.Epoch(1); e <= n; e++ {
		m.durableP[e] = true
	}
	m.primaryActs(t, m.p.Durable(n))
}

func (m *pairModel) secondaryDurable(t *rapid.T) {
	if len(m.journalling) == 0 {
		t.Skip("nothing")
	}
	n := m.journalling[0]
	m.journalling = m.journalling[1:]
	m.durableS[n] = true
	m.secondaryActs(t, m.s.Durable(n))
}

func (m *pairModel) apply(t *rapid.T) {
	if len(m.applying) == 0 {
		t.Skip("nothing")
	}
	n := m.applying[0]
	m.applying = m.applying[1:]
	if n != m.applied+1 {
		t.Fatalf("apply %d after %d", n, m.applied)
	}
	m.applied = n
	acts, err := m.s.Applied(n)
	if err != nil {
		t.Fatal(err)
	}
	m.secondaryActs(t, acts)
}

func (m *pairModel) stop(*rapid.T) {
	m.acking = false
	m.s.StopAcking()
}

func (m *pairModel) resume(t *rapid.T) {
	if m.granted {
		t.Skip("granted")
	}
	m.acking = true
	acts, err := m.s.ResumeAcking()
	if err != nil {
		t.Fatal(err)
	}
	m.secondaryActs(t, acts)
}

func (m *pairModel) takeOver(t *rapid.T) {
	if m.granted || rapid.IntRange(0, 2).Draw(t, "rarely") > 0 {
		t.Skip("not now")
	}
	if _, any := m.s.Newest(); !any {
		if _, err := m.s.Takeover(); err == nil {
			t.Fatal("took over from nothing")
		}
		return
	}
	m.granted, m.acking = true, false
	acts, err := m.s.Takeover()
	if err != nil {
		t.Fatal(err)
	}
	m.secondaryActs(t, acts)
}

// TestStraysChangeNothing: any event that does not fit is refused with a class,
// and leaves both machines as they were.
func TestStraysChangeNothing(t *testing.T) {
	classes := []error{ErrPair, ErrOrder, ErrNeverSent, ErrTally, ErrBusy, ErrEnded}
	rapid.Check(t, func(t *rapid.T) {
		pr := Pair{3, "p", "s"}
		p, s := NewPrimary(pr, 1), NewSecondary(pr, 1)
		released := model.Epoch(0)
		for range rapid.IntRange(1, 60).Draw(t, "events") {
			n := model.Epoch(rapid.Uint64Range(0, 5).Draw(t, "n"))
			other := Pair{model.Term(rapid.Uint64Range(2, 4).Draw(t, "term")), model.RunID(rapid.SampledFrom([]string{"p", "x"}).Draw(t, "run")), "s"}
			bp, bs := *p, *s
			var err error
			var acts []Action
			switch rapid.IntRange(0, 8).Draw(t, "event") {
			case 0:
				err = p.Captured(Capture{Epoch: n, Full: rapid.Bool().Draw(t, "full")})
			case 1:
				err = p.Sent(n)
			case 2:
				acts, err = p.Acked(other, n)
			case 3:
				err = p.Advance(other)
			case 4:
				err = s.Begin(other, n, rapid.Bool().Draw(t, "full"), false)
			case 5:
				err = s.Part(n, 0)
			case 6:
				_, err = s.End(other, n, Tally{})
			case 7:
				_, err = s.Applied(n)
			case 8:
				err = s.Abort(n)
			}
			for _, a := range acts {
				if a.Kind == Release {
					if a.Epoch != released+1 {
						t.Fatalf("release %d after %d", a.Epoch, released)
					}
					released = a.Epoch
				}
			}
			if err == nil {
				continue
			}
			known := false
			for _, c := range classes {
				known = known || errors.Is(err, c)
			}
			if !known || len(acts) > 0 {
				t.Fatalf("%v without a class, or with actions %v", err, acts)
			}
			if p.InFlight() != bp.InFlight() || p.next != bp.next || s.next != bs.next || s.partial != bs.partial || s.newest != bs.newest {
				t.Fatalf("%v changed something", err)
			}
		}
	})
}

// TestPacerKeepsTheCap: over any stretch, for any pauses, below twice the bounds.
func TestPacerKeepsTheCap(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		pol := model.FTPolicy{
			MaxOverheadPercent: rapid.IntRange(1, 90).Draw(t, "cap"),
			MinIntervalMS:      rapid.IntRange(1, 50).Draw(t, "min"),
			MaxIntervalMS:      rapid.IntRange(10, 500).Draw(t, "max"),
		}
		p := NewPacer(pol, Bounds{Pages: 1000})
		now := time.Duration(rapid.Int64Range(0, int64(time.Hour)).Draw(t, "start"))
		type capture struct{ end, pause time.Duration }
		var all []capture
		greedy := rapid.Bool().Draw(t, "output always waits")
		for range rapid.IntRange(1, 80).Draw(t, "captures") {
			l := Load{Now: now, Waiting: greedy || rapid.Bool().Draw(t, "waiting"), Pages: rapid.Int64Range(0, 1999).Draw(t, "pages")}
			d := p.Decide(l)
			for asked := 0; !d.Capture; asked++ {
				if d.At <= l.Now || asked > 3 {
					t.Fatalf("at %v told to wait until %v (asked %d times)", l.Now, d.At, asked)
				}
				l.Now = d.At
				d = p.Decide(l)
			}
			pause := time.Duration(rapid.Int64Range(0, int64(80*time.Millisecond)).Draw(t, "pause"))
			p.Captured(l.Now, l.Now+pause)
			now = l.Now + pause
			all = append(all, capture{now, pause})
		}
		share := float64(pol.MaxOverheadPercent) / 100
		for i := range all {
			stopped := time.Duration(0)
			for j := i + 1; j < len(all); j++ {
				stopped += all[j].pause
				span := all[j].end - all[i].end
				allowed := time.Duration(share*float64(span+burst)) + all[i].pause + all[j].pause + time.Microsecond
				if stopped > allowed {
					t.Fatalf("captures %d to %d: stopped %v of %v, allowed %v", i, j, stopped, span, allowed)
				}
			}
		}
	})
}

// TestPacerAnswersAndKeepsOn: while pauses are small, waiting output is captured
// as soon as the shortest interval has passed, and nothing waits beyond the longest.
func TestPacerAnswersAndKeepsOn(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		minI := rapid.IntRange(1, 20).Draw(t, "min")
		maxI := rapid.IntRange(minI+10, 400).Draw(t, "max")
		p := NewPacer(model.FTPolicy{MaxOverheadPercent: 25, MinIntervalMS: minI, MaxIntervalMS: maxI}, Bounds{})
		now, end := time.Duration(0), time.Duration(0)
		p.Captured(0, 0)
		for range rapid.IntRange(1, 50).Draw(t, "requests") {
			// Lone requests: at least 100 ms apart, and pauses of a few milliseconds.
			arrive := now + time.Duration(rapid.Int64Range(int64(100*time.Millisecond), int64(time.Second)).Draw(t, "gap"))
			for {
				d := p.Decide(Load{Now: now})
				if !d.Capture {
					if d.At > end+time.Duration(maxI)*time.Millisecond {
						t.Fatalf("idle: last end %v, told to wait until %v", end, d.At)
					}
					if d.At > arrive {
						break
					}
					now = d.At
					continue
				}
				pause := time.Duration(rapid.Int64Range(0, int64(3*time.Millisecond)).Draw(t, "pause"))
				p.Captured(now, now+pause)
				now += pause
				end = now
			}
			now = max(now, arrive)
			d := p.Decide(Load{Now: now, Waiting: true})
			if !d.Capture {
				if d.At-now > time.Duration(minI)*time.Millisecond {
					t.Fatalf("request at %v waits until %v, last end %v", now, d.At, end)
				}
				now = d.At
				if d = p.Decide(Load{Now: now, Waiting: true}); !d.Capture {
					t.Fatalf("told to come at %v, then to wait until %v", now, d.At)
				}
			}
			p.Captured(now, now+time.Millisecond)
			now += time.Millisecond
			end = now
		}
	})
}
