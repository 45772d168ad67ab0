package main

import (
	"context"
	"fmt"
	"os"
	"strings"

	"perdure/internal/cli"
	"perdure/internal/doctor"
	"perdure/internal/guestmem"
	"perdure/internal/qemu"
	"perdure/internal/selftest"
)

// flusherArgv is how the memory helper is started.
func flusherArgv() []string { return []string{"/proc/self/exe", "flusher"} }

// checks are those of doctor that need QEMU or FUSE.
func checks(o cli.DoctorOptions) []doctor.Check {
	var caps qemu.Capabilities
	var probed error
	list := []doctor.Check{
		{Name: "qemu", Run: func(ctx context.Context) doctor.Result {
			caps, probed = qemu.Probe(ctx, o.QEMU)
			if probed != nil {
				return doctor.Result{Level: doctor.Failed, Text: probed.Error(), Action: "install QEMU for x86-64 (Debian: qemu-system-x86), or give --qemu"}
			}
			if caps.SaveErr != "" {
				return doctor.Result{Level: doctor.Failed, Text: "device state cannot be saved and loaded: " + caps.SaveErr, Action: "install another build of QEMU, 7.2 or newer"}
			}
			return doctor.Result{Level: doctor.OK, Text: fmt.Sprintf("%d.%d.%d at %s, newest machine %s, device state saves and loads",
				caps.Version.Major, caps.Version.Minor, caps.Version.Micro, caps.Path, caps.Default())}
		}},
		{Name: "accelerator", Run: func(context.Context) doctor.Result { return checkAccel(caps, probed) }},
		{Name: "fuse", Run: func(ctx context.Context) doctor.Result {
			if err := guestmem.Probe(ctx, os.TempDir(), flusherArgv()); err != nil {
				return doctor.Result{Level: doctor.Failed, Text: err.Error(), Action: "use a kernel with FUSE (modprobe fuse); this one does not track memory as Level 3 needs it"}
			}
			return doctor.Result{Level: doctor.OK, Text: "a flush waits for every dirty page, one byte dirties one page"}
		}},
		{Name: "memory limits", Run: func(context.Context) doctor.Result {
			if p := guestmem.CheckLimits(1 << 30); len(p) > 0 {
				return doctor.Result{Level: doctor.Warning, Text: strings.Join(p, "; "), Action: "raise what is named, or run the agent as root"}
			}
			return doctor.Result{Level: doctor.OK, Text: "guest memory can be locked, dirty pages are not throttled"}
		}},
	}
	if o.Quick {
		return list
	}
	return append(list, doctor.Check{Name: "dirty tracking", Run: func(ctx context.Context) doctor.Result { return checkTracking(ctx, caps, probed) }})
}

func checkAccel(caps qemu.Capabilities, probed error) doctor.Result {
	if probed != nil {
		return doctor.Result{Level: doctor.Failed, Text: "not checked, QEMU could not be probed"}
	}
	if why, ok := caps.Accels[qemu.KVM]; ok && why == "" {
		return doctor.Result{Level: doctor.OK, Text: "kvm runs a 64-bit guest"}
	}
	if why, ok := caps.Accels[qemu.TCG]; ok && why == "" {
		return doctor.Result{Level: doctor.Warning, Text: "tcg (emulation) runs a 64-bit guest, kvm does not: " + caps.Accels[qemu.KVM],
			Action: "enable virtualization in the firmware and load kvm_intel or kvm_amd; emulated guests are slow and their clocks lag"}
	}
	return doctor.Result{Level: doctor.Failed, Text: fmt.Sprintf("nothing runs a 64-bit guest: kvm: %s; tcg: %s", caps.Accels[qemu.KVM], caps.Accels[qemu.TCG]),
		Action: "enable virtualization in the firmware and load kvm_intel or kvm_amd"}
}

// bestAccel is the accelerator that VMs would use here.
func bestAccel(caps qemu.Capabilities) string {
	for _, a := range []string{qemu.KVM, qemu.TCG} {
		if why, ok := caps.Accels[a]; ok && why == "" {
			return a
		}
	}
	return ""
}

func checkTracking(ctx context.Context, caps qemu.Capabilities, probed error) doctor.Result {
	accel := bestAccel(caps)
	if probed != nil || accel == "" {
		return doctor.Result{Level: doctor.Failed, Text: "not checked, no guest runs here"}
	}
	r, err := selftest.Prove(ctx, os.TempDir(), selftest.Options{QEMU: caps.Path, Accel: accel, Type: caps.Default(), Helper: flusherArgv(), TSCHz: qemu.KVMTSCHz()})
	if err != nil {
		return doctor.Result{Level: doctor.Failed, Text: err.Error(), Action: "do not use Level 3 on this host; report the kernel, the QEMU and the processor"}
	}
	return doctor.Result{Level: doctor.OK, Text: fmt.Sprintf("%s: %d checkpoints, %d dirty pages, %d MiB compared byte for byte, none missed; mean collection %.1f ms",
		accel, r.Rounds, r.Pages, r.Compare>>20, float64(r.Pause.Microseconds())/1000)}
}
