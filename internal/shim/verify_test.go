package shim

import (
	"slices"
	"testing"
	"time"

	"perdure/internal/model"
)

func TestPlanVerify(t *testing.T) {
	fresh := func() []model.VerifiedDisk {
		return []model.VerifiedDisk{{Disk: "disk0", Size: 100}, {Disk: "disk1", Size: 200}, {Disk: "disk2", Size: 300}}
	}
	end := time.Now()
	old := func(state model.VerifyState, peer string) *model.VerifyReport {
		return &model.VerifyReport{State: state, Peer: peer, Disks: []model.VerifiedDisk{
			{Disk: "disk0", Size: 100, Checked: 100, Ended: end, Left: 1, Mismatches: 1}, {Disk: "disk1", Size: 200, Checked: 50, Repaired: 2, Mismatches: 2}}}
	}
	all := []int{0, 1, 2}
	for _, c := range []struct {
		name    string
		r       model.VerifyReport
		old     *model.VerifyReport
		chosen  []int
		todo    []int
		checked []int64 // by disk of the report
	}{
		{"the first", model.VerifyReport{Peer: "b"}, nil, all, all, []int64{0, 0, 0}},
		{"one disk of none", model.VerifyReport{Peer: "b"}, nil, []int{1}, []int{1}, []int64{0}},
		{"a person's, after an interrupted one", model.VerifyReport{Peer: "b"}, old(model.VerifyInterrupted, "b"), all, all, []int64{0, 0, 0}},
		{"scheduled, after an interrupted one", model.VerifyReport{Peer: "b", Scheduled: true}, old(model.VerifyInterrupted, "b"), all, []int{1, 2}, []int64{100, 50, 0}},
		{"scheduled, after an interrupted one of one copy", model.VerifyReport{Peer: "b", Scheduled: true}, old(model.VerifyInterrupted, ""), all, all, []int64{0, 0, 0}},
		{"scheduled, after one that ended", model.VerifyReport{Peer: "b", Scheduled: true}, old(model.VerifyDone, "b"), all, all, []int64{0, 0, 0}},
		{"one disk: the others are remembered", model.VerifyReport{Peer: "b"}, old(model.VerifyDone, "b"), []int{1}, []int{1}, []int64{100, 0}},
	} {
		todo := planVerify(&c.r, c.old, fresh(), c.chosen)
		var disks []int
		for _, j := range todo {
			disks = append(disks, j.disk)
			if c.r.Disks[j.at].Disk != fresh()[j.disk].Disk {
				t.Errorf("%s: disk %d has the place of %s", c.name, j.disk, c.r.Disks[j.at].Disk)
			}
		}
		var checked []int64
		for _, d := range c.r.Disks {
			checked = append(checked, d.Checked)
		}
		if !slices.Equal(disks, c.todo) || !slices.Equal(checked, c.checked) {
			t.Errorf("%s: goes over %v, begins at %v", c.name, disks, checked)
		}
	}
	// A disk that has grown begins anew.
	r, grown := model.VerifyReport{Peer: "b", Scheduled: true}, fresh()
	grown[0].Size = 150
	if todo := planVerify(&r, old(model.VerifyInterrupted, "b"), grown, all); len(todo) != 3 || r.Disks[0].Checked != 0 || !r.Disks[0].Ended.IsZero() {
		t.Errorf("a disk that has grown: %+v", r.Disks[0])
	}
}
