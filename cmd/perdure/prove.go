package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"perdure/internal/agent"
	"perdure/internal/selftest"
)

// proveWord is the hidden command that runs the proof of dirty tracking for the agent.
const proveWord = "prove-tracking"

const (
	proveTimeout = 3 * time.Minute // it takes some seconds; a busy machine may need more
	proveNice    = 10              // whoever runs a VM comes first
)

// proveTracking runs the proof as a process of its own, since the agent must
// not serve guest memory. It has its own mount namespace and dies with the agent, so that
// neither a mount nor a QEMU is left behind however it ends.
func proveTracking(ctx context.Context, qemu string, m agent.Machine, dir string) (agent.Proof, error) {
	ctx, cancel := context.WithTimeout(ctx, proveTimeout)
	defer cancel()
	opts, err := json.Marshal(selftest.Options{QEMU: qemu, Accel: m.Accel, Type: m.Type, TSCHz: m.TSCHz})
	if err != nil {
		return agent.Proof{}, fmt.Errorf("prove dirty tracking: %w", err)
	}
	cmd := exec.CommandContext(ctx, "/proc/self/exe", proveWord, dir, string(opts))
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Unshareflags: syscall.CLONE_NEWNS}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return agent.Proof{}, fmt.Errorf("prove dirty tracking: %w: %s", err, bytes.TrimSpace(stderr.Bytes()))
	}
	var p agent.Proof
	if err := json.Unmarshal(out, &p); err != nil {
		return agent.Proof{}, fmt.Errorf("prove dirty tracking: read result: %w", err)
	}
	return p, nil
}

// beNice lowers the priority of all threads there are; later ones, and QEMU,
// have it from them. It is politeness: a failure changes nothing.
func beNice() {
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return
	}
	for _, t := range tasks {
		if tid, err := strconv.Atoi(t.Name()); err == nil {
			_ = unix.Setpriority(unix.PRIO_PROCESS, tid, proveNice)
		}
	}
}

// proveMain is "prove-tracking DIR OPTIONS": it prints an agent.Proof.
func proveMain(args []string) int {
	if len(args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: prove-tracking DIR OPTIONS")
		return 2
	}
	var o selftest.Options
	if err := json.Unmarshal([]byte(args[1]), &o); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	o.Helper = flusherArgv()
	beNice()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	var p agent.Proof
	switch r, err := selftest.Prove(ctx, args[0], o); {
	case ctx.Err() != nil:
		fmt.Fprintln(os.Stderr, "the proof was broken off")
		return 1
	case err != nil:
		p.Text = err.Error()
	default:
		p = agent.Proof{OK: true, Text: fmt.Sprintf("%s: %d checkpoints, %d dirty pages, %d MiB compared byte for byte, none missed", o.Accel, r.Rounds, r.Pages, r.Compare>>20)}
	}
	if err := json.NewEncoder(os.Stdout).Encode(p); err != nil {
		return 1
	}
	return 0
}
