package mirror

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Owner is told what becomes of the replicas on this side. Lost and Back are called
// in the order in which things happen, with a lock held: they must neither block
// for long nor call the Source.
type Owner struct {
	// Lost says that the replica of a disk has failed. True: it is given up, and the
	// peer's serves the disk from now on; what only the peer holds is answered after
	// Carry(true). False: the error is the guest's affair.
	Lost func(disk int, err error) bool
	// Back says that every disk has a whole replica here again, and that from now on
	// nothing is answered that this side does not hold, until Carry(true).
	Back func()
	// Pace, where there is one, is told of each piece that Refill has copied, and returns
	// when the next may come; with an error the refill ends with it. bytes: what of it was
	// no hole. Unlike the others it is called without a lock, and may take its time.
	Pace func(ctx context.Context, disk int, bytes int64) error
}

// local is what this side has of a disk. It does not change; another one takes its place.
type local struct {
	r     Replica // gets every change; nil: there is none
	reads bool    // and has all of them: it answers reads
	err   error   // why it was given up
	was   Replica // what was given up
}

// ErrUnreadable says that the peer cannot read something either; it wraps EIO.
var ErrUnreadable = fmt.Errorf("the other host cannot read it either: %w", syscall.EIO)

// errNoPeer answers what needs the peer while there is none.
var errNoPeer = errors.New("there is no peer to read from")

// Own makes o the owner. It is called before the first request.
func (s *Source) Own(o Owner) { s.owner = o }

// Carry allows that a change is answered when only the peer has it, or not.
func (s *Source) Carry(on bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.setCarry(on)
}

// setCarry is Carry with mu held. carry is closed while it is allowed.
func (s *Source) setCarry(on bool) {
	select {
	case <-s.carry:
		if !on {
			s.carry = make(chan struct{})
		}
	default:
		if on {
			close(s.carry)
		}
	}
}

// mayCarry is closed while it is allowed.
func (s *Source) mayCarry() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.carry
}

// Carried lists the disks that have no whole replica on this side.
func (s *Source) Carried() (disks []int) {
	for n, e := range s.disks() {
		if !e.local.Load().reads {
			disks = append(disks, n)
		}
	}
	return disks
}

// lose gives the replica l of e up, if the owner agrees; once.
func (e *Export) lose(l *local, err error) bool {
	s := e.s
	s.mu.Lock()
	defer s.mu.Unlock()
	switch now := e.local.Load(); {
	case now != l:
		return !now.reads // somebody else has seen it fail
	case s.link.Load() == nil:
		return false // there is nobody to go on with; restore has taken back what was given up
	case s.owner.Lost == nil, errors.Is(err, syscall.EINVAL), errors.Is(err, context.Canceled), errors.Is(err, syscall.ESHUTDOWN):
		return false
	case errors.Is(err, ErrUnreadable), errors.Is(err, errNoPeer):
		return false // giving this replica up would help nobody
	case l.reads && !s.owner.Lost(int(e.n.Load()), err):
		return false
	}
	e.local.Store(&local{err: err, was: l.r})
	return true
}

// GiveUp gives the replica of a disk up that does not answer any more. What waits
// for it waits on, but what comes from now on does not wait for that.
func (s *Source) GiveUp(n int, err error) bool {
	e := s.disks()[n]
	l := e.local.Load()
	if l.r == nil || !e.lose(l, err) {
		return false
	}
	// What waits is asked anew, by a client that is cut off now: it must not come after that.
	e.overlap.Load().abandon()
	e.overlap.Store(new(ranges))
	return true
}

// errGivenUp answers what waited for a replica that was given up.
var errGivenUp = fmt.Errorf("the replica was given up meanwhile: %w", syscall.ESHUTDOWN)

// refuse ends a change that is asked anew elsewhere. Nobody is to hear an error of
// it, so it waits, for a while, until its client is cut off.
func (e *Export) refuse(ctx context.Context) error {
	t := time.NewTimer(refuseAfter)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-e.s.closed:
		return ErrClosed
	case <-t.C:
		return errGivenUp
	}
}

// refuseAfter is how long a client may take to be cut off.
const refuseAfter = 5 * time.Second

// stay is a change that holds the gate of its Source.
type stay struct {
	s    *Source
	left atomic.Bool
}

// leave gives the gate back, once.
func (y *stay) leave() {
	if y.left.CompareAndSwap(false, true) {
		y.s.gate.RUnlock()
	}
}

// insiders are the changes that a local replica is carrying out. When another one has
// taken its place, those that still stand in it hold up nobody any more: whatever
// becomes of them, nothing counts on that replica, and they were sent to the peer before.
type insiders struct {
	mu   sync.Mutex
	list map[*stay]*local
}

// in runs do, which may never return.
func (e *Export) in(y *stay, here *local, do func(Replica) error) error {
	i := &e.inside
	i.mu.Lock()
	if i.list == nil {
		i.list = map[*stay]*local{}
	}
	i.list[y] = here
	i.mu.Unlock()
	if now := e.local.Load(); now != here && now.reads {
		y.leave() // it comes too late to be forgotten
	}
	err := do(here.r)
	i.mu.Lock()
	delete(i.list, y)
	i.mu.Unlock()
	return err
}

// forgetAll lets all who are inside leave. No change of the replica that counts is under way.
func (i *insiders) forgetAll() {
	i.mu.Lock()
	defer i.mu.Unlock()
	for y := range i.list {
		y.leave()
	}
}

// restore takes back what was given up while nothing had been carried. mu is held.
func (s *Source) restore() {
	select {
	case <-s.carry:
		return
	default:
	}
	for _, e := range s.disks() {
		if l := e.local.Load(); l.r == nil {
			e.local.Store(&local{r: l.was, reads: true})
		}
	}
}

// await waits until the peer has carried p out; and, unless held here, until that
// is enough, or is held here after all: again, if it is not nil, sees to that.
func (s *Source) await(ctx context.Context, l *link, p *pending, held bool, failure error, again func() bool) error {
	done := p.done
	for {
		var carry <-chan struct{}
		if done == nil {
			if held {
				return nil
			}
			carry = s.mayCarry() // before again looks
			if again != nil && again() {
				return nil
			}
		}
		select {
		case <-done:
			done = nil
		case <-carry:
			return nil
		case <-l.alone:
			return failure
		case <-s.closed:
			return ErrClosed
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// ReadAt reads from the local replica, and from the peer where that has failed.
func (e *Export) ReadAt(ctx context.Context, p []byte, off int64) error {
	l := e.local.Load()
	if l.reads {
		err := l.r.ReadAt(ctx, p, off)
		if err == nil || !e.s.Joined() || !e.lose(l, err) {
			return err
		}
	}
	err := e.readPeer(ctx, p, off)
	if now := e.local.Load(); errors.Is(err, errNoPeer) && now.reads {
		return now.r.ReadAt(ctx, p, off) // taken back
	} else if errors.Is(err, errNoPeer) && now.err != nil {
		return now.err
	}
	return err
}

// readPeer reads what the peer has, as of everything that was sent before.
func (e *Export) readPeer(ctx context.Context, p []byte, off int64) error {
	s := e.s
	l := s.link.Load()
	if l == nil {
		return errNoPeer
	}
	var asked []*pending
	defer func() {
		for _, a := range asked {
			l.forget(a)
		}
	}()
	for len(p) > 0 {
		n := min(len(p), maxPiece)
		a, err := l.begin(ctx, head{Op: opRead, Disk: uint32(e.n.Load()), Off: off, Len: int64(n)}, nil, p[:n])
		if err != nil {
			return err
		}
		asked = append(asked, a)
		p, off = p[n:], off+int64(n)
	}
	for _, a := range asked {
		if err := s.await(ctx, l, a, true, errNoPeer, nil); err != nil {
			return err
		}
		if a.err != nil {
			return a.err
		}
	}
	return nil
}

// Fetch gets blocks that are damaged on this side from the peer, in the order of
// the stream of writes; blockstore.Volume.SetFetch takes it. A block that comes
// here again and again cannot be repaired: then the replica is given up.
func (e *Export) Fetch(p []byte, off int64) error {
	if !e.s.Joined() {
		return errNoPeer
	}
	if e.fetched.often(off) {
		l := e.local.Load()
		e.lose(l, fmt.Errorf("block at %d is damaged again and again: %w", off, syscall.EIO))
	}
	return e.readPeer(context.Background(), p, off)
}

// fetches counts how often blocks were fetched lately.
type fetches struct {
	mu    sync.Mutex
	since time.Time
	count map[int64]int
}

// Within fetchSpan a block may be fetched fetchOften times, and fetchMany
// different ones, before the replica counts as failed.
const (
	fetchSpan  = 10 * time.Minute
	fetchOften = 6
	fetchMany  = 4096
)

func (f *fetches) often(off int64) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.count == nil || time.Since(f.since) > fetchSpan {
		f.since, f.count = time.Now(), map[int64]int{}
	}
	f.count[off]++
	return f.count[off] > fetchOften || len(f.count) > fetchMany
}

// Extent tells data from holes, of the local replica; where that has failed all is data.
func (e *Export) Extent(ctx context.Context, off, n int64) (int64, bool, error) {
	l := e.local.Load()
	if !l.reads {
		return n, false, nil
	}
	length, hole, err := l.r.Extent(ctx, off, n)
	if err != nil && e.s.Joined() && e.lose(l, err) {
		return n, false, nil
	}
	return length, hole, err
}

// forget takes back the place where an answer would be put.
func (l *link) forget(p *pending) {
	l.mu.Lock()
	_, open := l.waiting[p.id]
	delete(l.waiting, p.id)
	l.mu.Unlock()
	if !open && p.buf != nil {
		<-p.done // it may just be filled
	}
}

// The status of the answer to a read.
const (
	readData   uint32 = iota // the data follows
	readZeroes               // all is zero
	readFailed               // the peer cannot read it either; what it says follows
)

// readHead opens the answer to a read, little endian.
type readHead struct {
	ID     uint64
	Status uint32
	_      uint32
}

var readHeadSize = binary.Size(readHead{})

func (h readHead) encode() []byte {
	b := binary.LittleEndian.AppendUint64(make([]byte, 0, readHeadSize), h.ID)
	return binary.LittleEndian.AppendUint32(b, h.Status)[:readHeadSize]
}

// Data takes the answer to a read. Answers of a peer before Alone are ignored.
func (s *Source) Data(payload []byte) error {
	l := s.link.Load()
	if l == nil {
		return nil
	}
	var h readHead
	if len(payload) < readHeadSize {
		return fmt.Errorf("answer to a read of a mirror: %d bytes", len(payload))
	}
	if _, err := binary.Decode(payload[:readHeadSize], binary.LittleEndian, &h); err != nil {
		return fmt.Errorf("answer to a read of a mirror: %w", err)
	}
	data := payload[readHeadSize:]
	l.mu.Lock()
	p := l.waiting[h.ID]
	delete(l.waiting, h.ID)
	issued := h.ID <= l.next.Load()
	l.mu.Unlock()
	switch {
	case p == nil && issued:
		return nil // nobody waits for it any more
	case p == nil || p.buf == nil:
		return fmt.Errorf("answer to read %d of a mirror, which is not under way", h.ID)
	}
	defer close(p.done)
	switch {
	case h.Status == readData && len(data) == len(p.buf):
		copy(p.buf, data)
	case h.Status == readZeroes && len(data) == 0:
		clear(p.buf)
	case h.Status == readFailed:
		p.err = fmt.Errorf("%w (it says: %.200s)", ErrUnreadable, bytes.ToValidUTF8(data, nil))
	default:
		p.err = syscall.EIO
		return fmt.Errorf("answer to read %d of a mirror: %d bytes of %d, status %d", h.ID, len(data), len(p.buf), h.Status)
	}
	return nil
}
