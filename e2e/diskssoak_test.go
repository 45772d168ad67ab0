//go:build soak

package e2e

import (
	"encoding/json"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"perdure/api"
)

// TestSoakDisksAtOtherLevels does at level ca, where writes are mirrored, and at level none what
// TestDisks does at level ft.
func TestSoakDisksAtOtherLevels(t *testing.T) {
	for _, level := range []string{"ca", "none"} {
		t.Run(level, func(t *testing.T) {
			w := Start(t)
			v := w.CreateVM(VMOptions{Level: level, Disks: []string{"64M"}})
			p := v.Primary()
			s := w.Other(p)
			protected := func() {
				if level == "ca" {
					v.Protected()
				}
			}
			protected()
			w.Perdure(p, "disk", "attach", v.Name, "--size", "32M", "--id", "data")
			v.guestDisk("vdb", 32<<20)
			protected()
			v.sh("dd if=/dev/urandom of=/dev/vdb bs=64k count=32 conv=fsync")
			sum := v.sh("dd if=/dev/vdb bs=64k count=32 | md5sum")
			w.Perdure(s, "disk", "resize", v.Name, "data", "48M")
			v.guestDisk("vdb", 48<<20)
			protected()
			v.sh("dd if=/dev/urandom of=/dev/vdb bs=64k seek=600 count=8 conv=fsync")
			tail := v.sh("dd if=/dev/vdb bs=64k skip=600 | md5sum")
			if level == "ca" {
				w.Perdure(s, "disk", "replace", v.Name, "data", "--yes")
				protected()
				v.sameDisks()
				v.KillQEMU(p, syscall.SIGKILL)
				v.Wait("state=running,primary="+s, 30*time.Second)
			} else {
				v.Tell("poweroff")
				v.Wait("state=stopped", time.Minute)
				w.Perdure(p, "disk", "attach", v.Name, "--size", "16M", "--id", "third")
				w.Perdure(p, "disk", "resize", v.Name, "third", "24M")
				w.Perdure(p, "vm", "start", v.Name)
			}
			v.Within(4*time.Minute, "clock")
			v.guestDisk("vdb", 48<<20)
			if got := v.sh("dd if=/dev/vdb bs=64k count=32 | md5sum"); got != sum {
				t.Errorf("the disk holds %s, it was %s", got, sum)
			}
			if got := v.sh("dd if=/dev/vdb bs=64k skip=600 | md5sum"); got != tail {
				t.Errorf("the disk's new end holds %s, it was %s", got, tail)
			}
			if level == "none" {
				v.guestDisk("vdc", 24<<20)
			}
			protected()
			w.Perdure(s, "disk", "detach", v.Name, "data", "--yes")
			v.guestDisk("vdb", 0)
			if level == "ca" {
				protected()
				v.sameDisks()
			}
			out := w.Perdure(v.Primary(), "disk", "attach", v.Name, "--from", "data-1", "--id", "again")
			t.Log(out)
			v.guestDisk("vdb", 48<<20)
			if got := v.sh("dd if=/dev/vdb bs=64k count=32 | md5sum"); got != sum {
				t.Errorf("taken up again the disk holds %s, it was %s", got, sum)
			}
			protected()
		})
	}
}

// TestSoakDiskChangeInterrupted kills the agent at any moment of a change. Afterwards the list
// of disks is the old or the new one, the guest has just these, and the VM is protected.
func TestSoakDiskChangeInterrupted(t *testing.T) {
	w := Start(t)
	v := w.CreateVM(VMOptions{Disks: []string{"64M"}}).Protected()
	boot := v.Boot()
	p := v.Primary()
	list := func() (ids []string) {
		var l []api.VMDisk
		w.must(json.Unmarshal([]byte(w.Perdure(p, "disk", "list", v.Name, "-o", "json")), &l), "read list of disks")
		for _, d := range l {
			ids = append(ids, d.ID)
		}
		return ids
	}
	done, undone := 0, 0
	for n := range 10 {
		had := len(list()) == 2
		args := []string{"disk", "attach", v.Name, "--size", "16M", "--id", "data", "--no-wait"}
		if had {
			args = []string{"disk", "detach", v.Name, "data", "--delete", "--yes", "--no-wait"}
		}
		w.Perdure(p, args...)
		time.Sleep(time.Duration(n*n) * 12 * time.Millisecond) // that is what is tried: any moment
		w.KillAgent(p)
		var has bool
		v.Protected()
		w.Eventually(time.Minute, "the guest has what the list says", func() error {
			has = len(list()) == 2
			sectors := strings.TrimSpace(v.sh("cat /sys/block/vdb/size 2>/dev/null || echo 0"))
			if want := map[bool]string{true: fmt.Sprint(16 << 20 / 512), false: "0"}[has]; sectors != want {
				return fmt.Errorf("the guest says %s sectors, the list %v", sectors, list())
			}
			if vm := v.Show(); vm.Mode != "duplex" {
				return fmt.Errorf("mode %s", vm.Mode)
			}
			return nil
		})
		if has != had {
			done++
		} else {
			undone++
		}
	}
	t.Logf("%d changes were made, %d were not", done, undone)
	s := w.Other(p)
	v.KillQEMU(p, syscall.SIGKILL)
	v.Wait("state=running,primary="+s, 30*time.Second)
	if v.Boot() != boot {
		t.Error("the guest was rebooted")
	}
	v.Protected()
	v.sameDisks()
}

// TestSoakDisksAndLevels mixes what changes a running VM: a disk comes while it is at one level,
// grows at another and is verified at a third; the guest moves between QEMUs with it, and
// between hosts.
func TestSoakDisksAndLevels(t *testing.T) {
	w := Start(t)
	v := w.CreateVM(VMOptions{Disks: []string{"64M"}}).Protected()
	boot := v.Boot()
	traffic := v.Traffic()
	moves := []string{v.Primary()}
	read := func() string {
		return v.sh("echo 3 > /proc/sys/vm/drop_caches; dd if=/dev/vdb bs=64k count=32 | md5sum")
	}
	w.Perdure(v.Primary(), "disk", "attach", v.Name, "--size", "64M", "--id", "data")
	v.guestDisk("vdb", 64<<20)
	v.sh("dd if=/dev/urandom of=/dev/vdb bs=64k count=32 conv=fsync")
	sum := read()
	same := func(when string) {
		t.Helper()
		if got := read(); got != sum {
			t.Errorf("%s the disk holds %s, it was %s", when, got, sum)
		}
	}
	move := func() {
		t.Helper()
		v.Protected()
		p := v.Primary()
		v.KillQEMU(p, syscall.SIGKILL)
		moves = append(moves, w.Other(p))
		v.Wait("state=running,primary="+w.Other(p), 30*time.Second)
	}
	takeOver := func(when string) {
		t.Helper()
		move()
		same(when)
	}
	takeOver("after the takeover with a new disk")
	v.Protected()
	w.Perdure(v.Primary(), "vm", "level", v.Name, "ca")
	same("at level ca")
	v.Protected()
	w.Perdure(v.Primary(), "disk", "resize", v.Name, "data", "96M")
	v.guestDisk("vdb", 96<<20)
	v.Protected()
	t.Log(w.Perdure(v.Primary(), "disk", "verify", v.Name, "--wait"))
	w.Perdure(v.Primary(), "vm", "level", v.Name, "ft")
	v.guestDisk("vdb", 96<<20)
	same("back at level ft")
	takeOver("after the second takeover")
	v.Protected()
	t.Log(w.Perdure(v.Primary(), "disk", "verify", v.Name, "--wait"))
	t.Log(w.Perdure(v.Primary(), "disk", "show", v.Name, "data"))
	w.Perdure(v.Primary(), "disk", "detach", v.Name, "data", "--yes")
	v.guestDisk("vdb", 0)
	move()
	v.Protected()
	w.Perdure(v.Primary(), "vm", "level", v.Name, "none")
	v.CheckDisks()
	if v.Boot() != boot {
		t.Error("the guest was rebooted")
	}
	traffic.Check(15*time.Second, moves...)
}
