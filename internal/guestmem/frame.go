package guestmem

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/klauspost/compress/s2"
	"github.com/zeebo/xxh3"
)

// Wire form of pages. A frame is self-contained, little-endian:
//
//	0  u8  version (1)
//	1  u8  flags: bit 0 data is compressed (s2 block)
//	2  u16 number of ranges n, 1…frameRanges
//	4  u32 length of the pages' data before compression, a multiple of 4096, 0…frameData
//	8  u32 length of the data as it follows
//	12 u32 0
//	16 u64 XXH3 of the ranges and of the pages' data before compression
//	24 n × { u64 page number | 1<<63 if the pages are zero; u32 count ≥ 1 }
//	…  data: the pages of all ranges that are not zero, in order
//
// Zero pages cost 12 bytes per run. The checksum is that of the result, so that it
// covers the decompression too.
const (
	frameVersion   = 1
	flagCompressed = 1
	frameHead      = 24
	rangeSize      = 12
	zeroRange      = 1 << 63

	frameData   = 256 << 10 // bytes of pages in a frame, before compression
	frameRanges = 4096      // bounds a frame that says nothing but zero
)

// MaxFrame is the size that no frame exceeds, in bytes.
const MaxFrame = frameHead + frameRanges*rangeSize + frameData

// ErrFrame is wrapped by all errors that DecodePages finds itself: the frame was damaged or made by something else.
var ErrFrame = errors.New("bad page frame")

// EncoderConfig tunes an Encoder; the zero value is usable.
type EncoderConfig struct {
	Parallel      int   // frames compressed at the same time, default 2
	NoCompress    bool  // never compress
	LinkRate      int64 // bytes per second that the links carry, 0 unknown; compression that is slower than sending is skipped
	SkipUnchanged bool  // keep a 64-bit hash per page and leave out pages sent before with the same content
	Size          int64 // bytes of RAM, needed by SkipUnchanged only
}

// EncodeStats says what an Encode did.
type EncodeStats struct {
	Pages, ZeroPages, SkippedPages int   // all, of these zero, of these left out as unchanged
	Frames, Compressed             int   // frames emitted, of these compressed
	Bytes                          int64 // bytes of all frames
}

func (s *EncodeStats) add(o EncodeStats) {
	s.Pages += o.Pages
	s.ZeroPages += o.ZeroPages
	s.SkippedPages += o.SkippedPages
	s.Frames += o.Frames
	s.Compressed += o.Compressed
	s.Bytes += o.Bytes
}

// Encoder turns page sets into frames. It adapts to what it sees. One caller
// at a time; its goroutines end with the call that started them.
type Encoder struct {
	cfg   EncoderConfig
	sent  []uint64 // by page: hash of what was sent last, 0 for nothing
	adapt adapter
	jobs  []*job
}

// NewEncoder returns an encoder.
func NewEncoder(cfg EncoderConfig) *Encoder {
	if cfg.Parallel <= 0 {
		cfg.Parallel = 2
	}
	e := &Encoder{cfg: cfg}
	e.adapt.rate = float64(cfg.LinkRate)
	if cfg.SkipUnchanged {
		e.sent = make([]uint64, cfg.Size/PageSize)
	}
	return e
}

// Reset forgets what was sent (SkipUnchanged): call it when the other side
// starts from nothing, and when it is not certain that it got everything.
func (e *Encoder) Reset() { clear(e.sent) }

// run is a piece of guest memory, in whole pages.
type run struct {
	page uint64
	data []byte
}

// job is one frame in the making.
type job struct {
	runs  []run
	frame []byte
	send  [][]byte // its pages that are not zero
	raw   []byte   // the same in one piece, for the compressor
	out   []byte   // the frame, in frame's memory
	stats EncodeStats
	done  chan struct{}
}

// pages in a job at most, so that the frame's limits hold whatever is zero.
const jobPages = frameData / PageSize

// Encode calls emit with each frame of the set, in order, while later frames are being
// compressed. The frame is valid until emit returns. A set without pages gives no frame.
func (e *Encoder) Encode(ps *PageSet, emit func(frame []byte) error) (EncodeStats, error) {
	next := func(yield func(run) bool) {
		for off, data := range ps.Extents() {
			if !yield(run{uint64(off) / PageSize, data}) {
				return
			}
		}
	}
	return e.encode(next, emit)
}

// EncodeRun calls emit with frames for one run of pages (for Sweep), as Encode does.
func (e *Encoder) EncodeRun(off int64, data []byte, emit func(frame []byte) error) (EncodeStats, error) {
	if off < 0 || off%PageSize != 0 || len(data)%PageSize != 0 {
		return EncodeStats{}, fmt.Errorf("encode pages: %d bytes at %d are not whole pages", len(data), off)
	}
	return e.encode(func(yield func(run) bool) { yield(run{uint64(off) / PageSize, data}) }, emit)
}

func (e *Encoder) encode(src func(yield func(run) bool), emit func([]byte) error) (total EncodeStats, err error) {
	var flight []*job // being built, oldest first
	finish := func() {
		j := flight[0]
		flight = flight[1:]
		<-j.done
		total.add(j.stats)
		if err == nil && len(j.out) > 0 {
			err = emit(j.out)
		}
		e.jobs = append(e.jobs, j)
	}
	start := func(j *job) {
		if len(flight) == e.cfg.Parallel {
			finish()
		}
		flight = append(flight, j)
		j.done = make(chan struct{})
		go func() {
			e.build(j)
			close(j.done)
		}()
	}
	cur, n := e.job(), 0
	for r := range src {
		for len(r.data) > 0 && err == nil {
			if n == jobPages {
				start(cur)
				cur, n = e.job(), 0
			}
			k := min(len(r.data)/PageSize, jobPages-n)
			cur.runs = append(cur.runs, run{r.page, r.data[:k*PageSize]})
			r.page, r.data, n = r.page+uint64(k), r.data[k*PageSize:], n+k
		}
		if err != nil {
			break
		}
	}
	if err == nil && n > 0 {
		start(cur)
	} else {
		e.jobs = append(e.jobs, cur)
	}
	for len(flight) > 0 {
		finish()
	}
	return total, err
}

func (e *Encoder) job() *job {
	if n := len(e.jobs); n > 0 {
		j := e.jobs[n-1]
		e.jobs = e.jobs[:n-1]
		j.runs, j.out, j.stats = j.runs[:0], nil, EncodeStats{}
		return j
	}
	// With room for what the compressor may write at worst.
	return &job{frame: make([]byte, 0, frameHead+jobPages*rangeSize+s2.MaxEncodedLen(frameData)), raw: make([]byte, 0, frameData)}
}

// build makes the frame of j's runs; none if nothing is left to send.
func (e *Encoder) build(j *job) {
	f := j.frame[:frameHead]
	clear(f)
	j.send = j.send[:0]
	n := 0
	var last uint64 // page number and kind that would extend the last range
	for _, r := range j.runs {
		for o := 0; o < len(r.data); o += PageSize {
			page, p := r.page+uint64(o/PageSize), r.data[o:o+PageSize]
			j.stats.Pages++
			key, zero := page, isZero(p)
			if zero {
				key |= zeroRange
				j.stats.ZeroPages++
			}
			if e.unchanged(page, p) {
				j.stats.SkippedPages++
				continue
			}
			if !zero {
				j.send = append(j.send, p)
			}
			if n > 0 && key == last {
				c := f[len(f)-4:]
				binary.LittleEndian.PutUint32(c, binary.LittleEndian.Uint32(c)+1)
			} else {
				f = binary.LittleEndian.AppendUint64(f, key)
				f = binary.LittleEndian.AppendUint32(f, 1)
				n++
			}
			last = key + 1
		}
	}
	if n == 0 {
		return
	}
	f[0] = frameVersion
	binary.LittleEndian.PutUint16(f[2:], uint16(n))
	binary.LittleEndian.PutUint32(f[4:], uint32(len(j.send)*PageSize))
	head := len(f)
	f = e.pack(f, j)
	binary.LittleEndian.PutUint32(f[8:], uint32(len(f)-head))
	j.frame, j.out = f[:0], f
	j.stats.Frames, j.stats.Bytes = 1, int64(len(f))
}

// unchanged reports whether page was sent before with this content, and notes the content. Distinct pages may be asked for side by side.
func (e *Encoder) unchanged(page uint64, p []byte) bool {
	if page >= uint64(len(e.sent)) {
		return false
	}
	h := xxh3.Hash(p) | 1 // 0 means nothing
	if e.sent[page] == h {
		return true
	}
	e.sent[page] = h
	return false
}

// checksum covers the ranges and the data, in one pass over each.
func checksum(ranges, data []byte) uint64 {
	return xxh3.HashSeed(data, xxh3.Hash(ranges))
}

// pack appends the pages to f, compressed if that is worth it, and sets the checksum.
func (e *Encoder) pack(f []byte, j *job) []byte {
	head := len(f)
	if e.cfg.NoCompress || len(j.send) == 0 || !e.adapt.try() {
		for _, p := range j.send {
			f = append(f, p...)
		}
		binary.LittleEndian.PutUint64(f[16:], checksum(f[frameHead:head], f[head:]))
		return f
	}
	j.raw = j.raw[:0]
	for _, p := range j.send {
		j.raw = append(j.raw, p...)
	}
	binary.LittleEndian.PutUint64(f[16:], checksum(f[frameHead:], j.raw))
	start := time.Now()
	c := s2.Encode(f[head:cap(f)], j.raw)
	if !e.adapt.pays(len(j.raw), len(c), time.Since(start)) {
		return append(f, j.raw...)
	}
	f[1] |= flagCompressed
	j.stats.Compressed = 1
	return f[:head+len(c)]
}

// adapter decides whether to compress. When compression did not pay it is left
// off for a number of frames that doubles each time, so that a guest full of
// incompressible data costs next to nothing.
type adapter struct {
	mu   sync.Mutex
	rate float64 // bytes per second of the link, 0 unknown
	skip int     // frames left to pass untried
	back int     // how many to skip after the next failure
}

const (
	adaptWorth   = 0.9 // compressed to this share or less
	adaptBackMax = 64
)

func (a *adapter) try() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.skip > 0 {
		a.skip--
		return false
	}
	return true
}

// pays reports whether the compressed form should be used, and learns from it.
func (a *adapter) pays(raw, packed int, took time.Duration) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	small := float64(packed) <= adaptWorth*float64(raw)
	fast := a.rate == 0 || took.Seconds() < float64(raw-packed)/a.rate
	if small && fast {
		a.back = 0
		return true
	}
	a.back = min(max(1, 2*a.back), adaptBackMax)
	a.skip = a.back
	return small // it has been done already; do not send more than needed
}

// buffers of DecodePages.
var decodeBuffers = sync.Pool{New: func() any { b := make([]byte, frameData); return &b }}

// DecodePages checks a frame whole and then calls fn for each run of pages in it
// (off and len(data) are multiples of PageSize, off+len(data) ≤ size). Nothing is
// handed to fn before the checksum of the decoded pages was found right.
// data is valid until fn returns. Its own errors wrap ErrFrame.
func DecodePages(frame []byte, size int64, fn func(off int64, data []byte) error) error {
	if len(frame) < frameHead || frame[0] != frameVersion || frame[1]&^flagCompressed != 0 || binary.LittleEndian.Uint32(frame[12:]) != 0 {
		return fmt.Errorf("%w: head", ErrFrame)
	}
	n := int(binary.LittleEndian.Uint16(frame[2:]))
	rawLen := binary.LittleEndian.Uint32(frame[4:])
	if n == 0 || n > frameRanges || len(frame) < frameHead+n*rangeSize || rawLen > frameData ||
		uint64(len(frame)-frameHead-n*rangeSize) != uint64(binary.LittleEndian.Uint32(frame[8:])) {
		return fmt.Errorf("%w: lengths", ErrFrame)
	}
	ranges, data := frame[frameHead:frameHead+n*rangeSize], frame[frameHead+n*rangeSize:]
	if err := checkRanges(ranges, rawLen, size); err != nil {
		return err
	}
	if frame[1]&flagCompressed != 0 {
		if l, err := s2.DecodedLen(data); err != nil || l != int(rawLen) {
			return fmt.Errorf("%w: length of compressed data", ErrFrame)
		}
		b := decodeBuffers.Get().(*[]byte)
		defer decodeBuffers.Put(b)
		d, err := s2.Decode(*b, data)
		if err != nil {
			return fmt.Errorf("%w: decompress: %w", ErrFrame, err)
		}
		data = d
	}
	if len(data) != int(rawLen) {
		return fmt.Errorf("%w: length of data", ErrFrame)
	}
	if checksum(ranges, data) != binary.LittleEndian.Uint64(frame[16:]) {
		return fmt.Errorf("%w: checksum", ErrFrame)
	}
	for ; len(ranges) > 0; ranges = ranges[rangeSize:] {
		page, count := binary.LittleEndian.Uint64(ranges), int64(binary.LittleEndian.Uint32(ranges[8:]))
		off := int64(page&^zeroRange) * PageSize
		if page&zeroRange == 0 {
			if err := fn(off, data[:count*PageSize]); err != nil {
				return err
			}
			data = data[count*PageSize:]
			continue
		}
		for left := count * PageSize; left > 0; {
			k := min(left, int64(len(zeroes)))
			if err := fn(off, zeroes[:k:k]); err != nil {
				return err
			}
			off, left = off+k, left-k
		}
	}
	return nil
}

// checkRanges makes sure that the ranges lie in the memory and account for the data.
func checkRanges(ranges []byte, rawLen uint32, size int64) error {
	pages := uint64(max(size, 0)) / PageSize
	var sum uint64
	for ; len(ranges) > 0; ranges = ranges[rangeSize:] {
		key, count := binary.LittleEndian.Uint64(ranges), uint64(binary.LittleEndian.Uint32(ranges[8:]))
		page := key &^ zeroRange
		if count == 0 || page >= pages || count > pages-page {
			return fmt.Errorf("%w: pages %d+%d of %d", ErrFrame, page, count, pages)
		}
		if key&zeroRange == 0 {
			sum += count * PageSize
		}
	}
	if sum != uint64(rawLen) {
		return fmt.Errorf("%w: %d bytes of pages, %d announced", ErrFrame, sum, rawLen)
	}
	return nil
}
