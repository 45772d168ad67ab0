package diskcheck

import (
	"fmt"
	"math"
	"slices"
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
)

// entry is one request on one unit.
type entry struct {
	kind      kind
	value     uint64
	call, ret int64 // nanoseconds since the beginning of the Run
	durable   bool  // a write with FUA that was answered
}

func (e entry) String() string {
	name := map[kind]string{readOf: "read", writeOf: "write", flushOf: "flush", lossOf: "power lost"}[e.kind]
	ret := "never"
	if e.ret != never {
		ret = time.Duration(e.ret).String()
	}
	s := fmt.Sprintf("%-14v %-14s %s", time.Duration(e.call), ret, name)
	switch {
	case e.kind == flushOf || e.kind == lossOf:
		return s
	case e.value == torn:
		return s + " TORN"
	case e.durable:
		return fmt.Sprintf("%s %d, FUA", s, e.value)
	}
	return fmt.Sprintf("%s %d", s, e.value)
}

// register is what is known of one unit: the values that it may hold, of which
// there is one except after a loss of power, and those that it may hold after
// the next loss. Both sorted; never changed in place.
type register struct{ now, later []uint64 }

// model is the sequential disk.
var model = porcupine.Model{
	Init: func() any { return register{[]uint64{0}, []uint64{0}} },
	Step: func(state, input, _ any) (bool, any) {
		s, e := state.(register), input.(entry)
		switch e.kind {
		case readOf:
			if !slices.Contains(s.now, e.value) {
				return false, s
			}
			return true, register{[]uint64{e.value}, s.later}
		case writeOf:
			now := []uint64{e.value}
			if e.durable {
				return true, register{now, now}
			}
			return true, register{now, with(s.later, e.value)}
		case flushOf:
			return true, register{s.now, s.now}
		default:
			return true, register{s.later, s.later}
		}
	},
	Equal: func(a, b any) bool {
		x, y := a.(register), b.(register)
		return slices.Equal(x.now, y.now) && slices.Equal(x.later, y.later)
	},
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
		ops := make([]porcupine.Operation, len(h))
		for i, e := range h {
			ops[i] = porcupine.Operation{ClientId: i, Input: e, Call: e.call, Return: e.ret}
		}
		switch porcupine.CheckOperationsTimeout(model, ops, max(time.Until(deadline), time.Millisecond)) {
		case porcupine.Illegal:
			return fmt.Errorf("no disk answers like this: unit %d at offset %d, seed %d:\n%s", u, r.offset(u), r.cfg.Seed, show(h))
		case porcupine.Unknown:
			return fmt.Errorf("unit %d: %d requests could not be judged within %v", u, len(h), limit)
		}
	}
	return nil
}

// history of one unit, by call, without what cannot matter: flushes where no
// power was lost, and unanswered writes whose value nobody has seen.
func (r *Run) history(u int) []entry {
	seen := map[uint64]bool{0: true}
	for _, e := range r.units[u] {
		if e.kind == readOf {
			seen[e.value] = true
		}
	}
	var h []entry
	for _, e := range r.units[u] {
		if e.kind != writeOf || e.ret != never || seen[e.value] {
			h = append(h, e)
		}
	}
	if len(r.losses) > 0 {
		h = append(append(h, r.flushes...), r.losses...)
	}
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
