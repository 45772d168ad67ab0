package blockstore

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"

	"perdure/internal/bitmap"
)

// block is the content of one block.
type block = [BlockSize]byte

// runKind tells what a run of blocks holds.
type runKind uint8

const (
	runData  runKind = iota
	runZero          // zeroes that stay allocated
	runPunch         // zeroes whose space is given back
)

// run is count adjacent blocks of one kind. Data is in blocks (fresh from the
// overlay) or in flat (decoded).
type run struct {
	start, count int64
	kind         runKind
	blocks       []*block
	flat         []byte
}

// each calls fn with the data of the run in order, in pieces.
func (r *run) each(fn func(p []byte)) {
	if r.flat != nil {
		fn(r.flat)
	}
	for _, b := range r.blocks {
		fn(b[:])
	}
}

// EpochWrites is what one epoch did to one disk, coalesced: each block at most
// once, as it was at the end of the epoch, and what a FLUSH in it obliges to.
// It is made by Volume.Cut or Decode and does not change. Its methods may be
// called concurrently, but none after Volume.Commit.
type EpochWrites struct {
	within, before bool

	layer *layer    // of Cut; nil when decoded
	build sync.Once // of runs from layer
	runs  []run
	raw   []byte // encoding, when decoded

	// Kept by the one goroutine that persists and commits.
	seq    uint64 // in the journal; 0: not appended
	synced bool   // the obligation is fulfilled here
}

// FlushWithin says that the guest flushed within this epoch: it has to be
// durable, on both hosts, before its output leaves.
func (w *EpochWrites) FlushWithin() bool { return w.within }

// FlushBefore says that the guest flushed what the epochs before wrote: those
// have to be durable, on both hosts, before the output of this one leaves.
func (w *EpochWrites) FlushBefore() bool { return w.before }

// Empty says that there is nothing to write and no obligation.
func (w *EpochWrites) Empty() bool {
	return !w.within && !w.before && w.layer == nil && len(w.runs) == 0
}

// Bytes is how much data is in it; zeroes do not count.
func (w *EpochWrites) Bytes() int64 {
	var n int64
	for _, r := range w.all() {
		if r.kind == runData {
			n += r.count * BlockSize
		}
	}
	return n
}

// all returns the runs in ascending order. The sorting is done at the first
// call and not by Cut: the guest stands still during Cut.
func (w *EpochWrites) all() []run {
	w.build.Do(func() {
		if w.layer != nil {
			w.runs = w.layer.coalesce()
		}
	})
	return w.runs
}

// coalesce sorts the content of a layer that does not change any more.
func (l *layer) coalesce() []run {
	keys := make([]int64, 0, len(l.blocks))
	for k := range l.blocks {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	var runs []run
	for _, k := range keys {
		b := l.blocks[k]
		kind := runData
		if *b == zeroBlock {
			kind = runZero
		}
		if n := len(runs); n > 0 && runs[n-1].kind == kind && runs[n-1].start+runs[n-1].count == k {
			runs[n-1].count++
		} else {
			runs = append(runs, run{start: k, count: 1, kind: kind})
		}
		if kind == runData {
			r := &runs[len(runs)-1]
			r.blocks = append(r.blocks, b)
		}
	}
	if l.keep.Len() == 0 && l.punch.Len() == 0 {
		return runs
	}
	// Blocks lie over ranges: what is written after it was zeroed counts.
	written := len(runs)
	for _, z := range []struct {
		set  *bitmap.Ranges
		kind runKind
	}{{&l.keep, runZero}, {&l.punch, runPunch}} {
		var left bitmap.Ranges
		for _, r := range z.set.All() {
			left.Add(r.Start, r.End)
		}
		for _, r := range runs[:written] {
			left.Remove(r.start, r.start+r.count)
		}
		for _, r := range left.All() {
			runs = append(runs, run{start: r.Start, count: r.Len(), kind: z.kind})
		}
	}
	slices.SortFunc(runs, func(a, b run) int {
		if a.start < b.start {
			return -1
		}
		return 1
	})
	return runs
}

// The encoding, see docs/disk-format.md: version, flags, number of runs; per run
// the gap to the end of the last one, and length and kind in one number; then
// the data of all data runs.
const (
	writesVersion = 1
	flagWithin    = 1 << 0
	flagBefore    = 1 << 1
	maxBlocks     = 1 << 44 // of a disk: 64 PiB
)

// ErrEncoding says that bytes are no EpochWrites.
var ErrEncoding = errors.New("malformed epoch writes")

// EncodedLen bounds how long AppendTo's result is, from above.
func (w *EpochWrites) EncodedLen() int {
	if w.raw != nil {
		return len(w.raw)
	}
	return 2 + binary.MaxVarintLen64*(1+2*len(w.all())) + int(w.Bytes())
}

// AppendTo appends the encoding to dst. Peer messages and journal records hold the same bytes.
func (w *EpochWrites) AppendTo(dst []byte) []byte {
	if w.raw != nil {
		return append(dst, w.raw...)
	}
	var flags byte
	if w.within {
		flags |= flagWithin
	}
	if w.before {
		flags |= flagBefore
	}
	runs := w.all()
	dst = slices.Grow(dst, w.EncodedLen())
	dst = append(dst, writesVersion, flags)
	dst = binary.AppendUvarint(dst, uint64(len(runs)))
	end := int64(0)
	for _, r := range runs {
		dst = binary.AppendUvarint(dst, uint64(r.start-end))
		dst = binary.AppendUvarint(dst, uint64(r.count-1)<<2|uint64(r.kind))
		end = r.start + r.count
	}
	for i := range runs {
		runs[i].each(func(p []byte) { dst = append(dst, p...) })
	}
	return dst
}

// Decode reads what AppendTo wrote, for a disk of size bytes. The result keeps
// b, which must not change any more. Hostile input gives ErrEncoding, and no
// allocation beyond a small multiple of len(b).
func Decode(b []byte, size int64) (*EpochWrites, error) {
	bad := func(what string) (*EpochWrites, error) { return nil, fmt.Errorf("%w: %s", ErrEncoding, what) }
	if len(b) < 3 {
		return bad("too short")
	}
	if b[0] != writesVersion {
		return nil, fmt.Errorf("epoch writes version %d, this release knows %d: %w", b[0], writesVersion, ErrVersion)
	}
	if b[1]&^(flagWithin|flagBefore) != 0 {
		return bad("unknown flags")
	}
	p := b[2:]
	number := func() (uint64, bool) {
		v, n := binary.Uvarint(p)
		if n <= 0 {
			return 0, false
		}
		p = p[n:]
		return v, true
	}
	count, ok := number()
	if !ok || count > uint64(len(p))/2 {
		return bad("number of runs")
	}
	w := &EpochWrites{within: b[1]&flagWithin != 0, before: b[1]&flagBefore != 0, raw: b}
	if count > 0 {
		w.runs = make([]run, count)
	}
	var end, data uint64
	limit := min(uint64(size)/BlockSize, maxBlocks)
	for i := range w.runs {
		gap, ok1 := number()
		what, ok2 := number()
		if !ok1 || !ok2 || what&3 > uint64(runPunch) {
			return bad("run")
		}
		n := what>>2 + 1
		if gap > limit || n > limit || end+gap+n > limit {
			return bad("run beyond the end of the disk")
		}
		w.runs[i] = run{start: int64(end + gap), count: int64(n), kind: runKind(what & 3)}
		end += gap + n
		if w.runs[i].kind == runData {
			data += n * BlockSize
		}
	}
	if data != uint64(len(p)) {
		return bad("length of the data")
	}
	for i := range w.runs {
		if r := &w.runs[i]; r.kind == runData {
			n := r.count * BlockSize
			r.flat, p = p[:n:n], p[n:]
		}
	}
	return w, nil
}
