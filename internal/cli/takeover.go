package cli

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"perdure/api"
)

func (a *app) vmTakeoverCommand() *cobra.Command {
	var w waiting
	var host, confirm string
	var force bool
	c := a.named("takeover", "Let a host take a VM over by a person's decision", func(ctx context.Context, cl *api.Client, args []string) error {
		if host == "" {
			return api.Errorf(api.Invalid, "perdure vm takeover: --on is missing").WithAction("name the host that shall go on: --on HOST")
		}
		if confirm != "" && !force {
			return api.Errorf(api.Invalid, "--confirm is only used with --force")
		}
		risk, err := cl.TakeoverRisk(ctx, args[0], host)
		if err != nil {
			return err
		}
		if !risk.Possible {
			a.printRisk(risk)
			return api.Errorf(api.Refused, "VM %s cannot go on on %s: there is nothing to go on from", args[0], host)
		}
		if !risk.Safe {
			a.printRisk(risk)
		}
		if force && !risk.Safe && confirm == "" {
			if !a.inTTY {
				return api.Errorf(api.Refused, "a forced takeover was not confirmed").WithAction("read what could be lost, then add --confirm %s", args[0])
			}
			if confirm, err = a.ask(ctx, "Type the VM's name to go on: "); err != nil {
				return err
			}
			if confirm != args[0] {
				return api.Errorf(api.Refused, "%q is not the VM's name %q; nothing was done", confirm, args[0])
			}
		}
		if force && risk.Safe && confirm == "" {
			confirm = args[0] // nothing can be lost, so there is nothing to confirm
		}
		if err := cl.TakeoverVM(ctx, args[0], api.TakeoverVM{Host: host, Force: force, Confirm: confirm}); err != nil || w.no {
			return err
		}
		if _, err := a.await(ctx, cl, args[0], "state=running|paused,primary="+host, "to go on on "+host, w.timeout); err != nil {
			return err
		}
		return a.report(ctx, cl, args[0], "")
	})
	c.Use = "takeover NAME --on HOST [--force]"
	c.Long = `Lets a host take a VM over although the cluster did not decide so. Without
--force only what is safe is done. With --force it says first what could be
lost and asks for the VM's name; the VM goes on as a new branch of its history,
and the data of the other branch is kept for a person to choose from.`
	c.Flags().StringVar(&host, "on", "", "`HOST` that shall go on")
	c.Flags().BoolVar(&force, "force", false, "also where something could be lost")
	c.Flags().StringVar(&confirm, "confirm", "", "the VM's `NAME`, instead of being asked")
	w.add(c, time.Minute, "it runs there")
	return c
}

// printRisk says in words and numbers what a forced takeover could lose.
func (a *app) printRisk(r api.TakeoverRisk) {
	out := func(format string, args ...any) { fmt.Fprintf(a.err, format+"\n", args...) }
	if r.Safe {
		out("Nothing can be lost: %s holds everything that was let out.", r.Host)
		return
	}
	out("%s", a.paintErr(bad, fmt.Sprintf("Forced takeover of %s on %s: what could be lost", r.VM, r.Host)))
	switch r.From {
	case "memory":
		out("  %s would go on from its copy in memory, last complete epoch %d.", r.Host, r.LastEpoch)
	case "disk":
		out("  %s would start from its disk, as after a power failure; what was only in memory is gone.", r.Host)
	default:
		out("  %s holds neither memory nor disks of %s.", r.Host, r.VM)
	}
	switch {
	case r.BehindMS > 0:
		out("  What it holds is %s old: everything after that is gone.", time.Duration(r.BehindMS)*time.Millisecond)
	case r.BehindMS < 0:
		out("  How old it is cannot be told from here.")
	}
	if r.Replica != "" {
		out("  Its disks are %s as of term %d; the record stands at term %d.", r.Replica, r.ReplicaTerm, r.RecordTerm)
	}
	if r.Primary != "" && r.Primary != r.Host {
		if r.PrimaryAnswers {
			out("  %s", a.paintErr(bad, r.Primary+" ANSWERS AND MAY RUN IT NOW: what it does is not seen on "+r.Host+"."))
		} else {
			out("  %s does not answer from here and may still be running it; if so, both run until it is reached or switched off.", r.Primary)
		}
	}
	for _, l := range r.Losses {
		out("  - %s", l)
	}
	out("  The two histories are kept apart afterwards and are never merged.")
}
