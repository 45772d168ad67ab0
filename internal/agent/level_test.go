package agent

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"perdure/api"
	"perdure/internal/model"
	"perdure/internal/testenv"
)

// flag is a file by which a test tells a fake shim what to do.
func (h *host) flag(vm, name string, on bool) {
	h.t.Helper()
	path := filepath.Join(h.cfg.VMDir(vm), name)
	err := os.Remove(path)
	if on {
		err = os.WriteFile(path, nil, 0o600)
	}
	if err != nil {
		h.t.Fatal(err)
	}
}

// awaitLevel waits until specification and record say the same level.
func (h *host) awaitLevel(vm string, level model.Level) {
	h.t.Helper()
	h.await(vm, "of level "+string(level), func(r model.Record) bool {
		spec, err := h.ag.store.Spec(h.t.Context(), vm)
		return err == nil && r.Level == level && spec.Level == level
	})
}

// TestSetLevel changes the level of a running VM, asked on any host, with the agents away in the
// middle, and with a failure.
func TestSetLevel(t *testing.T) {
	t.Parallel()
	testenv.Root(t)
	a, b, w := trio(t)
	ctx := t.Context()
	a.create(api.CreateVM{Name: "v1", Level: model.LevelNone, Memory: 16 << 20, Disks: []api.CreateDisk{{Size: 1 << 20}}, Start: true})
	a.await("v1", "running", simplex)
	eventually(t, "its shim runs", 10*time.Second, func() bool { v, err := a.ag.VM(ctx, "v1"); return err == nil && v.State == model.StateRunning })
	wantErr(t, "the level it has", b.ag.SetLevel(ctx, "v1", api.SetLevel{Level: model.LevelNone}), api.Conflict, "already")
	wantErr(t, "no such VM", b.ag.SetLevel(ctx, "nix", api.SetLevel{Level: model.LevelFT}), api.NotFound, "nix")

	// The agent is gone while the change lasts; what the shim has done is written down when it comes back.
	a.flag("v1", "slow-level", true)
	if err := w.ag.SetLevel(ctx, "v1", api.SetLevel{Level: model.LevelFT}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the change is seen from elsewhere", 10*time.Second, func() bool {
		v, err := b.ag.VM(ctx, "v1")
		return err == nil && v.LevelChange != nil && !v.LevelChange.Ended && v.LevelChange.To == model.LevelFT && v.Level == model.LevelNone
	})
	a.off()
	a.flag("v1", "slow-level", false)
	a.on()
	a.awaitLevel("v1", model.LevelFT)
	a.await("v1", "protected", duplex)

	// Of a protected VM: its second copy is given up first, and made anew at the new level.
	term := a.record("v1").Term
	if err := b.ag.SetLevel(ctx, "v1", api.SetLevel{Level: model.LevelCA}); err != nil {
		t.Fatal(err)
	}
	a.awaitLevel("v1", model.LevelCA)
	a.await("v1", "protected", func(r model.Record) bool { return duplex(r) && r.Term > term })

	// A change that fails leaves the level, and the VM is protected again.
	a.flag("v1", "fail-level", true)
	term = a.record("v1").Term
	if err := a.ag.SetLevel(ctx, "v1", api.SetLevel{Level: model.LevelFT}); err != nil {
		t.Fatal(err)
	}
	a.await("v1", "protected", func(r model.Record) bool { return duplex(r) && r.Term > term })
	v, err := b.ag.VM(ctx, "v1")
	if err != nil || v.Level != model.LevelCA || v.LevelChange == nil || !strings.Contains(v.LevelChange.Error, "the test wants") {
		t.Errorf("level %s, change %+v, %v", v.Level, v.LevelChange, err)
	}
	a.flag("v1", "fail-level", false)

	// Down to none: the other host's copy stays, outdated.
	if err := b.ag.SetLevel(ctx, "v1", api.SetLevel{Level: model.LevelNone}); err != nil {
		t.Fatal(err)
	}
	a.awaitLevel("v1", model.LevelNone)
	if r := a.record("v1"); !simplex(r) || r.Replicas["b"].State != model.Outdated {
		t.Errorf("%+v", r)
	}
	if s := a.story("v1"); !strings.Contains(s, "keep their copies of the disks") {
		t.Errorf("events do not say what becomes of the other copy:\n%s", s)
	}

	// Stopped.
	if err := a.ag.KillVM(ctx, "v1"); err != nil {
		t.Fatal(err)
	}
	wantErr(t, "cancel of nothing", a.ag.SetLevel(ctx, "v1", api.SetLevel{Cancel: true}), api.Conflict, "stopped")
	if err := b.ag.SetLevel(ctx, "v1", api.SetLevel{Level: model.LevelFT}); err != nil {
		t.Fatal(err)
	}
	a.awaitLevel("v1", model.LevelFT)
	if err := a.ag.StartVM(ctx, "v1", api.StartVM{}); err != nil {
		t.Fatal(err)
	}
	a.await("v1", "protected", duplex)
}

// TestSetLevelRefused: what cannot be is refused before anything is touched.
func TestSetLevelRefused(t *testing.T) {
	t.Parallel()
	testenv.Root(t)
	h := provedHost(t, "", func(context.Context) (Proof, error) { return Proof{Text: "3 pages differ"}, nil })
	h.tracks("a", api.TrackingFailed)
	ctx := t.Context()
	h.create(api.CreateVM{Name: "v1", Level: model.LevelNone, Memory: 16 << 20, Start: true})
	h.await("v1", "running", simplex)
	err := h.ag.SetLevel(ctx, "v1", api.SetLevel{Level: model.LevelFT})
	wantErr(t, "no proof", err, api.Refused, "3 pages differ")
	for _, c := range []struct {
		name string
		spec func(*model.VMSpec)
		to   model.Level
		want string
	}{
		{"clock", func(s *model.VMSpec) { s.Accel = "kvm" }, model.LevelFT, "kvmclock"},
		{"uefi", func(s *model.VMSpec) { s.UEFI = true }, model.LevelCA, "UEFI"},
		{"memory", func(s *model.VMSpec) { s.Memory = 1 << 50; s.Level = model.LevelFT }, model.LevelNone, "a second time"},
	} {
		v, err := h.ag.find(ctx, "v1")
		if err != nil {
			t.Fatal(err)
		}
		c.spec(&v.Spec)
		wantErr(t, c.name, h.ag.setLevelHere(ctx, v, c.to), api.Refused, c.want)
	}
	if v, err := h.ag.VM(ctx, "v1"); err != nil || v.Level != model.LevelNone || v.LevelChange != nil {
		t.Errorf("a refused change has changed something: %+v, %v", v, err)
	}
	// Of a stopped VM.
	for _, c := range []struct {
		name string
		spec model.VMSpec
		to   model.Level
		want string
	}{{"uefi", model.VMSpec{UEFI: true}, model.LevelFT, "UEFI"}} {
		wantErr(t, "stopped: "+c.name, levelRefused(c.spec, c.to), api.Refused, c.want)
	}
}
