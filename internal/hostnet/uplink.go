package hostnet

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Carrier reports whether any of a bridge's uplinks is up and has a carrier.
// One that does not exist has none.
func Carrier(uplinks []string) bool {
	return slices.ContainsFunc(uplinks, func(n string) bool {
		l, err := netlink.LinkByName(n)
		return err == nil && l.Attrs().RawFlags&unix.IFF_UP != 0 && l.Attrs().RawFlags&unix.IFF_LOWER_UP != 0
	})
}

// CheckUplink returns an error unless name is a port of the bridge.
func CheckUplink(bridgeName, name string) error {
	br, err := bridge(bridgeName)
	if err != nil {
		return err
	}
	l, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find uplink %s: %w", name, err)
	}
	if l.Attrs().MasterIndex != br.Attrs().Index {
		return fmt.Errorf("uplink %s is not a port of bridge %s", name, bridgeName)
	}
	return nil
}

// MTU returns the largest payload of a device, bytes.
func MTU(name string) (int, error) {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return 0, fmt.Errorf("find device %s: %w", name, err)
	}
	return l.Attrs().MTU, nil
}

// Changes calls f after each change of any device until ctx ends. f must not block.
func Changes(ctx context.Context, f func()) error {
	ch, done := make(chan netlink.LinkUpdate, 64), make(chan struct{})
	if err := netlink.LinkSubscribe(ch, done); err != nil {
		return fmt.Errorf("watch devices: %w", err)
	}
	defer close(done)
	for {
		select {
		case <-ctx.Done():
			return nil
		case _, ok := <-ch:
			if !ok {
				return errors.New("watch devices: the kernel ended the subscription")
			}
			f()
		}
	}
}

// Probe asks targets by ARP over one uplink, past the bridge, so that it works
// whether the uplink is in use or not. It speaks by an address of its own: the
// switches must not look for the host's or a guest's behind an uplink that is
// not in use.
type Probe struct {
	fd      int
	index   int
	mac     net.HardwareAddr
	targets []netip.Addr
	heard   atomic.Int64 // time of the last answer, nanoseconds since start
	start   time.Time
	done    chan struct{}
}

// OpenProbe opens a probe on an uplink; id makes its address differ from that
// of other hosts. Targets are IPv4 addresses.
func OpenProbe(uplink, id string, targets []netip.Addr) (*Probe, error) {
	l, err := net.InterfaceByName(uplink)
	if err != nil {
		return nil, fmt.Errorf("open probe on %s: %w", uplink, err)
	}
	proto := binary.BigEndian.Uint16([]byte{0x08, 0x06})
	be := proto<<8 | proto>>8
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open probe on %s: %w", uplink, err)
	}
	tv := unix.NsecToTimeval(int64(100 * time.Millisecond))
	err = errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv),
		unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1),
		unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: be, Ifindex: l.Index}))
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("open probe on %s: %w", uplink, err)
	}
	sum := sha256.Sum256([]byte("probe " + id + " " + uplink))
	p := &Probe{fd: fd, index: l.Index, targets: targets, start: time.Now(), done: make(chan struct{}),
		mac: net.HardwareAddr{0x02, 0x70, 0x70, sum[0], sum[1], sum[2]}}
	return p, nil
}

// Run hears answers until ctx ends, and closes the probe.
func (p *Probe) Run(ctx context.Context) {
	defer close(p.done)
	defer unix.Close(p.fd)
	buf := make([]byte, 128)
	for ctx.Err() == nil {
		n, _, err := unix.Recvfrom(p.fd, buf, 0)
		if err == nil && p.answer(buf[:n]) {
			p.heard.Store(int64(time.Since(p.start)))
		} else if err != nil && !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
			select { // the link is down
			case <-ctx.Done():
			case <-time.After(100 * time.Millisecond):
			}
		}
	}
}

// answer reports whether a frame is an ARP reply of a target.
func (p *Probe) answer(f []byte) bool {
	if len(f) < 42 || f[20] != 0 || f[21] != 2 {
		return false
	}
	return slices.Contains(p.targets, netip.AddrFrom4([4]byte(f[28:32])))
}

// Ask sends one request to each target.
func (p *Probe) Ask() error {
	for _, t := range p.targets {
		f := make([]byte, 60)
		for i := range 6 {
			f[i] = 0xff
		}
		copy(f[6:], p.mac)
		copy(f[12:], []byte{0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, 1})
		copy(f[22:], p.mac)
		ip := t.As4()
		copy(f[38:], ip[:]) // the sender's address stays 0.0.0.0 (RFC 5227)
		if err := unix.Sendto(p.fd, f, 0, &unix.SockaddrLinklayer{Ifindex: p.index, Halen: 6}); err != nil {
			return fmt.Errorf("probe %v: %w", t, err)
		}
	}
	return nil
}

// Age returns how long ago the last answer came, or, where none did, how long
// the probe has been open.
func (p *Probe) Age() time.Duration { return time.Since(p.start) - time.Duration(p.heard.Load()) }

// Wait returns when Run has ended.
func (p *Probe) Wait() { <-p.done }
