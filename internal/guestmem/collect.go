package guestmem

import (
	"errors"
	"fmt"
	"iter"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

const (
	chunkSize  = 2 << 20 // one huge page; at least maxWrite, see reader.iov
	chunkPages = chunkSize / PageSize
)

// chunk is a buffer outside of Go's heap into which the kernel copies pages
// directly. It is shared by the reader that fills it and the page sets that
// hold pages in it, and goes back to the pool with the last of them.
type chunk struct {
	mem  []byte
	refs atomic.Int32
	// Place in the list of the set that is being collected, valid if gen is
	// the collector's; guarded by the collector's lock.
	gen uint32
	idx uint32
}

func (c *chunk) page(i uint32) []byte { return c.mem[i*PageSize : (i+1)*PageSize : (i+1)*PageSize] }

// pool keeps chunks for reuse: mapping and zeroing fresh memory costs as much
// as the copy that fills it, and it would happen while the guest stands still.
// It keeps what was in use at the recent peak, and lets go of the rest slowly.
type pool struct {
	mu     sync.Mutex
	free   []*chunk
	floor  int // chunks kept in any case, used and free
	used   int // chunks given out
	peak   int // of used, decaying
	closed bool
}

// get returns a chunk with one reference.
func (p *pool) get() (*chunk, error) {
	p.mu.Lock()
	p.used++
	p.peak = max(p.peak, p.used)
	if n := len(p.free); n > 0 {
		c := p.free[n-1]
		p.free = p.free[:n-1]
		p.mu.Unlock()
		c.refs.Store(1)
		return c, nil
	}
	p.mu.Unlock()
	c, err := newChunk()
	if err != nil {
		p.mu.Lock()
		p.used--
		p.mu.Unlock()
	}
	return c, err
}

func newChunk() (*chunk, error) {
	m, err := mapAligned(chunkSize)
	if err != nil {
		return nil, fmt.Errorf("map page buffer: %w", err)
	}
	c := &chunk{mem: m}
	c.refs.Store(1)
	return c, nil
}

// fill maps chunks ahead of need, up to the floor. Best effort: get tries again.
func (p *pool) fill() {
	for {
		p.mu.Lock()
		enough := p.closed || p.used+len(p.free) >= p.floor
		p.mu.Unlock()
		if enough {
			return
		}
		c, err := newChunk()
		if err != nil {
			return
		}
		p.mu.Lock()
		p.used++
		p.mu.Unlock()
		p.put(c)
	}
}

// trim lets the peak decay and unmaps what is kept beyond it. It is called once per released set.
func (p *pool) trim() {
	p.mu.Lock()
	if p.peak > p.used {
		p.peak -= (p.peak - p.used + 63) / 64
	}
	var drop []*chunk
	for len(p.free) > 0 && p.used+len(p.free) > max(p.peak, p.floor) {
		n := len(p.free) - 1
		drop = append(drop, p.free[n])
		p.free = p.free[:n]
	}
	p.mu.Unlock()
	unmap(drop)
}

func unmap(list []*chunk) {
	for _, c := range list {
		_ = unix.Munmap(c.mem) // only fails for memory that is not ours
	}
}

// put drops one reference.
func (p *pool) put(c *chunk) {
	if n := c.refs.Add(-1); n > 0 {
		return
	} else if n < 0 {
		panic("guestmem: page buffer released twice")
	}
	p.mu.Lock()
	p.used--
	if !p.closed {
		p.free = append(p.free, c)
		p.mu.Unlock()
		return
	}
	p.mu.Unlock()
	unmap([]*chunk{c})
}

func (p *pool) bytes() int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return int64(p.used+len(p.free)) * chunkSize
}

// close unmaps what is free; what sets still hold follows with their Release.
func (p *pool) close() {
	p.mu.Lock()
	free := p.free
	p.free, p.closed = nil, true
	p.mu.Unlock()
	unmap(free)
}

// mapAligned maps size bytes of zeroes, aligned to size and touched, as a huge page if there is one.
func mapAligned(size int) ([]byte, error) {
	m, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, err
	}
	// Advice only: without huge pages everything works the same.
	_ = unix.Madvise(m, unix.MADV_HUGEPAGE)
	for i := 0; i < size; i += PageSize {
		m[i] = 0
	}
	return m, nil
}

// pageRef says where one page of a set is.
type pageRef struct {
	num uint32 // page number in the guest's memory
	at  uint32 // index in the set's chunks × chunkPages + page in it
}

// collector gathers what the kernel hands over into the set of the next Cut.
//
// Invariant: a page is in the set at most once, with the content that arrived
// last. The kernel never has two WRITEs of one page in flight, so the order in
// which the lock is taken is the order in which the contents were true.
type collector struct {
	pool     *pool
	pressure chan struct{}
	limit    int64

	mu    sync.Mutex
	mode  Mode
	gen   uint32
	set   *PageSet
	index []uint64 // by page number: gen<<32 | position in set.pages
	spare *PageSet // an empty one whose lists have grown already
	void  error

	bytes atomic.Int64
}

func newCollector(p *pool, pages int64, limit int64) *collector {
	c := &collector{pool: p, pressure: make(chan struct{}, 1), limit: limit, gen: 1, index: make([]uint64, pages)}
	c.set = &PageSet{owner: c}
	return c
}

// segment is a run of whole pages in a chunk.
type segment struct {
	c   *chunk
	pos int // byte offset, multiple of PageSize
	n   int // bytes
}

// add takes the pages first… from the segments, in order, into the set. It
// compacts: pages that are in the set already are copied over their older
// copy, and the others are moved down over them. It returns how many bytes
// of the segments, counted from their start, are now held by the set; the rest may be
// overwritten. In mode Discard that is 0.
func (c *collector) add(first uint32, segs []segment) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.mode == Discard {
		return 0
	}
	var keep cursor
	keep.segs = segs
	num := first
	for _, s := range segs {
		for o := 0; o < s.n; o += PageSize {
			src := s.c.page(uint32((s.pos + o) / PageSize))
			if e := c.index[num]; uint32(e>>32) == c.gen {
				copy(c.set.page(c.set.pages[uint32(e)]), src)
			} else {
				ch, pg := keep.next()
				if dst := ch.page(pg); &dst[0] != &src[0] {
					copy(dst, src)
				}
				c.index[num] = uint64(c.gen)<<32 | uint64(len(c.set.pages))
				c.set.pages = append(c.set.pages, pageRef{num: num, at: c.place(ch)*chunkPages + pg})
			}
			num++
		}
	}
	if n := c.bytes.Add(int64(keep.used)); n >= c.limit && n-int64(keep.used) < c.limit {
		select {
		case c.pressure <- struct{}{}:
		default:
		}
	}
	return keep.used
}

// place returns the position of ch in the set's list, taking a reference the first time.
func (c *collector) place(ch *chunk) uint32 {
	if ch.gen != c.gen {
		ch.gen, ch.idx = c.gen, uint32(len(c.set.chunks))
		ch.refs.Add(1)
		c.set.chunks = append(c.set.chunks, ch)
	}
	return ch.idx
}

// cursor walks over the pages of segments.
type cursor struct {
	segs []segment
	seg  int
	off  int
	used int
}

func (k *cursor) next() (*chunk, uint32) {
	for k.off == k.segs[k.seg].n {
		k.seg, k.off = k.seg+1, 0
	}
	s := k.segs[k.seg]
	p := uint32((s.pos + k.off) / PageSize)
	k.off += PageSize
	k.used += PageSize
	return s.c, p
}

// fail makes everything collected since the last Cut void.
func (c *collector) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.void == nil {
		c.void = err
	}
}

func (c *collector) voided() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.void == nil {
		return nil
	}
	return fmt.Errorf("%w: %w", ErrVoid, c.void)
}

// setMode changes what happens with pages. Nothing collected outlives a time of discarding: a page in the set
// may have changed again, unseen, and would then undo a newer copy at the other side.
func (c *collector) setMode(m Mode) {
	c.mu.Lock()
	var old *PageSet
	if m != c.mode {
		c.mode = m
		c.void = nil
		old = c.swap()
	}
	c.mu.Unlock()
	if old != nil {
		old.Release()
	}
}

func (c *collector) discards() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.mode == Discard
}

// cut swaps the set for an empty one.
func (c *collector) cut() (*PageSet, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.void != nil {
		return nil, fmt.Errorf("%w: %w", ErrVoid, c.void)
	}
	return c.swap(), nil
}

func (c *collector) swap() *PageSet {
	s := c.set
	if c.set = c.spare; c.set == nil {
		c.set = &PageSet{owner: c}
	}
	c.spare = nil
	c.gen++
	if c.gen == 0 { // 2³² cuts: entries of old generations would come alive
		clear(c.index)
		c.gen = 1
	}
	c.bytes.Store(0)
	select {
	case <-c.pressure:
	default:
	}
	return s
}

func (c *collector) restart() {
	c.mu.Lock()
	s := c.swap()
	c.void = nil
	c.mu.Unlock()
	s.Release()
}

// PageSet is the memory of one epoch: every page that changed, once, with its
// last content. It is not safe for concurrent use, except for reading.
type PageSet struct {
	owner  *collector
	chunks []*chunk
	pages  []pageRef
}

// Pages returns the number of pages.
func (p *PageSet) Pages() int { return len(p.pages) }

// Bytes returns Pages times PageSize.
func (p *PageSet) Bytes() int64 { return int64(len(p.pages)) * PageSize }

func (p *PageSet) page(r pageRef) []byte { return p.chunks[r.at/chunkPages].page(r.at % chunkPages) }

// Extents yields the pages in order of arrival, in runs of whole pages. The data is valid until Release.
func (p *PageSet) Extents() iter.Seq2[int64, []byte] {
	return func(yield func(int64, []byte) bool) {
		for i := 0; i < len(p.pages); {
			r := p.pages[i]
			n := 1
			for i+n < len(p.pages) && r.at%chunkPages+uint32(n) < chunkPages &&
				p.pages[i+n].num == r.num+uint32(n) && p.pages[i+n].at == r.at+uint32(n) {
				n++
			}
			from := int(r.at%chunkPages) * PageSize
			if !yield(int64(r.num)*PageSize, p.chunks[r.at/chunkPages].mem[from:from+n*PageSize]) {
				return
			}
			i += n
		}
	}
}

// PageNumbers returns the numbers of all pages, ascending (for the audit).
func (p *PageSet) PageNumbers() []int64 {
	out := make([]int64, len(p.pages))
	for i, r := range p.pages {
		out[i] = int64(r.num)
	}
	slices.Sort(out)
	return out
}

// Release gives the buffers back. The set is empty afterwards; releasing an empty set does nothing.
func (p *PageSet) Release() {
	c := p.owner
	if c == nil {
		return
	}
	p.owner = nil
	for _, ch := range p.chunks {
		c.pool.put(ch)
	}
	c.pool.trim()
	next := &PageSet{owner: c, chunks: p.chunks[:0], pages: p.pages[:0]}
	p.chunks, p.pages = nil, nil
	const keepPages = 1 << 16 // half a MiB of list; a longer one is left to the collector of garbage
	if cap(next.pages) > keepPages {
		return
	}
	c.mu.Lock()
	if c.spare == nil || cap(c.spare.pages) < cap(next.pages) {
		c.spare = next
	}
	c.mu.Unlock()
}

var errNotAttached = errors.New("helper is not attached to the file")
