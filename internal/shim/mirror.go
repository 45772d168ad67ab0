package shim

import (
	"errors"
	"fmt"
	"time"

	"perdure/internal/authority"
	"perdure/internal/blockstore"
	"perdure/internal/mirror"
	"perdure/internal/model"
	"perdure/internal/nbd"
)

// Level ca: the disks are mirrored write by write (package mirror), memory is
// not. The pair, its session, its records and its rules are those of level ft; in
// place of epochs there is one stream of writes, and the standby's QEMU waits
// with its memory locked to boot the guest.
//
// What leaves by the network is not held. While the record says duplex the
// kernel's gate is open only as far as the secondary has confirmed
// (gatekeeper.confirm); a secondary that is about to claim confirms nothing
// any more, and lets nothing out before the last right that it confirmed has run
// out (gatekeeper.promise). So never two are heard, whoever hangs.

// Kinds of ordered messages at level ca.
const (
	kindMirror     uint8 = 64 + iota // one request of package mirror
	kindMirrorFull                   // beat: with what came before, the secondary's disks are complete
	kindMirrored                     // secondary to primary: numbers of requests that were carried out
	kindMirrorData                   // secondary to primary: the answer to a read
)

// mirrorKind reports whether a message from a primary belongs to level ca alone.
func mirrorKind(kind uint8) bool { return kind == kindMirror || kind == kindMirrorFull }

// memoryKind reports whether it belongs to a level that keeps memory.
func memoryKind(kind uint8) bool {
	return kind == kindSyncPages || kind >= kindEpochBegin && kind <= kindEpochEnd || kind == kindHandOver || kind == kindInput
}

// mirrorDisks puts the mirror between the guest and its disks, at level ca.
func (i *instance) mirrorDisks(exports map[string]nbd.Backend) {
	if i.cfg.Spec.Level != model.LevelCA {
		return
	}
	i.mirror = mirror.NewSource(i.replicas())
	i.ownMirror()
	i.onClose(i.closeFresh)
	for n, d := range i.cfg.Spec.Disks {
		exports[d.ID] = i.mirror.Export(n)
	}
}

func (i *instance) replicas() []mirror.Replica {
	var out []mirror.Replica
	for _, v := range i.vols {
		out = append(out, v)
	}
	return out
}

// exports lists the disks as the guest sees them.
func (i *instance) exports() []nbd.Backend {
	var out []nbd.Backend
	for n, v := range i.vols {
		if i.mirror != nil {
			out = append(out, i.mirror.Export(n))
		} else {
			out = append(out, v)
		}
	}
	return out
}

// isDuplex reports whether the record known here says duplex.
func (s *Shim) isDuplex() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mode.Mode == model.ModeDuplex
}

// joinMirror makes every write wait for the secondary from now on. The rule that
// is in force already says so: nothing may be acknowledged any more that only
// this side has, once the secondary says that it is complete.
func (p *primary) joinMirror(pr *pair) {
	start := time.Now()
	err := p.inst.mirror.Join(func(parts ...[]byte) error { return pr.sess.Send(pr.ctx, kindMirror, parts...) }, func() error {
		if err := pr.takeLastDisk(); err != nil {
			return err
		}
		return pr.sendLastDisk()
	})
	if err == nil {
		p.mirrored = true
		err = pr.sess.Send(pr.ctx, kindMirrorFull, beat{Term: uint64(pr.term), Run: packRun(p.s.run())}.encode())
	}
	if err != nil {
		pr.unsound(fmt.Errorf("begin to mirror: %w", err))
		return
	}
	p.s.tl.add("mirroring", 0, time.Since(start), "each write goes to host %s too", pr.host)
}

// mirrorAlone answers what waits for a secondary that does not count any more, by
// the record or by the survivor right, once the disks are this host's own, durably.
// It is no affair of the runner, which may be waiting for QEMU while QEMU waits
// for its disks. The result is closed when it is done; nil: there was nothing to do.
func (p *primary) mirrorAlone() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.goingAlone != nil || p.inst.mirror == nil || !p.inst.mirror.Joined() {
		return p.goingAlone
	}
	done := make(chan struct{})
	p.goingAlone = done
	p.goWork(func() {
		defer close(done)
		p.inst.point("alone.begin")
		if err := errors.Join(p.disks.lost(), p.disks.alone()); err != nil {
			p.guestEnded("go on without the secondary: " + err.Error())
			return
		}
		p.inst.point("alone.durable")
		p.inst.mirror.Alone()
		p.carrier.dropped()
	})
	return done
}

// leaveMirror is the end of mirroring, for the runner.
func (p *primary) leaveMirror() {
	if !p.mirrored {
		return
	}
	if done := p.mirrorAlone(); done != nil {
		<-done
	}
	p.mu.Lock()
	p.goingAlone = nil
	p.mu.Unlock()
	p.mirrored = false
	p.s.tl.add("simplex", 0, 0, "the VM goes on without a secondary")
}

// markMirrored has every write from now on be noted as one that the other side
// may lack: the secondary is complete, and reports nothing more. The next copy to
// it compares digests, and sends what does differ.
func (i *instance) markMirrored() {
	if i.mirror == nil {
		return
	}
	for _, st := range i.stores {
		st.Detach()
	}
}

// unsound gives the pair up for a reason that its session may not know of.
func (pr *pair) unsound(err error) {
	if pr.ctx.Err() != nil || pr.isLost() {
		return
	}
	pr.p.s.log.Error("pair given up", "error", err)
	pr.markLost()
	pr.giveUpPair(err.Error())
}

// newTarget is the standby's side of the mirror.
func (st *standby) newTarget() *mirror.Target {
	send := func(kind uint8) mirror.Send {
		return func(parts ...[]byte) error {
			st.mu.Lock()
			sess := st.sess
			st.mu.Unlock()
			return sess.Send(st.ctx, kind, parts...)
		}
	}
	return mirror.NewTarget(st.inst.replicas(), send(kindMirrored), send(kindMirrorData), func(err error) {
		if st.ctx.Err() == nil {
			st.s.noteDiskFailed(err)
			st.s.post(authority.EvGuestEnded{Reason: "disk of the standby: " + err.Error()})
		}
	})
}

// mirrorFull makes the replicas good for use, durably, and says so.
func (st *standby) mirrorFull(p []byte) error {
	b, err := decodeBeat(p)
	if err != nil {
		return err
	}
	if model.Term(b.Term) != st.pair.Term || b.Run.id() != st.pair.Primary {
		return fmt.Errorf("the disks are complete as of term %d, run %s: this standby is filled in term %d by run %s",
			b.Term, short(b.Run.id()), st.pair.Term, short(st.pair.Primary))
	}
	st.target.Settle()
	st.inst.point("full.begin")
	return st.becomeFull(&whole{})
}

// takeOverMirror boots the guest on the standby's QEMU. The authority has
// stopped the confirmations and holds the right.
func (s *Shim) takeOverMirror(st *standby, a authority.ActTakeOver) {
	start := time.Now()
	s.turnSwitches()
	// Nothing that the old primary has sent is carried out from here on. What was
	// carried out before is the disks' past, answered or not.
	st.recvMu.Lock()
	st.taken = true
	st.recvMu.Unlock()
	st.target.Settle()
	if err := st.readyDisks(); err != nil {
		s.tl.add("takeover-failed", 0, time.Since(start), "%v", err)
		s.post(authority.EvGuestEnded{Reason: "takeover: " + err.Error()})
		return
	}
	ready := time.Now()
	sleep(s.ctx, s.gate.promisedUntil()-bootNow())
	p := newPrimary(s, st.inst, st.disks, 0)
	s.mu.Lock()
	s.prim, s.stby = p, nil
	s.mu.Unlock()
	p.run(a.Paused)
	s.tl.add("takeover", 0, time.Since(start), "the guest boots here (disks ready in %.1f ms; the other side's right had run out after %.1f ms more)",
		ms(ready.Sub(start)), ms(time.Since(ready)))
	p.announce(announceFor)
	st.endReceiving()
	st.retire()
}

// readyDisks makes the disks durable and this host's own before the guest writes.
func (st *standby) readyDisks() error {
	st.inst.point("takeover.begin")
	for n, store := range st.inst.stores {
		if err := store.Flush(); err != nil {
			return fmt.Errorf("disk %d: %w", n, err)
		}
	}
	st.inst.point("takeover.flushed")
	err := errors.Join(st.disks.lost(), st.disks.alone())
	st.inst.point("takeover.durable")
	return err
}

var _ mirror.Replica = (*blockstore.Volume)(nil)
