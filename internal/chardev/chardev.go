// Package chardev is the shim's end of a guest's character devices: serial
// console and guest-agent port. What the guest writes is held back with the
// epoch that wrote it, like frames; what goes to the guest is held back while
// it is stopped, since QEMU would move ring indices in memory behind the
// checkpoint's back.
//
// One epoch of a held Port, in this order:
//
//	Hold            nothing is sent to QEMU, nothing is read from it
//	(stop)
//	Settle          QEMU has taken what it can of the input sent before
//	(device state saved, memory flushed)
//	Cut             the output of this epoch
//	(cont)
//	Unhold
//
// Cut comes after the flush, since reading lets a QEMU that waited for room
// write on, also while the guest is stopped: that belongs to the next epoch
// and must not be in this one's memory.
//
// Concurrency: all methods may be called from any goroutine; Hold, Settle, Cut
// and Unhold belong to the one who stops the guest. Outside Hold a Port reads always.
//
// Not guaranteed: a client that does not read is cut off, and output that was
// released while nobody was attached is kept only in the history. Input that
// was on its way to a QEMU that ends is lost.
package chardev

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	defaultHistory = 64 << 10
	defaultHeld    = 1 << 20
	readSize       = 32 << 10
	writeSize      = 4 << 10 // sent to QEMU at a time; Hold waits for one at most

	// holdPatience is how long Hold waits for a QEMU that reads slowly. A guest
	// that does not take its input at all must not hold up its checkpoints.
	holdPatience = 2 * time.Millisecond
	// settleRounds is how many turns of QEMU's main loop without a read say
	// that none will come: one arms the watch on the socket, the next uses it.
	settleRounds = 3
)

// Options of Listen.
type Options struct {
	// History is the size of the ring of released output in bytes; 0 means
	// 64 KiB, negative none.
	History int
	// MaxHeld bounds held output in bytes; 0 means 1 MiB. OnBound is called
	// once each time it is crossed, from the reading goroutine; it must not
	// block, nor call the Port. Beyond twice the bound reading stops: the guest's
	// device waits then, QEMU's main loop does not.
	MaxHeld int
	OnBound func(held int)
}

// Port is the shim's end of one character device.
type Port struct {
	opt     Options
	path    string
	listen  *net.UnixListener
	arrived chan struct{}
	quit    chan struct{}
	done    chan struct{}

	mu        sync.Mutex
	conn      *net.UnixConn // QEMU's, nil while it is not connected
	connected chan struct{} // closed while conn is not nil
	thaw      chan struct{} // closed when the reader may read; replaced by Hold
	frozen    bool          // Hold stands
	held      bool          // output waits for Release
	buf       []byte        // held output
	since     time.Time
	over      bool
	closed    bool
	history   ring
	clients   map[*client]struct{}

	token chan struct{} // holds one element while nobody writes and Hold does not stand
}

// Listen makes the Unix socket at path (an old one is replaced) and serves the
// QEMU that connects to it, again after each reconnection.
func Listen(path string, o Options) (*Port, error) {
	if o.History == 0 {
		o.History = defaultHistory
	}
	if o.MaxHeld <= 0 {
		o.MaxHeld = defaultHeld
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("replace socket: %w", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen for character device: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return nil, fmt.Errorf("listen for character device: %w", err)
	}
	p := &Port{opt: o, path: path, listen: l, arrived: make(chan struct{}, 1), quit: make(chan struct{}), done: make(chan struct{}),
		connected: make(chan struct{}), thaw: make(chan struct{}), history: ring{size: max(o.History, 0)},
		clients: map[*client]struct{}{}, token: make(chan struct{}, 1)}
	close(p.thaw)
	p.token <- struct{}{}
	go p.serve()
	return p, nil
}

// Close removes the socket, ends all clients and waits for the goroutine.
func (p *Port) Close() error {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return nil
	}
	p.closed = true
	close(p.quit)
	conn := p.conn
	for c := range p.clients {
		c.end(ErrClosed)
	}
	p.mu.Unlock()
	if conn != nil {
		conn.Close() // not with mu held: it waits for the reader, who may want mu
	}
	err := p.listen.Close()
	<-p.done
	return err
}

// Connected reports whether QEMU is connected.
func (p *Port) Connected() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.conn != nil
}

// serve takes one connection after the other: a QEMU has one, and makes a new
// one only when it has lost the old.
func (p *Port) serve() {
	defer close(p.done)
	for {
		c, err := p.listen.AcceptUnix()
		if err != nil {
			select {
			case <-p.quit:
				return
			case <-time.After(10 * time.Millisecond): // out of descriptors, perhaps not for long
				continue
			}
		}
		p.mu.Lock()
		if p.closed {
			p.mu.Unlock()
			c.Close()
			return
		}
		p.conn = c
		close(p.connected)
		p.mu.Unlock()

		p.read(c)

		p.mu.Lock()
		p.conn = nil
		p.connected = make(chan struct{})
		p.mu.Unlock()
		c.Close()
	}
}

// read moves QEMU's output until the connection ends.
func (p *Port) read(c *net.UnixConn) {
	rc, err := c.SyscallConn()
	if err != nil {
		return
	}
	scratch := make([]byte, readSize)
	for {
		p.mu.Lock()
		thaw := p.thaw
		p.mu.Unlock()
		select {
		case <-thaw:
		case <-p.quit:
			return
		}
		ended, over := false, 0
		err := rc.Read(func(fd uintptr) bool {
			p.mu.Lock()
			defer p.mu.Unlock()
			if p.frozen || p.full() {
				return true // wait for the thaw outside
			}
			n, err := unix.Read(int(fd), scratch)
			switch {
			case errors.Is(err, unix.EINTR):
				return true
			case errors.Is(err, unix.EAGAIN):
				return false
			case err != nil || n == 0:
				ended = true
				return true
			}
			over = p.take(scratch[:n])
			return true
		})
		if over > 0 && p.opt.OnBound != nil {
			p.opt.OnBound(over)
		}
		if err != nil || ended {
			return
		}
	}
}

// full reports that reading must wait until something was cut or released.
func (p *Port) full() bool { return p.held && len(p.buf) >= 2*p.opt.MaxHeld }

// gate makes the reader wait, or go on, as the state asks for. With mu held.
func (p *Port) gate() {
	shut := p.frozen || p.full()
	select {
	case <-p.thaw:
		if shut {
			p.thaw = make(chan struct{})
		}
	default:
		if !shut {
			close(p.thaw)
		}
	}
}

// take keeps or passes on what was read; over is the amount held if the bound
// was crossed just now. With mu held.
func (p *Port) take(b []byte) (over int) {
	if !p.held {
		p.deliver(b)
		return 0
	}
	if len(p.buf) == 0 {
		p.since = time.Now()
	}
	p.buf = append(p.buf, b...)
	if len(p.buf) > p.opt.MaxHeld && !p.over {
		p.over, over = true, len(p.buf)
	}
	p.gate()
	select {
	case p.arrived <- struct{}{}:
	default:
	}
	return over
}

// SetHeld chooses between holding output until Release (true) and passing it
// on at once (false; the state after Listen). Switching to false releases what
// is held, so it is for a guest whose output may leave.
func (p *Port) SetHeld(held bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.held = held
	if !held {
		p.deliver(p.drop())
	}
	p.gate()
}

// drop empties the hold and returns what was in it. With mu held.
func (p *Port) drop() []byte {
	b := p.buf
	p.buf, p.over, p.since = nil, false, time.Time{}
	return b
}

// Arrived has an element whenever held output arrived since it was last read.
func (p *Port) Arrived() <-chan struct{} { return p.arrived }

// Waiting returns how many bytes are held and not cut yet, and since when.
func (p *Port) Waiting() (bytes int, since time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.buf), p.since
}

// Hold keeps further input back and stops reading. To be called before the
// guest is stopped. It waits a moment for QEMU to take the input that was sent, so
// that Settle has nothing to do in most cases.
func (p *Port) Hold(ctx context.Context) error {
	select {
	case <-p.token:
	case <-ctx.Done():
		return fmt.Errorf("hold character device: %w", ctx.Err())
	}
	p.mu.Lock()
	p.frozen = true
	p.gate()
	p.mu.Unlock()
	for end := time.Now().Add(holdPatience); p.unread() > 0 && time.Now().Before(end) && ctx.Err() == nil; {
		time.Sleep(50 * time.Microsecond)
	}
	return nil
}

// unread is how much of the input sent QEMU has not read. The unit is the
// kernel's, 0 means all was read.
func (p *Port) unread() int {
	n := 0
	p.control(func(fd int) { n, _ = unix.IoctlGetInt(fd, unix.SIOCOUTQ) })
	return n
}

// control runs f with the descriptor of QEMU's connection, if there is one.
func (p *Port) control(f func(fd int)) {
	p.mu.Lock()
	c := p.conn
	p.mu.Unlock()
	if c == nil {
		return
	}
	if rc, err := c.SyscallConn(); err == nil {
		_ = rc.Control(func(fd uintptr) { f(int(fd)) }) // a closed connection has nothing in it
	}
}

// Settle is called when the guest is stopped and before its state is saved. If
// there is input that QEMU has not read, it makes sure that QEMU does not read
// it later: the stopped guest offers no new room, so what a few turns of QEMU's
// main loop leave lying stays there. roundTrip carries out any QMP command.
func (p *Port) Settle(ctx context.Context, roundTrip func(context.Context) error) error {
	last := p.unread()
	for rounds := 0; last > 0 && rounds < settleRounds; rounds++ {
		if err := roundTrip(ctx); err != nil {
			return fmt.Errorf("settle input of character device: %w", err)
		}
		if n := p.unread(); n != last {
			last, rounds = n, -1
		}
	}
	return nil
}

// Unhold lets input and output flow again; to be called when the guest runs.
// Without a Hold before it does nothing.
func (p *Port) Unhold() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.frozen {
		p.frozen = false
		p.gate()
		p.token <- struct{}{} // has room: Hold took it out
	}
}

// Cut returns, while the guest is stopped and Hold stands, exactly what it
// wrote since the last Cut. The caller keeps the slice.
func (p *Port) Cut() []byte {
	p.mu.Lock()
	b := p.drop()
	p.gate()
	p.mu.Unlock()
	p.control(func(fd int) {
		// Not until it is empty: QEMU may write more while this reads, and
		// that is not of this epoch.
		left, err := unix.IoctlGetInt(fd, unix.SIOCINQ)
		for err == nil && left > 0 {
			part := make([]byte, left)
			var n int
			if n, err = unix.Read(fd, part); errors.Is(err, unix.EINTR) {
				err = nil
				continue
			}
			n = max(n, 0)
			if err == nil && n == 0 {
				err = io.EOF // the reader deals with it
			}
			b = append(b, part[:n]...)
			left -= n
		}
	})
	return b
}

// Release passes the output of an epoch on to the attached clients and the
// history. Calls keep their order.
func (p *Port) Release(b []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.deliver(b)
}

// deliver gives output to everybody who wants it. With mu held.
func (p *Port) deliver(b []byte) {
	if len(b) == 0 {
		return
	}
	p.history.add(b)
	for c := range p.clients {
		c.send(b)
	}
}

// Write sends input to the guest. It waits for QEMU to connect, while Hold
// stands, and as long as the guest does not take its input. After an error
// some of the input may have been sent.
func (p *Port) Write(ctx context.Context, b []byte) error {
	for len(b) > 0 {
		n := min(len(b), writeSize)
		if err := p.write(ctx, b[:n]); err != nil {
			return fmt.Errorf("send input to the guest: %w", err)
		}
		b = b[n:]
	}
	return nil
}

func (p *Port) write(ctx context.Context, b []byte) error {
	for {
		p.mu.Lock()
		connected := p.connected
		p.mu.Unlock()
		select {
		case <-connected:
		case <-p.quit:
			return ErrClosed
		case <-ctx.Done():
			return ctx.Err()
		}
		select {
		case <-p.token:
		case <-p.quit:
			return ErrClosed
		case <-ctx.Done():
			return ctx.Err()
		}
		p.mu.Lock()
		c := p.conn
		p.mu.Unlock()
		// One piece under way at a time: a guest that takes no input has not
		// more of it lying around than Settle has to look after.
		if c != nil && p.unread() == 0 {
			_, err := c.Write(b) // does not wait: an empty socket takes writeSize
			p.token <- struct{}{}
			return err
		}
		p.token <- struct{}{}
		select {
		case <-time.After(200 * time.Microsecond):
		case <-p.quit:
			return ErrClosed
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// History returns a copy of the released output that is kept.
func (p *Port) History() []byte {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.history.bytes()
}

// Quiet reports, after Hold, that QEMU has read all input: Settle has nothing
// to do then.
func (p *Port) Quiet() bool { return p.unread() == 0 }
