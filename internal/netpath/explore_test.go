package netpath

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// The world of the explorer: two hosts on one LAN with a tunnel each way. Time
// goes in ticks; a host that is not stepped is a slow host.

var tickPolicy = Policy{Down: 1, Stable: 2, Drain: 1, Patience: 1, Silent: 1}

const aliveFor = 1 // ticks after which the last word counts as silence

// box is the kernel of a host as it really is: what the actions change.
type box struct {
	client          int // other host, or -1
	uplink, in, out bool
	server          bool // for the other host
	staticRule      bool // nothing goes from uplink to client end or back
}

type host struct {
	up    bool // agent runs
	m     Machine
	k     box
	plan  Plan
	busy  bool
	half  bool // in the middle of a step that the mutant splits
	heard Word
	at    int // tick of the last word, -1: none in this life
	// The world's own books.
	wire   bool // carrier of the uplink
	wireAt int
}

type world struct {
	mut    string
	now    int
	h      [2]host
	mail   [2]*Word // on its way to host i: the newest; an older one is overtaken, so lost
	alink  bool
	budget [3]int            // wire changes, A-link changes, crashes
	loops  map[[2]box]string // by kernels, shared by all worlds
	viol   string
}

var names = [2]string{"a", "b"}

func newWorld(mut string, budget [3]int) *world {
	w := &world{mut: mut, alink: true, budget: budget, loops: map[[2]box]string{}}
	for i := range w.h {
		h := &w.h[i]
		h.wire = true
		h.k = box{client: -1, uplink: true, staticRule: mut != "no-static-rule"}
		w.boot(i)
	}
	return w
}

func (w *world) boot(i int) {
	h := &w.h[i]
	h.up, h.busy, h.half, h.at, h.plan, h.heard = true, false, false, -1, Plan{}, Word{}
	h.m = *New(tickPolicy)
	h.m.rules.mut = w.mut
}

// have is what an owner reads from the kernel.
func (w *world) have(i int) Kernel {
	h := &w.h[i]
	k := Kernel{}
	if h.k.client >= 0 {
		k.Client = names[h.k.client]
		switch {
		case h.k.out:
			k.State = Open
		case h.k.in:
			k.State = Drain
		default:
			k.State = Shut
		}
	}
	if h.k.server {
		k.Serving = []string{names[1-i]}
	}
	if w.mut == "forget-client" {
		k.Client, k.State = "", None
	}
	return k
}

func (w *world) alive(i int) bool {
	return w.h[i].at >= 0 && w.now-w.h[i].at <= aliveFor
}

type move struct {
	op string
	i  int
}

func (w *world) moves() (ms []move) {
	ms = append(ms, move{"tick", 0})
	for i := range w.h {
		h := &w.h[i]
		switch {
		case !h.up:
			ms = append(ms, move{"boot", i})
		case h.busy:
			ms = append(ms, move{"act", i})
		default:
			ms = append(ms, move{"step", i})
		}
		if w.mail[i] != nil {
			// One that is never delivered is lost: the next overtakes it.
			if w.alink && h.up {
				ms = append(ms, move{"deliver", i})
			}
		}
		if w.budget[0] > 0 {
			ms = append(ms, move{"wire", i})
		}
		if w.budget[2] > 0 && h.up {
			ms = append(ms, move{"crash", i})
		}
	}
	if w.budget[1] > 0 {
		ms = append(ms, move{"alink", 0})
	}
	return ms
}

func (w *world) clone() *world {
	n := *w
	return &n
}

func (w *world) apply(mv move) *world {
	n := w.clone()
	h := &n.h[mv.i]
	switch mv.op {
	case "tick":
		n.now++
	case "boot":
		n.boot(mv.i)
	case "crash":
		n.budget[2]--
		h.up, h.busy = false, false
	case "wire":
		n.budget[0]--
		h.wire = !h.wire
		h.wireAt = n.now
	case "alink":
		n.budget[1]--
		n.alink = !n.alink
	case "deliver":
		h.heard, h.at = *n.mail[mv.i], n.now
		n.mail[mv.i] = nil
	case "step":
		n.step(mv.i)
	case "act":
		n.act(mv.i)
	}
	n.check()
	return n
}

func (w *world) step(i int) {
	h := &w.h[i]
	have := w.have(i)
	in := Inputs{Now: time.Duration(w.now), Uplink: h.wire, Have: have,
		Peers: []Peer{PeerOf(names[1-i], names[i], w.alive(i), h.heard)}}
	h.plan = h.m.Step(in)
	if have.State == Open && h.plan.Via == "" && h.plan.Drain != "" && w.now-h.wireAt < int(tickPolicy.Stable) {
		w.viol = fmt.Sprintf("%s goes back after %d ticks", names[i], w.now-h.wireAt)
	}
	h.busy = true
}

func (w *world) act(i int) {
	h := &w.h[i]
	if h.half { // the second half of a step that must be whole
		h.half = false
		h.k.uplink = false
		return
	}
	a := next(w.have(i), h.plan, h.m.rules)
	k := &h.k
	switch a.Kind {
	case Nothing:
		h.busy = false
		word := h.m.Say(w.have(i), h.plan)
		w.mail[1-i] = &word
	case JoinClient:
		k.client, k.in, k.out = 1-i, false, false
		if w.mut == "join-open" {
			k.in, k.out = true, true
		}
	case OpenClient:
		k.in, k.out = true, true
		if w.mut == "two-steps" {
			h.half = true
		} else {
			k.uplink = false
		}
	case DrainClient:
		k.in, k.out, k.uplink = true, w.mut == "drain-lets-out", true
	case ShutClient:
		k.in, k.out, k.uplink = false, false, true
	case LeaveClient:
		k.client, k.in, k.out = -1, false, false
	case JoinServer:
		k.server = true
	case LeaveServer:
		k.server = false
	}
}

// check judges every state, also between the steps of one plan. Wires and
// A-link count as whole: a fault may end at any moment.
func (w *world) check() {
	for i := range w.h {
		k := &w.h[i].k
		if k.uplink && k.out {
			w.viol = names[i] + ": both ways forward"
		}
		if k.client >= 0 && k.server {
			w.viol = names[i] + ": client end and server end in one bridge"
		}
	}
	pair := [2]box{w.h[0].k, w.h[1].k}
	loop, known := w.loops[pair]
	if !known {
		loop = w.loop()
		w.loops[pair] = loop
	}
	if loop != "" {
		w.viol = "loop: " + loop
	}
}

// loop looks for a way by which a frame comes back to where it was. A place is
// a port into which the frame just came: "from the LAN into a", "from the
// tunnel into the client end of a", "... into the server end of a", and the LAN.
func (w *world) loop() string {
	type place struct {
		i   int
		via string
	}
	next := func(p place) (out []place) {
		if p.via == "lan" { // the LAN floods to all
			for j := range w.h {
				if w.h[j].k.uplink {
					out = append(out, place{j, "uplink"})
				}
			}
			return out
		}
		k := &w.h[p.i].k
		o := 1 - p.i
		if p.via != "uplink" && k.uplink && !(p.via == "client" && k.staticRule) {
			out = append(out, place{0, "lan"})
		}
		// Out of the client end into the other's server end.
		if p.via != "client" && k.client == o && k.out && w.h[o].k.server && !(p.via == "uplink" && k.staticRule) {
			out = append(out, place{o, "server"})
		}
		// Out of the server end into the other's client end.
		if p.via != "server" && k.server && w.h[o].k.client == p.i && w.h[o].k.in {
			out = append(out, place{o, "client"})
		}
		return out
	}
	var visit func(path []place) string
	visit = func(path []place) string {
		for _, n := range next(path[len(path)-1]) {
			if slices.Contains(path, n) {
				return fmt.Sprint(append(path, n))
			}
			if s := visit(append(slices.Clone(path), n)); s != "" {
				return s
			}
		}
		return ""
	}
	starts := []place{{0, "lan"}}
	for i := range w.h {
		starts = append(starts, place{i, "client"}, place{i, "server"})
	}
	for _, s := range starts {
		if l := visit([]place{s}); l != "" {
			return l
		}
	}
	return ""
}

// key names a state; times count relative to now, and only as far as anything
// depends on them.
func (w *world) key() string {
	b := make([]byte, 0, 96)
	flag := func(fs ...bool) {
		var v byte
		for i, f := range fs {
			if f {
				v |= 1 << i
			}
		}
		b = append(b, v)
	}
	age := func(t time.Duration, limit time.Duration) { b = append(b, byte(min(time.Duration(w.now)-t, limit))) }
	host := func(s string) {
		b = append(b, 0)
		copy(b[len(b)-1:], s)
	}
	word := func(x Word) { flag(x.Offers, len(x.Serves) > 0, x.Ask != "") }
	b = append(b, byte(w.budget[0]), byte(w.budget[1]), byte(w.budget[2]))
	flag(w.alink)
	for i := range w.h {
		h := &w.h[i]
		m := &h.m
		flag(h.up, h.busy, h.half, h.wire, m.known, m.good, m.failed, w.mail[i] != nil)
		flag(h.k.uplink, h.k.in, h.k.out, h.k.server, h.k.client >= 0)
		if w.mail[i] != nil {
			word(*w.mail[i])
		}
		age(time.Duration(h.wireAt), tickPolicy.Stable)
		if h.at >= 0 {
			age(time.Duration(h.at), aliveFor+1)
			if w.alive(i) {
				word(h.heard)
			}
		} else {
			b = append(b, aliveFor+1)
		}
		if !h.up {
			continue
		}
		if h.busy {
			host(h.plan.Via)
			host(h.plan.Drain)
			host(h.plan.Ask)
			flag(len(h.plan.Serve) > 0)
		}
		age(m.since, tickPolicy.Stable)
		if host(m.ask); m.ask != "" {
			age(m.askedAt, tickPolicy.Patience)
		}
		if h.k.client >= 0 {
			b = append(b, byte(max(int(m.drainUntil)-w.now, 0)))
		}
	}
	return string(b)
}

type found struct {
	states int
	viol   string
	trace  []string
	full   bool
}

// explore visits every state within the budgets, breadth first. visit is called
// for each new one.
func explore(start *world, limit int, visit func(*world) string) found {
	type node struct {
		w      *world
		parent int
		mv     move
	}
	nodes := []node{{start, -1, move{}}}
	seen := map[string]bool{start.key(): true}
	story := func(i int) (out []string) {
		for ; i > 0; i = nodes[i].parent {
			out = append([]string{nodes[i].mv.op + " " + names[nodes[i].mv.i]}, out...)
		}
		return out
	}
	for at := 0; at < len(nodes); at++ {
		w := nodes[at].w
		for _, mv := range w.moves() {
			n := w.apply(mv)
			k := n.key()
			if seen[k] && n.viol == "" {
				continue
			}
			seen[k] = true
			nodes = append(nodes, node{n, at, mv})
			if n.viol == "" && visit != nil {
				n.viol = visit(n)
			}
			if n.viol != "" {
				return found{len(seen), n.viol, story(len(nodes) - 1), false}
			}
		}
		nodes[at].w = nil
		if len(nodes) > limit {
			return found{states: len(seen)}
		}
	}
	return found{states: len(seen), full: true}
}

// settle lets the world go on without further faults, with these wires, and
// says what is not as it should be then.
func settle(from *world, wires [2]bool) string { return from.clone().settle(wires) }

func (w *world) settle(wires [2]bool) string {
	w.alink = true
	for i := range w.h {
		if w.h[i].wire != wires[i] {
			w.h[i].wire, w.h[i].wireAt = wires[i], w.now
		}
		if !w.h[i].up {
			w.boot(i)
		}
	}
	for range 60 {
		w.now++
		for range 3 {
			for i := range w.h {
				if !w.h[i].busy {
					w.step(i)
				}
				for n := 0; w.h[i].busy; n++ {
					if w.act(i); n > 10 {
						return names[i] + " does not get to what it plans"
					}
				}
				if w.mail[1-i] != nil {
					w.h[1-i].heard, w.h[1-i].at = *w.mail[1-i], w.now
					w.mail[1-i] = nil
				}
			}
			if w.check(); w.viol != "" {
				return w.viol
			}
		}
	}
	for i := range w.h {
		k, o := w.have(i), names[1-i]
		switch {
		case wires[i] && !wires[1-i]:
			if k.Client != "" || !slices.Equal(k.Serving, []string{o}) {
				return fmt.Sprintf("%s should carry %s: %+v", names[i], o, k)
			}
		case !wires[i] && wires[1-i]:
			if k.Carried() != o || len(k.Serving) > 0 {
				return fmt.Sprintf("%s should be carried by %s: %+v", names[i], o, k)
			}
		default:
			if k.Client != "" || len(k.Serving) > 0 {
				return fmt.Sprintf("%s should be left alone: %+v", names[i], k)
			}
		}
	}
	return ""
}

// settles tries, from every hundredth state, what becomes of it when the faults end.
func settles() func(*world) string {
	n := 0
	return func(w *world) string {
		if n++; n%100 != 0 {
			return ""
		}
		for _, wires := range [][2]bool{{true, true}, {false, true}, {true, false}, {false, false}} {
			if s := settle(w, wires); s != "" {
				return fmt.Sprintf("does not settle with uplinks %v: %s", wires, s)
			}
		}
		return ""
	}
}

func TestExplore(t *testing.T) {
	budgets := [][3]int{{1, 1, 0}, {1, 0, 1}}
	if testing.Short() {
		budgets = [][3]int{{1, 0, 0}}
	}
	for _, budget := range budgets {
		r := explore(newWorld("", budget), 1_000_000, settles())
		if r.viol != "" {
			t.Fatalf("%s\n%s", r.viol, strings.Join(r.trace, "\n"))
		}
		t.Logf("%d states, budgets %v, all visited: %v", r.states, budget, r.full)
		if !r.full {
			t.Errorf("the exploration was cut short")
		}
	}
}

// pick chooses a move: faults and ticks are rare, or nothing would ever come about.
func pick(ms []move, n func(int) int) move {
	group := [3][]move{}
	for _, mv := range ms {
		switch mv.op {
		case "wire", "alink", "crash":
			group[0] = append(group[0], mv)
		case "tick":
			group[1] = append(group[1], mv)
		default:
			group[2] = append(group[2], mv)
		}
	}
	g := group[2]
	switch r := n(100); {
	case r < 2 && len(group[0]) > 0:
		g = group[0]
	case r < 10:
		g = group[1]
	}
	return g[n(len(g))]
}

// TestWalk goes far at random where the explorer cannot go everywhere.
func TestWalk(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld("", [3]int{1000, 1000, 1000})
		for range rapid.IntRange(50, 400).Draw(t, "length") {
			mv := pick(w.moves(), func(n int) int { return rapid.IntRange(0, n-1).Draw(t, "move") })
			if w = w.apply(mv); w.viol != "" {
				t.Fatal(w.viol)
			}
		}
		for _, wires := range [][2]bool{{true, true}, {false, true}, {true, false}, {false, false}} {
			if s := settle(w, wires); s != "" {
				t.Fatalf("does not settle with uplinks %v: %s", wires, s)
			}
		}
	})
}

// TestMutants breaks one rule at a time; each has to be noticed.
func TestMutants(t *testing.T) {
	for mut, want := range map[string]string{
		"two-steps":           "both ways forward",
		"join-open":           "both ways forward",
		"drain-lets-out":      "both ways forward",
		"serve-while-carried": "client end and server end",
		"forget-client":       "does not get to",
		"no-static-rule":      "loop",
		"no-stable":           "goes back after",
		"ask-nobody":          "should be carried",
		"never-serve":         "should",
	} {
		t.Run(mut, func(t *testing.T) {
			rnd := rand.New(rand.NewPCG(1, 2))
			var viol string
			walks := 0
			for ; viol == "" && walks < 5000; walks++ {
				w := newWorld(mut, [3]int{1000, 1000, 1000})
				for range 300 {
					if w = w.apply(pick(w.moves(), rnd.IntN)); w.viol != "" {
						break
					}
				}
				if viol = w.viol; viol == "" {
					viol = settle(w, [2]bool{false, true})
				}
			}
			if viol == "" || !strings.Contains(viol, want) {
				t.Errorf("not noticed, or as something else: %q", viol)
			}
			t.Logf("%d walks: %s", walks, viol)
		})
	}
}
