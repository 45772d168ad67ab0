package qemutest_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"perdure/internal/qemu"
	"perdure/internal/qemu/qemutest"
	"perdure/internal/testenv"
)

// TestHotplug gives a running guest a disk, and has a QEMU that was started with
// that disk load its state; it exchanges the disk for a larger one, and asks a
// guest that knows nothing of hot-plug to let go of it.
func TestHotplug(t *testing.T) {
	nbd := testenv.Tool(t, "qemu-nbd")
	for _, modern := range []bool{false, true} {
		t.Run(fmt.Sprintf("modern %v", modern), func(t *testing.T) { hotplug(t, nbd, modern) })
	}
}

func hotplug(t *testing.T, nbd string, modern bool) {
	ctx := qemutest.Context(t)
	shm, err := os.MkdirTemp("/dev/shm", "perdure-qemu-")
	check(t, err)
	t.Cleanup(func() { os.RemoveAll(shm) })
	build := func(side string, slots ...int) qemu.Machine {
		m := qemutest.Machine(t, "")
		m.Type, m.ModernVirtio, m.MemPath = "pc-i440fx-7.2", modern, filepath.Join(shm, side)
		for i, s := range slots {
			m.Disks = append(m.Disks, disk(t, nbd, filepath.Dir(m.QMPPath), fmt.Sprintf("disk%d", i), s))
		}
		return m
	}
	m := build("a", 0x10)
	a := qemutest.Start(t, m)
	check(t, a.Q.Cont(ctx))
	plug := disk(t, nbd, a.Dir, "disk1", 0x15)
	check(t, a.Q.PlugDisk(ctx, &m, plug))
	check(t, a.Q.Cont(ctx))
	if err := a.Q.PlugDisk(ctx, &m, disk(t, nbd, a.Dir, "disk2", 0x15)); err == nil {
		t.Error("two disks in one slot")
	}
	disks, err := a.Q.QueryDisks(ctx)
	check(t, err)
	if len(disks) != 2 || disks["disk1"] != qemu.DiskOK {
		t.Error("disks:", disks)
	}
	why, err := a.Q.Protectable(ctx)
	check(t, err)
	if len(why) > 0 {
		t.Error("cannot be protected:", why)
	}

	larger := disk(t, nbd, a.Dir, "disk1", 0x15)
	check(t, os.WriteFile(filepath.Join(a.Dir, "big"), nil, 0o600))
	check(t, os.Truncate(filepath.Join(a.Dir, "big"), 32<<20))
	_, err = a.Q.Stop(ctx)
	check(t, err)
	larger.Socket = filepath.Join(a.Dir, "big.sock")
	serveNBDFile(t, nbd, filepath.Join(a.Dir, "big"), larger.Socket)
	check(t, a.Q.SwapDisk(ctx, larger, 32<<20))
	disks, err = a.Q.QueryDisks(ctx)
	check(t, err)
	if len(disks) != 2 || disks["disk1"] != qemu.DiskOK {
		t.Error("disks after the exchange:", disks)
	}
	check(t, a.Q.SwapDisk(ctx, larger, 32<<20)) // and back to the other node
	check(t, a.Q.Cont(ctx))

	_, state, err := a.Q.StopAndSave(ctx, nil, nil)
	check(t, err)
	ram, err := os.ReadFile(m.MemPath)
	check(t, err)
	n := build("b", 0x10, 0x15)
	n.Incoming = true
	check(t, os.WriteFile(n.MemPath, ram, 0o600))
	b := qemutest.Start(t, n)
	check(t, b.Q.LoadDevices(ctx, state))
	check(t, b.Q.Cont(ctx))
	for _, l := range strings.Split(b.LogTail(4000), "\n") {
		if l != "" {
			t.Error("QEMU complains:", l)
		}
	}
	// One that has the disk elsewhere must refuse the state: else the test above shows nothing.
	o := build("c", 0x10, 0x16)
	o.Incoming = true
	check(t, os.WriteFile(o.MemPath, ram, 0o600))
	c := qemutest.Start(t, o)
	if err := c.Q.LoadDevices(ctx, state); err == nil {
		t.Error("a QEMU with the disk at another slot takes the state")
	}

	check(t, a.Q.Cont(ctx))
	if err := a.Q.UnplugDisk(ctx, &m, "disk1", 500*time.Millisecond); !errors.Is(err, qemu.ErrNotReleased) {
		t.Error("a guest without hot-plug lets go:", err)
	}
}

func TestNoHotplugOnQ35(t *testing.T) {
	nbd := testenv.Tool(t, "qemu-nbd")
	ctx := qemutest.Context(t)
	m := qemutest.Machine(t, "")
	m.Disks = []qemu.Disk{disk(t, nbd, filepath.Dir(m.QMPPath), "disk1", 0x11)}
	g := qemutest.Start(t, m)
	// Another size needs no hot-plug.
	check(t, g.Q.SwapDisk(ctx, disk(t, nbd, g.Dir, "disk1", 0x11), 16<<20))
	if err := g.Q.PlugDisk(ctx, &m, qemu.Disk{ID: "disk0", Socket: "/x", Slot: 0x10}); !errors.Is(err, qemu.ErrNoHotplug) {
		t.Error(err)
	}
	if err := g.Q.UnplugDisk(ctx, &m, "disk0", time.Second); !errors.Is(err, qemu.ErrNoHotplug) {
		t.Error(err)
	}
}

var served int

func disk(t *testing.T, nbd, dir, id string, slot int) qemu.Disk {
	t.Helper()
	served++
	d := qemu.Disk{ID: id, Export: "x", Socket: filepath.Join(dir, fmt.Sprintf("nbd%d", served)), Slot: slot, BootIndex: slot - 0xf}
	serveNBD(t, nbd, filepath.Join(dir, fmt.Sprintf("image%d", served)), d.Socket)
	return d
}
