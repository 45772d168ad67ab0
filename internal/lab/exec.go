package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netns"
)

func lookPath(name string) (string, error) {
	p, err := exec.LookPath(name)
	if err != nil {
		return "", fmt.Errorf("find program: %w", err)
	}
	return p, nil
}

// Command prepares a command that runs inside a node, as a process of that
// host: it is frozen with it and dies with it. When ctx ends it is killed with
// everything it started in its process group. Error text of a host that is off
// or frozen comes from Run or Start.
func (l *Lab) Command(ctx context.Context, host string, args ...string) *exec.Cmd {
	cmd := l.command(ctx, host, args)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 2 * time.Second
	return cmd
}

// Interactive is Command for a person at a terminal: the command shares the
// caller's process group, so that Ctrl-C reaches it.
func (l *Lab) Interactive(ctx context.Context, host string, args ...string) *exec.Cmd {
	cmd := l.command(ctx, host, args)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Cancel = func() error { return nil } // the command itself gets the signal
	return cmd
}

func (l *Lab) command(ctx context.Context, host string, args []string) *exec.Cmd {
	l.mu.Lock()
	defer l.mu.Unlock()
	n, err := l.fresh(host)
	if err == nil {
		err = l.usable(n)
	}
	if err == nil && len(args) == 0 {
		err = errors.New("no command given")
	}
	if err != nil {
		return &exec.Cmd{Err: err}
	}
	// The shell moves itself into the host's cgroup, then becomes nsenter: by
	// the time anything of the host is touched, the process belongs to it.
	sh := []string{"-c", `echo $$ > "$0" && exec nsenter "$@"`, filepath.Join(l.cgroup(n), "cgroup.procs"),
		"-t", strconv.Itoa(n.PID), "-m", "-u", "-i", "-n", "-p", "-C"}
	if wd, err := os.Getwd(); err == nil {
		sh = append(sh, "--wdns="+wd)
	}
	sh = append(sh, "--")
	cmd := exec.CommandContext(ctx, "/bin/sh", append(sh, args...)...)
	cmd.Env = l.environ(n)
	return cmd
}

// Output runs a command inside a node and returns its standard output; the
// error holds its exit status and what it said on standard error.
func (l *Lab) Output(ctx context.Context, host string, args ...string) ([]byte, error) {
	cmd := l.Command(ctx, host, args...)
	out, err := cmd.Output()
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		var ee *exec.ExitError
		if errors.As(err, &ee) && len(ee.Stderr) > 0 {
			err = fmt.Errorf("%w: %s", err, strings.TrimSpace(string(ee.Stderr)))
		}
		return out, fmt.Errorf("run %s on %s: %w", strings.Join(args, " "), host, err)
	}
	return out, nil
}

// InNetNS runs fn on a thread of its own inside a node's network namespace.
// Sockets that fn makes stay in that namespace; goroutines that it starts do
// not run there. The thread ends with fn.
func (l *Lab) InNetNS(host string, fn func() error) error {
	l.mu.Lock()
	n, err := l.fresh(host)
	if err == nil && !l.on(n) {
		err = fmt.Errorf("%s: %w", host, ErrOff)
	}
	pid := 0
	if err == nil {
		pid = n.PID
	}
	l.mu.Unlock()
	if err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := netns.Get()
		if err != nil {
			done <- fmt.Errorf("open own network namespace: %w", err)
			return
		}
		defer home.Close()
		ns, err := netns.GetFromPid(pid)
		if err != nil {
			done <- fmt.Errorf("open network namespace of %s: %w", host, err)
			return
		}
		defer ns.Close()
		if err := netns.Set(ns); err != nil {
			done <- fmt.Errorf("enter network namespace of %s: %w", host, err)
			return
		}
		ferr := fn()
		if err := netns.Set(home); err == nil {
			runtime.UnlockOSThread() // else the runtime ends this thread with the goroutine
		}
		done <- ferr
	}()
	return <-done
}

// Dial opens a TCP connection from inside a node, normally the client.
// The connection outlives the host's power-off as a socket without a peer.
func (l *Lab) Dial(ctx context.Context, from string, addr netip.AddrPort) (net.Conn, error) {
	var c net.Conn
	err := l.InNetNS(from, func() error {
		var d net.Dialer // one literal address: the socket is made on this thread
		var err error
		c, err = d.DialContext(ctx, "tcp4", addr.String())
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("dial %s from %s: %w", addr, from, err)
	}
	return c, nil
}

// Dialer returns a dial function, from inside a node, of the shape that test
// clients take.
func (l *Lab) Dialer(from string) func(ctx context.Context, addr string) (net.Conn, error) {
	return func(ctx context.Context, addr string) (net.Conn, error) {
		ap, err := netip.ParseAddrPort(addr)
		if err != nil {
			return nil, fmt.Errorf("parse address: %w", err)
		}
		return l.Dial(ctx, from, ap)
	}
}
