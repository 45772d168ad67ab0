package shim

import (
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"perdure/internal/authority"
	"perdure/internal/blockstore"
	"perdure/internal/model"
	"perdure/internal/netbuf"
	"perdure/internal/shimapi"
)

// boot builds the guest from the local disks, paused, under a fresh run.
func (s *Shim) boot() {
	start := time.Now()
	inst, err := build(s.ctx, s.cfg, false, s.lock, s.self, s.log)
	if err != nil {
		if s.ctx.Err() == nil {
			s.tl.add("start-failed", 0, time.Since(start), "%v", err)
			s.startFailed(err)
		}
		return
	}
	run := newRun()
	if err := s.claimReplicas(inst, run); err != nil {
		inst.close()
		s.tl.add("start-failed", 0, time.Since(start), "%v", err)
		s.startFailed(err)
		return
	}
	s.mu.Lock()
	s.inst = inst
	s.prim = newPrimary(s, inst, newDisks(s, inst), 0)
	s.mu.Unlock()
	s.tl.add("built", 0, time.Since(start), "QEMU is ready")
	s.post(authority.EvFilled{Run: run})
}

// claimReplicas checks that the local replicas are this VM's and whole, and
// writes the run that starts from them into their own metadata.
func (s *Shim) claimReplicas(inst *instance, run model.RunID) error {
	s.mu.Lock()
	term, branch := s.mode.Term, s.record.Record.Branch
	s.mu.Unlock()
	for n, st := range inst.stores {
		id := s.cfg.Spec.Disks[n].ID
		// A replica that knows itself to be Outdated is started from by a person
		// only, and then the record, which granted this start, calls it UpToDate.
		if m := st.Meta(); m.VM != s.cfg.Spec.UUID || m.State == model.Inconsistent {
			return fmt.Errorf("start from disk %s: its replica here is %s and belongs to VM %s; a whole one of %s is needed", id, m.State, m.VM, s.cfg.Spec.UUID)
		}
		if err := st.SetMeta(func(m *blockstore.Meta) {
			m.State, m.Term, m.Branch, m.Run = model.UpToDate, term, branch, run
		}); err != nil {
			return fmt.Errorf("mark disk %s: %w", id, err)
		}
		inst.point("boot.claimed")
	}
	return nil
}

// startFailed ends a shim that could not fill its memory, with the error that
// its agent then shows as the VM's problem.
func (s *Shim) startFailed(err error) {
	s.mu.Lock()
	s.startErr = err
	s.mu.Unlock()
	s.post(authority.EvGuestEnded{Reason: err.Error()})
}

// takeOver makes the newest complete epoch the live instance. The authority
// has stopped the acknowledgements and holds the right.
func (s *Shim) takeOver(st *standby, a authority.ActTakeOver) {
	if st.target != nil {
		s.takeOverMirror(st, a)
		return
	}
	start := time.Now()
	fail := func(err error) {
		s.tl.add("takeover-failed", st.newestEpoch(), time.Since(start), "%v", err)
		s.post(authority.EvGuestEnded{Reason: "takeover: " + err.Error()})
	}
	s.turnSwitches()
	if err := st.settle(); err != nil {
		fail(err)
		st.endReceiving()
		return
	}
	st.inst.point("takeover.applied")
	applied := time.Now()
	c := st.newest
	line := st.writeLine() // beside the load, which touches no disk
	if err := st.inst.qmp.LoadDevices(s.ctx, c.dev); err != nil {
		fail(fmt.Errorf("load device state of epoch %d: %w", c.epoch, err))
		st.endReceiving()
		<-line //nolint:errcheck // this side ends with the first error
		return
	}
	if err := s.awaitLine(line, st); err != nil {
		fail(err)
		st.endReceiving()
		return
	}
	st.inst.point("takeover.line")
	p := newPrimary(s, st.inst, st.disks, c.epoch)
	p.started = true
	s.mu.Lock()
	s.prim, s.stby = p, nil
	s.mu.Unlock()
	for _, wire := range c.output {
		f, err := netbuf.ParseFrames(wire)
		if err != nil {
			s.log.Error("output of the hand-over", "error", err)
		}
		p.kept = append(p.kept, f)
	}
	switch {
	case c.flags&flagOff != 0: // it ended there; here is only left to say so
		p.do(func() {
			p.standing, p.offAsked = standsOff, true
			p.setState(model.StateStopped)
			s.post(authority.EvPoweredOff{})
		})
	case c.flags&flagFault != 0:
		p.faulted()
	default:
		p.run(a.Paused) // the record knows better than the epoch what a person wants
	}
	s.goWork(st.receiveOn)
	p.do(func() { // behind what lets it run
		s.tl.add("takeover", c.epoch, time.Since(start), "the VM goes on here as of epoch %d (applied in %.1f ms, loaded and running in %.1f ms)",
			c.epoch, ms(applied.Sub(start)), ms(time.Since(applied)))
		st.deliverInput(c.epoch)
	})
	p.announce(announceFor)
	p.keepTime("the takeover")
	st.retire()
}

// writeLine makes the replicas say that they are written alone from here on.
func (st *standby) writeLine() <-chan error {
	line := make(chan error, 1)
	go func() { line <- errors.Join(st.disks.lost(), st.disks.alone()) }()
	return line
}

// awaitLine waits until the replicas say so, since what is written before could
// be taken for something older. This is the only copy of the VM: a disk that is full is waited
// for, and only one that failed for good ends it.
func (s *Shim) awaitLine(line <-chan error, st *standby) error {
	for {
		err := <-line
		if err == nil {
			s.tl.solved("disk-stuck")
			return nil
		}
		for _, store := range st.inst.stores {
			if store.Err() != nil {
				return err
			}
		}
		s.tl.problem(model.Problem{Code: "disk-stuck", Severity: model.Critical, Text: "the guest stands still: " + err.Error(),
			Action: "make room on this host's disk; it goes on by itself"})
		sleep(s.ctx, time.Second)
		if s.ctx.Err() != nil {
			return err
		}
		line = st.writeLine()
	}
}

// announceFor is how long a VM that moved tells the switches where it is: the
// old host's network card may still be draining.
const announceFor = 5 * time.Second

// settle ends the receiving of epochs, waits until everything complete is applied, and makes
// the disks ready for direct writes.
func (st *standby) settle() error {
	st.endTries()
	st.recvMu.Lock()
	st.taken = true
	st.mu.Lock()
	acts, err := st.books.Takeover()
	st.mu.Unlock()
	st.recvMu.Unlock()
	if err != nil {
		return err
	}
	// Nobody reports any more what is durable elsewhere: what is applied from here on
	// must not wait for that.
	for _, store := range st.inst.stores {
		store.Detach()
	}
	st.drained.Do(func() { close(st.drain) })
	if err := st.carryOut(acts); err != nil {
		return err
	}
	<-st.idle
	st.mu.Lock()
	err = st.applyErr
	st.mu.Unlock()
	if err != nil {
		return err
	}
	for len(st.applyQ) > 0 {
		if err := st.apply(<-st.applyQ); err != nil {
			return err
		}
	}
	// What the guest was told to be durable must be so before output leaves.
	for n, store := range st.inst.stores {
		if err := store.Sync(); err != nil {
			return fmt.Errorf("disk %d: %w", n, err)
		}
	}
	return nil
}

// retire ends what only a standby needs; the instance lives on, and so does the
// session for a moment (receiveOn).
func (st *standby) retire() {
	st.cancel()
	if st.ln != nil {
		st.ln.Close()
	}
}

// makeReplica makes the replica of a disk that this host has none of.
func makeReplica(cfg shimapi.Config, d model.DiskSpec) error {
	dir := filepath.Join(cfg.Dir, shimapi.DiskDir)
	fsys, _ := storageOf(cfg)
	have, err := blockstore.Exists(fsys, dir, d.ID)
	if err != nil {
		return fmt.Errorf("look for disk %s: %w", d.ID, err)
	}
	if have {
		return nil
	}
	if at, ok := cfg.Spec.Place(d.ID, cfg.Host); ok {
		return fmt.Errorf("disk %s: its replica at %s is not made yet, which is the agent's to do: it looks at the path first", d.ID, at.Path)
	}
	// What lies there without metadata is half made or half removed, as when a host lost its
	// power while a failed disk was made anew: it is nobody's, and would bar the way for ever.
	if err := blockstore.Abandon(fsys, dir, d.ID); err != nil {
		return err
	}
	return blockstore.Create(fsys, dir, blockstore.Params{ID: d.ID, VM: cfg.Spec.UUID, Size: d.Size, State: model.Inconsistent})
}
