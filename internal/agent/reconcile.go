package agent

import (
	"context"
	"errors"
	"os"
	"sync"
	"time"

	"perdure/internal/clusterstore"
	"perdure/internal/model"
	"perdure/internal/shimapi"
)

const (
	lookEvery = time.Second // between two looks at a VM without any hint
	// strangerGrace is how long a shim that the record does not name may take to
	// find that out and end by itself.
	strangerGrace = 10 * time.Second
	// orphanGrace is how long the QEMU of a dead shim may stay in duplex, so that
	// the other side takes over before anything is ended here.
	orphanGrace = 5 * time.Second
)

// manage keeps one worker per VM that concerns this host.
func (a *Agent) manage(ctx context.Context) {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		changed := a.store.Changed()
		if a.store.Loaded() {
			for _, vm := range a.concerned() {
				a.ensureWorker(ctx, vm)
			}
			a.kickAll()
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		case <-tick.C:
		}
	}
}

// concerned lists the VMs that the store knows, or of which there is something
// in this host's state directory.
func (a *Agent) concerned() []string {
	seen := map[string]bool{}
	var out []string
	for _, v := range a.store.VMs() {
		if here(v.Record.Record, a.cfg.Name) {
			seen[v.Spec.Name] = true
			out = append(out, v.Spec.Name)
		}
	}
	entries, err := os.ReadDir(a.cfg.Path("vms"))
	if err != nil {
		a.log.Error("list VM directories", "error", err)
	}
	for _, e := range entries {
		if n := e.Name(); e.IsDir() && n[0] != '.' && !seen[n] {
			out = append(out, n)
		}
	}
	return out
}

// here reports whether a record has anything to do with a host.
func here(rec model.Record, host string) bool {
	_, replica := rec.Replicas[host]
	return replica || rec.Primary.Host == host || rec.Secondary.Host == host
}

func (a *Agent) ensureWorker(ctx context.Context, vm string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.workers[vm] != nil || ctx.Err() != nil {
		return
	}
	w := newWorker(a, vm)
	a.workers[vm] = w
	a.wg.Go(func() {
		w.run(ctx)
		a.mu.Lock()
		delete(a.workers, vm)
		a.mu.Unlock()
	})
}

func (a *Agent) workerOf(vm string) *worker {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.workers[vm]
}

// kick makes a VM's worker look at once.
func (a *Agent) kick(vm string) {
	if w := a.workerOf(vm); w != nil {
		w.wake()
	}
}

func (a *Agent) kickAll() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, w := range a.workers {
		w.wake()
	}
}

// local is what a worker saw of its VM on this host.
type local struct {
	shim     bool
	shimProc procID
	qemu     bool
	qemuProc procID
	free     bool // the run lock is free
	settled  bool // the worker has looked, and starts nothing now
}

func (l local) empty() bool { return l.settled && !l.shim && !l.qemu && l.free }

// worker makes what lives of one VM on this host agree with its record. Only
// its own goroutine starts or ends anything of the VM here.
type worker struct {
	a  *Agent
	vm string

	hint chan struct{}
	do   chan job
	gone chan struct{} // closed when the worker has ended

	mu   sync.Mutex
	seen local
	note map[string]model.Problem // named problems of this host's share, by code
	// disksHeld: an operation changes the disks, see holdDisks.
	disksHeld bool
	disksNew  bool // one has ended, see disksChanged

	// Owned by the worker's goroutine.
	child        procID // the shim that this agent started and has to reap
	started      time.Time
	starts       int // starts in a row that did not last
	nextStart    time.Time
	watched      procID // whose exit is being waited for
	strangeSince time.Time
	orphanSince  time.Time
	lockedSince  time.Time
	disk         diskStart
	prot         protection
	disksNext    time.Time // when settling the disks is tried again
	surv         survivorState
	nextVerify   time.Time // when it is looked whether a verify is due
	levelSeen    levelSeen
}

// job is something that has to be done between two looks.
type job struct {
	f    func(ctx context.Context) error
	done chan error
}

func newWorker(a *Agent, vm string) *worker {
	return &worker{a: a, vm: vm, hint: make(chan struct{}, 1), do: make(chan job), gone: make(chan struct{}), note: map[string]model.Problem{}}
}

func (w *worker) wake() {
	select {
	case w.hint <- struct{}{}:
	default:
	}
}

// wakeIn makes the worker look again when a short delay is over, not only at
// its next round.
func (w *worker) wakeIn(d time.Duration) {
	if d < lookEvery {
		time.AfterFunc(d, w.wake)
	}
}

// between runs f in the worker's goroutine, so that nothing of the VM is
// started or ended at the same time.
func (w *worker) between(ctx context.Context, f func(ctx context.Context) error) error {
	j := job{f: f, done: make(chan error, 1)}
	select {
	case w.do <- j:
	case <-w.gone: // it does nothing any more
		return f(ctx)
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case err := <-j.done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (w *worker) run(ctx context.Context) {
	defer close(w.gone)
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		if w.look(ctx) {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-w.hint:
		case <-tick.C:
		case j := <-w.do:
			j.done <- j.f(ctx)
		}
	}
}

func (w *worker) facts() local {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.seen
}

func (w *worker) see(l local) {
	w.mu.Lock()
	w.seen = l
	w.mu.Unlock()
}

// problem names a problem of this host's share of the VM; an empty text solves it.
func (w *worker) problem(code string, sev model.Severity, text, action string) {
	w.mu.Lock()
	old, had := w.note[code]
	if text == "" {
		delete(w.note, code)
	} else {
		w.note[code] = model.Problem{Code: code, Severity: sev, Text: text, Action: action}
	}
	w.mu.Unlock()
	switch {
	case text != "" && (!had || old.Text != text):
		w.a.event(w.vm, "problem", 0, "%s: %s", code, text)
	case text == "" && had:
		w.a.event(w.vm, "problem-solved", 0, "%s: solved", code)
	}
}

func (w *worker) problems() []model.Problem {
	w.mu.Lock()
	defer w.mu.Unlock()
	out := make([]model.Problem, 0, len(w.note))
	for _, p := range w.note {
		out = append(out, p)
	}
	return out
}

// survey finds out what of the VM lives on this host.
func (w *worker) survey() local {
	dir := w.a.cfg.VMDir(w.vm)
	l := local{settled: true}
	l.shimProc, l.shim = shimOf(dir, shimapi.PIDFile)
	if !l.shim && w.child.alive() {
		l.shimProc, l.shim = w.child, true // it has not written its pid file yet
	}
	if l.qemuProc, l.qemu = qemuOf(w.a.vmFile(w.vm, shimapi.QEMUPID)); !l.qemu { // its shim died between the two
		l.qemuProc, l.qemu = qemuOf(w.a.vmFile(w.vm, shimapi.NextQEMUPID))
	}
	if !l.shim {
		l.free = lockFree(w.a.vmFile(w.vm, shimapi.LockFile))
	}
	return l
}

// look is one round: see what is, compare, do one thing. It reports whether the
// worker is not needed any more.
func (w *worker) look(ctx context.Context) (done bool) {
	v, known := w.a.store.VM(w.vm)
	rec := v.Record.Record
	l := w.survey()
	w.see(l)
	w.reapChild(l)
	w.watch(l)
	me := w.a.cfg.Name
	named := known && rec.Mode != model.ModeStopped &&
		(rec.Primary.Host == me || rec.Secondary.Host == me && (rec.Mode == model.ModeSyncing || rec.Mode == model.ModeDuplex))
	if l.shim || !l.qemu {
		w.orphanSince = time.Time{}
	}
	if l.shim || l.free {
		w.lockedSince = time.Time{}
	}
	switch {
	case !known && l.empty():
		return !w.exists()
	case l.shim:
		w.disk = diskStart{}
		w.shimLives(ctx, v, named, l)
	case l.qemu:
		w.orphan(ctx, l)
	case !l.free:
		w.lockedOut()
	case !named && rec.Mode != model.ModeStarting:
		w.calm()
	case !known:
	case rec.Mode == model.ModeStarting && rec.Primary.Host == me,
		rec.Mode == model.ModeSyncing && rec.Secondary.Host == me:
		w.disk = diskStart{}
		w.start(ctx, v)
	default:
		w.startFromDisk(ctx, v)
	}
	return false
}

func (w *worker) exists() bool {
	_, err := os.Stat(w.a.cfg.VMDir(w.vm))
	return !errors.Is(err, os.ErrNotExist)
}

// calm forgets what belonged to a VM that is not to live here now.
func (w *worker) calm() {
	w.starts, w.nextStart = 0, time.Time{}
	w.strangeSince = time.Time{}
	w.disk, w.prot, w.surv = diskStart{}, protection{}, survivorState{}
	for _, p := range w.problems() {
		w.problem(p.Code, "", "", "")
	}
}

// shimLives does what an agent owes a VM whose shim runs here.
func (w *worker) shimLives(ctx context.Context, v clusterstore.VMView, named bool, l local) {
	if !named {
		w.stranger(ctx, l)
		return
	}
	w.strangeSince = time.Time{}
	if time.Since(w.started) > 10*time.Second || !w.filling() {
		w.starts, w.nextStart = 0, time.Time{}
		w.problem("start-failed", "", "", "")
		w.problem("orphan", "", "", "")
	}
	rec := v.Record.Record
	if rec.Primary.Host == w.a.cfg.Name && rec.Mode != model.ModeStarting {
		w.survivor(ctx, v)
		if w.level(ctx, v) {
			return // its level is being changed
		}
		if !w.settleDisks(ctx, v) {
			w.protect(ctx, v)
			w.scheduleVerify(ctx, v)
		}
	}
}

// stranger handles a shim that the record does not name. It finds that out and
// ends by itself; only one that does not, and only on a confirmed record, is ended.
func (w *worker) stranger(ctx context.Context, l local) {
	if w.strangeSince.IsZero() {
		w.strangeSince = time.Now()
	}
	if time.Since(w.strangeSince) < strangerGrace {
		return
	}
	cur, err := w.a.store.Record(ctx, w.vm)
	if err != nil && !errors.Is(err, clusterstore.ErrNotFound) {
		return // nothing is known: everything stays
	}
	me := w.a.cfg.Name
	if err == nil && cur.Record.Mode != model.ModeStopped && (cur.Record.Primary.Host == me || cur.Record.Secondary.Host == me) {
		w.strangeSince = time.Time{}
		return
	}
	w.a.event(w.vm, "shim-ended", cur.Record.Term, "the shim here (pid %d) did not notice that the VM is not this host's any more; it is ended", l.shimProc.pid)
	w.end(ctx, l)
	w.strangeSince = time.Time{}
}

// lockedOut: no shim and no QEMU is known, but something holds the VM's lock. A
// shim may just be starting, or the flush helper ending.
func (w *worker) lockedOut() {
	if w.lockedSince.IsZero() {
		w.lockedSince = time.Now()
	}
	if time.Since(w.lockedSince) > 15*time.Second {
		w.problem("locked", model.Warning, "an unknown process holds the VM's run lock; nothing is started here meanwhile",
			"find it with: fuser "+w.a.vmFile(w.vm, shimapi.LockFile))
	}
}

// orphan handles a QEMU whose shim is dead. It can let nothing out and nobody
// can take it over again; the only question is when it may be ended.
func (w *worker) orphan(ctx context.Context, l local) {
	if w.orphanSince.IsZero() {
		w.orphanSince = time.Now()
		w.a.event(w.vm, "shim-lost", 0, "the shim of the VM died here and left its QEMU (pid %d) behind", l.qemuProc.pid)
	}
	cur, err := w.a.store.Record(ctx, w.vm)
	if err != nil && !errors.Is(err, clusterstore.ErrNotFound) {
		w.problem("orphan", model.Critical, "the shim died and left QEMU behind; without a quorum nothing is ended here", "none: it goes on when the cluster has a quorum")
		return
	}
	rec := cur.Record
	if err == nil && rec.Mode == model.ModeDuplex && rec.Primary.Host == w.a.cfg.Name && time.Since(w.orphanSince) < orphanGrace {
		return // the secondary takes over; the guest here is mute meanwhile
	}
	switch {
	case err != nil || rec.Mode == model.ModeStopped:
		w.a.event(w.vm, "orphan-ended", rec.Term, "QEMU without a shim is ended: the VM is stopped")
	case rec.Primary.Host != w.a.cfg.Name:
		w.a.event(w.vm, "orphan-ended", rec.Term, "QEMU without a shim is ended: host %s runs the VM", rec.Primary.Host)
	case rec.Mode == model.ModeStarting:
		w.a.event(w.vm, "orphan-ended", rec.Term, "QEMU without a shim is ended: its start was not finished")
	default:
		w.a.event(w.vm, "guest-lost", rec.Term, "THE GUEST IS LOST: its shim died while no other host held its memory (mode %s); QEMU is ended and the VM started again from its disks", rec.Mode)
	}
	w.end(ctx, l)
	w.problem("orphan", "", "", "")
	w.wake()
}
