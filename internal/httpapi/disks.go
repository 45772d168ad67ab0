package httpapi

import (
	"context"
	"net/http"

	"github.com/danielgtaylor/huma/v2"

	"perdure/api"
)

// DiskService is the part about the disks of VMs. What changes something returns an
// operation; everything that can be checked is checked before (api.Invalid,
// api.Conflict, api.Refused), and what fails later leaves the disks as they were.
type DiskService interface {
	// Disks lists the disks of a VM, or of all VMs if vm is empty. Hosts that do
	// not answer do not make it fail.
	Disks(ctx context.Context, vm string) ([]api.VMDisk, error)
	// AttachDisk gives a VM another disk. The server has called req.Validate.
	AttachDisk(ctx context.Context, vm string, req api.AttachDisk) (api.Operation, error)
	// DetachDisk takes a disk away.
	DetachDisk(ctx context.Context, vm, disk string, req api.DetachDisk) (api.Operation, error)
	// ResizeDisk makes a disk larger. The server has called req.Validate.
	ResizeDisk(ctx context.Context, vm, disk string, req api.ResizeDisk) (api.Operation, error)
	// ReplaceDisk gives one host's replica up for a new one. The server has called req.Validate.
	ReplaceDisk(ctx context.Context, vm, disk string, req api.ReplaceDisk) (api.Operation, error)
}

// NamedDisk is the part of a request that names a disk of a VM; exported for huma.
type NamedDisk struct {
	Named
	Disk string `path:"disk" doc:"Name of the disk"`
}

func (n *NamedDisk) check() error {
	if err := n.Named.check(); err != nil {
		return err
	}
	return api.CheckDiskID(n.Disk)
}

func (s *Server) registerDisks(h huma.API) {
	const tag = "disks"
	list := func(ctx context.Context, vm string) (*body[api.DiskList], error) {
		l, err := s.svc.Disks(ctx, vm)
		for i := range l {
			filled(&l[i])
		}
		return &body[api.DiskList]{api.DiskList{Disks: notNil(l)}}, err
	}
	register(s, h, op(http.MethodGet, "/disks", "listDisks", tag, "The disks of all VMs"),
		func(ctx context.Context, _ *none) (*body[api.DiskList], error) { return list(ctx, "") })
	register(s, h, op(http.MethodGet, "/vms/{name}/disks", "listVMDisks", tag, "The disks of one VM"),
		func(ctx context.Context, in *Named) (*body[api.DiskList], error) {
			if err := in.check(); err != nil {
				return nil, err
			}
			return list(ctx, in.Name)
		})
	register(s, h, op(http.MethodGet, "/vms/{name}/disks/{disk}", "getDisk", tag, "One disk with everything known of its replicas"),
		func(ctx context.Context, in *NamedDisk) (*body[api.VMDisk], error) {
			if err := in.check(); err != nil {
				return nil, err
			}
			l, err := list(ctx, in.Name)
			if err != nil {
				return nil, err
			}
			for _, d := range l.Body.Disks {
				if d.ID == in.Disk {
					return &body[api.VMDisk]{d}, nil
				}
			}
			return nil, api.Errorf(api.NotFound, "VM %q has no disk %q", in.Name, in.Disk).WithAction("see perdure disk list %s", in.Name)
		})
	attach := op(http.MethodPost, "/vms/{name}/disks", "attachDisk", tag, "Give a VM another disk, also while it runs")
	attach.DefaultStatus = http.StatusAccepted
	register(s, h, attach, s.attachDisk)
	detach := op(http.MethodDelete, "/vms/{name}/disks/{disk}", "detachDisk", tag, "Take a disk away, also while the VM runs")
	detach.DefaultStatus = http.StatusAccepted
	register(s, h, detach, func(ctx context.Context, in *struct {
		NamedDisk
		Delete bool `query:"delete" doc:"Remove its data; else they are kept aside on the host"`
	}) (*body[api.Operation], error) {
		if err := in.check(); err != nil {
			return nil, err
		}
		return accepted(s.svc.DetachDisk(ctx, in.Name, in.Disk, api.DetachDisk{Delete: in.Delete}))
	})
	resize := op(http.MethodPost, "/vms/{name}/disks/{disk}/resize", "resizeDisk", tag, "Make a disk larger")
	resize.DefaultStatus = http.StatusAccepted
	register(s, h, resize, func(ctx context.Context, in *struct {
		NamedDisk
		Body api.ResizeDisk
	}) (*body[api.Operation], error) {
		if err := in.check(); err != nil {
			return nil, err
		}
		if err := in.Body.Validate(); err != nil {
			return nil, err
		}
		return accepted(s.svc.ResizeDisk(ctx, in.Name, in.Disk, in.Body))
	})
	replace := op(http.MethodPost, "/vms/{name}/disks/{disk}/replace", "replaceDisk", tag, "Give one host's replica up for a new one")
	replace.DefaultStatus = http.StatusAccepted
	register(s, h, replace, func(ctx context.Context, in *struct {
		NamedDisk
		Body *api.ReplaceDisk
	}) (*body[api.Operation], error) {
		if err := in.check(); err != nil {
			return nil, err
		}
		var req api.ReplaceDisk
		if in.Body != nil {
			req = *in.Body
		}
		if err := req.Validate(); err != nil {
			return nil, err
		}
		return accepted(s.svc.ReplaceDisk(ctx, in.Name, in.Disk, req))
	})
}

func (s *Server) attachDisk(ctx context.Context, in *struct {
	Named
	Body api.AttachDisk
}) (*body[api.Operation], error) {
	if err := in.check(); err != nil {
		return nil, err
	}
	req := in.Body
	if err := req.Validate(); err != nil {
		return nil, err
	}
	if !isLocal(ctx) && !api.Forwarded(ctx) && req.Image != nil && req.Image.Path != "" {
		return nil, api.Errorf(api.Invalid, "the image is given by path, which only works over the Unix socket of the host").
			WithAction("upload the file first: POST %s/uploads", api.Prefix)
	}
	return accepted(s.svc.AttachDisk(ctx, in.Name, req))
}

func accepted(o api.Operation, err error) (*body[api.Operation], error) {
	o.Progress = notNil(o.Progress)
	return &body[api.Operation]{o}, err
}

// filled keeps empty lists from being written as null.
func filled(d *api.VMDisk) {
	d.Replicas, d.Sync, d.Problems = notNil(d.Replicas), notNil(d.Sync), notNil(d.Problems)
}
