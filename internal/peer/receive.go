package peer

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"time"
)

// frameCost is what one data frame counts against the window: its payload and
// a generous share for bookkeeping, so that the window bounds memory even when
// every message is a single byte.
func frameCost(payload int) int64 { return int64(payload) + 256 }

// errProtocol is the class of frames that are well-formed but not allowed now.
var errProtocol = errors.New("protocol broken")

// inMessage is a message whose frames have all arrived in order.
type inMessage struct {
	kind     uint8
	frames   [][]byte
	total    int
	cost     int64
	received time.Duration
}

// receiver puts data frames in order, drops doubles and joins messages. It has
// no lock of its own; the session's protects it.
type receiver struct {
	window   int64
	next     uint64            // lowest sequence number not arrived
	ranges   []seqRange        // arrived above next: ascending, disjoint, not touching
	ahead    map[uint64]inData // the frames of ranges
	accepted int64             // cost of all frames ever accepted
	consumed int64             // cost of all messages ever handed out
	cur      inMessage         // being joined; no frames: between messages
	got      int               // payload bytes in cur
	inbox    []inMessage       // whole, not handed out
}

type inData struct {
	h       header
	payload []byte
}

func newReceiver(window int64) *receiver {
	return &receiver{window: window, ahead: make(map[uint64]inData)}
}

// limit is the credit the sender may have spent since the beginning.
func (r *receiver) limit() uint64 { return uint64(r.consumed + r.window) }

// accept takes one data frame. It reports whether the frame is new (then its
// payload is kept) and whether a message has become whole.
func (r *receiver) accept(h header, payload []byte, now time.Duration) (fresh, whole bool, err error) {
	if h.seq < r.next {
		return false, false, nil
	}
	if _, dup := r.ahead[h.seq]; dup {
		return false, false, nil
	}
	cost := frameCost(len(payload))
	if r.accepted+cost > r.consumed+r.window {
		return false, false, fmt.Errorf("take frame %d: beyond the credit: %w", h.seq, errProtocol)
	}
	// Every frame costs at least frameCost(0), which bounds how far ahead one can be.
	if h.seq-r.next > uint64(r.window/frameCost(0)) {
		return false, false, fmt.Errorf("take frame %d: too far after %d: %w", h.seq, r.next, errProtocol)
	}
	r.accepted += cost
	if h.seq == r.next && len(r.ranges) == 0 { // the usual case
		r.next++
		whole, err = r.join(inData{h, payload}, now)
		return true, whole, err
	}
	r.ahead[h.seq] = inData{h, payload}
	r.note(h.seq)
	if r.ranges[0].from != r.next {
		return true, false, nil
	}
	run := r.ranges[0]
	r.ranges = slices.Delete(r.ranges, 0, 1)
	for s := run.from; s < run.to; s++ {
		d := r.ahead[s]
		delete(r.ahead, s)
		r.next = s + 1
		w, err := r.join(d, now)
		if err != nil {
			return true, whole, err
		}
		whole = whole || w
	}
	return true, whole, nil
}

// note adds one number to the ranges.
func (r *receiver) note(seq uint64) {
	i, _ := slices.BinarySearchFunc(r.ranges, seq, func(a seqRange, s uint64) int {
		if a.to < s {
			return -1
		}
		return 1
	}) // first range that ends at or after seq
	if i < len(r.ranges) && r.ranges[i].to == seq {
		r.ranges[i].to++
		if i+1 < len(r.ranges) && r.ranges[i+1].from == seq+1 {
			r.ranges[i].to = r.ranges[i+1].to
			r.ranges = slices.Delete(r.ranges, i+1, i+2)
		}
		return
	}
	if i < len(r.ranges) && r.ranges[i].from == seq+1 {
		r.ranges[i].from = seq
		return
	}
	r.ranges = slices.Insert(r.ranges, i, seqRange{seq, seq + 1})
}

// join adds the next frame in order to the message it belongs to.
func (r *receiver) join(d inData, now time.Duration) (bool, error) {
	first, last := d.h.flags&flagFirst != 0, d.h.flags&flagLast != 0
	c := &r.cur
	switch {
	case first != (len(c.frames) == 0):
		return false, fmt.Errorf("join frame %d: first frame out of place: %w", d.h.seq, errProtocol)
	case first:
		*c = inMessage{kind: d.h.kind, total: int(d.h.total)}
		r.got = 0
		if !last {
			c.frames = make([][]byte, 0, c.total/maxPayload+1)
		}
	case d.h.kind != c.kind:
		return false, fmt.Errorf("join frame %d: kind changes inside a message: %w", d.h.seq, errProtocol)
	}
	if len(d.payload) == 0 && !(first && last) {
		return false, fmt.Errorf("join frame %d: empty: %w", d.h.seq, errProtocol)
	}
	c.frames = append(c.frames, d.payload)
	c.cost += frameCost(len(d.payload))
	r.got += len(d.payload)
	if r.got > c.total || last != (r.got == c.total) {
		return false, fmt.Errorf("join frame %d: %d bytes of %d: %w", d.h.seq, r.got, c.total, errProtocol)
	}
	if !last {
		return false, nil
	}
	c.received = now
	r.inbox = append(r.inbox, *c)
	r.cur = inMessage{}
	return true, nil
}

// take hands out the oldest whole message.
func (r *receiver) take() (inMessage, bool) {
	if len(r.inbox) == 0 {
		return inMessage{}, false
	}
	m := r.inbox[0]
	r.inbox[0] = inMessage{}
	r.inbox = r.inbox[1:]
	r.consumed += m.cost
	return m, true
}

// block is the acknowledgement of what has arrived.
func (r *receiver) block(linkBytes uint64) ackBlock {
	return ackBlock{next: r.next, limit: r.limit(), linkBytes: linkBytes, ranges: r.ranges[:min(len(r.ranges), maxRanges)]}
}

// message joins the frames; buffers that become free go back to the pool.
func (m inMessage) message(pool *bufPool) Message {
	out := Message{Kind: m.kind, Received: m.received}
	if len(m.frames) == 1 {
		out.Payload = m.frames[0]
		return out
	}
	out.Payload = bytes.Join(m.frames, nil) // does not clear what it is about to fill
	for _, f := range m.frames {
		pool.put(f)
	}
	return out
}
