package lab

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// LAN names the network of the hosts and the client, in faults.
const LAN = "lan"

// BridgeName is the bridge on each host that holds its own address on the LAN
// and the VMs' cards.
const BridgeName = "br0"

const alinkMTU = 9000

// ALink returns the name of the i-th A-link.
func ALink(i int) string { return fmt.Sprintf("alink%d", i) }

// links lists the networks a node is connected to.
func (s *state) links(n *node) []string {
	switch n.Role {
	case RoleSwitch:
		return nil
	case RoleHost:
		ls := []string{LAN}
		for i := range s.ALinks {
			ls = append(ls, ALink(i))
		}
		return ls
	default:
		return []string{LAN}
	}
}

// port is the name of a node's port on the switch.
func port(node, link string) string { return node + "-" + link }

func handleAt(pid int) (*netlink.Handle, error) {
	ns, err := netns.GetFromPid(pid)
	if err != nil {
		return nil, fmt.Errorf("open network namespace: %w", err)
	}
	defer ns.Close()
	h, err := netlink.NewHandleAt(ns)
	if err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	return h, nil
}

func setUp(h *netlink.Handle, name string) error {
	l, err := h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find link %s: %w", name, err)
	}
	if err := h.LinkSetUp(l); err != nil {
		return fmt.Errorf("set link %s up: %w", name, err)
	}
	return nil
}

func addBridge(h *netlink.Handle, name string, mtu int, mac net.HardwareAddr) error {
	off := false // snooping without a querier loses groups
	br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name, MTU: mtu, HardwareAddr: mac}, MulticastSnooping: &off}
	if err := h.LinkAdd(br); err != nil {
		return fmt.Errorf("add bridge %s: %w", name, err)
	}
	return setUp(h, name)
}

// wireSwitch makes the networks in the switch's namespace.
func (l *Lab) wireSwitch(n *node) error {
	h, err := handleAt(n.PID)
	if err != nil {
		return err
	}
	defer h.Close()
	if err := setUp(h, "lo"); err != nil {
		return err
	}
	if err := addBridge(h, LAN, 0, nil); err != nil {
		return err
	}
	for i := range l.st.ALinks {
		if err := addBridge(h, ALink(i), alinkMTU, nil); err != nil {
			return err
		}
	}
	return nil
}

// mac is the same after each power-on, as a real card's is.
func (n *node) mac(link int) net.HardwareAddr {
	return net.HardwareAddr{0x02, 0x70, 0x64, 0, byte(link), byte(n.Number)}
}

// wire connects a node to its networks. What is named in n.Down stays down.
func (l *Lab) wire(n *node) error {
	sw, err := l.st.node(Switch)
	if err != nil {
		return err
	}
	hs, err := handleAt(sw.PID)
	if err != nil {
		return err
	}
	defer hs.Close()
	hn, err := handleAt(n.PID)
	if err != nil {
		return err
	}
	defer hn.Close()
	if err := setUp(hn, "lo"); err != nil {
		return err
	}
	for i, link := range l.st.links(n) {
		if err := l.plug(hs, hn, n, i, link); err != nil {
			return fmt.Errorf("connect %s to %s: %w", n.Name, link, err)
		}
	}
	return nil
}

func (l *Lab) plug(hs, hn *netlink.Handle, n *node, i int, link string) error {
	inner, mtu := link, 0
	if link == LAN {
		inner = "eth0"
	} else {
		mtu = alinkMTU
	}
	outer := port(n.Name, link)
	if old, err := hs.LinkByName(outer); err == nil { // its namespace is just being torn down
		if err := hs.LinkDel(old); err != nil {
			return fmt.Errorf("remove old port: %w", err)
		}
	}
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: outer, MTU: mtu, TxQLen: -1}, PeerName: inner,
		PeerHardwareAddr: n.mac(i), PeerNamespace: netlink.NsPid(n.PID)}
	if err := hs.LinkAdd(veth); err != nil {
		return fmt.Errorf("add veth: %w", err)
	}
	out, err := hs.LinkByName(outer)
	if err != nil {
		return fmt.Errorf("find port: %w", err)
	}
	br, err := hs.LinkByName(link)
	if err != nil {
		return fmt.Errorf("find network: %w", err)
	}
	if err := hs.LinkSetMaster(out, br); err != nil {
		return fmt.Errorf("attach port: %w", err)
	}
	holder := inner
	if link == LAN && (n.Role == RoleHost || n.Role == RoleWitness) {
		if err := enslave(hn, inner, n.mac(i)); err != nil {
			return err
		}
		holder = BridgeName
	}
	if err := setUp(hn, inner); err != nil {
		return err
	}
	addr := n.lanAddr()
	if link != LAN {
		addr = n.alinkAddr(i - 1)
	}
	if err := addAddr(hn, holder, addr); err != nil {
		return err
	}
	if n.Role == RoleClient {
		// A second network on the same LAN, for guests with two cards.
		second := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 79, 0, byte(n.Number)}), 24)
		if err := addAddr(hn, holder, second); err != nil {
			return err
		}
	}
	if n.Down[link] {
		return nil
	}
	return setUp(hs, outer)
}

// enslave puts a host's LAN card into its bridge, as real hosts have it.
func enslave(h *netlink.Handle, card string, mac net.HardwareAddr) error {
	if err := addBridge(h, BridgeName, 0, mac); err != nil {
		return err
	}
	br, err := h.LinkByName(BridgeName)
	if err != nil {
		return fmt.Errorf("find bridge: %w", err)
	}
	c, err := h.LinkByName(card)
	if err != nil {
		return fmt.Errorf("find card: %w", err)
	}
	if err := h.LinkSetMaster(c, br); err != nil {
		return fmt.Errorf("attach card to bridge: %w", err)
	}
	return nil
}

func addAddr(h *netlink.Handle, link string, p netip.Prefix) error {
	lk, err := h.LinkByName(link)
	if err != nil {
		return fmt.Errorf("find link %s: %w", link, err)
	}
	a := &netlink.Addr{IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), 32)}}
	if err := h.AddrAdd(lk, a); err != nil {
		return fmt.Errorf("add address %s: %w", p, err)
	}
	return nil
}

// setPorts sets the switch's ports of a node up or down, or removes them.
func (l *Lab) setPorts(n *node, links []string, do func(*netlink.Handle, netlink.Link) error) error {
	sw, err := l.st.node(Switch)
	if err != nil {
		return err
	}
	h, err := handleAt(sw.PID)
	if err != nil {
		return err
	}
	defer h.Close()
	var errs []error
	for _, link := range links {
		p, err := h.LinkByName(port(n.Name, link))
		if err != nil {
			var nf netlink.LinkNotFoundError
			if !errors.As(err, &nf) {
				errs = append(errs, fmt.Errorf("find port %s: %w", port(n.Name, link), err))
			}
			continue
		}
		if err := do(h, p); err != nil && !errors.Is(err, unix.ENODEV) { // it went with its namespace just now
			errs = append(errs, fmt.Errorf("change port %s: %w", port(n.Name, link), err))
		}
	}
	return errors.Join(errs...)
}

func portDown(h *netlink.Handle, p netlink.Link) error { return h.LinkSetDown(p) }
func portUp(h *netlink.Handle, p netlink.Link) error   { return h.LinkSetUp(p) }
func portDel(h *netlink.Handle, p netlink.Link) error  { return h.LinkDel(p) }
