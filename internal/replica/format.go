package replica

import (
	"fmt"
	"strings"
)

// FormatLineage is one line for people and tests: what is set of a lineage.
func FormatLineage(l Lineage) string {
	parts := []string{"current " + l.Current.String()}
	if !l.Base.IsZero() {
		s := "base " + l.Base.String()
		if l.BaseEmpty {
			s += " (empty copy)"
		}
		parts = append(parts, s)
	}
	if !l.Toward.IsZero() {
		parts = append(parts, "toward "+l.Toward.String())
	}
	var past []string
	for _, g := range l.History {
		if !g.IsZero() {
			past = append(past, g.String())
		}
	}
	if len(past) > 0 {
		parts = append(parts, "before "+strings.Join(past, ", "))
	}
	if l.Primary {
		parts = append(parts, "primary")
	}
	if l.Discarded {
		parts = append(parts, "discarded")
	}
	return strings.Join(parts, "; ")
}

// FormatJudgement is one line for people and tests.
func FormatJudgement(j Judgement) string {
	s := fmt.Sprintf("%s (%s)", j.Verdict, j.Row)
	for _, f := range []struct {
		on   bool
		word string
	}{{j.ByBitmap, "by bitmap"}, {j.Resume, "goes on"}, {j.Stale, "source is Outdated"}, {!j.Ancestor.IsZero(), "common " + j.Ancestor.String()}} {
		if f.on {
			s += ", " + f.word
		}
	}
	return s
}

// FormatAction is one line for people and tests.
func FormatAction(a Action) string {
	switch a := a.(type) {
	case ActPersist:
		s := fmt.Sprintf("persist %s, %s", a.State, FormatLineage(a.Lineage))
		if a.Marks != MarksKeep {
			s += "; marks " + a.Marks.String()
		}
		if a.Clean {
			s += "; clean"
		}
		return s
	case ActRule:
		return "guest writes: " + a.Rule.String()
	case ActSend:
		return "tell peer: " + formatMessage(a.Message)
	case ActCopy:
		return "copy what is marked"
	case ActSendRest:
		return "send the rest"
	case ActWhole:
		return "the peer is whole"
	case ActMarked:
		return "all that the peer lacks is marked"
	case ActLosing:
		return fmt.Sprintf("about to overwrite a whole copy: %s, %s", a.Copy.State, a.Copy.Current)
	case ActAlarm:
		return fmt.Sprintf("ALARM %s: %s", a.Code, a.Text)
	}
	return fmt.Sprintf("%#v", a)
}

func formatMessage(m Message) string {
	s := messageNames[m.Kind]
	switch m.Kind {
	case MsgBegin:
		s += fmt.Sprintf(" at %s toward %s", m.At, m.Toward)
		if m.Full {
			s += ", full"
		}
		if m.Compare {
			s += ", comparing digests"
		}
	case MsgLast:
		s += ", " + FormatLineage(m.Lineage)
	case MsgRefuse:
		s += ", " + m.Row
	}
	return s
}
