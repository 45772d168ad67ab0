package replica

import (
	"slices"

	"perdure/internal/model"
)

// Copy is what the judge needs of one copy of a disk: its metadata.
type Copy struct {
	VM    string // UUID
	Disk  string // disk id
	Size  int64  // bytes
	State model.ReplicaState
	Clean bool // its last user closed it properly
	Lineage
}

// Crashed reports whether the guest wrote through this copy and its end was not
// recorded.
func (c Copy) Crashed() bool { return c.Primary && !c.Clean }

// whole reports whether the copy is a disk as it was at some time.
func (c Copy) whole() bool {
	return (c.State == model.UpToDate || c.State == model.Outdated) && c.Toward.IsZero() && !c.Discarded
}

// alone reports whether the copy has data of a line that was written without a peer.
func (c Copy) alone() bool { return !c.Base.IsZero() }

// Verdict says how two copies become equal.
type Verdict int

// The verdicts, from the side of "mine".
const (
	// Same: one line; they differ at most in the marked set, and either may be
	// the source, for neither has written anything alone.
	Same Verdict = iota + 1
	SourceByBitmap
	SourceFull
	TargetByBitmap
	TargetFull
	// SplitBrain: each has data that the other has not. A person picks.
	SplitBrain
	// Unrelated: no generation in common. What is overwritten is for the
	// authority record to say, or for a person.
	Unrelated
	// NoSource: neither is whole.
	NoSource
	// WrongPair: another VM's or another disk's, or of another size.
	WrongPair
)

var verdictNames = []string{"", "Same", "SourceByBitmap", "SourceFull", "TargetByBitmap", "TargetFull", "SplitBrain", "Unrelated", "NoSource", "WrongPair"}

// String is the verdict's name.
func (v Verdict) String() string {
	if v < 0 || int(v) >= len(verdictNames) || v == 0 {
		return "none"
	}
	return verdictNames[v]
}

// Mirror is the same verdict from the other side.
func (v Verdict) Mirror() Verdict {
	switch v {
	case SourceByBitmap:
		return TargetByBitmap
	case SourceFull:
		return TargetFull
	case TargetByBitmap:
		return SourceByBitmap
	case TargetFull:
		return SourceFull
	}
	return v
}

// Judgement is a verdict with its grounds.
type Judgement struct {
	Verdict Verdict
	// Row names the row of the table in docs/replication.md that decided.
	Row string
	// ByBitmap: the marked set (activity logs and bitmaps of both) holds every
	// chunk in which the two differ. Besides Same and the two ByBitmap verdicts it
	// may be true of a split brain: a resync after a person's choice is short then.
	ByBitmap bool
	// Resume: an unfinished resync goes on.
	Resume bool
	// Ancestor is the newest line both have been in, zero if none is known.
	Ancestor Generation
	// Stale: the source is whole, but Outdated: newer data exists, or did.
	Stale bool
}

// Judge compares two copies of one disk. It needs nothing but their metadata,
// and both sides come to the same verdict, mirrored.
func Judge(mine, theirs Copy) Judgement {
	j := judgePair(mine, theirs)
	src := mine
	switch j.Verdict {
	case TargetByBitmap, TargetFull:
		src = theirs
	case Same:
		if mine.State == model.Outdated && theirs.State == model.UpToDate {
			src = theirs
		}
	case SourceByBitmap, SourceFull:
	default:
		return j
	}
	j.Stale = src.State == model.Outdated
	return j
}

func judgePair(m, t Copy) Judgement {
	if m.VM != t.VM || m.Disk != t.Disk || m.Size != t.Size {
		return Judgement{Verdict: WrongPair, Row: "wrong-pair"}
	}
	switch mw, tw := m.whole(), t.whole(); {
	case !mw && !tw:
		return Judgement{Verdict: NoSource, Row: "both-inconsistent"}
	case mw && !tw:
		return fill(m, t)
	case tw && !mw:
		return mirror(fill(t, m))
	}
	return judgeWhole(m, t)
}

func mirror(j Judgement) Judgement {
	j.Verdict = j.Verdict.Mirror()
	return j
}

// fill judges a target that is not whole: it has nothing of its own to lose.
func fill(src, dst Copy) Judgement {
	j := Judgement{Verdict: SourceFull, Ancestor: ancestor(src.Lineage, dst.Lineage)}
	switch {
	case dst.Current.IsZero() && dst.Toward.IsZero():
		j.Row = "never-connected"
	case src.alone() && src.Base == dst.Current && dst.Toward == src.Current && !dst.alone():
		// What the target had of its own is in the source's bitmap since before it
		// was told to begin, and bits leave that only for what the target has durably.
		j.Verdict, j.Row, j.ByBitmap, j.Resume = SourceByBitmap, "resync-interrupted", true, true
	case dst.Discarded && dst.Toward.IsZero():
		j.Row = "discarded" // by a person; unchanged since, so bitmaps may still tell the difference
		if bothMarked(src, dst) {
			j.Verdict, j.ByBitmap = SourceByBitmap, true
		}
	case dst.Toward.IsZero():
		j.Row = "worthless" // marked so by hand, or by a release that kept no lineage
	default:
		j.Row = "filled-by-another" // some of its chunks are another source's
	}
	return j
}

// judgeWhole judges two copies each of which is a disk as it once was.
func judgeWhole(m, t Copy) Judgement {
	j := Judgement{Ancestor: ancestor(m.Lineage, t.Lineage)}
	is := func(v Verdict, row string, byBitmap bool) Judgement {
		j.Verdict, j.Row, j.ByBitmap = v, row, byBitmap
		return j
	}
	switch {
	case m.Current.IsZero() || t.Current.IsZero():
		return is(Unrelated, "line-unknown", false) // written by a release that kept no lineage
	case m.Current == t.Current:
		return sameLine(m, t, is)
	case m.Current.Branch != t.Current.Branch:
		return is(SplitBrain, "other-branch", bothMarked(m, t))
	case m.alone() && m.Base == t.Current && !t.alone():
		return is(SourceByBitmap, "peer-missed-last", true)
	case t.alone() && t.Base == m.Current && !m.alone():
		return is(TargetByBitmap, "peer-missed-last", true)
	case m.alone() && t.alone() && bothMarked(m, t):
		return is(SplitBrain, "both-alone", true)
	case slices.Contains(m.past(), t.Current) && !t.alone():
		return is(SourceFull, "peer-missed-more", false)
	case slices.Contains(t.past(), m.Current) && !m.alone():
		return is(TargetFull, "peer-missed-more", false)
	case !j.Ancestor.IsZero():
		return is(SplitBrain, "both-went-on", false)
	}
	return is(Unrelated, "unrelated", false)
}

// sameLine judges two copies of one line.
func sameLine(m, t Copy, is func(Verdict, string, bool) Judgement) Judgement {
	switch {
	case m.alone() && t.alone():
		return is(SplitBrain, "both-alone-one-line", bothMarked(m, t)) // no right sequence of grants leads here
	case m.alone():
		// The target was complete, and the source never heard it; it may have gone on.
		return is(SourceByBitmap, "end-of-resync-unheard", true)
	case t.alone():
		return is(TargetByBitmap, "end-of-resync-unheard", true)
	case m.Crashed() && !t.Crashed():
		return is(SourceByBitmap, "crashed-as-primary", true)
	case t.Crashed() && !m.Crashed():
		return is(TargetByBitmap, "crashed-as-primary", true)
	case m.Crashed():
		return is(Same, "both-crashed-as-primary", true)
	case m.State == model.UpToDate && t.State == model.Outdated:
		return is(SourceByBitmap, "peer-outdated", true)
	case t.State == model.UpToDate && m.State == model.Outdated:
		return is(TargetByBitmap, "peer-outdated", true)
	case m.Clean && t.Clean:
		return is(Same, "both-clean", true)
	}
	return is(Same, "crashed-as-secondary", true)
}

// bothMarked reports whether the two bitmaps together hold all differences of
// two lines: both count from one point, or one from where the other began.
func bothMarked(m, t Copy) bool {
	if m.Current.IsZero() || t.Current.IsZero() {
		return false
	}
	return m.alone() && t.alone() && m.Base == t.Base && !m.BaseEmpty ||
		m.alone() && m.Base == t.Current || t.alone() && t.Base == m.Current ||
		m.Current == t.Current
}

// ancestor is the newest generation that both have been in.
func ancestor(m, t Lineage) Generation {
	theirs := append([]Generation{t.Current}, t.past()...)
	for _, g := range append([]Generation{m.Current}, m.past()...) {
		if !g.IsZero() && slices.Contains(theirs, g) {
			return g
		}
	}
	return Generation{}
}
