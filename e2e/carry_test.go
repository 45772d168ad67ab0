package e2e

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"perdure/api"
	"perdure/internal/client"
	"perdure/internal/model"
	"perdure/internal/shimapi"
)

// ownDisk puts a file system of its own under the replicas of a VM on one host,
// as a new disk that holds nothing else; keep: what is there moves to it.
func (v *VM) ownDisk(host string, keep bool) { v.w.T.Helper(); v.ownDiskOf(host, keep, "400M") }

// ownDiskOf is ownDisk of a size.
func (v *VM) ownDiskOf(host string, keep bool, size string) {
	v.w.T.Helper()
	w, dir := v.w, v.diskDir(host)
	img := filepath.Join(suite.dir, fmt.Sprintf("disk-%s-%d.ext4", host, time.Now().UnixNano()))
	script := fmt.Sprintf("truncate -s %[2]s %[1]s && mkfs.ext4 -q -m 0 %[1]s", img, size)
	if keep {
		script += fmt.Sprintf(" && mount -o loop %s /mnt && cp -a --sparse=always %s/. /mnt/ && umount /mnt", img, dir)
	}
	w.on(host, script+fmt.Sprintf(" && mount -o loop %[1]s %[2]s && rm %[1]s", img, dir))
	w.T.Cleanup(func() { v.pullDisk(host) })
}

// pullDisk takes the file system of ownDisk away, if there is one.
func (v *VM) pullDisk(host string) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	_, _ = v.w.Lab.Output(ctx, host, "umount", "-l", v.diskDir(host)) // gone with the host's power, or before
}

func (v *VM) diskDir(host string) string {
	return filepath.Join(v.w.Lab.StateDir(host), "vms", v.Name, "disks")
}

// breakDisk makes the file system of ownDisk fail: each operation is EIO from now
// on, as on a device that is gone.
func (v *VM) breakDisk(host string) {
	v.w.T.Helper()
	const ext4Shutdown, noFlush = 0x8004587d, 2
	agent, err := v.w.Lab.Agent(host)
	v.w.must(err, "find agent")
	fd, err := unix.Open(filepath.Join("/proc", fmt.Sprint(agent.PID), "root", v.diskDir(host)), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	v.w.must(err, "open the disk's directory")
	defer unix.Close(fd)
	flag := uint32(noFlush)
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), ext4Shutdown, uintptr(unsafe.Pointer(&flag))); e != 0 {
		v.w.must(e, "shut the file system down")
	}
	v.w.T.Logf("the disk of host %s fails", host)
}

// shimOp asks the shim of a VM on a host.
func (v *VM) shimOp(host string, op shimapi.Op) (string, error) {
	c := shimapi.NewShimClient(filepath.Join(v.w.Lab.StateDir(host), "vms", v.Name, shimapi.SocketFile))
	defer c.Close()
	ctx, cancel := context.WithTimeout(v.w.Ctx, 20*time.Second)
	defer cancel()
	r, err := c.Op(ctx, op)
	return r.Text, err
}

// replica waits until a VM's replicas on a host are in a state, and the VM runs
// protected with or without a problem of this code.
func (v *VM) replica(host string, state model.ReplicaState, code string, there bool, limit time.Duration) api.VM {
	v.w.T.Helper()
	var vm api.VM
	v.w.Eventually(limit, fmt.Sprintf("replica on %s %s, problem %s: %v", host, state, code, there), func() error {
		vm = v.Show()
		got := slices.ContainsFunc(vm.Problems, func(p model.Problem) bool { return p.Code == code })
		if vm.State != model.StateRunning || vm.Mode != model.ModeDuplex || got != there || vm.Disks[0].Replicas[host] != state {
			return fmt.Errorf("%s, %s, replicas %v, problems %+v", vm.State, vm.Mode, vm.Disks[0].Replicas, vm.Problems)
		}
		return nil
	})
	for _, p := range vm.Problems {
		v.w.T.Logf("problem %s: %s (to do: %s)", p.Code, p.Text, p.Action)
	}
	return vm
}

// digests are those of the VM's first image on each host. It must stand still.
func (v *VM) digests() (sums []string) {
	v.w.T.Helper()
	for _, h := range v.w.Lab.Hosts() {
		sums = append(sums, strings.Fields(v.w.on(h, "sha256sum "+filepath.Join(v.diskDir(h), v.Show().Disks[0].ID+".raw")))[0])
	}
	return sums
}

// TestCarry takes the disk of the host that runs a guest of level ca away: the
// guest notices nothing. The disk is replaced and filled; then the host is lost,
// and the guest boots on the other with every line that was acknowledged.
func TestCarry(t *testing.T) {
	w := Start(t)
	v := w.DefineVM(VMOptions{Level: "ca", Disks: []string{"128M"}})
	v.ownDisk("a", true)
	w.Perdure("a", "vm", "start", v.Name)
	v.Within(4*time.Minute, "clock")
	v.Wait("state=running,mode=duplex,primary=a", 2*time.Minute)
	boot := v.Boot()
	log := v.Log(0)
	w.must(log.WaitAcked(w.Ctx, 50), "log")

	v.breakDisk("a")
	w.must(log.WaitAcked(w.Ctx, 200), "log without the disk of its host")
	v.replica("a", model.Inconsistent, "disk-carried", true, 20*time.Second)
	v.SayLines("sh echo 3 >/proc/sys/vm/drop_caches; busybox cat /data/* >/dev/null; busybox touch /data/carried && busybox sync && echo ok")
	v.stays(log, boot, "its disk failed")

	id := v.Show().Disks[0].ID
	if text, err := w.TryPerdure("b", "disk", "replace", v.Name, id, "--host", "a", "--yes"); err == nil {
		t.Errorf("replaced on a broken disk: %s", text)
	} else {
		t.Logf("on the broken disk: %v", err)
	}
	v.pullDisk("a")
	v.ownDisk("a", false)
	t.Log(w.Perdure("b", "disk", "replace", v.Name, id, "--host", "a", "--yes"))
	v.replica("a", model.UpToDate, "disk-carried", false, time.Minute)
	t.Log(w.Perdure("b", "disk", "show", v.Name, id))
	w.must(log.WaitAcked(w.Ctx, 50), "log with the new disk")
	v.stays(log, boot, "its disk was replaced")
	w.Perdure("a", "vm", "pause", v.Name)
	if d := v.digests(); d[0] != d[1] {
		t.Errorf("the replicas differ: %v", d)
	}
	w.Perdure("a", "vm", "resume", v.Name)
	w.must(log.WaitAcked(w.Ctx, 20), "log after the comparison")

	w.PowerOff("a")
	v.Wait("state=running,primary=b", 30*time.Second)
	v.Within(4*time.Minute, "clock")
	w.must(log.WaitAcked(w.Ctx, 20), "log after the takeover")
	w.PowerOn("a")
	v.Protected()
	log.Stop()
	v.judge(log)
	v.sameDisks()
}

// stays fails the test if the guest has noticed anything.
func (v *VM) stays(log *client.Log, boot, what string) {
	v.w.T.Helper()
	r := log.Snapshot()
	if r.Breaks > 0 || r.Uncertain > 1 || r.Refused != "" {
		v.w.T.Errorf("%s, and the guest noticed: %v", what, r)
	}
	if v.Boot() != boot {
		v.w.T.Errorf("%s, and the guest was rebooted", what)
	}
	if lines, _ := v.SayLines("sh busybox dmesg | busybox grep -ciE 'i/o error|remount|hung' || true"); len(lines) == 0 || strings.TrimSpace(lines[len(lines)-1]) != "0" {
		v.w.T.Errorf("%s, and the guest's kernel says: %v", what, lines)
	}
	v.w.T.Logf("%s: %v", what, r)
}
