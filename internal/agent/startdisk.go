package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"perdure/api"
	"perdure/internal/authority"
	"perdure/internal/blockstore"
	"perdure/internal/clusterstore"
	"perdure/internal/model"
	"perdure/internal/shimapi"
	"perdure/internal/vfs"
)

// primaryFirst is how long an empty secondary's host leaves the start from disk
// to the primary's, where that answers.
const primaryFirst = 5 * time.Second

// diskStart is what a worker remembers while it waits for a start from disk.
type diskStart struct {
	since  time.Time // when this host was first found empty
	silent time.Time // since when the other host has not answered while there was a quorum
	told   time.Time // when the other host's shim was told to claim
	said   string    // reason last given
}

// say reports why the VM does not start yet, once per reason.
func (w *worker) say(text string) {
	if w.disk.said != text {
		w.disk.said = text
		w.a.event(w.vm, "start-waits", 0, "%s", text)
	}
}

// startFromDisk handles a VM that should live while nothing of it lives here:
// the host lost its power, or its QEMU and shim died. The memory on the other
// host has precedence; authority.StartFromDisk holds the rules.
func (w *worker) startFromDisk(ctx context.Context, hint clusterstore.VMView) {
	if time.Now().Before(w.nextStart) {
		return
	}
	cur, err := w.a.store.Record(ctx, w.vm)
	if err != nil {
		w.disk.silent = time.Time{}
		w.say("nothing is started here while the cluster has no quorum")
		return
	}
	rec, me := cur.Record, w.a.cfg.Name
	if cur.Revision != hint.Record.Revision && (rec.Mode == model.ModeStopped || rec.Mode == model.ModeStarting && rec.Primary.Host == me) {
		return // the next look has it
	}
	if rec.Mode == model.ModeDuplex && rec.Primary.Host == me && rec.Replicas[me].State != model.UpToDate {
		w.awaitGoodDisk(rec)
		return
	}
	if rec.Replicas[me].State != model.UpToDate || rec.Mode == model.ModeSyncing && rec.Primary.Host != me {
		return
	}
	if w.disk.since.IsZero() {
		w.disk.since = time.Now()
		if rec.Mode != model.ModeStarting {
			w.a.event(w.vm, "memory-lost", rec.Term, "this host holds no memory of the VM any more (mode %s, primary %s)", rec.Mode, rec.Primary.Host)
		}
	}
	other := w.otherFact(ctx, rec)
	if other == authority.OtherUnknown {
		return
	}
	if rec.Wanted == model.WantStopped && other != authority.OtherHolds {
		w.a.change(ctx, w.vm, authority.PowerOff) //nolint:errcheck // the next look tries again
		return
	}
	facts := authority.Facts{Host: me, OwnEmpty: true, Other: other}
	if err := w.diskFacts(hint.Spec, &facts); err != nil {
		w.problem("replica", model.Critical, "the disks here cannot be started from: "+err.Error(), "see the cause; start the VM on the other host if its replica is UpToDate")
		w.backOff()
		return
	}
	next, err := authority.StartFromDisk(rec, facts)
	if err != nil {
		w.say(err.Error())
		w.backOff()
		return
	}
	res := w.a.store.SwapRecord(ctx, shimapi.SwapRequest{VM: w.vm, Revision: cur.Revision, Record: next})
	if res.Outcome == shimapi.SwapDone {
		w.a.event(w.vm, "start-from-disk", next.Term, "the VM is started from the disks here (other host: %s)", orNone(string(other)))
		w.disk = diskStart{}
		w.problem("replica", "", "", "")
	}
	w.wake() // done, lost or unknown: the next look reads again
}

// awaitGoodDisk says why a VM whose disks had failed here, while the secondary's
// served it (level ca), does not live: that host was lost too, or takes its time.
func (w *worker) awaitGoodDisk(rec model.Record) {
	if w.disk.since.IsZero() {
		w.disk.since = time.Now()
	}
	if time.Since(w.disk.since) < 3*time.Second {
		return // it takes over
	}
	w.problem("replica", model.Critical, fmt.Sprintf("the disks of host %s had failed when the VM ended here; host %s has the only good copy, and nothing of the VM lives there", rec.Primary.Host, rec.Secondary.Host),
		fmt.Sprintf("bring host %s back: the VM starts there by itself", rec.Secondary.Host))
}

func (w *worker) backOff() { w.nextStart = time.Now().Add(2 * time.Second) }

func orNone(s string) string {
	if s == "" {
		return "none"
	}
	return s
}

// otherFact finds out what is known of the memory on the other host.
// OtherUnknown means: wait. Where no other host matters, OtherEmpty is said.
func (w *worker) otherFact(ctx context.Context, rec model.Record) authority.Other {
	me := w.a.cfg.Name
	other := rec.Secondary.Host
	if rec.Primary.Host != me {
		other = rec.Primary.Host
	}
	if other == "" || rec.Mode == model.ModeSimplex || rec.Mode == model.ModeSyncing {
		return authority.OtherEmpty
	}
	hctx, cancel := context.WithTimeout(ctx, peerTimeout)
	defer cancel()
	var h holds
	err := w.a.ask(hctx, other, "GET", "holds", w.vm, nil, &h)
	if api.ClassOf(err) == api.NotFound && w.a.store.Loaded() {
		err = fmt.Errorf("host %s is not in the cluster any more: %w", other, err)
	}
	if err != nil {
		return w.silence(other, err)
	}
	w.disk.silent = time.Time{}
	switch {
	case !h.Settled:
		return authority.OtherUnknown
	case h.Empty && rec.Primary.Host == other && time.Since(w.disk.since) < primaryFirst:
		return authority.OtherUnknown // it is the primary's to start
	case h.Empty:
		return authority.OtherEmpty
	case h.Shim && rec.Primary.Host == me && rec.Mode == model.ModeDuplex && h.Run == string(rec.Secondary.Run) && h.Run != "":
		w.tellClaim(ctx, other, rec)
		return authority.OtherHolds
	case rec.Primary.Host == other:
		return authority.OtherUnknown // the primary lives; its shim drops this host
	}
	w.say(fmt.Sprintf("host %s still has something of the VM (shim %v, run %q); waiting for it", other, h.Shim, h.Run))
	return authority.OtherUnknown
}

// silence counts how long the other host has not answered while this one had a
// quorum; boot_wait of that makes it OtherSilent.
func (w *worker) silence(other string, err error) authority.Other {
	if !w.a.store.Quorum() {
		w.disk.silent = time.Time{}
		return authority.OtherUnknown
	}
	if w.disk.silent.IsZero() {
		w.disk.silent = time.Now()
	}
	wait := w.a.cfg.BootWait.D()
	if time.Since(w.disk.silent) >= wait {
		return authority.OtherSilent
	}
	w.say(fmt.Sprintf("waiting up to %s for host %s, whose memory of the VM would have precedence: %v", wait, other, err))
	return authority.OtherUnknown
}

// tellClaim tells the secondary that the primary is empty, so that it takes over at once.
func (w *worker) tellClaim(ctx context.Context, other string, rec model.Record) {
	if time.Since(w.disk.told) < time.Second {
		return
	}
	w.disk.told = time.Now()
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	if err := w.a.ask(ctx, other, "POST", "claim", w.vm, rec.Primary, nil); err != nil {
		w.say(fmt.Sprintf("host %s holds the memory of the VM but does not take over yet: %v", other, err))
		return
	}
	w.say(fmt.Sprintf("host %s holds the memory of the VM and was told to go on with it", other))
}

// diskFacts replays the journals of the local replicas and reads their own
// metadata, under the VM's run lock.
func (w *worker) diskFacts(spec model.VMSpec, f *authority.Facts) error {
	lock, ok, err := tryLock(w.a.vmFile(w.vm, shimapi.LockFile))
	if err != nil {
		return err
	}
	if !ok {
		return errors.New("something of the VM still lives here")
	}
	defer lock.release()
	v, ok := w.a.store.VM(w.vm)
	f.Durable = true
	if ok {
		// A VM without disks has no metadata of its own: the record's word counts.
		f.DiskTerm, f.DiskBranch = v.Record.Record.Replicas[f.Host].Term, v.Record.Record.Branch
	}
	for i, d := range spec.Disks {
		m, err := replayDisk(w.a.vmFile(w.vm, shimapi.DiskDir), d.ID)
		if err != nil {
			return err
		}
		f.Durable = f.Durable && m.State == model.UpToDate && m.VM == spec.UUID
		if i == 0 || m.Term > f.DiskTerm {
			f.DiskTerm = m.Term
		}
		if i == 0 {
			f.DiskBranch = m.Branch
		} else if m.Branch != f.DiskBranch {
			return fmt.Errorf("disks are of different branches (%q, %q)", f.DiskBranch, m.Branch)
		}
	}
	return nil
}

func replayDisk(dir, id string) (_ blockstore.Meta, err error) {
	st, err := blockstore.Open(vfs.OS{}, dir, id, blockstore.Options{})
	if err != nil {
		return blockstore.Meta{}, fmt.Errorf("open disk %s: %w", id, err)
	}
	defer func() { err = errors.Join(err, st.Close()) }()
	if _, err := st.Replay(); err != nil {
		return blockstore.Meta{}, fmt.Errorf("replay journal of disk %s: %w", id, err)
	}
	return st.Meta(), nil
}
