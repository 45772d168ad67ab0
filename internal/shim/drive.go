package shim

import (
	"context"
	"fmt"
	"time"

	"perdure/internal/authority"
	"perdure/internal/model"
	"perdure/internal/shimapi"
)

// storeTimeout bounds one read or swap; a swap that has no answer by then
// counts as unknown.
const storeTimeout = 3 * time.Second

// step feeds one event to the authority and carries out what it answers, in
// that order. It runs in Run's goroutine only.
func (s *Shim) step(ev authority.Event) {
	s.note(ev)
	for _, a := range s.side.Step(ev) {
		if s.ctx.Err() != nil {
			return
		}
		s.act(a)
	}
}

// note keeps the newest record for status.
func (s *Shim) note(ev authority.Event) {
	var v model.Versioned
	switch e := ev.(type) {
	case authority.EvRecord:
		if !e.Found {
			return
		}
		v = e.Versioned
	case authority.EvSwap:
		v = e.Current
	default:
		return
	}
	s.mu.Lock()
	if v.Revision > s.record.Revision {
		s.record = v
	}
	s.mu.Unlock()
}

// act carries out one action.
func (s *Shim) act(a authority.Action) {
	s.log.Debug("action", "action", fmt.Sprintf("%T%+v", a, a))
	switch a := a.(type) {
	case authority.ActRead:
		s.goWork(s.read)
	case authority.ActSwap:
		s.goWork(func() { s.swap(a) })
	case authority.ActOutput:
		s.setOutput(a.Rule)
	case authority.ActCarry:
		s.setCarry(a.On)
	case authority.ActAck:
		if st := s.standby(); st != nil {
			st.setAcking(a.On)
		}
	case authority.ActBoot:
		s.goWork(s.boot)
	case authority.ActStandby:
		s.startStandby()
	case authority.ActRun:
		if p := s.primary(); p != nil {
			p.run(a.Paused)
		}
	case authority.ActDetach:
		if p := s.primary(); p != nil {
			p.detach()
		}
	case authority.ActTakeOver:
		if st := s.standby(); st != nil {
			s.goWork(func() { s.takeOver(st, a) })
		}
	case authority.ActEnd:
		s.end(errEnded{a.Reason})
	case authority.ActTell:
		s.tell(a)
	case authority.ActTimer:
		s.setTimer(a)
	case authority.ActMode:
		s.setMode(a)
	case authority.ActAlarm:
		s.tl.problem(model.Problem{Code: a.Code, Severity: model.Critical, Text: a.Text, Action: "see the VM's events; no output leaves that is not safe"})
	case authority.ActRefuse:
		s.refusal = a.Text
	}
}

// ask feeds an event that came from a person or the agent and returns the
// authority's refusal, if it refused.
func (s *Shim) ask(ctx context.Context, ev authority.Event) error {
	var refused string
	err := s.inRun(ctx, func() {
		s.refusal = ""
		s.step(ev)
		refused = s.refusal
	})
	if err != nil {
		return err
	}
	if refused != "" {
		return fmt.Errorf("refused: %s", refused)
	}
	return nil
}

func (s *Shim) standby() *standby {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stby
}

// read does the linearizable read that the authority asked for.
func (s *Shim) read() {
	ctx, cancel := context.WithTimeout(s.ctx, storeTimeout)
	defer cancel()
	r, err := s.agent.Read(ctx)
	if err != nil || !r.OK {
		s.post(authority.EvReadFailed{})
		return
	}
	s.post(authority.EvRecord{Versioned: r.Current, Found: r.Found})
}

// hintRead makes the authority read when a watch says that the record is newer.
func (s *Shim) hintRead() {
	s.step(authority.EvPeerTerm{Term: s.side.Record().Record.Term + 1})
}

func (s *Shim) swap(a authority.ActSwap) {
	ctx, cancel := context.WithTimeout(s.ctx, storeTimeout)
	defer cancel()
	start := time.Now()
	r := s.agent.Swap(ctx, a.Revision, a.Record)
	s.log.Info("swap", "mode", a.Record.Mode, "term", a.Record.Term, "outcome", r.Outcome, "error", r.Error, "took_ms", ms(time.Since(start)))
	out := authority.Unknown
	switch r.Outcome {
	case shimapi.SwapDone:
		out = authority.Done
	case shimapi.SwapConflict:
		out = authority.Conflict
	}
	s.post(authority.EvSwap{ID: a.ID, Outcome: out, Current: r.Current})
}

func (s *Shim) setTimer(a authority.ActTimer) {
	if t := s.timers[a.ID]; t != nil {
		t.Stop()
	}
	if a.Milliseconds < 0 {
		delete(s.timers, a.ID)
		return
	}
	s.timers[a.ID] = time.AfterFunc(time.Duration(a.Milliseconds)*time.Millisecond, func() { s.post(authority.EvTimer{ID: a.ID}) })
}

// setOutput puts an output rule in force before it returns.
func (s *Shim) setOutput(r authority.OutputRule) {
	rule := ruleNone
	switch r {
	case authority.OutputAcked:
		rule = ruleAcked
	case authority.OutputFree:
		rule = ruleFree
	}
	s.gate.setRule(rule)
	if p := s.primary(); p != nil {
		p.ruleChanged(rule)
	}
}

// tell sends a word of the authority to the peer, if there is one.
func (s *Shim) tell(a authority.ActTell) {
	switch {
	case s.primary() != nil:
		s.primary().tell(a)
	case s.standby() != nil:
		s.standby().tell(a)
	}
}

// setMode takes note of a new mode; a primary that became syncing goes to fill
// its secondary, one that became simplex gives up what was left of a pair.
func (s *Shim) setMode(a authority.ActMode) {
	s.mu.Lock()
	old := s.mode
	s.mode = a
	prim, replica := s.prim, s.record.Record.Replicas[s.cfg.Host]
	s.mu.Unlock()
	s.tl.setTerm(a.Term)
	if a == old {
		return
	}
	if a.Mode != old.Mode || a.Role != old.Role {
		s.tl.add("mode", 0, 0, "%s, %s, term %d", a.Role, a.Mode, a.Term)
	}
	s.markMode(a)
	if prim == nil || a.Role != authority.RolePrimary {
		return
	}
	switch a.Mode {
	case model.ModeSyncing:
		prim.protect(a.PeerHost, a.Term)
	case model.ModeDuplex:
		if old.Mode != a.Mode {
			prim.protected()
		}
		if prim.carrier != nil {
			prim.carrier.recorded(replica)
		}
	case model.ModeSimplex:
		s.tl.solved(pairApart)
		prim.alone()
	}
}
