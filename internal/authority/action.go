package authority

import "perdure/internal/model"

// Action is one thing a driver must do. The order of a list is binding: an
// action takes full effect before the next one begins (ActSwap, ActRead and
// ActTell: before the next one begins it has at least been queued behind
// everything queued earlier). If a driver dies between two, so does the shim.
type Action interface{ action() }

// OutputRule says what may leave the guest: frames, console bytes, agent
// answers, and the events derived from them. A higher rule allows more.
type OutputRule int

// The output rules, strictest first.
const (
	// OutputNone: nothing leaves; the gate is closed; what was held stays held.
	OutputNone OutputRule = iota
	// OutputAcked: output of an epoch leaves once the secondary whose run is
	// ActMode.PeerRun (or EvSynced.Run while asking for duplex) has acknowledged
	// it and its flushes are durable here. No clock is involved.
	OutputAcked
	// OutputFree: output leaves when what it depends on is durable here; no
	// other replica is UpToDate, so nobody else may be granted the VM.
	OutputFree
)

// String returns "none", "acked" or "free".
func (r OutputRule) String() string {
	switch r {
	case OutputNone:
		return "none"
	case OutputAcked:
		return "acked"
	default:
		return "free"
	}
}

// Role is what a Side is now.
type Role string

// The roles.
const (
	RoleNone      Role = "none"      // nothing read yet, or ended
	RolePrimary   Role = "primary"   // building, running, or handing over
	RoleSecondary Role = "secondary" // being filled, or standing by
)

// TimerID names a timer of a Side. Setting a timer again replaces it.
type TimerID string

// The timers.
const (
	TimerRetry TimerID = "retry" // a read failed, or a swap is unresolved
	TimerClaim TimerID = "claim" // the secondary's extra round trip before it claims
	TimerPoll  TimerID = "poll"  // slow check that the record still names this seat
)

// TellKind is the kind of a message to the peer shim.
type TellKind string

// The kinds of messages. The driver stamps each with term and run (ActMode).
const (
	// TellTerm: the record has reached Term; arrives as EvPeerTerm.
	TellTerm TellKind = "term"
	// TellDead: the memory of Run here is gone for good; arrives as EvPeerDead.
	TellDead TellKind = "dead"
	// TellSwitchover: the guest of Run is stopped, claim now; arrives as EvSwitchover.
	TellSwitchover TellKind = "switchover"
)

// ActRead asks for one linearizable read; answered by EvRecord or EvReadFailed.
// At most one is outstanding.
type ActRead struct{}

// ActSwap asks for one compare-and-swap: write Record if the revision is still
// Revision. Answered exactly once by EvSwap with the same ID; if the answer
// does not come, the driver answers Unknown itself and drops a later one.
type ActSwap struct {
	ID       uint64
	Revision model.Revision
	Record   model.Record
}

// ActOutput sets what may leave the guest from now on.
type ActOutput struct{ Rule OutputRule }

// ActAck (secondary) lets complete epochs be acknowledged, or not. When Off has
// taken effect, no acknowledgement may be sent any more, not even one that was
// due; epochs that arrive are still collected, and may be used.
type ActAck struct{ On bool }

// ActBoot asks to build the guest from the local disks, paused, under a fresh
// run id; answered by EvFilled or EvGuestEnded. Needs the run lock.
type ActBoot struct{}

// ActStandby asks to start the standby and to let the peer fill it; answered
// by EvFilled or EvGuestEnded. The local replica must not be touched, nor be
// called Inconsistent by its own metadata, before the first piece of the copy
// arrives from the primary's run in ActMode.PeerRun, stamped with this very
// term: the record that was read may be a moment old, and may by now call this
// replica UpToDate. (The explorer found this one.)
type ActStandby struct{}

// ActRun makes the paused local guest the live instance: cont, unless Paused,
// which says that a person wants it paused.
type ActRun struct{ Paused bool }

// ActDetach asks the primary to mark, durably, every block in its bitmap that
// the secondary has not reported durable. It precedes each claim of simplex.
type ActDetach struct{}

// ActTakeOver makes the newest complete epoch held here the live instance:
// load, cont (unless Paused), announce. Acknowledging was stopped before, and
// the driver drops incomplete epochs and those that arrive from now on.
type ActTakeOver struct {
	Term   model.Term
	Paused bool
}

// ActEnd is always the last action of a list: close the gate, kill the own
// QEMU, discard the memory, exit. The Side ignores every event after it.
type ActEnd struct{ Reason string }

// ActTell sends a message to the peer, best effort.
type ActTell struct {
	Kind     TellKind
	Term     model.Term
	Run      model.RunID
	Released bool // TellDead: a survivor right was given up unused; see EvPeerDead
}

// ActTimer sets a timer; EvTimer reports when it has run out. Milliseconds
// below 0 stops it.
type ActTimer struct {
	ID           TimerID
	Milliseconds int
}

// ActMode says what the Side is, for status and for stamping messages. Term
// and Run stamp every message; messages of another peer run are refused, and
// those of a higher term are reported by EvPeerTerm before anything else.
type ActMode struct {
	Role     Role
	Mode     model.Mode
	Term     model.Term
	Run      model.RunID
	PeerHost string
	PeerRun  model.RunID
}

// ActCarry lets the primary acknowledge, within the output rule, what only the
// secondary holds, or not. When Off has taken effect nothing is acknowledged any
// more that this host does not hold as well.
type ActCarry struct{ On bool }

// ActAlarm raises a named problem; Code is stable, kebab-case.
type ActAlarm struct {
	Code string
	Text string
}

// ActRefuse answers a person's or agent's request (EvProtect, EvUnprotect,
// EvForce, EvSurvivor, EvSwitchedOver, EvReplicaLost, EvReplicaBack) that cannot be met, with the reason.
type ActRefuse struct{ Text string }

func (ActRead) action()     {}
func (ActSwap) action()     {}
func (ActOutput) action()   {}
func (ActAck) action()      {}
func (ActBoot) action()     {}
func (ActStandby) action()  {}
func (ActRun) action()      {}
func (ActDetach) action()   {}
func (ActTakeOver) action() {}
func (ActEnd) action()      {}
func (ActTell) action()     {}
func (ActTimer) action()    {}
func (ActMode) action()     {}
func (ActCarry) action()    {}
func (ActAlarm) action()    {}
func (ActRefuse) action()   {}
