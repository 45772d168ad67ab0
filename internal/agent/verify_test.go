package agent

import (
	"encoding/json"
	"os"
	"strings"
	"testing"
	"time"

	"perdure/api"
	"perdure/internal/clusterstore"
	"perdure/internal/model"
	"perdure/internal/shimapi"
)

func TestVerifyDue(t *testing.T) {
	now := time.Date(2026, 5, 1, 0, 0, 0, 0, time.UTC)
	const day, week = 24 * time.Hour, 7 * 24 * time.Hour
	ago := func(d time.Duration) time.Time { return now.Add(-d) }
	done := func(d ...time.Duration) *model.VerifyReport {
		r := &model.VerifyReport{State: model.VerifyDone, Started: ago(d[0] + time.Hour), Ended: ago(d[0])}
		for i, e := range d {
			v := model.VerifiedDisk{Disk: []string{"disk0", "disk1"}[i]}
			if e >= 0 {
				v.Ended = ago(e)
			}
			r.Disks = append(r.Disks, v)
		}
		return r
	}
	interrupted := func(d time.Duration, why string, disks ...time.Duration) *model.VerifyReport {
		r := done(disks...)
		r.State, r.Ended, r.Why = model.VerifyInterrupted, ago(d), why
		return r
	}
	for _, c := range []struct {
		name   string
		report *model.VerifyReport
		made   time.Duration
		mode   model.Mode
		level  model.Level
		sched  model.VerifySchedule
		want   bool
	}{
		{"a new VM", nil, time.Hour, model.ModeDuplex, model.LevelFT, model.VerifySchedule{}, false},
		{"never verified", nil, week, model.ModeDuplex, model.LevelFT, model.VerifySchedule{}, true},
		{"lately", done(6*day, 6*day), 100 * day, model.ModeDuplex, model.LevelFT, model.VerifySchedule{}, false},
		{"a week ago", done(week, week), 100 * day, model.ModeDuplex, model.LevelFT, model.VerifySchedule{}, true},
		{"one disk lately, the other long ago", done(day, 8*day), 100 * day, model.ModeDuplex, model.LevelCA, model.VerifySchedule{}, true},
		{"one disk never", done(day), 100 * day, model.ModeDuplex, model.LevelCA, model.VerifySchedule{}, true},
		{"never wanted", nil, 100 * day, model.ModeDuplex, model.LevelFT, model.VerifySchedule{EverySeconds: -1}, false},
		{"every hour", done(2*time.Hour, 2*time.Hour), 100 * day, model.ModeDuplex, model.LevelFT, model.VerifySchedule{EverySeconds: 3600}, true},
		{"stopped", nil, 100 * day, model.ModeStopped, model.LevelFT, model.VerifySchedule{}, false},
		{"being filled", nil, 100 * day, model.ModeSyncing, model.LevelFT, model.VerifySchedule{}, false},
		{"not protected, due", done(8*day, 8*day), 100 * day, model.ModeSimplex, model.LevelFT, model.VerifySchedule{}, false},
		{"not protected for long", done(15*day, 15*day), 100 * day, model.ModeSimplex, model.LevelFT, model.VerifySchedule{}, true},
		{"level none", done(8*day, 8*day), 100 * day, model.ModeSimplex, model.LevelNone, model.VerifySchedule{}, true},
		{"just interrupted", interrupted(time.Minute, "lost", -1, -1), 100 * day, model.ModeDuplex, model.LevelFT, model.VerifySchedule{}, false},
		{"interrupted a while ago", interrupted(20*time.Minute, "lost", -1, -1), 100 * day, model.ModeDuplex, model.LevelFT, model.VerifySchedule{}, true},
		{"stopped by a person", interrupted(20*time.Minute, model.VerifyStoppedByPerson, -1, -1), 100 * day, model.ModeDuplex, model.LevelFT, model.VerifySchedule{}, false},
		{"stopped by a person a week ago", interrupted(week, model.VerifyStoppedByPerson, -1, -1), 100 * day, model.ModeDuplex, model.LevelFT, model.VerifySchedule{}, true},
	} {
		v := clusterstore.VMView{Verify: c.sched, Spec: model.VMSpec{Level: c.level, Created: ago(c.made), Disks: []model.DiskSpec{{ID: "disk0"}, {ID: "disk1"}}}}
		v.Record.Record.Mode = c.mode
		if got := verifyDue(c.report, v, now); got != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
	}
}

// TestVerifyingTurns: scheduled verifies of one host come one after the other, and
// one whose VM is gone bars nobody for long.
func TestVerifyingTurns(t *testing.T) {
	var v verifying
	now := time.Now()
	if !v.turn("a", false, now) || !v.turn("a", true, now) || v.turn("b", false, now) || !v.turn("a", true, now.Add(2*verifyLook)) {
		t.Error("a second one may run beside the first")
	}
	if !v.turn("a", false, now.Add(3*verifyLook)) || !v.turn("b", false, now.Add(3*verifyLook)) {
		t.Error("after its end nobody may")
	}
	v.turn("a", true, now.Add(4*verifyLook))
	if !v.turn("b", false, now.Add(8*verifyLook)) {
		t.Error("a VM that is gone bars the others for ever")
	}
}

// TestVerifySchedule: an agent starts a verify whose time has come, once, also when
// it restarts, and shows the report that the shim keeps.
func TestVerifySchedule(t *testing.T) {
	h := firstHost(t)
	h.create(api.CreateVM{Name: "vm1", Level: "none", Disks: []api.CreateDisk{{Size: 4 << 20}}, Start: true})
	h.await("vm1", "simplex", simplex)
	ops := func() string {
		b, _ := os.ReadFile(h.ag.vmFile("vm1", "fake-ops"))
		return string(b)
	}
	if ops() != "" {
		t.Fatalf("a VM that was just made is verified: %s", ops())
	}
	for _, bad := range []api.VerifyVM{{Rate: 5}, {Stop: true, Disk: "disk0"}, {Schedule: &model.VerifySchedule{EverySeconds: 5}}, {Schedule: &model.VerifySchedule{Rate: 1}}} {
		if bad.Validate() == nil {
			t.Errorf("%+v is not refused", bad)
		}
	}
	old := model.VerifyReport{Started: time.Now().Add(-2 * time.Hour), Ended: time.Now().Add(-2 * time.Hour), State: model.VerifyDone,
		Disks: []model.VerifiedDisk{{Disk: "disk0", Size: 4 << 20, Checked: 4 << 20, Ended: time.Now().Add(-2 * time.Hour)}}}
	put := func(r model.VerifyReport) {
		t.Helper()
		b, err := json.Marshal(r)
		if err == nil {
			err = os.WriteFile(h.ag.vmFile("vm1", shimapi.VerifyFile), b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	put(old)
	if err := h.ag.VerifyVM(t.Context(), "vm1", api.VerifyVM{Schedule: &model.VerifySchedule{EverySeconds: 3600, Rate: 1 << 20}}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the schedule is known", 5*time.Second, func() bool {
		st, err := h.ag.VerifyStatus(t.Context(), "vm1")
		return err == nil && st.Schedule.EverySeconds == 3600 && st.Report != nil && st.Due.Before(time.Now())
	})
	h.off() // the next look of this life is a minute away
	h.on()
	eventually(t, "a verify is started", 20*time.Second, func() bool { return strings.Contains(ops(), `"scheduled":true`) })
	if !strings.Contains(ops(), `"rate":1048576`) {
		t.Errorf("it was started as %s", ops())
	}
	// It ended; a further restart does not repeat it.
	old.Ended = time.Now()
	old.Disks[0].Ended = time.Now()
	put(old)
	h.off()
	h.on()
	eventually(t, "the worker has looked", 10*time.Second, func() bool {
		w := h.ag.workerOf("vm1")
		return w != nil && w.facts().shim
	})
	time.Sleep(1500 * time.Millisecond) // a further look
	if n := strings.Count(ops(), "\n"); n != 1 {
		t.Errorf("it was started %d times: %s", n, ops())
	}
	if err := h.ag.VerifyVM(t.Context(), "vm1", api.VerifyVM{Disk: "disk0", Rate: 1 << 20}); err != nil || !strings.Contains(ops(), `"disk":"disk0"`) {
		t.Errorf("asked for by a person: %v, %s", err, ops())
	}
}
