package apitest

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"perdure/api"
	"perdure/internal/model"
)

// Disks implements httpapi.Service.
func (f *Fake) Disks(_ context.Context, name string) ([]api.VMDisk, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.called("Disks", name); err != nil {
		return nil, err
	}
	var vms []*api.VM
	if name != "" {
		vm, err := f.vm(name)
		if err != nil {
			return nil, err
		}
		vms = []*api.VM{vm}
	} else {
		for _, vm := range f.VMList {
			vms = append(vms, vm)
		}
		slices.SortFunc(vms, func(a, b *api.VM) int { return strings.Compare(a.Name, b.Name) })
	}
	var out []api.VMDisk
	for _, vm := range vms {
		for i, d := range vm.Disks {
			out = append(out, fakeDisk(vm, i, d))
		}
	}
	return out, nil
}

// placed has a replica lie at a path.
func placed(d api.Disk, host, path string) api.Disk {
	d.Places = maps.Clone(d.Places)
	if d.Places == nil {
		d.Places = map[string]string{}
	}
	d.Places[host] = path
	if path == model.StatePlace {
		delete(d.Places, host)
	}
	return d
}

func fakeDisk(vm *api.VM, i int, d api.Disk) api.VMDisk {
	v := api.VMDisk{VM: vm.Name, ID: d.ID, Size: d.Size, Slot: 16 + i, Level: vm.Level, Mode: vm.Mode, Primary: vm.Primary, Places: d.Places, Behind: -1, Sync: vm.Sync, Problems: vm.Problems}
	if vm.Mode == model.ModeDuplex {
		v.Behind = 0
	}
	for _, host := range []string{"hosta", "hostb"} {
		st, has := d.Replicas[host]
		if !has {
			continue
		}
		r := api.DiskReplica{Host: host, Role: "spare", State: st, Answers: true, Exists: true, Path: "/var/lib/perdure/vms/" + vm.Name + "/disks/" + d.ID + ".raw",
			Size: d.Size, Allocated: d.Size / 4, OwnState: st, Term: vm.Term, Line: "7//0123456789abcdef", Checksums: "complete", ActiveLog: 8 << 20}
		if p := d.Places[host]; p != "" {
			r.Path, r.Place, r.Device = p, p, strings.HasPrefix(p, "/dev/")
		}
		switch host {
		case vm.Primary:
			r.Role = "primary"
		case vm.Secondary:
			r.Role = "secondary"
		}
		v.Replicas = append(v.Replicas, r)
	}
	return v
}

func (f *Fake) diskOp(method, kind, name, disk string, req any, end func(vm *api.VM, at int) error) (api.Operation, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.called(method, strings.TrimSpace(name+" "+disk), fmt.Sprintf("%+v", req)); err != nil {
		return api.Operation{}, err
	}
	vm, err := f.vm(name)
	if err != nil {
		return api.Operation{}, err
	}
	at := slices.IndexFunc(vm.Disks, func(d api.Disk) bool { return d.ID == disk })
	switch {
	case method == "AttachDisk" && at >= 0:
		return api.Operation{}, api.Errorf(api.Conflict, "VM %q has a disk %q already", name, disk)
	case method != "AttachDisk" && at < 0:
		return api.Operation{}, api.Errorf(api.NotFound, "VM %q has no disk %q", name, disk)
	}
	id := fmt.Sprintf("op%d", len(f.ops)+1)
	o := &fakeOp{op: api.Operation{ID: id, Kind: kind, VM: name, Host: "hosta", State: api.OperationRunning, Text: kind + " " + disk, Started: Epoch()},
		end: func() error { return end(vm, at) }}
	f.ops[id] = o
	return o.op, nil
}

// AttachDisk implements httpapi.Service.
func (f *Fake) AttachDisk(_ context.Context, name string, req api.AttachDisk) (api.Operation, error) {
	id := req.ID
	f.mu.Lock()
	if vm := f.VMList[name]; vm != nil && id == "" {
		id = fmt.Sprintf("disk%d", len(vm.Disks))
	}
	f.mu.Unlock()
	called := req
	if called.Image != nil {
		called.Image = nil // its path is another in each run
	}
	return f.diskOp("AttachDisk", "attach", name, id, called, func(vm *api.VM, _ int) error {
		size := req.Size
		if size == 0 {
			size = 1 << 30
		}
		d := api.Disk{ID: id, Size: size, Replicas: map[string]model.ReplicaState{"hosta": model.UpToDate}}
		for h, p := range req.Paths {
			d = placed(d, cmp.Or(h, "hosta"), p)
		}
		vm.Disks = append(vm.Disks, d)
		return nil
	})
}

// DetachDisk implements httpapi.Service.
func (f *Fake) DetachDisk(_ context.Context, name, disk string, req api.DetachDisk) (api.Operation, error) {
	return f.diskOp("DetachDisk", "detach", name, disk, req, func(vm *api.VM, at int) error {
		vm.Disks = slices.Delete(vm.Disks, at, at+1)
		return nil
	})
}

// ResizeDisk implements httpapi.Service.
func (f *Fake) ResizeDisk(_ context.Context, name, disk string, req api.ResizeDisk) (api.Operation, error) {
	f.mu.Lock()
	if vm := f.VMList[name]; vm != nil {
		for _, d := range vm.Disks {
			if d.ID == disk && d.Size > req.Size {
				f.mu.Unlock()
				return api.Operation{}, api.Errorf(api.Refused, "disk %s of VM %q has %s; it is not made smaller: the data beyond %s would be lost", disk, name, api.FormatSize(d.Size), api.FormatSize(req.Size))
			}
		}
	}
	f.mu.Unlock()
	return f.diskOp("ResizeDisk", "resize", name, disk, req, func(vm *api.VM, at int) error {
		vm.Disks[at].Size = req.Size
		return nil
	})
}

// ReplaceDisk implements httpapi.Service.
func (f *Fake) ReplaceDisk(_ context.Context, name, disk string, req api.ReplaceDisk) (api.Operation, error) {
	return f.diskOp("ReplaceDisk", "replace", name, disk, req, func(vm *api.VM, at int) error {
		if req.Path != "" {
			vm.Disks[at] = placed(vm.Disks[at], cmp.Or(req.Host, vm.Secondary), req.Path)
		}
		return nil
	})
}
