package httpapi

import (
	"context"
	"net/http"

	"github.com/danielgtaylor/huma/v2"

	"perdure/api"
)

// RepairService is the part about replicas that do not agree.
type RepairService interface {
	// VerifyVM starts a verify, ends one or changes the schedule; the server has called
	// req.Validate. api.Refused where the shim refuses: one is under way, the disk
	// does not exist.
	VerifyVM(ctx context.Context, name string, req api.VerifyVM) error
	// VerifyStatus returns the last report, also of a stopped VM.
	VerifyStatus(ctx context.Context, name string) (api.VerifyStatus, error)
	// SplitBrain says what each host holds; it changes nothing.
	SplitBrain(ctx context.Context, name string) (api.SplitBrain, error)
	// ResolveSplitBrain gives one host's replicas up. The server has checked the confirmation.
	ResolveSplitBrain(ctx context.Context, name string, req api.ResolveSplitBrain) error
}

func (s *Server) registerRepair(h huma.API) {
	action(s, h, "verify", "Compare the replicas of the disks, or change when that is done", func(ctx context.Context, name string, req api.VerifyVM) error {
		if err := req.Validate(); err != nil {
			return err
		}
		return s.svc.VerifyVM(ctx, name, req)
	})
	register(s, h, op(http.MethodGet, "/vms/{name}/verify", "verifyStatus", "vms", "The last report of verify, and the schedule"),
		func(ctx context.Context, in *Named) (*body[api.VerifyStatus], error) {
			if err := in.check(); err != nil {
				return nil, err
			}
			v, err := s.svc.VerifyStatus(ctx, in.Name)
			if v.Report != nil {
				v.Report.Disks = notNil(v.Report.Disks)
				for i := range v.Report.Disks {
					v.Report.Disks[i].Ranges = notNil(v.Report.Disks[i].Ranges)
				}
			}
			return &body[api.VerifyStatus]{v}, err
		})
	register(s, h, op(http.MethodGet, "/vms/{name}/split-brain", "splitBrain", "vms", "What each host holds, and what would be lost by giving it up"),
		func(ctx context.Context, in *Named) (*body[api.SplitBrain], error) {
			if err := in.check(); err != nil {
				return nil, err
			}
			v, err := s.svc.SplitBrain(ctx, in.Name)
			v.Sides = notNil(v.Sides)
			for i := range v.Sides {
				d := &v.Sides[i]
				d.Disks, d.Events, d.Loses = notNil(d.Disks), notNil(d.Events), notNil(d.Loses)
			}
			return &body[api.SplitBrain]{v}, err
		})
	resolve := op(http.MethodPost, "/vms/{name}/split-brain/resolve", "resolveSplitBrain", "vms", "Give the replicas of one host up")
	resolve.DefaultStatus = http.StatusNoContent
	register(s, h, resolve, func(ctx context.Context, in *struct {
		Named
		Body api.ResolveSplitBrain
	}) (*none, error) {
		if err := in.check(); err != nil {
			return nil, err
		}
		if err := api.CheckName("host", in.Body.Discard); err != nil {
			return nil, err
		}
		if in.Body.Confirm != in.Name {
			return nil, api.Errorf(api.Refused, "confirmation %q is not the VM's name %q", in.Body.Confirm, in.Name).
				WithAction("repeat the VM's name exactly in confirm")
		}
		return nil, s.svc.ResolveSplitBrain(ctx, in.Name, in.Body)
	})
}
