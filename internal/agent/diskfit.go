package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"perdure/api"
	"perdure/internal/blockstore"
	"perdure/internal/clusterstore"
	"perdure/internal/model"
	"perdure/internal/shimapi"
	"perdure/internal/vfs"
)

// Disks that become larger, and what makes replicas and guests follow the specification.

// ResizeDisk implements httpapi.Service.
func (a *Agent) ResizeDisk(ctx context.Context, vm, disk string, req api.ResizeDisk) (api.Operation, error) {
	return a.onDiskHost(ctx, "resize", vm, func(ctx context.Context, c *api.Client, _ *operation) (api.Operation, error) {
		return c.ResizeDisk(ctx, vm, disk, req)
	}, func(v clusterstore.VMView) (func(context.Context, *operation) error, error) {
		n := diskIndex(v.Spec, disk)
		if n < 0 {
			return nil, noDisk(v.Spec, disk)
		}
		now := v.Spec.Disks[n].Size
		if req.Size < now {
			return nil, api.Errorf(api.Refused, "disk %s of VM %q has %s; it is not made smaller: the data beyond %s would be lost", disk, vm, api.FormatSize(now), api.FormatSize(req.Size))
		}
		if req.Size == now {
			return func(context.Context, *operation) error { return nil }, nil
		}
		if err := a.roomToGrow(ctx, v, disk, now, req.Size); err != nil {
			return nil, err
		}
		return func(ctx context.Context, op *operation) error { return a.resize(ctx, op, vm, disk, req.Size) }, nil
	})
}

func (a *Agent) resize(ctx context.Context, op *operation, vm, disk string, size int64) error {
	_, err := a.changeDisks(ctx, op, vm, diskChange{plug: true, list: func(l []model.DiskSpec) ([]model.DiskSpec, error) {
		n := slices.IndexFunc(l, func(d model.DiskSpec) bool { return d.ID == disk })
		if n < 0 {
			return nil, api.Errorf(api.NotFound, "VM %q has no disk %q", vm, disk)
		}
		if l[n].Size > size {
			return nil, api.Errorf(api.Conflict, "disk %s of VM %q was made larger than that meanwhile", disk, vm)
		}
		l[n].Size = size
		return l, nil
	}})
	if err != nil {
		return err
	}
	a.event(vm, "disk-resized", 0, "disk %s has %s now", disk, api.FormatSize(size))
	spec, err := a.store.Spec(ctx, vm)
	if err != nil {
		return nil // the next start makes the replica fit
	}
	fit := func(context.Context) error {
		lock, ok, err := tryLock(a.vmFile(vm, shimapi.LockFile))
		if err != nil || !ok { // the guest has it, larger
			return err
		}
		defer lock.release()
		return a.fitReplicas(spec, false)
	}
	if w := a.workerOf(vm); w != nil {
		return w.between(ctx, fit)
	}
	return fit(ctx)
}

// fitReplicas makes the replicas here fit the specification, while nothing of the VM
// lives here: those of disks that became larger grow; with sweep, those of disks that are
// gone are put aside. Most are not found here any more, as the detaching has them removed; what
// is may be all that is left of a disk whose detaching broke off.
func (a *Agent) fitReplicas(spec model.VMSpec, sweep bool) error {
	dir := a.vmFile(spec.Name, shimapi.DiskDir)
	for _, d := range spec.Disks {
		ok, err := blockstore.Exists(vfs.OS{}, dir, d.ID)
		if err != nil {
			return fmt.Errorf("look for disk %s: %w", d.ID, err)
		}
		if !ok {
			continue
		}
		// Not Inspect, which asks an image elsewhere too: it may not answer.
		m, err := blockstore.ReadMeta(vfs.OS{}, dir, d.ID)
		if err != nil || m.Size >= d.Size {
			continue // who opens it says what is wrong
		}
		err = blockstore.Grow(vfs.OS{}, dir, d.ID, d.Size)
		if errors.Is(err, blockstore.ErrState) { // of an earlier release, and not opened since
			if _, err := replayDisk(dir, d.ID); err != nil {
				return err
			}
			err = blockstore.Grow(vfs.OS{}, dir, d.ID, d.Size)
		}
		if err != nil {
			return err
		}
	}
	if !sweep {
		return nil
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("look for replicas: %w", err)
	}
	for _, e := range entries {
		id, ok := strings.CutSuffix(e.Name(), ".meta")
		if ok && diskIndex(spec, id) < 0 {
			name, path, err := a.putAside(spec.Name, id)
			if err != nil {
				return err
			}
			a.log.Warn("the replica of a disk that was detached is put aside", "vm", spec.Name, "disk", id, "as", name+path)
		}
	}
	return nil
}

// holdDisks keeps the worker from protecting the VM and from settling its disks
// while an operation changes them; false: another one does.
func (w *worker) holdDisks(on bool) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if on && w.disksHeld {
		return false
	}
	w.disksHeld = on
	w.disksNew = w.disksNew || !on
	return true
}

// disksChanged reports whether an operation on the disks has ended since it was called last.
func (w *worker) disksChanged() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	changed := w.disksNew
	w.disksNew = false
	return changed
}

// settleDisks makes the disks of the guest here those of the specification, where an
// agent ended in the middle of a change or the guest threw one out. It reports whether
// the VM is not to be protected yet.
func (w *worker) settleDisks(ctx context.Context, v clusterstore.VMView) (busy bool) {
	w.mu.Lock()
	held := w.disksHeld
	w.mu.Unlock()
	if held {
		return true
	}
	if v.Record.Record.Mode != model.ModeSimplex {
		return false
	}
	have, ok := w.a.liveDisks(ctx, w.vm)
	if !ok || slices.Equal(have, model.PinSlots(v.Spec.Disks)) {
		if ok {
			w.problem("disks-differ", "", "", "")
		}
		return false
	}
	if time.Now().Before(w.disksNext) {
		return true
	}
	// The copy here may be older than the last change.
	spec, err := w.a.store.Spec(ctx, w.vm)
	if err != nil || slices.Equal(have, model.PinSlots(spec.Disks)) {
		return err != nil
	}
	if err := w.a.tellDisks(ctx, w.vm, model.PinSlots(spec.Disks)); err != nil {
		w.disksNext = time.Now().Add(10 * time.Second)
		w.problem("disks-differ", model.Warning, "the guest's disks are not yet what they should be: "+err.Error(),
			"none: it is tried again by itself, and at the next start the VM has them; it is not protected meanwhile")
		return true
	}
	w.a.event(w.vm, "disks-settled", 0, "the guest's disks are those of the VM's specification again")
	return true // the next look sees it
}
