package authority

import (
	"crypto/sha256"
	"fmt"
	"runtime/debug"
	"strings"
	"sync"
	"testing"

	"perdure/internal/model"
)

// result of one exploration.
type result struct {
	states, moves, depth int
	viol                 string
	trace                []move // shortest way to the violation
	full                 bool   // nothing was left unexplored
}

// explore visits every state reachable within the budgets, breadth first, so
// that a violation is found by the shortest way. limit bounds the states.
func explore(sc *scenario, limit int) result {
	start := &world{cfg: sc, left: sc.left}
	sc.init(start)
	type link struct {
		parent int32
		mv     move
	}
	seen := map[[16]byte]struct{}{}
	var links []link
	var buf []byte
	key := func(w *world) [16]byte {
		buf = w.code(buf)
		sum := sha256.Sum256(buf)
		return [16]byte(sum[:16])
	}
	type node struct {
		w  *world
		id int32
	}
	way := func(id int32) []move {
		var ms []move
		for ; id > 0; id = links[id].parent {
			ms = append([]move{links[id].mv}, ms...)
		}
		return ms
	}
	seen[key(start)] = struct{}{}
	links = append(links, link{-1, move{}})
	layer := []node{{start, 0}}
	var res result
	var ms []move
	for len(layer) > 0 {
		var nextLayer []node
		for _, nd := range layer {
			ms = nd.w.moves(ms)
			for _, m := range ms {
				n := nd.w.apply(m)
				res.moves++
				k := key(n)
				if _, ok := seen[k]; ok && n.viol == "" {
					continue
				}
				seen[k] = struct{}{}
				id := int32(len(links))
				links = append(links, link{nd.id, m})
				if n.viol != "" {
					res.states, res.viol, res.trace = len(seen), n.viol, way(id)
					return res
				}
				if len(links) < limit {
					nextLayer = append(nextLayer, node{n, id})
				}
			}
		}
		if len(nextLayer) > 0 {
			res.depth++
		}
		layer = nextLayer
	}
	res.states = len(seen)
	res.full = len(links) < limit
	return res
}

// story replays a trace into lines an operator can read.
func story(sc *scenario, trace []move) string {
	var b strings.Builder
	w := &world{cfg: sc, left: sc.left}
	sc.init(w)
	fmt.Fprintf(&b, "start: %s\n", FormatRecord(w.rec.Record))
	w.log = func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	for _, m := range trace {
		w = w.apply(m)
	}
	fmt.Fprintf(&b, "VIOLATION: %s\n", w.viol)
	return b.String()
}

func baseRecord() model.Record {
	return model.Record{
		VM: "vm", Level: model.LevelFT, Mode: model.ModeStopped, Wanted: model.WantStopped,
		Replicas: map[string]model.Replica{"a": {State: model.UpToDate}},
	}
}

func must(t model.Record, err error) model.Record {
	if err != nil {
		panic(err)
	}
	return t
}

// addShim puts a shim on h that has already read the record.
func (w *world) addShim(h int, feed ...Event) {
	hs := &w.h[h]
	hs.side = New(Config{Host: hostNames[h], ClaimDelayMS: 2, RetryMS: 10})
	hs.side.u = rules{mut: w.cfg.mut}
	hs.mem = garbage
	for _, ev := range feed {
		hs.side.Step(ev)
	}
}

// initStopped: a VM that was never started, its disk on a and a copy of the
// same content on b (as after a duplex power-off).
func initStopped(w *world) {
	r := baseRecord()
	r.Replicas["b"] = model.Replica{State: model.UpToDate}
	w.rec = model.Versioned{Record: r, Revision: 10}
	w.insts = []instance{{from: garbage, rel: 0, host: 0}}
	w.h[0].disk, w.h[1].disk = pos{0, 0}, pos{0, 0}
	w.h[0].mem, w.h[1].mem = garbage, garbage
}

// initSimplex: a runs alone, epoch 1 seen outside; b has an old replica.
func initSimplex(w *world) {
	w.rec.Revision = 10
	base := baseRecord()
	if w.ca {
		base.Level = model.LevelCA
	}
	st := w.keep(must(Start(base, "a")))
	w.addShim(0, EvStart{}, EvRecord{Versioned: st, Found: true}, EvFilled{Run: "r1"})
	sx := w.keep(must(Booted(st.Record, "a", "r1")))
	w.h[0].side.Step(EvSwap{ID: 1, Outcome: Done, Current: sx})
	w.insts = []instance{{from: garbage, rel: 1, host: 0}}
	w.h[0].disk, w.h[0].mem, w.h[0].running = pos{0, 1}, pos{0, 1}, true
	w.h[1].disk, w.h[1].mem = pos{0, 0}, garbage
	w.runs = 1
}

// keep makes r the next record of the store.
func (w *world) keep(r model.Record) model.Versioned {
	w.rec = model.Versioned{Record: r, Revision: w.rec.Revision + 1}
	if w.cfg.mut.anyRead {
		w.hist = append(w.hist, w.rec)
	}
	return w.rec
}

// initSyncing: a runs, epoch 1 seen outside, and has begun to copy to b.
func initSyncing(w *world) {
	initSimplex(w)
	a, b := &w.h[0], &w.h[1]
	a.side.Step(EvProtect{Host: "b"})
	a.side.Step(EvRecord{Versioned: w.rec, Found: true})
	sy := w.keep(must(Assign(w.rec.Record, "b")))
	a.side.Step(EvSwap{ID: 2, Outcome: Done, Current: sy})
	w.addShim(1, EvStart{}, EvRecord{Versioned: sy, Found: true})
	a.side.Step(EvPeerUp{Host: "b"})
	b.side.Step(EvPeerUp{Host: "a", Run: "r1", Term: sy.Record.Term})
	a.session, a.link, a.syncStage = true, true, 1
	b.session, b.link, b.begun, b.disk = true, true, true, garbage
}

// initDuplex: a is primary, b secondary, epoch 1 committed and seen outside.
func initDuplex(w *world) {
	initSyncing(w)
	a, b := &w.h[0], &w.h[1]
	b.side.Step(EvFilled{Run: "r2", Epoch: 1})
	a.side.Step(EvCaughtUp{})
	a.side.Step(EvSynced{Host: "b", Run: "r2", Epoch: 1})
	dx := w.keep(must(Duplex(w.rec.Record, "b", "r2")))
	a.side.Step(EvSwap{ID: 3, Outcome: Done, Current: dx})
	b.side.Step(EvPeerTerm{Term: dx.Record.Term})
	b.side.Step(EvRecord{Versioned: dx, Found: true})
	b.mem, b.disk, b.acking = pos{0, 1}, pos{0, 1}, b.side.Acking()
	a.acked, a.ackRun, a.syncStage = 1, "r2", 2
	w.runs = 2
}

// initDuplexCA is initDuplex at level ca.
func initDuplexCA(w *world) {
	w.ca = true
	initDuplex(w)
}

// initCarried is initDuplexCA after the disk of a has failed, and the record says so.
func initCarried(w *world) {
	initDuplexCA(w)
	a, b := &w.h[0], &w.h[1]
	a.dead = true
	a.side.Step(EvReplicaLost{})
	lost := w.keep(must(LostReplica(w.rec.Record)))
	a.side.Step(EvSwap{ID: 4, Outcome: Done, Current: lost})
	b.side.Step(EvPeerTerm{Term: lost.Record.Term})
	b.side.Step(EvRecord{Versioned: lost, Found: true})
}

// scenarios are the worlds that are explored whole.
func scenarios() []*scenario {
	mk := func(name string, init func(*world), left budget) *scenario {
		return &scenario{name: name, init: init, left: left, maxOut: 2, maxMsg: 2, validate: true}
	}
	return []*scenario{
		mk("duplex: silence wrongly taken, the peer comes back", initDuplex, budget{epoch: 2, lost: 2, connect: 1, unknown: 1}),
		mk("duplex: silence wrongly taken, answers lost", initDuplex, budget{epoch: 2, lost: 2, unknown: 2, unread: 1}),
		mk("duplex: a shim dies, its agent acts", initDuplex, budget{epoch: 2, crash: 1, lost: 1, blind: 1, unread: 1, disk: 1}),
		mk("duplex: both shims die", initDuplex, budget{epoch: 2, crash: 2, unknown: 1, disk: 2}),
		mk("duplex: power fails on both", initDuplex, budget{epoch: 2, power: 2, silence: 1, disk: 2}),
		mk("duplex: silence, then power fails on both", initDuplex, budget{epoch: 2, power: 2, lost: 1, disk: 2}),
		mk("duplex: frozen and thawed", initDuplex, budget{epoch: 2, freeze: 2, lost: 2, power: 1, disk: 1}),
		mk("duplex: survivor", initDuplex, budget{epoch: 2, survOn: 1, survOff: 2, lost: 2}),
		mk("duplex: survivor on, off and on again", initDuplex, budget{epoch: 2, survOn: 2, survOff: 2, lost: 1}),
		mk("duplex: survivor, the peer comes back", initDuplex, budget{epoch: 2, survOn: 1, lost: 2, connect: 1}),
		mk("duplex: survivor, a host dies", initDuplex, budget{epoch: 2, survOn: 1, lost: 1, power: 1, disk: 1}),
		mk("duplex: switchover", initDuplex, budget{epoch: 2, handover: 1, lost: 1, unknown: 1}),
		mk("duplex: switchover by a survivor", initDuplex, budget{epoch: 2, handover: 1, survOn: 1, lost: 1, connect: 1}),
		mk("duplex: switchover, a shim dies", initDuplex, budget{epoch: 2, handover: 1, crash: 1, lost: 1, disk: 1}),
		mk("duplex: power-off by the guest", initDuplex, budget{epoch: 2, off: 1, lost: 1, unknown: 1}),
		mk("duplex: power-off and start, wanted changes", initDuplex, budget{epoch: 2, off: 1, lost: 1, start: 1, paused: 1}),
		mk("syncing: to duplex and on", initSyncing, budget{epoch: 3, lost: 1, unknown: 1}),
		mk("syncing: a shim dies", initSyncing, budget{epoch: 3, crash: 1, connect: 1, disk: 1}),
		mk("simplex: protect", initSimplex, budget{epoch: 3, protect: 1, connect: 1, lost: 1}),
		mk("stopped: start, die, start again", initStopped, budget{epoch: 1, start: 1, crash: 1, unknown: 1, disk: 1}),
		mk("stopped: two agents start it", initStopped, budget{epoch: 1, start: 2, power: 1, off: 1, disk: 1}),
		mk("ca: the primary's disk fails", initDuplexCA, budget{epoch: 3, diskFail: 1, lost: 2, unknown: 1}),
		mk("ca: it fails, and is filled anew", initDuplexCA, budget{epoch: 2, diskFail: 2, refill: 2, unknown: 2}),
		mk("ca: it fails, and hosts lose power", initCarried, budget{epoch: 2, diskFail: 1, refill: 1, power: 2, disk: 2}),
		mk("ca: it fails, shims die", initCarried, budget{epoch: 2, refill: 1, crash: 2, disk: 2, protect: 1, connect: 1}),
		mk("ca: it fails under the survivor right", initDuplexCA, budget{epoch: 2, diskFail: 1, refill: 1, survOn: 1, survOff: 1, lost: 1}),
		mk("ca: it fails, the guest powers off", initDuplexCA, budget{epoch: 2, diskFail: 1, off: 1, lost: 1, unknown: 1, start: 1}),
		mk("ca: it fails, frozen and thawed", initDuplexCA, budget{epoch: 2, diskFail: 1, refill: 1, freeze: 2, lost: 2}),
		mk("level: written down while alone, protected by the new one", initSimplex, budget{epoch: 2, level: 1, protect: 1, connect: 1, unknown: 1}),
		mk("level: it meets a protection, answers are lost", initSimplex, budget{epoch: 1, level: 2, protect: 2, unknown: 1, lost: 1}),
		mk("level: of a pair that is left", initDuplexCA, budget{epoch: 2, level: 2, lost: 1, unknown: 1, protect: 1, connect: 1}),
		mk("level: the disk fails, and the level was another", initDuplexCA, budget{epoch: 2, level: 1, diskFail: 1, refill: 1, lost: 1, protect: 1, connect: 1}),
		mk("level: of a VM that is stopped, and started", initDuplex, budget{epoch: 1, off: 1, level: 2, start: 1, crash: 1, disk: 1}),
		mk("duplex: takeover, return, protect again", initDuplex, budget{epoch: 2, crash: 1, protect: 1, connect: 1, disk: 1}),
	}
}

// TestExplore visits every state that the scenarios can reach. It is the proof
// that the rules hold together, as far as the small world goes.
func TestExplore(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(400))
	limit := 50_000
	if raceEnabled || testing.Short() {
		limit = 2_000
	}
	var mu sync.Mutex
	var states, moves, depth int
	seen := map[string]bool{}
	t.Run("worlds", func(t *testing.T) {
		for _, sc := range scenarios() {
			t.Run(sc.name, func(t *testing.T) {
				t.Parallel()
				res := explore(sc, limit)
				t.Logf("%d states, %d transitions, depth %d, whole: %v", res.states, res.moves, res.depth, res.full)
				if res.viol != "" {
					t.Errorf("%s\n%s", res.viol, story(sc, res.trace))
				}
				mu.Lock()
				defer mu.Unlock()
				states, moves, depth = states+res.states, moves+res.moves, max(depth, res.depth)
				for k := range sc.seen {
					seen[k] = true
				}
			})
		}
	})
	line := fmt.Sprintf("authority explorer: %d states, %d transitions, depth %d", states, moves, depth)
	fmt.Println(line)
	t.Log(line)
	for _, k := range []string{"start on", "booted on", "protect on", "duplex with", "secondary dropped", "takeover by",
		"switchover to", "replica on lost", "replica on whole again", "start from disk on", "power-off", "survivor", "survivor removed", "wanted paused", "level none", "level ca", "level ft", "settle an unresolved swap"} {
		if !seen[k] && limit >= 50_000 {
			t.Errorf("no scenario reached a change of the kind %q", k)
		}
	}
	if states < 100_000 && limit >= 50_000 {
		t.Errorf("the small world became too small: %d states, want at least 100,000", states)
	}
}

// TestWalks goes deeper than the whole exploration can: long random walks with
// many faults. Then the faults stop, and the VM must come to run again (or be
// stopped, as asked): a rule that is safe because nothing moves is no rule.
// The seed is printed by the walk that fails.
func TestWalks(t *testing.T) {
	walks := 3000
	if raceEnabled || testing.Short() {
		walks = 100
	}
	left := budget{epoch: 20, crash: 3, power: 2, freeze: 2, lost: 5, connect: 6, protect: 4, survOn: 2, survOff: 2,
		off: 1, handover: 2, silence: 1, start: 2, blind: 1, paused: 1, unknown: 8, unread: 4, disk: 4, diskFail: 2, refill: 2, level: 3}
	inits := []func(*world){initDuplex, initSyncing, initSimplex, initStopped, initDuplexCA, initCarried}
	steps, healed := 0, 0
	for seed := range uint64(walks) {
		sc := &scenario{name: "walk", init: inits[seed%6], left: left, maxOut: 3, maxMsg: 4, validate: true}
		w := &world{cfg: sc, left: sc.left}
		sc.init(w)
		wk := &walker{x: seed*0x9e3779b97f4a7c15 + 1, w: w}
		for range 120 {
			wk.step(func(m move) bool {
				return m.kind != mvCrash && m.kind != mvPowerCut && m.kind != mvFreeze && m.kind != mvPowerOff || wk.x>>32%4 == 0
			})
		}
		// Losing the peer once in a while stands for the data plane's own
		// "nothing moves": the world loses messages without a word.
		wk.w.left = budget{epoch: wk.w.left.epoch, connect: 100, disk: 10, lost: 100}
		calm := 0
		for calm = 0; calm < 3000 && wk.w.viol == "" && !wk.w.settled(); calm++ {
			wk.step(func(m move) bool { return m.kind != mvConnect && m.kind != mvPeerLost || wk.x>>32%16 == 0 })
		}
		steps += len(wk.way)
		switch {
		case wk.w.viol != "":
			t.Fatalf("seed %d: %s\n%s", seed, wk.w.viol, wk.story(sc))
		case calm == 3000:
			t.Fatalf("seed %d: after the last fault nothing runs\n%s", seed, wk.story(sc))
		case wk.w.rec.Record.Mode != model.ModeStopped:
			healed++
		}
	}
	t.Logf("%d walks, %d steps, %d ended with a running VM", walks, steps, healed)
}

// walker takes random steps and remembers them.
type walker struct {
	x   uint64
	w   *world
	way []string
	ms  []move
}

func (k *walker) step(like func(move) bool) {
	if k.w.viol != "" {
		return
	}
	k.ms = k.w.moves(k.ms)
	if len(k.ms) == 0 {
		return
	}
	k.x ^= k.x << 13
	k.x ^= k.x >> 7
	k.x ^= k.x << 17
	m := k.ms[k.x%uint64(len(k.ms))]
	if !like(m) {
		return
	}
	k.w.log = func(format string, args ...any) { k.way = append(k.way, fmt.Sprintf(format, args...)) }
	k.w = k.w.apply(m)
}

func (k *walker) story(sc *scenario) string {
	return strings.Join(k.way, "\n") + "\nVIOLATION: " + k.w.viol
}

// settled reports whether the VM is in a state that needs nobody: stopped, or
// running with its output leaving.
func (w *world) settled() bool {
	r := w.rec.Record
	if r.Mode == model.ModeStopped {
		return true
	}
	if r.Wanted == model.WantStopped {
		return false
	}
	for h := range w.h {
		hs, o := &w.h[h], &w.h[1-h]
		if hs.side == nil || hs.frozen || !hs.running || hs.off || hs.side.Unresolved() || r.Primary.Run != hs.side.run {
			continue
		}
		if hs.side.Output() == OutputFree {
			return true
		}
		if hs.side.Output() == OutputAcked && r.Mode == model.ModeDuplex && o.side != nil && o.side.phase == phaseStandby &&
			o.side.Acking() && hs.session && o.session && hs.link && o.link && !o.frozen {
			return true
		}
	}
	return false
}
