package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"perdure/api"
	"perdure/internal/authority"
	"perdure/internal/blockstore"
	"perdure/internal/clusterstore"
	"perdure/internal/model"
	"perdure/internal/shimapi"
	"perdure/internal/vfs"
)

// The disks of a VM are changed by its primary's host, or, of a stopped VM, by a
// host whose replica is UpToDate. What counts is the specification in the cluster store:
// it changes in one transaction together with the record it rests on. Around it everything is ordered so
// that whatever ends in the middle, the old list holds or the new one:
//
//	attach   replica made here → pair left → specification → guest (the old specification again, if it refuses)
//	detach   pair left → guest lets go → specification → replica put aside or removed
//	resize   pair left → specification → replica made larger under the guest
//	replace  pair left → the other host makes its replica anew
//
// A replica that no specification names is not used by anybody. A shim says which disks its
// QEMU has; where they are not those of the specification, because an agent ended in the
// middle or a guest threw a disk out, the worker has them made so (settleDisks). Only giving a
// guest a disk is needed for that in the order above, which takes no consent of the guest.
// A pair is not filled before both agree: the worker does not ask for it, and two shims with
// different disks refuse each other.
//
// The other host follows when it is prepared to be filled the next time (fitReplicas).

const (
	// alonePatience bounds the leaving of a pair.
	alonePatience = 30 * time.Second
	// tellPatience bounds a change of a guest's disks. A replica that is made larger is first
	// made durable, which a slow disk takes its time for.
	tellPatience = 10 * time.Minute
	tellAgainIn  = 500 * time.Millisecond
	// keptDir holds the data of detached disks, in a VM's disk directory.
	keptDir = "kept"
)

// diskHost is who changes the disks of a VM.
func (a *Agent) diskHost(v clusterstore.VMView) (string, error) {
	rec := v.Record.Record
	switch rec.Mode {
	case model.ModeStopped:
		hosts := preferred(rec) // the same for whoever is asked, so that there is one change at a time
		for _, n := range hosts {
			if n == a.cfg.Name {
				return n, nil
			}
			for _, h := range a.store.Hosts() {
				if h.Name == n && h.Alive {
					return n, nil
				}
			}
		}
		if len(hosts) == 0 {
			return "", api.Errorf(api.Refused, "VM %q has no replica that is UpToDate", v.Spec.Name)
		}
		return "", api.Errorf(api.Unavailable, "host %s, which holds the disks of VM %q, gives no sign of life", hosts[0], v.Spec.Name)
	case model.ModeStarting:
		return "", api.Errorf(api.Conflict, "VM %q is just starting on host %s", v.Spec.Name, rec.Primary.Host).WithAction("wait until it runs: perdure vm wait %s --for running", v.Spec.Name)
	}
	return rec.Primary.Host, nil
}

// onDiskHost has a change of disks carried out where it belongs: here, or there, followed from here.
func (a *Agent) onDiskHost(ctx context.Context, kind, vm string, there func(ctx context.Context, c *api.Client, op *operation) (api.Operation, error),
	here func(v clusterstore.VMView) (func(ctx context.Context, op *operation) error, error)) (api.Operation, error) {
	v, err := a.find(ctx, vm)
	if err != nil {
		return api.Operation{}, err
	}
	host, err := a.diskHost(v)
	if err != nil {
		return api.Operation{}, err
	}
	if host == a.cfg.Name {
		do, err := here(v)
		if err != nil {
			return api.Operation{}, err
		}
		return a.ops.begin(kind, vm, do)
	}
	if api.Forwarded(ctx) {
		return api.Operation{}, api.Errorf(api.Unavailable, "VM %q moved to host %s meanwhile; ask again", vm, host)
	}
	p, _, err := a.peer(host)
	if err != nil {
		return api.Operation{}, err
	}
	return a.ops.begin(kind, vm, func(ctx context.Context, op *operation) error {
		fctx := api.WithForwarded(ctx)
		remote, err := there(fctx, p.api, op)
		for err == nil {
			op.mirror(remote)
			switch remote.State {
			case api.OperationDone:
				return nil
			case api.OperationFailed:
				return remote.Error.Err()
			}
			if !sleep(ctx, 200*time.Millisecond) {
				cctx, cancel := context.WithTimeout(api.WithForwarded(context.WithoutCancel(ctx)), 5*time.Second)
				defer cancel()
				return errors.Join(context.Cause(ctx), p.api.CancelOperation(cctx, remote.ID))
			}
			remote, err = p.api.Operation(fctx, remote.ID, 0)
		}
		return err
	})
}

func diskIndex(spec model.VMSpec, id string) int {
	return slices.IndexFunc(spec.Disks, func(d model.DiskSpec) bool { return d.ID == id })
}

func noDisk(spec model.VMSpec, id string) error {
	return api.Errorf(api.NotFound, "VM %q has no disk %q", spec.Name, id).WithAction("see perdure disk list %s", spec.Name)
}

// hotplugs refuses a change of a running VM whose machine has no hot-plug.
func hotplugs(v clusterstore.VMView, what string) error {
	if v.Record.Record.Mode == model.ModeStopped || strings.HasPrefix(v.Spec.Machine, "pc-i440fx-") {
		return nil
	}
	return api.Errorf(api.Refused, "VM %q has machine type %s, whose bus has no free hot-plug port: %s only while it is stopped", v.Spec.Name, v.Spec.Machine, what).
		WithAction("stop it first: perdure vm stop %s", v.Spec.Name)
}

// AttachDisk implements httpapi.Service.
func (a *Agent) AttachDisk(ctx context.Context, vm string, req api.AttachDisk) (api.Operation, error) {
	return a.onDiskHost(ctx, "attach", vm, func(ctx context.Context, c *api.Client, op *operation) (api.Operation, error) {
		if req.Image != nil && req.Image.Path != "" {
			op.say("sending the image")
			var report func(int64)
			err := c.SendImage(ctx, &req, func(_ string, done, total int64) {
				if report == nil {
					report = op.track("upload", total)
				}
				report(done)
			})
			if err != nil {
				return api.Operation{}, err
			}
		}
		return c.AttachDisk(ctx, vm, req)
	}, func(v clusterstore.VMView) (func(context.Context, *operation) error, error) {
		p, err := a.planAttach(ctx, v, req)
		if err != nil {
			return nil, err
		}
		return func(ctx context.Context, op *operation) error {
			defer p.release()
			return a.attach(ctx, op, p)
		}, nil
	})
}

// attachPlan is a disk that was checked and may be made.
type attachPlan struct {
	vm      string
	uuid    string
	disk    model.DiskSpec
	image   *image
	kept    string // file of a detached disk
	places  []model.DiskPlace
	device  bool // its place here is a block device
	release func()
}

// planAttach checks everything that can be checked before anything is made.
func (a *Agent) planAttach(ctx context.Context, v clusterstore.VMView, req api.AttachDisk) (_ *attachPlan, err error) {
	spec := v.Spec
	p := &attachPlan{vm: spec.Name, uuid: spec.UUID, disk: model.DiskSpec{ID: req.ID, Size: req.Size}, release: func() {}}
	defer func() {
		if err != nil {
			p.release()
		}
	}()
	if err := hotplugs(v, "it is given disks"); err != nil {
		return nil, err
	}
	if len(spec.Disks) >= model.DiskSlots {
		return nil, api.Errorf(api.Refused, "VM %q has %d disks; more are not possible", spec.Name, len(spec.Disks))
	}
	for n := 0; p.disk.ID == ""; n++ {
		if id := fmt.Sprintf("disk%d", n); diskIndex(spec, id) < 0 {
			p.disk.ID = id
		}
	}
	if diskIndex(spec, p.disk.ID) >= 0 || slices.ContainsFunc(spec.NICs, func(n model.NICSpec) bool { return n.ID == p.disk.ID }) {
		return nil, api.Errorf(api.Conflict, "VM %q has a device %q already", spec.Name, p.disk.ID)
	}
	p.disk.Slot = freeSlot(spec.Disks)
	what := "disk " + p.disk.ID
	switch {
	case req.From != "":
		if p.kept, p.disk.Size, err = a.keptDisk(spec.Name, req.From); err != nil {
			return nil, err
		}
	case req.Image != nil:
		var path string
		if path, p.release, err = a.uploads.take("image of "+what, req.Image); err != nil {
			p.release = func() {}
			return nil, err
		}
		img, err := a.probeImage(ctx, "image of "+what, path, req.Format)
		if err != nil {
			return nil, err
		}
		if err := a.foreign(path); err != nil {
			return nil, err
		}
		if p.disk.Size == 0 {
			p.disk.Size = max(img.size, api.MinDisk)
		}
		if p.disk.Size < img.size {
			return nil, api.Errorf(api.Invalid, "%s: size %s is below that of its image, %s", what, api.FormatSize(p.disk.Size), api.FormatSize(img.size))
		}
		p.image = &img
	}
	var unhold func()
	if p.places, p.device, unhold, err = a.planPlaces(ctx, spec, p.disk, req.Paths, req.Overwrite, nil); err != nil {
		return nil, err
	}
	upload := p.release
	p.release = func() { upload(); unhold() }
	if at := p.at(a.cfg.Name); at != "" {
		if err := notOnto(what, p.image, at); err != nil {
			return nil, err
		}
		if p.kept != "" {
			return nil, api.Errorf(api.Invalid, "%s: the detached disk %q is taken up where it lies on host %s; no path there (%s) goes with it", what, req.From, a.cfg.Name, at).
				WithAction("attach it without that path, then have its replica made elsewhere: perdure disk replace %s %s --host %s --path %s", spec.Name, p.disk.ID, a.cfg.Name, at)
		}
		return p, nil
	}
	free, err := diskFree(a.cfg.Path("vms"))
	if err != nil {
		return nil, err
	}
	if p.kept == "" && p.disk.Size > free {
		return nil, api.Errorf(api.Invalid, "%s needs %s; host %s has %s free in %s", what, api.FormatSize(p.disk.Size), a.cfg.Name, api.FormatSize(free), a.cfg.StateDir)
	}
	return p, nil
}

// foreign refuses a file that is the replica of a disk of some VM: it may be in use.
func (a *Agent) foreign(path string) error {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return api.Errorf(api.Invalid, "look at image %s: %w", path, err)
	}
	st, err := os.Stat(real)
	if err != nil {
		return api.Errorf(api.Invalid, "look at image %s: %w", path, err)
	}
	for _, c := range a.claims() {
		if o, err := os.Stat(c.path); err == nil && os.SameFile(st, o) {
			return api.Errorf(api.Refused, "%s is disk %s of VM %q and may be in use", path, c.disk, c.vm).
				WithAction("detach it there, or copy the file while that VM is stopped")
		}
	}
	return nil
}

// freeSlot returns the lowest slot that no disk has.
func freeSlot(disks []model.DiskSpec) int {
	for s := model.FirstDiskSlot; ; s++ {
		if !slices.ContainsFunc(model.PinSlots(disks), func(d model.DiskSpec) bool { return d.Slot == s }) {
			return s
		}
	}
}

// keptDisk finds the data of a detached disk.
func (a *Agent) keptDisk(vm, name string) (path string, size int64, err error) {
	dir := filepath.Join(a.vmFile(vm, shimapi.DiskDir), keptDir)
	path = filepath.Join(dir, name+".raw")
	st, err := os.Stat(path)
	if errors.Is(err, os.ErrNotExist) {
		have := []string{}
		entries, _ := os.ReadDir(dir)
		for _, e := range entries {
			have = append(have, strings.TrimSuffix(e.Name(), ".raw"))
		}
		return "", 0, api.Errorf(api.NotFound, "VM %q has no detached disk %q on host %s (there are: %s)", vm, name, a.cfg.Name, joinOr(have, "none"))
	}
	if err != nil {
		return "", 0, fmt.Errorf("look for detached disk %s: %w", name, err)
	}
	return path, st.Size(), nil
}

// attach makes the replica here, then has the VM have it.
func (a *Agent) attach(ctx context.Context, op *operation, p *attachPlan) (err error) {
	dir := a.vmFile(p.vm, shimapi.DiskDir)
	made := false
	defer func() {
		if err != nil && made {
			err = errors.Join(err, a.removeReplica(p.vm, p.disk.ID))
		}
	}()
	if err := a.clearReplica(p.vm, p.disk.ID); err != nil {
		return err
	}
	made = true
	raw := filepath.Join(dir, p.disk.ID+".raw")
	at := p.at(a.cfg.Name)
	switch {
	case p.kept != "":
		// A second name: whatever happens, the first one is still there.
		if err := os.Link(p.kept, raw); err != nil {
			return fmt.Errorf("take up %s: %w", p.kept, err)
		}
	case p.image != nil:
		op.say("importing " + filepath.Base(p.image.path) + " as " + p.disk.ID)
		if err := a.importTo(ctx, *p.image, p.disk.Size, raw, at, p.device, op.track("import", p.image.size)); err != nil {
			return err
		}
	}
	cur, err := a.store.Record(ctx, p.vm)
	if err != nil {
		return storeError(p.vm, err)
	}
	params := blockstore.Params{ID: p.disk.ID, VM: p.uuid, Size: p.disk.Size, Term: cur.Record.Term, Branch: cur.Record.Branch,
		State: model.UpToDate, Adopt: p.kept != "" || p.image != nil}
	if at != "" {
		if p.device && !params.Adopt {
			op.say("clearing " + at)
		}
		params.Image, params.Device, params.Host = at, p.device, a.cfg.Name
	}
	if err = blockstore.Create(vfs.OS{}, dir, params); err != nil {
		return fmt.Errorf("make disk %s: %w", p.disk.ID, err)
	}
	tried := false
	add := func(l []model.DiskSpec) ([]model.DiskSpec, error) {
		switch {
		case tried && slices.Contains(l, p.disk):
			return l, nil // an earlier try, whose answer was lost
		case slices.ContainsFunc(l, func(d model.DiskSpec) bool { return d.ID == p.disk.ID || d.Slot == p.disk.Slot }):
			return nil, api.Errorf(api.Conflict, "VM %q was given another disk meanwhile", p.vm)
		case len(l) >= model.DiskSlots:
			return nil, api.Errorf(api.Refused, "VM %q has %d disks; more are not possible", p.vm, len(l))
		}
		tried = true
		return append(l, p.disk), nil
	}
	known, err := a.changeDisks(ctx, op, p.vm, diskChange{list: add, plug: true, outdates: true, places: p.places})
	if err != nil {
		made = known // what the store may name stays
		return err
	}
	if p.kept != "" {
		if err := os.Remove(p.kept); err != nil {
			a.log.Warn("remove the second name of a disk that was taken up again", "file", p.kept, "error", err)
		}
	}
	a.event(p.vm, "disk-attached", 0, "disk %s (%s) was attached at slot %#x", p.disk.ID, api.FormatSize(p.disk.Size), p.disk.Slot)
	op.say("disk " + p.disk.ID)
	return nil
}

// clearReplica makes room for a replica of a disk that no specification names:
// what is whole there is put aside, what is half made is removed.
func (a *Agent) clearReplica(vm, id string) error {
	dir := a.vmFile(vm, shimapi.DiskDir)
	ok, err := blockstore.Exists(vfs.OS{}, dir, id)
	if err != nil {
		return fmt.Errorf("look for disk %s: %w", id, err)
	}
	if ok {
		_, _, err = a.putAside(vm, id)
		return err
	}
	return a.removeReplica(vm, id)
}

// putAside keeps the data of a replica that nobody uses any more under another
// name, and removes the rest of it. Data elsewhere stay where they are (path).
func (a *Agent) putAside(vm, id string) (name, path string, err error) {
	dir := a.vmFile(vm, shimapi.DiskDir)
	m, err := replayDisk(dir, id)
	switch {
	case errors.Is(err, blockstore.ErrImage): // nothing of it is there any more
		return "", "", blockstore.Abandon(vfs.OS{}, dir, id)
	case err != nil:
		return "", "", err
	case m.Image != "":
		left, err := blockstore.Release(vfs.OS{}, dir, id, true)
		return "", m.Image, errors.Join(left, err)
	}
	kept := filepath.Join(dir, keptDir)
	if err := os.MkdirAll(kept, 0o700); err != nil {
		return "", "", fmt.Errorf("keep disk %s: %w", id, err)
	}
	raw := filepath.Join(dir, id+".raw")
	for n := 1; ; n++ {
		name = fmt.Sprintf("%.10s-%d", id, n) // a name that may be given
		err := os.Link(raw, filepath.Join(kept, name+".raw"))
		if errors.Is(err, os.ErrExist) {
			continue
		}
		if err != nil {
			return "", "", fmt.Errorf("keep disk %s: %w", id, err)
		}
		break
	}
	if err := syncDir(kept); err != nil {
		return "", "", err
	}
	return name, "", blockstore.Remove(vfs.OS{}, dir, id)
}

// diskChange is one change of the list of disks.
type diskChange struct {
	// list makes the new list of the old one, all slots given.
	list func([]model.DiskSpec) ([]model.DiskSpec, error)
	plug bool // the specification first, then the guest; else the guest first
	// outdates: the replicas of other hosts lack something afterwards.
	outdates bool
	// places are added to those of the specification.
	places []model.DiskPlace
	// after, if set, is called when the specification has changed by a change that is
	// not plug, before the VM is protected again.
	after func(ctx context.Context)
}

// changeDisks carries a change out, of a VM that runs here or is stopped. known is
// false where it could not be found out whether the store has taken it.
func (a *Agent) changeDisks(ctx context.Context, op *operation, vm string, c diskChange) (known bool, err error) {
	v, err := a.find(ctx, vm)
	if err != nil {
		return true, err
	}
	if v.Record.Record.Mode == model.ModeStopped {
		known, err := a.changeSpec(ctx, vm, func(spec model.VMSpec, rec model.Record) (model.VMSpec, model.Record, error) {
			if rec.Mode != model.ModeStopped {
				return spec, rec, api.Errorf(api.Conflict, "VM %q was started meanwhile", vm)
			}
			if spec.Disks, err = c.list(model.PinSlots(spec.Disks)); err != nil {
				return spec, rec, err
			}
			if spec.Places = spec.WithPlaces(c.places...); !c.outdates {
				return spec, rec, nil
			}
			for h, r := range rec.Replicas {
				if h == a.cfg.Name || r.State != model.UpToDate {
					continue
				}
				if rec, err = authority.Outdate(rec, h); err != nil {
					return spec, rec, err
				}
			}
			return spec, rec, nil
		})
		if err == nil && c.after != nil {
			c.after(ctx)
		}
		return known, err
	}
	w := a.workerOf(vm)
	if w == nil {
		return true, api.Errorf(api.Unavailable, "VM %q does not run on host %s any more", vm, a.cfg.Name)
	}
	if !w.holdDisks(true) {
		return true, api.Errorf(api.Conflict, "the disks of VM %q are being changed already", vm)
	}
	defer func() {
		w.holdDisks(false)
		w.wake()
	}()
	// Once begun it goes to its end, or back.
	ctx = context.WithoutCancel(ctx)
	if err := a.leavePair(ctx, op, vm); err != nil {
		return true, err
	}
	old, err := a.store.Spec(ctx, vm)
	if err != nil {
		return true, storeError(vm, err)
	}
	list, err := c.list(model.PinSlots(old.Disks))
	if err != nil {
		return true, err
	}
	store := func(from, to []model.DiskSpec) (bool, error) {
		return a.changeSpec(ctx, vm, func(spec model.VMSpec, rec model.Record) (model.VMSpec, model.Record, error) {
			switch {
			case rec.Mode != model.ModeSimplex || rec.Primary.Host != a.cfg.Name:
				return spec, rec, api.Errorf(api.Conflict, "VM %q is not alone on host %s any more (mode %s on %s)", vm, a.cfg.Name, rec.Mode, rec.Primary.Host)
			case slices.Equal(model.PinSlots(spec.Disks), to):
				return spec, rec, nil // an earlier try, whose answer was lost
			case !slices.Equal(model.PinSlots(spec.Disks), from):
				return spec, rec, api.Errorf(api.Conflict, "the disks of VM %q were changed meanwhile", vm)
			}
			spec.Disks = to
			spec.Places = spec.WithPlaces(c.places...)
			return spec, rec, nil
		})
	}
	from := model.PinSlots(old.Disks)
	if !c.plug {
		op.say("waiting for the guest to let go of the disk")
		if _, err := a.tellDisksToEnd(ctx, vm, list); err != nil {
			return true, err
		}
		known, err := store(from, list)
		if err == nil && c.after != nil {
			c.after(ctx)
		}
		return known, err
	}
	if known, err := store(from, list); err != nil {
		return known, err
	}
	op.say("the guest gets it")
	if ended, err := a.tellDisksToEnd(ctx, vm, list); err != nil {
		if back := a.guestHas(ctx, vm, list); back {
			return true, nil // only the answer was lost
		}
		if !ended {
			return false, err // the specification stays: the guest has it so, or will
		}
		known, rerr := store(list, from)
		return known && rerr == nil, errors.Join(err, rerr)
	}
	return true, nil
}

// changeSpec is clusterstore.ChangeSpec whose outcome is settled by asking again.
// f must see that its change was made already.
func (a *Agent) changeSpec(ctx context.Context, vm string, f func(model.VMSpec, model.Record) (model.VMSpec, model.Record, error)) (known bool, err error) {
	for range 10 {
		err = a.store.ChangeSpec(ctx, vm, f)
		if !errors.Is(err, clusterstore.ErrUnavailable) {
			a.statuses.drop(vm)
			if err != nil {
				return true, refusal(vm, storeError(vm, err))
			}
			a.awaitSpec(ctx, vm)
			return true, nil
		}
		if !sleep(ctx, 500*time.Millisecond) {
			break
		}
	}
	return false, api.Errorf(api.Timeout, "the cluster store did not say whether the disks of VM %q were changed; look at them again (perdure disk list %s): %w", vm, vm, err)
}

// awaitSpec waits a moment until the copy here has what the store has: who asks
// after a change is shown it.
func (a *Agent) awaitSpec(ctx context.Context, vm string) {
	spec, err := a.store.Spec(ctx, vm)
	if err != nil {
		return
	}
	late := time.After(time.Second)
	for {
		changed := a.store.Changed()
		if v, ok := a.store.VM(vm); ok && slices.Equal(v.Spec.Disks, spec.Disks) {
			return
		}
		select {
		case <-changed:
		case <-late:
			return
		}
	}
}

// leavePair has the VM go on without its second copy, and waits for that.
func (a *Agent) leavePair(ctx context.Context, op *operation, vm string) error {
	ctx, cancel := context.WithTimeout(ctx, alonePatience)
	defer cancel()
	for {
		cur, err := a.store.Record(ctx, vm)
		if err != nil {
			return storeError(vm, err)
		}
		rec := cur.Record
		switch {
		case rec.Mode == model.ModeStopped || rec.Primary.Host != a.cfg.Name:
			return api.Errorf(api.Conflict, "VM %q does not run on host %s any more (mode %s on %s)", vm, a.cfg.Name, rec.Mode, rec.Primary.Host)
		case rec.Mode == model.ModeSimplex:
			return nil
		case rec.Mode == model.ModeSyncing || rec.Mode == model.ModeDuplex:
			op.say("going on without the second copy for the moment")
			if err := a.shimOpHere(ctx, vm, shimapi.Op{Op: "unprotect"}); err != nil {
				a.log.Info("leave the pair", "vm", vm, "error", err)
			}
		}
		if !sleep(ctx, 100*time.Millisecond) {
			return api.Errorf(api.Timeout, "VM %q did not leave its second copy within %v; nothing was changed", vm, alonePatience)
		}
	}
}

// tellDisks has the running guest here have these disks.
func (a *Agent) tellDisks(ctx context.Context, vm string, list []model.DiskSpec) error {
	value, err := json.Marshal(shimapi.SetDisks{Disks: list})
	if err != nil {
		return fmt.Errorf("tell the shim of VM %q its disks: %w", vm, err)
	}
	ctx, cancel := context.WithTimeout(ctx, opTimeout)
	defer cancel()
	return a.shimOpHere(ctx, vm, shimapi.Op{Op: "disks", Value: string(value)})
}

// tellDisksToEnd is tellDisks for who has to know what became of it: a shim that takes longer than
// an answer is waited for goes on, and is asked again. ended is false where it was still at it.
func (a *Agent) tellDisksToEnd(ctx context.Context, vm string, list []model.DiskSpec) (ended bool, err error) {
	for late := time.Now().Add(tellPatience); ; {
		err = a.tellDisks(ctx, vm, list)
		busy := err != nil && (api.ClassOf(err) == api.Timeout || strings.Contains(err.Error(), shimapi.DisksChanging))
		if !busy || time.Now().After(late) || !sleep(ctx, tellAgainIn) {
			return !busy, err
		}
	}
}

// liveDisks asks the shim here which disks its guest has; false: it does not say.
func (a *Agent) liveDisks(ctx context.Context, vm string) ([]model.DiskSpec, bool) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	c := a.shim(vm)
	defer c.Close()
	st, err := c.Status(ctx)
	if err != nil || st.Role != shimapi.RolePrimary || st.Disks == nil {
		return nil, false
	}
	var out []model.DiskSpec
	for _, d := range st.Disks {
		out = append(out, d.DiskSpec)
	}
	return out, true
}

func (a *Agent) guestHas(ctx context.Context, vm string, list []model.DiskSpec) bool {
	have, ok := a.liveDisks(ctx, vm)
	return ok && slices.Equal(have, list)
}

// DetachDisk implements httpapi.Service.
func (a *Agent) DetachDisk(ctx context.Context, vm, disk string, req api.DetachDisk) (api.Operation, error) {
	return a.onDiskHost(ctx, "detach", vm, func(ctx context.Context, c *api.Client, _ *operation) (api.Operation, error) {
		return c.DetachDisk(ctx, vm, disk, req)
	}, func(v clusterstore.VMView) (func(context.Context, *operation) error, error) {
		if diskIndex(v.Spec, disk) < 0 {
			return nil, noDisk(v.Spec, disk)
		}
		if err := hotplugs(v, "its disks are taken away"); err != nil {
			return nil, err
		}
		return func(ctx context.Context, op *operation) error { return a.detach(ctx, op, vm, disk, req.Delete) }, nil
	})
}

func (a *Agent) detach(ctx context.Context, op *operation, vm, disk string, del bool) error {
	gone := false
	_, err := a.changeDisks(ctx, op, vm, diskChange{list: func(l []model.DiskSpec) ([]model.DiskSpec, error) {
		n := slices.IndexFunc(l, func(d model.DiskSpec) bool { return d.ID == disk })
		if n < 0 {
			if gone {
				return l, nil // an earlier try, whose answer was lost
			}
			return nil, api.Errorf(api.NotFound, "VM %q has no disk %q", vm, disk)
		}
		gone = true
		return slices.Delete(l, n, n+1), nil
	}, after: func(ctx context.Context) { a.dropElsewhere(ctx, vm, disk) }})
	if err != nil {
		return err
	}
	a.event(vm, "disk-detached", 0, "disk %s was detached", disk)
	if del {
		op.say("its data were removed")
		return a.removeReplica(vm, disk)
	}
	name, path, err := a.putAside(vm, disk)
	if err != nil {
		return api.Errorf(api.Internal, "disk %s of VM %q is detached, but its data could not be put aside and stay where they are: %w", disk, vm, err)
	}
	if path != "" {
		op.say(fmt.Sprintf("its data stay in %s on host %s, as a raw image", path, a.cfg.Name))
	}
	if name != "" {
		op.say(fmt.Sprintf("its data are kept on host %s as %s (perdure disk attach %s --from %s)", a.cfg.Name, name, vm, name))
	}
	return nil
}

// dropElsewhere has the other hosts remove their replicas of a disk that was detached
// here. One that does not answer puts its own aside when it is filled the next time.
func (a *Agent) dropElsewhere(ctx context.Context, vm, disk string) {
	v, err := a.find(ctx, vm)
	if err != nil {
		return
	}
	for _, h := range sortedKeys(v.Record.Record.Replicas) {
		if h == a.cfg.Name {
			continue
		}
		dctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		err := a.ask(dctx, h, http.MethodPost, "renew-replica", vm, renewReplica{Disk: disk, UUID: v.Spec.UUID, Drop: true}, nil)
		cancel()
		if err != nil {
			a.log.Warn("a replica of a detached disk is left behind", "vm", vm, "disk", disk, "host", h, "error", err)
		}
	}
}
