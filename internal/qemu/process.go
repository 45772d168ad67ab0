package qemu

import (
	"context"
	"errors"
	"os"
)

// StartOptions says how a QEMU process is attached to its surroundings.
type StartOptions struct {
	// LockFile is inherited by QEMU, so that a flock taken on it is held until
	// QEMU too is gone. May be nil.
	LockFile *os.File
	// Extra files are inherited after it.
	Extra []*os.File
	// LogPath takes QEMU's standard output and error, appended. It is a file,
	// not a pipe, since QEMU outlives whoever would read the pipe.
	LogPath string
	// PIDFile is written atomically as "PID STARTTIME\n"; empty: none.
	PIDFile string
	// OOMScoreAdj is set on QEMU, -1000 to 1000.
	OOMScoreAdj int
	Dir         string // working directory, empty: that of the caller
}

// Process is a QEMU process, started by Start or found again by Adopt.
type Process struct{}

// ExitReason says how a process ended.
type ExitReason struct {
	Code    int    // exit code, -1 when unknown or ended by a signal
	Signal  string // name of the signal that ended it, empty if none
	Adopted bool   // not our child: code and signal are not known
	Stderr  string // the last lines of its log
}

// String is one line for people.
func (e ExitReason) String() string { panic("not yet") }

// Start runs path with args in a session of its own. The process outlives the
// caller; ctx bounds only the start itself.
func Start(ctx context.Context, path string, args []string, o StartOptions) (*Process, error) {
	panic("not yet")
}

// ErrNoProcess is returned by Adopt when the process of a pid file is gone.
var ErrNoProcess = errors.New("process is gone")

// Adopt finds a process again by its pid file: same pid and same start time.
func Adopt(pidFile, logPath string) (*Process, error) { panic("not yet") }

// PID returns the process id.
func (p *Process) PID() int { panic("not yet") }

// Exited is closed when the process has ended.
func (p *Process) Exited() <-chan struct{} { panic("not yet") }

// Wait waits for the end.
func (p *Process) Wait(ctx context.Context) (ExitReason, error) { panic("not yet") }

// Kill ends the process with SIGKILL through its pidfd, so that never another
// process is hit. It does not wait. Killing an ended process is no error.
func (p *Process) Kill() error { panic("not yet") }

// Signal sends SIGSTOP, SIGCONT or SIGTERM for tests and orderly ends.
func (p *Process) Signal(sig os.Signal) error { panic("not yet") }

// LogTail returns up to n of the last bytes of the log, for error messages.
func (p *Process) LogTail(n int) string { panic("not yet") }
