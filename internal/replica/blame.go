package replica

// View is what one side says of one block as of a moment that both sides share:
// the end of an epoch, or while no write is under way in it. The zero View is a
// block that cannot be read and of which nothing is kept.
type View struct {
	Read  bool   // it could be read
	Is    uint32 // checksum of what is there, if it could be read
	Keeps bool   // a checksum is kept, and counts
	Kept  uint32 // that checksum
}

// Holds reports whether the block is proved to be what was written last.
func (v View) Holds() bool { return v.Read && v.Keeps && v.Is == v.Kept }

// Fails reports whether the block is proved not to be what was written last, or
// is of no use.
func (v View) Fails() bool { return !v.Read || v.Keeps && v.Is != v.Kept }

// Blame says which of two copies of a block is wrong.
type Blame uint8

// The verdicts, from the side of "mine".
const (
	NobodyWrong  Blame = iota
	MineWrong          // theirs is to be written over mine
	TheirsWrong        // mine is to be written over theirs
	BothHold           // they differ, and each is what its side wrote: nothing tells which is right
	NeitherHolds       // nothing proves either
)

// String is the verdict in words.
func (b Blame) String() string {
	switch b {
	case NobodyWrong:
		return "nobody is wrong"
	case MineWrong:
		return "mine is wrong"
	case TheirsWrong:
		return "theirs is wrong"
	case BothHold:
		return "they differ, and the checksums of both hold"
	}
	return "the checksum of neither holds"
}

// BlameBlock judges two copies of a block; same says that their contents are equal.
// A copy is written over only where the other one is proved: its own checksum
// holds and the wrong one's does not, or, where no checksum holds, it is what the
// other side's checksum was made of.
func BlameBlock(mine, theirs View, same bool) Blame {
	if same && !mine.Fails() && !theirs.Fails() {
		return NobodyWrong
	}
	switch m, t := mine.Holds(), theirs.Holds(); {
	case m && t:
		return BothHold
	case m:
		return TheirsWrong
	case t:
		return MineWrong
	}
	m := mine.Read && theirs.Keeps && mine.Is == theirs.Kept
	t := theirs.Read && mine.Keeps && theirs.Is == mine.Kept
	switch {
	case m && !t:
		return TheirsWrong
	case t && !m:
		return MineWrong
	}
	return NeitherHolds
}
