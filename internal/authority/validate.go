package authority

import (
	"fmt"

	"perdure/internal/model"
)

// Validate checks the invariants of a record. A record that fails it was not
// written by this package's transitions: refuse to act on it, and say so.
//
// Invariant: in simplex and syncing exactly the primary's replica is UpToDate;
// in duplex exactly the pair's are, but at level ca the primary's may be
// Inconsistent (LostReplica); while starting the primary's is. Every
// UpToDate replica is of the record's branch. Only a primary in duplex whose
// replica counts can be survivor. No seat holds a run where nothing lives.
func Validate(rec model.Record) error {
	fail := func(format string, args ...any) error {
		return fmt.Errorf("record of %s, term %d, %s: %w: %s", rec.VM, rec.Term, rec.Mode, ErrInvalid, fmt.Sprintf(format, args...))
	}
	switch rec.Wanted {
	case model.WantRunning, model.WantPaused, model.WantStopped:
	default:
		return fail("wanted %q", rec.Wanted)
	}
	p, s := rec.Primary, rec.Secondary
	switch {
	case s.Host != "" && s.Host == p.Host:
		return fail("one host holds both seats")
	case s.Run != "" && s.Run == p.Run:
		return fail("one run holds both seats")
	case p.Host == "" && p.Run != "" || s.Host == "" && s.Run != "":
		return fail("a run without a host")
	case rec.Mode != model.ModeStopped && p.Host == "":
		return fail("no primary")
	case rec.Mode != model.ModeStopped && rec.Term == 0:
		return fail("no term")
	}
	allowed := map[string]bool{p.Host: true} // hosts whose replica may be UpToDate
	want := map[string]bool{p.Host: true}    // hosts whose replica must be
	wantRun, wantSec := true, false
	switch rec.Mode {
	case model.ModeStopped:
		wantRun, want, allowed = false, nil, nil
	case model.ModeStarting:
		wantRun, allowed = false, nil
	case model.ModeSimplex:
	case model.ModeSyncing:
		wantSec = true
		if s.Run != "" || rec.Replicas[s.Host].State != model.Inconsistent {
			return fail("the secondary being filled holds a run or a replica that is not Inconsistent")
		}
	case model.ModeDuplex:
		wantSec = true
		if s.Run == "" {
			return fail("the secondary holds no run")
		}
		allowed[s.Host], want[s.Host] = true, true
		if rec.Level == model.LevelCA && rec.Replicas[p.Host].State == model.Inconsistent {
			if delete(want, p.Host); rec.Survivor != "" {
				return fail("survivor is %s, whose replica is given up", rec.Survivor)
			}
		}
	default:
		return fail("mode unknown")
	}
	switch {
	case wantRun != (p.Run != ""):
		return fail("primary is %s", seatWord(p))
	case wantSec != (s.Host != ""):
		return fail("secondary is %s", seatWord(s))
	case rec.Survivor != "" && (rec.Mode != model.ModeDuplex || rec.Survivor != p.Host):
		return fail("survivor is %s", rec.Survivor)
	}
	return validateReplicas(rec, allowed, want, fail)
}

func validateReplicas(rec model.Record, allowed, want map[string]bool, fail func(string, ...any) error) error {
	for h, r := range rec.Replicas {
		switch r.State {
		case model.UpToDate:
			if allowed != nil && !allowed[h] {
				return fail("replica on %s is UpToDate beside the primary's", h)
			}
			if r.Branch != rec.Branch {
				return fail("replica on %s is UpToDate but of branch %q", h, r.Branch)
			}
		case model.Outdated, model.Inconsistent:
		default:
			return fail("replica on %s is %q", h, r.State)
		}
		if r.Term > rec.Term {
			return fail("replica on %s is of term %d", h, r.Term)
		}
	}
	for h := range want {
		if !upToDate(rec, h) {
			return fail("replica on %s is %s", h, replicaWord(rec, h))
		}
	}
	return nil
}
