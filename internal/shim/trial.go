package shim

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"perdure/internal/authority"
	"perdure/internal/chardev"
	"perdure/internal/model"
	"perdure/internal/qemu"
)

// A standby is tried, not trusted: its last state is loaded into a scratch QEMU
// with a private view of the same memory, once it is full and then at this
// distance.
const trialInterval = 5 * time.Minute

// trials tries the standby for as long as it stands by. A failure ends the
// pair: what cannot be loaded is no protection.
func (st *standby) trials() {
	for st.tryCtx.Err() == nil {
		start := time.Now()
		n, err := st.try(st.tryCtx)
		switch {
		case st.tryCtx.Err() != nil || errors.Is(err, errNoState):
			return
		case err != nil:
			// The alarm may be lost, and what cannot be loaded must not count as a
			// successor for a moment longer.
			text := "the standby's state cannot be loaded: " + err.Error()
			st.alarm(text)
			st.s.post(authority.EvGuestEnded{Reason: text})
			return
		}
		st.s.tl.add("trial", n, time.Since(start), "the state of epoch %d loads in a scratch QEMU", n)
		sleep(st.tryCtx, trialInterval)
	}
}

// errNoState says that there is nothing to try, or no more.
var errNoState = errors.New("the standby holds no state to try")

// try loads the newest applied state into a scratch QEMU. Applying waits for
// the load itself (some tens of milliseconds), not for the scratch QEMU's start.
func (st *standby) try(ctx context.Context) (model.Epoch, error) { return st.tryBy(ctx, st.between) }

// tryNext is try for the state that follows the one it tried last, none left
// out: from the first call on an epoch is applied only when the one before was
// tried, which holds the primary back as a slow secondary does. That ends when
// no call comes for eachPatience, and with whatever ends trials.
func (st *standby) tryNext(ctx context.Context) (model.Epoch, error) {
	select {
	case st.between <- func(*whole) { st.each = true }:
	case <-st.idle:
		return 0, errNoState
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	return st.tryBy(ctx, st.following)
}

// eachPatience is how long applying waits for the next trial.
const eachPatience = 5 * time.Second

// tryBy is try with the channel by which the applier is asked. One at a time:
// two would want the same taps.
func (st *standby) tryBy(ctx context.Context, ask chan<- func(*whole)) (n model.Epoch, err error) {
	st.trying.Lock()
	defer st.trying.Unlock()
	left, _ := filepath.Glob(filepath.Join(st.s.cfg.Dir, "trial-*")) // by a shim that was killed meanwhile
	for _, d := range left {
		os.RemoveAll(d)
	}
	dir, err := os.MkdirTemp(st.s.cfg.Dir, "trial-*")
	if err != nil {
		return 0, fmt.Errorf("make directory for a trial: %w", err)
	}
	defer os.RemoveAll(dir)
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	defer context.AfterFunc(st.tryCtx, cancel)()
	proc, q, done, err := st.scratch(ctx, dir)
	defer done()
	if err != nil {
		return 0, fmt.Errorf("start scratch QEMU: %w", err)
	}
	defer func() {
		q.Close()
		_ = proc.Kill() // it may have ended
		_, _ = proc.Wait(context.WithoutCancel(ctx))
	}()
	result := make(chan error, 1)
	job := func(c *whole) {
		if c == nil || c.dev == nil {
			result <- errNoState
			return
		}
		n = c.epoch
		result <- q.LoadDevices(ctx, c.dev)
	}
	select {
	case ask <- job:
	case <-st.idle:
		return 0, errNoState
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	err = <-result
	return n, err
}

// scratch starts a QEMU like the standby's whose every write goes nowhere: the
// memory is a private view, the taps have no bridge, the ports no clients, and
// the guest never runs. done ends its ports; it is never nil.
func (st *standby) scratch(ctx context.Context, dir string) (_ *qemu.Process, _ *qemu.QMP, done func(), err error) {
	m := st.inst.machine(true)
	m.Private = true
	m.QMPPath, m.SerialPath, m.AgentPath = filepath.Join(dir, "qmp"), filepath.Join(dir, "serial"), filepath.Join(dir, "agent")
	if m.VNCPath != "" {
		m.VNCPath = filepath.Join(dir, "vnc")
	}
	for n := range m.NICs {
		m.NICs[n].Tap, m.NICs[n].FD = "px"+m.NICs[n].Tap[2:], 0 // QEMU makes it, and it goes with QEMU
	}
	var ports []*chardev.Port
	done = func() {
		for _, p := range ports {
			p.Close()
		}
	}
	for _, path := range []string{m.SerialPath, m.AgentPath} {
		p, err := chardev.Listen(path, chardev.Options{History: -1})
		if err != nil {
			return nil, nil, done, err
		}
		ports = append(ports, p)
	}
	args, err := qemu.Args(m)
	if err != nil {
		return nil, nil, done, err
	}
	proc, err := qemu.Start(ctx, st.s.cfg.QEMU, args, qemu.StartOptions{LogPath: filepath.Join(dir, "log"), OOMScoreAdj: 500, Dir: dir, Temporary: true})
	if err != nil {
		return nil, nil, done, err
	}
	q, err := qemu.DialQMP(ctx, m.QMPPath, proc.LogTail)
	if err != nil {
		_ = proc.Kill() // it may have ended
		return nil, nil, done, err
	}
	return proc, q, done, nil
}
