package shim

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"perdure/internal/hostnet"
	"perdure/internal/model"
	"perdure/internal/qemu"
	"perdure/internal/shimapi"
)

// The move of a guest to a second QEMU of its host, whose memory is of another kind. See level.go.

// buildBeside makes a second QEMU for the guest of old, which runs on meanwhile: it waits for it with
// memory and output as the level asks for, and shares disks and character devices.
func buildBeside(ctx context.Context, old *instance, to model.Level, s *Shim) (_ *instance, err error) {
	i := &instance{cfg: old.cfg, log: old.log, ft: to == model.LevelFT, bound: old.bound, beside: true, tapSet: 1 - old.tapSet,
		serial: old.serial, gagent: old.gagent, agentUse: old.agentUse, hot: old.hot, closers: old.closers}
	i.cfg.Spec.Level = to
	i.cfg.Spec.SteadyTime = old.cfg.Spec.SteadyTime || old.ft // the guest must see the same machine
	for _, name := range []string{"qmp.sock", "vnc.sock"} {
		p := i.path(name)
		i.onClose(func() { os.Remove(p) }) // where it did not come to be the VM's
	}
	defer func() {
		if err != nil {
			i.close()
		}
	}()
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for _, nic := range i.cfg.Spec.NICs {
		if err := hostnet.CheckBridge(nic.Bridge); err != nil {
			return nil, err
		}
	}
	steps := []struct {
		what string
		do   func() error
	}{
		{"make taps", i.makeTaps},
		{"mount guest memory", func() error { return i.mountRAM(ctx, s.lock, s.self) }},
		{"start a second QEMU", func() error { return i.start(ctx, true, s.lock) }},
		{"attach to guest memory", i.attachRAM},
		{"divert output", func() error { return i.divert(ctx) }},
	}
	for _, st := range steps {
		if err := st.do(); err != nil {
			return nil, fmt.Errorf("%s: %w", st.what, err)
		}
	}
	return i, nil
}

// errChangeLate ends a change whose guest changes its memory faster than it can be copied.
var errChangeLate = errors.New("the copy of the guest's memory did not come to an end in time")

// move is the change to or from ft. When it returns, one of the two QEMUs is gone.
func (c *levelChange) move(ctx context.Context, p *primary) error {
	limit := changeLimit + time.Duration(c.s.cfg.Spec.Memory/changeRate)*time.Second
	ctx, cancel := context.WithTimeoutCause(ctx, limit, errChangeLate)
	defer cancel()
	old := p.inst
	next, err := buildBeside(ctx, old, c.to, c.s)
	if err != nil {
		return reason(ctx, err)
	}
	input := &inputLog{}
	input.open(old.taps, c.s.log)
	defer input.close()
	var since time.Time
	if !c.s.copiesStopped() {
		since, err = c.copy(ctx, old, next, func() { input.take() }) // the guest has had what came so far
		if err != nil {
			c.back(old, next, p)
			return reason(ctx, err)
		}
	}
	result := make(chan error, 1)
	p.do(func() {
		if since.IsZero() {
			since, err = c.copyStopped(ctx, p, next, input)
		}
		if err != nil {
			c.backHere(old, next, p)
			result <- reason(ctx, err)
			return
		}
		result <- c.hand(p, next, input, since)
	})
	switch err = c.await(p, result); {
	case err == nil:
		old.close()
	case errors.Is(err, errVMEnds):
		next.close()
	}
	return err
}

// reason puts the cause for which a change was given up in the place of the error that it led to.
func reason(ctx context.Context, err error) error {
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// copiesStopped reports whether the guest has to stand still for the whole copy. QEMU's own emulation loses
// track of a page now and then when a guest writes to it in the moment in which it is looked
// at (seen with 7.2 and two busy processors: ten pages of a guest in one of ten changes). Kvm's tracking is the processor's.
func (s *Shim) copiesStopped() bool { return s.cfg.Spec.Accel != qemu.KVM && !s.copyLive }

// copyStopped is copy for a guest that stands still meanwhile, for the runner.
func (c *levelChange) copyStopped(ctx context.Context, p *primary, next *instance, input *inputLog) (since time.Time, err error) {
	if err := p.changeable(); err != nil {
		return since, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(p.ctx, func() { cancel(errors.New("the VM is ending")) })()
	since = time.Now()
	input.take()
	if p.standing == "" {
		st, err := p.stop()
		if err != nil {
			return since, err
		}
		if !st.WasRunning {
			p.stands(st.Status)
			return since, fmt.Errorf("the guest does not run: QEMU is in state %s", st.Status)
		}
	}
	_, err = c.copy(ctx, p.inst, next, func() {})
	return since, err
}

// copy copies the guest's memory until the guest stands still for the rest: since when, it returns. seen is called now
// and then while it may run.
func (c *levelChange) copy(ctx context.Context, old, next *instance, seen func()) (since time.Time, err error) {
	path := next.path("move.sock")
	defer os.Remove(path)
	if err := next.qmp.AcceptMigration(ctx, path); err != nil {
		return since, err
	}
	c.step("copy", next)
	if err := old.qmp.Migrate(ctx, path, qemu.MigrateOptions{Downtime: changeDowntime}); err != nil {
		return since, err
	}
	cleaned := time.Now()
	return old.qmp.AwaitSwitchover(ctx, func(m qemu.Migration) {
		c.report(m)
		seen()
		if next.ram != nil && time.Since(cleaned) > cleanInterval {
			// As primary.clean does: the copy would be slowed down as a writer of dirty pages.
			if err := next.ram.Flush(); err != nil {
				c.s.log.Warn("clean guest memory", "error", err)
				next.ram.Restart()
			}
			cleaned = time.Now()
		}
	})
}

// back has the guest go on in its old QEMU after a failure. It is for any goroutine.
func (c *levelChange) back(old, next *instance, p *primary) {
	done := make(chan struct{})
	p.do(func() { defer close(done); c.backHere(old, next, p) })
	select {
	case <-done:
	case <-p.ctx.Done():
		p.work.Wait()
		next.close()
	}
}

// backHere is back, for the runner.
func (c *levelChange) backHere(old, next *instance, p *primary) {
	next.close()
	select {
	case <-next.proc.Exited():
	default:
		// Whether it holds the guest is not known: nobody lets either run.
		p.guestEnded("the second QEMU of a change of level does not end")
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(p.ctx), qmpTimeout)
	defer cancel()
	err := old.qmp.CancelMigration(ctx)
	if err != nil && !errors.Is(err, qemu.ErrMigrated) { // else the second had it, and is dead
		if p.ctx.Err() == nil {
			p.guestEnded("take the guest back after a change of level failed: " + err.Error())
		}
		return
	}
	for _, port := range old.ports() {
		port.Unhold()
	}
	if p.standing != "" || p.offAsked || p.ctx.Err() != nil {
		return
	}
	if err := p.resume(); err != nil && p.ctx.Err() == nil {
		p.guestEnded(err.Error())
	}
}

// hand is the last step, for the runner of the old primary: the guest stands still, and goes on in
// next, or in its old place.
func (c *levelChange) hand(p *primary, next *instance, input *inputLog, since time.Time) error {
	s, old := c.s, p.inst
	ctx, cancel := context.WithTimeout(p.ctx, handLimit)
	defer cancel()
	if err := c.finish(ctx, p, next); err != nil {
		c.backHere(old, next, p)
		return err
	}
	// From here on the guest is the new QEMU's. Nothing that the old one still is may do anything.
	p.cancel()
	if err := old.proc.Kill(); err != nil {
		s.log.Error("kill QEMU", "error", err)
	}
	next.settleIn(old)
	next.adoptDisks(old)
	next.slotAll()
	frames := c.moveTaps(old, next, input)
	np := c.succeed(p, next)
	paused := p.standing == standsPaused
	np.do(func() {
		if paused {
			np.standing = standsPaused
			np.setState(model.StatePaused)
		} else if err := np.resume(); err != nil {
			np.guestEnded(err.Error())
			return
		}
		c.mu.Lock()
		c.blackout = time.Since(since)
		c.mu.Unlock()
		deliverAll(next.taps, frames, s)
		for _, port := range next.ports() {
			port.Unhold()
		}
	})
	// The caller ends the old primary, whose runner this is; the new one must have begun by then.
	c.settled(np)
	np.announce(announceFor)
	return nil
}

// finish lets the old QEMU hand the guest over. Until it returns nil the guest is the old one's.
func (c *levelChange) finish(ctx context.Context, p *primary, next *instance) error {
	old := p.inst
	if err := p.changeable(); err != nil {
		return err
	}
	old.noteRunning(false)
	if err := p.passAll(ctx); err != nil {
		return err
	}
	for _, port := range old.ports() {
		if err := port.Hold(ctx); err != nil {
			return err
		}
	}
	for _, port := range old.ports() {
		if err := port.Settle(ctx, func(ctx context.Context) error { _, _, err := old.qmp.Status(ctx); return err }); err != nil {
			return err
		}
	}
	c.step("hand", next)
	if _, running, err := old.qmp.Status(ctx); err != nil {
		return err
	} else if running {
		return errors.New("the guest was let run in the middle of the change")
	}
	if err := old.qmp.FinishMigration(ctx); err != nil {
		return err
	}
	c.step("handed", next)
	if err := next.qmp.AwaitMigrated(ctx); err != nil {
		return err
	}
	if _, running, err := next.qmp.Status(ctx); err != nil {
		return err
	} else if running {
		return errors.New("the second QEMU let the guest run by itself")
	}
	return nil
}

// passAll lets out all that a guest of level ft, which stands still, has sent.
func (p *primary) passAll(ctx context.Context) error {
	for n, d := range p.inst.nics {
		for sent := false; !sent; {
			var err error
			sent, err = p.s.gate.whileOpen(func() error {
				f, err := d.Drain(p.ctx)
				if err != nil {
					return err
				}
				return f.Send(p.s.gate.pieced(p.inst.outlets[n]))
			})
			if err != nil {
				p.s.log.Warn("release output", "nic", d.NIC(), "error", err)
			}
			if !sent {
				sleep(ctx, time.Millisecond)
			}
			if ctx.Err() != nil {
				return fmt.Errorf("release output of %s: %w", d.NIC(), context.Cause(ctx))
			}
		}
	}
	return nil
}

// settleIn takes over what belongs to the VM, not to one QEMU. The old one is dead.
func (i *instance) settleIn(old *instance) {
	for _, name := range []string{"qmp.sock", "vnc.sock"} {
		if err := os.Rename(i.path(name), filepath.Join(i.cfg.Dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			i.log.Warn("rename socket", "error", err)
		}
	}
	old.mu.Lock()
	lasting := old.lasting
	old.lasting, old.pidFile = nil, ""
	ran, since := old.ran, old.since
	old.mu.Unlock()
	i.mu.Lock()
	defer i.mu.Unlock()
	i.lasting, i.ran, i.since = lasting, ran, since
	if err := os.Rename(filepath.Join(i.cfg.Dir, i.pidFile), filepath.Join(i.cfg.Dir, shimapi.QEMUPID)); err != nil {
		i.log.Error("name the new QEMU's pid", "error", err) // an agent finds it under the other name too
	} else {
		i.pidFile = shimapi.QEMUPID
	}
	i.beside = false
}

// moveTaps gives the guest's place in its bridges to the taps of next, and returns what the guest
// was sent meanwhile and has not had, by NIC.
func (c *levelChange) moveTaps(old, next *instance, input *inputLog) [][]byte {
	s := c.s
	waits := make([][]byte, len(next.taps))
	count := make([]int, len(next.taps))
	for n, nic := range next.cfg.Spec.NICs {
		alias := next.cfg.Spec.Name + " " + nic.ID
		if err := hostnet.CreateTap(next.taps[n], nic.Bridge, alias); err != nil {
			s.tl.add("network-fault", 0, 0, "%v", err)
		}
		if err := hostnet.CreateTap(old.taps[n], "", alias); err != nil {
			s.log.Error("take the old tap out of its bridge", "error", err)
		}
		var err error
		if waits[n], count[n], err = old.outlets[n].Unread(); err != nil {
			s.log.Warn("take what the guest was sent", "error", err)
		}
	}
	s.gate.setTaps(next.taps)
	for n, seen := range input.take() {
		// A QEMU whose guest stands still takes one more frame out of the tap, and keeps it.
		waits[n] = append(bytes.Clone(hostnet.FrameBefore(seen, count[n])), waits[n]...)
	}
	return waits
}

// deliverAll hands a guest the frames that it was sent, by NIC.
func deliverAll(taps []string, frames [][]byte, s *Shim) {
	for n, f := range frames {
		if len(f) == 0 {
			continue
		}
		box, err := hostnet.OpenInbox(taps[n])
		if err == nil {
			err = errors.Join(box.Deliver(f), box.Close())
		}
		if err != nil {
			s.log.Warn("input of the guest was not carried over whole", "error", err)
		}
	}
}

// succeed puts a primary of the new QEMU in the place of the old one.
func (c *levelChange) succeed(p *primary, next *instance) *primary {
	s := c.s
	d := p.disks
	d.mu.Lock()
	d.inst = next
	d.mu.Unlock()
	np := newPrimary(s, next, d, p.lastEpoch())
	np.started = true
	s.mu.Lock()
	s.inst, s.prim, s.level = next, np, c.to
	mode := s.mode
	s.mu.Unlock()
	if mode.Mode == model.ModeSyncing {
		np.protect(mode.PeerHost, mode.Term) // the old primary was told, and is gone
	}
	return np
}
