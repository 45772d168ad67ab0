// Package epoch is the checkpoint protocol of a pair, both sides, as pure state
// machines: Pacer decides when the guest is stopped for a checkpoint, Primary
// and Secondary keep the books of the epochs and decide what may follow what.
//
//	primary:    Captured → Sent → Acked → (Commit) → Durable → (Release)
//	secondary:  Begin → Part… → End → (Journal) → Durable → (Ack, Apply) → Applied
//
// What is in parentheses are actions handed to the caller, who carries them out
// in the order given. Two rules are the reason for the package:
//
//   - Output commit. Release(n) is handed out only after the secondary of this
//     pair, in this term, has acknowledged epoch n and all before it, and what
//     the guest flushed up to n is durable on both hosts.
//   - No half states. Only an epoch that arrived whole, counted and checksummed,
//     in a gap-free row, is ever acknowledged, applied or taken over from.
//
// Concurrency: none; the caller serialises. There is no clock, no I/O and no
// goroutine here: time is an argument (any monotonic reading, CLOCK_BOOTTIME in
// production). Failure: a refused event changes nothing and returns an error of
// the classes below; after one, the caller treats the pair as broken.
//
// Not guaranteed here: who may be primary (internal/authority), that messages
// arrive in order (internal/peer), or that bytes are on a disk (the caller says so).
package epoch

import "errors"

// Error classes of refused events.
var (
	ErrPair      = errors.New("other term or run")         // not of this pair as it is now
	ErrOrder     = errors.New("out of order")              // a gap, a repetition, or a step left out
	ErrNeverSent = errors.New("epoch was never sent")      // acknowledged before its end was sent
	ErrTally     = errors.New("contents do not add up")    // counts or checksum differ: the epoch is not whole
	ErrBusy      = errors.New("too many epochs in flight") // MaxInFlight reached
	ErrEnded     = errors.New("books are closed")          // after Alone or Takeover
)

// MaxInFlight is how many captured epochs may wait for their acknowledgement.
const MaxInFlight = 2
