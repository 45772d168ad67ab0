// Package qemutest starts QEMU with a guest made for tests: it boots in a
// tenth of a second and sends numbered frames, console lines and guest-agent
// lines (guest/guest.c.txt says what it understands). For tests only.
//
// Everything that is started ends with the test, also a failed one.
package qemutest

import (
	"context"
	_ "embed"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/vishvananda/netns"

	"perdure/internal/qemu"
	"perdure/internal/testenv"
)

//go:embed guest/guest.elf
var guestELF []byte

// Guest is a QEMU that a test runs.
type Guest struct {
	*qemu.Process
	Q       *qemu.QMP
	Dir     string
	Machine qemu.Machine
}

// Context ends with the test, and after a minute at the latest.
func Context(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// Machine is one with the test guest in it; command is its command line.
func Machine(t testing.TB, command string) qemu.Machine {
	dir := t.TempDir()
	kernel := filepath.Join(dir, "guest.elf")
	if err := os.WriteFile(kernel, guestELF, 0o600); err != nil {
		t.Fatal(err)
	}
	return qemu.Machine{Name: "t", UUID: "6f0b8c52-6f5a-4c0e-9a3b-1d2e3f405162", Type: "pc-q35-7.2", Accel: qemu.TCG,
		VCPUs: 1, Memory: 16 << 20, FT: true, QMPPath: filepath.Join(dir, "qmp"), Kernel: kernel, Append: command, Sandbox: true}
}

// Start runs a machine; its guest waits for Cont.
func Start(t testing.TB, m qemu.Machine, files ...*os.File) *Guest {
	t.Helper()
	path := testenv.QEMU(t)
	args, err := qemu.Args(m)
	if err != nil {
		t.Fatal(err)
	}
	ctx := Context(t)
	dir := filepath.Dir(m.QMPPath)
	p, err := qemu.Start(ctx, path, args, qemu.StartOptions{LogPath: filepath.Join(dir, "log"), Files: files})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Kill(); err != nil {
			t.Error(err)
		}
		<-p.Exited()
	})
	q, err := qemu.DialQMP(ctx, m.QMPPath, p.LogTail)
	if err != nil {
		t.Fatal(err, p.LogTail(2000))
	}
	t.Cleanup(func() { q.Close() })
	return &Guest{Process: p, Q: q, Dir: dir, Machine: m}
}

// NetNS puts the test's goroutine, on a thread of its own, into a network
// namespace of its own. QEMU processes that it starts are in there too.
func NetNS(t testing.TB) {
	t.Helper()
	testenv.Root(t)
	runtime.LockOSThread()
	old, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	ns, err := netns.New()
	testenv.Need(t, err == nil, "needs the right to make network namespaces")
	t.Cleanup(func() {
		ns.Close()
		if err := netns.Set(old); err != nil {
			t.Error(err) // the thread stays locked and ends with its goroutine
			return
		}
		old.Close()
		runtime.UnlockOSThread()
	})
}
