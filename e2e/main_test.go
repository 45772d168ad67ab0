// Package e2e tests the real binary on the hosts of one lab: real agents,
// shims and QEMUs, a client outside, faults on demand.
//
// All tests of one run share a lab, which Start makes whole again before each
// test: hosts on, links up, no VM left. Tests must not run in parallel with
// each other, and two runs on one machine wait for each other. What a test may
// rely on is in World and VM; what it must always check is in Traffic.
package e2e

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"hash/fnv"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"perdure/internal/diskcheck/diskserver"
	"perdure/internal/lab"
	"perdure/internal/lab/guest"
)

// shared is what all tests of this process use: made by the first that needs
// it, removed by TestMain.
type shared struct {
	dir   string // holds binaries, guest and lab
	bin   string
	guest guest.Guest
	lab   *lab.Lab
	vms   int // made so far
	built bool
	err   error // of the build: the same for every test
}

var suite shared

func TestMain(m *testing.M) {
	diskserver.Main()
	flag.Parse()
	os.Exit(runAll(m))
}

func runAll(m *testing.M) int {
	dir, unlock, err := workDir()
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	defer unlock()
	suite.dir = dir
	// Ctrl-C ends the process; the lab must not outlive it.
	sig := make(chan os.Signal, 1)
	signal.Notify(sig, os.Interrupt, syscall.SIGTERM)
	go func() {
		<-sig
		fmt.Fprintln(os.Stderr, "e2e: interrupted, removing the lab")
		suite.tearDown()
		os.Exit(130)
	}()
	code := m.Run()
	if err := suite.tearDown(); err != nil {
		fmt.Fprintln(os.Stderr, "e2e: remove the lab:", err)
		code = max(code, 1)
	}
	return code
}

// workDir is the same for each run of one checkout, so that what a killed run
// left is found, and locked while a run lasts. PERDURE_E2E_DIR names another, at
// most 40 bytes long, for a run beside others.
func workDir() (dir string, unlock func(), err error) {
	wd, err := os.Getwd()
	if err != nil {
		return "", nil, fmt.Errorf("find own directory: %w", err)
	}
	h := fnv.New32a()
	h.Write([]byte(wd))
	// Not on tmpfs: disks and journals of the hosts lie below.
	if dir = os.Getenv("PERDURE_E2E_DIR"); dir == "" {
		dir = filepath.Join("/var/tmp", fmt.Sprintf("perdure-%08x", h.Sum32()))
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", nil, fmt.Errorf("make work directory: %w", err)
	}
	f, err := os.Open(dir)
	if err != nil {
		return "", nil, fmt.Errorf("open work directory: %w", err)
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		fmt.Fprintln(os.Stderr, "e2e: another run of this checkout is under way; waiting for its end")
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
	}
	if err != nil {
		f.Close()
		return "", nil, fmt.Errorf("lock work directory: %w", err)
	}
	return dir, func() { f.Close() }, nil
}

func (s *shared) labDir() string { return filepath.Join(s.dir, "lab") }

// build makes the binaries and the guest, once.
func (s *shared) build() error {
	if s.built {
		return s.err
	}
	s.built = true
	s.bin = filepath.Join(s.dir, "bin")
	cmd := exec.Command("go", "build", "-trimpath", "-o", s.bin+"/", "./cmd/perdure", "./cmd/perdure-guest")
	cmd.Dir = ".."
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		s.err = fmt.Errorf("build: %w: %s", err, out)
		return s.err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	s.guest, s.err = guest.Build(ctx, guest.Options{Dir: filepath.Join(s.dir, "guest"), Program: filepath.Join(s.bin, "perdure-guest")})
	return s.err
}

// up makes the lab, or a new one where the old could not be made whole.
func (s *shared) up(ctx context.Context) error {
	if s.lab != nil {
		return nil
	}
	if err := lab.Down(ctx, s.labDir(), nil); err != nil { // of a run that was killed
		return err
	}
	l, err := lab.Up(ctx, lab.Cluster(lab.Options{Dir: s.labDir(), Hosts: 2, Witness: true, ALinks: 2, Binary: filepath.Join(s.bin, "perdure")}))
	if err != nil {
		return err
	}
	s.lab = l
	return nil
}

func (s *shared) tearDown() error {
	if s.dir == "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if os.Getenv("KEEP") == "1" && s.lab != nil {
		fmt.Fprintf(os.Stderr, "e2e: the lab is still up: %s lab --dir %s status\n", filepath.Join(s.bin, "perdure"), s.labDir())
		return nil
	}
	err := lab.Down(ctx, s.labDir(), nil)
	s.lab = nil
	return errors.Join(err, os.RemoveAll(filepath.Join(s.dir, "guest")))
}
