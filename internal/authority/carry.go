package authority

import (
	"fmt"

	"perdure/internal/model"
)

// Level ca: the primary's own copy of the disks fails while the guest runs. The
// guest goes on on this host, and the secondary's copy alone serves it. The
// record says so before the first write that only the secondary holds is
// acknowledged, and goes on saying so until this host has every write again.

// LostReplica records that the primary's replica does not count any more:
// duplex → duplex, term+1, level ca. It becomes Inconsistent, since what was in
// flight when it failed may be there or not, and a failed sync loses what was
// written before. A survivor right ends with it: who has no data of its own
// cannot go on alone. While it stands LostSecondary is refused.
func LostReplica(rec model.Record) (model.Record, error) { return rules{}.lostReplica(rec) }

// RegainedReplica records that the primary's replica holds every write again,
// durably, and gets each further one before it is acknowledged: duplex → duplex,
// term+1.
func RegainedReplica(rec model.Record) (model.Record, error) { return rules{}.regainedReplica(rec) }

func (u rules) lostReplica(rec model.Record) (model.Record, error) {
	host := rec.Primary.Host
	switch {
	case rec.Mode != model.ModeDuplex:
		return rec, fmt.Errorf("give up the replica on %s: %w: %s", host, ErrMode, rec.Mode)
	case rec.Level != model.LevelCA:
		return rec, fmt.Errorf("give up the replica on %s: %w: %s; only at level %s does the guest go on without it", host, ErrLevel, rec.Level, model.LevelCA)
	case !upToDate(rec, host):
		return rec, fmt.Errorf("give up the replica on %s: %w: it is given up already", host, ErrReplica)
	}
	n := next(rec, model.ModeDuplex, "replica on "+host+" lost")
	n.Survivor = ""
	if !u.mut.lossUnrecorded {
		n.Replicas[host] = model.Replica{State: model.Inconsistent, Term: rec.Term, Branch: rec.Branch}
	}
	return stamp(n), nil
}

func (u rules) regainedReplica(rec model.Record) (model.Record, error) {
	host := rec.Primary.Host
	switch {
	case rec.Mode != model.ModeDuplex:
		return rec, fmt.Errorf("take the replica on %s back: %w: %s", host, ErrMode, rec.Mode)
	case !replicaLost(rec):
		return rec, fmt.Errorf("take the replica on %s back: %w: it is not given up", host, ErrReplica)
	}
	n := next(rec, model.ModeDuplex, "replica on "+host+" whole again")
	n.Replicas[host] = model.Replica{State: model.UpToDate}
	return stamp(n), nil
}

// replicaLost reports whether a record says that its primary runs on the
// secondary's copy of the disks alone.
func replicaLost(rec model.Record) bool {
	return rec.Mode == model.ModeDuplex && !upToDate(rec, rec.Primary.Host)
}

// onReplicaLost takes in that the own copy of the disks fails.
func (s *Side) onReplicaLost(e EvReplicaLost, primary bool) {
	r := s.rec.Record
	switch {
	case !primary || r.Mode != model.ModeDuplex || r.Level != model.LevelCA:
		s.do(ActRefuse{Text: fmt.Sprintf("go on without the replica on %s: this side is %s, the VM %s at level %s", s.cfg.Host, s.phase, r.Mode, r.Level)})
	case s.drop || s.detached || s.handing || s.stopWanted:
		s.do(ActRefuse{Text: fmt.Sprintf("go on without the replica on %s: the secondary is lost, or the VM is ending", s.cfg.Host)})
	default:
		s.diskLost, s.diskBack = true, false
		// The survivor right is given up before it is taken out of the record.
		s.survPast = s.survPast || s.survOn || r.Survivor != ""
		s.survOn, s.survRead, s.survOff, s.survAnew = false, false, false, false
	}
}

// onReplicaBack takes in that the own copy is whole again.
func (s *Side) onReplicaBack(primary bool) {
	if !primary || !s.diskLost || !replicaLost(s.rec.Record) || s.drop {
		s.do(ActRefuse{Text: fmt.Sprintf("take the replica on %s back: this side is %s and its replica is %s", s.cfg.Host, s.phase, replicaWord(s.rec.Record, s.cfg.Host))})
		return
	}
	s.diskBack = true
}

// settleReplica draws what follows from the state of the own copy, and reports
// whether this side has ended: it has no data of its own, and the host that has
// them is lost. Whatever that one holds it may be started from.
func (s *Side) settleReplica() (ended bool) {
	r := s.rec.Record
	if s.diskBack && r.Mode == model.ModeDuplex && !replicaLost(r) && len(s.asked) == 0 {
		s.diskLost, s.diskBack = false, false
	}
	if s.diskLost && s.drop && !s.u.mut.lossDropsSecondary {
		s.onGuestEnded(EvGuestEnded{Reason: fmt.Sprintf("host %s is lost, and the disks of this host had failed before: the VM goes on where the data is", r.Secondary.Host)})
		return true
	}
	return false
}

// mayCarry reports whether what only the secondary holds may be acknowledged: by
// the record and by every swap that may still replace it.
func (s *Side) mayCarry() bool {
	if s.u.mut.carryEarly && s.diskLost {
		return true
	}
	if s.phase != phaseRunning || !replicaLost(s.rec.Record) || s.diskBack && !s.u.mut.carryLate {
		return false
	}
	for _, a := range s.asked {
		if upToDate(a.record, s.cfg.Host) && !s.u.mut.carryLate {
			return false
		}
	}
	return true
}

// setCarry puts a change of the right to carry in force.
func (s *Side) setCarry(on bool) {
	if s.carry != on {
		s.carry = on
		s.do(ActCarry{On: on})
	}
}
