package blockstore

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"perdure/internal/model"
	"perdure/internal/vfs"
)

// journal is the epoch journal of a Store: two files that take turns. One is
// appended to until it holds half the limit; then the other one is used, from
// its start, if all its records are trimmed, that is durable in the image. So
// trimming never is on the way of an epoch, and the files' blocks are used
// again and again, which makes fdatasync cheap.
//
// Locks, in this order: applying, appending or syncing; mu.
type journal struct {
	key   uint32
	ready atomic.Bool

	appending sync.Mutex // one Append at a time; guards buf
	buf       []byte
	applying  sync.Mutex // one Apply at a time
	syncing   sync.Mutex // one Sync at a time

	mu          sync.Mutex
	areas       [2]area
	active      int
	incarnation uint64
	next        uint64 // sequence number of the next record
	applied     uint64 // all records up to here are in the image
	trimmed     uint64 // and up to here durable there, as the metadata say; never above applied
	pending     []pendingEpoch

	trim chan struct{} // asks the trimmer; nil when there is none
	done chan struct{} // closed when the trimmer has ended
}

// area is one of the journal's files.
type area struct {
	file     vfs.File
	end      int64  // where the next record goes
	size     int64  // of the file, all of it written
	last     uint64 // sequence number of the last record
	unsynced bool
}

// pendingEpoch is a record that was appended and not applied yet.
type pendingEpoch struct {
	seq    uint64
	epoch  model.Epoch
	writes *EpochWrites
}

func (j *journal) isReady() bool { return j.ready.Load() }

func (j *journal) appliedThrough() uint64 {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.applied
}

// Pending is how many epochs were appended and not applied.
func (s *Store) Pending() int {
	s.journal.mu.Lock()
	defer s.journal.mu.Unlock()
	return len(s.journal.pending)
}

func (s *Store) needsTrim() bool {
	s.journal.mu.Lock()
	defer s.journal.mu.Unlock()
	return s.journal.applied > s.journal.trimmed
}

// Replay brings the image to the state that was last made durable: it applies
// every complete record that was not trimmed, in order, up to the first torn
// one, makes the image durable and empties the journal. It returns how many
// epochs it applied. Interrupted at any point, it can be run again. It is called
// once, after Open; only then may the replica be called anything but Inconsistent.
func (s *Store) Replay() (epochs int, err error) {
	j := &s.journal
	if j.isReady() {
		return 0, fmt.Errorf("replay journal of %s: %w", s.id, ErrState)
	}
	if err := s.Err(); err != nil {
		return 0, err
	}
	if err := s.settleSide(); err != nil {
		return 0, fmt.Errorf("replay journal of %s: %w", s.id, err)
	}
	meta := s.metaNow()
	found, err := s.scanJournal(meta)
	if err != nil {
		return 0, fmt.Errorf("replay journal of %s: %w", s.id, err)
	}
	last := meta.trimmed
	for _, r := range found {
		if r.head.seq <= last {
			continue
		}
		if r.head.seq != last+1 {
			break // one between is torn: what follows it must not be there either
		}
		w, err := readRecord(j.areas[r.area].file, r.off, r.head, s.size)
		if errors.Is(err, errTorn) {
			break
		}
		if err == nil {
			err = s.applyInPlace(w)
		}
		if err != nil {
			return epochs, fmt.Errorf("replay journal of %s: %w", s.id, err)
		}
		last = r.head.seq
		epochs++
	}
	if epochs > 0 {
		changes := s.changes.Load()
		if err := s.raw.Sync(); err != nil {
			return epochs, s.fail("sync of the image", err)
		}
		s.synced.Store(changes)
	}
	return epochs, s.startJournal(last)
}

// Discard forgets the journal and all epochs that were appended and not
// applied, for a replica whose content is about to be replaced. It takes the
// place of Replay after Open, and may be called at any later time.
func (s *Store) Discard() error {
	j := &s.journal
	j.applying.Lock()
	defer j.applying.Unlock()
	j.appending.Lock()
	defer j.appending.Unlock()
	if !j.isReady() {
		if err := s.settleSide(); err != nil {
			return fmt.Errorf("discard journal of %s: %w", s.id, err)
		}
		return s.startJournal(s.metaNow().trimmed)
	}
	j.mu.Lock()
	last := j.next - 1
	j.pending = nil
	j.mu.Unlock()
	return s.startJournal(last)
}

func (s *Store) metaNow() metaRecord {
	s.metaMu.Lock()
	defer s.metaMu.Unlock()
	return s.meta
}

// startJournal begins an empty journal after record last. The incarnation
// changes: complete records may lie behind a torn one, and would seem to follow
// when the torn one's number and place are used again.
func (s *Store) startJournal(last uint64) error {
	j := &s.journal
	if err := s.bumpStamp(); err != nil {
		return err
	}
	if err := s.changeMeta(func(m *metaRecord) {
		m.incarnation++
		m.trimmed = last
		m.Clean = false
	}); err != nil {
		return err
	}
	var sizes [2]int64
	for i := range sizes {
		var err error
		if sizes[i], err = j.areas[i].file.Size(); err != nil {
			return fmt.Errorf("start journal of %s: %w", s.id, err)
		}
	}
	j.mu.Lock()
	j.incarnation = s.metaNow().incarnation
	j.next, j.applied, j.trimmed = last+1, last, last
	j.active = 0
	for i := range j.areas {
		j.areas[i] = area{file: j.areas[i].file, size: sizes[i]}
	}
	j.mu.Unlock()
	if !j.isReady() {
		if !s.opts.NoAutoTrim {
			j.trim, j.done = make(chan struct{}, 1), make(chan struct{})
			go s.trimmer(j.trim, j.done)
			if s.InDoubt() > 0 {
				s.background.Go(s.reassureAll)
			}
		}
		j.ready.Store(true)
	}
	return nil
}

// foundRecord is a header that fits, and where.
type foundRecord struct {
	head recordHeader
	area int
	off  int64
}

// scanJournal lists the records of both files that belong to the current
// incarnation, in order of their numbers. Payloads are not checked yet.
func (s *Store) scanJournal(meta metaRecord) ([]foundRecord, error) {
	var found []foundRecord
	for i := range s.journal.areas {
		f := s.journal.areas[i].file
		size, err := f.Size()
		if err != nil {
			return nil, err
		}
		prev := uint64(0)
		for off := int64(0); ; {
			h, err := readHeader(f, off, size)
			if errors.Is(err, errTorn) {
				break
			} else if err != nil {
				return nil, err
			}
			if h.incarnation != meta.incarnation || h.key != s.journal.key || prev != 0 && h.seq != prev+1 {
				break
			}
			found = append(found, foundRecord{h, i, off})
			prev = h.seq
			off += recordTotal(h.length)
		}
	}
	slices.SortFunc(found, func(a, b foundRecord) int {
		if a.head.seq < b.head.seq {
			return -1
		}
		return 1
	})
	return found, nil
}

// Append writes an epoch to the journal and keeps w until it is applied. It is
// not durable before the next Sync. Epochs are appended in order; an epoch
// without writes leaves no record. After an error the epoch is not in the
// journal, and the call may be repeated.
func (s *Store) Append(term model.Term, epoch model.Epoch, w *EpochWrites) error {
	if err := s.checkWrite(0, 0); err != nil {
		return err
	}
	if len(w.all()) == 0 {
		return nil
	}
	j := &s.journal
	j.appending.Lock()
	defer j.appending.Unlock()
	j.mu.Lock()
	if n := len(j.pending); n > 0 && epoch != 0 && epoch <= j.pending[n-1].epoch {
		j.mu.Unlock()
		return fmt.Errorf("append epoch %d of %s behind epoch %d: %w", epoch, s.id, j.pending[n-1].epoch, ErrState)
	}
	h := recordHeader{incarnation: j.incarnation, seq: j.next, term: term, epoch: epoch, key: j.key}
	j.mu.Unlock()

	j.buf = appendRecord(j.buf, h, w)
	a, err := s.place(int64(len(j.buf)))
	if err != nil {
		return err
	}
	s.point("journal.write")
	if _, err := a.file.WriteAt(j.buf, a.end); err != nil {
		return fmt.Errorf("append epoch %d to the journal of %s: %w", epoch, s.id, err)
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	a.end += int64(len(j.buf))
	a.last, a.unsynced = h.seq, true
	j.next++
	j.pending = append(j.pending, pendingEpoch{h.seq, epoch, w})
	w.seq = h.seq
	s.through.appended(epoch)
	if cap(j.buf) > keepBuf {
		j.buf = nil
	}
	return nil
}

// keepBuf is up to what size the buffer for records is kept.
const keepBuf = 8 << 20

// place chooses the file for a record of n bytes.
func (s *Store) place(n int64) (*area, error) {
	j := &s.journal
	half := s.opts.JournalLimit / 2
	for forced := false; ; forced = true {
		j.mu.Lock()
		a, other := &j.areas[j.active], &j.areas[1-j.active]
		switch {
		case a.last <= j.trimmed:
			a.end = 0 // nothing in it is needed any more
		case a.end+n > half && other.last <= j.trimmed:
			j.active = 1 - j.active
			a, other = other, a
			a.end = 0
		}
		over := a.end+n > 2*s.opts.JournalLimit && a.end > 0
		j.mu.Unlock()
		if !over || forced {
			// Forced and still over: epochs that are not applied fill it, and
			// whoever lets them pile up bounds them.
			return a, s.grow(a, a.end+n)
		}
		// The trimmer does not keep up. Waiting for it here is what bounds the journal.
		if err := s.Trim(); err != nil {
			return nil, err
		}
	}
}

// grow writes zeroes ahead of the records, up to end at least, in steps: a sync
// that has to record new blocks of the file takes several times as long as one
// that does not, and so only one in many does, until the file is as long as it gets.
func (s *Store) grow(a *area, end int64) error {
	if end <= a.size {
		return nil
	}
	step := min(max(s.opts.JournalLimit/64, recordAlign), 1<<20)
	p := make([]byte, step)
	for a.size < end {
		n := step - a.size%step
		if _, err := a.file.WriteAt(p[:n], a.size); err != nil {
			return fmt.Errorf("extend the journal of %s: %w", s.id, err)
		}
		a.size += n
	}
	return nil
}

// Sync makes every epoch that was appended before durable, and every direct
// write that returned before. It does nothing if there is nothing to make durable.
func (s *Store) Sync() error {
	// Direct writes first, and with them the journal's older records are trimmed:
	// a replay must not put older blocks over them.
	if err := s.syncImage(func() bool { return false }); err != nil {
		return err
	}
	return s.syncJournal()
}

func (s *Store) syncJournal() error {
	j := &s.journal
	j.syncing.Lock()
	defer j.syncing.Unlock()
	if err := s.Err(); err != nil {
		return err
	}
	epoch := s.through.appendedNow()
	j.mu.Lock()
	var dirty []*area
	// The file not active holds the older records.
	for _, i := range []int{1 - j.active, j.active} {
		if a := &j.areas[i]; a.unsynced {
			a.unsynced = false
			dirty = append(dirty, a)
		}
	}
	j.mu.Unlock()
	for _, a := range dirty {
		if err := a.file.Sync(); err != nil {
			return s.fail("sync of the journal", err)
		}
		s.point("journal.synced")
	}
	s.through.journalSynced(epoch)
	return nil
}

// Persist appends an epoch and fulfils what it obliges to: when it returns nil,
// the epoch may be acknowledged (by a secondary) or counted as held here (by a
// primary).
func (s *Store) Persist(term model.Term, epoch model.Epoch, w *EpochWrites) error {
	if w.before && !w.within {
		// Only what came before must be durable. Often it is already, when the
		// caller used the time since to Sync.
		if err := s.Sync(); err != nil {
			return err
		}
	}
	if err := s.Append(term, epoch, w); err != nil {
		return err
	}
	if w.within {
		if err := s.Sync(); err != nil {
			return err
		}
	}
	w.synced = true
	return nil
}

// Apply writes all appended epochs up to and including through in place, in
// order. Called when they have committed. After an error it may be called
// again: applying twice does no harm.
func (s *Store) Apply(through model.Epoch) error {
	if err := s.applyWhile(func(p pendingEpoch) bool { return p.epoch <= through }); err != nil {
		return err
	}
	s.Committed(through)
	return nil
}

func (s *Store) applyWhile(ok func(pendingEpoch) bool) error {
	j := &s.journal
	j.applying.Lock()
	defer j.applying.Unlock()
	for {
		if err := s.Err(); err != nil {
			return err
		}
		j.mu.Lock()
		if len(j.pending) == 0 || !ok(j.pending[0]) {
			j.mu.Unlock()
			return nil
		}
		p := j.pending[0]
		j.mu.Unlock()
		if p.epoch > 0 {
			s.act.reach(p.epoch) // first, so that nobody asks any more for what is answered now
			s.answerDigests(p.epoch - 1)
		}
		s.point("journal.apply")
		if err := s.applyInPlace(p.writes); err != nil {
			return fmt.Errorf("apply epoch %d: %w", p.epoch, err)
		}
		j.mu.Lock()
		j.pending[0] = pendingEpoch{}
		if j.pending = j.pending[1:]; len(j.pending) == 0 {
			j.pending = nil
		}
		j.applied = p.seq
		idle := &j.areas[1-j.active]
		kick := idle.last > j.trimmed && idle.last <= j.applied
		j.mu.Unlock()
		if kick {
			j.askTrim()
		}
	}
}

// applyDirect writes an epoch in place that is not in the journal. The caller
// holds off everything that could still undo it.
func (s *Store) applyDirect(w *EpochWrites) error {
	if err := s.checkWrite(0, 0); err != nil {
		return err
	}
	s.journal.applying.Lock()
	defer s.journal.applying.Unlock()
	defer s.written.Add(1)
	s.through.direct(s.act.epochNow())
	return s.applyInPlace(w)
}

// applyStep is up to how much is written by one call.
const applyStep = 1 << 20

// applyInPlace writes the runs of w into the image.
func (s *Store) applyInPlace(w *EpochWrites) error {
	if err := s.act.warmRuns(w.all()); err != nil {
		return err
	}
	var scratch []byte
	for _, r := range w.all() {
		off := r.start * BlockSize
		if r.kind != runData {
			if err := s.zeroInPlace(off, r.count*BlockSize, r.kind == runPunch); err != nil {
				return err
			}
			continue
		}
		if scratch == nil && len(r.blocks) > 1 {
			scratch = make([]byte, 0, min(applyStep, w.Bytes()))
		}
		put := func(p []byte) error {
			l := s.lockBlocks(off, int64(len(p)))
			defer s.blocks.unlock(l)
			err := s.writeRange(p, off)
			off += int64(len(p))
			return err
		}
		var err error
		for p := r.flat; len(p) > 0 && err == nil; p = p[min(applyStep, len(p)):] {
			err = put(p[:min(applyStep, len(p))])
		}
		for b := r.blocks; len(b) > 0 && err == nil; {
			if len(b) == 1 {
				err = put(b[0][:])
				break
			}
			n := min(applyStep/BlockSize, len(b))
			scratch = scratch[:0]
			for _, x := range b[:n] {
				scratch = append(scratch, x[:]...)
			}
			err = put(scratch)
			b = b[n:]
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (s *Store) zeroInPlace(off, n int64, punch bool) error {
	l := s.lockBlocks(off, n)
	defer s.blocks.unlock(l)
	return s.zeroRange(off, n, punch)
}

// Trim makes the image durable and forgets the records that were applied. The
// store does so by itself, off the hot path; a caller may at quiet times.
func (s *Store) Trim() error { return s.syncImage(s.needsTrim) }

// trimThrough notes, durably, that records up to n need no replay.
func (s *Store) trimThrough(n uint64) error {
	j := &s.journal
	j.mu.Lock()
	need := n > j.trimmed
	j.mu.Unlock()
	if !need {
		return nil
	}
	if err := s.changeMeta(func(m *metaRecord) { m.trimmed = n }); err != nil {
		return err
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.trimmed = n
	for i := range j.areas {
		if j.areas[i].last <= n {
			j.areas[i].unsynced = false
		}
	}
	return nil
}

// trimmer trims when asked; it ends with the store, or with its failure.
func (s *Store) trimmer(ask <-chan struct{}, done chan<- struct{}) {
	defer close(done)
	for range ask {
		if s.Trim() != nil {
			break // it sticks, and the next call on the store returns it
		}
	}
}

// askTrim wakes the trimmer, if there is one.
func (j *journal) askTrim() {
	if j.trim == nil {
		return
	}
	select {
	case j.trim <- struct{}{}:
	default: // it was asked already
	}
}

// stop ends the trimmer. No Apply may be under way.
func (j *journal) stop() {
	if j.trim != nil {
		close(j.trim)
		<-j.done
		j.trim = nil
	}
}
