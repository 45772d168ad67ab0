package replica

import (
	"hash/maphash"
	"math/rand/v2"
	"strings"
	"testing"
)

// explored is one run through a world.
type explored struct {
	states int
	whole  bool
	bad    string
	way    []string
	phases map[Phase]bool
	rows   map[string]bool
}

// explore goes through every state, breadth first so that the way to a violation
// is a shortest one, up to a number of states.
func explore(start *world, limit int) explored {
	type item struct {
		w    *world
		from int
		name string
	}
	r := explored{phases: map[Phase]bool{}, rows: map[string]bool{}}
	s1, s2 := maphash.MakeSeed(), maphash.MakeSeed()
	seen := map[[2]uint64]bool{}
	type step struct {
		from int
		name string
	}
	var steps []step
	way := func(n int) (out []string) {
		for ; n > 0; n = steps[n].from {
			out = append([]string{steps[n].name}, out...)
		}
		return out
	}
	queue := []item{{w: start}}
	for len(queue) > 0 {
		it := queue[0]
		queue[0].w = nil
		queue = queue[1:]
		k := it.w.key()
		id := [2]uint64{maphash.String(s1, k), maphash.String(s2, k)}
		if seen[id] {
			continue
		}
		seen[id] = true
		steps = append(steps, step{it.from, it.name})
		me := len(steps) - 1
		it.w.check()
		for i := range it.w.hosts {
			m := &it.w.n[i].m
			r.phases[m.phase], r.rows[m.judge.Row] = true, true
		}
		if it.w.bad != "" {
			r.bad, r.way, r.states = it.w.bad, way(me), len(seen)
			return r
		}
		if len(seen) >= limit {
			r.states = len(seen)
			return r
		}
		for _, m := range it.w.moves() {
			c := it.w.clone()
			m.do(c)
			queue = append(queue, item{c, me, m.name})
		}
	}
	r.states, r.whole = len(seen), true
	return r
}

// fault reports whether a move is something going wrong; the rest is the product's work.
func fault(name string) bool {
	return strings.Contains(name, "power off, keeping") || name == "session lost"
}

// walk goes one way at random; faults are rarer than work.
func walk(w *world, rng *rand.Rand, steps int, rows map[string]bool) (string, []string) {
	var way []string
	for range steps {
		ms := w.moves()
		if len(ms) == 0 {
			break
		}
		m := ms[rng.IntN(len(ms))]
		if fault(m.name) && rng.IntN(8) > 0 {
			continue
		}
		way = append(way, m.name)
		m.do(w)
		w.check()
		for i := range w.hosts {
			rows[w.n[i].m.judge.Row] = true
		}
		if w.bad != "" {
			return w.bad, way
		}
	}
	return "", way
}

// drive makes moves by name, as far as they are possible, and everything that
// needs no choice in between: disks and messages.
func drive(t testing.TB, w *world, names ...string) *world {
	t.Helper()
	for _, name := range append(names, "") {
		settle(w)
		if name == "" {
			break
		}
		done := false
		for _, m := range w.moves() {
			if done = m.name == name; done {
				m.do(w)
				break
			}
		}
		if !done {
			var have []string
			for _, m := range w.moves() {
				have = append(have, m.name)
			}
			t.Fatalf("%q is not possible; possible: %q", name, have)
		}
	}
	if w.check(); w.bad != "" {
		t.Fatal(w.bad)
	}
	return w
}

func settle(w *world) {
	for again := true; again; {
		again = false
		for _, m := range w.moves() {
			if strings.HasSuffix(m.name, " disk") || strings.HasPrefix(m.name, "deliver") || strings.HasSuffix(m.name, "hears of the loss") {
				m.do(w)
				again = true
				break
			}
		}
	}
}

// pairOf is a world in which two hosts are a pair, and both hold a write.
func pairOf(t testing.TB, hosts int, left budget, mut mutants) *world {
	w := newWorld(hosts, budget{writes: 1, starts: 1, assigns: 1}, mut)
	drive(t, w, "h0 start", "write 0", "flush", "h0 assigns h1", "session", "copy 0", "copy 1", "caught up", "h0 duplex")
	w.left = left
	return w
}

var explorations = map[string]struct {
	pair  bool
	left  budget
	whole bool
	first []string // moves that were made before
}{
	"first":           {false, budget{writes: 1, crashes: 1, starts: 2, assigns: 1}, true, nil},
	"first-loss":      {false, budget{writes: 1, losses: 1, starts: 1, assigns: 2}, false, nil},
	"pair-crash":      {true, budget{writes: 1, crashes: 1, starts: 1, assigns: 1}, true, nil},
	"pair-loss":       {true, budget{writes: 2, losses: 1, assigns: 1}, false, nil},
	"pair-twice":      {true, budget{writes: 1, crashes: 2, starts: 2, assigns: 1}, false, nil},
	"pair-loss-cut":   {true, budget{writes: 1, crashes: 1, losses: 1, starts: 1, assigns: 2}, false, nil},
	"simplex-granted": {true, budget{writes: 1, crashes: 1, starts: 1, assigns: 1}, true, []string{"session lost", "h0 claims simplex"}},
	"last-boundary":   {false, budget{writes: 1, losses: 1, assigns: 1}, true, []string{"h0 start", "h0 assigns h1", "session", "copy 0", "copy 1"}},
	"old-primary":     {true, budget{writes: 1, crashes: 1, losses: 1, assigns: 1}, false, []string{"write 0", "h0 power off, keeping 1", "h1 takes over", "h1 assigns h0"}},
	"pair-power-off":  {true, budget{writes: 1, crashes: 1, starts: 2, assigns: 1, stops: 1}, false, nil},
}

func exploration(t testing.TB, name string, mut mutants) *world {
	e := explorations[name]
	w := newWorld(2, e.left, mut)
	if e.pair {
		w = pairOf(t, 2, e.left, mut)
	}
	if len(e.first) > 0 {
		w.left = budget{9, 9, 9, 9, 9, 9}
		last := e.first[len(e.first)-1]
		drive(t, w, e.first[:len(e.first)-1]...)
		for _, m := range w.moves() { // what follows from the last one is explored
			if m.name == last {
				m.do(w)
				break
			}
		}
		w.left = e.left
	}
	return w
}

func TestExplore(t *testing.T) {
	states, rows, phases := 0, map[string]bool{}, map[Phase]bool{}
	for name, e := range explorations {
		limit := 7000
		if e.whole {
			limit = 20000
		}
		r := explore(exploration(t, name, mutants{}), limit)
		t.Logf("%s: %d states, whole: %v", name, r.states, r.whole)
		if r.bad != "" {
			t.Fatalf("%s\n%s", r.bad, strings.Join(r.way, "\n"))
		}
		if e.whole && !r.whole {
			t.Errorf("%s was not explored whole", name)
		}
		states += r.states
		for k := range r.rows {
			rows[k] = true
		}
		for k := range r.phases {
			phases[k] = true
		}
	}
	t.Logf("replica explorer: %d states, rows %v", states, rows)
	for p := PhaseClosed; p < PhaseFailed; p++ {
		if !phases[p] {
			t.Errorf("phase %s was never reached", p)
		}
	}
}

func TestWalks(t *testing.T) {
	rows := map[string]bool{}
	for seed := range uint64(2000) {
		rng := rand.New(rand.NewPCG(seed, 1))
		w := newWorld(2+int(seed%2), budget{writes: 12, crashes: 5, losses: 5, starts: 9, assigns: 12, stops: 2}, mutants{})
		if bad, way := walk(w, rng, 800, rows); bad != "" {
			t.Fatalf("seed %d: %s\n%s", seed, bad, strings.Join(way, "\n"))
		}
	}
	t.Log(rows)
}

func TestMutants(t *testing.T) {
	for name, c := range map[string]struct {
		mut   mutants
		world string // of explorations; "": walks with three hosts
	}{
		"no-marks":       {mutants{noMarks: true}, "pair-loss"},
		"no-rotate":      {mutants{noRotate: true}, "pair-loss"},
		"begin-early":    {mutants{beginEarly: true}, "simplex-granted"},
		"ending-forgets": {mutants{endingForgets: true}, "last-boundary"},
		"always-bitmap":  {mutants{alwaysBitmap: true}, ""},
		"no-rename":      {mutants{noRename: true}, ""},
		"keep-base":      {mutants{keepBase: true}, ""},
		"no-merge":       {mutants{noMerge: true}, "pair-crash"},
		"stays-uptodate": {mutants{staysUpToDate: true}, "pair-loss"},
	} {
		t.Run(name, func(t *testing.T) {
			bad, way := "", []string(nil)
			if c.world != "" {
				r := explore(exploration(t, c.world, c.mut), 40000)
				bad, way = r.bad, r.way
			}
			for seed := uint64(0); bad == "" && c.world == "" && seed < 20000; seed++ {
				w := newWorld(3, budget{writes: 12, crashes: 5, losses: 5, starts: 9, assigns: 12, stops: 2}, c.mut)
				bad, way = walk(w, rand.New(rand.NewPCG(seed, 2)), 800, map[string]bool{})
			}
			if bad == "" {
				t.Fatal("not found")
			}
			t.Logf("%s\n%s", bad, strings.Join(way, "\n"))
		})
	}
}
