package shim

import (
	"math/rand/v2"
	"testing"
	"time"
)

// kernel models the nftables set: a tap is open until its timeout.
type kernel struct {
	now   *time.Duration
	until time.Duration
	stall time.Duration // how long the caller is frozen inside the next Open
}

func (k *kernel) Open(_ []string, d time.Duration) error {
	*k.now += k.stall
	k.stall = 0
	k.until = *k.now + d
	return nil
}

func (k *kernel) Shut([]string) error { k.until = 0; return nil }

func (k *kernel) open() bool { return *k.now < k.until }

func newTestGate() (*gatekeeper, *kernel, *time.Duration) {
	now := 1000 * time.Second
	k := &kernel{now: &now}
	g := newGatekeeper(k, []string{"pd0"})
	g.now = func() time.Duration { return now }
	return g, k, &now
}

func TestGateClosesWithoutConfirmation(t *testing.T) {
	g, k, now := newTestGate()
	g.setRule(ruleAcked)
	if k.open() {
		t.Fatal("open before anything was confirmed")
	}
	g.confirm(*now - 100*time.Millisecond)
	if !k.open() {
		t.Fatal("a fresh confirmation does not open")
	}
	*now += 201 * time.Millisecond
	if k.open() {
		t.Fatal("open longer than the span after the question was sent")
	}
	if ok, _ := g.whileOpen(func() error { t.Error("output left after the right ran out"); return nil }); ok {
		t.Fatal("whileOpen says yes after the right ran out")
	}
	g.tick()
	if k.open() {
		t.Fatal("a tick renews a right that needs confirmation")
	}
}

func TestGateOldAnswer(t *testing.T) {
	g, k, now := newTestGate()
	g.setRule(ruleAcked)
	asked := *now
	*now += 10 * time.Second // frozen; the answer lies in the socket
	g.confirm(asked)
	if k.open() {
		t.Fatal("an answer to a question from before the freeze opens the gate")
	}
}

func TestGateFrozenInsideOpen(t *testing.T) {
	g, k, now := newTestGate()
	g.setRule(ruleAcked)
	k.stall = 10 * time.Second
	g.confirm(*now)
	if k.open() {
		t.Fatal("frozen between clock and kernel, the gate stays open after the thaw")
	}
	if ok, _ := g.whileOpen(func() error { return nil }); ok {
		t.Fatal("output may leave after the thaw")
	}
}

// TestGateRandom drives the gate with random steps and checks, at each, that
// the kernel is never open beyond what the rule and the confirmations allow.
func TestGateRandom(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	r := rand.New(rand.NewPCG(seed, 1))
	g, k, now := newTestGate()
	rule, right := ruleNone, time.Duration(0)
	for step := range 100000 {
		switch r.IntN(6) {
		case 0:
			rule, right = outputRule(r.IntN(3)), 0
			g.setRule(rule)
		case 1:
			at := *now - time.Duration(r.IntN(500))*time.Millisecond
			right = max(right, at+gateSpan)
			g.confirm(at)
		case 2:
			g.tick()
		case 3:
			if r.IntN(10) == 0 {
				k.stall = time.Duration(r.IntN(2000)) * time.Millisecond
			}
		default:
			*now += time.Duration(r.IntN(200)) * time.Millisecond
		}
		limit := time.Duration(0)
		switch rule {
		case ruleAcked:
			limit = right
		case ruleFree:
			limit = *now + gateSpan
		}
		if k.open() && k.until > limit+gateSlack {
			t.Fatalf("seed %d, step %d: rule %d, open until %v, allowed until %v, now %v", seed, step, rule, k.until, limit, *now)
		}
	}
}

// TestPromise runs a primary and a secondary of level ca against each other:
// beats and answers that are late, lost or come out of order, either side frozen,
// a claim at any time. From the moment the secondary may let something out the
// primary's kernel is shut, for ever.
func TestPromise(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	r := rand.New(rand.NewPCG(seed, 2))
	ms := func(n int) time.Duration { return time.Duration(r.IntN(n)) * time.Millisecond }
	takeovers := 0
	for round := range 2000 {
		p, pk, now := newTestGate()
		sk := &kernel{now: now}
		s := newGatekeeper(sk, []string{"pd0"})
		ahead := 3 * time.Hour // the hosts' clocks have nothing in common but their pace
		s.now = func() time.Duration { return *now + ahead }
		p.setRule(ruleAcked)
		type note struct{ sent, due time.Duration }
		var asked, answered []note
		claimed := time.Duration(0)
		pFrozen, sFrozen := time.Duration(0), time.Duration(0)
		for range 400 {
			*now += ms(30)
			if r.IntN(50) == 0 {
				pFrozen = *now + ms(1500)
			}
			if r.IntN(80) == 0 {
				sFrozen = *now + ms(800)
			}
			if *now >= pFrozen {
				if r.IntN(2) == 0 {
					asked = append(asked, note{*now, *now + ms(200)})
				}
				p.tick()
			}
			for i := 0; i < len(asked) && *now >= sFrozen; i++ {
				if n := asked[i]; n.due <= *now && r.IntN(5) > 0 {
					if claimed == 0 {
						s.promise()
						answered = append(answered, note{n.sent, *now + ms(300)})
					}
					asked = append(asked[:i], asked[i+1:]...)
					i--
				}
			}
			for i := 0; i < len(answered) && *now >= pFrozen; i++ {
				if n := answered[i]; n.due <= *now && r.IntN(5) > 0 {
					p.confirm(n.sent)
					answered = append(answered[:i], answered[i+1:]...)
					i--
				}
			}
			if claimed == 0 && r.IntN(100) == 0 {
				claimed = *now
				s.setRule(ruleFree)
			}
			if claimed != 0 && *now >= sFrozen {
				s.tick()
			}
			if sk.open() {
				takeovers++
			}
			if pk.open() && sk.open() {
				t.Fatalf("seed %d, round %d: both gates are open at %v; the claim was %v ago", seed, round, *now, *now-claimed)
			}
		}
	}
	if takeovers == 0 {
		t.Fatal("no secondary was ever heard: this test shows nothing")
	}
}

// TestPromiseIsKept: without the promise the same would fail.
func TestPromiseIsKept(t *testing.T) {
	s, k, now := newTestGate()
	s.promise()
	s.setRule(ruleFree)
	if ok, _ := s.whileOpen(func() error { t.Error("output left before the promise ran out"); return nil }); ok || k.open() || s.hasRight() {
		t.Fatal("open right after the promise")
	}
	*now += promiseSpan - time.Millisecond
	s.tick()
	if k.open() {
		t.Fatal("open before the promise ran out")
	}
	*now += 2 * time.Millisecond
	s.tick()
	if !k.open() || !s.hasRight() {
		t.Fatal("not open after the promise ran out")
	}
}

// gates models the sets of several taps.
type gates map[string]bool

func (g gates) Open(taps []string, _ time.Duration) error {
	for _, t := range taps {
		g[t] = true
	}
	return nil
}

func (g gates) Shut(taps []string) error {
	for _, t := range taps {
		g[t] = false
	}
	return nil
}

// TestGateOfOtherTaps: when the VM gets other taps the old ones are shut at once, and the
// new ones open as far as the right reaches.
func TestGateOfOtherTaps(t *testing.T) {
	k := gates{}
	g := newGatekeeper(k, []string{"pd0"})
	now := 1000 * time.Second
	g.now = func() time.Duration { return now }
	g.setRule(ruleFree)
	if !k["pd0"] {
		t.Fatal("shut although everything may leave")
	}
	g.setTaps([]string{"pd1"})
	if k["pd0"] || !k["pd1"] {
		t.Errorf("after the change: %v", k)
	}
	g.setRule(ruleNone)
	g.setTaps([]string{"pd0"})
	if k["pd0"] || k["pd1"] {
		t.Errorf("open without a right: %v", k)
	}
}
