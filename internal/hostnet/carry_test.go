package hostnet

import (
	"encoding/binary"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"perdure/internal/testenv"
)

// run runs a command in the namespace of the calling thread.
func run(t testing.TB, args ...string) string {
	t.Helper()
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// port is a packet socket on a device.
func portSocket(t testing.TB, dev string) (fd, index int) {
	t.Helper()
	i, err := net.InterfaceByName(dev)
	check(t, err)
	fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	check(t, err)
	tv := unix.NsecToTimeval(int64(20 * time.Millisecond))
	check(t, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv))
	check(t, unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1))
	check(t, unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: 0x0300, Ifindex: i.Index})) // ETH_P_ALL
	t.Cleanup(func() { unix.Close(fd) })
	return fd, i.Index
}

var waySeq uint32

// crosses reports whether a frame put in at one port comes out at the other.
func crosses(t testing.TB, in, out string, group bool) bool {
	t.Helper()
	src, index := portSocket(t, in)
	dst, _ := portSocket(t, out)
	waySeq++
	f := make([]byte, 60)
	copy(f, []byte{0x02, 9, 9, 9, 9, 9, 0x02, 8, 8, 8, 8, byte(waySeq), 0x88, 0xb5})
	if group {
		copy(f, []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff})
	}
	binary.BigEndian.PutUint32(f[20:], waySeq)
	check(t, unix.Sendto(src, f, 0, &unix.SockaddrLinklayer{Ifindex: index, Halen: 6}))
	buf := make([]byte, 2048)
	for end := time.Now().Add(150 * time.Millisecond); time.Now().Before(end); {
		n, _, err := unix.Recvfrom(dst, buf, 0)
		if err == nil && n >= 24 && buf[12] == 0x88 && buf[13] == 0xb5 && binary.BigEndian.Uint32(buf[20:]) == waySeq {
			return true
		}
	}
	return false
}

// TestWays puts a bridge into every state and sees what passes: an uplink, a
// guest's port, and a port in the place of the client end.
func TestWays(t *testing.T) {
	inNetNS(t)
	testenv.Tool(t, "ip")
	testenv.Tool(t, "nft")
	run(t, "ip", "link", "add", "br0", "type", "bridge", "mcast_snooping", "0")
	for _, p := range []string{"uplink0", "vm", "pxcaa", "pxsaa", "pxcbb"} {
		run(t, "ip", "link", "add", p, "type", "veth", "peer", "name", "o"+p)
		run(t, "ip", "link", "set", "dev", p, "master", "br0", "up")
		run(t, "ip", "link", "set", "dev", "o"+p, "up")
	}
	run(t, "ip", "link", "set", "dev", "br0", "up")
	w, err := OpenWays()
	check(t, err)
	if _, ok, err := w.Get(); ok || err != nil {
		t.Fatalf("installed before Set: %v %v", ok, err)
	}
	expect := func(state string, sets WaySets, yes, no []string) {
		t.Helper()
		check(t, w.Set(sets))
		got, ok, err := w.Get()
		if err != nil || !ok || len(got.Shut) != len(sets.Shut) || len(got.Drain) != len(sets.Drain) || len(got.Uplinks) != len(sets.Uplinks) {
			t.Errorf("%s: read back %+v, %v, %v", state, got, ok, err)
		}
		for want, list := range map[bool][]string{true: yes, false: no} {
			for _, way := range list {
				from, to, _ := strings.Cut(way, ">")
				to, kind, _ := strings.Cut(to, "/")
				for _, group := range []bool{true, false} {
					if kind == "one" && group || kind == "all" && !group {
						continue
					}
					if crosses(t, "o"+from, "o"+to, group) != want {
						t.Errorf("%s: from %s to %s (to all: %v) should pass: %v", state, from, to, group, want)
					}
				}
			}
		}
	}
	static := []string{"pxcaa>uplink0", "uplink0>pxcaa", "pxcaa>pxsaa", "pxsaa>pxcaa", "pxcaa>pxcbb"}
	expect("own uplink", WaySets{Shut: []string{"pxcaa", "pxcbb"}, Uplinks: []string{"uplink0"}},
		[]string{"vm>uplink0", "uplink0>vm", "pxsaa>uplink0", "uplink0>pxsaa", "pxsaa>vm"}, append(static, "vm>pxcaa", "pxcaa>vm"))
	expect("carried", WaySets{Shut: []string{"uplink0", "pxcbb"}, Uplinks: []string{"uplink0"}},
		[]string{"vm>pxcaa", "pxcaa>vm"}, append(static, "vm>uplink0", "uplink0>vm"))
	expect("drain", WaySets{Drain: []string{"pxcaa"}, Shut: []string{"pxcbb"}, Uplinks: []string{"uplink0"}},
		[]string{"vm>uplink0", "uplink0>vm", "pxcaa>vm/one"}, append(static, "vm>pxcaa", "pxcaa>vm/all"))
	// All open by mistake: still nothing goes from one way out to another.
	expect("nothing shut", WaySets{Uplinks: []string{"uplink0"}}, []string{"vm>uplink0", "vm>pxcaa"}, static)
	run(t, "nft", "flush", "ruleset")
	if _, ok, err := w.Get(); ok || err != nil {
		t.Errorf("after a flush: installed %v, %v", ok, err)
	}
	check(t, w.Uninstall())
}

// TestTunnelEnds makes and removes both ends, and looks at what the bridge is after.
func TestTunnelEnds(t *testing.T) {
	inNetNS(t)
	testenv.Tool(t, "ip")
	testenv.Tool(t, "bridge")
	run(t, "ip", "link", "add", "br0", "type", "bridge")
	run(t, "ip", "link", "add", "uplink0", "type", "veth", "peer", "name", "ouplink0")
	run(t, "ip", "link", "set", "dev", "uplink0", "master", "br0", "up")
	run(t, "ip", "link", "set", "dev", "br0", "up")
	tun := Tunnel{Bridge: "br0", Client: "a", Server: "b", Port: 7403}
	check(t, tun.JoinClient([]string{"uplink0"}, net.ParseIP("10.0.0.2")))
	check(t, tun.JoinClient([]string{"uplink0"}, net.ParseIP("10.0.0.2"))) // again, as after a crash
	other := Tunnel{Bridge: "br0", Client: "c", Server: "a", Port: 7403}
	check(t, other.JoinServer(net.ParseIP("10.0.0.3")))
	ends, err := Ends()
	if err != nil || len(ends) != 2 {
		t.Fatalf("%+v, %v", ends, err)
	}
	for _, e := range ends {
		if want := map[bool]Tunnel{true: tun, false: other}[e.Client]; e.Tunnel != want || !e.Joined {
			t.Errorf("found %+v, want %+v", e, want)
		}
	}
	dests := func() string { return run(t, "bridge", "fdb", "show", "dev", tun.ClientName()) }
	if s := dests(); strings.Count(s, "dst ") != 1 || !strings.Contains(s, "dst 10.0.0.2") {
		t.Errorf("destinations: %s", s)
	}
	check(t, SetRemote(tun.ClientName(), net.ParseIP("10.0.1.2")))
	if s := dests(); strings.Count(s, "dst ") != 1 || !strings.Contains(s, "dst 10.0.1.2") {
		t.Errorf("destinations after the change: %s", s)
	}
	d := run(t, "ip", "-d", "link", "show", tun.ClientName())
	if !strings.Contains(d, "isolated on") || !strings.Contains(d, "mtu 1500") {
		t.Errorf("client end: %s", d)
	}
	if d := run(t, "ip", "-d", "link", "show", "uplink0"); !strings.Contains(d, "isolated on") {
		t.Errorf("uplink: %s", d)
	}
	if d := run(t, "ip", "link", "show", "br0"); !strings.Contains(d, "mtu 1500") {
		t.Errorf("the bridge's MTU changed: %s", d)
	}
	check(t, Leave(tun.ClientName(), []string{"uplink0"}))
	check(t, Leave(tun.ClientName(), []string{"uplink0", "gone"}))
	if d := run(t, "ip", "-d", "link", "show", "uplink0"); !strings.Contains(d, "isolated off") {
		t.Errorf("uplink afterwards: %s", d)
	}
}

func TestProbe(t *testing.T) {
	inNetNS(t)
	testenv.Tool(t, "ip")
	run(t, "ip", "link", "add", "uplink0", "type", "veth", "peer", "name", "far")
	run(t, "ip", "link", "set", "dev", "uplink0", "up")
	run(t, "ip", "link", "set", "dev", "far", "up")
	p, err := OpenProbe("uplink0", "a", []netip.Addr{netip.MustParseAddr("192.0.2.1")})
	check(t, err)
	defer unix.Close(p.fd)
	if !Carrier([]string{"none", "uplink0"}) || Carrier([]string{"none"}) {
		t.Error("Carrier")
	}
	far, _ := portSocket(t, "far")
	check(t, p.Ask())
	buf := make([]byte, 256)
	var asked []byte
	for end := time.Now().Add(2 * time.Second); asked == nil && time.Now().Before(end); {
		if n, _, err := unix.Recvfrom(far, buf, 0); err == nil && n >= 42 && buf[12] == 8 && buf[13] == 6 {
			asked = buf[:n]
		}
	}
	if asked == nil || net.IP(asked[38:42]).String() != "192.0.2.1" || net.IP(asked[28:32]).String() != "0.0.0.0" {
		t.Fatalf("asked % x", asked)
	}
	reply := append([]byte(nil), asked...)
	copy(reply, asked[6:12])
	copy(reply[6:], []byte{2, 1, 1, 1, 1, 1})
	reply[21] = 2
	copy(reply[28:], []byte{192, 0, 2, 1})
	if !p.answer(reply) {
		t.Error("an answer is not taken")
	}
	foreign := append([]byte(nil), reply...)
	foreign[31] = 9
	if p.answer(foreign) || p.answer(asked) || p.answer(reply[:20]) {
		t.Error("something else is taken for an answer")
	}
	run(t, "ip", "link", "set", "dev", "far", "down")
	if Carrier([]string{"uplink0"}) {
		t.Error("carrier after the other end went down")
	}
}
