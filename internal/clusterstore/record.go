package clusterstore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"perdure/internal/model"
	"perdure/internal/shimapi"
)

func versioned(kv *mvccpb.KeyValue) (model.Versioned, error) {
	var v model.Versioned
	if err := json.Unmarshal(kv.Value, &v.Record); err != nil {
		return v, fmt.Errorf("decode record %s: %w", kv.Key, err)
	}
	v.Revision = model.Revision(kv.ModRevision)
	return v, nil
}

// Record reads a VM's record linearizably: what it returns was in force at some
// moment between call and return. Errors are ErrNotFound, or ErrUnavailable
// (nothing is known), wrapped.
func (s *Store) Record(ctx context.Context, vm string) (model.Versioned, error) {
	var out model.Versioned
	err := s.get(ctx, recordKey(vm), func(kv *mvccpb.KeyValue) (err error) {
		out, err = versioned(kv)
		return err
	})
	if err != nil {
		return model.Versioned{}, fmt.Errorf("read record of %q: %w", vm, err)
	}
	return out, nil
}

// SwapRecord replaces a record where its revision is still the given one.
//
// Invariant: SwapDone and SwapConflict are said only on etcd's own word that
// the transaction was applied. Everything else (a deadline, a lost leader, a
// full disk, a stopped member) is SwapUnknown, also where the request was
// perhaps never sent: the caller goes on under the stricter of both rules until
// a later read or swap tells.
func (s *Store) SwapRecord(ctx context.Context, req shimapi.SwapRequest) shimapi.SwapResult {
	if req.Record.VM != req.VM || req.Revision <= 0 {
		return s.refuseSwap(ctx, req)
	}
	val, err := json.Marshal(req.Record)
	if err != nil {
		return shimapi.SwapResult{Outcome: shimapi.SwapUnknown, Error: err.Error()}
	}
	key := recordKey(req.VM)
	var resp *clientv3.TxnResponse
	err = s.do(ctx, func(ctx context.Context) error {
		// resp is read only when this function has returned in time.
		r, err := s.cli.Txn(ctx).
			If(clientv3.Compare(clientv3.ModRevision(key), "=", int64(req.Revision))).
			Then(clientv3.OpPut(key, string(val))).
			Else(clientv3.OpGet(key)).
			Commit()
		if err == nil {
			resp = r
		}
		return err
	})
	if err != nil {
		return shimapi.SwapResult{Outcome: shimapi.SwapUnknown, Error: fmt.Sprintf("swap record of %q: %v", req.VM, err)}
	}
	if resp.Succeeded {
		return shimapi.SwapResult{Outcome: shimapi.SwapDone, Current: model.Versioned{
			Record: req.Record, Revision: model.Revision(resp.Header.Revision)}}
	}
	res := shimapi.SwapResult{Outcome: shimapi.SwapConflict}
	kvs := resp.Responses[0].GetResponseRange().Kvs
	if len(kvs) == 0 {
		res.Error = fmt.Sprintf("record of %q does not exist any more", req.VM)
		return res
	}
	if res.Current, err = versioned(kvs[0]); err != nil {
		res.Error = err.Error()
	}
	return res
}

// refuseSwap answers a request that is wrong in itself. It was not and never
// will be carried out, so it counts as a conflict where the record can be read.
func (s *Store) refuseSwap(ctx context.Context, req shimapi.SwapRequest) shimapi.SwapResult {
	msg := fmt.Sprintf("swap record of %q: the request is for %q at revision %d", req.VM, req.Record.VM, req.Revision)
	cur, err := s.Record(ctx, req.VM)
	if err != nil && !errors.Is(err, ErrNotFound) {
		return shimapi.SwapResult{Outcome: shimapi.SwapUnknown, Error: msg + "; " + err.Error()}
	}
	return shimapi.SwapResult{Outcome: shimapi.SwapConflict, Current: cur, Error: msg}
}

// CreateVM stores specification and record of a new VM in one transaction.
// ErrExists where there is one of that name. An error that is ErrUnavailable
// leaves open whether the VM exists now.
func (s *Store) CreateVM(ctx context.Context, spec model.VMSpec, rec model.Record) error {
	if rec.VM != spec.Name {
		return fmt.Errorf("create VM %q: the record is for %q", spec.Name, rec.VM)
	}
	sv, err := json.Marshal(spec)
	if err != nil {
		return fmt.Errorf("create VM %q: %w", spec.Name, err)
	}
	rv, err := json.Marshal(rec)
	if err != nil {
		return fmt.Errorf("create VM %q: %w", spec.Name, err)
	}
	sk, rk := specKey(spec.Name), recordKey(spec.Name)
	ok, err := s.txn(ctx,
		[]clientv3.Cmp{clientv3.Compare(clientv3.CreateRevision(sk), "=", 0), clientv3.Compare(clientv3.CreateRevision(rk), "=", 0)},
		[]clientv3.Op{clientv3.OpPut(sk, string(sv)), clientv3.OpPut(rk, string(rv))})
	if err != nil {
		return fmt.Errorf("create VM %q: %w", spec.Name, err)
	}
	if !ok {
		return fmt.Errorf("create VM %q: %w", spec.Name, ErrExists)
	}
	return nil
}

// DeleteVM removes everything the store knows of a VM whose record is still at
// rev; ErrConflict otherwise.
func (s *Store) DeleteVM(ctx context.Context, vm string, rev model.Revision) error {
	ok, err := s.txn(ctx,
		[]clientv3.Cmp{clientv3.Compare(clientv3.ModRevision(recordKey(vm)), "=", int64(rev))},
		[]clientv3.Op{clientv3.OpDelete(vmPrefix(vm), clientv3.WithPrefix())})
	if err != nil {
		return fmt.Errorf("delete VM %q: %w", vm, err)
	}
	if !ok {
		return fmt.Errorf("delete VM %q: %w", vm, ErrConflict)
	}
	return nil
}

// Spec reads the specification of a VM linearizably.
func (s *Store) Spec(ctx context.Context, vm string) (model.VMSpec, error) {
	var spec model.VMSpec
	if err := s.getJSON(ctx, specKey(vm), &spec); err != nil {
		return model.VMSpec{}, fmt.Errorf("read specification of %q: %w", vm, err)
	}
	return spec, nil
}

// changeTries bounds the repetitions of a ChangeSpec that meets other changes.
const changeTries = 5

// ChangeSpec replaces a VM's specification and record by what f makes of them, both in one
// transaction, and asks f again where either was changed meanwhile. An error of f
// ends it and comes back wrapped. An error that is ErrUnavailable leaves open whether the change was
// made; ErrConflict: others changed them all the time.
func (s *Store) ChangeSpec(ctx context.Context, vm string, f func(model.VMSpec, model.Record) (model.VMSpec, model.Record, error)) error {
	fail := func(err error) error { return fmt.Errorf("change specification of %q: %w", vm, err) }
	for range changeTries {
		var spec model.VMSpec
		var rec model.Record
		var revs [2]int64
		for n, key := range []string{specKey(vm), recordKey(vm)} {
			err := s.get(ctx, key, func(kv *mvccpb.KeyValue) error {
				revs[n] = kv.ModRevision
				if n == 0 {
					return json.Unmarshal(kv.Value, &spec)
				}
				return json.Unmarshal(kv.Value, &rec)
			})
			if err != nil {
				return fail(err)
			}
		}
		spec, rec, err := f(spec, rec.Clone())
		if err != nil {
			return fail(err)
		}
		sv, err := json.Marshal(spec)
		if err != nil {
			return fail(err)
		}
		rv, err := json.Marshal(rec)
		if err != nil {
			return fail(err)
		}
		ok, err := s.txn(ctx,
			[]clientv3.Cmp{clientv3.Compare(clientv3.ModRevision(specKey(vm)), "=", revs[0]), clientv3.Compare(clientv3.ModRevision(recordKey(vm)), "=", revs[1])},
			[]clientv3.Op{clientv3.OpPut(specKey(vm), string(sv)), clientv3.OpPut(recordKey(vm), string(rv))})
		if err != nil {
			return fail(err)
		}
		if ok {
			return nil
		}
	}
	return fail(ErrConflict)
}

// PutEndpoint publishes where the shim of a VM on one host listens. It does
// nothing where the VM does not exist (any more).
func (s *Store) PutEndpoint(ctx context.Context, vm string, e shimapi.Endpoint) error {
	val, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("publish endpoint of %q: %w", vm, err)
	}
	ok, err := s.txn(ctx,
		[]clientv3.Cmp{clientv3.Compare(clientv3.CreateRevision(specKey(vm)), ">", 0)},
		[]clientv3.Op{clientv3.OpPut(endpointKey(vm, e.Host), string(val))})
	if err == nil && !ok {
		err = ErrNotFound
	}
	if err != nil {
		return fmt.Errorf("publish endpoint of %q on %s: %w", vm, e.Host, err)
	}
	return nil
}

func (s *Store) get(ctx context.Context, key string, f func(*mvccpb.KeyValue) error) error {
	var kvs []*mvccpb.KeyValue
	err := s.do(ctx, func(ctx context.Context) error {
		r, err := s.cli.Get(ctx, key)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrUnavailable, err)
		}
		kvs = r.Kvs
		return nil
	})
	if err != nil {
		return err
	}
	if len(kvs) == 0 {
		return ErrNotFound
	}
	return f(kvs[0])
}

func (s *Store) getJSON(ctx context.Context, key string, out any) error {
	return s.get(ctx, key, func(kv *mvccpb.KeyValue) error {
		if err := json.Unmarshal(kv.Value, out); err != nil {
			return fmt.Errorf("decode %s: %w", key, err)
		}
		return nil
	})
}

// txn reports whether the comparisons held.
func (s *Store) txn(ctx context.Context, cmps []clientv3.Cmp, then []clientv3.Op) (bool, error) {
	var ok bool
	err := s.do(ctx, func(ctx context.Context) error {
		r, err := s.cli.Txn(ctx).If(cmps...).Then(then...).Commit()
		if err != nil {
			return fmt.Errorf("%w: %w", ErrUnavailable, err)
		}
		ok = r.Succeeded
		return nil
	})
	if err != nil {
		return false, err
	}
	return ok, nil
}
