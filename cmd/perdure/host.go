package main

import (
	"context"
	"fmt"
	"net/http"
	"path/filepath"

	"perdure/internal/agent"
	"perdure/internal/cli"
	"perdure/internal/httpapi"
	"perdure/internal/qemu"
)

func initCluster(_ context.Context, o cli.InitOptions) error {
	if err := agent.Init(o.Config, o.Cluster); err != nil {
		return err
	}
	fmt.Fprintf(o.Out, "Cluster %q made; host %q keeps its state in %s.\nNext: perdure agent --state-dir %s\n",
		o.Cluster, o.Config.Name, o.Config.StateDir, o.Config.StateDir)
	return nil
}

func joinCluster(ctx context.Context, o cli.JoinOptions) error {
	if err := agent.Join(ctx, o.Config, o.Token, version); err != nil {
		return err
	}
	fmt.Fprintf(o.Out, "Host %q joined the cluster.\nNext: perdure agent --state-dir %s\n", o.Config.Name, o.Config.StateDir)
	return nil
}

func runWitness(ctx context.Context, o cli.WitnessOptions) error {
	if o.Token != "" {
		if err := agent.Join(ctx, o.Config, o.Token, version); err != nil {
			return err
		}
	}
	dir, err := filepath.Abs(o.StateDir)
	if err != nil {
		return fmt.Errorf("find state directory: %w", err)
	}
	return runAgent(ctx, cli.AgentOptions{StateDir: dir, Log: o.Log})
}

func runAgent(ctx context.Context, o cli.AgentOptions) error {
	log := logger(o.Log)
	a, err := agent.Open(ctx, o.StateDir, agent.Options{Log: log, Version: version, Probe: probeMachine, Prove: proveTracking,
		API: func(a *agent.Agent) http.Handler {
			return httpapi.New(httpapi.Options{Service: a, Version: version, Log: log}).Handler()
		}})
	if err != nil {
		return err
	}
	defer a.Close()
	return a.Run(ctx)
}

// defaultCPU is the CPU model of guests that name none: under KVM one that
// every processor of the last decade offers, so that hosts may differ.
const defaultCPU = "Nehalem"

// probeMachine finds out what VMs of this host are built with.
func probeMachine(ctx context.Context, path string) (agent.Machine, error) {
	caps, err := qemu.Probe(ctx, path)
	if err != nil {
		return agent.Machine{}, err
	}
	m := agent.Machine{QEMU: fmt.Sprintf("%d.%d.%d", caps.Version.Major, caps.Version.Minor, caps.Version.Micro), Accel: bestAccel(caps), Type: caps.Default(), Sandbox: caps.Sandbox}
	if m.Accel == qemu.KVM {
		m.CPU, m.TSCHz = defaultCPU, qemu.KVMTSCHz()
	}
	if m.Accel == "" {
		return m, fmt.Errorf("no accelerator runs a 64-bit guest: kvm: %s; tcg: %s", caps.Accels[qemu.KVM], caps.Accels[qemu.TCG])
	}
	return m, nil
}
