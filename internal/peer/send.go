package peer

import (
	"slices"
	"time"
)

// Bounds of the sending side.
const (
	redundantMax = 16 << 10 // bytes of small messages on the way on all links at once
	hedgeMax     = 4 << 20  // bytes on the way a second time
	hedgeMin     = 10 * time.Millisecond
	capFirst     = 1 << 20   // data bytes on the way on a link whose delay is not known yet
	capFloor     = 384 << 10 // must exceed ackEvery, or a link would wait for heartbeats
	capCeiling   = 8 << 20
	ackEvery     = 128 << 10            // data bytes on a link after which it is acknowledged inside a message
	queueDelay   = 5 * time.Millisecond // delay of heartbeats by bulk data that a link's cap aims at
)

// outFrame is a data frame that is not acknowledged. The session's lock
// protects it; buf is only read while writers > 0.
type outFrame struct {
	seq     uint64
	buf     []byte // header and payload
	cost    int64
	links   uint8 // bit per link that has it queued or sent on its present connection
	writers int8  // links that are writing buf without the lock
	acked   bool
	copied  bool // counted in sender.redundant
	hedged  bool // counted in sender.hedged
}

// flight is a data frame handed to one connection, oldest first in link.fly.
type flight struct {
	f   *outFrame
	end uint64 // link.sentData after it
	at  time.Duration
}

// sender holds what is not acknowledged. No lock of its own.
type sender struct {
	una       uint64      // sequence number of frames[0]
	frames    []*outFrame // una, una+1, …; acknowledged ones in the middle stay until the row is closed
	cursor    uint64      // lowest sequence number that no link was given yet
	resend    []*outFrame // lost with a link, to be taken before anything new
	spent     int64       // credit spent since the beginning
	limit     int64       // credit granted since the beginning
	redundant int64
	hedged    int64
}

func (s *sender) next() uint64 { return s.una + uint64(len(s.frames)) }

// add appends frames in order; their sequence numbers must already continue the row.
func (s *sender) add(fs []*outFrame) {
	for _, f := range fs {
		s.frames = append(s.frames, f)
		s.spent += f.cost
	}
}

// unsent returns the next frame that no link was given, and moves on.
func (s *sender) unsent() *outFrame {
	for s.cursor < s.next() {
		f := s.frames[s.cursor-s.una]
		s.cursor++
		if !f.acked && f.links == 0 {
			return f
		}
	}
	return nil
}

// again returns the next frame to be sent again.
func (s *sender) again() *outFrame {
	for len(s.resend) > 0 {
		f := s.resend[0]
		s.resend[0] = nil
		s.resend = s.resend[1:]
		if !f.acked && f.links == 0 {
			return f
		}
	}
	return nil
}

// pending reports whether a bulk link would find something to send.
func (s *sender) pending() bool { return len(s.resend) > 0 || s.cursor < s.next() }

// orphan notes that a frame's last link is gone.
func (s *sender) orphan(fs []*outFrame) {
	slices.SortFunc(fs, func(a, b *outFrame) int {
		if a.seq < b.seq {
			return -1
		}
		return 1
	})
	s.resend = append(s.resend, fs...)
}

// ack takes an acknowledgement. It reports whether anything changed, and
// whether the block speaks of frames that do not exist.
func (s *sender) ack(a ackBlock, pool *bufPool) (moved, bad bool) {
	top := s.next()
	if a.next > top || (len(a.ranges) > 0 && a.ranges[len(a.ranges)-1].to > top) {
		return false, true
	}
	if int64(a.limit) > s.limit {
		s.limit = int64(a.limit)
		moved = true
	}
	for q := s.una; q < a.next; q++ {
		moved = s.settle(s.frames[q-s.una], pool) || moved
	}
	for _, r := range a.ranges {
		for q := max(r.from, s.una); q < r.to; q++ {
			moved = s.settle(s.frames[q-s.una], pool) || moved
		}
	}
	n := 0
	for n < len(s.frames) && s.frames[n].acked {
		s.frames[n] = nil
		n++
	}
	s.frames = s.frames[n:]
	s.una += uint64(n)
	s.cursor = max(s.cursor, s.una)
	return moved, false
}

// settle marks one frame as acknowledged and frees what it held.
func (s *sender) settle(f *outFrame, pool *bufPool) bool {
	if f.acked {
		return false
	}
	f.acked = true
	n := int64(len(f.buf))
	if f.copied {
		s.redundant -= n
	}
	if f.hedged {
		s.hedged -= n
	}
	if f.writers == 0 {
		pool.put(f.buf)
		f.buf = nil
	}
	return true
}

// written notes that a link has stopped reading buf.
func (f *outFrame) written(pool *bufPool) {
	f.writers--
	if f.acked && f.writers == 0 && f.buf != nil {
		pool.put(f.buf)
		f.buf = nil
	}
}

// cut splits a message into sealed frames from sequence number seq on.
// Flags, total and sequence number are part of the checksum, so the number must
// be known: the caller holds the right to send.
func cut(seq uint64, kind uint8, parts [][]byte, total int, pool *bufPool) []*outFrame {
	n := max(1, (total+maxPayload-1)/maxPayload)
	out := make([]*outFrame, 0, n)
	left, part, at := total, 0, 0
	for i := range n {
		size := min(left, maxPayload)
		buf := pool.get(headerLen + size)
		for got := 0; got < size; {
			c := copy(buf[headerLen+got:], parts[part][at:])
			got += c
			at += c
			if at == len(parts[part]) {
				part, at = part+1, 0
			}
		}
		h := header{typ: typeData, kind: kind, length: uint32(size), seq: seq + uint64(i)}
		if i == 0 {
			h.flags |= flagFirst
			h.total = uint32(total)
		}
		if i == n-1 {
			h.flags |= flagLast
		}
		putHeader(buf, h)
		out = append(out, &outFrame{seq: h.seq, buf: buf, cost: frameCost(size)})
		left -= size
	}
	return out
}
