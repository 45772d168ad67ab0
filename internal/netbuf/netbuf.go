// Package netbuf holds back what a guest sends: it diverts the frames of one
// NIC out of a running QEMU into this process and tells exactly which of them
// belong to the epoch that just ended. Once that epoch is held by the other
// host they leave by the tap itself (Outlet), not through QEMU: so they can
// leave while the guest stands still for its next checkpoint, and QEMU's main
// loop sees each frame once.
//
// Concurrency: one goroutine per Diverter reads always, whether anybody wants
// the frames or not, since a full socket would block QEMU's main loop. All
// methods may be called from any goroutine; Drain belongs to the one who stops
// the guest.
//
// Failure: when QEMU ends, or its side of the socket does, Err says so; frames
// that were drained before can still be sent.
//
// Not guaranteed: frames are not kept for ever. Beyond twice Options.MaxBytes
// whole frames are dropped, as a network may, and counted. Frames that QEMU
// itself makes (announce-self) must not be diverted: they come without the
// header that the others have.
package netbuf

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Wire form of QEMU's filter-redirector with vnet_hdr_support:
//
//	uint32 length of header and frame, uint32 length of the header (big-endian), header, frame
const (
	prefix   = 8
	maxFrame = 128 << 10 // more than QEMU's NET_BUFSIZE (69,632)

	defaultMax    = 8 << 20
	drainPatience = 2 * time.Second
)

// Commander carries out QMP commands; *qemu.QMP is one.
type Commander interface {
	Execute(ctx context.Context, command string, args any) (json.RawMessage, error)
}

// Options of Divert.
type Options struct {
	// MaxBytes is the bound of held output of this NIC that is not drained
	// yet; 0 means 8 MiB.
	MaxBytes int64
	// OnBound is called once each time the bound is crossed upwards, from the
	// reading goroutine: the guest must be stopped soon. It must not block, nor call the Diverter.
	OnBound func(nic string, held int64)
}

// Stats of a Diverter since it began.
type Stats struct {
	Frames, Bytes uint64 // arrived from the guest
	Dropped       uint64 // frames beyond the hard bound
}

// Diverter is the diversion of one NIC.
type Diverter struct {
	nic     string
	opt     Options
	q       Commander
	out     *net.UnixConn // as QEMU names it: out of it
	arrived chan struct{}
	done    chan struct{} // the reading goroutine has ended
	undo    []func(context.Context) error

	mu     sync.Mutex
	cur    *buffer // being filled; complete frames up to cur.whole
	full   []*buffer
	frames int
	bytes  int64
	since  time.Time
	over   bool
	stats  Stats
	err    error
	closed bool

	pool *sync.Pool
}

// NIC returns the id of the NIC.
func (d *Diverter) NIC() string { return d.nic }

// Arrived has an element whenever frames arrived since it was last read.
func (d *Diverter) Arrived() <-chan struct{} { return d.arrived }

// Waiting returns what is held and not yet drained, and since when the oldest waits.
func (d *Diverter) Waiting() (frames int, bytes int64, since time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.frames, d.bytes, d.since
}

// Stats returns the counters.
func (d *Diverter) Stats() Stats {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.stats
}

// Err returns why the diversion broke (QEMU's end, mostly), or nil.
func (d *Diverter) Err() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.err
}

// Divert begins to hold the frames of NIC nicID. Only while the guest is
// stopped and the tap's gate shut. A Unix socket is made in sockDir for a moment.
func Divert(ctx context.Context, q Commander, nicID, sockDir string, o Options) (*Diverter, error) {
	if o.MaxBytes <= 0 {
		o.MaxBytes = defaultMax
	}
	d := &Diverter{nic: nicID, opt: o, q: q, arrived: make(chan struct{}, 1), done: make(chan struct{}), pool: newPool()}
	if err := d.setUp(ctx, sockDir); err != nil {
		_ = d.tearDown(context.WithoutCancel(ctx)) // of what may be half there; the first error says why
		return nil, fmt.Errorf("divert output of %s: %w", nicID, err)
	}
	return d, nil
}

func (d *Diverter) setUp(ctx context.Context, sockDir string) error {
	var err error
	if d.out, err = d.channel(ctx, "out", sockDir); err != nil {
		return err
	}
	d.cur = d.pool.Get().(*buffer)
	go d.read()
	return d.filter(ctx, "out", "outdev")
}

// channel makes one character device in QEMU and returns our end.
func (d *Diverter) channel(ctx context.Context, dir, sockDir string) (*net.UnixConn, error) {
	id, path := d.id("c", dir), filepath.Join(sockDir, d.id("div", dir))
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	defer l.Close() // removes the socket too
	_, err = d.q.Execute(ctx, "chardev-add", map[string]any{"id": id, "backend": map[string]any{"type": "socket",
		"data": map[string]any{"server": false, "addr": map[string]any{"type": "unix", "data": map[string]any{"path": path}}}}})
	if err != nil {
		return nil, err
	}
	d.undo = append(d.undo, func(ctx context.Context) error {
		_, err := d.q.Execute(ctx, "chardev-remove", map[string]any{"id": id})
		return err
	})
	// QEMU has connected when it answers; the connection waits in the queue.
	if err := l.SetDeadline(time.Now().Add(drainPatience)); err != nil {
		return nil, err
	}
	return l.AcceptUnix()
}

func (d *Diverter) filter(ctx context.Context, dir, dev string) error {
	id := d.id("f", dir)
	_, err := d.q.Execute(ctx, "object-add", map[string]any{"qom-type": "filter-redirector", "id": id, "netdev": d.nic,
		"queue": "rx", dev: d.id("c", dir), "vnet_hdr_support": true})
	if err != nil {
		return err
	}
	d.undo = append(d.undo, func(ctx context.Context) error {
		_, err := d.q.Execute(ctx, "object-del", map[string]any{"id": id})
		return err
	})
	return nil
}

func (d *Diverter) id(kind, dir string) string { return "pd-" + kind + "-" + dir + "-" + d.nic }

// Remove ends the diversion: the guest's frames go straight out again. Only
// while the guest is stopped, with the gate shut, and after Drain and Release of the last frames.
func (d *Diverter) Remove(ctx context.Context) error {
	if err := d.tearDown(ctx); err != nil {
		return fmt.Errorf("end diversion of %s: %w", d.nic, err)
	}
	return nil
}

// Close forgets everything held and ends the goroutine, without a word to
// QEMU (which is gone or about to be).
func (d *Diverter) Close() error {
	d.undo = nil
	return d.tearDown(context.Background())
}

func (d *Diverter) tearDown(ctx context.Context) error {
	var errs []error
	for i := len(d.undo) - 1; i >= 0; i-- {
		errs = append(errs, d.undo[i](ctx))
	}
	d.undo = nil
	d.mu.Lock()
	d.closed = true
	d.mu.Unlock()
	if d.out != nil {
		d.out.Close()
	}
	if d.cur != nil { // the goroutine was started
		<-d.done
	}
	return errors.Join(errs...)
}

// read is the goroutine that always reads.
func (d *Diverter) read() {
	defer close(d.done)
	rc, err := d.out.SyscallConn()
	if err == nil {
		var ferr error
		err = rc.Read(func(fd uintptr) bool {
			d.mu.Lock()
			var over int64
			over, ferr = d.fill(int(fd))
			d.mu.Unlock()
			if over > 0 && d.opt.OnBound != nil {
				d.opt.OnBound(d.nic, over)
			}
			return ferr != nil
		})
		if ferr != nil {
			err = ferr
		}
	}
	d.mu.Lock()
	if !d.closed {
		d.err = fmt.Errorf("read diverted output of %s: %w", d.nic, err)
	}
	d.mu.Unlock()
	d.signal()
}

func (d *Diverter) signal() {
	select {
	case d.arrived <- struct{}{}:
	default:
	}
}

// fill reads until the socket is empty. over is the amount held if the bound
// was crossed just now. Called with mu held, by the reader and by Drain.
func (d *Diverter) fill(fd int) (over int64, err error) {
	had := d.frames
	defer func() {
		if d.frames > had {
			d.signal()
		}
	}()
	for {
		if d.cur.room() == 0 {
			d.nextBuffer()
		}
		n, err := unix.Read(fd, d.cur.data[d.cur.end:])
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			return over, nil
		case err != nil:
			return over, err
		case n == 0:
			return over, io.EOF
		}
		d.cur.end += n
		if err := d.parse(); err != nil {
			return over, err
		}
		if d.bytes > d.opt.MaxBytes && !d.over {
			d.over, over = true, d.bytes
		}
	}
}

// nextBuffer puts the full buffer aside; the frame that did not fit moves on.
func (d *Diverter) nextBuffer() {
	old := d.cur
	d.cur = d.pool.Get().(*buffer)
	d.cur.end = copy(d.cur.data, old.data[old.whole:old.end])
	old.end = old.whole
	d.full = append(d.full, old)
}

// parse counts the frames that are complete by now.
func (d *Diverter) parse() error {
	b := d.cur
	for b.end-b.whole >= prefix {
		n := int(binary.BigEndian.Uint32(b.data[b.whole:]))
		if n > maxFrame-prefix {
			return fmt.Errorf("frame of %d bytes: not what a filter-redirector sends", n)
		}
		size := prefix + n
		if b.end-b.whole < size {
			return nil
		}
		d.stats.Frames++
		d.stats.Bytes += uint64(n)
		if d.bytes+int64(size) > 2*d.opt.MaxBytes {
			d.stats.Dropped++
			b.end = b.whole + copy(b.data[b.whole:], b.data[b.whole+size:b.end])
			continue
		}
		if d.frames == 0 {
			d.since = time.Now()
		}
		d.frames++
		d.bytes += int64(size)
		b.frames++
		b.whole += size
	}
	return nil
}

// Drain returns, while the guest is stopped, exactly the frames it sent since
// the last Drain: QEMU wrote them all before it answered that it has stopped.
func (d *Diverter) Drain(ctx context.Context) (Frames, error) {
	f, err := d.drain(ctx)
	if err != nil {
		return Frames{}, fmt.Errorf("drain output of %s: %w", d.nic, err)
	}
	return f, nil
}

func (d *Diverter) drain(ctx context.Context) (Frames, error) {
	rc, err := d.out.SyscallConn()
	if err != nil {
		return Frames{}, err
	}
	deadline := time.Now().Add(drainPatience)
	for {
		var f Frames
		var done bool
		var ferr error
		err := rc.Control(func(fd uintptr) {
			d.mu.Lock()
			defer d.mu.Unlock()
			if d.err != nil {
				ferr = d.err
				return
			}
			if _, ferr = d.fill(int(fd)); ferr != nil {
				return
			}
			if d.cur.end == d.cur.whole {
				f, done = d.take(), true
			}
		})
		if err = errors.Join(err, ferr); err != nil || done {
			return f, err
		}
		// Half a frame: QEMU is still writing, so it cannot be stopped yet.
		if ctx.Err() != nil {
			return Frames{}, ctx.Err()
		}
		if time.Now().After(deadline) {
			return Frames{}, errors.New("a frame stays incomplete")
		}
		time.Sleep(20 * time.Microsecond)
	}
}

// take hands over everything held. A small rest is copied, so that an idle
// guest's single frames do not keep big buffers.
func (d *Diverter) take() Frames {
	f := Frames{frames: d.frames, bytes: d.bytes, since: d.since, parts: d.full}
	if c := d.cur; c.whole > 0 {
		if c.whole <= smallPart {
			f.parts = append(f.parts, &buffer{data: append([]byte(nil), c.data[:c.whole]...), whole: c.whole, end: c.whole, frames: c.frames})
			c.reset()
		} else {
			f.parts = append(f.parts, c)
			d.cur = d.pool.Get().(*buffer)
		}
	}
	d.full, d.frames, d.bytes, d.since, d.over = nil, 0, 0, time.Time{}, false
	return f
}
