package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"perdure/api"
	"perdure/internal/model"
)

func (a *app) vmEventsCommand() *cobra.Command {
	var follow bool
	var since string
	c := a.named("events", "The timeline of a VM", func(ctx context.Context, cl *api.Client, args []string) error {
		q := api.EventQuery{Follow: follow}
		if since != "" {
			t, err := parseSince(since, a.now())
			if err != nil {
				return err
			}
			q.Since = t
		}
		if follow {
			return a.followEvents(ctx, cl, args[0], q)
		}
		events := []model.Event{}
		if err := cl.Events(ctx, args[0], q, func(e model.Event) error {
			events = append(events, e)
			return nil
		}); err != nil {
			return err
		}
		if a.machine() {
			return a.printValue(events)
		}
		a.printEvents(events)
		return nil
	})
	c.Long = `Prints what happened to a VM on all its hosts, oldest first, with how long it
took. With -f it goes on as things happen, through takeovers and restarts of
agents, until interrupted. -o json prints a list, with -f one object a line.`
	c.Flags().BoolVarP(&follow, "follow", "f", false, "go on with events as they happen")
	c.Flags().StringVar(&since, "since", "", "only later ones: a `TIME` (RFC 3339) or a duration back from now, such as 10m")
	return c
}

func parseSince(s string, now time.Time) (time.Time, error) {
	if d, err := time.ParseDuration(s); err == nil && d >= 0 {
		return now.Add(-d), nil
	}
	t, err := time.Parse(time.RFC3339Nano, s)
	if err != nil {
		return t, api.Errorf(api.Invalid, "--since %q is neither a time such as 2006-01-02T15:04:05Z nor a duration such as 10m", s)
	}
	return t, nil
}

const eventTime = "2006-01-02 15:04:05.000"

func took(e *model.Event) string {
	if e.DurationMS == 0 {
		return ""
	}
	return ms(e.DurationMS)
}

func (a *app) eventStyle(typ string) style {
	switch typ {
	case "duplex", "started", "running", "resumed":
		return good
	case "takeover", "secondary-lost", "primary-lost", "fault", "panic", "io-error", "refused":
		return bad
	}
	return plain
}

func (a *app) printEvents(events []model.Event) {
	t := &table{head: []string{"TIME", "HOST", "TYPE", "TERM", "TOOK", "TEXT"}}
	if a.output == "wide" {
		t.head = []string{"TIME", "HOST", "TYPE", "TERM", "EPOCH", "TOOK", "TEXT"}
	}
	for i := range events {
		e := &events[i]
		row := []cell{{text: e.Time.Local().Format(eventTime)}, {text: e.Host}, {e.Type, a.eventStyle(e.Type)}, {text: strconv.FormatUint(uint64(e.Term), 10)}}
		if a.output == "wide" {
			row = append(row, text("%d", e.Epoch))
		}
		t.add(append(row, cell{text: took(e)}, cell{text: e.Text})...)
	}
	a.printTable(t)
}

// followEvents asks again when the stream breaks, without repeating an event.
func (a *app) followEvents(ctx context.Context, cl *api.Client, name string, q api.EventQuery) error {
	type id struct {
		host, typ string
		seq       uint64
		at        time.Time
	}
	seen := map[id]bool{}
	answered := false
	for {
		err := cl.Events(ctx, name, q, func(e model.Event) error {
			answered = true
			k := id{e.Host, e.Type, e.Seq, e.Time.UTC()}
			if seen[k] {
				return nil
			}
			seen[k] = true
			// Clocks of hosts differ: asking again reaches back far enough that no
			// event of the other host is missed.
			if back := e.Time.Add(-time.Minute); back.After(q.Since) {
				q.Since = back
				for k := range seen {
					if k.at.Before(back.Add(-time.Minute)) {
						delete(seen, k)
					}
				}
			}
			return a.printEvent(&e)
		})
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil && api.ClassOf(err) != api.Unavailable && api.ClassOf(err) != api.Timeout:
			return err
		case err != nil && !answered:
			return err
		}
		a.note("event stream broke; asking again")
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(500 * time.Millisecond):
		}
	}
}

func (a *app) printEvent(e *model.Event) error {
	switch a.output {
	case "json":
		return json.NewEncoder(a.out).Encode(e)
	case "yaml":
		if _, err := fmt.Fprintln(a.out, "---"); err != nil {
			return err
		}
		return a.printValue(e)
	}
	_, err := fmt.Fprintf(a.out, "%s  %-8s %s  term %-4d %9s  %s\n", e.Time.Local().Format(eventTime), e.Host,
		a.paint(a.eventStyle(e.Type), fmt.Sprintf("%-16s", e.Type)), e.Term, took(e), e.Text)
	return err
}
