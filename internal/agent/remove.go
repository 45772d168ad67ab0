package agent

import (
	"context"
	"fmt"
	"strings"

	"perdure/api"
	"perdure/internal/authority"
	"perdure/internal/model"
)

// RemoveHost implements httpapi.Service: it takes a host or the witness that
// does not come back out of the cluster. Everything that stands against it is
// found before anything is changed.
func (a *Agent) RemoveHost(ctx context.Context, name string) error {
	member, err := a.removable(ctx, name)
	if err != nil {
		return err
	}
	// Copies that nobody may start from go first: a removal that breaks off here
	// is repeated, and has cost nothing.
	for _, v := range a.store.VMs() {
		_, err := a.change(ctx, v.Spec.Name, func(r model.Record) (model.Record, error) {
			if why := needs(r, name); why != "" {
				return r, api.Errorf(api.Refused, "host %s cannot be removed: VM %q %s", name, r.VM, why)
			}
			if _, has := r.Replicas[name]; !has {
				return r, nil
			}
			return authority.Discard(r, name)
		})
		if err != nil {
			return refusal(v.Spec.Name, err)
		}
	}
	if member != 0 {
		if err := a.store.RemoveMember(ctx, member); err != nil {
			return api.Errorf(api.Refused, "the cluster store does not let host %s go: %w", name, err).
				WithAction("bring the other voters back first: without %s all of the rest may be needed for a majority", name)
		}
	}
	if err := a.store.DeleteHost(ctx, name); err != nil {
		return storeError("", err)
	}
	a.log.Info("host removed", "name", name, "by", api.Actor(ctx))
	return nil
}

// removable checks everything that can be checked beforehand, and returns the
// host's member of the store, 0 if it has none.
func (a *Agent) removable(ctx context.Context, name string) (uint64, error) {
	if name == a.cfg.Name {
		return 0, api.Errorf(api.Refused, "host %s cannot remove itself", name).WithAction("ask another host (perdure --server)")
	}
	if _, err := a.store.Cluster(ctx); err != nil { // linearizable: what follows is not a minority's view
		return 0, storeError("", err)
	}
	h, known := a.hostKnown(name)
	var member, left, up = uint64(0), 0, 0
	for _, m := range a.store.Members() {
		switch {
		case m.Name == name:
			member = m.ID
			known = true
		case m.Learner || m.Name == "":
		default:
			left++
			if m.Up || m.Self {
				up++
			}
		}
	}
	switch {
	case !known:
		return 0, api.Errorf(api.NotFound, "there is no host %q", name)
	case h.Alive:
		return 0, api.Errorf(api.Refused, "host %s is alive", name).
			WithAction("move its VMs away, stop its agent, and repeat this; its state directory may be removed afterwards")
	}
	var why []string
	for _, v := range a.store.VMs() {
		if w := needs(v.Record.Record, name); w != "" {
			why = append(why, fmt.Sprintf("VM %q %s", v.Spec.Name, w))
		}
	}
	if len(why) > 0 {
		return 0, api.Errorf(api.Refused, "host %s is still needed: %s", name, strings.Join(why, "; ")).
			WithAction("go on with such a VM on another host (perdure vm takeover NAME --on HOST, or perdure vm start --on HOST), or delete it (perdure vm delete --force)")
	}
	if up <= left/2 {
		return 0, api.Errorf(api.Refused, "without %s the cluster would have %d voters, of which only %d answer: that is no majority", name, left, up).
			WithAction("bring the other voters back first")
	}
	return member, nil
}

// needs says what a VM still needs a host for, or "".
func needs(r model.Record, host string) string {
	live := r.Mode != model.ModeStopped
	switch {
	case live && r.Primary.Host == host:
		return fmt.Sprintf("should run there (mode %s)", r.Mode)
	case live && r.Secondary.Host == host:
		return fmt.Sprintf("has its second copy there (mode %s)", r.Mode)
	case r.Replicas[host].State != model.UpToDate:
		return ""
	}
	for h, rep := range r.Replicas {
		if h != host && rep.State == model.UpToDate {
			return "has a good copy of its disks there; once started on host " + h + " it does not need that any more"
		}
	}
	return "has its only good copy there"
}
