package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func (l *Lab) cgroup(n *node) string { return filepath.Join(l.st.Cgroup, n.Name) }

// on reports whether the node's init lives: by its cgroup, since a bare number
// may long belong to another process.
func (l *Lab) on(n *node) bool {
	if n.PID == 0 {
		return false
	}
	pids, err := cgroupPIDs(l.cgroup(n))
	return err == nil && slices.Contains(pids, n.PID)
}

// usable says why nothing can be run on the node, or nil.
func (l *Lab) usable(n *node) error {
	if !l.on(n) {
		return fmt.Errorf("%s: %w", n.Name, ErrOff)
	}
	if cgroupFrozen(l.cgroup(n)) {
		return fmt.Errorf("%s: %w", n.Name, ErrFrozen)
	}
	return nil
}

// powerOn starts a node: namespaces, links, init, programs.
func (l *Lab) powerOn(ctx context.Context, n *node) error {
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	l.log.Info("power on", "host", n.Name)
	// Remains of an earlier life go first, so that they are not taken for this one.
	if err := removeCgroup(ctx, l.cgroup(n)); err != nil {
		return fmt.Errorf("power on %s: %w", n.Name, err)
	}
	if err := os.Mkdir(l.cgroup(n), 0o755); err != nil {
		return fmt.Errorf("power on %s: make cgroup: %w", n.Name, err)
	}
	if err := os.MkdirAll(l.StateDir(n.Name), 0o700); err != nil {
		return fmt.Errorf("power on %s: make directory: %w", n.Name, err)
	}
	release, err := l.startInit(n)
	if err != nil {
		return fmt.Errorf("power on %s: %w", n.Name, err)
	}
	defer func() { _ = release(false) }() // without the word, init ends
	if err := l.save(); err != nil {
		return err
	}
	if n.Role == RoleSwitch {
		err = l.wireSwitch(n)
	} else {
		err = l.wire(n)
	}
	if err != nil {
		return fmt.Errorf("power on %s: %w", n.Name, err)
	}
	if err := release(true); err != nil {
		return fmt.Errorf("power on %s: %w", n.Name, err)
	}
	return nil
}

// startInit starts the node's init in new namespaces, in its cgroup, and waits
// until it has set itself up. It starts its programs only once release(true)
// is called, and ends when release(false) is.
func (l *Lab) startInit(n *node) (release func(bool) error, err error) {
	cg, err := os.Open(l.cgroup(n))
	if err != nil {
		return nil, fmt.Errorf("open cgroup: %w", err)
	}
	defer cg.Close()
	log, err := os.OpenFile(filepath.Join(l.hostDir(n.Name), "init.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, fmt.Errorf("open log: %w", err)
	}
	defer log.Close()
	readyR, readyW, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("make pipe: %w", err)
	}
	defer readyR.Close()
	defer readyW.Close()
	goR, goW, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("make pipe: %w", err)
	}
	defer goR.Close()

	args := []string{"lab-init", "--name", n.Name, "--role", string(n.Role), "--dir", l.hostDir(n.Name)}
	prog := l.program(n)
	if prog.Wait {
		args = append(args, "--wait-for", filepath.Join(l.hostDir(n.Name), superviseFile))
	}
	if len(prog.Args) > 0 {
		args = append(args, "--")
	}
	for _, a := range prog.Args {
		args = append(args, strings.ReplaceAll(a, "{state}", l.StateDir(n.Name)))
	}
	cmd := exec.Command(l.st.Binary, args...)
	cmd.Dir = "/"
	cmd.Env = l.environ(n)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.ExtraFiles = []*os.File{readyW, goR} // 3 and 4
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid:     true, // a Ctrl-C at the terminal is not for the hosts
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
		// After the move into the cgroup, which so becomes the root of what the host sees.
		Unshareflags: unix.CLONE_NEWCGROUP,
		UseCgroupFD:  true,
		CgroupFD:     int(cg.Fd()),
	}
	if err := cmd.Start(); err != nil {
		goW.Close()
		return nil, fmt.Errorf("start init: %w", err)
	}
	n.PID = cmd.Process.Pid
	l.inits.Go(func() { _ = cmd.Wait() }) // ends with the host; Down waits for it
	readyW.Close()
	word, err := io.ReadAll(io.LimitReader(readyR, 4096))
	if err == nil && string(word) != "ready\n" {
		err = fmt.Errorf("init failed: %s", strings.TrimSpace(string(word)))
	}
	if err != nil {
		goW.Close()
		return nil, err
	}
	done := false
	return func(ok bool) error {
		if done {
			return nil
		}
		done = true
		defer goW.Close()
		if ok {
			if _, err := goW.Write([]byte("go\n")); err != nil {
				return fmt.Errorf("release init: %w", err)
			}
		}
		return nil
	}, nil
}

func (l *Lab) program(n *node) Program {
	switch n.Role {
	case RoleHost:
		return l.st.Agent
	case RoleWitness:
		return l.st.Vote
	default:
		return Program{}
	}
}

// environ is the environment inside a node.
func (l *Lab) environ(n *node) []string {
	var env []string
	for _, e := range os.Environ() {
		k, _, _ := strings.Cut(e, "=")
		if k != "PATH" && k != "PERDURE_SOCKET" {
			env = append(env, e)
		}
	}
	path := os.Getenv("PATH")
	if path == "" {
		path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	}
	env = append(env, "PATH="+l.Bin()+":"+path+":/usr/sbin:/sbin")
	if n.Role == RoleHost || n.Role == RoleWitness {
		env = append(env, "PERDURE_SOCKET="+filepath.Join(l.StateDir(n.Name), "run", "agent.sock"))
	}
	return env
}

// PowerOff takes a host's power away: its links fall silent first, so that not
// even a FIN gets out, then everything it runs ends at one instant. Its state
// directory stays. On a host that is off it does nothing.
func (l *Lab) PowerOff(ctx context.Context, host string) error {
	return l.change(func() error {
		n, err := l.member(host)
		if err != nil {
			return err
		}
		links := l.st.links(n)
		if err := l.setPorts(n, links, portDown); err != nil {
			return fmt.Errorf("power off %s: %w", host, err)
		}
		if err := removeCgroup(ctx, l.cgroup(n)); err != nil {
			return fmt.Errorf("power off %s: %w", host, err)
		}
		// The kernel takes namespaces apart in the background; the ports must be gone now.
		if err := l.setPorts(n, links, portDel); err != nil {
			return fmt.Errorf("power off %s: %w", host, err)
		}
		n.PID = 0
		return l.save()
	})
}

// PowerOn starts a host that is off, with the addresses and the state
// directory it had. Links that were taken down stay down.
func (l *Lab) PowerOn(ctx context.Context, host string) error {
	return l.change(func() error {
		n, err := l.member(host)
		if err != nil {
			return err
		}
		if l.on(n) {
			return fmt.Errorf("power on %s: it is on already", host)
		}
		return l.powerOn(ctx, n)
	})
}

// Freeze stops every process of a host at once and leaves its links up: a host
// that hangs. It returns when all stand still.
func (l *Lab) Freeze(ctx context.Context, host string) error { return l.freeze(ctx, host, true) }

// Thaw lets a frozen host go on.
func (l *Lab) Thaw(ctx context.Context, host string) error { return l.freeze(ctx, host, false) }

func (l *Lab) freeze(ctx context.Context, host string, on bool) error {
	return l.change(func() error {
		n, err := l.member(host)
		if err != nil {
			return err
		}
		if !l.on(n) {
			return fmt.Errorf("%s: %w", host, ErrOff)
		}
		if err := freezeCgroup(ctx, l.cgroup(n), on); err != nil {
			return fmt.Errorf("%s: %w", host, err)
		}
		return nil
	})
}

// SetLink takes one link of a host (LAN, ALink(i)) down or up, at the switch:
// the host's card loses its carrier. Links stay down over a power-off.
func (l *Lab) SetLink(host, link string, up bool) error {
	return l.change(func() error {
		n, err := l.st.node(host)
		if err != nil {
			return err
		}
		if links := l.st.links(n); !slices.Contains(links, link) {
			return fmt.Errorf("%s has no link %q (it has: %s)", host, link, strings.Join(links, ", "))
		}
		do := portDown
		if up {
			do = portUp
			delete(n.Down, link)
		} else {
			if n.Down == nil {
				n.Down = map[string]bool{}
			}
			n.Down[link] = true
		}
		if err := l.save(); err != nil {
			return err
		}
		return l.setPorts(n, []string{link}, do)
	})
}

// member finds a node that can be powered off: a host or the witness.
func (l *Lab) member(name string) (*node, error) {
	n, err := l.st.node(name)
	if err != nil {
		return nil, err
	}
	if n.Role != RoleHost && n.Role != RoleWitness {
		return nil, fmt.Errorf("%s is the lab's %s, not a host", name, n.Role)
	}
	return n, nil
}

// Process is one process of a host, as the machine outside sees it.
type Process struct {
	PID  int
	Args []string
}

// Processes lists what runs on a host. A frozen host's are listed too.
func (l *Lab) Processes(host string) ([]Process, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	n, err := l.fresh(host)
	if err != nil {
		return nil, err
	}
	return l.processes(n)
}

func (l *Lab) processes(n *node) ([]Process, error) {
	pids, err := cgroupPIDs(l.cgroup(n))
	if err != nil {
		return nil, err
	}
	var out []Process
	for _, pid := range pids {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if err != nil || len(b) == 0 {
			continue // it ended just now
		}
		out = append(out, Process{PID: pid, Args: strings.Split(strings.TrimRight(string(b), "\x00"), "\x00")})
	}
	return out, nil
}

// Agent finds the agent of a host.
func (l *Lab) Agent(host string) (Process, error) {
	return l.find(host, "agent", func(p Process) bool { return isPerdure(p, "agent") || isPerdure(p, "witness") })
}

// Shim finds the shim of a VM on a host.
func (l *Lab) Shim(host, vm string) (Process, error) {
	dir := filepath.Join(l.StateDir(host), "vms", vm)
	return l.find(host, "shim of "+vm, func(p Process) bool {
		return isPerdure(p, "shim") && slices.ContainsFunc(p.Args, func(a string) bool { return strings.HasSuffix(a, dir) })
	})
}

// QEMU finds the QEMU of a VM on a host: the one that holds guest memory, not
// a scratch one that tries a state.
func (l *Lab) QEMU(host, vm string) (Process, error) {
	return l.find(host, "QEMU of "+vm, func(p Process) bool {
		if !strings.HasPrefix(filepath.Base(p.Args[0]), "qemu-system-") {
			return false
		}
		i := slices.Index(p.Args, "-name")
		if i < 0 || i+1 >= len(p.Args) {
			return false
		}
		name, _, _ := strings.Cut(strings.TrimPrefix(p.Args[i+1], "guest="), ",")
		return name == vm
	})
}

func (l *Lab) find(host, what string, match func(Process) bool) (Process, error) {
	ps, err := l.Processes(host)
	if err != nil {
		return Process{}, err
	}
	for _, p := range ps {
		if match(p) {
			return p, nil
		}
	}
	return Process{}, fmt.Errorf("no %s runs on host %s", what, host)
}

func isPerdure(p Process, sub string) bool {
	return len(p.Args) > 1 && p.Args[1] == sub
}

// Signal sends a signal to a process of a host.
func (p Process) Signal(sig syscall.Signal) error {
	if err := unix.Kill(p.PID, sig); err != nil {
		return fmt.Errorf("send %v to %d: %w", sig, p.PID, err)
	}
	return nil
}

// Gone waits until the process has ended.
func (p Process) Gone(ctx context.Context) error {
	fd, err := unix.PidfdOpen(p.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("watch process %d: %w", p.PID, err)
	}
	defer unix.Close(fd)
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 50)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("watch process %d: %w", p.PID, err)
		}
		if n > 0 {
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
}

// Status of a node.
type Status struct {
	Name      string   `json:"name"`
	Role      Role     `json:"role"`
	Power     string   `json:"power"` // "on", "off", "frozen"
	Addr      string   `json:"addr"`
	ALinks    []string `json:"alinks,omitempty"`
	DownLinks []string `json:"down_links,omitempty"`
	Agent     int      `json:"agent_pid,omitempty"`
	Processes int      `json:"processes"`
	VMs       []string `json:"vms,omitempty"` // names of the VMs with a shim here
	StateDir  string   `json:"state_dir,omitempty"`
}

// Status says what each node is and does, the switch left out.
func (l *Lab) Status() ([]Status, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.load(); err != nil { // another process may have changed links or power
		return nil, err
	}
	var out []Status
	for i := range l.st.Nodes {
		n := &l.st.Nodes[i]
		if n.Role == RoleSwitch {
			continue
		}
		s, err := l.nodeStatus(n)
		if err != nil {
			return nil, err
		}
		out = append(out, s)
	}
	return out, nil
}

func (l *Lab) nodeStatus(n *node) (Status, error) {
	s := Status{Name: n.Name, Role: n.Role, Power: "off", Addr: n.lanAddr().Addr().String()}
	if l.on(n) {
		s.Power = "on"
		if cgroupFrozen(l.cgroup(n)) {
			s.Power = "frozen"
		}
	}
	if n.Role == RoleHost {
		for i := range l.st.ALinks {
			s.ALinks = append(s.ALinks, n.alinkAddr(i).Addr().String())
		}
	}
	for k := range n.Down {
		s.DownLinks = append(s.DownLinks, k)
	}
	slices.Sort(s.DownLinks)
	if n.Role != RoleClient {
		s.StateDir = l.StateDir(n.Name)
	}
	ps, err := l.processes(n)
	if err != nil {
		return s, err
	}
	s.Processes = len(ps)
	for _, p := range ps {
		if isPerdure(p, "agent") || isPerdure(p, "witness") {
			s.Agent = p.PID
		}
		if i := slices.Index(p.Args, "--dir"); isPerdure(p, "shim") && i > 0 && i+1 < len(p.Args) {
			s.VMs = append(s.VMs, filepath.Base(p.Args[i+1]))
		}
	}
	slices.Sort(s.VMs)
	return s, nil
}

// waitFile waits until the file exists.
func waitFile(ctx context.Context, name string) error {
	for {
		if _, err := os.Stat(name); err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(100 * time.Millisecond):
		}
	}
}
