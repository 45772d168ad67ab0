package blockstore

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"sync"

	"perdure/internal/bitmap"
	"perdure/internal/vfs"
)

// ExtentSize is the unit of the activity log, in bytes.
const ExtentSize = 4 << 20

const (
	chunksPerExtent = ExtentSize / ChunkSize // 64: one word
	blocksPerExtent = ExtentSize / BlockSize // 1024: one page of checksums
	chunksPerPage   = bitsBytes * 8          // of the bitmap file
	extentsPerPage  = chunksPerPage / chunksPerExtent
	bitsPage        = 4096
	bitsHead        = 32
	bitsBytes       = 4032
	bitsVersion     = 1
)

var bitsMagic = [8]byte{'P', 'D', 'R', 'B', 'I', 'T', 'S', '\n'}

// missing is the set of chunks that the peer lacks, or may lack: in memory, and in
// a file that lags behind. The activity log makes up for the lag: an extent does
// not leave it before what is set here within it is in the file.
//
// In the file each page of the bitmap has two places that are written in turns,
// so that a torn write leaves the page before it.
//
// Locks, in this order: saving, mu.
type missing struct {
	file vfs.File
	key  uint32

	saving sync.Mutex // one save at a time; guards page and seqs
	page   [bitsPage]byte
	seqs   []uint64 // by page, as in the file

	mu    sync.Mutex
	bits  *bitmap.Bitmap
	dirty *bitmap.Bitmap // pages whose file is behind
	sets  *bitmap.Bitmap // those among them that lack a set bit
	lost  int            // pages found damaged, and therefore all set
}

func bitsPages(size int64) int64 {
	chunks := (size + ChunkSize - 1) / ChunkSize
	return (chunks + chunksPerPage - 1) / chunksPerPage
}

// createMissing fills the file with pages that say "nothing", all written, so
// that later no write needs space.
func createMissing(f vfs.File, size int64) error {
	zero := make([]byte, 1<<20)
	end := bitsPages(size) * 2 * bitsPage
	for off := int64(0); off < end; off += int64(len(zero)) {
		if _, err := f.WriteAt(zero[:min(int64(len(zero)), end-off)], off); err != nil {
			return err
		}
	}
	return f.Sync()
}

// open reads the file. A page of which neither place is whole counts as all set.
func (m *missing) open(f vfs.File, key uint32, size int64) error {
	pages := bitsPages(size)
	m.file, m.key, m.seqs = f, key, make([]uint64, pages)
	m.bits = bitmap.New((size + ChunkSize - 1) / ChunkSize)
	m.dirty, m.sets = bitmap.New(pages), bitmap.New(pages)
	n, err := f.Size()
	if err != nil {
		return err
	}
	both := make([]byte, 2*bitsPage)
	for p := range pages {
		clear(both)
		if n >= (p+1)*2*bitsPage {
			if _, err := f.ReadAt(both, p*2*bitsPage); err != nil {
				return err
			}
		} else {
			both[0], both[bitsPage] = 1, 1 // cut off: damaged
		}
		if err := m.load(p, both); err != nil {
			return err
		}
	}
	return nil
}

func (m *missing) load(p int64, both []byte) error {
	first := p * chunksPerPage
	best, seq, found := []byte(nil), uint64(0), false
	for i := range 2 {
		b := both[i*bitsPage:][:bitsPage]
		if IsZero(b) {
			found = true // never written: nothing is set
			continue
		}
		s, err := decodeBits(b, m.key, p)
		if errors.Is(err, ErrVersion) {
			return err
		}
		if err == nil && s >= seq {
			best, seq, found = b, s, true
		}
	}
	m.seqs[p] = seq
	end := min(first+chunksPerPage, m.bits.Len())
	if !found {
		m.lost++
		m.bits.SetRange(first, end)
		m.dirty.Set(p)
		m.sets.Set(p)
		return nil
	}
	if best == nil {
		return nil
	}
	for c := first; c < end; c += 64 {
		w := binary.LittleEndian.Uint64(best[bitsHead+(c-first)/8:])
		m.bits.OrWord(c, w)
	}
	return nil
}

func decodeBits(b []byte, key uint32, page int64) (seq uint64, err error) {
	le := binary.LittleEndian
	if [8]byte(b[:8]) != bitsMagic || le.Uint32(b[bitsPage-4:]) != crc32.Checksum(b[:bitsPage-4], castagnoli) {
		return 0, ErrCorrupt
	}
	if v := le.Uint32(b[8:]); v != bitsVersion {
		return 0, fmt.Errorf("bitmap version %d, this release knows %d: %w", v, bitsVersion, ErrVersion)
	}
	if le.Uint32(b[12:]) != key || int64(le.Uint64(b[16:])) != page {
		return 0, ErrCorrupt
	}
	return le.Uint64(b[24:]), nil
}

// set adds chunks, in memory.
func (m *missing) set(start, end int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for c := start; c < end; {
		p := c / chunksPerPage
		stop := min(end, (p+1)*chunksPerPage)
		before := m.bits.Count()
		m.bits.SetRange(c, stop)
		if m.bits.Count() != before {
			m.dirty.Set(p)
			m.sets.Set(p)
		}
		c = stop
	}
}

// setMask adds chunks of one extent.
func (m *missing) setMask(extent int64, mask uint64) {
	c := extent * chunksPerExtent
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.bits.OrWord(c, mask) {
		m.dirty.Set(c / chunksPerPage)
		m.sets.Set(c / chunksPerPage)
	}
}

// clear removes chunks, in memory.
func (m *missing) clear(start, end int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for c := start; c < end; {
		p := c / chunksPerPage
		stop := min(end, (p+1)*chunksPerPage)
		before := m.bits.Count()
		m.bits.ClearRange(c, stop)
		if m.bits.Count() != before {
			m.dirty.Set(p)
		}
		c = stop
	}
}

// behind reports whether the file lacks a bit that is set in the page of an extent.
func (m *missing) behind(extent int64) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.sets.Test(extent / extentsPerPage)
}

// save brings the file up to date: of the pages in which bits were set since, or,
// with all, of every page that changed. A failed sync is passed to fatal.
func (m *missing) save(all bool, fatal func(error) error) error {
	m.saving.Lock()
	defer m.saving.Unlock()
	var saved []int64
	for p := int64(0); ; p++ {
		m.mu.Lock()
		which := m.sets
		if all {
			which = m.dirty
		}
		start, _, ok := which.Next(p, 1)
		if !ok {
			m.mu.Unlock()
			break
		}
		p = start
		m.encode(p)
		m.dirty.Clear(p)
		m.sets.Clear(p)
		m.mu.Unlock()
		saved = append(saved, p)
		if _, err := m.file.WriteAt(m.page[:], p*2*bitsPage+int64(m.seqs[p]+1)%2*bitsPage); err != nil {
			m.behindAgain(saved)
			return err
		}
	}
	if len(saved) == 0 {
		return nil
	}
	if err := m.file.Sync(); err != nil {
		m.behindAgain(saved)
		return fatal(err)
	}
	for _, p := range saved {
		m.seqs[p]++
	}
	return nil
}

func (m *missing) behindAgain(pages []int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, p := range pages {
		m.dirty.Set(p)
		m.sets.Set(p)
	}
}

// encode builds a page of the file. saving and mu are held.
func (m *missing) encode(p int64) {
	b, le := m.page[:], binary.LittleEndian
	clear(b)
	copy(b, bitsMagic[:])
	le.PutUint32(b[8:], bitsVersion)
	le.PutUint32(b[12:], m.key)
	le.PutUint64(b[16:], uint64(p))
	le.PutUint64(b[24:], m.seqs[p]+1)
	first := p * chunksPerPage
	for c := first; c < min(first+chunksPerPage, m.bits.Len()); c += 64 {
		le.PutUint64(b[bitsHead+(c-first)/8:], m.bits.Word(c))
	}
	le.PutUint32(b[bitsPage-4:], crc32.Checksum(b[:bitsPage-4], castagnoli))
}
