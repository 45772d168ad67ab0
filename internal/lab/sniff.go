package lab

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Sniffer watches the LAN's switch and notes through which host's port the
// frames of given senders come in. A VM may move from one host to another, but
// once the first frame came from the new host, none may come from the old one:
// that is what "never two" looks like from outside.
type Sniffer struct {
	fd    int
	ports map[int]string // by interface index at the switch
	l     *Lab
	done  chan struct{}
	end   chan struct{}
	once  sync.Once

	mu      sync.Mutex
	senders map[[6]byte][]Stay
	dropped int
	err     error
}

// Stay is a time during which all frames of a sender came from one host.
type Stay struct {
	Host        string    `json:"host"`
	First, Last time.Time // of its frames, by the kernel's time stamps
	Frames      int       `json:"frames"`
}

func (s Stay) String() string {
	return fmt.Sprintf("%s %s–%s (%d frames)", s.Host, s.First.Format("15:04:05.000"), s.Last.Format("15:04:05.000"), s.Frames)
}

// Sniff starts watching the LAN for frames sent by these MAC addresses.
func (l *Lab) Sniff(macs ...net.HardwareAddr) (*Sniffer, error) {
	s := &Sniffer{fd: -1, l: l, done: make(chan struct{}), end: make(chan struct{}), senders: map[[6]byte][]Stay{}}
	for _, m := range macs {
		if len(m) != 6 {
			return nil, fmt.Errorf("watch %v: not an Ethernet address", m)
		}
		s.senders[[6]byte(m)] = nil
	}
	if err := s.readPorts(); err != nil {
		return nil, err
	}
	err := l.InNetNS(Switch, func() error {
		// One socket for all ports, so that frames are seen in the order in which they came.
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open packet socket: %w", err)
		}
		s.fd = fd
		if err := s.prepare(macs); err != nil {
			unix.Close(fd)
			return err
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	go s.run()
	return s, nil
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }

// prepare sets filter and options before the socket is bound, so that no frame
// gets in that the filter has not seen.
func (s *Sniffer) prepare(macs []net.HardwareAddr) error {
	prog := macFilter(macs)
	fprog := unix.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]}
	if err := unix.SetsockoptSockFprog(s.fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &fprog); err != nil {
		return fmt.Errorf("attach filter: %w", err)
	}
	for _, o := range []struct{ level, opt, val int }{
		{unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64 << 20},
		{unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1},
		{unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1}, // what the switch passes on is no new frame
	} {
		if err := unix.SetsockoptInt(s.fd, o.level, o.opt, o.val); err != nil {
			return fmt.Errorf("set socket option: %w", err)
		}
	}
	tv := unix.NsecToTimeval(int64(100 * time.Millisecond))
	if err := unix.SetsockoptTimeval(s.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		return fmt.Errorf("set receive timeout: %w", err)
	}
	if err := unix.Bind(s.fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL)}); err != nil {
		return fmt.Errorf("bind packet socket: %w", err)
	}
	return nil
}

// macFilter is a classic BPF program that passes the first 14 bytes of frames
// whose source is one of the addresses.
func macFilter(macs []net.HardwareAddr) []unix.SockFilter {
	const (
		ldw  = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		ldh  = unix.BPF_LD | unix.BPF_H | unix.BPF_ABS
		jeq  = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		retK = unix.BPF_RET | unix.BPF_K
	)
	var p []unix.SockFilter
	for _, m := range macs {
		p = append(p,
			unix.SockFilter{Code: ldw, K: 6},
			unix.SockFilter{Code: jeq, Jf: 3, K: binary.BigEndian.Uint32(m)},
			unix.SockFilter{Code: ldh, K: 10},
			unix.SockFilter{Code: jeq, Jf: 1, K: uint32(binary.BigEndian.Uint16(m[4:]))},
			unix.SockFilter{Code: retK, K: 14})
	}
	return append(p, unix.SockFilter{Code: retK, K: 0})
}

// readPorts learns which interface of the switch is whose LAN port; a host
// that was powered on again has a new one.
func (s *Sniffer) readPorts() error {
	s.l.mu.Lock()
	sw, err := s.l.st.node(Switch)
	pid := 0
	if err == nil {
		pid = sw.PID
	}
	s.l.mu.Unlock()
	if err != nil {
		return err
	}
	h, err := handleAt(pid)
	if err != nil {
		return err
	}
	defer h.Close()
	links, err := h.LinkList()
	if err != nil {
		return fmt.Errorf("list ports: %w", err)
	}
	if s.ports == nil {
		s.ports = map[int]string{}
	}
	for _, lk := range links {
		if host, ok := strings.CutSuffix(lk.Attrs().Name, "-"+LAN); ok {
			s.ports[lk.Attrs().Index] = host
		}
	}
	return nil
}

func (s *Sniffer) run() {
	defer close(s.done)
	defer unix.Close(s.fd)
	buf, oob := make([]byte, 64), make([]byte, 256)
	for {
		select {
		case <-s.end:
			s.countDropped()
			return
		default:
		}
		n, oobn, _, from, err := unix.Recvmsg(s.fd, buf, oob, 0)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) || errors.Is(err, unix.ENETDOWN) {
			continue
		}
		if err != nil {
			s.mu.Lock()
			s.err = fmt.Errorf("receive frame: %w", err)
			s.mu.Unlock()
			return
		}
		ll, ok := from.(*unix.SockaddrLinklayer)
		if !ok || n < 12 {
			continue
		}
		host, known := s.ports[ll.Ifindex]
		if !known {
			if s.readPorts() == nil {
				host = s.ports[ll.Ifindex]
			}
			if host == "" { // the bridge itself, which sees broadcasts once more, or an A-link
				s.ports[ll.Ifindex] = ""
			}
		}
		if host != "" {
			s.note([6]byte(buf[6:12]), host, stamp(oob[:oobn]))
		}
	}
}

// stamp finds the kernel's time of reception.
func stamp(oob []byte) time.Time {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err == nil {
		for _, m := range msgs {
			if m.Header.Type == unix.SO_TIMESTAMPNS && len(m.Data) >= int(unsafe.Sizeof(unix.Timespec{})) {
				ts := (*unix.Timespec)(unsafe.Pointer(&m.Data[0]))
				return time.Unix(ts.Unix())
			}
		}
	}
	return time.Now()
}

func (s *Sniffer) note(mac [6]byte, host string, t time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	stays, watched := s.senders[mac]
	if !watched {
		return
	}
	if n := len(stays); n > 0 && stays[n-1].Host == host {
		stays[n-1].Last = t
		stays[n-1].Frames++
		return
	}
	s.senders[mac] = append(stays, Stay{Host: host, First: t, Last: t, Frames: 1})
}

func (s *Sniffer) countDropped() {
	st, err := unix.GetsockoptTpacketStats(s.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		s.err = fmt.Errorf("read drop counter: %w", err)
		return
	}
	s.dropped += int(st.Drops)
}

// Stays returns where a sender's frames came from up to now, in order. Each
// entry but the first is a move.
func (s *Sniffer) Stays(mac net.HardwareAddr) []Stay {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(mac) != 6 {
		return nil
	}
	return append([]Stay(nil), s.senders[[6]byte(mac)]...)
}

// Close stops watching; it fails when frames were missed, because then nothing
// is proved.
func (s *Sniffer) Close() error {
	s.once.Do(func() { close(s.end) })
	<-s.done
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return s.err
	}
	if s.dropped > 0 {
		return fmt.Errorf("watch LAN: %d frames were not seen", s.dropped)
	}
	return nil
}

// WaitFrame waits until a frame of the sender comes from the host.
func (s *Sniffer) WaitFrame(ctx context.Context, mac net.HardwareAddr, host string) error {
	for {
		if st := s.Stays(mac); len(st) > 0 && st[len(st)-1].Host == host {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for a frame of %v from %s: %w", mac, host, context.Cause(ctx))
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// Moves returns the hosts a sender's frames came from, in order: "a", "b", …
func Moves(stays []Stay) []string {
	var out []string
	for _, s := range stays {
		out = append(out, s.Host)
	}
	return out
}
