package shim

import (
	"path/filepath"
	"slices"
	"testing"
	"time"

	"perdure/internal/blockstore"
	"perdure/internal/model"
	"perdure/internal/shimapi"
	"perdure/internal/vfs"
)

// replica reads the metadata of the only disk's replica on a host whose shim has ended.
func (h *testHost) replica() blockstore.Meta {
	t := h.w.t
	t.Helper()
	st, err := blockstore.Open(vfs.OS{}, filepath.Join(h.dir, shimapi.DiskDir), "disk0", blockstore.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	return st.Meta()
}

// marked waits until the replica of a living shim has the term of the record.
func (h *testHost) marked(rec model.Record, run model.RunID) {
	t := h.w.t
	t.Helper()
	var m blockstore.Meta
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		h.shim.mu.Lock()
		inst := h.shim.inst
		h.shim.mu.Unlock()
		m = inst.stores[0].Meta()
		if m.State == model.UpToDate && m.Term == rec.Term && m.Run == run && m.Branch == rec.Branch {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("the replica on host %s says %+v; the record is %+v", h.name, m, rec)
		}
	}
}

func (h *testHost) ends() {
	t := h.w.t
	t.Helper()
	select {
	case err := <-h.done:
		if err != nil {
			t.Errorf("shim of host %s ended with %v", h.name, err)
		}
		h.done <- nil
	case <-time.After(20 * time.Second):
		t.Fatalf("shim of host %s does not end", h.name)
	}
}

// TestReplicasFollowRecord: were the record lost, the replicas' own metadata
// must tell the newest copy by its term.
func TestReplicasFollowRecord(t *testing.T) {
	w := newWorld(t, 128, 1)
	w.protect()
	a, b := w.hosts["a"], w.hosts["b"]
	rec := w.store.get().Record
	a.marked(rec, rec.Primary.Run)
	b.marked(rec, rec.Secondary.Run)

	a.op(shimapi.Op{Op: "switchover"})
	rec = w.until("switchover", 20*time.Second, func(r model.Record) bool { return r.Mode == model.ModeSimplex && r.Primary.Host == "b" })
	b.marked(rec, rec.Primary.Run)
	a.ends()
	if m := a.replica(); m.State != model.Outdated || m.Term >= rec.Term {
		t.Errorf("the replica that was left behind says %+v; the record's term is %d", m, rec.Term)
	}
}

// TestPairApart: a pair whose sides lost each other while nobody can decide
// says so, and goes on when somebody can.
func TestPairApart(t *testing.T) {
	w := newWorld(t, 128, 0)
	w.protect()
	a, b := w.hosts["a"], w.hosts["b"]
	apart := func(s shimapi.Status) bool {
		return slices.ContainsFunc(s.Problems, func(p model.Problem) bool { return p.Code == pairApart })
	}
	w.store.cut(true, "a", "b")
	b.shim.standby().sess.Close("the test cuts the links")
	a.untilStatus("the problem", 20*time.Second, apart)
	if r := w.store.get().Record; r.Mode != model.ModeDuplex {
		t.Fatalf("decided without the store: %+v", r)
	}
	w.store.cut(false, "a")
	w.until("a goes on alone", 20*time.Second, func(r model.Record) bool { return r.Mode == model.ModeSimplex && r.Primary.Host == "a" })
	a.untilStatus("running, and the problem gone", 20*time.Second, func(s shimapi.Status) bool { return s.State == model.StateRunning && !apart(s) })
}

func TestStallWatch(t *testing.T) {
	t0 := time.Unix(1000, 0)
	at := func(s int) time.Time { return t0.Add(time.Duration(s) * time.Second) }
	var w stallWatch
	for i, c := range []struct {
		count int64
		sec   int
		want  bool
	}{{0, 0, false}, {0, 59, false}, {1, 60, false}, {1, 119, false}, {2, 120, false}, {2, 179, false}, {2, 180, true}} {
		if got := w.stalled(c.count, at(c.sec), time.Minute); got != c.want {
			t.Errorf("step %d: %v", i, got)
		}
	}
}
