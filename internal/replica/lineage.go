package replica

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"perdure/internal/model"
)

// Generation names one line of data: everything that was written from the
// moment on at which somebody began to write a copy without its peer. The grant
// under which that began names it: nobody else may write the VM's disks in that
// term, and where terms are handed out twice (a cluster store that was restored)
// the run still differs, which is random.
//
// Invariant: at most two whole copies bear one generation: the one that began
// it, and the one peer that was with it since. They differ at most in what was
// under way when they were last together, and in what the first one wrote since,
// which is in its bitmap. The zero Generation is "nothing known".
type Generation struct {
	Term   model.Term     // of the grant under which the line was begun
	Branch model.BranchID // of that grant; at most MaxName bytes
	Run    model.RunID    // of the instance that began it; at most MaxName bytes
}

// MaxName is the length up to which branch and run fit into a generation, bytes.
const MaxName = 32

// IsZero reports whether nothing is known.
func (g Generation) IsZero() bool { return g == Generation{} }

// String is for people: term, branch if there is one, the run's first digits.
func (g Generation) String() string {
	if g.IsZero() {
		return "none"
	}
	s := fmt.Sprintf("term %d", g.Term)
	if g.Branch != "" {
		s += " branch " + string(g.Branch[:min(8, len(g.Branch))])
	}
	if g.Run != "" {
		s += " run " + string(g.Run[:min(8, len(g.Run))])
	}
	return s
}

// HistoryLen is how many older generations a lineage remembers. A copy that was
// away for longer is "unrelated", and then copied whole.
const HistoryLen = 8

// Lineage is what one copy of a disk knows about where its data comes from. It
// is a plain value, comparable with ==, kept in the replica's metadata; its
// methods return the changed value, which counts once it is durable.
//
// Invariant: Base is set exactly while there is data here that the peer's copy
// lacks, or may lack; the bitmap (with the activity log) then holds every chunk
// in which the copy of generation Base differs from this one. A whole copy with
// a Base was written alone and is never overwritten silently.
type Lineage struct {
	// Current is the line that the data belongs to; zero: it never was whole.
	Current Generation
	// Base is the generation of the peer's copy that the bitmap is relative to;
	// zero: no peer's copy is behind this one, the bitmap means nothing.
	Base Generation
	// Toward is set in a copy that is Inconsistent because it is being filled:
	// the source's Current. What this copy had of its own (activity log, bitmap)
	// was in the source's bitmap, durably, before this was set.
	Toward Generation
	// History holds older generations of this data, newest first; the rest is zero.
	History [HistoryLen]Generation
	// Primary: the guest wrote through this copy's host, and its end was not
	// recorded. Found set at start, it means "crashed as primary".
	Primary bool
	// BaseEmpty: Base names a copy that held nothing (a full copy is under way),
	// so it is not worth remembering.
	BaseEmpty bool
	// Discarded: a person gave this copy up, and it may be overwritten, whatever
	// it holds. It is not whole any more, though nothing in it was changed yet.
	Discarded bool
}

// past lists everything that is remembered of the past, newest first.
func (l Lineage) past() []Generation {
	out := make([]Generation, 0, HistoryLen+1)
	if !l.Base.IsZero() && !l.BaseEmpty {
		out = append(out, l.Base)
	}
	for _, g := range l.History {
		if !g.IsZero() {
			out = append(out, g)
		}
	}
	return out
}

// remember puts g in front of the history, unless it is there or is nothing.
func (l *Lineage) remember(g Generation) {
	if g.IsZero() || slices.Contains(l.History[:], g) {
		return
	}
	copy(l.History[1:], l.History[:HistoryLen-1])
	l.History[0] = g
}

// WriteAlone begins the line g, before the first write that the peer's copy
// does not get. It must be durable, together with a bitmap that holds all that
// the peer did not report durable, before such a write is acknowledged, and
// after the record granted it: a grant that was only asked for begins nothing.
//
// A copy that is written alone already goes on in the line it is in: what the
// peer lacks is still what the bitmap says. Only a new branch begins a new line
// then, so that a forced decision can never be mistaken.
func (l Lineage) WriteAlone(g Generation) Lineage {
	switch {
	case l.Base.IsZero():
		l.Base, l.BaseEmpty = l.Current, false
	case l.Current.Branch == g.Branch:
		l.Primary = true
		return l
	default:
		l.remember(l.Current)
	}
	l.Current, l.Primary = g, true
	return l
}

// FillStarts is the source's side of a copy that cannot rest on a bitmap: from
// now on the bitmap, all of whose bits are set first, is relative to the empty
// copy that empty names. Both names must be new: the standby's run is in empty,
// line is of the grant under which the copy is made.
//
// The source's line is renamed too: another copy may have reached the end of a
// resync in the old one without this side hearing of it. Two copies that were
// filled at different times must never bear one name.
func (l Lineage) FillStarts(empty, line Generation) Lineage {
	if !l.BaseEmpty {
		l.remember(l.Base)
	}
	l.remember(l.Current)
	l.Current = line
	l.Base, l.BaseEmpty = empty, true
	return l
}

// FillEnds is the source's side of the end of any resync: the peer's copy is
// known to be whole and of this line.
func (l Lineage) FillEnds() Lineage {
	if !l.BaseEmpty {
		l.remember(l.Base)
	}
	l.Base, l.BaseEmpty = Generation{}, false
	return l
}

// Filling is the target's side of the start of a resync from a source at
// toward. at is the source's Base: the generation of this copy, or, for a full
// copy, the name that the source gave to the empty copy. It must be durable
// (with the state Inconsistent) before the first byte is overwritten, and after
// the source has, durably, all that this copy has of its own in its bitmap.
func (l Lineage) Filling(at, toward Generation) Lineage {
	if at != l.Current && l.Toward.IsZero() {
		l.remember(l.Current)
	}
	if !l.BaseEmpty {
		l.remember(l.Base)
	}
	l.Current, l.Toward = at, toward
	l.Base, l.BaseEmpty, l.Primary, l.Discarded = Generation{}, false, false, false
	return l
}

// Filled is the target's side of the end of a resync: this copy is the source's
// data as of an epoch boundary, so it takes over the source's past.
func (l Lineage) Filled(source Lineage) Lineage {
	past := source.past()
	l = Lineage{Current: source.Current}
	copy(l.History[:], past[:min(len(past), HistoryLen)])
	return l
}

// Closed notes an orderly end: everything is durable and nothing is under way.
func (l Lineage) Closed() Lineage {
	l.Primary = false
	return l
}

// Encoding. All numbers are little-endian; a name is its bytes, padded with
// zeroes. The order: 4 bytes of flags, 4 bytes zero, then Current, Base, Toward
// and the history, each as 8 bytes of term, MaxName of branch, MaxName of run.
const (
	generationSize = 8 + 2*MaxName
	// EncodedSize is the length of an encoded Lineage, bytes.
	EncodedSize = 8 + (3+HistoryLen)*generationSize

	flagPrimary   = 1
	flagBaseEmpty = 2
	flagDiscarded = 4
)

// ErrFormat says that bytes are no lineage, or a lineage cannot be encoded.
var ErrFormat = errors.New("malformed lineage")

// Validate refuses what cannot be encoded.
func (l Lineage) Validate() error {
	for _, g := range append([]Generation{l.Current, l.Base, l.Toward}, l.History[:]...) {
		for _, s := range []string{string(g.Branch), string(g.Run)} {
			if len(s) > MaxName || bytes.IndexByte([]byte(s), 0) >= 0 {
				return fmt.Errorf("name %.40q in a generation: at most %d bytes, none of them zero: %w", s, MaxName, ErrFormat)
			}
		}
	}
	return nil
}

// AppendTo appends the EncodedSize bytes of l, which must be valid.
func (l Lineage) AppendTo(b []byte) []byte {
	var flags uint32
	if l.Primary {
		flags |= flagPrimary
	}
	if l.BaseEmpty {
		flags |= flagBaseEmpty
	}
	if l.Discarded {
		flags |= flagDiscarded
	}
	b = binary.LittleEndian.AppendUint64(b, uint64(flags))
	for _, g := range append([]Generation{l.Current, l.Base, l.Toward}, l.History[:]...) {
		var names [2 * MaxName]byte
		copy(names[:MaxName], g.Branch)
		copy(names[MaxName:], g.Run)
		b = append(binary.LittleEndian.AppendUint64(b, uint64(g.Term)), names[:]...)
	}
	return b
}

// DecodeLineage reads the first EncodedSize bytes of b. Everything that AppendTo
// would not have written is refused (ErrFormat).
func DecodeLineage(b []byte) (Lineage, error) {
	var l Lineage
	if len(b) < EncodedSize {
		return l, fmt.Errorf("%d bytes, %d needed: %w", len(b), EncodedSize, ErrFormat)
	}
	flags := binary.LittleEndian.Uint64(b)
	if flags&^(flagPrimary|flagBaseEmpty|flagDiscarded) != 0 {
		return l, fmt.Errorf("unknown flags %#x: %w", flags, ErrFormat)
	}
	l.Primary, l.BaseEmpty, l.Discarded = flags&flagPrimary != 0, flags&flagBaseEmpty != 0, flags&flagDiscarded != 0
	into := []*Generation{&l.Current, &l.Base, &l.Toward}
	for i := range l.History {
		into = append(into, &l.History[i])
	}
	for i, g := range into {
		p := b[8+i*generationSize:][:generationSize]
		branch, ok1 := unpad(p[8:][:MaxName])
		run, ok2 := unpad(p[8+MaxName:][:MaxName])
		if !ok1 || !ok2 {
			return Lineage{}, fmt.Errorf("a name of generation %d is not padded with zeroes: %w", i, ErrFormat)
		}
		*g = Generation{Term: model.Term(binary.LittleEndian.Uint64(p)), Branch: model.BranchID(branch), Run: model.RunID(run)}
	}
	return l, nil
}

// unpad returns a name without its padding, and whether that is all zeroes.
func unpad(p []byte) (string, bool) {
	n := bytes.IndexByte(p, 0)
	if n < 0 {
		return string(p), true
	}
	return string(p[:n]), len(bytes.Trim(p[n:], "\x00")) == 0
}
