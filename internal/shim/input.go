package shim

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"perdure/internal/hostnet"
	"perdure/internal/model"
)

// What the guest was sent and the other copy does not know of is carried over
// when the guest moves: a client whose request fell into the gap has its
// answer as soon as the VM runs again, and need not wait for its own
// retransmission timer (200 ms and more). Only input is carried, so none of it
// needs a right; where nobody can carry (the host is gone) clients repeat
// themselves as on any network.

// How long input is carried after a takeover. Switches learn at once where the
// guest is; what is still under way to the old place is young.
const (
	carryFor = time.Second
	carryIn  = 500 * time.Millisecond
)

// maxInput bounds what a standby keeps of input, in bytes.
const maxInput = 4 << 20

// inputLog watches what the guest of a protected VM is sent. Its methods may be
// called from any goroutine.
type inputLog struct {
	mu    sync.Mutex
	boxes []*hostnet.Inbox // by NIC; nil where watching failed
	back  [][]byte         // of a capture that failed: comes first in the next take
}

// open begins to watch. A tap that cannot be watched is done without.
func (l *inputLog) open(taps []string, log *slog.Logger) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, tap := range taps {
		b, err := hostnet.OpenInbox(tap)
		if err != nil {
			log.Warn("input of the guest will not be carried over", "error", err)
		}
		l.boxes = append(l.boxes, b)
	}
}

func (l *inputLog) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, b := range l.boxes {
		if b != nil {
			b.Close()
		}
	}
	l.boxes, l.back = nil, nil
}

// giveBack is for frames that were taken for an epoch that never came to be.
func (l *inputLog) giveBack(frames [][]byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.back = frames
}

// take returns what came since the last call, by NIC.
func (l *inputLog) take() [][]byte {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	out := make([][]byte, len(l.boxes))
	for n, b := range l.boxes {
		if b != nil {
			out[n], _ = b.Take(now) // what cannot be read is not carried
		}
		if n < len(l.back) {
			out[n] = append(l.back[n], out[n]...)
		}
	}
	l.back = nil
	return out
}

// carryDuring sends input to the secondary for as long as a hand-over lasts.
// The frames reach the guest here as well, should it stay.
func (p *primary) carryDuring(pr *pair) {
	p.goWork(func() {
		for p.ctx.Err() == nil && !pr.isLost() && !pr.isLeft() && p.isHandedOver() {
			if p.sendInput(p.ctx, pr, p.lastEpoch()+1, p.input.take()) != nil {
				return
			}
			sleep(p.ctx, carryStep)
		}
	})
}

// carryStep is how long a frame may wait for the next look at the taps.
const carryStep = 2 * time.Millisecond

func (p *primary) isHandedOver() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.state == model.StateHeld
}

// carryOver sends all that the secondary may need once this guest is gone or
// handed over, and goes on for as long as the secondary listens. Meanwhile it
// repeats what the secondary was told last, which may have been lost. The runner has ended.
func (p *primary) carryOver(pr *pair) {
	pr.mu.Lock()
	sess, lost, word := pr.sess, pr.lost || pr.left, pr.lastWord
	flights := pr.sortedFlights()
	pr.mu.Unlock()
	p.mu.Lock()
	moves := p.state == model.StateFault || p.state == model.StateHeld
	p.mu.Unlock()
	if sess == nil || lost || !p.held || p.offAsked || !moves {
		return
	}
	told := time.Now()
	// The primary's own context is over: this is the last that it does.
	ctx, cancel := context.WithTimeout(context.Background(), carryFor)
	defer cancel()
	for _, c := range flights {
		if p.sendInput(ctx, pr, c.epoch, c.input) != nil {
			return
		}
	}
	for ctx.Err() == nil {
		if p.sendInput(ctx, pr, p.lastEpoch()+1, p.input.take()) != nil {
			return
		}
		if word != nil && time.Since(told) > beatInterval {
			told = time.Now()
			tellPeer(sess, *word)
		}
		select {
		case <-sess.Lost():
			return
		case <-time.After(carryStep):
		}
	}
}

// sendInput sends frames that an epoch of this number would contain.
func (p *primary) sendInput(ctx context.Context, pr *pair, epoch model.Epoch, input [][]byte) error {
	for n, frames := range input {
		if len(frames) == 0 {
			continue
		}
		if err := pr.sess.Send(ctx, kindInput, pack(inputHead{NIC: uint32(n), Epoch: uint64(epoch)}), frames); err != nil {
			return fmt.Errorf("carry input over: %w", err)
		}
	}
	return nil
}

// seenInput is what a standby keeps of it.
type seenInput struct {
	nic    int
	epoch  model.Epoch
	frames []byte
	at     time.Time
}

// maxInputAge is how old input may be when it is delivered: networks repeat
// themselves within a moment, and not every protocol knows an old datagram from a new one.
const maxInputAge = 2 * time.Second

var inputHeadLen = binary.Size(inputHead{})

// takeInput keeps frames for the guest, or hands them to it if it runs here already.
func (st *standby) takeInput(p []byte) error {
	if len(p) < inputHeadLen {
		return fmt.Errorf("input: %d bytes, at least %d wanted", len(p), inputHeadLen)
	}
	var h inputHead
	if err := unpack(p[:inputHeadLen], &h); err != nil {
		return err
	}
	if int64(h.NIC) >= int64(len(st.inst.taps)) {
		return fmt.Errorf("input for network card %d, there are %d", h.NIC, len(st.inst.taps))
	}
	in := seenInput{nic: int(h.NIC), epoch: model.Epoch(h.Epoch), frames: p[inputHeadLen:], at: time.Now()}
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.live != nil {
		if err := st.deliver(in); err != nil {
			st.s.log.Info("input of the guest was not carried over whole", "error", err)
		}
		return nil
	}
	for st.inputLen += len(in.frames); st.inputLen > maxInput && len(st.input) > 0; st.input = st.input[1:] {
		st.inputLen -= len(st.input[0].frames)
	}
	st.input = append(st.input, in)
	return nil
}

// deliver hands frames to the guest. mu is held.
func (st *standby) deliver(in seenInput) error {
	if in.nic >= len(st.live) || st.live[in.nic] == nil {
		return nil
	}
	return st.live[in.nic].Deliver(in.frames)
}

// deliverInput hands the guest, which runs here now as of epoch n, what was
// sent to it since then.
func (st *standby) deliverInput(n model.Epoch) {
	live := make([]*hostnet.Inbox, len(st.inst.taps))
	var errs []error
	for k, tap := range st.inst.taps {
		var err error
		live[k], err = hostnet.OpenInbox(tap)
		errs = append(errs, err)
	}
	st.mu.Lock()
	st.live = live
	count := 0
	for _, in := range st.input {
		if in.epoch > n && time.Since(in.at) < maxInputAge {
			count += len(in.frames)
			errs = append(errs, st.deliver(in))
		}
	}
	st.input, st.inputLen = nil, 0
	if st.carried {
		st.closeLive()
	}
	st.mu.Unlock()
	if err := errors.Join(errs...); err != nil {
		st.s.log.Warn("input of the guest was not carried over whole", "error", err)
	}
	if count > 0 {
		st.s.tl.add("input-carried", n, 0, "%d bytes that were sent to the guest at its last place reached it here", count)
	}
}

// receiveOn lets a standby that has become the VM receive input for a moment
// more, then ends the session with the old place.
func (st *standby) receiveOn() {
	t := time.NewTimer(carryIn)
	defer t.Stop()
	st.mu.Lock()
	sess := st.sess
	st.mu.Unlock()
	select {
	case <-t.C:
	case <-sess.Lost():
	case <-st.recvCtx.Done():
	}
	st.endReceiving()
	st.endCarrying()
}

// endCarrying ends the delivery of input, also one that has not begun.
func (st *standby) endCarrying() {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.carried = true
	st.closeLive()
}

// closeLive lets what still comes go nowhere. mu is held.
func (st *standby) closeLive() {
	for n, b := range st.live {
		if b != nil {
			b.Close()
			st.live[n] = nil
		}
	}
}

// endReceiving ends the session with the old place.
func (st *standby) endReceiving() {
	st.mu.Lock()
	sess := st.sess
	st.mu.Unlock()
	sess.Close("taken over")
	st.endRecv()
}
