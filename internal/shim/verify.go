package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"perdure/internal/blockstore"
	"perdure/internal/model"
	"perdure/internal/replica"
	"perdure/internal/shimapi"
	"perdure/internal/vfs"
)

// verifier carries out verifies, one at a time, on the host that runs the guest, and
// keeps the report: in memory, in the VM's directory, and on the secondary's host.
type verifier struct {
	s *Shim

	mu     sync.Mutex
	report *model.VerifyReport // the last one; nil: none
	loaded bool
	stop   context.CancelCauseFunc // of the one under way; nil: none
	gauge  *replica.Gauge
	begun  time.Time
	now    int // disk that is gone over

	readsMu sync.Mutex
	reads   int64  // repairs by requests of the guest that were not told yet
	readAt  string // the last of them
}

func newVerifier(s *Shim) *verifier { return &verifier{s: s} }

// errVerifyStopped is the cause with which a person ends a verify.
var errVerifyStopped = errors.New(model.VerifyStoppedByPerson)

// reportEverySave is the distance in which the report of a verify under way is saved.
const reportEverySave = 5 * time.Second

// verifyFloor is the rate below which a verify does not go for the guest's sake.
const verifyFloor = 1 << 20

// load reads the last report, once. mu is held.
func (v *verifier) load() {
	if v.loaded {
		return
	}
	v.loaded = true
	r, err := shimapi.ReadVerifyReport(v.s.cfg.Dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		v.s.log.Warn("the last report of verify cannot be read", "error", err)
	default:
		if r.State == model.VerifyRunning {
			r.State, r.Why = model.VerifyInterrupted, "the VM's instance ended"
		}
		v.report = &r
	}
}

// last is the last report, or nil.
func (v *verifier) last() *model.VerifyReport {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.load()
	return cloneReport(v.report)
}

func cloneReport(r *model.VerifyReport) *model.VerifyReport {
	if r == nil {
		return nil
	}
	c := *r
	c.Disks = slices.Clone(r.Disks)
	for i := range c.Disks {
		c.Disks[i].Ranges = slices.Clone(c.Disks[i].Ranges)
	}
	return &c
}

// progress is of the verify under way.
func (v *verifier) progress() []model.Progress {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.stop == nil || v.gauge == nil || v.now >= len(v.report.Disks) {
		return nil
	}
	d := v.report.Disks[v.now]
	return []model.Progress{{What: "verify " + d.Disk, Done: v.gauge.Done(), Total: v.gauge.Total(), ETASeconds: v.gauge.ETA(), Rate: v.gauge.Rate()}}
}

// save keeps the report here; mu is held.
func (v *verifier) save() []byte {
	b, err := json.MarshalIndent(v.report, "", "  ")
	if err == nil {
		err = keepReport(v.s.cfg.Dir, b)
	}
	if err != nil {
		v.s.log.Error("save the report of verify", "error", err)
	}
	return b
}

// keepReport writes a report that was made here or on the other host.
func keepReport(dir string, b []byte) error {
	return vfs.ReplaceFile(vfs.OS{}, filepath.Join(dir, shimapi.VerifyFile), b)
}

// start begins a verify.
func (v *verifier) start(opts shimapi.VerifyOptions) (string, error) {
	p := v.s.primary()
	if p == nil {
		return "", errNotRunning
	}
	if opts.Rate <= 0 {
		opts.Rate = model.AskedVerifyRate
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.load()
	if v.stop != nil {
		return "", fmt.Errorf("a verify is under way since %s", v.report.Started.Local().Format(time.DateTime))
	}
	if p.ctx.Err() != nil {
		return "", errNotRunning
	}
	specs, changing := v.s.disksNow() // who changes them now waits for mu before it does
	if changing {
		return "", errDisksChange
	}
	disks, err := v.disks(specs, opts.Disk)
	if err != nil {
		return "", err
	}
	sc, ctx, stop, err := p.newScrub(opts.Rate)
	if err != nil {
		return "", err
	}
	old := v.report
	r := &model.VerifyReport{Started: time.Now().UTC(), State: model.VerifyRunning, Scheduled: opts.Scheduled, Host: v.s.cfg.Host, Peer: sc.peerHost, Rate: opts.Rate}
	if old != nil {
		r.Reads = old.Reads
	}
	var fresh []model.VerifiedDisk
	for n, spec := range specs {
		fresh = append(fresh, model.VerifiedDisk{Disk: spec.ID, Size: p.inst.store(n).Size(), Ranges: []model.VerifiedRange{}})
	}
	todo := planVerify(r, old, fresh, disks)
	v.report, v.stop, v.gauge, v.now = r, stop, nil, 0
	with := "each block with its own checksum"
	if r.Peer != "" {
		with = "compared with host " + r.Peer
	}
	v.s.tl.add("verify-started", 0, 0, "%d disks, %s, at most %d bytes per second", len(todo), with, r.Rate)
	first := v.save()
	p.goWork(func() {
		v.handOn(ctx, sc.peer, first)
		gov := newGovernor(p.inst.latency, min(verifyFloor, opts.Rate), opts.Rate)
		defer gov.close()
		sc.pace = gov.wait
		err := v.run(ctx, sc, todo)
		if err != nil && ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		stop(nil)
		v.end(p.ctx, sc, err)
	})
	return with, nil
}

// job is a disk to go over, and its place in the report.
type job struct{ disk, at int }

// planVerify fills in the disks of a report that begins, and returns which of them
// are to be gone over. What is known of the others stays; a scheduled verify goes on where
// the last one was interrupted, if that compared the same.
func planVerify(r, old *model.VerifyReport, fresh []model.VerifiedDisk, chosen []int) (todo []job) {
	goOn := r.Scheduled && old != nil && old.State == model.VerifyInterrupted && (old.Peer != "") == (r.Peer != "")
	for n, d := range fresh {
		before, known := entryOf(old, d.Disk)
		if !slices.Contains(chosen, n) {
			if known {
				r.Disks = append(r.Disks, before)
			}
			continue
		}
		if goOn && known && before.Size == d.Size {
			d = before
		}
		if d.Ended.IsZero() { // else it was done before the interruption
			todo = append(todo, job{n, len(r.Disks)})
		}
		r.Disks = append(r.Disks, d)
	}
	return todo
}

// entryOf is what a report says of a disk.
func entryOf(r *model.VerifyReport, disk string) (model.VerifiedDisk, bool) {
	if r != nil {
		for _, d := range r.Disks {
			if d.Disk == disk {
				return d, true
			}
		}
	}
	return model.VerifiedDisk{}, false
}

// disks chooses by name; empty: all.
func (v *verifier) disks(specs []model.DiskSpec, name string) (list []int, err error) {
	var names []string
	for n, d := range specs {
		if name == "" || name == d.ID {
			list = append(list, n)
		}
		names = append(names, d.ID)
	}
	switch {
	case len(names) == 0:
		return nil, errors.New("the VM has no disks")
	case len(list) == 0:
		return nil, fmt.Errorf("the VM has no disk %q; its disks are %s", name, strings.Join(names, ", "))
	}
	return list, nil
}

// newScrub prepares to compare with the secondary where there is one that holds
// everything, and else each replica with its own checksums. The context ends with
// what is compared, and is to be cancelled at the end.
func (p *primary) newScrub(rate int64) (*scrub, context.Context, context.CancelCauseFunc, error) {
	if m := p.inst.mirror; m != nil && len(m.Carried()) > 0 {
		return nil, nil, nil, errors.New("a disk of this host has failed and is carried by the other one: there are no two replicas to compare before it is replaced")
	}
	sc := &scrub{stores: p.inst.storeList(), host: p.s.cfg.Host, step: func() int64 { return stepFor(rate, false) }}
	p.mu.Lock()
	pr := p.cur
	p.mu.Unlock()
	if pr == nil || !p.s.isDuplex() || !pr.whole.Load() || pr.isLost() {
		ctx, cancel := context.WithCancelCause(p.ctx)
		return sc, ctx, cancel, nil
	}
	if pr.scrub == nil {
		return nil, nil, nil, fmt.Errorf("host %s runs a release that cannot verify", pr.host)
	}
	sc.peer, sc.peerHost = pr.scrub, pr.host
	if m := p.inst.mirror; m != nil {
		sc.still = m.Still
	} else {
		sc.ahead = func(lead model.Epoch) model.Epoch { return p.lastEpoch() + lead }
		sc.step = func() int64 { return stepFor(rate, true) }
	}
	ctx, cancel := context.WithCancelCause(pr.ctx)
	p.goWork(func() { // ends with the verify, and with the pair
		select {
		case <-pr.sess.Lost():
			cancel(fmt.Errorf("the session with host %s is lost", pr.host))
		case <-ctx.Done():
		}
	})
	return sc, ctx, cancel, nil
}

// run goes over the disks.
func (v *verifier) run(ctx context.Context, sc *scrub, todo []job) error {
	saved := time.Now()
	for _, j := range todo {
		i := j.at
		v.mu.Lock()
		v.now, v.begun = i, time.Now()
		d := v.report.Disks[i]
		v.gauge = replica.NewGauge(0, d.Size)
		v.gauge.At(0, d.Size-d.Checked)
		v.mu.Unlock()
		err := sc.disk(ctx, j.disk, &d, func() {
			v.mu.Lock()
			v.report.Disks[i] = d
			v.report.Disks[i].Ranges = slices.Clone(d.Ranges)
			v.gauge.At(time.Since(v.begun), d.Size-d.Checked)
			var b []byte
			if time.Since(saved) > reportEverySave {
				saved = time.Now()
				b = v.save()
			}
			v.mu.Unlock()
			if b != nil {
				v.handOn(ctx, sc.peer, b)
			}
		})
		if err != nil {
			return fmt.Errorf("disk %s: %w", d.Disk, err)
		}
		v.mu.Lock()
		v.report.Disks[i].Ended = time.Now().UTC()
		v.mu.Unlock()
	}
	return nil
}

// end closes the report, and says what was found.
func (v *verifier) end(ctx context.Context, sc *scrub, err error) {
	v.mu.Lock()
	r := v.report
	r.Ended, r.State = time.Now().UTC(), model.VerifyDone
	if err != nil {
		r.State, r.Why = model.VerifyInterrupted, err.Error()
	}
	v.stop, v.gauge = nil, nil
	b := v.save()
	done := cloneReport(r)
	v.mu.Unlock()
	v.handOn(ctx, sc.peer, b)
	checked, bad, repaired, rewritten, left := done.Counts()
	text := fmt.Sprintf("%d bytes checked, %d blocks did not match, %d repaired, %d written over by the guest, %d left", checked, bad, repaired, rewritten, left)
	if err != nil {
		v.s.tl.add("verify-interrupted", 0, done.Ended.Sub(done.Started), "%s: %v", text, err)
	} else {
		v.s.tl.add("verified", 0, done.Ended.Sub(done.Started), "%s", text)
	}
	for _, d := range done.Disks {
		for _, g := range d.Ranges {
			if g.What == foundRepaired {
				v.s.tl.add("repaired", 0, 0, "disk %s: %d bytes at %d on host %s were written anew: %s", d.Disk, g.Len, g.Off, g.Host, g.Why)
			}
		}
	}
	v.judge(done)
}

// handOn gives the secondary's host the report, best effort.
func (v *verifier) handOn(ctx context.Context, p scrubPeer, b []byte) {
	c, ok := p.(*scrubClient)
	if !ok {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	if err := c.keep(ctx, b); err != nil {
		v.s.log.Info("the report of verify is on this host only", "error", err)
	}
}

// judge raises the problem of what could not be repaired, or takes it away.
func (v *verifier) judge(r *model.VerifyReport) {
	var where []string
	for _, d := range r.Disks {
		for _, g := range d.Ranges {
			if g.What == foundLeft {
				where = append(where, fmt.Sprintf("%s %d+%d (%s)", d.Disk, g.Off, g.Len, g.Why))
			}
		}
	}
	_, _, _, _, left := r.Counts()
	switch {
	case left == 0 && r.State == model.VerifyDone:
		v.s.tl.solved("verify-mismatch")
	case left > 0:
		more := ""
		if len(where) > 8 {
			where, more = where[:8], " and more, see the report"
		}
		v.s.tl.problem(model.Problem{Code: "verify-mismatch", Severity: model.Critical,
			Text:   fmt.Sprintf("verify found %d blocks that cannot be repaired: %s%s", left, strings.Join(where, "; "), more),
			Action: "perdure disk verify " + v.s.cfg.Spec.Name + " --report; where only one host's replica is wrong: give it up by perdure vm protect --off and protect again; else restore what lies there from a backup; then verify again"})
	}
}

// recall raises again what the last report left, at the start of an instance.
func (v *verifier) recall() {
	if v == nil { // in tests of what is around it
		return
	}
	if r := v.last(); r != nil {
		v.judge(r)
	}
}

// cancel ends a verify that is under way.
func (v *verifier) cancel() (string, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.stop == nil {
		return "", errors.New("no verify is under way")
	}
	v.stop(errVerifyStopped)
	return "", nil
}

// yield ends a verify under way because the disks are changed, and waits for its end.
func (v *verifier) yield(ctx context.Context) error {
	for {
		v.mu.Lock()
		stop := v.stop
		v.mu.Unlock()
		if stop == nil {
			return nil
		}
		stop(errDisksChange)
		sleep(ctx, 10*time.Millisecond)
		if ctx.Err() != nil {
			return fmt.Errorf("wait for the end of the verify: %w", ctx.Err())
		}
	}
}

// watchRepairs counts the blocks of a replica that requests of the guest find damaged
// and have repaired.
func (p *primary) watchRepairs(n int, st *blockstore.Store) {
	if p.s.verify == nil { // in tests of what is around it
		return
	}
	id, v := p.s.cfg.Spec.Disks[n].ID, p.s.verify
	st.OnRepair(func(off int64) {
		v.readsMu.Lock()
		defer v.readsMu.Unlock()
		v.reads++
		v.readAt = fmt.Sprintf("%s at %d", id, off)
		if v.reads == 1 && p.ctx.Err() == nil { // the others come with it
			p.goWork(func() {
				sleep(p.ctx, readsEvery)
				_ = st.Flush() // see lookOnce; a failure sticks to the replica
				v.noteReads(p.ctx)
			})
		}
	})
}

// readsEvery is for how long repairs are counted before they are told together.
const readsEvery = time.Second

// noteReads tells of the blocks that requests of the guest found damaged since the last time.
func (v *verifier) noteReads(ctx context.Context) {
	v.readsMu.Lock()
	n, at := v.reads, v.readAt
	v.reads = 0
	v.readsMu.Unlock()
	from, peer := "the other host", scrubPeer(nil)
	if p := v.s.primary(); p != nil {
		p.mu.Lock()
		if pr := p.cur; pr != nil && pr.scrub != nil {
			from, peer = "host "+pr.host, pr.scrub
		}
		p.mu.Unlock()
	}
	v.mu.Lock()
	v.load()
	if v.report == nil {
		v.report = &model.VerifyReport{Host: v.s.cfg.Host, State: model.VerifyInterrupted, Why: "none was made yet", Disks: []model.VerifiedDisk{}}
	}
	v.report.Reads.Blocks += n
	v.report.Reads.Last = time.Now().UTC()
	v.report.Reads.Where = fmt.Sprintf("%s on host %s", at, v.s.cfg.Host)
	b := v.save()
	v.mu.Unlock()
	v.s.tl.add("read-repaired", 0, 0, "%d damaged blocks of this host's replicas, the last one of disk %s: the guest was given, and the replica got, what %s has", n, at, from)
	v.handOn(ctx, peer, b)
}

// fetchFrom makes reads that meet damage here be answered from the secondary, which
// holds everything; see blockstore.Fetch.
//
// At level ft what lies in place here is at most as new as the newest captured epoch,
// and what is newer of a block is held in memory, where the read has looked before. So
// the secondary's copy is the right one once that epoch is in place there. No new epoch
// with a newer write can come in between: QEMU ends its requests before it stops.
func (pr *pair) fetchFrom() {
	if pr.scrub == nil || pr.p.inst.mirror != nil {
		return
	}
	for n, vol := range pr.p.inst.vols {
		id := pr.p.s.cfg.Spec.Disks[n].ID // for the log
		vol.SetFetch(func(p []byte, off int64) error {
			ctx, cancel := context.WithTimeoutCause(pr.ctx, fetchLimit, fmt.Errorf("host %s took longer than %v", pr.host, fetchLimit))
			defer cancel()
			if err := pr.scrub.read(ctx, n, pr.p.lastEpoch(), p, off); err != nil {
				return fmt.Errorf("read what is damaged in disk %s here from host %s: %w", id, pr.host, err)
			}
			return nil
		})
	}
}

// fetchLimit bounds how long a read of the guest waits for the other side.
const fetchLimit = 2 * time.Second

// fetchNoMore is the end of fetchFrom.
func (p *primary) fetchNoMore() {
	if p.inst.mirror != nil {
		return
	}
	for _, vol := range p.inst.vols {
		vol.SetFetch(nil)
	}
}
