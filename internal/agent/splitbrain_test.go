package agent

import (
	"strings"
	"testing"
	"time"

	"perdure/api"
	"perdure/internal/blockstore"
	"perdure/internal/model"
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
	if err := b.ag.ResolveSplitBrain(ctx, "vm1", api.ResolveSplitBrain{Discard: "a", Confirm: "vm1"}); err != nil {
		t.Fatal(err)
	}
	if m, _, err := blockstore.Peek(vfs.OS{}, a.ag.vmFile("vm1", shimapi.DiskDir), "disk0"); err != nil || !m.Lineage.Discarded {
		t.Errorf("host a: %+v, %v", m, err)
	}
	b.await("vm1", "protected again", duplex)
}
