package e2e

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"
)

// fault is something that happens to one host of a protected VM.
type fault struct {
	name  string
	do    func(w *World, v *VM, host string) // strikes
	after func(w *World, v *VM, host string) // mends what does not mend by itself, when traffic flows again; may be nil
}

// hostFaults is what can happen to a host that holds a VM, running or standing by.
var hostFaults = []fault{
	{"qemu killed", func(w *World, v *VM, h string) { v.KillQEMU(h, syscall.SIGKILL) }, nil},
	{"shim killed", func(w *World, v *VM, h string) { v.KillShim(h, syscall.SIGKILL) }, nil},
	{"shim stopped", func(w *World, v *VM, h string) { v.KillShim(h, syscall.SIGSTOP) },
		func(w *World, v *VM, h string) { v.KillShim(h, syscall.SIGCONT) }},
	{"power off", func(w *World, v *VM, h string) { w.PowerOff(h) }, func(w *World, v *VM, h string) { w.PowerOn(h) }},
	{"frozen for 10 s", func(w *World, v *VM, h string) { w.Freeze(h) }, func(w *World, v *VM, h string) {
		w.Never(10*time.Second, "freeze", func() error { return nil })
		w.Thaw(h)
	}},
	{"power off and on within 3 s", func(w *World, v *VM, h string) { w.PowerOff(h); w.PowerOn(h) }, nil},
}

// strikeEach makes each fault on one host of a VM, the primary or else the
// secondary, and waits until the VM is protected again by itself, on the host
// where it should run then.
func strikeEach(t *testing.T, primary bool) {
	w := Start(t)
	v := w.CreateVM(VMOptions{}).Protected()
	for _, f := range hostFaults {
		ok := t.Run(f.name, func(t *testing.T) {
			sub := w.sub(t)
			v := v.in(sub)
			p := v.Primary()
			struck, moves := w.Other(p), []string{p}
			if primary {
				struck, moves = p, []string{p, w.Other(p)}
			}
			runs := moves[len(moves)-1]
			tr := v.Traffic()
			f.do(sub, v, struck)
			if primary {
				v.Wait("state=running,primary="+runs, 20*time.Second)
			}
			tr.Resume()
			if f.after != nil {
				f.after(sub, v, struck)
			}
			v.Wait("state=running,mode=duplex,primary="+runs, 2*time.Minute)
			tr.Flow(50)
			tr.Check(0, moves...)
		})
		if !ok {
			t.Fatalf("%s: the VM is not used any further", f.name)
		}
	}
}

// TestPrimaryFaults strikes the host that runs the VM: the other host goes on
// where it was.
func TestPrimaryFaults(t *testing.T) { strikeEach(t, true) }

// TestSecondaryFaults strikes the host that stands by: the client notices a
// short wait at most, and the VM stays where it is.
func TestSecondaryFaults(t *testing.T) { strikeEach(t, false) }

// TestLinks cuts links between the hosts of a protected VM.
func TestLinks(t *testing.T) {
	w := Start(t)
	v := w.CreateVM(VMOptions{}).Protected()
	t.Run("one A-link of two", func(t *testing.T) {
		sub := w.sub(t)
		v := v.in(sub)
		p := v.Primary()
		term := v.Show().Term
		tr := v.Traffic()
		for _, link := range []string{"alink0", "alink1"} {
			sub.Link(false, p, link)
			tr.Flow(100)
			sub.Link(true, p, link)
			sub.Eventually(20*time.Second, link+" is up again", func() error {
				for _, l := range v.Show().Links {
					if !l.Up {
						return fmt.Errorf("link %d is down", l.Index)
					}
				}
				return nil
			})
		}
		tr.Check(0, p)
		if vm := v.Show(); vm.Term != term || vm.Mode != "duplex" {
			t.Errorf("term %d, mode %s: the loss of one link should change nothing (term %d, duplex)", vm.Term, vm.Mode, term)
		}
	})
	t.Run("both A-links", func(t *testing.T) {
		sub := w.sub(t)
		v := v.in(sub)
		p := v.Primary()
		tr := v.Traffic()
		sub.Link(false, p, "alink0", "alink1")
		tr.Resume()
		vm := v.Wait("mode=simplex|syncing,state=running", 20*time.Second)
		moves := []string{p}
		if vm.Primary != p {
			moves = append(moves, vm.Primary)
		}
		sub.Link(true, p, "alink0", "alink1")
		v.Protected()
		tr.Flow(50)
		tr.Check(0, moves...)
	})
	t.Run("primary's host cut off", func(t *testing.T) {
		sub := w.sub(t)
		v := v.in(sub)
		p := v.Primary()
		s := w.Other(p)
		tr := v.Traffic()
		sub.CutOff(p)
		v.Wait("state=running,primary="+s, 20*time.Second)
		tr.Resume()
		sub.Reconnect(p)
		v.Protected()
		tr.Flow(50)
		tr.Check(0, p, s)
	})
	t.Run("secondary's host cut off", func(t *testing.T) {
		sub := w.sub(t)
		v := v.in(sub)
		p := v.Primary()
		tr := v.Traffic()
		sub.CutOff(w.Other(p))
		tr.Resume()
		v.Wait("state=running,mode=simplex", 20*time.Second)
		sub.Reconnect(w.Other(p))
		v.Protected()
		tr.Flow(50)
		tr.Check(0, p)
	})
}

// TestControlPlane loses what no VM may notice: agents and the witness.
func TestControlPlane(t *testing.T) {
	w := Start(t)
	v := w.CreateVM(VMOptions{}).Protected()
	t.Run("agents killed", func(t *testing.T) {
		sub := w.sub(t)
		v := v.in(sub)
		before := v.Show()
		tr := v.Traffic()
		for _, h := range []string{"a", "b", "w"} {
			p, err := sub.Lab.Agent(h)
			sub.must(err, "find agent")
			sub.signal(p, syscall.SIGKILL)
			tr.Flow(20)
		}
		sub.WaitCluster()
		tr.Flow(50)
		tr.Check(0, before.Primary)
		if now := v.Show(); now.Term != before.Term || now.Mode != "duplex" {
			t.Errorf("term %d, mode %s; before: term %d, duplex", now.Term, now.Mode, before.Term)
		}
	})
	// The witness is lost, then the secondary's host: the primary goes on by the
	// survivor right. Then it is the only one that may.
	t.Run("witness lost, then the secondary's host", func(t *testing.T) {
		sub := w.sub(t)
		v := v.in(sub)
		p := v.Primary()
		s := w.Other(p)
		tr := v.Traffic()
		sub.PowerOff("w")
		v.waitSurvivor(p)
		tr.Flow(20)
		sub.PowerOff(s)
		tr.Resume()
		sub.PowerOn("w")
		sub.PowerOn(s)
		sub.WaitCluster()
		v.Protected()
		v.waitSurvivor("")
		tr.Flow(50)
		tr.Check(0, p)
	})
	// The witness is lost, then the primary's host: nobody may take over, since
	// the survivor right stood with the primary. When it returns, the memory of
	// the secondary has precedence.
	t.Run("witness lost, then the primary's host", func(t *testing.T) {
		sub := w.sub(t)
		v := v.in(sub)
		p := v.Primary()
		sub.PowerOff("w")
		v.waitSurvivor(p)
		sub.PowerOff(p)
		sub.Never(3*time.Second, "the secondary takes over against the survivor right", func() error {
			out, err := sub.TryPerdure(w.Other(p), "vm", "list")
			if err == nil && strings.Contains(out, "running") {
				return fmt.Errorf("the other host says:\n%s", out)
			}
			return nil
		})
		sub.PowerOn("w")
		sub.PowerOn(p)
		sub.WaitCluster()
		v.Protected()
		v.Say("clock")
		v.CheckDisks()
	})
}

// waitSurvivor waits until a host ("": none) has the survivor right.
func (v *VM) waitSurvivor(host string) {
	v.w.T.Helper()
	v.w.Eventually(30*time.Second, fmt.Sprintf("survivor right of %q", host), func() error {
		if got := v.Show().Survivor; got != host {
			return fmt.Errorf("survivor is %q", got)
		}
		return nil
	})
}

// TestPowerLoss takes the power of both hosts at once: every acknowledged line
// is on the disk afterwards, whichever host returns first, or alone.
func TestPowerLoss(t *testing.T) {
	w := Start(t)
	v := w.CreateVM(VMOptions{})
	for _, c := range []struct {
		name  string
		first int // 0: the primary of before, 1: the secondary
		alone bool
	}{{"primary first", 0, false}, {"secondary first", 1, false}, {"only the secondary", 1, true}} {
		ok := t.Run(c.name, func(t *testing.T) {
			w := w.sub(t)
			v := v.in(w).Protected()
			p := v.Primary()
			order := []string{p, w.Other(p)}
			log := v.Log(0)
			w.must(log.WaitAcked(w.Ctx, 100), "log")
			off := make(chan error, 2)
			for _, h := range order {
				go func() { off <- w.Lab.PowerOff(w.Ctx, h) }()
			}
			for range order {
				w.must(<-off, "power off")
			}
			log.Abort() // no answer comes any more to the line that is due
			w.PowerOn(order[c.first])
			if !c.alone {
				w.PowerOn(order[1-c.first])
			}
			v.Wait("state=running", 2*time.Minute)
			v.Say("clock")
			r, err := log.Verify(w.Ctx)
			w.must(err, "verify log")
			if !r.Clean() {
				t.Errorf("log: %v; lost %v", r, r.Lost)
			}
			t.Logf("log: %v", r)
			v.CheckDisks()
		})
		if !ok {
			t.Fatalf("%s: the VM is not used any further", c.name)
		}
	}
}

// TestPingPong takes over twenty times in a row, in all ways, with protection between.
func TestPingPong(t *testing.T) {
	w := Start(t)
	v := w.CreateVM(VMOptions{VCPUs: 2, Disks: []string{"128M", "128M"}, NICs: 2}).Protected()
	tr := v.Traffic()
	p := v.Primary()
	moves := []string{p}
	for n := range 20 {
		switch n % 3 {
		case 0:
			v.KillQEMU(p, syscall.SIGKILL)
		case 1:
			v.KillShim(p, syscall.SIGKILL)
		case 2:
			w.Perdure(p, "vm", "switchover", v.Name)
		}
		p = w.Other(p)
		moves = append(moves, p)
		v.Wait("state=running,primary="+p, 20*time.Second)
		tr.Resume()
		v.Protected()
	}
	tr.Flow(50)
	tr.Check(0, moves...)
}

// TestVCPUs takes over a guest with four processors that is busy.
func TestVCPUs(t *testing.T) {
	w := Start(t)
	v := w.CreateVM(VMOptions{VCPUs: 4, Memory: "512M"}).Protected()
	v.Say("meter on")
	tr := v.Traffic()
	v.KillQEMU("a", syscall.SIGKILL)
	v.Wait("state=running,primary=b", 20*time.Second)
	tr.Resume()
	v.Protected()
	tr.Check(0, "a", "b")
}

// TestGuestAsks lets the guest do what ends or restarts it.
func TestGuestAsks(t *testing.T) {
	w := Start(t)
	v := w.CreateVM(VMOptions{}).Protected()
	boot := v.Boot()
	v.Tell("reboot")
	w.Eventually(time.Minute, "the guest boots anew", func() error {
		if v.Boot() == boot {
			return fmt.Errorf("it has not rebooted yet")
		}
		return nil
	})
	v.Protected()
	v.Tell("poweroff")
	v.Wait("state=stopped,mode=stopped", 30*time.Second)
	// Neither the loss of the last primary nor time resurrects it.
	w.PowerOff("a")
	w.Never(3*time.Second, "resurrection", func() error {
		if vm := v.Show(); vm.State != "stopped" {
			return fmt.Errorf("the VM is %s on %s", vm.State, vm.Primary)
		}
		return nil
	})
	w.PowerOn("a")
	w.WaitCluster()
	w.Perdure("b", "vm", "start", v.Name)
	v.Protected()
	v.Say("clock")
	v.CheckDisks()
}

// TestPaused takes over a VM that a person has paused: it stays paused.
func TestPaused(t *testing.T) {
	w := Start(t)
	v := w.CreateVM(VMOptions{}).Protected()
	tr := v.Traffic()
	w.Perdure("a", "vm", "pause", v.Name)
	v.Wait("state=paused", 20*time.Second)
	w.PowerOff("a")
	v.Wait("state=paused,primary=b", 20*time.Second)
	w.Never(2*time.Second, "resumed by nobody", func() error {
		if s := v.Show().State; s != "paused" {
			return fmt.Errorf("the VM is %s", s)
		}
		return nil
	})
	w.Perdure("b", "vm", "resume", v.Name)
	v.Wait("state=running", 20*time.Second)
	tr.Resume()
	w.PowerOn("a")
	v.Protected()
	tr.Flow(20)
	tr.Check(0, "a", "b")
}

// TestSwitchover moves a VM by plan, back and forth.
func TestSwitchover(t *testing.T) {
	w := Start(t)
	v := w.CreateVM(VMOptions{}).Protected()
	tr := v.Traffic()
	for _, to := range []string{"b", "a"} {
		w.Perdure(to, "vm", "switchover", v.Name)
		v.Wait("state=running,primary="+to, 20*time.Second)
		tr.Resume()
		v.Protected()
	}
	tr.Check(2*time.Second, "a", "b", "a")
}
