package diskcheck

import (
	"fmt"
	"math"
	"slices"
	"sort"
	"strings"
	"time"

	"github.com/anishathalye/porcupine"
)

// never is when a request that was not answered returned.
const never = math.MaxInt64

type kind int

const (
	readOf kind = iota
	writeOf
	flushOf
	lossOf
	moveOf // the disk goes on elsewhere
)

// entry is one request on one unit.
type entry struct {
	kind      kind
	value     uint64
	call, ret int64 // nanoseconds since the beginning of the Run
	durable   bool  // a write with FUA that was answered
	calm      bool  // an answered write that needs not be known to be durable or not, see settled
	maybe     bool  // a write that happened between call and ret, or never
	moves     int   // how often the disk had been taken over when it was called
}

func (e entry) String() string {
	name := map[kind]string{readOf: "read", writeOf: "write", flushOf: "flush", lossOf: "power lost", moveOf: "taken over"}[e.kind]
	ret := "never"
	if e.ret != never {
		ret = time.Duration(e.ret).String()
	}
	s := fmt.Sprintf("%-14v %-14s %s", time.Duration(e.call), ret, name)
	switch {
	case e.kind != readOf && e.kind != writeOf:
		return s
	case e.value == torn:
		return s + " TORN"
	case e.durable:
		return fmt.Sprintf("%s %d, FUA", s, e.value)
	case e.maybe:
		return fmt.Sprintf("%s %d, perhaps", s, e.value)
	}
	return fmt.Sprintf("%s %d", s, e.value)
}

// register is what is known of one unit: the values that it may hold, of which
// there is one except after a loss, and those that it may hold after it was taken
// over, and after the power was lost. All sorted; never changed in place.
type register struct{ now, moved, later []uint64 }

// model is the sequential disk.
var model = porcupine.Model{
	Init: func() any { return register{[]uint64{0}, []uint64{0}, []uint64{0}} },
	Step: func(state, input, _ any) (bool, any) {
		s, e := state.(register), input.(entry)
		switch e.kind {
		case readOf:
			if !slices.Contains(s.now, e.value) {
				return false, s
			}
			return true, register{[]uint64{e.value}, s.moved, s.later}
		case writeOf:
			now := []uint64{e.value}
			switch {
			case e.maybe:
				return true, register{with(s.now, e.value), with(s.moved, e.value), with(s.later, e.value)}
			case e.durable || e.calm:
				return true, register{now, now, now}
			case e.ret == never:
				return true, register{now, with(s.moved, e.value), with(s.later, e.value)}
			}
			return true, register{now, now, with(s.later, e.value)}
		case flushOf:
			return true, register{s.now, s.moved, s.flushed()}
		case moveOf:
			return true, register{s.moved, s.moved, s.later}
		default:
			return true, register{s.later, s.later, s.later}
		}
	},
	Equal: func(a, b any) bool {
		x, y := a.(register), b.(register)
		return slices.Equal(x.now, y.now) && slices.Equal(x.moved, y.moved) && slices.Equal(x.later, y.later)
	},
}

// flushed is what the register may hold after a loss of power that follows a
// flush: what it holds now, or, where a write was never answered, what it held before.
func (s register) flushed() []uint64 {
	if len(s.moved) == 1 {
		return s.now
	}
	out := s.moved
	for _, v := range s.now {
		out = with(out, v)
	}
	return out
}

func with(set []uint64, v uint64) []uint64 {
	at, ok := slices.BinarySearch(set, v)
	if ok {
		return set
	}
	return slices.Insert(slices.Clone(set), at, v)
}

// Check decides whether a disk could have answered so. Its error names the unit,
// and shows its history. limit bounds the time for the whole disk; a check that
// does not end by then is an error too.
func (r *Run) Check(limit time.Duration) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	deadline := time.Now().Add(limit)
	for u := range r.units {
		h := r.history(u)
		switch judge(h, deadline) {
		case porcupine.Illegal:
			// The first requests that are wrong together say where to look.
			n := sort.Search(len(h), func(n int) bool { return judge(h[:n], deadline) == porcupine.Illegal })
			return fmt.Errorf("no disk answers like this: unit %d at offset %d, seed %d:\n%s", u, r.offset(u), r.cfg.Seed, show(h[:min(n, len(h))]))
		case porcupine.Unknown:
			return fmt.Errorf("unit %d: %d requests could not be judged within %v:\n%s", u, len(h), limit, show(h))
		}
	}
	return nil
}

// judge decides about one unit.
func judge(h []entry, deadline time.Time) porcupine.CheckResult {
	ops := make([]porcupine.Operation, len(h))
	for i, e := range h {
		ops[i] = porcupine.Operation{ClientId: i, Input: e, Call: e.call, Return: e.ret}
	}
	return porcupine.CheckOperationsTimeout(model, ops, max(time.Until(deadline), time.Millisecond))
}

// lastFlushes are those that no other one follows before the power is lost: what an
// earlier one made durable, a later one does as well.
func (r *Run) lastFlushes() (out []entry) {
	from := int64(math.MinInt64)
	for _, l := range r.losses { // in their order
		newest := int64(math.MinInt64) // when the last one began
		for _, f := range r.flushes {
			if f.call >= from && f.ret <= l.call {
				newest = max(newest, f.call)
			}
		}
		for _, f := range r.flushes {
			if f.call >= from && f.ret <= l.call && f.ret >= newest {
				out = append(out, f)
			}
		}
		from = l.call
	}
	return out
}

// settled reports whether it is of no interest if a write that was answered was
// durable before: no power was lost afterwards, or there was a flush in between.
func (r *Run) settled(w entry, flushes []entry) bool {
	for _, l := range r.losses {
		if l.ret >= w.call {
			return slices.ContainsFunc(flushes, func(f entry) bool { return f.call > w.ret && f.ret <= l.call })
		}
	}
	return true
}

// history of one unit, by call, without what cannot matter: flushes but
// the last before the power was lost, and unanswered writes whose value nobody has seen. What was not
// answered before the disk was taken over cannot happen afterwards.
func (r *Run) history(u int) []entry {
	seen := map[uint64]int64{} // when a value was read last
	for _, e := range r.units[u] {
		if e.kind == readOf {
			seen[e.value] = max(seen[e.value], e.ret)
		}
	}
	var h []entry
	for _, e := range r.units[u] {
		if e.kind == writeOf && e.ret == never && e.moves < len(r.moves) {
			e.maybe, e.ret = true, r.moves[e.moves].ret
		}
		if e.kind != writeOf || e.ret != never && !e.maybe || seen[e.value] > e.call {
			h = append(h, e)
		}
	}
	flushes := r.lastFlushes()
	for i := range h {
		h[i].calm = h[i].kind == writeOf && h[i].ret != never && !h[i].maybe && r.settled(h[i], flushes)
	}
	h = append(h, r.moves...)
	h = append(append(h, flushes...), r.losses...)
	slices.SortStableFunc(h, func(a, b entry) int { return int(min(max(a.call-b.call, -1), 1)) })
	return h
}

// show prints a history, shortened to what lies around its end.
func show(h []entry) string {
	const most = 200
	var b strings.Builder
	if len(h) > most {
		fmt.Fprintf(&b, "… %d earlier\n", len(h)-most)
		h = h[len(h)-most:]
	}
	for _, e := range h {
		fmt.Fprintln(&b, e)
	}
	return b.String()
}
