package e2e

import (
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"perdure/internal/lab"
	"perdure/internal/model"
)

// TestLevels takes a running guest from none by ca and ft and back to none, with one
// TCP connection, a durable log and a watch on the LAN all the way, and a takeover in the middle. It also
// strikes the change itself, and the agents while it lasts.
func TestLevels(t *testing.T) {
	w := Start(t)
	v := w.CreateVM(VMOptions{Level: "none", Disks: []string{"128M"}})
	p := v.Primary()
	v.Within(time.Minute, "clock")
	tr := v.Traffic()
	// Struck: the second QEMU is killed as soon as it is there. The guest runs on.
	v.strikeChange(p)
	tr.Flow(20)
	v.setLevel("ca")
	v.Protected()
	tr.Flow(20)
	v.setLevel("ft")
	v.Protected()
	tr.Flow(50)
	s := v.Secondary()
	v.KillQEMU(p, syscall.SIGKILL)
	v.Wait("state=running,primary="+s, 30*time.Second)
	tr.Resume()
	// While the change lasts both agents are killed, and come back.
	v.Protected()
	v.setLevelWithoutAgents("ca", s)
	tr.Flow(20)
	v.setLevel("none")
	tr.Flow(50)
	if vm := v.Show(); vm.Mode != model.ModeSimplex || vm.Secondary != "" {
		t.Errorf("at level none the VM is %s with a secondary on %q", vm.Mode, vm.Secondary)
	}
	tr.Check(5*time.Second, p, s)
	v.levelOfStopped()
	v.loseShim()
}

// setLevel changes the level by the command line and prints for how long the guest stood still.
func (v *VM) setLevel(level string) {
	v.w.T.Helper()
	out := v.w.Perdure(v.Primary(), "vm", "level", v.Name, level)
	v.w.T.Logf("%s", strings.TrimSpace(out))
	vm := v.Show()
	if string(vm.Level) != level || vm.State != model.StateRunning {
		v.w.T.Fatalf("after the change to %s: level %s, %s", level, vm.Level, vm.State)
	}
	if c := vm.LevelChange; c == nil || string(c.To) != level || c.Error != "" {
		v.w.T.Errorf("the change to %s is shown as %+v", level, c)
	} else {
		v.w.T.Logf("%s → %s: blackout %.1f ms", c.From, c.To, c.BlackoutMS)
	}
}

// strikeChange kills the second QEMU of a change to ft.
func (v *VM) strikeChange(host string) {
	w := v.w
	w.T.Helper()
	w.Perdure(host, "vm", "level", v.Name, "ft", "--no-wait")
	w.signal(v.secondQEMU(host), syscall.SIGKILL)
	w.Eventually(30*time.Second, "the change to be given up", func() error {
		if c := v.Show().LevelChange; c == nil || !c.Ended {
			return fmt.Errorf("change %+v", c)
		}
		return nil
	})
	vm := v.Show()
	if vm.LevelChange.Error == "" || vm.Level != "none" || vm.State != model.StateRunning {
		w.T.Fatalf("after the second QEMU was killed: %+v, level %s, %s", vm.LevelChange, vm.Level, vm.State)
	}
	w.T.Logf("struck: %s", vm.LevelChange.Error)
}

// secondQEMU waits for the second QEMU of a change on a host where there was none before.
func (v *VM) secondQEMU(host string) (found lab.Process) {
	v.w.T.Helper()
	v.w.Eventually(20*time.Second, "a second QEMU", func() error {
		list, err := v.w.Lab.Processes(host)
		if err != nil {
			return err
		}
		for _, p := range list {
			if strings.Contains(strings.Join(p.Args, " "), "/"+v.Name+"/next-qmp.sock") {
				found = p
				return nil
			}
		}
		return errors.New("there is none")
	})
	return found
}

// loseShim kills the shim in the middle of a change: without a second copy the guest is lost, as always; both QEMUs
// are ended, and the VM boots from its disks and is protected at the level that it had.
func (v *VM) loseShim() {
	w := v.w
	w.T.Helper()
	p := v.Primary()
	boot := v.Boot()
	w.Perdure(p, "vm", "level", v.Name, "ca", "--no-wait")
	second := v.secondQEMU(p)
	v.KillShim(p, syscall.SIGKILL)
	w.must(second.Gone(w.Ctx), "wait for the end of the second QEMU")
	v.Within(2*time.Minute, "clock")
	vm := v.Protected().Show()
	if vm.Level != "ft" || v.Boot() == boot {
		w.T.Errorf("after the shim was lost: level %s, booted again: %v", vm.Level, v.Boot() != boot)
	}
}

// setLevelWithoutAgents begins a change and kills both agents: the shim brings it to its end, and
// the agent that comes back writes it down.
func (v *VM) setLevelWithoutAgents(level, host string) {
	w := v.w
	w.T.Helper()
	w.Perdure(host, "vm", "level", v.Name, level, "--no-wait")
	for _, h := range []string{host, w.Other(host)} {
		w.KillAgent(h)
	}
	w.WaitCluster()
	v.Wait("level="+level+",mode=duplex,state=running", 2*time.Minute)
}

// levelOfStopped changes the level of a stopped VM, and starts it.
func (v *VM) levelOfStopped() {
	w := v.w
	w.T.Helper()
	p := v.Primary()
	v.Tell("poweroff")
	v.Wait("state=stopped", time.Minute)
	w.Perdure(p, "vm", "level", v.Name, "ft")
	if out, err := w.TryPerdure(p, "vm", "level", v.Name, "ft"); err == nil || !strings.Contains(err.Error(), "already") {
		w.T.Errorf("the level it has was set: %s %v", out, err)
	}
	w.Perdure(p, "vm", "start", v.Name)
	v.Protected()
}
