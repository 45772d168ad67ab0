package hostnet

import (
	"bytes"
	"encoding/binary"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestFrameBefore picks one frame of what an Inbox took.
func TestFrameBefore(t *testing.T) {
	var all []byte
	for n := range 5 {
		all = append(binary.LittleEndian.AppendUint32(all, uint32(20+n)), make([]byte, 20+n)...)
	}
	for n, want := range map[int]int{-1: 0, 0: 24, 1: 23, 4: 20, 5: 0, 9: 0} {
		if want > 0 {
			want += inboxPrefix
		}
		if got := FrameBefore(all, n); len(got) != want {
			t.Errorf("before the last %d: %d bytes, want %d", n, len(got), want)
		}
	}
	if got := FrameBefore(nil, 0); got != nil {
		t.Error("a frame out of nothing")
	}
	for n := range all { // torn: no more than no crash is asked for
		FrameBefore(all[:n], 0)
		FrameBefore(all[:n], 2)
	}
}

// TestUnread: what waits in a tap can be handed on, and with what an Inbox saw it
// says which frame somebody else has taken out.
func TestUnread(t *testing.T) {
	f := newField(t, tap0)
	check(t, f.in.Close())
	tap, err := OpenTap(tap0)
	check(t, err)
	defer tap.Close()
	in, err := OpenInbox(tap0)
	check(t, err)
	defer in.Close()
	frame := func(n byte) []byte {
		b := append([]byte("\xff\xff\xff\xff\xff\xff\x02\x00\x00\x00\x00\x02\x88\xb5"), make([]byte, 46)...)
		b[14] = n
		return b
	}
	for n := range 4 {
		f.sendFar(t, make([]byte, 10), frame(byte(n)))
	}
	var seen []byte
	for end := time.Now().Add(10 * time.Second); len(ours(seen)) < 4*(4+10+60); {
		in.Await(100 * time.Millisecond)
		b, err := in.Take(time.Now())
		check(t, err)
		if seen = append(seen, ours(b)...); time.Now().After(end) {
			t.Fatalf("%d bytes seen", len(seen))
		}
	}
	for _, size := range []int{vnetHeaderShort, vnetHeaderLong} { // whichever the guest's driver chose
		check(t, unix.IoctlSetPointerInt(tap.fd, unix.TUNSETVNETHDRSZ, size))
		if size == vnetHeaderLong {
			seen = nil
			for n := range 4 {
				f.sendFar(t, make([]byte, 10), frame(byte(n)))
			}
			for end := time.Now().Add(10 * time.Second); len(ours(seen)) < 4*(4+10+60) && time.Now().Before(end); {
				in.Await(100 * time.Millisecond)
				b, err := in.Take(time.Now())
				check(t, err)
				seen = append(seen, ours(b)...)
			}
		}
		buf := make([]byte, 2048)
		for n := byte(9); n != 0; n = buf[size+14] { // as a QEMU whose guest stands still does; the kernel's own come first
			k := read(t, tap.fd, buf)
			if string(buf[size+6:size+12]) != "\x02\x00\x00\x00\x00\x02" || k < size+60 {
				buf[size+14] = 9
			}
		}
		got, waits, err := tap.Unread()
		check(t, err)
		if got = ours(got); waits < 3 || len(got) != 3*(4+10+60) || !bytes.Equal(got, seen[4+10+60:]) {
			t.Fatalf("header of %d: %d frames wait, %d bytes: want the last 3 of what was seen", size, waits, len(got))
		}
		if x := FrameBefore(seen, 3); len(x) != 4+10+60 || x[4+10+14] != 0 {
			t.Errorf("the frame that was taken out is not the first: % x", x)
		}
		if _, again, err := tap.Unread(); err != nil || again != 0 {
			t.Errorf("%d frames are still there, %v", again, err)
		}
	}
}
