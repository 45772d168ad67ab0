package hostnet

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"sort"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"perdure/internal/testenv"
)

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// inNetNS puts the test on a thread in a network namespace of its own.
func inNetNS(t testing.TB) {
	t.Helper()
	testenv.Root(t)
	runtime.LockOSThread()
	old, err := netns.Get()
	check(t, err)
	ns, err := netns.New()
	testenv.Need(t, err == nil, "needs the right to make network namespaces")
	t.Cleanup(func() {
		ns.Close()
		check(t, netns.Set(old))
		old.Close()
		runtime.UnlockOSThread()
	})
}

// field is a bridge with a tap, into which the test sends frames as a guest
// would, and a listener on another port.
type field struct {
	gate *Gate
	tap  string
	in   *os.File // the guest's end of the tap
	out  int      // packet socket on the far end of a veth
	seq  uint32
}

func newField(t testing.TB, tap string) *field {
	t.Helper()
	inNetNS(t)
	f := &field{tap: tap}
	made, err := EnsureBridge("br0")
	check(t, err)
	if !made {
		t.Error("bridge was there before")
	}
	check(t, CreateTap(tap, "br0", "test, net0"))
	f.in = openTap(t, tap)
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "port"}, PeerName: "far"}
	check(t, netlink.LinkAdd(veth))
	br, err := netlink.LinkByName("br0")
	check(t, err)
	for _, n := range []string{"port", "far"} {
		l, err := netlink.LinkByName(n)
		check(t, err)
		if n == "port" {
			check(t, netlink.LinkSetMaster(l, br))
		} else {
			f.out = listen(t, l.Attrs().Index)
		}
		check(t, netlink.LinkSetUp(l))
	}
	// Without a gate frames pass, once all ports are up.
	for end := time.Now().Add(10 * time.Second); !f.passes(t, 20*time.Millisecond); {
		if time.Now().After(end) {
			t.Fatal("nothing passes though there is no gate")
		}
	}
	g, err := OpenGate()
	if err == nil {
		err = g.Install()
	}
	testenv.Need(t, err == nil, fmt.Sprint("needs nftables for bridges in the kernel: ", err))
	t.Cleanup(func() { g.Close() })
	f.gate = g
	return f
}

func openTap(t testing.TB, name string) *os.File {
	t.Helper()
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	check(t, err)
	ifr, err := unix.NewIfreq(name)
	check(t, err)
	ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
	check(t, unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr))
	f := os.NewFile(uintptr(fd), "tun")
	t.Cleanup(func() { f.Close() })
	return f
}

func listen(t testing.TB, index int) int {
	t.Helper()
	proto := int(binary.NativeEndian.Uint16([]byte{0x88, 0xb5}))
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, proto)
	check(t, err)
	check(t, unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: uint16(proto), Ifindex: index}))
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// passes sends one frame and reports whether it comes out within the time.
func (f *field) passes(t testing.TB, within time.Duration) bool {
	t.Helper()
	f.seq++
	frame := make([]byte, 60)
	copy(frame, "\xff\xff\xff\xff\xff\xff\x02\x00\x00\x00\x00\x01\x88\xb5")
	binary.BigEndian.PutUint32(frame[14:], f.seq)
	_, err := f.in.Write(frame)
	check(t, err)
	b := make([]byte, 100)
	for end := time.Now().Add(within); ; {
		left := time.Until(end)
		if left <= 0 {
			return false
		}
		tv := unix.NsecToTimeval(max(left, time.Microsecond).Nanoseconds())
		check(t, unix.SetsockoptTimeval(f.out, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv))
		n, _, err := unix.Recvfrom(f.out, b, 0)
		if err == nil && n >= 18 && binary.BigEndian.Uint32(b[14:]) == f.seq {
			return true
		}
		if err == nil && n >= 18 && binary.BigEndian.Uint32(b[14:]) > f.seq {
			t.Fatal("a frame from the future")
		}
	}
}

const tap0 = "pd0123456789a00"

func TestGate(t *testing.T) {
	f := newField(t, tap0)
	g := f.gate
	check(t, g.Check())
	if f.passes(t, 50*time.Millisecond) {
		t.Fatal("a frame passed a gate that nobody opened")
	}
	check(t, g.Open([]string{tap0}, 300*time.Millisecond))
	opened := time.Now()
	if !f.passes(t, time.Second) {
		t.Fatal("nothing passes an open gate")
	}
	st, err := g.State()
	check(t, err)
	if d := st[tap0]; d <= 0 || d > 300*time.Millisecond {
		t.Errorf("state %v", st)
	}
	// Renewed, it stays open beyond the first timeout …
	for time.Since(opened) < 500*time.Millisecond {
		check(t, g.Open([]string{tap0}, 300*time.Millisecond))
		if !f.passes(t, time.Second) {
			t.Fatal("shut in spite of renewals, after ", time.Since(opened))
		}
		time.Sleep(20 * time.Millisecond)
	}
	// … and shuts by itself.
	last := time.Now()
	check(t, g.Open([]string{tap0}, 300*time.Millisecond))
	var passed time.Duration
	for time.Since(last) < 500*time.Millisecond {
		if at := time.Since(last); f.passes(t, 10*time.Millisecond) {
			passed = at
		}
	}
	// The lower bound is generous: this machine may be busy. The upper one is the rule.
	if passed < 200*time.Millisecond || passed > 300*time.Millisecond+10*time.Millisecond {
		t.Errorf("the last frame passed %v after the last renewal, which was for 300 ms", passed)
	}
	// A shorter time shortens; Shut shuts at once, again and again.
	check(t, g.Open([]string{tap0}, time.Hour))
	check(t, g.Open([]string{tap0}, 100*time.Millisecond))
	time.Sleep(130 * time.Millisecond)
	if f.passes(t, 50*time.Millisecond) {
		t.Error("a shorter time did not shorten")
	}
	check(t, g.Open([]string{tap0}, time.Hour))
	check(t, g.Install()) // leaves it open
	if !f.passes(t, time.Second) {
		t.Error("Install shut the gate")
	}
	check(t, g.Shut([]string{tap0}))
	check(t, g.Shut([]string{tap0}))
	if f.passes(t, 50*time.Millisecond) {
		t.Error("open after Shut")
	}
	if st, err := g.State(); err != nil || len(st) != 0 {
		t.Error(st, err)
	}
	for _, d := range []time.Duration{0, -time.Second, 2 * time.Hour} {
		if g.Open([]string{tap0}, d) == nil {
			t.Errorf("opened for %v", d)
		}
	}
}

// TestRenewalIsSeamless: deleting and adding an element in one transaction
// leaves no moment in which the tap is shut.
func TestRenewalIsSeamless(t *testing.T) {
	f := newField(t, tap0)
	check(t, f.gate.Open([]string{tap0}, time.Second))
	quit, done := make(chan struct{}), make(chan error, 1)
	renewals := 0
	go func() {
		for {
			select {
			case <-quit:
				done <- nil
				return
			default:
			}
			if err := f.gate.Open([]string{tap0}, time.Second); err != nil {
				done <- err
				return
			}
			renewals++
		}
	}()
	for i := range 2000 {
		if !f.passes(t, 2*time.Second) {
			t.Errorf("frame %d was dropped during renewals", i)
		}
	}
	close(quit)
	check(t, <-done)
	t.Log(renewals, "renewals")
}

func TestGateOfOthersTaps(t *testing.T) {
	f := newField(t, tap0)
	check(t, f.gate.Open([]string{"pd0123456789a01", "pd0123456789a0"}, time.Minute))
	if f.passes(t, 50*time.Millisecond) {
		t.Error("opened by the name of another tap")
	}
}

func TestGateLeavesOtherDevicesAlone(t *testing.T) {
	f := newField(t, "vnet0")
	if !f.passes(t, time.Second) {
		t.Error("the gate holds a device that is not the product's")
	}
}

func TestGateReinstalled(t *testing.T) {
	f := newField(t, tap0)
	check(t, f.gate.Uninstall())
	check(t, f.gate.Uninstall())
	if f.gate.Check() == nil {
		t.Error("Check misses nothing")
	}
	if err := f.gate.Open([]string{tap0}, time.Minute); !errors.Is(err, ErrReinstalled) {
		t.Error(err)
	}
	check(t, f.gate.Check())
	if !f.passes(t, time.Second) {
		t.Error("not open after it was put back")
	}
}

// childEnv makes the test binary a process that only renews the gate.
const childEnv = "PERDURE_HOSTNET_RENEW"

func TestMain(m *testing.M) {
	if tap := os.Getenv(childEnv); tap != "" {
		g, err := OpenGate()
		if err != nil {
			panic(err)
		}
		for {
			if err := g.Open([]string{tap}, 200*time.Millisecond); err != nil {
				panic(err)
			}
			fmt.Println("renewed")
			time.Sleep(50 * time.Millisecond)
		}
	}
	os.Exit(m.Run())
}

// TestFrozenRenewer: the rule that a frozen, killed or swapped-out shim is
// mute without anybody acting.
func TestFrozenRenewer(t *testing.T) {
	f := newField(t, tap0)
	child := exec.Command(os.Args[0])
	child.Env = append(os.Environ(), childEnv+"="+tap0)
	out, err := child.StdoutPipe()
	check(t, err)
	check(t, child.Start()) // on this thread, so in its namespace
	defer func() { child.Process.Kill(); child.Wait() }()
	r := bufio.NewScanner(out)
	for i := 0; i < 8 && r.Scan(); i++ {
		if !f.passes(t, time.Second) {
			t.Fatal("shut while it is renewed")
		}
	}
	check(t, child.Process.Signal(syscall.SIGSTOP))
	frozen := time.Now()
	for f.passes(t, 10*time.Millisecond) {
		if time.Since(frozen) > 2*time.Second {
			t.Fatal("open though the renewing process is frozen")
		}
	}
	t.Logf("shut %v after the freeze, asked for 200 ms", time.Since(frozen))
	if f.passes(t, 100*time.Millisecond) {
		t.Error("opened again by itself")
	}
	check(t, child.Process.Signal(syscall.SIGCONT))
	for end := time.Now().Add(5 * time.Second); !f.passes(t, 20*time.Millisecond); {
		if time.Now().After(end) {
			t.Fatal("does not open again after the thaw")
		}
	}
}

func TestRenewalCost(t *testing.T) {
	f := newField(t, tap0)
	for _, n := range []int{1, 4} {
		var taps []string
		for i := range n {
			taps = append(taps, TapName("cost", i))
		}
		var d []time.Duration
		for range 500 {
			began := time.Now()
			check(t, f.gate.Open(taps, 300*time.Millisecond))
			d = append(d, time.Since(began))
		}
		sort.Slice(d, func(i, j int) bool { return d[i] < d[j] })
		t.Logf("renewal of %d taps: median %v p99 %v", n, d[250], d[495])
	}
}

func TestTaps(t *testing.T) {
	inNetNS(t)
	_, err := EnsureBridge("br0")
	check(t, err)
	made, err := EnsureBridge("br0")
	if err != nil || made {
		t.Error(made, err)
	}
	check(t, CreateTap(tap0, "br0", "db1 net0"))
	check(t, CreateTap(tap0, "br0", "db1 net0"))
	l, err := netlink.LinkByName(tap0)
	check(t, err)
	br, err := netlink.LinkByName("br0")
	check(t, err)
	if a := l.Attrs(); a.MasterIndex != br.Attrs().Index || a.Alias != "db1 net0" || a.Flags&unix.IFF_UP == 0 {
		t.Errorf("tap: %+v", a)
	}
	check(t, CreateTap(tap0, "", ""))
	if l, err = netlink.LinkByName(tap0); err != nil || l.Attrs().MasterIndex != 0 {
		t.Error("still on a bridge:", err)
	}
	if err := CreateTap("pd0", "none", ""); err == nil {
		t.Error("joined a bridge that is not there")
	}
	if err := CreateTap("pd0", tap0, ""); err == nil {
		t.Error("joined a bridge that is a tap")
	}
	if err := CreateTap("br0", "", ""); err == nil {
		t.Error("took a bridge for a tap")
	}
	if _, err := netlink.LinkByName("pd0"); err == nil {
		t.Error("a failed CreateTap left its tap")
	}
	if err := DeleteTap("br0"); err == nil {
		t.Error("deleted a bridge")
	}
	check(t, DeleteTap(tap0))
	check(t, DeleteTap(tap0))
	if CheckBridge("br0") != nil || CheckBridge("br1") == nil {
		t.Error("CheckBridge")
	}
}

func TestTapName(t *testing.T) {
	seen := map[string]bool{}
	for _, u := range []string{"6f0b8c52-6f5a-4c0e-9a3b-1d2e3f405162", "6f0b8c52-6f5a-4c0e-9a3b-1d2e3f405163"} {
		for i := range 256 {
			n := TapName(u, i)
			if len(n) != 15 || !strings.HasPrefix(n, "pd") || seen[n] {
				t.Fatal(n)
			}
			seen[n] = true
		}
	}
}
