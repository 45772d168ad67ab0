package qemu

import (
	"bytes"
	"cmp"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Capabilities is what a QEMU binary can do, found out by trying.
type Capabilities struct {
	Path     string
	Version  Version
	Package  string            // the distribution's version string, if any
	Machines []string          // versioned q35 and i440fx types
	Q35      string            // newest versioned q35 type
	I440FX   string            // newest versioned i440fx type
	Accels   map[string]string // KVM, TCG → "" if it runs a 64-bit guest, else why not
	Sandbox  bool              // Machine.Sandbox may be set
	SaveErr  string            // why saving and loading device state does not work; empty if it does
}

// Default is the machine type that a new VM gets: i440fx, which every guest
// knows, takes new disks while it runs, and saves its device state half a
// millisecond faster than q35 (2.5 against 3.2 ms with the same devices under TCG); q35 where a QEMU has no other.
func (c Capabilities) Default() string { return cmp.Or(c.I440FX, c.Q35) }

const (
	kvmTimeout  = 5 * time.Second  // the stub takes some tenths of a second
	tcgTimeout  = 30 * time.Second // also on a busy machine
	saveTimeout = 30 * time.Second
	exitCode64  = 2*0x2a + 1 // of isa-debug-exit, as stub64 asks for it
)

//go:embed stub/stub64.bin
var stub64 []byte

var (
	versionRE = regexp.MustCompile(`version ([0-9]+)\.([0-9]+)\.([0-9]+)(?: \(([^)]*)\))?`)
	typeRE    = regexp.MustCompile(`(?m)^(pc-(?:q35|i440fx)-[0-9.]+) `)
	aliasRE   = regexp.MustCompile(`(?m)^q35 .*\(alias of (pc-q35-[0-9.]+)\)`)
	alias2RE  = regexp.MustCompile(`(?m)^pc .*\(alias of (pc-i440fx-[0-9.]+)\)`)
)

// Probe tries out the binary at path. It takes some seconds at most; ctx
// bounds it. The error says that the binary cannot be run at all; what it cannot do is in the result.
func Probe(ctx context.Context, path string) (Capabilities, error) {
	c := Capabilities{Path: path, Accels: map[string]string{}}
	out, err := exec.CommandContext(ctx, path, "-version").Output()
	if err != nil {
		return c, fmt.Errorf("run %s: %w", path, err)
	}
	m := versionRE.FindStringSubmatch(string(out))
	if m == nil {
		return c, fmt.Errorf("read version of %s: unexpected %q", path, firstLine(out))
	}
	for i, p := range []*int{&c.Version.Major, &c.Version.Minor, &c.Version.Micro} {
		*p, _ = strconv.Atoi(m[i+1]) // digits by the expression
	}
	c.Package = m[4]
	if out, err = exec.CommandContext(ctx, path, "-machine", "help").Output(); err != nil {
		return c, fmt.Errorf("list machine types of %s: %w", path, err)
	}
	for _, t := range typeRE.FindAllStringSubmatch(string(out), -1) {
		c.Machines = append(c.Machines, t[1])
	}
	if a := aliasRE.FindStringSubmatch(string(out)); a != nil {
		c.Q35 = a[1]
	}
	if a := alias2RE.FindStringSubmatch(string(out)); a != nil {
		c.I440FX = a[1]
	}
	best := ""
	for _, accel := range []string{TCG, KVM} {
		c.Accels[accel] = ""
		if err := ProbeAccel(ctx, path, accel); err != nil {
			c.Accels[accel] = err.Error()
			continue
		}
		best = accel
	}
	if best == "" {
		c.SaveErr = "no accelerator runs a 64-bit guest"
		return c, nil
	}
	err = probeSave(ctx, path, best, c.Default(), true)
	c.Sandbox = err == nil
	if err != nil {
		err = probeSave(ctx, path, best, c.Default(), false)
	}
	if err != nil {
		c.SaveErr = err.Error()
	}
	return c, nil
}

// ProbeAccel boots a tiny 64-bit guest under accel (KVM or TCG) and returns
// nil if it ran to its end. A /dev/kvm that starts firmware but runs no 64-bit
// guest is found out here.
func ProbeAccel(ctx context.Context, path, accel string) error {
	return probeAccel(ctx, path, accel, "max")
}

func probeAccel(ctx context.Context, path, accel, cpu string) error {
	limit := tcgTimeout
	if accel == KVM {
		limit = kvmTimeout
		if _, err := os.Stat("/dev/kvm"); err != nil {
			return fmt.Errorf("probe kvm: %w", err)
		}
	}
	dir, err := os.MkdirTemp("", "perdure-probe-*")
	if err != nil {
		return fmt.Errorf("probe %s: %w", accel, err)
	}
	defer os.RemoveAll(dir)
	kernel := filepath.Join(dir, "stub64")
	if err := os.WriteFile(kernel, stub64, 0o600); err != nil {
		return fmt.Errorf("probe %s: %w", accel, err)
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, path, "-accel", accel, "-machine", "q35", "-cpu", cpu, "-m", "32", "-nodefaults", "-no-user-config",
		"-display", "none", "-no-reboot", "-device", "isa-debug-exit,iobase=0xf4,iosize=1", "-kernel", kernel)
	cmd.Stderr = &stderr
	cmd.WaitDelay = time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // a prober that is killed leaves none behind
	err = cmd.Run()
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("probe %s: a 64-bit guest did not run to its end within %v", accel, limit)
	case errors.As(err, &exit) && exit.ExitCode() == exitCode64:
		return nil
	case err != nil:
		return fmt.Errorf("probe %s: %w: %s", accel, err, firstLine(stderr.Bytes()))
	}
	return fmt.Errorf("probe %s: the guest ended without having run: %s", accel, firstLine(stderr.Bytes()))
}

// ProbeSave checks that saving the state of devices and loading it into a
// second QEMU work with this binary.
func ProbeSave(ctx context.Context, path, accel string) error {
	out, err := exec.CommandContext(ctx, path, "-machine", "help").Output()
	if err != nil {
		return fmt.Errorf("list machine types of %s: %w", path, err)
	}
	a := alias2RE.FindSubmatch(out)
	if a == nil {
		a = aliasRE.FindSubmatch(out)
	}
	if a == nil {
		return fmt.Errorf("probe device state: %s has neither an i440fx nor a q35 machine", path)
	}
	return probeSave(ctx, path, accel, string(a[1]), false)
}

func probeSave(ctx context.Context, path, accel, machine string, sandbox bool) error {
	ctx, cancel := context.WithTimeout(ctx, saveTimeout)
	defer cancel()
	dir, err := os.MkdirTemp("", "perdure-probe-*")
	if err != nil {
		return fmt.Errorf("probe device state: %w", err)
	}
	defer os.RemoveAll(dir)
	m := Machine{Name: "probe", UUID: "00000000-0000-4000-8000-000000000001", Type: machine, Accel: accel, VCPUs: 1, Memory: 32 << 20, Sandbox: sandbox}
	var state []byte
	m.QMPPath = filepath.Join(dir, "a.qmp")
	err = withQEMU(ctx, path, m, filepath.Join(dir, "a.log"), func(q *QMP) error {
		if err := q.Cont(ctx); err != nil {
			return err
		}
		s, err := q.Stop(ctx)
		if err != nil {
			return err
		}
		if !s.WasRunning {
			return fmt.Errorf("guest is %s instead of paused after stop", s.Status)
		}
		state, err = q.SaveDevices(ctx, nil)
		return err
	})
	if err != nil {
		return fmt.Errorf("probe device state: %w", err)
	}
	m.QMPPath, m.Incoming = filepath.Join(dir, "b.qmp"), true
	err = withQEMU(ctx, path, m, filepath.Join(dir, "b.log"), func(q *QMP) error {
		if err := q.LoadDevices(ctx, state); err != nil {
			return err
		}
		return q.Cont(ctx)
	})
	if err != nil {
		return fmt.Errorf("probe device state: %w", err)
	}
	return nil
}

// withQEMU runs a machine for as long as f takes.
func withQEMU(ctx context.Context, path string, m Machine, log string, f func(*QMP) error) error {
	args, err := Args(m)
	if err != nil {
		return err
	}
	p, err := Start(ctx, path, args, StartOptions{LogPath: log, Temporary: true})
	if err != nil {
		return err
	}
	defer func() {
		_ = p.Kill() // it may have ended by itself
		<-p.Exited()
	}()
	// A QEMU that ends at once must not be waited for.
	dial, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		select {
		case <-p.Exited():
		case <-dial.Done():
		}
		cancel()
	}()
	q, err := DialQMP(dial, m.QMPPath, p.LogTail)
	if err != nil {
		return fmt.Errorf("%w; QEMU's log ends: %s", err, p.LogTail(tailBytes))
	}
	defer q.Close()
	return f(q)
}

func firstLine(b []byte) string {
	s, _, _ := strings.Cut(strings.TrimSpace(string(b)), "\n")
	return s
}
