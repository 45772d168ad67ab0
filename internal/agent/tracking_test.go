package agent

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"perdure/api"
	"perdure/internal/config"
	"perdure/internal/model"
	"perdure/internal/testenv"
)

// provedHost is the only host of a cluster, with a stand-in for the proof.
func provedHost(t *testing.T, proofFile string, prove func(context.Context) (Proof, error)) *host {
	t.Helper()
	h := &host{t: t, cfg: hostConfig(t, "a", config.RoleHost), prove: func(ctx context.Context, _ string, _ Machine, _ string) (Proof, error) { return prove(ctx) }}
	h.cfg.TrackingProof = proofFile
	h.cfg.QEMU = "/bin/true" // what the proof is kept for is looked at; nothing of it is run
	if err := Init(h.cfg, "test"); err != nil {
		t.Fatal(err)
	}
	h.on()
	t.Cleanup(h.cleanup)
	if err := h.ag.store.WaitReady(t.Context()); err != nil {
		t.Fatal(err)
	}
	return h
}

// tracks waits until host name is shown with a state of its proof.
func (h *host) tracks(name string, want api.Tracking) api.Host {
	h.t.Helper()
	var v api.Host
	eventually(h.t, name+" has proof "+string(want), 20*time.Second, func() bool {
		v, _ = h.ag.Host(h.t.Context(), name)
		return v.Tracking == want
	})
	return v
}

func TestFailedProofRefusesLevelFT(t *testing.T) {
	t.Parallel()
	var calls atomic.Int32
	result := Proof{Text: "3 pages differ from the guest's memory"}
	h := provedHost(t, "", func(context.Context) (Proof, error) { calls.Add(1); return result, nil })
	v := h.tracks("a", api.TrackingFailed)
	if len(v.Problems) != 1 || v.Problems[0].Code != "tracking-failed" || !strings.Contains(v.Problems[0].Text, "3 pages differ") {
		t.Errorf("problems of the host: %+v", v.Problems)
	}
	ft := api.CreateVM{Name: "v1", Level: model.LevelFT, Memory: 16 << 20}
	if err := ft.Validate(); err != nil {
		t.Fatal(err)
	}
	_, err := h.ag.CreateVM(t.Context(), ft)
	wantErr(t, "level ft", err, api.Refused, "host a failed the proof of dirty tracking that level ft rests on: 3 pages differ")
	h.create(api.CreateVM{Name: "v2", Level: model.LevelNone, Memory: 16 << 20})

	// A failure is not believed for ever: the next life of the agent tries again.
	h.off()
	result = Proof{OK: true, Text: "none missed"}
	h.on()
	h.tracks("a", api.TrackingProved)
	h.create(ft)
	if n := calls.Load(); n != 2 {
		t.Errorf("%d proofs, want 2", n)
	}
	// A good one is: it is kept for this boot, kernel and QEMU.
	h.off()
	h.on()
	h.tracks("a", api.TrackingProved)
	if n := calls.Load(); n != 2 {
		t.Errorf("%d proofs after a restart, want 2", n)
	}
}

func TestProofThatCannotBeRun(t *testing.T) {
	h := provedHost(t, "", func(context.Context) (Proof, error) { return Proof{}, errors.New("no FUSE here") })
	if v := h.tracks("a", api.TrackingFailed); v.TrackingText != "no FUSE here" {
		t.Errorf("%+v", v)
	}
}

// TestProtectionWaitsForProof has two hosts share a proof, as those of a lab do.
func TestProtectionWaitsForProof(t *testing.T) {
	t.Parallel()
	testenv.Root(t)
	file := filepath.Join(t.TempDir(), "shared", "proof.json")
	release := make(chan struct{})
	var calls atomic.Int32
	prove := func(ctx context.Context) (Proof, error) {
		calls.Add(1)
		select {
		case <-release:
			return Proof{OK: true, Text: "none missed"}, nil
		case <-ctx.Done():
			return Proof{}, ctx.Err()
		}
	}
	a := provedHost(t, file, prove)
	b := &host{t: t, cfg: hostConfig(t, "b", config.RoleHost), prove: a.prove}
	b.cfg.TrackingProof, b.cfg.QEMU = file, a.cfg.QEMU
	if err := Join(t.Context(), b.cfg, token(t, a, config.RoleHost), "test"); err != nil {
		t.Fatal(err)
	}
	b.on()
	t.Cleanup(b.cleanup)
	a.tracks("b", api.TrackingPending)
	a.create(api.CreateVM{Name: "v1", Level: model.LevelFT, Memory: 16 << 20, Start: true})
	a.await("v1", "running alone", simplex)
	eventually(t, "the VM says what it waits for", 20*time.Second, func() bool {
		v, err := a.ag.VM(t.Context(), "v1")
		if err != nil {
			return false
		}
		for _, p := range v.Problems {
			if p.Code == "unprotected" && strings.Contains(p.Text, "still proving its dirty tracking") {
				return true
			}
		}
		return false
	})
	if rec := a.record("v1"); rec.Secondary.Host != "" {
		t.Fatalf("protected on an unproved host: %+v", rec)
	}
	close(release)
	a.await("v1", "protected", duplex)
	if n := calls.Load(); n != 1 {
		t.Errorf("%d proofs for two hosts that share one, want 1", n)
	}
	if _, err := os.Stat(file); err != nil {
		t.Error(err)
	}
}

// TestKeptProof: a proof for anything else than what is here counts for nothing.
func TestKeptProof(t *testing.T) {
	path := filepath.Join(t.TempDir(), "p")
	here := proofOf{Boot: "b", Kernel: "k", QEMU: "q", Accel: "kvm", Type: "t", By: "v"}
	good := Proof{OK: true, Text: "none missed"}
	if err := writeProof(path, keptProof{For: here, Proof: good}); err != nil {
		t.Fatal(err)
	}
	if got, ok := readProof(path, here); !ok || got != good {
		t.Errorf("%+v %v", got, ok)
	}
	for i, other := range []proofOf{{"x", "k", "q", "kvm", "t", "v"}, {"b", "x", "q", "kvm", "t", "v"}, {"b", "k", "x", "kvm", "t", "v"},
		{"b", "k", "q", "tcg", "t", "v"}, {"b", "k", "q", "kvm", "x", "v"}, {"b", "k", "q", "kvm", "t", "x"}} {
		if _, ok := readProof(path, other); ok {
			t.Errorf("case %d: a proof for %+v counted for %+v", i, here, other)
		}
	}
	if err := os.WriteFile(path, []byte(`{"for":`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, ok := readProof(path, here); ok {
		t.Error("a torn file counted")
	}
}
