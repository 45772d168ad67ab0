package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// procID names a process for good: a pid is used again, pid and start time are not.
type procID struct {
	pid   int
	start uint64 // field 22 of /proc/PID/stat
}

// stat reads start time and state letter of a process.
func stat(pid int) (start uint64, state byte, err error) {
	data, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return 0, 0, err
	}
	// The name in parentheses may hold anything; fields are counted behind it.
	i := bytes.LastIndexByte(data, ')')
	if i < 0 {
		return 0, 0, fmt.Errorf("stat of process %d is malformed", pid)
	}
	f := strings.Fields(string(data[i+1:]))
	if len(f) < 20 {
		return 0, 0, fmt.Errorf("stat of process %d is malformed", pid)
	}
	start, err = strconv.ParseUint(f[19], 10, 64)
	return start, f[0][0], err
}

// alive reports whether the process still runs (a zombie does not).
func (p procID) alive() bool {
	if p.pid <= 0 {
		return false
	}
	start, state, err := stat(p.pid)
	return err == nil && start == p.start && state != 'Z' && state != 'X'
}

// procOf names the process that has a pid now.
func procOf(pid int) (procID, bool) {
	start, state, err := stat(pid)
	if err != nil || state == 'Z' || state == 'X' {
		return procID{}, false
	}
	return procID{pid, start}, true
}

// qemuOf finds the QEMU that a shim recorded as "PID STARTTIME".
func qemuOf(path string) (procID, bool) {
	data, err := os.ReadFile(path)
	if err != nil {
		return procID{}, false
	}
	f := strings.Fields(string(data))
	if len(f) != 2 {
		return procID{}, false
	}
	pid, err1 := strconv.Atoi(f[0])
	start, err2 := strconv.ParseUint(f[1], 10, 64)
	p := procID{pid, start}
	return p, err1 == nil && err2 == nil && p.alive()
}

// shimOf finds the shim that runs in a VM's directory, by its pid file; the
// command line must be that of this VM's shim, since the number alone proves nothing.
func shimOf(dir, pidFile string) (procID, bool) {
	data, err := os.ReadFile(filepath.Join(dir, pidFile))
	if err != nil {
		return procID{}, false
	}
	f := strings.Fields(string(data))
	if len(f) == 0 {
		return procID{}, false
	}
	pid, err := strconv.Atoi(f[0])
	if err != nil {
		return procID{}, false
	}
	p, ok := procOf(pid)
	if !ok || !isShim(pid, dir) {
		return procID{}, false
	}
	return p, true
}

func isShim(pid int, dir string) bool {
	data, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cmdline"))
	if err != nil {
		return false
	}
	shim := false
	for _, arg := range strings.Split(string(data), "\x00") {
		shim = shim || arg == "shim"
		if shim && (arg == dir || arg == "--dir="+dir) {
			return true
		}
	}
	return false
}

// kill ends a process by its pidfd, so that never another one is hit, and waits
// until it is gone.
func (p procID) kill(ctx context.Context) error {
	fd, err := unix.PidfdOpen(p.pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open process %d: %w", p.pid, err)
	}
	defer unix.Close(fd)
	// The pidfd is fixed now; only if the start time still fits is it the one meant.
	if !p.alive() {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill process %d: %w", p.pid, err)
	}
	for ctx.Err() == nil {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 100)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("wait for process %d: %w", p.pid, err)
		}
		if n > 0 || !p.alive() {
			reap(p.pid)
			return nil
		}
	}
	return fmt.Errorf("process %d was killed and does not end (it may hang in the kernel): %w", p.pid, context.Cause(ctx))
}

// reap collects the exit status of a child; of a process that is none it does nothing.
func reap(pid int) (unix.WaitStatus, bool) {
	var ws unix.WaitStatus
	got, err := unix.Wait4(pid, &ws, unix.WNOHANG, nil)
	return ws, err == nil && got == pid
}

// watchExit calls f when the process has ended, unless stop becomes readable
// first. It blocks.
func (p procID) watchExit(stop int, f func()) {
	fd, err := unix.PidfdOpen(p.pid, 0)
	if err != nil {
		f()
		return
	}
	defer unix.Close(fd)
	for {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}, {Fd: int32(stop), Events: unix.POLLIN}}
		if _, err := unix.Poll(fds, -1); err != nil && !errors.Is(err, unix.EINTR) {
			return
		}
		switch {
		case fds[1].Revents != 0:
			return
		case fds[0].Revents != 0:
			f()
			return
		}
	}
}

// runLock is a VM's lock file, held by its shim, its QEMU and the flush helper.
type runLock struct{ f *os.File }

// tryLock takes the run lock, or reports that something of the VM still lives
// here. A directory without a lock file is free.
func tryLock(path string) (*runLock, bool, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, false, fmt.Errorf("open run lock: %w", err)
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	switch {
	case err == nil:
		return &runLock{f}, true, nil
	case errors.Is(err, unix.EWOULDBLOCK):
		f.Close()
		return nil, false, nil
	}
	f.Close()
	return nil, false, fmt.Errorf("take run lock: %w", err)
}

// release gives the lock back. Closing alone does not where a process that is being started
// at this moment has a copy of the file, until it becomes its program.
func (l *runLock) release() {
	_ = unix.Flock(int(l.f.Fd()), unix.LOCK_UN) // cannot fail on a file that is locked
	l.f.Close()
}

// lockFree reports whether nothing of a VM lives here. It takes the lock for a
// moment; only the VM's own worker may call it, since a shim that starts at
// that moment would find the lock taken.
func lockFree(path string) bool {
	if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
		return true
	}
	l, ok, err := tryLock(path)
	if err != nil || !ok {
		return false
	}
	l.release()
	return true
}

// lastLine returns the last line of a log, shortened, for messages.
func lastLine(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return ""
	}
	buf := make([]byte, min(st.Size(), 2048))
	if _, err := f.ReadAt(buf, st.Size()-int64(len(buf))); err != nil {
		return ""
	}
	lines := strings.Split(strings.TrimSpace(string(buf)), "\n")
	line := lines[len(lines)-1]
	if len(line) > 400 {
		line = line[:400] + "…"
	}
	return line
}

// sleep waits and reports false where ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
