package qemutest_test

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"perdure/internal/qemu"
	"perdure/internal/qemu/qemutest"
	"perdure/internal/testenv"
)

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// console is the test's end of the guest's serial port.
func console(t *testing.T, m *qemu.Machine) func() net.Conn {
	m.SerialPath = filepath.Join(filepath.Dir(m.QMPPath), "serial")
	l, err := net.Listen("unix", m.SerialPath)
	check(t, err)
	t.Cleanup(func() { l.Close() })
	return func() net.Conn {
		c, err := l.Accept()
		check(t, err)
		t.Cleanup(func() { c.Close() })
		return c
	}
}

func await(t *testing.T, ctx context.Context, q *qemu.QMP, name string) {
	t.Helper()
	for {
		select {
		case e, ok := <-q.Events():
			if !ok {
				t.Fatal("QEMU ended before the event ", name)
			}
			if e.Name == name {
				return
			}
		case <-ctx.Done():
			t.Fatal("no event ", name)
		}
	}
}

// TestReasonsToStandStill: a guest that stopped for a reason of its own is
// told from one that Stop has stopped.
func TestReasonsToStandStill(t *testing.T) {
	for code, c := range map[byte]struct{ event, status string }{
		1: {"GUEST_PANICKED", qemu.StatusGuestPanicked},
		2: {"SHUTDOWN", qemu.StatusShutdown},
		3: {"RESET", qemu.StatusPaused},
	} {
		t.Run(c.event, func(t *testing.T) {
			ctx := qemutest.Context(t)
			m := qemutest.Machine(t, "")
			accept := console(t, &m)
			g := qemutest.Start(t, m)
			check(t, g.Q.Cont(ctx))
			con := accept()
			// Until then the firmware listens.
			for r := bufio.NewReader(con); ; {
				l, err := r.ReadString('\n')
				check(t, err)
				if strings.Contains(l, "guest up") {
					break
				}
			}
			_, err := con.Write([]byte{code})
			check(t, err)
			await(t, ctx, g.Q, c.event)
			if c.event != "RESET" {
				await(t, ctx, g.Q, "STOP")
			}
			st, err := g.Q.Stop(ctx)
			check(t, err)
			if st.Status != c.status || st.WasRunning != (c.event == "RESET") {
				t.Errorf("Stop says %+v", st)
			}
			err = g.Q.Cont(ctx)
			if c.event == "SHUTDOWN" && err == nil {
				t.Error("a guest that has powered off goes on")
			}
		})
	}
}

// TestWholeMachine has every device that the product gives a guest, on both
// kinds of machine, and moves it to a second QEMU with its memory.
func TestWholeMachine(t *testing.T) {
	nbd := testenv.Tool(t, "qemu-nbd")
	for _, typ := range []string{"pc-q35-7.2", "pc-i440fx-7.2"} {
		for _, modern := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s modern %v", typ, modern), func(t *testing.T) {
				qemutest.NetNS(t)
				wholeMachine(t, nbd, typ, modern)
			})
		}
	}
}

func wholeMachine(t *testing.T, nbd, typ string, modern bool) {
	ctx := qemutest.Context(t)
	shm, err := os.MkdirTemp("/dev/shm", "perdure-qemu-")
	check(t, err)
	t.Cleanup(func() { os.RemoveAll(shm) })
	build := func(side string) qemu.Machine {
		m := qemutest.Machine(t, "frames serial agent")
		dir := filepath.Dir(m.QMPPath)
		m.Type, m.VCPUs, m.ModernVirtio, m.MemPath = typ, 2, modern, filepath.Join(shm, side)
		m.SerialPath, m.AgentPath, m.VNCPath = filepath.Join(dir, "serial"), filepath.Join(dir, "agent"), filepath.Join(dir, "vnc")
		for i := range 2 {
			tap := &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: fmt.Sprintf("tap-%s%d", side, i)}, Mode: netlink.TUNTAP_MODE_TAP}
			check(t, netlink.LinkAdd(tap))
			check(t, netlink.LinkSetUp(tap))
			m.NICs = append(m.NICs, qemu.NIC{ID: fmt.Sprintf("net%d", i), Tap: tap.Name, MAC: fmt.Sprintf("52:54:00:00:00:%02x", i)})
			d := qemu.Disk{ID: fmt.Sprintf("disk%d", i), Export: "x", Socket: filepath.Join(dir, fmt.Sprintf("nbd%d", i)), BootIndex: i + 1}
			serveNBD(t, nbd, filepath.Join(dir, d.ID), d.Socket)
			m.Disks = append(m.Disks, d)
		}
		return m
	}
	m := build("a")
	a := qemutest.Start(t, m)
	check(t, a.Q.Cont(ctx))
	time.Sleep(300 * time.Millisecond) // let it get somewhere
	why, err := a.Q.Protectable(ctx)
	check(t, err)
	if len(why) > 0 {
		t.Error("cannot be protected:", why)
	}
	disks, err := a.Q.QueryDisks(ctx)
	check(t, err)
	if len(disks) != 2 || disks["disk0"] != qemu.DiskOK || disks["disk1"] != qemu.DiskOK {
		t.Error("disks:", disks)
	}
	check(t, a.Q.SetLink(ctx, "net0", false))
	check(t, a.Q.SetLink(ctx, "net0", true))
	check(t, a.Q.AnnounceSelf(ctx, time.Second))
	check(t, a.Q.SystemPowerdown(ctx)) // of no interest to this guest

	var save, stop, cont []time.Duration
	var state []byte
	for range 50 {
		t0 := time.Now()
		_, err = a.Q.Stop(ctx)
		check(t, err)
		t1 := time.Now()
		state, err = a.Q.SaveDevices(ctx, state)
		check(t, err)
		t2 := time.Now()
		check(t, a.Q.Cont(ctx))
		stop, save, cont = append(stop, t1.Sub(t0)), append(save, t2.Sub(t1)), append(cont, time.Since(t2))
	}
	t.Logf("device state %d bytes; medians: stop %v, save %v, cont %v", len(state), median(stop), median(save), median(cont))
	_, state, err = a.Q.StopAndSave(ctx, state, nil)
	check(t, err)

	// What QEMU says its memory is, is what the file holds.
	dump := filepath.Join(a.Dir, "dump")
	check(t, a.Q.PMemSave(ctx, 1<<20, 4<<20, dump))
	got, err := os.ReadFile(dump)
	check(t, err)
	ram, err := os.ReadFile(m.MemPath)
	check(t, err)
	if !bytes.Equal(got, ram[1<<20:5<<20]) {
		t.Error("pmemsave and the memory file differ")
	}

	// A scratch QEMU takes the state and leaves the memory file alone.
	scratch := build("s")
	scratch.MemPath, scratch.Private, scratch.Incoming = m.MemPath, true, true
	tried := time.Now()
	s := qemutest.Start(t, scratch)
	check(t, s.Q.LoadDevices(ctx, state))
	check(t, s.Q.Cont(ctx)) // a real one never runs
	t.Logf("tried in %v", time.Since(tried))
	time.Sleep(50 * time.Millisecond)
	if again, err := os.ReadFile(m.MemPath); err != nil || !bytes.Equal(again, ram) {
		t.Error("the scratch QEMU has written to the memory file", err)
	}

	n := build("b")
	n.Incoming = true
	check(t, os.WriteFile(n.MemPath, ram, 0o600))
	b := qemutest.Start(t, n)
	began := time.Now()
	check(t, b.Q.LoadDevices(ctx, state))
	check(t, b.Q.Cont(ctx))
	t.Logf("taken over in %v", time.Since(began))
	if s, running, err := b.Q.Status(ctx); err != nil || !running {
		t.Error(s, err)
	}
	for _, l := range strings.Split(b.LogTail(4000), "\n") {
		if l != "" && !strings.Contains(l, "Unable to connect character device") { // nobody listens here
			t.Error("QEMU complains:", l)
		}
	}
}

func median(d []time.Duration) time.Duration {
	sort.Slice(d, func(i, j int) bool { return d[i] < d[j] })
	return d[len(d)/2]
}

func serveNBD(t *testing.T, nbd, image, socket string) {
	t.Helper()
	f, err := os.Create(image)
	check(t, err)
	check(t, f.Truncate(16<<20))
	check(t, f.Close())
	serveNBDFile(t, nbd, image, socket)
}

func serveNBDFile(t *testing.T, nbd, image, socket string) {
	t.Helper()
	cmd := exec.Command(nbd, "-f", "raw", "-k", socket, "-x", "x", "-t", "-e", "4", image)
	check(t, cmd.Start())
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if _, err := os.Stat(socket); err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatal("qemu-nbd does not listen")
		}
	}
}

// TestDying: the end of QEMU is known when its first thread has gone, and no
// command waits for the rest of it.
func TestDying(t *testing.T) {
	ctx := qemutest.Context(t)
	m := qemutest.Machine(t, "")
	m.Memory = 1 << 30 // takes a while to take down
	g := qemutest.Start(t, m)
	tids, err := g.Q.VCPUThreads(ctx)
	check(t, err)
	if len(tids) != m.VCPUs {
		t.Fatalf("%d vCPU threads, want %d", len(tids), m.VCPUs)
	}
	g.WatchThreads(append(tids, g.PID()))
	check(t, g.Q.Cont(ctx))
	select {
	case <-g.Dying():
		t.Fatal("called dying while it runs")
	case <-time.After(50 * time.Millisecond):
	}
	began := time.Now()
	check(t, g.Kill())
	select {
	case <-g.Dying():
	case <-ctx.Done():
		t.Fatal("the end was not noticed")
	}
	dying := time.Since(began)
	g.Q.Abort()
	if err := g.Q.Cont(ctx); err == nil {
		t.Error("a dead QEMU goes on")
	}
	if _, err := g.Wait(ctx); err != nil {
		t.Fatal(err)
	}
	t.Logf("known to die after %v, ended after %v", dying, time.Since(began))
	g.WatchThreads(tids) // of a process that is gone: nothing to watch
}
