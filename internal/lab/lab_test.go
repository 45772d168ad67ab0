package lab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"perdure/internal/testenv"
)

// TestMain lets the test binary be the init of the hosts and the program in them.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "lab-init":
			os.Exit(InitMain(os.Args[2:]))
		case "agent": // a host's program: it only lives
			os.MkdirAll(filepath.Join(os.Args[2], "run"), 0o755)
			os.WriteFile(filepath.Join(os.Args[2], "run", "alive"), nil, 0o644)
			for { // a select without cases is a deadlock to a program that is built without cgo
				time.Sleep(time.Hour)
			}
		case "fuse":
			fuseMain(os.Args[2])
			os.Exit(0)
		case "up-and-hang":
			_, err := Up(context.Background(), Options{Dir: os.Args[2], Form: func(context.Context, *Lab) error {
				fmt.Println("hanging")
				select {}
			}})
			fmt.Println(err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func up(t *testing.T, o Options) *Lab {
	t.Helper()
	testenv.Root(t)
	testenv.Tool(t, "nsenter")
	if o.Dir == "" {
		dir, err := os.MkdirTemp("", "lab")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.Remove(dir) })
		o.Dir = filepath.Join(dir, "l")
	}
	if o.Agent.Args == nil {
		o.Agent = Program{Args: []string{"perdure", "agent", "{state}"}}
	}
	l, err := Up(testContext(t), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		if err := l.Down(ctx); err != nil {
			t.Errorf("down: %v", err)
		}
		nothingLeft(t, l)
	})
	return l
}

// nothingLeft checks that a lab that was taken down is gone without a trace.
func nothingLeft(t *testing.T, l *Lab) {
	t.Helper()
	if _, err := os.Stat(l.dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("directory is still there: %v", err)
	}
	if _, err := os.Stat(l.st.Cgroup); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("cgroup is still there: %v", err)
	}
	ms, err := readMounts("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range ms {
		if strings.HasPrefix(m.point, l.dir) {
			t.Errorf("mount is still there: %s", m.point)
		}
	}
	for _, n := range l.st.Nodes {
		// A zombie waits for its parent and has no command line any more.
		if b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", n.PID)); strings.Contains(string(b), "lab-init") {
			t.Errorf("init of %s is still there", n.Name)
		}
	}
}

func ping(t *testing.T, l *Lab, from, to string) bool {
	t.Helper()
	return l.Command(testContext(t), from, "busybox", "ping", "-q", "-c", "1", "-W", "1", to).Run() == nil
}

func waitPing(t *testing.T, l *Lab, from, to string) {
	t.Helper()
	for range 20 {
		if ping(t, l, from, to) {
			return
		}
	}
	t.Errorf("%s cannot reach %s", from, to)
}

func TestNetworksAndFaults(t *testing.T) {
	testenv.Tool(t, "busybox")
	l := up(t, Options{Hosts: 2, Witness: true, ALinks: 2})
	ctx := testContext(t)

	for _, p := range [][2]string{{"a", "10.77.0.2"}, {"a", "10.78.0.2"}, {"b", "10.78.1.1"}, {"w", "10.77.0.1"}, {"client", "10.77.0.2"}, {"a", "10.77.0.100"}} {
		waitPing(t, l, p[0], p[1])
	}
	if ping(t, l, "client", "10.78.0.1") {
		t.Error("the client reaches an A-link")
	}

	// Links.
	if err := l.SetLink("b", ALink(0), false); err != nil {
		t.Fatal(err)
	}
	if ping(t, l, "a", "10.78.0.2") {
		t.Error("alink0 of b is down and answers")
	}
	waitPing(t, l, "a", "10.78.1.2")
	if err := l.SetLink("b", ALink(0), true); err != nil {
		t.Fatal(err)
	}
	waitPing(t, l, "a", "10.78.0.2")
	if err := l.SetLink("b", "alink7", false); err == nil || !strings.Contains(err.Error(), "alink1") {
		t.Errorf("unknown link: %v", err)
	}

	// Freeze: nothing in user space answers, the kernel does; exec is refused.
	if err := l.Freeze(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	if err := l.Command(ctx, "a", "true").Run(); !errors.Is(err, ErrFrozen) {
		t.Errorf("command on a frozen host: %v", err)
	}
	if s := status(t, l, "a"); s.Power != "frozen" {
		t.Errorf("status of a frozen host: %+v", s)
	}
	if err := l.Thaw(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	if err := l.Command(ctx, "a", "true").Run(); err != nil {
		t.Error(err)
	}

	// Power-off, twice, of a frozen host; a link that was down stays down.
	if err := l.SetLink("a", ALink(1), false); err != nil {
		t.Fatal(err)
	}
	if err := l.Freeze(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := l.PowerOff(ctx, "a"); err != nil {
			t.Fatal(err)
		}
	}
	if ping(t, l, "b", "10.77.0.1") {
		t.Error("a is off and answers")
	}
	if err := l.Command(ctx, "a", "true").Run(); !errors.Is(err, ErrOff) {
		t.Errorf("command on a host that is off: %v", err)
	}
	if s := status(t, l, "a"); s.Power != "off" || s.Processes != 0 {
		t.Errorf("status of a host that is off: %+v", s)
	}
	if err := l.PowerOn(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	waitPing(t, l, "b", "10.77.0.1")
	waitPing(t, l, "b", "10.78.0.1")
	if ping(t, l, "b", "10.78.1.1") {
		t.Error("a link that was taken down is up after a power-on")
	}
	if err := l.PowerOff(ctx, "client"); err == nil {
		t.Error("the client can be powered off")
	}
	if err := l.Freeze(ctx, "zz"); err == nil || !strings.Contains(err.Error(), "a, b") {
		t.Errorf("unknown host: %v", err)
	}
}

func status(t *testing.T, l *Lab, name string) Status {
	t.Helper()
	all, err := l.Status()
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(all, func(s Status) bool { return s.Name == name })
	if i < 0 {
		t.Fatalf("no status of %s", name)
	}
	return all[i]
}

func TestHostLooksLikeAHost(t *testing.T) {
	l := up(t, Options{Hosts: 1})
	ctx := testContext(t)
	out, err := l.Output(ctx, "a", "sh", "-c", `hostname; echo $PERDURE_SOCKET; cat /proc/1/comm >/dev/null && echo $$; ls /sys/class/net | tr '\n' ' '; grep -c . /sys/fs/cgroup/cgroup.procs; command -v perdure`)
	if err != nil {
		t.Fatal(err)
	}
	f := strings.Split(strings.TrimSpace(string(out)), "\n")
	want := []string{"a", l.StateDir("a") + "/run/agent.sock"}
	if len(f) < 5 || !slices.Equal(f[:2], want) || !strings.Contains(f[3], "br0 eth0 lo") || f[len(f)-1] != l.Bin()+"/perdure" {
		t.Errorf("inside the host: %q", f)
	}
	err = l.Command(ctx, "a", "sh", "-c", "exit 7").Run()
	if err == nil || err.Error() != "exit status 7" {
		t.Errorf("exit status is not passed on: %v", err)
	}
	// What mounts inside stays inside.
	if err := l.Command(ctx, "a", "mount", "-t", "tmpfs", "none", l.StateDir("a")).Run(); err != nil {
		t.Error(err)
	}
	ms, _ := readMounts("/proc/self/mountinfo")
	if slices.ContainsFunc(ms, func(m mount) bool { return m.point == l.StateDir("a") }) {
		t.Error("a mount inside the host is seen outside")
	}
}

func TestInitKeepsProgramRunning(t *testing.T) {
	l := up(t, Options{Hosts: 1, Agent: Program{Args: []string{"perdure", "agent", "{state}"}, Wait: true}})
	ctx := testContext(t)
	if _, err := l.Agent("a"); err == nil {
		t.Error("the program runs before its file is there")
	}
	if err := l.Supervise("a"); err != nil {
		t.Fatal(err)
	}
	agent := func() Process {
		for {
			if p, err := l.Agent("a"); err == nil {
				return p
			}
			if ctx.Err() != nil {
				t.Fatal("the program does not run")
			}
		}
	}
	p := agent()
	if err := p.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := p.Gone(ctx); err != nil {
		t.Fatal(err)
	}
	if q := agent(); q.PID == p.PID {
		t.Error("the program did not die")
	}
	// An orphan is adopted and reaped: no zombie stays.
	if err := l.Command(ctx, "a", "sh", "-c", "setsid sleep 0.1 & exit 0").Run(); err != nil {
		t.Fatal(err)
	}
	for {
		out, err := l.Output(ctx, "a", "sh", "-c", "cat /proc/[0-9]*/stat")
		if err != nil && len(out) == 0 {
			t.Fatal(err)
		}
		if !strings.Contains(string(out), "(sleep)") {
			return
		}
	}
}

func TestDialFromClient(t *testing.T) {
	testenv.Tool(t, "busybox")
	l := up(t, Options{Hosts: 1})
	ctx := testContext(t)
	srv := l.Command(ctx, "a", "busybox", "nc", "-l", "-p", "4000", "-e", "echo", "hello")
	if err := srv.Start(); err != nil {
		t.Fatal(err)
	}
	defer srv.Wait()
	for {
		c, err := l.Dial(ctx, Client, netip.MustParseAddrPort("10.77.0.1:4000"))
		if err != nil {
			if ctx.Err() != nil {
				t.Fatal(err)
			}
			continue
		}
		defer c.Close()
		line, err := bufio.NewReader(c).ReadString('\n')
		if line != "hello\n" {
			t.Errorf("answer %q, %v", line, err)
		}
		if !strings.HasPrefix(c.LocalAddr().String(), "10.77.0.200:") {
			t.Errorf("dialled from %v", c.LocalAddr())
		}
		return
	}
}

// TestFailedUpLeavesNothing lets Up fail, be interrupted, and be killed.
func TestFailedUpLeavesNothing(t *testing.T) {
	testenv.Root(t)
	base, err := os.MkdirTemp("", "lab")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(base)
	dir := filepath.Join(base, "l")
	gone := func(l *Lab) { t.Helper(); nothingLeft(t, l) }

	var seen *Lab
	boom := errors.New("boom")
	_, err = Up(t.Context(), Options{Dir: dir, Form: func(_ context.Context, l *Lab) error { seen = l; return boom }})
	if !errors.Is(err, boom) {
		t.Fatalf("up: %v", err)
	}
	gone(seen)

	ctx, cancel := context.WithCancelCause(t.Context())
	_, err = Up(ctx, Options{Dir: dir, Form: func(ctx context.Context, l *Lab) error {
		seen = l
		cancel(errors.New("Ctrl-C"))
		<-ctx.Done()
		return context.Cause(ctx)
	}})
	if err == nil || !strings.Contains(err.Error(), "Ctrl-C") {
		t.Fatalf("up: %v", err)
	}
	gone(seen)

	// Killed without a chance to clean: the next Down does, twice, and so does the next Up.
	for _, byUp := range []bool{false, true} {
		upAndKill(t, dir)
		l := &Lab{dir: dir}
		if err := l.load(); err != nil {
			t.Fatal(err)
		}
		if !l.alive() {
			t.Error("the hosts did not survive; this tests nothing")
		}
		if byUp {
			// Processes of a half-made lab count as a lab: nothing is removed behind anyone's back.
			if _, err := Up(t.Context(), Options{Dir: dir}); !errors.Is(err, ErrExists) {
				t.Errorf("up over a half-made lab: %v", err)
			}
			if err := killCgroup(t.Context(), l.st.Cgroup); err != nil {
				t.Fatal(err)
			}
			nl, err := Up(t.Context(), Options{Dir: dir})
			if err != nil {
				t.Fatal(err)
			}
			if st := status(t, nl, "a"); st.Power != "on" {
				t.Errorf("status: %+v", st)
			}
		}
		for range 2 {
			if err := Down(t.Context(), dir, nil); err != nil {
				t.Fatal(err)
			}
		}
		nothingLeft(t, l)
	}
	if _, err := Open(dir, nil); !errors.Is(err, ErrNoLab) {
		t.Errorf("open: %v", err)
	}
}

// upAndKill runs Up in a process of its own and kills that in the middle.
func upAndKill(t *testing.T, dir string) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, "up-and-hang", dir)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "hanging\n" {
		t.Errorf("child: %q, %v", line, err)
	}
	cmd.Process.Kill()
	cmd.Wait()
}

func TestUpRefusesForeignDirectory(t *testing.T) {
	testenv.Root(t)
	dir, err := os.MkdirTemp("", "lab")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	keep := filepath.Join(dir, "precious")
	if err := os.WriteFile(keep, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Up(t.Context(), Options{Dir: dir}); err == nil {
		t.Error("up in a directory with foreign files")
	}
	if err := Down(t.Context(), dir, nil); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(keep); err != nil {
		t.Error("a foreign file is gone")
	}
	for _, o := range []Options{{Hosts: 17}, {ALinks: 5}, {Dir: "/"}, {Dir: "/" + strings.Repeat("x", 60)}, {Binary: "/nonexistent"}} {
		if _, err := Up(t.Context(), o); err == nil {
			t.Errorf("up with %+v", o)
		}
	}
}
