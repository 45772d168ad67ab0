// Package testenv says what the machine that runs a test offers. A test that
// needs more is skipped with the reason, except where PERDURE_TEST_NOSKIP=1 is
// set (make test, CI): there a missing thing is a failure, so that nothing goes
// untested unnoticed.
package testenv

import (
	"os"
	"os/exec"
	"testing"
)

// NoSkipEnv is the variable that turns skips into failures.
const NoSkipEnv = "PERDURE_TEST_NOSKIP"

// Need ends the test unless ok; reason says what is missing and where it comes from.
func Need(t testing.TB, ok bool, reason string) {
	t.Helper()
	if ok {
		return
	}
	if os.Getenv(NoSkipEnv) == "1" {
		t.Fatalf("cannot run here: %s", reason)
	}
	t.Skipf("cannot run here: %s", reason)
}

// Root needs an effective user id of 0.
func Root(t testing.TB) {
	t.Helper()
	Need(t, os.Geteuid() == 0, "needs root")
}

// Tool needs a program on the PATH and returns where it is.
func Tool(t testing.TB, name string) string {
	t.Helper()
	p, err := exec.LookPath(name)
	Need(t, err == nil, "needs the program "+name+" (make setup installs it)")
	return p
}

// QEMU needs root, FUSE and a QEMU for x86-64, and returns its path.
func QEMU(t testing.TB) string {
	t.Helper()
	Root(t)
	_, err := os.Stat("/dev/fuse")
	Need(t, err == nil, "needs /dev/fuse")
	return Tool(t, "qemu-system-x86_64")
}

// Slow skips a test in -short mode; make test does not use -short.
func Slow(t testing.TB) {
	t.Helper()
	if testing.Short() {
		t.Skip("long test: not in -short mode")
	}
}
