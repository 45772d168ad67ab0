package nbd

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// slowDisk lets chosen requests wait, and counts those under way.
type slowDisk struct {
	*memDisk
	hold  chan struct{} // WRITEs at slowAt wait for it
	under atomic.Int32
	most  atomic.Int32
}

const slowAt = 8192

func (d *slowDisk) WriteAt(ctx context.Context, p []byte, off int64, fua bool) error {
	n := d.under.Add(1)
	for m := d.most.Load(); n > m && !d.most.CompareAndSwap(m, n); m = d.most.Load() {
	}
	defer d.under.Add(-1)
	if off == slowAt {
		select {
		case <-d.hold:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return d.memDisk.WriteAt(ctx, p, off, fua)
}

// TestASlowRequestDoesNotHoldUpOthers: after many quick ones, which the reader
// carries out itself, one hangs. Those behind it, and the answers before it, must
// not wait for it.
func TestASlowRequestDoesNotHoldUpOthers(t *testing.T) {
	d := &slowDisk{memDisk: newMemDisk(1 << 20), hold: make(chan struct{})}
	c := open(t, serveDisks(t, map[string]Backend{"disk0": d}, Options{}), "disk0", false)
	p := make([]byte, 4096)
	for range 50 {
		c.do(t, cmdWrite, 0, 0, 4096, p)
	}
	var batch []byte
	for i := range uint64(10) {
		off := i * 4096
		if i == 5 {
			off = slowAt
		} else if off == slowAt {
			off = 0
		}
		batch = append(batch, requestBytes(cmdWrite, 0, 1000+i, off, 4096, p)...)
	}
	c.send(t, batch)
	seen := map[uint64]bool{}
	for range 9 {
		r, err := c.receive(0)
		if err != nil || r.errno != 0 {
			t.Fatal(err, r.errno)
		}
		seen[r.cookie] = true
	}
	if seen[1005] || len(seen) != 9 {
		t.Fatal(seen)
	}
	close(d.hold)
	if r, err := c.receive(0); err != nil || r.cookie != 1005 {
		t.Fatal(r, err)
	}
}

// waitingDisk says that its requests wait; each waits until enough are under way.
type waitingDisk struct {
	*memDisk
	want int32
	n    atomic.Int32
	all  chan struct{}
}

func (d *waitingDisk) Waits() bool { return true }

func (d *waitingDisk) WriteAt(ctx context.Context, p []byte, off int64, fua bool) error {
	if d.n.Add(1) == d.want {
		close(d.all)
	}
	select {
	case <-d.all:
	case <-ctx.Done():
		return ctx.Err()
	}
	return d.memDisk.WriteAt(ctx, p, off, fua)
}

// TestAWaitingBackendGetsRequestsSideBySide: as many as MaxRequests, at once.
func TestAWaitingBackendGetsRequestsSideBySide(t *testing.T) {
	d := &waitingDisk{memDisk: newMemDisk(1 << 20), want: 32, all: make(chan struct{})}
	c := open(t, serveDisks(t, map[string]Backend{"disk0": d}, Options{MaxRequests: 32}), "disk0", true)
	go func() {
		for i := range uint64(32) {
			_, _ = c.Write(requestBytes(cmdWrite, 0, i, i*4096, 4096, make([]byte, 4096)))
		}
	}()
	for range 32 {
		if r, err := c.receive(0); err != nil || r.errno != 0 {
			t.Fatal(err, r.errno)
		}
	}
}

// TestRequestsUnderWayAreAnsweredWhenTheServerStops, if they end within the grace.
func TestRequestsUnderWayAreAnsweredWhenTheServerStops(t *testing.T) {
	for _, ends := range []bool{true, false} {
		d := &slowDisk{memDisk: newMemDisk(1 << 20), hold: make(chan struct{})}
		ours, theirs := net.Pipe()
		ln := &oneConn{ours, make(chan struct{}), make(chan struct{}, 1)}
		ln.first <- struct{}{}
		ctx, cancel := context.WithCancel(t.Context())
		grace := 20 * time.Second
		if !ends {
			grace = 50 * time.Millisecond
		}
		done := make(chan error, 1)
		go func() {
			done <- Serve(ctx, ln, map[string]Backend{"disk0": d}, Options{Grace: grace})
		}()
		c := &client{Conn: theirs}
		c.greet(t, flagFixedNewstyle|flagNoZeroes)
		c.send(t, optionBytes(optExportName, []byte("disk0")))
		c.read(t, 10)
		c.send(t, requestBytes(cmdWrite, 0, 7, slowAt, 4096, make([]byte, 4096)))
		for d.under.Load() == 0 {
			runtime.Gosched()
		}
		cancel()
		if ends {
			close(d.hold)
		}
		r, err := c.receive(0)
		if ends && (err != nil || r.errno != 0 || r.cookie != 7) {
			t.Fatal(r, err)
		}
		if !ends && err == nil {
			t.Fatal("a request that was given up must not be answered, with whatever error: ", r)
		}
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
}

// oneConn is a listener with one client.
type oneConn struct {
	nc     net.Conn
	closed chan struct{}
	first  chan struct{}
}

func (l *oneConn) Accept() (net.Conn, error) {
	select {
	case <-l.first:
		return l.nc, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *oneConn) Close() error {
	select {
	case <-l.closed:
	default:
		close(l.closed)
	}
	return nil
}
func (l *oneConn) Addr() net.Addr { return &net.UnixAddr{} }

// fitness checks that a server is as before: another client is served, and
// nothing is left of those that are gone.
func fitness(t *testing.T, sock string) {
	t.Helper()
	c := open(t, sock, "disk0", true)
	if r := c.do(t, cmdRead, 0, 0, 4096, nil); r.errno != 0 {
		t.Fatal(r.errno)
	}
	c.send(t, requestBytes(cmdDisc, 0, 0, 0, 0, nil))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
}

// settled waits until no more goroutines are there than before.
func settled(t *testing.T, before int) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); runtime.NumGoroutine() > before; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d goroutines, %d before", runtime.NumGoroutine(), before)
		}
	}
}

// TestHostileClients come one after another, and leave nothing behind.
func TestHostileClients(t *testing.T) {
	d := newMemDisk(4 << 20)
	sock := serveDisks(t, map[string]Backend{"disk0": d}, Options{HandshakeTimeout: 200 * time.Millisecond, MaxInflightBytes: 2 << 20, MaxConns: 8})
	fitness(t, sock)
	before := runtime.NumGoroutine()
	hello := binary.BigEndian.AppendUint32(nil, flagFixedNewstyle|flagNoZeroes)
	into := func(t *testing.T) *client { return open(t, sock, "disk0", false) }
	for name, attack := range map[string]func(t *testing.T) *client{
		"says nothing":  func(t *testing.T) *client { return dial(t, sock) },
		"unknown flags": func(t *testing.T) *client { c := dial(t, sock); c.greet(t, 1<<7); return c },
		"speaks HTTP": func(t *testing.T) *client {
			c := dial(t, sock)
			_, _ = c.Write([]byte("GET / HTTP/1.1\r\n\r\n"))
			return c
		},
		"drips":           drips(sock, hello),
		"endless options": endless(sock, hello, optionBytes(99, nil)),
		"endless lists":   endless(sock, hello, optionBytes(optList, nil)),
		"option of 4 GiB": endless(sock, append(hello, 'I', 'H', 'A', 'V', 'E', 'O', 'P', 'T', 0, 0, 0, 6, 255, 255, 255, 255), make([]byte, 64<<10)),
		"option half sent": func(t *testing.T) *client {
			c := dial(t, sock)
			c.greet(t, 3)
			c.send(t, optionBytes(optGo, lstring("disk0"))[:18])
			return c
		},
		"no magic": func(t *testing.T) *client { c := into(t); _, _ = c.Write(make([]byte, 4096)); return c },
		"half a header": func(t *testing.T) *client {
			c := into(t)
			c.send(t, requestBytes(cmdRead, 0, 1, 0, 512, nil)[:17])
			_ = c.Close()
			return c
		},
		"half a payload": func(t *testing.T) *client {
			c := into(t)
			c.send(t, requestBytes(cmdWrite, 0, 1, 0, 65536, make([]byte, 70)))
			_ = c.Close()
			return c
		},
		"refused, unsent": func(t *testing.T) *client {
			c := into(t)
			c.send(t, requestBytes(cmdWrite, 0, 1, 0, 1<<32-512, make([]byte, 70)))
			_ = c.Close()
			return c
		},
		"reads nothing":     readsNothing(sock, 256<<10),
		"reads nothing, 4k": readsNothing(sock, 4096),
		"gone at once": func(t *testing.T) *client {
			c := into(t)
			c.send(t, requestBytes(cmdRead, 0, 1, 0, 1<<20, nil))
			_ = c.Close()
			return c
		},
		"talks after DISC": func(t *testing.T) *client {
			c := into(t)
			c.send(t, requestBytes(cmdDisc, 0, 0, 0, 0, requestBytes(cmdWrite, 0, 1, 0, 512, make([]byte, 512))))
			return c
		},
		"closes its writing": func(t *testing.T) *client {
			c := into(t)
			c.send(t, requestBytes(cmdRead, 0, 1, 0, 512, nil))
			_ = c.Conn.(*net.UnixConn).CloseWrite()
			return c
		},
		"one cookie for all": oneCookie(sock),
	} {
		t.Run(name, func(t *testing.T) {
			c := attack(t)
			fitness(t, sock)
			_ = c.Close()
			settled(t, before+1) // this subtest
		})
	}
	if d.data[0] != 0 {
		t.Fatal("something was written")
	}
}

// drips sends a handshake a byte at a time, for longer than it may take.
func drips(sock string, hello []byte) func(t *testing.T) *client {
	return func(t *testing.T) *client {
		c := dial(t, sock)
		for i := 0; ; i++ {
			b := append(hello, optionBytes(optInfo, make([]byte, 8000))...)[i]
			if _, err := c.Write([]byte{b}); err != nil {
				return c // thrown out
			}
			time.Sleep(time.Millisecond) // that is the attack
		}
	}
}

// endless sends something again and again until it is thrown out.
func endless(sock string, first, again []byte) func(t *testing.T) *client {
	return func(t *testing.T) *client {
		c := dial(t, sock)
		_, err := c.Write(first)
		go func() { _, _ = io.Copy(io.Discard, c.Conn) }()
		for err == nil {
			_, err = c.Write(again)
		}
		if errors.Is(err, syscall.ETIMEDOUT) {
			t.Fatal(err)
		}
		return c
	}
}

// readsNothing asks for data until the server takes no more requests.
func readsNothing(sock string, n uint32) func(t *testing.T) *client {
	return func(t *testing.T) *client {
		c := open(t, sock, "disk0", true)
		_ = c.SetWriteDeadline(time.Now().Add(500 * time.Millisecond))
		for i := uint64(0); ; i++ {
			if _, err := c.Write(requestBytes(cmdRead, 0, i, 0, n, nil)); err != nil {
				return c
			}
		}
	}
}

// oneCookie uses the same cookie for everything: each request is answered all the same.
func oneCookie(sock string) func(t *testing.T) *client {
	return func(t *testing.T) *client {
		c := open(t, sock, "disk0", true)
		for range 100 {
			c.send(t, requestBytes(cmdRead, 0, 5, 4096, 512, nil))
		}
		for range 100 {
			if r, err := c.receive(512); err != nil || r.cookie != 5 || len(r.data) != 512 {
				t.Fatal(r, err)
			}
		}
		return c
	}
}

// TestGarbage sends random bytes, some of them almost right, on many connections at once.
func TestGarbage(t *testing.T) {
	d := &strictDisk{memDisk: newMemDisk(1 << 20)}
	sock := serveDisks(t, map[string]Backend{"disk0": d}, Options{HandshakeTimeout: time.Second, MaxInflightBytes: 1 << 20})
	fitness(t, sock)
	before := runtime.NumGoroutine()
	var all sync.WaitGroup
	for seed := range uint64(8) {
		all.Go(func() {
			rnd := rand.New(rand.NewPCG(seed, 0))
			for range 30 {
				nc, err := net.Dial("unix", sock)
				if err != nil {
					t.Error(err)
					return
				}
				_ = nc.SetDeadline(time.Now().Add(20 * time.Second))
				go func() { _, _ = io.Copy(io.Discard, nc) }()
				b := binary.BigEndian.AppendUint32(nil, 3)
				b = append(b, optionBytes(optStructuredReply, nil)...)
				b = append(b, optionBytes(optSetMetaContext, metaQuery("disk0", contextAllocation))...)
				b = append(b, optionBytes(optGo, append(lstring("disk0"), 0, 0))...)
				for range 40 {
					n := uint32(rnd.IntN(16)) * 512
					req := requestBytes(uint16(rnd.IntN(9)), uint16(rnd.IntN(32)), rnd.Uint64(), uint64(rnd.IntN(2100))*512, n, nil)
					if binary.BigEndian.Uint16(req[6:]) == cmdWrite {
						req = append(req, make([]byte, n)...)
					}
					b = append(b, req...)
				}
				for range rnd.IntN(3) {
					b[rnd.IntN(len(b))] ^= byte(1 << rnd.IntN(8))
				}
				_, _ = nc.Write(b[:rnd.IntN(len(b))+1])
				_ = nc.Close()
			}
		})
	}
	all.Wait()
	settled(t, before) // until then all connections that are allowed at once may be taken
	fitness(t, sock)
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.bad != "" {
		t.Fatal(d.bad)
	}
}

// fastDisk knows that whole 4 KiB blocks are zeroed quickly.
type fastDisk struct{ *memDisk }

func (fastDisk) FastZero(off, n int64, _ bool) bool { return off%4096 == 0 && n%4096 == 0 }

// TestFastZero: refused without doing it where it would not be fast, and unknown
// where the backend cannot tell.
func TestFastZero(t *testing.T) {
	d := fastDisk{newMemDisk(1 << 20)}
	for i := range d.data {
		d.data[i] = 1
	}
	c := open(t, serveDisks(t, map[string]Backend{"disk0": d}, Options{}), "disk0", true)
	if c.flags&tfSendFastZero == 0 || c.flags&tfSendCache == 0 {
		t.Fatalf("flags %#x", c.flags)
	}
	if r := c.do(t, cmdWriteZeroes, cmdFlagFastZero, 0, 512, nil); r.errno != errNotSup || d.data[0] != 1 {
		t.Fatal(r.errno)
	}
	if r := c.do(t, cmdWriteZeroes, cmdFlagFastZero|cmdFlagNoHole|cmdFlagFUA, 0, 4096, nil); r.errno != 0 || d.data[0] != 0 {
		t.Fatal(r.errno)
	}
	if r := c.do(t, cmdWriteZeroes, 0, 4096, 512, nil); r.errno != 0 || d.data[4096] != 0 {
		t.Fatal(r.errno)
	}
	if r := c.do(t, cmdTrim, cmdFlagFastZero, 0, 4096, nil); r.errno != errInvalid {
		t.Fatal(r.errno)
	}
	if r := c.do(t, cmdCache, 0, 0, 1<<20, nil); r.errno != 0 {
		t.Fatal(r.errno)
	}
	c = open(t, serveDisks(t, map[string]Backend{"disk0": d.memDisk}, Options{}), "disk0", true)
	if r := c.do(t, cmdWriteZeroes, cmdFlagFastZero, 0, 4096, nil); r.errno != errInvalid || c.flags&tfSendFastZero != 0 {
		t.Fatal(r.errno, c.flags)
	}
}

// TestPace: one slow request among quick ones changes nothing, two hand the next
// ones on, and each failed trial hands on more.
func TestPace(t *testing.T) {
	var p pace
	const slow = slowRead
	eager := func() (n int) {
		for !p.inline() {
			n++
		}
		return n
	}
	for range 100 {
		p.note(slow, slow)
		for range slowWeight {
			if !p.inline() {
				t.Fatal("one slow request is enough")
			}
			p.note(0, slow)
		}
	}
	p.note(slow, slow)
	p.note(slow, slow)
	for want := minEager; want <= 2*maxEager; want *= 2 {
		if n := eager(); n != min(want, maxEager) {
			t.Fatalf("%d handed on, want %d", n, want)
		}
		p.note(slow, slow)
	}
	eager()
	for range slowWeight + 1 {
		p.note(0, slow)
	}
	p.note(slow, slow)
	if !p.inline() {
		t.Fatal("not forgiven")
	}
	p.note(slow, slow)
	if n := eager(); n != minEager {
		t.Fatal("streak not forgotten:", n)
	}
}
