package peer

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

const (
	backoffMin  = 100 * time.Millisecond
	backoffMax  = time.Second
	connectTime = time.Second     // for a TCP connection
	greetTime   = 3 * time.Second // for handshake and hello
)

// errGone: the listener has ended the session or never had it.
var errGone = errors.New("the peer has ended this session")

// errRefused is the class of refusals that trying again does not change.
var errRefused = errors.New("refused for good")

// Dial connects to the peer's listener over all links and returns when the
// first link is up; the others join in the background and are redialled for as
// long as the session lives. It retries until ctx ends, except when every link
// was refused for good (certificate, version). The session outlives ctx.
func Dial(ctx context.Context, cfg Config) (*Session, error) {
	cfg, err := cfg.withDefaults(true)
	if err != nil {
		return nil, err
	}
	for {
		s, again, err := found(ctx, cfg)
		if err == nil {
			return s, nil
		}
		if !again {
			return nil, err
		}
		// The listener ended this nonce before we knew that it had taken it.
		if !sleep(ctx, ctx.Done(), backoffMin) {
			return nil, fmt.Errorf("dial peer: %w: %w", context.Cause(ctx), err)
		}
	}
}

// founding is what the links of a session that is being founded share.
type founding struct {
	mu     sync.Mutex
	errs   []error // last error per link
	up     chan struct{}
	failed chan error // first reason to give up this nonce
	once   sync.Once
}

// found tries to found one session with a fresh nonce.
func found(ctx context.Context, cfg Config) (s *Session, again bool, err error) {
	var n nonce
	if _, err := rand.Read(n[:]); err != nil {
		return nil, false, fmt.Errorf("dial peer: draw nonce: %w", err)
	}
	s = newSession(cfg, n, len(cfg.Remote))
	f := &founding{errs: make([]error, len(cfg.Remote)), up: make(chan struct{}), failed: make(chan error, len(cfg.Remote))}
	s.wg.Add(len(s.links))
	for _, l := range s.links {
		go l.dial(f)
	}
	select {
	case <-f.up:
		return s, false, nil
	case err = <-f.failed:
		again = errors.Is(err, errGone)
	case <-ctx.Done():
		f.mu.Lock()
		err = fmt.Errorf("dial peer: %w: %w", context.Cause(ctx), errors.Join(f.errs...))
		f.mu.Unlock()
	}
	s.mu.Lock()
	s.lose(&LostError{Cause: CauseLocal, Detail: "dialling was given up"}, codeClosed, "dialling was given up")
	s.mu.Unlock()
	s.wg.Wait()
	return nil, again, err
}

// note keeps the last error of a link; it gives the founding up when that is
// hopeless on every link.
func (f *founding) note(idx int, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.errs[idx] = err
	if errors.Is(err, errGone) {
		f.fail(err)
		return
	}
	for _, e := range f.errs {
		if !errors.Is(e, errRefused) && !errors.Is(e, errIdentity) {
			return
		}
	}
	f.fail(fmt.Errorf("dial peer: %w", errors.Join(f.errs...)))
}

func (f *founding) fail(err error) {
	select {
	case f.failed <- err:
	default:
	}
}

// dial keeps one link up for as long as the session lives.
func (l *link) dial(f *founding) {
	s := l.s
	defer s.wg.Done()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	s.wg.Add(1)
	go func() { // ends with the session, or with this function
		defer s.wg.Done()
		select {
		case <-s.lost:
			cancel()
		case <-ctx.Done():
		}
	}()
	wait := backoffMin
	for ctx.Err() == nil {
		down, err := l.connect(ctx)
		if err == nil && down == nil {
			return // lost meanwhile
		}
		if err == nil {
			f.once.Do(func() { close(f.up) })
			select {
			case <-down:
			case <-s.lost:
				return
			}
			wait = backoffMin
		} else {
			s.log.Debug("peer link not up", "link", l.idx, "error", err.Error())
			select {
			case <-f.up:
				if errors.Is(err, errGone) {
					s.mu.Lock()
					s.lose(&LostError{Cause: CauseGone, Detail: err.Error()}, codeSilent, err.Error())
					s.mu.Unlock()
					return
				}
			default:
				f.note(l.idx, err)
			}
		}
		if !sleep(ctx, s.lost, wait) {
			return
		}
		wait = min(2*wait, backoffMax)
	}
}

// connect makes one connection and takes it into service.
func (l *link) connect(ctx context.Context) (<-chan struct{}, error) {
	s := l.s
	d := net.Dialer{Timeout: connectTime, KeepAlive: -1}
	if len(s.cfg.Local) > 0 && s.cfg.Local[l.idx] != "" {
		ip := net.ParseIP(hostOf(s.cfg.Local[l.idx]))
		if ip == nil {
			return nil, fmt.Errorf("dial link %d: local address %q: %w", l.idx, s.cfg.Local[l.idx], errRefused)
		}
		d.LocalAddr = &net.TCPAddr{IP: ip}
	}
	nc, err := d.DialContext(ctx, "tcp", s.cfg.Remote[l.idx])
	if err != nil {
		return nil, fmt.Errorf("dial link %d: %w", l.idx, err)
	}
	raw, ok := nc.(*net.TCPConn)
	if !ok {
		nc.Close()
		return nil, fmt.Errorf("dial link %d: not TCP: %w", l.idx, errRefused)
	}
	// A loss while the handshake goes on must not wait for it.
	defer context.AfterFunc(ctx, func() { _ = raw.SetDeadline(time.Unix(1, 0)) })()
	c, w, err := l.greet(raw)
	if err != nil {
		raw.Close()
		return nil, fmt.Errorf("greet on link %d: %w", l.idx, err)
	}
	if err := s.agree(w); err != nil {
		raw.Close()
		return nil, fmt.Errorf("greet on link %d: %w", l.idx, err)
	}
	return l.attach(c), nil
}

// greet sends our hello and returns the peer's welcome.
func (l *link) greet(raw *net.TCPConn) (*linkConn, hello, error) {
	s := l.s
	c, err := wrap(raw, &s.cfg, true, time.Now().Add(greetTime))
	if err != nil {
		return nil, hello{}, err
	}
	s.mu.Lock()
	h := hello{low: versionMin, high: versionMax, session: s.nonce, peer: s.peerNonce,
		index: uint8(l.idx), links: uint8(len(s.links)), limit: uint64(s.cfg.Window), opaque: s.cfg.Hello}
	s.mu.Unlock()
	if _, err := c.tls.Write(appendFrame(nil, header{typ: typeHello}, appendHello(nil, h))); err != nil {
		return nil, hello{}, fmt.Errorf("send hello: %w", err)
	}
	head := make([]byte, headerLen)
	fh, payload, err := readFrame(c.tls, head, func(n int) []byte { return make([]byte, n) })
	if err != nil {
		return nil, hello{}, fmt.Errorf("await welcome: %w", err)
	}
	switch fh.typ {
	case typeWelcome:
	case typeRefuse:
		code, text, err := parseCode(payload)
		switch {
		case err != nil:
			return nil, hello{}, err
		case code == codeGone:
			return nil, hello{}, fmt.Errorf("%w: %q", errGone, text)
		case code == codeVersion:
			return nil, hello{}, fmt.Errorf("%w: %q", errRefused, text)
		}
		return nil, hello{}, fmt.Errorf("refused for now: %q", text)
	default:
		return nil, hello{}, fmt.Errorf("await welcome: frame of type %d: %w", fh.typ, errFrame)
	}
	w, err := parseHello(payload)
	if err != nil {
		return nil, hello{}, err
	}
	if w.low != w.high || w.low < versionMin || w.low > versionMax {
		return nil, hello{}, fmt.Errorf("await welcome: version %d: %w", w.low, errRefused)
	}
	if w.session != s.nonce || w.index != h.index || w.links != h.links || (w.peer == nonce{}) {
		return nil, hello{}, fmt.Errorf("await welcome: not for this link: %w", errFrame)
	}
	if err := raw.SetDeadline(time.Time{}); err != nil {
		return nil, hello{}, fmt.Errorf("clear deadline: %w", err)
	}
	return c, w, nil
}

// agree takes the first welcome as the founding one and checks later ones
// against it: all links must end in the same listener's session.
func (s *Session) agree(w hello) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cause != nil {
		return s.cause
	}
	if !s.established {
		s.begin(w.peer, w.opaque, w.limit)
		return nil
	}
	if s.peerNonce != w.peer {
		return fmt.Errorf("another session answers: %w", errGone)
	}
	return nil
}

// begin starts the clock of a session, under the lock.
func (s *Session) begin(peer nonce, opaque []byte, limit uint64) {
	s.peerNonce, s.peerHello, s.out.limit = peer, opaque, int64(limit)
	s.established = true
	now := Now()
	later(&s.heard, now)
	s.patience.since = now
	s.wg.Add(1)
	go s.clerk()
}

// sleep waits and reports whether it was left to.
func sleep(ctx context.Context, stop <-chan struct{}, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
	case <-stop:
	}
	return false
}

// hostOf returns the host part of an address that may lack a port.
func hostOf(addr string) string {
	if h, _, err := net.SplitHostPort(addr); err == nil {
		return h
	}
	return addr
}
