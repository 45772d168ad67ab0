package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"perdure/internal/testenv"
)

// stuckFile is a file on FUSE whose server never answers a write: the worst
// that a host can hold when its power goes.
type stuckFile struct{ fs.Inode }

func (*stuckFile) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, fuse.FOPEN_KEEP_CACHE, 0
}
func (*stuckFile) Getattr(_ context.Context, _ fs.FileHandle, o *fuse.AttrOut) syscall.Errno {
	o.Size, o.Mode = 1<<20, syscall.S_IFREG|0o600
	o.SetTimeout(time.Hour)
	return 0
}
func (*stuckFile) Read(_ context.Context, _ fs.FileHandle, b []byte, _ int64) (fuse.ReadResult, syscall.Errno) {
	return fuse.ReadResultData(make([]byte, len(b))), 0
}
func (*stuckFile) Write(context.Context, fs.FileHandle, []byte, int64) (uint32, syscall.Errno) {
	select {}
}
func (*stuckFile) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno { select {} }

// fuseMain is the host's program in TestPowerOffWithStuckFUSE: a server, and a
// second process that maps its file, dirties it and hangs in fdatasync.
func fuseMain(state string) {
	mnt := filepath.Join(state, "mem")
	if len(os.Args) > 3 { // the second process
		f, err := os.OpenFile(filepath.Join(mnt, "ram"), os.O_RDWR, 0)
		if err != nil {
			panic(err)
		}
		mem, err := unix.Mmap(int(f.Fd()), 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			panic(err)
		}
		for i := 0; i < len(mem); i += 4096 {
			mem[i] = 1
		}
		os.WriteFile(filepath.Join(state, "stuck"), nil, 0o644)
		unix.Fdatasync(int(f.Fd()))
		select {}
	}
	if err := os.MkdirAll(mnt, 0o700); err != nil {
		panic(err)
	}
	root := &fs.Inode{}
	_, err := fs.Mount(mnt, root, &fs.Options{
		MountOptions: fuse.MountOptions{DirectMount: true, FsName: "stuck"},
		OnAdd: func(ctx context.Context) {
			root.AddChild("ram", root.NewPersistentInode(ctx, &stuckFile{}, fs.StableAttr{Mode: syscall.S_IFREG, Ino: 2}), false)
		},
	})
	if err != nil {
		panic(err)
	}
	c := exec.Command("/proc/self/exe", "fuse", state, "writer")
	c.Stderr = os.Stderr
	if err := c.Run(); err != nil {
		panic(err)
	}
}

func connections(t *testing.T) []string {
	t.Helper()
	ents, err := os.ReadDir("/sys/fs/fuse/connections")
	if err != nil {
		t.Fatalf("list connections of FUSE: %v", err)
	}
	var out []string
	for _, e := range ents {
		out = append(out, e.Name())
	}
	return out
}

// mountFusectl makes the connections visible to the test where nobody has done so.
func mountFusectl(t *testing.T) {
	t.Helper()
	const dir = "/sys/fs/fuse/connections"
	switch err := unix.Mount("fusectl", dir, "fusectl", 0, ""); {
	case err == nil:
		t.Cleanup(func() {
			if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
				t.Error(err)
			}
		})
	case !errors.Is(err, unix.EBUSY): // busy: it is mounted
		t.Fatalf("mount fusectl: %v", err)
	}
}

func TestPowerOffWithStuckFUSE(t *testing.T) {
	testenv.Root(t)
	_, err := os.Stat("/dev/fuse")
	testenv.Need(t, err == nil, "needs /dev/fuse")
	mountFusectl(t)
	l := up(t, Options{Hosts: 1, Agent: Program{Args: []string{"perdure", "fuse", "{state}"}}})
	ctx := testContext(t)
	for _, hang := range []bool{false, true} {
		stuck := filepath.Join(l.StateDir("a"), "stuck")
		if err := waitFile(ctx, stuck); err != nil {
			t.Fatal(err)
		}
		var mine []mount
		ps, err := l.Processes("a")
		if err != nil || len(ps) < 3 {
			t.Fatalf("processes of the host: %v, %v", ps, err)
		}
		ms, err := readMounts(fmt.Sprintf("/proc/%d/mountinfo", ps[0].PID))
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range ms {
			if m.point == filepath.Join(l.StateDir("a"), "mem") {
				mine = append(mine, m)
			}
		}
		if len(mine) != 1 || !slices.Contains(connections(t), fmt.Sprint(mine[0].minor)) {
			t.Fatalf("FUSE mount in the host: %+v of %v", mine, connections(t))
		}
		if hang {
			if err := l.Freeze(ctx, "a"); err != nil {
				t.Fatal(err)
			}
		}
		start := time.Now()
		if err := l.PowerOff(ctx, "a"); err != nil {
			t.Fatal(err)
		}
		t.Logf("power-off took %v", time.Since(start))
		if slices.Contains(connections(t), fmt.Sprint(mine[0].minor)) {
			t.Error("the FUSE connection is still there")
		}
		if err := os.Remove(stuck); err != nil {
			t.Fatal(err)
		}
		if err := l.PowerOn(ctx, "a"); err != nil {
			t.Fatal(err)
		}
	}
}

// sendAs sends one broadcast frame with a foreign sender from a host's card.
func sendAs(t *testing.T, l *Lab, host string, mac net.HardwareAddr) {
	t.Helper()
	err := l.InNetNS(host, func() error {
		card, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		frame := make([]byte, 60)
		copy(frame, []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff})
		copy(frame[6:], mac)
		frame[12], frame[13] = 0x88, 0xb5 // for experiments
		return unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: card.Index})
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestSnifferTellsWhoSends(t *testing.T) {
	l := up(t, Options{Hosts: 2})
	ctx := testContext(t)
	vm, other := net.HardwareAddr{0x52, 0x54, 0, 1, 2, 3}, net.HardwareAddr{0x52, 0x54, 0, 1, 2, 4}
	s, err := l.Sniff(vm, other)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	see := func(host string, mac net.HardwareAddr) {
		t.Helper()
		for {
			sendAs(t, l, host, mac)
			once, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
			err := s.WaitFrame(once, mac, host)
			cancel()
			if err == nil {
				return
			}
			if ctx.Err() != nil { // a card that was just plugged in drops frames for a moment
				t.Fatal(err)
			}
		}
	}
	see("a", vm)
	see("a", vm)
	see("b", other)
	see("b", vm)
	sendAs(t, l, "b", net.HardwareAddr{0x52, 0x54, 9, 9, 9, 9})
	see("a", vm) // the zombie's frame that must not go unnoticed
	if got := Moves(s.Stays(vm)); !slices.Equal(got, []string{"a", "b", "a"}) {
		t.Errorf("moves: %v", s.Stays(vm))
	}
	if got := s.Stays(other); len(got) != 1 || got[0].Host != "b" {
		t.Errorf("stays of the other: %v", got)
	}

	// A host that was off and on again has a new port.
	if err := l.PowerOff(ctx, "b"); err != nil {
		t.Fatal(err)
	}
	if err := l.PowerOn(ctx, "b"); err != nil {
		t.Fatal(err)
	}
	see("b", vm)
	// What a host sends while its link is down is not on the LAN.
	if err := l.SetLink("a", LAN, false); err != nil {
		t.Fatal(err)
	}
	n := len(s.Stays(vm))
	see("b", other)
	if len(s.Stays(vm)) != n {
		t.Errorf("frames through a dead link: %v", s.Stays(vm))
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}
