package cli

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"perdure/api"
	"perdure/internal/model"
)

func (a *app) vmLevelCommand() *cobra.Command {
	var w waiting
	var stop bool
	c := &cobra.Command{Use: "level NAME LEVEL", Short: "Change the level of protection while the guest runs", ValidArgsFunction: a.completeVMs,
		Args: func(c *cobra.Command, list []string) error {
			if stop {
				return args("NAME")(c, list)
			}
			return args("NAME", "LEVEL")(c, list)
		}}
	c.RunE = a.call(func(ctx context.Context, cl *api.Client, list []string) error {
		if stop {
			return cl.SetLevel(ctx, list[0], api.SetLevel{Cancel: true})
		}
		return a.setLevel(ctx, cl, list[0], model.Level(list[1]), w)
	})
	c.Long = `Changes the level of protection of a VM: none, ca or ft. The guest runs on, with its
connections; to or from ft it moves to a second QEMU on its own host and stands still for
some tens of milliseconds. While the change lasts the VM has no second copy, and to or from
ft its memory is needed twice on its host. Whatever fails leaves the level as it was.
A second copy is then made by itself, as after a start. Of a stopped VM the
level is changed at once, for its next start.`
	c.Flags().BoolVar(&stop, "cancel", false, "give up the change that is under way")
	w.add(c, 30*time.Minute, "its level is changed")
	return c
}

func (a *app) setLevel(ctx context.Context, cl *api.Client, name string, to model.Level, w waiting) error {
	req := api.SetLevel{Level: to}
	if err := req.Validate(); err != nil {
		return err
	}
	before, err := cl.VM(ctx, name)
	if err != nil {
		return err
	}
	if err := cl.SetLevel(ctx, name, req); err != nil || w.no {
		return err
	}
	p := a.newProgress()
	defer p.clear()
	vm, err := a.followLevel(ctx, cl, before, to, w.timeout, p)
	if err != nil {
		return err
	}
	p.clear()
	said := fmt.Sprintf("level %s, it was %s", to, before.Level)
	if c := vm.LevelChange; c != nil && vm.Mode != model.ModeStopped {
		said += "; the guest stood still for " + ms(c.BlackoutMS)
	}
	return a.report(ctx, cl, name, said)
}

// followLevel waits until a change of level that was accepted has ended, and shows how far it is. A
// person who interrupts it gives the change up.
func (a *app) followLevel(ctx context.Context, cl *api.Client, before api.VM, to model.Level, timeout time.Duration, p *progress) (api.VM, error) {
	name := before.Name
	for end := a.now().Add(timeout); ; {
		vm, err := cl.VM(ctx, name)
		if ctx.Err() != nil {
			p.clear()
			cctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
			defer cancel()
			if err := cl.SetLevel(cctx, name, api.SetLevel{Cancel: true}); err != nil {
				a.note("the change could not be given up: %v", err)
			} else {
				a.note("given up; the level stays %s", before.Level)
			}
			return vm, ctx.Err()
		}
		if err != nil {
			return vm, err
		}
		c := vm.LevelChange
		if c != nil && before.LevelChange != nil && c.Begun.Equal(before.LevelChange.Begun) {
			c = nil // an earlier one
		}
		switch {
		case c != nil && c.Ended && c.Error != "":
			return vm, api.Errorf(api.Refused, "VM %s keeps level %s: %s", name, before.Level, c.Error)
		case vm.Level == to && (c == nil || c.Ended):
			return vm, nil
		case vm.Mode == model.ModeStopped && before.Mode != model.ModeStopped:
			return vm, api.Errorf(api.Conflict, "VM %s was stopped before its level was changed; it is %s", name, vm.Level)
		case !a.now().Before(end):
			return vm, timedOut(&vm, name, "to have level "+string(to), timeout)
		}
		what := fmt.Sprintf("changing %s to level %s", name, to)
		if c != nil && c.Progress.Total > 0 {
			p.show(what, []model.Progress{c.Progress})
		} else {
			p.show(what, nil)
		}
		select {
		case <-time.After(levelPoll):
		case <-ctx.Done():
		}
	}
}

// levelPoll is the distance of looks at a change of level.
const levelPoll = 100 * time.Millisecond
