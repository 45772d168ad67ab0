package agent

import (
	"strings"
	"testing"
	"time"

	"perdure/api"
	"perdure/internal/config"
	"perdure/internal/model"
	"perdure/internal/shimapi"
	"perdure/internal/testenv"
)

func TestNeeds(t *testing.T) {
	good, old := model.Replica{State: model.UpToDate}, model.Replica{State: model.Outdated}
	for what, c := range map[string]struct {
		rec  model.Record
		want string
	}{
		"primary":         {model.Record{Mode: model.ModeSimplex, Primary: model.Seat{Host: "x"}}, "should run there"},
		"secondary":       {model.Record{Mode: model.ModeSyncing, Primary: model.Seat{Host: "y"}, Secondary: model.Seat{Host: "x"}}, "second copy there"},
		"only copy":       {model.Record{Mode: model.ModeStopped, Replicas: map[string]model.Replica{"x": good, "y": old}}, "only good copy"},
		"one of two":      {model.Record{Mode: model.ModeStopped, Replicas: map[string]model.Replica{"x": good, "y": good}}, "once started on host y"},
		"an outdated one": {model.Record{Mode: model.ModeSimplex, Primary: model.Seat{Host: "y"}, Replicas: map[string]model.Replica{"x": old, "y": good}}, ""},
		"nothing":         {model.Record{Mode: model.ModeStopped, Primary: model.Seat{Host: "y"}, Replicas: map[string]model.Replica{"y": good}}, ""},
	} {
		got := needs(c.rec, "x")
		if got != c.want && (c.want == "" || !strings.Contains(got, c.want)) {
			t.Errorf("%s: %q, want %q", what, got, c.want)
		}
	}
}

// TestReplaceHost is the replacement of a dead host: it is refused as long as
// the host is needed, then its name is free, and the dead one is a stranger.
func TestReplaceHost(t *testing.T) {
	t.Parallel()
	testenv.Root(t)
	a, b, _ := trio(t)
	ctx := t.Context()
	a.create(api.CreateVM{Name: "v1", Level: model.LevelFT, Memory: 16 << 20, Disks: []api.CreateDisk{{Size: 1 << 20}}, Start: true})
	a.await("v1", "protected", duplex)
	wantErr(t, "unknown", a.ag.RemoveHost(ctx, "nix"), api.NotFound, "no host")
	wantErr(t, "itself", a.ag.RemoveHost(ctx, "a"), api.Refused, "itself")
	wantErr(t, "alive", a.ag.RemoveHost(ctx, "b"), api.Refused, "is alive")

	b.off()
	b.killVM("v1", true)
	eventually(t, "b is silent", 30*time.Second, func() bool { h, err := a.ag.Host(ctx, "b"); return err == nil && h.State == api.HostSilent })
	wantErr(t, "in duplex", a.ag.RemoveHost(ctx, "b"), api.Refused, `VM "v1" has its second copy there`)
	if err := a.ag.shimOpHere(ctx, "v1", shimapi.Op{Op: "unprotect"}); err != nil { // as the shim does when its peer is lost
		t.Fatal(err)
	}
	a.await("v1", "alone", simplex)
	eventually(t, "b is let go", 30*time.Second, func() bool { return a.ag.RemoveHost(ctx, "b") == nil })
	if r := a.record("v1"); len(r.Replicas) != 1 {
		t.Errorf("replicas after the removal: %+v", r.Replicas)
	}
	if n := len(a.ag.store.Members()); n != 2 {
		t.Errorf("%d voters, want 2", n)
	}
	eventually(t, "b is a stranger", 20*time.Second, func() bool { return a.ag.stranger("b") })
	if _, err := a.ag.issueRenewal("b", nil, time.Now()); api.ClassOf(err) != api.Forbidden {
		t.Errorf("a removed host got a certificate: %v", err)
	}

	// A new machine under the old name takes its place by itself.
	joined(t, a, "b", config.RoleHost)
	a.await("v1", "protected by the new b", func(r model.Record) bool { return duplex(r) && r.Secondary.Host == "b" })
}
