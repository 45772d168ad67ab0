package epoch

import (
	"fmt"

	"perdure/internal/model"
)

// Capture describes a captured epoch to Primary.
type Capture struct {
	Epoch model.Epoch
	Held  int64 // bytes of output held until this epoch's release
	Flush bool  // the guest flushed a disk in it: durable on both hosts before release
	Full  bool  // holds all of memory, not only what changed
}

// Primary keeps the books of a running copy. See the package comment.
type Primary struct {
	pair     Pair
	next     model.Epoch // number of the next capture
	needFull bool
	ended    bool
	open     []flight // oldest first; captured and not yet released
}

type flight struct {
	Capture
	pair    Pair // under which it was captured
	sent    bool // the end of it was handed to the connection
	acked   bool
	durable bool // what the guest flushed is durable on this host
}

// NewPrimary opens the books. first is the number of the first epoch; the
// first capture must be full, since the secondary is known to hold nothing.
func NewPrimary(pair Pair, first model.Epoch) *Primary {
	return &Primary{pair: pair, next: first, needFull: true}
}

// Pair returns the identity of epochs captured from now on.
func (p *Primary) Pair() Pair { return p.pair }

// Next returns the number of the next capture and whether it must be full.
func (p *Primary) Next() (n model.Epoch, full bool) { return p.next, p.needFull }

// InFlight returns how many captured epochs are not acknowledged.
func (p *Primary) InFlight() int {
	n := 0
	for _, f := range p.open {
		if !f.acked {
			n++
		}
	}
	return n
}

// Held returns the bytes of output captured and not yet released.
func (p *Primary) Held() int64 {
	var n int64
	for _, f := range p.open {
		n += f.Held
	}
	return n
}

// Open returns the epochs captured and not yet released, oldest first.
func (p *Primary) Open() []model.Epoch {
	out := make([]model.Epoch, len(p.open))
	for i, f := range p.open {
		out[i] = f.Epoch
	}
	return out
}

// Captured notes that the guest was stopped, its state taken whole, and may run on.
func (p *Primary) Captured(c Capture) error {
	switch {
	case p.ended:
		return fmt.Errorf("note capture of epoch %d: %w", c.Epoch, ErrEnded)
	case c.Epoch != p.next:
		return fmt.Errorf("note capture of epoch %d, expected %d: %w", c.Epoch, p.next, ErrOrder)
	case p.needFull && !c.Full:
		return fmt.Errorf("note capture of epoch %d: must be full: %w", c.Epoch, ErrOrder)
	case p.InFlight() >= MaxInFlight:
		return fmt.Errorf("note capture of epoch %d: %w", c.Epoch, ErrBusy)
	}
	p.open = append(p.open, flight{Capture: c, pair: p.pair, durable: !c.Flush})
	p.next++
	p.needFull = false
	return nil
}

// Sent notes that the whole of epoch n, its end included, was handed to the
// connection. Strictly in order.
func (p *Primary) Sent(n model.Epoch) error {
	for i := range p.open {
		f := &p.open[i]
		if f.sent {
			continue
		}
		if f.Epoch != n {
			return fmt.Errorf("note epoch %d as sent, expected %d: %w", n, f.Epoch, ErrOrder)
		}
		f.sent = true
		return nil
	}
	return fmt.Errorf("note epoch %d as sent: nothing to send: %w", n, ErrOrder)
}

// Acked notes the secondary's acknowledgement of epoch n as received, with the
// pair it carried. Only the oldest unacknowledged epoch can be acknowledged.
func (p *Primary) Acked(pair Pair, n model.Epoch) ([]Action, error) {
	if p.ended {
		return nil, fmt.Errorf("take acknowledgement of epoch %d: %w", n, ErrEnded)
	}
	for i := range p.open {
		f := &p.open[i]
		if f.acked {
			continue
		}
		switch {
		case f.pair != pair:
			return nil, fmt.Errorf("take acknowledgement of epoch %d by %v, sent by %v: %w", n, pair, f.pair, ErrPair)
		case f.Epoch != n:
			return nil, fmt.Errorf("take acknowledgement of epoch %d, expected %d: %w", n, f.Epoch, ErrOrder)
		case !f.sent:
			return nil, fmt.Errorf("take acknowledgement of epoch %d: %w", n, ErrNeverSent)
		}
		f.acked = true
		return p.release([]Action{{Commit, n, f.pair}}), nil
	}
	if n >= p.next {
		return nil, fmt.Errorf("take acknowledgement of epoch %d: %w", n, ErrNeverSent)
	}
	return nil, fmt.Errorf("take acknowledgement of epoch %d again: %w", n, ErrOrder)
}

// Durable notes that everything the guest flushed up to and including epoch n
// is durable on this host. Only epochs with a flush need it; it may come before
// or after the acknowledgement.
func (p *Primary) Durable(n model.Epoch) []Action {
	for i := range p.open {
		if p.open[i].Epoch <= n {
			p.open[i].durable = true
		}
	}
	if p.ended {
		return nil
	}
	return p.release(nil)
}

// release hands out, oldest first, what is acknowledged and durable.
func (p *Primary) release(acts []Action) []Action {
	// Invariant: nothing is released before everything older is.
	for len(p.open) > 0 && p.open[0].acked && p.open[0].durable {
		acts = append(acts, Action{Release, p.open[0].Epoch, p.open[0].pair})
		p.open = p.open[1:]
	}
	return acts
}

// Void notes that collecting failed (a page write or a flush of the memory
// file): the kernel calls pages clean that nobody has. begun says whether parts
// of the epoch being captured were already sent. That epoch, Next, is taken
// again under the same number and full. Output held for it stays held.
func (p *Primary) Void(begun bool) []Action {
	p.needFull = true
	if p.ended || !begun {
		return nil
	}
	return []Action{{Abort, p.next, p.pair}}
}

// Advance changes the identity of the same pair after a swap that this primary
// asked for and that is done (syncing to duplex): epochs in flight keep the
// identity under which they were captured.
func (p *Primary) Advance(pair Pair) error {
	switch {
	case p.ended:
		return fmt.Errorf("advance to %v: %w", pair, ErrEnded)
	case pair.Term <= p.pair.Term:
		return fmt.Errorf("advance from %v to %v: %w", p.pair, pair, ErrOrder)
	case pair.Primary != p.pair.Primary || (p.pair.Secondary != "" && pair.Secondary != p.pair.Secondary):
		return fmt.Errorf("advance from %v to %v: %w", p.pair, pair, ErrPair)
	}
	p.pair = pair
	return nil
}

// Alone closes the books after simplex was granted to this primary: no other
// host can take over any more, so everything held may be committed and leave, in
// order. Call it only when the swap to simplex is done. What the guest flushed
// still has to be durable here: the caller makes it so before each Release.
func (p *Primary) Alone() []Action {
	var acts []Action
	for _, f := range p.open {
		if !f.acked {
			acts = append(acts, Action{Commit, f.Epoch, f.pair})
		}
		acts = append(acts, Action{Release, f.Epoch, f.pair})
	}
	p.open, p.ended = nil, true
	return acts
}
