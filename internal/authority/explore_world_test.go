package authority

import (
	"fmt"
	"strings"

	"perdure/internal/model"
)

// The small world of the explorer: two hosts with an agent and at most one shim
// each, one store (the cluster's quorum; a host that cannot reach it is one
// whose requests stay on their way), two disks, messages on their way.
//
// Epochs are abstract: epoch n of an instance is its state number n, every
// epoch flushes a write, and its output depends on that write. A position
// (instance, n) holds another if that lies on its own past.

var hostNames = [2]string{"a", "b"}

// pos is a point of history: epoch n of an instance; inst -1 is garbage.
type pos struct{ inst, n int8 }

var garbage = pos{-1, 0}

// instance is one life line of the guest: started from a position, by loading
// memory or by booting from a disk; rel is its newest epoch whose output left.
type instance struct {
	from pos
	rel  int8
	host int8
}

type msgKind uint8

const (
	mHello msgKind = iota + 1
	mEpoch
	mBegin // the copy begins: the secondary's disks are being overwritten
	mFill
	mSynced
	mAck
	mTell
	mAgentDead
)

// message is one message to the shim of host to, on its way.
type message struct {
	to       int8
	kind     msgKind
	run      model.RunID // whose memory it speaks of
	toRun    model.RunID
	at       pos
	full     bool
	term     model.Term
	tell     TellKind
	released bool
}

// swapState is the one swap of a Side that was not answered yet.
type swapState struct {
	state int8 // 0 none, 1 on its way, 2 carried out, reply on its way
	id    uint64
	rev   model.Revision
	rec   model.Record
	out   Outcome
	cur   model.Versioned
}

// readState is the one read of a Side that was not answered yet. It may be
// carried out at any time until its reply arrives; v is the first state it can
// return, that of when it was asked.
type readState struct {
	asked bool
	v     model.Versioned
}

// orphan is a swap nobody waits for any more; it may still be carried out.
type orphan struct {
	rev model.Revision
	rec model.Record
}

// hostState is one host: agent, disk, and its shim with driver state.
type hostState struct {
	down, frozen bool
	disk         pos  // what is durable, as one position
	dead         bool // it takes no writes any more
	refill       bool // and is being filled anew, from the secondary's
	side         *Side
	swap         swapState
	read         readState
	retry, claim bool // timers set
	session      bool // the driver believes that the peer talks
	link         bool // its connection leads to the shim that lives now
	begun        bool // secondary: its disks are being overwritten
	booting      bool
	running      bool // the guest is the live instance
	off          bool // the guest is off or stopped for good
	mem          pos  // primary: newest captured; secondary: newest complete
	acking       bool
	acked        int8 // newest epoch acknowledged …
	ackRun       model.RunID
	syncStage    int8 // primary: 1 copying, 2 last epoch was sent
	part         bool // mutant ackEarly: an epoch is only half here
}

// budget bounds the faults and requests of one exploration.
type budget struct {
	epoch    int8 // newest epoch number that is captured
	crash    int8 // shim with guest dies, host stays
	power    int8 // host dies, comes back empty
	freeze   int8
	lost     int8 // a living peer is taken for lost
	connect  int8 // sessions
	protect  int8
	survOn   int8
	survOff  int8
	off      int8 // guest powers off
	handover int8
	silence  int8 // a living host is taken for silent by the other agent
	start    int8 // start of a stopped VM
	blind    int8 // an agent starts a shim although the record asks for none
	paused   int8 // wanted flips behind everybody's back
	unknown  int8 // a swap's answer is lost (its request may land late)
	unread   int8 // a read fails
	disk     int8 // starts from disk that an agent asks for
	diskFail int8 // the primary's disk fails
	refill   int8 // and is filled anew
	level    int8 // an agent writes down another level
}

type world struct {
	cfg     *scenario
	rec     model.Versioned // the store
	hist    []model.Versioned
	h       [2]hostState
	msgs    []message
	orphans []orphan
	insts   []instance
	left    budget
	runs    int8
	ca      bool // level ca; else ft
	viol    string
	log     func(format string, args ...any) // nil unless a trace is replayed
}

// scenario is one start state with its budgets and mutants.
type scenario struct {
	name   string
	mut    mutants
	left   budget
	init   func(w *world)
	maxOut int // orphans at most
	maxMsg int // messages on their way, per receiver
	// validate checks each record; off for mutants, which are to be found by
	// what they do and not by what they write.
	validate bool
	seen     map[string]bool // kinds of changes that the store carried out
}

// sawChange notes the kind of a change: the words of its reason up to a host.
func (sc *scenario) sawChange(reason string) {
	if sc.seen == nil {
		sc.seen = map[string]bool{}
	}
	var words []string
	for _, f := range strings.Fields(reason) {
		if f != "a" && f != "b" {
			words = append(words, f)
		}
	}
	sc.seen[strings.Join(words, " ")] = true
}

func (w *world) clone() *world {
	n := *w
	n.msgs = append([]message(nil), w.msgs...)
	n.orphans = append([]orphan(nil), w.orphans...)
	n.insts = append([]instance(nil), w.insts...)
	return &n
}

func (w *world) note(format string, args ...any) {
	if w.log != nil {
		w.log(format, args...)
	}
}

func (w *world) fail(format string, args ...any) {
	if w.viol == "" {
		w.viol = fmt.Sprintf(format, args...)
	}
}

// holds reports whether position p has q on its past.
func (w *world) holds(p, q pos) bool {
	for p.inst >= 0 {
		if p.inst == q.inst {
			return p.n >= q.n
		}
		f := w.insts[p.inst].from
		if f.n > p.n {
			f.n = p.n
		}
		p = f
	}
	return q.inst < 0 || q.n == 0
}

// holdsAllReleased returns the first output that p does not hold.
func (w *world) holdsAllReleased(p pos) (pos, bool) {
	for i := range w.insts {
		if in := w.insts[i]; in.rel > in.from.n {
			q := pos{int8(i), in.rel}
			if p.inst < 0 || !w.holds(p, q) {
				return q, false
			}
		}
	}
	return pos{}, true
}

func (w *world) send(m message) {
	if w.h[m.to].side == nil || w.pointless(m) {
		return
	}
	if m.kind != mHello && m.kind != mAgentDead && !w.h[1-m.to].link {
		return // a connection to a shim that is gone
	}
	n := 0
	for _, o := range w.msgs {
		if o == m {
			return
		}
		if o.to == m.to {
			n++
		}
	}
	if n >= w.cfg.maxMsg { // loss of the oldest
		for i, o := range w.msgs {
			if o.to == m.to {
				w.msgs = append(w.msgs[:i], w.msgs[i+1:]...)
				break
			}
		}
	}
	w.msgs = append(w.msgs, m)
}

// pointless reports whether m can change nothing at its receiver any more,
// whenever it arrives.
func (w *world) pointless(m message) bool {
	hs := &w.h[m.to]
	s := hs.side
	switch m.kind {
	case mAck:
		return hs.running && hs.ackRun == m.run && m.at.n <= hs.acked
	case mEpoch:
		return hs.mem.inst == m.at.inst && m.at.n <= hs.mem.n || s.run != "" && s.run != m.toRun && !w.cfg.mut.noRunCheck
	case mFill, mBegin:
		return s.run != ""
	case mTell:
		return m.tell == TellTerm && m.term <= s.rec.Record.Term
	}
	return false
}

// prune drops messages that became pointless.
func (w *world) prune() {
	keep := w.msgs[:0]
	for _, m := range w.msgs {
		if w.h[m.to].side != nil && !w.pointless(m) {
			keep = append(keep, m)
		}
	}
	w.msgs = keep
}

func (w *world) addOrphan(rev model.Revision, rec model.Record) {
	if rev != w.rec.Revision {
		return // dead: can only conflict
	}
	for _, o := range w.orphans {
		if o.rev == rev && sameRecord(o.rec, rec) {
			return
		}
	}
	if len(w.orphans) >= w.cfg.maxOut {
		w.orphans = w.orphans[1:] // lost for good
	}
	w.orphans = append(w.orphans, orphan{rev, rec})
}

// cas carries out a swap at the store.
func (w *world) cas(rev model.Revision, rec model.Record) bool {
	if rev != w.rec.Revision {
		return false
	}
	old := w.rec.Record
	w.rec = model.Versioned{Record: rec, Revision: rev + 1}
	if w.cfg.mut.anyRead {
		w.hist = append(append([]model.Versioned(nil), w.hist...), w.rec)
	}
	w.cfg.sawChange(rec.Reason)
	w.orphans = nil // all at the old revision, all dead
	if rec.Term < old.Term {
		w.fail("the term went back from %d to %d", old.Term, rec.Term)
	}
	if old.Mode == model.ModeStopped && rec.Mode != model.ModeStopped && rec.Mode != model.ModeStarting {
		w.fail("rule: a VM recorded stopped was taken over (%s)", rec.Reason)
	}
	if w.cfg.validate {
		if err := Validate(rec); err != nil {
			w.fail("%v", err)
		}
	}
	return true
}

// step feeds one event to the shim of h and carries out the actions.
func (w *world) step(h int, ev Event) {
	hs := &w.h[h]
	s := *hs.side
	hs.side = &s
	acts := s.Step(ev)
	if w.log != nil {
		w.note("  %s: %s", hostNames[h], FormatEvent(ev))
	}
	for _, a := range acts {
		if w.log != nil {
			w.note("  %s:     -> %s", hostNames[h], FormatAction(a))
		}
		w.perform(h, a)
	}
}

func (w *world) perform(h int, act Action) {
	hs := &w.h[h]
	switch a := act.(type) {
	case ActRead:
		if hs.read.asked {
			w.fail("contract: two reads outstanding on %s", hostNames[h])
		}
		hs.read = readState{asked: true, v: w.rec}
	case ActSwap:
		if hs.swap.state == 1 {
			// An older one, settled by a read, was not answered yet. Its answer
			// would tell the side no more than one more read.
			w.addOrphan(hs.swap.rev, hs.swap.rec)
		}
		hs.swap = swapState{state: 1, id: a.ID, rev: a.Revision, rec: a.Record}
	case ActAck:
		hs.acking = a.On
		w.acknowledge(h)
	case ActBoot:
		hs.booting = true
	case ActRun:
		w.run(h)
	case ActTakeOver:
		w.begin(h, hs.mem, "rule 2: takeover")
	case ActEnd:
		w.endShim(h)
	case ActTell:
		w.send(message{to: int8(1 - h), kind: mTell, tell: a.Kind, term: a.Term, run: a.Run, released: a.Released})
	case ActTimer:
		on := a.Milliseconds >= 0
		switch a.ID {
		case TimerRetry:
			hs.retry = on
		case TimerClaim:
			hs.claim = on
		}
	}
}

func (w *world) run(h int) {
	hs := &w.h[h]
	if hs.booting {
		hs.booting = false
		w.begin(h, hs.disk, "rule 4: start from disk")
		return
	}
	hs.off = false // a switchover that did not happen
}

// begin makes a new instance on h from position p.
func (w *world) begin(h int, p pos, how string) {
	hs := &w.h[h]
	if q, ok := w.holdsAllReleased(p); !ok {
		w.fail("%s on %s from epoch %d of instance %d, but output of epoch %d of instance %d has left",
			how, hostNames[h], p.n, p.inst, q.n, q.inst)
	}
	if p.inst < 0 {
		p = pos{0, 0}
	}
	w.insts = append(w.insts, instance{from: p, rel: p.n, host: int8(h)})
	hs.mem = pos{int8(len(w.insts) - 1), p.n}
	hs.running, hs.off, hs.acked, hs.ackRun, hs.syncStage = true, false, 0, "", 0
	if !hs.acking { // a mutant may still be acknowledging what it ignores
		hs.part = false
	}
}

// endShim ends shim and guest of h; memory is gone, requests may still land.
func (w *world) endShim(h int) {
	hs := &w.h[h]
	if hs.swap.state == 1 {
		w.addOrphan(hs.swap.rev, hs.swap.rec)
	}
	*hs = hostState{down: hs.down, frozen: hs.frozen, disk: hs.disk, dead: hs.dead}
	keep := w.msgs[:0]
	for _, m := range w.msgs {
		if int(m.to) != h {
			keep = append(keep, m)
		}
	}
	w.msgs = keep
	w.h[1-h].link = false
}

// expected is the secondary run whose acknowledgements count.
func (hs *hostState) expected() model.RunID {
	if r := hs.side.told.PeerRun; r != "" {
		return r
	}
	return hs.side.synced.Run
}

func (w *world) acknowledge(h int) {
	hs := &w.h[h]
	if hs.acking && !hs.running && hs.mem.inst >= 0 && (hs.side.run != "" || w.cfg.mut.noRunCheck) {
		w.send(message{to: int8(1 - h), kind: mAck, run: hs.side.run, toRun: hs.side.told.PeerRun, at: hs.mem})
	}
}

// release lets the output of the next epoch of h leave, after its flushed
// write is durable here.
func (w *world) release(h int) {
	hs := &w.h[h]
	in := &w.insts[hs.mem.inst]
	n := in.rel + 1
	if !w.cfg.mut.notDurable && !hs.dead {
		hs.disk = pos{hs.mem.inst, n}
	}
	in.rel = n
	w.note("  %s: output of epoch %d of instance %d leaves (rule %s)", hostNames[h], n, hs.mem.inst, hs.side.Output())
	q := pos{hs.mem.inst, n}
	for i := range w.insts {
		o := w.insts[i]
		if int8(i) == q.inst || o.rel == o.from.n && !w.runningNow(int8(i)) {
			continue
		}
		p := pos{int8(i), o.rel}
		if !w.holds(p, q) && !w.holds(q, p) {
			w.fail("rule 1: %s let out epoch %d of instance %d, which is no part of the history that %s continues",
				hostNames[h], n, q.inst, hostNames[o.host])
		}
	}
}

func (w *world) runningNow(i int8) bool {
	hs := &w.h[w.insts[i].host]
	return hs.running && hs.mem.inst == i
}

// check looks at one state as a whole.
func (w *world) check() {
	if w.viol != "" {
		return
	}
	free := 0
	for h := range w.h {
		hs := &w.h[h]
		if hs.side != nil && hs.running && !hs.off && hs.side.Output() == OutputFree {
			free++
		}
	}
	if free > 1 {
		w.fail("rule 1: two instances may let output out freely")
	}
	w.checkSomeDisk()
	// Rule 3: if the power of the site, or one host, failed now, whatever the
	// record calls fit to start from holds every flushed write that was seen.
	r := w.rec.Record
	for h := range w.h {
		if r.Replicas[hostNames[h]].State != model.UpToDate || (r.Survivor != "" && r.Survivor != hostNames[h]) {
			continue
		}
		if q, ok := w.holdsAllReleased(w.h[h].disk); !ok {
			w.fail("rule 3: the record calls the replica on %s UpToDate, but it lacks the flushed write of epoch %d of instance %d, whose effect was seen",
				hostNames[h], q.n, q.inst)
		}
	}
}

// checkSomeDisk: whatever was seen outside rests on at least one disk.
func (w *world) checkSomeDisk() {
	q, all := w.holdsAllReleased(w.h[0].disk)
	if all {
		return
	}
	if _, all := w.holdsAllReleased(w.h[1].disk); !all {
		w.fail("rule 3: no disk holds the flushed write of epoch %d of instance %d, whose effect was seen", q.n, q.inst)
	}
}
