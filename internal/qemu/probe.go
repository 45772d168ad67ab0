package qemu

import "context"

// Capabilities is what a QEMU binary can do, found out by trying.
type Capabilities struct {
	Path     string
	Version  Version
	Package  string            // the distribution's version string
	Machines []string          // versioned q35 and i440fx types
	Q35      string            // newest versioned q35 type
	Accels   map[string]string // "kvm", "tcg" → "" if it runs a 64-bit guest, else why not
	Sandbox  bool
	SaveErr  string // why saving and loading device state does not work; empty if it does
}

// Probe tries out the binary at path; it takes some seconds at most (ctx bounds it).
func Probe(ctx context.Context, path string) (Capabilities, error) { panic("not yet") }

// ProbeAccel boots a tiny 64-bit guest under accel ("kvm", "tcg") and returns
// nil if it ran to its end. A /dev/kvm that starts firmware but runs no 64-bit
// guest is found out here.
func ProbeAccel(ctx context.Context, path, accel string) error { panic("not yet") }

// ProbeSave checks that xen-save-devices-state and loading its result work.
func ProbeSave(ctx context.Context, path, accel string) error { panic("not yet") }
