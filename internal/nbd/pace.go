package nbd

import (
	"context"
	"sync/atomic"
	"time"
)

// Requests that a page cache or memory answers take less time than handing the
// reading on to another goroutine. So the worker whose turn it is carries quick
// ones out itself and lets their answers leave together. Whether a request is
// quick is not known before it is over; two things keep a slow one from holding
// up those behind it: pace, which learns from the last ones, and the minder,
// which takes the turn away from a worker that does not come back.

const (
	quickBytes = 32 << 10               // larger requests are never carried out by the reader
	slowRead   = 50 * time.Microsecond  // a READ that took longer had to wait for the disk
	slowWrite  = 200 * time.Microsecond // so had a WRITE; a page cache takes some 20 µs for a block
	slowWeight = 8                      // quick requests that make up for a slow one
	minEager   = 128                    // requests handed on after slow ones, at first
	maxEager   = 4096                   // and at most
	mindEvery  = 4 * time.Millisecond
)

// quick says whether a request may be carried out by the reader at all.
func (t task) quick() bool {
	switch t.req.cmd {
	case cmdRead, cmdWrite:
		return t.req.length <= quickBytes && (t.req.cmd == cmdRead || t.req.flags&cmdFlagFUA == 0)
	default:
		return t.no != accepted
	}
}

// slow is how long a quick request may take before it was not quick.
func (t task) slow() time.Duration {
	if t.req.cmd == cmdWrite {
		return slowWrite
	}
	return slowRead
}

// pace decides whether quick requests are carried out by the reader.
type pace struct {
	score  int // grows with slow requests, shrinks with quick ones
	eager  int // requests to hand on before the next trial
	streak int // the last value that eager began with
}

func (p *pace) inline() bool {
	if p.eager > 0 {
		p.eager--
		return false
	}
	return true
}

// note takes the time of a request that the reader carried out.
func (p *pace) note(d, slow time.Duration) {
	if d < slow {
		if p.score > 0 {
			p.score--
		} else {
			p.streak = 0
		}
		return
	}
	// One slow request among quick ones is no reason: the machine was busy.
	if p.score += slowWeight; p.score > slowWeight {
		p.slow()
	}
}

// slow hands on what comes for a while; the next slow request after that does so
// at once, and for longer.
func (p *pace) slow() {
	p.score = slowWeight
	p.streak = min(max(2*p.streak, minEager), maxEager)
	p.eager = p.streak
}

// minder watches the reader of one connection while it carries out a request.
type minder struct {
	// state is twice the number of the last request that a reader carried out, plus
	// one while it does. Whoever takes that one away owns the turn.
	state  atomic.Uint64
	asleep atomic.Bool
	wake   chan struct{}
	quit   chan struct{}
}

func (m *minder) init() {
	m.wake, m.quit = make(chan struct{}, 1), make(chan struct{})
}

func (m *minder) begin(op uint64) {
	m.state.Store(2*op + 1)
	if m.asleep.Load() {
		select {
		case m.wake <- struct{}{}:
		default:
		}
	}
}

// end is false when the turn was taken away.
func (m *minder) end(op uint64) bool { return m.state.CompareAndSwap(2*op+1, 2*op) }

// restAfter is how many looks without a request put the minder to sleep.
const restAfter = 8

// mind is the minder's goroutine.
func (c *conn) mind(ctx context.Context) {
	m := &c.minder
	tick := time.NewTimer(0)
	defer tick.Stop()
	for {
		m.asleep.Store(true)
		// Whoever began before this store did not see it; then the state says so.
		if m.state.Load()&1 == 0 {
			select {
			case <-m.wake:
			case <-m.quit:
				return
			}
		}
		m.asleep.Store(false)
		last := m.state.Load()
		for rest := 0; rest < restAfter; {
			tick.Reset(mindEvery)
			select {
			case <-tick.C:
			case <-m.quit:
				return
			}
			now := m.state.Load()
			switch {
			case now != last:
				rest = 0
			case now&1 == 0:
				rest++
			case m.state.CompareAndSwap(now, now-1):
				// The turn is ours: answers that waited leave, somebody else reads.
				c.pace.slow()
				c.passOn(ctx)
			}
			last = m.state.Load()
		}
	}
}
