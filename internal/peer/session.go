package peer

import (
	"context"
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
type Session struct{}

// PeerHello returns the peer's Config.Hello. The caller must not change it.
func (s *Session) PeerHello() []byte { panic("not built yet") }

// Send queues one message of at most MaxMessage bytes, the concatenation of
// parts, behind all earlier ones. It copies the parts and returns as soon as
// there is credit for the whole message; until then it blocks. It returns the
// context's error with nothing sent, or an error that is ErrLost.
func (s *Session) Send(ctx context.Context, kind uint8, parts ...[]byte) error {
	panic("not built yet")
}

// Recv returns the next message in order. Once the session is lost it returns
// an error that is ErrLost at once, and what was received but not yet handed
// out is had from Leftover only; but after the peer's polite Close it first
// hands out all that the peer sent before. Before it hands anything out it
// compares Now with LastHeard, so a process that was frozen gets ErrLost.
func (s *Session) Recv(ctx context.Context) (Message, error) { panic("not built yet") }

// Leftover returns, once the session is lost, the messages that were received
// whole and in order but not handed out by Recv; a second call returns nothing.
// A secondary looks here for its newest complete epoch. A primary must not use
// it: an acknowledgement found here is too old to let output out.
func (s *Session) Leftover() []Message { panic("not built yet") }

// Urgent sends a note of at most MaxUrgent bytes on every link that is up,
// before everything queued, outside the order of messages. It never blocks. It
// is delivered at most once and may be lost; repeat it until answered.
func (s *Session) Urgent(kind uint8, payload []byte) error { panic("not built yet") }

// Lost is closed when the session is lost, for whatever cause.
func (s *Session) Lost() <-chan struct{} { panic("not built yet") }

// Cause returns nil while the session lives, then a *LostError.
func (s *Session) Cause() error { panic("not built yet") }

// Links returns the state of each link.
func (s *Session) Links() []LinkState { panic("not built yet") }

// RTT returns the smoothed round trip of the best link that is up, 0 if unknown.
func (s *Session) RTT() time.Duration { panic("not built yet") }

// LastHeard returns the time (of Now) at which something of the peer was last
// read on any link.
func (s *Session) LastHeard() time.Duration { panic("not built yet") }

// Close says goodbye with a reason of at most 256 bytes, after waiting up to
// half a second for what was sent to be acknowledged, and waits for all
// goroutines of the session. The peer sees CauseClosed. Closing a lost session
// only waits. It may be called more than once.
func (s *Session) Close(reason string) { panic("not built yet") }
