package blockstore

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"sync"
	"sync/atomic"

	"perdure/internal/vfs"
)

// sumPage holds the checksums of one extent, which is one page of their file. Its
// elements are read and written atomically: blocks of one extent are written side
// by side.
type sumPage [blocksPerExtent]uint32

// doubts marks the blocks of an extent whose checksum says nothing: after a crash,
// or after a write that failed. Read and written atomically.
type doubts [blocksPerExtent / 64]uint64

func newDoubts() *doubts {
	d := new(doubts)
	for i := range d {
		d[i] = ^uint64(0)
	}
	return d
}

func (d *doubts) has(n int64) bool {
	return d != nil && atomic.LoadUint64(&d[n/64])&(1<<(n%64)) != 0
}

func (d *doubts) set(n int64)   { atomic.OrUint64(&d[n/64], 1<<(n%64)) }
func (d *doubts) clear(n int64) { atomic.AndUint64(&d[n/64], ^(uint64(1) << (n % 64))) }

func (d *doubts) none() bool {
	for i := range d {
		if atomic.LoadUint64(&d[i]) != 0 {
			return false
		}
	}
	return true
}

// sums is the file of the block checksums. The pages of hot extents are in memory
// and go to the file when the extent leaves the activity log, so a write costs no
// I/O for its checksum; after a crash exactly the extents in the log are in doubt.
type sums struct {
	file     vfs.File // nil: none are kept
	complete atomic.Bool
}

func (s *sums) on() bool { return s.file != nil }

// zeroSum makes the checksum of a block of zeroes 0, so that a hole in the file of
// the checksums stands for a hole in the image.
var zeroSum = crc32.Checksum(zeroBlock[:], castagnoli)

func sumOf(b []byte) uint32 { return crc32.Checksum(b, castagnoli) ^ zeroSum }

func createSums(f vfs.File, size int64) error {
	if err := f.Truncate(extents(size) * blocksPerExtent * 4); err != nil {
		return err
	}
	return f.Sync()
}

// read reads the page of an extent from the file.
func (s *sums) read(no int64) (*sumPage, error) {
	var b [blocksPerExtent * 4]byte
	if _, err := s.file.ReadAt(b[:], no*int64(len(b))); err != nil {
		return nil, err
	}
	p := new(sumPage)
	for i := range p {
		p[i] = binary.LittleEndian.Uint32(b[4*i:])
	}
	return p, nil
}

func (s *sums) write(no int64, p *sumPage) error {
	var b [blocksPerExtent * 4]byte
	for i := range p {
		binary.LittleEndian.PutUint32(b[4*i:], atomic.LoadUint32(&p[i]))
	}
	_, err := s.file.WriteAt(b[:], no*int64(len(b)))
	return err
}

// sumCache holds pages of cold extents for reads. Guarded by activity.mu.
type sumCache struct {
	pages map[int64]*sumPage
	ring  []int64
	at    int
}

const cachedPages = 1024 // 4 MiB, for 4 GiB of the disk

func (c *sumCache) put(no int64, p *sumPage) {
	if c.pages == nil {
		c.pages = map[int64]*sumPage{}
	}
	if _, ok := c.pages[no]; !ok {
		if len(c.ring) < cachedPages {
			c.ring = append(c.ring, no)
		} else {
			delete(c.pages, c.ring[c.at])
			c.ring[c.at] = no
			c.at = (c.at + 1) % cachedPages
		}
	}
	c.pages[no] = p
}

func (c *sumCache) take(no int64) *sumPage {
	p := c.pages[no]
	delete(c.pages, no)
	return p
}

// loadPages gets the checksums of extents that are about to be hot. A page that
// cannot be read is in doubt as a whole. The caller is busy.
func (a *activity) loadPages(news []int32) error {
	if !a.s.sums.on() {
		return nil
	}
	for _, i := range news {
		e := &a.entries[i]
		a.mu.Lock()
		page, have, no := a.cache.take(e.no), e.page, e.no
		a.mu.Unlock()
		if have != nil {
			continue // of an earlier attempt
		}
		var lost *doubts
		if page == nil {
			var err error
			if page, err = a.s.sums.read(no); err != nil {
				page, lost = new(sumPage), newDoubts()
			}
		}
		a.mu.Lock()
		e.page, e.doubt = page, lost
		if lost != nil {
			a.inDoubt++
		}
		a.mu.Unlock()
	}
	return nil
}

// sumsOf returns the checksums of an extent for reading.
func (a *activity) sumsOf(no int64) (*sumPage, *doubts, error) {
	for {
		a.mu.Lock()
		if e := a.find(no); e != nil && e.page != nil {
			p, d := e.page, e.doubt
			a.mu.Unlock()
			return p, d, nil
		}
		if p := a.cache.pages[no]; p != nil {
			a.mu.Unlock()
			return p, nil, nil
		}
		leaves := a.leaves
		a.mu.Unlock()
		p, err := a.s.sums.read(no)
		if err != nil {
			return nil, nil, err
		}
		a.mu.Lock()
		fresh := a.leaves == leaves
		if fresh && a.index[no] == 0 {
			a.cache.put(no, p)
		}
		a.mu.Unlock()
		if fresh {
			return p, nil, nil
		}
	}
}

// verify compares whole blocks, read from off on, with their checksums, and
// returns the first one that differs, as an offset; -1: none.
func (s *Store) verify(p []byte, off int64) (bad int64, err error) {
	complete := s.sums.complete.Load()
	for len(p) > 0 {
		page, doubt, err := s.act.sumsOf(off / ExtentSize)
		if err != nil {
			return -1, fmt.Errorf("read checksums of %s: %w", s.id, err)
		}
		for n := off % ExtentSize / BlockSize; n < blocksPerExtent && len(p) > 0; n++ {
			want := atomic.LoadUint32(&page[n])
			if (want != 0 || complete) && sumOf(p[:BlockSize]) != want && !doubt.has(n) {
				return off, nil
			}
			p, off = p[BlockSize:], off+BlockSize
		}
	}
	return -1, nil
}

// saveSums makes the checksums of extents that are about to leave durable. Those
// in doubt are computed anew first. The caller is busy and has not mu.
func (s *Store) saveSums(victims []int32) error {
	a := &s.act
	saved := false
	for _, i := range victims {
		e := &a.entries[i]
		a.mu.Lock()
		no, page, doubt, leaving := e.no, e.page, e.doubt, e.state == exLeaving
		a.mu.Unlock()
		if doubt != nil && leaving {
			if err := s.reassure(e); err != nil {
				a.unreadable++ // it stays; whether that is an error is for makeRoom to say
				continue
			}
		}
		a.mu.Lock()
		write := e.state == exLeaving && e.dirty && e.doubt == nil
		if write {
			e.dirty = false
		}
		a.mu.Unlock()
		if !write {
			continue
		}
		if err := s.sums.write(no, page); err != nil {
			a.mu.Lock()
			e.dirty = true
			a.mu.Unlock()
			return fmt.Errorf("write checksums of %s: %w", s.id, err)
		}
		saved = true
	}
	if !saved {
		return nil
	}
	s.point("sums.written")
	if err := s.sums.file.Sync(); err != nil {
		return s.fail("sync of the checksums", err)
	}
	return nil
}

// reassure computes the checksums in doubt of an extent that is leaving. The doubts
// stay where somebody came to write there, which is no error, or where a block
// cannot be read.
func (s *Store) reassure(e *extent) error {
	a := &s.act
	a.mu.Lock()
	no, doubt := e.no, e.doubt
	a.mu.Unlock()
	fresh := make(map[int64]uint32)
	buf := s.buffers.get()
	defer s.buffers.put(buf)
	data := int64(0) // up to here from n on is data, or a hole
	hole := false
	for n := range int64(blocksPerExtent) {
		off := no*ExtentSize + n*BlockSize
		if !doubt.has(n) || off >= s.size {
			continue
		}
		if off >= data {
			length, h, err := s.Extent(off, min((no+1)*ExtentSize, s.size)-off)
			if err != nil {
				return err
			}
			data, hole = off+length, h
		}
		if hole {
			fresh[n] = 0
			continue
		}
		if _, err := s.raw.ReadAt(buf[:], off); err != nil {
			return err
		}
		fresh[n] = sumOf(buf[:])
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if e.state != exLeaving || e.doubt == nil {
		return nil
	}
	for n, sum := range fresh {
		atomic.StoreUint32(&e.page[n], sum)
	}
	a.trust(e)
	return nil
}

// trust ends the doubts about an extent. mu is held.
func (a *activity) trust(e *extent) {
	if e.doubt != nil {
		e.doubt, e.dirty = nil, true
		a.inDoubt--
	}
}

// suspect marks blocks of a hot extent whose content is not known, after a write
// that failed. The blocks are locked.
func (a *activity) suspect(e *extent, off, n int64) {
	if e.page == nil {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if e.doubt == nil {
		e.doubt = new(doubts)
		a.inDoubt++
	}
	for b := off % ExtentSize / BlockSize; b <= (off%ExtentSize+n-1)/BlockSize; b++ {
		e.doubt.set(b)
	}
}

// know stores the checksum of a block of a hot extent. The block is locked.
func (e *extent) know(n int64, sum uint32, doubt *doubts) {
	atomic.StoreUint32(&e.page[n], sum)
	if doubt.has(n) {
		doubt.clear(n)
	}
}

// InDoubt is how many extents (of 4 MiB) have checksums that are not trusted: as
// many as were in the activity log when the last user died, at most.
func (s *Store) InDoubt() int {
	s.act.mu.Lock()
	defer s.act.mu.Unlock()
	return s.act.inDoubt
}

// reassureStep is how much is read at once, with writes in it held up.
const reassureStep = 256 << 10

// Reassure computes the checksums of one extent that are in doubt. The store does
// so by itself in the background, unless told not to. more: there are others.
func (s *Store) Reassure() (more bool, err error) {
	a := &s.act
	a.mu.Lock()
	var e *extent
	for i := range a.entries {
		if x := &a.entries[i]; x.doubt != nil && x.state == exHot && (e == nil || x.used < e.used) {
			e = x
		}
	}
	if e == nil {
		a.mu.Unlock()
		return false, nil
	}
	no, doubt := e.no, e.doubt
	a.mu.Unlock()
	buf := make([]byte, reassureStep)
	for off := no * ExtentSize; off < min((no+1)*ExtentSize, s.size); off += reassureStep {
		p := buf[:min(reassureStep, s.size-off)]
		if err := s.reassureBlocks(e, doubt, p, off); err != nil {
			return false, err
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if e.no == no && e.doubt == doubt && doubt.none() {
		a.trust(e)
	}
	return a.inDoubt > 0, nil
}

func (s *Store) reassureBlocks(e *extent, doubt *doubts, p []byte, off int64) error {
	l := s.blocks.lock(off, off+int64(len(p)))
	defer s.blocks.unlock(l)
	h, d, err := s.act.begin(off, int64(len(p)))
	if err != nil {
		return err
	}
	defer s.act.end(h)
	if h != e || d != doubt {
		return nil // it left meanwhile
	}
	if length, hole, err := s.raw.Extent(off, int64(len(p))); err == nil && hole && length == int64(len(p)) {
		clear(p)
	} else if _, err := s.raw.ReadAt(p, off); err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("read %s: %w", s.id, err)
	}
	for n := off % ExtentSize / BlockSize; len(p) > 0; n, p = n+1, p[BlockSize:] {
		if doubt.has(n) {
			h.know(n, sumOf(p[:BlockSize]), doubt)
		}
	}
	return nil
}

// bufferPool lends buffers of one block.
type bufferPool struct{ pool sync.Pool }

func (b *bufferPool) get() *block {
	if p, ok := b.pool.Get().(*block); ok {
		return p
	}
	return new(block)
}

func (b *bufferPool) put(p *block) { b.pool.Put(p) }
