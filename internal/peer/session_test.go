package peer

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// testCtx ends with the test, at the latest after 30 s.
func testCtx(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestMessagesOfAllSizesArriveInOrderBothWays(t *testing.T) {
	w := newWorld(t, 2, nil)
	if got := string(w.a.PeerHello()) + "/" + string(w.b.PeerHello()); got != "from b/from a" {
		t.Fatalf("hellos: %s", got)
	}
	sizes := []int{0, 1, 100, maxPayload - 1, maxPayload, maxPayload + 1, 1 << 20, MaxMessage, 7}
	var wg sync.WaitGroup
	for _, dir := range [][2]*Session{{w.a, w.b}, {w.b, w.a}} {
		wg.Add(2)
		go func() {
			defer wg.Done()
			for i, n := range sizes {
				body := bytes.Repeat([]byte{byte(i + 1)}, n)
				if err := dir[0].Send(testCtx(t), uint8(i), body[:n/3], nil, body[n/3:]); err != nil {
					t.Error(err)
				}
			}
		}()
		go func() {
			defer wg.Done()
			for i, n := range sizes {
				m, err := dir[1].Recv(testCtx(t))
				if err != nil {
					t.Error(err)
					return
				}
				if m.Kind != uint8(i) || !bytes.Equal(m.Payload, bytes.Repeat([]byte{byte(i + 1)}, n)) {
					t.Errorf("message %d: kind %d, %d bytes", i, m.Kind, len(m.Payload))
				}
				if age := Now() - m.Received; age < 0 || age > time.Minute {
					t.Errorf("message %d: received %v ago", i, age)
				}
			}
		}()
	}
	wg.Wait()
	if err := w.a.Send(testCtx(t), 0, make([]byte, MaxMessage+1)); !errors.Is(err, ErrTooBig) {
		t.Fatalf("too big a message: %v", err)
	}
	if err := w.a.Urgent(0, make([]byte, MaxUrgent+1)); !errors.Is(err, ErrTooBig) {
		t.Fatalf("too big a note: %v", err)
	}
}

func TestUrgentNotesArriveOnceAndPassBulk(t *testing.T) {
	var mu sync.Mutex
	seen := map[string]int{}
	w := newWorld(t, 2, func(a, b *Config) {
		b.Urgent = func(kind uint8, p []byte) {
			mu.Lock()
			seen[fmt.Sprint(kind, string(p))]++
			mu.Unlock()
		}
	})
	// Nobody receives: bulk fills the window, and urgent notes still pass.
	ctx, cancel := context.WithCancel(testCtx(t))
	done := make(chan struct{})
	go func() {
		defer close(done)
		for w.a.Send(ctx, 1, make([]byte, MaxMessage)) == nil {
		}
	}()
	for i := range 50 {
		check(t, w.a.Urgent(uint8(i), []byte("note")))
		want := fmt.Sprint(uint8(i), "note")
		eventually(t, "the note", func() bool { mu.Lock(); defer mu.Unlock(); return seen[want] > 0 })
	}
	cancel()
	<-done
	mu.Lock()
	defer mu.Unlock()
	for k, n := range seen {
		if n != 1 {
			t.Errorf("note %s came %d times", k, n)
		}
	}
}

func TestSendBlocksAtTheWindowAndMemoryStaysBounded(t *testing.T) {
	w := newWorld(t, 2, func(a, b *Config) { b.Window = MinWindow })
	var sent atomic.Int64
	ctx, cancel := context.WithCancel(testCtx(t))
	done := make(chan error, 1)
	go func() {
		for {
			if err := w.a.Send(ctx, 1, make([]byte, 1<<20)); err != nil {
				done <- err
				return
			}
			sent.Add(1)
		}
	}()
	held := func(s *Session) (out, in int64) {
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, f := range s.out.frames {
			out += f.cost
		}
		return out, s.in.accepted - s.in.consumed
	}
	eventually(t, "the window is full", func() bool { return sent.Load() == 7 }) // 8 messages cost a little more than 8 MiB
	eventually(t, "all acknowledged", func() bool { o, _ := held(w.a); return o == 0 })
	if _, in := held(w.b); in > MinWindow {
		t.Fatalf("receiver holds %d bytes", in)
	}
	for range 20 {
		_, err := w.b.Recv(testCtx(t))
		check(t, err)
		if o, _ := held(w.a); o > MinWindow {
			t.Fatalf("sender holds %d bytes", o)
		}
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Fatalf("cancelled send: %v", err)
	}
}

func TestPoliteCloseDeliversEverythingFirst(t *testing.T) {
	w := newWorld(t, 2, nil)
	for i := range 10 {
		check(t, w.a.Send(testCtx(t), uint8(i), make([]byte, 300<<10)))
	}
	w.a.Close("switchover done")
	<-w.b.Lost()
	for i := range 10 {
		m, err := w.b.Recv(testCtx(t))
		check(t, err)
		if m.Kind != uint8(i) {
			t.Fatalf("message %d has kind %d", i, m.Kind)
		}
	}
	_, err := w.b.Recv(testCtx(t))
	var lost *LostError
	if !errors.Is(err, ErrLost) || !errors.As(err, &lost) || lost.Cause != CauseClosed || lost.Detail != "switchover done" {
		t.Fatalf("after close: %v", err)
	}
	if CauseOf(w.a.Cause()) != CauseLocal || CauseOf(w.a.Send(testCtx(t), 1)) != CauseLocal {
		t.Fatalf("own side: %v", w.a.Cause())
	}
}

func TestOneLinkCutIsNoLossAndComesBack(t *testing.T) {
	w := newWorld(t, 2, nil)
	for i := range 3 {
		w.proxies[i%2].cut(i == 2)
		eventually(t, "the link is down", func() bool { return !w.a.Links()[i%2].Up || !w.b.Links()[i%2].Up })
		check(t, w.a.Send(testCtx(t), 9, []byte("still here")))
		_, err := w.b.Recv(testCtx(t))
		check(t, err)
		w.allUp(t)
	}
	if w.a.Cause() != nil || w.b.Cause() != nil {
		t.Fatal("session was lost")
	}
}

func TestAllLinksClosedIsALossAtOnce(t *testing.T) {
	w := newWorld(t, 2, nil)
	check(t, w.a.Send(testCtx(t), 5, []byte("last words")))
	eventually(t, "it arrived", func() bool { w.b.mu.Lock(); defer w.b.mu.Unlock(); return len(w.b.in.inbox) == 1 })
	start := time.Now()
	for _, p := range w.proxies {
		p.set(func(p *proxy) { p.refuse = true })
	}
	for _, p := range w.proxies {
		p.cut(true)
	}
	<-w.a.Lost()
	<-w.b.Lost()
	took := time.Since(start)
	t.Logf("noticed after %v", took)
	if took > 2*time.Second {
		t.Errorf("noticed after %v only", took)
	}
	if CauseOf(w.b.Cause()) != CauseDied {
		t.Errorf("cause: %v", w.b.Cause())
	}
	if _, err := w.b.Recv(testCtx(t)); !errors.Is(err, ErrLost) {
		t.Errorf("receive after loss: %v", err)
	}
	if rest := w.b.Leftover(); len(rest) != 1 || string(rest[0].Payload) != "last words" {
		t.Errorf("left over: %v", rest)
	}
	if len(w.b.Leftover()) != 0 {
		t.Error("left over twice")
	}
}

func TestSilenceOnAllLinksIsALoss(t *testing.T) {
	w := newWorld(t, 2, func(a, b *Config) { a.Silence, b.Silence = 300*time.Millisecond, 300*time.Millisecond })
	start := time.Now()
	for _, p := range w.proxies {
		p.set(func(p *proxy) { p.hole = true })
	}
	<-w.a.Lost()
	<-w.b.Lost()
	took := time.Since(start)
	t.Logf("noticed after %v", took)
	if took < 250*time.Millisecond || took > 3*time.Second {
		t.Errorf("noticed after %v", took)
	}
	if CauseOf(w.a.Cause()) != CauseSilent || CauseOf(w.b.Cause()) != CauseSilent {
		t.Errorf("causes: %v, %v", w.a.Cause(), w.b.Cause())
	}
	// Healing does not revive it; a new session can be had at once.
	for _, p := range w.proxies {
		p.heal()
	}
	a, err := Dial(testCtx(t), w.cfgA)
	check(t, err)
	b, err := w.listener.Accept(testCtx(t))
	check(t, err)
	check(t, a.Send(testCtx(t), 1, []byte("new")))
	m, err := b.Recv(testCtx(t))
	check(t, err)
	if string(m.Payload) != "new" {
		t.Fatalf("got %q", m.Payload)
	}
	a.Close("")
	b.Close("")
}

// A process that wakes after a freeze finds old messages in its inbox and its
// sockets. The freeze is played by moving the time last heard back.
func TestAWakingProcessBelievesNothingOld(t *testing.T) {
	w := newWorld(t, 2, nil)
	check(t, w.a.Send(testCtx(t), 1, []byte("from before")))
	eventually(t, "it arrived", func() bool { w.b.mu.Lock(); defer w.b.mu.Unlock(); return len(w.b.in.inbox) == 1 })
	// Under the lock no frame is handled, as in a frozen process; whoever comes
	// first afterwards, reader, clerk or Recv, must judge by the clock.
	w.b.mu.Lock()
	w.b.heard.Store(int64(Now() - 10*time.Second))
	w.b.mu.Unlock()
	if _, err := w.b.Recv(testCtx(t)); CauseOf(err) != CauseSilent {
		// A reader may have read between the two steps above only if the store came
		// first; it compares before it notes the time.
		t.Fatalf("after the freeze: %v", err)
	}
	<-w.a.Lost()
}

func TestStrangersAreRefused(t *testing.T) {
	base := testConfig(t)
	lc := base
	lc.Local = []string{"127.0.0.1:0"}
	lc.Verify = func(st tls.ConnectionState) error {
		if st.PeerCertificates[0].Subject.CommonName != "host" {
			return errors.New("wrong host")
		}
		return nil
	}
	l, err := Listen(testCtx(t), lc)
	check(t, err)
	defer l.Close()
	dial := func(c Config) error {
		c.Remote = l.Addrs()
		ctx, cancel := context.WithTimeout(testCtx(t), 2*time.Second)
		defer cancel()
		s, err := Dial(ctx, c)
		if err == nil {
			s.Close("")
		}
		return err
	}
	wrongHost := base
	wrongHost.Verify = func(tls.ConnectionState) error { return errors.New("this is not host-b") }
	if err := dial(wrongHost); err == nil || !errors.Is(err, errIdentity) {
		t.Errorf("dialling the wrong host: %v", err)
	}
	wrongCA := testConfig(t)
	if err := dial(wrongCA); err == nil {
		t.Error("dialling with another CA succeeded")
	}
	if err := dial(base); err != nil {
		t.Errorf("dialling with the right certificate: %v", err)
	}
	for name, c := range map[string]Config{
		"no TLS":     {Verify: base.Verify, Remote: []string{"x:1"}},
		"no verify":  {TLS: base.TLS, Remote: []string{"x:1"}},
		"no links":   base,
		"five links": {TLS: base.TLS, Verify: base.Verify, Remote: make([]string, 5)},
		"window":     {TLS: base.TLS, Verify: base.Verify, Remote: []string{"x:1"}, Window: 1},
	} {
		if _, err := Dial(testCtx(t), c); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestASecondDiallerWaitsForTheFirst(t *testing.T) {
	w := newWorld(t, 1, nil)
	ctx, cancel := context.WithTimeout(testCtx(t), 300*time.Millisecond)
	defer cancel()
	if s, err := Dial(ctx, w.cfgA); err == nil {
		s.Close("")
		t.Fatal("two sessions at a time")
	}
	w.a.Close("make room")
	<-w.b.Lost()
	s, err := Dial(testCtx(t), w.cfgA)
	check(t, err)
	defer s.Close("")
	b, err := w.listener.Accept(testCtx(t))
	check(t, err)
	b.Close("")
}

func TestConcurrentSendersAreNotMixed(t *testing.T) {
	w := newWorld(t, 2, nil)
	const senders, each = 4, 25
	for i := range senders {
		go func() {
			r := rand.New(rand.NewPCG(1, uint64(i)))
			for n := range each {
				body := bytes.Repeat([]byte{byte(n)}, r.IntN(200<<10))
				w.a.Send(testCtx(t), uint8(i), []byte{byte(n)}, body)
			}
		}()
	}
	var next [senders]byte
	for range senders * each {
		m, err := w.b.Recv(testCtx(t))
		check(t, err)
		for _, c := range m.Payload {
			if c != next[m.Kind] {
				t.Fatalf("sender %d: byte %d in message %d", m.Kind, c, next[m.Kind])
			}
		}
		next[m.Kind]++
	}
}

// Whatever way a session ends, nothing of it goes on running.
func TestNothingIsLeftRunning(t *testing.T) {
	running := func() string {
		b := make([]byte, 1<<20)
		b = b[:runtime.Stack(b, true)]
		for _, name := range []string{"(*link).", "(*Session).clerk", "(*Listener).serve"} {
			if bytes.Contains(b, []byte("peer."+name)) {
				return string(b)
			}
		}
		return ""
	}
	for _, end := range []func(w *world){
		func(w *world) { w.a.Close("a is done") },
		func(w *world) { w.b.Close("b is done") },
		func(w *world) {
			for _, p := range w.proxies {
				p.set(func(p *proxy) { p.refuse = true })
				p.cut(true)
			}
		},
	} {
		w := newWorld(t, 2, nil)
		end(w)
		<-w.a.Lost()
		<-w.b.Lost()
		check(t, w.listener.Close())
		eventually(t, "goroutines to end", func() bool { return running() == "" })
		w.a.Close("")
		w.b.Close("")
	}
}
