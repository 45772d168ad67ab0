//go:build soak

package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"perdure/internal/model"
	"perdure/internal/shimapi"
)

// carried is a guest of level ca on host a, whose disk has failed there.
func carried(t *testing.T, fail func(w *World, v *VM)) (w *World, v *VM) {
	w = Start(t)
	v = w.DefineVM(VMOptions{Level: "ca", Disks: []string{"128M"}})
	v.ownDisk("a", true)
	w.Perdure("a", "vm", "start", v.Name)
	v.Within(4*time.Minute, "clock")
	v.Wait("state=running,mode=duplex,primary=a", 2*time.Minute)
	fail(w, v)
	return w, v
}

// TestSoakCarryStall lets the disk of the host that runs the guest stand still:
// no error, no answer. The guest waits for as long as that is borne, and goes on.
func TestSoakCarryStall(t *testing.T) {
	w, v := carried(t, func(*World, *VM) {})
	boot := v.Boot()
	log := v.Log(0)
	w.must(log.WaitAcked(w.Ctx, 50), "log")
	w.on("a", "mount --bind "+v.diskDir("a")+" /mnt && fsfreeze -f /mnt")
	thawed := false
	thaw := func() {
		if !thawed {
			thawed = true
			w.on("a", "fsfreeze -u /mnt; umount -l /mnt")
		}
	}
	defer thaw()
	before := log.Snapshot().Acked
	w.Eventually(time.Minute, "the log goes on although the disk stands", func() error {
		if n := log.Snapshot().Acked; n < before+100 {
			return fmt.Errorf("%d lines since", n-before)
		}
		return nil
	})
	v.replica("a", model.Inconsistent, "disk-carried", true, 20*time.Second)
	v.stays(log, boot, "its disk stood still")
	v.pullDisk("a") // with requests that it never answered
	v.ownDisk("a", false)
	_, err := v.shimOp("a", shimapi.Op{Op: "disk-replace", Value: v.Show().Disks[0].ID})
	w.must(err, "replace the disk")
	v.replica("a", model.UpToDate, "disk-carried", false, time.Minute)
	w.must(log.WaitAcked(w.Ctx, 50), "log with the new disk")
	v.stays(log, boot, "its disk was replaced")
	thaw() // what had been stuck comes through now: into the old disk only
	w.must(log.WaitAcked(w.Ctx, 50), "log after the old disk answered")
	v.stays(log, boot, "its old disk answered")
	w.Perdure("a", "vm", "pause", v.Name)
	if d := v.digests(); d[0] != d[1] {
		t.Errorf("the replicas differ: %v", d)
	}
	w.Perdure("a", "vm", "resume", v.Name)

	// Once more; this one answers again, and nobody has to do anything.
	w.on("a", "fsfreeze -f "+v.diskDir("a"))
	v.replica("a", model.Inconsistent, "disk-carried", true, time.Minute)
	w.on("a", "fsfreeze -u "+v.diskDir("a"))
	v.replica("a", model.UpToDate, "disk-carried", false, 2*time.Minute)
	w.must(log.WaitAcked(w.Ctx, 50), "log with the disk that answers again")
	v.stays(log, boot, "its disk stood still for a while")
	log.Stop()
	v.judge(log)
}

// TestSoakCarryLost loses the host with the only good copy: the guest ends rather
// than go on without one, and boots there when it is back, with every line.
func TestSoakCarryLost(t *testing.T) {
	w, v := carried(t, func(w *World, v *VM) {})
	log := v.Log(0)
	w.must(log.WaitAcked(w.Ctx, 50), "log")
	v.breakDisk("a")
	w.must(log.WaitAcked(w.Ctx, 100), "log without the disk of its host")
	v.replica("a", model.Inconsistent, "disk-carried", true, 20*time.Second)
	w.PowerOff("b")
	v.named("host b", "only good copy")
	w.Never(5*time.Second, "the VM runs without its disk", func() error {
		if s := v.Show().State; s == model.StateRunning {
			return fmt.Errorf("state %s", s)
		}
		return nil
	})
	w.PowerOn("b")
	v.Wait("state=running,primary=b", 2*time.Minute)
	v.Within(4*time.Minute, "clock")
	w.must(log.WaitAcked(w.Ctx, 20), "log after the start on b")
	log.Stop()
	v.judge(log)
}

// TestSoakDiskFailsFT: at level ft a failed disk costs the host its copy: the
// secondary takes over, and the host is left alone until the disk is replaced.
func TestSoakDiskFailsFT(t *testing.T) {
	w := Start(t)
	v := w.DefineVM(VMOptions{Disks: []string{"128M"}})
	v.ownDisk("a", true)
	w.Perdure("a", "vm", "start", v.Name)
	v.Within(4*time.Minute, "clock")
	v.Wait("state=running,mode=duplex,primary=a", 2*time.Minute)
	tr := v.Traffic()
	v.breakDisk("a")
	v.Tell("sh busybox dd if=/dev/urandom of=/data/fill bs=64k count=16 && busybox sync")
	v.Wait("state=running,primary=b", 20*time.Second)
	tr.Resume()
	v.named("host a", "cannot hold a copy")
	w.Never(15*time.Second, "protected by a host whose disk has failed", func() error {
		if m := v.Show().Mode; m == model.ModeDuplex {
			return fmt.Errorf("mode %s", m)
		}
		return nil
	})
	if n := strings.Count(v.events(w.Ctx), "was chosen to hold the second copy"); n > 3 { // the first one, and one that was too early to know
		t.Errorf("the host with the failed disk was tried %d times", n)
	}
	v.pullDisk("a")
	w.KillAgent("a") // which forgets; replacing the disk has it forget too
	v.Protected()
	tr.Flow(20)
	tr.Check(0, "a", "b")
}

// TestSoakDiskStandsFT: at level ft a disk of the primary's host that does not answer is not
// taken for a slow secondary: the VM goes on there.
func TestSoakDiskStandsFT(t *testing.T) {
	w := Start(t)
	v := w.DefineVM(VMOptions{Disks: []string{"128M"}})
	v.ownDisk("a", true)
	w.Perdure("a", "vm", "start", v.Name)
	v.Within(4*time.Minute, "clock")
	v.Wait("state=running,mode=duplex,primary=a", 2*time.Minute)
	boot := v.Boot()
	log := v.Log(0)
	w.must(log.WaitAcked(w.Ctx, 50), "log")
	w.on("a", "mount --bind "+v.diskDir("a")+" /mnt && fsfreeze -f /mnt")
	defer w.on("a", "fsfreeze -u /mnt; umount -l /mnt")
	w.Never(15*time.Second, "the good copy dropped", func() error {
		if m := v.Show().Mode; m != model.ModeDuplex {
			return fmt.Errorf("mode %s", m)
		}
		return nil
	})
	v.Wait("state=running,primary=b", 40*time.Second)
	w.must(log.WaitAcked(w.Ctx, 50), "log on the other host")
	if again := v.Boot(); again != boot {
		t.Errorf("the guest was booted: %s, then %s", boot, again)
	}
	log.Stop()
	v.judge(log)
}
