package hostnet

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"perdure/internal/testenv"
)

// site is two hosts on one LAN, each with a bridge, an uplink and an A-link, a
// guest behind a's bridge, and a client on the LAN.
type site struct {
	t  testing.TB
	ns map[string]netns.NsHandle
}

// in runs f in a namespace; the thread is locked.
func (s *site) in(name string, f func()) {
	s.t.Helper()
	old, err := netns.Get()
	check(s.t, err)
	defer old.Close()
	check(s.t, netns.Set(s.ns[name]))
	defer func() { check(s.t, netns.Set(old)) }()
	f()
}

func (s *site) wire(nsA, a, nsB, b string, mtu int) {
	s.t.Helper()
	s.in(nsA, func() {
		run(s.t, "ip", "link", "add", "tmp0", "type", "veth", "peer", "name", "tmp1")
		l, err := netlink.LinkByName("tmp1")
		check(s.t, err)
		check(s.t, netlink.LinkSetNsFd(l, int(s.ns[nsB])))
		run(s.t, "ip", "link", "set", "dev", "tmp0", "name", a, "mtu", fmt.Sprint(mtu), "up")
	})
	s.in(nsB, func() { run(s.t, "ip", "link", "set", "dev", "tmp1", "name", b, "mtu", fmt.Sprint(mtu), "up") })
}

func newSite(t testing.TB, alinkMTU int) *site {
	inNetNS(t)
	testenv.Tool(t, "ip")
	home, err := netns.Get()
	check(t, err)
	s := &site{t: t, ns: map[string]netns.NsHandle{}}
	for _, n := range []string{"lan", "a", "b", "vm", "client"} {
		h, err := netns.New()
		check(t, err)
		s.ns[n] = h
		t.Cleanup(func() { h.Close() })
	}
	check(t, netns.Set(home))
	t.Cleanup(func() { home.Close() })
	for _, n := range []string{"lan", "a", "b"} {
		s.in(n, func() {
			run(t, "ip", "link", "add", "br0", "type", "bridge", "mcast_snooping", "0")
			run(t, "ip", "link", "set", "dev", "br0", "up")
		})
	}
	s.wire("lan", "pa", "a", "eth0", 1500)
	s.wire("lan", "pb", "b", "eth0", 1500)
	s.wire("lan", "pc", "client", "eth0", 1500)
	s.wire("a", "tap0", "vm", "eth0", 1500)
	s.wire("a", "alink", "b", "alink", alinkMTU)
	for ns, ports := range map[string][]string{"lan": {"pa", "pb", "pc"}, "a": {"eth0", "tap0"}, "b": {"eth0"}} {
		s.in(ns, func() {
			for _, p := range ports {
				run(t, "ip", "link", "set", "dev", p, "master", "br0")
			}
		})
	}
	for ns, a := range map[string][2]string{"vm": {"192.0.2.1/24", "eth0"}, "client": {"192.0.2.2/24", "eth0"}, "a": {"10.0.0.1/24", "alink"}, "b": {"10.0.0.2/24", "alink"}} {
		s.in(ns, func() { run(t, "ip", "addr", "add", a[0], "dev", a[1]) })
	}
	return s
}

// frames counts what came into the LAN from a host.
func (s *site) frames(port string) (n int) {
	s.in("lan", func() {
		l, err := netlink.LinkByName(port)
		check(s.t, err)
		n = int(l.Attrs().Statistics.RxPackets)
	})
	return n
}

// transfer sends bytes over a TCP connection that is there already.
func transfer(t testing.TB, from, to net.Conn, size int) {
	t.Helper()
	check(t, to.SetDeadline(time.Now().Add(20*time.Second)))
	done := make(chan error, 1)
	go func() {
		_, err := io.CopyN(io.Discard, to, int64(size))
		done <- err
	}()
	_, err := from.Write(make([]byte, size))
	check(t, err)
	if err := <-done; err != nil {
		t.Fatalf("transfer: %v", err)
	}
}

// TestCarriedFrames carries a bridge by hand, with frames of full size over
// A-links with and without room for them, and counts what goes round.
func TestCarriedFrames(t *testing.T) {
	for _, mtu := range []int{9000, 1500} {
		t.Run(fmt.Sprint("A-link MTU ", mtu), func(t *testing.T) { carriedFrames(t, mtu) })
	}
}

func carriedFrames(t *testing.T, mtu int) {
	s := newSite(t, mtu)
	var lis net.Listener
	var err error
	s.in("vm", func() { lis, err = net.Listen("tcp4", "192.0.2.1:80") })
	check(t, err)
	defer lis.Close()
	accepted := make(chan net.Conn, 1)
	go func() {
		c, err := lis.Accept()
		if err == nil {
			accepted <- c
		}
	}()
	var client net.Conn
	s.in("client", func() { client, err = (&net.Dialer{Timeout: 5 * time.Second}).Dial("tcp4", "192.0.2.1:80") })
	check(t, err)
	defer client.Close()
	guest := <-accepted
	defer guest.Close()
	transfer(t, guest, client, 1<<20)
	transfer(t, client, guest, 1<<20)

	tun := Tunnel{Bridge: "br0", Client: "a", Server: "b", Port: 7403}
	var ways *Ways
	s.in("b", func() { check(t, tun.JoinServer(net.ParseIP("10.0.0.1"))) })
	s.in("a", func() {
		ways, err = OpenWays()
		check(t, err)
		check(t, ways.Set(WaySets{Shut: []string{tun.ClientName()}, Uplinks: []string{"eth0"}}))
		check(t, tun.JoinClient([]string{"eth0"}, net.ParseIP("10.0.0.2")))
	})
	transfer(t, guest, client, 1<<20) // still by the uplink
	turn := func() {
		s.in("a", func() {
			check(t, ways.Set(WaySets{Shut: []string{"eth0"}, Uplinks: []string{"eth0"}}))
			Forget("eth0", true)
			macs, err := Locals("br0", []string{"eth0"}, nil)
			check(t, err)
			if len(macs) < 2 {
				t.Errorf("addresses behind the bridge: %v; the guest's is missing", macs)
			}
			check(t, Announce(tun.ClientName(), macs))
		})
	}
	turn()
	pa, pb := s.frames("pa"), s.frames("pb")
	transfer(t, guest, client, 4<<20)
	transfer(t, client, guest, 4<<20)
	if d := s.frames("pa") - pa; d > 5 {
		t.Errorf("%d frames left by the uplink that is shut", d)
	}
	if d := s.frames("pb") - pb; d < 50 {
		t.Errorf("only %d frames left by the other host's uplink", d)
	}
	// A frame of full size that is no IP packet, both ways.
	for _, way := range [][2]string{{"vm", "client"}, {"client", "vm"}} {
		if !s.whole(way[0], way[1]) {
			t.Errorf("a frame of 1514 bytes does not come from %s to %s", way[0], way[1])
		}
	}
	// Everything open by mistake, no rules at all: nothing goes round.
	s.in("a", func() { check(t, ways.Uninstall()) })
	pa, pb = s.frames("pa"), s.frames("pb")
	s.in("client", func() {
		fd, index := portSocket(t, "eth0")
		f := make([]byte, 60)
		copy(f, []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 7, 7, 7, 7, 7, 0x88, 0xb5})
		for range 10 {
			check(t, unix.Sendto(fd, f, 0, &unix.SockaddrLinklayer{Ifindex: index, Halen: 6}))
		}
	})
	time.Sleep(300 * time.Millisecond) // a loop would take millions of frames in this time
	if da, db := s.frames("pa")-pa, s.frames("pb")-pb; da+db > 200 {
		t.Errorf("without rules %d and %d frames came in from the hosts for 10 broadcasts: a loop", da, db)
	} else {
		t.Logf("without rules %d and %d frames for 10 broadcasts", da, db)
	}
	// And back.
	s.in("a", func() {
		Forget(tun.ClientName(), false)
		check(t, ways.Set(WaySets{Drain: []string{tun.ClientName()}, Uplinks: []string{"eth0"}}))
		macs, err := Locals("br0", []string{"eth0"}, nil)
		check(t, err)
		check(t, Announce("eth0", macs))
	})
	transfer(t, guest, client, 1<<20)
	s.in("a", func() { check(t, Leave(tun.ClientName(), []string{"eth0"})) })
	s.in("b", func() { check(t, Leave(tun.ServerName(), nil)) })
	pb = s.frames("pb")
	transfer(t, guest, client, 1<<20)
	transfer(t, client, guest, 1<<20)
	if d := s.frames("pb") - pb; d > 5 {
		t.Errorf("%d frames still leave by the other host", d)
	}
}

// whole reports whether one frame of 1514 bytes comes through.
func (s *site) whole(from, to string) (ok bool) {
	var dst int
	s.in(to, func() { dst, _ = portSocket(s.t, "eth0") })
	waySeq++
	s.in(from, func() {
		src, index := portSocket(s.t, "eth0")
		f := make([]byte, 1514)
		copy(f, []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 6, 6, 6, 6, byte(len(from)), 0x88, 0xb5})
		binary.BigEndian.PutUint32(f[20:], waySeq)
		check(s.t, unix.Sendto(src, f, 0, &unix.SockaddrLinklayer{Ifindex: index, Halen: 6}))
	})
	buf := make([]byte, 2048)
	for end := time.Now().Add(2 * time.Second); !ok && time.Now().Before(end); {
		n, _, err := unix.Recvfrom(dst, buf, 0)
		ok = err == nil && n == 1514 && binary.BigEndian.Uint32(buf[20:]) == waySeq
	}
	return ok
}
