package clusterstore

import (
	"context"
	"encoding/json"
	"fmt"

	clientv3 "go.etcd.io/etcd/client/v3"

	"perdure/internal/model"
)

func verifyKey(vm string) string { return vmPrefix(vm) + "verify" }

// SetVerifySchedule notes when the disks of a VM are verified by themselves; the
// zero schedule is the default one.
func (s *Store) SetVerifySchedule(ctx context.Context, vm string, sched model.VerifySchedule) error {
	op := clientv3.OpDelete(verifyKey(vm))
	if sched != (model.VerifySchedule{}) {
		val, err := json.Marshal(sched)
		if err != nil {
			return fmt.Errorf("note schedule of verify of %q: %w", vm, err)
		}
		op = clientv3.OpPut(verifyKey(vm), string(val))
	}
	ok, err := s.txn(ctx, []clientv3.Cmp{clientv3.Compare(clientv3.CreateRevision(specKey(vm)), ">", 0)}, []clientv3.Op{op})
	if err == nil && !ok {
		err = ErrNotFound
	}
	if err != nil {
		return fmt.Errorf("note schedule of verify of %q: %w", vm, err)
	}
	return nil
}
