package cli

import (
	"bufio"
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"perdure/api"
	"perdure/internal/model"
)

func (a *app) vmCommand() *cobra.Command {
	c := a.group("vm", "Virtual machines", "")
	c.AddCommand(a.vmCreateCommand(),
		&cobra.Command{Use: "list", Aliases: []string{"ls"}, Short: "List the VMs", Args: args(), RunE: a.call(a.vmList)},
		a.named("show", "Show one VM: what is wrong first", a.vmShow),
		a.vmStartCommand(), a.vmStopCommand(), a.vmKillCommand(), a.vmDeleteCommand(), a.vmPauseCommand(), a.vmResumeCommand(),
		a.vmProtectCommand(), a.vmLevelCommand(), a.vmSwitchoverCommand(), a.vmTakeoverCommand(), a.vmEventsCommand(), a.vmWaitCommand(), a.vmConsoleCommand(), a.vmDiskCommand())
	return c
}

// named makes a command whose one argument is the name of a VM.
func (a *app) named(verb, short string, f func(context.Context, *api.Client, []string) error) *cobra.Command {
	return &cobra.Command{Use: verb + " NAME", Short: short, Args: args("NAME"), RunE: a.call(f), ValidArgsFunction: a.completeVMs}
}

// waiting holds the flags of commands that wait for their effect.
type waiting struct {
	no      bool
	timeout time.Duration
}

func (w *waiting) add(c *cobra.Command, timeout time.Duration, what string) {
	c.Flags().BoolVar(&w.no, "no-wait", false, "return as soon as the request was accepted")
	c.Flags().DurationVar(&w.timeout, "timeout", timeout, "how long to wait until "+what)
}

func (a *app) vmStartCommand() *cobra.Command {
	var w waiting
	var host string
	c := a.named("start", "Start a stopped VM", func(ctx context.Context, cl *api.Client, args []string) error {
		if err := cl.StartVM(ctx, args[0], api.StartVM{Host: host}); err != nil {
			return err
		}
		if w.no {
			return nil
		}
		p := a.newProgress()
		defer p.clear()
		if err := a.waitStart(ctx, cl, args[0], w.timeout, p); err != nil {
			return err
		}
		p.clear()
		return a.report(ctx, cl, args[0], "")
	})
	c.Flags().StringVar(&host, "host", "", "`HOST` where (default: where its newest disks are)")
	w.add(c, time.Minute, "it runs")
	return c
}

// waitStart waits until a VM runs, and ends early where it cannot.
func (a *app) waitStart(ctx context.Context, cl *api.Client, name string, timeout time.Duration, p *progress) error {
	cond, err := api.ParseCondition("state=running|paused|fault")
	if err != nil {
		return err
	}
	for end := a.now().Add(timeout); ; {
		p.show("starting "+name, nil)
		r, err := cl.Wait(ctx, name, cond, min(time.Second, max(time.Millisecond, end.Sub(a.now()))))
		switch {
		case err != nil:
			return err
		case r.Met && r.VM.State == model.StateFault:
			return vmFailed(r.VM, "started but stands still")
		case r.Met:
			return nil
		case r.VM != nil && r.VM.Mode == model.ModeStopped && r.VM.Wanted == model.WantStopped:
			return vmFailed(r.VM, "did not start")
		case r.VM != nil && r.VM.Mode == model.ModeStarting && startFailed(r.VM) != "":
			return api.Errorf(api.Internal, "VM %s did not start: %s", name, startFailed(r.VM)).
				WithAction("remove the cause: it is tried again by itself; or give up: perdure vm kill %s", name)
		case !a.now().Before(end):
			return timedOut(r.VM, name, "to run", timeout)
		}
	}
}

// startFailed returns why the last try to start a VM failed, or "".
func startFailed(vm *api.VM) string {
	for _, p := range vm.Problems {
		if p.Code == "start-failed" {
			return p.Text
		}
	}
	return ""
}

// vmFailed makes an error of the worst problem a VM has.
func vmFailed(vm *api.VM, what string) error {
	if ps := byseverity(vm.Problems); len(ps) > 0 {
		return api.Errorf(api.Internal, "VM %s %s: %s", vm.Name, what, ps[0].Text).WithAction("%s", ps[0].Action)
	}
	why := vm.Reason
	if why == "" {
		why = "see perdure vm events " + vm.Name
	}
	return api.Errorf(api.Internal, "VM %s %s: %s", vm.Name, what, why)
}

func timedOut(vm *api.VM, name, what string, timeout time.Duration) *api.Error {
	seen := "nothing was seen of it"
	if vm != nil {
		seen = fmt.Sprintf("it is %s, mode %s", stateCell(vm.State).text, vm.Mode)
		if ps := byseverity(vm.Problems); len(ps) > 0 {
			seen += "; " + ps[0].Text
		}
	}
	return api.Errorf(api.Timeout, "VM %s: waited %s for it %s; %s", name, timeout, what, seen)
}

// await waits for a condition after a change.
func (a *app) await(ctx context.Context, cl *api.Client, name, cond, what string, timeout time.Duration) (*api.VM, error) {
	cnd, err := api.ParseCondition(cond)
	if err != nil {
		return nil, err
	}
	r, err := cl.Wait(ctx, name, cnd, timeout)
	if err != nil {
		return r.VM, err
	}
	if !r.Met {
		return r.VM, timedOut(r.VM, name, what, timeout)
	}
	return r.VM, nil
}

func (a *app) vmStopCommand() *cobra.Command {
	var w waiting
	c := a.named("stop", "Press the guest's power button", func(ctx context.Context, cl *api.Client, args []string) error {
		if err := cl.StopVM(ctx, args[0]); err != nil || w.no {
			return err
		}
		vm, err := a.await(ctx, cl, args[0], "state=stopped", "to shut down", w.timeout)
		if api.ClassOf(err) == api.Timeout && vm != nil {
			return timedOut(vm, args[0], "to shut down", w.timeout).WithAction("the guest may ignore its power button; perdure vm kill %s ends it at once", args[0])
		}
		if err != nil {
			return err
		}
		return a.report(ctx, cl, args[0], "")
	})
	c.Long = "Asks the guest to shut down (ACPI) and waits until it has. A guest may ignore it."
	w.add(c, 90*time.Second, "it has stopped")
	return c
}

func (a *app) vmKillCommand() *cobra.Command {
	var w waiting
	c := a.named("kill", "End a VM at once, as by pulling its plug", func(ctx context.Context, cl *api.Client, args []string) error {
		if err := cl.KillVM(ctx, args[0]); err != nil || w.no {
			return err
		}
		if _, err := a.await(ctx, cl, args[0], "state=stopped", "to end", w.timeout); err != nil {
			return err
		}
		return a.report(ctx, cl, args[0], "")
	})
	w.add(c, 30*time.Second, "it has stopped")
	return c
}

func (a *app) vmDeleteCommand() *cobra.Command {
	var force, yes bool
	c := a.named("delete", "Remove a stopped VM and its disks", func(ctx context.Context, cl *api.Client, args []string) error {
		if a.inTTY && !yes {
			vm, err := cl.VM(ctx, args[0])
			if err != nil {
				return err
			}
			var size int64
			for _, d := range vm.Disks {
				size += d.Size
			}
			answer, err := a.ask(ctx, fmt.Sprintf("Remove VM %s and its %d disks (%s) for ever? [y/N] ", vm.Name, len(vm.Disks), api.FormatSize(size)))
			if err != nil {
				return err
			}
			if s := strings.ToLower(answer); s != "y" && s != "yes" {
				return api.Errorf(api.Refused, "not confirmed; nothing was removed")
			}
		}
		if err := cl.DeleteVM(ctx, args[0], api.DeleteVM{Force: force}); err != nil {
			return err
		}
		a.say("%s: removed", args[0])
		return nil
	})
	c.Aliases = []string{"rm"}
	c.Long = "Removes a stopped VM and its disks on all hosts. Asks first on a terminal."
	c.Flags().BoolVar(&force, "force", false, "also when copies on hosts that do not answer have to be left behind")
	c.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return c
}

// ask puts a question on the error stream and reads one line.
func (a *app) ask(ctx context.Context, question string) (string, error) {
	fmt.Fprint(a.err, question)
	type answer struct {
		line string
		err  error
	}
	got := make(chan answer, 1)
	// The read cannot be interrupted; the goroutine ends with its line or with the process.
	go func() {
		line, err := bufio.NewReader(a.in).ReadString('\n')
		got <- answer{line, err}
	}()
	select {
	case <-ctx.Done():
		return "", ctx.Err()
	case r := <-got:
		if r.line == "" && r.err != nil {
			return "", api.Errorf(api.Refused, "no answer was given")
		}
		return strings.TrimSpace(r.line), nil
	}
}

func (a *app) vmPauseCommand() *cobra.Command {
	var w waiting
	c := a.named("pause", "Let the guest stand still until it is resumed", func(ctx context.Context, cl *api.Client, args []string) error {
		if err := cl.PauseVM(ctx, args[0]); err != nil || w.no {
			return err
		}
		if _, err := a.await(ctx, cl, args[0], "state=paused", "to stand still", w.timeout); err != nil {
			return err
		}
		return a.report(ctx, cl, args[0], "")
	})
	c.Long = "Lets the guest stand still. It stays so through takeovers, until \"vm resume\"."
	w.add(c, 30*time.Second, "it stands still")
	return c
}

func (a *app) vmResumeCommand() *cobra.Command {
	var w waiting
	c := a.named("resume", "Let a paused guest go on", func(ctx context.Context, cl *api.Client, args []string) error {
		if err := cl.ResumeVM(ctx, args[0]); err != nil || w.no {
			return err
		}
		if _, err := a.await(ctx, cl, args[0], "state=running", "to go on", w.timeout); err != nil {
			return err
		}
		return a.report(ctx, cl, args[0], "")
	})
	w.add(c, 30*time.Second, "it runs")
	return c
}

func (a *app) vmProtectCommand() *cobra.Command {
	var w waiting
	var req api.ProtectVM
	c := a.named("protect", "Fill a second copy now, or give it up (--off)", func(ctx context.Context, cl *api.Client, args []string) error {
		if err := cl.ProtectVM(ctx, args[0], req); err != nil || w.no {
			return err
		}
		if req.Off {
			if _, err := a.await(ctx, cl, args[0], "mode=simplex|stopped", "to give its second copy up", w.timeout); err != nil {
				return err
			}
			return a.report(ctx, cl, args[0], "")
		}
		p := a.newProgress()
		defer p.clear()
		if err := a.followSync(ctx, cl, args[0], w.timeout, p); err != nil {
			return err
		}
		p.clear()
		return a.report(ctx, cl, args[0], "")
	})
	c.Long = `Fills a second copy of a VM of level ca or ft on another host while the guest runs, and
waits until it is protected. This happens by itself too; the command is for
choosing the host, and for seeing why it does not.`
	c.Flags().StringVar(&req.Host, "host", "", "`HOST` of the second copy (default: any with room)")
	c.Flags().BoolVar(&req.Off, "off", false, "give the second copy up; the VM goes on alone")
	w.add(c, 30*time.Minute, "it is protected")
	return c
}

// followSync waits for duplex and shows the copying.
func (a *app) followSync(ctx context.Context, cl *api.Client, name string, timeout time.Duration, p *progress) error {
	cond, err := api.ParseCondition("mode=duplex|stopped")
	if err != nil {
		return err
	}
	said := map[string]bool{}
	for end := a.now().Add(timeout); ; {
		r, err := cl.Wait(ctx, name, cond, min(500*time.Millisecond, max(time.Millisecond, end.Sub(a.now()))))
		switch {
		case err != nil:
			return err
		case r.Met && r.VM.Mode == model.ModeStopped:
			return api.Errorf(api.Conflict, "VM %s was stopped before it was protected", name)
		case r.Met:
			return nil
		case !a.now().Before(end):
			return timedOut(r.VM, name, "to be protected", timeout)
		}
		if r.VM == nil {
			continue
		}
		p.show("protecting "+name, r.VM.Sync)
		for _, pr := range r.VM.Problems {
			if !said[pr.Code] {
				said[pr.Code] = true
				p.clear()
				a.note("%s %s: %s", pr.Severity, pr.Code, pr.Text)
			}
		}
	}
}

func (a *app) vmSwitchoverCommand() *cobra.Command {
	var w waiting
	var to string
	c := a.named("switchover", "Move a VM to its second copy, planned", func(ctx context.Context, cl *api.Client, args []string) error {
		vm, err := cl.VM(ctx, args[0])
		if err != nil {
			return err
		}
		if to != "" && to == vm.Primary {
			a.say("%s is on %s already", vm.Name, to)
			return nil
		}
		if err := cl.SwitchoverVM(ctx, args[0], api.SwitchoverVM{Host: to}); err != nil || w.no {
			return err
		}
		if _, err := a.await(ctx, cl, args[0], "state=running|paused,primary!="+vm.Primary, "to move away from "+vm.Primary, w.timeout); err != nil {
			return err
		}
		return a.report(ctx, cl, args[0], "")
	})
	c.Long = "Moves a protected VM to the host of its second copy, without losing anything; the\nguest stands still for some tens of milliseconds."
	c.Flags().StringVar(&to, "to", "", "the new primary `HOST` (default: the secondary)")
	w.add(c, time.Minute, "it runs there")
	return c
}

func (a *app) vmWaitCommand() *cobra.Command {
	var cond string
	var timeout time.Duration
	c := a.named("wait", "Wait until a VM is as wanted", func(ctx context.Context, cl *api.Client, args []string) error {
		if cond == "" {
			return api.Errorf(api.Invalid, "perdure vm wait: --for is missing").WithAction("give a condition such as --for state=running or --for mode=duplex")
		}
		if timeout <= 0 {
			return api.Errorf(api.Invalid, "--timeout %s is not allowed; it must be above 0", timeout)
		}
		cnd, err := api.ParseCondition(cond)
		if err != nil {
			return err
		}
		r, err := cl.Wait(ctx, args[0], cnd, timeout)
		if err != nil {
			return err
		}
		if !r.Met {
			return timedOut(r.VM, args[0], "to be "+cond, timeout)
		}
		if a.machine() {
			return a.printValue(r.VM)
		}
		if r.VM == nil {
			a.say("%s: does not exist", args[0])
			return nil
		}
		fmt.Fprintln(a.out, a.stateLine(r.VM))
		return nil
	})
	c.Use = "wait NAME --for CONDITION"
	c.Long = `Waits until a condition holds; ends with exit code 6 when the time is up first.

A condition is KEY=VALUE with KEY one of state, mode, level, primary, secondary
or problem; != turns it round, A|B allows either, and several joined by commas
must all hold. A state or mode alone is enough; "absent" means that the VM does
not exist, "problem=none" that nothing is wrong.`
	c.Example = "  perdure vm wait web --for running\n  perdure vm wait web --for mode=duplex,problem=none --timeout 10m\n  perdure vm wait web --for 'primary!=hosta'"
	c.Flags().StringVar(&cond, "for", "", "the `CONDITION`")
	c.Flags().DurationVar(&timeout, "timeout", time.Minute, "how long to wait")
	return c
}
