package replica

import (
	"fmt"
	"strings"

	"perdure/internal/authority"
	"perdure/internal/model"
)

// The world of the explorer: hosts with a process and a disk of a few blocks,
// one session at a time, and the real authority record. A block's content is
// the number of the write that made it, which grows; so "at least as new as"
// is a comparison. A chunk of the bitmap and an extent of the log are one block.
const (
	maxHosts  = 3
	maxBlocks = 2
)

type blocks [maxBlocks]int8
type bits [maxBlocks]bool

// wire is one message of a session: a machine's, or data.
type wire struct {
	kind  wireKind
	msg   Message
	block int8
	value int8
	set   bits
}

type wireKind int8

const (
	wMachine wireKind = iota
	wMarks            // machine's MsgMarks, with the sender's log and bitmap
	wChunk
	wChunkDone
	wWrite
	wWriteDone
	wFlush
	wFlushed
	wClean // these blocks are durable on both
)

// node is one host.
type node struct {
	up       bool // a process of the VM runs
	closing  bool
	primary  bool
	run      int8
	m        Machine
	pend     ActPersist
	busy     int8 // 0 none, else the next step of pend, from 1
	copying  bool
	marked   bool
	whole    bool
	lost     bool // a loss is to be told to the process
	sent     bits // chunks on their way
	inflight blocks
	acked    blocks
	snap     blocks // acked when the flush under way was asked for
	flushing bool
	theirs   bits

	// The disk.
	dur, vol blocks
	log, bm  bits
	meta     Copy
}

type budget struct{ writes, crashes, losses, starts, assigns, stops int8 }

type world struct {
	hosts    int
	n        [maxHosts]node
	rec      model.Record // never changed in place
	sess     bool
	a, b     int // of the session: primary, secondary
	q        [2][]wire
	promised blocks
	version  int8
	runs     int8
	left     budget
	bad      string
	mut      mutants
}

func newWorld(hosts int, left budget, mut mutants) *world {
	w := &world{hosts: hosts, left: left, mut: mut}
	w.rec = model.Record{VM: "vm", Level: model.LevelFT, Mode: model.ModeStopped, Wanted: model.WantStopped, Replicas: map[string]model.Replica{"h0": {State: model.UpToDate}}}
	for i := range hosts {
		w.n[i].meta = Copy{VM: "vm", Disk: "d", Size: 4096, State: model.Inconsistent, Clean: true}
	}
	w.n[0].meta.State = model.UpToDate
	return w
}

func (w *world) clone() *world {
	c := *w
	for i := range c.q {
		c.q[i] = append([]wire(nil), w.q[i]...)
	}
	return &c
}

func hostName(i int) string      { return fmt.Sprintf("h%d", i) }
func runName(n int8) model.RunID { return model.RunID(fmt.Sprintf("r%d", n)) }
func (w *world) fail(f string, a ...any) {
	if w.bad == "" {
		w.bad = fmt.Sprintf(f, a...)
	}
}

// step feeds a machine and carries out what it says, up to the next durable step.
func (w *world) step(i int, ev Event) {
	n := &w.n[i]
	for _, a := range n.m.Step(ev) {
		switch a := a.(type) {
		case ActPersist:
			if n.busy != 0 {
				w.fail("h%d: two changes of metadata at once", i)
			}
			n.pend, n.busy = a, 1
		case ActRule:
			w.rule(i, a.Rule)
		case ActSend:
			kind, m := wMachine, wire{msg: a.Message}
			if a.Message.Kind == MsgMarks {
				kind = wMarks
				m.set = n.log
				if !n.meta.Base.IsZero() {
					m.set = union(m.set, n.bm)
				}
			}
			m.kind = kind
			w.send(i, m)
		case ActCopy:
			n.copying = true
		case ActSendRest:
			n.copying = false
			for b := range maxBlocks {
				if n.bm[b] {
					w.send(i, wire{kind: wChunk, block: int8(b), value: n.vol[b]})
				}
			}
			w.step(i, EvRestSent{})
		case ActWhole:
			n.whole = true
		case ActMarked:
			n.marked = true
		case ActAlarm:
			if a.Code != "replica-failed" {
				w.fail("h%d: false alarm %s: %s", i, a.Code, a.Text)
			}
		}
	}
}

func union(a, b bits) bits {
	for i := range a {
		a[i] = a[i] || b[i]
	}
	return a
}

// rule takes effect; what was in flight when a host goes on alone counts.
func (w *world) rule(i int, r Rule) {
	n := &w.n[i]
	n.flushing = false
	if r != RuleAlone {
		return
	}
	for b := range maxBlocks {
		if n.inflight[b] != 0 {
			n.acked[b], n.inflight[b] = n.inflight[b], 0
		}
		if n.vol[b] < w.promised[b] {
			w.fail("h%d goes on alone with block %d as of write %d; write %d was flushed and seen", i, b, n.vol[b], w.promised[b])
		}
	}
}

func (w *world) send(i int, m wire) {
	if !w.sess || i != w.a && i != w.b {
		return
	}
	d := 0
	if i == w.b {
		d = 1
	}
	w.q[d] = append(w.q[d], m)
}

// persist carries out one step of a change of metadata: marks, metadata, marks.
func (w *world) persist(i int) {
	n := &w.n[i]
	switch n.busy {
	case 1:
		switch n.pend.Marks {
		case MarksFresh:
			n.bm = n.log
		case MarksOwn:
			n.bm = union(n.bm, n.log)
		case MarksTheirs:
			n.bm = union(union(n.bm, n.log), n.theirs)
		case MarksNew:
			n.bm = union(n.log, n.theirs)
		case MarksAll:
			for b := range n.bm {
				n.bm[b] = true
			}
		}
	case 2:
		if n.pend.State == model.UpToDate && n.meta.State == model.Inconsistent {
			n.dur = n.vol // the store syncs before it calls a copy good
		}
		n.meta.State, n.meta.Lineage, n.meta.Clean = n.pend.State, n.pend.Lineage, n.pend.Clean
	case 3:
		switch n.pend.Marks {
		case MarksClear:
			n.bm = bits{}
		case MarksWipe:
			n.bm, n.log, n.vol, n.dur = bits{}, bits{}, blocks{}, blocks{}
		}
		n.busy = 0
		if n.closing {
			w.end(i)
			return
		}
		w.step(i, EvPersisted{})
		return
	}
	n.busy++
}

// end takes a process away; its disk stays.
func (w *world) end(i int) {
	n := &w.n[i]
	*n = node{dur: n.dur, vol: n.vol, log: n.log, bm: n.bm, meta: n.meta}
	if w.sess && (i == w.a || i == w.b) {
		w.drop()
	}
}

func (w *world) drop() {
	w.sess, w.q = false, [2][]wire{}
	for _, i := range []int{w.a, w.b} {
		w.n[i].lost = w.n[i].up
	}
}

func (w *world) open(i int, primary bool) {
	w.runs++
	n := &w.n[i]
	n.up, n.primary, n.run = true, primary, w.runs
	n.m = New()
	n.m.mut = w.mut
	n.acked = w.promised
	w.step(i, EvOpen{n.meta})
}

func (w *world) line(i int) Generation {
	return Generation{Term: w.rec.Term, Branch: w.rec.Branch, Run: runName(w.n[i].run)}
}

func (w *world) primary() int {
	for i := range w.hosts {
		if w.n[i].up && w.n[i].primary && w.rec.Primary == (model.Seat{Host: hostName(i), Run: runName(w.n[i].run)}) {
			return i
		}
	}
	return -1
}

func (w *world) secondary() int {
	for i := range w.hosts {
		if w.n[i].up && !w.n[i].primary && w.rec.Secondary.Host == hostName(i) {
			return i
		}
	}
	return -1
}

// receive takes the first message of one direction.
func (w *world) receive(d int) {
	m := w.q[d][0]
	w.q[d] = w.q[d][1:]
	i := w.b
	if d == 1 {
		i = w.a
	}
	n := &w.n[i]
	b := m.block
	switch m.kind {
	case wMachine:
		w.step(i, EvMessage{m.msg})
	case wMarks:
		n.theirs = m.set
		w.step(i, EvMessage{m.msg})
	case wChunk:
		n.vol[b], n.dur[b] = m.value, m.value
		m.kind = wChunkDone
		w.send(i, m)
	case wChunkDone:
		n.sent[b] = false
		if n.m.Phase() == PhaseSource && n.vol[b] == m.value {
			n.bm[b] = false
		}
	case wWrite:
		n.log[b], n.vol[b] = true, m.value
		m.kind = wWriteDone
		w.send(i, m)
	case wWriteDone:
		if n.inflight[b] == m.value {
			n.inflight[b], n.acked[b] = 0, m.value
		}
	case wFlush:
		n.dur = n.vol
		w.send(i, wire{kind: wFlushed})
	case wFlushed:
		w.flushed(i)
	case wClean:
		for b := range n.log {
			if m.set[b] && n.dur[b] == n.vol[b] {
				n.log[b] = false
			}
		}
	}
	if n.m.Phase() == PhaseTarget && n.m.ended {
		n.dur = n.vol
		w.step(i, EvBoundary{})
	}
}

// flushed ends a flush on both hosts: what was acknowledged before it is promised.
func (w *world) flushed(i int) {
	n := &w.n[i]
	if !n.flushing {
		return
	}
	n.flushing = false
	var clean bits
	for b := range maxBlocks {
		w.promised[b] = max(w.promised[b], n.snap[b])
		if n.inflight[b] == 0 && n.acked[b] == n.snap[b] && n.vol[b] == n.dur[b] {
			n.log[b], clean[b] = false, true
		}
	}
	w.send(i, wire{kind: wClean, set: clean})
}

// check looks for what must never be.
func (w *world) check() {
	for i := range w.hosts {
		n := &w.n[i]
		if n.meta.State != model.Inconsistent && !n.meta.Toward.IsZero() {
			w.fail("h%d calls itself %s while it is being filled", i, n.meta.State)
		}
		if w.rec.Replicas[hostName(i)].State != model.UpToDate {
			continue
		}
		if n.meta.State != model.UpToDate {
			w.fail("the record calls h%d UpToDate, which calls itself %s", i, n.meta.State)
		}
		for b := range maxBlocks {
			if n.dur[b] < w.promised[b] {
				w.fail("the record calls h%d UpToDate; on its disk block %d is as of write %d, and write %d was flushed and seen", i, b, n.dur[b], w.promised[b])
			}
		}
	}
	if !w.sess || len(w.q[0])+len(w.q[1]) > 0 {
		return
	}
	p, s := &w.n[w.a], &w.n[w.b]
	if p.m.Phase() != PhasePair || s.m.Phase() != PhaseMirror {
		return
	}
	for b := range maxBlocks {
		if p.inflight[b] == 0 && p.vol[b] != s.vol[b] {
			w.fail("h%d and h%d are a pair and differ in block %d: writes %d and %d", w.a, w.b, b, p.vol[b], s.vol[b])
		}
	}
}

// key tells states apart.
func (w *world) key() string {
	var k strings.Builder
	put := func(vs ...int8) {
		for _, v := range vs {
			k.WriteByte(byte(v))
		}
	}
	flag := func(bs ...bool) {
		for _, b := range bs {
			k.WriteByte(map[bool]byte{true: 1}[b])
		}
	}
	gen := func(g Generation) { fmt.Fprintf(&k, "%d%s%s,", g.Term, g.Branch, g.Run) }
	lin := func(l Lineage) {
		gen(l.Current)
		gen(l.Base)
		gen(l.Toward)
		for _, g := range l.History {
			if g.IsZero() {
				break
			}
			gen(g)
		}
		flag(l.Primary, l.BaseEmpty)
	}
	cp := func(c Copy) { lin(c.Lineage); k.WriteString(string(c.State[:1])); flag(c.Clean) }
	msg := func(m Message) { put(int8(m.Kind)); gen(m.At); gen(m.Toward); flag(m.Full); lin(m.Lineage) }
	for i := range w.hosts {
		n := &w.n[i]
		flag(n.up, n.closing, n.primary, n.copying, n.marked, n.whole, n.lost, n.flushing)
		put(n.run, n.busy)
		for b := range maxBlocks {
			put(n.dur[b], n.vol[b], n.inflight[b], n.acked[b], n.snap[b])
			flag(n.log[b], n.bm[b], n.sent[b], n.theirs[b])
		}
		cp(n.meta)
		if !n.up {
			continue
		}
		if n.busy != 0 {
			lin(n.pend.Lineage)
			k.WriteString(string(n.pend.State[:1]))
			put(int8(n.pend.Marks))
		}
		m := &n.m
		put(int8(m.phase), int8(m.rule), int8(m.grant.Kind), int8(m.judge.Verdict))
		gen(m.grant.Line)
		flag(m.busy, m.up, m.owed, m.ended)
		lin(m.from)
		if m.up {
			cp(Copy{State: m.hello.Copy.State + "-", Lineage: m.hello.Copy.Lineage})
		}
	}
	k.WriteString(authority.FormatRecord(w.rec))
	flag(w.sess)
	put(int8(w.a), int8(w.b))
	for d := range w.q {
		for _, m := range w.q[d] {
			put(int8(m.kind), m.block, m.value)
			flag(m.set[:]...)
			msg(m.msg)
		}
		put(-1)
	}
	put(w.promised[:]...)
	l := w.left
	put(w.version, w.runs, l.writes, l.crashes, l.losses, l.starts, l.assigns, l.stops)
	return k.String()
}
