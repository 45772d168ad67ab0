package hostnet

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The ends of the tunnels that carry a bridge's frames to another host. The
// tap gate guards names that begin with "pd"; these must not.
const (
	clientPrefix = "pxc" // leads to the host that carries this one
	serverPrefix = "pxs" // leads to a host that this one carries
)

// VXLANOverhead is what VXLAN adds to a frame's payload over IPv4, in bytes:
// Ethernet 14, IP 20, UDP 8, VXLAN 8. Over IPv6 it is 20 more.
const VXLANOverhead = 50

// tunnelPriority is the DSCP of carried frames on the A-link, as a type of
// service: CS1, below everything else.
const tunnelPriority = 0x20

// Tunnel names one tunnel: the bridge and the host that is carried. Each end
// derives the same VXLAN identifier from it.
type Tunnel struct {
	Bridge string
	Client string // host that is carried
	Server string // host that carries
	Port   int    // UDP
}

func (t Tunnel) sum() []byte {
	h := sha256.Sum256([]byte(t.Bridge + "\x00" + t.Client))
	return h[:]
}

// vni is the same at both ends whoever carries. Two tunnels of one host with
// the same number cannot be made: the kernel refuses the second.
func (t Tunnel) vni() int { return int(binary.BigEndian.Uint32(t.sum()) & 0xffffff) }

// ClientName is the name of the device at the host that is carried.
func (t Tunnel) ClientName() string { return clientPrefix + hex.EncodeToString(t.sum()[4:10]) }

// ServerName is the name of the device at the host that carries.
func (t Tunnel) ServerName() string { return serverPrefix + hex.EncodeToString(t.sum()[4:10]) }

func (t Tunnel) alias(end string) string {
	return fmt.Sprintf("perdure net %s %s %s %s %d", end, t.Bridge, t.Client, t.Server, t.Port)
}

// End is one tunnel end found in the kernel.
type End struct {
	Tunnel
	Name   string
	Client bool
	Joined bool // it is a port of its bridge
}

// Ends lists the tunnel ends of this host.
func Ends() ([]End, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list tunnel ends: %w", err)
	}
	names := map[int]string{}
	for _, l := range links {
		names[l.Attrs().Index] = l.Attrs().Name
	}
	var out []End
	for _, l := range links {
		a := l.Attrs()
		f := strings.Fields(a.Alias)
		if l.Type() != "vxlan" || !strings.HasPrefix(a.Name, clientPrefix) && !strings.HasPrefix(a.Name, serverPrefix) {
			continue
		}
		e := End{Name: a.Name, Client: strings.HasPrefix(a.Name, clientPrefix)}
		if len(f) == 7 {
			e.Bridge, e.Tunnel.Client, e.Server = f[3], f[4], f[5]
			e.Port, _ = strconv.Atoi(f[6])
			e.Joined = a.MasterIndex != 0 && names[a.MasterIndex] == e.Bridge
		}
		out = append(out, e)
	}
	return out, nil
}

// JoinClient makes the client end of a tunnel and puts it into the bridge. The
// caller has shut the end (Ways) before: it must not forward yet.
//
// Uplinks and client end are isolated from each other in the bridge itself, so
// that even where somebody flushes all netfilter rules nothing goes from one to
// the other.
func (t Tunnel) JoinClient(uplinks []string, remote net.IP) error {
	for _, u := range uplinks {
		if err := isolate(u, true); err != nil {
			return fmt.Errorf("join client end of bridge %s: %w", t.Bridge, err)
		}
	}
	if err := t.join(t.ClientName(), t.alias("client"), remote, true); err != nil {
		return fmt.Errorf("join client end of bridge %s: %w", t.Bridge, err)
	}
	return nil
}

// JoinServer makes the server end of a tunnel and puts it into the bridge.
func (t Tunnel) JoinServer(remote net.IP) error {
	if err := t.join(t.ServerName(), t.alias("server"), remote, false); err != nil {
		return fmt.Errorf("join server end for %s of bridge %s: %w", t.Client, t.Bridge, err)
	}
	return nil
}

func (t Tunnel) join(name, alias string, remote net.IP, isolated bool) (err error) {
	br, err := bridge(t.Bridge)
	if err != nil {
		return err
	}
	if err := removeLink(name); err != nil { // what a crash left behind
		return err
	}
	dev := &netlink.Vxlan{LinkAttrs: netlink.LinkAttrs{Name: name, TxQLen: 1000}, VxlanId: t.vni(), Port: t.Port, TOS: tunnelPriority, Learning: false}
	if err := netlink.LinkAdd(dev); err != nil {
		return fmt.Errorf("make %s (VXLAN %d): %w", name, t.vni(), err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, removeLink(name))
		}
	}()
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	quiet(name)
	// The bridge takes on the smallest MTU of its ports: it must not change.
	err = errors.Join(netlink.LinkSetAlias(l, alias), netlink.LinkSetMTU(l, br.Attrs().MTU), setRemote(l, remote))
	if err != nil {
		return fmt.Errorf("set up %s: %w", name, err)
	}
	if err := netlink.LinkSetMaster(l, br); err != nil {
		return fmt.Errorf("put %s into the bridge: %w", name, err)
	}
	if isolated {
		if err := netlink.LinkSetIsolated(l, true); err != nil {
			return fmt.Errorf("isolate %s: %w", name, err)
		}
	}
	// Groups that were joined at the other host are not known here.
	brport(name, "multicast_router", "2")
	if err := netlink.LinkSetUp(l); err != nil {
		return fmt.Errorf("set up %s: %w", name, err)
	}
	return nil
}

// SetRemote changes the address of the other end, when another A-link is to be
// used; the same address again costs nothing.
func SetRemote(name string, remote net.IP) error {
	l, err := netlink.LinkByName(name)
	if err == nil {
		err = setRemote(l, remote)
	}
	if err != nil {
		return fmt.Errorf("turn tunnel %s to %v: %w", name, remote, err)
	}
	return nil
}

// setRemote makes remote the only place where the tunnel sends to.
func setRemote(l netlink.Link, remote net.IP) error {
	zero := make(net.HardwareAddr, 6)
	old, err := netlink.NeighList(l.Attrs().Index, unix.AF_BRIDGE)
	if err != nil {
		return fmt.Errorf("list destinations: %w", err)
	}
	have := false
	for _, n := range old {
		if n.HardwareAddr.String() != zero.String() || n.IP == nil {
			continue
		}
		if n.IP.Equal(remote) {
			have = true
			continue
		}
		gone := netlink.Neigh{LinkIndex: l.Attrs().Index, Family: unix.AF_BRIDGE, HardwareAddr: zero, IP: n.IP, Flags: netlink.NTF_SELF}
		if err := netlink.NeighDel(&gone); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("remove destination %v: %w", n.IP, err)
		}
	}
	if have {
		return nil
	}
	err = netlink.NeighAppend(&netlink.Neigh{LinkIndex: l.Attrs().Index, Family: unix.AF_BRIDGE, HardwareAddr: zero, IP: remote,
		Flags: netlink.NTF_SELF, State: netlink.NUD_PERMANENT | netlink.NUD_NOARP})
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("set destination %v: %w", remote, err)
	}
	return nil
}

// Leave takes a tunnel end away; a missing one is no error. With its last
// client end the uplinks of a bridge are as they were.
func Leave(name string, uplinks []string) error {
	if err := removeLink(name); err != nil {
		return fmt.Errorf("remove tunnel end %s: %w", name, err)
	}
	for _, u := range uplinks {
		if err := isolate(u, false); err != nil {
			return fmt.Errorf("remove tunnel end %s: %w", name, err)
		}
	}
	return nil
}

func removeLink(name string) error {
	l, err := netlink.LinkByName(name)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return nil
	}
	if err == nil {
		err = netlink.LinkDel(l)
	}
	if errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

// isolate sets the bridge's own flag of an uplink; one that is gone, or in no
// bridge, needs none.
func isolate(port string, on bool) error {
	l, err := netlink.LinkByName(port)
	if errors.As(err, new(netlink.LinkNotFoundError)) || err == nil && l.Attrs().MasterIndex == 0 {
		return nil
	}
	if err == nil {
		err = netlink.LinkSetIsolated(l, on)
	}
	if err != nil {
		return fmt.Errorf("isolate uplink %s (%v): %w", port, on, err)
	}
	return nil
}

// Forget makes the bridge forget which addresses are behind a port, and with
// learn false not learn new ones there: the frames that follow are sent to all
// ports that are open.
func Forget(port string, learn bool) {
	brport(port, "learning", map[bool]string{false: "0", true: "1"}[learn])
	brport(port, "flush", "1")
}

// brport sets a port's attribute that netlink libraries do not know. A failure
// costs at most some frames: the addresses run out by themselves.
func brport(port, attr, value string) {
	_ = os.WriteFile(filepath.Join("/sys/class/net", port, "brport", attr), []byte(value), 0)
}

// quiet keeps the host itself from talking on a device.
func quiet(name string) {
	_ = os.WriteFile("/proc/sys/net/ipv6/conf/"+name+"/disable_ipv6", []byte("1"), 0)
}

// Locals lists the addresses behind a bridge's own ports: what has to be
// announced when the way out changes. Uplinks and tunnel ends are left out.
// Addresses behind guarded taps count only where open says so of the tap: an
// instance that has lost its right must not call the frames to itself.
func Locals(bridgeName string, uplinks []string, open func(tap string) bool) ([]net.HardwareAddr, error) {
	br, err := bridge(bridgeName)
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list addresses of bridge %s: %w", bridgeName, err)
	}
	ports := map[int]string{}
	for _, l := range links {
		n := l.Attrs().Name
		if l.Attrs().MasterIndex != br.Attrs().Index || slices.Contains(uplinks, n) || strings.HasPrefix(n, clientPrefix) || strings.HasPrefix(n, serverPrefix) {
			continue
		}
		if !strings.HasPrefix(n, tapPrefix) || open(n) {
			ports[l.Attrs().Index] = n
		}
	}
	entries, err := netlink.NeighList(0, unix.AF_BRIDGE)
	if err != nil {
		return nil, fmt.Errorf("list addresses of bridge %s: %w", bridgeName, err)
	}
	out := []net.HardwareAddr{br.Attrs().HardwareAddr}
	for _, e := range entries {
		// A permanent entry is the port's own address, not that of who is behind it.
		if ports[e.LinkIndex] == "" || e.State&netlink.NUD_PERMANENT != 0 || len(e.HardwareAddr) != 6 || e.HardwareAddr[0]&1 != 0 {
			continue
		}
		if !slices.ContainsFunc(out, func(m net.HardwareAddr) bool { return m.String() == e.HardwareAddr.String() }) {
			out = append(out, e.HardwareAddr)
		}
	}
	return out, nil
}

// Announce sends a reverse ARP request in the name of each address out of a
// port, past the bridge, so that switches learn where they are now.
func Announce(port string, macs []net.HardwareAddr) error {
	l, err := net.InterfaceByName(port)
	if err != nil {
		return fmt.Errorf("announce on %s: %w", port, err)
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("announce on %s: %w", port, err)
	}
	defer unix.Close(fd)
	for _, m := range macs {
		if err := unix.Sendto(fd, reverseARP(m), 0, &unix.SockaddrLinklayer{Ifindex: l.Index, Halen: 6}); err != nil {
			return fmt.Errorf("announce %v on %s: %w", m, port, err)
		}
	}
	return nil
}

// reverseARP is what QEMU sends after a migration (RFC 903).
func reverseARP(hw net.HardwareAddr) []byte {
	f := make([]byte, 60)
	for i := range 6 {
		f[i] = 0xff
	}
	copy(f[6:], hw)
	copy(f[12:], []byte{0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3})
	copy(f[22:], hw)
	copy(f[32:], hw)
	return f
}
