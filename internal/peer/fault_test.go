package peer

import (
	"bytes"
	"encoding/binary"
	"errors"
	"flag"
	"log/slog"
	"math/rand/v2"
	"testing"
	"time"
)

var (
	faultSeed   = flag.Uint64("fault.seed", 0, "seed of the random faults; 0 draws one")
	faultRounds = flag.Int("fault.rounds", 8, "random faults per run")
)

// fault does one kind of harm to one proxy.
type fault struct {
	name string
	do   func(p *proxy, r *rand.Rand)
	cuts bool // needs a new connection, if only later: the stream is cut or damaged
}

var faults = []fault{
	{"cut", func(p *proxy, r *rand.Rand) { p.cut(r.IntN(2) == 0) }, true},
	{"cut and refuse", func(p *proxy, r *rand.Rand) {
		p.set(func(p *proxy) { p.refuse = true })
		p.cut(true)
	}, true},
	{"black hole", func(p *proxy, r *rand.Rand) { p.set(func(p *proxy) { p.hole = true }) }, false},
	{"drip", func(p *proxy, r *rand.Rand) {
		n := 200 + r.IntN(4000)
		p.set(func(p *proxy) { p.chunk, p.delay = n, func() time.Duration { return 2 * time.Millisecond } })
	}, false},
	{"delay", func(p *proxy, r *rand.Rand) {
		d := time.Duration(r.IntN(60)) * time.Millisecond
		p.set(func(p *proxy) { p.delay = func() time.Duration { return d } })
	}, false},
	{"jitter", func(p *proxy, r *rand.Rand) {
		seed := r.Uint64()
		p.set(func(p *proxy) {
			p.delay = func() time.Duration { return time.Duration(rand.N(int64(20*time.Millisecond))) + time.Duration(seed%3) }
		})
	}, false},
	{"corrupt", func(p *proxy, r *rand.Rand) {
		n := 1 + r.IntN(5)
		p.set(func(p *proxy) {
			p.pass = func(_ bool, b []byte) []byte {
				if n--; n == 0 {
					b[len(b)/2] ^= 0x40
				}
				return b
			}
		})
	}, true},
	{"swallow", func(p *proxy, r *rand.Rand) {
		n := 1 + r.IntN(5)
		p.set(func(p *proxy) {
			p.pass = func(_ bool, b []byte) []byte {
				if n--; n == 0 {
					return b[:len(b)/2]
				}
				return b
			}
		})
	}, true},
}

// Random faults on one link at a time, under traffic both ways, never lose,
// double, mix or reorder a message, and never lose the session. Order across
// links is scrambled by the faults themselves.
func TestFaultsOnOneLinkAtATimeCostNoMessage(t *testing.T) {
	seed := *faultSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("seed %d (run again with -fault.seed=%d)", seed, seed)
	r := rand.New(rand.NewPCG(seed, 1))
	w := newWorld(t, 2, func(a, b *Config) {
		a.Silence, b.Silence = 3*time.Second, 3*time.Second
		a.Window, b.Window = MinWindow, MinWindow
		h := slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
		a.Log, b.Log = h.With("side", "a"), h.With("side", "b")
	})
	stop := make(chan struct{})
	type result struct {
		n   uint64
		err error
	}
	sent, got := make(chan result, 2), make(chan result, 2)
	for i, dir := range [][2]*Session{{w.a, w.b}, {w.b, w.a}} {
		go func() {
			n, err := sendNumbered(t, dir[0], rand.New(rand.NewPCG(seed, uint64(i)+2)), stop)
			sent <- result{n, err}
		}()
		go func() {
			n, err := recvNumbered(t, dir[1])
			got <- result{n, err}
		}()
	}
	for round := range *faultRounds {
		f, link := faults[r.IntN(len(faults))], r.IntN(2)
		p := w.proxies[link]
		t.Logf("round %d: %s", round, f.name)
		f.do(p, r)
		hold := time.NewTimer(time.Duration(r.IntN(800)) * time.Millisecond) // how long the fault lasts
		if r.IntN(8) == 0 {
			hold.Reset(4 * time.Second) // beyond the silence of a link
		}
		select {
		case <-hold.C:
		case <-w.a.Lost():
		case <-w.b.Lost():
		}
		p.heal()
		if f.cuts {
			// Two faults at a time are another matter: end this one before the next.
			w.renew(t, link)
		}
		w.allUp(t)
		if w.a.Cause() != nil || w.b.Cause() != nil {
			t.Fatalf("session lost: %v / %v; longest stall %v", w.a.Cause(), w.b.Cause(), w.stall())
		}
	}
	close(stop)
	var total [2]uint64
	for range 2 {
		s, g := <-sent, <-got
		if s.err != nil || g.err != nil {
			t.Fatalf("sender: %v, receiver: %v", s.err, g.err)
		}
		total[0] += s.n
		total[1] += g.n
	}
	if total[0] != total[1] {
		t.Fatalf("%d messages sent, %d received", total[0], total[1])
	}
	t.Logf("%d messages", total[0])
}

// renew replaces the connection of one link and waits until both sides have it.
func (w *world) renew(t *testing.T, link int) {
	t.Helper()
	down := func() bool { return !w.a.Links()[link].Up && !w.b.Links()[link].Up }
	p := w.proxies[link]
	p.set(func(p *proxy) { p.refuse = true })
	eventually(t, "the link is down", func() bool {
		p.cut(true) // again and again: one may just be coming up
		return down() || w.a.Cause() != nil || w.b.Cause() != nil
	})
	p.heal()
}

// sendNumbered sends messages of random sizes, each numbered and filled from
// its number, until stop, then one of kind 1.
func sendNumbered(t *testing.T, s *Session, r *rand.Rand, stop chan struct{}) (uint64, error) {
	fill := make([]byte, 256<<10)
	for n := uint64(0); ; n++ {
		kind := uint8(0)
		select {
		case <-stop:
			kind = 1
		default:
		}
		size := r.IntN(200)
		if r.IntN(4) == 0 {
			size = r.IntN(len(fill))
		}
		var head [8]byte
		binary.BigEndian.PutUint64(head[:], n)
		body := fill[:size]
		for i := range body {
			body[i] = byte(n)
		}
		if err := s.Send(testCtx(t), kind, head[:], body); err != nil || kind == 1 {
			return n, err
		}
	}
}

func recvNumbered(t *testing.T, s *Session) (uint64, error) {
	for n := uint64(0); ; n++ {
		m, err := s.Recv(testCtx(t))
		if err != nil {
			return n, err
		}
		if got := binary.BigEndian.Uint64(m.Payload); got != n {
			return n, errors.New("a message is missing, doubled or out of order")
		}
		if len(bytes.Trim(m.Payload[8:], string([]byte{byte(n)}))) != 0 {
			return n, errors.New("a message is mixed with another")
		}
		if m.Kind == 1 {
			return n, nil
		}
	}
}

// A black hole on one of two links costs small messages nothing and never
// stalls large ones for as long as its detection takes.
func TestABlackHoleOnOneLinkDelaysNothing(t *testing.T) {
	w := newWorld(t, 2, func(a, b *Config) { a.Silence, b.Silence = 5*time.Second, 5*time.Second })
	// Warm up, so that round trips are known.
	for range 20 {
		check(t, w.a.Send(testCtx(t), 0, make([]byte, 100)))
		_, err := w.b.Recv(testCtx(t))
		check(t, err)
	}
	w.proxies[1].set(func(p *proxy) { p.hole = true })
	for _, size := range []int{100, 100, 100, 1 << 20, 100, 1 << 20, 4 << 20} {
		start := time.Now()
		check(t, w.a.Send(testCtx(t), 0, make([]byte, size)))
		_, err := w.b.Recv(testCtx(t))
		check(t, err)
		took := time.Since(start)
		t.Logf("%d bytes took %v", size, took)
		if limit := 2 * time.Second; took > limit {
			t.Errorf("%d bytes took %v", size, took)
		}
	}
	if !w.a.Links()[1].Up {
		t.Error("the test is about a link that still counts as up")
	}
}

// Only the direction from a to b is lost: b notices, and tells a or closes.
func TestOneWaySilenceEndsBothSides(t *testing.T) {
	w := newWorld(t, 2, func(a, b *Config) { a.Silence, b.Silence = 300*time.Millisecond, 300*time.Millisecond })
	start := time.Now()
	for _, p := range w.proxies {
		p.set(func(p *proxy) {
			p.pass = func(toTarget bool, b []byte) []byte {
				if toTarget {
					return nil
				}
				return b
			}
		})
	}
	<-w.b.Lost()
	<-w.a.Lost()
	if took := time.Since(start); took > 3*time.Second {
		t.Errorf("took %v", took)
	}
	t.Logf("a: %v; b: %v", w.a.Cause(), w.b.Cause())
}
