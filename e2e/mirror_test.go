package e2e

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"syscall"
	"testing"
	"time"

	"perdure/internal/client"
)

// TestMirror strikes a VM of level ca. Whatever happens, every acknowledged line
// of its log is on the disk, its file system is whole, its frames come from one
// host after the other, and it is protected again by itself.
func TestMirror(t *testing.T) { mirrorFaults(t, false) }

// mirrorFaults strikes with the loss of either host and of the links between
// them; with all, also with what the tests of package shim show more quickly.
func mirrorFaults(t *testing.T, all bool) {
	w := Start(t)
	v := w.CreateVM(VMOptions{Level: "ca", Disks: []string{"128M"}}).Protected()
	off := func(w *World, v *VM, h string) { w.PowerOff(h) }
	on := func(w *World, v *VM, h string) { w.PowerOn(h) }
	for _, f := range []fault{
		{"power off", off, on},
		{"QEMU killed", func(w *World, v *VM, h string) { v.KillQEMU(h, syscall.SIGKILL) }, nil},
		{"shim stopped for 3 s", func(w *World, v *VM, h string) {
			v.KillShim(h, syscall.SIGSTOP)
			w.Never(3*time.Second, "stop", func() error { return nil })
			v.KillShim(h, syscall.SIGCONT)
		}, nil},
	} {
		if f.name != "power off" && !all {
			continue
		}
		ok := t.Run("primary/"+f.name, func(t *testing.T) { mirrorTakeover(w.sub(t), v, f) })
		if !ok {
			t.Fatalf("%s: the VM is not used any further", f.name)
		}
	}
	for _, f := range []fault{
		{"power off", off, on},
		{"QEMU killed", func(w *World, v *VM, h string) { v.KillQEMU(h, syscall.SIGKILL) }, nil},
	} {
		if f.name != "power off" && !all {
			continue
		}
		ok := t.Run("secondary/"+f.name, func(t *testing.T) { mirrorStays(w.sub(t), v, f) })
		if !ok {
			t.Fatalf("%s: the VM is not used any further", f.name)
		}
	}
	t.Run("both A-links", func(t *testing.T) {
		w := w.sub(t)
		v := v.in(w)
		p := v.Primary()
		moves := v.watchMoves()
		log := v.Log(0)
		w.must(log.WaitAcked(w.Ctx, 50), "log")
		w.Link(false, p, "alink0", "alink1")
		now := v.Wait("mode=simplex|syncing,state=running", 30*time.Second).Primary
		v.Within(4*time.Minute, "clock")
		w.must(log.WaitAcked(w.Ctx, 20), "log after the links were cut")
		w.Link(true, p, "alink0", "alink1")
		v.Protected()
		log.Stop()
		v.judge(log)
		if now == p {
			moves(p)
		} else {
			moves(p, now)
		}
	})
	t.Run("started on the other host", func(t *testing.T) {
		w := w.sub(t)
		v := v.in(w)
		s := v.Secondary()
		log := v.Log(0)
		w.must(log.WaitAcked(w.Ctx, 50), "log")
		log.Stop()
		v.Tell("poweroff")
		v.Wait("state=stopped", time.Minute)
		v.equalReplicas()
		w.Perdure(s, "vm", "start", v.Name, "--host", s)
		v.Within(4*time.Minute, "clock")
		v.judge(log)
		v.Wait("state=running,mode=duplex,primary="+s, 2*time.Minute)
	})
	t.Run("switchover is refused", func(t *testing.T) {
		w := w.sub(t)
		out, err := w.TryPerdure(v.Primary(), "vm", "switchover", v.Name)
		if err == nil {
			t.Fatalf("it was not refused: %s", out)
		}
		t.Log(err)
	})
}

// mirrorTakeover strikes the primary's host: the guest boots on the other.
func mirrorTakeover(w *World, v *VM, f fault) {
	v = v.in(w)
	p := v.Primary()
	s := w.Other(p)
	boot := v.Boot()
	moves := v.watchMoves()
	log := v.Log(0)
	w.must(log.WaitAcked(w.Ctx, 50), "log")
	struck := time.Now()
	f.do(w, v, p)
	v.Wait("state=running,primary="+s, 30*time.Second)
	v.Within(4*time.Minute, "clock")
	w.T.Logf("the guest answers %v after the fault: %s", time.Since(struck).Round(time.Millisecond), v.Say("boot"))
	w.must(log.WaitAcked(w.Ctx, 20), "log after the takeover")
	if f.after != nil {
		f.after(w, v, p)
	}
	v.Protected()
	log.Stop()
	v.judge(log)
	if v.Boot() == boot {
		w.T.Error("the guest was not booted: this is not level ca")
	}
	moves(p, s)
	v.sameDisks()
}

// mirrorStays strikes the secondary's host: the guest notices a short wait at most.
func mirrorStays(w *World, v *VM, f fault) {
	v = v.in(w)
	p := v.Primary()
	boot := v.Boot()
	moves := v.watchMoves()
	log := v.Log(0)
	w.must(log.WaitAcked(w.Ctx, 50), "log")
	f.do(w, v, w.Other(p))
	w.must(log.WaitAcked(w.Ctx, 50), "log without a secondary")
	if f.after != nil {
		f.after(w, v, w.Other(p))
	}
	v.Wait("state=running,mode=duplex,primary="+p, 2*time.Minute)
	w.must(log.WaitAcked(w.Ctx, 50), "log with a secondary again")
	if r := log.Stop(); r.Breaks > 0 {
		w.T.Errorf("the log's connection broke %d times", r.Breaks)
	}
	v.judge(log)
	if v.Boot() != boot {
		w.T.Error("the guest was rebooted")
	}
	moves(p)
	v.sameDisks()
}

// judge checks the log of a VM, and its file systems.
func (v *VM) judge(log *client.Log) {
	v.w.T.Helper()
	r, err := log.Verify(v.w.Ctx)
	v.w.must(err, "verify log")
	if !r.Clean() {
		v.w.T.Errorf("log: %v; lost %v, repeated %v, foreign %v", r, r.Lost, r.Repeated, r.Foreign)
	}
	v.w.T.Logf("log: %v", r)
	v.CheckDisks()
}

// sameDisks lets the guest stand still and compares the replicas of its disks.
func (v *VM) sameDisks() {
	w := v.w
	w.T.Helper()
	w.Perdure(w.AnyHost(), "vm", "pause", v.Name)
	defer w.Perdure(w.AnyHost(), "vm", "resume", v.Name)
	v.equalReplicas()
}

// equalReplicas compares the replicas of all disks; nobody may write to them.
func (v *VM) equalReplicas() {
	w := v.w
	w.T.Helper()
	disks, err := w.API(w.AnyHost()).Disks(w.Ctx, v.Name)
	w.must(err, "list disks")
	for _, d := range disks {
		sums := map[string]string{}
		for _, r := range d.Replicas {
			f, err := os.Open(r.Path)
			w.must(err, "open replica")
			sum := sha256.New()
			_, err = io.CopyN(sum, f, d.Size)
			f.Close()
			w.must(err, "read replica")
			sums[r.Host] = hex.EncodeToString(sum.Sum(nil)[:8])
		}
		hosts := w.Lab.Hosts()
		if sums[hosts[0]] != sums[hosts[1]] {
			w.T.Errorf("the replicas of %s differ: %s", d.ID, fmt.Sprint(sums))
		}
	}
}

// watchMoves watches the LAN; the result judges from which hosts the VM's frames came.
func (v *VM) watchMoves() func(moves ...string) {
	v.w.T.Helper()
	t := &Traffic{v: v, macs: v.MACs()}
	var err error
	t.sniffer, err = v.w.Lab.Sniff(t.macs...)
	v.w.must(err, "watch LAN")
	v.w.T.Cleanup(func() { t.sniffer.Close() })
	return t.CheckMoves
}
