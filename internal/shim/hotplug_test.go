package shim

import (
	"fmt"
	"strings"
	"testing"

	"perdure/internal/model"
)

func TestDiskSteps(t *testing.T) {
	const M = 1 << 20
	list := func(ds ...model.DiskSpec) []model.DiskSpec { return ds }
	d := func(id string, size int64, slot int) model.DiskSpec {
		return model.DiskSpec{ID: id, Size: size * M, Slot: slot}
	}
	for _, c := range []struct {
		name       string
		have, want []model.DiskSpec
		steps, err string
	}{
		{"nothing", list(d("a", 1, 0), d("b", 1, 0)), list(d("a", 1, 0x10), d("b", 1, 0x11)), "", ""},
		{"add", list(d("a", 1, 0)), list(d("a", 1, 0x10), d("b", 1, 0x15)), "added b", ""},
		{"remove", list(d("a", 1, 0), d("b", 1, 0)), list(d("b", 1, 0x11)), "removed a", ""},
		{"grow", list(d("a", 1, 0)), list(d("a", 3, 0x10)), "resized a", ""},
		{"all, the slot free again", list(d("a", 1, 0), d("b", 1, 0)), list(d("b", 2, 0x11), d("c", 1, 0x10)), "removed a, resized b, added c", ""},
		{"all gone", list(d("a", 1, 0)), nil, "removed a", ""},
		{"smaller", list(d("a", 2, 0)), list(d("a", 1, 0x10)), "", "does not become smaller"},
		{"moves", list(d("a", 1, 0)), list(d("a", 1, 0x12)), "", "does not move"},
		// After b went, a list without slots means another place for c.
		{"moves by itself", list(d("b", 1, 0), d("c", 1, 0)), list(d("c", 1, 0)), "", "does not move"},
		{"twice", list(d("a", 1, 0)), list(d("a", 1, 0x10), d("a", 1, 0x11)), "", "twice"},
		{"other order", list(d("a", 1, 0), d("b", 1, 0)), list(d("b", 1, 0x11), d("a", 1, 0x10)), "", "place in the list"},
		{"before others", list(d("a", 1, 0)), list(d("b", 1, 0x15), d("a", 1, 0x10)), "", "place in the list"},
	} {
		steps, err := diskSteps(c.have, c.want)
		var got []string
		for _, s := range steps {
			got = append(got, fmt.Sprintf("%s %s", s.kind, s.d.ID))
		}
		if strings.Join(got, ", ") != c.steps || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: %v, %v", c.name, got, err)
		}
	}
}

// TestMachineDigestKnowsSlots: two sides whose disks are at other slots refuse each other,
// and a VM whose disks never changed is what it was for earlier releases.
func TestMachineDigestKnowsSlots(t *testing.T) {
	spec := func(disks ...model.DiskSpec) string { return machineDigest(model.VMSpec{UUID: "u", Disks: disks}) }
	plain := spec(model.DiskSpec{ID: "a", Size: 1}, model.DiskSpec{ID: "b", Size: 1})
	if spec(model.DiskSpec{ID: "a", Size: 1, Slot: 0x10}, model.DiskSpec{ID: "b", Size: 1, Slot: 0x11}) != plain {
		t.Error("slots that are said and slots that are not are another machine")
	}
	if spec(model.DiskSpec{ID: "a", Size: 1, Slot: 0x10}, model.DiskSpec{ID: "b", Size: 1, Slot: 0x12}) == plain {
		t.Error("another slot is the same machine")
	}
}
