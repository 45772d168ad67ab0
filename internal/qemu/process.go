package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// StartOptions says how a QEMU process is attached to its surroundings.
type StartOptions struct {
	// LockFile is inherited by QEMU, so that a flock taken on it is held until
	// QEMU too is gone. May be nil.
	LockFile *os.File
	// Files are inherited too, as descriptors FirstFile, FirstFile+1, …; the
	// caller may close its own when Start has returned.
	Files []*os.File
	// LogPath takes QEMU's standard output and error, appended. It is a file,
	// not a pipe, since QEMU outlives whoever would read the pipe.
	LogPath string
	// PIDFile is written atomically as "PID STARTTIME\n"; empty: none.
	PIDFile string
	// OOMScoreAdj is set on QEMU, -1000 to 1000. Lowering it needs
	// CAP_SYS_RESOURCE; without, QEMU keeps the caller's.
	OOMScoreAdj int
	// Dir is the working directory; empty: that of the caller.
	Dir string
	// Temporary has the kernel end QEMU when the caller dies: for one that runs
	// no guest of anybody.
	Temporary bool
}

// FirstFile is the descriptor in QEMU of the first of StartOptions.Files.
const FirstFile = 4

// Process is a QEMU process, started by Start or found again by Adopt.
type Process struct {
	pid     int
	pidfd   *os.File
	logPath string
	adopted bool

	exited    chan struct{}
	reason    ExitReason // set before exited is closed
	dying     chan struct{}
	dyingOnce sync.Once
}

// ExitReason says how a process ended.
type ExitReason struct {
	Code    int    // exit code, -1 when unknown or ended by a signal
	Signal  string // name of the signal that ended it, empty if none
	Adopted bool   // not our child: code and signal are not known
	Stderr  string // the last lines of its log
}

// String is one line for people.
func (e ExitReason) String() string {
	var s string
	switch {
	case e.Adopted:
		s = "QEMU ended"
	case e.Signal != "":
		s = "QEMU was ended by " + e.Signal
	default:
		s = "QEMU ended with status " + strconv.Itoa(e.Code)
	}
	if e.Stderr != "" {
		s += ": " + strings.ReplaceAll(e.Stderr, "\n", "; ")
	}
	return s
}

// tailBytes is how much of QEMU's log is quoted in errors.
const tailBytes = 1024

// Start runs path with args in a session of its own, so that neither a signal
// for the caller's group nor the caller's end reaches it. ctx bounds only the
// start itself.
func Start(ctx context.Context, path string, args []string, o StartOptions) (_ *Process, err error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("start %s: %w", path, err)
	}
	log, err := os.OpenFile(o.LogPath, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o640)
	if err != nil {
		return nil, fmt.Errorf("open QEMU's log: %w", err)
	}
	defer log.Close()
	pidfd := -1
	cmd := exec.Command(path, args...)
	cmd.Stdout, cmd.Stderr, cmd.Dir = log, log, o.Dir
	// No Pdeathsig for a guest: it outlives the shim.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, PidFD: &pidfd}
	if o.Temporary {
		cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	}
	if o.LockFile != nil || len(o.Files) > 0 {
		cmd.ExtraFiles = append([]*os.File{o.LockFile}, o.Files...)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", path, err)
	}
	p := &Process{pid: cmd.Process.Pid, logPath: o.LogPath, exited: make(chan struct{}), dying: make(chan struct{})}
	if pidfd >= 0 {
		p.pidfd = os.NewFile(uintptr(pidfd), "pidfd")
	}
	go p.reap(cmd)
	defer func() {
		if err != nil {
			_ = p.Kill()
			<-p.exited
		}
	}()
	if p.pidfd == nil {
		return nil, fmt.Errorf("start %s: the kernel gave no pidfd", path)
	}
	adj := strconv.Itoa(o.OOMScoreAdj)
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", p.pid), []byte(adj), 0); err != nil && !gone(err) && !errors.Is(err, fs.ErrPermission) {
		return nil, fmt.Errorf("set oom_score_adj of QEMU: %w", err)
	}
	if o.PIDFile != "" {
		if err := writePIDFile(o.PIDFile, p.pid); err != nil && !gone(err) {
			return nil, err
		}
	}
	return p, nil
}

// gone reports an error that only says that the process has ended already;
// Exited tells the reason better.
func gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH)
}

func (p *Process) reap(cmd *exec.Cmd) {
	_ = cmd.Wait() // the state says it all
	r := ExitReason{Code: cmd.ProcessState.ExitCode()}
	if ws, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		r.Signal = unix.SignalName(ws.Signal())
	}
	r.Stderr = p.LogTail(tailBytes)
	p.reason = r
	p.markDying()
	close(p.exited)
}

// ErrNoProcess is returned by Adopt when the process of a pid file is gone.
var ErrNoProcess = errors.New("process is gone")

// Adopt finds a process again by its pid file: same pid and same start time.
// How it ends is then not known, only that it did.
func Adopt(pidFile, logPath string) (*Process, error) {
	b, err := os.ReadFile(pidFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("adopt QEMU: %w (no pid file)", ErrNoProcess)
	} else if err != nil {
		return nil, fmt.Errorf("adopt QEMU: %w", err)
	}
	var pid int
	var start uint64
	if _, err := fmt.Sscan(string(b), &pid, &start); err != nil || pid < 2 {
		return nil, fmt.Errorf("adopt QEMU: pid file %s has %q, want PID STARTTIME", pidFile, b)
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil, fmt.Errorf("adopt QEMU: %w (pid %d)", ErrNoProcess, pid)
	} else if err != nil {
		return nil, fmt.Errorf("adopt QEMU: open pidfd of %d: %w", pid, err)
	}
	// Compared after the pidfd was opened: from here on the pid cannot be reused.
	if s, err := startTime(pid); err != nil || s != start {
		unix.Close(fd)
		return nil, fmt.Errorf("adopt QEMU: %w (pid %d is another process now)", ErrNoProcess, pid)
	}
	p := &Process{pid: pid, logPath: logPath, adopted: true, exited: make(chan struct{}), dying: make(chan struct{})}
	p.pidfd = os.NewFile(uintptr(fd), "pidfd")
	go p.watch(fd)
	return p, nil
}

// watch waits for the end of a process that is not our child.
func (p *Process) watch(fd int) {
	for {
		_, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1)
		if err == nil || !errors.Is(err, unix.EINTR) {
			break
		}
	}
	p.reason = ExitReason{Code: -1, Adopted: true, Stderr: p.LogTail(tailBytes)}
	p.markDying()
	close(p.exited)
}

// PID returns the process id.
func (p *Process) PID() int { return p.pid }

// Exited is closed when the process has ended (and, if it is our child, was reaped).
func (p *Process) Exited() <-chan struct{} { return p.exited }

// Wait waits for the end and says how it came. The error is that of ctx.
func (p *Process) Wait(ctx context.Context) (ExitReason, error) {
	select {
	case <-p.exited:
		return p.reason, nil
	case <-ctx.Done():
		return ExitReason{}, fmt.Errorf("wait for the end of QEMU: %w", ctx.Err())
	}
}

// Kill ends the process with SIGKILL through its pidfd, so that never another
// process is hit. It does not wait. Killing an ended process is no error.
func (p *Process) Kill() error { return p.Signal(unix.SIGKILL) }

// Signal sends a signal the same way.
func (p *Process) Signal(sig syscall.Signal) error {
	if p.pidfd == nil {
		return nil
	}
	rc, err := p.pidfd.SyscallConn()
	if err != nil {
		return fmt.Errorf("signal QEMU: %w", err)
	}
	var serr error
	err = rc.Control(func(fd uintptr) { serr = unix.PidfdSendSignal(int(fd), sig, nil, 0) })
	if err == nil {
		err = serr
	}
	if err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("signal QEMU: %w", err)
	}
	return nil
}

// LogTail returns up to the last n bytes of QEMU's log, whole lines, for error messages.
func (p *Process) LogTail(n int) string {
	f, err := os.Open(p.logPath)
	if err != nil {
		return ""
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return ""
	}
	off := max(0, st.Size()-int64(n))
	b := make([]byte, st.Size()-off)
	k, _ := f.ReadAt(b, off) // a shorter read is a shorter quote
	b = b[:k]
	if i := bytes.IndexByte(b, '\n'); off > 0 && i >= 0 {
		b = b[i+1:]
	}
	return strings.TrimSpace(string(b))
}

// startTime is field 22 of /proc/PID/stat, in clock ticks since boot. Together
// with the pid it names one process.
func startTime(pid int) (uint64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, fmt.Errorf("read start time of %d: %w", pid, err)
	}
	// The second field is the program's name in parentheses and may hold anything.
	i := bytes.LastIndexByte(b, ')')
	f := strings.Fields(string(b[i+1:]))
	if i < 0 || len(f) < 20 {
		return 0, fmt.Errorf("read start time of %d: unexpected /proc format", pid)
	}
	return strconv.ParseUint(f[19], 10, 64)
}

func writePIDFile(path string, pid int) (err error) {
	start, err := startTime(pid)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".pid-*")
	if err != nil {
		return fmt.Errorf("write pid file: %w", err)
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	_, err = fmt.Fprintf(f, "%d %d\n", pid, start)
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("write pid file: %w", err)
	}
	if err = os.Rename(f.Name(), path); err != nil {
		return fmt.Errorf("write pid file: %w", err)
	}
	return nil
}
