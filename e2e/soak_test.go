//go:build soak

package e2e

import (
	"context"
	"flag"
	"math/rand/v2"
	"syscall"
	"testing"
	"time"

	"perdure/internal/lab"
)

var (
	soakFor  = flag.Duration("soak-for", time.Hour, "how long random faults are made")
	soakSeed = flag.Uint64("soak-seed", 0, "seed of the random faults (0: from the clock)")
)

// TestSoakRandomFaults makes one fault after the other, at random, while a
// client talks to the guest; after each the VM must become protected again by
// itself. The seed is printed; the same one makes the same faults again.
func TestSoakRandomFaults(t *testing.T) {
	seed := *soakSeed
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	t.Logf("seed %d: repeat with -soak-seed %d", seed, seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	w := Start(t)
	ctx, cancel := context.WithTimeout(t.Context(), *soakFor+time.Hour)
	t.Cleanup(cancel)
	w.Ctx = ctx
	v := w.CreateVM(VMOptions{VCPUs: 2, Disks: []string{"256M", "256M"}}).Protected()
	tr := v.Traffic()
	moves := []string{v.Primary()}
	for n, end := 1, time.Now().Add(*soakFor); time.Now().Before(end); n++ {
		host := w.Lab.Hosts()[rnd.IntN(2)]
		f := soakFaults[rnd.IntN(len(soakFaults))]
		t.Logf("%d: %s, host %s (primary %s)", n, f.name, host, v.Primary())
		f.do(w, v, host)
		tr.Resume()
		if f.after != nil {
			f.after(w, v, host)
		}
		v.Wait("state=running,mode=duplex", 5*time.Minute)
		tr.Flow(100)
		if p := v.Primary(); p != moves[len(moves)-1] {
			moves = append(moves, p)
		}
		if c := tr.Counter.Snapshot(); c.Lost+c.Repeated+c.Wrong > 0 {
			t.Fatalf("after fault %d (%s): %v", n, f.name, c)
		}
		tr.CheckLog()
	}
	tr.Check(0, moves...)
}

// soakFaults are those after which the client always gets an answer within the
// deadline of a request.
var soakFaults = []fault{
	{"QEMU killed", func(_ *World, v *VM, h string) { v.KillQEMU(h, syscall.SIGKILL) }, nil},
	{"shim killed", func(_ *World, v *VM, h string) { v.KillShim(h, syscall.SIGKILL) }, nil},
	{"agent killed", func(w *World, _ *VM, h string) { w.KillAgent(h) }, nil},
	{"power off", func(w *World, _ *VM, h string) { w.PowerOff(h) }, func(w *World, _ *VM, h string) { w.PowerOn(h); w.WaitCluster() }},
	{"freeze", func(w *World, _ *VM, h string) { w.Freeze(h) }, func(w *World, _ *VM, h string) { w.Thaw(h); w.WaitCluster() }},
	{"one A-link", func(w *World, _ *VM, h string) { w.Link(false, h, lab.ALink(0)) }, func(w *World, _ *VM, h string) { w.Link(true, h, lab.ALink(0)) }},
	{"both A-links", func(w *World, _ *VM, h string) { w.Link(false, h, lab.ALink(0), lab.ALink(1)) },
		func(w *World, _ *VM, h string) { w.Link(true, h, lab.ALink(0), lab.ALink(1)) }},
	{"cut off", func(w *World, _ *VM, h string) { w.CutOff(h) }, func(w *World, _ *VM, h string) { w.Reconnect(h); w.WaitCluster() }},
	{"switchover", func(w *World, v *VM, _ string) { w.Perdure(w.AnyHost(), "vm", "switchover", v.Name) }, nil},
	{"witness power off", func(w *World, _ *VM, _ string) { w.PowerOff(lab.Witness) },
		func(w *World, _ *VM, _ string) { w.PowerOn(lab.Witness); w.WaitCluster() }},
}

// TestSoakMirror strikes a VM of level ca in every way.
func TestSoakMirror(t *testing.T) { mirrorFaults(t, true) }
