package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"perdure/internal/authority"
	"perdure/internal/blockstore"
	"perdure/internal/epoch"
	"perdure/internal/guestmem"
	"perdure/internal/model"
	"perdure/internal/netbuf"
	"perdure/internal/qemu"
	"perdure/internal/shimapi"
)

// Bounds of what a primary may hold before a checkpoint is forced or the guest
// is stopped.
const (
	heldOutputBound = 4 << 20  // bytes of output of one VM
	heldDiskBound   = 48 << 20 // bytes of disk writes
	qmpTimeout      = 20 * time.Second
	cleanInterval   = time.Second // distance of cleanings while simplex
)

// primary runs a guest. Its runner goroutine alone stops and continues it.
type primary struct {
	s      *Shim
	inst   *instance
	disks  *disks
	cmds   chan func()
	wake   chan struct{}
	ctx    context.Context
	cancel context.CancelFunc
	work   sync.WaitGroup

	// ramMu: one user of the memory's flush at a time.
	ramMu sync.Mutex

	// Owned by the runner.
	pair        *pair // the pair being filled or held, nil while alone
	held        bool  // output and writes are held per epoch
	mirrored    bool  // level ca: writes wait for the secondary
	standing    string
	pacer       *epoch.Pacer
	started     bool
	boundSince  time.Time // standsBound: since when
	boundTold   bool      // and whether people were told
	goOn        bool      // leaving a pair: the guest runs again afterwards
	finalPaused bool      // the guest to be handed over was paused by a person
	offAsked    bool      // the end of a guest that is off is under way
	lastPages   int       // dirty pages of the last epoch
	input       inputLog
	kept        []netbuf.Frames // output that leaves as soon as the guest runs: of a hand-over, by NIC

	latency atomic.Int64 // commit latency measured last, for the pacer
	timing  atomic.Bool  // the guest's clock is being set right
	ended   sync.Once
	carrier *diskCarrier // level ca
	mu      sync.Mutex   // guards what others read
	state   model.RunState
	cur     *pair
	// goingAlone is closed when mirrorAlone is done, nil while it is not under way.
	goingAlone chan struct{}
	last       model.Epoch // newest captured epoch
}

// Why a guest stands still, for primary.standing and people.
const (
	standsNew    = "not started"
	standsPaused = "paused by a person"
	standsBound  = "too much output waits for the secondary"
	standsOff    = "powered off"
	standsFinal  = "handed over"
)

func newPrimary(s *Shim, inst *instance, d *disks, last model.Epoch) *primary {
	p := &primary{s: s, inst: inst, disks: d, cmds: make(chan func(), 32), wake: make(chan struct{}, 1), standing: standsNew,
		state: model.StateStarting, last: last}
	p.ctx, p.cancel = context.WithCancel(s.ctx)
	for _, d := range inst.nics {
		p.forward(d.Arrived())
	}
	for _, port := range inst.ports() {
		p.forward(port.Arrived())
	}
	for _, v := range inst.vols {
		p.forward(v.Full())
	}
	if inst.ram != nil {
		p.forward(inst.ram.Pressure())
		p.goWork(p.clean)
	}
	if inst.mirror != nil {
		p.carrier = newCarrier(p)
	}
	p.forward(inst.bound)
	p.goWork(p.loop)
	s.verify.recall()
	for n, st := range inst.stores {
		p.watchRepairs(n, st)
	}
	return p
}

func (p *primary) goWork(f func()) {
	p.work.Add(1)
	go func() { defer p.work.Done(); f() }()
}

// forward wakes the runner for each element of c.
func (p *primary) forward(c <-chan struct{}) {
	p.goWork(func() {
		for {
			select {
			case _, ok := <-c:
				if !ok {
					return
				}
				p.kick()
			case <-p.ctx.Done():
				return
			}
		}
	})
}

// kick wakes the runner.
func (p *primary) kick() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// do queues a command for the runner.
func (p *primary) do(f func()) {
	select {
	case p.cmds <- f:
	case <-p.ctx.Done():
	}
}

func (p *primary) close() {
	p.cancel()
	p.mu.Lock()
	pr := p.cur
	p.mu.Unlock()
	if pr != nil { // whatever waits here, the secondary need not
		defer time.AfterFunc(carryFor, func() { pr.hangUp("the primary ends") }).Stop()
	}
	p.work.Wait()
	if pr != nil {
		if p.inst.mirror == nil {
			p.carryOver(pr)
		}
		pr.close("the primary ends")
	}
	p.input.close()
}

func (p *primary) setState(st model.RunState) {
	p.mu.Lock()
	p.state = st
	p.mu.Unlock()
}

// loop is the runner.
func (p *primary) loop() {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	events := p.inst.qmp.Events()
	for p.ctx.Err() == nil {
		if !p.held {
			p.pass()
		}
		wait := p.next()
		timer.Reset(wait)
		select {
		case f := <-p.cmds:
			f()
		case <-p.wake:
		case <-timer.C:
		case ev, ok := <-events:
			if !ok {
				events = nil
				continue
			}
			p.onEvent(ev)
		case <-p.inst.proc.Dying():
			p.guestEnded("QEMU ended: " + p.exitReason())
			return
		case <-p.ramFailed():
			p.guestEnded("guest memory lost: " + p.inst.ram.Err().Error())
			return
		case <-p.ctx.Done():
		}
	}
}

func (p *primary) ramFailed() <-chan struct{} {
	if p.inst.ram == nil {
		return nil
	}
	return p.inst.ram.Failed()
}

func (p *primary) exitReason() string {
	patience := time.Second
	if p.held {
		patience = time.Millisecond // a successor waits; the log has the rest
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	r, err := p.inst.proc.Wait(ctx)
	if err != nil {
		return "it was told to or broke"
	}
	return r.String()
}

// guestEnded tells the authority, once, and ends everything that drives the guest.
func (p *primary) guestEnded(why string) {
	if p.ctx.Err() != nil {
		return
	}
	p.ended.Do(func() {
		p.inst.noteRunning(false)
		p.setState(model.StateFault)
		p.s.tl.add("guest-ended", p.lastEpoch(), 0, "%s", why)
		p.s.post(authority.EvGuestEnded{Reason: why})
		p.cancel()
	})
}

// next captures what is due and returns how long nothing will be due.
func (p *primary) next() time.Duration {
	for p.held && p.ctx.Err() == nil {
		if p.standing != "" && p.standing != standsBound {
			return time.Hour
		}
		if p.pair == nil {
			return time.Hour // being left; the disks are waited for
		}
		if d := p.latency.Swap(0); d > 0 {
			p.pacer.Committed(time.Duration(d))
		}
		_, bytes, since := p.inst.waiting()
		load := epoch.Load{Now: bootNow(), Waiting: !since.IsZero(), HeldBytes: bytes, DiskBytes: p.inst.diskHeld(),
			Pages: p.inst.ram.Collected() / guestmem.PageSize, InFlight: p.pair.inFlight()}
		if p.pair.isLost() {
			p.boundStop(load)
			return time.Hour
		}
		d := p.pacer.Decide(load)
		if !d.Capture {
			p.boundStop(load)
			if d.At == epoch.Never {
				return time.Hour
			}
			return max(d.At-load.Now, 0)
		}
		if p.standing == standsBound {
			if err := p.resume(); err != nil {
				p.guestEnded(err.Error())
				return time.Hour
			}
		}
		p.checkpoint(0, false)
	}
	return time.Hour
}

// boundStop stops a guest whose output, disk writes or memory nobody takes: the
// socket is read on, so that QEMU never blocks, and the guest stands still until
// epochs can commit again.
func (p *primary) boundStop(l epoch.Load) {
	p.tellBound()
	if p.standing != "" || l.HeldBytes < heldOutputBound && l.DiskBytes < heldDiskBound && l.Pages*guestmem.PageSize < p.inst.ram.Size()/2 {
		return
	}
	st, err := p.stop()
	if err != nil {
		return
	}
	if !st.WasRunning {
		p.stands(st.Status)
		return
	}
	p.standing, p.boundSince, p.boundTold = standsBound, time.Now(), false
	p.setState(model.StateHeld)
}

// tellBound says so when the guest has stood still at a bound for long: a busy
// guest meets its bounds many times a second.
func (p *primary) tellBound() {
	if p.standing != standsBound || p.boundTold || time.Since(p.boundSince) < time.Second {
		return
	}
	p.boundTold = true
	p.s.tl.add("held", p.lastEpoch(), time.Since(p.boundSince), "guest stopped: %s", standsBound)
	p.s.tl.problem(model.Problem{Code: "held", Severity: model.Critical,
		Text:   "the guest stands still: what it did waits to be acknowledged by the secondary, or for the cluster to say that it may go on alone",
		Action: "bring back the secondary's host or a majority of the voters; it goes on by itself"})
}

// stop is QMP's stop with the account of guest time.
func (p *primary) stop() (qemu.Stopped, error) {
	ctx, cancel := context.WithTimeout(p.ctx, qmpTimeout)
	defer cancel()
	st, err := p.inst.qmp.Stop(ctx)
	if err != nil {
		return st, fmt.Errorf("stop guest: %w", err)
	}
	p.inst.noteRunning(false)
	return st, nil
}

// resume lets the guest run and forgets why it stood still.
func (p *primary) resume() error {
	ctx, cancel := context.WithTimeout(p.ctx, qmpTimeout)
	defer cancel()
	if err := p.inst.qmp.Cont(ctx); err != nil {
		return fmt.Errorf("continue guest: %w", err)
	}
	if p.standing == standsBound && p.boundTold {
		p.s.tl.solved("held")
	}
	p.standing = ""
	stood := p.inst.noteRunning(true)
	p.setState(model.StateRunning)
	if p.started && stood > timeStood {
		p.keepTime("a stop")
	}
	return nil
}

// run starts a guest that was built or whose hand-over failed.
func (p *primary) run(paused bool) {
	p.do(func() {
		kept := p.kept
		p.kept = nil
		if err := p.disks.alone(); err != nil {
			p.guestEnded(err.Error())
			return
		}
		if paused {
			p.standing = standsPaused
			p.setState(model.StatePaused)
			return
		}
		if err := p.resume(); err != nil {
			p.guestEnded(err.Error())
			return
		}
		p.releaseFrames(kept)
		if !p.started {
			p.started = true
			p.s.tl.add("started", 0, 0, "the guest runs on host %s", p.s.cfg.Host)
		}
	})
}

// pass lets out what a guest without a pair has sent.
func (p *primary) pass() {
	for n, d := range p.inst.nics {
		if frames, _, _ := d.Waiting(); frames == 0 {
			continue
		}
		open, err := p.s.gate.whileOpen(func() error {
			f, err := d.Drain(p.ctx)
			if err != nil {
				return err
			}
			return f.Send(p.s.gate.pieced(p.inst.outlets[n]))
		})
		if err != nil && p.ctx.Err() == nil {
			p.s.log.Warn("release output", "nic", d.NIC(), "error", err)
		}
		if !open {
			return // ruleChanged or the next beat wakes the runner
		}
	}
}

// clean writes dirty memory back slowly while nobody needs it, so that the
// kernel never throttles the guest for dirtying too much.
func (p *primary) clean() {
	for p.ctx.Err() == nil {
		sleep(p.ctx, cleanInterval)
		p.mu.Lock()
		busy := p.cur != nil
		p.mu.Unlock()
		if busy || p.ctx.Err() != nil {
			continue
		}
		p.ramMu.Lock()
		if err := p.inst.ram.Flush(); err != nil {
			p.s.log.Warn("clean guest memory", "error", err)
			p.inst.ram.Restart()
		}
		p.ramMu.Unlock()
	}
}

// diskError puts QEMU's BLOCK_IO_ERROR into words.
func diskError(data []byte) string {
	var e struct {
		Node      string `json:"node-name"`
		Operation string `json:"operation"`
		Reason    string `json:"reason"`
	}
	if err := json.Unmarshal(data, &e); err != nil || e.Reason == "" {
		return "a disk of the guest failed: " + string(data)
	}
	return fmt.Sprintf("a %s on %s of the guest failed: %s", e.Operation, e.Node, e.Reason)
}

// checkpoint captures one epoch and hands it to the sender. With stay the
// guest is left standing. It returns the epoch, or nil if the pair was given up.
func (p *primary) checkpoint(flags uint32, stay bool) *captured {
	if p.pair == nil || stay && !p.awaitRoom() {
		return nil
	}
	c, err := p.capture(flags, stay, nil)
	if err != nil {
		p.captureFailed(err)
		return nil
	}
	p.pair.send(c)
	return c
}

// awaitRoom waits until an epoch may be captured. It gives up when the pair is
// lost; the caller's person tries again.
func (p *primary) awaitRoom() bool {
	for p.pair.inFlight() >= epoch.MaxInFlight {
		select {
		case <-p.wake:
		case <-time.After(beatInterval):
		case <-p.ctx.Done():
		}
		if p.pair.isLost() || p.ctx.Err() != nil {
			return false
		}
	}
	return true
}

func (p *primary) captureFailed(err error) {
	if p.ctx.Err() != nil {
		return
	}
	if errors.Is(err, guestmem.ErrVoid) || errors.Is(err, epoch.ErrBusy) {
		p.inst.ram.Restart()
		p.pair.fail()
		p.s.post(authority.EvUnprotect{Reason: err.Error()})
		return
	}
	p.guestEnded(err.Error())
}

// ruleChanged tells of a new output rule that is in force already.
func (p *primary) ruleChanged(r outputRule) {
	p.mu.Lock()
	pr := p.cur
	p.mu.Unlock()
	if r == ruleAcked && pr != nil && pr.caughtUp() {
		p.do(func() { p.enterHeld(pr) })
	}
	if r == ruleFree {
		p.mirrorAlone()
	}
	if r == ruleFree && pr != nil {
		// Without a secondary that could take over: by the record, or by the
		// survivor right before the record can say so.
		p.do(func() {
			if p.held || p.mirrored {
				p.leavePair()
			}
		})
	}
	if pr != nil {
		pr.gateChanged()
	}
	p.kick()
}

// enterHeld begins to hold output and writes: the guest is stopped once, and
// the first whole epoch is captured in that stop.
func (p *primary) enterHeld(pr *pair) {
	if p.held || p.mirrored || p.pair != pr || pr.isLost() {
		return
	}
	if p.inst.mirror != nil {
		p.joinMirror(pr)
		return
	}
	// Nobody writes back memory behind the capture any more.
	p.pacer = epoch.NewPacer(p.s.cfg.Spec.FT, epoch.Bounds{HeldBytes: heldOutputBound / 2, DiskBytes: heldDiskBound / 2,
		Pages: p.s.cfg.Spec.Memory / guestmem.PageSize / 8})
	c, err := p.capture(flagSync, false, func() error {
		for _, v := range p.inst.vols {
			if err := v.SetMode(blockstore.Held); err != nil {
				return err
			}
		}
		for _, port := range p.inst.ports() {
			port.SetHeld(true)
		}
		p.held = true
		p.input.open(p.inst.taps, p.s.log)
		return pr.takeLastDisk()
	})
	if err != nil {
		p.captureFailed(err)
		return
	}
	pr.send(c)
}

// alone leaves a pair behind after simplex was granted: everything held is
// committed and released in order, then the guest goes on without holding.
func (p *primary) alone() {
	p.mirrorAlone()
	p.do(p.leavePair)
}

// leavePair is alone in the runner.
func (p *primary) leavePair() {
	pr := p.pair
	p.pair = nil
	p.mu.Lock()
	p.cur = nil
	p.mu.Unlock()
	p.leaveMirror()
	p.fetchNoMore()
	if pr != nil {
		pr.leave()
		if err := p.disks.lost(); err != nil && p.ctx.Err() == nil {
			p.guestEnded("mark what the secondary lacks: " + err.Error())
			return
		}
		for _, v := range p.inst.vols {
			v.StopTracking()
		}
	}
	if p.inst.ram != nil {
		p.inst.ram.SetMode(guestmem.Discard)
	}
	if p.held {
		p.leave(pr)
	}
}

// leave ends holding. What cannot be written now (a full disk) is tried again:
// this is the only copy of the VM.
func (p *primary) leave(pr *pair) {
	err := p.leaveHeld(pr)
	if err == nil {
		p.s.tl.solved("disk-stuck")
		return
	}
	for _, st := range p.inst.stores {
		if st.Err() != nil {
			p.guestEnded(err.Error())
		}
	}
	if p.ctx.Err() != nil {
		return
	}
	p.setState(model.StateHeld)
	p.s.tl.problem(model.Problem{Code: "disk-stuck", Severity: model.Critical, Text: "the guest stands still: " + err.Error(),
		Action: "make room on this host's disk; it goes on by itself"})
	time.AfterFunc(time.Second, func() { p.do(func() { p.leave(pr) }) })
}

// leaveHeld is the end of holding. The guest stands still meanwhile.
func (p *primary) leaveHeld(pr *pair) error {
	start := time.Now()
	st, err := p.stop()
	if err != nil {
		return err
	}
	if !st.WasRunning && p.standing == "" && !p.goOn {
		p.stands(st.Status)
	}
	// A guest that was to be handed over is this side's again.
	final := p.standing == standsFinal && !p.finalPaused
	p.goOn = p.goOn || st.WasRunning || p.standing == standsBound || final
	if err := errors.Join(p.disks.lost(), p.disks.alone()); err != nil {
		return err
	}
	p.inst.point("leave.line")
	flights, err := pr.commitAlone()
	if err != nil {
		return err
	}
	p.inst.point("leave.committed")
	for _, v := range p.inst.vols {
		if err := v.SetMode(blockstore.Direct); err != nil {
			return fmt.Errorf("write disk in place: %w", err)
		}
	}
	p.held = false
	p.input.close()
	if p.goOn {
		p.goOn = false
		if err := p.resume(); err != nil {
			return err
		}
	} else if p.standing == standsFinal {
		p.standing = standsPaused
		p.setState(model.StatePaused)
	}
	pr.releaseAlone(flights)
	if final {
		kept := p.kept
		p.kept = nil
		p.releaseFrames(kept)
	}
	for _, port := range p.inst.ports() {
		port.SetHeld(false) // behind the older output
	}
	p.pass()
	p.s.tl.add("simplex", p.lastEpoch(), time.Since(start), "the VM goes on without a secondary")
	return nil
}

func (p *primary) lastEpoch() model.Epoch {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.last
}

// detach is asked before each claim of simplex: what the secondary has not
// reported durable is marked when it returns.
func (p *primary) detach() {
	if err := p.disks.lost(); err != nil && p.ctx.Err() == nil {
		p.guestEnded("mark what the secondary lacks: " + err.Error())
	}
}

// protect begins to fill a secondary on host.
func (p *primary) protect(host string, term model.Term) {
	p.do(func() {
		if p.pair != nil {
			return
		}
		if _, changing := p.s.disksNow(); changing { // since it was asked for
			go p.s.post(authority.EvUnprotect{Reason: errDisksChange.Error()})
			return
		}
		pr := newPair(p, host, term)
		p.pair = pr
		p.mu.Lock()
		p.cur = pr
		p.mu.Unlock()
		pr.goWork(pr.fill)
	})
}

// protected notes that the record says duplex.
func (p *primary) protected() {
	p.mu.Lock()
	pr := p.cur
	p.mu.Unlock()
	if pr != nil {
		p.s.tl.add("duplex", p.lastEpoch(), time.Since(pr.begun), "protected by host %s", pr.host)
		for _, code := range []string{"not-protected", "secondary-slow", "pair-unsound", "split-brain", "replica-contradicts-record"} {
			p.s.tl.solved(code)
		}
	}
}

// beat asks the secondary to confirm, and wakes a runner that waits for the gate.
func (p *primary) beat() {
	p.mu.Lock()
	pr := p.cur
	p.mu.Unlock()
	if pr != nil {
		pr.beat()
	}
	if p.carrier != nil {
		p.carrier.watchDisks()
	}
	p.kick()
}

func (p *primary) tell(a authority.ActTell) {
	p.mu.Lock()
	pr := p.cur
	p.mu.Unlock()
	if pr != nil {
		pr.tell(a)
	}
}

// fill adds to a status what the primary knows.
func (p *primary) fill(st *shimapi.Status) {
	p.mu.Lock()
	defer p.mu.Unlock()
	st.State, st.Epoch = p.state, p.last
	if st.State == model.StateRunning && !p.s.gate.hasRight() {
		st.State = model.StateHeld // its output has no way out now: nobody may call it running
	}
	if p.cur != nil {
		p.cur.fillStatus(st)
	}
	if p.carrier != nil {
		p.carrier.fillStatus(st)
	}
}
