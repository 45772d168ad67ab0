package apitest

import (
	"context"
	"time"

	"perdure/api"
	"perdure/internal/model"
)

// VerifyVM implements httpapi.Service. What it finds is in f.Verified.
func (f *Fake) VerifyVM(_ context.Context, name string, req api.VerifyVM) error {
	return f.change("VerifyVM", name, req.Disk, func(vm *api.VM) error {
		if req.Schedule != nil {
			f.VerifySchedule = *req.Schedule
			return nil
		}
		if err := running(vm, "verify"); err != nil {
			return err
		}
		if r := f.Verified; r != nil && r.State == model.VerifyRunning {
			return api.Errorf(api.Refused, "VM %q: a verify is under way", name)
		}
		rate := req.Rate
		if rate == 0 {
			rate = model.AskedVerifyRate
		}
		f.Verified = &model.VerifyReport{Started: Epoch(), State: model.VerifyRunning, Host: vm.Primary, Peer: vm.Secondary, Rate: rate}
		for _, d := range vm.Disks {
			if req.Disk == "" || req.Disk == d.ID {
				f.Verified.Disks = append(f.Verified.Disks, model.VerifiedDisk{Disk: d.ID, Size: d.Size, Checked: d.Size / 2})
			}
		}
		if len(f.Verified.Disks) == 0 {
			f.Verified = nil
			return api.Errorf(api.Refused, "VM %q has no disk %q", name, req.Disk)
		}
		f.looks = 0
		return nil
	})
}

// VerifyStatus implements httpapi.Service; a verify is over at the third look.
func (f *Fake) VerifyStatus(_ context.Context, name string) (api.VerifyStatus, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.called("VerifyStatus", name); err != nil {
		return api.VerifyStatus{}, err
	}
	if _, err := f.vm(name); err != nil {
		return api.VerifyStatus{}, err
	}
	st := api.VerifyStatus{VM: name, Schedule: f.VerifySchedule}
	if r := f.Verified; r != nil {
		if f.looks++; f.looks >= 3 && r.State == model.VerifyRunning {
			r.State, r.Ended = model.VerifyDone, r.Started.Add(90*time.Second)
			for i := range r.Disks {
				r.Disks[i].Checked, r.Disks[i].Ended = r.Disks[i].Size, r.Ended
				if f.Finds != nil {
					f.Finds(&r.Disks[i])
				}
			}
		}
		c := *r
		c.Disks = append([]model.VerifiedDisk(nil), r.Disks...)
		st.Report = &c
	}
	if every := f.VerifySchedule.Every(); every > 0 {
		st.Due = Epoch().Add(every)
	}
	return st, nil
}

// SplitBrain implements httpapi.Service.
func (f *Fake) SplitBrain(_ context.Context, name string) (api.SplitBrain, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.called("SplitBrain", name); err != nil {
		return api.SplitBrain{}, err
	}
	vm, err := f.vm(name)
	if err != nil {
		return api.SplitBrain{}, err
	}
	s := f.Split
	s.VM, s.Primary, s.Running = name, vm.Primary, vm.Mode != model.ModeStopped
	return s, nil
}

// ResolveSplitBrain implements httpapi.Service: the VM is protected again at the second look.
func (f *Fake) ResolveSplitBrain(_ context.Context, name string, req api.ResolveSplitBrain) error {
	return f.change("ResolveSplitBrain", name, req.Discard, func(vm *api.VM) error {
		for i := range f.Split.Sides {
			s := &f.Split.Sides[i]
			if s.Host != req.Discard {
				continue
			}
			if !s.CanDiscard {
				return api.Errorf(api.Refused, "the replicas of VM %q on host %s are not discarded: %s", name, s.Host, s.WhyNot)
			}
			s.Split, f.Split.Split = false, false
			f.next[name] = []func(*api.VM){func(*api.VM) {}, func(vm *api.VM) { vm.Mode, vm.Secondary = model.ModeDuplex, s.Host }}
			return nil
		}
		return api.Errorf(api.NotFound, "host %q holds nothing of VM %q", req.Discard, name)
	})
}
