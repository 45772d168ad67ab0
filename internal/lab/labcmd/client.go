package labcmd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"perdure/internal/client"
	"perdure/internal/lab"
	"perdure/internal/lab/guestsvc"
)

// clientCommand is `perdure lab client …`: the test client for people.
func clientCommand(l *labCommands) *cobra.Command {
	c := &cobra.Command{Use: "client", Short: "Talk to the demo guest from the lab's client, and keep the books", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() }}
	var interval, duration time.Duration
	flags := func(c *cobra.Command) *cobra.Command {
		c.Flags().DurationVar(&interval, "interval", 20*time.Millisecond, "between two requests")
		c.Flags().DurationVar(&duration, "duration", 0, "how long (default: until Ctrl-C)")
		return c
	}
	c.AddCommand(flags(&cobra.Command{Use: "counter IP", Short: "Stream requests over one connection and check that the guest goes on where it was", Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			o, err := l.clientOptions(c, args[0], guestsvc.PortCounter, interval)
			if err != nil {
				return err
			}
			return runCounter(c, o, duration)
		}}))
	c.AddCommand(flags(&cobra.Command{Use: "log IP", Short: "Append to the durable log, then compare it with what was acknowledged", Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			o, err := l.clientOptions(c, args[0], guestsvc.PortLog, interval)
			if err != nil {
				return err
			}
			return runLog(c, o, duration)
		}}))
	c.AddCommand(&cobra.Command{Use: "say IP COMMAND…", Short: "Send a command to the guest's control service (help lists them)", Args: cobra.MinimumNArgs(2),
		RunE: func(c *cobra.Command, args []string) error {
			o, err := l.clientOptions(c, args[0], guestsvc.PortControl, 0)
			if err != nil {
				return err
			}
			command := args[1]
			for _, a := range args[2:] {
				command += " " + a
			}
			lines, text, err := client.Control(c.Context(), o.Dial, o.Addr, command)
			for _, s := range lines {
				fmt.Fprintln(c.OutOrStdout(), s)
			}
			if err == nil && text != "" {
				fmt.Fprintln(c.OutOrStdout(), text)
			}
			return err
		}})
	return c
}

func (l *labCommands) clientOptions(c *cobra.Command, ip string, port int, interval time.Duration) (client.Options, error) {
	got, err := l.open(c)
	if err != nil {
		return client.Options{}, err
	}
	return client.Options{Addr: net.JoinHostPort(ip, strconv.Itoa(port)), Dial: got.Dialer(lab.Client), Interval: interval}, nil
}

// until waits for the end of duration or Ctrl-C, showing a line that moves.
func until(c *cobra.Command, duration time.Duration, done <-chan struct{}, line func() string) {
	ctx := c.Context()
	if duration > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, duration)
		defer cancel()
	}
	live := false
	if f, ok := c.ErrOrStderr().(*os.File); ok {
		live = term.IsTerminal(int(f.Fd()))
	}
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
		case <-done:
		case <-tick.C:
			if live {
				fmt.Fprintf(c.ErrOrStderr(), "\r\x1b[K%s", line())
			}
			continue
		}
		if live {
			fmt.Fprint(c.ErrOrStderr(), "\r\x1b[K")
		}
		return
	}
}

// untilConnected returns a context that ends with the parent until connected
// is called, and no more after: Ctrl-C then asks for the result.
func untilConnected(parent context.Context) (ctx context.Context, connected func()) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(parent))
	stop := context.AfterFunc(parent, cancel)
	return ctx, func() { stop() }
}

func runCounter(c *cobra.Command, o client.Options, duration time.Duration) error {
	ctx, connected := untilConnected(c.Context())
	cl, err := client.StartCounter(ctx, o)
	connected()
	if err != nil {
		return err
	}
	until(c, duration, cl.Done(), func() string { return cl.Snapshot().String() })
	r := cl.Stop()
	fmt.Fprintln(c.OutOrStdout(), r)
	if !r.Clean() {
		return errors.New("the counter did not go on as it must")
	}
	return nil
}

func runLog(c *cobra.Command, o client.Options, duration time.Duration) error {
	ctx, connected := untilConnected(c.Context())
	lg, err := client.StartLog(ctx, o)
	connected()
	if err != nil {
		return err
	}
	until(c, duration, nil, func() string { return lg.Snapshot().String() })
	lg.Stop()
	vctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	r, err := lg.Verify(vctx)
	if err != nil {
		return err
	}
	fmt.Fprintln(c.OutOrStdout(), r)
	if !r.Clean() {
		return errors.New("the log is not what was acknowledged")
	}
	return nil
}
