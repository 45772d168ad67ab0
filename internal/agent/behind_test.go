package agent

import (
	"testing"

	"perdure/api"
	"perdure/internal/model"
)

// TestNeverFilled: a copy that never held anything lacks all, whatever is marked.
func TestNeverFilled(t *testing.T) {
	for _, c := range []struct {
		states []model.ReplicaState // of the others
		want   int64
	}{
		{nil, -1},
		{[]model.ReplicaState{model.Inconsistent}, 100},
		{[]model.ReplicaState{""}, 100},
		{[]model.ReplicaState{model.Outdated}, 0},
		{[]model.ReplicaState{model.Inconsistent, model.UpToDate}, 0},
	} {
		d := api.VMDisk{Primary: "a", Size: 100, Replicas: []api.DiskReplica{{Host: "a", State: model.UpToDate}}}
		for _, s := range c.states {
			d.Replicas = append(d.Replicas, api.DiskReplica{Host: "b", State: s})
		}
		if got := neverFilled(d); got != c.want {
			t.Errorf("%v: %d bytes behind, want %d", c.states, got, c.want)
		}
	}
}
