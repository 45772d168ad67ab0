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

// TestDisks gives a protected VM a disk while a client streams, lets the guest
// write to it, and takes the VM over: the other host's QEMU was started with the disk that
// the first one was given while it ran. Then the disk grows, and is taken away again.
func TestDisks(t *testing.T) {
	w := Start(t)
	v := w.CreateVM(VMOptions{Disks: []string{"64M"}}).Protected()
	p := v.Primary()
	s := w.Other(p)
	boot := v.Boot()
	traffic := v.Traffic()

	w.T.Log(w.Perdure(s, "disk", "attach", v.Name, "--size", "64M", "--id", "data"))
	v.guestDisk("vdb", 64<<20)
	v.sh("dd if=/dev/urandom of=/dev/vdb bs=64k count=32 conv=fsync")
	sum := v.sh("dd if=/dev/vdb bs=64k count=32 | md5sum")
	v.Protected()
	w.T.Log(w.Perdure(s, "disk", "status", v.Name))
	w.T.Log(w.Perdure(p, "disk", "show", v.Name, "data"))
	v.wantDisks("disk0", "data")

	v.KillQEMU(p, syscall.SIGKILL)
	v.Wait("state=running,primary="+s, 30*time.Second)
	v.sh("echo 3 > /proc/sys/vm/drop_caches")
	if got := v.sh("dd if=/dev/vdb bs=64k count=32 | md5sum"); got != sum {
		t.Errorf("after the takeover the disk holds %s, it was %s", got, sum)
	}
	v.Protected()

	w.T.Log(w.Perdure(p, "disk", "resize", v.Name, "data", "96M"))
	v.guestDisk("vdb", 96<<20)
	v.sh("dd if=/dev/urandom of=/dev/vdb bs=64k seek=1100 count=8 conv=fsync")
	tail := v.sh("dd if=/dev/vdb bs=64k skip=1000 | md5sum")
	v.Protected()
	v.sameDisks()
	v.KillQEMU(s, syscall.SIGKILL)
	v.Wait("state=running,primary="+p, 30*time.Second)
	v.guestDisk("vdb", 96<<20)
	v.sh("echo 3 > /proc/sys/vm/drop_caches")
	if got := v.sh("dd if=/dev/vdb bs=64k count=32 | md5sum"); got != sum {
		t.Errorf("after the second takeover the disk holds %s, it was %s", got, sum)
	}
	if got := v.sh("dd if=/dev/vdb bs=64k skip=1000 | md5sum"); got != tail {
		t.Errorf("the new end of the disk holds %s, it was %s", got, tail)
	}
	v.Protected()

	out := w.Perdure(s, "vm", "disk", "remove", v.Name, "data", "--yes")
	w.T.Log(out)
	if !strings.Contains(out, "--from data-1") {
		t.Errorf("it is not said where the data are: %s", out)
	}
	v.guestDisk("vdb", 0)
	v.wantDisks("disk0")
	v.Protected()
	v.KillQEMU(p, syscall.SIGKILL)
	v.Wait("state=running,primary="+s, 30*time.Second)
	v.guestDisk("vdb", 0)
	v.Protected()
	v.sameDisks()
	v.CheckDisks()
	if v.Boot() != boot {
		t.Error("the guest was rebooted")
	}
	traffic.Check(5*time.Second, p, s, p, s)
}

// sh runs a shell command in the guest and returns what it printed.
func (v *VM) sh(command string) string {
	v.w.T.Helper()
	lines, text := v.SayLines("sh " + command)
	if text != "" {
		v.w.T.Logf("guest: %s: %s", command, text)
	}
	for _, l := range lines {
		if strings.HasSuffix(l, "-") { // md5sum; dd talks beside it
			return l
		}
	}
	return strings.Join(lines, "\n")
}

// guestDisk waits until the guest sees a disk of this size; 0: none.
func (v *VM) guestDisk(dev string, size int64) {
	v.w.T.Helper()
	v.w.Eventually(20*time.Second, fmt.Sprintf("the guest has %s with %d bytes", dev, size), func() error {
		out := strings.TrimSpace(v.sh("cat /sys/block/" + dev + "/size 2>/dev/null || echo 0"))
		if out != fmt.Sprint(size/512) {
			return fmt.Errorf("it says %q sectors", out)
		}
		return nil
	})
}

func (v *VM) wantDisks(ids ...string) {
	v.w.T.Helper()
	var l []api.VMDisk
	v.w.must(json.Unmarshal([]byte(v.w.Perdure(v.w.AnyHost(), "disk", "list", v.Name, "-o", "json")), &l), "read list of disks")
	var got []string
	for _, d := range l {
		got = append(got, d.ID)
	}
	if strings.Join(got, " ") != strings.Join(ids, " ") {
		v.w.T.Errorf("disks %v, want %v", got, ids)
	}
}
