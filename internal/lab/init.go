package lab

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// restartDelay is the pause between the end of a host's program and its next start.
const restartDelay = 200 * time.Millisecond

// InitMain is the first process of a lab host (`perdure lab-init`); args are
// those after that word. It sets up the mount namespace, reports on descriptor
// 3, waits for "go" on descriptor 4, then reaps orphans and keeps the host's
// program running. It returns the exit status when it fails, and otherwise
// ends only with its host.
func InitMain(args []string) int {
	fl := flag.NewFlagSet("lab-init", flag.ContinueOnError)
	name := fl.String("name", "", "name of the host")
	role := fl.String("role", string(RoleHost), "role of the node")
	dir := fl.String("dir", "", "directory of the host")
	waitFor := fl.String("wait-for", "", "start the program only once this file exists")
	if err := fl.Parse(args); err != nil {
		return 2
	}
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "lab-init is run by `perdure lab` as the first process of a lab host, not by hand")
		return 2
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, nil)).With("host", *name)
	ready, word := os.NewFile(3, "ready"), os.NewFile(4, "go")
	unix.CloseOnExec(3)
	unix.CloseOnExec(4)
	if err := setupNode(*name, Role(*role)); err != nil {
		log.Error("set up host", "err", err)
		fmt.Fprintln(ready, err)
		return 1
	}
	fmt.Fprintln(ready, "ready")
	ready.Close()
	if b, _ := io.ReadAll(word); string(b) != "go\n" {
		log.Error("the lab gave up before this host was connected")
		return 1
	}
	word.Close()
	log.Info("host is on", "program", strings.Join(fl.Args(), " "))
	return supervise(log, *dir, *waitFor, fl.Args())
}

// setupNode makes the namespaces look like a host of their own.
func setupNode(name string, role Role) error {
	if err := unix.Sethostname([]byte(name)); err != nil {
		return fmt.Errorf("set hostname: %w", err)
	}
	// First of all: nothing that is mounted here may be seen outside.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	type mnt struct {
		fstype, point string
		optional      bool
	}
	mounts := []mnt{
		{"proc", "/proc", false},
		{"sysfs", "/sys", false}, // shows the devices of the network namespace it was mounted in
		{"cgroup2", "/sys/fs/cgroup", true},
		{"fusectl", "/sys/fs/fuse/connections", true},
		{"tmpfs", "/dev/shm", true}, // memory: gone with the power
	}
	for _, m := range mounts {
		err := unix.Mount(m.fstype, m.point, m.fstype, unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
		if err != nil && !m.optional {
			return fmt.Errorf("mount %s: %w", m.point, err)
		}
	}
	if role == RoleSwitch { // it forwards frames and has nothing to say itself
		for _, which := range []string{"all", "default"} {
			err := os.WriteFile("/proc/sys/net/ipv6/conf/"+which+"/disable_ipv6", []byte("1"), 0)
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				return fmt.Errorf("turn IPv6 off: %w", err)
			}
		}
	}
	return nil
}

// supervise reaps every child and keeps the program running.
func supervise(log *slog.Logger, dir, waitFor string, args []string) int {
	var out *os.File
	if len(args) > 0 {
		if waitFor != "" {
			if err := waitFile(context.Background(), waitFor); err != nil {
				log.Error("wait for file", "err", err)
				return 1
			}
		}
		f, err := os.OpenFile(filepath.Join(dir, "agent.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
		if err != nil {
			log.Error("open log", "err", err)
			return 1
		}
		out = f
	}
	died := make(chan os.Signal, 1)
	signal.Notify(died, unix.SIGCHLD)
	start := make(chan struct{}, 1)
	if len(args) > 0 {
		start <- struct{}{}
	}
	running := 0
	for {
		select {
		case <-died:
			for _, pid := range reap() {
				if pid == running {
					running = 0
					log.Warn("program ended", "pid", pid, "restart_in", restartDelay)
					time.AfterFunc(restartDelay, func() { start <- struct{}{} })
				}
			}
		case <-start:
			p, err := launch(args, out)
			if err != nil {
				log.Error("start program", "err", err)
				time.AfterFunc(restartDelay, func() { start <- struct{}{} })
				continue
			}
			running = p
			log.Info("program started", "pid", p)
		}
	}
}

// launch starts the program without waiting for it: reap does.
func launch(args []string, out *os.File) (int, error) {
	path, err := lookPath(args[0])
	if err != nil {
		return 0, err
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		return 0, err
	}
	defer null.Close()
	p, err := os.StartProcess(path, args, &os.ProcAttr{Dir: "/", Files: []*os.File{null, out, out}})
	if err != nil {
		return 0, err
	}
	return p.Pid, nil // reap waits for it
}

// reap collects every child that has ended, adopted ones too.
func reap() (pids []int) {
	for {
		pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || pid <= 0 {
			return pids
		}
		pids = append(pids, pid)
	}
}
