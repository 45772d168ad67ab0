package peer

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	urgentQueue = 64                     // urgent notes waiting on one link
	pongQueue   = 8                      // heartbeats waiting to be answered on one link
	batchMax    = 32 << 10               // small frames written in one go
	smallFrame  = 8 << 10                // frames up to here are copied into a batch
	byeTime     = 100 * time.Millisecond // for a goodbye to leave and the peer to close
	directMax   = 16 << 10               // data on the way up to which a sender may write itself: any socket has room for more

	// ackDelay is how long an acknowledgement may wait for a frame to travel with. It must be far below hedgeMin.
	ackDelay = 2 * time.Millisecond
)

// link is one availability link of a session: at most one connection at a time,
// with a reader and a writer. The session's lock protects everything but the
// atomics. gen tells the connections of a link apart.
type link struct {
	s    *Session
	idx  int
	wake *sync.Cond // on s.mu: the writer has something to do

	up    bool
	gen   uint64
	conn  *linkConn
	raw   *net.TCPConn
	down  chan struct{} // closed when the present connection is given up
	heard *atomic.Int64 // of the present connection

	// What the writer takes from, in this order.
	bye     []byte
	urgent  [][]byte
	pongs   []pong
	ackDue  bool
	ackSoon bool        // goes with whatever goes next; ackDue when the timer fires
	ackTime *time.Timer // made when it is first needed
	ackSet  bool        // it runs
	pingDue bool
	prio    []*outFrame // small messages on all links, hedges

	fly       []flight // data handed to this connection and not acknowledged on it
	sentData  uint64   // bytes of data frames handed to this connection
	ackedData uint64   // of these, read by the peer
	recvData  uint64   // bytes of data frames read from this connection
	toldData  uint64   // of these, acknowledged
	cap       int64    // data bytes that may be on the way, see adapt
	capHit    bool

	nextPing  time.Duration
	pingSeq   uint64
	pingAsked time.Duration // when pingDue was set
	pingOpen  time.Duration // when the oldest unanswered ping was sent; 0: none
	pingLow   uint64        // its number
	rtt       time.Duration // smoothed
	rttMin    time.Duration // lowest lately
	rttSlot   time.Duration // lowest since slotAt
	slotAt    time.Duration
	pace      time.Duration // rtt, or the age of an unanswered ping if that is more
	avoid     bool          // no bulk data: much slower than the best link

	sentBytes int64
	recvBytes atomic.Int64
}

type pong struct{ seq, stamp uint64 }

func newLink(s *Session, idx int) *link {
	l := &link{s: s, idx: idx}
	l.wake = sync.NewCond(&s.mu)
	return l
}

// attach takes a connection whose handshake and hello are done into service,
// instead of an older one of the same link. br holds what was read beyond the
// hello. It returns a channel that is closed when the connection is given up,
// or nil if the session is lost (then the connection is closed).
func (l *link) attach(c *linkConn) <-chan struct{} {
	s := l.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cause != nil || s.checkSilence(Now()) {
		c.raw.Close()
		return nil
	}
	if l.up {
		l.drop("replaced by a new connection", false)
	}
	now := Now()
	c.bind(s)
	l.up, l.conn, l.raw, l.heard = true, c, c.raw, &c.heard
	l.gen++
	l.down = make(chan struct{})
	l.urgent, l.pongs, l.prio, l.fly = nil, nil, nil, nil
	l.sentData, l.ackedData, l.recvData, l.toldData = 0, 0, 0, 0
	l.cap, l.capHit = capFirst, false
	l.nextPing, l.pingOpen, l.pingDue, l.ackDue, l.ackSoon = now, 0, false, true, false
	l.rtt, l.rttMin, l.rttSlot, l.slotAt, l.pace, l.avoid = 0, 0, 0, now, 0, false
	s.log.Info("peer link up", "link", l.idx, "remote", c.raw.RemoteAddr().String())
	s.wg.Add(2)
	go l.read(c, l.gen)
	go l.write(c, l.gen)
	poke(s.kick)
	return l.down
}

// drop gives up the present connection, under the lock. Frames that were only
// on it go to the others at once. died says that the peer's kernel closed it.
func (l *link) drop(why string, died bool) {
	if !l.up {
		return
	}
	s := l.s
	l.up = false
	l.raw.Close()
	close(l.down)
	bit := uint8(1) << l.idx
	var alone []*outFrame
	lose := func(f *outFrame) {
		if f.links&bit == 0 {
			return
		}
		f.links &^= bit
		if !f.acked && f.links == 0 {
			alone = append(alone, f)
		}
	}
	for _, e := range l.fly {
		lose(e.f)
	}
	for _, f := range l.prio {
		lose(f)
	}
	l.fly, l.prio, l.urgent, l.pongs = nil, nil, nil, nil
	s.out.orphan(alone)
	others := false
	for _, o := range s.links {
		o.wake.Broadcast()
		others = others || o.up
	}
	s.log.Warn("peer link down", "link", l.idx, "reason", why, "frames_to_resend", len(alone))
	if !others && died && s.cause == nil {
		// Nothing is left, and it was not the network that went quiet: the kernel
		// of the peer closed what its process held.
		s.lose(&LostError{Cause: CauseDied, Detail: why}, 0, "")
	}
}

// end is drop for a lost session: the writer says goodbye if it still can.
func (l *link) end(bye []byte) {
	if !l.up {
		return
	}
	l.bye = bye
	_ = l.raw.SetDeadline(time.Now().Add(byeTime)) // fails only on a closed socket
	l.wake.Broadcast()
}

// give queues a frame for this link before bulk data. The caller wakes the writer.
func (l *link) give(f *outFrame) {
	f.links |= 1 << l.idx
	l.prio = append(l.prio, f)
}

// failed ends the connection of generation gen because of err, under the lock.
func (l *link) failed(gen uint64, err error) {
	s := l.s
	if l.gen != gen || !l.up {
		return
	}
	if s.cause != nil {
		l.up = false
		l.raw.Close()
		close(l.down)
		l.wake.Broadcast()
		return
	}
	if errors.Is(err, errProtocol) {
		s.lose(&LostError{Cause: CauseProtocol, Detail: err.Error()}, codeBroken, err.Error())
		return // the reader sees this too and ends by the deadline
	}
	died := errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
	l.drop(err.Error(), died)
}

// read is the reader of one connection.
func (l *link) read(c *linkConn, gen uint64) {
	defer l.s.wg.Done()
	head := make([]byte, headerLen)
	br := bufio.NewReaderSize(c.r, 4<<10) // small: payloads go past it
	for {
		h, payload, err := readFrame(br, head, l.s.pool.get)
		if err == nil {
			l.recvBytes.Add(int64(headerLen + len(payload)))
			err = l.handle(h, payload, gen)
		}
		if err != nil {
			l.s.mu.Lock()
			l.failed(gen, err)
			l.s.mu.Unlock()
			if errors.Is(err, errProtocol) {
				continue // only to let the goodbye out; ends at the deadline
			}
			return
		}
	}
}

// handle acts on one frame.
func (l *link) handle(h header, payload []byte, gen uint64) error {
	s := l.s
	now := Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cause != nil || l.gen != gen || !l.up {
		return nil // only waiting for the peer to close
	}
	// A process that was frozen finds old frames here: not one is believed.
	if s.checkSilence(now) {
		return nil
	}
	switch h.typ {
	case typeData:
		return l.handleData(h, payload, now)
	case typeAck:
		return l.handleAck(payload, now)
	case typePing:
		if len(payload) < 8 {
			return fmt.Errorf("read ping of %d bytes: %w", len(payload), errFrame)
		}
		if len(l.pongs) < pongQueue {
			l.pongs = append(l.pongs, pong{h.seq, binary.BigEndian.Uint64(payload)})
			l.wake.Signal()
		}
		return l.handleAck(payload[8:], now)
	case typePong:
		if len(payload) != 8 {
			return fmt.Errorf("read pong of %d bytes: %w", len(payload), errFrame)
		}
		return l.handlePong(h.seq, binary.BigEndian.Uint64(payload), now)
	case typeUrgent:
		if s.urgentIn.fresh(h.seq) && s.cfg.Urgent != nil {
			s.mu.Unlock()
			defer s.mu.Lock()
			s.cfg.Urgent(h.kind, payload)
		}
		return nil
	case typeBye:
		code, text, err := parseCode(payload)
		if err != nil {
			return err
		}
		cause := CauseGone
		if code == codeClosed {
			cause = CauseClosed
		}
		s.lose(&LostError{Cause: cause, Detail: text}, 0, "")
		return nil
	}
	return fmt.Errorf("read frame of type %d in a running session: %w", h.typ, errProtocol)
}

func (l *link) handleData(h header, payload []byte, now time.Duration) error {
	s := l.s
	l.recvData += uint64(headerLen + len(payload))
	fresh, whole, err := s.in.accept(h, payload, now)
	if err != nil {
		return err
	}
	if !fresh {
		s.pool.put(payload)
	}
	if whole {
		poke(s.arrived)
	}
	switch {
	case l.recvData-l.toldData >= ackEvery:
		l.ackDue = true
		l.wake.Signal()
	case !fresh || h.flags&flagLast != 0:
		l.ackLater()
	}
	return nil
}

// ackLater has what was read acknowledged with the next frame, at the latest in
// ackDelay: most messages are answered before, and a frame less is a system call
// and a wake-up less on either side.
func (l *link) ackLater() {
	l.ackSoon = true
	switch {
	case l.ackSet:
		return
	case l.ackTime == nil:
		l.ackTime = time.AfterFunc(ackDelay, l.ackNow)
	default:
		l.ackTime.Reset(ackDelay)
	}
	l.ackSet = true
}

func (l *link) ackNow() {
	l.s.mu.Lock()
	defer l.s.mu.Unlock()
	l.ackSet = false
	if l.ackSoon && l.up {
		l.ackDue = true
		l.wake.Signal()
	}
}

func (l *link) handleAck(payload []byte, now time.Duration) error {
	s := l.s
	a, err := parseAck(payload)
	if err != nil {
		return err
	}
	if a.linkBytes > l.sentData {
		return fmt.Errorf("take ack of %d bytes on a link, sent %d: %w", a.linkBytes, l.sentData, errProtocol)
	}
	if a.linkBytes > l.ackedData {
		l.ackedData = a.linkBytes
		n := 0
		for n < len(l.fly) && l.fly[n].end <= a.linkBytes {
			l.fly[n].f.links &^= 1 << l.idx
			l.fly[n] = flight{}
			n++
		}
		l.fly = l.fly[n:]
		l.wake.Signal()
	}
	moved, bad := s.out.ack(a, &s.pool)
	if bad {
		return fmt.Errorf("take ack up to %d, sent up to %d: %w", a.next, s.out.next(), errProtocol)
	}
	if moved {
		poke(s.credit)
	}
	return nil
}

// handlePong measures the round trip, which includes waiting behind bulk data
// on either side: it is what a heartbeat experiences.
func (l *link) handlePong(seq, stamp uint64, now time.Duration) error {
	sample := now - time.Duration(stamp)
	if sample < 0 || seq > l.pingSeq {
		return fmt.Errorf("read pong %d sent %v ahead: %w", seq, -sample, errProtocol)
	}
	if l.pingOpen != 0 && seq >= l.pingLow {
		l.pingOpen = 0
	}
	if l.rtt == 0 {
		l.rtt = sample
	} else {
		l.rtt += (sample - l.rtt) / 4
	}
	if l.rttSlot == 0 || sample < l.rttSlot {
		l.rttSlot = sample
	}
	if now-l.slotAt > 5*time.Second || l.rttMin == 0 {
		l.rttMin, l.rttSlot, l.slotAt = l.rttSlot, sample, now
	}
	l.rttMin = min(l.rttMin, sample)
	l.adapt(sample)
	return nil
}

// adapt sets how much data may be on the way: as much as the link takes without
// delaying heartbeats by more than some milliseconds. Kernel and switch buffers
// hold far more, and everything urgent would queue behind it.
func (l *link) adapt(sample time.Duration) {
	switch {
	case sample > l.rttMin+queueDelay:
		l.cap = max(capFloor, l.cap*3/4)
	case l.capHit:
		l.cap = min(capCeiling, l.cap+l.cap/4)
	}
	l.capHit = false
}

// write is the writer of one connection.
func (l *link) write(c *linkConn, gen uint64) {
	s := l.s
	defer s.wg.Done()
	s.mu.Lock()
	defer s.mu.Unlock()
	for l.gen == gen && l.up {
		switch {
		case c.writing: // a sender does; it wakes this one if there is more
			l.wake.Wait()
		case s.cause != nil:
			bye := l.bye
			s.mu.Unlock()
			c.leave(bye)
			s.mu.Lock()
			return
		case !l.writeOnce(c, gen):
			l.wake.Wait()
		}
	}
}

// writeOnce writes what is due, as far as it goes in one piece, and reports whether there was
// anything. Under the lock, which is given up meanwhile; nobody else is writing.
func (l *link) writeOnce(c *linkConn, gen uint64) bool {
	s := l.s
	batch, big := l.gather(c.batch[:0], Now)
	c.batch = batch
	if len(batch) == 0 && big == nil {
		return false
	}
	l.sentBytes += int64(len(batch))
	var body []byte
	if big != nil {
		body = big.buf
		l.sentBytes += int64(len(body))
	}
	c.writing = true
	s.mu.Unlock()
	err := c.writeAll(batch, body)
	s.mu.Lock()
	c.writing = false
	if big != nil {
		big.written(&s.pool)
	}
	if err != nil {
		l.failed(gen, err)
	}
	return true
}

// signal wakes the writer, unless whoever writes now does when it is done.
func (l *link) signal() {
	if !l.up || !l.conn.writing {
		l.wake.Signal()
	}
}

// turn is the right to write to a connection, in the place of its writer.
type turn struct {
	l   *link
	c   *linkConn
	gen uint64
}

// takeTurn is called under the lock when direct says so.
func (l *link) takeTurn() *turn {
	l.conn.writing = true
	return &turn{l, l.conn, l.gen}
}

// write writes what is due, and ends the turn.
func (t *turn) write() {
	l, s := t.l, t.l.s
	s.mu.Lock()
	defer s.mu.Unlock()
	t.c.writing = false
	if l.gen == t.gen && l.up && s.cause == nil {
		l.writeOnce(t.c, t.gen)
	}
	if l.busy() {
		l.wake.Signal()
	}
}

// direct reports whether a sender may write a small frame itself: its socket takes
// it without waiting, and nothing is before it. A message then needs no
// other goroutine to leave, which wakes up late while the sender goes on with its work.
func (l *link) direct() bool {
	return l.up && !l.avoid && !l.conn.writing && l.s.cause == nil && int64(l.sentData-l.ackedData) <= directMax
}

// busy reports whether the writer has something to do.
func (l *link) busy() bool {
	return len(l.urgent) > 0 || len(l.pongs) > 0 || l.ackDue || l.pingDue || len(l.prio) > 0 || l.s.out.pending() || l.s.cause != nil
}

// gather collects what is to be written next, most urgent first: small frames
// into b, at most one large data frame beside it.
func (l *link) gather(b []byte, clock func() time.Duration) ([]byte, *outFrame) {
	s := l.s
	for _, u := range l.urgent {
		b = append(b, u...)
	}
	l.urgent = l.urgent[:0]
	for _, p := range l.pongs {
		b = appendFrame(b, header{typ: typePong, seq: p.seq}, binary.BigEndian.AppendUint64(nil, p.stamp))
	}
	l.pongs = l.pongs[:0]
	if l.pingDue || l.ackDue || l.ackSoon && (len(b) > 0 || len(l.prio) > 0 || s.out.pending()) {
		block := s.in.block(l.recvData)
		s.told, l.toldData = max(s.told, block.limit), l.recvData
		if l.pingDue {
			now := clock()
			l.pingSeq++
			if l.pingOpen == 0 {
				l.pingOpen, l.pingLow = now, l.pingSeq
			}
			p := appendAck(binary.BigEndian.AppendUint64(nil, uint64(now)), block)
			b = appendFrame(b, header{typ: typePing, seq: l.pingSeq}, p)
		} else {
			b = appendFrame(b, header{typ: typeAck}, appendAck(nil, block))
		}
		l.pingDue, l.ackDue, l.ackSoon = false, false, false
	}
	var now time.Duration
	for len(b) < batchMax {
		f := l.pick()
		if f == nil {
			break
		}
		if now == 0 {
			now = clock()
		}
		f.links |= 1 << l.idx
		l.sentData += uint64(len(f.buf))
		l.fly = append(l.fly, flight{f: f, end: l.sentData, at: now})
		if len(f.buf) > smallFrame {
			f.writers++
			return b, f
		}
		b = append(b, f.buf...)
	}
	return b, nil
}

// pick returns the next data frame for this link, or nil.
func (l *link) pick() *outFrame {
	for len(l.prio) > 0 {
		f := l.prio[0]
		l.prio[0] = nil
		l.prio = l.prio[1:]
		if !f.acked {
			return f
		}
		f.links &^= 1 << l.idx
	}
	s := l.s
	if !s.out.pending() {
		return nil
	}
	if int64(l.sentData-l.ackedData) >= l.cap {
		l.capHit = true
		return nil
	}
	if l.avoid {
		return nil
	}
	if f := s.out.again(); f != nil {
		return f
	}
	return s.out.unsent()
}
