package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"perdure/internal/testenv"
)

// TestDiskPaths has a VM of level ca whose replicas lie elsewhere: in a file on one host and
// on a block device on the other. It is taken over onto the device, and the
// file's replica is moved while the guest writes.
func TestDiskPaths(t *testing.T) {
	w := Start(t)
	dir := t.TempDir()
	back := filepath.Join(dir, "back")
	w.must(os.WriteFile(back, nil, 0o600), "make file")
	w.must(os.Truncate(back, 80<<20), "make file")
	losetup := testenv.Tool(t, "losetup")
	out, err := exec.Command(losetup, "--find", "--show", back).Output()
	testenv.Need(t, err == nil, "needs loop devices")
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() { // runs after the VM was removed
		if out, err := exec.Command(losetup, "-d", dev).CombinedOutput(); err != nil {
			t.Errorf("losetup -d %s: %v %s", dev, err, out)
		}
	})
	a, b := w.Lab.Hosts()[0], w.Lab.Hosts()[1]
	file, moved := filepath.Join(dir, "web.raw"), filepath.Join(dir, "moved.raw")

	v := w.CreateVM(VMOptions{Level: "ca", Host: a, Disks: []string{"64M,path=" + file + ",path=" + b + ":" + dev}}).Protected()
	list := w.Perdure(b, "disk", "list", v.Name)
	t.Log(list)
	if want := a + ":" + file + ", " + b + ":" + dev; !strings.Contains(list, want) {
		t.Errorf("the list does not show %s", want)
	}
	w.refused(a, "it is the replica of this disk on host "+a, "disk", "replace", v.Name, "disk0", "--host", b, "--path", file)
	w.refused(b, "it is disk disk0 of VM", "disk", "attach", v.Name, "--size", "8M", "--path", b+":"+dev)
	log := v.Log(0)
	w.must(log.WaitAcked(w.Ctx, 50), "log")

	v.KillQEMU(a, syscall.SIGKILL)
	v.Wait("state=running,primary="+b, 30*time.Second)
	v.Within(4*time.Minute, "clock")
	w.must(log.WaitAcked(w.Ctx, 20), "log after the takeover onto the device")
	v.Protected()

	t.Log(w.Perdure(b, "disk", "replace", v.Name, "disk0", "--host", a, "--path", moved))
	w.must(log.WaitAcked(w.Ctx, 20), "log while the replica is moved")
	v.Protected()
	t.Log(w.Perdure(a, "disk", "show", v.Name, "disk0"))
	if _, err := os.Stat(file); !os.IsNotExist(err) {
		t.Errorf("the file of the old replica: %v", err)
	}
	if _, err := os.Stat(moved); err != nil {
		t.Error(err)
	}
	log.Stop()
	v.judge(log)
	v.sameDisks()
	v.remove()
	if _, err := os.Stat(moved); !os.IsNotExist(err) {
		t.Errorf("the file of the removed VM: %v", err)
	}
}

// refused runs a command that must fail and say a certain thing.
func (w *World) refused(host, part string, args ...string) {
	w.T.Helper()
	out, err := w.TryPerdure(host, args...)
	if err == nil || !strings.Contains(err.Error()+out, part) {
		w.T.Errorf("perdure %s: %s %v; want %q", strings.Join(args, " "), out, err, part)
	}
}
