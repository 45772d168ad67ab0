package authority

import "perdure/internal/model"

// wantOther returns the record that a side which is not the live instance
// wants next, nil for none.
func (s *Side) wantOther() *model.Record {
	r := s.rec.Record
	switch s.phase {
	case phaseBooting:
		if s.run != "" {
			return s.need("start", func() (model.Record, error) { return s.u.booted(r, s.cfg.Host, s.run) })
		}
	case phaseFilling, phaseStandby:
		if !s.canClaim() {
			return nil
		}
		if s.branch != "" {
			return s.need("forced takeover", func() (model.Record, error) { return s.u.force(r, s.cfg.Host, s.run, s.branch) })
		}
		if s.consents() && r.Mode == model.ModeDuplex {
			return s.need("switchover", func() (model.Record, error) { return s.u.switchover(r) })
		}
		return s.need("takeover", func() (model.Record, error) {
			return s.u.takeOver(r, model.Seat{Host: s.cfg.Host, Run: s.run})
		})
	}
	return nil
}

// consents reports whether the primary itself let go of the VM, survivor right
// included: it handed over in this term, or died without having used the right.
func (s *Side) consents() bool {
	r := s.rec.Record
	return (s.consentRun != "" && s.consentRun == r.Primary.Run && s.consentTerm == r.Term) ||
		(s.deadFree && s.deadRun == r.Primary.Run)
}

// canClaim reports whether a secondary should claim now, as far as the record
// known here allows it. The swap decides.
func (s *Side) canClaim() bool {
	r := s.rec.Record
	if s.phase != phaseStandby && !(s.phase == phaseFilling && s.run != "" && s.u.mut.syncingClaims) {
		return false
	}
	switch {
	case s.branch != "":
		return true
	case s.consents():
		return true
	case r.Survivor != "" && !s.u.mut.ignoreSurvivor:
		return false
	}
	// Handed over in a term this side did not know then: no consent to end a
	// survivor right, but reason enough to claim.
	return s.claimDue || s.primaryDead() || s.consentRun != "" && s.consentRun == r.Primary.Run
}

// primaryDead reports whether the memory of the recorded primary is gone for certain.
func (s *Side) primaryDead() bool {
	return s.deadRun != "" && s.deadRun == s.rec.Record.Primary.Run
}

// mayAck reports whether complete epochs may be acknowledged. Memory is needed,
// and no claim may be on its way, unless the primary is heard again: then every
// epoch acknowledged is one that a late success of the claim starts from.
func (s *Side) mayAck() bool {
	if s.run == "" && !s.u.mut.noRunCheck {
		return false
	}
	if s.branch != "" || s.consents() || s.primaryDead() {
		return false
	}
	for _, a := range s.asked {
		claim := a.record.Primary.Host == s.cfg.Host
		if claim && s.peerLost && !s.u.mut.claimWhileAcking {
			return false
		}
	}
	return true
}

// stopClaimTimer stops the claim timer if it runs.
func (s *Side) stopClaimTimer() {
	if s.peerLost && !s.claimDue {
		s.do(ActTimer{ID: TimerClaim, Milliseconds: -1})
	}
}
