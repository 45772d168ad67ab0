package doctor

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		leave := make(chan struct{})
		checks := []Check{
			{"good", func(context.Context) Result { time.Sleep(time.Second); return ok("fine") }},
			{"odd", func(context.Context) Result { return warning("slow", "wait") }},
			{"broken", func(context.Context) Result { panic("nil map") }},
			{"slow", func(ctx context.Context) Result { <-ctx.Done(); return failed("gave up", "") }},
			{"stuck", func(context.Context) Result { <-leave; return ok("late") }},
			{"last", func(context.Context) Result { return Result{Name: "own name", Level: OK} }},
		}
		var before, after []string
		r := Run(t.Context(), checks, RunOptions{Timeout: 10 * time.Second, Before: func(n string) { before = append(before, n) }, After: func(x Result) { after = append(after, x.Name+" "+string(x.Level)) }})
		if got := strings.Join(after, ", "); got != "good ok, odd warning, broken failed, slow failed, stuck failed, own name ok" {
			t.Errorf("results: %s", got)
		}
		if len(before) != 6 || r.OK != 2 || r.Warnings != 1 || r.Failed != 3 {
			t.Errorf("report: %+v", r)
		}
		if r.Checks[0].TookMS != 1000 {
			t.Errorf("took %v ms", r.Checks[0].TookMS)
		}
		if !strings.Contains(r.Checks[2].Text, "nil map") || !strings.Contains(r.Checks[3].Text, "gave up") || !strings.Contains(r.Checks[4].Text, "no result") {
			t.Errorf("texts: %+v", r.Checks)
		}
		if !strings.Contains(r.Summary(), "3 FAILED") {
			t.Errorf("summary %q", r.Summary())
		}
		close(leave)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if r := Run(ctx, checks, RunOptions{}); len(r.Checks) != 0 {
			t.Errorf("ran after its end: %+v", r)
		}
	})
}

// tree makes files that stand for /proc and /sys.
func tree(t *testing.T, files map[string]string) hostFS {
	t.Helper()
	root := t.TempDir()
	for p, s := range files {
		p = filepath.Join(root, p)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(s+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return hostFS{root}
}

func want(t *testing.T, r Result, level Level, says string) {
	t.Helper()
	if r.Level != level || !strings.Contains(r.Text, says) {
		t.Errorf("%s %q, want %s with %q", r.Level, r.Text, level, says)
	}
	if r.Level == Failed && r.Action == "" {
		t.Errorf("%q says nothing about what to do", r.Text)
	}
}

func TestHostChecks(t *testing.T) {
	want(t, checkRoot(0), OK, "root")
	want(t, checkRoot(1000), Warning, "user 1000")
	kernel := func(rel string) hostFS { return tree(t, map[string]string{"proc/sys/kernel/osrelease": rel}) }
	want(t, checkKernel(kernel("6.1.0-18-amd64")), OK, "6.1.0")
	want(t, checkKernel(kernel("5.4.0")), Failed, "older than 5.10")
	want(t, checkKernel(kernel("odd")), Warning, "odd")
	want(t, checkKernel(tree(t, nil)), Failed, "cannot be read")
	want(t, checkCgroup(tree(t, map[string]string{"sys/fs/cgroup/cgroup.controllers": "cpu io memory pids"})), OK, "memory")
	want(t, checkCgroup(tree(t, map[string]string{"sys/fs/cgroup/cgroup.controllers": "cpu"})), Warning, "no memory controller")
	want(t, checkCgroup(tree(t, nil)), Warning, "no cgroup v2")
	want(t, checkBridge(tree(t, map[string]string{"sys/module/bridge/x": ""})), OK, "bridge")
	want(t, checkBridge(tree(t, map[string]string{"proc/sys/kernel/osrelease": "6.1", "lib/modules/6.1/modules.dep": "kernel/net/bridge/bridge.ko: kernel/net/802/stp.ko"})), OK, "bridge")
	want(t, checkBridge(tree(t, nil)), Warning, "no bridge")
	want(t, checkBDI(tree(t, map[string]string{"sys/class/bdi/0:1/strict_limit": "0", "proc/sys/vm/dirty_ratio": "20"})), OK, "20")
	want(t, checkBDI(tree(t, map[string]string{"sys/class/bdi/0:1/x": "0", "proc/sys/vm/dirty_ratio": "2"})), Warning, "2 %")
	want(t, checkBDI(tree(t, nil)), Failed, "bdi")
	mem := func(s string) hostFS { return tree(t, map[string]string{"proc/meminfo": s}) }
	want(t, checkMemory(mem("MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\nSwapTotal: 0 kB")), OK, "8.0 GiB available of 16.0 GiB")
	want(t, checkMemory(mem("MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\nSwapTotal: 1048576 kB")), Warning, "swap")
	want(t, checkMemory(mem("MemTotal: 1048576 kB\nMemAvailable: 104857 kB")), Warning, "0.1 GiB available")
	want(t, checkMemory(tree(t, nil)), Failed, "cannot be read")
}

func TestDiskChecks(t *testing.T) {
	dir := t.TempDir()
	if r := checkSpace(filepath.Join(dir, "not", "yet")); !strings.Contains(r.Text, dir) {
		t.Errorf("the directory above is not measured: %+v", r)
	}
	r := checkFsync(t.Context(), dir)
	if !strings.Contains(r.Text, "of 32") {
		t.Errorf("fsync: %+v", r)
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	if os.Geteuid() != 0 {
		want(t, checkFsync(t.Context(), "/proc"), Failed, "no file")
	}
}

func TestClockChecks(t *testing.T) {
	if r := checkClock(t.Context()); r.Level == Failed {
		t.Errorf("clock: %+v", r)
	}
	if r := checkClockSync(); r.Level == Failed {
		t.Errorf("clock sync: %+v", r)
	}
}

func TestLinkChecks(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := checkLink(t.Context(), ln.Addr().String())
	if r.Level == Failed || !strings.Contains(r.Text, "10 of 10 answered") {
		t.Errorf("listening: %+v", r)
	}
	ln.Close()
	// A refusal is an answer: the link is there.
	if r := checkLink(t.Context(), ln.Addr().String()); r.Level == Failed {
		t.Errorf("refusing: %+v", r)
	}
	want(t, checkLink(t.Context(), "no-such-host"), Failed, "no IP address")
}

// Whatever the machine, every check gives a level and says something.
func TestAllChecksAnswer(t *testing.T) {
	r := Run(t.Context(), HostChecks(HostOptions{StateDir: t.TempDir(), Peers: []string{"127.0.0.1:1"}}), RunOptions{Timeout: 30 * time.Second})
	for _, c := range r.Checks {
		if c.Level != OK && c.Level != Warning && c.Level != Failed || c.Text == "" || c.Name == "" {
			t.Errorf("%+v", c)
		}
		if c.Level == Failed && c.Action == "" {
			t.Errorf("%s does not say what to do: %+v", c.Name, c)
		}
	}
	if r.OK+r.Warnings+r.Failed != len(r.Checks) || len(r.Checks) != 14 {
		t.Errorf("%d checks: %+v", len(r.Checks), r)
	}
}
