package blockstore

import (
	"sync"
	"time"

	"perdure/internal/bitmap"
	"perdure/internal/model"
)

// Attach says that from now on the peer gets every change too, and reports what
// it has made durable. first is the number of the epoch that is open now; what
// ends from here on belongs to it, until Committed moves on. Chunks that the
// peer lacks stay in the bitmap until ClearMissing.
func (s *Store) Attach(first model.Epoch) { s.act.attach(first) }

// Detach says that the peer is lost: everything that it has not reported durable
// is in the bitmap when Detach returns, and so is every later change. After a crash
// it is there too, because its extents are in the activity log; nothing needs to be
// synced. A replica that is not attached is detached already.
func (s *Store) Detach() { s.act.detach() }

// PeerDurable notes that the peer has made durable everything of the epochs up to
// through. Only then may their extents leave the activity log, so an attached
// peer has to report from time to time; see PeerWanted.
func (s *Store) PeerDurable(through model.Epoch) { s.act.peerDurable(through) }

// PeerWanted carries a token when the activity log runs out of extents whose
// changes the peer has reported durable. Writes into cold extents wait until it
// reports, or until Detach: the owner has to see to either. It draws a line
// (Committed) where writes go in place as they come, has the peer sync and report,
// and reports DurableThrough itself; a report of an epoch does not wait for the
// epoch being in place here, as the peer has it whole.
func (s *Store) PeerWanted() <-chan struct{} { return s.act.ask }

// PeerAwaited reports whether a write waits, perhaps for the peer's report: where
// notes may get lost, the owner asks the peer again.
func (s *Store) PeerAwaited() bool {
	a := &s.act
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.attached && a.waiting > 0
}

// Committed says that epoch e has ended: all its changes are in place, and what
// ends from now on belongs to a later one. Apply says so by itself. The owner of
// a Volume says it after Commit; of one in mode Direct whenever it wants a line
// drawn, with numbers that grow.
func (s *Store) Committed(e model.Epoch) {
	s.through.committed(e)
	s.act.reach(e + 1)
	s.answerDigests(e)
}

// DurableThrough is the epoch up to which everything is durable here, in the
// image or in the journal: what to report to the peer.
func (s *Store) DurableThrough() model.Epoch { return s.through.durable() }

// Missing is a copy of the set of chunks that the peer lacks or may lack. Right
// after Open it also holds what a crash left in the activity log.
func (s *Store) Missing() *bitmap.Bitmap {
	s.miss.mu.Lock()
	defer s.miss.mu.Unlock()
	return s.miss.bits.Clone()
}

// MissingCount is how many chunks the peer lacks or may lack.
func (s *Store) MissingCount() int64 {
	s.miss.mu.Lock()
	defer s.miss.mu.Unlock()
	return s.miss.bits.Count()
}

// NextMissing finds the first run of chunks in the bitmap at or after from, at most limit long.
func (s *Store) NextMissing(from, limit int64) (start, end int64, ok bool) {
	s.miss.mu.Lock()
	defer s.miss.mu.Unlock()
	return s.miss.bits.Next(from, limit)
}

// Chunks is how many chunks the disk has.
func (s *Store) Chunks() int64 { return (s.size + ChunkSize - 1) / ChunkSize }

// MarkMissing adds chunks start … end-1: what the peer's own bitmap and log name,
// what verify found different, or everything before a full copy. It is durable
// after SaveMissing.
func (s *Store) MarkMissing(start, end int64) { s.miss.set(start, min(end, s.Chunks())) }

// MarkMissingSet adds a set, which must be as long as Missing.
func (s *Store) MarkMissingSet(b *bitmap.Bitmap) {
	for at := int64(0); ; {
		start, end, ok := b.Next(at, 0)
		if !ok {
			return
		}
		s.miss.set(start, end)
		at = end
	}
}

// ClearMissing removes chunks that the peer has now, durably. It need not be
// saved: after a crash they are copied once more.
func (s *Store) ClearMissing(start, end int64) { s.miss.clear(start, min(end, s.Chunks())) }

// SaveMissing makes the bitmap durable. A resync calls it now and then, so that
// after a crash it goes on where it was.
func (s *Store) SaveMissing() error {
	if err := s.checkWrite(0, 0); err != nil {
		return err
	}
	return s.saveMissing(true)
}

func (s *Store) saveMissing(all bool) error {
	s.point("bitmap.save")
	err := s.miss.save(all, func(err error) error { return s.fail("sync of the bitmap", err) })
	s.point("bitmap.saved")
	return err
}

// ActivityStats tell how the activity log is used, since Open.
type ActivityStats struct {
	Extents  int    // hot now
	Limit    int    // at most
	Commits  uint64 // writes of its file, each with a sync
	InDoubt  int    // with checksums that are not trusted
	Attached bool
}

// Activity returns the figures of the activity log.
func (s *Store) Activity() ActivityStats {
	a := &s.act
	a.mu.Lock()
	defer a.mu.Unlock()
	return ActivityStats{Extents: len(a.entries) - len(a.free), Limit: len(a.entries), Commits: a.commits, InDoubt: a.inDoubt, Attached: a.attached}
}

// throughs keep up to which epoch what is durable.
type throughs struct {
	mu         sync.Mutex
	done       model.Epoch // all up to here are in place
	image      model.Epoch // all up to here were in place at the image's last sync
	append     model.Epoch // the last one in the journal
	journal    model.Epoch // the last one in the journal when it was last synced
	lastDirect model.Epoch // the last one that went in place without the journal
}

func (t *throughs) committed(e model.Epoch) {
	t.mu.Lock()
	t.done = max(t.done, e)
	t.mu.Unlock()
}

func (t *throughs) inPlace() model.Epoch {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.done
}

func (t *throughs) imageSynced(e model.Epoch) {
	t.mu.Lock()
	t.image = max(t.image, e)
	t.mu.Unlock()
}

func (t *throughs) appended(e model.Epoch) {
	t.mu.Lock()
	t.append = max(t.append, e)
	t.mu.Unlock()
}

func (t *throughs) appendedNow() model.Epoch {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.append
}

func (t *throughs) journalSynced(e model.Epoch) {
	t.mu.Lock()
	t.journal = max(t.journal, e)
	t.mu.Unlock()
}

func (t *throughs) direct(e model.Epoch) {
	t.mu.Lock()
	t.lastDirect = max(t.lastDirect, e)
	t.mu.Unlock()
}

func (t *throughs) durable() model.Epoch {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.lastDirect <= t.image {
		return max(t.image, t.journal)
	}
	return t.image
}

// reassureAll computes checksums in doubt until none is left, with pauses three
// times as long as the work: the guest comes first.
func (s *Store) reassureAll() {
	for tries := s.InDoubt() + 8; ; {
		start := time.Now()
		more, err := s.Reassure()
		if err != nil {
			if tries--; tries < 0 || s.Err() != nil {
				return // what cannot be read stays in doubt
			}
			more = true
		}
		if !more {
			return
		}
		select {
		case <-s.stopping:
			return
		case <-time.After(3 * time.Since(start)):
		}
	}
}
