// Package mirror keeps the disks of a VM the same on two hosts, write by write
// (protection level ca): a Source carries out the guest's requests on the local
// replica and sends them to a Target on the other host, which carries them out on
// its own; the guest is answered when both have them, and a FLUSH, or a write
// with FUA, when it is durable on both. Reads are local. A disk whose replica on this
// side has failed is carried: the Target's serves it alone, reads included.
//
// Order: requests that overlap are in flight one after the other, so that both
// replicas see them in one order; others have none, and need none: a FLUSH only
// covers what was answered before, and that is on both sides.
//
// Concurrency: all methods may be called from any goroutine, but Target.Take,
// which takes the messages of one stream in their order. There is no goroutine
// in a Source, but for a change that waits for its owner; a Target has one for each request that may take long.
//
// Failure: a Source whose peer is gone answers no change until Alone says that
// the peer does not count any more: nothing that only one side has is
// acknowledged before that was decided. A change that fails on this side is
// answered when the peer has carried it out and Carry says that this is enough,
// if the Owner agrees to give the replica up; else with its error. A Target that
// cannot carry a change out says so to its owner and answers nothing any more.
//
// It does not guarantee that both replicas are equal while a request is in
// flight, nor after a crash of either side: what may differ then is what was
// never answered, or never flushed. It does not decide anything, and it does not
// fill a replica: see Join.
package mirror

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Replica is one side's copy of one disk; blockstore.Volume is one.
type Replica interface {
	Size() int64
	ReadAt(ctx context.Context, p []byte, off int64) error
	WriteAt(ctx context.Context, p []byte, off int64, fua bool) error
	Zero(ctx context.Context, off, n int64, fua, punch bool) error
	Flush(ctx context.Context) error
	Extent(ctx context.Context, off, n int64) (length int64, hole bool, err error)
}

// Send puts one message, the concatenation of parts, into the stream to the
// peer, behind all earlier ones. It keeps none of the parts. After an error
// nothing more is sent.
type Send func(parts ...[]byte) error

// The operations of a request on the wire.
const (
	opWrite uint8 = 1 + iota
	opZero
	opFlush
	opRead // answered by a message of its own; sees every request that was sent before
)

// Flags of a request on the wire.
const (
	flagFUA uint8 = 1 << iota
	flagPunch
	flagMore // a further piece of the same request follows; only the last is answered
)

// head opens each request on the wire, little endian; the data of a write follows.
type head struct {
	ID    uint64
	Off   int64
	Len   int64
	Disk  uint32
	Op    uint8
	Flags uint8
	_     uint16
}

var headSize = binary.Size(head{})

// maxPiece bounds the data of one message, in bytes.
const maxPiece = 1 << 20

// ErrClosed answers requests of a Source that was closed.
var ErrClosed = fmt.Errorf("the mirror is closed: %w", syscall.ESHUTDOWN)

// Source is the running side: all disks of one VM.
type Source struct {
	// gate is held shared by each change from start to end, and exclusively by
	// Join, so that a change is either before it or goes to both sides.
	gate    sync.RWMutex
	link    atomic.Pointer[link]      // nil: alone
	exports atomic.Pointer[[]*Export] // changed with gate held shared, and mu; see Add
	closed  chan struct{}
	once    sync.Once
	owner   Owner

	mu    sync.Mutex    // guards changes of Export.local, and the order of the owner's news
	carry chan struct{} // guarded by mu; closed while the peer alone may do
}

// NewSource returns a Source of these replicas that is alone: changes go to
// them only.
func NewSource(replicas []Replica) *Source {
	s := &Source{closed: make(chan struct{}), carry: make(chan struct{})}
	exports := make([]*Export, 0, len(replicas))
	for n, r := range replicas {
		exports = append(exports, s.newExport(n, r))
	}
	s.exports.Store(&exports)
	return s
}

// newExport is disk n with a whole replica on this side.
func (s *Source) newExport(n int, r Replica) *Export {
	e := &Export{s: s, size: r.Size()}
	e.n.Store(int64(n))
	e.local.Store(&local{r: r, reads: true})
	e.overlap.Store(new(ranges))
	return e
}

// Export is disk n as the guest sees it.
func (s *Source) Export(n int) *Export { return s.disks()[n] }

func (s *Source) disks() []*Export { return *s.exports.Load() }

// Join has every change from now on go to the peer too. rest runs before the
// first of them, while no change is under way: it puts into the same stream
// what the peer still lacks. Guest requests wait meanwhile, so rest should be short.
// After an error the Source is alone, as before.
func (s *Source) Join(send Send, rest func() error) error {
	s.gate.Lock()
	defer s.gate.Unlock()
	if s.link.Load() != nil {
		return errors.New("join a mirror that has a peer already")
	}
	if err := rest(); err != nil {
		return err
	}
	s.link.Store(&link{send: send, waiting: map[uint64]*pending{}, alone: make(chan struct{})})
	return nil
}

// Alone says that the peer does not count any more: what waits for it is
// answered, and changes go to the local replicas only. Only who has the right
// to go on without the peer may call it. It waits for nothing, and may be
// called again.
func (s *Source) Alone() {
	if l := s.link.Swap(nil); l != nil {
		s.mu.Lock()
		s.restore()
		s.mu.Unlock()
		close(l.alone)
		l.callAll(nil)
	}
}

// Joined reports whether changes go to a peer.
func (s *Source) Joined() bool { return s.link.Load() != nil }

// Done takes an answer of the peer. Answers of a peer before Alone are ignored.
func (s *Source) Done(payload []byte) error {
	if len(payload)%8 != 0 {
		return fmt.Errorf("answer of a mirror: %d bytes", len(payload))
	}
	l := s.link.Load()
	if l == nil {
		return nil
	}
	for ; len(payload) > 0; payload = payload[8:] {
		if err := l.answered(binary.LittleEndian.Uint64(payload)); err != nil {
			return err
		}
	}
	return nil
}

// Oldest is for how long the peer has owed the answer to a request, 0 if it owes none.
func (s *Source) Oldest() time.Duration {
	if l := s.link.Load(); l != nil {
		return l.oldest(time.Now())
	}
	return 0
}

// Close fails all requests that wait, and all later changes.
func (s *Source) Close() {
	s.once.Do(func() {
		close(s.closed)
		if l := s.link.Load(); l != nil {
			l.callAll(ErrClosed)
		}
	})
}

// link is one peer, from Join to Alone.
type link struct {
	send  Send
	alone chan struct{} // closed by Alone

	// order is held from giving a request its number to having sent all of it.
	order sync.Mutex
	next  atomic.Uint64 // written with order held

	mu      sync.Mutex
	waiting map[uint64]*pending
}

type pending struct {
	id    uint64
	since time.Time
	buf   []byte // of a read: where the answer is put
	err   error  // of a read, once done is closed
	done  chan struct{}
	then  func(error) // of StartWrite, guarded by link.mu: called by who takes it from here
}

func (l *link) answered(id uint64) error {
	l.mu.Lock()
	p := l.waiting[id]
	if p == nil || p.buf != nil {
		l.mu.Unlock()
		return fmt.Errorf("answer to request %d of a mirror, which is not under way", id)
	}
	delete(l.waiting, id)
	then := p.then
	p.then = nil
	close(p.done)
	l.mu.Unlock()
	if then != nil {
		then(nil)
	}
	return nil
}

func (l *link) oldest(now time.Time) (d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, p := range l.waiting {
		d = max(d, now.Sub(p.since))
	}
	return d
}

// begin sends a request; buf is where the answer to a read is put. It does not tell whether that failed: whoever finds the
// stream broken tells the owner, who decides, and until then nothing is answered. Its error is that of a context that
// has ended: a client that was cut off asks anew, and nothing of before comes behind that in the stream.
func (l *link) begin(ctx context.Context, h head, data, buf []byte) (*pending, error) {
	p := &pending{since: time.Now(), buf: buf, done: make(chan struct{})}
	l.order.Lock()
	defer l.order.Unlock()
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	h.ID = l.next.Add(1)
	p.id = h.ID
	l.mu.Lock()
	l.waiting[h.ID] = p
	l.mu.Unlock()
	for off := h.Off; int64(len(data)) > maxPiece; data = data[maxPiece:] {
		piece := h
		piece.Off, piece.Len, piece.Flags = off, maxPiece, h.Flags&^flagFUA|flagMore
		if l.send(piece.encode(), data[:maxPiece]) != nil {
			return p, nil
		}
		off += maxPiece
		h.Off, h.Len = off, h.Len-maxPiece
	}
	_ = l.send(h.encode(), data) // see above
	return p, nil
}

func (h head) encode() []byte {
	b, err := binary.Append(make([]byte, 0, headSize), binary.LittleEndian, h)
	if err != nil {
		panic("encode head of a mirrored request: " + err.Error()) // it has a fixed size
	}
	return b
}

// change carries a change out on both sides.
func (e *Export) change(ctx context.Context, h head, data []byte, do func(Replica) error) error {
	s := e.s
	s.gate.RLock()
	y := &stay{s: s}
	defer y.leave()
	if s.isClosed() {
		return ErrClosed
	}
	l := s.link.Load()
	if l == nil {
		here := e.local.Load()
		if here.r == nil {
			return here.err
		}
		return do(here.r)
	}
	h.Disk = uint32(e.n.Load()) // now, under the gate: the number may have changed before there was a peer
	o := e.overlap.Load()
	if h.Op != opFlush {
		held, err := o.lock(ctx, h.Off, h.Off+h.Len)
		if errors.Is(err, errGivenUp) {
			return e.refuse(ctx)
		}
		if err != nil {
			return err
		}
		defer o.unlock(held)
	}
	here := e.local.Load() // after the lock, see copyPiece
	if o.abandoned() {
		return e.refuse(ctx) // what is here by now does not know of this lock
	}
	p, err := l.begin(ctx, h, data, nil)
	if err != nil {
		return err
	}
	var again func() bool
	if h.Op == opFlush {
		again = func() bool { return e.flushed(ctx) }
	}
	if here.r == nil {
		return s.await(ctx, l, p, false, here.err, again)
	}
	err = e.in(y, here, do)
	if err != nil && !e.lose(here, err) {
		return err
	}
	return s.await(ctx, l, p, err == nil, err, again)
}

// flushed sees to a FLUSH that the peer alone has carried out, and whose disk has come back here
// meanwhile: nobody will say any more that the peer is enough. (A change holds its
// range, and no disk comes back before it has ended.)
func (e *Export) flushed(ctx context.Context) bool {
	here := e.local.Load()
	if !here.reads {
		return false
	}
	err := here.r.Flush(ctx)
	if err != nil {
		e.lose(here, err) // if nobody agrees to that, it waits for the peer's loss, and fails then
	}
	return err == nil
}

// Export is one disk of a Source; it implements nbd.Backend, nbd.Allocator, nbd.Waiter and nbd.Starter.
type Export struct {
	s       *Source
	n       atomic.Int64 // number of the disk; it does not change while there is a peer
	size    int64
	local   atomic.Pointer[local]
	overlap atomic.Pointer[ranges]
	inside  insiders
	fetched fetches
}

// Size is the disk's length in bytes.
func (e *Export) Size() int64 { return e.size }

// Waits reports whether requests wait for the peer.
func (e *Export) Waits() bool { return e.s.Joined() }

// WriteAt writes p on both sides, with fua durably.
func (e *Export) WriteAt(ctx context.Context, p []byte, off int64, fua bool) error {
	h := head{Op: opWrite, Off: off, Len: int64(len(p)), Flags: flagIf(fua, flagFUA)}
	return e.change(ctx, h, p, func(r Replica) error { return r.WriteAt(ctx, p, off, fua) })
}

// Zero makes a range read as zeroes on both sides; punch gives the space back.
func (e *Export) Zero(ctx context.Context, off, n int64, fua, punch bool) error {
	h := head{Op: opZero, Off: off, Len: n, Flags: flagIf(fua, flagFUA) | flagIf(punch, flagPunch)}
	return e.change(ctx, h, nil, func(r Replica) error { return r.Zero(ctx, off, n, fua, punch) })
}

// Flush makes everything durable on both sides that was answered before.
func (e *Export) Flush(ctx context.Context) error {
	return e.change(ctx, head{Op: opFlush}, nil, func(r Replica) error { return r.Flush(ctx) })
}

func flagIf(on bool, f uint8) uint8 {
	if on {
		return f
	}
	return 0
}
