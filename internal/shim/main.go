package shim

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"perdure/internal/guestmem"
	"perdure/internal/hostnet"
)

// Main is the shim process: it runs the VM whose directory is dir until the
// authority ends it. helper is the argv of the memory helper.
func Main(ctx context.Context, dir string, helper []string, log *slog.Logger) error {
	cfg, err := ReadConfig(dir)
	if err != nil {
		return err
	}
	log = log.With("vm", cfg.Spec.Name, "host", cfg.Host)
	if err := guestmem.HardenProcess(); err != nil {
		log.Warn("this process is less protected than it should be", "error", err)
	}
	gate, err := openGate()
	if err != nil {
		return err
	}
	defer gate.Close()
	s, err := Open(cfg, helper, gate, log)
	if err != nil {
		return err
	}
	return s.Run(ctx)
}

// openGate installs the kernel's gate. Two shims that start at the same moment
// may get into each other's way, so it is tried for a while.
func openGate() (*hostnet.Gate, error) {
	gate, err := hostnet.OpenGate()
	if err != nil {
		return nil, fmt.Errorf("open the tap gate: %w", err)
	}
	for end := time.Now().Add(5 * time.Second); ; {
		if err = gate.Install(); err == nil {
			return gate, nil
		}
		if time.Now().After(end) {
			gate.Close()
			return nil, fmt.Errorf("install the tap gate: %w", err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}
