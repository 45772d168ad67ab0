package nbd

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Starter is implemented by a Backend that can begin a write and tell later that it
// is done. The server then goes on reading meanwhile, without a goroutine
// for each write that waits.
type Starter interface {
	// StartWrite begins to write all of p, and calls done once, from any goroutine,
	// possibly before it returns; p is the backend's until then. False: nothing was begun, since
	// that would have to wait, and done is not called; the server calls WriteAt then. It may take as long as a
	// write into a page cache. done does not block.
	StartWrite(ctx context.Context, p []byte, off int64, done func(error)) bool
}

// started counts the writes that a connection has begun and not answered.
type started struct {
	n  atomic.Int32
	wg sync.WaitGroup
}

func (s *started) add() {
	s.n.Add(1)
	s.wg.Add(1)
}

func (s *started) done() {
	s.n.Add(-1)
	s.wg.Done()
}

// canStart says whether a request is one that a backend might begin.
func (c *conn) canStart(t task) bool {
	if t.no != accepted || t.req.cmd != cmdWrite || int(c.started.n.Load()) >= c.srv.opts.MaxRequests {
		return false
	}
	_, ok := c.s.backend.(Starter)
	return ok
}

// start begins a write if the backend will; it is answered when it is done.
func (c *conn) start(ctx context.Context, t task) bool {
	c.started.add()
	begun := time.Now()
	ok := c.s.backend.(Starter).StartWrite(ctx, t.buf.data, int64(t.req.off), func(err error) {
		if took := c.srv.opts.Took; took != nil {
			took(time.Since(begun))
		}
		c.finish(t, err)
	})
	if !ok {
		c.started.done()
	}
	return ok
}

// finish answers a write that was begun. It does not block: the caller has more to
// do than this client.
func (c *conn) finish(t task, err error) {
	c.release(t.buf)
	w := &replier{out: &c.out, structured: c.s.structured}
	if err == nil {
		p := w.head[:simpleSize]
		putSimple(p, t.req.cookie, 0)
		if c.out.offer(p) {
			c.started.done()
			return
		}
	}
	go func() { // it counts until its answer is taken, so a client that does not read has no more of these than of workers
		defer c.started.done()
		if err != nil {
			w.fail(t.req, errnoOf(err), err.Error())
		} else {
			w.ok(t.req)
		}
		_ = c.out.flush() // the error sticks, and the reader meets it
	}()
}

// settle waits for the writes that were begun, until ctx ends.
func (c *conn) settle(ctx context.Context) {
	if c.started.n.Load() == 0 && ctx.Err() == nil {
		c.started.wg.Wait()
		return
	}
	over := make(chan struct{})
	go func() {
		c.started.wg.Wait()
		close(over)
	}()
	select {
	case <-over:
	case <-ctx.Done():
	}
}

// offer sends a small answer, with what waits before it, as far as that goes without
// waiting. False: nothing of it was taken.
func (a *answers) offer(p []byte) bool {
	l, ok := a.link.(*fdLink)
	if !ok || !a.mu.TryLock() {
		return false
	}
	defer a.mu.Unlock()
	if a.err != nil {
		return true // nobody is there to be told
	}
	if len(a.p)+len(p) > holdAnswers {
		return false
	}
	a.p = append(a.p, p...)
	n, err := l.tryWrite(a.p)
	if err != nil {
		a.err = err
		a.link.cut()
		return true
	}
	rest := copy(a.p, a.p[n:])
	a.p = a.p[:rest]
	if rest > 0 && !a.flushing { // the client is slow to read
		a.flushing = true
		go a.flushRest()
	}
	return true
}

// flushRest sends what offer left.
func (a *answers) flushRest() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.flushing = false
	a.flushLocked()
}

// end has everything dropped from now on: the link may mean something else soon.
func (a *answers) end() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.err == nil {
		a.err = errEnded
	}
}

// tryWrite writes what the socket takes at once.
func (l *fdLink) tryWrite(p []byte) (int, error) {
	for {
		n, err := unix.SendmsgN(l.fd, p, nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		switch err {
		case nil:
			return n, nil
		case unix.EAGAIN:
			return 0, nil
		case unix.EINTR:
		default:
			return 0, err
		}
	}
}
