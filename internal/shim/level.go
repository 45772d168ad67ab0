package shim

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"time"

	"perdure/internal/authority"
	"perdure/internal/blockstore"
	"perdure/internal/hostnet"
	"perdure/internal/mirror"
	"perdure/internal/model"
	"perdure/internal/qemu"
	"perdure/internal/shimapi"
)

// The level of a running guest is changed while it runs alone (simplex), when the rules of all levels
// are the same: everything may leave at once, and no other host may be granted the VM. So no rule is
// ever in doubt, whatever ends in the middle; see docs/level.md.
//
//	none ↔ ca      what stands behind the disks is exchanged; QEMU notices nothing
//	none, ca ↔ ft  the guest moves to a second QEMU of this host (beside), whose memory is of the other
//	               kind, by QEMU's live migration
//
// Disks and character devices are those of both QEMUs: only who may use them changes. Each has taps of its
// own, and the second's join the bridge when the first's have left it.
//
// Invariant: at most one of the two has vCPUs that may run. The second is let run only
// after the first has handed its guest over whole (QEMU calls its migration completed) and was
// killed; the first is let run again only after the second was killed and has ended.

var errLevelChanges = errors.New("the VM's level is being changed just now")

const (
	// changeDowntime is how long the guest may stand still for the rest of its memory, by QEMU's estimate.
	changeDowntime = 100 * time.Millisecond
	// handLimit bounds the last step, during which the guest stands still.
	handLimit = 20 * time.Second
	// changeRate and changeLimit bound the copy: it is given up when it takes longer
	// than the memory takes at this many bytes per second, and this besides.
	changeRate  = 20 << 20
	changeLimit = 5 * time.Minute
	leaveLimit  = 30 * time.Second // for giving the second copy up
)

// tapOther is the distance of the two names of a tap: a QEMU beside another has the other one.
const tapOther = 0x80

func tapName(uuid string, nic, set int) string { return hostnet.TapName(uuid, nic+set*tapOther) }

// path is where this instance has a socket.
func (i *instance) path(name string) string {
	if i.beside {
		name = "next-" + name
	}
	return filepath.Join(i.cfg.Dir, name)
}

// levelChange is one change of level.
type levelChange struct {
	s      *Shim
	from   model.Level
	to     model.Level
	begun  time.Time
	cancel context.CancelCauseFunc

	mu       sync.Mutex
	done     int64
	total    int64
	ended    bool
	err      error
	blackout time.Duration
}

func (c *levelChange) status() *shimapi.LevelChange {
	if c == nil {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	st := &shimapi.LevelChange{Begun: c.begun, From: c.from, To: c.to, Ended: c.ended, Done: c.done, Total: c.total, BlackoutMS: ms(c.blackout)}
	if c.err != nil {
		st.Error = c.err.Error()
	}
	return st
}

func (c *levelChange) over() bool {
	if c == nil {
		return true
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ended
}

// levelNow returns the level of what lives here, and whether it is being changed.
func (s *Shim) levelNow() (level model.Level, changing bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.level, !s.change.over()
}

// spec is the VM's specification with the level of what lives here.
func (s *Shim) spec() model.VMSpec {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.specLocked()
}

func (s *Shim) specLocked() model.VMSpec {
	spec := s.cfg.Spec
	spec.Level = s.level
	return spec
}

// changeLevel begins to change the level of the running guest.
func (s *Shim) changeLevel(ctx context.Context, to model.Level) (string, error) {
	p := s.primary()
	if p == nil {
		return "", errNotRunning
	}
	if to != model.LevelNone && to != model.LevelCA && to != model.LevelFT {
		return "", fmt.Errorf("level %q is not known; allowed are none, ca and ft", to)
	}
	if to != model.LevelNone && s.cfg.FirmwareCode != "" {
		return "", fmt.Errorf("a guest with UEFI cannot have level %s", to)
	}
	cctx, cancel := context.WithCancelCause(s.ctx)
	c := &levelChange{s: s, to: to, begun: time.Now(), cancel: cancel}
	s.mu.Lock()
	c.from = s.level
	last := s.change
	var err error
	switch {
	case !s.change.over():
		err = errLevelChanges
	case s.changing:
		err = errDisksChange
	case to == s.level:
		err = fmt.Errorf("the VM has level %s already", to)
	case s.mode.Mode != model.ModeSimplex && s.mode.Mode != model.ModeSyncing && s.mode.Mode != model.ModeDuplex:
		err = fmt.Errorf("the VM is %s", s.mode.Mode)
	default:
		s.change = c
	}
	s.mu.Unlock()
	if err != nil {
		cancel(nil)
		return "", err
	}
	if err = p.ask(ctx, p.standsRight); err == nil {
		err = errors.Join(s.mayLeave(), c.movable(ctx, p))
	}
	if err != nil {
		cancel(nil)
		s.mu.Lock()
		s.change = last
		s.mu.Unlock()
		return "", err
	}
	s.goWork(func() {
		defer cancel(nil)
		c.run(cctx, p)
	})
	return fmt.Sprintf("changing level %s to %s", c.from, to), nil
}

// movable says what about the running guest stands against a change.
func (c *levelChange) movable(ctx context.Context, p *primary) error {
	var reasons []string
	var err error
	switch model.LevelFT {
	case c.to:
		reasons, err = p.inst.qmp.Protectable(ctx)
	case c.from:
		reasons, err = p.inst.qmp.QueryBlockedReasons(ctx)
	}
	if err != nil {
		return fmt.Errorf("ask QEMU whether the guest can be moved: %w", err)
	}
	if len(reasons) > 0 {
		return fmt.Errorf("the guest cannot have level %s: %s", c.to, reasons[0])
	}
	return nil
}

// leavePair has the VM give its second copy up, by the ordinary rule, and waits until it runs alone.
func (c *levelChange) leavePair(ctx context.Context, p *primary) error {
	ctx, cancel := context.WithTimeoutCause(ctx, leaveLimit, errors.New("the second copy was not given up in time"))
	defer cancel()
	for asked := false; ; sleep(ctx, 5*time.Millisecond) {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		c.s.mu.Lock()
		mode := c.s.mode.Mode
		c.s.mu.Unlock()
		if mode == model.ModeSimplex {
			var alone bool
			if err := p.ask(ctx, func() error { alone = p.pair == nil && !p.held && !p.mirrored; return nil }); err != nil {
				return err
			}
			if alone {
				return nil
			}
		} else if !asked {
			asked = true
			c.s.tl.add("unprotecting", 0, 0, "the second copy is given up while the level is changed")
			if err := c.s.ask(ctx, authority.EvUnprotect{Reason: "the level is changed"}); err != nil {
				return fmt.Errorf("give the second copy up: %w", err)
			}
		}
	}
}

// changeable says why the guest's level cannot be changed now. It is for the runner.
func (p *primary) changeable() error {
	p.s.mu.Lock()
	mode := p.s.mode.Mode
	p.s.mu.Unlock()
	if p.pair != nil || p.held || p.mirrored || mode != model.ModeSimplex {
		return errors.New("the VM has a second copy, or is getting one")
	}
	return p.standsRight()
}

// standsRight says what about the guest itself stands against a change. It is for the runner.
func (p *primary) standsRight() error {
	switch {
	case p.standing == standsBound: // given up with the pair
	case p.standing != "" && p.standing != standsPaused:
		return fmt.Errorf("the guest does not run: %s", p.standing)
	case p.carries():
		return errors.New("the guest works on a disk of the other host, since the one here has failed; replace it first (perdure disk replace)")
	case len(p.inst.outlets) != len(p.inst.taps) || len(p.inst.slots) != len(p.inst.vols):
		return errors.New("the guest was started in a way that does not allow it")
	}
	return nil
}

// step is where tests break a change.
func (c *levelChange) step(name string, next *instance) {
	if c.s.atStep != nil {
		c.s.atStep(name, next)
	}
}

// cancelChange gives a change of level up; one that is done stays so.
func (s *Shim) cancelChange() error {
	s.mu.Lock()
	c := s.change
	s.mu.Unlock()
	if c.over() {
		return errors.New("the VM's level is not being changed")
	}
	c.cancel(errors.New("cancelled"))
	return nil
}

func (c *levelChange) end(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ended, c.err = true, err
}

func (c *levelChange) report(m qemu.Migration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.total = max(c.total, m.Total)
	// QEMU's count begins anew with each round; people see what was copied once.
	c.done = max(c.done, c.total-m.Remaining)
}

// run carries a change out, or leaves everything as it was.
func (c *levelChange) run(ctx context.Context, p *primary) {
	s := c.s
	s.tl.add("level-change", 0, 0, "level %s is changed to %s", c.from, c.to)
	err := c.leavePair(ctx, p)
	switch {
	case err != nil:
	case c.from == model.LevelFT || c.to == model.LevelFT:
		err = c.move(ctx, p)
	default:
		err = c.exchange(p)
	}
	if err != nil {
		s.tl.add("level-kept", 0, time.Since(c.begun), "level %s was not changed to %s: %v", c.from, c.to, err)
	} else {
		s.tl.add("level-changed", 0, time.Since(c.begun), "the level is %s now; the guest stood still for %.1f ms", c.to, ms(c.blackout))
	}
	c.end(err)
}

// exchange is the change between none and ca: the QEMU stays, with another view of its disks.
func (c *levelChange) exchange(p *primary) error {
	result := make(chan error, 1)
	p.do(func() {
		if err := p.changeable(); err != nil {
			result <- err
			return
		}
		p.cancel()
		next := p.inst.again(c.to)
		next.slotAll()
		paused := p.standing == standsPaused
		np := c.succeed(p, next)
		np.do(func() {
			if paused {
				np.standing = standsPaused
				np.setState(model.StatePaused)
				return
			}
			np.standing = ""
			np.setState(model.StateRunning)
		})
		c.settled(np)
		result <- nil
	})
	return c.await(p, result)
}

// settled waits until a new primary does what it was told: the old one ends then.
func (c *levelChange) settled(np *primary) {
	done := make(chan struct{})
	np.do(func() { close(done) })
	select {
	case <-done:
	case <-np.ctx.Done():
	}
}

var errVMEnds = errors.New("the VM is ending")

// await waits for what was asked of the runner of p, which may end with it.
func (c *levelChange) await(p *primary, result <-chan error) error {
	select {
	case err := <-result:
		if err == nil {
			p.close()
		}
		return err
	case <-p.ctx.Done():
	}
	p.work.Wait() // the runner has ended, by the change or by something else
	select {
	case err := <-result:
		if err == nil {
			p.close()
		}
		return err
	default:
		return errVMEnds
	}
}

// again is the same instance, QEMU and all, as another level sees it. The old one may
// only be closed after that, which closing the new one does.
func (i *instance) again(to model.Level) *instance {
	n := &instance{cfg: i.cfg, log: i.log, ft: i.ft, ram: i.ram, proc: i.proc, qmp: i.qmp, serial: i.serial, gagent: i.gagent, agentUse: i.agentUse,
		nics: i.nics, outlets: i.outlets, taps: i.taps, tapSet: i.tapSet, bound: i.bound, hot: i.hot, closers: i.closers}
	n.cfg.Spec.Level = to
	n.onClose(n.removePID)
	n.onClose(i.close)
	n.adoptDisks(i)
	i.mu.Lock()
	defer i.mu.Unlock()
	n.lasting, n.pidFile, n.running, n.since, n.ran = i.lasting, i.pidFile, i.running, i.since, i.ran
	i.lasting, i.pidFile = nil, ""
	return n
}

// adoptDisks takes over what serves the VM's disks from an instance whose guest uses them no more, or
// will be this one's.
func (i *instance) adoptDisks(old *instance) {
	old.mu.Lock()
	i.stores = append([]*blockstore.Store(nil), old.stores...)
	i.vols = append([]*blockstore.Volume(nil), old.vols...)
	i.clean, i.slots, i.latency = old.clean, old.slots, old.latency
	i.watches, i.nbdCuts, i.fresh = old.watches, old.nbdCuts, old.fresh
	old.fresh = nil
	old.mu.Unlock()
	i.onClose(i.closeFresh)
	if i.cfg.Spec.Level != model.LevelCA {
		for _, v := range i.vols {
			v.SetFetch(nil) // the mirror's
		}
		return
	}
	i.mirror = mirror.NewSource(i.replicas())
	i.onClose(i.closeMirror)
	i.ownMirror()
}

// slotAll puts the disks of this instance's level behind what QEMU sees.
func (i *instance) slotAll() {
	for n, s := range i.slots {
		if i.mirror != nil {
			s.set(i.mirror.Export(n))
		} else {
			s.set(i.vols[n])
		}
	}
}

func (i *instance) closeMirror() {
	if i.mirror != nil {
		i.mirror.Close()
	}
}
