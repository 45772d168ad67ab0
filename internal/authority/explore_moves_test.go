package authority

import (
	"fmt"

	"perdure/internal/model"
)

type moveKind uint8

const (
	mvDeliver moveKind = iota + 1 // message arg arrives
	mvSwapExec
	mvSwapReply
	mvSwapUnknown
	mvReadStale // mutant: a member answers from an old state (arg: index of the past)
	mvReadReply // arg 1: as of when it was asked
	mvReadFail
	mvOrphan
	mvTimerRetry
	mvTimerClaim
	mvPeerLost
	mvConnect
	mvBooted
	mvCapture
	mvRelease
	mvBegin
	mvCaughtUp
	mvLastEpoch
	mvProtect
	mvPowerOff
	mvHandOver
	mvSurvOn
	mvSurvWrite
	mvSurvOff
	mvSurvClear // the agent takes out of the record what its shim gave up
	mvSurvSteal
	mvCrash
	mvPowerCut
	mvPowerOn
	mvFreeze
	mvThaw
	mvSpawn
	mvStart
	mvStartDisk
	mvSilence
	mvReap
	mvWanted
	mvLevel // arg: which, see levelNames
	mvDiskFail
	mvRefill
	mvRefilled
)

type move struct {
	kind moveKind
	h    int8
	arg  uint8
}

// levelNames are those that an agent may write down.
var levelNames = []model.Level{model.LevelNone, model.LevelCA, model.LevelFT}

// moves lists everything that can happen next.
func (w *world) moves(ms []move) []move {
	ms = ms[:0]
	add := func(k moveKind, h int, arg int) { ms = append(ms, move{k, int8(h), uint8(arg)}) }
	for i := range w.orphans {
		add(mvOrphan, 0, i)
	}
	for i, m := range w.msgs {
		if !w.h[m.to].frozen {
			add(mvDeliver, int(m.to), i)
		}
	}
	for h := range w.h {
		hs := &w.h[h]
		if hs.down {
			add(mvPowerOn, h, 0)
			continue
		}
		if w.left.power > 0 {
			add(mvPowerCut, h, 0)
		}
		if hs.frozen {
			add(mvThaw, h, 0)
			if hs.side != nil {
				w.storeMoves(h, add)
			}
			continue
		}
		if w.left.freeze > 0 && hs.side != nil {
			add(mvFreeze, h, 0)
		}
		w.agentMoves(h, add)
		if hs.side != nil {
			w.storeMoves(h, add)
			w.shimMoves(h, add)
		}
	}
	if a, b := &w.h[0], &w.h[1]; w.left.connect > 0 && a.side != nil && b.side != nil && !a.frozen && !b.frozen && (!a.session || !b.session) {
		add(mvConnect, 0, 0)
	}
	return ms
}

// storeMoves: what the store does with requests of h; happens to frozen hosts too.
func (w *world) storeMoves(h int, add func(moveKind, int, int)) {
	hs := &w.h[h]
	if hs.swap.state == 1 {
		add(mvSwapExec, h, 0)
	}
}

// shimMoves: what the shim of h and its driver may do or learn next.
func (w *world) shimMoves(h int, add func(moveKind, int, int)) {
	hs := &w.h[h]
	s := hs.side
	if hs.swap.state != 0 {
		if w.left.unknown > 0 {
			add(mvSwapUnknown, h, 0)
		}
		if hs.swap.state == 2 {
			add(mvSwapReply, h, 0)
		}
	}
	if hs.read.asked {
		if w.left.unread > 0 {
			add(mvReadFail, h, 0)
		}
		add(mvReadReply, h, 0)
		if hs.read.v.Revision != w.rec.Revision {
			add(mvReadReply, h, 1)
		}
		for i := range w.hist {
			if w.cfg.mut.anyRead && w.hist[i].Revision != w.rec.Revision {
				add(mvReadStale, h, i)
			}
		}
	}
	if hs.retry {
		add(mvTimerRetry, h, 0)
	}
	if hs.claim {
		add(mvTimerClaim, h, 0)
	}
	if hs.session && (w.left.lost > 0 || w.h[1-h].side == nil) {
		add(mvPeerLost, h, 0)
	}
	if hs.booting && s.run == "" && w.runs < 9 {
		add(mvBooted, h, 0)
	}
	if w.left.crash > 0 {
		add(mvCrash, h, 0)
	}
	if !hs.running {
		return
	}
	in := w.insts[hs.mem.inst]
	mode := s.Mode()
	if !hs.off && hs.mem.n < w.left.epoch && hs.mem.n-in.rel < 2 {
		add(mvCapture, h, 0)
	}
	w.diskMoves(h, add)
	if in.rel < hs.mem.n && (!hs.dead || s.Carrying()) {
		switch s.Output() {
		case OutputFree:
			add(mvRelease, h, 0)
		case OutputAcked:
			if hs.acked > in.rel && hs.ackRun == hs.expected() && hs.ackRun != "" {
				add(mvRelease, h, 0)
			}
		}
	}
	switch {
	case mode == model.ModeSyncing && hs.session && hs.syncStage == 0 && !s.drop:
		add(mvBegin, h, 0)
	case mode == model.ModeSyncing && hs.session && hs.syncStage == 1 && !s.drop:
		if !s.caughtUp {
			add(mvCaughtUp, h, 0)
		}
		if (s.Output() == OutputAcked && s.caughtUp || w.cfg.mut.duplexEarly) && hs.mem.n < w.left.epoch && !hs.off {
			add(mvLastEpoch, h, 0)
		}
	case mode == model.ModeSimplex && w.left.protect > 0 && !w.h[1-h].down && len(s.asked) == 0 && s.protect == "":
		add(mvProtect, h, 0)
	}
	if in.rel == hs.mem.n && !hs.off && !s.stopWanted {
		if w.left.off > 0 {
			add(mvPowerOff, h, 0)
		}
		if w.left.handover > 0 && mode == model.ModeDuplex && !s.drop && hs.acked == hs.mem.n {
			add(mvHandOver, h, 0)
		}
	}
}

// diskMoves: what may become of the disk of h, which runs the guest.
func (w *world) diskMoves(h int, add func(moveKind, int, int)) {
	hs := &w.h[h]
	switch {
	case !hs.dead && w.left.diskFail > 0 && !hs.off:
		add(mvDiskFail, h, 0)
	case hs.dead && !hs.refill && w.left.refill > 0 && hs.side.Carrying() && hs.session:
		add(mvRefill, h, 0)
	case hs.refill && hs.session:
		add(mvRefilled, h, 0)
	}
}

// agentMoves: what the agent of h may do next.
func (w *world) agentMoves(h int, add func(moveKind, int, int)) {
	hs := &w.h[h]
	r := w.rec.Record
	name := hostNames[h]
	if w.left.paused > 0 && r.Mode != model.ModeStopped {
		add(mvWanted, h, 0)
	}
	if w.left.level > 0 && (r.Mode == model.ModeStopped || r.Mode == model.ModeSimplex && r.Primary.Host == name) {
		for i, l := range levelNames {
			if l != r.Level {
				add(mvLevel, h, i)
			}
		}
	}
	if hs.side != nil {
		if hs.running && r.Mode == model.ModeDuplex && r.Primary.Host == name {
			if w.left.survOn > 0 && !hs.side.survOn {
				add(mvSurvOn, h, 0)
				if r.Survivor == "" {
					add(mvSurvWrite, h, 0)
				}
			}
			if w.left.survOff > 0 && hs.side.survOn {
				add(mvSurvOff, h, 0)
			}
			if w.left.survOff > 0 && hs.side.survOff && r.Survivor == name {
				add(mvSurvClear, h, 0)
			}
		}
		if w.cfg.mut.survivorByOther && r.Survivor != "" && r.Survivor != name {
			add(mvSurvSteal, h, 0)
		}
		return
	}
	switch {
	case r.Mode == model.ModeStarting && r.Primary.Host == name,
		r.Mode == model.ModeSyncing && r.Secondary.Host == name:
		add(mvSpawn, h, 0)
	case (r.Primary.Host == name || r.Secondary.Host == name) && w.left.blind > 0:
		add(mvSpawn, h, 1)
	}
	switch r.Mode {
	case model.ModeStopped:
		if w.left.start > 0 {
			add(mvStart, h, 0)
		}
	default:
		if r.Wanted != model.WantStopped && w.left.disk > 0 {
			add(mvStartDisk, h, 0)
			if w.left.silence > 0 && !w.h[1-h].down {
				add(mvSilence, h, 0)
			}
		}
	}
	if o := &w.h[1-h]; o.side != nil && r.Mode == model.ModeDuplex && (r.Primary.Host == name || r.Secondary.Host == name) {
		add(mvReap, h, 0)
	}
}

// apply carries out one move on a copy. It returns nil when nothing came of it.
func (w *world) apply(m move) *world {
	n := w.clone()
	h := int(m.h)
	hs := &n.h[h]
	switch m.kind {
	case mvDeliver:
		n.deliver(int(m.arg))
	case mvOrphan:
		o := n.orphans[m.arg]
		if n.log != nil {
			n.note("store: a late request is carried out: %s", FormatRecord(o.rec))
		}
		n.cas(o.rev, o.rec)
	case mvSwapExec, mvReadStale, mvSwapReply, mvReadReply, mvSwapUnknown, mvReadFail:
		n.applyStore(m)
	case mvTimerRetry:
		hs.retry = false
		n.step(h, EvTimer{ID: TimerRetry})
	case mvTimerClaim:
		hs.claim = false
		n.step(h, EvTimer{ID: TimerClaim})
	case mvPeerLost:
		if n.h[1-h].side != nil {
			n.left.lost--
		}
		hs.session = false
		n.step(h, EvPeerLost{})
	case mvConnect:
		n.left.connect--
		n.note("the shims find each other")
		for i := range n.h {
			s := n.h[i].side
			n.send(message{to: int8(1 - i), kind: mHello, run: s.run, term: s.rec.Record.Term})
		}
	case mvCrash, mvPowerCut, mvPowerOn, mvFreeze, mvThaw:
		n.applyFault(m)
	case mvSpawn, mvStart, mvStartDisk, mvSilence, mvReap, mvWanted, mvLevel, mvSurvOn, mvSurvWrite, mvSurvOff, mvSurvClear, mvSurvSteal:
		n.applyAgent(m)
	default:
		n.applyDriver(m)
	}
	n.prune()
	n.check()
	return n
}

func (w *world) applyStore(m move) {
	h := int(m.h)
	hs := &w.h[h]
	switch m.kind {
	case mvSwapExec:
		out := Conflict
		if w.cas(hs.swap.rev, hs.swap.rec) {
			out = Done
		}
		if w.log != nil {
			w.note("store: swap %d of %s: %s, now %s", hs.swap.id, hostNames[h], out, FormatRecord(w.rec.Record))
		}
		hs.swap.state, hs.swap.out, hs.swap.cur = 2, out, w.rec
		hs.swap.rec, hs.swap.rev = model.Record{}, 0
	case mvReadStale:
		w.note("a member that lags answers the read of %s", hostNames[h])
		v := w.hist[m.arg]
		hs.read = readState{}
		w.step(h, EvRecord{Versioned: v, Found: true})
	case mvSwapReply:
		ev := EvSwap{ID: hs.swap.id, Outcome: hs.swap.out, Current: hs.swap.cur}
		hs.swap = swapState{}
		w.step(h, ev)
	case mvSwapUnknown:
		w.left.unknown--
		ev := EvSwap{ID: hs.swap.id, Outcome: Unknown}
		if hs.swap.state == 1 {
			w.addOrphan(hs.swap.rev, hs.swap.rec)
		}
		hs.swap = swapState{}
		w.step(h, ev)
	case mvReadReply:
		v := w.rec
		if m.arg == 1 {
			v = hs.read.v
		}
		hs.read = readState{}
		w.step(h, EvRecord{Versioned: v, Found: true})
	case mvReadFail:
		w.left.unread--
		hs.read = readState{}
		w.step(h, EvReadFailed{})
	}
}

func (w *world) applyFault(m move) {
	h := int(m.h)
	hs := &w.h[h]
	name := hostNames[h]
	switch m.kind {
	case mvCrash:
		w.left.crash--
		w.note("%s: shim and guest are killed", name)
		w.endShim(h)
	case mvPowerCut:
		w.left.power--
		w.note("%s: power off", name)
		w.endShim(h)
		hs.down, hs.frozen = true, false
	case mvPowerOn:
		w.note("%s: power on, memory empty", name)
		hs.down = false
	case mvFreeze:
		w.left.freeze--
		w.note("%s: frozen", name)
		hs.frozen = true
	case mvThaw:
		w.note("%s: thawed", name)
		hs.frozen = false
	}
}

func (w *world) applyAgent(m move) {
	h := int(m.h)
	hs := &w.h[h]
	name := hostNames[h]
	u := rules{mut: w.cfg.mut}
	r := w.rec.Record
	ask := func(what string, rec model.Record, err error) {
		if err == nil {
			w.note("agent of %s: asks: %s", name, what)
			w.addOrphan(w.rec.Revision, rec)
		}
	}
	switch m.kind {
	case mvSpawn:
		if m.arg == 1 {
			w.left.blind--
		}
		w.note("agent of %s: starts a shim", name)
		cfg := Config{Host: name, ClaimDelayMS: 2, RetryMS: 10}
		hs.side = New(cfg)
		hs.side.u = u
		hs.mem = garbage
		w.step(h, EvStart{})
	case mvStart:
		w.left.start--
		n, err := u.start(r, name)
		ask("start", n, err)
	case mvStartDisk, mvSilence:
		w.askStartFromDisk(h, m.kind == mvSilence, u, ask)
	case mvReap:
		run := r.Primary.Run
		if r.Secondary.Host == name {
			run = r.Secondary.Run
		}
		w.note("agent of %s: tells the peer that run %s is gone", name, run)
		w.send(message{to: int8(1 - h), kind: mAgentDead, run: run})
	case mvWanted:
		w.left.paused--
		n, err := SetWanted(r, model.WantPaused)
		ask("wanted paused", n, err)
	case mvLevel:
		w.left.level--
		n, err := SetLevel(r, levelNames[m.arg])
		ask("level "+string(levelNames[m.arg]), n, err)
	case mvSurvOn:
		w.left.survOn--
		w.step(h, EvSurvivor{On: true})
	case mvSurvWrite:
		w.left.survOn--
		n, err := u.setSurvivor(r, name, true)
		ask("survivor on", n, err)
	case mvSurvOff:
		w.left.survOff--
		w.step(h, EvSurvivor{On: false})
	case mvSurvClear:
		w.left.survOff--
		n, err := u.setSurvivor(r, name, false)
		ask("survivor off", n, err)
	case mvSurvSteal:
		n, err := u.setSurvivor(r, name, false)
		ask("survivor off", n, err)
	}
}

func (w *world) askStartFromDisk(h int, wrongly bool, u rules, ask func(string, model.Record, error)) {
	hs, o := &w.h[h], &w.h[1-h]
	other := OtherHolds
	switch {
	case wrongly:
		w.left.silence--
		other = OtherSilent
	case o.down || o.frozen:
		other = OtherSilent
	case o.side == nil:
		other = OtherEmpty
	}
	f := Facts{Host: hostNames[h], OwnEmpty: true, Other: other, Durable: hs.disk.inst >= 0, DiskBranch: w.rec.Record.Branch}
	n, err := u.startFromDisk(w.rec.Record, f)
	if err == nil {
		w.left.disk--
	}
	ask("start from disk, the other host "+string(other), n, err)
	r := w.rec.Record
	if err == nil && other == OtherHolds && r.Mode == model.ModeDuplex && r.Survivor == "" &&
		o.side.run != "" && o.side.run == r.Secondary.Run {
		w.fail("precedence: %s starts from disk over the good memory of run %s", hostNames[h], o.side.run)
	}
}

func (w *world) newRun() model.RunID {
	w.runs++
	return model.RunID(fmt.Sprintf("r%d", w.runs))
}

func (w *world) applyDriver(m move) {
	h := int(m.h)
	hs := &w.h[h]
	name := hostNames[h]
	switch m.kind {
	case mvBooted:
		w.step(h, EvFilled{Run: w.newRun()})
	case mvCapture:
		w.capture(h, false)
	case mvRelease:
		w.release(h)
	case mvBegin:
		hs.syncStage = 1
		w.note("  %s: begins to copy", name)
		w.send(message{to: int8(1 - h), kind: mBegin, run: hs.side.run, term: hs.side.Term()})
	case mvCaughtUp:
		w.step(h, EvCaughtUp{})
	case mvLastEpoch:
		w.capture(h, true)
		hs.syncStage = 2
	case mvProtect:
		w.left.protect--
		hs.syncStage = 0
		w.step(h, EvProtect{Host: hostNames[1-h]})
	case mvDiskFail:
		w.left.diskFail--
		hs.dead = true
		w.note("%s: its disk fails", name)
		w.step(h, EvReplicaLost{})
	case mvRefill:
		w.left.refill--
		hs.refill, hs.disk = true, garbage
		w.note("%s: its disk is filled anew", name)
	case mvRefilled:
		hs.refill, hs.dead = false, false
		if !w.cfg.mut.backUnfilled {
			hs.disk = pos{hs.mem.inst, w.insts[hs.mem.inst].rel}
		}
		w.step(h, EvReplicaBack{})
	case mvPowerOff:
		w.left.off--
		hs.off = true
		w.note("%s: the guest powers off", name)
		w.step(h, EvPoweredOff{})
	case mvHandOver:
		w.left.handover--
		hs.off = true
		w.step(h, EvSwitchedOver{})
	}
}

// capture closes an epoch and sends it: as an increment, or, as the last of a
// copy, with everything.
func (w *world) capture(h int, last bool) {
	hs := &w.h[h]
	hs.mem.n++
	w.note("  %s: captures epoch %d of instance %d", hostNames[h], hs.mem.n, hs.mem.inst)
	s := hs.side
	switch {
	case last:
		w.send(message{to: int8(1 - h), kind: mFill, run: s.run, at: hs.mem})
	case hs.expected() != "" && hs.session && !s.detached:
		w.send(message{to: int8(1 - h), kind: mEpoch, run: s.run, toRun: hs.expected(), at: hs.mem})
	}
}

// deliver hands message i to its shim.
func (w *world) deliver(i int) {
	m := w.msgs[i]
	w.msgs = append(w.msgs[:i], w.msgs[i+1:]...)
	h := int(m.to)
	hs := &w.h[h]
	if hs.side == nil {
		return
	}
	s := hs.side
	switch m.kind {
	case mHello:
		hs.session, hs.link = true, true
		if hs.syncStage == 1 && m.run == "" {
			hs.syncStage = 0 // a copy starts over with each connection
		}
		w.step(h, EvPeerUp{Host: hostNames[1-h], Run: m.run, Term: m.term})
		if hs.side != nil && hs.running && hs.side.Mode() == model.ModeDuplex && !hs.side.detached && m.run == hs.side.rec.Record.Secondary.Run {
			w.send(message{to: int8(1 - h), kind: mEpoch, run: hs.side.run, toRun: m.run, at: hs.mem, full: true})
		}
	case mEpoch:
		w.onEpoch(h, m)
	case mBegin:
		if s.phase == phaseFilling && s.run == "" && m.run == s.told.PeerRun && m.term == s.told.Term {
			hs.disk, hs.begun, hs.dead = garbage, true, false
		}
	case mFill:
		if hs.begun && s.phase == phaseFilling && s.run == "" && m.run == s.told.PeerRun && w.runs < 9 {
			hs.mem, hs.disk = m.at, m.at
			run := w.newRun()
			w.step(h, EvFilled{Run: run, Epoch: model.Epoch(m.at.n)})
			if hs.side != nil {
				w.send(message{to: int8(1 - h), kind: mSynced, run: run, toRun: m.run, at: m.at})
			}
		}
	case mSynced:
		if hs.running && m.toRun == s.run {
			w.step(h, EvSynced{Host: hostNames[1-h], Run: m.run, Epoch: model.Epoch(m.at.n)})
			if hs.side != nil {
				hs.acked, hs.ackRun = m.at.n, m.run
			}
		}
	case mAck:
		if hs.running && (m.toRun == s.run && m.run == hs.expected() || w.cfg.mut.noRunCheck) && m.at.n <= hs.mem.n {
			if hs.ackRun != m.run || hs.acked < m.at.n {
				hs.acked, hs.ackRun = m.at.n, m.run
			}
		}
	case mTell, mAgentDead:
		w.onTell(h, m)
	}
}

func (w *world) onTell(h int, m message) {
	switch {
	case m.kind == mAgentDead:
		w.step(h, EvPeerDead{Run: m.run})
	case m.tell == TellTerm:
		w.step(h, EvPeerTerm{Term: m.term})
	case m.tell == TellDead:
		w.step(h, EvPeerDead{Run: m.run, Released: m.released})
	case m.tell == TellSwitchover:
		w.step(h, EvSwitchover{Run: m.run, Term: m.term})
	}
}

// onEpoch takes an epoch in at the secondary: whole, durable, then acknowledged.
func (w *world) onEpoch(h int, m message) {
	hs := &w.h[h]
	s := hs.side
	ack := message{to: int8(1 - h), kind: mAck, run: s.run, toRun: m.run, at: m.at}
	if hs.running {
		if hs.acking && w.cfg.mut.claimWhileAcking {
			w.send(ack) // nobody told the receiving half to stop
		}
		return
	}
	if m.run != s.told.PeerRun && !w.cfg.mut.noRunCheck || m.toRun != s.run && !w.cfg.mut.noRunCheck || hs.mem.inst < 0 && !w.cfg.mut.noRunCheck {
		return
	}
	if m.at.inst != hs.mem.inst || m.at.n <= hs.mem.n || (!m.full && m.at.n != hs.mem.n+1) {
		return
	}
	if w.cfg.mut.ackEarly && !hs.part {
		hs.part = true
		if hs.acking {
			w.send(ack)
		}
		w.msgs = append(w.msgs, m) // the rest of it is still on its way
		return
	}
	hs.part = false
	hs.mem, hs.disk = m.at, m.at
	w.acknowledge(h)
}
