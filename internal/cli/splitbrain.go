package cli

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"perdure/api"
	"perdure/internal/model"
)

func (a *app) splitBrainCommand() *cobra.Command {
	c := a.group("split-brain", "Replicas that went apart", `After a forced takeover, or when both hosts wrote alone, each side of a VM may hold
data that the other has not. Perdure never merges them and overwrites neither: a
person looks at what each side would lose, and gives one up.`)
	c.AddCommand(a.named("show", "Show what each side holds, and what would be lost by giving it up", a.splitShow), a.splitResolveCommand())
	return c
}

func (a *app) splitShow(ctx context.Context, cl *api.Client, args []string) error {
	s, err := cl.SplitBrain(ctx, args[0])
	if err != nil {
		return err
	}
	if a.machine() {
		return a.printValue(s)
	}
	a.printSplit(s)
	return nil
}

func (a *app) splitResolveCommand() *cobra.Command {
	var w waiting
	var host string
	var yes bool
	c := a.named("resolve", "Give one side's replicas up", func(ctx context.Context, cl *api.Client, args []string) error {
		if host == "" {
			return api.Errorf(api.Invalid, "perdure split-brain resolve: --discard is missing").WithAction("see what each side holds: perdure split-brain show %s; then name the host to be given up: --discard HOST", args[0])
		}
		s, err := cl.SplitBrain(ctx, args[0])
		if err != nil {
			return err
		}
		side := sideOf(s, host)
		if side == nil {
			return api.Errorf(api.NotFound, "host %q holds nothing of VM %q", host, args[0])
		}
		if side.CanDiscard && !yes {
			a.printLoss(s, side)
			if !a.inTTY {
				return api.Errorf(api.Refused, "nothing was confirmed, and nothing done").WithAction("read what is lost, then add --yes")
			}
			typed, err := a.ask(ctx, "Type the VM's name to go on: ")
			if err != nil {
				return err
			}
			if typed != args[0] {
				return api.Errorf(api.Refused, "%q is not the VM's name %q; nothing was done", typed, args[0])
			}
		}
		// What cannot be discarded the agent refuses, with its reason.
		if err := cl.ResolveSplitBrain(ctx, args[0], api.ResolveSplitBrain{Discard: host, Confirm: args[0]}); err != nil {
			return err
		}
		if w.no {
			return nil
		}
		return a.awaitResolved(ctx, cl, args[0], host, w.timeout)
	})
	c.Use = "resolve NAME --discard HOST"
	c.Long = `Gives the replicas of one host up, for good. It says first what is lost by that and
asks for the VM's name. They are filled from the side that counts afterwards, by
what differs where that is known, and the VM is protected again. Refused for the host
that runs the VM, for the only good copy, and while the other side does not answer.`
	c.Flags().StringVar(&host, "discard", "", "`HOST` whose replicas are given up")
	c.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	w.add(c, 5*time.Minute, "the VM is protected again")
	return c
}

// awaitResolved waits for protection, where the VM is one that has it.
func (a *app) awaitResolved(ctx context.Context, cl *api.Client, name, host string, timeout time.Duration) error {
	vm, err := cl.VM(ctx, name)
	if err != nil {
		return err
	}
	if !vm.Level.HasSecondary() || vm.Mode == model.ModeStopped {
		a.say("%s: the replicas on %s are given up", name, host)
		return nil
	}
	if slices.ContainsFunc(vm.Problems, func(p model.Problem) bool { return p.Code == "protection-off" }) {
		a.say("%s: the replicas on %s are given up; protection is off: perdure vm protect %s", name, host, name)
		return nil
	}
	p := a.newProgress()
	defer p.clear()
	cond, err := api.ParseCondition("mode=duplex")
	if err != nil {
		return err
	}
	for end := a.now().Add(timeout); ; {
		r, err := cl.Wait(ctx, name, cond, min(time.Second, max(time.Millisecond, end.Sub(a.now()))))
		switch {
		case err != nil:
			return err
		case r.Met:
			p.clear()
			return a.report(ctx, cl, name, "")
		case !a.now().Before(end):
			return timedOut(r.VM, name, "to be protected again", timeout)
		}
		if r.VM != nil {
			p.show("filling "+host, r.VM.Sync)
		}
	}
}

func sideOf(s api.SplitBrain, host string) *api.SplitSide {
	for i := range s.Sides {
		if s.Sides[i].Host == host {
			return &s.Sides[i]
		}
	}
	return nil
}

// printSplit says in words and numbers what there is.
func (a *app) printSplit(s api.SplitBrain) {
	switch {
	case s.Split:
		a.say("%s", a.paint(bad, s.VM+": SPLIT BRAIN: a side has data that the one which counts has not"))
	default:
		a.say("%s", a.paint(good, s.VM+": no side waits for a decision"))
	}
	for i := range s.Sides {
		side := &s.Sides[i]
		what := "stands apart"
		switch {
		case side.Counts && s.Running:
			what = "runs the VM: its copy counts"
		case side.Counts:
			what = "the VM would be started from it: its copy counts"
		case !side.Split:
			what = "is brought up to date by itself"
		}
		a.say("\n%s %s", a.paint(bold, side.Host), what)
		branch := string(side.Branch)
		if branch == "" {
			branch = "the first"
		}
		if side.State != "" {
			a.say("  by the record      %s, as of term %d, branch %s", side.State, side.Term, branch)
		} else {
			a.say("  by the record      nothing")
		}
		if !side.Answers {
			a.say("  %s", a.paint(warn, "does not answer: only the record is known"))
		}
		for _, d := range side.Disks {
			a.printSplitDisk(d)
		}
		for n, e := range side.Events {
			label := ""
			if n == 0 {
				label = "last events"
			}
			a.say("  %-18s %s  %-16s %s", label, e.Time.Local().Format(time.DateTime), e.Type, e.Text)
		}
		a.say("  given up, it loses")
		for _, l := range side.Loses {
			a.say("    - %s", l)
		}
		if side.CanDiscard {
			a.say("  may be given up    perdure split-brain resolve %s --discard %s", s.VM, side.Host)
		} else {
			a.say("  not to be given up %s", side.WhyNot)
		}
	}
}

func (a *app) printSplitDisk(d api.SplitDisk) {
	if d.Error != "" {
		a.say("  %-18s %s", d.Disk, a.paint(bad, d.Error))
		return
	}
	line := fmt.Sprintf("%s, %s, line of %s", api.FormatSize(d.Size), d.State, d.Line)
	if d.Crashed {
		line += ", not closed in order"
	}
	if d.Discarded {
		line += ", given up"
	}
	a.say("  %-18s %s", d.Disk, line)
	more := ""
	if d.Alone {
		more = fmt.Sprintf("written alone since %s: at most %s", d.Since, api.FormatSize(d.AloneBytes))
	} else if d.AloneBytes > 0 {
		more = fmt.Sprintf("may differ in at most %s", api.FormatSize(d.AloneBytes))
	}
	if !d.Written.IsZero() {
		if more != "" {
			more += ", "
		}
		more += "last written " + d.Written.Local().Format(time.DateTime)
	}
	if more != "" {
		a.say("  %-18s %s", "", more)
	}
	if d.Verdict != "" {
		common := "nothing in common is known"
		if d.Common != "" {
			common = "common up to " + d.Common
		}
		a.say("  %-18s compared: %s, %s", "", d.Verdict, common)
	}
}

// printLoss says what is lost before it is.
func (a *app) printLoss(s api.SplitBrain, side *api.SplitSide) {
	fmt.Fprintln(a.err, a.paintErr(bad, fmt.Sprintf("The replicas of %s on %s are given up for good; %s counts. What is lost:", s.VM, side.Host, s.Primary)))
	for _, l := range side.Loses {
		fmt.Fprintf(a.err, "  - %s\n", l)
	}
}
