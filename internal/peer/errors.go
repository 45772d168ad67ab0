package peer

import (
	"errors"
	"fmt"
)

// ErrLost is what every call on a lost session returns (errors.Is); errors.As
// with *LostError tells why.
var ErrLost = errors.New("session lost")

// ErrTooBig refuses a message, urgent note or reason beyond the protocol's bounds.
var ErrTooBig = errors.New("message too big")

// ErrNoLink is returned by Urgent when no link is up at this moment.
var ErrNoLink = errors.New("no link is up")

// Cause says why a session was lost.
type Cause uint8

// The causes. None of them proves that a guest is dead.
const (
	CauseNone     Cause = iota // the session lives
	CauseSilent                // nothing was heard on any link for Config.Silence (or longer, see MaxSilence)
	CauseDied                  // every link was closed by the peer's kernel without goodbye: its process died
	CauseClosed                // the peer called Close; Detail is its reason
	CauseLocal                 // this side called Close; Detail is its reason
	CauseGone                  // the peer had already lost or ended the session; Detail says how
	CauseProtocol              // the peer broke the protocol
)

// String returns the cause in a word.
func (c Cause) String() string {
	switch c {
	case CauseNone:
		return "none"
	case CauseSilent:
		return "silent"
	case CauseDied:
		return "died"
	case CauseClosed:
		return "closed"
	case CauseLocal:
		return "local"
	case CauseGone:
		return "gone"
	case CauseProtocol:
		return "protocol"
	}
	return fmt.Sprintf("cause %d", uint8(c))
}

// LostError is the error of a lost session. It is ErrLost by errors.Is.
type LostError struct {
	Cause  Cause
	Detail string // for people
}

// Error implements error.
func (e *LostError) Error() string {
	if e.Detail == "" {
		return "session lost: " + e.Cause.String()
	}
	return "session lost: " + e.Cause.String() + ": " + e.Detail
}

// Is reports that every LostError is ErrLost.
func (e *LostError) Is(target error) bool { return target == ErrLost }

// CauseOf returns the cause inside err, or CauseNone if err is not about a lost session.
func CauseOf(err error) Cause {
	var l *LostError
	if errors.As(err, &l) {
		return l.Cause
	}
	return CauseNone
}
