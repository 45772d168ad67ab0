package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"perdure/internal/authority"
	"perdure/internal/model"
	"perdure/internal/shimapi"
)

// TestMain lets the test binary play shim and QEMU: the agent starts shims as
// its own program with "shim --dir DIR".
func TestMain(m *testing.M) {
	if len(os.Args) > 3 && os.Args[1] == "shim" {
		if err := fakeShim(os.Args[3]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if len(os.Args) > 1 && os.Args[1] == "fake-qemu" {
		// It only lives, and holds the run lock. (A select without cases is a deadlock
		// to a program that is built without cgo.)
		for {
			time.Sleep(time.Hour)
		}
	}
	os.Exit(m.Run())
}

// fake is a shim without a guest: it keeps to the protocol and to the record.
type fake struct {
	cfg   shimapi.Config
	agent *shimapi.AgentClient
	lock  *os.File
	ended chan struct{}

	mu       sync.Mutex
	run      model.RunID
	rec      model.Versioned
	survivor bool
	qemu     *exec.Cmd
	over     bool
	level    model.Level
	change   *shimapi.LevelChange
	disks    []model.DiskSpec // of the guest
}

func fakeShim(dir string) error {
	if _, err := os.Stat(filepath.Join(dir, "fail")); err == nil {
		return fmt.Errorf("the test wants this start to fail")
	}
	data, err := os.ReadFile(filepath.Join(dir, shimapi.ConfigFile))
	if err != nil {
		return err
	}
	f := &fake{ended: make(chan struct{})}
	if err := json.Unmarshal(data, &f.cfg); err != nil {
		return err
	}
	f.level = f.cfg.Spec.Level
	if f.lock, err = os.OpenFile(filepath.Join(dir, shimapi.LockFile), os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return err
	}
	if err := syscall.Flock(int(f.lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return fmt.Errorf("run lock: %w", err)
	}
	f.disks = model.PinSlots(f.cfg.Spec.Disks)
	f.agent = shimapi.NewAgentClient(f.cfg.AgentSocket, f.cfg.Spec.Name)
	sock := filepath.Join(dir, shimapi.SocketFile)
	os.Remove(sock)
	l, err := net.Listen("unix", sock)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, shimapi.PIDFile), fmt.Appendf(nil, "%d\n", os.Getpid()), 0o600); err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, _ *http.Request) { answer(w, f.status()) })
	mux.HandleFunc("POST /v1/op", func(w http.ResponseWriter, r *http.Request) {
		var op shimapi.Op
		if !decode(w, r, &op) {
			return
		}
		var res shimapi.OpResult
		if err := f.op(op); err != nil {
			res.Error = err.Error()
		}
		answer(w, res)
	})
	mux.HandleFunc("GET /v1/console", func(w http.ResponseWriter, r *http.Request) {
		c, err := shimapi.AcceptUpgrade(w, r)
		if err == nil {
			fmt.Fprintf(c, "console on %s\n", f.cfg.Host)
			c.Close()
		}
	})
	go http.Serve(l, mux)
	f.agent.Event(context.Background(), model.Event{Time: time.Now(), VM: f.cfg.Spec.Name, Type: "fake-up", Text: "fake shim is up"})
	return f.loop()
}

func newRun() model.RunID { return model.RunID(randomID(16)) }

func (f *fake) loop() error {
	for {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		r, err := f.agent.Read(ctx)
		cancel()
		if err == nil && r.OK {
			if !r.Found || !f.step(r.Current) {
				f.end()
				return nil
			}
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func (f *fake) end() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.over = true
	if f.qemu != nil {
		f.qemu.Process.Kill()
		f.qemu.Wait()
	}
	os.Remove(filepath.Join(f.cfg.Dir, shimapi.QEMUPID))
	os.Remove(filepath.Join(f.cfg.Dir, shimapi.PIDFile))
}

// step follows the record and reports whether this shim still has a place in it.
func (f *fake) step(cur model.Versioned) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rec = cur
	rec, me := cur.Record, f.cfg.Host
	switch {
	case rec.Mode == model.ModeStopped:
		return false
	case rec.Mode == model.ModeStarting && rec.Primary.Host == me:
		if f.run != "" {
			return false // one life, one filling
		}
		f.startQEMU()
		run := newRun()
		next, err := authority.Booted(rec, me, run)
		if err == nil && f.swap(next) {
			f.run = run
		}
	case rec.Primary.Host == me:
		if rec.Primary.Run != f.run {
			return false
		}
		if rec.Mode == model.ModeSyncing {
			f.complete()
		}
	case rec.Secondary.Host == me && rec.Mode == model.ModeSyncing:
		f.startQEMU()
		if f.run == "" {
			f.run = newRun()
		}
		f.agent.Publish(context.Background(), shimapi.Endpoint{Host: me, Addrs: []string{"x:1"}, Nonce: string(f.run)})
	case rec.Secondary.Host == me && rec.Mode == model.ModeDuplex:
		return rec.Secondary.Run == f.run
	default:
		return false
	}
	return true
}

// complete makes the pair duplex once the other side has published its run.
func (f *fake) complete() {
	eps, _ := f.agent.Endpoints(context.Background())
	sec := f.rec.Record.Secondary.Host
	for _, e := range eps {
		if e.Host != sec || e.Nonce == "" {
			continue
		}
		// An endpoint of an earlier life would be told by its session; here the
		// secondary's own swap check does it.
		if next, err := authority.Duplex(f.rec.Record, sec, model.RunID(e.Nonce)); err == nil {
			f.swap(next)
		}
	}
}

func (f *fake) swap(next model.Record) bool {
	r := f.agent.Swap(context.Background(), f.rec.Revision, next)
	if r.Outcome == shimapi.SwapDone {
		f.rec = r.Current
	}
	return r.Outcome == shimapi.SwapDone
}

func (f *fake) startQEMU() {
	if f.qemu != nil || f.over {
		return
	}
	cmd := exec.Command(os.Args[0], "fake-qemu", f.cfg.Dir)
	cmd.ExtraFiles = []*os.File{f.lock}
	if err := cmd.Start(); err != nil {
		return
	}
	f.qemu = cmd
	p, _ := procOf(cmd.Process.Pid)
	os.WriteFile(filepath.Join(f.cfg.Dir, shimapi.QEMUPID), fmt.Appendf(nil, "%d %d\n", p.pid, p.start), 0o600)
}

func (f *fake) status() shimapi.Status {
	f.mu.Lock()
	defer f.mu.Unlock()
	rec := f.rec.Record
	st := shimapi.Status{VM: f.cfg.Spec.Name, Host: f.cfg.Host, PID: os.Getpid(), Role: shimapi.RoleNone, Run: f.run, Mode: rec.Mode, Term: rec.Term, Record: f.rec, Epoch: 7}
	switch {
	case f.run == "":
	case rec.Primary.Run == f.run:
		st.Role, st.State = shimapi.RolePrimary, model.StateRunning
		st.Disks = []shimapi.DiskStatus{}
		for _, d := range f.disks {
			st.Disks = append(st.Disks, shimapi.DiskStatus{DiskSpec: d})
		}
		if rec.Wanted == model.WantPaused {
			st.State = model.StatePaused
		}
	default:
		st.Role = shimapi.RoleStandby
	}
	if r, err := shimapi.ReadVerifyReport(f.cfg.Dir); err == nil {
		st.Verify = &r
	}
	if st.Level = f.level; f.change != nil {
		c := *f.change
		st.Change = &c
	}
	if f.survivor {
		st.Problems = []model.Problem{{Code: "fake-survivor", Severity: model.Warning}}
	}
	return st
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func (f *fake) op(op shimapi.Op) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	// The record may have changed since the last look.
	if r, err := f.agent.Read(context.Background()); err == nil && r.Found {
		f.rec = r.Current
	}
	rec := f.rec.Record
	try := func(next model.Record, err error) error {
		if err != nil {
			return err
		}
		if !f.swap(next) {
			return fmt.Errorf("swap failed")
		}
		return nil
	}
	switch op.Op {
	case "protect":
		if f.change != nil && !f.change.Ended {
			fmt.Fprintln(os.Stderr, "protected in the middle of a change of level")
			os.Exit(1)
		}
		if slow := filepath.Join(filepath.Dir(f.lock.Name()), "slow"); exists(slow) {
			go func() { // the test wants it accepted, and the record to wait
				for exists(slow) {
					time.Sleep(5 * time.Millisecond)
				}
				f.mu.Lock()
				defer f.mu.Unlock()
				if err := try(authority.Assign(rec, op.Host)); err != nil {
					fmt.Fprintln(os.Stderr, "protect:", err)
				}
			}()
			return nil
		}
		return try(authority.Assign(rec, op.Host))
	case "unprotect":
		return try(authority.LostSecondary(rec))
	case "poweroff", "shutdown":
		return try(authority.PowerOff(rec))
	case "switchover":
		return try(authority.Switchover(rec))
	case "peer-dead":
		if string(rec.Primary.Run) != op.Value {
			return fmt.Errorf("not the primary's run")
		}
		return try(authority.TakeOver(rec, model.Seat{Host: f.cfg.Host, Run: f.run}))
	case "takeover":
		return try(authority.Force(rec, f.cfg.Host, f.run, model.BranchID(randomID(4))))
	case "survivor":
		f.survivor = op.Value == "on"
		if !f.survivor && rec.Survivor != "" {
			return try(authority.SetSurvivor(rec, f.cfg.Host, false))
		}
		return nil
	case "level":
		if rec.Mode == model.ModeDuplex || rec.Mode == model.ModeSyncing {
			if err := try(authority.LostSecondary(rec)); err != nil {
				return err
			}
		}
		f.change = &shimapi.LevelChange{From: f.level, To: model.Level(op.Value), Begun: time.Now(), Done: 1, Total: 2}
		go f.changeLevel()
		return nil
	case "pause", "resume":
		return nil
	case "verify":
		o, err := os.OpenFile(filepath.Join(f.cfg.Dir, "fake-ops"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			return err
		}
		defer o.Close()
		_, err = fmt.Fprintln(o, op.Value)
		return err
	case "disks":
		var want shimapi.SetDisks
		if err := json.Unmarshal([]byte(op.Value), &want); err != nil {
			return err
		}
		if rec.Mode != model.ModeSimplex {
			return fmt.Errorf("the VM is %s", rec.Mode)
		}
		if exists(filepath.Join(f.cfg.Dir, "refuse-disks")) {
			return fmt.Errorf("the guest does not want to")
		}
		if exists(filepath.Join(f.cfg.Dir, "slow-disks")) {
			go f.changeDisks(want.Disks) // longer than anybody waits for the answer
			return errors.New(shimapi.DisksChanging)
		}
		f.disks = want.Disks
		return nil
	}
	return fmt.Errorf("unknown operation %q", op.Op)
}

// changeDisks brings a change to its end when the test lets it.
func (f *fake) changeDisks(want []model.DiskSpec) {
	for exists(filepath.Join(f.cfg.Dir, "slow-disks")) {
		time.Sleep(5 * time.Millisecond)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.disks = want
}

// changeLevel brings a change to its end when the test lets it.
func (f *fake) changeLevel() {
	for exists(filepath.Join(f.cfg.Dir, "slow-level")) {
		time.Sleep(5 * time.Millisecond)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.change.Ended = true
	if exists(filepath.Join(f.cfg.Dir, "fail-level")) {
		f.change.Error = "the test wants this change to fail"
		return
	}
	f.level = f.change.To
}
