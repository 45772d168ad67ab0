package e2e

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"perdure/internal/client"
	"perdure/internal/lab"
	"perdure/internal/lab/guestsvc"
)

// lockedBuffer collects the output of a command that still runs.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// watchConsole runs perdure vm console on a host until the test ends.
func (v *VM) watchConsole(host string) (out, said *lockedBuffer) {
	v.w.T.Helper()
	out, said = &lockedBuffer{}, &lockedBuffer{}
	ctx, cancel := context.WithCancel(v.w.Ctx)
	cmd := v.w.Lab.Command(ctx, host, "perdure", "vm", "console", v.Name)
	cmd.Stdout, cmd.Stderr = out, said
	v.w.must(cmd.Start(), "start console")
	v.w.T.Cleanup(func() {
		cancel()
		_ = cmd.Wait() // killed
	})
	return out, said
}

var consoleLine = regexp.MustCompile(`(?m)^line (\d+) of the console\r*$`)

// consoleLines returns the numbers of the lines shown whole.
func consoleLines(text string) []int {
	var out []int
	for _, m := range consoleLine.FindAllStringSubmatch(text, -1) {
		n, err := strconv.Atoi(m[1])
		if err == nil {
			out = append(out, n)
		}
	}
	return out
}

// echoChunk is sent at once and comes back before the next: a window that is
// open lets it leave in segments as long as there can be.
const echoChunk = 128 << 10

// startEcho sends random bytes to the echo service until stop is closed, and
// compares what comes back. The result is how many did, and what went wrong.
func (v *VM) startEcho(stop <-chan struct{}) (result func() (int64, error)) {
	v.w.T.Helper()
	o := v.options(guestsvc.PortEcho, 0)
	conn, err := o.Dial(v.w.Ctx, o.Addr)
	v.w.must(err, "dial echo")
	v.w.T.Cleanup(func() { conn.Close() })
	// One that paces itself (BBR, on some machines) never sends large segments here.
	raw, err := conn.(*net.TCPConn).SyscallConn()
	v.w.must(err, "choose congestion control")
	v.w.must(raw.Control(func(fd uintptr) {
		err = unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, "reno")
	}), "choose congestion control")
	v.w.must(err, "choose congestion control")
	var n int64
	done := make(chan error, 1)
	go func() {
		src := rand.NewChaCha8([32]byte{1})
		out, back := make([]byte, echoChunk), make([]byte, echoChunk)
		for {
			select {
			case <-stop:
				done <- nil
				return
			default:
			}
			src.Read(out)
			_, err := conn.Write(out)
			if err == nil {
				_, err = io.ReadFull(conn, back)
			}
			if err == nil && !bytes.Equal(out, back) {
				err = errors.New("other bytes came back than were sent")
			}
			if err != nil {
				done <- fmt.Errorf("after %d bytes: %w", n, err)
				return
			}
			n += echoChunk
		}
	}()
	return func() (int64, error) { err := <-done; return n, err }
}

// segments watches the taps of a host and keeps the longest frame each way.
type segments struct {
	mu                   sync.Mutex
	fromGuest, toGuest   int   // bytes, the longest
	fromBytes, toBytes   int64 // all
	fromFrames, toFrames int
}

// watchSegments begins to watch the VM's tap on a host, until the test ends or
// the host does.
func (v *VM) watchSegments(host string) *segments {
	v.w.T.Helper()
	s := &segments{}
	fd := -1
	err := v.w.Lab.InNetNS(host, func() error {
		links, err := net.Interfaces()
		if err != nil {
			return err
		}
		for _, l := range links {
			if !strings.HasPrefix(l.Name, "pd") {
				continue
			}
			// Of no protocol until it is bound to the tap.
			if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
				return err
			}
			all := uint16(unix.ETH_P_ALL>>8 | unix.ETH_P_ALL<<8&0xff00)
			tv := unix.NsecToTimeval(int64(100 * time.Millisecond))
			return errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv),
				unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: l.Index}))
		}
		return fmt.Errorf("no tap on host %s", host)
	})
	v.w.must(err, "watch tap")
	stop, done := make(chan struct{}), make(chan struct{})
	v.w.T.Cleanup(func() { close(stop); <-done; unix.Close(fd) })
	go func() {
		defer close(done)
		buf := make([]byte, 64)
		for {
			select {
			case <-stop:
				return
			default:
			}
			n, from, err := unix.Recvfrom(fd, buf, unix.MSG_TRUNC) // n: the whole frame's length
			ll, ok := from.(*unix.SockaddrLinklayer)
			if err != nil || !ok {
				if err != nil && !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
					return // the tap is gone
				}
				continue
			}
			s.mu.Lock()
			if ll.Pkttype == unix.PACKET_OUTGOING {
				s.toGuest, s.toBytes, s.toFrames = max(s.toGuest, n), s.toBytes+int64(n), s.toFrames+1
			} else {
				s.fromGuest, s.fromBytes, s.fromFrames = max(s.fromGuest, n), s.fromBytes+int64(n), s.fromFrames+1
			}
			s.mu.Unlock()
		}
	}()
	return s
}

func (s *segments) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return fmt.Sprintf("from the guest %d bytes in %d frames, the longest %d; to it %d in %d, the longest %d",
		s.fromBytes, s.fromFrames, s.fromGuest, s.toBytes, s.toFrames, s.toGuest)
}

// large reports whether much went both ways, in segments far beyond a frame on a wire.
func (s *segments) large() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.fromBytes > 2<<20 && s.toBytes > 2<<20 && s.fromGuest > 32<<10 && s.toGuest > 32<<10
}

// picture is what a VNC client sees.
type picture struct {
	width, height int
	pixels        []byte // 4 bytes each
}

// seen connects a VNC client (RFC 6143) to the display on a host and returns the picture.
func (v *VM) seen(host string) picture {
	v.w.T.Helper()
	p, err := readScreen(filepath.Join(v.w.Lab.StateDir(host), "vms", v.Name, "vnc.sock"))
	v.w.must(err, "VNC on host "+host)
	return p
}

func readScreen(socket string) (p picture, err error) {
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return p, err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	read := func(n int) []byte {
		b := make([]byte, n)
		if err == nil {
			_, err = io.ReadFull(conn, b)
		}
		return b
	}
	write := func(b ...byte) {
		if err == nil {
			_, err = conn.Write(b)
		}
	}
	if version := read(12); err == nil && !bytes.HasPrefix(version, []byte("RFB 003.")) {
		return p, fmt.Errorf("the server says %q", version)
	}
	write([]byte("RFB 003.008\n")...)
	if types := read(int(read(1)[0])); err == nil && !bytes.Contains(types, []byte{1}) {
		return p, fmt.Errorf("security types %v, none is wanted", types)
	}
	write(1)
	if result := read(4); err == nil && !bytes.Equal(result, []byte{0, 0, 0, 0}) {
		return p, fmt.Errorf("security result %v", result)
	}
	write(1) // shared
	head := read(24)
	p.width, p.height = int(binary.BigEndian.Uint16(head)), int(binary.BigEndian.Uint16(head[2:]))
	read(int(binary.BigEndian.Uint32(head[20:]))) // the name
	if err == nil && head[4] != 32 {
		return p, fmt.Errorf("%d bits for each pixel, 32 wanted", head[4])
	}
	write(2, 0, 0, 1, 0, 0, 0, 0) // encoding: raw
	write(3, 0, 0, 0, 0, 0, head[0], head[1], head[2], head[3])
	p.pixels = make([]byte, 4*p.width*p.height)
	for left := p.width * p.height; left > 0 && err == nil; {
		update := read(4)
		if err == nil && update[0] != 0 {
			return p, fmt.Errorf("message of type %d, a picture is wanted", update[0])
		}
		for range binary.BigEndian.Uint16(update[2:]) {
			r := read(12)
			x, y := int(binary.BigEndian.Uint16(r)), int(binary.BigEndian.Uint16(r[2:]))
			w, h := int(binary.BigEndian.Uint16(r[4:])), int(binary.BigEndian.Uint16(r[6:]))
			if err == nil && (x+w > p.width || y+h > p.height || binary.BigEndian.Uint32(r[8:]) != 0) {
				return p, fmt.Errorf("a part of %dx%d at %d,%d, encoding %x, in a picture of %dx%d", w, h, x, y, r[8:], p.width, p.height)
			}
			for row := range h {
				copy(p.pixels[4*((y+row)*p.width+x):], read(4*w))
			}
			left -= w * h
		}
	}
	return p, err
}

// colours counts different pixels.
func (p picture) colours() int {
	seen := map[[4]byte]bool{}
	for i := 0; i+4 <= len(p.pixels); i += 4 {
		seen[[4]byte(p.pixels[i:])] = true
	}
	return len(seen)
}

// TestDevicesTakeover takes the power of the primary's host while everything a
// guest has is in use: its serial console is read by a person, its display by a
// VNC client, and segments of up to 64 KiB stream in both directions.
func TestDevicesTakeover(t *testing.T) {
	w := Start(t)
	v := w.CreateVM(VMOptions{Append: "perdure.tick=0", Flags: []string{"--vnc"}}).Protected()
	before := v.seen("a")
	t.Logf("display: %dx%d, %d colours", before.width, before.height, before.colours())

	out, said := v.watchConsole("b")
	v.SayLines(`sh (i=0; while [ ! -e /tmp/enough ]; do i=$((i+1)); echo "line $i of the console"; busybox sleep 0.02; done >/dev/console; echo "the last was $i" >/dev/console) >/dev/null 2>&1 &`)
	// A sender bounds its segments by its rate; this asks for large ones at any.
	const large = "echo 44 > /proc/sys/net/ipv4/tcp_min_tso_segs"
	_, err := w.Lab.Output(w.Ctx, lab.Client, "/bin/sh", "-c", large)
	w.must(err, "ask for large segments")
	v.SayLines("sh " + large)
	seg := v.watchSegments("a")
	stop := make(chan struct{})
	echo := v.startEcho(stop)
	type bulk struct {
		client.BulkResult
		err error
	}
	stream := make(chan bulk, 1)
	go func() {
		o := v.options(guestsvc.PortControl, 0)
		r, err := client.Bulk(w.Ctx, o.Dial, o.Addr, 25*time.Second)
		stream <- bulk{r, err}
	}()
	w.Eventually(40*time.Second, "lines on the console, and large segments both ways", func() error {
		if n := len(consoleLines(out.String())); n < 20 || !seg.large() {
			return fmt.Errorf("%d lines; %v", n, seg)
		}
		return nil
	})
	t.Log(seg)
	if len(stream) > 0 {
		t.Fatal("the stream ended before the takeover")
	}
	w.PowerOff("a")
	shown := len(consoleLines(out.String()))
	v.Wait("state=running,primary=b", 20*time.Second)

	b := <-stream
	if b.err != nil {
		t.Errorf("stream out of the guest: %v", b.err)
	}
	close(stop)
	n, err := echo()
	t.Logf("out of the guest %d bytes, longest gap %v; %d bytes came back", b.Bytes, b.Gap.Round(time.Millisecond), n)
	if err != nil {
		t.Errorf("echo: %v", err)
	}
	v.checkConsole(shown, out, said)
	if after := v.seen("b"); after.width != before.width || after.height != before.height || !bytes.Equal(after.pixels, before.pixels) || after.colours() < 2 {
		t.Errorf("the display shows %dx%d in %d colours on b, it was %dx%d in %d", after.width, after.height, after.colours(), before.width, before.height, before.colours())
	}
	w.PowerOn("a")
	v.Protected()
	v.CheckDisks()
}

// checkConsole ends the lines on the console and checks that all were shown,
// once and in order, by one perdure vm console. shown is how many there were
// before the takeover to host b.
func (v *VM) checkConsole(shown int, out, said *lockedBuffer) {
	t := v.w.T
	t.Helper()
	v.w.Eventually(time.Minute, "the console goes on", func() error {
		if n := len(consoleLines(out.String())); n < shown+20 {
			return fmt.Errorf("%d lines, %d before the takeover; the console says: %s", n, shown, said)
		}
		return nil
	})
	v.SayLines("sh : >/tmp/enough")
	last := 0
	v.w.Eventually(time.Minute, "the end of the lines on the console", func() error {
		text := out.String()
		if i := strings.LastIndex(text, "the last was "); i < 0 || !strings.Contains(text[i:], "\n") {
			return errors.New("it has not come yet")
		} else if _, err := fmt.Sscanf(text[i:], "the last was %d", &last); err != nil {
			return err
		}
		return nil
	})
	got := consoleLines(out.String())
	for i, n := range got {
		if n != i+1 {
			t.Errorf("line %d of the console where %d belongs (%d were shown before the takeover)\n%s", n, i+1, shown, out)
			break
		}
	}
	if len(got) != last || !strings.Contains(said.String(), "connected again on b") {
		t.Errorf("%d lines shown of %d; the console says: %s", len(got), last, said)
	}
	t.Logf("console: %d lines, %d of them before the takeover: %s", len(got), shown, strings.TrimSpace(said.String()))
}
