package httpapi

import (
	"context"
	"net/http"
	"reflect"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"perdure/api"
)

var problemType = reflect.TypeFor[api.Problem]()

type (
	none        struct{}
	body[T any] struct{ Body T }
	// Named is the part of a request that names a VM; exported because huma
	// fills only exported embedded fields.
	Named struct {
		Name string `path:"name" doc:"Name of the VM"`
	}
	withBody[T any] struct{ Body T }
	vmOp[T any]     struct {
		Named
		Body *T
	}
	// ByID is the part of a request that names an operation.
	ByID struct {
		ID string `path:"id"`
	}
)

func (n *Named) check() error { return api.CheckName("VM", n.Name) }

func op(method, path, id, tag, summary string) huma.Operation {
	return huma.Operation{OperationID: id, Method: method, Path: path, Summary: summary, Tags: []string{tag}}
}

func (s *Server) registerCluster(h huma.API) {
	const tag = "cluster"
	register(s, h, op(http.MethodGet, "/cluster", "getCluster", tag, "The cluster as the answering host sees it"),
		func(ctx context.Context, _ *none) (*body[api.Cluster], error) {
			c, err := s.svc.Cluster(ctx)
			return &body[api.Cluster]{c}, err
		})
	register(s, h, op(http.MethodGet, "/hosts", "listHosts", tag, "All hosts and the witness"),
		func(ctx context.Context, _ *none) (*body[api.HostList], error) {
			l, err := s.svc.Hosts(ctx)
			return &body[api.HostList]{api.HostList{Hosts: notNil(l)}}, err
		})
	register(s, h, op(http.MethodGet, "/hosts/{name}", "getHost", tag, "One host"),
		func(ctx context.Context, in *struct {
			Name string `path:"name"`
		}) (*body[api.Host], error) {
			if err := api.CheckName("host", in.Name); err != nil {
				return nil, err
			}
			v, err := s.svc.Host(ctx, in.Name)
			return &body[api.Host]{v}, err
		})
	remove := op(http.MethodDelete, "/hosts/{name}", "removeHost", tag, "Take a host that does not come back out of the cluster")
	remove.DefaultStatus = http.StatusNoContent
	register(s, h, remove, func(ctx context.Context, in *struct {
		Name string `path:"name"`
	}) (*none, error) {
		if err := api.CheckName("host", in.Name); err != nil {
			return nil, err
		}
		return nil, s.svc.RemoveHost(ctx, in.Name)
	})
	register(s, h, op(http.MethodPost, "/tokens", "createToken", tag, "Make a join token"),
		func(ctx context.Context, in *withBody[api.CreateToken]) (*body[api.Token], error) {
			if err := in.Body.Validate(); err != nil {
				return nil, err
			}
			t, err := s.svc.CreateToken(ctx, in.Body)
			return &body[api.Token]{t}, err
		})
	register(s, h, op(http.MethodPost, "/join", "join", tag, "Join the cluster with a token; needs no client certificate"),
		func(ctx context.Context, in *withBody[api.JoinRequest]) (*body[api.JoinReply], error) {
			if err := api.CheckName("host", in.Body.Name); err != nil {
				return nil, err
			}
			r, err := s.svc.Join(ctx, in.Body)
			return &body[api.JoinReply]{r}, err
		})
}

func (s *Server) registerVMs(h huma.API) {
	const tag = "vms"
	register(s, h, op(http.MethodGet, "/vms", "listVMs", tag, "All VMs"),
		func(ctx context.Context, _ *none) (*body[api.VMList], error) {
			l, err := s.svc.VMs(ctx)
			return &body[api.VMList]{api.VMList{VMs: notNil(l)}}, err
		})
	register(s, h, op(http.MethodGet, "/vms/{name}", "getVM", tag, "One VM with everything known of it"),
		func(ctx context.Context, in *Named) (*body[api.VM], error) {
			if err := in.check(); err != nil {
				return nil, err
			}
			v, err := s.svc.VM(ctx, in.Name)
			return &body[api.VM]{v}, err
		})
	create := op(http.MethodPost, "/vms", "createVM", tag, "Create a VM; images are copied in the background")
	create.DefaultStatus = http.StatusAccepted
	register(s, h, create, s.createVM)
	del := op(http.MethodDelete, "/vms/{name}", "deleteVM", tag, "Remove a stopped VM and its disks")
	del.DefaultStatus = http.StatusNoContent
	register(s, h, del, func(ctx context.Context, in *struct {
		Named
		Force bool `query:"force" doc:"Also when replicas on silent hosts are left behind"`
	}) (*none, error) {
		if err := in.check(); err != nil {
			return nil, err
		}
		return nil, s.svc.DeleteVM(ctx, in.Name, api.DeleteVM{Force: in.Force})
	})
	register(s, h, op(http.MethodGet, "/vms/{name}/wait", "waitVM", tag, "Wait until a condition holds; answers when it does or the time is up"), s.waitVM)
	register(s, h, op(http.MethodGet, "/vms/{name}/takeover", "takeoverRisk", tag, "What a forced takeover could lose"),
		func(ctx context.Context, in *struct {
			Named
			Host string `query:"host" required:"true" doc:"Where the VM would go on"`
		}) (*body[api.TakeoverRisk], error) {
			if err := in.check(); err != nil {
				return nil, err
			}
			if err := api.CheckName("host", in.Host); err != nil {
				return nil, err
			}
			r, err := s.svc.TakeoverRisk(ctx, in.Name, in.Host)
			r.Losses = notNil(r.Losses)
			return &body[api.TakeoverRisk]{r}, err
		})
	s.registerActions(h)
}

// registerActions adds the changes of a VM: POST /vms/NAME/ACTION, answered
// with 204 once accepted.
func (s *Server) registerActions(h huma.API) {
	action(s, h, "start", "Start a stopped VM", s.svc.StartVM)
	action(s, h, "stop", "Press the guest's power button", plain(s.svc.StopVM))
	action(s, h, "kill", "End the instance at once", plain(s.svc.KillVM))
	action(s, h, "pause", "Let the guest stand still", plain(s.svc.PauseVM))
	action(s, h, "resume", "Let a paused guest go on", plain(s.svc.ResumeVM))
	action(s, h, "protect", "Fill a secondary now, or give it up", s.svc.ProtectVM)
	action(s, h, "level", "Change the level of protection, running or stopped", func(ctx context.Context, name string, req api.SetLevel) error {
		if err := req.Validate(); err != nil {
			return err
		}
		return s.svc.SetLevel(ctx, name, req)
	})
	action(s, h, "switchover", "Move the VM to its secondary, planned", s.svc.SwitchoverVM)
	action(s, h, "takeover", "Let a host take the VM over", func(ctx context.Context, name string, req api.TakeoverVM) error {
		if err := api.CheckName("host", req.Host); err != nil {
			return err
		}
		if req.Force && req.Confirm != name {
			return api.Errorf(api.Refused, "confirmation %q is not the VM's name %q", req.Confirm, name).
				WithAction("repeat the VM's name exactly in confirm")
		}
		return s.svc.TakeoverVM(ctx, name, req)
	})
}

func plain(f func(context.Context, string) error) func(context.Context, string, none) error {
	return func(ctx context.Context, name string, _ none) error { return f(ctx, name) }
}

// action registers one change; its body may be left out.
func action[T any](s *Server, h huma.API, verb, summary string, f func(context.Context, string, T) error) {
	o := op(http.MethodPost, "/vms/{name}/"+verb, verb+"VM", "vms", summary)
	o.DefaultStatus = http.StatusNoContent
	register(s, h, o, func(ctx context.Context, in *vmOp[T]) (*none, error) {
		if err := in.check(); err != nil {
			return nil, err
		}
		var req T
		if in.Body != nil {
			req = *in.Body
		}
		return nil, f(ctx, in.Name, req)
	})
}

func (s *Server) createVM(ctx context.Context, in *withBody[api.CreateVM]) (*body[api.Operation], error) {
	req := in.Body
	if err := req.Validate(); err != nil {
		return nil, err
	}
	if !isLocal(ctx) && !api.Forwarded(ctx) && req.UsesPaths() {
		return nil, api.Errorf(api.Invalid, "files are given by path, which only works over the Unix socket of the host").
			WithAction("upload the files first: POST %s/uploads", api.Prefix)
	}
	o, err := s.svc.CreateVM(ctx, req)
	o.Progress = notNil(o.Progress)
	return &body[api.Operation]{o}, err
}

type waitInput struct {
	Named
	For       string `query:"for" required:"true" doc:"Condition, such as state=running or mode=duplex,primary!=a"`
	TimeoutMS int64  `query:"timeout_ms" minimum:"0" doc:"At most 60000; default 30000"`
}

// waitVM looks every 100 ms, here and not across the network.
func (s *Server) waitVM(ctx context.Context, in *waitInput) (*body[api.WaitResult], error) {
	if err := in.check(); err != nil {
		return nil, err
	}
	cond, err := api.ParseCondition(in.For)
	if err != nil {
		return nil, err
	}
	limit := 30 * time.Second
	if in.TimeoutMS > 0 {
		limit = min(time.Duration(in.TimeoutMS)*time.Millisecond, maxWait)
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	var last api.WaitResult
	for {
		res := api.WaitResult{}
		vm, err := s.svc.VM(ctx, in.Name)
		switch {
		case err == nil:
			res.VM = &vm
		case ctx.Err() != nil:
			return &body[api.WaitResult]{last}, nil
		case api.ClassOf(err) == api.Unavailable:
			// Trouble that may pass: a wait through a takeover must live through it.
			res.VM = last.VM
		case api.ClassOf(err) != api.NotFound:
			return nil, err
		case !cond.AllowsAbsent():
			return nil, err // it will not come by waiting
		}
		if err == nil || api.ClassOf(err) == api.NotFound {
			res.Met = cond.Holds(res.VM)
		}
		if res.Met {
			return &body[api.WaitResult]{res}, nil
		}
		last = res
		select {
		case <-ctx.Done():
			return &body[api.WaitResult]{last}, nil
		case <-tick.C:
		}
	}
}

func (s *Server) registerTransfers(h huma.API) {
	const tag = "operations"
	register(s, h, op(http.MethodGet, "/operations", "listOperations", tag, "Long operations of this host, newest first"),
		func(ctx context.Context, _ *none) (*body[api.OperationList], error) {
			l, err := s.svc.Operations(ctx)
			return &body[api.OperationList]{api.OperationList{Operations: notNil(l)}}, err
		})
	register(s, h, op(http.MethodGet, "/operations/{id}", "getOperation", tag, "One operation; with wait_ms, answers at its end or when the time is up"),
		s.operation)
	cancel := op(http.MethodDelete, "/operations/{id}", "cancelOperation", tag, "End an operation and undo what it made")
	cancel.DefaultStatus = http.StatusNoContent
	register(s, h, cancel, func(ctx context.Context, in *ByID) (*none, error) {
		return nil, s.svc.CancelOperation(ctx, in.ID)
	})
}

func (s *Server) operation(ctx context.Context, in *struct {
	ByID
	WaitMS int64 `query:"wait_ms" minimum:"0" doc:"At most 60000; default 0"`
}) (*body[api.Operation], error) {
	deadline := time.Now().Add(min(time.Duration(in.WaitMS)*time.Millisecond, maxWait))
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for {
		o, err := s.svc.Operation(ctx, in.ID)
		o.Progress = notNil(o.Progress)
		if err != nil || o.State != api.OperationRunning || !time.Now().Before(deadline) {
			return &body[api.Operation]{o}, err
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-tick.C:
		}
	}
}

// notNil keeps empty lists from being written as null.
func notNil[T any](l []T) []T {
	if l == nil {
		return []T{}
	}
	return l
}
