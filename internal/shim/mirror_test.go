package shim

import (
	"bytes"
	"os"
	"path/filepath"
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

// TestMirror is level ca in one test: a guest is mirrored, the disk of its host
// fails, and it boots on the other host from disks that were the same.
func TestMirror(t *testing.T) {
	w := newWorld(t, 256, 1)
	w.useLevel(model.LevelCA)
	a, b := w.hosts["a"], w.hosts["b"]
	w.protect()
	a.op(shimapi.Op{Op: "reset"}) // the guest boots once more, with every write mirrored
	k := a.console()
	k.until(t, "PERDURE-GUEST READY", 60*time.Second)
	a.op(shimapi.Op{Op: "pause"})
	w.sameDisks()
	a.op(shimapi.Op{Op: "resume"})

	// The disk of this host fails: the other host's works. The guest boots there.
	a.shim.inst.stores[0].Close()
	a.op(shimapi.Op{Op: "reset"})
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
