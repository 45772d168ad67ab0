package testenv

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// contained tells the second process of Main what it is.
const contained = "PERDURE_TEST_CONTAINED"

// Main runs the tests of a package that starts QEMU or mounts something: in a
// process of its own that is the first of a PID and a mount namespace, so that
// nothing outlives the tests, also when they are killed outright. It returns the
// exit code. Without root, or where the kernel refuses, the tests run as usual.
func Main(m *testing.M) int {
	if os.Getenv(contained) != "" {
		if err := settleIn(); err != nil {
			fmt.Fprintln(os.Stderr, "contain tests:", err)
			return 1
		}
		return m.Run()
	}
	if os.Geteuid() != 0 {
		return m.Run()
	}
	code, err := rerun()
	if err != nil { // nothing has run yet
		return m.Run()
	}
	return code
}

// rerun has this program run once more, contained. The error says that it did not begin.
func rerun() (int, error) {
	runtime.LockOSThread() // the kernel's word of a parent's death goes by thread
	defer runtime.UnlockOSThread()
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), contained+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGQUIT, syscall.SIGTERM, syscall.SIGINT) // go test's, at its time limit
	defer signal.Stop(signals)
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	ended := make(chan struct{})
	defer close(ended)
	go func() {
		for {
			select {
			case s := <-signals:
				_ = cmd.Process.Signal(s) // it may have ended
			case <-ended:
				return
			}
		}
	}()
	err := cmd.Wait()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0, nil
	case errors.As(err, &exit) && exit.ExitCode() >= 0:
		return exit.ExitCode(), nil
	}
	fmt.Fprintln(os.Stderr, "contained tests:", err)
	return 2, nil
}

// settleIn keeps mounts inside, and shows the processes of the new namespace.
func settleIn() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	return nil
}
