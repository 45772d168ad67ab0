package authority

import "perdure/internal/model"

// Event is something that happened to a shim, told to its Side by the driver.
// Events are handled one at a time, in the order the driver learned of them.
type Event interface{ event() }

// Outcome says what is known of a swap. The values are those of the shim
// protocol, so a driver converts one by a plain type conversion.
type Outcome string

// The outcomes of a swap.
const (
	// Done: the store carried it out; the record is what was asked for.
	Done Outcome = "done"
	// Conflict: it was not carried out and never will be; Current is the record now.
	Conflict Outcome = "conflict"
	// Unknown: it may have been carried out, or may still be, at any later time.
	Unknown Outcome = "unknown"
)

// EvStart is the first event of a Side; it answers with the first ActRead.
type EvStart struct{}

// EvRecord answers ActRead: what a linearizable read returned. Never feed it
// from a watch, a cache or a serializable read. Found is false when the record
// does not exist (the VM was deleted); then Versioned is ignored.
type EvRecord struct {
	model.Versioned
	Found bool
}

// EvReadFailed answers ActRead when there was no quorum or no answer.
type EvReadFailed struct{}

// EvSwap answers ActSwap of the same ID, exactly once. Revision in Current is
// the new revision for Done and the one found for Conflict (0: the record was
// deleted); Current is ignored for Unknown.
type EvSwap struct {
	ID      uint64
	Outcome Outcome
	Current model.Versioned
}

// EvFilled says that memory was filled here under a fresh run id made by the
// driver: as primary, the guest was built from the local disks and stands
// paused before its first instruction; as secondary, the copy is complete as
// of Epoch, checksummed, with its disks durable. From then on the secondary
// counts an epoch as complete only when it holds all of it.
type EvFilled struct {
	Run   model.RunID
	Epoch model.Epoch // 0 for a primary
}

// EvPeerUp says that a session with the peer shim stands and what its hello
// said. Run is the run whose memory the peer holds now (empty: none). It is
// given once per session, and again when the peer's hello changes.
type EvPeerUp struct {
	Host string
	Run  model.RunID
	Term model.Term
	Mode model.Mode
}

// EvPeerLost says that the peer is silent beyond the configured window, or
// closed, on all links. It may be wrong at any time.
type EvPeerLost struct{}

// EvPeerDead says that the memory of run Run on the other host is gone for
// certain: its shim said so (TellDead), its host runs a shim of another life,
// or its agent has reaped it. A guess does not count. Released copies the flag
// of TellDead and is false from any other source.
type EvPeerDead struct {
	Run      model.RunID
	Released bool
}

// EvCaughtUp (primary, syncing) says that the rest of the copy fits into one
// last epoch. The Side answers ActOutput{OutputAcked}; only after that is in
// force may the driver capture the last epoch, whose completion it then
// reports by EvSynced. So no output that the copy does not hold ever left.
type EvCaughtUp struct{}

// EvSynced (primary, syncing) says that the secondary reported: complete under
// Run as of Epoch, an epoch that was captured after OutputAcked was in force.
type EvSynced struct {
	Host  string
	Run   model.RunID
	Epoch model.Epoch
}

// EvGuestEnded says that the own QEMU died or became unusable (or, before it
// ran, could not be built). The Side mutes, tells the peer and ends.
type EvGuestEnded struct{ Reason string }

// EvPoweredOff (primary) says that the guest is off for good (by itself or by
// a person), the last epoch is committed and durable wherever the output rule
// in force asks for it, and its output has left.
type EvPoweredOff struct{}

// EvProtect (primary, simplex) asks to fill a secondary on Host.
type EvProtect struct{ Host string }

// EvUnprotect (primary, syncing or duplex) asks to drop the secondary: a
// person asked, it is too slow, its audit or trial load failed.
type EvUnprotect struct{ Reason string }

// EvSwitchedOver (primary, duplex) says that the final epoch of a planned move
// is complete and acknowledged by the secondary and that the own guest is
// stopped. The driver keeps the stopped guest until ActEnd: if the secondary
// is lost before it claims, the Side may order ActRun to go on here.
type EvSwitchedOver struct{}

// EvSwitchover (secondary) is the peer's TellSwitchover: the primary of run
// Run, in term Term, hands the VM over. The Side claims at once, survivor right
// or not; in any other term the word has no meaning.
type EvSwitchover struct {
	Run  model.RunID
	Term model.Term
}

// EvForce (secondary holding memory) is a person's audited order to take over
// whatever the record says of survivors; it makes the new branch Branch. Run
// must be the run held here, else it is refused.
type EvForce struct {
	Branch model.BranchID
	Run    model.RunID
}

// EvSurvivor is the agent's word about the survivor right, primary only.
// On: a voter on neither host of the pair was lost; the agent may or may not
// have written survivor already (Confirmed: it has, and has read it back). The
// Side holds the right only after its own linearizable read, and writes the
// record itself where it does not say so yet. Off: the voter is back; the
// right is given up at once and then taken out of the record.
type EvSurvivor struct {
	On        bool
	Confirmed bool
}

// EvReplicaLost (primary, duplex, level ca) says that this host's own copy of a
// disk is of no use any more. Nothing that only the secondary holds may be
// acknowledged before the Side answers ActCarry{On: true}. Refused (ActRefuse) where
// there is no secondary to go on with: then the failure is the guest's affair.
type EvReplicaLost struct{ Reason string }

// EvReplicaBack (primary, after ActCarry{On: true}) says that the own copy holds
// every write again, durably, and that each write since is acknowledged only when
// both hosts have it.
type EvReplicaBack struct{}

// EvTimer says that the timer ID, set by ActTimer, has run out.
type EvTimer struct{ ID TimerID }

// EvPeerTerm says that the peer (or the agent) mentioned Term. If it is higher
// than the newest one known, the record must be read.
type EvPeerTerm struct{ Term model.Term }

func (EvStart) event()        {}
func (EvRecord) event()       {}
func (EvReadFailed) event()   {}
func (EvSwap) event()         {}
func (EvFilled) event()       {}
func (EvPeerUp) event()       {}
func (EvPeerLost) event()     {}
func (EvPeerDead) event()     {}
func (EvCaughtUp) event()     {}
func (EvSynced) event()       {}
func (EvGuestEnded) event()   {}
func (EvPoweredOff) event()   {}
func (EvProtect) event()      {}
func (EvUnprotect) event()    {}
func (EvSwitchedOver) event() {}
func (EvSwitchover) event()   {}
func (EvForce) event()        {}
func (EvSurvivor) event()     {}
func (EvReplicaLost) event()  {}
func (EvReplicaBack) event()  {}
func (EvTimer) event()        {}
func (EvPeerTerm) event()     {}
