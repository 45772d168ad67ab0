package diskcheck

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"
)

// A guest whose memory is checkpointed goes back in time together with its disk:
// what it did after the checkpoint that goes on elsewhere has not happened. With
// Config.Gate held exclusively nothing is under way, and these may be called.

// Mark is a moment at which nothing was under way.
type Mark struct {
	at    int64
	value uint64 // the last pattern that was handed out
}

// Mark returns this moment.
func (r *Run) Mark() Mark {
	r.mu.Lock()
	defer r.mu.Unlock()
	return Mark{r.now(), r.value.Load()}
}

// past is the history up to a Settle, kept for a RollBack to before it.
type past struct {
	units                  [][]entry
	flushes, losses, moves []entry
	from, to               int64 // when it begins and ends
}

// RollBack takes back what was done after m. What was written since is from now
// on what nobody has written: it must not be seen any more.
func (r *Run) RollBack(m Mark) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.rolls++
	if m.at < r.from {
		if r.past == nil || m.at < r.past.from {
			return fmt.Errorf("roll back to %v, and the history begins at %v: more was undone than may be", time.Duration(m.at), time.Duration(r.from))
		}
		p := r.past
		r.units, r.flushes, r.losses, r.moves, r.from, r.past = p.units, p.flushes, p.losses, p.moves, p.from, nil
	}
	for u, h := range r.units {
		r.units[u] = before(h, m.at)
	}
	r.flushes, r.losses, r.moves = before(r.flushes, m.at), before(r.losses, m.at), before(r.moves, m.at)
	if now := r.value.Load(); now > m.value {
		r.undone = append(r.undone, span{m.value, now})
	}
	return nil
}

// span is the patterns after one and up to another.
type span struct{ after, to uint64 }

// before keeps what was called before t, all of which has ended by then.
func before(h []entry, t int64) []entry {
	out := h[:0:0]
	for _, e := range h {
		if e.call < t {
			out = append(out, e.ended(t))
		}
	}
	return out
}

// ended is an entry of which nothing is under way any more at t: what was never
// answered has happened by then, or never will.
func (e entry) ended(t int64) entry {
	if e.kind == writeOf && e.ret == never {
		e.maybe, e.ret = true, max(t, e.call)
	}
	return e
}

// Undone looks for patterns that were taken back in what a disk holds, from its
// beginning on.
func (r *Run) Undone(disk []byte) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for u := range r.cfg.Units {
		v := decode(disk[r.offset(u):][:r.cfg.Unit], u)
		if v == torn || v == 0 {
			continue
		}
		for _, s := range r.undone {
			if v > s.after && v <= s.to {
				return fmt.Errorf("unit %d at offset %d holds write %d, which was undone", u, r.offset(u), v)
			}
		}
		if v > r.value.Load() {
			return fmt.Errorf("unit %d at offset %d holds write %d, which is of a guest that was given up", u, r.offset(u), v)
		}
	}
	return nil
}

// Saw notes what a disk holds, from its beginning on, as if every unit had just
// been read.
func (r *Run) Saw(disk []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.saw(disk)
}

func (r *Run) saw(disk []byte) {
	call := r.now()
	for u := range r.cfg.Units {
		v := decode(disk[r.offset(u):][:r.cfg.Unit], u)
		r.units[u] = append(r.units[u], entry{kind: readOf, value: v, call: call, ret: r.now()})
	}
}

// Survived returns when the newest of the writes was begun that are left on a
// disk that lost its power: all flushes before that, on any part of the disk, must
// have been obeyed.
func (r *Run) Survived(disk []byte) time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	var last int64
	for u := range r.cfg.Units {
		v := decode(disk[r.offset(u):][:r.cfg.Unit], u)
		if v == torn || v == 0 {
			continue // zeroes do not tell who wrote them
		}
		for _, e := range r.units[u] {
			if e.kind == writeOf && e.value == v {
				last = max(last, e.call)
			}
		}
	}
	return r.start.Add(time.Duration(last))
}

// Lost notes a loss of power in which only flushes count that were answered by t,
// and what the disk holds now. The others were answered before they were carried out.
func (r *Run) Lost(t time.Time, disk []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now, until := r.now(), int64(t.Sub(r.start))
	for u, h := range r.units {
		for i, e := range h {
			e = e.ended(now)
			e.durable = e.durable && e.ret <= until
			r.units[u][i] = e
		}
	}
	var counted []entry
	for _, f := range r.flushes {
		if f.ret <= until {
			counted = append(counted, f)
		}
	}
	r.flushes = counted
	r.losses = append(r.losses, entry{kind: lossOf, call: now, ret: r.now()})
	r.saw(disk)
}

// ghostly is the first pattern of guests that were given up.
const ghostly = 1 << 62

// Haunt writes patterns on nc that must never be seen, as a guest does that has not
// heard that it was given up, until ctx or the connection ends. each runs around
// every request; it may wait, and ends the haunting with an error.
func (r *Run) Haunt(ctx context.Context, nc net.Conn, each func(request func()) error) error {
	c, err := attach(nc, r.cfg.Export)
	if err != nil {
		return err
	}
	defer c.close()
	defer context.AfterFunc(ctx, c.close)()
	for n := 0; ctx.Err() == nil; n++ {
		u := n % r.cfg.Units
		p := make([]byte, r.cfg.Unit)
		encode(p, u, ghostly+r.ghosts.Add(1))
		var werr error
		if err := each(func() { werr = c.do(cmdWrite, 0, r.offset(u), len(p), p, nil) }); err != nil {
			return err
		}
		if errors.Is(werr, errLost) {
			return nil
		}
	}
	return nil
}
