package netpath

import (
	"testing"
	"time"
)

// driver plays one host against peers that do what the test says.
type driver struct {
	t    *testing.T
	m    *Machine
	now  time.Duration
	up   bool
	peer []Peer
	have Kernel
	plan Plan
}

func (d *driver) run(for_ time.Duration) {
	for end := d.now + for_; d.now < end; d.now += 10 * time.Millisecond {
		d.plan = d.m.Step(Inputs{Now: d.now, Uplink: d.up, Peers: d.peer, Have: d.have})
		for a := Next(d.have, d.plan); a.Kind != Nothing; a = Next(d.have, d.plan) {
			d.have = d.have.After(a)
		}
	}
}

func (d *driver) via(want string) {
	d.t.Helper()
	if got := d.have.Carried(); got != want {
		d.t.Fatalf("at %v: carried by %q, want %q (%+v)", d.now, got, want, d.plan)
	}
}

func newDriver(t *testing.T, peers ...Peer) *driver {
	return &driver{t: t, m: New(DefaultPolicy()), now: time.Hour, up: true, peer: peers}
}

func TestHoldDoubles(t *testing.T) {
	d := newDriver(t, Peer{Name: "b", Alive: true, Offers: true, Serves: true})
	d.run(time.Minute)
	d.via("")
	for i, hold := range []time.Duration{10, 20, 40, 80, 160, 160} {
		d.up = false
		d.run(200 * time.Millisecond)
		d.via("b")
		d.up = true
		d.run(hold*time.Second - 100*time.Millisecond)
		d.via("b")
		d.run(200 * time.Millisecond)
		d.via("")
		if i == 0 && d.have.State != Drain {
			t.Error("late frames are not taken")
		}
	}
	// After a long good time it begins anew.
	d.run(time.Hour)
	d.up = false
	d.run(200 * time.Millisecond)
	d.up = true
	d.run(10100 * time.Millisecond)
	d.via("")
}

func TestShortBlipIsNothing(t *testing.T) {
	d := newDriver(t, Peer{Name: "b", Alive: true, Offers: true, Serves: true})
	d.run(time.Second)
	d.up = false
	d.run(40 * time.Millisecond)
	d.up = true
	d.run(time.Second)
	if d.have.Client != "" {
		t.Errorf("a blip was acted upon: %+v", d.have)
	}
}

// TestThirdHost: a carrying host that falls silent is given up only for
// another that says that it carries.
func TestThirdHost(t *testing.T) {
	d := newDriver(t, Peer{Name: "b", Alive: true, Offers: true, Serves: true}, Peer{Name: "c"})
	d.up = false
	d.run(time.Second)
	d.via("b")
	d.peer[0] = Peer{Name: "b"}
	d.run(time.Minute)
	d.via("b")
	d.peer[1] = Peer{Name: "c", Alive: true, Offers: true}
	d.run(time.Second)
	d.via("b")
	if d.plan.Ask != "c" {
		t.Errorf("asks %q", d.plan.Ask)
	}
	d.peer[1].Serves = true
	d.run(time.Second)
	d.via("c")
	// One that says no is left at once.
	d.peer[1].Offers = false
	d.run(20 * time.Millisecond)
	d.via("")
}

// TestTurn: a host that does not do what it offers is not asked for ever.
func TestTurn(t *testing.T) {
	d := newDriver(t, Peer{Name: "b", Alive: true, Offers: true}, Peer{Name: "c", Alive: true, Offers: true})
	d.up = false
	asked := map[string]bool{}
	for range 40 {
		d.run(100 * time.Millisecond)
		asked[d.plan.Ask] = true
	}
	if !asked["b"] || !asked["c"] {
		t.Errorf("asked %v", asked)
	}
}

func TestServe(t *testing.T) {
	d := newDriver(t, Peer{Name: "b", Alive: true, Asks: true}, Peer{Name: "c", Alive: true, Asks: true})
	d.run(time.Second)
	if len(d.have.Serving) != 2 {
		t.Fatalf("%+v", d.have)
	}
	d.peer[0] = Peer{Name: "b"} // silent: its frames are carried on
	d.peer[1].Asks = false
	d.run(time.Minute)
	if len(d.have.Serving) != 1 || d.have.Serving[0] != "b" {
		t.Fatalf("%+v", d.have)
	}
	// Its own uplink fails: it has to leave b to be carried itself.
	d.peer[1] = Peer{Name: "c", Alive: true, Offers: true, Serves: true}
	d.up = false
	d.run(time.Second)
	d.via("c")
	if len(d.have.Serving) != 0 {
		t.Errorf("%+v", d.have)
	}
}
