package guest

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"perdure/internal/client"
	"perdure/internal/lab/guestsvc"
	"perdure/internal/testenv"
)

// vm is the guest under a plain QEMU, with ports forwarded.
type vm struct {
	addr map[int]string
	ser  string
	done chan struct{}
}

func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

func boot(t *testing.T, g Guest, disk string) *vm {
	t.Helper()
	qemu := testenv.QEMU(t)
	v := &vm{addr: map[int]string{}, ser: filepath.Join(t.TempDir(), "serial"), done: make(chan struct{})}
	netdev := "user,id=n0,restrict=on"
	for _, p := range []int{guestsvc.PortEcho, guestsvc.PortCounter, guestsvc.PortLog, guestsvc.PortControl} {
		v.addr[p] = fmt.Sprintf("127.0.0.1:%d", freePort(t))
		netdev += fmt.Sprintf(",hostfwd=tcp:%s-:%d", v.addr[p], p)
	}
	cmd := exec.Command(qemu, "-accel", "tcg", "-cpu", "max", "-M", "q35", "-m", "256", "-smp", "2", "-nodefaults", "-display", "none",
		"-kernel", g.Kernel, "-initrd", g.Initrd, "-append", AppendFor("10.0.2.15/24"), "-serial", "file:"+v.ser,
		"-drive", "file="+disk+",if=virtio,format=raw", "-netdev", netdev, "-device", "virtio-net-pci,netdev=n0,romfile=", "-device", "virtio-rng-pci")
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { defer close(v.done); cmd.Wait() }()
	t.Cleanup(func() { cmd.Process.Kill(); <-v.done })
	// A forwarded port accepts long before the guest does.
	for limit := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		b, _ := os.ReadFile(v.ser)
		if strings.Contains(string(b), "PERDURE-GUEST READY") {
			return v
		}
		if time.Now().After(limit) {
			t.Fatalf("the guest does not get ready; console:\n%s", b)
		}
	}
}

// TestGuestBoots boots the guest as people will, twice with the same disk.
func TestGuestBoots(t *testing.T) {
	testenv.QEMU(t)
	testenv.Slow(t)
	dir := t.TempDir()
	program := filepath.Join(dir, "perdure-guest")
	build := exec.Command("go", "build", "-o", program, "perdure/cmd/perdure-guest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the guest's program: %v: %s", err, out)
	}
	g, err := Build(t.Context(), Options{Dir: filepath.Join(dir, "guest"), Program: program})
	if err != nil {
		t.Fatal(err)
	}
	disk := filepath.Join(dir, "disk")
	f, err := os.Create(disk)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(64 << 20); err != nil {
		t.Fatal(err)
	}
	f.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()

	say := func(v *vm, cmd string) string {
		t.Helper()
		_, text, err := client.Control(ctx, nil, v.addr[guestsvc.PortControl], cmd)
		if err != nil {
			b, _ := os.ReadFile(v.ser)
			t.Fatalf("%s: %v; console:\n%s", cmd, err, b)
		}
		return text
	}
	v := boot(t, g, disk)
	if b := client.ParseFields(say(v, "boot")); b["fsck"] != "new" || b["clocksource"] != "tsc" {
		t.Errorf("first boot: %v", b)
	}
	count, err := client.StartCounter(ctx, client.Options{Addr: v.addr[guestsvc.PortCounter]})
	if err != nil {
		t.Fatal(err)
	}
	log, err := client.StartLog(ctx, client.Options{Addr: v.addr[guestsvc.PortLog]})
	if err != nil {
		t.Fatal(err)
	}
	say(v, "meter on")
	say(v, "dirty 10 1 16")
	if err := log.WaitAcked(ctx, 20); err != nil {
		t.Error(err)
	}
	if r, err := log.Verify(ctx); err != nil || !r.Clean() {
		t.Errorf("log: %v, %v", r, err)
	}
	if r := count.Stop(); !r.Clean() {
		t.Errorf("counter: %v", r)
	}
	if n := say(v, "meter"); n == "0" {
		t.Error("the meter stands still")
	}
	if s := say(v, "fsck"); s != "clean" {
		t.Errorf("fsck: %s", s)
	}
	acked := log.Abort().Acked
	console, err := os.ReadFile(v.ser)
	if err != nil || !strings.Contains(string(console), "PERDURE-GUEST READY") || !strings.Contains(string(console), "tick 1 ") {
		t.Errorf("console: %v\n%s", err, console)
	}
	client.Control(ctx, nil, v.addr[guestsvc.PortControl], "poweroff") // no answer: it is gone
	select {
	case <-v.done:
	case <-ctx.Done():
		t.Fatal("the guest does not power off")
	}

	v = boot(t, g, disk)
	if b := client.ParseFields(say(v, "boot")); b["fsck"] != "clean" {
		t.Errorf("second boot: %v", b)
	}
	lines, err := client.ListLog(ctx, nil, v.addr[guestsvc.PortLog])
	if err != nil || len(lines) < acked {
		t.Errorf("log after a reboot: %d lines of %d acknowledged, %v", len(lines), acked, err)
	}
}
