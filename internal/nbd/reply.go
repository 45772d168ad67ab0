package nbd

import (
	"context"
	"encoding/binary"
	"fmt"
	"strings"
	"sync"
	"unicode/utf8"
)

// answers collects what is sent to the client. Small answers wait until there is
// nothing left to read, or flush is called: one system call then carries many.
type answers struct {
	link link

	mu  sync.Mutex
	p   []byte
	err error // the link is of no use any more

	flushing bool // a goroutine is about to send what offer left
}

const (
	holdAnswers = 32 << 10 // bytes of answers that wait at most
	copyAnswers = 8 << 10  // longer ones are not copied
	maxExtents  = 512      // bounds one block status answer
	maxMessage  = 512      // bytes of text that go with an error
)

// add sends p, at the latest with the next flush.
func (a *answers) add(p []byte) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(p) > copyAnswers && len(a.p) == 0 {
		a.write(p)
		return
	}
	if len(a.p)+len(p) > holdAnswers {
		a.flushLocked()
		if len(p) > copyAnswers {
			a.write(p)
			return
		}
	}
	a.p = append(a.p, p...)
}

// flush sends what waits; the error is that of this or of any send before.
func (a *answers) flush() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.flushLocked()
	return a.err
}

func (a *answers) flushLocked() {
	if len(a.p) > 0 {
		a.write(a.p)
		a.p = a.p[:0]
	}
}

func (a *answers) write(p []byte) {
	if a.err != nil {
		return
	}
	if _, a.err = a.link.Write(p); a.err != nil {
		// Answers are lost from here on: end the reader, wherever it waits.
		a.link.cut()
	}
}

// replier makes the answers of one worker.
type replier struct {
	out        *answers
	structured bool
	head       [chunkSize + 6 + maxMessage]byte
}

// ok answers a request that has no data.
func (w *replier) ok(req request) {
	p := w.head[:simpleSize]
	putSimple(p, req.cookie, 0)
	w.out.add(p)
}

// fail answers with an error, and a text for people where the client can take one.
func (w *replier) fail(req request, errno uint32, why string) {
	if !w.structured {
		p := w.head[:simpleSize]
		putSimple(p, req.cookie, errno)
		w.out.add(p)
		return
	}
	why = message(why)
	p := w.head[:chunkSize+6+len(why)]
	putChunk(p, req.cookie, typeError, uint32(6+len(why)))
	binary.BigEndian.PutUint32(p[chunkSize:], errno)
	binary.BigEndian.PutUint16(p[chunkSize+4:], uint16(len(why)))
	copy(p[chunkSize+6:], why)
	w.out.add(p)
}

// message makes a text what the protocol calls a string.
func message(s string) string {
	s = strings.ToValidUTF8(strings.ReplaceAll(s, "\x00", "?"), "?")
	if len(s) <= maxMessage {
		return s
	}
	s = s[:maxMessage]
	for !utf8.ValidString(s) {
		s = s[:len(s)-1]
	}
	return s
}

// read sends the data of a READ in one chunk, so DF holds always. The header
// goes into the room in front of the data.
func (w *replier) read(req request, buf *buffer) {
	p := buf.all[headRoom-simpleSize : headRoom+len(buf.data)]
	if w.structured {
		p = buf.all[headRoom-chunkSize-8 : headRoom+len(buf.data)]
		putChunk(p, req.cookie, typeOffsetData, 8+uint32(len(buf.data)))
		binary.BigEndian.PutUint64(p[chunkSize:], req.off)
	} else {
		putSimple(p, req.cookie, 0)
	}
	w.out.add(p)
}

// status asks for extents and sends them. Neighbours of one kind become one;
// the list ends within the range that was asked for.
func (w *replier) status(ctx context.Context, req request, alloc Allocator) error {
	limit := maxExtents
	if req.flags&cmdFlagReqOne != 0 {
		limit = 1
	}
	p := make([]byte, chunkSize+4, chunkSize+4+8*8)
	off, left, last := int64(req.off), int64(req.length), uint32(0)
	for count := 0; left > 0; {
		n, hole, err := alloc.Extent(ctx, off, left)
		if err == nil && (n <= 0 || n > left) {
			err = fmt.Errorf("extent of %d bytes in %d", n, left)
		}
		if err != nil {
			return err
		}
		var state uint32
		if hole {
			state = stateHole | stateZero
		}
		if count > 0 && state == last {
			e := p[len(p)-8:]
			binary.BigEndian.PutUint32(e, binary.BigEndian.Uint32(e)+uint32(n))
		} else {
			if count == limit {
				break
			}
			p = binary.BigEndian.AppendUint32(p, uint32(n))
			p = binary.BigEndian.AppendUint32(p, state)
			count++
		}
		last = state
		off, left = off+n, left-n
	}
	putChunk(p, req.cookie, typeBlockStatus, uint32(len(p)-chunkSize))
	binary.BigEndian.PutUint32(p[chunkSize:], allocationID)
	w.out.add(p)
	return nil
}

func putSimple(p []byte, cookie uint64, errno uint32) {
	binary.BigEndian.PutUint32(p, magicSimple)
	binary.BigEndian.PutUint32(p[4:], errno)
	binary.BigEndian.PutUint64(p[8:], cookie)
}

// putChunk writes the header of the only, and so last, chunk of a reply.
func putChunk(p []byte, cookie uint64, typ uint16, n uint32) {
	binary.BigEndian.PutUint32(p, magicStructured)
	binary.BigEndian.PutUint16(p[4:], chunkDone)
	binary.BigEndian.PutUint16(p[6:], typ)
	binary.BigEndian.PutUint64(p[8:], cookie)
	binary.BigEndian.PutUint32(p[16:], n)
}
