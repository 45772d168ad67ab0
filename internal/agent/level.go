package agent

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"time"

	"perdure/api"
	"perdure/internal/authority"
	"perdure/internal/clusterstore"
	"perdure/internal/model"
	"perdure/internal/shimapi"
)

// The level of a VM is in its specification and its record, and in what its shim has built. Of a stopped
// VM the first two are changed. Of a running one the shim changes what it has built, and the
// agent of its host then writes down what the shim says: so whatever ends in the middle, store and guest come to
// agree, and a change that failed has changed nothing (docs/level.md).

// SetLevel implements httpapi.Service.
func (a *Agent) SetLevel(ctx context.Context, name string, req api.SetLevel) error {
	v, err := a.find(ctx, name)
	if err != nil {
		return err
	}
	rec := v.Record.Record
	if rec.Mode == model.ModeStopped || rec.Primary.Host == "" {
		if req.Cancel {
			return api.Errorf(api.Conflict, "VM %q is stopped: its level is not being changed", name)
		}
		return a.setLevelStopped(ctx, name, req.Level)
	}
	if host := rec.Primary.Host; host != a.cfg.Name {
		if api.Forwarded(ctx) {
			return api.Errorf(api.Unavailable, "VM %q moved to host %s meanwhile; ask again", name, host)
		}
		p, _, err := a.peer(host)
		if err != nil {
			return err
		}
		defer a.statuses.drop(name)
		return p.api.SetLevel(api.WithForwarded(ctx), name, req)
	}
	if req.Cancel {
		return a.shimOpHere(ctx, name, shimapi.Op{Op: "level-cancel"})
	}
	return a.setLevelHere(ctx, v, req.Level)
}

// setLevelStopped changes the level of a VM that is stopped: it takes effect with the next start.
func (a *Agent) setLevelStopped(ctx context.Context, name string, to model.Level) error {
	err := a.store.ChangeSpec(ctx, name, func(spec model.VMSpec, rec model.Record) (model.VMSpec, model.Record, error) {
		switch {
		case rec.Mode != model.ModeStopped:
			return spec, rec, api.Errorf(api.Conflict, "VM %q was started meanwhile; ask again", name)
		case spec.Level == to && rec.Level == to:
			return spec, rec, api.Errorf(api.Conflict, "VM %q has level %s already", name, to)
		}
		if err := levelRefused(spec, to); err != nil {
			return spec, rec, err
		}
		if to == model.LevelFT && spec.Accel == "kvm" {
			if spec.TSCHz == 0 {
				return spec, rec, api.Errorf(api.Refused, "VM %q cannot have level ft: kvm offered no fixed TSC frequency on the host where it was created", name)
			}
			spec.SteadyTime = true // the guest boots anew and may find another clock
		}
		spec.Level = to
		rec, err := authority.SetLevel(rec, to)
		return spec, rec, err
	})
	if err != nil {
		return levelError(name, err)
	}
	a.statuses.drop(name)
	a.event(name, "level-set", 0, "the level is %s from the next start on", to)
	return nil
}

// levelError gives an error of a change its class for callers from outside.
func levelError(name string, err error) error {
	var e *api.Error
	switch {
	case errors.As(err, &e):
		return e
	case errors.Is(err, clusterstore.ErrConflict):
		return api.Errorf(api.Unavailable, "VM %q changes too fast; try again", name)
	}
	if errors.Is(err, clusterstore.ErrNotFound) || errors.Is(err, clusterstore.ErrUnavailable) {
		return storeError(name, err)
	}
	return refusal(name, err)
}

// levelRefused says what about a VM itself stands against a level.
func levelRefused(spec model.VMSpec, to model.Level) error {
	if !spec.UEFI {
		return nil
	}
	if err := uefiRefused(to); err != nil {
		return api.Errorf(api.Refused, "VM %q has UEFI and cannot have level %s: %w", spec.Name, to, err)
	}
	return nil
}

// setLevelHere has the shim of this host change the level of its running guest, once nothing that
// can be known before stands against it.
func (a *Agent) setLevelHere(ctx context.Context, v clusterstore.VMView, to model.Level) error {
	spec, name := v.Spec, v.Spec.Name
	if v.Record.Record.Mode == model.ModeStarting {
		return api.Errorf(api.Conflict, "VM %q is just starting; wait until it runs (perdure vm wait %s --for state=running)", name, name)
	}
	if spec.Level == to {
		return api.Errorf(api.Conflict, "VM %q has level %s already", name, to)
	}
	if err := levelRefused(spec, to); err != nil {
		return err
	}
	if to == model.LevelFT {
		if spec.Accel == "kvm" && !spec.SteadyTime {
			return api.Errorf(api.Refused, "VM %q cannot become level ft while it runs: its guest has kvmclock, which checkpoints would slow", name).
				WithAction("shut the guest down, change the level, and start it: it then finds a clock that level ft can keep")
		}
		want := spec
		want.Level = to
		if err := errors.Join(checkFUSE(want), a.checkTracking()); err != nil {
			return api.Errorf(api.Refused, "VM %q cannot have level ft on host %s: %w", name, a.cfg.Name, err)
		}
	}
	if to == model.LevelFT || spec.Level == model.LevelFT {
		// Guest memory and overhead once more, while the change lasts.
		if free := memAvailable(); free > 0 && free < spec.Memory+ftOverhead {
			return api.Errorf(api.Refused, "host %s has %s of memory free: the guest's %s and some more are needed a second time while its level is changed",
				a.cfg.Name, api.FormatSize(free), api.FormatSize(spec.Memory)).WithAction("make room on that host, or shut the guest down and change the level while it is stopped")
		}
	}
	defer a.kick(name)
	return a.shimOpHere(ctx, name, shimapi.Op{Op: "level", Value: string(to)})
}

// levelLook is the least distance of two looks at what level a shim says.
const levelLook = 250 * time.Millisecond

// level writes down the level that the running guest has come to have, and reports whether it is
// just being changed.
func (w *worker) level(ctx context.Context, v clusterstore.VMView) (busy bool) {
	rec := v.Record.Record
	if rec.Mode != model.ModeSimplex {
		w.levelSeen = levelSeen{}
		return false // it is changed in simplex only; until then protection has nothing to do here
	}
	if w.levelSeen.rev == v.Record.Revision && time.Since(w.levelSeen.at) < levelLook {
		if w.levelSeen.busy {
			w.wakeIn(levelLook)
		}
		return w.levelSeen.busy
	}
	sctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	c := w.a.shim(w.vm)
	defer c.Close()
	st, err := c.Status(sctx)
	if err != nil || st.Role != shimapi.RolePrimary || st.Run != rec.Primary.Run {
		return false
	}
	busy = st.Change != nil && !st.Change.Ended
	if !busy && st.Level != "" && (st.Level != v.Spec.Level || st.Level != rec.Level) {
		if err := w.adoptLevel(ctx, st); err != nil {
			w.a.log.Warn("write down the level of a VM", "vm", w.vm, "level", st.Level, "error", err)
			busy = true // nobody is to be named by the old one
		}
	}
	w.levelSeen = levelSeen{rev: v.Record.Revision, at: time.Now(), busy: busy}
	if busy {
		w.wakeIn(levelLook)
	}
	return busy
}

// levelSeen is what a worker remembers of its last look.
type levelSeen struct {
	rev  model.Revision
	at   time.Time
	busy bool
}

// adoptLevel makes specification and record say what the shim of the record's primary has built.
func (w *worker) adoptLevel(ctx context.Context, st shimapi.Status) error {
	var from model.Level
	err := w.a.store.ChangeSpec(ctx, w.vm, func(spec model.VMSpec, rec model.Record) (model.VMSpec, model.Record, error) {
		if rec.Primary != (model.Seat{Host: w.a.cfg.Name, Run: st.Run}) {
			return spec, rec, errChangedMeanwhile
		}
		old := spec
		from = spec.Level
		spec.SteadyTime = spec.SteadyTime || spec.Level == model.LevelFT && spec.Accel == "kvm" // the guest keeps its clock
		spec.Level = st.Level
		next, err := authority.SetLevel(rec, st.Level)
		if err == nil && reflect.DeepEqual(old, spec) && rec.Level == st.Level {
			err = errNothingNew
		}
		return spec, next, err
	})
	if errors.Is(err, errNothingNew) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("adopt level: %w", err)
	}
	w.a.statuses.drop(w.vm)
	text := fmt.Sprintf("the level is %s, it was %s", st.Level, from)
	if st.Level == model.LevelNone {
		if v, ok := w.a.store.VM(w.vm); ok && len(v.Record.Record.Replicas) > 1 {
			text += "; the other hosts keep their copies of the disks, outdated from now on: they make the next protection cheaper, and go with the VM"
		}
	}
	w.a.event(w.vm, "level-set", st.Term, "%s", text)
	return nil
}

var errNothingNew = errors.New("there is nothing to change")
