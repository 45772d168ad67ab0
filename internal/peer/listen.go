package peer

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"
)

const (
	greetings    = 16 // connections that may be in their handshake at a time
	retiredCount = 64 // ended sessions whose dialler is told so
)

// Listener waits for a peer to dial. It serves one session at a time: while one
// lives, other diallers are told to come again.
type Listener struct {
	cfg    Config
	socks  []*net.TCPListener
	ready  chan *Session
	closed chan struct{}
	wg     sync.WaitGroup
	slots  chan struct{}

	mu      sync.Mutex
	cur     *Session
	retired []nonce
	raws    map[*net.TCPConn]struct{} // in their handshake
	ended   bool
}

// Listen opens a listening socket per link. ctx bounds only the opening.
func Listen(ctx context.Context, cfg Config) (*Listener, error) {
	cfg, err := cfg.withDefaults(false)
	if err != nil {
		return nil, err
	}
	l := &Listener{
		cfg: cfg, ready: make(chan *Session, 1), closed: make(chan struct{}),
		slots: make(chan struct{}, greetings), raws: make(map[*net.TCPConn]struct{}),
	}
	// Multipath TCP has its own notion of the options we set, and of failover.
	lc := net.ListenConfig{KeepAlive: -1}
	lc.SetMultipathTCP(false)
	for _, a := range cfg.Local {
		if _, _, err := net.SplitHostPort(a); err != nil {
			a = net.JoinHostPort(a, "0")
		}
		nl, err := lc.Listen(ctx, "tcp", a)
		if err != nil {
			for _, s := range l.socks {
				s.Close()
			}
			return nil, fmt.Errorf("listen for peer: %w", err)
		}
		l.socks = append(l.socks, nl.(*net.TCPListener))
	}
	l.wg.Add(len(l.socks))
	for _, s := range l.socks {
		go l.serve(s)
	}
	return l, nil
}

// Addrs returns the IP:port of each link, in the order of Config.Local.
func (l *Listener) Addrs() []string {
	out := make([]string, len(l.socks))
	for i, s := range l.socks {
		out[i] = s.Addr().String()
	}
	return out
}

// ErrListenerClosed is returned by Accept after Close.
var ErrListenerClosed = errors.New("listener closed")

// Accept returns the next session, as soon as its first link is up.
func (l *Listener) Accept(ctx context.Context) (*Session, error) {
	for {
		select {
		case s := <-l.ready:
			if s.Cause() == nil {
				return s, nil
			}
		case <-l.closed:
			return nil, fmt.Errorf("accept peer: %w", ErrListenerClosed)
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// Close stops listening and ends a session that nobody has accepted; links of
// an accepted session stay, but can no longer be redialled. It waits.
func (l *Listener) Close() error {
	l.mu.Lock()
	if !l.ended {
		l.ended = true
		close(l.closed)
		for _, s := range l.socks {
			s.Close()
		}
		for raw := range l.raws {
			raw.Close()
		}
	}
	l.mu.Unlock()
	l.wg.Wait()
	select {
	case s := <-l.ready:
		s.Close("nobody accepted the session")
	default:
	}
	return nil
}

// serve takes connections of one socket.
func (l *Listener) serve(sock *net.TCPListener) {
	defer l.wg.Done()
	for {
		raw, err := sock.AcceptTCP()
		if err != nil {
			select {
			case <-l.closed:
				return
			case <-time.After(backoffMin): // out of descriptors, or the like
				l.cfg.Log.Warn("peer listener cannot accept", "error", err.Error())
				continue
			}
		}
		select {
		case l.slots <- struct{}{}:
		case <-l.closed:
			raw.Close()
			return
		}
		l.mu.Lock()
		if l.ended {
			l.mu.Unlock()
			raw.Close()
			return
		}
		l.raws[raw] = struct{}{}
		l.wg.Add(1)
		l.mu.Unlock()
		go func() {
			defer l.wg.Done()
			err := l.greet(raw)
			l.mu.Lock()
			delete(l.raws, raw)
			l.mu.Unlock()
			<-l.slots
			if err != nil {
				raw.Close()
				l.cfg.Log.Info("peer link refused", "remote", raw.RemoteAddr().String(), "error", err.Error())
			}
		}()
	}
}

// greet does the handshake of one connection and joins it to its session.
func (l *Listener) greet(raw *net.TCPConn) error {
	c, err := wrap(raw, &l.cfg, false, time.Now().Add(greetTime))
	if err != nil {
		return err
	}
	head := make([]byte, headerLen)
	fh, payload, err := readFrame(c.tls, head, func(n int) []byte { return make([]byte, n) })
	if err != nil {
		return fmt.Errorf("await hello: %w", err)
	}
	if fh.typ != typeHello {
		return fmt.Errorf("await hello: frame of type %d: %w", fh.typ, errFrame)
	}
	h, err := parseHello(payload)
	if err != nil {
		return err
	}
	version := min(h.high, versionMax)
	if version < max(h.low, versionMin) {
		return refuse(c, codeVersion, fmt.Sprintf("this side speaks versions %d to %d", versionMin, versionMax))
	}
	s, code, text := l.admit(h)
	if s == nil {
		return refuse(c, code, text)
	}
	w := hello{low: version, high: version, session: h.session, peer: s.peerNonce,
		index: h.index, links: h.links, limit: uint64(l.cfg.Window), opaque: l.cfg.Hello}
	if _, err := c.tls.Write(appendFrame(nil, header{typ: typeWelcome}, appendHello(nil, w))); err != nil {
		return fmt.Errorf("send welcome: %w", err)
	}
	if err := raw.SetDeadline(time.Time{}); err != nil {
		return fmt.Errorf("clear deadline: %w", err)
	}
	if s.links[h.index].attach(c) == nil {
		return s.Cause()
	}
	l.offer(s)
	return nil
}

// refuse answers a hello with a reason and returns it as an error.
func refuse(c *linkConn, code uint16, text string) error {
	if _, err := c.tls.Write(appendFrame(nil, header{typ: typeRefuse}, appendCode(nil, code, text))); err != nil {
		return fmt.Errorf("send refusal: %w", err)
	}
	_ = c.raw.CloseWrite() // what the dialler does not read it does not need
	return fmt.Errorf("%w: %s", errRefused, text)
}

// admit finds or founds the session a hello is for.
func (l *Listener) admit(h hello) (s *Session, code uint16, text string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended {
		return nil, codeBusy, "the listener is closing"
	}
	if l.cur != nil && l.cur.Cause() != nil {
		l.retired = append(l.retired, l.cur.nonce)
		if len(l.retired) > retiredCount {
			l.retired = l.retired[1:]
		}
		l.cur = nil
	}
	switch {
	case l.cur != nil && l.cur.nonce == h.session:
		if h.peer != (nonce{}) && h.peer != l.cur.peerNonce {
			return nil, codeGone, "no such session"
		}
		if int(h.links) != len(l.cur.links) {
			return nil, codeGone, "the number of links has changed"
		}
		return l.cur, 0, ""
	case h.peer != (nonce{}) || slices.Contains(l.retired, h.session):
		// A link that wants back into a session that is over must never found one.
		return nil, codeGone, "that session is over"
	case l.cur != nil:
		return nil, codeBusy, "another session lives"
	}
	var mine nonce
	if _, err := rand.Read(mine[:]); err != nil {
		return nil, codeBusy, "no random numbers"
	}
	s = newSession(l.cfg, h.session, int(h.links))
	s.mu.Lock()
	s.begin(mine, h.opaque, h.limit)
	s.mu.Unlock()
	l.cur = s
	return s, 0, ""
}

// offer hands a session to Accept, once. An older one that is still waiting
// there is lost by now, or this one could not have been founded.
func (l *Listener) offer(s *Session) {
	l.mu.Lock()
	defer l.mu.Unlock()
	s.mu.Lock()
	first := !s.offered
	s.offered = true
	s.mu.Unlock()
	if !first {
		return
	}
	select {
	case <-l.ready:
	default:
	}
	l.ready <- s
}
