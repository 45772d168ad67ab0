package shim

import (
	"net"
	"sync"
	"testing"
	"time"
)

// dryLink is one A-link between two hosts of a test, as a forwarder of TCP
// connections that does them harm.
type dryLink struct {
	ln net.Listener
	wg sync.WaitGroup

	mu     sync.Mutex
	cond   *sync.Cond
	target string
	conns  map[net.Conn]struct{}
	ended  bool
	hole   bool          // nothing is forwarded, nothing is closed
	delay  time.Duration // before each piece
	piece  int           // bytes of a piece; 0: 64 KiB
}

func newDryLink(t testing.TB) *dryLink {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := &dryLink{ln: ln, conns: map[net.Conn]struct{}{}}
	l.cond = sync.NewCond(&l.mu)
	l.wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			l.wg.Go(func() { l.serve(c) })
		}
	})
	t.Cleanup(func() {
		_ = ln.Close()
		l.set(func() { l.ended = true })
		l.cut()
		l.wg.Wait()
	})
	return l
}

// set changes what the link does.
func (l *dryLink) set(f func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	f()
	l.cond.Broadcast()
}

func (l *dryLink) heal() { l.set(func() { l.hole, l.delay, l.piece = false, 0, 0 }) }

// cut ends all connections as the kernel of a process that died does.
func (l *dryLink) cut() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for c := range l.conns {
		_ = c.Close()
	}
}

func (l *dryLink) serve(c net.Conn) {
	defer c.Close()
	l.mu.Lock()
	for l.hole && !l.ended {
		l.cond.Wait()
	}
	target := l.target
	l.mu.Unlock()
	d, err := net.Dial("tcp", target)
	if err != nil {
		return
	}
	defer d.Close()
	l.mu.Lock()
	if l.ended {
		l.mu.Unlock()
		return
	}
	l.conns[c], l.conns[d] = struct{}{}, struct{}{}
	l.mu.Unlock()
	done := make(chan struct{}, 2)
	go func() { l.pump(d, c); done <- struct{}{} }()
	go func() { l.pump(c, d); done <- struct{}{} }()
	<-done
	_, _ = c.Close(), d.Close()
	<-done
	l.mu.Lock()
	delete(l.conns, c)
	delete(l.conns, d)
	l.mu.Unlock()
}

func (l *dryLink) pump(to, from net.Conn) {
	buf := make([]byte, 64<<10)
	for {
		l.mu.Lock()
		n := len(buf)
		if l.piece > 0 {
			n = l.piece
		}
		l.mu.Unlock()
		n, err := from.Read(buf[:n])
		if err != nil {
			return
		}
		l.mu.Lock()
		for l.hole && !l.ended {
			l.cond.Wait()
		}
		delay := l.delay
		l.mu.Unlock()
		if delay > 0 {
			time.Sleep(delay) // the fault itself
		}
		if _, err := to.Write(buf[:n]); err != nil {
			return
		}
	}
}
