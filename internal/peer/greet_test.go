package peer

import (
	"context"
	"crypto/tls"
	"testing"
	"time"
)

// greetRaw connects to a listener without Dial, sends one frame and returns the answer.
func greetRaw(t *testing.T, addr string, cfg Config, frame []byte) (header, []byte, error) {
	t.Helper()
	c, err := tls.Dial("tcp", addr, cfg.TLS)
	check(t, err)
	t.Cleanup(func() { c.Close() })
	check(t, c.SetDeadline(time.Now().Add(5*time.Second)))
	_, err = c.Write(frame)
	check(t, err)
	return readFrame(c, make([]byte, headerLen), func(n int) []byte { return make([]byte, n) })
}

func TestAHelloThatDoesNotFitIsRefused(t *testing.T) {
	w := newWorld(t, 1, nil)
	addr := w.listener.Addrs()[0]
	good := hello{low: 1, high: 1, session: nonce{7}, links: 1, limit: MinWindow}
	with := func(change func(h *hello)) []byte {
		h := good
		change(&h)
		return appendFrame(nil, header{typ: typeHello}, appendHello(nil, h))
	}
	live := w.a.nonce
	for _, c := range []struct {
		name  string
		frame []byte
		code  uint16 // 0: closed without an answer
	}{
		{"a later version", with(func(h *hello) { h.low, h.high = 2, 9 }), codeVersion},
		{"another dialler", with(func(h *hello) {}), codeBusy},
		{"back into a session that never was", with(func(h *hello) { h.peer = nonce{1} }), codeGone},
		{"into the live session with a wrong listener's nonce", with(func(h *hello) { h.session, h.peer = live, nonce{1} }), codeGone},
		{"into the live session with more links", with(func(h *hello) { h.session, h.links = live, 3 }), codeGone},
		{"no nonce", with(func(h *hello) { h.session = nonce{} }), 0},
		{"a link beyond the count", with(func(h *hello) { h.index = 1 }), 0},
		{"data before the hello", appendFrame(nil, header{typ: typeData, flags: 3, total: 1}, []byte{1}), 0},
		{"no frame", []byte("GET / HTTP/1.1\r\nHost: somebody\r\n\r\n"), 0},
	} {
		h, payload, err := greetRaw(t, addr, w.cfgA, c.frame)
		switch {
		case c.code == 0 && err == nil:
			t.Errorf("%s: answered by type %d", c.name, h.typ)
		case c.code != 0 && (err != nil || h.typ != typeRefuse):
			t.Errorf("%s: type %d, %v", c.name, h.typ, err)
		case c.code != 0:
			if code, text, err := parseCode(payload); err != nil || code != c.code {
				t.Errorf("%s: code %d %q, %v", c.name, code, text, err)
			}
		}
	}
	if w.a.Cause() != nil || w.b.Cause() != nil {
		t.Errorf("a stranger ended the session: %v, %v", w.a.Cause(), w.b.Cause())
	}
}

// A dialler whose link comes back after the listener ended the session is told so.
func TestALinkThatComesBackTooLateIsToldSo(t *testing.T) {
	w := newWorld(t, 2, nil)
	w.b.mu.Lock()
	// The listener's side ends without its goodbye getting through.
	w.b.lose(&LostError{Cause: CauseLocal, Detail: "test"}, 0, "")
	w.b.mu.Unlock()
	<-w.a.Lost()
	if c := CauseOf(w.a.Cause()); c != CauseGone && c != CauseDied {
		t.Errorf("cause: %v", w.a.Cause())
	}
	frame := appendFrame(nil, header{typ: typeHello}, appendHello(nil,
		hello{low: 1, high: 1, session: w.a.nonce, links: 2, limit: MinWindow}))
	h, payload, err := greetRaw(t, w.listener.Addrs()[0], w.cfgA, frame)
	check(t, err)
	if code, _, err := parseCode(payload); h.typ != typeRefuse || err != nil || code != codeGone {
		t.Errorf("an ended nonce founded a session: type %d, code %d, %v", h.typ, code, err)
	}
}

// A peer that breaks the protocol inside a session loses it, and is told.
func TestAPeerThatBreaksTheProtocolLosesTheSession(t *testing.T) {
	w := newWorld(t, 1, nil)
	w.a.mu.Lock()
	// A frame from the middle of a message that never began.
	f := &outFrame{seq: w.a.out.next(), cost: frameCost(1)}
	f.buf = appendFrame(nil, header{typ: typeData, flags: flagLast, seq: f.seq}, []byte{1})
	w.a.out.add([]*outFrame{f})
	w.a.links[0].wake.Signal()
	w.a.mu.Unlock()
	<-w.b.Lost()
	<-w.a.Lost()
	if CauseOf(w.b.Cause()) != CauseProtocol || CauseOf(w.a.Cause()) != CauseGone {
		t.Errorf("causes: %v, %v", w.a.Cause(), w.b.Cause())
	}
}

func TestAcceptAndDialGiveUpWithTheirContext(t *testing.T) {
	cfg := testConfig(t)
	cfg.Local = []string{"127.0.0.1"}
	l, err := Listen(testCtx(t), cfg)
	check(t, err)
	addr := l.Addrs()
	check(t, l.Close())
	if _, err := l.Accept(testCtx(t)); err == nil {
		t.Error("accepted on a closed listener")
	}
	cfg.Local, cfg.Remote = nil, addr
	ctx, cancel := context.WithTimeout(testCtx(t), 300*time.Millisecond)
	defer cancel()
	if s, err := Dial(ctx, cfg); err == nil {
		s.Close("")
		t.Error("dialled nobody")
	} else {
		t.Logf("%v", err)
	}
}
