package agent

import (
	"context"
	"time"

	"perdure/internal/authority"
	"perdure/internal/clusterstore"
	"perdure/internal/model"
	"perdure/internal/shimapi"
)

const (
	voterLost   = 2 * time.Second // probes of a voter must have failed so long for it to count as lost
	voterBack   = 2 * time.Second // the danger must have been over so long for the right to be given up
	clearAfter  = 3 * time.Second // the shim takes the right out of the record itself; else the agent does
	tellAgain   = 5 * time.Second
	survivorOp  = "survivor"
	survivorErr = "survivor-open"
)

// survivorState is what a worker remembers of the survivor right.
type survivorState struct {
	told    model.RunID // run whose shim was told "on"
	toldAt  time.Time
	okSince time.Time // since when the right is not needed
	offAt   time.Time // when the shim gave it up
}

// survivorNeeded reports whether the loss of host secondary now would cost the
// cluster its quorum, so that a primary could not ask for simplex. With three
// voters that is so when the witness is lost; with two, always. With more,
// further losses are borne, and the secondary keeps its right to claim. sure is
// false while too little is known to say either.
func survivorNeeded(members []clusterstore.Member, secondary string) (needed, sure bool) {
	voters, up := 0, 0
	for _, m := range members {
		if m.Learner {
			continue
		}
		voters++
		switch {
		case m.Self || m.Up:
		case m.LostFor >= voterLost:
			continue
		default:
			return false, false // failing, but not for long
		}
		if m.Name != secondary {
			up++
		}
	}
	return up < voters/2+1, voters > 0
}

// survivor keeps the survivor right of a primary here as the votes demand. The
// order is the rule: to gain it, write, read back, then tell; to lose it, the
// shim gives it up first, then it is taken out of the record.
func (w *worker) survivor(ctx context.Context, v clusterstore.VMView) {
	rec, s := v.Record.Record, &w.surv
	if rec.Mode != model.ModeDuplex {
		*s = survivorState{}
		w.problem("survivor", "", "", "")
		w.problem(survivorErr, "", "", "")
		return
	}
	needed, sure := survivorNeeded(w.a.store.Members(), rec.Secondary.Host)
	switch {
	case !sure || !w.a.store.Quorum() && !needed:
		s.okSince = time.Time{}
	case needed:
		s.okSince, s.offAt = time.Time{}, time.Time{}
		w.gainSurvivor(ctx, v)
	default:
		if s.okSince.IsZero() {
			s.okSince = time.Now()
		}
		if time.Since(s.okSince) >= voterBack && (rec.Survivor != "" || s.told != "") {
			w.dropSurvivor(ctx, v)
		}
		if rec.Survivor == "" && s.told == "" {
			w.problem("survivor", "", "", "")
			w.problem(survivorErr, "", "", "")
		}
	}
}

func (w *worker) gainSurvivor(ctx context.Context, v clusterstore.VMView) {
	rec, s, me := v.Record.Record, &w.surv, w.a.cfg.Name
	if rec.Survivor == me && s.told == rec.Primary.Run && time.Since(s.toldAt) < tellAgain {
		return
	}
	if rec.Survivor != me {
		got, err := w.a.change(ctx, w.vm, func(r model.Record) (model.Record, error) {
			if r.Primary != rec.Primary || r.Secondary != rec.Secondary {
				return r, errChangedMeanwhile
			}
			return authority.SetSurvivor(r, me, true)
		})
		if err != nil {
			w.problem(survivorErr, model.Warning, "a voter is lost and the survivor right could not be written: "+err.Error(),
				"bring the lost voter back; the loss of one more host would stop this VM until then")
			return
		}
		w.a.event(w.vm, "survivor-on", got.Record.Term, "%s: this host may go on alone, host %s will not claim meanwhile", w.a.voteShortage(), rec.Secondary.Host)
	}
	// Read back: the right is held only on a record that was seen to say so.
	cur, err := w.a.store.Record(ctx, w.vm)
	if err != nil || cur.Record.Survivor != me || cur.Record.Primary != rec.Primary {
		return
	}
	if err := w.shimOp(ctx, shimapi.Op{Op: survivorOp, Value: "on", Host: me}); err != nil {
		w.problem(survivorErr, model.Warning, "the survivor right is written but the shim did not take it: "+err.Error(), "none: it is told again")
		return
	}
	s.told, s.toldAt = rec.Primary.Run, time.Now()
	w.problem(survivorErr, "", "", "")
	w.problem("survivor", model.Warning, w.a.voteShortage()+"; this host goes on alone if it must, host "+rec.Secondary.Host+" does not take over by itself meanwhile",
		"bring the lost voter back, or add a witness where there is none")
}

// voteShortage says why the cluster could not bear the loss of one more voter.
func (a *Agent) voteShortage() string {
	for _, m := range a.store.Members() {
		if !m.Learner && m.LostFor >= voterLost {
			return "voter " + m.Name + " is lost"
		}
	}
	return "there are two hosts and no witness"
}

func (w *worker) dropSurvivor(ctx context.Context, v clusterstore.VMView) {
	rec, s, me := v.Record.Record, &w.surv, w.a.cfg.Name
	if s.told != "" || s.offAt.IsZero() {
		if err := w.shimOp(ctx, shimapi.Op{Op: survivorOp, Value: "off", Host: me}); err != nil {
			return // it still holds the right: the record must go on saying so
		}
		s.told, s.offAt = "", time.Now()
		w.a.event(w.vm, "survivor-off", rec.Term, "all voters that are needed are back: the survivor right is given up")
	}
	if rec.Survivor == me && time.Since(s.offAt) > clearAfter {
		_, err := w.a.change(ctx, w.vm, func(r model.Record) (model.Record, error) {
			if r.Primary != rec.Primary || r.Secondary != rec.Secondary {
				return r, errChangedMeanwhile
			}
			return authority.SetSurvivor(r, me, false)
		})
		if err != nil {
			return
		}
	}
	if rec.Survivor == "" {
		*s = survivorState{okSince: s.okSince}
	}
}

// shimOp asks the VM's shim on this host.
func (w *worker) shimOp(ctx context.Context, op shimapi.Op) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	c := w.a.shim(w.vm)
	defer c.Close()
	_, err := c.Op(ctx, op)
	return err
}
