package hostnet

import (
	"fmt"
	"net"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Attract turns a card's frames towards this host before its guest runs here:
// the bridge is told that the address is at the tap, and frame, an
// announcement in the card's name, goes out of the bridge's other ports. What
// is sent to the guest from then on waits in its tap. The tap gate does not see
// the announcement, so only who holds the VM's right may call this.
func Attract(tap, bridge string, mac net.HardwareAddr, frame []byte) error {
	port, err := net.InterfaceByName(tap)
	if err != nil {
		return fmt.Errorf("attract %v: tap %s: %w", mac, tap, err)
	}
	br, err := net.InterfaceByName(bridge)
	if err != nil {
		return fmt.Errorf("attract %v: bridge %s: %w", mac, bridge, err)
	}
	// The bridge may still believe that the card is behind its uplink, and would
	// drop frames that come from there for it.
	err = netlink.NeighSet(&netlink.Neigh{LinkIndex: port.Index, Family: unix.AF_BRIDGE, HardwareAddr: mac,
		Flags: netlink.NTF_MASTER, State: netlink.NUD_REACHABLE})
	if err != nil {
		return fmt.Errorf("attract %v to %s: %w", mac, tap, err)
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("attract %v: %w", mac, err)
	}
	defer unix.Close(fd)
	if err := unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: br.Index, Halen: 6}); err != nil {
		return fmt.Errorf("attract %v: announce on %s: %w", mac, bridge, err)
	}
	return nil
}
