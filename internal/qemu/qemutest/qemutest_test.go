package qemutest_test

import (
	"bufio"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"perdure/internal/qemu/qemutest"
)

func TestGuestRuns(t *testing.T) {
	m := qemutest.Machine(t, "serial agent")
	dir := filepath.Dir(m.QMPPath)
	m.SerialPath, m.AgentPath = filepath.Join(dir, "serial"), filepath.Join(dir, "agent")
	want := map[string]string{m.SerialPath: "tick ", m.AgentPath: "agent "}
	listeners := map[string]net.Listener{}
	for p := range want {
		l, err := net.Listen("unix", p)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		listeners[p] = l
	}
	g := qemutest.Start(t, m)
	ctx := qemutest.Context(t)
	if err := g.Q.Cont(ctx); err != nil {
		t.Fatal(err)
	}
	for p, l := range listeners {
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		d, _ := ctx.Deadline()
		c.SetReadDeadline(d)
		r := bufio.NewReader(c)
		for {
			s, err := r.ReadString('\n')
			if err != nil {
				t.Fatalf("%s: no line that begins with %q: %v", p, want[p], err)
			}
			if strings.HasPrefix(s, want[p]) {
				t.Logf("%q", s)
				break
			}
		}
	}
}
