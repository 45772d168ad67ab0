package hostnet

import (
	"bytes"
	"encoding/binary"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TestTapSend: what the shim sends goes the guest's way: through the gate, with
// whichever header the tap wants at the moment.
func TestTapSend(t *testing.T) {
	f := newField(t, tap0)
	check(t, f.in.Close())
	tap, err := OpenTap(tap0)
	check(t, err)
	defer func() { check(t, tap.Close()) }()
	if _, err := OpenTap(tap0); err == nil {
		t.Error("two are attached to one tap")
	}
	out := listen(t, f.far(t))
	frame := func(n byte) []byte {
		b := append([]byte("\xff\xff\xff\xff\xff\xff\x02\x00\x00\x00\x00\x01\x88\xb5"), make([]byte, 46)...)
		b[14] = n
		return b
	}
	check(t, tap.SendPlain(frame(1))) // the gate is shut
	check(t, f.gate.Open([]string{tap0}, time.Minute))
	for n, size := range []int{vnetHeaderShort, vnetHeaderLong} {
		check(t, unix.IoctlSetPointerInt(tap.fd, unix.TUNSETVNETHDRSZ, size))
		check(t, tap.SendPlain(frame(byte(2+2*n))))
		check(t, tap.Send(append(make([]byte, vnetHeaderLong), frame(byte(3+2*n))...), vnetHeaderLong))
	}
	tv := unix.NsecToTimeval(int64(10 * time.Second))
	check(t, unix.SetsockoptTimeval(out, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv))
	b := make([]byte, 200)
	for want := byte(2); want <= 5; want++ {
		n, _, err := unix.Recvfrom(out, b, 0)
		check(t, err)
		if n != 60 || b[14] != want {
			t.Fatalf("frame %d of %d bytes came, want %d of 60", b[14], n, want)
		}
	}
	for _, bad := range []int{0, 8, 11, 13, 100} {
		if err := tap.Send(make([]byte, 60), bad); err == nil {
			t.Errorf("a header of %d bytes was taken", bad)
		}
	}
}

// far is the index of the device behind the bridge's other port.
func (f *field) far(t *testing.T) int {
	t.Helper()
	l, err := netlink.LinkByName("far")
	check(t, err)
	return l.Attrs().Index
}

// sendFar sends a frame, behind a virtio-net header, towards the guest.
func (f *field) sendFar(t *testing.T, header, frame []byte) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	check(t, err)
	defer unix.Close(fd)
	check(t, unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1))
	err = unix.Sendto(fd, append(bytes.Clone(header), frame...), 0, &unix.SockaddrLinklayer{Ifindex: f.far(t), Halen: 6})
	check(t, err)
}

// TestInbox: frames for the guest are seen, also when nobody reads the tap, and
// come to another guest as they were: a large one whole, with its checksum still
// to be filled in. Frames of the guest are not seen.
func TestInbox(t *testing.T) {
	f := newField(t, tap0)
	check(t, f.in.Close())
	tap, err := OpenTap(tap0)
	check(t, err)
	defer tap.Close()
	const other = "pd0123456789a01"
	check(t, CreateTap(other, "", ""))
	dst, err := OpenTap(other)
	check(t, err)
	defer dst.Close()
	for _, x := range []*Tap{tap, dst} { // as QEMU does for a guest that takes large frames
		check(t, unix.IoctlSetInt(x.fd, unix.TUNSETOFFLOAD, unix.TUN_F_CSUM|unix.TUN_F_TSO4))
	}
	in, err := OpenInbox(tap0)
	check(t, err)
	defer func() { check(t, in.Close()) }()
	feed, err := OpenInbox(other)
	check(t, err)
	defer feed.Close()

	small := append([]byte("\xff\xff\xff\xff\xff\xff\x02\x00\x00\x00\x00\x02\x88\xb5"), bytes.Repeat([]byte{7}, 46)...)
	gso := make([]byte, 10)
	gso[0], gso[1] = 1, 1 // the checksum is to be filled in; TCP over IPv4 to be cut up
	binary.NativeEndian.PutUint16(gso[2:], 54)
	binary.NativeEndian.PutUint16(gso[4:], 1448)
	binary.NativeEndian.PutUint16(gso[6:], 34)
	binary.NativeEndian.PutUint16(gso[8:], 16)
	big := make([]byte, 20000)
	copy(big, "\xff\xff\xff\xff\xff\xff\x02\x00\x00\x00\x00\x02\x08\x00\x45\x00")
	binary.BigEndian.PutUint16(big[16:], uint16(len(big)-14))
	big[22], big[23], big[46] = 64, unix.IPPROTO_TCP, 0x50
	sum := uint32(0) // a bridge may look at the IP header (RFC 791)
	for i := 14; i < 34; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(big[i:]))
	}
	binary.BigEndian.PutUint16(big[24:], ^uint16(sum+sum>>16))
	for i := 54; i < len(big); i++ {
		big[i] = byte(i * 31 >> 3)
	}
	f.sendFar(t, make([]byte, 10), small)
	check(t, tap.SendPlain(small)) // of the guest
	f.sendFar(t, gso, big)

	var got []byte
	for end := time.Now().Add(10 * time.Second); len(got) < 4+10+len(small)+4+10+len(big); {
		in.Await(100 * time.Millisecond)
		b, err := in.Take(time.Now())
		check(t, err)
		if got = append(got, ours(b)...); time.Now().After(end) {
			t.Fatalf("%d bytes seen", len(got))
		}
	}
	check(t, feed.Deliver(got))
	b := make([]byte, 70000)
	for n, want := range [][]byte{small, big} {
		k := read(t, dst.fd, b)
		if !bytes.Equal(b[vnetHeaderShort:k], want) {
			t.Errorf("frame %d: %d bytes came, want %d, or they differ", n, k-vnetHeaderShort, len(want))
		}
		if n == 1 && b[0]&1 == 0 {
			t.Error("the large frame lost what says that its checksum is missing")
		}
	}
	if x, err := in.Take(time.Now()); err != nil || len(ours(x)) > 0 {
		t.Errorf("%d more bytes seen, %v: of the guest's own?", len(x), err)
	}
	for _, bad := range [][]byte{{1}, {1, 0, 0, 0, 9}, {200, 0, 0, 0, 1}, {255, 255, 255, 255, 1}, append([]byte{4, 0, 0, 0}, small...)} {
		if err := feed.Deliver(bad); err == nil {
			t.Errorf("delivered % x", bad)
		}
	}
	if n, err := unix.Read(dst.fd, b); err == nil {
		t.Errorf("%d bytes came out of bad input", n)
	}
}

// ours leaves out what the kernel says by itself on a new network.
func ours(frames []byte) (out []byte) {
	for len(frames) > 0 {
		n := 4 + int(binary.LittleEndian.Uint32(frames))
		if string(frames[4+10+6:4+10+12]) == "\x02\x00\x00\x00\x00\x02" {
			out = append(out, frames[:n]...)
		}
		frames = frames[n:]
	}
	return out
}

func read(t *testing.T, fd int, b []byte) int {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); ; {
		_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 100)
		n, err := unix.Read(fd, b)
		if err == nil {
			return n
		}
		if time.Now().After(end) {
			t.Fatal("no frame came: ", err)
		}
	}
}

// TestInboxFlood: more than is worth repeating is forgotten, and looked at
// again after a while.
func TestInboxFlood(t *testing.T) {
	f := newField(t, tap0)
	check(t, f.in.Close())
	tap, err := OpenTap(tap0)
	check(t, err)
	defer tap.Close()
	in, err := OpenInbox(tap0)
	check(t, err)
	defer in.Close()
	frame := append([]byte("\xff\xff\xff\xff\xff\xff\x02\x00\x00\x00\x00\x02\x88\xb5"), make([]byte, 1400)...)
	now := time.Now()
	for range 600 {
		f.sendFar(t, make([]byte, 10), frame)
	}
	if b, err := in.Take(now); err != nil || len(b) > inboxTake {
		t.Fatalf("%d bytes of a flood, %v", len(b), err)
	}
	f.sendFar(t, make([]byte, 10), frame)
	if b, err := in.Take(now.Add(inboxQuiet / 2)); err != nil || len(b) > 0 {
		t.Fatalf("looked at again too early: %d bytes, %v", len(b), err)
	}
	if b, err := in.Take(now.Add(2 * inboxQuiet)); err != nil || len(b) > 0 {
		t.Fatalf("gave what is too old: %d bytes, %v", len(b), err)
	}
	f.sendFar(t, make([]byte, 10), frame)
	if b, err := in.Take(now.Add(3 * inboxQuiet)); err != nil || len(b) != 4+10+len(frame) {
		t.Fatalf("after the flood: %d bytes, %v", len(b), err)
	}
}
