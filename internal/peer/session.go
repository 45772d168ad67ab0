package peer

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"
)

// Message is one message of the peer.
type Message struct {
	Kind     uint8         // the caller's
	Payload  []byte        // belongs to the receiver for ever; never touched again by the package
	Received time.Duration // Now() when the last byte of it was there
}

// LinkState is one link as seen from this side.
type LinkState struct {
	Index     int
	Up        bool
	RTT       time.Duration // smoothed round trip of heartbeats; 0: not measured yet
	SentBytes int64         // bytes of frames written since the session began
	RecvBytes int64         // bytes of frames read since the session began
}

// Session is the connection to the peer shim over all links.
type Session struct {
	cfg   Config
	log   *slog.Logger
	nonce nonce
	pool  bufPool
	wg    sync.WaitGroup
	lost  chan struct{}
	heard atomic.Int64 // Now() of the last bytes of the peer, any link

	sendRight chan struct{} // holds a token while nobody is sending
	credit    chan struct{} // poked when limit or acknowledgements move
	arrived   chan struct{} // poked when the inbox is not empty
	kick      chan struct{} // pokes the clerk

	mu          sync.Mutex
	established bool  // the clerk runs
	offered     bool  // handed to Accept; listener's side
	peerNonce   nonce // the listener's, on both sides
	peerHello   []byte
	links       []*link
	out         sender
	in          *receiver
	told        uint64 // highest credit limit told to the peer
	urgentOut   uint64
	patience    patience
	urgentIn    dedup
	cause       *LostError
}

// newSession makes a session without links. Its clerk starts with the first link.
func newSession(cfg Config, n nonce, links int) *Session {
	s := &Session{
		cfg: cfg, log: cfg.Log, nonce: n,
		lost:      make(chan struct{}),
		sendRight: make(chan struct{}, 1),
		credit:    make(chan struct{}, 1),
		arrived:   make(chan struct{}, 1),
		kick:      make(chan struct{}, 1),
		in:        newReceiver(cfg.Window),
	}
	s.sendRight <- struct{}{}
	s.told = s.in.limit()
	s.patience.limit.Store(int64(cfg.Silence))
	for i := range links {
		s.links = append(s.links, newLink(s, i))
	}
	return s
}

// PeerHello returns the peer's Config.Hello. The caller must not change it.
func (s *Session) PeerHello() []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.peerHello
}

// Send queues one message of at most MaxMessage bytes, the concatenation of
// parts, behind all earlier ones. It copies the parts and returns as soon as
// there is credit for the whole message; until then it blocks. It returns the
// context's error with nothing sent, or an error that is ErrLost.
func (s *Session) Send(ctx context.Context, kind uint8, parts ...[]byte) error {
	total := 0
	for _, p := range parts {
		total += len(p)
	}
	if total > MaxMessage {
		return fmt.Errorf("send message of %d bytes: %w", total, ErrTooBig)
	}
	select {
	case <-s.sendRight:
	case <-s.lost:
		return s.Cause()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	held := true
	defer func() {
		if held {
			s.sendRight <- struct{}{}
		}
	}()
	cost := int64(total) + int64(max(1, (total+maxPayload-1)/maxPayload))*frameCost(0)
	// The credit for all of it first: a message that was begun must be ended.
	for {
		s.mu.Lock()
		ok, cause, next := s.out.spent+cost <= s.out.limit, s.cause, s.out.next()
		s.mu.Unlock()
		if cause != nil {
			return cause
		}
		if ok {
			direct, err := s.push(cut(next, kind, parts, total, &s.pool), total)
			held = false
			s.sendRight <- struct{}{}
			if direct != nil {
				direct.write()
			}
			return err
		}
		select {
		case <-s.credit:
		case <-s.lost:
			return s.Cause()
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// push queues sealed frames; the caller holds the right to send. The turn that it
// returns, if any, is the caller's to take.
func (s *Session) push(fs []*outFrame, total int) (*turn, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cause != nil {
		return nil, s.cause
	}
	idle, behind := len(s.out.frames) == 0, s.out.pending()
	s.out.add(fs)
	if len(fs) == 1 && total <= redundantMax && s.out.redundant+int64(len(fs[0].buf)) <= redundantMax {
		f := fs[0]
		f.copied = true
		s.out.redundant += int64(len(f.buf))
		for _, l := range s.links {
			if l.up {
				l.give(f)
			}
		}
	}
	var mine *turn
	for _, l := range s.links {
		if mine == nil && !behind && len(fs) == 1 && total <= directMax && l.direct() {
			mine = l.takeTurn()
		} else {
			l.signal()
		}
	}
	if idle {
		poke(s.kick)
	}
	return mine, nil
}

// Recv returns the next message in order. Once the session is lost it returns
// an error that is ErrLost at once, and what was received but not yet handed
// out is had from Leftover only; but after the peer's polite Close it first
// hands out all that the peer sent before. While the session lives it compares
// Now with LastHeard before it hands anything out, so a process that was frozen
// gets ErrLost. Message.Received dates what is handed out.
func (s *Session) Recv(ctx context.Context) (Message, error) {
	for {
		s.mu.Lock()
		if s.cause == nil {
			s.checkSilence(Now())
		}
		if s.cause != nil && s.cause.Cause != CauseClosed {
			s.mu.Unlock()
			return Message{}, s.cause
		}
		m, ok := s.in.take()
		if ok {
			s.tellCredit()
			if len(s.in.inbox) > 0 {
				poke(s.arrived)
			}
			s.mu.Unlock()
			return m.message(&s.pool), nil
		}
		cause := s.cause
		s.mu.Unlock()
		if cause != nil {
			return Message{}, cause
		}
		select {
		case <-s.arrived:
		case <-s.lost:
		case <-ctx.Done():
			return Message{}, context.Cause(ctx)
		}
	}
}

// tellCredit has the best link tell the peer of new credit once it is worth a frame.
func (s *Session) tellCredit() {
	if s.in.limit()-s.told < uint64(s.cfg.Window/8) {
		return
	}
	var best *link
	for _, l := range s.links {
		if l.up && (best == nil || l.pace < best.pace) {
			best = l
		}
	}
	if best != nil {
		best.ackDue = true
		best.wake.Signal()
	}
}

// Leftover returns, once the session is lost, the messages that were received
// whole and in order but not handed out by Recv; a second call returns nothing.
// A secondary looks here for its newest complete epoch. A primary must not use
// it: an acknowledgement found here is too old to let output out.
func (s *Session) Leftover() []Message {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cause == nil {
		return nil
	}
	var out []Message
	for {
		m, ok := s.in.take()
		if !ok {
			return out
		}
		out = append(out, m.message(&s.pool))
	}
}

// Urgent sends a note of at most MaxUrgent bytes on every link that is up,
// before everything queued, outside the order of messages. It never blocks. It
// is delivered at most once and may be lost; repeat it until answered.
func (s *Session) Urgent(kind uint8, payload []byte) error {
	if len(payload) > MaxUrgent {
		return fmt.Errorf("send urgent note of %d bytes: %w", len(payload), ErrTooBig)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cause != nil {
		return s.cause
	}
	s.urgentOut++
	note := appendFrame(nil, header{typ: typeUrgent, kind: kind, seq: s.urgentOut}, payload)
	sent := false
	for _, l := range s.links {
		if !l.up {
			continue
		}
		if len(l.urgent) == urgentQueue { // the oldest is the least urgent by now
			copy(l.urgent, l.urgent[1:])
			l.urgent = l.urgent[:urgentQueue-1]
		}
		l.urgent = append(l.urgent, note)
		l.wake.Signal()
		sent = true
	}
	if !sent {
		return fmt.Errorf("send urgent note: %w", ErrNoLink)
	}
	return nil
}

// Lost is closed when the session is lost, for whatever cause.
func (s *Session) Lost() <-chan struct{} { return s.lost }

// Cause returns nil while the session lives, then a *LostError.
func (s *Session) Cause() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cause == nil {
		return nil // not a nil *LostError inside an error
	}
	return s.cause
}

// Links returns the state of each link.
func (s *Session) Links() []LinkState {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]LinkState, len(s.links))
	for i, l := range s.links {
		out[i] = LinkState{Index: i, Up: l.up, RTT: l.rtt, SentBytes: l.sentBytes, RecvBytes: l.recvBytes.Load()}
	}
	return out
}

// RTT returns the smoothed round trip of the best link that is up, 0 if unknown.
func (s *Session) RTT() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	var best time.Duration
	for _, l := range s.links {
		if l.up && l.rtt > 0 && (best == 0 || l.rtt < best) {
			best = l.rtt
		}
	}
	return best
}

// LastHeard returns the time (of Now) at which something of the peer was last
// read on any link.
func (s *Session) LastHeard() time.Duration { return time.Duration(s.heard.Load()) }

// closeFlush is how long Close waits for what was sent to be acknowledged.
const closeFlush = 500 * time.Millisecond

// Close says goodbye with a reason of at most 256 bytes, after waiting up to
// half a second for what was sent to be acknowledged, and waits for all
// goroutines of the session. The peer sees CauseClosed. Closing a lost session
// only waits. It may be called more than once.
func (s *Session) Close(reason string) {
	ctx, cancel := context.WithTimeout(context.Background(), closeFlush)
	defer cancel()
	select {
	case <-s.sendRight: // kept: no Send starts any more, and the pokes of credit are ours
	case <-s.lost:
	case <-ctx.Done():
	}
	for ctx.Err() == nil {
		s.mu.Lock()
		done := s.cause != nil || len(s.out.frames) == 0
		s.mu.Unlock()
		if done {
			break
		}
		select {
		case <-s.credit:
		case <-s.lost:
		case <-ctx.Done():
		}
	}
	s.mu.Lock()
	s.lose(&LostError{Cause: CauseLocal, Detail: reason}, codeClosed, reason)
	s.mu.Unlock()
	s.wg.Wait()
}

// lose ends the session under the lock; the first cause counts. A code other
// than 0 is told to the peer as a goodbye, as far as links still take it.
func (s *Session) lose(e *LostError, code uint16, text string) {
	if s.cause != nil {
		return
	}
	s.cause = e
	s.log.Info("peer session lost", "cause", e.Cause.String(), "detail", e.Detail)
	var bye []byte
	if code != 0 {
		bye = appendFrame(nil, header{typ: typeBye}, appendCode(nil, code, text))
	}
	for _, l := range s.links {
		l.end(bye)
	}
	close(s.lost)
}

// poke fills a channel of capacity one.
func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
