package agent

import (
	"context"
	"errors"
	"slices"
	"sort"
	"sync"
	"time"

	"perdure/api"
	"perdure/internal/model"
)

// operationLife is how long an operation is remembered after its end.
const operationLife = time.Hour

// errCancelled is the cause with which a person ends an operation.
var errCancelled = errors.New("cancelled")

// operations are the long things this host carries out.
type operations struct {
	host string
	mu   sync.Mutex
	by   map[string]*operation
	vms  map[string]string // VM being made → operation
	wg   sync.WaitGroup
}

type operation struct {
	mu     sync.Mutex
	op     api.Operation
	cancel context.CancelCauseFunc
}

func newOperations(host string) *operations {
	return &operations{host: host, by: map[string]*operation{}, vms: map[string]string{}}
}

// begin starts an operation on a VM; one at a time.
func (o *operations) begin(kind, vm string, f func(ctx context.Context, op *operation) error) (api.Operation, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if id := o.vms[vm]; id != "" {
		return api.Operation{}, api.Errorf(api.Conflict, "something else is being done with VM %q just now (operation %s)", vm, id)
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	op := &operation{cancel: cancel, op: api.Operation{ID: o.host + "-" + randomID(6), Kind: kind, VM: vm, Host: o.host,
		State: api.OperationRunning, Progress: []model.Progress{}, Started: time.Now().UTC()}}
	id := op.op.ID
	o.by[id], o.vms[vm] = op, id
	o.wg.Go(func() {
		defer cancel(nil)
		err := f(ctx, op)
		if err != nil && errors.Is(context.Cause(ctx), errCancelled) {
			err = api.Errorf(api.Conflict, "cancelled; nothing is left of it")
		}
		o.mu.Lock()
		delete(o.vms, vm)
		o.mu.Unlock()
		op.end(err)
	})
	return op.get(), nil
}

func (op *operation) get() api.Operation {
	op.mu.Lock()
	defer op.mu.Unlock()
	out := op.op
	out.Progress = slices.Clone(out.Progress)
	return out
}

func (op *operation) end(err error) {
	op.mu.Lock()
	defer op.mu.Unlock()
	op.op.Ended = time.Now().UTC()
	op.op.State = api.OperationDone
	if err != nil {
		op.op.State = api.OperationFailed
		op.op.Error = api.ProblemOf(err)
		op.op.Text = err.Error()
	}
}

func (op *operation) say(text string) {
	op.mu.Lock()
	defer op.mu.Unlock()
	op.op.Text = text
}

// track adds a thing that is being copied and returns how to report on it.
func (op *operation) track(what string, total int64) func(done int64) {
	op.mu.Lock()
	defer op.mu.Unlock()
	i := len(op.op.Progress)
	op.op.Progress = append(op.op.Progress, model.Progress{What: what, Total: total, ETASeconds: -1})
	start := time.Now()
	return func(done int64) {
		op.mu.Lock()
		defer op.mu.Unlock()
		p := &op.op.Progress[i]
		p.Done = min(done, p.Total)
		if spent := time.Since(start).Seconds(); p.Done > 0 && spent > 0.2 {
			p.ETASeconds = spent * float64(p.Total-p.Done) / float64(p.Done)
		}
	}
}

// mirror shows what another host says of the operation that does the work.
func (op *operation) mirror(from api.Operation) {
	op.mu.Lock()
	defer op.mu.Unlock()
	op.op.Progress, op.op.Text = from.Progress, from.Text
}

func (o *operations) sweep(now time.Time) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for id, op := range o.by {
		if v := op.get(); v.State != api.OperationRunning && now.Sub(v.Ended) > operationLife {
			delete(o.by, id)
		}
	}
}

// cancelAll ends everything at the agent's end and waits for its undoing.
func (o *operations) cancelAll() {
	o.mu.Lock()
	for _, op := range o.by {
		op.cancel(errors.New("the agent ends"))
	}
	o.mu.Unlock()
	o.wg.Wait()
}

// Operations implements httpapi.Service.
func (a *Agent) Operations(context.Context) ([]api.Operation, error) {
	a.ops.mu.Lock()
	defer a.ops.mu.Unlock()
	out := make([]api.Operation, 0, len(a.ops.by))
	for _, op := range a.ops.by {
		out = append(out, op.get())
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Started.After(out[j].Started) })
	return out, nil
}

func (a *Agent) operation(id string) (*operation, error) {
	a.ops.mu.Lock()
	defer a.ops.mu.Unlock()
	if op := a.ops.by[id]; op != nil {
		return op, nil
	}
	return nil, api.Errorf(api.NotFound, "there is no operation %q on host %s (each is remembered for an hour there, until its agent restarts)", id, a.cfg.Name)
}

// Operation implements httpapi.Service.
func (a *Agent) Operation(_ context.Context, id string) (api.Operation, error) {
	op, err := a.operation(id)
	if err != nil {
		return api.Operation{}, err
	}
	return op.get(), nil
}

// CancelOperation implements httpapi.Service.
func (a *Agent) CancelOperation(_ context.Context, id string) error {
	op, err := a.operation(id)
	if err != nil {
		return err
	}
	if op.get().State == api.OperationRunning {
		op.cancel(errCancelled)
	}
	return nil
}
