package agent

import (
	"context"
	"errors"
	"fmt"
	"reflect"

	"perdure/api"
	"perdure/internal/authority"
	"perdure/internal/clusterstore"
	"perdure/internal/model"
	"perdure/internal/shimapi"
)

var errChangedMeanwhile = errors.New("the VM changed hands meanwhile")

// changeTries bounds the repetitions of a change that meets others.
const changeTries = 5

// change reads a record linearizably, computes the next one and swaps it in,
// again where another change came first. An unknown outcome is settled by
// reading: the swap is asked for again at the same revision, which can succeed
// once only, and a record that is just what was asked for counts as done.
// Errors of f come back wrapped; api.Timeout means that the outcome is not known.
func (a *Agent) change(ctx context.Context, vm string, f func(model.Record) (model.Record, error)) (model.Versioned, error) {
	var asked *model.Record
	for range changeTries {
		cur, err := a.store.Record(ctx, vm)
		if err != nil {
			return cur, storeError(vm, err)
		}
		if asked != nil && reflect.DeepEqual(cur.Record, *asked) {
			return cur, nil
		}
		next, err := f(cur.Record)
		if err != nil {
			return cur, err
		}
		if reflect.DeepEqual(next, cur.Record) {
			return cur, nil
		}
		res := a.store.SwapRecord(ctx, shimapi.SwapRequest{VM: vm, Revision: cur.Revision, Record: next})
		switch res.Outcome {
		case shimapi.SwapDone:
			a.log.Info("record changed", "vm", vm, "term", next.Term, "mode", next.Mode, "primary", next.Primary.Host, "secondary", next.Secondary.Host, "reason", next.Reason)
			a.statuses.drop(vm)
			a.kick(vm)
			return res.Current, nil
		case shimapi.SwapUnknown:
			asked = &next
		}
		if ctx.Err() != nil {
			break
		}
	}
	if asked != nil {
		return model.Versioned{}, api.Errorf(api.Timeout, "the cluster store did not say in time whether the change of VM %q was made; look at it again", vm)
	}
	return model.Versioned{}, api.Errorf(api.Unavailable, "VM %q changes too fast; try again", vm)
}

// storeError gives an error of the store its class for callers from outside.
func storeError(vm string, err error) error {
	switch {
	case errors.Is(err, clusterstore.ErrNotFound):
		return api.Errorf(api.NotFound, "there is no VM %q", vm)
	case errors.Is(err, clusterstore.ErrUnavailable):
		return api.Errorf(api.Unavailable, "the cluster has no quorum: nothing about VM %q can be decided now", vm).
			WithAction("bring back enough hosts (and the witness) for a majority")
	}
	return err
}

// refusal gives a refused transition its class for callers from outside.
func refusal(vm string, err error) error {
	var e *api.Error
	if errors.As(err, &e) {
		return err
	}
	for _, c := range []struct {
		err   error
		class api.Class
	}{
		{authority.ErrMode, api.Conflict}, {authority.ErrSeat, api.Conflict}, {authority.ErrWanted, api.Conflict},
		{authority.ErrArgument, api.Invalid}, {authority.ErrLevel, api.Refused}, {authority.ErrReplica, api.Refused},
		{authority.ErrSurvivor, api.Refused}, {authority.ErrAlive, api.Refused}, {authority.ErrBranch, api.Refused},
		{authority.ErrAhead, api.Refused}, {authority.ErrInvalid, api.Internal}, {errChangedMeanwhile, api.Conflict},
	} {
		if errors.Is(err, c.err) {
			return api.Errorf(c.class, "VM %q: %w", vm, err)
		}
	}
	return fmt.Errorf("VM %q: %w", vm, err)
}
