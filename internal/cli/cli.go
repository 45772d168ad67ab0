// Package cli is Perdure's command line: a client of the REST interface, plus
// the commands that start the product's other processes, whose bodies main
// injects as Hooks so that this package reaches neither the cluster store nor
// FUSE nor QEMU.
//
// Main runs one command line and returns the exit code; it uses the streams and
// the environment it is given and keeps no state between calls. Output for
// people goes to the output stream as tables, for programs as JSON or YAML with
// the fields of package api; notes, progress and questions go to the error
// stream. What a command says is what the agent said when it was asked: a VM is
// never called running unless its own shim was heard saying so.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"perdure/api"
	"perdure/internal/config"
	"perdure/internal/doctor"
)

// Exit codes that no error class stands for; see api.Classes for the others.
const (
	ExitOK          = 0
	ExitInterrupted = 130
)

// Hooks are the bodies of the commands that are not clients. A nil hook leaves
// its command out. Each runs until its context ends or it is done; errors made
// with api.Errorf decide the exit code.
type Hooks struct {
	Version  string // of the binary
	Revision string // of its source, if known

	Init    func(context.Context, InitOptions) error
	Join    func(context.Context, JoinOptions) error
	Witness func(context.Context, WitnessOptions) error
	Agent   func(context.Context, AgentOptions) error
	Shim    func(context.Context, ShimOptions) error
	// Flusher gets the arguments as they are.
	Flusher func(context.Context, []string) error
	// Checks are further checks of perdure doctor, run after the built-in ones.
	Checks func(DoctorOptions) []doctor.Check
	// Commands are mounted as they are (lab). An error of theirs that has a
	// method ExitCode ends the process with that code and without a message.
	Commands []*cobra.Command
}

// InitOptions of perdure init. Config is valid.
type InitOptions struct {
	Config  config.Config
	Cluster string // name of the new cluster
	Out     io.Writer
}

// JoinOptions of perdure join. Config is valid.
type JoinOptions struct {
	Config config.Config
	Token  string
	Out    io.Writer
}

// WitnessOptions of perdure witness. Where Token is set, Config is valid and
// the witness joins before it runs; else it runs from StateDir.
type WitnessOptions struct {
	Config   config.Config
	Token    string
	StateDir string
	Log      LogOptions
}

// AgentOptions of perdure agent.
type AgentOptions struct {
	StateDir string
	Log      LogOptions
}

// ShimOptions of perdure shim.
type ShimOptions struct {
	Dir string
	Log LogOptions
}

// LogOptions say what a long-running process writes on its error stream.
type LogOptions struct {
	Level  string // debug, info, warn or error
	Format string // text or json
	Out    io.Writer
}

// DoctorOptions are handed to Hooks.Checks.
type DoctorOptions struct {
	StateDir string
	Peers    []string
	QEMU     string
	Quick    bool // leave out what takes longer than some seconds
}

// Streams are what a command line talks to. Terminals are recognised where
// they are *os.File.
type Streams struct {
	In       io.Reader
	Out, Err io.Writer
	Env      func(string) string
}

// StdStreams returns those of the process.
func StdStreams() Streams {
	return Streams{In: os.Stdin, Out: os.Stdout, Err: os.Stderr, Env: os.Getenv}
}

// app is one command line being carried out.
type app struct {
	Hooks
	in       io.Reader
	out, err io.Writer
	env      func(string) string

	outTTY, errTTY, inTTY bool
	colour, colourErr     bool

	output                        string
	socket, server, cert, key, ca string
	clientMade                    *api.Client
	now                           func() time.Time
}

// Main carries out one command line (without the program's name) and returns
// the exit code.
func Main(ctx context.Context, hooks Hooks, s Streams, args []string) int {
	a := newApp(hooks, s)
	root := a.root()
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if a.clientMade != nil {
		a.clientMade.Close()
	}
	return a.finish(ctx, err)
}

// Root returns the command tree, for documentation.
func Root(hooks Hooks, s Streams) *cobra.Command { return newApp(hooks, s).root() }

func newApp(hooks Hooks, s Streams) *app {
	a := &app{Hooks: hooks, in: s.In, out: s.Out, err: s.Err, env: s.Env, now: time.Now}
	a.inTTY, a.outTTY, a.errTTY = isTerminal(s.In), isTerminal(s.Out), isTerminal(s.Err)
	mayColour := a.env("NO_COLOR") == "" && a.env("TERM") != "dumb"
	a.colour, a.colourErr = a.outTTY && mayColour, a.errTTY && mayColour
	return a
}

func isTerminal(v any) bool {
	f, ok := v.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// finish says what went wrong and chooses the exit code.
func (a *app) finish(ctx context.Context, err error) int {
	if err == nil {
		return ExitOK
	}
	// The command that was run has said what there is to say. Only the error
	// itself counts, not what it wraps: a helper's exit code is not ours.
	if e, ok := err.(interface{ ExitCode() int }); ok {
		return e.ExitCode()
	}
	if errors.Is(err, context.Canceled) && ctx.Err() != nil {
		fmt.Fprintln(a.err, "perdure: interrupted")
		return ExitInterrupted
	}
	fmt.Fprintf(a.err, "%s %s\n", a.paintErr(bad, "perdure:"), err)
	if p := api.ProblemOf(err); p.Action != "" {
		fmt.Fprintf(a.err, "  to do: %s\n", p.Action)
	}
	return api.ClassOf(err).Info().Exit
}

// exitCode ends the process with a code and no message: what there is to say was said.
type exitCode int

func (e exitCode) Error() string { return fmt.Sprintf("exit code %d", int(e)) }

// ExitCode is what finish looks for; mounted commands may do the same.
func (e exitCode) ExitCode() int { return int(e) }

const rootLong = `Perdure keeps virtual machines running through the loss of hosts, disks and
networks, on ordinary Linux hosts without shared storage, on unmodified QEMU.

Most commands ask the agent of a host: over its Unix socket (--socket,
PERDURE_SOCKET), or from elsewhere over TLS (--server with --cert, --key and
--ca). See "perdure help exit-codes" for what the exit codes mean.`

func (a *app) root() *cobra.Command {
	root := a.group("perdure", "Virtual machines that outlive their hosts", rootLong)
	root.SilenceErrors, root.SilenceUsage = true, true
	root.SetIn(a.in)
	root.SetOut(a.out)
	root.SetErr(a.err)
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return api.Errorf(api.Invalid, "%s: %w", c.CommandPath(), err).WithAction("see %s --help", c.CommandPath())
	})
	f := root.PersistentFlags()
	f.StringVarP(&a.output, "output", "o", "table", "`FORM` of the output: table, wide, json or yaml")
	f.StringVar(&a.socket, "socket", "", "Unix socket of the agent, `PATH` (default $PERDURE_SOCKET, else "+defaultSocket()+")")
	f.StringVar(&a.server, "server", "", "agent to ask over TLS, `HOST:PORT`, several separated by commas (default $PERDURE_SERVER)")
	f.StringVar(&a.cert, "cert", "", "client certificate for --server, PEM `FILE` (default $PERDURE_CERT)")
	f.StringVar(&a.key, "key", "", "its key, PEM `FILE` (default $PERDURE_KEY)")
	f.StringVar(&a.ca, "ca", "", "certificate authority of the cluster, PEM `FILE` (default $PERDURE_CA)")
	root.PersistentPreRunE = func(*cobra.Command, []string) error { return a.checkOutput() }
	root.AddGroup(&cobra.Group{ID: "use", Title: "Using a cluster:"}, &cobra.Group{ID: "host", Title: "On a host:"})
	add := func(group string, cmds ...*cobra.Command) {
		for _, c := range cmds {
			if c != nil {
				c.GroupID = group
				root.AddCommand(c)
			}
		}
	}
	add("use", a.statusCommand(), a.hostCommand(), a.vmCommand(), a.diskCommand(), a.tokenCommand())
	add("host", a.initCommand(), a.joinCommand(), a.witnessCommand(), a.agentCommand(), a.doctorCommand(), a.inspectCommand())
	add("", a.shimCommand(), a.flusherCommand(), a.versionCommand(), a.manCommand(), exitCodesTopic())
	add("host", a.Commands...)
	return root
}

func defaultSocket() string { return filepath.Join(config.DefaultStateDir, "run", "agent.sock") }

// group makes a command that only holds others.
func (a *app) group(use, short, long string) *cobra.Command {
	c := &cobra.Command{Use: use, Short: short, Long: long, Args: cobra.ArbitraryArgs}
	c.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return cmd.Help()
		}
		err := api.Errorf(api.Invalid, "%s: command %q does not exist", cmd.CommandPath(), args[0])
		if s := cmd.SuggestionsFor(args[0]); len(s) > 0 {
			return err.WithAction("did you mean %s %s?", cmd.CommandPath(), strings.Join(s, " or "))
		}
		return err.WithAction("see %s --help", cmd.CommandPath())
	}
	return c
}

// args checks the number of arguments; names are those of the usage line.
func args(names ...string) cobra.PositionalArgs {
	return func(c *cobra.Command, given []string) error {
		switch {
		case len(given) < len(names):
			return api.Errorf(api.Invalid, "%s: %s is missing", c.CommandPath(), names[len(given)]).WithAction("see %s --help", c.CommandPath())
		case len(given) > len(names):
			return api.Errorf(api.Invalid, "%s: argument %q is one too many", c.CommandPath(), given[len(names)]).WithAction("see %s --help", c.CommandPath())
		}
		return nil
	}
}

// client returns the client that the flags and the environment ask for.
func (a *app) client() (*api.Client, error) {
	if a.clientMade != nil {
		return a.clientMade, nil
	}
	if a.socket != "" && a.server != "" {
		return nil, api.Errorf(api.Invalid, "both --socket %s and --server %s are given; give one of both", a.socket, a.server)
	}
	or := func(flag, env string) string {
		if flag != "" {
			return flag
		}
		return a.env(env)
	}
	socket, server := a.socket, a.server
	if socket == "" && server == "" {
		socket, server = a.env("PERDURE_SOCKET"), a.env("PERDURE_SERVER")
		if socket != "" {
			server = "" // on the host itself its socket is the nearer one
		}
	}
	o := api.Options{Socket: socket}
	if server != "" {
		conf, err := api.LoadTLS(or(a.cert, "PERDURE_CERT"), or(a.key, "PERDURE_KEY"), or(a.ca, "PERDURE_CA"))
		if err != nil {
			return nil, err
		}
		o.TLS = conf
		for s := range strings.SplitSeq(server, ",") {
			o.Servers = append(o.Servers, strings.TrimSpace(s))
		}
	} else if socket == "" {
		o.Socket = defaultSocket()
	}
	c, err := api.New(o)
	if err != nil {
		return nil, err
	}
	a.clientMade = c
	return c, nil
}

// call makes the body of a command that talks to the agent.
func (a *app) call(f func(ctx context.Context, c *api.Client, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		c, err := a.client()
		if err != nil {
			return err
		}
		return f(cmd.Context(), c, args)
	}
}

func exitCodesTopic() *cobra.Command {
	var b strings.Builder
	b.WriteString("Exit codes of all commands:\n\n    0  ok\n")
	byExit := map[int][]string{}
	var order []int
	for _, c := range api.Classes() {
		if byExit[c.Exit] == nil {
			order = append(order, c.Exit)
		}
		byExit[c.Exit] = append(byExit[c.Exit], c.Meaning)
	}
	for _, e := range order {
		fmt.Fprintf(&b, "%5d  %s\n", e, strings.Join(byExit[e], "; or "))
	}
	b.WriteString("  130  interrupted\n\n\"perdure doctor\" ends with 1 when any check failed. \"perdure lab exec\" ends with\nthe code of the command it ran.")
	return &cobra.Command{Use: "exit-codes", Short: "What the exit codes mean", Long: b.String()}
}

// versionInfo is what perdure version prints.
type versionInfo struct {
	Version  string `json:"version"`
	Revision string `json:"revision,omitempty"`
}

func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{Use: "version", Short: "Print the version", Args: args(),
		RunE: func(*cobra.Command, []string) error {
			v := versionInfo{a.Version, a.Revision}
			if a.machine() {
				return a.printValue(v)
			}
			if v.Revision != "" {
				v.Version += " (" + v.Revision + ")"
			}
			fmt.Fprintln(a.out, "perdure "+v.Version)
			return nil
		}}
}
