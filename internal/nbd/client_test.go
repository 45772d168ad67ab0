package nbd

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

// memDisk is a backend in memory with holes per 4 KiB, and switches for tests.
type memDisk struct {
	mu      sync.Mutex
	data    []byte
	alloc   []bool
	flushes int
	fua     int
	fail    error
	gate    chan struct{} // if set, READs at offset 0 wait for it
}

func newMemDisk(n int) *memDisk { return &memDisk{data: make([]byte, n), alloc: make([]bool, n/4096)} }

func (d *memDisk) Size() int64 { return int64(len(d.data)) }

func (d *memDisk) ReadAt(ctx context.Context, p []byte, off int64) error {
	if d.gate != nil && off == 0 {
		select {
		case <-d.gate:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	copy(p, d.data[off:])
	return d.fail
}

func (d *memDisk) WriteAt(_ context.Context, p []byte, off int64, fua bool) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.mark(off, int64(len(p)), true)
	copy(d.data[off:], p)
	if fua {
		d.fua++
	}
	return d.fail
}

func (d *memDisk) Zero(_ context.Context, off, n int64, fua, punch bool) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	clear(d.data[off : off+n])
	d.mark(off, n, !punch)
	return d.fail
}

func (d *memDisk) Flush(context.Context) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.flushes++
	return d.fail
}

func (d *memDisk) Extent(_ context.Context, off, n int64) (int64, bool, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	first := d.alloc[off/4096]
	end := off/4096*4096 + 4096
	for end < off+n && d.alloc[end/4096] == first {
		end += 4096
	}
	return min(end-off, n), !first, d.fail
}

func (d *memDisk) mark(off, n int64, v bool) {
	for i := off / 4096; i <= (off+n-1)/4096; i++ {
		d.alloc[i] = v
	}
}

// serveDisks serves exports on a Unix socket until the test ends and returns its path.
func serveDisks(t testing.TB, exports map[string]Backend, o Options) string {
	t.Helper()
	sock := filepath.Join(t.TempDir(), "nbd.sock")
	ln, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, ln, exports, o) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return sock
}

// client is a small NBD client that can also misbehave.
type client struct {
	net.Conn
	size       uint64
	flags      uint16
	structured bool
	cookie     uint64
}

func dial(t testing.TB, sock string) *client {
	t.Helper()
	nc, err := net.Dial("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = nc.Close() })
	_ = nc.SetDeadline(time.Now().Add(20 * time.Second))
	return &client{Conn: nc}
}

// greet reads the greeting and sends client flags.
func (c *client) greet(t testing.TB, flags uint32) {
	t.Helper()
	b := c.read(t, 18)
	if binary.BigEndian.Uint64(b) != magicInit || binary.BigEndian.Uint64(b[8:]) != magicOption {
		t.Fatalf("bad greeting % x", b)
	}
	c.send(t, binary.BigEndian.AppendUint32(nil, flags))
}

func (c *client) send(t testing.TB, b []byte) {
	t.Helper()
	if _, err := c.Write(b); err != nil {
		t.Fatal(err)
	}
}

func (c *client) read(t testing.TB, n int) []byte {
	t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(c, b); err != nil {
		t.Fatalf("read %d bytes: %v", n, err)
	}
	return b
}

func optionBytes(opt uint32, data []byte) []byte {
	b := binary.BigEndian.AppendUint64(nil, magicOption)
	b = binary.BigEndian.AppendUint32(b, opt)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

type optReply struct {
	typ  uint32
	data []byte
}

// option sends an option and collects its replies up to the last.
func (c *client) option(t testing.TB, opt uint32, data []byte) []optReply {
	t.Helper()
	c.send(t, optionBytes(opt, data))
	var out []optReply
	for {
		h := c.read(t, 20)
		if binary.BigEndian.Uint64(h) != magicReply || binary.BigEndian.Uint32(h[8:]) != opt {
			t.Fatalf("bad option reply % x", h)
		}
		r := optReply{binary.BigEndian.Uint32(h[12:]), c.read(t, int(binary.BigEndian.Uint32(h[16:])))}
		out = append(out, r)
		if r.typ == repAck || r.typ >= 1<<31 {
			return out
		}
	}
}

func lstring(s string) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(s))), s...)
}

func metaQuery(export string, queries ...string) []byte {
	b := binary.BigEndian.AppendUint32(lstring(export), uint32(len(queries)))
	for _, q := range queries {
		b = append(b, lstring(q)...)
	}
	return b
}

// open shakes hands up to transmission.
func open(t testing.TB, sock, export string, structured bool) *client {
	t.Helper()
	c := dial(t, sock)
	c.greet(t, flagFixedNewstyle|flagNoZeroes)
	if structured {
		c.structured = true
		if r := c.option(t, optStructuredReply, nil); r[0].typ != repAck {
			t.Fatalf("structured replies: %v", r)
		}
		if r := c.option(t, optSetMetaContext, metaQuery(export, contextAllocation)); r[len(r)-1].typ != repAck {
			t.Fatalf("meta context: %v", r)
		}
	}
	r := c.option(t, optGo, append(lstring(export), 0, 0))
	if r[len(r)-1].typ != repAck {
		t.Fatalf("go: %x %s", r[len(r)-1].typ, r[len(r)-1].data)
	}
	for _, x := range r {
		if x.typ == repInfo && binary.BigEndian.Uint16(x.data) == infoExport {
			c.size, c.flags = binary.BigEndian.Uint64(x.data[2:]), binary.BigEndian.Uint16(x.data[10:])
		}
	}
	return c
}

func requestBytes(cmd, flags uint16, cookie, off uint64, n uint32, payload []byte) []byte {
	b := binary.BigEndian.AppendUint32(nil, magicRequest)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, cmd)
	b = binary.BigEndian.AppendUint64(b, cookie)
	b = binary.BigEndian.AppendUint64(b, off)
	b = binary.BigEndian.AppendUint32(b, n)
	return append(b, payload...)
}

type reply struct {
	cookie uint64
	errno  uint32
	data   []byte // of a READ, or the descriptors of a block status
}

// receive reads one reply; n is the length of the READ it answers, 0 otherwise.
func (c *client) receive(n int) (reply, error) {
	var h [chunkSize]byte
	if _, err := io.ReadFull(c, h[:simpleSize]); err != nil {
		return reply{}, err
	}
	switch binary.BigEndian.Uint32(h[:]) {
	case magicSimple:
		r := reply{cookie: binary.BigEndian.Uint64(h[8:]), errno: binary.BigEndian.Uint32(h[4:])}
		if r.errno == 0 && n > 0 {
			if c.structured {
				return r, errors.New("simple reply to a READ")
			}
			r.data = make([]byte, n)
			_, err := io.ReadFull(c, r.data)
			return r, err
		}
		return r, nil
	case magicStructured:
	default:
		return reply{}, fmt.Errorf("bad magic % x", h[:4])
	}
	if _, err := io.ReadFull(c, h[simpleSize:]); err != nil {
		return reply{}, err
	}
	r := reply{cookie: binary.BigEndian.Uint64(h[8:])}
	p := make([]byte, binary.BigEndian.Uint32(h[16:]))
	if _, err := io.ReadFull(c, p); err != nil {
		return r, err
	}
	if binary.BigEndian.Uint16(h[4:]) != chunkDone || !c.structured {
		return r, errors.New("unexpected chunk")
	}
	switch binary.BigEndian.Uint16(h[6:]) {
	case typeOffsetData:
		r.data = p[8:]
	case typeBlockStatus:
		r.data = p[4:]
	case typeError:
		r.errno = binary.BigEndian.Uint32(p)
	}
	return r, nil
}

// do sends one request and waits for its answer.
func (c *client) do(t testing.TB, cmd, flags uint16, off uint64, n uint32, payload []byte) reply {
	t.Helper()
	c.cookie++
	c.send(t, requestBytes(cmd, flags, c.cookie, off, n, payload))
	want := 0
	if cmd == cmdRead {
		want = int(n)
	}
	r, err := c.receive(want)
	if err != nil {
		t.Fatal(err)
	}
	if r.cookie != c.cookie {
		t.Fatalf("cookie %d, want %d", r.cookie, c.cookie)
	}
	return r
}
