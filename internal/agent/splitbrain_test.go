package agent

import (
	"strings"
	"testing"
	"time"

	"perdure/api"
	"perdure/internal/blockstore"
	"perdure/internal/model"
	"perdure/internal/replica"
	"perdure/internal/shimapi"
	"perdure/internal/vfs"
)

// TestSplitBrainRefusals tries hard to have the wrong side given up.
func TestSplitBrainRefusals(t *testing.T) {
	a, b, _ := trio(t)
	ctx := t.Context()
	a.create(api.CreateVM{Name: "vm1", Level: "ca", Disks: []api.CreateDisk{{Size: 4 << 20}}, Start: true, Host: "a"})
	a.await("vm1", "duplex", duplex)
	refused := func(via *host, side, part string) {
		t.Helper()
		err := via.ag.ResolveSplitBrain(ctx, "vm1", api.ResolveSplitBrain{Discard: side, Confirm: "vm1"})
		if err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("host %s is to be discarded: %v, want %q in it", side, err, part)
		}
		for _, h := range []*host{a, b} {
			if h.ag == nil {
				continue
			}
			if m, _, err := blockstore.Peek(vfs.OS{}, h.ag.vmFile("vm1", shimapi.DiskDir), "disk0"); err != nil || m.Lineage.Discarded {
				t.Fatalf("host %s: discarded all the same (%v)", h.cfg.Name, err)
			}
		}
	}
	refused(a, "a", "the VM runs from it")
	refused(a, "b", "the VM may be started from")
	refused(b, "nosuch", "holds nothing")
	refused(b, "w", "holds nothing")

	// A person has b go on while a is away.
	a.off()
	a.killVM("vm1", true)
	if err := b.ag.TakeoverVM(ctx, "vm1", api.TakeoverVM{Host: "b", Force: true, Confirm: "vm1"}); err != nil {
		t.Fatal(err)
	}
	rec := b.await("vm1", "a branch", func(r model.Record) bool { return r.Branch != "" && r.Primary.Host == "b" })
	if rec.Replicas["a"].State != model.Outdated {
		t.Fatalf("%+v", rec)
	}
	refused(b, "a", "does not answer")
	refused(b, "b", "the VM runs from it")
	a.on()
	eventually(t, "both sides answer", 30*time.Second, func() bool {
		s, err := a.ag.SplitBrain(ctx, "vm1")
		return err == nil && len(s.Sides) == 2 && s.Sides[0].Answers && s.Sides[1].Answers
	})
	s, err := a.ag.SplitBrain(ctx, "vm1")
	if err != nil || !s.Split || s.Sides[0].Host != "b" || !s.Sides[0].Counts || !s.Sides[1].Split || s.Sides[1].Branch == rec.Branch {
		t.Fatalf("%+v, %v", s, err)
	}
	vm, err := b.ag.VM(ctx, "vm1")
	if err != nil {
		t.Fatal(err)
	}
	found := false
	for _, p := range vm.Problems {
		found = found || p.Code == "split-brain"
	}
	if !found {
		t.Errorf("no problem split-brain: %+v", vm.Problems)
	}
	// What b has calls itself Inconsistent, so a's is the only copy that is whole.
	refused(a, "a", "no other whole copy is sure")
	st, err := blockstore.Open(vfs.OS{}, b.ag.vmFile("vm1", shimapi.DiskDir), "disk0", blockstore.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err = st.Replay(); err == nil {
		err = st.SetMeta(func(m *blockstore.Meta) { m.State = model.UpToDate })
	}
	if cerr := st.Close(); err != nil || cerr != nil {
		t.Fatal(err, cerr)
	}
	if a.record("vm1").Mode != model.ModeSimplex {
		t.Fatalf("it did not wait for a person: %+v", a.record("vm1"))
	}
	// Nor is it given up by the way, disk by disk: by request, or where a request comes that was judged too early.
	for _, via := range []*host{a, b} {
		op, err := via.ag.ReplaceDisk(ctx, "vm1", "disk0", api.ReplaceDisk{Host: "a"})
		for err == nil && op.State == api.OperationRunning {
			op, err = via.ag.Operation(ctx, op.ID)
		}
		if err == nil {
			err = op.Error.Err()
		}
		if err == nil || !strings.Contains(err.Error(), "another line of history") {
			t.Errorf("a's disk is replaced: %v", err)
		}
	}
	if err := a.ag.renewHere(ctx, "vm1", renewReplica{Disk: "disk0", UUID: vm.UUID}); err == nil || !strings.Contains(err.Error(), "another line of history") {
		t.Errorf("a makes its replica anew: %v", err)
	}
	if m, _, err := blockstore.Peek(vfs.OS{}, a.ag.vmFile("vm1", shimapi.DiskDir), "disk0"); err != nil || m.State == model.Inconsistent {
		t.Fatalf("a's replica: %+v, %v", m, err)
	}
	if err := b.ag.ResolveSplitBrain(ctx, "vm1", api.ResolveSplitBrain{Discard: "a", Confirm: "vm1"}); err != nil {
		t.Fatal(err)
	}
	if m, _, err := blockstore.Peek(vfs.OS{}, a.ag.vmFile("vm1", shimapi.DiskDir), "disk0"); err != nil || !m.Lineage.Discarded {
		t.Errorf("host a: %+v, %v", m, err)
	}
	b.await("vm1", "protected again", duplex)
}

// TestSplitSides judges what two hosts say of their replicas.
func TestSplitSides(t *testing.T) {
	g := func(term model.Term, branch model.BranchID) replica.Generation {
		return replica.Generation{Term: term, Branch: branch, Run: "r"}
	}
	disk := func(st model.ReplicaState, l replica.Lineage, marked int64) replicaFacts {
		c := replica.Copy{VM: "vm", Disk: "disk0", Size: 8 << 20, State: st, Clean: true, Lineage: l}
		return replicaFacts{Disks: []diskFacts{{Disk: "disk0", Size: 8 << 20, State: st, Clean: true, Marked: marked, Written: time.Unix(0, 0), copy: c}}}
	}
	together := replica.Lineage{Current: g(3, "")}
	forced := together.WriteAlone(g(7, "x"))
	for _, c := range []struct {
		name         string
		state        model.ReplicaState // of host b by the record
		branch       model.BranchID
		good, other  replicaFacts
		split        bool
		verdict, why string
		loses        string
	}{
		{"behind", model.Outdated, "x", disk(model.UpToDate, together.WriteAlone(g(7, "")), 4096), disk(model.Outdated, together, 0), false, "peer-missed-last", "waits for nobody", "its bitmap names nothing"},
		{"forced, and the other one went on too", model.Outdated, "", disk(model.UpToDate, forced, 4096), disk(model.UpToDate, together.WriteAlone(g(5, "")), 1<<20), true, "other-branch", "", "alone since term 3 run r: at most 1MiB"},
		{"forced, and the other one was behind only", model.Outdated, "", disk(model.UpToDate, forced, 4096), disk(model.Outdated, together, 0), true, "other-branch", "", "its bitmap names nothing"},
		{"both went on in one branch", model.Outdated, "x", disk(model.UpToDate, together.WriteAlone(g(7, "")), 4096), disk(model.UpToDate, together.WriteAlone(g(5, "")), 1<<20), true, "both-alone", "", "at most 1MiB"},
		{"the other one is newer than the one that counts", model.Outdated, "x", disk(model.UpToDate, together, 0), disk(model.UpToDate, together.WriteAlone(g(5, "")), 1<<20), true, "peer-missed-last", "", "at most 1MiB"},
		{"strangers", model.Outdated, "x", disk(model.UpToDate, together, 0), disk(model.UpToDate, replica.Lineage{Current: g(1, ""), Base: g(9, "")}, 1<<20), true, "unrelated", "", "at most 1MiB"},
		{"half filled", model.Inconsistent, "", disk(model.UpToDate, together.WriteAlone(g(7, "")), 4096), disk(model.Inconsistent, replica.Lineage{Current: g(2, ""), Toward: g(5, "")}, 0), false, "filled-by-another", "waits for nobody", "no whole copy"},
		{"given up before", model.Inconsistent, "", disk(model.UpToDate, forced, 4096), disk(model.Outdated, replica.Lineage{Current: g(3, ""), Discarded: true}, 0), false, "discarded", "waits for nobody", "given up before"},
		{"the good one is not whole", model.Outdated, "", disk(model.Inconsistent, forced, 4096), disk(model.UpToDate, together, 0), true, "never-connected", "no other whole copy", "its bitmap names nothing"},
	} {
		rec := model.Record{Mode: model.ModeSimplex, Branch: "x", Primary: model.Seat{Host: "a", Run: "r"}, Replicas: map[string]model.Replica{
			"a": {State: model.UpToDate, Branch: "x"}, "b": {State: c.state, Branch: c.branch}}}
		facts := map[string]replicaFacts{"a": c.good, "b": c.other}
		s := api.SplitBrain{VM: "vm", Primary: "a", Running: true, Sides: []api.SplitSide{makeSide(rec, "a", "a", facts, nil), makeSide(rec, "b", "a", facts, nil)}}
		b := s.Sides[1]
		if b.Split != c.split || b.Disks[0].Verdict != c.verdict && c.verdict != "never-connected" {
			t.Errorf("%s: split %v, %s", c.name, b.Split, b.Disks[0].Verdict)
		}
		if why := whyKeep(rec, b, s); !strings.Contains(why, c.why) || (why == "") != (c.why == "") {
			t.Errorf("%s: to be kept because %q, want %q", c.name, why, c.why)
		}
		if l := strings.Join(losses("vm", b, s), "; "); !strings.Contains(l, c.loses) {
			t.Errorf("%s: loses %q, want %q", c.name, l, c.loses)
		}
		if why := whyKeep(rec, s.Sides[0], s); !strings.Contains(why, "the VM runs from it") {
			t.Errorf("%s: the side that runs: %q", c.name, why)
		}
	}
}
