package client

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"perdure/internal/lab/guestsvc"
)

// serve runs the guest's services here.
func serve(t *testing.T, s *guestsvc.Server) map[int]string {
	t.Helper()
	ls, addrs := map[int]net.Listener{}, map[int]string{}
	for _, p := range []int{guestsvc.PortEcho, guestsvc.PortCounter, guestsvc.PortLog, guestsvc.PortControl} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		ls[p], addrs[p] = l, l.Addr().String()
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); s.Serve(ctx, ls) }()
	t.Cleanup(func() { cancel(); <-done })
	return addrs
}

func within(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func TestCounterClean(t *testing.T) {
	addrs := serve(t, &guestsvc.Server{})
	ctx := within(t, 10*time.Second)
	c, err := StartCounter(ctx, Options{Addr: addrs[guestsvc.PortCounter]})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.WaitOK(ctx, 50); err != nil {
		t.Fatal(err)
	}
	r := c.Stop()
	if !r.Clean() || r.OK < 50 || r.Waits.N != r.OK || r.Waits.Max < r.Waits.Median {
		t.Errorf("%v", r)
	}
}

// fake answers each line with what fn says; "" closes the connection.
func fake(t *testing.T, fn func(i int, line string) string) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	t.Cleanup(func() { l.Close(); wg.Wait() })
	i := 0
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			br := bufio.NewReader(c)
			for {
				line, err := br.ReadString('\n')
				if err != nil {
					break
				}
				i++
				a := fn(i, line)
				if a == "" {
					break
				}
				fmt.Fprint(c, a)
			}
			c.Close()
		}
	})
	return l.Addr().String()
}

// TestCounterNotices feeds every kind of fault that a counter is there to see.
func TestCounterNotices(t *testing.T) {
	for _, tc := range []struct {
		name  string
		fault func(s *guestsvc.Server, line string) string // the answer to the fifth request
		want  func(CounterResult) bool
	}{
		{"skipped", func(s *guestsvc.Server, line string) string {
			s.Count([]byte(line))
			n, sum := s.Count([]byte(line))
			return fmt.Sprintf("%d %x\n", n, sum)
		}, func(r CounterResult) bool { return r.Lost == 1 && r.Repeated == 0 }},
		{"went back", func(s *guestsvc.Server, line string) string {
			var old guestsvc.Server // a guest that has forgotten the last lines
			key := strings.Fields(line)[0]
			old.Count(fmt.Appendf(nil, "%s 1\n", key))
			n, sum := old.Count([]byte(line))
			return fmt.Sprintf("%d %x\n", n, sum)
		}, func(r CounterResult) bool { return r.Repeated >= 3 }},
		{"other content", func(s *guestsvc.Server, line string) string {
			n, _ := s.Count([]byte(line))
			return fmt.Sprintf("%d %064x\n", n, 1)
		}, func(r CounterResult) bool { return r.Wrong >= 1 }},
		{"garbage", func(*guestsvc.Server, string) string { return "hello\n" }, func(r CounterResult) bool { return r.Wrong >= 1 }},
		{"connection closed", func(*guestsvc.Server, string) string { return "" }, func(r CounterResult) bool { return r.Lost == 1 && r.Err != "" }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := &guestsvc.Server{}
			addr := fake(t, func(i int, line string) string {
				if i == 5 {
					return tc.fault(s, line)
				}
				n, sum := s.Count([]byte(line))
				return fmt.Sprintf("%d %x\n", n, sum)
			})
			ctx := within(t, 10*time.Second)
			c, err := StartCounter(ctx, Options{Addr: addr})
			if err != nil {
				t.Fatal(err)
			}
			for r := c.Snapshot(); r.Sent < 20 && r.Err == "" && ctx.Err() == nil; r = c.Snapshot() {
			}
			if r := c.Stop(); r.Clean() || !tc.want(r) {
				t.Errorf("%v", r)
			}
		})
	}
}

func TestLogVerify(t *testing.T) {
	dir := t.TempDir()
	s := &guestsvc.Server{Data: []string{dir}}
	addrs := serve(t, s)
	ctx := within(t, 20*time.Second)
	start := func() *Log {
		l, err := StartLog(ctx, Options{Addr: addrs[guestsvc.PortLog]})
		if err != nil {
			t.Fatal(err)
		}
		if err := l.WaitAcked(ctx, 10); err != nil {
			t.Fatal(err)
		}
		return l
	}
	l := start()
	other := start() // somebody else's lines do no harm
	if r, err := l.Verify(ctx); err != nil || !r.Clean() {
		t.Errorf("while running: %v, %v", r, err)
	}
	other.Stop()
	l.Stop()
	r, err := l.Verify(ctx)
	if err != nil || !r.Clean() || r.Acked < 10 {
		t.Errorf("%v, %v", r, err)
	}

	// Damage the log: one line gone, one twice, one never sent.
	s.CloseLogs()
	name := filepath.Join(dir, "log")
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	text := strings.Replace(string(b), l.o.Key+" 3\n", "", 1) + l.o.Key + " 1\n" + l.o.Key + " 999999\n" + "torn line without an end"
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	r, err = l.Verify(ctx)
	if err != nil || r.Clean() || len(r.Lost) != 1 || len(r.Repeated) != 1 || len(r.Foreign) != 1 || r.Disorder == 0 {
		t.Errorf("damaged log: %v, %v", r, err)
	}
}

func TestLogReconnectsAndRefusal(t *testing.T) {
	ctx := within(t, 20*time.Second)
	addr := fake(t, func(i int, line string) string {
		if i == 4 {
			return ""
		}
		return fmt.Sprintf("%d\n", i)
	})
	l, err := StartLog(ctx, Options{Addr: addr})
	if err != nil {
		t.Fatal(err)
	}
	if err := l.WaitAcked(ctx, 20); err != nil {
		t.Fatal(err)
	}
	if r := l.Stop(); r.Breaks != 1 || r.Uncertain != 1 {
		t.Errorf("%v", r)
	}
	addrs := serve(t, &guestsvc.Server{}) // no disk
	l, err = StartLog(ctx, Options{Addr: addrs[guestsvc.PortLog]})
	if err != nil {
		t.Fatal(err)
	}
	if err := l.WaitAcked(ctx, 1); err == nil {
		t.Error("a line was acknowledged without a disk")
	}
	if r := l.Stop(); r.Refused == "" || r.Clean() {
		t.Errorf("%v", r)
	}
}

func TestControlAndBulk(t *testing.T) {
	addrs := serve(t, &guestsvc.Server{Data: []string{t.TempDir()}})
	ctx := within(t, 20*time.Second)
	addr := addrs[guestsvc.PortControl]
	lines, _, err := Control(ctx, nil, addr, "help")
	if err != nil || len(lines) < 10 {
		t.Errorf("help: %d lines, %v", len(lines), err)
	}
	_, text, err := Control(ctx, nil, addr, "fsyncbench 5")
	if f := ParseFields(text); err != nil || f["per_second"] == "" {
		t.Errorf("fsyncbench: %q, %v", text, err)
	}
	for _, bad := range []string{"nonsense", "bulk", "bulk x", "sum 7", "meter on", "fsck 1", "fsyncbench 0"} {
		if _, _, err := Control(ctx, nil, addr, bad); err == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
	r, err := Bulk(ctx, nil, addr, 200*time.Millisecond)
	if err != nil || r.Bytes == 0 || r.Rate() <= 0 {
		t.Errorf("bulk: %+v, %v", r, err)
	}
	broken := fake(t, func(int, string) string { return strings.Repeat("\x00", 16) })
	if _, err := Bulk(ctx, nil, broken, time.Second); err == nil || !strings.Contains(err.Error(), "broken") {
		t.Errorf("a broken stream: %v", err)
	}
}

func TestDialGivesUp(t *testing.T) {
	ctx := within(t, 300*time.Millisecond)
	if _, err := StartCounter(ctx, Options{Addr: "127.0.0.1:1"}); err == nil {
		t.Error("connected to nobody")
	}
}
