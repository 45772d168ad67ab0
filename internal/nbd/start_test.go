package nbd

import (
	"bytes"
	"context"
	"math/rand/v2"
	"net"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// startingDisk begins writes, and keeps what has to be called when they are done.
type startingDisk struct {
	*memDisk
	refuse atomic.Bool

	mu   sync.Mutex
	open []func(error)
}

func (d *startingDisk) Waits() bool { return true }

func (d *startingDisk) StartWrite(ctx context.Context, p []byte, off int64, done func(error)) bool {
	if d.refuse.Load() {
		return false
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.open = append(d.open, func(err error) {
		if err == nil {
			err = d.memDisk.WriteAt(ctx, p, off, false) // p must be untouched until now
		}
		done(err)
	})
	return true
}

// at returns what is at off.
func (d *startingDisk) at(off, n int) []byte {
	d.memDisk.mu.Lock()
	defer d.memDisk.mu.Unlock()
	return bytes.Clone(d.data[off : off+n])
}

// take returns what is open once there are n, in random order.
func (d *startingDisk) take(n int) []func(error) {
	for {
		d.mu.Lock()
		if len(d.open) >= n {
			l := d.open
			d.open = nil
			d.mu.Unlock()
			rand.Shuffle(len(l), func(i, j int) { l[i], l[j] = l[j], l[i] })
			return l
		}
		d.mu.Unlock()
		runtime.Gosched()
	}
}

func startWrites(t *testing.T, c *client, n int) {
	t.Helper()
	var all []byte
	for i := range n {
		all = append(all, requestBytes(cmdWrite, 0, uint64(i), uint64(i)*4096, 4096, bytes.Repeat([]byte{byte(i + 1)}, 4096))...)
	}
	c.send(t, all)
}

// TestBegunWritesAreAnsweredWhenTheyAreDone, whatever the order, with their errors, and others meanwhile.
func TestBegunWritesAreAnsweredWhenTheyAreDone(t *testing.T) {
	before := runtime.NumGoroutine()
	d := &startingDisk{memDisk: newMemDisk(1 << 20)}
	c := open(t, serveDisks(t, map[string]Backend{"disk0": d}, Options{}), "disk0", true)
	startWrites(t, c, 20)
	open := d.take(20)
	if r := c.do(t, cmdRead, 0, 512<<10, 4096, nil); r.errno != 0 { // reading goes on
		t.Fatal(r.errno)
	}
	for i, f := range open {
		if i%5 == 0 {
			f(syscall.ENOSPC)
		} else {
			f(nil)
		}
	}
	failed := 0
	for range 20 {
		r, err := c.receive(0)
		if err != nil {
			t.Fatal(err)
		}
		at := int(r.cookie) * 4096
		switch {
		case r.errno == errNoSpace:
			failed++
		case r.errno != 0 || !bytes.Equal(d.at(at, 4096), bytes.Repeat([]byte{byte(r.cookie + 1)}, 4096)):
			t.Fatalf("write %d: %d", r.cookie, r.errno)
		}
	}
	if failed != 4 {
		t.Fatalf("%d errors", failed)
	}
	d.refuse.Store(true) // what the backend does not begin is carried out
	if r := c.do(t, cmdWrite, 0, 0, 4096, bytes.Repeat([]byte{99}, 4096)); r.errno != 0 || d.at(0, 1)[0] != 99 {
		t.Fatal(r.errno)
	}
	_ = c.Close()
	settled(t, before+3) // of the server itself
}

// TestClientThatDoesNotReadBoundsBegunWrites: answers that nobody takes hold up no
// caller, and do not pile up.
func TestClientThatDoesNotReadBoundsBegunWrites(t *testing.T) {
	d := &startingDisk{memDisk: newMemDisk(1 << 20)}
	const most = 16
	c := open(t, serveDisks(t, map[string]Backend{"disk0": d}, Options{MaxRequests: most}), "disk0", true)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for i := uint64(0); ; i++ { // more answers than any socket holds
			if _, err := c.Write(requestBytes(cmdWrite, 0, i, 0, 512, make([]byte, 512))); err != nil {
				return
			}
		}
	}()
	before := runtime.NumGoroutine()
	count, since := 0, time.Now()
	for time.Since(since) < 300*time.Millisecond { // nothing has come for so long: all is full
		d.mu.Lock()
		l := d.open
		d.open = nil
		d.mu.Unlock()
		for _, f := range l {
			f(nil)
			count++
			since = time.Now()
		}
		// Some that are done have not ended yet; without a bound there were one for each write.
		if n := runtime.NumGoroutine(); n > before+16*most {
			t.Fatalf("%d goroutines, %d before, after %d writes", n, before, count)
		}
		runtime.Gosched()
	}
	_ = c.Close()
	<-ended
	if count < 4*most {
		t.Fatalf("only %d writes were begun", count)
	}
	for _, f := range d.take(0) {
		f(nil)
	}
}

// TestServerEndsWithBegunWrites: those that do not end within the grace are given
// up, and what is done later hits nobody else's socket.
func TestServerEndsWithBegunWrites(t *testing.T) {
	d := &startingDisk{memDisk: newMemDisk(1 << 20)}
	sock := filepath.Join(t.TempDir(), "nbd.sock")
	ln, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, ln, map[string]Backend{"disk0": d}, Options{Grace: 20 * time.Millisecond}) }()
	c := open(t, sock, "disk0", true)
	startWrites(t, c, 5)
	open := d.take(5)
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	for _, f := range open {
		f(nil)
	}
	if r, err := c.receive(0); err == nil {
		t.Fatal("answered after the end: ", r)
	}
}
