package e2e

import (
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"perdure/internal/lab"
)

// carriedBy waits until the frames of a host's bridge go over another ("": by
// its own uplink, with nothing left over).
func (w *World) carriedBy(host, by string) {
	w.T.Helper()
	w.Eventually(30*time.Second, fmt.Sprintf("bridge of %s carried by %q", host, by), func() error {
		ends, err := w.tunnelEnds(host)
		if err != nil {
			return err
		}
		client := slices.ContainsFunc(ends, func(e string) bool { return strings.HasPrefix(e, "pxc") })
		if client != (by != "") {
			return fmt.Errorf("tunnel ends on %s: %v", host, ends)
		}
		return nil
	})
}

func (w *World) tunnelEnds(host string) ([]string, error) {
	out, err := w.Lab.Output(w.Ctx, host, "ip", "-o", "link", "show", "type", "vxlan")
	var ends []string
	for _, l := range strings.Split(strings.TrimSpace(string(out)), "\n") {
		if f := strings.Fields(l); len(f) > 1 {
			ends = append(ends, strings.TrimSuffix(f[1], ":"))
		}
	}
	return ends, err
}

// problem waits for a named problem of a VM, as any host shows it.
func (v *VM) problem(code string) {
	v.w.T.Helper()
	v.w.Eventually(20*time.Second, "problem "+code, func() error {
		for _, p := range v.Show().Problems {
			if p.Code == code {
				if p.Action == "" {
					v.w.T.Errorf("problem %s says not what to do", code)
				}
				return nil
			}
		}
		return fmt.Errorf("the VM's problems are %v", v.Show().Problems)
	})
}

// quiet checks by the counters of the LAN's switch that no frame goes round: a
// loop of two bridges fills any link within milliseconds.
func (w *World) quiet(what string) {
	w.T.Helper()
	const during, most = 2 * time.Second, 3000 // frames; the traffic of the tests is some hundreds
	before, err := w.Lab.Frames()
	w.must(err, "read frame counters")
	w.must(w.Lab.Broadcast(10), "send broadcasts")
	w.Never(during, "lab", func() error { return nil })
	after, err := w.Lab.Frames()
	w.must(err, "read frame counters")
	var said []string
	for port, n := range after {
		d := n - before[port]
		if d > most {
			w.T.Errorf("%s: %d frames through port %s of a switch in %v: a loop", what, d, port, during)
		}
		said = append(said, fmt.Sprintf("%s %d", port, d))
	}
	slices.Sort(said)
	w.T.Logf("%s: frames in %v: %s", what, during, strings.Join(said, ", "))
}

// TestNetworkFailover cuts the uplinks of hosts under a protected VM and one
// that is not: their clients notice a short wait, over the same connections.
func TestNetworkFailover(t *testing.T) {
	w := Start(t)
	v := w.CreateVM(VMOptions{})
	plain := w.CreateVM(VMOptions{Level: "none"})
	v.Protected()
	cut := func(w *World, v *VM, p string) {
		w.Link(false, p, lab.LAN)
		w.carriedBy(p, w.Other(p))
	}
	restore := func(w *World, p string) {
		w.Link(true, p, lab.LAN)
		w.carriedBy(p, "")
		w.carriedBy(w.Other(p), "")
	}
	t.Run("uplink of the primary's host", func(t *testing.T) {
		w := w.sub(t)
		v, plain := v.in(w), plain.in(w)
		p := v.Primary()
		term := v.Show().Term
		c, o := v.Counter(10*time.Millisecond), plain.Counter(10*time.Millisecond)
		w.must(c.WaitOK(w.Ctx, 50), "counter")
		cut(w, v, p)
		w.must(c.WaitOK(w.Ctx, 100), "counter")
		w.must(o.WaitOK(w.Ctx, 100), "counter of the unprotected VM")
		v.problem("uplink-down")
		w.quiet("carried")
		r, ro := c.Snapshot(), o.Snapshot()
		t.Logf("BLACKOUT when the uplink was cut: %v (protected), %v (unprotected)", r.Waits.Max, ro.Waits.Max)
		if r.Waits.Max > 5*time.Second || ro.Waits.Max > 5*time.Second {
			t.Errorf("the blackout was %v and %v; about one second is meant", r.Waits.Max, ro.Waits.Max)
		}
		// What is carried needs no agent.
		for _, h := range w.Lab.Hosts() {
			a, err := w.Lab.Agent(h)
			w.must(err, "find agent")
			w.signal(a, syscall.SIGKILL)
			w.must(a.Gone(w.Ctx), "end of the agent")
			w.must(c.WaitOK(w.Ctx, 30), "counter without agent")
		}
		w.WaitCluster()
		w.carriedBy(p, w.Other(p))
		_ = c.Stop()
		back, backO := v.Counter(2*time.Millisecond), plain.Counter(2*time.Millisecond)
		w.must(back.WaitOK(w.Ctx, 50), "counter")
		restore(w, p)
		w.must(back.WaitOK(w.Ctx, 200), "counter")
		w.must(backO.WaitOK(w.Ctx, 200), "counter of the unprotected VM")
		rb, rbo := back.Stop(), backO.Stop()
		t.Logf("longest wait on the way back: %v (protected), %v (unprotected)", rb.Waits.Max, rbo.Waits.Max)
		for _, r := range []interface {
			Clean() bool
			String() string
		}{rb, rbo, o.Stop()} {
			if !r.Clean() {
				t.Errorf("counter: %v", r)
			}
		}
		w.quiet("back")
		if now := v.Show(); now.Term != term || now.Primary != p || now.Mode != "duplex" {
			t.Errorf("term %d, primary %s, mode %s: the failure of an uplink is no reason for a takeover (term %d, %s)", now.Term, now.Primary, now.Mode, term, p)
		}
		out := w.Perdure(w.AnyHost(), "vm", "events", v.Name)
		for _, typ := range []string{"network-carried", "network-back"} {
			if !strings.Contains(out, typ) {
				t.Errorf("no event %s in\n%s", typ, out)
			}
		}
	})
	t.Run("both uplinks", func(t *testing.T) {
		w := w.sub(t)
		v := v.in(w)
		p := v.Primary()
		s := w.Other(p)
		c := v.Counter(10 * time.Millisecond)
		w.must(c.WaitOK(w.Ctx, 50), "counter")
		cut(w, v, p)
		w.Link(false, s, lab.LAN)
		w.carriedBy(p, "")
		w.carriedBy(s, "")
		w.quiet("both uplinks cut")
		// The other host's comes back first: it carries.
		w.Link(true, s, lab.LAN)
		w.carriedBy(p, s)
		w.must(c.WaitOK(w.Ctx, 50), "counter")
		w.quiet("one uplink back")
		restore(w, p)
		w.must(c.WaitOK(w.Ctx, 50), "counter")
		if r := c.Stop(); !r.Clean() {
			t.Errorf("counter: %v", r)
		}
	})
	t.Run("uplink and A-links", func(t *testing.T) {
		w := w.sub(t)
		v, plain := v.in(w), plain.in(w)
		p := v.Primary()
		s := w.Other(p)
		cut(w, v, p)
		// One A-link less: the tunnel moves to the other.
		c := plain.Counter(10 * time.Millisecond)
		w.Link(false, p, "alink0")
		w.must(c.WaitOK(w.Ctx, 200), "counter over the other A-link")
		w.Link(false, p, "alink1")
		w.quiet("uplink and A-links cut")
		// All comes back at once: whatever each side still believes, no loop.
		w.Link(true, p, lab.LAN, "alink0", "alink1")
		w.quiet("everything back")
		w.carriedBy(p, "")
		w.carriedBy(s, "")
		w.must(c.WaitOK(w.Ctx, 50), "counter")
		if r := c.Stop(); !r.Clean() {
			t.Errorf("counter: %v", r)
		}
		w.WaitCluster()
		v.Protected()
	})
	t.Run("rules flushed, agents killed", func(t *testing.T) {
		w := w.sub(t)
		v := v.in(w)
		p := v.Primary()
		cut(w, v, p)
		for _, h := range w.Lab.Hosts() {
			w.Freeze(h)
		}
		// Nobody looks: all rules go, and the uplink comes back.
		for _, h := range w.Lab.Hosts() {
			w.must(w.Lab.FlushRules(h), "flush rules")
		}
		w.Link(true, p, lab.LAN)
		w.quiet("no rules, nobody looks")
		for _, h := range w.Lab.Hosts() {
			w.Thaw(h)
		}
		w.WaitCluster()
		w.carriedBy(p, "")
		v.Wait("state=running", time.Minute)
	})
}
