// Command perdure is the one binary of Perdure: agent, shim, witness, lab and
// command line. It puts the pieces together and holds no logic of its own.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"perdure/internal/cli"
	"perdure/internal/guestmem"
	"perdure/internal/lab"
	"perdure/internal/lab/labcmd"
	"perdure/internal/shim"
)

// Set by the linker (see Makefile).
var (
	version  = "dev"
	revision = ""
)

func main() { os.Exit(run()) }

func run() int {
	// The first process of a lab host and the memory helper must not load
	// anything that they do not need.
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "lab-init":
			return lab.InitMain(os.Args[2:])
		case "flusher":
			return guestmem.HelperMain(os.Args[2:])
		case proveWord:
			return proveMain(os.Args[2:])
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	hooks := cli.Hooks{
		Version: version, Revision: revision,
		Init: initCluster, Join: joinCluster, Witness: runWitness, Agent: runAgent, Shim: runShim,
		Flusher:  func(context.Context, []string) error { return nil },
		Checks:   checks,
		Commands: []*cobra.Command{labcmd.Command()},
	}
	return cli.Main(ctx, hooks, cli.StdStreams(), os.Args[1:])
}

// runShim drives one VM. It does not end by SIGINT: that is for the terminal
// that happened to start the agent, and VMs outlive it.
func runShim(ctx context.Context, o cli.ShimOptions) error {
	return shim.Main(context.WithoutCancel(ctx), o.Dir, []string{"/proc/self/exe", "flusher"}, logger(o.Log))
}

// logger builds the logger that a long-running process was asked for.
func logger(o cli.LogOptions) *slog.Logger {
	var level slog.Level
	if err := level.UnmarshalText([]byte(o.Level)); err != nil {
		fmt.Fprintf(o.Out, "log level %q is not known, using info\n", o.Level)
	}
	opts := &slog.HandlerOptions{Level: level}
	if o.Format == "json" {
		return slog.New(slog.NewJSONHandler(o.Out, opts))
	}
	return slog.New(slog.NewTextHandler(o.Out, opts))
}
