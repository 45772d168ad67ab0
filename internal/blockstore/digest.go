package blockstore

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/zeebo/xxh3"

	"perdure/internal/model"
	"perdure/internal/vfs"
)

// Trust says what a replica's own checksums say of a chunk.
type Trust uint8

// The verdicts.
const (
	Unknown    Trust = iota // of some block there is no checksum, or one in doubt; the others hold
	Holds                   // all checksums hold
	Broken                  // a block does not match its checksum
	Unreadable              // a block cannot be read
)

// ChunkDigest is one chunk of a replica, for a comparison with the peer's. Digests
// guard against mistakes and decay, not against somebody who makes them fit.
type ChunkDigest struct {
	Chunk int64 // number; its offset is Chunk × ChunkSize
	Sum   [16]byte
	Trust Trust
}

// ErrTooLate says that an epoch after the one asked for is in place already.
var ErrTooLate = errors.New("a later epoch is in place already")

// Digest reads chunks start … end-1, each while no write is under way in it, and
// passes their digests on. A difference from the peer's means something only if
// both sides did the same writes to the chunk: with writes in one order on both
// hosts, ask while none is on its way; with epochs, use DigestAsOf. It reads as
// fast as it can: the caller asks for little at a time.
func (s *Store) Digest(start, end int64, each func(ChunkDigest) error) error {
	if start < 0 || end > s.Chunks() {
		return fmt.Errorf("digest of chunks %d … %d of %s: %w", start, end, s.id, syscall.EINVAL)
	}
	buf := chunkBuffers.Get().(*[ChunkSize]byte)
	defer chunkBuffers.Put(buf)
	for c := start; c < end; c++ {
		d, err := s.digestChunk(c, buf[:])
		if err != nil {
			return err
		}
		if err := each(d); err != nil {
			return err
		}
	}
	return nil
}

// prefetchMost is the longest run of chunks worth a word beforehand: the system sees
// by itself that a longer one is read in sequence.
const prefetchMost = 16

// Prefetch says that a run of chunks is about to be read. Many short ones far from
// each other are read at the same time then, and nothing in between. It is a hint.
func (s *Store) Prefetch(start, end int64) {
	if p, ok := s.raw.(vfs.Prefetcher); ok && start >= 0 && start < end && end <= s.Chunks() && end-start <= prefetchMost {
		_ = p.Prefetch(start*ChunkSize, min(end*ChunkSize, s.size)-start*ChunkSize)
	}
}

// chunkBuffers are for digests: they are often asked for one by one.
var chunkBuffers = sync.Pool{New: func() any { return new([ChunkSize]byte) }}

var (
	noData    [ChunkSize]byte // what a hole reads as; never written
	noDataSum = xxh3.Hash128(noData[:]).Bytes()
)

func (s *Store) digestChunk(c int64, buf []byte) (ChunkDigest, error) {
	off := c * ChunkSize
	p := buf[:min(ChunkSize, s.size-off)]
	if err := s.check(off, int64(len(p))); err != nil {
		return ChunkDigest{}, err
	}
	l := s.lockBlocks(off, int64(len(p)))
	defer s.blocks.unlock(l)
	d := ChunkDigest{Chunk: c}
	if s.isHole(off, int64(len(p))) {
		// Where most of a disk are holes, reading and adding them up is most of the work.
		if p = noData[:len(p)]; len(p) == ChunkSize {
			d.Sum = noDataSum
		}
	} else if err := s.readImage(p, off); err != nil {
		if !mediumError(err) {
			return d, err
		}
		d.Trust = Unreadable
		return d, nil
	}
	if d.Sum == ([16]byte{}) {
		d.Sum = xxh3.Hash128(p).Bytes()
	}
	if !s.sums.on() {
		return d, nil
	}
	bad, err := s.verify(p, off)
	if err != nil {
		return d, err
	}
	if bad >= 0 {
		d.Trust = Broken
		return d, nil
	}
	known, err := s.allKnown(off, int64(len(p)))
	if known {
		d.Trust = Holds
	}
	return d, err
}

// isHole reports whether a range of the image is a hole for sure: what lies behind
// the end of an image that was cut under our feet looks like one.
func (s *Store) isHole(off, n int64) bool {
	length, hole, err := s.raw.Extent(off, n)
	if err != nil || !hole || length < n {
		return false
	}
	size, err := s.raw.Size()
	return err == nil && off+n <= size
}

// allKnown reports whether every block of a range within one extent has a checksum that counts.
func (s *Store) allKnown(off, n int64) (bool, error) {
	page, doubt, err := s.act.sumsOf(off / ExtentSize)
	if err != nil {
		return false, fmt.Errorf("read checksums of %s: %w", s.id, err)
	}
	complete := s.sums.complete.Load()
	for b := off % ExtentSize / BlockSize; b < (off%ExtentSize+n)/BlockSize; b++ {
		if doubt.has(b) || !complete && atomic.LoadUint32(&page[b]) == 0 {
			return false, nil
		}
	}
	return true, nil
}

// digestQueue holds what waits for the end of an epoch.
type digestQueue struct {
	some atomic.Bool
	mu   sync.Mutex
	list []*digestWait
}

type digestWait struct {
	epoch model.Epoch
	do    func() error
	err   error
	done  chan struct{}
}

// DigestAsOf is Digest as of the end of epoch e: after all its writes are in place,
// and before any of the next one. Both sides ask for the same epoch, ahead of it;
// ErrTooLate: it is past, ask for a later one. The range is read while the next
// epoch waits to be applied, so it should be short (a chunk takes some 20 µs).
func (s *Store) DigestAsOf(ctx context.Context, e model.Epoch, start, end int64) (out []ChunkDigest, err error) {
	err = s.asOf(ctx, e, func() error {
		return s.Digest(start, end, func(d ChunkDigest) error {
			out = append(out, d)
			return nil
		})
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

// asOf runs do as of the end of epoch e, see DigestAsOf, and returns its error. When
// it returns, do runs no more.
func (s *Store) asOf(ctx context.Context, e model.Epoch, do func() error) error {
	w := &digestWait{epoch: e, do: do, done: make(chan struct{})}
	q := &s.digests
	q.mu.Lock()
	q.some.Store(true) // before the epoch is looked at, see answerDigests
	now := s.act.epochNow()
	if now > e {
		q.mu.Unlock()
		return fmt.Errorf("digest of %s as of epoch %d, epoch %d is open: %w", s.id, e, now, ErrTooLate)
	}
	q.list = append(q.list, w)
	q.mu.Unlock()
	select {
	case <-w.done:
		return w.err
	case <-ctx.Done():
	}
	q.mu.Lock()
	for i, x := range q.list {
		if x == w {
			q.list = append(q.list[:i], q.list[i+1:]...)
			q.mu.Unlock()
			return ctx.Err()
		}
	}
	q.mu.Unlock()
	<-w.done // it is under way
	return w.err
}

// answerDigests carries out what waits for epoch e or an earlier one. The caller
// applies epochs in order, has said that a later one is open, and applies it afterwards.
func (s *Store) answerDigests(e model.Epoch) {
	q := &s.digests
	if !q.some.Load() {
		return
	}
	q.mu.Lock()
	var due []*digestWait
	rest := q.list[:0]
	for _, w := range q.list {
		if w.epoch <= e {
			due = append(due, w)
		} else {
			rest = append(rest, w)
		}
	}
	q.list = rest
	q.some.Store(len(rest) > 0)
	q.mu.Unlock()
	for _, w := range due {
		w.err = w.do()
		close(w.done)
	}
}
