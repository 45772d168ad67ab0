// Package hostnet makes the taps of VMs and guards them: the Gate is a rule
// in the kernel that lets a tap's frames pass only for as long as somebody
// keeps saying so.
//
// Concurrency: all methods may be called from any goroutine. Taps are made in
// the network namespace of the process, more exactly of the thread that calls; a Gate stays in the
// namespace of the thread that opened it.
//
// Not guaranteed: an administrator who flushes the host's whole nftables rule
// set takes the Gate away with it. Gate.Open notices, puts it back and says so
// (ErrReinstalled); until then nothing holds back a process that runs wild.
package hostnet

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// tapPrefix marks the taps that the Gate guards. No other device of a host may
// be called so.
const tapPrefix = "pd"

// TapName returns the name of a VM's tap: "pd", eleven hexadecimal digits that
// depend on the VM's UUID, two of the NIC's index (0–255).
func TapName(uuid string, nic int) string {
	// Not the UUID's own digits: some kinds of UUID begin alike.
	h := sha256.Sum256([]byte(uuid))
	return fmt.Sprintf("%s%.11s%02x", tapPrefix, hex.EncodeToString(h[:]), nic&0xff)
}

// CheckBridge returns an error unless a bridge of this name exists.
func CheckBridge(name string) error {
	_, err := bridge(name)
	return err
}

func bridge(name string) (netlink.Link, error) {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("find bridge %s: %w", name, err)
	}
	if l.Type() != "bridge" {
		return nil, fmt.Errorf("find bridge %s: it is a device of type %s", name, l.Type())
	}
	return l, nil
}

// EnsureBridge makes a bridge if it is missing and sets it up. made says that
// it was missing.
func EnsureBridge(name string) (made bool, err error) {
	_, err = netlink.LinkByName(name)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		err = netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name}})
		made = err == nil
		if errors.Is(err, unix.EEXIST) { // another shim was quicker
			err = nil
		}
	}
	if err != nil {
		return false, fmt.Errorf("make bridge %s: %w", name, err)
	}
	l, err := bridge(name)
	if err == nil {
		err = netlink.LinkSetUp(l)
	}
	if err != nil {
		if made {
			err = errors.Join(err, netlink.LinkDel(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name}}))
		}
		return false, fmt.Errorf("set up bridge %s: %w", name, err)
	}
	return made, nil
}

// CreateTap makes a persistent tap, or takes over the one that is there, joins
// it to the bridge (empty: to none, for a QEMU that is only tried) and sets it
// up; alias is for people. On failure nothing is left of what it made.
func CreateTap(name, bridgeName, alias string) (err error) {
	if err := createTap(name, bridgeName, alias); err != nil {
		return fmt.Errorf("make tap %s: %w", name, err)
	}
	return nil
}

func createTap(name, bridgeName, alias string) (err error) {
	if name == "" || len(name) > unix.IFNAMSIZ-1 {
		return fmt.Errorf("name of %d bytes: 1 to %d are possible", len(name), unix.IFNAMSIZ-1)
	}
	var br netlink.Link
	if bridgeName != "" {
		if br, err = bridge(bridgeName); err != nil {
			return err
		}
	}
	tap, made, err := findOrAddTap(name)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil && made {
			err = errors.Join(err, netlink.LinkDel(tap))
		}
	}()
	// The host itself must not talk to the guest here.
	v6 := "/proc/sys/net/ipv6/conf/" + name + "/disable_ipv6"
	if err := os.WriteFile(v6, []byte("1"), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("disable IPv6 on it: %w", err)
	}
	if alias != "" {
		if err := netlink.LinkSetAlias(tap, alias); err != nil {
			return fmt.Errorf("set alias: %w", err)
		}
	}
	if br != nil {
		if err := netlink.LinkSetMTU(tap, br.Attrs().MTU); err != nil {
			return fmt.Errorf("set MTU: %w", err)
		}
		if err := netlink.LinkSetMaster(tap, br); err != nil {
			return fmt.Errorf("join bridge %s: %w", bridgeName, err)
		}
	} else if err := netlink.LinkSetNoMaster(tap); err != nil {
		return fmt.Errorf("leave bridge: %w", err)
	}
	if err := netlink.LinkSetUp(tap); err != nil {
		return fmt.Errorf("set up: %w", err)
	}
	return nil
}

func findOrAddTap(name string) (l netlink.Link, made bool, err error) {
	l, err = netlink.LinkByName(name)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		t := &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: name}, Mode: netlink.TUNTAP_MODE_TAP,
			Flags: netlink.TUNTAP_NO_PI | netlink.TUNTAP_VNET_HDR | netlink.TUNTAP_ONE_QUEUE}
		if err := netlink.LinkAdd(t); err != nil {
			return nil, false, err
		}
		l, err = netlink.LinkByName(name)
		if err != nil {
			return nil, false, errors.Join(err, netlink.LinkDel(t))
		}
		return l, true, nil
	}
	if err != nil {
		return nil, false, err
	}
	t, ok := l.(*netlink.Tuntap)
	if !ok || t.Mode != netlink.TUNTAP_MODE_TAP {
		return nil, false, fmt.Errorf("there is a device of type %s with this name", l.Type())
	}
	return l, false, nil
}

// DeleteTap removes a tap; a missing one is no error.
func DeleteTap(name string) error {
	l, err := netlink.LinkByName(name)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return nil
	}
	if err == nil {
		if _, ok := l.(*netlink.Tuntap); !ok {
			return fmt.Errorf("delete tap %s: it is a device of type %s", name, l.Type())
		}
		err = netlink.LinkDel(l)
	}
	if err != nil {
		return fmt.Errorf("delete tap %s: %w", name, err)
	}
	return nil
}
