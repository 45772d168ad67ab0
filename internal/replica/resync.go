package replica

import (
	"fmt"

	"perdure/internal/model"
)

// trySource starts filling the peer, if the record asks for it, a session
// stands, and the two copies' own metadata do not contradict the record.
func (m *Machine) trySource() []Action {
	if m.grant.Kind != GrantSource || !m.up || m.busy {
		return nil
	}
	if why, code := m.contradiction(); code != "" {
		m.up = false // of this session nothing more is expected
		return []Action{ActAlarm{code, why}, ActSend{Message{Kind: MsgRefuse, Row: m.judge.Row}}}
	}
	if m.byBitmap() {
		m.phase = PhaseAsk
		return []Action{ActSend{Message{Kind: MsgAsk}}}
	}
	m.phase = PhaseMerge
	line := m.grant.Line
	if m.mut.noRename {
		line = m.copy.Current
	}
	return m.persist(m.copy.State, m.copy.FillStarts(m.hello.Empty, line), MarksAll)
}

// byBitmap reports whether the marked set is enough.
func (m *Machine) byBitmap() bool {
	switch m.judge.Verdict {
	case Same, SourceByBitmap:
		return m.judge.ByBitmap
	}
	return m.mut.alwaysBitmap && m.judge.Verdict == SourceFull && !m.hello.Copy.Current.IsZero()
}

// contradiction tells why the peer must not be filled from here although the
// record says so, with the code of the problem; "" when nothing speaks against it.
func (m *Machine) contradiction() (why, code string) {
	j, t := m.judge, m.hello.Copy
	switch j.Verdict {
	case Same, SourceByBitmap, SourceFull:
		return "", ""
	case TargetByBitmap, TargetFull:
		if m.mut.trustRecord {
			return "", ""
		}
		return fmt.Sprintf("the record says that this host's copy (%s) is the good one, but the peer's own metadata (%s) are newer: nothing is copied until a person decides",
			m.copy.Current, t.Current), "replica-contradicts-record"
	case SplitBrain:
		if m.mut.mergeSplit {
			return "", ""
		}
		return fmt.Sprintf("split brain: this host's copy (%s) and the peer's (%s) each have data that the other has not, since %s: a person picks",
			m.copy.Current, t.Current, j.Ancestor), "split-brain"
	case Unrelated:
		if t.alone() && !m.mut.trustRecord {
			return fmt.Sprintf("the peer's copy (%s) has nothing in common with this one (%s) and was written alone: a person decides whether it may be overwritten",
				t.Current, m.copy.Current), "split-brain"
		}
		return "", "" // older than the history reaches; the record knows it as behind
	case NoSource:
		return "neither copy is whole", "no-source"
	}
	return fmt.Sprintf("the peer's copy is disk %q of VM %s, %d bytes; this is disk %q of VM %s, %d bytes", t.Disk, t.VM, t.Size, m.copy.Disk, m.copy.VM, m.copy.Size), "wrong-pair"
}

// onMessage takes in a word of the peer's machine.
func (m *Machine) onMessage(msg Message) []Action {
	if !m.up {
		return nil
	}
	switch msg.Kind {
	case MsgAsk:
		return m.onAsk()
	case MsgMarks:
		if m.phase != PhaseAsk {
			return nil
		}
		return m.merge()
	case MsgBegin:
		return m.onBegin(msg)
	case MsgReady:
		if m.phase == PhaseReady {
			m.phase = PhaseSource
			return []Action{ActCopy{}}
		}
	case MsgLast:
		if m.phase == PhaseTarget {
			m.ended, m.from = true, msg.Lineage
		}
	case MsgWhole:
		if m.phase == PhaseEnding && m.ended {
			m.phase = PhaseSettle
			marks := MarksClear
			if m.mut.keepBase {
				return m.persist(m.copy.State, m.copy.Lineage, marks)
			}
			return m.persist(m.copy.State, m.copy.FillEnds(), marks)
		}
	case MsgRefuse:
		return m.onRefuse(msg)
	}
	return nil
}

func (m *Machine) onRefuse(msg Message) []Action {
	acts := []Action{ActAlarm{"peer-refuses", "the peer refuses: " + msg.Row}}
	m.up = false
	switch m.phase {
	case PhaseAsk, PhaseReady:
		m.phase = PhaseAlone
	case PhaseOffered:
		m.phase = PhaseIdle
	}
	return acts
}

// willing tells a target whether it may be written over from this source.
func (m *Machine) willing() bool {
	if m.grant.Kind != GrantTarget || m.phase != PhaseIdle && m.phase != PhaseOffered || m.busy {
		return false
	}
	switch m.judge.Verdict {
	case Same, TargetByBitmap, TargetFull:
		return true
	case Unrelated:
		return !m.copy.alone() || m.mut.trustRecord
	case SplitBrain:
		return m.mut.mergeSplit
	case SourceByBitmap, SourceFull:
		return m.mut.trustRecord
	}
	return false
}

func (m *Machine) refuse() []Action {
	m.up = false
	return []Action{
		ActAlarm{"replica-contradicts-record", fmt.Sprintf("the peer wants to write over this copy (%s, %s), which speaks against it (%s): refused", m.copy.State, m.copy.Current, m.judge.Row)},
		ActSend{Message{Kind: MsgRefuse, Row: m.judge.Row}}}
}

func (m *Machine) onAsk() []Action {
	if !m.willing() {
		return m.refuse()
	}
	m.phase = PhaseOffered
	return []Action{ActSend{Message{Kind: MsgMarks}}}
}

// merge takes the target's marks into the bitmap, durably, before the target may
// forget them.
func (m *Machine) merge() []Action {
	m.phase = PhaseMerge
	l, marks := m.copy.Lineage, MarksTheirs
	if !m.copy.alone() {
		l.Base, l.BaseEmpty, marks = l.Current, false, MarksNew
	}
	if m.mut.noMerge {
		marks = MarksKeep
	}
	return m.persist(m.copy.State, l, marks)
}

// onBegin turns this copy into a target.
func (m *Machine) onBegin(msg Message) []Action {
	if !m.willing() || msg.Full == (m.phase == PhaseOffered) {
		return m.refuse()
	}
	var acts []Action
	if m.copy.whole() {
		acts = append(acts, ActLosing{m.copy})
	}
	marks := MarksClear
	if msg.Full && !msg.Compare {
		marks = MarksWipe
	}
	m.phase = PhaseTurn
	state := model.Inconsistent
	if m.mut.staysUpToDate {
		state = m.copy.State
	}
	return append(acts, m.persist(state, m.copy.Filling(msg.At, msg.Toward), marks)...)
}

// onPersisted goes on with what waited for the disk.
func (m *Machine) onPersisted() []Action {
	if !m.busy {
		return nil
	}
	m.busy = false
	m.copy = m.next
	if m.owed {
		m.owed = false
		return m.lostMeanwhile()
	}
	switch m.phase {
	case PhaseBegin:
		m.phase = PhaseAlone
		return append(m.setRule(RuleAlone), m.follow()...)
	case PhaseMerge:
		m.phase = PhaseReady
		full := m.copy.BaseEmpty && !m.judge.ByBitmap
		return []Action{ActSend{Message{Kind: MsgBegin, At: m.copy.Base, Toward: m.copy.Current, Full: full,
			Compare: full && !m.hello.Copy.Current.IsZero()}}}
	case PhaseSettle:
		m.phase = PhasePair
		return []Action{ActWhole{}}
	case PhaseTurn:
		m.phase = PhaseTarget
		return []Action{ActSend{Message{Kind: MsgReady}}}
	case PhaseWhole:
		m.phase = PhaseMirror
		return append([]Action{ActSend{Message{Kind: MsgWhole}}}, m.follow()...)
	case PhaseDetach:
		m.phase = PhaseLost
		return append([]Action{ActMarked{}}, m.follow()...)
	case PhaseIdle:
		return m.follow()
	}
	return nil
}

// lostMeanwhile carries out a loss that came while the disk was being written.
func (m *Machine) lostMeanwhile() []Action {
	acts := m.afterLoss()
	if m.busy {
		return acts
	}
	return append(acts, m.follow()...)
}
