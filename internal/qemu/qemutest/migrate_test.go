package qemutest_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"perdure/internal/qemu"
	"perdure/internal/qemu/qemutest"
)

// TestMigrateBetweenMemories: a running guest goes from plain memory to a shared file and back, by
// way of an attempt that is given up. Its memory is the same, byte for byte, and its console goes on
// where it was, on the same socket.
func TestMigrateBetweenMemories(t *testing.T) {
	ctx := qemutest.Context(t)
	shm, err := os.MkdirTemp("/dev/shm", "perdure-qemu-")
	check(t, err)
	t.Cleanup(func() { os.RemoveAll(shm) })
	serial := filepath.Join(t.TempDir(), "serial")
	l, err := net.Listen("unix", serial)
	check(t, err)
	defer l.Close()
	start := func(file string, incoming bool) *qemutest.Guest {
		m := qemutest.Machine(t, "serial")
		m.SerialPath, m.Memory, m.Incoming = serial, 64<<20, incoming
		if m.MemPath = ""; file != "" {
			m.MemPath = filepath.Join(shm, file)
			check(t, os.WriteFile(m.MemPath, nil, 0o600))
			check(t, os.Truncate(m.MemPath, m.Memory))
		}
		return qemutest.Start(t, m)
	}
	g := start("", false)
	check(t, g.Q.Cont(ctx))
	lines := newCounter(t, l)
	lines.next(t)
	for n, file := range []string{"", "ram", ""} {
		before := lines.next(t)
		other := start(file, true)
		if n == 0 {
			giveUp(t, ctx, g, other)
			lines.past(t, before)
			continue
		}
		path := filepath.Join(other.Dir, "m")
		check(t, other.Q.AcceptMigration(ctx, path))
		// Not while it runs: under TCG a store may be missed, see docs/level.md.
		_, err := g.Q.Stop(ctx)
		check(t, err)
		check(t, g.Q.Migrate(ctx, path, qemu.MigrateOptions{Downtime: 100 * time.Millisecond}))
		_, err = g.Q.AwaitSwitchover(ctx, nil)
		check(t, err)
		want := dump(t, ctx, g)
		check(t, g.Q.FinishMigration(ctx))
		check(t, other.Q.AwaitMigrated(ctx))
		for { // the target may know first
			s, _, err := g.Q.Status(ctx)
			check(t, err)
			if s == qemu.StatusMigrated {
				break
			}
			if ctx.Err() != nil {
				t.Fatalf("the guest has left, and QEMU is in state %q", s)
			}
		}
		if err := g.Q.CancelMigration(ctx); !errors.Is(err, qemu.ErrMigrated) {
			t.Error("a migration that is over was cancelled:", err)
		}
		if got := dump(t, ctx, other); !bytes.Equal(got, want) {
			t.Fatalf("to %q: memory differs", file)
		}
		check(t, g.Kill())
		check(t, other.Q.Cont(ctx))
		lines.past(t, before)
		g = other
	}
	lines.whole(t)
}

// giveUp begins a migration and cancels it when the guest stands still already; then it kills the
// target in the same place. Each time the guest goes on where it was.
func giveUp(t *testing.T, ctx context.Context, g, other *qemutest.Guest) {
	for _, kill := range []bool{false, true} {
		path := filepath.Join(other.Dir, fmt.Sprint("m", kill))
		if kill {
			m := other.Machine
			m.QMPPath += "2"
			other = qemutest.Start(t, m)
		}
		check(t, other.Q.AcceptMigration(ctx, path))
		check(t, g.Q.Migrate(ctx, path, qemu.MigrateOptions{Downtime: 100 * time.Millisecond}))
		_, err := g.Q.AwaitSwitchover(ctx, nil)
		check(t, err)
		if s, running, err := g.Q.Status(ctx); err != nil || running {
			t.Fatalf("the guest runs at the switch: %s, %v", s, err)
		}
		if kill {
			check(t, other.Kill())
			<-other.Exited()
			if err := g.Q.FinishMigration(ctx); err == nil {
				t.Fatal("a guest went to a QEMU that is dead")
			}
		}
		check(t, g.Q.CancelMigration(ctx))
		if s, running, err := g.Q.Status(ctx); err != nil || !running {
			t.Fatalf("the guest does not go on: %s, %v", s, err)
		}
		if !kill {
			check(t, other.Kill())
			<-other.Exited()
		}
	}
}

func dump(t *testing.T, ctx context.Context, g *qemutest.Guest) []byte {
	t.Helper()
	path := filepath.Join(g.Dir, "dump")
	check(t, g.Q.PMemSave(ctx, 1<<20, g.Machine.Memory-1<<20, path))
	b, err := os.ReadFile(path)
	check(t, err)
	return b
}

// counter follows the numbered lines of the guest over all connections.
type counter struct {
	lines chan string
	text  []string
}

func newCounter(t *testing.T, l net.Listener) *counter {
	c := &counter{lines: make(chan string, 1<<16)}
	go func() {
		for {
			conn, err := l.Accept() // one after the other, as the shim does
			if err != nil {
				return
			}
			for r := bufio.NewReader(conn); ; {
				s, err := r.ReadString('\n')
				if s = strings.TrimSpace(s); s != "" {
					c.lines <- s
				}
				if err != nil {
					break
				}
			}
			conn.Close()
		}
	}()
	return c
}

// next returns how many lines have come, after one more.
func (c *counter) next(t *testing.T) int {
	t.Helper()
	select {
	case s := <-c.lines:
		c.text = append(c.text, s)
	case <-time.After(20 * time.Second):
		t.Fatal("the guest says nothing any more")
	}
	return len(c.text)
}

func (c *counter) past(t *testing.T, n int) {
	t.Helper()
	for len(c.text) < n+20 {
		c.next(t)
	}
}

// whole checks that the numbers have neither gap nor repetition.
func (c *counter) whole(t *testing.T) {
	t.Helper()
	last := -1
	for _, s := range c.text {
		var n int
		if _, err := fmt.Sscanf(s, "tick %d", &n); err != nil {
			continue // the firmware's
		}
		if last >= 0 && n != last+1 {
			t.Errorf("line %d follows line %d", n, last)
		}
		last = n
	}
	if last < 40 {
		t.Errorf("%d numbered lines; the last were %q", last, c.text[max(0, len(c.text)-3):])
	}
}
