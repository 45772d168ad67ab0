// Package shim is the data plane of one VM on one host: it owns the VM's QEMU,
// its memory, its disks, its held output and its checkpoints, and talks to the
// shim of the other host. It is an assembly: the rules are in authority and
// epoch, the mechanisms in guestmem, qemu, netbuf, chardev, nbd, blockstore,
// hostnet and peer; here are the goroutines, the timers and the order of calls.
//
// Concurrency: one goroutine (Run) owns the authority machine and carries out
// its actions; one (the runner, primary.go) owns the running guest and alone
// stops and continues it; one sends epochs and one commits and releases them
// (pair.go). A standby has one that receives and one that applies.
//
// Failure: whatever breaks here ends this instance or falls back to simplex by
// the rules of the authority; nothing is retried behind their back. A shim that
// is killed leaves its QEMU running and mute: the kernel's gate closes by
// itself, and the run lock, whose descriptor QEMU inherited, keeps a second
// instance from starting until that QEMU is gone.
//
// It does not guarantee that a VM runs: it guarantees that no second one does.
package shim

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"perdure/internal/authority"
	"perdure/internal/model"
	"perdure/internal/shimapi"
)

// ErrLocked says that another instance of this VM lives on this host: its
// shim, its QEMU or its memory helper.
var ErrLocked = errors.New("another instance of this VM lives on this host")

// Shim is one shim process.
type Shim struct {
	cfg    shimapi.Config
	log    *slog.Logger
	agent  *shimapi.AgentClient
	tl     *timeline
	gate   *gatekeeper
	stats  checkpointStats
	verify *verifier
	lock   *os.File
	self   []string // argv of the memory helper
	tls    *tls.Config
	events chan authority.Event
	calls  chan func()

	// Owned by the goroutine of Run.
	side    *authority.Side
	timers  map[authority.TimerID]*time.Timer
	refusal string

	markMu sync.Mutex // one writer of the replicas' metadata at a time
	mu     sync.Mutex // guards what Status reads
	mode   authority.ActMode
	record model.Versioned
	inst   *instance
	prim   *primary
	stby   *standby
	level  model.Level  // of what runs or stands by here
	change *levelChange // of the level: under way, or the last one
	// Of tests: where they break a change, and that a guest under TCG shall run during it.
	atStep   func(step string, next *instance)
	copyLive bool
	// changing: the disks of the running guest are being changed.
	changing bool
	// startErr is why the memory could not be filled.
	startErr error

	ctx  context.Context
	end  context.CancelCauseFunc
	work sync.WaitGroup
}

// errEnded is the cause with which a shim ends by order of the authority.
type errEnded struct{ reason string }

func (e errEnded) Error() string { return "ended: " + e.reason }

// ReadConfig reads and checks the configuration in dir.
func ReadConfig(dir string) (shimapi.Config, error) {
	var c shimapi.Config
	path := filepath.Join(dir, shimapi.ConfigFile)
	b, err := os.ReadFile(path)
	if err != nil {
		return c, fmt.Errorf("read shim configuration: %w", err)
	}
	if err := json.Unmarshal(b, &c); err != nil {
		return c, fmt.Errorf("read shim configuration %s: %w", path, err)
	}
	if c.Version != 1 {
		return c, fmt.Errorf("read shim configuration %s: version %d, this program knows 1", path, c.Version)
	}
	c.Dir = dir
	return c, nil
}

// Open takes the VM's run lock and prepares a shim; it starts nothing.
func Open(cfg shimapi.Config, helper []string, gate kernelGate, log *slog.Logger) (*Shim, error) {
	lock, err := os.OpenFile(filepath.Join(cfg.Dir, shimapi.LockFile), os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open run lock: %w", err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		lock.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("take run lock of VM %q: %w", cfg.Spec.Name, ErrLocked)
		}
		return nil, fmt.Errorf("take run lock of VM %q: %w", cfg.Spec.Name, err)
	}
	conf, err := peerTLS(cfg)
	if err != nil {
		lock.Close()
		return nil, err
	}
	agent := shimapi.NewAgentClient(cfg.AgentSocket, cfg.Spec.Name)
	s := &Shim{
		cfg: cfg, log: log, agent: agent, lock: lock, self: helper, tls: conf,
		tl:     newTimeline(cfg.Spec.Name, cfg.Host, agent, log),
		events: make(chan authority.Event, 256),
		calls:  make(chan func()),
		level:  cfg.Spec.Level,
		side:   authority.New(authority.Config{Host: cfg.Host, ClaimDelayMS: 5, RetryMS: 100, PollMS: 2000}),
		timers: map[authority.TimerID]*time.Timer{},
	}
	s.gate = newGatekeeper(gate, tapNames(cfg.Spec))
	s.verify = newVerifier(s)
	return s, nil
}

// Run drives the shim until the authority ends it (nil), or ctx does.
func (s *Shim) Run(ctx context.Context) error {
	s.ctx, s.end = context.WithCancelCause(ctx)
	defer s.end(nil)
	ctl := newControl(s)
	if err := ctl.serve(s.ctx); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(s.cfg.Dir, shimapi.PIDFile), fmt.Appendf(nil, "%d\n", os.Getpid()), 0o600); err != nil {
		return fmt.Errorf("write pid file: %w", err)
	}
	tlCtx, tlStop := context.WithCancel(context.WithoutCancel(ctx))
	tlDone := make(chan struct{})
	go func() { s.tl.run(tlCtx); close(tlDone) }()
	s.goWork(s.watchRecord)

	s.step(authority.EvStart{})
	beat := time.NewTicker(beatInterval)
	defer beat.Stop()
	for s.ctx.Err() == nil {
		select {
		case ev := <-s.events:
			s.step(ev)
		case f := <-s.calls:
			f()
		case <-beat.C:
			s.beat()
		case <-s.ctx.Done():
		}
	}
	cause := context.Cause(s.ctx)
	s.teardown(cause)
	tlStop()
	<-tlDone
	var ended errEnded
	if !errors.As(cause, &ended) {
		return cause
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.startErr != nil { // one line, for the last of the log
		return errors.New(strings.Join(strings.Fields(s.startErr.Error()), " "))
	}
	return nil
}

// beatInterval is the distance of heartbeats of the pair and of gate renewals.
const beatInterval = 50 * time.Millisecond

// beat renews the gate and asks the secondary to confirm the primary's right.
func (s *Shim) beat() {
	s.gate.tick()
	if err := s.gate.lastFault(); err != nil {
		s.tl.problem(model.Problem{Code: "gate-fault", Severity: model.Critical, Text: "the kernel's tap gate could not be set: " + err.Error(),
			Action: "check that nftables works on this host (nft list tables)"})
	} else {
		s.tl.solved("gate-fault")
	}
	if p := s.primary(); p != nil {
		p.beat()
	}
}

// post hands an event to the authority; it never blocks for long, since Run
// carries out actions quickly.
func (s *Shim) post(ev authority.Event) {
	select {
	case s.events <- ev:
	case <-s.ctx.Done():
	}
}

// inRun runs f in Run's goroutine and waits for it.
func (s *Shim) inRun(ctx context.Context, f func()) error {
	done := make(chan struct{})
	select {
	case s.calls <- func() { f(); close(done) }:
		<-done
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-s.ctx.Done():
		return errors.New("the shim is ending")
	}
}

// goWork runs f in a goroutine that teardown waits for.
func (s *Shim) goWork(f func()) {
	s.work.Add(1)
	go func() { defer s.work.Done(); f() }()
}

// watchRecord reads the record again whenever the agent hints that it changed.
func (s *Shim) watchRecord() {
	var rev model.Revision
	for s.ctx.Err() == nil {
		got, err := s.agent.Watch(s.ctx, rev)
		if err != nil {
			sleep(s.ctx, 200*time.Millisecond)
			continue
		}
		if got > rev {
			rev = got
			s.mu.Lock()
			known := s.record.Revision
			s.mu.Unlock()
			if got > known {
				// Only a hint: the authority reads for itself.
				_ = s.inRun(s.ctx, func() { s.hintRead() }) // fails only at the end
			}
		}
	}
}

// sleep waits for d or the end of ctx.
func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// newRun makes a run id.
func newRun() model.RunID {
	var b [16]byte
	if _, err := io.ReadFull(rand.Reader, b[:]); err != nil {
		panic("read random numbers: " + err.Error()) // the kernel's generator does not fail
	}
	return model.RunID(hex.EncodeToString(b[:]))
}

func (s *Shim) primary() *primary {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.prim
}

// teardown ends everything that this shim started. The gate closes first.
func (s *Shim) teardown(cause error) {
	s.gate.setRule(ruleNone)
	s.tl.add("shim-ended", 0, 0, "%v", cause)
	s.mu.Lock()
	inst, prim, stby := s.inst, s.prim, s.stby
	s.mu.Unlock()
	if inst != nil {
		for _, st := range inst.storeList() {
			st.Detach() // nothing here waits for the peer's reports any more
		}
	}
	if prim != nil {
		prim.close()
	}
	if stby != nil {
		stby.close()
	}
	if inst != nil {
		s.markOutdated(inst)
		inst.close()
	}
	s.work.Wait()
	s.mu.Lock()
	late, lateInst := s.prim, s.inst // finished while this was ending
	s.mu.Unlock()
	if late != nil {
		late.close()
	}
	if lateInst != nil {
		lateInst.close()
	}
	os.Remove(filepath.Join(s.cfg.Dir, shimapi.PIDFile))
	os.Remove(filepath.Join(s.cfg.Dir, shimapi.SocketFile))
	s.lock.Close()
}

// Status says what this shim does now.
func (s *Shim) Status() shimapi.Status {
	s.mu.Lock()
	mode, rec, inst, prim, stby, level, change := s.mode, s.record, s.inst, s.prim, s.stby, s.level, s.change
	s.mu.Unlock()
	st := shimapi.Status{Level: level, Change: change.status(),
		VM: s.cfg.Spec.Name, Host: s.cfg.Host, PID: os.Getpid(), Run: mode.Run, Mode: mode.Mode, Term: mode.Term,
		Record: rec, Checkpoint: s.stats.snapshot(), Problems: s.tl.problems(), State: model.StateStarting,
	}
	switch mode.Role {
	case authority.RolePrimary:
		st.Role = shimapi.RolePrimary
	case authority.RoleSecondary:
		st.Role = shimapi.RoleStandby
	default:
		st.Role = shimapi.RoleNone
	}
	if stby != nil {
		stby.fill(&st)
	}
	if prim != nil {
		prim.fill(&st)
		st.Sync = append(st.Sync, s.verify.progress()...)
	}
	st.Verify = s.verify.last()
	if inst != nil {
		st.GuestMS = ms(inst.guestTime())
	}
	st.Disks = s.diskStatus()
	return st
}

// attachAgent serves one client of the guest-agent port until it goes or the
// shim ends. Answers leave when their epoch has committed.
func (s *Shim) attachAgent(rw io.ReadWriteCloser) {
	p := s.primary()
	if p == nil || p.inst.gagent == nil {
		return
	}
	p.inst.agentUse.RLock() // waits for seconds at most, see setTime
	defer p.inst.agentUse.RUnlock()
	if err := p.inst.gagent.Attach(s.ctx, rw, false); err != nil && s.ctx.Err() == nil {
		s.log.Info("guest-agent client left", "error", err)
	}
}

// attachConsole serves one console client until it goes or the shim ends.
func (s *Shim) attachConsole(rw io.ReadWriteCloser) {
	s.mu.Lock()
	inst := s.inst
	s.mu.Unlock()
	if inst == nil || inst.serial == nil {
		fmt.Fprintf(rw, "the VM has no console yet\r\n")
		return
	}
	if err := inst.serial.Attach(s.ctx, rw, true); err != nil && s.ctx.Err() == nil {
		s.log.Info("console client left", "error", err)
	}
}
