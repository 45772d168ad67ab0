package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"perdure/api"
	"perdure/internal/authority"
	"perdure/internal/clusterstore"
	"perdure/internal/config"
	"perdure/internal/model"
	"perdure/internal/shimapi"
)

// opTimeout bounds an operation asked of a shim, wherever it runs.
const opTimeout = 30 * time.Second

// VMs implements httpapi.Service.
func (a *Agent) VMs(ctx context.Context) ([]api.VM, error) {
	views := a.store.VMs()
	out := make([]api.VM, len(views))
	var wg sync.WaitGroup
	for i, v := range views {
		wg.Go(func() { out[i] = a.view(ctx, v) })
	}
	wg.Wait()
	return out, nil
}

// VM implements httpapi.Service.
func (a *Agent) VM(ctx context.Context, name string) (api.VM, error) {
	v, err := a.find(ctx, name)
	if err != nil {
		return api.VM{}, err
	}
	if api.Forwarded(ctx) {
		// Another agent asks: only what this host itself holds counts.
		if v.Record.Record.Primary.Host != a.cfg.Name || v.Record.Record.Mode == model.ModeStopped {
			return api.FromRecord(v.Spec, v.Record.Record), nil
		}
		vm, err := a.liveHere(ctx, v)
		if err != nil {
			return api.VM{}, err
		}
		return *vm, nil
	}
	return a.view(ctx, v), nil
}

// find returns the local copy of a VM; one that is not there yet is looked for
// in the store, so that a VM can be seen as soon as it was made.
func (a *Agent) find(ctx context.Context, name string) (clusterstore.VMView, error) {
	if v, ok := a.store.VM(name); ok {
		return v, nil
	}
	spec, err := a.store.Spec(ctx, name)
	if err != nil {
		return clusterstore.VMView{}, storeError(name, err)
	}
	rec, err := a.store.Record(ctx, name)
	if err != nil {
		return clusterstore.VMView{}, storeError(name, err)
	}
	return clusterstore.VMView{Spec: spec, Record: rec}, nil
}

// StartVM implements httpapi.Service.
func (a *Agent) StartVM(ctx context.Context, name string, req api.StartVM) error {
	v, err := a.find(ctx, name)
	if err != nil {
		return err
	}
	if a.machine.Load() == nil && a.cfg.Role == config.RoleHost && (req.Host == "" || req.Host == a.cfg.Name) {
		a.awaitMachine(ctx) //nolint:errcheck // what is known then is judged below
	}
	_, err = a.change(ctx, name, func(rec model.Record) (model.Record, error) {
		if rec.Mode != model.ModeStopped {
			return rec, api.Errorf(api.Conflict, "VM %q is not stopped (mode %s on %s)", name, rec.Mode, rec.Primary.Host)
		}
		host, err := a.startHost(v.Spec, rec, req.Host)
		if err != nil {
			return rec, err
		}
		return authority.Start(rec, host)
	})
	if err != nil {
		return refusal(name, err)
	}
	return nil
}

// startHost chooses where a stopped VM starts, or says why nowhere.
func (a *Agent) startHost(spec model.VMSpec, rec model.Record, asked string) (string, error) {
	hosts := map[string]clusterstore.HostView{}
	for _, h := range a.store.Hosts() {
		hosts[h.Name] = h
	}
	if a.cfg.Role == config.RoleHost { // what it knows of itself is newer
		hosts[a.cfg.Name] = clusterstore.HostView{HostInfo: a.hostInfo(), Alive: true}
	}
	why := func(name string) error {
		h, known := hosts[name]
		switch {
		case !known:
			return api.Errorf(api.NotFound, "there is no host %q", name)
		case rec.Replicas[name].State != model.UpToDate:
			return api.Errorf(api.Refused, "VM %q cannot start on %s: its disks there are %s, only UpToDate ones may be started from", spec.Name, name, orNone(string(rec.Replicas[name].State)))
		case !h.Alive:
			return api.Errorf(api.Unavailable, "host %s gives no sign of life", name)
		case h.QEMU == "":
			return api.Errorf(api.Refused, "host %s has no QEMU that can be used (it looks for one again now and then); run perdure doctor there", name)
		case spec.Accel == "kvm" && h.Accel != "kvm":
			return api.Errorf(api.Refused, "VM %q needs accelerator kvm, host %s offers %s", spec.Name, name, h.Accel)
		case h.MemoryTotal > 0 && h.MemoryFree < spec.Memory:
			return api.Errorf(api.Refused, "host %s has %s of memory free, VM %q needs %s", name, api.FormatSize(h.MemoryFree), spec.Name, api.FormatSize(spec.Memory))
		}
		return nil
	}
	if asked != "" {
		return asked, why(asked)
	}
	var first error
	for _, n := range preferred(rec) {
		err := why(n)
		if err == nil {
			return n, nil
		}
		if first == nil {
			first = err
		}
	}
	if first == nil {
		first = api.Errorf(api.Refused, "VM %q has no replica that is UpToDate", spec.Name)
	}
	return "", first
}

// preferred lists hosts with a replica that is UpToDate, the last primary first.
func preferred(rec model.Record) []string {
	var out []string
	if rec.Replicas[rec.Primary.Host].State == model.UpToDate {
		out = append(out, rec.Primary.Host)
	}
	for _, h := range sortedKeys(rec.Replicas) {
		if h != rec.Primary.Host && rec.Replicas[h].State == model.UpToDate {
			out = append(out, h)
		}
	}
	return out
}

// StopVM implements httpapi.Service.
func (a *Agent) StopVM(ctx context.Context, name string) error {
	return a.primaryOp(ctx, name, shimapi.Op{Op: "shutdown"})
}

// KillVM implements httpapi.Service. The shim ends the instance in order where
// it can; where it does not answer the record is changed over its head, which
// ends its right to run, and what is left is ended by its host's agent.
func (a *Agent) KillVM(ctx context.Context, name string) error {
	v, err := a.find(ctx, name)
	if err != nil {
		return err
	}
	if v.Record.Record.Mode == model.ModeStopped {
		return api.Errorf(api.Conflict, "VM %q is stopped already", name)
	}
	octx, cancel := context.WithTimeout(ctx, 5*time.Second)
	asked := a.primaryOp(octx, name, shimapi.Op{Op: "poweroff"})
	cancel()
	if asked == nil && a.awaitStopped(ctx, name, 5*time.Second) {
		return nil
	}
	_, err = a.change(ctx, name, func(rec model.Record) (model.Record, error) {
		if rec.Mode == model.ModeStopped {
			return rec, nil
		}
		return authority.PowerOff(rec)
	})
	if err != nil {
		return refusal(name, err)
	}
	a.event(name, "killed", 0, "the VM was ended by decree, its shim did not do it (%v)", asked)
	return nil
}

func (a *Agent) awaitStopped(ctx context.Context, name string, limit time.Duration) bool {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		changed := a.store.Changed()
		if v, ok := a.store.VM(name); !ok || v.Record.Record.Mode == model.ModeStopped {
			return true
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return false
		}
	}
}

// PauseVM implements httpapi.Service.
func (a *Agent) PauseVM(ctx context.Context, name string) error {
	return a.setPaused(ctx, name, true)
}

// ResumeVM implements httpapi.Service.
func (a *Agent) ResumeVM(ctx context.Context, name string) error {
	return a.setPaused(ctx, name, false)
}

// setPaused writes what a person wants first: a takeover at this moment then
// knows it too.
func (a *Agent) setPaused(ctx context.Context, name string, paused bool) error {
	op, want := shimapi.Op{Op: "resume"}, model.WantRunning
	if paused {
		op, want = shimapi.Op{Op: "pause"}, model.WantPaused
	}
	if _, err := a.change(ctx, name, func(rec model.Record) (model.Record, error) {
		if rec.Mode == model.ModeStopped {
			return rec, api.Errorf(api.Conflict, "VM %q is stopped", name)
		}
		if rec.Wanted == want {
			return rec, nil
		}
		return authority.SetWanted(rec, want)
	}); err != nil {
		return refusal(name, err)
	}
	return a.primaryOp(ctx, name, op)
}

// ProtectVM implements httpapi.Service.
func (a *Agent) ProtectVM(ctx context.Context, name string, req api.ProtectVM) error {
	v, err := a.find(ctx, name)
	if err != nil {
		return err
	}
	if !v.Spec.Level.HasSecondary() {
		return api.Errorf(api.Refused, "VM %q is of level %s; only levels ca and ft have a second copy", name, v.Spec.Level)
	}
	if req.Host != "" {
		if err := a.checkHost(req.Host); err != nil {
			return err
		}
	}
	if err := a.store.SetUnprotected(ctx, name, req.Off); err != nil {
		return storeError(name, err)
	}
	rec := v.Record.Record
	switch {
	case rec.Mode == model.ModeStopped || rec.Mode == model.ModeStarting:
		return nil // noted for when it runs
	case req.Off && rec.Mode == model.ModeSimplex:
		return nil
	case req.Off:
		return a.primaryOp(ctx, name, shimapi.Op{Op: "unprotect"})
	case rec.Mode != model.ModeSimplex:
		if req.Host != "" && req.Host != rec.Secondary.Host {
			return api.Errorf(api.Conflict, "VM %q has its second copy on %s already; give it up first (--off)", name, rec.Secondary.Host)
		}
		return nil
	}
	host, err := a.chooseSecondary(v, req.Host)
	if err != nil {
		return err
	}
	pctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	if err := a.ask(pctx, host, "POST", "prepare", name, nil, nil); err != nil {
		return err
	}
	err = a.primaryOp(ctx, name, shimapi.Op{Op: "protect", Host: host})
	if err == nil {
		return nil
	}
	// The agent of the primary's host protects by itself, too, and may have been first.
	if cur, rerr := a.store.Record(ctx, name); rerr == nil && cur.Record.Secondary.Host != "" && (req.Host == "" || cur.Record.Secondary.Host == req.Host) {
		return nil
	}
	return err
}

func (a *Agent) chooseSecondary(v clusterstore.VMView, asked string) (string, error) {
	if asked != "" {
		return asked, a.checkSecondary(v, asked)
	}
	hosts, why := a.candidates(v)
	if len(hosts) == 0 {
		return "", api.Errorf(api.Refused, "VM %q cannot be protected: %s", v.Spec.Name, joinOr(why, "there is no other host"))
	}
	return hosts[0], nil
}

// checkHost refuses a name that is no host's which runs VMs, whatever state the
// VM is in.
func (a *Agent) checkHost(name string) error {
	for _, h := range a.store.Hosts() {
		if h.Name == name && h.Role != string(config.RoleHost) {
			return api.Errorf(api.Refused, "%s is a witness and runs no VMs", name)
		}
		if h.Name == name {
			return nil
		}
	}
	return api.Errorf(api.NotFound, "there is no host %q", name)
}

func (a *Agent) checkSecondary(v clusterstore.VMView, host string) error {
	if err := a.checkHost(host); err != nil {
		return err
	}
	var own clusterstore.HostView
	for _, h := range a.store.Hosts() {
		if h.Name == v.Record.Record.Primary.Host {
			own = h
		}
	}
	for _, h := range a.store.Hosts() {
		if h.Name != host {
			continue
		}
		if why := untracked(own.HostInfo); why != "" {
			return api.Errorf(api.Refused, "host %s %s", own.Name, why)
		}
		if why := a.unfit(v, own, h); why != "" {
			return api.Errorf(api.Refused, "host %s %s", host, why)
		}
		return nil
	}
	return api.Errorf(api.NotFound, "there is no host %q", host)
}

// SwitchoverVM implements httpapi.Service.
func (a *Agent) SwitchoverVM(ctx context.Context, name string, req api.SwitchoverVM) error {
	v, err := a.find(ctx, name)
	if err != nil {
		return err
	}
	if req.Host != "" {
		if err := a.checkHost(req.Host); err != nil {
			return err
		}
	}
	rec := v.Record.Record
	if rec.Mode != model.ModeDuplex {
		return api.Errorf(api.Conflict, "VM %q is not duplex (mode %s): there is no second copy to switch to", name, rec.Mode)
	}
	if v.Spec.Level == model.LevelCA {
		return api.Errorf(api.Refused, "VM %q is of level ca, which keeps no memory of the guest on the other host: a planned move would cut the guest's power", name).
			WithAction("shut the guest down (perdure vm stop %s), then start the VM on host %s (perdure vm start %s --host %s)", name, rec.Secondary.Host, name, rec.Secondary.Host)
	}
	if req.Host != "" && req.Host != rec.Secondary.Host {
		return api.Errorf(api.Refused, "VM %q can be switched to its secondary's host %s only, not to %s", name, rec.Secondary.Host, req.Host)
	}
	return a.primaryOp(ctx, name, shimapi.Op{Op: "switchover", Host: rec.Secondary.Host})
}

// primaryOp asks the shim of the record's primary, here or through the agent of
// its host, which passes nothing on.
func (a *Agent) primaryOp(ctx context.Context, name string, op shimapi.Op) error {
	v, err := a.find(ctx, name)
	if err != nil {
		return err
	}
	rec := v.Record.Record
	if rec.Mode == model.ModeStopped || rec.Primary.Host == "" {
		return api.Errorf(api.Conflict, "VM %q is stopped", name)
	}
	return a.opOn(ctx, rec.Primary.Host, name, op)
}

// opOn asks the shim of a VM on a host.
func (a *Agent) opOn(ctx context.Context, host, name string, op shimapi.Op) error {
	ctx, cancel := context.WithTimeout(ctx, opTimeout)
	defer cancel()
	if host == a.cfg.Name {
		return a.shimOpHere(ctx, name, op)
	}
	defer a.statuses.drop(name)
	return a.ask(ctx, host, "POST", "op", name, op, nil)
}

// shimOpHere asks this host's shim of a VM.
func (a *Agent) shimOpHere(ctx context.Context, name string, op shimapi.Op) error {
	c := a.shim(name)
	defer c.Close()
	defer a.statuses.drop(name)
	if _, err := c.Op(ctx, op); err != nil {
		if _, serr := os.Stat(a.vmFile(name, shimapi.SocketFile)); errors.Is(serr, os.ErrNotExist) {
			return api.Errorf(api.Unavailable, "VM %q has no shim on host %s now", name, a.cfg.Name)
		}
		if ctx.Err() != nil {
			return api.Errorf(api.Timeout, "the shim of VM %q on host %s did not answer in time", name, a.cfg.Name)
		}
		return api.Errorf(api.Refused, "VM %q: %w", name, err)
	}
	return nil
}

// Console implements httpapi.Service.
func (a *Agent) Console(ctx context.Context, name string) (io.ReadWriteCloser, error) {
	v, err := a.find(ctx, name)
	if err != nil {
		return nil, err
	}
	rec := v.Record.Record
	if rec.Mode == model.ModeStopped || rec.Primary.Host == "" {
		return nil, api.Errorf(api.Conflict, "VM %q is stopped", name)
	}
	if rec.Primary.Host == a.cfg.Name {
		c := a.shim(name)
		conn, err := c.Console(ctx)
		if err != nil {
			return nil, api.Errorf(api.Unavailable, "console of VM %q: %w", name, err)
		}
		return conn, nil
	}
	if api.Forwarded(ctx) {
		return nil, api.Errorf(api.Unavailable, "VM %q moved to host %s meanwhile; ask again", name, rec.Primary.Host)
	}
	p, _, err := a.peer(rec.Primary.Host)
	if err != nil {
		return nil, err
	}
	conn, err := p.api.Console(api.WithForwarded(ctx), name)
	if err != nil {
		return nil, err
	}
	go a.closeWhenMoved(ctx, name, rec.Primary.Host, conn) // ends with the request
	return conn, nil
}

// closeWhenMoved ends a console that leads to a host when the VM runs on
// another: a host without power, or frozen, never says that it has ended.
func (a *Agent) closeWhenMoved(ctx context.Context, name, host string, conn io.Closer) {
	t := time.NewTicker(500 * time.Millisecond)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		if v, err := a.find(ctx, name); err == nil && v.Record.Record.Primary.Host != host {
			conn.Close()
			return
		}
	}
}

func joinOr(list []string, other string) string {
	if len(list) == 0 {
		return other
	}
	s := list[0]
	for _, x := range list[1:] {
		s += "; " + x
	}
	return s
}

// TakeoverRisk implements httpapi.Service.
func (a *Agent) TakeoverRisk(ctx context.Context, name, host string) (api.TakeoverRisk, error) {
	v, err := a.find(ctx, name)
	if err != nil {
		return api.TakeoverRisk{}, err
	}
	if _, _, err := a.peer(host); err != nil && host != a.cfg.Name {
		return api.TakeoverRisk{}, err
	}
	rec := v.Record.Record
	rep, has := rec.Replicas[host]
	r := api.TakeoverRisk{VM: name, Host: host, From: "nothing", Replica: rep.State, ReplicaTerm: rep.Term, RecordTerm: rec.Term,
		Primary: rec.Primary.Host, BehindMS: -1, Losses: []string{}}
	live := a.view(ctx, v)
	r.PrimaryAnswers = live.State != model.StateUnknown && live.State != model.StateStopped
	h, herr := a.holdsOn(ctx, host, name)
	memory := herr == nil && h.Shim && h.Run != "" && h.Run == string(rec.Secondary.Run) && rec.Secondary.Host == host
	switch {
	case rec.Primary.Host == host && rec.Mode != model.ModeStopped:
		return r, api.Errorf(api.Conflict, "host %s is the primary of VM %q already", host, name)
	case memory:
		r.Possible, r.From = true, "memory"
		r.Safe = rec.Mode == model.ModeDuplex && rec.Survivor == ""
		if rec.Survivor != "" {
			r.Losses = append(r.Losses, fmt.Sprintf("host %s may have gone on alone since the record was written: everything it did since then is lost", rec.Survivor))
		}
		if r.PrimaryAnswers {
			r.Losses = append(r.Losses, fmt.Sprintf("host %s runs the VM now and answers: it is ended, clients lose nothing if the pair is whole", rec.Primary.Host))
		}
	case has && rep.State == model.UpToDate:
		r.Possible, r.From = true, "disk"
		r.Safe = rec.Mode == model.ModeStopped
		if !r.Safe {
			r.Losses = append(r.Losses, "everything in the memory of the VM is lost; it boots anew from its disks as after a power failure",
				fmt.Sprintf("if host %s still runs the VM, what it has written since is lost for this branch", rec.Primary.Host))
		}
	case has && rep.State == model.Outdated:
		r.Possible, r.From = true, "disk"
		r.Losses = append(r.Losses, fmt.Sprintf("the disks on %s are as of term %d, the VM is at term %d: everything written in between is lost", host, rep.Term, rec.Term),
			"everything in the memory of the VM is lost; it boots anew from its disks as after a power failure")
	default:
		r.Losses = append(r.Losses, fmt.Sprintf("host %s holds nothing that could be gone on from (replica: %s)", host, orNone(string(rep.State))))
	}
	if herr != nil {
		r.Losses = append(r.Losses, fmt.Sprintf("host %s does not answer: what it holds is judged by the record only", host))
	}
	return r, nil
}

func (a *Agent) holdsOn(ctx context.Context, host, vm string) (holds, error) {
	ctx, cancel := context.WithTimeout(ctx, peerTimeout)
	defer cancel()
	if host == a.cfg.Name {
		return a.holds(ctx, vm)
	}
	var h holds
	err := a.ask(ctx, host, "GET", "holds", vm, nil, &h)
	return h, err
}

// TakeoverVM implements httpapi.Service.
func (a *Agent) TakeoverVM(ctx context.Context, name string, req api.TakeoverVM) error {
	v, err := a.find(ctx, name)
	if err != nil {
		return err
	}
	rec := v.Record.Record
	risk, err := a.TakeoverRisk(ctx, name, req.Host)
	switch {
	case err != nil:
		return err
	case !risk.Possible:
		return api.Errorf(api.Refused, "VM %q cannot go on on host %s: %s", name, req.Host, joinOr(risk.Losses, "it holds nothing of it"))
	case !risk.Safe && !req.Force:
		return api.Errorf(api.Refused, "a takeover of VM %q on host %s could lose something: %s", name, req.Host, joinOr(risk.Losses, "unknown")).
			WithAction("repeat with --force if that is borne")
	case risk.Safe && risk.From == "disk":
		return a.StartVM(ctx, name, api.StartVM{Host: req.Host})
	case risk.Safe && risk.PrimaryAnswers:
		return a.SwitchoverVM(ctx, name, api.SwitchoverVM{Host: req.Host})
	case !req.Force:
		return api.Errorf(api.Conflict, "host %s takes VM %q over by itself as soon as the cluster decides so", req.Host, name).
			WithAction("wait, or repeat with --force to decide it yourself")
	}
	a.event(name, "takeover-forced", rec.Term, "%s ordered host %s to go on from its %s; accepted: %s",
		orNone(api.Actor(ctx)), req.Host, risk.From, joinOr(risk.Losses, "nothing is lost as far as is known"))
	if risk.From == "memory" {
		return a.opOn(ctx, req.Host, name, shimapi.Op{Op: "takeover", Force: true})
	}
	_, err = a.change(ctx, name, func(r model.Record) (model.Record, error) {
		return authority.Force(r, req.Host, "", model.BranchID(randomID(8)))
	})
	if err != nil {
		return refusal(name, err)
	}
	return nil
}
