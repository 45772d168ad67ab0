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
