package shim

import (
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"perdure/internal/model"
	"perdure/internal/shimapi"
)

// runAlone boots the guest on host a.
func (w *world) runAlone() *console {
	w.t.Helper()
	a := w.hosts["a"]
	a.start()
	w.until("simplex", 60*time.Second, func(r model.Record) bool { return r.Mode == model.ModeSimplex })
	a.untilStatus("running", 20*time.Second, func(s shimapi.Status) bool { return s.State == model.StateRunning })
	k := a.console()
	k.until(w.t, "PERDURE-GUEST READY", 60*time.Second)
	return k
}

// change changes the level and returns how that ended.
func (h *testHost) change(to model.Level) shimapi.LevelChange {
	h.w.t.Helper()
	h.op(shimapi.Op{Op: "level", Value: string(to)})
	st := h.untilStatus("end of the change", 60*time.Second, func(s shimapi.Status) bool { return s.Change != nil && s.Change.Ended })
	return *st.Change
}

// ticksOn waits for two more lines of the guest, which count seconds, and checks that none is
// missing, none comes twice, and the guest has booted boots times since the console was attached.
func ticksOn(t *testing.T, k *console, boots int) {
	t.Helper()
	seen := func() (ticks []int) {
		for _, l := range strings.Split(k.String(), "\n") {
			var n int
			if _, err := fmt.Sscanf(l, "tick %d uptime", &n); err == nil {
				ticks = append(ticks, n)
			}
		}
		return ticks
	}
	had := len(seen())
	for end := time.Now().Add(20 * time.Second); len(seen()) < had+2; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("the guest says nothing any more; last: %q", k.String()[max(0, len(k.String())-300):])
		}
	}
	list := seen()
	for n := 1; n < len(list); n++ {
		if list[n] != list[n-1]+1 {
			t.Fatalf("tick %d follows %d", list[n], list[n-1])
		}
	}
	if n := strings.Count(k.String(), "PERDURE-GUEST READY"); n != boots {
		t.Fatalf("the guest has booted %d times, not %d", n, boots)
	}
}

// TestLevelChange takes a running guest through all levels and back. One client of the console
// stays attached all the time.
func TestLevelChange(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 128, 1)
	w.useLevel(model.LevelNone)
	w.spec.VNC, w.spec.VCPUs = true, 2
	k := w.runAlone()
	a := w.hosts["a"]
	for _, to := range []model.Level{model.LevelFT, model.LevelNone, model.LevelCA, model.LevelFT, model.LevelCA, model.LevelNone} {
		c := a.change(to)
		if c.Error != "" {
			t.Fatalf("to %s: %s", to, c.Error)
		}
		st := a.shim.Status()
		t.Logf("to %s: the guest stood still for %.1f ms", to, c.BlackoutMS)
		if st.Level != to || st.State != model.StateRunning || st.Role != shimapi.RolePrimary {
			t.Errorf("to %s: the shim says level %s, %s, %s", to, st.Level, st.Role, st.State)
		}
		if onFUSE := a.shim.inst.ram != nil; onFUSE != (to == model.LevelFT) {
			t.Errorf("to %s: memory on FUSE: %v", to, onFUSE)
		}
		if mirrored := a.shim.inst.mirror != nil; mirrored != (to == model.LevelCA) {
			t.Errorf("to %s: disks by the mirror: %v", to, mirrored)
		}
		left, err := filepath.Glob(filepath.Join(a.dir, "*next*"))
		if err != nil || len(left) > 0 {
			t.Errorf("to %s: left behind: %v, %v", to, left, err)
		}
		ticksOn(t, k, 1)
		// The other ways into the guest: its agent, and its screen.
		if _, _, err := a.shim.primary().setTime(); err != nil {
			t.Errorf("to %s: guest agent: %v", to, err)
		}
		hello := make([]byte, 4)
		screen, err := net.Dial("unix", filepath.Join(a.dir, "vnc.sock"))
		if err == nil {
			_, err = io.ReadFull(screen, hello)
			screen.Close()
		}
		if err != nil || string(hello) != "RFB " {
			t.Errorf("to %s: VNC says %q, %v", to, hello, err)
		}
	}
}

// TestLevelChangeProtected: what a raised guest is, is what level ft protects: it is filled on the other host,
// and goes on there when its QEMU dies.
func TestLevelChangeProtected(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 128, 1)
	w.useLevel(model.LevelNone)
	k := w.runAlone()
	a, b := w.hosts["a"], w.hosts["b"]
	if c := a.change(model.LevelFT); c.Error != "" {
		t.Fatal(c.Error)
	}
	w.setLevel(model.LevelFT)
	a.op(shimapi.Op{Op: "protect", Host: "b"})
	w.until("syncing", 10*time.Second, func(r model.Record) bool { return r.Mode == model.ModeSyncing })
	b.start()
	w.until("duplex", 60*time.Second, func(r model.Record) bool { return r.Mode == model.ModeDuplex })
	ticksOn(t, k, 1)
	a.shim.inst.proc.Kill()
	w.until("takeover", 10*time.Second, func(r model.Record) bool { return r.Mode == model.ModeSimplex && r.Primary.Host == "b" })
	kb := b.console()
	kb.until(t, "tick", 20*time.Second)
	<-a.done
	a.done <- nil
	// And down again, on the host that took it over.
	if c := b.change(model.LevelNone); c.Error != "" {
		t.Fatal(c.Error)
	}
	ticksOn(t, kb, 0)
}

// setLevel is what the agent does after a change: later shims are of the new level.
func (w *world) setLevel(l model.Level) {
	w.spec.Level = l
	w.store.mu.Lock()
	w.store.cur.Record.Level = l
	w.store.cur.Revision++
	w.store.mu.Unlock()
}

// TestLevelChangeFails breaks a change at each of its steps: the guest goes on in its old QEMU, nothing is
// left behind, and the next attempt succeeds.
func TestLevelChangeFails(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 128, 1)
	w.useLevel(model.LevelNone)
	k := w.runAlone()
	a := w.hosts["a"]
	pid := a.shim.inst.proc.PID()
	next := func() int {
		path := filepath.Join(a.dir, shimapi.NextQEMUPID)
		for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
			var n int
			if b, err := os.ReadFile(path); err == nil {
				if _, err := fmt.Sscan(string(b), &n); err == nil {
					return n
				}
			}
		}
		t.Fatal("no second QEMU")
		return 0
	}
	// Refused before anything is touched: a level that there is not, a guest that stands still by a fault, something in QEMU
	// that no checkpoint would hold.
	refused := func(to, want string) {
		t.Helper()
		_, err := a.shim.do(t.Context(), shimapi.Op{Op: "level", Value: to})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("change to %s: error %v, want one with %q", to, err, want)
		}
	}
	refused("gold", "not known")
	refused("none", "already")
	p := a.shim.primary()
	stand := func(why string) {
		if err := p.ask(t.Context(), func() error { p.standing = why; return nil }); err != nil {
			t.Fatal(err)
		}
	}
	stand("the guest's kernel panicked")
	refused("ft", "panicked")
	stand("")
	odd := map[string]any{"qom-type": "memory-backend-ram", "id": "odd", "size": 1 << 20}
	if _, err := p.inst.qmp.Execute(t.Context(), "object-add", odd); err != nil {
		t.Fatal(err)
	}
	refused("ft", "ramblock")
	if _, err := p.inst.qmp.Execute(t.Context(), "object-del", map[string]any{"id": "odd"}); err != nil {
		t.Fatal(err)
	}
	for n, c := range []struct {
		name  string
		upset func() // beside the change
		at    func(step string, next *instance)
		want  string
	}{
		{name: "killed at its start", upset: func() { unix.Kill(next(), unix.SIGKILL) }, want: "SIGKILL"},
		{name: "killed in the copy", at: killAt("copy")},
		{name: "killed before the last step, live", at: killAt("hand")},
		{name: "killed before the last step", at: killAt("hand")},
		{name: "killed after the last step, live", at: killAt("handed")},
		{name: "killed after the last step", at: killAt("handed")},
		{name: "cancelled", want: "cancelled", at: func(step string, _ *instance) {
			if step == "copy" {
				a.shim.cancelChange()
			}
		}},
	} {
		// The guest runs during the copy in half of them, which does it no harm as it comes back.
		a.shim.copyLive = n%2 == 0
		a.shim.atStep = c.at
		if c.upset != nil {
			go c.upset()
		}
		got := a.change(model.LevelFT)
		if got.Error == "" {
			t.Fatalf("%s: the change was made all the same", c.name)
		}
		t.Logf("%s: %s", c.name, got.Error)
		if c.want != "" && !strings.Contains(got.Error, c.want) {
			t.Errorf("%s: the reason is %q, want one with %q", c.name, got.Error, c.want)
		}
		st := a.shim.Status()
		if st.Level != model.LevelNone || a.shim.inst.proc.PID() != pid || st.State != model.StateRunning {
			t.Fatalf("%s: level %s, QEMU %d (was %d), state %s", c.name, st.Level, a.shim.inst.proc.PID(), pid, st.State)
		}
		left, err := filepath.Glob(filepath.Join(a.dir, "*next*"))
		if err != nil || len(left) > 0 {
			t.Errorf("%s: left behind: %v, %v", c.name, left, err)
		}
		if n%2 == 1 {
			ticksOn(t, k, 1)
		}
	}
	a.shim.copyLive = false
	// What a person asks in the middle is done in the end; nobody can let the guest run at the last step.
	paused := make(chan struct{})
	a.shim.atStep = func(step string, _ *instance) {
		switch step {
		case "copy":
			go func() { defer close(paused); a.op(shimapi.Op{Op: "pause"}) }()
		case "hand":
			if a.shim.inst.qmp.Cont(t.Context()) == nil {
				t.Error("a guest that stands still for the last step was let run")
			}
		}
	}
	stays := func() {
		t.Helper()
		if _, running, err := a.shim.inst.qmp.Status(t.Context()); err != nil || running || a.shim.Status().State != model.StatePaused {
			t.Errorf("a paused guest: running %v, %v, the shim says %s", running, err, a.shim.Status().State)
		}
	}
	if got := a.change(model.LevelFT); got.Error != "" {
		t.Fatal(got.Error)
	}
	<-paused
	stays()
	// A paused guest moves too, and stays paused. As it does not write, the way of kvm can be gone to its end.
	a.shim.atStep, a.shim.copyLive = nil, true
	if got := a.change(model.LevelCA); got.Error != "" {
		t.Fatal(got.Error)
	}
	stays()
	a.shim.copyLive = false
	a.op(shimapi.Op{Op: "resume"})
	ticksOn(t, k, 1)
	// A VM that is ended in the middle leaves nothing behind.
	a.shim.atStep = func(step string, _ *instance) {
		if step == "copy" {
			go a.shim.do(t.Context(), shimapi.Op{Op: "poweroff"})
			time.Sleep(100 * time.Millisecond) // it may come before or after the end of the copy
		}
	}
	a.op(shimapi.Op{Op: "level", Value: "ft"})
	w.until("stopped", 20*time.Second, func(r model.Record) bool { return r.Mode == model.ModeStopped })
	select {
	case <-a.done:
		a.done <- nil
	case <-time.After(30 * time.Second):
		t.Fatal("the shim does not end")
	}
	if left, err := filepath.Glob(filepath.Join(a.dir, "*.pid")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func killAt(at string) func(string, *instance) {
	return func(step string, next *instance) {
		if step == at {
			next.proc.Kill()
			<-next.proc.Exited()
		}
	}
}

// TestLevelChangeCarries: a guest that was raised to ca, in place and by a move, is of level ca in everything: its writes are
// mirrored, and it goes on with the other host's disk when its own fails. While it does its level stays; when
// the disk was replaced it can be changed again.
func TestLevelChangeCarries(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 128, 1)
	w.useLevel(model.LevelNone)
	k := w.runAlone()
	a, b := w.hosts["a"], w.hosts["b"]
	for _, to := range []model.Level{model.LevelFT, model.LevelNone, model.LevelCA} {
		if c := a.change(to); c.Error != "" {
			t.Fatalf("to %s: %s", to, c.Error)
		}
	}
	w.setLevel(model.LevelCA)
	a.op(shimapi.Op{Op: "protect", Host: "b"})
	w.until("syncing", 10*time.Second, func(r model.Record) bool { return r.Mode == model.ModeSyncing })
	b.start()
	w.until("duplex", 60*time.Second, func(r model.Record) bool { return r.Mode == model.ModeDuplex })
	boots := func() {
		t.Helper()
		before := strings.Count(k.String(), "PERDURE-GUEST READY")
		a.op(shimapi.Op{Op: "reset"})
		for end := time.Now().Add(60 * time.Second); strings.Count(k.String(), "PERDURE-GUEST READY") == before; time.Sleep(20 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("the guest does not boot:\n%s", k)
			}
		}
	}
	boots() // with every write mirrored
	a.op(shimapi.Op{Op: "pause"})
	w.sameDisks()
	a.op(shimapi.Op{Op: "resume"})

	a.shim.primary().inst.store(0).Close()
	boots()
	w.until("carried", 10*time.Second, func(r model.Record) bool { return r.Replicas["a"].State == model.Inconsistent })
	if _, err := a.shim.do(t.Context(), shimapi.Op{Op: "level", Value: "none"}); err == nil || !strings.Contains(err.Error(), "disk of the other host") {
		t.Errorf("the level of a guest whose disk is carried was changed: %v", err)
	}
	a.op(shimapi.Op{Op: "disk-replace", Value: "disk0"})
	w.until("whole again", 60*time.Second, func(r model.Record) bool {
		return r.Mode == model.ModeDuplex && r.Replicas["a"].State == model.UpToDate
	})
	for _, to := range []model.Level{model.LevelFT, model.LevelCA, model.LevelNone} {
		if c := a.change(to); c.Error != "" {
			t.Fatalf("to %s: %s", to, c.Error)
		}
	}
	before := strings.Count(k.String(), "tick ")
	for end := time.Now().Add(20 * time.Second); strings.Count(k.String(), "tick ") < before+2; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the guest says nothing any more")
		}
	}
	boots() // its disk still works, though it is the replaced one
}
