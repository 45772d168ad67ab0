package authority

import (
	"fmt"

	"perdure/internal/model"
)

// Config of a Side.
type Config struct {
	Host         string // this host's name
	ClaimDelayMS int    // how much longer than a primary a secondary waits before it claims: one round trip, ≥ 0
	RetryMS      int    // pause before a failed read or an unresolved swap is tried again, > 0
	PollMS       int    // distance of the slow checks of the record; 0: none
}

// phase is where a Side is in its one life; it only moves forward, but for
// standby → running (takeover).
type phase string

const (
	phaseNew     phase = "new"     // the record has not been read yet
	phaseBooting phase = "booting" // a start was granted here; the guest is being built
	phaseRunning phase = "running" // the live instance
	phaseFilling phase = "filling" // named as secondary; not recorded as a successor yet
	phaseStandby phase = "standby" // recorded as the successor
	phaseEnded   phase = "ended"
)

// askedSwap is a swap asked at the revision known now. Whatever its reply said,
// it counts until a higher revision was read: a lost request may land late.
type askedSwap struct {
	id       uint64
	record   model.Record
	answered bool // the driver has answered (Unknown); the request itself may still be on its way
	rewrite  bool // it writes a survivor right anew; see primaryState.survAnew
}

// Side is the authority state machine of one shim, from its start to its end.
//
// Invariant: rec is the newest record this side has read; asked holds every
// swap of this side that could still replace it; out never exceeds what the
// strictest of all these records allows.
type Side struct {
	cfg Config
	u   rules

	phase    phase
	run      model.RunID
	epoch    model.Epoch // as of which the secondary was filled
	rec      model.Versioned
	named    model.Term // term of the record that gave this shim its place to fill
	asked    []askedSwap
	lastID   uint64
	reading  bool
	reread   bool           // a read is owed as soon as the outstanding one returns
	readFrom model.Revision // newest revision known when the outstanding read was asked
	tellTerm bool           // the peer should hear of the new term
	wentBack bool           // the store was restored to an older state: no claims any more
	retrySet bool
	mayAsk   bool // the retry pause is over (or there is none)

	out  OutputRule
	ack  bool
	told ActMode

	carry bool // ActCarry in force

	primaryState
	secondaryState

	acts []Action // being collected by Step
}

// primaryState is what a running primary wants and knows.
type primaryState struct {
	drop       bool       // the secondary is lost, dead or unwanted
	dropFinal  bool       // and must not be taken back if it is heard again
	detachTold bool       // ActDetach was given for this loss
	caughtUp   bool       // the copy's last epoch may be captured: output is held
	synced     model.Seat // the secondary that reported complete
	protect    string     // host to be filled
	protRead   bool       // and the record was read since, as agents change replicas too
	stopWanted bool       // the guest is off
	handing    bool       // the guest is stopped, the secondary was told to claim
	survOn     bool       // the agent says: hold the survivor right
	survRead   bool       // and this side has read the record since
	survOff    bool       // the right was given up; to be taken out of the record
	survPast   bool       // it was given up once, so the agent may have a removal on its way
	survAnew   bool       // hence it is held only after one more write of our own
	detached   bool       // went on alone under the survivor right; irreversible until recorded
	diskLost   bool       // the own copy of the disks is given up, or its return is not recorded yet
	diskBack   bool       // and is whole again: to be recorded
}

// secondaryState is what a secondary wants and knows.
type secondaryState struct {
	peerLost    bool           // the primary is silent
	claimDue    bool           // and has been for the extra round trip
	deadRun     model.RunID    // this run of the primary is gone for certain
	deadFree    bool           // and it gave up its survivor right unused
	consentRun  model.RunID    // this run of the primary handed over …
	consentTerm model.Term     // … in this term
	branch      model.BranchID // a person's forced takeover
}

// New returns a Side that has done nothing yet; feed it EvStart first.
func New(cfg Config) *Side {
	return &Side{cfg: cfg, phase: phaseNew, mayAsk: true, told: ActMode{Role: RoleNone}}
}

// Record returns the newest record read, revision 0 before the first. The
// caller must not change it.
func (s *Side) Record() model.Versioned { return s.rec }

// Role returns what this side is now.
func (s *Side) Role() Role { return s.told.Role }

// Mode returns the mode of the newest record read.
func (s *Side) Mode() model.Mode { return s.rec.Record.Mode }

// Term returns the term of the newest record read.
func (s *Side) Term() model.Term { return s.rec.Record.Term }

// Run returns the run held here, empty before EvFilled.
func (s *Side) Run() model.RunID { return s.run }

// Output returns the output rule in force.
func (s *Side) Output() OutputRule { return s.out }

// Acking reports whether complete epochs are acknowledged.
func (s *Side) Acking() bool { return s.ack }

// Carrying reports whether what only the secondary holds may be acknowledged.
func (s *Side) Carrying() bool { return s.carry }

// Detached reports whether the primary went on alone under the survivor right
// and the record does not say so yet.
func (s *Side) Detached() bool { return s.detached }

// Unresolved reports whether a swap of this side may still land.
func (s *Side) Unresolved() bool { return len(s.asked) > 0 }

// Ended reports whether ActEnd was given.
func (s *Side) Ended() bool { return s.phase == phaseEnded }

// Step handles one event and returns what the driver must do, in this order.
// Events after ActEnd are ignored. The list belongs to the caller.
func (s *Side) Step(ev Event) []Action {
	if s.phase == phaseEnded {
		return nil
	}
	s.acts = nil
	s.handle(ev)
	if s.phase != phaseEnded {
		s.settle()
	}
	acts := s.acts
	s.acts = nil
	return acts
}

func (s *Side) do(a Action) { s.acts = append(s.acts, a) }

// handle takes in one fact; what follows from it is settle's matter.
func (s *Side) handle(ev Event) {
	switch e := ev.(type) {
	case EvStart:
		s.read()
	case EvRecord:
		s.onRecord(e)
	case EvReadFailed:
		s.reading, s.reread = false, true
		s.armRetry()
	case EvSwap:
		s.onSwap(e)
	case EvTimer:
		s.onTimer(e)
	case EvPeerTerm:
		if e.Term > s.rec.Record.Term {
			s.read()
		}
	case EvFilled:
		s.onFilled(e)
	case EvGuestEnded:
		s.onGuestEnded(e)
	case EvPeerUp:
		s.onPeerUp(e)
	case EvPeerLost:
		s.onPeerLost()
	case EvPeerDead:
		s.onPeerDead(e)
	default:
		s.onRequest(ev)
	}
}

// read asks for a linearizable read, or for one more after the outstanding one.
func (s *Side) read() {
	if s.reading {
		s.reread = true
		return
	}
	s.reading, s.reread, s.readFrom = true, false, s.rec.Revision
	s.do(ActRead{})
}

func (s *Side) armRetry() {
	if !s.retrySet {
		s.retrySet = true
		s.do(ActTimer{ID: TimerRetry, Milliseconds: s.cfg.RetryMS})
	}
}

func (s *Side) onRecord(e EvRecord) {
	s.reading = false
	again := s.reread
	if !e.Found {
		s.end("the record was deleted")
		return
	}
	s.survRead, s.protRead = s.survOn, s.protect != ""
	s.adopt(e.Versioned, s.readFrom)
	if again {
		s.read()
	}
}

// adopt takes in a record from a read or a swap's reply. floor is the newest
// revision known when it was asked for: a linearizable answer cannot be older.
func (s *Side) adopt(v model.Versioned, floor model.Revision) {
	if s.u.mut.anyRead && v.Revision != s.rec.Revision {
		s.rec, s.asked = v, nil
		return
	}
	if v.Revision < floor || (v.Revision > s.rec.Revision && v.Record.Term < s.rec.Record.Term) {
		if !s.wentBack {
			s.wentBack = true
			s.do(ActAlarm{Code: "record-went-back", Text: fmt.Sprintf(
				"the cluster store shows term %d, revision %d, older than term %d, revision %d already seen: it was rebuilt or restored; this side claims nothing until a person decides",
				v.Record.Term, v.Revision, s.rec.Record.Term, s.rec.Revision)})
		}
		return
	}
	if v.Revision <= s.rec.Revision {
		return // an answer overtaken by a newer one; settles nothing
	}
	rose := v.Record.Term > s.rec.Record.Term && s.rec.Revision > 0
	s.rec, s.asked, s.mayAsk = v, nil, true
	if s.retrySet {
		s.retrySet = false
		s.do(ActTimer{ID: TimerRetry, Milliseconds: -1})
	}
	s.tellTerm = s.tellTerm || rose
}

func (s *Side) onSwap(e EvSwap) {
	i, floor := -1, model.Revision(0)
	for k := range s.asked {
		if s.asked[k].id == e.ID {
			i, floor = k, s.rec.Revision
		}
	}
	switch e.Outcome {
	case Done:
		s.survRead = s.survOn
		if i >= 0 && s.asked[i].rewrite {
			s.survAnew = false
		}
		s.adopt(e.Current, floor)
	case Conflict:
		if e.Current.Revision == 0 {
			s.end("the record was deleted")
			return
		}
		if i >= 0 {
			s.asked = append(append([]askedSwap(nil), s.asked[:i]...), s.asked[i+1:]...)
		}
		s.adopt(e.Current, floor)
	default:
		if i < 0 {
			return // settled meanwhile
		}
		s.asked = append([]askedSwap(nil), s.asked...)
		s.asked[i].answered = true
		if s.u.mut.notStricter {
			s.asked = nil
		}
		s.mayAsk = false
		s.read()
		s.armRetry()
	}
}

func (s *Side) onTimer(e EvTimer) {
	switch e.ID {
	case TimerRetry:
		s.retrySet = false
		s.mayAsk = true
		if s.reread || s.waitsForRecord() {
			s.read()
		}
		if s.handing {
			s.tellSwitchover()
		}
	case TimerClaim:
		s.claimDue = s.claimDue || s.peerLost
	case TimerPoll:
		s.read()
		s.do(ActTimer{ID: TimerPoll, Milliseconds: s.cfg.PollMS})
	}
}

// waitsForRecord reports whether only somebody else's swap can move this side:
// a secondary that lost its primary but may not claim.
func (s *Side) waitsForRecord() bool {
	switch s.phase {
	case phaseFilling:
		return s.peerLost || s.primaryDead()
	case phaseStandby:
		return (s.claimDue || s.primaryDead()) && !s.canClaim()
	default:
		return s.handing
	}
}

func (s *Side) onFilled(e EvFilled) {
	if s.run != "" || e.Run == "" || (s.phase != phaseBooting && s.phase != phaseFilling) {
		s.end(fmt.Sprintf("memory filled as %q while %s", e.Run, s.phase))
		return
	}
	s.run, s.epoch = e.Run, e.Epoch
}

func (s *Side) onGuestEnded(e EvGuestEnded) {
	s.mute()
	if s.phase != phaseNew && s.phase != phaseBooting {
		s.do(ActTell{Kind: TellDead, Term: s.rec.Record.Term, Run: s.run, Released: !s.detached})
	}
	s.end(e.Reason)
}

// mute stops acknowledgements and output, before anything else happens.
func (s *Side) mute() {
	s.setCarry(false)
	if s.ack {
		s.ack = false
		s.do(ActAck{On: false})
	}
	if s.out != OutputNone {
		s.out = OutputNone
		s.do(ActOutput{Rule: OutputNone})
	}
}

func (s *Side) end(reason string) {
	s.mute()
	s.phase = phaseEnded
	s.told = ActMode{Role: RoleNone, Mode: s.rec.Record.Mode, Term: s.rec.Record.Term}
	s.do(ActEnd{Reason: reason})
}

// settle draws the consequences of what is known: place, swap, rules. Whatever
// becomes stricter is done before a swap is asked; whatever becomes looser
// rests on the record alone.
func (s *Side) settle() {
	if s.rec.Revision == 0 {
		return
	}
	before := s.phase
	s.place()
	if s.phase == phaseEnded {
		return
	}
	if s.phase == phaseRunning {
		s.stopAck() // whatever it does, a live instance takes no epochs in
	}
	s.tellMode()
	s.enter(before)
	var want *model.Record
	if s.phase == phaseRunning {
		if s.settleReplica() {
			return
		}
		s.settleSurvivor()
		want = s.wantPrimary()
	} else {
		want = s.wantOther()
	}
	if want == nil && len(s.asked) > 0 {
		w := withdraw(s.rec.Record)
		want = &w
	}
	s.ask(want)
	s.applyRules()
	if n := len(s.asked); n > 0 && s.asked[n-1].id == 0 {
		s.lastID++
		s.asked[n-1].id = s.lastID
		s.do(ActSwap{ID: s.lastID, Revision: s.rec.Revision, Record: s.asked[n-1].record})
	}
	if s.tellTerm {
		s.tellTerm = false
		s.do(ActTell{Kind: TellTerm, Term: s.rec.Record.Term, Run: s.run})
	}
	if s.waitsForRecord() {
		s.armRetry()
	}
}

// ask puts want among the asked swaps (with id 0: not sent yet), unless one is
// in flight or the retry pause is not over. An equal older one is replaced: of
// two equal swaps at one revision at most one can land, with one result.
func (s *Side) ask(want *model.Record) {
	if want == nil || !s.mayAsk || s.wentBack {
		return
	}
	var keep []askedSwap
	for _, a := range s.asked {
		if !a.answered {
			return
		}
		if !sameRecord(a.record, *want) {
			keep = append(keep, a)
		}
	}
	s.asked = append(keep, askedSwap{record: *want, rewrite: s.survAnew && want.Survivor == s.cfg.Host})
}

func sameRecord(a, b model.Record) bool {
	if len(a.Replicas) != len(b.Replicas) {
		return false
	}
	for h, r := range a.Replicas {
		if b.Replicas[h] != r {
			return false
		}
	}
	a.Replicas, b.Replicas = nil, nil
	return a.VM == b.VM && a.Term == b.Term && a.Mode == b.Mode && a.Level == b.Level && a.Primary == b.Primary &&
		a.Secondary == b.Secondary && a.Branch == b.Branch && a.Survivor == b.Survivor && a.Wanted == b.Wanted
}

// place moves the phase to what the record says of this host and run, or ends
// the side when it says nothing.
func (s *Side) place() {
	r := s.rec.Record
	me := model.Seat{Host: s.cfg.Host, Run: s.run}
	live := r.Mode == model.ModeSimplex || r.Mode == model.ModeSyncing || r.Mode == model.ModeDuplex
	switch {
	case live && s.sits(r.Primary) && (s.run != "" || s.u.mut.noRunCheck):
		s.phase = phaseRunning
	case r.Mode == model.ModeDuplex && s.sits(r.Secondary) && (s.run != "" || s.u.mut.noRunCheck):
		s.phase = phaseStandby
	case r.Mode == model.ModeSyncing && r.Secondary.Host == me.Host && s.fresh(phaseFilling):
		s.phase = phaseFilling
	case r.Mode == model.ModeStarting && r.Primary.Host == me.Host && s.fresh(phaseBooting):
		s.phase = phaseBooting
	case s.phase == phaseStandby && r.Mode == model.ModeStopped && s.u.mut.takeOverStopped:
	default:
		if r.Mode == model.ModeStopped {
			s.mute()
			if s.phase == phaseRunning {
				s.do(ActTell{Kind: TellTerm, Term: r.Term, Run: s.run})
			}
			s.end("stopped")
			return
		}
		s.end(fmt.Sprintf("term %d: %s, primary %s, secondary %s: this run has no place in it", r.Term, r.Mode, seatWord(r.Primary), seatWord(r.Secondary)))
	}
}

// sits reports whether this side is the one in the seat: host and run.
func (s *Side) sits(seat model.Seat) bool {
	return seat.Host == s.cfg.Host && (seat.Run == s.run || s.u.mut.noRunCheck)
}

// fresh reports whether a place to be filled is the one this shim was started
// for. One life, one filling: a later grant of the same kind is for a new shim.
func (s *Side) fresh(p phase) bool {
	if s.phase == phaseNew {
		s.named = s.rec.Record.Term
		return true
	}
	return s.phase == p && s.named == s.rec.Record.Term
}

func seatWord(s model.Seat) string {
	if s.Empty() {
		return "none"
	}
	if s.Run == "" {
		return s.Host
	}
	return s.Host + "/" + string(s.Run)
}

// enter starts what a new phase begins with.
func (s *Side) enter(before phase) {
	if s.phase == before {
		if s.phase == phaseRunning && s.handing && s.rec.Record.Mode == model.ModeSimplex {
			// The secondary was lost before it claimed; the kept guest goes on.
			s.handing = false
			s.do(ActRun{Paused: s.rec.Record.Wanted == model.WantPaused})
		}
		return
	}
	paused := s.rec.Record.Wanted == model.WantPaused
	switch {
	case s.phase == phaseBooting:
		s.do(ActBoot{})
	case s.phase == phaseFilling:
		s.do(ActStandby{})
	case s.phase == phaseRunning && before == phaseBooting:
		s.do(ActRun{Paused: paused})
	case s.phase == phaseRunning:
		s.do(ActTakeOver{Term: s.rec.Record.Term, Paused: paused})
		s.stopClaimTimer()
		s.secondaryState = secondaryState{}
	}
	if s.cfg.PollMS > 0 && (before == phaseNew || before == phaseBooting) {
		s.do(ActTimer{ID: TimerPoll, Milliseconds: s.cfg.PollMS})
	}
}

func (s *Side) stopAck() {
	if s.ack && !s.u.mut.claimWhileAcking {
		s.ack = false
		s.do(ActAck{On: false})
	}
}

// tellMode reports role, mode and stamps when they changed.
func (s *Side) tellMode() {
	r := s.rec.Record
	m := ActMode{Role: RolePrimary, Mode: r.Mode, Term: r.Term, Run: s.run}
	switch s.phase {
	case phaseFilling, phaseStandby:
		m.Role = RoleSecondary
		m.PeerHost, m.PeerRun = r.Primary.Host, r.Primary.Run
	default:
		m.PeerHost, m.PeerRun = r.Secondary.Host, r.Secondary.Run
	}
	if m != s.told {
		s.told = m
		s.do(m)
	}
}

// applyRules brings acknowledging and output to what all possible records allow.
func (s *Side) applyRules() {
	if s.phase == phaseFilling || s.phase == phaseStandby {
		if on := s.mayAck(); on != s.ack {
			if on {
				s.ack = true
				s.do(ActAck{On: true})
			} else {
				s.stopAck()
			}
		}
		return
	}
	s.setCarry(s.mayCarry())
	rule := OutputNone
	if s.phase == phaseRunning {
		rule = s.ruleUnder(s.rec.Record)
		for _, a := range s.asked {
			if s.u.mut.freeOnClaim && a.record.Mode == model.ModeSimplex {
				rule = OutputFree
				break
			}
			if u := s.ruleUnder(a.record); u < rule && !s.u.mut.notStricter {
				rule = u
			}
		}
	}
	if rule != s.out {
		s.out = rule
		s.do(ActOutput{Rule: rule})
	}
}
