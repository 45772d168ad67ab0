//go:build soak

package e2e

import (
	"testing"
	"time"

	"perdure/internal/model"
)

// TestSoakLevels changes the level again and again under steady traffic: nothing is lost, nothing
// repeated, and no client waits as long as it would for a frame that was lost in the change.
func TestSoakLevels(t *testing.T) {
	w := Start(t)
	v := w.CreateVM(VMOptions{Level: "none", Disks: []string{"128M"}})
	v.Within(time.Minute, "clock")
	p := v.Primary()
	tr := v.Traffic()
	var worst time.Duration
	for range 6 {
		for _, level := range []model.Level{"ft", "none"} {
			busy := v.Counter(time.Millisecond)
			v.setLevel(string(level))
			w.must(busy.WaitOK(w.Ctx, 20), "counter")
			r := busy.Stop()
			if !r.Clean() {
				t.Errorf("to %s: %v", level, r)
			}
			t.Logf("to %s: longest wait %v", level, r.Waits.Max)
			worst = max(worst, r.Waits.Max)
		}
	}
	t.Logf("longest wait of all: %v", worst)
	tr.Check(5*time.Second, p)
}
