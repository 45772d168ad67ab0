package shim

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"perdure/internal/model"
	"perdure/internal/shimapi"
)

// useLevel makes the world's VM one of another level; called before any start.
func (w *world) useLevel(l model.Level) {
	w.spec.Level = l
	w.store.cur.Record.Level = l
}

// sameDisks fails the test unless the replicas of all disks are the same. The
// guest must stand still.
func (w *world) sameDisks() {
	w.t.Helper()
	for _, d := range w.spec.Disks {
		var got [2][]byte
		for n, h := range []string{"a", "b"} {
			b, err := os.ReadFile(filepath.Join(w.dir, h, shimapi.DiskDir, d.ID+".raw"))
			if err != nil {
				w.t.Fatal(err)
			}
			got[n] = b
		}
		if !bytes.Equal(got[0], got[1]) {
			w.t.Errorf("the replicas of %s differ", d.ID)
		}
		if len(bytes.Trim(got[0], "\x00")) == 0 {
			w.t.Errorf("nothing was written to %s: this test shows nothing", d.ID)
		}
	}
}

// TestMirror is level ca in one test: a guest is mirrored; the disk of its host
// fails, and it goes on with the other host's; the disk is replaced and filled
// again; then it boots on the other host, from disks that were the same all along.
func TestMirror(t *testing.T) {
	w := newWorld(t, 256, 1)
	w.useLevel(model.LevelCA)
	a, b := w.hosts["a"], w.hosts["b"]
	w.protect()
	k := a.console()
	k.until(t, "PERDURE-GUEST READY", 60*time.Second)
	boots := func(h *testHost) { // with every write mirrored
		before := strings.Count(k.String(), "PERDURE-GUEST READY")
		h.op(shimapi.Op{Op: "reset"})
		for end := time.Now().Add(60 * time.Second); strings.Count(k.String(), "PERDURE-GUEST READY") == before; time.Sleep(20 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("the guest does not boot:\n%s", k)
			}
		}
	}
	boots(a)
	a.op(shimapi.Op{Op: "pause"})
	w.sameDisks()
	a.op(shimapi.Op{Op: "resume"})

	// The disk of this host fails: the other host's works.
	a.shim.inst.store(0).Close()
	boots(a)
	carried := w.until("carried", 10*time.Second, func(r model.Record) bool { return r.Replicas["a"].State == model.Inconsistent })
	if carried.Mode != model.ModeDuplex || carried.Primary.Host != "a" || carried.Replicas["b"].State != model.UpToDate {
		t.Fatalf("the record says %+v", carried)
	}
	a.untilStatus("carried", time.Second, func(s shimapi.Status) bool {
		return s.State == model.StateRunning && len(s.Problems) == 1 && s.Problems[0].Code == problemCarried
	})
	for _, op := range []shimapi.Op{{Op: "unprotect"}, {Op: "survivor", Value: "on"}, {Op: "disk-replace", Value: "nodisk"}} {
		a.refuses(op)
	}

	// It is replaced.
	a.op(shimapi.Op{Op: "disk-replace", Value: w.spec.Disks[0].ID})
	w.until("whole again", 30*time.Second, func(r model.Record) bool { return r.Replicas["a"].State == model.UpToDate })
	a.untilStatus("no problem left", 10*time.Second, func(s shimapi.Status) bool { return len(s.Problems) == 0 && len(s.Sync) == 0 })
	a.refuses(shimapi.Op{Op: "disk-replace", Value: w.spec.Disks[0].ID})
	a.op(shimapi.Op{Op: "pause"})
	w.sameDisks()
	a.op(shimapi.Op{Op: "resume"})

	// It fails again, while nothing can be decided: the guest waits, and goes on.
	// Then the host is lost.
	w.store.cut(true, "a")
	a.shim.inst.store(0).Close()
	before := strings.Count(k.String(), "PERDURE-GUEST READY")
	a.op(shimapi.Op{Op: "reset"})
	a.untilStatus("waits", 20*time.Second, func(s shimapi.Status) bool {
		return len(s.Problems) == 1 && strings.Contains(s.Problems[0].Text, "waits until the cluster")
	})
	for end := time.Now().Add(2 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if r := w.store.get().Record; r.Replicas["a"].State != model.UpToDate || strings.Count(k.String(), "PERDURE-GUEST READY") != before {
			t.Fatalf("the guest goes on although the record cannot say so: %+v", r)
		}
	}
	w.store.cut(false, "a")
	w.until("carried", 10*time.Second, func(r model.Record) bool { return r.Replicas["a"].State == model.Inconsistent })
	if err := a.shim.inst.proc.Kill(); err != nil {
		t.Fatal(err)
	}
	w.until("takeover", 10*time.Second, func(r model.Record) bool { return r.Mode == model.ModeSimplex && r.Primary.Host == "b" })
	b.untilStatus("running on b", 20*time.Second, func(s shimapi.Status) bool {
		return s.Role == shimapi.RolePrimary && s.State == model.StateRunning
	})
	b.console().until(t, "PERDURE-GUEST READY", 60*time.Second)
	select {
	case err := <-a.done:
		if err != nil {
			t.Errorf("shim of a ended with %v", err)
		}
		a.done <- nil
	case <-time.After(10 * time.Second):
		t.Error("shim of a does not end after it lost its VM")
	}
}

// refuses fails the test if an operation is carried out.
func (h *testHost) refuses(op shimapi.Op) {
	h.w.t.Helper()
	c := shimapi.NewShimClient(filepath.Join(h.dir, shimapi.SocketFile))
	defer c.Close()
	if text, err := c.Op(h.w.t.Context(), op); err == nil {
		h.w.t.Errorf("%+v was carried out: %s", op, text)
	} else {
		h.w.t.Log(err)
	}
}
