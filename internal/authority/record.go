package authority

import (
	"errors"
	"fmt"

	"perdure/internal/model"
)

// The classes of refusals; every error of a transition wraps exactly one.
var (
	ErrMode     = errors.New("wrong mode")                // the record's mode does not allow it
	ErrSeat     = errors.New("wrong host or run")         // the seat named is not the one asked for
	ErrReplica  = errors.New("replica not fit")           // the host's replica may not be used so
	ErrSurvivor = errors.New("survivor right stands")     // another host may be ahead without asking
	ErrAlive    = errors.New("a live run may be left")    // memory has precedence over disks
	ErrBranch   = errors.New("wrong branch")              // histories that never resync by themselves
	ErrAhead    = errors.New("replica ahead of record")   // the store was rebuilt or restored
	ErrWanted   = errors.New("not wanted")                // a person wants it otherwise
	ErrArgument = errors.New("argument missing or wrong") // the caller's fault
	ErrLevel    = errors.New("level has no second copy")  // not a protected VM
	ErrInvalid  = errors.New("record inconsistent")       // Validate
)

// Other is what is known of the memory on the other host of a pair, for StartFromDisk.
type Other string

// What may be known of the other host.
const (
	OtherUnknown Other = ""       // not asked, or asked and no answer yet
	OtherHolds   Other = "holds"  // a shim there holds memory of the VM
	OtherEmpty   Other = "empty"  // its agent says: no shim, run lock free
	OtherSilent  Other = "silent" // no answer for the whole boot_wait, while this host had quorum
)

// Facts is what an agent must have found out before it starts a VM from disk.
type Facts struct {
	Host       string         // the host whose replica would be started
	OwnEmpty   bool           // no live run here: no shim, run lock free
	Other      Other          // the other host of the record (duplex, starting)
	Durable    bool           // the local replica's journal is replayed and its own metadata calls it UpToDate
	DiskTerm   model.Term     // term in the replica's own metadata
	DiskBranch model.BranchID // branch in the replica's own metadata
}

// rules carries the mutants of a test; the zero value is the product.
type rules struct{ mut mutants }

// Start grants a stopped VM to host, whose replica must be UpToDate:
// stopped → starting, term+1, wanted running. Other UpToDate replicas stay so
// until Booted, since nothing is written before.
func Start(rec model.Record, host string) (model.Record, error) { return rules{}.start(rec, host) }

// Booted turns a granted start into a live run: starting → simplex, term+1.
// Every other replica becomes Outdated in the same swap, so that none of them
// can be started once this one has written.
func Booted(rec model.Record, host string, run model.RunID) (model.Record, error) {
	return rules{}.booted(rec, host, run)
}

// Assign names host as the secondary to be filled: simplex → syncing, term+1.
// Its replica becomes Inconsistent.
func Assign(rec model.Record, host string) (model.Record, error) { return rules{}.assign(rec, host) }

// Duplex makes the filled secondary a possible successor: syncing → duplex,
// term+1. The primary must already behave as duplex.
func Duplex(rec model.Record, host string, run model.RunID) (model.Record, error) {
	return rules{}.duplex(rec, host, run)
}

// LostSecondary drops the secondary: duplex or syncing → simplex, term+1. A
// replica that was UpToDate becomes Outdated; a survivor right ends, and what
// was done under it is recorded by just that. Refused while the primary's own
// replica is given up.
func LostSecondary(rec model.Record) (model.Record, error) { return rules{}.lostSecondary(rec) }

// TakeOver makes the secondary, named by its seat, the primary: duplex →
// simplex, term+1. Refused while a survivor right stands.
func TakeOver(rec model.Record, by model.Seat) (model.Record, error) {
	return rules{}.takeOver(rec, by)
}

// Switchover is TakeOver with the primary's consent: the primary has stopped
// for good, and gave up any survivor right before it consented.
func Switchover(rec model.Record) (model.Record, error) { return rules{}.switchover(rec) }

// StartFromDisk starts a VM whose record says it lives while no live run is
// left: starting, simplex, syncing or duplex → starting, term+1. It is allowed
// only from an UpToDate, durable replica, and only when the facts show that no
// memory of the VM is left that has precedence.
func StartFromDisk(rec model.Record, f Facts) (model.Record, error) {
	return rules{}.startFromDisk(rec, f)
}

// PowerOff records that the guest is off and its last epoch committed: any
// live mode → stopped, term+1, wanted stopped. Replicas keep their state, so
// after a duplex power-off either host may start it.
func PowerOff(rec model.Record) (model.Record, error) { return rules{}.powerOff(rec) }

// SetSurvivor writes (on) or removes (off) the survivor right of the primary.
// by is the host that asks; it must be the primary's, else the right could be
// taken from under a primary that uses it. The term stays.
func SetSurvivor(rec model.Record, by string, on bool) (model.Record, error) {
	return rules{}.setSurvivor(rec, by, on)
}

// Force is a person's decision: host becomes the primary of a new branch, from
// the memory of run (→ simplex), or from its disk when run is empty
// (→ starting). Every other replica becomes Outdated and keeps its branch. An
// Inconsistent replica is refused: there is nothing in it that ever was.
func Force(rec model.Record, host string, run model.RunID, branch model.BranchID) (model.Record, error) {
	return rules{}.force(rec, host, run, branch)
}

// SetWanted records what a person wants. The term stays. A stopped VM becomes
// wanted running by Start only.
func SetWanted(rec model.Record, w model.Wanted) (model.Record, error) {
	switch w {
	case model.WantRunning, model.WantPaused, model.WantStopped:
	default:
		return rec, fmt.Errorf("set wanted %q: %w", w, ErrArgument)
	}
	if rec.Mode == model.ModeStopped && w != model.WantStopped {
		return rec, fmt.Errorf("set wanted %s: %w: stopped", w, ErrMode)
	}
	n := rec.Clone()
	n.Wanted = w
	n.Reason = "wanted " + string(w)
	return n, nil
}

// SetLevel records another level of protection. The term stays. It is for a VM
// that is stopped or runs alone: then nothing that is in force depends on the level.
func SetLevel(rec model.Record, l model.Level) (model.Record, error) {
	switch {
	case l != model.LevelNone && l != model.LevelCA && l != model.LevelFT:
		return rec, fmt.Errorf("set level %q: %w", l, ErrArgument)
	case rec.Mode != model.ModeStopped && rec.Mode != model.ModeSimplex:
		return rec, fmt.Errorf("set level %s: %w: %s", l, ErrMode, rec.Mode)
	}
	n := rec.Clone()
	n.Level = l
	n.Reason = "level " + string(l)
	return n, nil
}

// Outdate records that the replica of host lacks something: a disk that it has no
// copy of, or one that is made anew. Another replica must be UpToDate. The term
// stays. It is for a VM that is stopped or runs alone, on another host.
func Outdate(rec model.Record, host string) (model.Record, error) {
	r, ok := rec.Replicas[host]
	switch {
	case rec.Mode != model.ModeStopped && rec.Mode != model.ModeSimplex:
		return rec, fmt.Errorf("outdate the replica of %s: %w: %s", host, ErrMode, rec.Mode)
	case rec.Mode == model.ModeSimplex && rec.Primary.Host == host:
		return rec, fmt.Errorf("outdate the replica of %s: %w: the VM runs from it", host, ErrSeat)
	case !ok:
		return rec, fmt.Errorf("outdate the replica of %s: %w: there is none", host, ErrReplica)
	}
	other := false
	for h, o := range rec.Replicas {
		other = other || h != host && o.State == model.UpToDate
	}
	if r.State != model.UpToDate {
		return rec, nil
	}
	if !other {
		return rec, fmt.Errorf("outdate the replica of %s: %w: it is the only UpToDate one", host, ErrReplica)
	}
	n := rec.Clone()
	r.State = model.Outdated
	n.Replicas[host] = r
	n.Reason = "replica of " + host + " outdated"
	return n, nil
}

// Discard forgets the replica of host, which a person gave up (say, the old
// branch after a forced takeover): from then on host may be filled anew. The
// term stays. A seat's or an UpToDate replica is refused.
func Discard(rec model.Record, host string) (model.Record, error) {
	r, ok := rec.Replicas[host]
	switch {
	case !ok:
		return rec, fmt.Errorf("discard replica on %s: %w: no replica", host, ErrArgument)
	case r.State == model.UpToDate || host == rec.Secondary.Host || (host == rec.Primary.Host && rec.Mode != model.ModeStopped):
		return rec, fmt.Errorf("discard replica on %s: %w: %s, in use or needed", host, ErrReplica, r.State)
	}
	n := rec.Clone()
	delete(n.Replicas, host)
	n.Reason = "replica on " + host + " discarded"
	return n, nil
}

// next returns a copy of rec with the following term. UpToDate replicas are
// UpToDate as of the new term; the term of any other says how old its data is.
func next(rec model.Record, mode model.Mode, reason string) model.Record {
	n := rec.Clone()
	n.Term++
	n.Mode = mode
	n.Reason = reason
	return n
}

// stamp gives every UpToDate replica the record's term and branch.
func stamp(n model.Record) model.Record {
	for h, r := range n.Replicas {
		if r.State == model.UpToDate {
			r.Term, r.Branch = n.Term, n.Branch
			n.Replicas[h] = r
		}
	}
	return n
}

// outdateAllBut marks every UpToDate replica but host's as Outdated.
func outdateAllBut(n model.Record, host string) {
	for h, r := range n.Replicas {
		if h != host && r.State == model.UpToDate {
			r.State = model.Outdated
			n.Replicas[h] = r
		}
	}
}

func upToDate(rec model.Record, host string) bool {
	return rec.Replicas[host].State == model.UpToDate
}

func (u rules) start(rec model.Record, host string) (model.Record, error) {
	switch {
	case host == "":
		return rec, fmt.Errorf("start: %w: no host", ErrArgument)
	case rec.Mode != model.ModeStopped:
		return rec, fmt.Errorf("start on %s: %w: %s", host, ErrMode, rec.Mode)
	case !upToDate(rec, host) && !u.mut.startOutdated:
		return rec, fmt.Errorf("start on %s: %w: %s", host, ErrReplica, replicaWord(rec, host))
	}
	n := next(rec, model.ModeStarting, "start on "+host)
	n.Primary, n.Secondary, n.Survivor = model.Seat{Host: host}, model.Seat{}, ""
	n.Wanted = model.WantRunning
	return stamp(n), nil
}

func (u rules) booted(rec model.Record, host string, run model.RunID) (model.Record, error) {
	switch {
	case run == "":
		return rec, fmt.Errorf("record boot on %s: %w: no run", host, ErrArgument)
	case rec.Mode != model.ModeStarting:
		return rec, fmt.Errorf("record boot on %s: %w: %s", host, ErrMode, rec.Mode)
	case rec.Primary != model.Seat{Host: host}:
		return rec, fmt.Errorf("record boot on %s: %w: start was granted to %s", host, ErrSeat, rec.Primary.Host)
	case !upToDate(rec, host) && !u.mut.startOutdated:
		return rec, fmt.Errorf("record boot on %s: %w: %s", host, ErrReplica, replicaWord(rec, host))
	}
	n := next(rec, model.ModeSimplex, "booted on "+host)
	n.Primary.Run = run
	if !u.mut.bootKeepsOthers {
		outdateAllBut(n, host)
	}
	return stamp(n), nil
}

func (u rules) assign(rec model.Record, host string) (model.Record, error) {
	switch {
	case host == "" || host == rec.Primary.Host:
		return rec, fmt.Errorf("assign secondary %q: %w: not another host than the primary", host, ErrArgument)
	case rec.Mode != model.ModeSimplex:
		return rec, fmt.Errorf("assign secondary %s: %w: %s", host, ErrMode, rec.Mode)
	case rec.Level != model.LevelFT && rec.Level != model.LevelCA:
		return rec, fmt.Errorf("assign secondary %s: %w: %s", host, ErrLevel, rec.Level)
	}
	if r, ok := rec.Replicas[host]; ok && r.Branch != rec.Branch && r.State != model.Inconsistent {
		return rec, fmt.Errorf("assign secondary %s: %w: its replica is of branch %q, the VM of %q", host, ErrBranch, r.Branch, rec.Branch)
	}
	n := next(rec, model.ModeSyncing, "protect on "+host)
	n.Secondary = model.Seat{Host: host}
	n.Replicas[host] = model.Replica{State: model.Inconsistent, Term: n.Term, Branch: n.Branch}
	return stamp(n), nil
}

func (u rules) duplex(rec model.Record, host string, run model.RunID) (model.Record, error) {
	switch {
	case run == "" || run == rec.Primary.Run:
		return rec, fmt.Errorf("record duplex with %s: %w: run %q", host, ErrArgument, run)
	case rec.Mode != model.ModeSyncing:
		return rec, fmt.Errorf("record duplex with %s: %w: %s", host, ErrMode, rec.Mode)
	case rec.Secondary.Host != host:
		return rec, fmt.Errorf("record duplex with %s: %w: secondary is %s", host, ErrSeat, rec.Secondary.Host)
	}
	n := next(rec, model.ModeDuplex, "duplex with "+host)
	n.Secondary.Run = run
	n.Replicas[host] = model.Replica{State: model.UpToDate}
	return stamp(n), nil
}

func (u rules) lostSecondary(rec model.Record) (model.Record, error) {
	if rec.Mode != model.ModeDuplex && rec.Mode != model.ModeSyncing {
		return rec, fmt.Errorf("drop secondary: %w: %s", ErrMode, rec.Mode)
	}
	if replicaLost(rec) && !u.mut.lossDropsSecondary {
		return rec, fmt.Errorf("drop secondary: %w: the one on %s is %s, and %s holds the only good copy", ErrReplica, rec.Primary.Host, replicaWord(rec, rec.Primary.Host), rec.Secondary.Host)
	}
	n := next(rec, model.ModeSimplex, "secondary "+rec.Secondary.Host+" dropped")
	n.Secondary, n.Survivor = model.Seat{}, ""
	if !u.mut.lostKeepsUpToDate {
		outdateAllBut(n, n.Primary.Host)
	}
	return stamp(n), nil
}

func (u rules) takeOver(rec model.Record, by model.Seat) (model.Record, error) {
	if rec.Mode == model.ModeStopped && u.mut.takeOverStopped {
		n := next(rec, model.ModeSimplex, "takeover by "+by.Host)
		n.Primary, n.Wanted = by, model.WantRunning
		outdateAllBut(n, by.Host)
		return stamp(n), nil
	}
	syncing := rec.Mode == model.ModeSyncing && u.mut.syncingClaims
	switch {
	case rec.Mode != model.ModeDuplex && !syncing:
		return rec, fmt.Errorf("take over by %s: %w: %s", by.Host, ErrMode, rec.Mode)
	case by.Run == "" || by.Host != rec.Secondary.Host:
		return rec, fmt.Errorf("take over by %s: %w: secondary is %s", by.Host, ErrSeat, rec.Secondary.Host)
	case by.Run != rec.Secondary.Run && !u.mut.noRunCheck && !syncing:
		return rec, fmt.Errorf("take over by %s: %w: it does not hold the secondary's run", by.Host, ErrSeat)
	case rec.Survivor != "" && !u.mut.ignoreSurvivor:
		return rec, fmt.Errorf("take over by %s: %w: %s", by.Host, ErrSurvivor, rec.Survivor)
	}
	return succeed(rec, by, "takeover by "+by.Host), nil
}

func (u rules) switchover(rec model.Record) (model.Record, error) {
	if rec.Mode != model.ModeDuplex {
		return rec, fmt.Errorf("switch over: %w: %s", ErrMode, rec.Mode)
	}
	return succeed(rec, rec.Secondary, "switchover to "+rec.Secondary.Host), nil
}

// succeed makes seat the lone primary.
func succeed(rec model.Record, seat model.Seat, reason string) model.Record {
	n := next(rec, model.ModeSimplex, reason)
	n.Primary, n.Secondary, n.Survivor = seat, model.Seat{}, ""
	if r := n.Replicas[seat.Host]; r.State != model.UpToDate {
		n.Replicas[seat.Host] = model.Replica{State: model.UpToDate}
	}
	outdateAllBut(n, seat.Host)
	return stamp(n)
}

func (u rules) startFromDisk(rec model.Record, f Facts) (model.Record, error) {
	fail := func(class error, why string) (model.Record, error) {
		return rec, fmt.Errorf("start from disk on %s: %w: %s", f.Host, class, why)
	}
	pair := f.Host == rec.Primary.Host || f.Host == rec.Secondary.Host
	switch {
	case f.Host == "":
		return fail(ErrArgument, "no host")
	case rec.Mode == model.ModeStopped:
		return fail(ErrMode, "stopped; use start")
	case rec.Wanted == model.WantStopped:
		return fail(ErrWanted, "wanted stopped")
	case rec.Mode == model.ModeStarting && f.Host == rec.Primary.Host:
		return fail(ErrMode, "the start is already granted to this host")
	case !f.OwnEmpty:
		return fail(ErrAlive, "this host holds memory of it")
	case !upToDate(rec, f.Host) && !u.mut.startOutdated:
		return fail(ErrReplica, replicaWord(rec, f.Host))
	case !f.Durable:
		return fail(ErrReplica, "journal not replayed, or its own metadata does not call it UpToDate")
	case f.DiskBranch != rec.Branch:
		return fail(ErrBranch, fmt.Sprintf("replica is of %q, record of %q", f.DiskBranch, rec.Branch))
	case f.DiskTerm > rec.Term:
		return fail(ErrAhead, fmt.Sprintf("replica has seen term %d, record says %d", f.DiskTerm, rec.Term))
	}
	// The memory on the other side has precedence over any disk, where it may
	// be used at all: a secondary may not be while the primary is survivor, and
	// is no successor in simplex or syncing.
	ask := rec.Mode == model.ModeDuplex || rec.Mode == model.ModeStarting || !pair
	if rec.Mode == model.ModeDuplex && rec.Survivor == f.Host {
		ask = false
	}
	if rec.Survivor != "" && rec.Survivor != f.Host && !u.mut.ignoreSurvivor {
		return fail(ErrSurvivor, rec.Survivor+" may be ahead")
	}
	if ask && !u.mut.emptyBoots {
		switch f.Other {
		case OtherEmpty, OtherSilent:
		case OtherHolds:
			return fail(ErrAlive, "the other host holds its memory")
		default:
			return fail(ErrAlive, "the other host has not been asked")
		}
	}
	n := next(rec, model.ModeStarting, "start from disk on "+f.Host)
	if rec.Survivor != "" {
		// The right may have been used: whoever lacks it is behind.
		outdateAllBut(n, f.Host)
	}
	n.Primary, n.Secondary, n.Survivor = model.Seat{Host: f.Host}, model.Seat{}, ""
	return stamp(n), nil
}

func (u rules) powerOff(rec model.Record) (model.Record, error) {
	if rec.Mode == model.ModeStopped {
		return rec, fmt.Errorf("record power-off: %w: already stopped", ErrMode)
	}
	n := next(rec, model.ModeStopped, "power-off")
	if rec.Survivor != "" {
		outdateAllBut(n, rec.Primary.Host)
	}
	n.Primary.Run, n.Secondary, n.Survivor = "", model.Seat{}, ""
	n.Wanted = model.WantStopped
	return stamp(n), nil
}

func (u rules) setSurvivor(rec model.Record, by string, on bool) (model.Record, error) {
	switch {
	case rec.Mode != model.ModeDuplex:
		return rec, fmt.Errorf("set survivor: %w: %s", ErrMode, rec.Mode)
	case by != rec.Primary.Host && !u.mut.survivorByOther:
		return rec, fmt.Errorf("set survivor by %s: %w: primary is %s", by, ErrSeat, rec.Primary.Host)
	case on && replicaLost(rec):
		return rec, fmt.Errorf("set survivor by %s: %w: its own is %s, so it could not go on alone", by, ErrReplica, replicaWord(rec, by))
	}
	n := rec.Clone()
	n.Survivor, n.Reason = "", "survivor removed"
	if on {
		n.Survivor, n.Reason = rec.Primary.Host, "survivor "+rec.Primary.Host
	}
	return n, nil
}

func (u rules) force(rec model.Record, host string, run model.RunID, branch model.BranchID) (model.Record, error) {
	switch {
	case host == "":
		return rec, fmt.Errorf("force takeover: %w: no host", ErrArgument)
	case branch == "" || branch == rec.Branch:
		return rec, fmt.Errorf("force takeover on %s: %w: needs a new one", host, ErrBranch)
	case run == "" && rec.Replicas[host].State != model.UpToDate && rec.Replicas[host].State != model.Outdated:
		return rec, fmt.Errorf("force takeover on %s: %w: %s", host, ErrReplica, replicaWord(rec, host))
	case run != "" && rec.Replicas[host].State == model.Inconsistent:
		return rec, fmt.Errorf("force takeover on %s: %w: %s", host, ErrReplica, replicaWord(rec, host))
	case run != "" && rec.Secondary != model.Seat{Host: host, Run: run}:
		return rec, fmt.Errorf("force takeover on %s: %w: the memory there is not the secondary's run", host, ErrSeat)
	}
	n := next(rec, model.ModeSimplex, "forced takeover on "+host)
	if run == "" {
		n.Mode = model.ModeStarting
		if n.Wanted == model.WantStopped {
			n.Wanted = model.WantRunning
		}
	}
	n.Primary, n.Secondary, n.Survivor = model.Seat{Host: host, Run: run}, model.Seat{}, ""
	outdateAllBut(n, host)
	n.Branch = branch
	n.Replicas[host] = model.Replica{State: model.UpToDate}
	return stamp(n), nil
}

// withdraw rewrites the record as it is. Its only effect is the new revision,
// which kills every swap asked at the old one: so an unresolved swap is
// settled, whichever way it went.
func withdraw(rec model.Record) model.Record {
	n := rec.Clone()
	n.Reason = "settle an unresolved swap"
	return n
}

func replicaWord(rec model.Record, host string) string {
	r, ok := rec.Replicas[host]
	if !ok {
		return "no replica"
	}
	return string(r.State)
}
