package hostnet

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"time"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// Inbox sees the frames that the host hands to a guest, and hands it frames
// that were seen elsewhere. So what a guest was sent and has not acted on when
// its host loses it can be given to the copy that goes on: a sender need not
// wait for its own retransmission timer.
//
// It is best effort, as a network is: frames may be missed, never invented.
// Frames that were waiting in the tap when Take was called count as seen by the guest.
//
// Concurrency: one user at a time, except Deliver, which any may call.
type Inbox struct {
	tap    string
	fd     int
	buf    []byte
	quiet  time.Time // no frames are wanted before
	missed bool
}

// Bounds of an Inbox.
const (
	inboxKernel = 2 << 20         // bytes that the kernel keeps between two calls of Take
	inboxTake   = 512 << 10       // bytes of one Take; a guest that gets more is not helped by repeating them
	inboxQuiet  = 2 * time.Second // how long a flood is left alone
	inboxFrame  = 256             // what a frame costs beside its bytes
	maxSeen     = 1<<16 + 64      // of one frame: 64 KiB and headers
	inboxPrefix = 4               // length of a frame before it, in Take's result
)

// toGuest accepts frames that leave the host by the device: on a tap, those for
// the guest. Tagged ones are left alone, since their tag would be lost.
var toGuest = []bpf.Instruction{
	bpf.LoadExtension{Num: bpf.ExtVLANTagPresent},
	bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: 0, SkipTrue: 3},
	bpf.LoadExtension{Num: bpf.ExtType},
	bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.PACKET_OUTGOING, SkipFalse: 1},
	bpf.RetConstant{Val: 1 << 18},
	bpf.RetConstant{Val: 0},
}

// OpenInbox begins to watch a tap.
func OpenInbox(tap string) (*Inbox, error) {
	b, err := openInbox(tap)
	if err != nil {
		return nil, fmt.Errorf("watch frames for the guest on %s: %w", tap, err)
	}
	return b, nil
}

func openInbox(tap string) (*Inbox, error) {
	dev, err := net.InterfaceByName(tap)
	if err != nil {
		return nil, err
	}
	// Protocol 0: nothing is seen before the filter stands.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	raw, err := bpf.Assemble(toGuest)
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	filter := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		filter[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	all := binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, unix.ETH_P_ALL))
	err = errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1),
		unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, inboxKernel),
		unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: dev.Index}))
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return &Inbox{tap: tap, fd: fd, buf: make([]byte, maxSeen)}, nil
}

// Take returns the frames seen since the last call, in the form that Deliver
// takes. Of a flood nothing is returned, and for a while nothing is looked at:
// repeating it would help nobody.
func (b *Inbox) Take(now time.Time) ([]byte, error) {
	if now.Before(b.quiet) {
		return nil, nil
	}
	var out []byte
	for seen := 0; ; {
		n, _, err := unix.Recvfrom(b.fd, b.buf, 0)
		switch {
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.ENETDOWN):
			continue
		case errors.Is(err, unix.EAGAIN):
			if b.missed { // what was seen while nobody looked is too old
				b.missed, out = false, nil
			}
			return out, nil
		case err != nil:
			return nil, fmt.Errorf("read frames for the guest on %s: %w", b.tap, err)
		}
		if seen += n + inboxFrame; b.missed && seen > 2*inboxKernel { // still flooded, and faster than this reads
			b.quiet = now.Add(inboxQuiet)
			return nil, nil
		}
		if len(out)+n > inboxTake && !b.missed {
			b.quiet, b.missed = now.Add(inboxQuiet), true
			return nil, nil
		}
		if !b.missed {
			out = append(binary.LittleEndian.AppendUint32(out, uint32(n)), b.buf[:n]...)
		}
	}
}

// Await waits until frames are there for Take, or d has passed.
func (b *Inbox) Await(d time.Duration) {
	_, _ = unix.Poll([]unix.PollFd{{Fd: int32(b.fd), Events: unix.POLLIN}}, int(d.Milliseconds())) // either way Take is next
}

// Deliver hands frames that another Inbox took to the guest of this tap.
// Malformed input is refused; what came before it is delivered. A frame that the
// tap does not take is left out; the first such error is returned.
func (b *Inbox) Deliver(frames []byte) error {
	var refused error
	for len(frames) > 0 {
		if len(frames) < inboxPrefix {
			return fmt.Errorf("deliver frames on %s: %d bytes left, a head takes %d", b.tap, len(frames), inboxPrefix)
		}
		n := int64(binary.LittleEndian.Uint32(frames))
		frames = frames[inboxPrefix:]
		if n < vnetHeaderShort || n > maxSeen || n > int64(len(frames)) {
			return fmt.Errorf("deliver frames on %s: frame of %d bytes, %d are left, %d to %d allowed", b.tap, n, len(frames), vnetHeaderShort, maxSeen)
		}
		if _, err := unix.Write(b.fd, frames[:n]); err != nil {
			refused = cmp.Or(refused, fmt.Errorf("deliver frames on %s: %w", b.tap, err))
		}
		frames = frames[n:]
	}
	return refused
}

// Close ends the watching.
func (b *Inbox) Close() error {
	if err := unix.Close(b.fd); err != nil {
		return fmt.Errorf("close inbox of %s: %w", b.tap, err)
	}
	return nil
}
