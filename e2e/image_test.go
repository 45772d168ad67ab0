package e2e

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"perdure/api"
	"perdure/internal/lab"
	"perdure/internal/lab/bootdisk"
	"perdure/internal/lab/guest"
	"perdure/internal/model"
	"perdure/internal/shimapi"
	"perdure/internal/testenv"
)

// bootImage makes a disk that boots the demo guest by itself, and an image of it
// in the given format. Noise behind what is used gives an import something to do.
func (w *World) bootImage(format, ip string, noise int) string {
	w.T.Helper()
	for _, p := range []string{"grub-mkimage", "mcopy", "mmd"} {
		testenv.Tool(w.T, p)
	}
	dir := w.T.TempDir()
	raw := filepath.Join(dir, "disk.raw")
	w.must(bootdisk.Write(w.Ctx, raw, bootdisk.Files{Kernel: suite.guest.Kernel, Initrd: suite.guest.Initrd, Append: guest.AppendFor(ip + "/24")}), "make image")
	f, err := os.OpenFile(raw, os.O_WRONLY|os.O_APPEND, 0)
	w.must(err, "open image")
	b := make([]byte, noise)
	rnd := rand.NewChaCha8([32]byte{})
	_, _ = rnd.Read(b) // never fails
	_, err = f.Write(b)
	w.must(err, "write image")
	w.must(f.Close(), "write image")
	if format == "raw" {
		return raw
	}
	out := filepath.Join(dir, "disk."+format)
	if msg, err := exec.Command("qemu-img", "convert", "-O", format, raw, out).CombinedOutput(); err != nil {
		w.T.Fatalf("make image: %v: %s", err, msg)
	}
	return out
}

// createFrom makes and starts a VM whose first disk is an image, whose second is
// for data, and follows the import.
func (w *World) createFrom(level, format string, noise int, change func(*api.CreateVM)) *VM {
	w.T.Helper()
	w.vms++
	suite.vms++
	v := &VM{w: w, Name: fmt.Sprintf("vm%d", w.vms), IP: fmt.Sprintf("10.77.0.%d", 50+(suite.vms-1)%50)}
	image := w.bootImage(format, v.IP, noise)
	w.T.Cleanup(v.remove)
	c := w.API("a")
	req := api.CreateVM{Name: v.Name, Level: model.Level(level), VCPUs: 1, Memory: 256 << 20,
		Disks: []api.CreateDisk{{Image: &api.File{Path: image}}, {Size: 64 << 20}}, NICs: []api.CreateNIC{{Bridge: lab.BridgeName}}}
	if change != nil {
		change(&req)
	}
	w.must(req.Validate(), "check request")
	op, err := c.CreateVM(w.Ctx, req)
	w.must(err, "create VM")
	var last, seen, etas int
	for op.State == api.OperationRunning {
		for _, p := range op.Progress {
			if p.What == "import" && p.Total > 0 {
				seen++
				if now := int(p.Done * 100 / p.Total); now < last || now > 100 {
					w.T.Errorf("the import went from %d to %d per cent", last, now)
				} else {
					last = now
				}
				if p.ETASeconds >= 0 {
					etas++
				}
			}
		}
		op, err = c.Operation(w.Ctx, op.ID, 10*time.Millisecond)
		w.must(err, "follow import")
	}
	if op.State != api.OperationDone {
		w.T.Fatalf("import: %+v", op.Error)
	}
	if len(op.Progress) == 0 {
		w.T.Error("the import says nothing of its progress")
	}
	for _, p := range op.Progress {
		if p.What != "import" || p.Total == 0 || p.Done != p.Total {
			w.T.Errorf("at its end the import says %+v", p)
		}
	}
	w.T.Logf("import of %s: seen %d times on its way, %d times with the time left", filepath.Base(image), seen, etas)
	w.Perdure("a", "vm", "start", v.Name)
	v.Within(4*time.Minute, "clock")
	return v
}

// TestImageProtected imports a vmdk, boots it by its own boot loader at level
// ft, and lets it outlive its QEMU.
func TestImageProtected(t *testing.T) {
	w := Start(t)
	v := w.createFrom("ft", "vmdk", 64<<20, nil).Protected()
	boot := v.Boot()
	c := v.Counter(10 * time.Millisecond)
	w.must(c.WaitOK(w.Ctx, 50), "counter")
	v.KillQEMU("a", syscall.SIGKILL)
	v.Wait("state=running,primary=b", 20*time.Second)
	w.must(c.WaitOK(w.Ctx, 50), "counter after the takeover")
	if r := c.Stop(); !r.Clean() {
		t.Errorf("counter: %v", r)
	}
	if v.Boot() != boot {
		t.Error("the guest was rebooted")
	}
	if s := v.Say("fsck 0"); s != "clean" {
		t.Errorf("file system of the data disk: %s", s)
	}
}

// TestUEFI imports a qcow2 and boots it by UEFI at level none. The firmware's
// variables are the VM's own, and last. The guest's clock is set after a pause.
func TestUEFI(t *testing.T) {
	w := Start(t)
	v := w.createFrom("none", "qcow2", 0, func(r *api.CreateVM) { r.UEFI = true })
	nvram := filepath.Join(w.Lab.StateDir("a"), "vms", v.Name, shimapi.NVRAMFile)
	first, err := os.ReadFile(nvram)
	w.must(err, "read UEFI variables")
	boot := v.Boot()
	if out := w.Perdure("a", "vm", "show", v.Name); !bytes.Contains([]byte(out), []byte("UEFI")) {
		t.Errorf("vm show does not speak of UEFI:\n%s", out)
	}
	if !bytes.Contains(first, utf16("Boot0000")) { // what it found to boot on its first start
		t.Error("the firmware wrote nothing into its variables")
	}
	v.checkTimeAfterPause("a")
	w.Perdure("a", "vm", "stop", v.Name)
	v.Wait("state=stopped", 30*time.Second)
	w.Perdure("a", "vm", "start", v.Name)
	v.Within(4*time.Minute, "clock")
	if v.Boot() == boot {
		t.Error("the guest was not started anew")
	}
	if again, err := os.ReadFile(nvram); err != nil || len(again) != len(first) {
		t.Errorf("UEFI variables after a restart: %d bytes, %v; they had %d", len(again), err, len(first))
	}
}

// checkTimeAfterPause lets a guest stand still for so long that its clock is set
// through its agent when it goes on.
func (v *VM) checkTimeAfterPause(host string) {
	w := v.w
	w.T.Helper()
	const stand = 3 * time.Second
	w.Perdure(host, "vm", "pause", v.Name)
	w.Never(stand, "a paused guest", func() error { return nil })
	w.Perdure(host, "vm", "resume", v.Name)
	w.Eventually(time.Minute, "the guest's clock is right again", func() error {
		if at, real, _ := v.guestClocks(); at.UnixNano()-int64(real) > int64(stand/2) {
			return fmt.Errorf("it is %v behind", time.Duration(at.UnixNano()-int64(real)))
		}
		return nil
	})
	w.Eventually(20*time.Second, "the event", func() error {
		if out := w.Perdure(host, "vm", "events", v.Name); !strings.Contains(out, "guest-time") {
			return fmt.Errorf("events:\n%s", out)
		}
		return nil
	})
}

// utf16 is how UEFI writes names.
func utf16(s string) []byte {
	var b []byte
	for _, c := range []byte(s) {
		b = append(b, c, 0)
	}
	return b
}
