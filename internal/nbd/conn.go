package nbd

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// errGoodbye ends the reading of a connection after NBD_CMD_DISC.
var errGoodbye = errors.New("nbd: client disconnected")

// errEnded takes answers that come when the connection is over.
var errEnded = errors.New("nbd: the connection has ended")

// readSize is the read buffer of a connection; larger payloads bypass it.
const readSize = 64 << 10

// conn is one connection in transmission.
type conn struct {
	srv  *server
	link link
	r    *bufio.Reader
	s    session
	out  answers
	mem  *budget
	wg   sync.WaitGroup
	idle atomic.Int32 // workers that wait for turn

	// turn holds one token: whoever has it reads the next request. What follows is
	// guarded by it.
	turn chan struct{}
	n    int   // workers
	err  error // why reading ended
	op   uint64
	pace pace

	minder minder

	started started
}

// source lets a buffered reader go on with a link where it began with a net.Conn.
type source struct{ io.Reader }

// serveConn carries one connection from greeting to end.
func (s *server) serveConn(ctx context.Context, sl *slot) (export string, err error) {
	nc := sl.nc
	defer func() { _ = nc.Close() }()
	if err := nc.SetDeadline(time.Now().Add(s.opts.HandshakeTimeout)); err != nil {
		return "", fmt.Errorf("set deadline: %w", err)
	}
	src := &source{nc}
	r := bufio.NewReaderSize(src, readSize)
	ses, err := s.negotiate(r, nc)
	if errors.Is(err, errAbort) {
		return "", nil
	} else if err != nil {
		return "", err
	}
	if err := nc.SetDeadline(time.Time{}); err != nil {
		return ses.name, fmt.Errorf("clear deadline: %w", err)
	}
	l, err := takeOver(nc)
	if err != nil {
		return ses.name, fmt.Errorf("take over the socket: %w", err)
	}
	defer func() { _ = l.Close() }()
	s.transmits(sl, l)
	src.Reader = l
	return ses.name, s.transmit(ctx, l, r, ses)
}

// transmit serves requests until the client leaves; nil after a proper goodbye.
func (s *server) transmit(ctx context.Context, l link, r *bufio.Reader, ses session) error {
	c := &conn{srv: s, link: l, r: r, s: ses, out: answers{link: l}, mem: newBudget(s.opts.MaxInflightBytes), turn: make(chan struct{}, 1)}
	c.minder.init()
	var minding sync.WaitGroup
	minding.Go(func() { c.mind(ctx) })
	c.turn <- struct{}{}
	c.n = 1
	c.wg.Add(1)
	c.worker(ctx)
	c.wg.Wait()
	c.settle(ctx)
	close(c.minder.quit)
	minding.Wait()
	err := c.out.flush()
	c.out.end()
	switch {
	case errors.Is(c.err, errGoodbye), errors.Is(c.err, io.EOF), errors.Is(c.err, syscall.ECONNRESET):
		// A client may end by closing its socket too; what it has not read is lost to nobody.
		return nil
	case err != nil:
		return fmt.Errorf("answer: %w", err)
	default:
		return c.err
	}
}

// task is one request that was read.
type task struct {
	req request
	no  refusal
	buf *buffer // of READ and WRITE, if not refused
}

// worker reads and serves requests until reading has ended.
func (c *conn) worker(ctx context.Context) {
	defer c.wg.Done()
	w := &replier{out: &c.out, structured: c.s.structured}
	hd := make([]byte, requestSize)
	for {
		c.idle.Add(1)
		<-c.turn
		c.idle.Add(-1)
		t, led := c.lead(ctx, w, hd)
		switch led {
		case ended:
			return
		case handedOn:
			c.serve(ctx, w, t)
		}
		_ = c.out.flush() // the error sticks, and the reader meets it
	}
}

// leading is how a worker's turn ended.
type leading int

const (
	ended    leading = iota // there is no more to read
	handedOn                // somebody else reads; the worker has a request to carry out
	deposed                 // somebody else reads; the worker's request took too long and is done
)

// lead reads requests, and carries out those that are quick without giving up
// its turn. When it returns the turn is not the worker's any more.
func (c *conn) lead(ctx context.Context, w *replier, hd []byte) (task, leading) {
	for c.err == nil {
		t, err := c.next(hd)
		if err == nil && ctx.Err() != nil {
			// It was cut off: what is left in the buffer is asked anew, or was.
			err = net.ErrClosed
			if t.buf != nil {
				c.release(t.buf)
			}
		}
		if err != nil {
			c.err = err
			break
		}
		waits := c.waits()
		if !t.quick() || waits && !c.canStart(t) || !c.pace.inline() {
			c.passOn(ctx)
			return t, handedOn
		}
		c.op++
		op := c.op
		start := time.Now()
		c.minder.begin(op)
		if waits {
			if !c.start(ctx, t) {
				if c.minder.end(op) {
					c.passOn(ctx)
				}
				return t, handedOn
			}
		} else {
			c.serve(ctx, w, t)
		}
		if !c.minder.end(op) {
			return task{}, deposed
		}
		c.pace.note(time.Since(start), t.slow())
	}
	_ = c.out.flush()
	c.turn <- struct{}{} // for the next worker to see the error too
	return task{}, ended
}

// waits says that the backend is known not to be quick.
func (c *conn) waits() bool {
	w, ok := c.s.backend.(Waiter)
	return ok && w.Waits()
}

// passOn gives the turn to another worker, a new one if all are busy and more are allowed.
func (c *conn) passOn(ctx context.Context) {
	_ = c.out.flush()
	if c.idle.Load() == 0 && c.n < c.srv.opts.MaxRequests {
		c.n++
		c.wg.Add(1)
		go c.worker(ctx)
	}
	c.turn <- struct{}{}
}

// fill makes answers leave before a read of n bytes may have to wait.
func (c *conn) fill(n int) error {
	if c.r.Buffered() < n {
		return c.out.flush()
	}
	return nil
}

// next reads one request with its payload. An error means that the connection
// cannot go on.
func (c *conn) next(hd []byte) (t task, err error) {
	if err = c.fill(requestSize); err != nil {
		return t, err
	}
	if _, err = io.ReadFull(c.r, hd); err != nil {
		return t, err
	}
	if t.req, err = decodeRequest(hd); err != nil {
		return t, err
	}
	if t.req.cmd == cmdDisc {
		return t, errGoodbye
	}
	n := t.req.length
	t.no = t.req.check(c.s.terms())
	switch {
	case t.req.cmd == cmdWrite && t.no != accepted:
		// The payload is on its way all the same; skipping it costs no memory.
		if err = c.fill(int(n)); err != nil {
			return t, err
		}
		if _, err = io.CopyN(io.Discard, c.r, int64(n)); err != nil {
			return t, fmt.Errorf("skip payload: %w", err)
		}
	case t.no == accepted && (t.req.cmd == cmdWrite || t.req.cmd == cmdRead):
		if !c.mem.tryTake(costOf(n)) {
			if err = c.out.flush(); err != nil {
				return t, err
			}
			if !c.mem.take(costOf(n)) {
				return t, net.ErrClosed
			}
		}
		t.buf = c.srv.pool.get(n)
		if t.req.cmd == cmdWrite {
			if err = c.fill(int(n)); err == nil {
				_, err = io.ReadFull(c.r, t.buf.data)
			}
			if err != nil {
				c.release(t.buf)
				return task{}, fmt.Errorf("read payload: %w", err)
			}
		}
	}
	return t, nil
}

func (c *conn) release(b *buffer) {
	n := b.cost()
	c.srv.pool.put(b)
	c.mem.give(n)
}

// serve carries one request out and answers it.
func (c *conn) serve(ctx context.Context, w *replier, t task) {
	if t.buf != nil {
		defer c.release(t.buf)
	}
	if t.no != accepted {
		w.fail(t.req, t.no.errno, t.no.why)
		return
	}
	if took := c.srv.opts.Took; took != nil {
		begun := time.Now()
		defer func() { took(time.Since(begun)) }()
	}
	b, req := c.s.backend, t.req
	off, n, fua := int64(req.off), int64(req.length), req.flags&cmdFlagFUA != 0
	var err error
	switch req.cmd {
	case cmdRead:
		if err = b.ReadAt(ctx, t.buf.data, off); err == nil {
			w.read(req, t.buf)
			return
		}
	case cmdWrite:
		err = b.WriteAt(ctx, t.buf.data, off, fua)
	case cmdTrim:
		err = b.Zero(ctx, off, n, fua, true)
	case cmdWriteZeroes:
		punch := req.flags&cmdFlagNoHole == 0
		if req.flags&cmdFlagFastZero != 0 && !b.(FastZeroer).FastZero(off, n, punch) {
			w.fail(req, errNotSup, "zeroes would not be faster than data")
			return
		}
		err = b.Zero(ctx, off, n, fua, punch)
	case cmdFlush:
		err = b.Flush(ctx)
	case cmdCache:
		if ch, ok := b.(Cacher); ok {
			err = ch.Cache(ctx, off, n)
		}
	case cmdBlockStatus:
		if err = w.status(ctx, req, b.(Allocator)); err == nil {
			return
		}
	}
	if err != nil {
		w.fail(req, errnoOf(err), err.Error())
		return
	}
	w.ok(req)
}
