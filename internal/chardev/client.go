package chardev

import (
	"context"
	"errors"
	"fmt"
	"io"
)

// The ends of an Attach that are not the client's doing.
var (
	ErrClosed = errors.New("character device is closed")
	ErrSlow   = errors.New("client reads too slowly")
)

// clientBound is how much output may wait for one client, beyond the history.
const clientBound = 1 << 20

// ring keeps the last size bytes.
type ring struct {
	size int
	b    []byte // up to twice size, so that it is moved seldom
}

func (r *ring) add(b []byte) {
	if len(b) > r.size {
		b = b[len(b)-r.size:]
	}
	if len(r.b)+len(b) > 2*r.size {
		r.b = append(r.b[:0], r.b[max(0, len(r.b)-r.size):]...)
	}
	r.b = append(r.b, b...)
}

func (r *ring) bytes() []byte {
	return append([]byte(nil), r.b[max(0, len(r.b)-r.size):]...)
}

// client is one attached reader. Its fields belong to the Port's mutex.
type client struct {
	queue []byte
	err   error
	wake  chan struct{}
	dead  chan struct{} // closed when err is set
}

func (c *client) send(b []byte) {
	if len(c.queue)+len(b) > clientBound {
		c.end(ErrSlow)
		return
	}
	c.queue = append(c.queue, b...)
	c.kick()
}

func (c *client) end(err error) {
	if c.err == nil {
		c.err = err
		close(c.dead)
	}
}

func (c *client) kick() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// Attach connects a client: it gets the history if asked for, then output as
// it is released, and what it sends goes to the guest. Attach returns when rw
// ends (its end of file gives nil), ctx ends, the Port is closed, or the client
// reads too slowly. If rw is an io.Closer, Attach closes it at its end and
// leaves no goroutine behind; otherwise one waits in rw.Read until that returns.
func (p *Port) Attach(ctx context.Context, rw io.ReadWriter, history bool) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	c := &client{wake: make(chan struct{}, 1), dead: make(chan struct{})}
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return fmt.Errorf("attach: %w", ErrClosed)
	}
	if history {
		c.queue = p.history.bytes()
		c.kick()
	}
	p.clients[c] = struct{}{}
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		delete(p.clients, c)
		p.mu.Unlock()
	}()

	input, output := make(chan error, 1), make(chan error, 1)
	go func() { input <- p.pumpInput(ctx, rw) }()
	go func() { output <- p.pumpOutput(ctx, rw, c) }()
	var err error
	inputEnded, outputEnded := false, false
	select {
	case err = <-input:
		inputEnded = true
	case err = <-output:
		outputEnded = true
	case <-c.dead: // perhaps in the middle of a Write that nobody reads
		p.mu.Lock()
		err = c.err
		p.mu.Unlock()
	case <-ctx.Done():
		err = ctx.Err()
	}
	cancel()
	closer, closes := rw.(io.Closer)
	if closes {
		_ = closer.Close() // what it says of the connection's end, err says better
	}
	if closes && !inputEnded {
		<-input //nolint:errcheck // it came from closing
	}
	if !outputEnded && (closes || inputEnded) {
		<-output //nolint:errcheck // as above
	}
	if err != nil {
		return fmt.Errorf("attach: %w", err)
	}
	return nil
}

func (p *Port) pumpInput(ctx context.Context, r io.Reader) error {
	b := make([]byte, writeSize)
	for {
		n, err := r.Read(b)
		if n > 0 {
			if werr := p.Write(ctx, b[:n]); werr != nil {
				return werr
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (p *Port) pumpOutput(ctx context.Context, w io.Writer, c *client) error {
	for {
		p.mu.Lock()
		b := c.queue
		c.queue = nil
		p.mu.Unlock()
		if len(b) > 0 {
			if _, err := w.Write(b); err != nil {
				return err
			}
			continue
		}
		select {
		case <-c.wake:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
