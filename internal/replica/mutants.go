package replica

// mutants breaks single rules, so that a test can show that the explorer would
// see it. Only tests of this package can set one; the zero value is the product.
type mutants struct {
	noMarks       bool // a lost peer's missing writes are not marked
	noRotate      bool // writing alone begins no new line
	beginEarly    bool // writes are acknowledged before the new line is durable
	endingForgets bool // a loss at the end of a resync does not mark what was on its way
	alwaysBitmap  bool // a copy that missed more than the last line is filled by bitmap
	noRename      bool // a full copy does not rename the source's line
	trustRecord   bool // the record's word overrules newer metadata
	mergeSplit    bool // a split brain is merged
	keepBase      bool // the bitmap is emptied without noting that the peer is whole
	noMerge       bool // the target's own marks are not taken over
	staysUpToDate bool // a target keeps its state while it is overwritten
}
