package agent

import (
	"context"
	"fmt"
	"slices"
	"sort"
	"sync"
	"time"

	"perdure/api"
	"perdure/internal/clusterstore"
	"perdure/internal/model"
	"perdure/internal/shimapi"
)

const (
	statusFresh = 100 * time.Millisecond // a live status is asked for at most so often
	statusSilly = time.Second            // a host that did not answer is not asked again for so long
)

// statusCache keeps the last live word about each VM for a moment, so that many
// callers cost one question.
type statusCache struct {
	mu sync.Mutex
	by map[string]*statusEntry
}

type statusEntry struct {
	ask  sync.Mutex // one question at a time
	mu   sync.Mutex
	vm   *api.VM // nil: nobody answered
	at   time.Time
	last time.Time // when a shim was heard last
}

func newStatusCache() *statusCache { return &statusCache{by: map[string]*statusEntry{}} }

func (c *statusCache) entry(vm string) *statusEntry {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.by[vm]
	if e == nil {
		e = &statusEntry{}
		c.by[vm] = e
	}
	return e
}

// drop makes the next caller ask anew.
func (c *statusCache) drop(vm string) {
	e := c.entry(vm)
	e.mu.Lock()
	e.at = time.Time{}
	e.mu.Unlock()
}

func (e *statusEntry) fresh() (*api.VM, time.Time, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	limit := statusFresh
	if e.vm == nil {
		limit = statusSilly
	}
	return e.vm, e.last, time.Since(e.at) < limit
}

// view puts together what is known of a VM. The state is what a shim says now;
// where none answers it is unknown, whatever was heard before.
func (a *Agent) view(ctx context.Context, v clusterstore.VMView) api.VM {
	rec := v.Record.Record
	out := api.FromRecord(v.Spec, rec)
	out.RecordAsOf = time.Now()
	if !a.store.Quorum() {
		out.RecordAsOf = a.store.AsOf()
	}
	e := a.statuses.entry(v.Spec.Name)
	live, last, ok := e.fresh()
	if !ok || live != nil && live.Term != rec.Term {
		live, last = a.askLive(ctx, e, v)
	}
	out.StateAsOf = last
	if live != nil {
		mergeLive(&out, *live)
	}
	if w := a.workerOf(v.Spec.Name); w != nil {
		out.Problems = append(out.Problems, w.problems()...)
	}
	out.Problems = append(out.Problems, a.vmProblems(v, out.State)...)
	dedupe(&out)
	return out
}

// askLive asks the shim of the record's primary, through its agent where that
// is another host.
func (a *Agent) askLive(ctx context.Context, e *statusEntry, v clusterstore.VMView) (*api.VM, time.Time) {
	e.ask.Lock()
	defer e.ask.Unlock()
	if live, last, ok := e.fresh(); ok && (live == nil || live.Term == v.Record.Record.Term) {
		return live, last
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), peerTimeout)
	defer cancel()
	live, err := a.live(ctx, v)
	e.mu.Lock()
	defer e.mu.Unlock()
	e.at = time.Now()
	e.vm = nil
	if err == nil {
		e.vm = live
		if !live.StateAsOf.IsZero() {
			e.last = live.StateAsOf
		}
	}
	return e.vm, e.last
}

func (a *Agent) live(ctx context.Context, v clusterstore.VMView) (*api.VM, error) {
	rec := v.Record.Record
	host := rec.Primary.Host
	if host == "" || rec.Mode == model.ModeStopped {
		vm := api.FromRecord(v.Spec, rec)
		return &vm, nil
	}
	if host != a.cfg.Name {
		p, _, err := a.peer(host)
		if err != nil {
			return nil, err
		}
		vm, err := p.api.VM(api.WithForwarded(ctx), v.Spec.Name)
		if err != nil {
			return nil, err
		}
		return &vm, nil
	}
	return a.liveHere(ctx, v)
}

// liveHere asks this host's own shim.
func (a *Agent) liveHere(ctx context.Context, v clusterstore.VMView) (*api.VM, error) {
	rec := v.Record.Record
	vm := api.FromRecord(v.Spec, rec)
	c := a.shim(v.Spec.Name)
	defer c.Close()
	st, err := c.Status(ctx)
	if err != nil {
		if rec.Mode == model.ModeStarting {
			vm.State = model.StateStarting // granted to this host, whose agent is answering
		}
		return &vm, nil
	}
	fromShim(&vm, rec, st)
	if w := a.workerOf(v.Spec.Name); w != nil {
		vm.Problems = append(vm.Problems, w.problems()...)
	}
	return &vm, nil
}

// fromShim takes over what a shim says of itself. A shim that is not the
// record's primary cannot say that the VM runs.
func fromShim(vm *api.VM, rec model.Record, st shimapi.Status) {
	vm.StateAsOf = time.Now()
	switch {
	case st.Role == shimapi.RolePrimary && rec.Primary.Run != "" && st.Run == rec.Primary.Run:
		vm.State = st.State
	case rec.Mode == model.ModeStarting:
		vm.State = model.StateStarting
	}
	if st.Term > vm.Term && st.Run == rec.Primary.Run {
		// The shim has read a newer record than this host's copy.
		vm.Mode, vm.Term = st.Mode, st.Term
	}
	vm.Epoch, vm.Checkpoint, vm.GuestMS = st.Epoch, st.Checkpoint, st.GuestMS
	vm.Sync = append(vm.Sync, st.Sync...)
	addVerified(vm.Disks, st.Verify)
	if c := st.Change; c != nil {
		vm.LevelChange = &api.LevelChange{From: c.From, To: c.To, Begun: c.Begun, Ended: c.Ended, Error: c.Error, BlackoutMS: c.BlackoutMS,
			Progress: model.Progress{What: "memory", Done: c.Done, Total: c.Total, ETASeconds: -1}}
		if spent := time.Since(c.Begun).Seconds(); c.Done > 0 && !c.Ended {
			vm.LevelChange.Progress.ETASeconds = spent * float64(c.Total-c.Done) / float64(c.Done)
		}
	}
	vm.Problems = append(vm.Problems, st.Problems...)
	for _, l := range st.Links {
		vm.Links = append(vm.Links, api.PairLink{Index: l.Index, Up: l.Up, RTTMS: l.RTTMS, Sent: l.Sent, Recv: l.Recv})
	}
}

// mergeLive lays what the primary's host said over what the local copy of the
// record says.
func mergeLive(out *api.VM, live api.VM) {
	if live.Term < out.Term && live.State != model.StateStopped {
		return // said of an older record
	}
	if live.Term > out.Term {
		out.Mode, out.Primary, out.Secondary, out.PrimaryRun, out.SecondaryRun = live.Mode, live.Primary, live.Secondary, live.PrimaryRun, live.SecondaryRun
		out.Term, out.Survivor, out.Branch, out.Reason, out.Wanted = live.Term, live.Survivor, live.Branch, live.Reason, live.Wanted
		out.Disks = live.Disks
	}
	out.State, out.Epoch, out.Checkpoint, out.GuestMS = live.State, live.Epoch, live.Checkpoint, live.GuestMS
	keepVerified(out.Disks, live.Disks)
	out.Sync, out.Links, out.LevelChange = orEmpty(live.Sync), orEmpty(live.Links), live.LevelChange
	out.Problems = append(out.Problems, live.Problems...)
}

func orEmpty[T any](s []T) []T {
	if s == nil {
		return []T{}
	}
	return s
}

func dedupe(vm *api.VM) {
	seen := map[string]bool{}
	out := []model.Problem{}
	for _, p := range vm.Problems {
		if key := p.Code + "\x00" + p.Text; !seen[key] {
			seen[key] = true
			out = append(out, p)
		}
	}
	sort.SliceStable(out, func(i, j int) bool { return out[i].Code < out[j].Code })
	vm.Problems = out
}

// vmProblems names what only the cluster as a whole shows.
func (a *Agent) vmProblems(v clusterstore.VMView, state model.RunState) []model.Problem {
	rec := v.Record.Record
	var out []model.Problem
	if state == model.StateUnknown {
		out = append(out, model.Problem{Code: "host-silent", Severity: model.Critical,
			Text: fmt.Sprintf("host %s, which should run the VM, does not answer", rec.Primary.Host), Action: "look after the host; nothing is known of the VM until it answers"})
	}
	if !a.store.Quorum() {
		out = append(out, model.Problem{Code: "no-quorum", Severity: model.Critical,
			Text: "the cluster has no majority of voters: what is shown of the record may be old, and no change can be decided", Action: "bring back enough hosts or the witness"})
	}
	if v.Unprotected && v.Spec.Level.HasSecondary() && rec.Mode == model.ModeSimplex {
		out = append(out, model.Problem{Code: "protection-off", Severity: model.Warning,
			Text: "the second copy was given up by a person", Action: "perdure vm protect " + v.Spec.Name})
	}
	out = append(out, diskProblems(a.store.Hosts(), rec)...)
	if rec.Mode != model.ModeStopped {
		out = append(out, a.nicProblems(v)...)
	}
	out = append(out, splitProblems(v)...)
	return out
}

// nicProblems names what is wrong with the bridges that a VM uses where it runs.
func (a *Agent) nicProblems(v clusterstore.VMView) (out []model.Problem) {
	for _, h := range a.store.Hosts() {
		if h.Name != v.Record.Record.Primary.Host {
			continue
		}
		nets := h.Networks
		if h.Name == a.cfg.Name {
			nets = a.nets.now()
		}
		for _, n := range nets {
			if slices.ContainsFunc(v.Spec.NICs, func(c model.NICSpec) bool { return c.Bridge == n.Bridge }) {
				out = append(out, n.Problems...)
			}
		}
	}
	return out
}

func (a *Agent) clusterProblems() []model.Problem {
	out := []model.Problem{}
	if !a.store.Quorum() {
		out = append(out, model.Problem{Code: "no-quorum", Severity: model.Critical,
			Text: "no majority of voters answers: VMs go on, nothing can be started, taken over or changed", Action: "bring back enough hosts or the witness"})
	}
	voters := 0
	for _, m := range a.store.Members() {
		if m.Learner || m.Name == "" {
			continue
		}
		voters++
		if m.LostFor >= voterLost {
			out = append(out, model.Problem{Code: "voter-lost", Severity: model.Warning,
				Text: fmt.Sprintf("voter %s does not answer", m.Name), Action: "bring it back; with one more loss the cluster may be without a majority"})
		}
	}
	if voters == 2 {
		out = append(out, model.Problem{Code: "no-witness", Severity: model.Warning,
			Text:   "two hosts without a witness: after the loss of one, the primary's side goes on; the other never takes over by itself",
			Action: "add a witness: perdure token create --witness, then perdure witness --join TOKEN on any small machine"})
	}
	if left := a.leftovers(); len(left) > 0 {
		out = append(out, model.Problem{Code: "leftovers", Severity: model.Warning,
			Text: fmt.Sprintf("%d directories of earlier VMs were moved to %s", len(left), a.cfg.Path("left")), Action: "look whether they are still needed, and remove them"})
	}
	return out
}

func hostProblems(h clusterstore.HostView) []model.Problem {
	out := []model.Problem{}
	if h.Role == "host" && h.QEMU == "" {
		out = append(out, model.Problem{Code: "no-qemu", Severity: model.Critical, Text: "no QEMU that can be used was found on " + h.Name, Action: "run perdure doctor there"})
	}
	if left := time.Until(h.CertificateEnds); !h.CertificateEnds.IsZero() && left < certificateWarn {
		out = append(out, model.Problem{Code: "certificate-ends", Severity: model.Critical,
			Text:   fmt.Sprintf("the certificate of %s ends on %s and could not be renewed", h.Name, h.CertificateEnds.Format(time.DateOnly)),
			Action: "let a host that holds the authority's key run beside it; the log of its agent says why it was not renewed"})
	}
	if h.Tracking == clusterstore.TrackingFailed {
		out = append(out, model.Problem{Code: "tracking-failed", Severity: model.Critical,
			Text:   "no VM is protected at level ft on " + h.Name + ": the proof of dirty tracking failed: " + h.TrackingText,
			Action: "use another kernel or QEMU there (perdure doctor tries again), and report these two and the processor"})
	}
	for _, n := range h.Networks {
		out = append(out, n.Problems...)
	}
	return out
}
