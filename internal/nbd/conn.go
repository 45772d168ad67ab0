package nbd

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// errGoodbye ends the reading of a connection after NBD_CMD_DISC.
var errGoodbye = errors.New("nbd: client disconnected")

// readSize is the read buffer of a connection; larger payloads bypass it.
const readSize = 64 << 10

// maxExtents bounds one block status reply.
const maxExtents = 512

// conn is one connection in transmission.
type conn struct {
	srv  *server
	nc   net.Conn
	r    *bufio.Reader
	s    session
	mem  *budget
	wg   sync.WaitGroup
	idle atomic.Int32 // workers that wait for turn

	// turn holds one token: whoever has it reads the next request. n and err are
	// guarded by it.
	turn chan struct{}
	n    int   // workers
	err  error // why reading ended

	writing sync.Mutex // one reply at a time
}

// serveConn carries one connection from greeting to end.
func (s *server) serveConn(ctx context.Context, nc net.Conn) (export string, err error) {
	if err := nc.SetDeadline(time.Now().Add(s.opts.HandshakeTimeout)); err != nil {
		return "", fmt.Errorf("set deadline: %w", err)
	}
	r := bufio.NewReaderSize(nc, readSize)
	ses, err := s.negotiate(r, nc)
	if errors.Is(err, errAbort) {
		return "", nil
	} else if err != nil {
		return "", err
	}
	if err := nc.SetDeadline(time.Time{}); err != nil {
		return ses.name, fmt.Errorf("clear deadline: %w", err)
	}
	c := &conn{srv: s, nc: nc, r: r, s: ses, mem: newBudget(s.opts.MaxInflightBytes), turn: make(chan struct{}, 1)}
	c.turn <- struct{}{}
	c.n = 1
	c.wg.Add(1)
	c.worker(ctx)
	c.wg.Wait()
	if errors.Is(c.err, errGoodbye) || errors.Is(c.err, io.EOF) {
		return ses.name, nil
	}
	return ses.name, c.err
}

// worker reads and serves requests until reading has ended.
func (c *conn) worker(ctx context.Context) {
	defer c.wg.Done()
	hd := new([requestSize]byte)
	head := new([headRoom]byte)
	for {
		c.idle.Add(1)
		<-c.turn
		c.idle.Add(-1)
		if c.err != nil {
			c.turn <- struct{}{} // for the next worker to see it too
			return
		}
		req, buf, errno, err := c.next(hd)
		if err != nil {
			c.err = err
			c.turn <- struct{}{}
			return
		}
		if c.idle.Load() == 0 && c.n < c.srv.opts.MaxRequests {
			c.n++
			c.wg.Add(1)
			go c.worker(ctx)
		}
		c.turn <- struct{}{}
		err = c.serve(ctx, req, buf, errno, head)
		if buf != nil {
			n := buf.cost()
			c.srv.pool.put(buf)
			c.mem.give(n)
		}
		if err != nil {
			// Answers are lost from here on: end the reader, wherever it waits.
			_ = c.nc.Close()
			c.mem.close()
		}
	}
}

// next reads one request with its payload. errno is not 0 when the request is
// to be refused; err is set when the connection cannot go on.
func (c *conn) next(hd *[requestSize]byte) (req request, buf *buffer, errno uint32, err error) {
	if _, err = io.ReadFull(c.r, hd[:]); err != nil {
		return req, nil, 0, err
	}
	if req, err = decodeRequest(hd); err != nil {
		return req, nil, 0, err
	}
	if req.cmd == cmdDisc {
		return req, nil, 0, errGoodbye
	}
	errno = req.check(c.s.size, c.s.structured, c.s.status)
	switch {
	case req.cmd == cmdWrite && errno != 0:
		// The payload is on its way all the same; skipping it costs no memory.
		if _, err = io.CopyN(io.Discard, c.r, int64(req.length)); err != nil {
			return req, nil, 0, fmt.Errorf("skip payload: %w", err)
		}
	case errno == 0 && (req.cmd == cmdWrite || req.cmd == cmdRead):
		if !c.mem.take(costOf(req.length)) {
			return req, nil, 0, net.ErrClosed
		}
		buf = c.srv.pool.get(req.length)
		if req.cmd == cmdWrite {
			if _, err = io.ReadFull(c.r, buf.data); err != nil {
				return req, nil, 0, fmt.Errorf("read payload: %w", err)
			}
		}
	}
	return req, buf, errno, nil
}

// serve carries one request out and answers it; an error means that the answer was not sent.
func (c *conn) serve(ctx context.Context, req request, buf *buffer, errno uint32, head *[headRoom]byte) error {
	if errno != 0 {
		return c.answer(req, errno, head)
	}
	b, off, n, fua := c.s.backend, int64(req.off), int64(req.length), req.flags&cmdFlagFUA != 0
	var err error
	switch req.cmd {
	case cmdRead:
		if err = b.ReadAt(ctx, buf.data, off); err == nil {
			return c.answerRead(req, buf)
		}
	case cmdWrite:
		err = b.WriteAt(ctx, buf.data, off, fua)
	case cmdTrim:
		err = b.Zero(ctx, off, n, fua, true)
	case cmdWriteZeroes:
		err = b.Zero(ctx, off, n, fua, req.flags&cmdFlagNoHole == 0)
	case cmdFlush:
		err = b.Flush(ctx)
	case cmdBlockStatus:
		return c.answerStatus(ctx, req, head)
	}
	return c.answer(req, errnoOf(err), head)
}

// answer sends a reply without data.
func (c *conn) answer(req request, errno uint32, head *[headRoom]byte) error {
	p := head[:simpleSize]
	if c.s.structured && (req.cmd == cmdRead || req.cmd == cmdBlockStatus) {
		// These two must be answered by chunks; the other ones may be simple.
		p = head[:chunkSize+6]
		putChunk(p, req.cookie, typeError, 6)
		binary.BigEndian.PutUint32(p[chunkSize:], errno)
		binary.BigEndian.PutUint16(p[chunkSize+4:], 0) // no message
	} else {
		putSimple(p, req.cookie, errno)
	}
	return c.send(p)
}

// answerRead sends the data of a READ in one chunk, so DF holds always.
func (c *conn) answerRead(req request, buf *buffer) error {
	if !c.s.structured {
		p := buf.all[headRoom-simpleSize : headRoom+len(buf.data)]
		putSimple(p, req.cookie, 0)
		return c.send(p)
	}
	p := buf.all[headRoom-chunkSize-8 : headRoom+len(buf.data)]
	putChunk(p, req.cookie, typeOffsetData, 8+uint32(len(buf.data)))
	binary.BigEndian.PutUint64(p[chunkSize:], req.off)
	return c.send(p)
}

// answerStatus asks the backend for extents and sends them.
func (c *conn) answerStatus(ctx context.Context, req request, head *[headRoom]byte) error {
	alloc, ok := c.s.backend.(Allocator)
	if !ok {
		return c.answer(req, errInvalid, head)
	}
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
			return c.answer(req, errnoOf(err), head)
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
	return c.send(p)
}

func (c *conn) send(p []byte) error {
	c.writing.Lock()
	_, err := c.nc.Write(p)
	c.writing.Unlock()
	return err
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
