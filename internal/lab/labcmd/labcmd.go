// Package labcmd is the command line of the lab: `perdure lab …`. It holds no
// logic of its own beyond flags and output, keeps no state, and leaves nothing
// running but the lab itself.
package labcmd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"perdure/api"
	"perdure/internal/lab"
	"perdure/internal/lab/demo"
	"perdure/internal/lab/guest"
)

// ExitStatus ends the process with the status of the command that lab exec
// ran, and without a message: what there is to say was said by that command.
type ExitStatus int

func (e ExitStatus) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// ExitCode is the status, 1 to 255.
func (e ExitStatus) ExitCode() int { return int(e) }

type labCommands struct{ dir string }

// Command returns `lab` with everything below it.
func Command() *cobra.Command {
	l := &labCommands{}
	c := &cobra.Command{
		Use:   "lab",
		Short: "Several hosts on one machine, with faults on demand",
		Long: `Runs several hosts on this machine, each in namespaces of its own, with a LAN,
availability links, a witness and a client, and the same agent and shims as on
real hosts. Faults are made on demand. Needs root. "lab down" leaves nothing behind.`,
		Example: `  perdure lab up
  perdure lab exec a -- perdure host list
  perdure lab host a power-off
  perdure lab link b alink0 down
  perdure lab down`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.PersistentFlags().StringVar(&l.dir, "dir", lab.DefaultDir, "directory of the lab")
	c.AddCommand(l.up(), l.down(), l.status(), l.exec(), l.host(), l.link(), l.guest(), l.demo(), clientCommand(l))
	return c
}

// logger tells a person at the terminal what is being done.
func logger(c *cobra.Command) *slog.Logger { return slog.New(&plainHandler{w: c.ErrOrStderr()}) }

func (l *labCommands) up() *cobra.Command {
	o := lab.Options{}
	bare := false
	c := &cobra.Command{Use: "up", Short: "Make a lab and form a cluster of its hosts", Args: cobra.NoArgs}
	c.Flags().IntVar(&o.Hosts, "hosts", 2, "number of hosts, 1 to 16: a, b, c, …")
	c.Flags().BoolVar(&o.Witness, "witness", true, "with a witness: w")
	c.Flags().IntVar(&o.ALinks, "alinks", lab.DefaultALinks, "number of availability links, 0 to 4")
	c.Flags().BoolVar(&bare, "no-cluster", false, "only the hosts; nothing runs on them")
	c.RunE = func(c *cobra.Command, _ []string) error {
		if o.Hosts == 0 { // in Options it means the default
			return api.Errorf(api.Invalid, "number of hosts 0: must be 1 to 16")
		}
		o.Dir, o.Log = l.dir, logger(c)
		if !bare {
			o = lab.Cluster(o)
		}
		made, err := lab.Up(c.Context(), o)
		if err != nil {
			return explain(err)
		}
		if err := printStatus(c.OutOrStdout(), made); err != nil {
			return err
		}
		at := l.at()
		fmt.Fprintf(c.OutOrStdout(), "\nTry:  perdure lab%s exec a -- perdure host list\n      perdure lab%s exec a            (a shell on host a)\n      perdure lab%s down\n", at, at, at)
		return nil
	}
	return c
}

// at is the flag that names this lab, where it is not the default one.
func (l *labCommands) at() string {
	if l.dir == lab.DefaultDir {
		return ""
	}
	return " --dir " + l.dir
}

func (l *labCommands) open(c *cobra.Command) (*lab.Lab, error) {
	got, err := lab.Open(l.dir, logger(c))
	if err != nil {
		return nil, explain(err)
	}
	return got, nil
}

// explain gives errors of the lab their class and says what to do.
func explain(err error) error {
	switch {
	case errors.Is(err, lab.ErrNoLab):
		return api.Errorf(api.NotFound, "%w", err).WithAction("make one: perdure lab up")
	case errors.Is(err, lab.ErrExists):
		return api.Errorf(api.Conflict, "%w", err).WithAction("use it, or remove it first: perdure lab down")
	case errors.Is(err, lab.ErrOff):
		return api.Errorf(api.Conflict, "%w", err).WithAction("perdure lab host NAME power-on")
	case errors.Is(err, lab.ErrFrozen):
		return api.Errorf(api.Conflict, "%w", err).WithAction("perdure lab host NAME thaw")
	}
	return err
}

func (l *labCommands) down() *cobra.Command {
	return &cobra.Command{Use: "down", Short: "Remove the lab, whole or half-made, and everything that belongs to it", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(c.Context()), 2*time.Minute) // Ctrl-C in the middle would leave half of it
			defer cancel()
			return lab.Down(ctx, l.dir, logger(c))
		}}
}

func (l *labCommands) status() *cobra.Command {
	return &cobra.Command{Use: "status", Short: "Show what each host is and does", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			got, err := l.open(c)
			if err != nil {
				return err
			}
			if f := c.Flag("output"); f != nil && f.Value.String() == "json" {
				st, err := got.Status()
				if err != nil {
					return err
				}
				e := json.NewEncoder(c.OutOrStdout())
				e.SetIndent("", "  ")
				return e.Encode(st)
			}
			return printStatus(c.OutOrStdout(), got)
		}}
}

func printStatus(w io.Writer, l *lab.Lab) error {
	st, err := l.Status()
	if err != nil {
		return err
	}
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "NAME\tROLE\tPOWER\tADDRESS\tA-LINKS\tLINKS DOWN\tAGENT\tVMS")
	or := func(s string) string {
		if s == "" {
			return "-"
		}
		return s
	}
	for _, s := range st {
		agent := ""
		if s.Agent != 0 {
			agent = fmt.Sprint("pid ", s.Agent)
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", s.Name, s.Role, s.Power, s.Addr, or(strings.Join(s.ALinks, " ")),
			or(strings.Join(s.DownLinks, " ")), or(agent), or(strings.Join(s.VMs, " ")))
	}
	return tw.Flush()
}

func (l *labCommands) exec() *cobra.Command {
	c := &cobra.Command{Use: "exec HOST|client [-- CMD…]", Short: "Run a command on a host (default: a shell)", Args: cobra.MinimumNArgs(1),
		Long: `Runs a command as a process of that host: in its namespaces and its cgroup, so
that it is frozen with the host and dies with it. Plain "perdure vm list" asks
that host's agent. The exit status is the command's.`,
		RunE: func(c *cobra.Command, args []string) error {
			got, err := l.open(c)
			if err != nil {
				return err
			}
			host, cmd := args[0], args[1:]
			if len(cmd) > 0 && cmd[0] == "--" { // flags end at HOST already
				cmd = cmd[1:]
			}
			if len(cmd) == 0 {
				sh := os.Getenv("SHELL")
				if sh == "" {
					sh = "/bin/sh"
				}
				cmd = []string{sh}
			}
			x := got.Interactive(c.Context(), host, cmd...)
			err = x.Run()
			var ee *exec.ExitError
			if errors.As(err, &ee) {
				if code := ee.ExitCode(); code > 0 {
					return ExitStatus(code)
				}
				return ExitStatus(130) // ended by a signal
			}
			return explain(err)
		}}
	c.Flags().SetInterspersed(false)
	return c
}

func (l *labCommands) host() *cobra.Command {
	do := map[string]func(*lab.Lab, context.Context, string) error{
		"power-off": (*lab.Lab).PowerOff, "power-on": (*lab.Lab).PowerOn, "freeze": (*lab.Lab).Freeze, "thaw": (*lab.Lab).Thaw,
	}
	return &cobra.Command{Use: "host NAME power-off|power-on|freeze|thaw", Short: "Take a host's power, give it back, let it hang, let it go on",
		Args: cobra.ExactArgs(2), ValidArgs: []string{"power-off", "power-on", "freeze", "thaw"},
		RunE: func(c *cobra.Command, args []string) error {
			f, ok := do[args[1]]
			if !ok {
				return api.Errorf(api.Invalid, "%q cannot be done to a host; allowed are power-off, power-on, freeze and thaw", args[1])
			}
			got, err := l.open(c)
			if err != nil {
				return err
			}
			// In the middle of it, Ctrl-C would leave a host half off.
			return explain(f(got, context.WithoutCancel(c.Context()), args[0]))
		}}
}

func (l *labCommands) link() *cobra.Command {
	return &cobra.Command{Use: "link HOST lan|alink0|alink1 down|up", Short: "Pull a cable at the switch, or plug it in again", Args: cobra.ExactArgs(3),
		RunE: func(c *cobra.Command, args []string) error {
			if !slices.Contains([]string{"up", "down"}, args[2]) {
				return api.Errorf(api.Invalid, "%q cannot be done to a link; allowed are down and up", args[2])
			}
			got, err := l.open(c)
			if err != nil {
				return err
			}
			return explain(got.SetLink(args[0], args[1], args[2] == "up"))
		}}
}

func (l *labCommands) guest() *cobra.Command {
	g := &cobra.Command{Use: "guest", Short: "The demo guest", Args: cobra.NoArgs, RunE: func(c *cobra.Command, _ []string) error { return c.Help() }}
	g.AddCommand(&cobra.Command{Use: "build DIR", Short: "Build kernel and initramfs of the demo guest into DIR", Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			built, err := guest.Build(c.Context(), guest.Options{Dir: args[0], Log: logger(c)})
			if err != nil {
				return err
			}
			fmt.Fprintf(c.OutOrStdout(), "kernel  %s\ninitrd  %s\nappend  %s\n", built.Kernel, built.Initrd, guest.AppendFor("10.77.0.50/24"))
			return nil
		}})
	return g
}

func (l *labCommands) demo() *cobra.Command {
	o := demo.Options{Keep: os.Getenv("KEEP") == "1"}
	c := &cobra.Command{Use: "demo", Short: "A guest outlives the power-off of its host, live", Args: cobra.NoArgs,
		Long: `Makes a lab, protects the demo guest, lets a client talk to it, takes the power
of the primary's host in the middle, gives it back, and waits until the guest is
protected again. Ends with 1 if anything was lost. KEEP=1 leaves the lab up.`,
		RunE: func(c *cobra.Command, _ []string) error {
			o.Dir, o.Out = l.dir, c.OutOrStdout()
			ok, err := demo.Run(c.Context(), o)
			if err != nil {
				return explain(err)
			}
			if !ok {
				return ExitStatus(1)
			}
			return nil
		}}
	c.Flags().BoolVar(&o.Keep, "keep", o.Keep, "leave the lab up (default: $KEEP = 1)")
	return c
}

// plainHandler writes log records as lines for people.
type plainHandler struct{ w io.Writer }

func (h *plainHandler) Enabled(_ context.Context, lv slog.Level) bool { return lv >= slog.LevelInfo }
func (h *plainHandler) WithAttrs([]slog.Attr) slog.Handler            { return h }
func (h *plainHandler) WithGroup(string) slog.Handler                 { return h }
func (h *plainHandler) Handle(_ context.Context, r slog.Record) error {
	s := "· " + r.Message
	r.Attrs(func(a slog.Attr) bool { s += " " + a.Value.String(); return true })
	_, err := fmt.Fprintln(h.w, s)
	return err
}
