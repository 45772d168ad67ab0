package shim

import (
	"errors"
	"log/slog"
	"net"
	"os"
	"testing"
	"time"

	"perdure/internal/hostnet"
	"perdure/internal/qemu/qemutest"
	"perdure/internal/testenv"
)

// carrier is a standby with one tap, whose guest reads at dst.
func carrier(t *testing.T) (st *standby, tap *hostnet.Tap) {
	t.Helper()
	testenv.Root(t)
	qemutest.NetNS(t)
	const name = "pd0123456789a00"
	if err := hostnet.CreateTap(name, "", ""); err != nil {
		t.Fatal(err)
	}
	tap, err := hostnet.OpenTap(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tap.Close() })
	// The kernel drops what is sent before it has taken notice of the link, which it does once a second where others have just changed.
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		i, err := net.InterfaceByName(name)
		if err != nil {
			t.Fatal(err)
		}
		if i.Flags&net.FlagRunning != 0 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("%s does not run: %v", name, i.Flags)
		}
	}
	log := slog.New(slog.DiscardHandler)
	s := &Shim{log: log, tl: newTimeline("vm", "b", nil, log)}
	return &standby{s: s, inst: &instance{taps: []string{name}}}, tap
}

func inputOf(epoch uint64) []byte {
	frame := append([]byte("\xff\xff\xff\xff\xff\xff\x02\x00\x00\x00\x00\x02\x88\xb5"), make([]byte, 46)...)
	frame[14] = byte(epoch)
	frame = append(make([]byte, 10), frame...)
	b := append(pack(inputHead{Epoch: epoch}), byte(len(frame)), 0, 0, 0)
	return append(b, frame...)
}

func openFiles(t *testing.T) int {
	t.Helper()
	l, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(l)
}

// got returns which of the frames of inputOf a guest has got.
func got(t *testing.T, tap *hostnet.Tap, want int) (numbers []byte) {
	t.Helper()
	f, err := tap.Inherit()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	for b := make([]byte, 2000); len(numbers) < want; {
		n, err := f.Read(b)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return numbers
		}
		if err == nil && n == 10+60 && b[10+12] == 0x88 {
			numbers = append(numbers, b[10+14])
		}
	}
	return numbers
}

// TestInputDelivered: exactly what the guest's epoch does not contain comes to
// it, and what comes later at once.
func TestInputDelivered(t *testing.T) {
	st, tap := carrier(t)
	for _, n := range []uint64{7, 8, 9} {
		if err := st.takeInput(inputOf(n)); err != nil {
			t.Fatal(err)
		}
	}
	st.input[2].at = time.Now().Add(-time.Minute) // too old for any network
	st.deliverInput(7)
	if err := st.takeInput(inputOf(10)); err != nil {
		t.Fatal(err)
	}
	if n := got(t, tap, 2); string(n) != "\x08\x0a" {
		t.Errorf("frames % x came, want 08 and 0a", n)
	}
	st.endCarrying()
	for _, bad := range [][]byte{nil, make([]byte, 5), append(pack(inputHead{NIC: 1}), 1, 2, 3)} {
		if err := st.takeInput(bad); err == nil {
			t.Errorf("took % x", bad)
		}
	}
}

// TestInputEndsBeforeItBegins: the session may be gone before the guest runs.
// Nothing is left open then, and what still comes harms nobody.
func TestInputEndsBeforeItBegins(t *testing.T) {
	st, _ := carrier(t)
	st.endCarrying()
	before := openFiles(t)
	if err := st.takeInput(inputOf(8)); err != nil {
		t.Fatal(err)
	}
	st.deliverInput(7)
	if err := st.takeInput(inputOf(9)); err != nil {
		t.Fatal(err)
	}
	if n := openFiles(t); n != before {
		t.Errorf("%d files open, %d before", n, before)
	}
}
