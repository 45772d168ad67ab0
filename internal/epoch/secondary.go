package epoch

import (
	"fmt"

	"perdure/internal/model"
)

// Secondary keeps the books of a standing-by copy. See the package comment.
type Secondary struct {
	pair   Pair
	next   model.Epoch // number of the next epoch to begin
	acking bool
	ended  bool // Takeover was called

	partial *arriving
	whole   []complete // oldest first; complete and not yet both acknowledged and applied

	newest   model.Epoch // newest complete
	any      bool        // newest is valid
	applied  model.Epoch // newest applied
	appliedY bool
	acked    model.Epoch // newest acknowledged
	ackedY   bool
	readied  bool
}

type arriving struct {
	n     model.Epoch
	pair  Pair
	flush bool
	tally Tally
}

type complete struct {
	n        model.Epoch
	pair     Pair
	durable  bool // or nothing to make durable
	acked    bool
	applying bool
	applied  bool
}

// NewSecondary opens the books; acknowledging is on. first is the number of
// the first epoch, which must be full.
func NewSecondary(pair Pair, first model.Epoch) *Secondary {
	return &Secondary{pair: pair, next: first, acking: true}
}

// Pair returns the identity under which epochs are accepted.
func (s *Secondary) Pair() Pair { return s.pair }

// Begin opens epoch n. flush says that the guest flushed a disk in it.
func (s *Secondary) Begin(pair Pair, n model.Epoch, full, flush bool) error {
	switch {
	case s.ended:
		return fmt.Errorf("begin epoch %d: %w", n, ErrEnded)
	case pair != s.pair:
		return fmt.Errorf("begin epoch %d by %v, expected %v: %w", n, pair, s.pair, ErrPair)
	case s.partial != nil:
		return fmt.Errorf("begin epoch %d before the end of %d: %w", n, s.partial.n, ErrOrder)
	case n != s.next:
		return fmt.Errorf("begin epoch %d, expected %d: %w", n, s.next, ErrOrder)
	case !s.any && !full:
		return fmt.Errorf("begin epoch %d: the first must be full: %w", n, ErrOrder)
	}
	s.partial = &arriving{n: n, pair: pair, flush: flush}
	return nil
}

// Part counts one part of the epoch that is arriving. The caller buffers it.
func (s *Secondary) Part(n model.Epoch, kind uint8, content ...[]byte) error {
	if s.ended {
		return fmt.Errorf("take part of epoch %d: %w", n, ErrEnded)
	}
	if s.partial == nil || s.partial.n != n {
		return fmt.Errorf("take part of epoch %d: not begun: %w", n, ErrOrder)
	}
	s.partial.tally.Add(kind, content...)
	return nil
}

// Flushed notes, before its end, that the arriving epoch holds a flush
// (when that was not known at its beginning).
func (s *Secondary) Flushed(n model.Epoch) error {
	if s.partial == nil || s.partial.n != n {
		return fmt.Errorf("note flush in epoch %d: not begun: %w", n, ErrOrder)
	}
	s.partial.flush = true
	return nil
}

// End closes epoch n. It is complete if the primary's tally is ours.
func (s *Secondary) End(pair Pair, n model.Epoch, t Tally) ([]Action, error) {
	switch {
	case s.ended:
		return nil, fmt.Errorf("end epoch %d: %w", n, ErrEnded)
	case s.partial == nil || s.partial.n != n:
		return nil, fmt.Errorf("end epoch %d: not begun: %w", n, ErrOrder)
	case pair != s.partial.pair:
		return nil, fmt.Errorf("end epoch %d by %v, begun by %v: %w", n, pair, s.partial.pair, ErrPair)
	case t != s.partial.tally:
		return nil, fmt.Errorf("end epoch %d: got %+v, primary sent %+v: %w", n, s.partial.tally, t, ErrTally)
	}
	a := s.partial
	s.partial = nil
	s.whole = append(s.whole, complete{n: n, pair: a.pair, durable: !a.flush})
	s.newest, s.any = n, true
	s.next = n + 1
	var acts []Action
	if a.flush {
		acts = append(acts, Action{Journal, n, a.pair})
	}
	return s.settle(acts), nil
}

// Abort forgets the arriving epoch; the primary takes it again, full.
func (s *Secondary) Abort(n model.Epoch) error {
	if s.ended {
		return fmt.Errorf("abort epoch %d: %w", n, ErrEnded)
	}
	if s.partial == nil || s.partial.n != n {
		return fmt.Errorf("abort epoch %d: not begun: %w", n, ErrOrder)
	}
	s.partial = nil
	return nil
}

// Durable notes that the disk writes of epoch n, and of all before it, are
// durable in this host's journal.
func (s *Secondary) Durable(n model.Epoch) []Action {
	for i := range s.whole {
		if s.whole[i].n <= n {
			s.whole[i].durable = true
		}
	}
	return s.settle(nil)
}

// Applied notes that pages and disk writes of epoch n are applied. In order.
func (s *Secondary) Applied(n model.Epoch) ([]Action, error) {
	for i := range s.whole {
		c := &s.whole[i]
		if c.applied {
			continue
		}
		if c.n != n || !c.applying {
			break
		}
		c.applied = true
		s.applied, s.appliedY = n, true
		return s.settle(nil), nil
	}
	return nil, fmt.Errorf("note epoch %d as applied: %w", n, ErrOrder)
}

// settle hands out what has become allowed, in epoch order.
func (s *Secondary) settle(acts []Action) []Action {
	for i := range s.whole {
		c := &s.whole[i]
		// Invariant: no epoch passes one before it, neither in acknowledgement nor
		// in application. Once this host takes over, nobody is promised anything
		// any more, so application no longer waits for the journal.
		if !c.durable && !s.ended {
			break
		}
		if s.acking && !c.acked {
			c.acked = true
			s.acked, s.ackedY = c.n, true
			acts = append(acts, Action{Ack, c.n, c.pair})
		}
		if !c.applying {
			c.applying = true
			acts = append(acts, Action{Apply, c.n, c.pair})
		}
	}
	for len(s.whole) > 0 && s.whole[0].acked && s.whole[0].applied {
		s.whole = s.whole[1:]
	}
	if s.ended && !s.readied && s.any && s.appliedY && s.applied == s.newest {
		s.readied = true
		acts = append(acts, Action{Ready, s.newest, s.pair})
	}
	return acts
}

// StopAcking is the first step of every claim: from here on nothing is
// acknowledged. Epochs go on arriving, completing and being applied.
func (s *Secondary) StopAcking() { s.acking = false }

// ResumeAcking is allowed while a claim is unresolved and the primary is heard
// again; what was withheld is acknowledged now. The claim may still succeed:
// then Takeover stops acknowledging again and uses the newest complete epoch.
func (s *Secondary) ResumeAcking() ([]Action, error) {
	if s.ended {
		return nil, fmt.Errorf("resume acknowledging: %w", ErrEnded)
	}
	s.acking = true
	return s.settle(nil), nil
}

// Acking reports whether acknowledgements are on.
func (s *Secondary) Acking() bool { return s.acking }

// Advance changes the identity of the same pair (syncing to duplex). No epoch
// may be arriving: the primary changes between two epochs.
func (s *Secondary) Advance(pair Pair) error {
	switch {
	case s.ended:
		return fmt.Errorf("advance to %v: %w", pair, ErrEnded)
	case s.partial != nil:
		return fmt.Errorf("advance to %v inside epoch %d: %w", pair, s.partial.n, ErrOrder)
	case pair.Term <= s.pair.Term:
		return fmt.Errorf("advance from %v to %v: %w", s.pair, pair, ErrOrder)
	case pair.Primary != s.pair.Primary || (s.pair.Secondary != "" && pair.Secondary != s.pair.Secondary):
		return fmt.Errorf("advance from %v to %v: %w", s.pair, pair, ErrPair)
	}
	s.pair = pair
	return nil
}

// Newest returns the newest complete epoch: the one a takeover would use.
func (s *Secondary) Newest() (model.Epoch, bool) { return s.newest, s.any }

// NewestAcked returns the newest epoch whose acknowledgement was handed out.
func (s *Secondary) NewestAcked() (model.Epoch, bool) { return s.acked, s.ackedY }

// NewestApplied returns the newest applied epoch.
func (s *Secondary) NewestApplied() (model.Epoch, bool) { return s.applied, s.appliedY }

// Backlog returns how many complete epochs are not applied yet.
func (s *Secondary) Backlog() int {
	n := 0
	for _, c := range s.whole {
		if !c.applied {
			n++
		}
	}
	return n
}

// Takeover ends the receiving for good, once the claim is granted: an epoch
// that is still arriving is forgotten, everything complete is applied in order,
// and Ready follows when that is done. It fails if no epoch was ever complete.
func (s *Secondary) Takeover() ([]Action, error) {
	if s.ended {
		return nil, fmt.Errorf("take over: %w", ErrEnded)
	}
	if !s.any {
		return nil, fmt.Errorf("take over: no complete epoch: %w", ErrOrder)
	}
	s.acking, s.ended, s.partial = false, true, nil
	return s.settle(nil), nil
}
