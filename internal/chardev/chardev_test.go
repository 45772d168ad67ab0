package chardev_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"perdure/internal/chardev"
)

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func context10(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func until(t testing.TB, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !f(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("waited in vain until ", what)
		}
	}
}

// fake is a Port with the test in QEMU's place.
func fake(t *testing.T, o chardev.Options) (*chardev.Port, net.Conn, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	p, err := chardev.Listen(path, o)
	check(t, err)
	t.Cleanup(func() { check(t, p.Close()) })
	return p, dial(t, p, path), path
}

func dial(t *testing.T, p *chardev.Port, path string) net.Conn {
	t.Helper()
	c, err := net.Dial("unix", path)
	check(t, err)
	t.Cleanup(func() { c.Close() })
	until(t, "QEMU is connected", p.Connected)
	return c
}

func write(t *testing.T, w io.Writer, s string) {
	t.Helper()
	_, err := io.WriteString(w, s)
	check(t, err)
}

func TestPassThroughAndHistory(t *testing.T) {
	p, q, path := fake(t, chardev.Options{History: 10})
	write(t, q, "boot ")
	until(t, "output is in the history", func() bool { return string(p.History()) == "boot " })
	mine, theirs := net.Pipe()
	ended := make(chan error, 1)
	go func() { ended <- p.Attach(context10(t), theirs, true) }()
	got := make([]byte, 5)
	_, err := io.ReadFull(mine, got)
	check(t, err)
	write(t, q, "login:")
	got = append(got, make([]byte, 6)...)
	_, err = io.ReadFull(mine, got[5:])
	check(t, err)
	if string(got) != "boot login:" {
		t.Errorf("client got %q", got)
	}
	if h := p.History(); string(h) != "oot login:" {
		t.Errorf("history of 10 bytes is %q", h)
	}
	write(t, mine, "root\n")
	in := make([]byte, 5)
	_, err = io.ReadFull(q, in)
	check(t, err)
	if string(in) != "root\n" {
		t.Errorf("QEMU got %q", in)
	}
	// QEMU goes and comes back; the client stays.
	check(t, q.Close())
	until(t, "the end is noticed", func() bool { return !p.Connected() })
	q = dial(t, p, path)
	write(t, q, "again")
	_, err = io.ReadFull(mine, got[:5])
	check(t, err)
	check(t, mine.Close())
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestEpochs(t *testing.T) {
	p, q, _ := fake(t, chardev.Options{})
	ctx := context10(t)
	p.SetHeld(true)
	write(t, q, "one")
	<-p.Arrived()
	if n, since := p.Waiting(); n != 3 || since.IsZero() {
		t.Error(n, since)
	}
	check(t, p.Hold(ctx))
	write(t, q, " and more") // stays in the socket, but belongs to the epoch
	if b := p.Cut(); string(b) != "one and more" {
		t.Errorf("first epoch is %q", b)
	}
	if b := p.Cut(); len(b) != 0 {
		t.Errorf("cut twice: %q", b)
	}
	// Input waits while Hold stands.
	sent := make(chan error, 1)
	go func() { sent <- p.Write(ctx, []byte("in")) }()
	check(t, q.SetReadDeadline(time.Now().Add(30*time.Millisecond)))
	if n, _ := q.Read(make([]byte, 9)); n != 0 {
		t.Error("input was sent to a stopped guest")
	}
	write(t, q, "two")
	p.Unhold()
	check(t, <-sent)
	check(t, q.SetReadDeadline(time.Time{}))
	_, err := io.ReadFull(q, make([]byte, 2))
	check(t, err)
	until(t, "second epoch arrives", func() bool { n, _ := p.Waiting(); return n == 3 })
	if len(p.History()) != 0 {
		t.Errorf("left before it was released: %q", p.History())
	}
	p.Release([]byte("one and more"))
	p.SetHeld(false)
	if h := p.History(); string(h) != "one and moretwo" {
		t.Errorf("history %q", h)
	}
	p.Unhold() // without Hold: nothing
	check(t, p.Write(ctx, []byte("x")))
}

func TestHoldDoesNotWaitForADeafGuest(t *testing.T) {
	p, _, _ := fake(t, chardev.Options{})
	ctx := context10(t)
	check(t, p.Write(ctx, []byte("never read")))
	began := time.Now()
	check(t, p.Hold(ctx))
	trips := 0
	check(t, p.Settle(ctx, func(context.Context) error { trips++; return nil }))
	if d := time.Since(began); d > time.Second || trips == 0 {
		t.Errorf("%v, %d round trips", d, trips)
	}
	if err := p.Settle(ctx, func(context.Context) error { return io.ErrClosedPipe }); !errors.Is(err, io.ErrClosedPipe) {
		t.Error(err)
	}
	p.Unhold()
	short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
	defer cancel()
	if err := p.Write(short, []byte("more")); !errors.Is(err, context.DeadlineExceeded) {
		t.Error("a second piece was sent though the first was not read:", err)
	}
}

func TestBound(t *testing.T) {
	over := make(chan int, 10)
	p, q, _ := fake(t, chardev.Options{MaxHeld: 100_000, OnBound: func(n int) { over <- n }})
	p.SetHeld(true)
	go func() {
		b := bytes.Repeat([]byte("x"), 1000)
		for {
			if _, err := q.Write(b); err != nil {
				return
			}
		}
	}()
	if n := <-over; n <= 100_000 || n > 100_000+64<<10 {
		t.Error("bound of 100,000 crossed at", n)
	}
	until(t, "reading stops at twice the bound", func() bool { n, _ := p.Waiting(); return n >= 200_000 })
	time.Sleep(20 * time.Millisecond)
	if n, _ := p.Waiting(); n > 200_000+64<<10 {
		t.Errorf("%d bytes held", n)
	}
	if len(over) != 0 {
		t.Error("bound reported twice")
	}
	check(t, p.Hold(context10(t)))
	if n := len(p.Cut()); n < 200_000 {
		t.Errorf("cut %d bytes", n)
	}
	p.Unhold()
	<-over // and on it goes
}

func TestSlowClient(t *testing.T) {
	p, q, _ := fake(t, chardev.Options{})
	mine, theirs := net.Pipe()
	defer mine.Close()
	ended := make(chan error, 1)
	go func() { ended <- p.Attach(context10(t), theirs, false) }()
	go func() {
		b := bytes.Repeat([]byte("x"), 10_000)
		for {
			if _, err := q.Write(b); err != nil {
				return
			}
		}
	}()
	if err := <-ended; !errors.Is(err, chardev.ErrSlow) {
		t.Error(err)
	}
}

func TestAttachEnds(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	p, err := chardev.Listen(path, chardev.Options{})
	check(t, err)
	ctx, cancel := context.WithCancel(context10(t))
	ended := make(chan error, 1)
	_, theirs := net.Pipe()
	go func() { ended <- p.Attach(ctx, theirs, true) }()
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	_, theirs = net.Pipe()
	go func() { ended <- p.Attach(context10(t), theirs, true) }()
	time.Sleep(5 * time.Millisecond)
	check(t, p.Close())
	check(t, p.Close())
	if err := <-ended; !errors.Is(err, chardev.ErrClosed) {
		t.Error(err)
	}
	if err := p.Attach(context10(t), theirs, true); !errors.Is(err, chardev.ErrClosed) {
		t.Error(err)
	}
	if err := p.Write(context10(t), []byte("x")); !errors.Is(err, chardev.ErrClosed) {
		t.Error(err)
	}
	if _, err := chardev.Listen("/nonexistent/s", chardev.Options{}); err == nil {
		t.Error("listens nowhere")
	}
	long := filepath.Join(t.TempDir(), strings.Repeat("x", 120))
	if _, err := chardev.Listen(long, chardev.Options{}); err == nil {
		t.Error("listens on a path that is too long")
	}
}

func TestHistoryRing(t *testing.T) {
	p, _, _ := fake(t, chardev.Options{History: 1000})
	var all []byte
	for i := range 500 {
		s := fmt.Appendf(nil, "line %d\n", i)
		all = append(all, s...)
		p.Release(s)
		if want := all[max(0, len(all)-1000):]; !bytes.Equal(p.History(), want) {
			t.Fatalf("after line %d the history is %q", i, p.History())
		}
	}
	big := bytes.Repeat([]byte("y"), 5000)
	p.Release(big)
	if h := p.History(); len(h) != 1000 || h[0] != 'y' {
		t.Error(len(h))
	}
}
