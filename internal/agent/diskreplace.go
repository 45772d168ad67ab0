package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"perdure/api"
	"perdure/internal/authority"
	"perdure/internal/clusterstore"
	"perdure/internal/model"
	"perdure/internal/shimapi"
)

// A replica of a disk is given up for a new one, which is then filled from the other host's.

// ReplaceDisk implements httpapi.Service.
func (a *Agent) ReplaceDisk(ctx context.Context, vm, disk string, req api.ReplaceDisk) (api.Operation, error) {
	if req.Host != "" {
		if err := a.checkHost(req.Host); err != nil {
			return api.Operation{}, err
		}
	}
	return a.onDiskHost(ctx, "replace", vm, func(ctx context.Context, c *api.Client, _ *operation) (api.Operation, error) {
		return c.ReplaceDisk(ctx, vm, disk, req)
	}, func(v clusterstore.VMView) (func(context.Context, *operation) error, error) {
		if diskIndex(v.Spec, disk) < 0 {
			return nil, noDisk(v.Spec, disk)
		}
		host, err := replaceHost(v, req.Host)
		if err != nil {
			return nil, err
		}
		if rec := v.Record.Record; req.Path != "" && rec.Mode != model.ModeStopped && host == rec.Primary.Host && rec.Replicas[host].State == model.UpToDate {
			return nil, api.Errorf(api.Refused, "host %s runs VM %q from its replica of disk %s, which is good; it is not moved to %s meanwhile", host, vm, disk, req.Path).
				WithAction("repeat this when the other host runs the VM, or while it is stopped")
		}
		if err := a.decided(ctx, vm, host, disk); err != nil {
			return nil, err
		}
		to, err := a.replacePlace(ctx, v, disk, host, req)
		if err != nil {
			return nil, err
		}
		return func(ctx context.Context, op *operation) error { return a.replaceReplica(ctx, op, v, disk, host, to) }, nil
	})
}

// decided refuses to give up a replica that may hold what no other one does, because its
// host wrote alone: a person looks at the sides first, and says which one is lost.
func (a *Agent) decided(ctx context.Context, vm, host, disk string) error {
	s, err := a.SplitBrain(ctx, vm)
	if err != nil {
		return err
	}
	for _, side := range s.Sides {
		if side.Host == host && side.Split {
			return api.Errorf(api.Refused, "host %s keeps another line of history of VM %q (split brain); its replica of disk %s may hold data that no other host has", host, vm, disk).
				WithAction("perdure split-brain show %s, then perdure split-brain resolve %s --discard HOST", vm, vm)
		}
	}
	return nil
}

// replaceHost decides whose replica is meant, and whether it may be given up.
func replaceHost(v clusterstore.VMView, asked string) (string, error) {
	rec, name := v.Record.Record, v.Spec.Name
	others := []string{}
	for _, h := range sortedKeys(rec.Replicas) {
		if h != rec.Primary.Host {
			others = append(others, h)
		}
	}
	if asked == "" {
		if len(others) != 1 {
			return "", api.Errorf(api.Invalid, "VM %q has replicas on %d other hosts (%s); say whose is to be replaced (--host)", name, len(others), joinOr(others, "none"))
		}
		asked = others[0]
	}
	if _, ok := rec.Replicas[asked]; !ok {
		return "", api.Errorf(api.Refused, "host %s has no replica of VM %q", asked, name)
	}
	good := false
	for h, r := range rec.Replicas {
		good = good || h != asked && r.State == model.UpToDate
	}
	running := rec.Mode != model.ModeStopped
	switch {
	case !good:
		return "", api.Errorf(api.Refused, "host %s has the only UpToDate replica of VM %q; it is not given up", asked, name)
	case running && asked == rec.Primary.Host && v.Spec.Level != model.LevelCA:
		return "", api.Errorf(api.Refused, "host %s runs VM %q from its replica", asked, name).
			WithAction("let the other host run it first (perdure vm switchover %s), then repeat this", name)
	}
	return asked, nil
}

// newPlace is where a replica that is made anew is to lie.
type newPlace struct {
	path      string // model.StatePlace: the state directory
	overwrite bool
	device    bool
	change    bool // it differs from what the specification says
}

// replacePlace has the host look at the place of its new replica, before anything is given up.
func (a *Agent) replacePlace(ctx context.Context, v clusterstore.VMView, disk, host string, req api.ReplaceDisk) (to newPlace, err error) {
	now, placed := v.Spec.Place(disk, host)
	to = newPlace{path: req.Path, overwrite: req.Overwrite}
	switch {
	case to.path == "" && placed:
		to.path = now.Path
	case to.path == "":
		to.path = model.StatePlace
	}
	if to.path != model.StatePlace {
		to.path = filepath.Clean(to.path)
	}
	if to.path == model.StatePlace {
		to.change = placed
		return to, nil
	}
	to.change = now.Path != to.path || now.Overwrite != to.overwrite
	found, err := a.placeOn(ctx, host, placeAsk{VM: v.Spec.Name, UUID: v.Spec.UUID, Disk: disk, Size: v.Spec.Disks[diskIndex(v.Spec, disk)].Size,
		Path: to.path, Overwrite: to.overwrite})
	to.device = found.Device
	return to, err
}

// place writes where a replica is to lie into the specification, and returns how to take that back.
func (a *Agent) place(ctx context.Context, v clusterstore.VMView, disk, host string, to newPlace) (back func(), err error) {
	if !to.change {
		return func() {}, nil
	}
	set := func(ctx context.Context, p model.DiskPlace) error {
		_, err := a.changeSpec(ctx, v.Spec.Name, func(spec model.VMSpec, rec model.Record) (model.VMSpec, model.Record, error) {
			if spec.UUID != v.Spec.UUID || diskIndex(spec, disk) < 0 {
				return spec, rec, noDisk(spec, disk)
			}
			spec.Places = spec.WithPlaces(p)
			return spec, rec, nil
		})
		return err
	}
	old, placed := v.Spec.Place(disk, host)
	if !placed {
		old = model.DiskPlace{Disk: disk, Host: host, Path: model.StatePlace}
	}
	back = func() {
		if err := set(context.WithoutCancel(ctx), old); err != nil {
			a.log.Warn("take back the new place of a replica", "vm", v.Spec.Name, "disk", disk, "host", host, "error", err)
		}
	}
	return back, set(ctx, model.DiskPlace{Disk: disk, Host: host, Path: to.path, Overwrite: to.overwrite})
}

// replaceReplica has a host make its replica of one disk anew; it is filled when the VM
// is protected the next time.
func (a *Agent) replaceReplica(ctx context.Context, op *operation, v clusterstore.VMView, disk, host string, to newPlace) (err error) {
	vm, rec := v.Spec.Name, v.Record.Record
	back, err := a.place(ctx, v, disk, host, to)
	if err != nil {
		return err
	}
	defer func() {
		// A shim that was too slow to answer may be filling the replica at its new place.
		if err != nil && api.ClassOf(err) != api.Timeout {
			back()
		}
	}()
	if rec.Mode != model.ModeStopped && host == rec.Primary.Host {
		defer a.holdPlace(placeAsk{VM: vm, UUID: v.Spec.UUID, Disk: disk, Path: to.path})()
		op.say("the running guest's replica is made anew")
		value, err := json.Marshal(shimapi.ReplaceDisk{Disk: disk, Path: to.path, Device: to.device})
		if err != nil {
			return fmt.Errorf("replace disk %s: %w", disk, err)
		}
		if to.path == model.StatePlace && !to.change {
			value = []byte(disk) // which older shims know too
		}
		return a.shimOpHere(ctx, vm, shimapi.Op{Op: "disk-replace", Value: string(value)})
	}
	if rec.Mode != model.ModeStopped {
		w := a.workerOf(vm)
		if w == nil || !w.holdDisks(true) {
			return api.Errorf(api.Conflict, "the disks of VM %q are being changed already", vm)
		}
		defer func() {
			w.holdDisks(false)
			w.wake()
		}()
		ctx = context.WithoutCancel(ctx)
		if err := a.leavePair(ctx, op, vm); err != nil {
			return err
		}
	}
	if _, err := a.change(ctx, vm, func(r model.Record) (model.Record, error) { return authority.Outdate(r, host) }); err != nil {
		return refusal(vm, err)
	}
	op.say("host " + host + " makes its replica anew")
	rctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	req := renewReplica{Disk: disk, UUID: v.Spec.UUID}
	if host == a.cfg.Name {
		return a.renewHere(rctx, vm, req)
	}
	if err := a.ask(rctx, host, http.MethodPost, "renew-replica", vm, req, nil); err != nil {
		return err
	}
	a.event(vm, "disk-replaced", 0, "host %s made its replica of disk %s anew", host, disk)
	return nil
}

// renewReplica asks a host to make its replica of a disk anew.
type renewReplica struct {
	Disk string `json:"disk"`
	UUID string `json:"uuid"`
	Drop bool   `json:"drop,omitempty"` // the disk was detached: remove the replica only
}

// renewHere gives this host's replica of a disk up, by a record, read linearizably, that
// needs it for nothing.
func (a *Agent) renewHere(ctx context.Context, vm string, req renewReplica) error {
	do := func(ctx context.Context) error {
		spec, err := a.store.Spec(ctx, vm)
		if err != nil {
			return err
		}
		cur, err := a.store.Record(ctx, vm)
		if err != nil {
			return err
		}
		rec, me := cur.Record, a.cfg.Name
		n := diskIndex(spec, req.Disk)
		switch {
		case req.Drop && spec.UUID == req.UUID && n >= 0:
			return fmt.Errorf("VM %q has disk %q", vm, req.Disk)
		case spec.UUID != req.UUID || n < 0 && !req.Drop || api.CheckDiskID(req.Disk) != nil:
			return fmt.Errorf("VM %q has no disk %q", vm, req.Disk)
		case req.Drop:
		case rec.Replicas[me].State == model.UpToDate:
			return fmt.Errorf("the replica of VM %q on host %s is UpToDate", vm, me)
		case otherBranch(rec, rec.Replicas[me]):
			return fmt.Errorf("host %s keeps another line of history of VM %q: a person decides first (perdure split-brain show %s)", me, vm, vm)
		case rec.Mode != model.ModeStopped && (rec.Primary.Host == me || rec.Secondary.Host == me):
			return fmt.Errorf("host %s has a place in the record of VM %q", me, vm)
		}
		if own, err := os.ReadFile(filepath.Join(a.cfg.VMDir(vm), uuidFile)); req.Drop && (err != nil || string(own) != req.UUID) {
			return nil // nothing of that VM is here
		}
		if err := a.ownDir(spec); err != nil {
			return err
		}
		lock, ok, err := tryLock(a.vmFile(vm, shimapi.LockFile))
		switch {
		case err != nil:
			return err
		case !ok:
			return fmt.Errorf("%w: VM %q", errStillLives, vm)
		}
		defer lock.release()
		if req.Drop {
			return a.removeReplica(vm, req.Disk)
		}
		err = a.makeReplica(ctx, spec, rec, spec.Disks[n])
		if err == nil {
			a.diskReplaced(vm) // this host may hold the second copy again
		}
		return err
	}
	for { // what lived here needs a moment to end
		var err error
		if w := a.workerOf(vm); w != nil {
			err = w.between(ctx, do)
		} else {
			err = do(ctx)
		}
		if !errors.Is(err, errStillLives) || !sleep(ctx, 100*time.Millisecond) {
			return err
		}
	}
}
