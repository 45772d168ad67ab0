package replica

import (
	"fmt"

	"perdure/internal/model"
)

// Phase is where a machine stands.
type Phase int

// The phases. "Source" and "target" are sides of a resync, whoever runs the guest.
const (
	PhaseClosed  Phase = iota // nothing loaded
	PhaseIdle                 // loaded; nobody may write here
	PhaseBegin                // (granted alone) the new line is being made durable
	PhaseAlone                // the guest writes here, and nowhere else
	PhaseAsk                  // source: the target's marks are awaited
	PhaseMerge                // source: its bitmap takes them in, durably
	PhaseReady                // source: the target is turning itself into one
	PhaseSource               // source: copying
	PhaseEnding               // source: the rest was sent; writes go to both already
	PhaseSettle               // source: the peer is whole; noting that
	PhasePair                 // primary: both copies are one line
	PhaseDetach               // primary: the peer is lost; what it lacks is being marked
	PhaseLost                 // primary: marked; waits for the grant to go on alone
	PhaseOffered              // target: gave its marks
	PhaseTurn                 // target: becoming Inconsistent, durably
	PhaseTarget               // target: being filled
	PhaseWhole                // target: becoming UpToDate, durably
	PhaseMirror               // secondary: follows the primary's writes
	PhaseFailed               // the local copy failed; nothing is done with it any more
)

var phaseNames = []string{"closed", "idle", "begin", "alone", "ask", "merge", "ready", "source", "ending", "settle", "pair", "detach", "lost", "offered", "turn", "target", "whole", "mirror", "failed"}

// String is the phase's name.
func (p Phase) String() string {
	if p < 0 || int(p) >= len(phaseNames) {
		return "none"
	}
	return phaseNames[p]
}

// Rule says where the guest's writes go and when they are acknowledged.
type Rule int

// The rules, the strictest first.
const (
	RuleHold  Rule = iota // nothing is acknowledged
	RuleBoth              // local and peer; acknowledged when both have it (or with its epoch)
	RuleAlone             // local only; the chunk is marked in the bitmap before the acknowledgement
)

var ruleNames = []string{"hold", "both", "alone"}

// String is the rule's name.
func (r Rule) String() string { return ruleNames[r] }

// Marks says what is to be done with the bitmap together with new metadata.
type Marks int

// What to do with the bitmap, and when.
const (
	MarksKeep   Marks = iota // nothing
	MarksFresh               // before the metadata: empty it, then mark all that the activity log holds
	MarksOwn                 // before the metadata: mark, besides, all that the activity log holds
	MarksTheirs              // before the metadata: mark, besides, the activity log and what the peer sent
	MarksNew                 // before the metadata: empty it, then as MarksTheirs
	MarksAll                 // before the metadata: mark everything
	MarksClear               // after the metadata: empty it
	MarksWipe                // after the metadata: empty it and the log, and make the image one hole
)

var marksNames = []string{"keep", "fresh", "own", "theirs", "new", "all", "clear", "wipe"}

// String is the name.
func (m Marks) String() string { return marksNames[m] }

// GrantKind is what the authority record gives one host with respect to a disk.
type GrantKind int

// The grants. Each rests on a record that was read, never on one asked for. After
// the loss of a peer whose copy the record may call UpToDate, GrantAlone is given
// only for a record read after ActMarked.
const (
	GrantNone   GrantKind = iota // stopped, or no place in the record
	GrantAlone                   // primary, and no other replica is UpToDate
	GrantSource                  // as GrantAlone, and the peer may be filled
	GrantTarget                  // the host whose replica is filled; its copy is worth nothing by the record
	GrantPair                    // primary or secondary in duplex
	GrantStale                   // another host went on without this one: this copy is Outdated
)

var grantNames = []string{"none", "alone", "source", "target", "pair", "stale"}

// String is the name.
func (g GrantKind) String() string { return grantNames[g] }

// MessageKind is the kind of a message to the peer's machine.
type MessageKind int

// The messages, in the order of a resync. Within a session they arrive in order,
// and in one order with chunks and writes.
const (
	MsgAsk    MessageKind = iota + 1 // source → target: send your marks
	MsgMarks                         // target → source: here they are (the driver adds them)
	MsgBegin                         // source → target: At, Toward, Full
	MsgReady                         // target → source: Inconsistent, durably; write over me
	MsgLast                          // source → target: that was all, as of this boundary; Lineage
	MsgWhole                         // target → source: UpToDate and durable as of that boundary
	MsgRefuse                        // either: not with me; Row
)

var messageNames = []string{"", "ask", "marks", "begin", "ready", "last", "whole", "refuse"}

// Message goes to the peer's machine.
type Message struct {
	Kind       MessageKind
	At, Toward Generation // MsgBegin
	Full       bool       // MsgBegin: nothing of the target's data is relied on
	Compare    bool       // MsgBegin, Full: its data is kept, and digests tell what is equal
	Lineage    Lineage    // MsgLast: the source's
	Row        string     // MsgRefuse: why
}

// Event is something that happened.
type Event interface{ isEvent() }

// The events.
type (
	// EvOpen: the local copy was opened, its journal replayed.
	EvOpen struct{ Copy Copy }
	// EvGrant: the authority's word. Line names the line that would begin under
	// it: its term and branch, and the run of this host's instance.
	EvGrant struct {
		Kind GrantKind
		Line Generation
	}
	// EvHello: a session with the peer stands; Copy is what it said of its copy,
	// Empty the name a copy of nothing would get (its new run is in it).
	EvHello struct {
		Copy  Copy
		Empty Generation
	}
	// EvMessage: a word of the peer's machine, of the session that stands.
	EvMessage struct{ Message Message }
	// EvPersisted: the outstanding ActPersist is durable.
	EvPersisted struct{}
	// EvCaughtUp: what is left fits into one boundary. From the ActRule that
	// answers it on, new writes go to both; the driver then sends the rest.
	EvCaughtUp struct{}
	// EvRestSent: the rest was handed to the session.
	EvRestSent struct{}
	// EvBoundary: (target) everything before MsgLast is in the image, durably.
	EvBoundary struct{}
	// EvLost: the session ended. Nothing of it arrives any more.
	EvLost struct{}
	// EvFailed: the local copy failed for good.
	EvFailed struct{ Reason string }
	// EvClose: an orderly end; everything is durable.
	EvClose struct{}
)

func (EvOpen) isEvent()      {}
func (EvGrant) isEvent()     {}
func (EvHello) isEvent()     {}
func (EvMessage) isEvent()   {}
func (EvPersisted) isEvent() {}
func (EvCaughtUp) isEvent()  {}
func (EvRestSent) isEvent()  {}
func (EvBoundary) isEvent()  {}
func (EvLost) isEvent()      {}
func (EvFailed) isEvent()    {}
func (EvClose) isEvent()     {}

// Action is something the driver must do.
type Action interface{ isAction() }

// The actions. Their order is binding: each takes effect before the next begins.
type (
	// ActPersist: make metadata and marks durable, in the order that Marks says,
	// then answer by EvPersisted. At most one is outstanding. What it replaces is
	// the metadata as last persisted.
	ActPersist struct {
		State   model.ReplicaState
		Lineage Lineage
		Marks   Marks
		Clean   bool
	}
	// ActRule: what is acknowledged from now on.
	ActRule struct{ Rule Rule }
	// ActSend: to the peer's machine, in order with chunks and writes.
	ActSend struct{ Message Message }
	// ActCopy: (source) send every marked chunk; take a mark back only when the
	// target has that very content durably. Stops with the session.
	ActCopy struct{}
	// ActSendRest: (source) send what is still marked, then EvRestSent.
	ActSendRest struct{}
	// ActWhole: (source) the peer's copy is whole and one line with this one: the
	// record may call it UpToDate.
	ActWhole struct{}
	// ActLosing: a copy that was a whole disk is about to be overwritten, and is no
	// disk until the end of the resync. Said before it is.
	ActLosing struct{ Copy Copy }
	// ActMarked: (primary) all that the lost peer lacks is marked; the record may
	// be asked for simplex.
	ActMarked struct{}
	// ActAlarm: a named problem. Nothing is overwritten meanwhile.
	ActAlarm struct{ Code, Text string }
)

func (ActPersist) isAction()  {}
func (ActRule) isAction()     {}
func (ActSend) isAction()     {}
func (ActCopy) isAction()     {}
func (ActSendRest) isAction() {}
func (ActWhole) isAction()    {}
func (ActLosing) isAction()   {}
func (ActMarked) isAction()   {}
func (ActAlarm) isAction()    {}

// Machine is one disk of one host with respect to one peer. The zero value has
// nothing loaded; feed it EvOpen first. It belongs to one goroutine, is a plain
// value and may be copied and compared.
type Machine struct {
	copy  Copy // as durable
	next  Copy // as it will be after the outstanding ActPersist
	busy  bool // an ActPersist is outstanding
	phase Phase
	rule  Rule
	grant EvGrant
	hello EvHello
	judge Judgement
	up    bool // a session stands, and its hello was heard
	owed  bool // the peer was lost while something was being made durable
	ended bool // (target) the end was announced
	from  Lineage
	mut   mutants
}

// New returns a machine that has nothing loaded.
func New() Machine { return Machine{} }

// Phase returns where the machine stands.
func (m *Machine) Phase() Phase { return m.phase }

// Rule returns the rule for the guest's writes in force.
func (m *Machine) Rule() Rule { return m.rule }

// Copy returns the local copy's metadata as last persisted.
func (m *Machine) Copy() Copy { return m.copy }

// Resized notes that the local copy was made larger, durably; nothing may be under
// way, and no peer be met.
func (m *Machine) Resized(size int64) { m.copy.Size, m.next.Size = size, size }

// Judgement returns what was found of the peer's copy; zero before a hello.
func (m *Machine) Judgement() Judgement { return m.judge }

// PeerHasData reports whether the peer's copy ever held data of a known line.
func (m *Machine) PeerHasData() bool { return !m.hello.Copy.Current.IsZero() }

// PeerClean reports whether the peer's copy was closed properly by its last user.
func (m *Machine) PeerClean() bool { return m.hello.Copy.Clean }

// Step handles one event and returns what the driver must do, in this order. An
// event that does not fit where the machine stands changes nothing: a message
// may be overtaken by a loss, a grant by the next one.
func (m *Machine) Step(ev Event) []Action {
	if m.phase == PhaseFailed {
		return nil
	}
	switch e := ev.(type) {
	case EvOpen:
		if m.phase == PhaseClosed {
			m.copy, m.phase = e.Copy, PhaseIdle
		}
	case EvGrant:
		return m.onGrant(e)
	case EvHello:
		return m.onHello(e)
	case EvMessage:
		return m.onMessage(e.Message)
	case EvPersisted:
		return m.onPersisted()
	case EvCaughtUp:
		if m.phase == PhaseSource {
			m.phase = PhaseEnding
			return append(m.setRule(RuleBoth), ActSendRest{})
		}
	case EvRestSent:
		if m.phase == PhaseEnding && !m.ended {
			m.ended = true
			return []Action{ActSend{Message{Kind: MsgLast, Lineage: m.copy.Lineage}}}
		}
	case EvBoundary:
		if m.phase == PhaseTarget && m.ended {
			m.phase = PhaseWhole
			return m.persist(model.UpToDate, m.copy.Filled(m.from), MarksClear)
		}
	case EvLost:
		return m.onLost()
	case EvFailed:
		m.phase, m.rule = PhaseFailed, RuleHold
		return []Action{ActRule{RuleHold}, ActAlarm{"replica-failed", "the local copy failed: " + e.Reason}}
	case EvClose:
		return m.onClose()
	}
	return nil
}

// persist asks for new metadata. Nothing else is asked until it is durable.
func (m *Machine) persist(state model.ReplicaState, l Lineage, marks Marks) []Action {
	m.next = m.copy
	m.next.State, m.next.Lineage, m.next.Clean = state, l, false
	m.busy = true
	return []Action{ActPersist{State: state, Lineage: l, Marks: marks}}
}

func (m *Machine) setRule(r Rule) []Action {
	if m.rule == r {
		return nil
	}
	m.rule = r
	return []Action{ActRule{r}}
}

// onGrant takes in the authority's word.
func (m *Machine) onGrant(g EvGrant) []Action {
	if m.phase == PhaseClosed {
		return nil
	}
	m.grant = g
	if m.busy {
		return nil // followed when the metadata are durable
	}
	return m.follow()
}

// follow does what the last grant allows or asks for.
func (m *Machine) follow() []Action {
	switch m.grant.Kind {
	case GrantAlone, GrantSource:
		switch m.phase {
		case PhaseIdle, PhaseMirror, PhaseLost:
			return m.begin()
		case PhaseAlone:
			return m.trySource()
		}
	case GrantTarget:
		if m.phase == PhaseMirror && !m.up {
			m.phase = PhaseIdle
		}
	case GrantStale:
		if (m.phase == PhaseIdle || m.phase == PhaseMirror || m.phase == PhaseTarget) && m.copy.State == model.UpToDate {
			m.phase = PhaseIdle
			return m.persist(model.Outdated, m.copy.Lineage, MarksKeep)
		}
	}
	return nil
}

// begin starts a line of its own, which the record has granted.
func (m *Machine) begin() []Action {
	if !m.copy.whole() || m.copy.State != model.UpToDate {
		return []Action{ActAlarm{"replica-not-fit", fmt.Sprintf("the record grants the disk to this host, whose copy calls itself %s, of %s: nothing is written", m.copy.State, m.copy.Current)}}
	}
	l := m.copy.WriteAlone(m.grant.Line)
	marks := MarksFresh
	if m.copy.alone() {
		marks = MarksOwn
	}
	if m.mut.noMarks {
		marks = MarksKeep
	}
	m.phase = PhaseBegin
	if m.mut.noRotate {
		l = m.copy.Lineage
		l.Primary = true
	}
	if m.mut.beginEarly {
		return append(m.setRule(RuleAlone), m.persist(model.UpToDate, l, marks)...)
	}
	return m.persist(model.UpToDate, l, marks)
}

// onHello judges the peer's copy.
func (m *Machine) onHello(e EvHello) []Action {
	if m.phase == PhaseClosed {
		return nil
	}
	m.up, m.hello, m.ended = true, e, false
	m.judge = Judge(m.copy, e.Copy)
	if m.busy {
		return nil
	}
	return m.follow()
}

// onClose notes an orderly end, if nothing is under way.
func (m *Machine) onClose() []Action {
	if m.busy || m.phase == PhaseClosed {
		return m.setRule(RuleHold)
	}
	acts := m.setRule(RuleHold)
	l := m.copy.Closed()
	acts = append(acts, m.persist(m.copy.State, l, MarksKeep)...)
	p := acts[len(acts)-1].(ActPersist)
	p.Clean, m.next.Clean = true, true
	acts[len(acts)-1] = p
	m.phase = PhaseClosed
	return acts
}

// onLost is the end of a session.
func (m *Machine) onLost() []Action {
	m.up, m.ended, m.hello, m.judge = false, false, EvHello{}, Judgement{}
	if m.busy && m.phase != PhaseBegin && m.phase != PhaseIdle && m.phase != PhaseClosed && m.phase != PhaseDetach {
		m.owed = true
		return m.setRule(m.lostRule())
	}
	return m.afterLoss()
}

// lostRule is what holds while the loss of the peer waits for a disk.
func (m *Machine) lostRule() Rule {
	if m.rule == RuleBoth {
		return RuleHold
	}
	return m.rule
}

func (m *Machine) afterLoss() []Action {
	switch m.phase {
	case PhaseAsk, PhaseMerge, PhaseReady, PhaseSource:
		m.phase = PhaseAlone // it was all the time
		return nil
	case PhaseEnding:
		// What the guest wrote to both meanwhile is not acknowledged, or is in the log.
		m.phase = PhaseBegin
		if m.mut.endingForgets {
			return m.persist(m.copy.State, m.copy.Lineage, MarksKeep)
		}
		return append(m.setRule(RuleHold), m.persist(m.copy.State, m.copy.Lineage, MarksOwn)...)
	case PhaseSettle, PhasePair:
		m.grant = EvGrant{} // older than the loss: the record may name another by now
		m.phase = PhaseDetach
		marks := MarksFresh
		if m.mut.noMarks {
			marks = MarksKeep
		}
		return append(m.setRule(RuleHold), m.persist(m.copy.State, m.copy.Lineage, marks)...)
	case PhaseOffered:
		m.phase = PhaseIdle
	case PhaseTurn, PhaseTarget, PhaseWhole:
		// One life, one filling; a copy that became whole meanwhile waits as a mirror
		// does: if the record calls it UpToDate, it may be granted.
		m.phase = PhaseIdle
		if m.copy.whole() {
			m.phase = PhaseMirror
		}
	}
	return nil
}
