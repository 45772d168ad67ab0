package replica

import (
	"fmt"

	"perdure/internal/authority"
	"perdure/internal/model"
)

// move is one thing that can happen next.
type move struct {
	name string
	do   func(*world)
}

// moves lists everything that can happen in w.
func (w *world) moves() []move {
	var ms []move
	add := func(name string, do func(*world)) { ms = append(ms, move{name, do}) }
	for i := range w.hosts {
		n := &w.n[i]
		if n.busy != 0 {
			add(fmt.Sprintf("h%d disk", i), func(w *world) { w.persist(i) })
		}
		if n.lost {
			add(fmt.Sprintf("h%d hears of the loss", i), func(w *world) { w.n[i].lost = false; w.hearsLoss(i) })
		}
		if w.left.crashes > 0 {
			w.crashes(i, add)
		}
		w.recordMoves(i, add)
	}
	if w.sess {
		for d := range w.q {
			if len(w.q[d]) > 0 {
				add(fmt.Sprintf("deliver %d", d), func(w *world) { w.receive(d) })
			}
		}
		if w.left.losses > 0 {
			add("session lost", func(w *world) { w.left.losses--; w.drop() })
		}
	}
	if p := w.primary(); p >= 0 {
		w.guest(p, add)
		if s := w.secondary(); s >= 0 && !w.sess && w.rec.Mode == model.ModeSyncing && !w.n[p].lost && !w.n[s].lost && w.n[s].m.Phase() == PhaseIdle && w.n[p].m.Phase() == PhaseAlone {
			add("session", func(w *world) { w.connect(p, s) })
		}
	}
	return ms
}

func (w *world) hearsLoss(i int) {
	n := &w.n[i]
	n.copying, n.sent, n.flushing, n.whole = false, bits{}, false, false
	w.step(i, EvLost{})
}

func (w *world) connect(p, s int) {
	w.sess, w.a, w.b, w.q = true, p, s, [2][]wire{}
	empty := Generation{Term: w.rec.Term, Run: runName(w.n[s].run)}
	a, b := w.n[p].meta, w.n[s].meta
	w.step(p, EvHello{Copy: b, Empty: empty})
	w.step(s, EvHello{Copy: a})
}

// crashes: power fails on one host. Of what was not synced any part survives.
func (w *world) crashes(i int, add func(string, func(*world))) {
	n := &w.n[i]
	if !n.up {
		return
	}
	for keep := range 1 << maxBlocks {
		same := false
		for b := range maxBlocks {
			same = same || keep&(1<<b) != 0 && n.vol[b] == n.dur[b]
		}
		if same {
			continue
		}
		add(fmt.Sprintf("h%d power off, keeping %b", i, keep), func(w *world) {
			w.left.crashes--
			n := &w.n[i]
			for b := range maxBlocks {
				if keep&(1<<b) != 0 {
					n.dur[b] = n.vol[b]
				}
			}
			n.vol = n.dur
			w.end(i)
		})
	}
}

// guest lists what the guest can do.
func (w *world) guest(p int, add func(string, func(*world))) {
	n := &w.n[p]
	rule := n.m.Rule()
	if rule == RuleHold || n.closing {
		return
	}
	for b := range maxBlocks {
		if w.left.writes > 0 && n.inflight[b] == 0 {
			add(fmt.Sprintf("write %d", b), func(w *world) { w.left.writes--; w.write(p, b) })
		}
		if n.copying && n.bm[b] && !n.sent[b] {
			add(fmt.Sprintf("copy %d", b), func(w *world) {
				w.n[p].sent[b] = true
				w.send(p, wire{kind: wChunk, block: int8(b), value: w.n[p].vol[b]})
			})
		}
	}
	if n.copying && n.sent == (bits{}) && w.sess && !n.lost {
		add("caught up", func(w *world) { w.step(p, EvCaughtUp{}) })
	}
	if !n.flushing && (n.acked != w.promised) {
		add("flush", func(w *world) { w.flush(p) })
	}
}

func (w *world) write(p, b int) {
	n := &w.n[p]
	w.version++
	v := w.version
	n.log[b], n.vol[b] = true, v
	if n.m.Rule() == RuleAlone {
		n.bm[b] = true
		n.acked[b] = v
		return
	}
	n.inflight[b] = v
	w.send(p, wire{kind: wWrite, block: int8(b), value: v})
}

func (w *world) flush(p int) {
	n := &w.n[p]
	n.dur = n.vol
	if n.m.Rule() == RuleBoth {
		n.flushing, n.snap = true, n.acked
		w.send(p, wire{kind: wFlush})
		return
	}
	w.promised = n.acked
	n.log = bits{} // marked, and durable here
}

// recordMoves lists the changes of the record that host i can bring about.
func (w *world) recordMoves(i int, add func(string, func(*world))) {
	n, host := &w.n[i], hostName(i)
	me := model.Seat{Host: host, Run: runName(n.run)}
	try := func(name string, rec model.Record, err error, then func(w *world)) {
		if err == nil {
			add(host+" "+name, func(w *world) { w.rec = rec; then(w) })
		}
	}
	if !n.up && w.left.starts > 0 {
		w.startMoves(i, try)
	}
	if !n.up || n.closing {
		return
	}
	if n.primary && w.rec.Primary == me {
		if n.marked || !w.sess && !n.lost && n.m.Phase() == PhaseAlone && w.rec.Mode == model.ModeSyncing {
			rec, err := authority.LostSecondary(w.rec)
			try("claims simplex", rec, err, func(w *world) {
				w.n[i].marked = false
				w.step(i, EvGrant{GrantAlone, w.line(i)})
			})
		}
		if n.whole && w.rec.Mode == model.ModeSyncing && w.sess {
			rec, err := authority.Duplex(w.rec, w.rec.Secondary.Host, runName(w.n[w.b].run))
			try("duplex", rec, err, func(w *world) { w.n[i].whole = false })
		}
		w.assignMoves(i, try)
		w.stopMoves(i, try)
		return
	}
	if !n.primary && w.rec.Secondary == me && n.m.Phase() == PhaseMirror && !w.sess && !n.lost {
		rec, err := authority.TakeOver(w.rec, me)
		try("takes over", rec, err, func(w *world) {
			w.n[i].primary = true
			w.n[i].acked = w.n[i].vol
			w.step(i, EvGrant{GrantAlone, w.line(i)})
		})
		return
	}
	if w.rec.Secondary.Host != host && n.busy == 0 {
		add(host+" has no place any more", func(w *world) {
			w.step(i, EvGrant{Kind: GrantStale})
			for w.n[i].busy != 0 {
				w.persist(i)
			}
			w.end(i)
		})
	}
}

func (w *world) startMoves(i int, try func(string, model.Record, error, func(*world))) {
	host := hostName(i)
	booted := func(rec model.Record, err error) (model.Record, error) {
		if err != nil {
			return rec, err
		}
		return authority.Booted(rec, host, runName(w.runs+1))
	}
	boot := func(w *world) {
		w.left.starts--
		w.open(i, true)
		w.step(i, EvGrant{GrantAlone, w.line(i)})
	}
	rec, err := booted(authority.Start(w.rec, host))
	try("start", rec, err, boot)
	other := authority.OtherEmpty
	for j := range w.hosts {
		if j != i && w.n[j].up {
			other = authority.OtherHolds
		}
	}
	meta := w.n[i].meta
	f := authority.Facts{Host: host, OwnEmpty: true, Other: other, Durable: meta.State == model.UpToDate, DiskTerm: meta.Current.Term, DiskBranch: meta.Current.Branch}
	rec, err = booted(authority.StartFromDisk(w.rec, f))
	try("start from disk", rec, err, boot)
}

func (w *world) assignMoves(i int, try func(string, model.Record, error, func(*world))) {
	if w.left.assigns == 0 || w.n[i].m.Phase() != PhaseAlone {
		return
	}
	for j := range w.hosts {
		if j == i || w.n[j].up {
			continue
		}
		rec, err := authority.Assign(w.rec, hostName(j))
		try(fmt.Sprintf("assigns h%d", j), rec, err, func(w *world) {
			w.left.assigns--
			w.open(j, false)
			w.step(j, EvGrant{GrantTarget, w.line(j)})
			w.step(i, EvGrant{GrantSource, w.line(i)})
		})
	}
}

// stopMoves: the guest is off, everything was flushed on all hosts of the pair.
func (w *world) stopMoves(i int, try func(string, model.Record, error, func(*world))) {
	n := &w.n[i]
	if w.left.stops == 0 || n.busy != 0 || n.inflight != (blocks{}) || len(w.q[0])+len(w.q[1]) > 0 {
		return
	}
	pair := w.rec.Mode == model.ModeDuplex && w.sess
	if !pair && w.rec.Mode != model.ModeSimplex || pair && w.n[w.b].busy != 0 || !pair && n.m.Phase() != PhaseAlone {
		return
	}
	rec, err := authority.PowerOff(w.rec)
	try("power off", rec, err, func(w *world) {
		w.left.stops--
		who := []int{i}
		if pair {
			who = append(who, w.b)
		}
		w.promised = w.n[i].acked
		for _, k := range who {
			n := &w.n[k]
			n.dur, n.log, n.closing = n.vol, bits{}, true
			w.step(k, EvClose{})
		}
	})
}
