package lab

import (
	"fmt"
	"net"
	"os/exec"
	"strings"

	"golang.org/x/sys/unix"
)

// Frames returns for each port of the lab's switches how many frames have come
// in from the node there, since the node was connected. Two readings show
// whether frames go round in a loop.
func (l *Lab) Frames() (map[string]int, error) {
	l.mu.Lock()
	n, err := l.fresh(Switch)
	pid := 0
	if err == nil {
		pid = n.PID
	}
	l.mu.Unlock()
	if err != nil {
		return nil, err
	}
	h, err := handleAt(pid)
	if err != nil {
		return nil, err
	}
	defer h.Close()
	links, err := h.LinkList()
	if err != nil {
		return nil, fmt.Errorf("read frame counters: %w", err)
	}
	out := map[string]int{}
	for _, lk := range links {
		if a := lk.Attrs(); lk.Type() == "veth" && a.Statistics != nil {
			out[a.Name] = int(a.Statistics.RxPackets)
		}
	}
	return out, nil
}

// FlushRules removes every netfilter rule of a host, as a careless firewall
// script does; also of one that is frozen.
func (l *Lab) FlushRules(host string) error {
	return l.InNetNS(host, func() error {
		out, err := exec.Command("nft", "flush", "ruleset").CombinedOutput()
		if err != nil {
			return fmt.Errorf("flush rules of %s: %w: %s", host, err, strings.TrimSpace(string(out)))
		}
		return nil
	})
}

// Broadcast sends a few frames to everybody from the client into the LAN: what
// would go round for ever in a loop.
func (l *Lab) Broadcast(count int) error {
	return l.InNetNS(Client, func() error {
		i, err := net.InterfaceByName("eth0")
		if err != nil {
			return fmt.Errorf("send broadcast: %w", err)
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("send broadcast: %w", err)
		}
		defer unix.Close(fd)
		f := make([]byte, 60)
		copy(f, []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff})
		copy(f[6:], i.HardwareAddr)
		f[12], f[13] = 0x88, 0xb5 // for local experiments (IEEE 802)
		for range count {
			if err := unix.Sendto(fd, f, 0, &unix.SockaddrLinklayer{Ifindex: i.Index, Halen: 6}); err != nil {
				return fmt.Errorf("send broadcast: %w", err)
			}
		}
		return nil
	})
}
