package qemu

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"perdure/internal/testenv"
)

func TestProbe(t *testing.T) {
	path := testenv.QEMU(t)
	c, err := Probe(testCtx(t), path)
	check(t, err)
	t.Logf("%+v", c)
	if !c.Version.atLeast(7, 2) || !strings.HasPrefix(c.Q35, "pc-q35-") || !strings.HasPrefix(c.I440FX, "pc-i440fx-") || len(c.Machines) < 2 {
		t.Errorf("version %v, q35 %q, %d machine types", c.Version, c.Q35, len(c.Machines))
	}
	if c.Accels[TCG] != "" || c.SaveErr != "" {
		t.Errorf("tcg: %q, save: %q", c.Accels[TCG], c.SaveErr)
	}
	// Whether kvm works depends on the host; that the answer is right can be
	// asserted only where it is known to lie.
	if _, err := os.Stat("/sys/module/kvm_pvm"); err == nil && c.Accels[KVM] == "" {
		t.Error("kvm is said to run 64-bit guests, on a host where it does not")
	}
}

// On some machines kvm starts firmware and then runs a 64-bit guest for ever
// without getting anywhere. "max" fails there in another way already.
func TestProbeFindsHang(t *testing.T) {
	testenv.Slow(t)
	path := testenv.QEMU(t)
	if _, err := os.Stat("/sys/module/kvm_pvm"); err != nil {
		t.Skip("no kvm here that is known to hang")
	}
	err := probeAccel(testCtx(t), path, KVM, "qemu64")
	if err == nil || !strings.Contains(err.Error(), "did not run to its end") {
		t.Error(err)
	}
	t.Log(err)
}

func TestProbeOfOtherPrograms(t *testing.T) {
	ctx := testCtx(t)
	if _, err := Probe(ctx, "/nonexistent"); err == nil {
		t.Error("probed a missing program")
	}
	if _, err := Probe(ctx, testenv.Tool(t, "true")); err == nil {
		t.Error("probed a program that is no QEMU")
	}
	// A QEMU that has no such accelerator.
	fake := filepath.Join(t.TempDir(), "qemu")
	check(t, os.WriteFile(fake, []byte("#!/bin/sh\necho 'no such accel' >&2; exit 1\n"), 0o700))
	if err := ProbeAccel(ctx, fake, TCG); err == nil || !strings.Contains(err.Error(), "no such accel") {
		t.Error(err)
	}
}
