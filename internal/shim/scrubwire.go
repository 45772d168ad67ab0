package shim

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"time"

	"perdure/internal/blockstore"
	"perdure/internal/model"
	"perdure/internal/peer"
	"perdure/internal/replica"
)

// scrubVersion is what the hello says where a side answers the messages below.
const scrubVersion = 1

// Kinds of ordered messages of verify and of read repair. The primary asks, the
// secondary answers each question once, in any order.
const (
	kindScrubAsk    uint8 = 80 + iota // scrubHead; for scrubFix and scrubKeep data follows
	kindScrubAnswer                   // secondary to primary: scrubHead of the question with its status, data
)

// What is asked.
const (
	scrubWarm   uint8 = 1 + iota // read Count chunks from First on into the cache
	scrubDigest                  // digests of Count chunks: 16 bytes and one of trust each
	scrubLook                    // one chunk: 9 bytes for each block, then its content
	scrubFix                     // replace blocks (Mask) of the chunk that was looked at last
	scrubRead                    // Count bytes at First as the secondary has them, once Epoch is in place
	scrubKeep                    // keep a report: JSON
)

// Status of an answer.
const (
	scrubOK uint8 = iota
	scrubLate
	scrubFailed // the data is the reason
)

// scrubHead heads a question and its answer, little endian.
type scrubHead struct {
	ID     uint64
	Epoch  uint64
	First  int64
	Count  int64
	Disk   uint32
	Mask   uint32 // of blocks: which to replace, or which were
	Op     uint8
	Status uint8
	_      uint16
}

var scrubHeadSize = binary.Size(scrubHead{})

func decodeScrub(p []byte) (h scrubHead, data []byte, err error) {
	if len(p) < scrubHeadSize {
		return h, nil, fmt.Errorf("message of verify: %d bytes, at least %d wanted", len(p), scrubHeadSize)
	}
	return h, p[scrubHeadSize:], unpack(p[:scrubHeadSize], &h)
}

// scrubClient asks the secondary; it is one session's.
type scrubClient struct {
	send func(kind uint8, content ...[]byte) error

	mu    sync.Mutex
	next  uint64
	calls map[uint64]chan scrubReply
}

type scrubReply struct {
	head scrubHead
	data []byte
}

func newScrubClient(send func(kind uint8, content ...[]byte) error) *scrubClient {
	return &scrubClient{send: send, calls: map[uint64]chan scrubReply{}}
}

// take takes an answer. One that nobody waits for any more is dropped.
func (c *scrubClient) take(p []byte) error {
	h, data, err := decodeScrub(p)
	if err != nil {
		return err
	}
	c.mu.Lock()
	ch := c.calls[h.ID]
	delete(c.calls, h.ID)
	c.mu.Unlock()
	if ch != nil {
		ch <- scrubReply{h, data}
	}
	return nil
}

func (c *scrubClient) ask(ctx context.Context, h scrubHead, data []byte) (scrubReply, error) {
	ch := make(chan scrubReply, 1)
	c.mu.Lock()
	c.next++
	h.ID = c.next
	c.calls[h.ID] = ch
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		delete(c.calls, h.ID)
		c.mu.Unlock()
	}()
	if err := c.send(kindScrubAsk, pack(h), data); err != nil {
		return scrubReply{}, err
	}
	select {
	case r := <-ch:
		switch r.head.Status {
		case scrubOK:
			return r, nil
		case scrubLate:
			return r, fmt.Errorf("the secondary: %w", blockstore.ErrTooLate)
		}
		return r, fmt.Errorf("the secondary: %s", r.data)
	case <-ctx.Done():
		return scrubReply{}, context.Cause(ctx)
	}
}

func (c *scrubClient) warm(ctx context.Context, disk int, first, count int64) error {
	_, err := c.ask(ctx, scrubHead{Op: scrubWarm, Disk: uint32(disk), First: first, Count: count}, nil)
	return err
}

func (c *scrubClient) digests(ctx context.Context, disk int, e model.Epoch, first, count int64) ([]blockstore.ChunkDigest, error) {
	r, err := c.ask(ctx, scrubHead{Op: scrubDigest, Disk: uint32(disk), Epoch: uint64(e), First: first, Count: count}, nil)
	if err != nil {
		return nil, err
	}
	if int64(len(r.data)) != 17*count {
		return nil, fmt.Errorf("digests of %d chunks: %d bytes", count, len(r.data))
	}
	out := make([]blockstore.ChunkDigest, count)
	for i := range out {
		p := r.data[17*i:]
		out[i] = blockstore.ChunkDigest{Chunk: first + int64(i), Sum: [16]byte(p), Trust: blockstore.Trust(p[16])}
	}
	return out, nil
}

func (c *scrubClient) look(ctx context.Context, disk int, e model.Epoch, chunk int64) ([]byte, []replica.View, error) {
	r, err := c.ask(ctx, scrubHead{Op: scrubLook, Disk: uint32(disk), Epoch: uint64(e), First: chunk}, nil)
	if err != nil {
		return nil, nil, err
	}
	return decodeLook(r.data)
}

func (c *scrubClient) fix(ctx context.Context, disk int, chunk int64, mask uint32, data []byte) (uint32, error) {
	var wanted []byte
	for b := range blockstore.BlocksPerChunk {
		if mask&(1<<b) != 0 {
			wanted = append(wanted, block(data, b)...)
		}
	}
	r, err := c.ask(ctx, scrubHead{Op: scrubFix, Disk: uint32(disk), First: chunk, Mask: mask}, wanted)
	return r.head.Mask, err
}

// read gets a range as the secondary has it, once an epoch is in place there.
func (c *scrubClient) read(ctx context.Context, disk int, e model.Epoch, p []byte, off int64) error {
	r, err := c.ask(ctx, scrubHead{Op: scrubRead, Disk: uint32(disk), Epoch: uint64(e), First: off, Count: int64(len(p))}, nil)
	if err != nil {
		return err
	}
	if len(r.data) != len(p) {
		return fmt.Errorf("%d bytes of a disk asked of the secondary: %d came", len(p), len(r.data))
	}
	copy(p, r.data)
	return nil
}

// keep hands a report on, so that it is there after a takeover.
func (c *scrubClient) keep(ctx context.Context, report []byte) error {
	_, err := c.ask(ctx, scrubHead{Op: scrubKeep}, report)
	return err
}

// Flags of a block in an answer to scrubLook.
const (
	viewRead uint8 = 1 << iota
	viewKeeps
)

// encodeLook makes the answer to scrubLook: for each block flags, checksum of what is
// there and the one kept (9 bytes), then the content.
func encodeLook(l *blockstore.Look) []byte {
	out := make([]byte, 0, 9*len(l.Blocks)+len(l.Data))
	for _, v := range l.Blocks {
		var flags uint8
		if v.Read {
			flags |= viewRead
		}
		if v.Keeps {
			flags |= viewKeeps
		}
		out = append(out, flags)
		out = binary.LittleEndian.AppendUint32(out, v.Is)
		out = binary.LittleEndian.AppendUint32(out, v.Kept)
	}
	return append(out, l.Data...)
}

func decodeLook(p []byte) ([]byte, []replica.View, error) {
	const each = 9 + blockstore.BlockSize
	if len(p)%each != 0 || len(p)/each > blockstore.BlocksPerChunk {
		return nil, nil, fmt.Errorf("look at a chunk: %d bytes", len(p))
	}
	views := make([]replica.View, len(p)/each)
	for b := range views {
		views[b] = replica.View{Read: p[0]&viewRead != 0, Keeps: p[0]&viewKeeps != 0,
			Is: binary.LittleEndian.Uint32(p[1:]), Kept: binary.LittleEndian.Uint32(p[5:])}
		p = p[9:]
	}
	return p, views, nil
}

// scrubServer answers on the secondary's side. It is one session's.
type scrubServer struct {
	stores []*blockstore.Store
	send   func(kind uint8, content ...[]byte) error
	keep   func(report []byte) error
	// inPlace waits until an epoch is in place here; nil: there are none.
	inPlace func(ctx context.Context, e model.Epoch) error

	mu   sync.Mutex
	last *blockstore.Look
	disk uint32 // of last
	over bool
}

// maxScrubRead bounds one read of the primary, in bytes.
const maxScrubRead = 1 << 20

// check refuses a question that does not fit.
func (s *scrubServer) check(h scrubHead) error {
	if h.Op == scrubKeep {
		return nil
	}
	if int(h.Disk) >= len(s.stores) {
		return fmt.Errorf("question about disk %d, there are %d", h.Disk, len(s.stores))
	}
	st := s.stores[h.Disk]
	chunks, size := st.Chunks(), st.Size()
	ok := h.First >= 0 && h.Count >= 0
	switch h.Op {
	case scrubWarm, scrubDigest:
		ok = ok && h.Count <= sumChunks && h.First <= chunks-h.Count
	case scrubLook, scrubFix:
		ok = ok && h.First < chunks
	case scrubRead:
		ok = ok && h.Count <= maxScrubRead && h.First <= size-h.Count
	default:
		ok = false
	}
	if !ok {
		return fmt.Errorf("question %d about disk %d: %d from %d on, of %d chunks", h.Op, h.Disk, h.Count, h.First, chunks)
	}
	return nil
}

// answer answers a question; it may take as long as an epoch.
func (s *scrubServer) answer(ctx context.Context, h scrubHead, data []byte) {
	var out []byte
	err := s.check(h)
	if err == nil {
		out, err = s.carryOut(ctx, &h, data)
	}
	switch {
	case errors.Is(err, blockstore.ErrTooLate):
		h.Status, out = scrubLate, nil
	case err != nil:
		h.Status, out = scrubFailed, []byte(err.Error())
	}
	_ = s.send(kindScrubAnswer, pack(h), out) // a lost session needs no answer
}

func (s *scrubServer) carryOut(ctx context.Context, h *scrubHead, data []byte) (out []byte, err error) {
	if h.Op == scrubKeep {
		return nil, s.keep(data)
	}
	st, e := s.stores[h.Disk], model.Epoch(h.Epoch)
	switch h.Op {
	case scrubWarm:
		st.Warm(h.First, h.First+h.Count)
	case scrubDigest:
		var list []blockstore.ChunkDigest
		if e != 0 {
			list, err = st.DigestAsOf(ctx, e, h.First, h.First+h.Count)
		} else {
			err = st.Digest(h.First, h.First+h.Count, func(d blockstore.ChunkDigest) error { list = append(list, d); return nil })
		}
		for _, d := range list {
			out = append(append(out, d.Sum[:]...), byte(d.Trust))
		}
	case scrubLook:
		var l *blockstore.Look
		if e != 0 {
			l, err = st.LookAsOf(ctx, e, h.First)
		} else {
			l, err = st.LookAt(h.First)
		}
		if err == nil {
			s.hold(l, h.Disk)
			out = encodeLook(l)
		}
	case scrubFix:
		return nil, s.fix(h, data)
	case scrubRead:
		if e != 0 && s.inPlace != nil {
			if err := s.inPlace(ctx, e); err != nil {
				return nil, err
			}
		}
		out = make([]byte, h.Count)
		err = st.ReadAt(out, h.First)
	}
	return out, err
}

// lookLife is how long a look is kept for a repair: it costs each write a little.
const lookLife = 10 * time.Second

// hold keeps the newest look, for a while.
func (s *scrubServer) hold(l *blockstore.Look, disk uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	time.AfterFunc(lookLife, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		l.Close()
		if s.last == l {
			s.last = nil
		}
	})
	if s.last != nil {
		s.last.Close()
	}
	if s.last, s.disk = l, disk; s.over {
		l.Close()
		s.last = nil
	}
}

// fix replaces blocks of the last look, and says in h.Mask which.
func (s *scrubServer) fix(h *scrubHead, data []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.last == nil || s.disk != h.Disk || s.last.Chunk != h.First {
		return fmt.Errorf("chunk %d of disk %d was not looked at", h.First, h.Disk)
	}
	var done uint32
	for b := range s.last.Blocks {
		if h.Mask&(1<<b) == 0 {
			continue
		}
		if len(data) < blockstore.BlockSize {
			return errors.New("too little data for the blocks that are to be replaced")
		}
		ok, err := s.last.Replace(b, data[:blockstore.BlockSize])
		if err != nil {
			return err
		}
		if ok {
			done |= 1 << b
		}
		data = data[blockstore.BlockSize:]
	}
	h.Mask = done
	return s.stores[h.Disk].Flush() // at once, see lookOnce
}

// close forgets what was looked at.
func (s *scrubServer) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.over = true
	if s.last != nil {
		s.last.Close()
		s.last = nil
	}
}

// takeScrub answers a question of the primary, in a goroutine of its own.
func (st *standby) takeScrub(m peer.Message) error {
	h, data, err := decodeScrub(m.Payload)
	if err != nil {
		return err
	}
	data = bytes.Clone(data)
	st.goWork(func() { st.scrub.answer(st.ctx, h, data) })
	return nil
}

// newScrubServer is made when the primary has spoken.
func (st *standby) newScrubServer() *scrubServer {
	s := &scrubServer{stores: st.inst.stores, send: st.sendKind, keep: func(b []byte) error { return keepReport(st.s.cfg.Dir, b) }}
	if st.target == nil {
		s.inPlace = st.awaitApplied
	}
	return s
}

// awaitApplied waits until an epoch is applied here.
func (st *standby) awaitApplied(ctx context.Context, e model.Epoch) error {
	for {
		st.appliedMu.Lock()
		got, more := st.appliedTo, st.appliedMore
		st.appliedMu.Unlock()
		if got >= e {
			return nil
		}
		select {
		case <-more:
		case <-st.drain:
			return errors.New("the session is over")
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// noteApplied wakes who waits for an epoch.
func (st *standby) noteApplied(e model.Epoch) {
	st.appliedMu.Lock()
	defer st.appliedMu.Unlock()
	st.appliedTo = e
	close(st.appliedMore)
	st.appliedMore = make(chan struct{})
}
