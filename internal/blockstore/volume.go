package blockstore

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"perdure/internal/bitmap"
)

// Mode of a Volume.
type Mode int

// The modes.
const (
	Direct Mode = iota // alone: writes go in place, FLUSH makes them durable
	Held               // protected: writes and FLUSH are answered from memory until the epoch commits
)

// VolumeOptions of a Volume; the zero value is good.
type VolumeOptions struct {
	HeldLimit int64 // bytes held from which on Full fires; 0: 64 MiB
}

// Volume is the disk as the guest sees it; it implements nbd.Backend and
// nbd.Allocator. It does not own its Store.
//
// In mode Held the life of an epoch is: writes collect in the open layer; Cut
// closes it while the guest stands still; the caller persists it, here and on
// the peer; Commit applies it in place and drops it from memory. Reads see the
// open layer, then the cut ones, newest first, then the image.
type Volume struct {
	store *Store
	limit int64
	full  chan struct{}

	// gate is held shared by each request from start to end, and exclusively while
	// the mode changes or an epoch is cut. The guest stands still then, so nobody waits.
	gate    sync.RWMutex
	mode    Mode         // guarded by gate
	leaving *EpochWrites // guarded by gate; cut by a SetMode(Direct) that failed

	fetch atomic.Pointer[Fetch]

	mu       sync.RWMutex // guards what follows
	open     *layer
	cut      []*EpochWrites // oldest first; only those that wrote something
	held     int64          // bytes, of open and cut
	free     []*block
	drained  chan struct{} // closed, and made anew, by each Commit
	stopping bool          // a FLUSH counts for the next epoch
	within   bool          // obligations of the open epoch, see EpochWrites
	before   bool
	next     bool      // a FLUSH came while stopping
	nextAt   time.Time // when the first of these came
	stopFrom time.Time // when stopping began
	owing    bool      // something was written that no FLUSH obliges to yet

	trackMu sync.Mutex
	dirty   *bitmap.Bitmap // nil: not tracking
}

// Fetch gets blocks from the peer that are damaged here: as of the peer's newest
// write to them, in the order of the stream of writes. off and len(p) are
// multiples of BlockSize.
type Fetch func(p []byte, off int64) error

// SetFetch makes reads of damaged blocks be answered from the peer, and the blocks
// be repaired in place. nil: they fail with a BlockError. Called from requests
// while they hold the blocks: it must not wait for a write to this volume.
func (v *Volume) SetFetch(f Fetch) {
	if f == nil {
		v.fetch.Store(nil)
		return
	}
	v.fetch.Store(&f)
}

// repairing does something that reads the image, and once more for each damaged
// run of blocks that the peer could replace.
func (v *Volume) repairing(do func() error) error {
	for last := int64(-1); ; {
		err := do()
		f := v.fetch.Load()
		if err == nil || f == nil {
			return err
		}
		var bad *BlockError
		if !errors.As(err, &bad) || bad.Off == last {
			return err // it was repaired, and is bad again
		}
		if rerr := v.store.Repair(bad.Off, bad.Len, *f); rerr != nil {
			return errors.Join(err, rerr)
		}
		last = bad.Off
	}
}

// readStore reads from the image, with repair. Where nothing can be written here,
// the peer answers all the same.
func (v *Volume) readStore(p []byte, off int64) error {
	err := v.store.ReadAt(p, off)
	f := v.fetch.Load()
	if err == nil || f == nil {
		return err
	}
	first := true
	err = v.repairing(func() error {
		if first {
			first = false
			return err
		}
		return v.store.ReadAt(p, off)
	})
	var bad *BlockError
	if err == nil || !errors.As(err, &bad) {
		return err
	}
	in := off % BlockSize
	whole := make([]byte, (in+int64(len(p))+BlockSize-1)/BlockSize*BlockSize)
	if ferr := (*f)(whole, off-in); ferr != nil {
		return errors.Join(err, ferr)
	}
	copy(p, whole[in:])
	return nil
}

// NewVolume returns a volume in mode Direct. After a takeover every acknowledged
// epoch must have been applied before, and Store.Sync must have returned before
// output leaves: the guest may have been told of flushes whose epoch was not
// made durable here yet.
func NewVolume(s *Store, o VolumeOptions) *Volume {
	if o.HeldLimit <= 0 {
		o.HeldLimit = 64 << 20
	}
	return &Volume{store: s, limit: o.HeldLimit, full: make(chan struct{}, 1), open: newLayer(),
		drained: make(chan struct{}), owing: true}
}

// Store is what lies below.
func (v *Volume) Store() *Store { return v.store }

// Size is the disk's length in bytes.
func (v *Volume) Size() int64 { return v.store.Size() }

// Mode is the mode now.
func (v *Volume) Mode() Mode {
	v.gate.RLock()
	defer v.gate.RUnlock()
	return v.mode
}

// ReadAt fills p with what the guest wrote last.
func (v *Volume) ReadAt(_ context.Context, p []byte, off int64) error {
	v.gate.RLock()
	defer v.gate.RUnlock()
	if v.mode == Direct {
		return v.readStore(p, off)
	}
	if err := v.store.check(off, int64(len(p))); err != nil {
		return err
	}
	// Memory first, the image afterwards: a block that is in memory now may be
	// applied and dropped at any time, and is in the image then, not before.
	var space [8]span
	misses := v.readHeld(p, off, space[:0])
	for _, m := range misses {
		if err := v.readStore(p[m.from:m.to], off+int64(m.from)); err != nil {
			return err
		}
	}
	return nil
}

// span is a part of a request's buffer.
type span struct{ from, to int }

// readHeld fills what is held and returns which parts are not.
func (v *Volume) readHeld(p []byte, off int64, misses []span) []span {
	v.mu.RLock()
	defer v.mu.RUnlock()
	if v.open.empty() && len(v.cut) == 0 {
		return append(misses, span{0, len(p)})
	}
	for at := 0; at < len(p); {
		in := int((off + int64(at)) % BlockSize)
		n := min(BlockSize-in, len(p)-at)
		b, ok := v.find((off + int64(at)) / BlockSize)
		switch {
		case !ok && len(misses) > 0 && misses[len(misses)-1].to == at:
			misses[len(misses)-1].to += n
		case !ok:
			misses = append(misses, span{at, at + n})
		case b == nil:
			clear(p[at : at+n])
		default:
			copy(p[at:at+n], b[in:])
		}
		at += n
	}
	return misses
}

// find returns the newest held content of a block, nil for zeroes. v.mu is held.
func (v *Volume) find(n int64) (*block, bool) {
	if b, ok := v.open.find(n); ok {
		return b, true
	}
	for i := len(v.cut) - 1; i >= 0; i-- {
		if b, ok := v.cut[i].layer.find(n); ok {
			return b, true
		}
	}
	return nil, false
}

// WriteAt writes p; in mode Direct with fua durably, in mode Held fua obliges
// the epoch as a Flush does.
func (v *Volume) WriteAt(ctx context.Context, p []byte, off int64, fua bool) error {
	v.gate.RLock()
	defer v.gate.RUnlock()
	if v.mode == Direct {
		return v.direct(off, int64(len(p)), fua, func() error { return v.store.WriteAt(p, off) })
	}
	if err := v.store.checkWrite(off, int64(len(p))); err != nil {
		return err
	}
	for at := int64(0); at < int64(len(p)); {
		in := (off + at) % BlockSize
		if n := min(BlockSize-in, int64(len(p))-at); n < BlockSize {
			if err := v.merge((off+at)/BlockSize, int(in), p[at:at+n]); err != nil {
				return err
			}
			at += n
			continue
		}
		n := (int64(len(p)) - at) / BlockSize * BlockSize
		v.put((off+at)/BlockSize, p[at:at+n])
		at += n
	}
	v.wrote(ctx, fua)
	return nil
}

// put holds whole blocks from first on.
func (v *Volume) put(first int64, p []byte) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for n := first; len(p) > 0; n, p = n+1, p[BlockSize:] {
		copy(v.own(n)[:], p)
	}
}

// own returns the open epoch's block n, new (with any content) if there was
// none. v.mu is held.
func (v *Volume) own(n int64) *block {
	b := v.open.blocks[n]
	if b == nil {
		if k := len(v.free); k > 0 {
			b, v.free = v.free[k-1], v.free[:k-1]
		} else {
			b = new(block)
		}
		v.open.blocks[n] = b
		v.open.taken++
		v.held += BlockSize
	}
	return b
}

// merge writes a part of one block. What is around it comes from memory or the
// image; the image is read without the lock, which is right because a block
// that gets held meanwhile is what the part is then merged with.
func (v *Volume) merge(n int64, in int, p []byte) error {
	var base block
	if !v.tryMerge(n, in, p, nil) {
		if err := v.readStore(base[:], n*BlockSize); err != nil {
			return err
		}
		v.tryMerge(n, in, p, &base)
	}
	return nil
}

// tryMerge does it if the rest of the block is held or given.
func (v *Volume) tryMerge(n int64, in int, p []byte, base *block) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	b := v.open.blocks[n]
	if b == nil {
		old, ok := v.find(n)
		if !ok && base == nil {
			return false
		}
		if ok {
			base = old
		}
		b = v.own(n)
		if base != nil {
			*b = *base
		} else {
			*b = block{}
		}
	}
	copy(b[in:], p)
	return true
}

// Zero makes a range read as zeroes; punch gives the space back. However long
// the range, memory held for it is a few bytes.
func (v *Volume) Zero(ctx context.Context, off, n int64, fua, punch bool) error {
	v.gate.RLock()
	defer v.gate.RUnlock()
	if v.mode == Direct {
		return v.direct(off, n, fua, func() error { return v.store.Zero(off, n, punch) })
	}
	if err := v.store.checkWrite(off, n); err != nil {
		return err
	}
	first, end := (off+BlockSize-1)/BlockSize, (off+n)/BlockSize
	if first > end { // within one block
		if err := v.merge(end, int(off%BlockSize), zeroBlock[:n]); err != nil {
			return err
		}
	} else {
		if in := off % BlockSize; in != 0 {
			if err := v.merge(first-1, int(in), zeroBlock[in:]); err != nil {
				return err
			}
		}
		if in := (off + n) % BlockSize; in != 0 {
			if err := v.merge(end, 0, zeroBlock[:in]); err != nil {
				return err
			}
		}
		if first < end {
			v.mu.Lock()
			v.held -= v.open.held()
			v.open.zero(first, end, punch)
			v.held += v.open.held()
			v.mu.Unlock()
		}
	}
	v.wrote(ctx, fua)
	return nil
}

// direct carries out a change in place.
func (v *Volume) direct(off, n int64, fua bool, do func() error) error {
	err := v.repairing(do)
	// Marked after the change and before the answer: whoever takes the bitmap later
	// finds the mark, whoever took it earlier reads the image later still.
	v.mark(off, n)
	if err == nil && fua {
		err = v.store.Flush()
	}
	return err
}

// wrote ends a held change: obligations, and the bounds.
func (v *Volume) wrote(ctx context.Context, fua bool) {
	v.mu.Lock()
	v.owing = true
	if fua {
		v.oblige()
	}
	held, drained := v.held, v.drained
	v.mu.Unlock()
	if held < v.limit {
		return
	}
	select {
	case v.full <- struct{}{}:
	default: // nobody took the last one yet
	}
	if held < 2*v.limit {
		return
	}
	// Far beyond: slow the guest down, but never for long. QEMU's stop waits for
	// requests in flight, and it may take a stop to get rid of what is held.
	t := time.NewTimer(overLimitDelay)
	defer t.Stop()
	select {
	case <-t.C:
	case <-drained:
	case <-ctx.Done():
	}
}

// overLimitDelay is what a write costs when twice the limit is held.
const overLimitDelay = 20 * time.Millisecond

// oblige notes that all writes so far are to be made durable before output
// leaves that could tell of it. v.mu is held.
func (v *Volume) oblige() {
	if !v.owing {
		return // an earlier obligation, of this epoch or one before, covers everything
	}
	v.owing = false
	switch {
	case v.stopping:
		if !v.next {
			v.next, v.nextAt = true, time.Now()
		}
	case v.open.empty():
		v.before = true
	default:
		v.within = true
	}
}

// Flush makes all writes durable that were answered before; in mode Held it
// obliges the epoch instead, and returns at once.
func (v *Volume) Flush(context.Context) error {
	v.gate.RLock()
	defer v.gate.RUnlock()
	if v.mode == Direct {
		return v.store.Flush()
	}
	if err := v.store.Err(); err != nil {
		return err
	}
	v.mu.Lock()
	v.oblige()
	v.mu.Unlock()
	return nil
}

// Extent tells data from holes. While anything is held all counts as data.
func (v *Volume) Extent(_ context.Context, off, n int64) (length int64, hole bool, err error) {
	v.gate.RLock()
	defer v.gate.RUnlock()
	v.mu.RLock()
	held := !v.open.empty() || len(v.cut) > 0
	v.mu.RUnlock()
	if held {
		return n, false, v.store.check(off, n)
	}
	return v.store.Extent(off, n)
}

// BeginStop is called before QEMU is told to stop, in mode Held. QEMU flushes
// every disk at each stop; such a FLUSH, and a guest's own that ends as late, is
// seen by the guest only after cont, so it obliges the next epoch, and an epoch
// that merely wrote needs no sync of its own. Stopped tells which are as late.
func (v *Volume) BeginStop() {
	v.mu.Lock()
	v.stopping, v.stopFrom = true, time.Now()
	v.mu.Unlock()
}

// clockSlip is by how much the wall clock may differ from the monotonic one over a
// stop before it is not believed.
const clockSlip = time.Millisecond

// Stopped says since when the guest has stood still, by the wall clock, as QEMU
// tells it with its STOP event; zero: nobody knows. Called between the stop and
// Cut. A FLUSH that came before may have been answered, and told of, in the epoch
// that ends: it obliges that one.
func (v *Volume) Stopped(at time.Time) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if !v.stopping || !v.next {
		return
	}
	now := time.Now()
	slip := now.Round(0).Sub(v.stopFrom.Round(0)) - now.Sub(v.stopFrom)
	believed := !at.IsZero() && slip.Abs() <= clockSlip
	// QEMU's clock is cut off at microseconds.
	if believed && v.nextAt.Round(0).After(at.Add(time.Microsecond)) {
		return
	}
	v.next = false
	if v.open.empty() {
		v.before = true
	} else {
		v.within = true
	}
}

// EndStop is called after cont when no Cut was made in between.
func (v *Volume) EndStop() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.stopping = false
	if v.next {
		v.next, v.owing = false, true
		v.oblige()
	}
}

// Cut closes the open epoch and returns what it wrote. The guest stands still,
// with no request in flight; it may go on right after. The cost does not depend
// on how much was written. Cut also ends the stop window.
func (v *Volume) Cut() *EpochWrites {
	v.gate.Lock()
	defer v.gate.Unlock()
	return v.cutLocked()
}

// cutLocked is Cut with the gate held.
func (v *Volume) cutLocked() *EpochWrites {
	v.mu.Lock()
	defer v.mu.Unlock()
	w := &EpochWrites{within: v.within, before: v.before}
	v.within, v.before = false, v.next
	v.stopping, v.next = false, false
	if !v.open.empty() {
		w.layer = v.open
		v.cut = append(v.cut, w)
		v.open = newLayer()
	}
	return w
}

// Commit applies an epoch in place and drops it from memory, in the order of
// Cut. Guest requests go on meanwhile. An obligation of w that was not
// fulfilled by Store.Persist is fulfilled now. When Commit returned nil, w must
// not be used any more; after an error it may be called again.
func (v *Volume) Commit(w *EpochWrites) error {
	if w.layer != nil {
		v.mu.RLock()
		first := len(v.cut) > 0 && v.cut[0] == w
		v.mu.RUnlock()
		if !first {
			return fmt.Errorf("commit an epoch of %s out of order: %w", v.store.id, ErrState)
		}
	}
	if err := v.settle(w); err != nil {
		return err
	}
	if w.layer == nil {
		return nil
	}
	var err error
	if seq := w.seq; seq != 0 {
		err = v.store.applyWhile(func(p pendingEpoch) bool { return p.seq <= seq })
	} else {
		err = v.store.applyDirect(w)
	}
	if err != nil {
		return err
	}
	for _, r := range w.all() {
		v.mark(r.start*BlockSize, r.count*BlockSize)
	}
	v.drop(w)
	return nil
}

// settle makes durable what w obliges to.
func (v *Volume) settle(w *EpochWrites) error {
	switch {
	case w.synced || !w.within && !w.before:
		return nil
	case w.seq == 0:
		return v.store.Persist(0, 0, w)
	default:
		w.synced = true
		return v.store.Sync()
	}
}

// drop forgets the oldest cut epoch and keeps some of its blocks for later ones.
func (v *Volume) drop(w *EpochWrites) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.cut[0] = nil
	if v.cut = v.cut[1:]; len(v.cut) == 0 {
		v.cut = nil
	}
	v.held -= w.layer.held()
	for _, b := range w.layer.blocks {
		if len(v.free) >= keepBlocks {
			break
		}
		v.free = append(v.free, b)
	}
	w.layer, w.runs = nil, nil
	close(v.drained)
	v.drained = make(chan struct{})
}

// keepBlocks is how many blocks are kept for later epochs: 16 MiB.
const keepBlocks = 4096

// SetMode changes the mode while the guest stands still. To Direct every cut
// epoch must have been committed; the open one is applied in place, and what it
// obliges to is durable on return, so this is a commit: the caller must have
// the right to let the epoch's output out alone. After an error (a full disk)
// the mode is still Held and the call may be repeated.
func (v *Volume) SetMode(m Mode) error {
	v.gate.Lock()
	defer v.gate.Unlock()
	if m == v.mode {
		return nil
	}
	if m == Held {
		v.mu.Lock()
		// Direct writes that were not flushed become an obligation with the next FLUSH.
		v.owing, v.stopping, v.next, v.within, v.before = true, false, false, false, false
		v.mu.Unlock()
		v.mode = Held
		return nil
	}
	if err := v.finishLeaving(); err != nil {
		return err
	}
	v.mu.RLock()
	left := len(v.cut)
	v.mu.RUnlock()
	if left > 0 {
		return fmt.Errorf("leave mode held with %d epochs of %s not committed: %w", left, v.store.id, ErrState)
	}
	w := v.cutLocked()
	v.mu.Lock()
	// A FLUSH in the stop window, and one left for the next epoch, have no later epoch to oblige.
	w.within = w.within || v.before && w.layer != nil
	w.before = w.before || v.before
	v.before = false
	v.mu.Unlock()
	v.leaving = w
	if err := v.finishLeaving(); err != nil {
		return err
	}
	v.mode = Direct
	return nil
}

// finishLeaving commits what SetMode has cut, now or in an earlier attempt.
func (v *Volume) finishLeaving() error {
	if v.leaving == nil {
		return nil
	}
	if err := v.Commit(v.leaving); err != nil {
		return err
	}
	v.leaving = nil
	return nil
}

// HeldBytes is how much memory held writes take, of the open epoch and those cut.
func (v *Volume) HeldBytes() int64 {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return v.held
}

// Full carries a token when HeldLimit was passed: the epoch should be cut now,
// and the guest be stopped for as long as nothing can be committed. At twice
// the limit writes are slowed down, but never refused or stopped.
func (v *Volume) Full() <-chan struct{} { return v.full }

// StartTracking begins, with nothing marked, to mark the chunks of the image that change.
func (v *Volume) StartTracking() {
	b := bitmap.New((v.Size() + ChunkSize - 1) / ChunkSize)
	v.trackMu.Lock()
	v.dirty = b
	v.trackMu.Unlock()
}

// TakeDirty returns the chunks (of ChunkSize bytes) of the image that changed
// since tracking began or TakeDirty was last called; nil when not tracking. A
// chunk read afterwards is as it was then, or newer and marked again.
func (v *Volume) TakeDirty() *bitmap.Bitmap {
	v.trackMu.Lock()
	defer v.trackMu.Unlock()
	b := v.dirty
	if b != nil {
		v.dirty = bitmap.New(b.Len())
	}
	return b
}

// StopTracking ends tracking and forgets the marks.
func (v *Volume) StopTracking() {
	v.trackMu.Lock()
	v.dirty = nil
	v.trackMu.Unlock()
}

func (v *Volume) mark(off, n int64) {
	v.trackMu.Lock()
	defer v.trackMu.Unlock()
	if v.dirty == nil || n <= 0 || off < 0 || off+n > v.Size() {
		return
	}
	v.dirty.SetRange(off/ChunkSize, (off+n-1)/ChunkSize+1)
}
