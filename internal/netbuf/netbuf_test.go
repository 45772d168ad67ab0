package netbuf_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sort"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"perdure/internal/hostnet"
	"perdure/internal/netbuf"
	"perdure/internal/qemu"
	"perdure/internal/qemu/qemutest"
)

const (
	numbered = 0x88b5 // ethertypes of the test guest
	ask      = 0x88b6
	answer   = 0x88b7
)

// wire is a tap and what comes out of it.
type wire struct {
	name string
	fd   int
	file *os.File

	mu     sync.Mutex
	seen   []uint32 // numbers of the guest's frames, in order
	big    int
	answer chan []byte
	other  []string
}

func newWire(t *testing.T, name string) *wire {
	t.Helper()
	tap := &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: name}, Mode: netlink.TUNTAP_MODE_TAP}
	check(t, netlink.LinkAdd(tap))
	check(t, os.WriteFile("/proc/sys/net/ipv6/conf/"+name+"/disable_ipv6", []byte("1"), 0))
	check(t, netlink.LinkSetUp(tap))
	link, err := netlink.LinkByName(name)
	check(t, err)
	proto := int(binary.NativeEndian.Uint16([]byte{0, unix.ETH_P_ALL}))
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, proto)
	check(t, err)
	check(t, unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: uint16(proto), Ifindex: link.Attrs().Index}))
	check(t, unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20))
	w := &wire{name: name, fd: fd, file: os.NewFile(uintptr(fd), name), answer: make(chan []byte, 16)}
	done := make(chan struct{})
	go func() { defer close(done); w.listen() }()
	t.Cleanup(func() { w.file.Close(); <-done })
	return w
}

func (w *wire) listen() {
	b := make([]byte, 70000)
	for {
		n, err := w.file.Read(b)
		if errors.Is(err, unix.ENETDOWN) {
			continue
		}
		if err != nil {
			return
		}
		f := b[:n]
		w.mu.Lock()
		switch kind := binary.BigEndian.Uint16(f[12:]); {
		case kind == numbered:
			w.seen = append(w.seen, binary.BigEndian.Uint32(f[18:]))
		case kind == 0x0800 && n == 65000:
			w.big++
			w.seen = append(w.seen, binary.BigEndian.Uint32(f[58:]))
		case kind == answer:
			w.answer <- append([]byte(nil), f...)
		case kind == ask:
		default:
			w.other = append(w.other, fmt.Sprintf("%d bytes, type %#x", n, kind))
		}
		w.mu.Unlock()
	}
}

func (w *wire) count() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.seen)
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func until(t *testing.T, ctx context.Context, what string, f func() bool) {
	t.Helper()
	for !f() {
		if ctx.Err() != nil {
			t.Fatal("waited in vain until ", what)
		}
		time.Sleep(time.Millisecond)
	}
}

// set is a guest with two NICs whose output is diverted.
type set struct {
	*qemutest.Guest
	wires []*wire
	taps  []*hostnet.Tap
	div   []*netbuf.Diverter
}

func newSet(t *testing.T, command string, o netbuf.Options) *set {
	t.Helper()
	qemutest.NetNS(t)
	m := qemutest.Machine(t, command)
	s := &set{}
	var files []*os.File
	for i := range 2 {
		s.wires = append(s.wires, newWire(t, fmt.Sprintf("tap%d", i)))
		tap, err := hostnet.OpenTap(s.wires[i].name)
		check(t, err)
		t.Cleanup(func() { check(t, tap.Close()) })
		file, err := tap.Inherit()
		check(t, err)
		s.taps, files = append(s.taps, tap), append(files, file)
		m.NICs = append(m.NICs, qemu.NIC{ID: fmt.Sprintf("net%d", i), FD: qemu.FirstFile + i, MAC: fmt.Sprintf("52:54:00:00:00:%02x", i)})
	}
	s.Guest = qemutest.Start(t, m, files...)
	for _, f := range files {
		check(t, f.Close())
	}
	for i := range 2 {
		d, err := netbuf.Divert(qemutest.Context(t), s.Q, m.NICs[i].ID, s.Dir, o)
		check(t, err)
		t.Cleanup(func() { d.Close() })
		s.div = append(s.div, d)
	}
	return s
}

// epoch stops the guest and returns the frames that it sent until then.
func (s *set) epoch(t *testing.T, ctx context.Context) []netbuf.Frames {
	t.Helper()
	st, err := s.Q.Stop(ctx)
	check(t, err)
	if !st.WasRunning {
		t.Fatal("guest was ", st.Status)
	}
	var f []netbuf.Frames
	for _, d := range s.div {
		x, err := d.Drain(ctx)
		check(t, err)
		f = append(f, x)
	}
	return f
}

func (s *set) cont(t *testing.T, ctx context.Context) {
	t.Helper()
	check(t, s.Q.Cont(ctx))
}

// TestEpochs: through many epochs, each frame leaves exactly once, in order,
// and not before it was released; a frame that was released does not come back (the loop that the order of
// the filters prevents).
func TestEpochs(t *testing.T) {
	s := newSet(t, "frames gso gap=300000", netbuf.Options{})
	ctx := qemutest.Context(t)
	check(t, s.Q.Cont(ctx))
	total := []int{0, 0}
	for k := range 60 {
		until(t, ctx, "frames wait", func() bool {
			n, _, since := s.div[0].Waiting()
			m, _, _ := s.div[1].Waiting()
			return n > 3 && m > 3 && !since.IsZero()
		})
		f := s.epoch(t, ctx)
		for i := range f {
			if n := s.wires[i].count(); n > total[i] {
				t.Fatalf("NIC %d: %d frames left, %d were released", i, n, total[i])
			}
			total[i] += f[i].Len()
			if n, _, _ := s.div[i].Waiting(); n != 0 {
				t.Fatalf("%d frames wait after Drain", n)
			}
		}
		// Frames leave whether the guest stands still or not.
		for i := range f {
			if k%2 == 0 {
				check(t, f[i].Send(s.taps[i]))
			}
		}
		s.cont(t, ctx)
		for i := range f {
			if k%2 != 0 {
				check(t, f[i].Send(s.taps[i]))
			}
		}
	}
	for i, w := range s.wires {
		until(t, ctx, "all released frames have left", func() bool { return w.count() >= total[i] })
	}
	f := s.epoch(t, ctx)
	for i, w := range s.wires {
		st := s.div[i].Stats()
		if int(st.Frames) != total[i]+f[i].Len() || st.Dropped != 0 {
			t.Errorf("NIC %d: %+v, released %d, last epoch %d", i, st, total[i], f[i].Len())
		}
		for k, n := range w.seen {
			if int(n) != k+1 {
				t.Fatalf("NIC %d: frame %d came as number %d", i, n, k+1)
			}
		}
		if w.big == 0 {
			t.Error("no frame of 65,000 bytes came whole")
		}
		t.Logf("NIC %d: %d frames, %d of them big; others on the tap: %v", i, len(w.seen), w.big, w.other)
		f[i].Drop()
	}
	// Without the diversion they go straight out.
	for _, d := range s.div {
		check(t, d.Remove(ctx))
	}
	check(t, s.Q.Cont(ctx))
	for i, w := range s.wires {
		until(t, ctx, "frames leave without a diversion", func() bool { return w.count() > total[i]+10 })
	}
	// And it can be had again.
	_, err := s.Q.Stop(ctx)
	check(t, err)
	d, err := netbuf.Divert(ctx, s.Q, "net0", s.Dir, netbuf.Options{})
	check(t, err)
	check(t, s.Q.Cont(ctx))
	until(t, ctx, "frames arrive again", func() bool { n, _, _ := d.Waiting(); return n > 5 })
	check(t, d.Close())
}

// TestRoundTrip measures what a request/response client waits for when each
// answer is released at once: the cost of the diversion alone.
func TestRoundTrip(t *testing.T) {
	s := newSet(t, "", netbuf.Options{})
	ctx := qemutest.Context(t)
	check(t, s.Q.Cont(ctx))
	var direct, held, pause []time.Duration
	request := make([]byte, 60)
	binary.BigEndian.PutUint16(request[12:], ask)
	until(t, ctx, "the guest is up", func() bool {
		_, err := s.wires[0].file.Write(request)
		check(t, err)
		n, _, _ := s.div[0].Waiting()
		return n > 0
	})
	for quiet := false; !quiet; { // the answers to earlier questions
		select {
		case <-s.div[0].Arrived():
		case <-time.After(100 * time.Millisecond):
			quiet = true
		}
	}
	for i := -1; i < 200; i++ {
		began := time.Now()
		_, err := s.wires[0].file.Write(request)
		check(t, err)
		select {
		case <-s.div[0].Arrived():
		case <-ctx.Done():
			t.Fatal("no answer arrived")
		}
		if i < 0 {
			select {
			case <-s.wires[0].answer:
				t.Fatal("the answer left before it was released")
			case <-time.After(20 * time.Millisecond):
			}
		}
		stop := time.Now()
		f := s.epoch(t, ctx)
		s.cont(t, ctx)
		pause = append(pause, time.Since(stop))
		if i < 0 { // with the answers to the first questions
			f[0].Drop()
			continue
		}
		if f[0].Len() != 1 || f[1].Len() != 0 {
			t.Fatalf("epoch has %d and %d frames, want 1 and 0", f[0].Len(), f[1].Len())
		}
		check(t, f[0].Send(s.taps[0]))
		<-s.wires[0].answer
		held = append(held, time.Since(began))
	}
	s.epoch(t, ctx)
	for _, d := range s.div {
		check(t, d.Remove(ctx))
	}
	check(t, s.Q.Cont(ctx))
	for range 200 {
		began := time.Now()
		_, err := s.wires[0].file.Write(request)
		check(t, err)
		<-s.wires[0].answer
		direct = append(direct, time.Since(began))
	}
	for _, x := range [][]time.Duration{direct, held, pause} {
		sort.Slice(x, func(i, j int) bool { return x[i] < x[j] })
	}
	t.Logf("round trip direct %v, with hold, stop, drain, cont, release %v (of it pause %v); medians of 200", direct[100], held[100], pause[100])
}

func TestBound(t *testing.T) {
	bound := make(chan int64, 4)
	s := newSet(t, "frames gso gap=100000", netbuf.Options{MaxBytes: 1 << 20, OnBound: func(nic string, n int64) {
		if nic == "net0" {
			bound <- n
		}
	}})
	ctx := qemutest.Context(t)
	check(t, s.Q.Cont(ctx))
	select {
	case n := <-bound:
		if n <= 1<<20 || n > 1<<20+70000 {
			t.Errorf("bound of 1 MiB was said to be crossed at %d bytes", n)
		}
	case <-ctx.Done():
		t.Fatal("bound not noticed")
	}
	// Nobody stops the guest: it goes on, and so does QEMU; what cannot be held is dropped.
	until(t, ctx, "frames are dropped", func() bool { return s.div[0].Stats().Dropped > 10 })
	if _, n, _ := s.div[0].Waiting(); n > 2<<20 {
		t.Errorf("%d bytes held, hard bound is 2 MiB", n)
	}
	if len(bound) != 0 {
		t.Error("bound reported more than once")
	}
	f := s.epoch(t, ctx)
	s.cont(t, ctx)
	check(t, f[0].Send(s.taps[0])) // still well-formed
	until(t, ctx, "the frames have left", func() bool { return s.wires[0].count() >= f[0].Len() })
	until(t, ctx, "the bound is crossed again", func() bool { return len(bound) > 0 })
}

func TestEndOfQEMU(t *testing.T) {
	s := newSet(t, "frames", netbuf.Options{})
	ctx := qemutest.Context(t)
	check(t, s.Q.Cont(ctx))
	until(t, ctx, "frames wait", func() bool { n, _, _ := s.div[0].Waiting(); return n > 0 })
	f := s.epoch(t, ctx)
	check(t, s.Kill())
	<-s.Exited()
	until(t, ctx, "the end is noticed", func() bool { return s.div[0].Err() != nil })
	// What was drained is whole, and leaves though QEMU is gone.
	n, want := f[0].Len(), s.wires[0].count()
	check(t, f[0].Send(s.taps[0]))
	until(t, ctx, "the last frames have left", func() bool { return s.wires[0].count() == want+n })
	if _, err := s.div[0].Drain(ctx); err == nil {
		t.Error("drained a dead QEMU")
	}
	if err := s.div[0].Remove(ctx); err == nil {
		t.Error("Remove says nothing of the dead QEMU")
	}
}

func TestDivertUndoes(t *testing.T) {
	qemutest.NetNS(t)
	m := qemutest.Machine(t, "")
	w := newWire(t, "tap0")
	m.NICs = []qemu.NIC{{ID: "net0", Tap: w.name, MAC: "52:54:00:00:00:01"}}
	g := qemutest.Start(t, m)
	ctx := qemutest.Context(t)
	if _, err := netbuf.Divert(ctx, g.Q, "net9", g.Dir, netbuf.Options{}); err == nil {
		t.Fatal("diverted a NIC that is not there")
	}
	raw, err := g.Q.Execute(ctx, "query-chardev", nil)
	check(t, err)
	if s := string(raw); s == "" || strings.Contains(s, "pd-c-") {
		t.Errorf("left behind: %s", s)
	}
	if d, err := netbuf.Divert(ctx, g.Q, "net0", g.Dir, netbuf.Options{}); err != nil {
		t.Error(err)
	} else {
		check(t, d.Remove(ctx))
	}
}
