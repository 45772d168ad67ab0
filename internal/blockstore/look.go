package blockstore

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"

	"perdure/internal/model"
	"perdure/internal/replica"
	"perdure/internal/vfs"
)

// BlocksPerChunk is how many blocks a chunk has; the last one of a disk may have fewer.
const BlocksPerChunk = ChunkSize / BlockSize

// Look is a close look at one chunk of a replica: what is there, and what its
// checksums say of each block. As long as it is not closed the store notes which of
// the blocks are written, so that a repair never undoes a newer write.
type Look struct {
	Chunk  int64
	Data   []byte         // the chunk's content; what cannot be read is zero
	Blocks []replica.View // one for each block of Data

	s *Store
	w *watch
}

// LookAt looks at a chunk while no write is under way in it. The caller closes the Look.
func (s *Store) LookAt(chunk int64) (*Look, error) {
	if chunk < 0 || chunk >= s.Chunks() {
		return nil, fmt.Errorf("look at chunk %d of %s, which has %d: %w", chunk, s.id, s.Chunks(), syscall.EINVAL)
	}
	off := chunk * ChunkSize
	l := &Look{Chunk: chunk, Data: make([]byte, min(ChunkSize, s.size-off)), s: s}
	n := int64(len(l.Data))
	if err := s.check(off, n); err != nil {
		return nil, err
	}
	lock := s.lockBlocks(off, n)
	defer s.blocks.unlock(lock)
	l.Blocks = make([]replica.View, n/BlockSize)
	for b := range l.Blocks {
		p := l.Data[b*BlockSize:][:BlockSize]
		err := s.readImage(p, off+int64(b)*BlockSize)
		switch {
		case err == nil:
			l.Blocks[b].Read, l.Blocks[b].Is = true, sumOf(p)
		case mediumError(err):
			clear(p)
		default:
			return nil, err
		}
	}
	if s.sums.on() {
		page, doubt, err := s.act.sumsOf(off / ExtentSize)
		if err != nil {
			return nil, fmt.Errorf("read checksums of %s: %w", s.id, err)
		}
		complete := s.sums.complete.Load()
		for b := range l.Blocks {
			at := off%ExtentSize/BlockSize + int64(b)
			kept := atomic.LoadUint32(&page[at])
			l.Blocks[b].Keeps, l.Blocks[b].Kept = !doubt.has(at) && (kept != 0 || complete), kept
		}
	}
	l.w = s.watches.add(off, n)
	return l, nil
}

// LookAsOf is LookAt as of the end of epoch e, see DigestAsOf.
func (s *Store) LookAsOf(ctx context.Context, e model.Epoch, chunk int64) (l *Look, err error) {
	err = s.asOf(ctx, e, func() (err error) {
		l, err = s.LookAt(chunk)
		return err
	})
	return l, err
}

// Replace writes p, one block, in place of a block of the Look, unless that was
// written since, by anybody: then it reports false. Its checksum is p's afterwards.
// Durable as any write.
func (l *Look) Replace(block int, p []byte) (bool, error) {
	s, off := l.s, l.Chunk*ChunkSize+int64(block)*BlockSize
	if block < 0 || block >= len(l.Blocks) || len(p) != BlockSize {
		return false, fmt.Errorf("replace block %d of chunk %d of %s by %d bytes: %w", block, l.Chunk, s.id, len(p), syscall.EINVAL)
	}
	if err := s.checkWrite(off, BlockSize); err != nil {
		return false, err
	}
	lock := s.lockBlocks(off, BlockSize)
	defer s.blocks.unlock(lock)
	if l.w.written(block) {
		return false, nil
	}
	s.point("repair.write")
	err := s.writeRange(p, off)
	s.written.Add(1)
	if err != nil {
		return false, &BlockError{Disk: s.id, Off: off, Len: BlockSize, Err: err}
	}
	s.repaired.Add(1)
	return true, nil
}

// OnRepair has f be told the offset of each block that a read or a write found damaged
// and Repair has written anew. It is called within that request, and must be quick.
func (s *Store) OnRepair(f func(off int64)) { s.onRepair.Store(&f) }

// Close ends the Look. It may be called twice.
func (l *Look) Close() { l.s.watches.remove(l.w) }

// Warm reads chunks start … end-1 from the medium, not from the page cache as far
// as the system lets that be had, so that a digest that follows is quick, and of
// what is on the medium. What cannot be read is the digest's affair. It returns how
// many bytes were no hole.
func (s *Store) Warm(start, end int64) int64 {
	off, stop := start*ChunkSize, min(end*ChunkSize, s.size)
	if off < 0 || off >= stop || s.Err() != nil {
		return 0
	}
	if d, ok := s.raw.(vfs.Dropper); ok {
		_ = d.Drop(off, stop-off) // a hint
	}
	buf := make([]byte, warmStep)
	var data int64
	for off < stop {
		n, hole, err := s.Extent(off, stop-off)
		if err != nil {
			return data + stop - off
		}
		if !hole {
			data += n
			for at := off; at < off+n; at += warmStep {
				_, _ = s.raw.ReadAt(buf[:min(warmStep, off+n-at)], at) // see above
			}
		}
		off += n
	}
	return data
}

const warmStep = 256 << 10

// watches are the ranges whose writes are noted.
type watches struct {
	some atomic.Int32
	mu   sync.Mutex
	list []*watch
}

// watch notes which blocks of a range were written. Guarded by watches.mu, and,
// so that a block is not written between a look and a write, by the block's lock.
type watch struct {
	off, end int64
	dirty    []atomic.Bool
}

func (w *watch) written(block int) bool { return w.dirty[block].Load() }

// add begins to note. The blocks are locked.
func (ws *watches) add(off, n int64) *watch {
	w := &watch{off: off, end: off + n, dirty: make([]atomic.Bool, (n+BlockSize-1)/BlockSize)}
	ws.mu.Lock()
	defer ws.mu.Unlock()
	ws.list = append(ws.list, w)
	ws.some.Add(1)
	return w
}

func (ws *watches) remove(w *watch) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	if i := slices.Index(ws.list, w); i >= 0 {
		ws.list = slices.Delete(ws.list, i, i+1)
		ws.some.Add(-1)
	}
}

// touch notes a change of a range whose blocks are locked.
func (s *Store) touch(off, n int64) {
	if s.watches.some.Load() == 0 || n <= 0 {
		return
	}
	s.watches.mu.Lock()
	defer s.watches.mu.Unlock()
	for _, w := range s.watches.list {
		for b := max(off, w.off); b < min(off+n, w.end); b = b/BlockSize*BlockSize + BlockSize {
			w.dirty[(b-w.off)/BlockSize].Store(true)
		}
	}
}
