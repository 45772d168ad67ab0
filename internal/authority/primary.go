package authority

import (
	"fmt"

	"perdure/internal/model"
)

// ruleUnder returns what a running primary may let out if r is the record.
func (s *Side) ruleUnder(r model.Record) OutputRule {
	if !s.sits(r.Primary) {
		return OutputNone
	}
	switch r.Mode {
	case model.ModeSimplex:
		return OutputFree
	case model.ModeSyncing:
		if s.caughtUp && !s.u.mut.duplexEarly {
			return OutputAcked
		}
		return OutputFree
	case model.ModeDuplex:
		if s.detached {
			return OutputFree
		}
		return OutputAcked
	}
	return OutputNone
}

// wantPrimary returns the record a running primary wants next, nil for none.
func (s *Side) wantPrimary() *model.Record {
	r := s.rec.Record
	pair := r.Mode == model.ModeSyncing || r.Mode == model.ModeDuplex
	if !pair && len(s.asked) == 0 {
		s.drop, s.dropFinal, s.detachTold, s.detached, s.caughtUp = false, false, false, false, false
		s.synced = model.Seat{}
		s.survPast, s.survAnew = false, false // no removal can land in a later duplex
	}
	if pair {
		s.protect = ""
	}
	if r.Mode == model.ModeDuplex {
		s.caughtUp = false // the mode itself holds output now
	}
	switch {
	case s.stopWanted:
		return s.need("power-off", s.stopRecord)
	case pair && s.drop:
		return s.need("drop of the secondary", func() (model.Record, error) { return s.u.lostSecondary(r) })
	case r.Mode == model.ModeSyncing && s.caughtUp && s.synced.Run != "":
		return s.need("duplex", func() (model.Record, error) { return s.u.duplex(r, s.synced.Host, s.synced.Run) })
	case r.Mode == model.ModeDuplex && s.diskLost && !s.diskBack && !replicaLost(r):
		return s.need("loss of the replica", func() (model.Record, error) { return s.u.lostReplica(r) })
	case r.Mode == model.ModeDuplex && s.diskBack && replicaLost(r):
		return s.need("return of the replica", func() (model.Record, error) { return s.u.regainedReplica(r) })
	case r.Mode == model.ModeDuplex && s.survOn && s.survRead && !s.detached && !s.handing && (r.Survivor == "" || s.survAnew):
		return s.need("survivor on", func() (model.Record, error) { return s.u.setSurvivor(r, s.cfg.Host, true) })
	case r.Mode == model.ModeDuplex && s.survOff && !s.detached && !s.handing && r.Survivor != "":
		return s.need("survivor off", func() (model.Record, error) { return s.u.setSurvivor(r, s.cfg.Host, false) })
	case r.Mode == model.ModeSimplex && s.protect != "" && s.protRead:
		host := s.protect
		want := s.need("protection", func() (model.Record, error) { return s.u.assign(r, host) })
		if want == nil {
			s.protect = ""
		}
		return want
	}
	return nil
}

// need carries out a transition; a refusal is told, never forced.
func (s *Side) need(what string, f func() (model.Record, error)) *model.Record {
	n, err := f()
	if err != nil {
		s.do(ActRefuse{Text: fmt.Sprintf("%s: %v", what, err)})
		return nil
	}
	return &n
}

// stopRecord is the stopped record. A secondary keeps its UpToDate replica only
// if the primary never went on without it.
func (s *Side) stopRecord() (model.Record, error) {
	r := s.rec.Record
	if r.Survivor != "" && !s.detached {
		n, err := s.u.setSurvivor(r, s.cfg.Host, false)
		if err != nil {
			return r, err
		}
		r = n
	}
	return s.u.powerOff(r)
}

// settleSurvivor lets the primary go on alone, without asking, when it holds
// the survivor right and has lost its secondary.
func (s *Side) settleSurvivor() {
	if !s.drop || s.rec.Record.Mode != model.ModeDuplex {
		return
	}
	if !s.detachTold {
		s.detachTold = true
		s.do(ActDetach{})
	}
	if !s.detached && !s.handing && s.holdsSurvivor() {
		s.detached, s.dropFinal = true, true
	}
}

// holdsSurvivor reports whether no possible record lets the secondary claim.
func (s *Side) holdsSurvivor() bool {
	if s.u.mut.survivorUnread && s.survOn {
		return true
	}
	if !s.survOn || !s.survRead || s.survAnew || s.rec.Record.Survivor != s.cfg.Host {
		return false
	}
	for _, a := range s.asked {
		if a.record.Mode == model.ModeDuplex && a.record.Survivor != s.cfg.Host {
			return false
		}
	}
	return true
}

func (s *Side) tellSwitchover() {
	s.do(ActTell{Kind: TellSwitchover, Term: s.rec.Record.Term, Run: s.run})
	s.armRetry()
}

func (s *Side) onPeerUp(e EvPeerUp) {
	r := s.rec.Record
	if e.Term > r.Term {
		s.read()
	}
	switch s.phase {
	case phaseRunning:
		s.primaryPeerUp(e)
	case phaseFilling, phaseStandby:
		if e.Host != r.Primary.Host {
			return
		}
		if e.Run != r.Primary.Run && !s.u.mut.noRunCheck {
			// One lock per host: a shim of another life means that the old one is gone.
			s.onPeerDead(EvPeerDead{Run: r.Primary.Run})
			return
		}
		s.stopClaimTimer()
		s.peerLost, s.claimDue = false, false
	}
}

func (s *Side) primaryPeerUp(e EvPeerUp) {
	r := s.rec.Record
	if e.Host != r.Secondary.Host {
		return
	}
	switch {
	case r.Mode == model.ModeDuplex && (e.Run == r.Secondary.Run || s.u.mut.noRunCheck):
		if !s.dropFinal {
			s.drop, s.detachTold = false, false
		}
	case r.Mode == model.ModeDuplex, s.synced.Run != "" && e.Run != s.synced.Run:
		s.drop, s.dropFinal = true, true
	}
}

func (s *Side) onPeerLost() {
	switch s.phase {
	case phaseRunning:
		s.drop = s.drop || s.rec.Record.Mode == model.ModeDuplex || s.rec.Record.Mode == model.ModeSyncing
		// A copy that broke off starts over; only a recorded secondary may come back.
		s.dropFinal = s.dropFinal || s.rec.Record.Mode == model.ModeSyncing
		s.breakOffCopy()
	case phaseFilling, phaseStandby:
		if s.peerLost {
			return
		}
		s.peerLost = true
		if s.phase == phaseFilling {
			s.read()
		}
		if s.cfg.ClaimDelayMS == 0 {
			s.claimDue = true
			return
		}
		s.do(ActTimer{ID: TimerClaim, Milliseconds: s.cfg.ClaimDelayMS})
	}
}

// breakOffCopy frees output that was held for a duplex that was never asked for.
func (s *Side) breakOffCopy() {
	for _, a := range s.asked {
		if a.record.Mode == model.ModeDuplex {
			return
		}
	}
	s.caughtUp, s.synced = false, model.Seat{}
}

func (s *Side) onPeerDead(e EvPeerDead) {
	r := s.rec.Record
	switch s.phase {
	case phaseRunning:
		if (r.Mode == model.ModeDuplex && e.Run == r.Secondary.Run) || (r.Mode == model.ModeSyncing && (e.Run == "" || e.Run == s.synced.Run)) {
			s.drop, s.dropFinal = true, true
			s.breakOffCopy()
		}
	case phaseFilling, phaseStandby:
		if e.Run == "" {
			return
		}
		s.deadRun, s.deadFree = e.Run, e.Released || (s.deadFree && s.deadRun == e.Run)
		if s.phase == phaseFilling {
			s.read()
		}
	}
}

// onRequest handles what a person, the agent or the own data plane asks for.
func (s *Side) onRequest(ev Event) {
	primary, secondary := s.phase == phaseRunning, s.phase == phaseFilling || s.phase == phaseStandby
	mode := s.rec.Record.Mode
	switch e := ev.(type) {
	case EvCaughtUp:
		s.caughtUp = s.caughtUp || (primary && mode == model.ModeSyncing && !s.drop)
	case EvSynced:
		if primary && mode == model.ModeSyncing && !s.drop && (s.caughtUp || s.u.mut.duplexEarly) && e.Run != "" {
			s.synced, s.caughtUp = model.Seat{Host: e.Host, Run: e.Run}, true
		}
	case EvPoweredOff:
		s.stopWanted = s.stopWanted || (primary && !s.handing)
	case EvProtect:
		if !primary || mode != model.ModeSimplex || s.stopWanted {
			s.do(ActRefuse{Text: fmt.Sprintf("protect on %s: this side is %s, the VM %s", e.Host, s.phase, mode)})
			return
		}
		if s.wentBack {
			s.do(ActRefuse{Text: "protect on " + e.Host + ": the cluster store went back; a person has to decide first"})
			return
		}
		s.protect, s.protRead = e.Host, false
		s.read()
	case EvUnprotect:
		if !primary {
			s.do(ActRefuse{Text: fmt.Sprintf("unprotect: this side is %s", s.phase)})
			return
		}
		if s.diskLost {
			s.do(ActRefuse{Text: fmt.Sprintf("unprotect: the disks of this host have failed, and host %s holds the only good copy", s.rec.Record.Secondary.Host)})
			return
		}
		s.protect, s.drop, s.dropFinal = "", true, true
		s.breakOffCopy()
	case EvSwitchedOver:
		if !primary || mode != model.ModeDuplex || s.drop || s.stopWanted {
			s.do(ActRefuse{Text: fmt.Sprintf("switch over: this side is %s, the VM %s", s.phase, mode)})
			return
		}
		s.handing, s.survOn, s.survRead = true, false, false
		s.tellSwitchover()
	case EvSwitchover:
		if secondary {
			s.consentRun, s.consentTerm = e.Run, e.Term
			if e.Term != s.rec.Record.Term {
				s.read()
			}
		}
	case EvForce:
		if s.phase != phaseStandby || e.Run != s.run || e.Branch == "" || e.Branch == s.rec.Record.Branch {
			s.do(ActRefuse{Text: fmt.Sprintf("forced takeover: this side is %s and holds run %q of branch %q", s.phase, s.run, s.rec.Record.Branch)})
			return
		}
		s.branch = e.Branch
	case EvSurvivor:
		s.onSurvivor(e, primary)
	case EvReplicaLost:
		s.onReplicaLost(e, primary)
	case EvReplicaBack:
		s.onReplicaBack(primary)
	}
}

func (s *Side) onSurvivor(e EvSurvivor, primary bool) {
	if !primary {
		if e.On {
			s.do(ActRefuse{Text: fmt.Sprintf("survivor: this side is %s", s.phase)})
		}
		return
	}
	if s.handing {
		return
	}
	if s.diskLost {
		if e.On {
			s.do(ActRefuse{Text: "survivor: the disks of this host have failed, it could not go on alone"})
		}
		return // it was given up with the disks
	}
	if !e.On && s.detached && !s.u.mut.offInUse {
		// Whoever then took it out of the record would let the secondary claim.
		s.do(ActRefuse{Text: "survivor off: the right is in use; it ends when the record says simplex"})
		return
	}
	// Given up before it is taken out of the record; held only after a read.
	if e.On && !s.survOn {
		s.survRead = false
		s.read()
		if s.survPast && !s.u.mut.survivorStale {
			// A removal that the agent asked for while the right was given up
			// may still land at the revision it read. A write that succeeds from
			// now on puts the record past every such revision.
			s.survAnew = true
			s.asked = append([]askedSwap(nil), s.asked...)
			for i := range s.asked {
				s.asked[i].rewrite = false
			}
		}
	}
	s.survOn, s.survOff = e.On, !e.On
	s.survPast = s.survPast || !e.On
	s.survAnew = s.survAnew && e.On
}
