package agent

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"net/http"
	"sync"
	"time"

	"perdure/api"
	"perdure/internal/clusterstore"
	"perdure/internal/model"
	"perdure/internal/shimapi"
)

const (
	// verifyLook is the distance in which it is looked whether a verify is due.
	verifyLook = time.Minute
	// verifyAgain is how long after its end an interrupted one goes on.
	verifyAgain = 10 * time.Minute
)

// VerifyVM implements httpapi.Service.
func (a *Agent) VerifyVM(ctx context.Context, name string, req api.VerifyVM) error {
	if _, err := a.find(ctx, name); err != nil {
		return err
	}
	switch {
	case req.Schedule != nil:
		if err := a.store.SetVerifySchedule(ctx, name, *req.Schedule); err != nil {
			return storeError(name, err)
		}
		return nil
	case req.Stop:
		return a.primaryOp(ctx, name, shimapi.Op{Op: "verify-stop"})
	}
	v, err := json.Marshal(shimapi.VerifyOptions{Disk: req.Disk, Rate: req.Rate})
	if err != nil {
		return api.Errorf(api.Internal, "ask for a verify: %w", err)
	}
	return a.primaryOp(ctx, name, shimapi.Op{Op: "verify", Value: string(v)})
}

// VerifyStatus implements httpapi.Service. Every host that held a replica may have
// the last report: the newest counts.
func (a *Agent) VerifyStatus(ctx context.Context, name string) (api.VerifyStatus, error) {
	v, err := a.find(ctx, name)
	if err != nil {
		return api.VerifyStatus{}, err
	}
	rec := v.Record.Record
	hosts := map[string]bool{rec.Primary.Host: true, rec.Secondary.Host: true}
	for h := range rec.Replicas {
		hosts[h] = true
	}
	delete(hosts, "")
	var mu sync.Mutex
	var wg sync.WaitGroup
	var last *model.VerifyReport
	for h := range hosts {
		wg.Go(func() {
			r, err := a.verifyOn(ctx, h, name)
			if err != nil || r == nil {
				return // a host that does not answer has nothing newer that could be shown
			}
			mu.Lock()
			defer mu.Unlock()
			if last == nil || newerReport(r, last) || h == rec.Primary.Host && !newerReport(last, r) {
				last = r
			}
		})
	}
	wg.Wait()
	st := api.VerifyStatus{VM: name, Report: last, Schedule: v.Verify}
	st.Schedule.Rate = st.Schedule.RateOr(model.DefaultVerifyRate)
	st.Schedule.EverySeconds = int64(v.Verify.Every() / time.Second)
	if v.Verify.EverySeconds < 0 {
		st.Schedule.EverySeconds = -1
	}
	if every := v.Verify.Every(); every > 0 && len(v.Spec.Disks) > 0 {
		st.Due = verifiedSince(last, v.Spec).Add(every)
	}
	return st, nil
}

func newerReport(r, than *model.VerifyReport) bool {
	if r.Started.Equal(than.Started) {
		return r.Reads.Last.After(than.Reads.Last)
	}
	return r.Started.After(than.Started)
}

func (a *Agent) verifyOn(ctx context.Context, host, vm string) (*model.VerifyReport, error) {
	ctx, cancel := context.WithTimeout(ctx, peerTimeout)
	defer cancel()
	if host == a.cfg.Name {
		return a.verifyHere(ctx, vm)
	}
	var r *model.VerifyReport
	err := a.ask(ctx, host, http.MethodGet, "verify", vm, nil, &r)
	return r, err
}

// verifyHere is the last report that this host has; nil: none.
func (a *Agent) verifyHere(ctx context.Context, vm string) (*model.VerifyReport, error) {
	c := a.shim(vm)
	defer c.Close()
	st, err := c.Status(ctx)
	if err == nil && st.Role == shimapi.RolePrimary {
		return st.Verify, nil
	}
	r, err := shimapi.ReadVerifyReport(a.cfg.VMDir(vm))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case err != nil:
		return nil, err
	}
	if r.State == model.VerifyRunning { // by a shim that is not there any more
		r.State, r.Why = model.VerifyInterrupted, "the VM's instance ended"
	}
	return &r, nil
}

// verifiedSince is since when all disks of a VM are known to have been verified.
func verifiedSince(r *model.VerifyReport, spec model.VMSpec) time.Time {
	var oldest time.Time
	for _, d := range spec.Disks {
		at := spec.Created
		if r != nil {
			for _, v := range r.Disks {
				if v.Disk == d.ID && !v.Ended.IsZero() {
					at = v.Ended
				}
			}
		}
		if oldest.IsZero() || at.Before(oldest) {
			oldest = at
		}
	}
	return oldest
}

// verifyDue decides whether a scheduled verify is to be started now. One replica
// alone says less than a comparison, so a VM that is not protected now is given time.
func verifyDue(r *model.VerifyReport, v clusterstore.VMView, now time.Time) bool {
	every, rec := v.Verify.Every(), v.Record.Record
	if every == 0 || len(v.Spec.Disks) == 0 || rec.Mode != model.ModeSimplex && rec.Mode != model.ModeDuplex {
		return false
	}
	if r != nil && r.State == model.VerifyInterrupted {
		wait := min(verifyAgain, every)
		if r.Why == model.VerifyStoppedByPerson {
			wait = every
		}
		if now.Sub(r.Ended) < wait {
			return false
		}
	}
	age := now.Sub(verifiedSince(r, v.Spec))
	if v.Spec.Level.HasSecondary() && rec.Mode != model.ModeDuplex {
		return age >= 2*every
	}
	return age >= every
}

// scheduleVerify starts a verify of the VM here when it is due, one on this host at a time.
func (w *worker) scheduleVerify(ctx context.Context, v clusterstore.VMView) {
	now := time.Now()
	if now.Before(w.nextVerify) {
		return
	}
	w.nextVerify = now.Add(verifyLook)
	sctx, cancel := context.WithTimeout(ctx, peerTimeout)
	defer cancel()
	r, err := w.a.verifyHere(sctx, w.vm)
	if err != nil {
		w.a.log.Warn("the last report of verify cannot be read", "vm", w.vm, "error", err)
		r = nil
	}
	running := r != nil && r.State == model.VerifyRunning
	if !w.a.verifying.turn(w.vm, running, now) || running || !verifyDue(r, v, now) {
		return
	}
	opts, err := json.Marshal(shimapi.VerifyOptions{Rate: v.Verify.RateOr(model.DefaultVerifyRate), Scheduled: true})
	if err == nil {
		err = w.a.shimOpHere(ctx, w.vm, shimapi.Op{Op: "verify", Value: string(opts)})
	}
	if err != nil {
		w.a.log.Info("a verify that is due cannot be started", "vm", w.vm, "error", err)
		return
	}
	w.a.verifying.turn(w.vm, true, now)
}

// verifying keeps scheduled verifies of one host from running side by side.
type verifying struct {
	mu sync.Mutex
	vm string    // the one that runs
	at time.Time // when that was seen last
}

// turn notes whether a VM is being verified, and reports whether it may be.
func (t *verifying) turn(vm string, running bool, now time.Time) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.vm == vm && !running || now.Sub(t.at) > 3*verifyLook {
		t.vm = ""
	}
	if running && (t.vm == "" || t.vm == vm) {
		t.vm, t.at = vm, now
	}
	return t.vm == "" || t.vm == vm
}

// addVerified puts what a report says of each disk beside it.
func addVerified(disks []api.Disk, r *model.VerifyReport) {
	if r == nil {
		return
	}
	for i := range disks {
		for n := range r.Disks {
			if r.Disks[n].Disk == disks[i].ID {
				disks[i].Verified = &r.Disks[n]
			}
		}
	}
}

// keepVerified takes over what another host's word says of the same disks.
func keepVerified(disks, from []api.Disk) {
	for i := range disks {
		for n := range from {
			if from[n].ID == disks[i].ID && from[n].Verified != nil {
				disks[i].Verified = from[n].Verified
			}
		}
	}
}
