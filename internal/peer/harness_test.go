package peer

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// testPKI makes a CA and one certificate that serves both sides.
func testPKI(t testing.TB) *tls.Config {
	t.Helper()
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(t, err)
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, &caKey.PublicKey, caKey)
	check(t, err)
	caCert, err := x509.ParseCertificate(caDER)
	check(t, err)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(t, err)
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "host"}, DNSNames: []string{"host"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, leaf, caCert, &key.PublicKey, caKey)
	check(t, err)
	pool := x509.NewCertPool()
	pool.AddCert(caCert)
	return &tls.Config{
		Certificates: []tls.Certificate{{Certificate: [][]byte{der, caDER}, PrivateKey: key}},
		RootCAs:      pool, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert, ServerName: "host",
	}
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// world is a listener and a dialler with a proxy per link between them.
type world struct {
	listener *Listener
	proxies  []*proxy
	a, b     *Session // a dialled, b accepted
	cfgA     Config
	late     atomic.Int64 // longest time by which a timer of this process was late
}

// watchStalls measures how late the machine lets this process run, to tell a
// starved test from a broken one.
func (w *world) watchStalls(stop <-chan struct{}) {
	t := time.NewTicker(5 * time.Millisecond)
	defer t.Stop()
	last := Now()
	for {
		select {
		case <-t.C:
		case <-stop:
			return
		}
		now := Now()
		w.late.Store(max(w.late.Load(), int64(now-last)))
		last = now
	}
}

func (w *world) stall() time.Duration { return time.Duration(w.late.Load()) }

func testConfig(t testing.TB) Config {
	return Config{TLS: testPKI(t), Verify: func(tls.ConnectionState) error { return nil }, Silence: 4 * time.Second}
}

// newWorld connects two sides over links proxies; change may be nil.
func newWorld(t testing.TB, links int, change func(a, b *Config)) *world {
	t.Helper()
	base := testConfig(t)
	ca, cb := base, base
	ca.Hello, cb.Hello = []byte("from a"), []byte("from b")
	if change != nil {
		change(&ca, &cb)
	}
	for range links {
		cb.Local = append(cb.Local, "127.0.0.1:0")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	w := &world{}
	var err error
	w.listener, err = Listen(ctx, cb)
	check(t, err)
	for _, addr := range w.listener.Addrs() {
		p := newProxy(t, addr)
		w.proxies = append(w.proxies, p)
		ca.Remote = append(ca.Remote, p.addr())
	}
	w.cfgA = ca
	w.a, err = Dial(ctx, ca)
	check(t, err)
	w.b, err = w.listener.Accept(ctx)
	check(t, err)
	stop := make(chan struct{})
	go w.watchStalls(stop)
	w.allUp(t)
	t.Cleanup(func() {
		close(stop)
		w.a.Close("test ends")
		w.b.Close("test ends")
		w.listener.Close()
		for _, p := range w.proxies {
			p.close()
		}
	})
	return w
}

// allUp waits until every link is up and measured on both sides.
func (w *world) allUp(t testing.TB) {
	t.Helper()
	eventually(t, "all links up", func() bool {
		for _, s := range []*Session{w.a, w.b} {
			if err := s.Cause(); err != nil {
				t.Fatalf("session lost: %v; longest stall of this process: %v", err, w.stall())
			}
			for _, l := range s.Links() {
				if !l.Up || l.RTT == 0 {
					return false
				}
			}
		}
		return true
	})
}

// eventually polls a condition for up to 15 s.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(15 * time.Second)
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("waited in vain for: %s", what)
		}
	}
}

// proxy forwards TCP connections to a target and does them harm on demand.
type proxy struct {
	t      testing.TB
	ln     net.Listener
	target string
	wg     sync.WaitGroup

	mu    sync.Mutex
	cond  *sync.Cond
	conns map[net.Conn]struct{}
	ended bool
	// Faults.
	refuse bool                                 // new connections are closed at once
	hole   bool                                 // nothing is forwarded, nothing is closed
	delay  func() time.Duration                 // before each chunk; nil: none
	chunk  int                                  // bytes per chunk, 0: 64 KiB
	pass   func(toTarget bool, b []byte) []byte // changes bytes; nil: none
}

func newProxy(t testing.TB, target string) *proxy {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	p := &proxy{t: t, ln: ln, target: target, conns: map[net.Conn]struct{}{}}
	p.cond = sync.NewCond(&p.mu)
	p.wg.Add(1)
	go func() {
		defer p.wg.Done()
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			p.wg.Add(1)
			go p.serve(c)
		}
	}()
	return p
}

func (p *proxy) addr() string { return p.ln.Addr().String() }

func (p *proxy) serve(c net.Conn) {
	defer p.wg.Done()
	defer c.Close()
	p.mu.Lock()
	bad := p.refuse || p.ended
	p.mu.Unlock()
	if bad {
		return
	}
	d, err := net.Dial("tcp", p.target)
	if err != nil {
		return
	}
	defer d.Close()
	p.mu.Lock()
	p.conns[c], p.conns[d] = struct{}{}, struct{}{}
	p.mu.Unlock()
	done := make(chan struct{}, 2)
	go func() { p.pump(d, c, true); done <- struct{}{} }()
	go func() { p.pump(c, d, false); done <- struct{}{} }()
	<-done
	c.Close()
	d.Close()
	<-done
	p.mu.Lock()
	delete(p.conns, c)
	delete(p.conns, d)
	p.mu.Unlock()
}

func (p *proxy) pump(to, from net.Conn, toTarget bool) {
	buf := make([]byte, 64<<10)
	for {
		p.mu.Lock()
		n := len(buf)
		if p.chunk > 0 {
			n = p.chunk
		}
		p.mu.Unlock()
		n, err := from.Read(buf[:n])
		p.mu.Lock()
		for p.hole && !p.ended {
			p.cond.Wait()
		}
		delay, pass := p.delay, p.pass
		p.mu.Unlock()
		if n > 0 {
			if delay != nil {
				time.Sleep(delay()) // this is the fault itself, not a wait for something
			}
			out := buf[:n]
			if pass != nil {
				p.mu.Lock()
				out = pass(toTarget, out)
				p.mu.Unlock()
			}
			if _, err := to.Write(out); err != nil {
				return
			}
		}
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			return
		}
	}
}

// set changes faults.
func (p *proxy) set(f func(p *proxy)) {
	p.mu.Lock()
	f(p)
	p.cond.Broadcast()
	p.mu.Unlock()
}

// heal takes all faults away.
func (p *proxy) heal() {
	p.set(func(p *proxy) { p.refuse, p.hole, p.delay, p.chunk, p.pass = false, false, nil, 0, nil })
}

// cut closes all connections; reset sends RST instead of FIN.
func (p *proxy) cut(reset bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		if tc, ok := c.(*net.TCPConn); ok && reset {
			tc.SetLinger(0)
		}
		c.Close()
	}
}

func (p *proxy) close() {
	p.ln.Close()
	p.set(func(p *proxy) { p.ended = true })
	p.cut(false)
	p.wg.Wait()
}
