package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"perdure/internal/blockstore"
	"perdure/internal/clusterstore"
	"perdure/internal/model"
	"perdure/internal/shimapi"
	"perdure/internal/vfs"
)

const (
	maxStartDelay = 30 * time.Second
	maxShimLog    = 16 << 20 // bytes; then the log is turned over, one old file is kept
	uuidFile      = "uuid"   // whose directory this is
)

// start starts the VM's shim. What the shim may do it finds out itself from the
// record; a shim too many ends by itself.
func (w *worker) start(ctx context.Context, v clusterstore.VMView) {
	if time.Now().Before(w.nextStart) {
		return
	}
	l := w.facts()
	l.settled = false
	w.see(l)
	defer func() { w.see(w.survey()) }()
	rec := v.Record.Record
	// The copy here may be older than the last change of the disks.
	if spec, err := w.a.store.Spec(ctx, w.vm); err == nil {
		v.Spec = spec
	}
	err := w.a.ready(ctx, v.Spec, rec)
	if err == nil {
		err = w.launch(v.Spec)
	}
	w.started = time.Now()
	w.starts++
	w.nextStart = w.started.Add(min(time.Second<<min(w.starts-1, 8), maxStartDelay))
	if err != nil {
		w.problem("start-failed", model.Critical, "it cannot be started here: "+err.Error(), "remove the cause; it is tried again by itself")
		return
	}
	w.a.event(w.vm, "shim-started", rec.Term, "shim started (pid %d, mode %s)", w.child.pid, rec.Mode)
	w.watch(local{shim: true, shimProc: w.child})
}

// ready puts everything in place that a shim of the VM needs here.
func (a *Agent) ready(ctx context.Context, spec model.VMSpec, rec model.Record) error {
	if err := checkFUSE(spec); err != nil {
		return err
	}
	if err := a.ownDir(spec); err != nil {
		return err
	}
	secondary := rec.Secondary.Host == a.cfg.Name
	if err := a.replicas(ctx, spec, rec, secondary); err != nil {
		return err
	}
	if err := a.fetchBlobs(ctx, spec, rec); err != nil {
		return err
	}
	sc := shimapi.Config{
		Version: 1, Host: a.cfg.Name, Spec: spec, Dir: a.cfg.VMDir(spec.Name), AgentSocket: a.cfg.AgentSocket(),
		ALinkAddrs: a.cfg.ALinkAddrs(), CertFile: a.cfg.PKIPath("host.crt"), KeyFile: a.cfg.PKIPath("host.key"), CAFile: a.cfg.PKIPath("ca.crt"),
		QEMU: a.cfg.QEMU,
	}
	if m := a.machine.Load(); m != nil { // else it has just started, and the older options do
		sc.QEMUVersion, sc.Sandbox = m.QEMU, m.Sandbox
	}
	if spec.Kernel != nil {
		sc.KernelPath = a.cfg.BlobPath(spec.Kernel.SHA256)
	}
	if spec.Initrd != nil {
		sc.InitrdPath = a.cfg.BlobPath(spec.Initrd.SHA256)
	}
	if err := a.setFirmware(spec, &sc); err != nil {
		return err
	}
	data, err := json.MarshalIndent(sc, "", "  ")
	if err != nil {
		return fmt.Errorf("write shim configuration: %w", err)
	}
	return writeAtomic(a.vmFile(spec.Name, shimapi.ConfigFile), append(data, '\n'), 0o600)
}

// ownDir makes the VM's directory. What an earlier VM of the same name left
// behind here is moved aside, never deleted.
func (a *Agent) ownDir(spec model.VMSpec) error {
	dir := a.cfg.VMDir(spec.Name)
	old, err := os.ReadFile(filepath.Join(dir, uuidFile))
	switch {
	case err == nil && string(old) == spec.UUID:
		return nil
	case err == nil:
		if err := a.moveAside(spec.Name, string(old)); err != nil {
			return err
		}
	case !errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("read VM directory: %w", err)
	}
	if err := os.MkdirAll(filepath.Join(dir, shimapi.DiskDir), 0o700); err != nil {
		return fmt.Errorf("make VM directory: %w", err)
	}
	return writeAtomic(filepath.Join(dir, uuidFile), []byte(spec.UUID), 0o600)
}

// moveAside moves the directory of an earlier VM out of the way. Nothing is
// deleted: a person may still want it.
func (a *Agent) moveAside(vm, uuid string) error {
	left := a.cfg.Path("left")
	if err := os.MkdirAll(left, 0o700); err != nil {
		return fmt.Errorf("move an old VM's directory aside: %w", err)
	}
	to := filepath.Join(left, fmt.Sprintf("%s-%s-%d", vm, uuid, time.Now().UnixNano()))
	if err := os.Rename(a.cfg.VMDir(vm), to); err != nil {
		return fmt.Errorf("move an old VM's directory aside: %w", err)
	}
	a.events.forget(vm)
	a.log.Warn("the directory of an earlier VM of the same name was moved aside", "vm", vm, "to", to)
	return nil
}

// replicas makes the replicas of a secondary that are not there yet, empty and
// marked Inconsistent. A primary's must exist: nothing is made in their place.
func (a *Agent) replicas(ctx context.Context, spec model.VMSpec, rec model.Record, secondary bool) error {
	if err := a.fitReplicas(spec, secondary); err != nil {
		return err
	}
	dir := a.vmFile(spec.Name, shimapi.DiskDir)
	for _, d := range spec.Disks {
		ok, err := blockstore.Exists(vfs.OS{}, dir, d.ID)
		switch {
		case err != nil:
			return fmt.Errorf("look for disk %s: %w", d.ID, err)
		case ok && secondary && rec.Replicas[a.cfg.Name].State != model.UpToDate && a.misplaced(spec, d.ID):
		case ok:
			if err := a.checkImage(ctx, spec.Name, d.ID); err != nil {
				return err
			}
			continue
		case !secondary:
			return fmt.Errorf("disk %s is missing in %s", d.ID, dir)
		}
		if err := a.makeReplica(ctx, spec, rec, d); err != nil {
			return err
		}
	}
	return nil
}

// makeReplica makes a replica here, empty and marked Inconsistent, in the place of one that
// may be there. That one is kept where the place of the new one is refused.
func (a *Agent) makeReplica(ctx context.Context, spec model.VMSpec, rec model.Record, d model.DiskSpec) error {
	p, release, err := a.placed(ctx, spec, blockstore.Params{ID: d.ID, VM: spec.UUID, Size: d.Size,
		Term: rec.Term, Branch: rec.Branch, State: model.Inconsistent})
	if err != nil {
		return err
	}
	defer release()
	if err := a.removeReplica(spec.Name, d.ID); err != nil {
		return err
	}
	if err := blockstore.Create(vfs.OS{}, a.vmFile(spec.Name, shimapi.DiskDir), p); err != nil {
		return fmt.Errorf("make replica of disk %s: %w", d.ID, err)
	}
	return nil
}

// launch starts the shim's process as a session of its own, so that it outlives
// the agent.
func (w *worker) launch(spec model.VMSpec) error {
	dir := w.a.cfg.VMDir(spec.Name)
	logPath := filepath.Join(dir, shimapi.LogFile)
	if st, err := os.Stat(logPath); err == nil && st.Size() > maxShimLog {
		if err := os.Rename(logPath, logPath+".1"); err != nil {
			return fmt.Errorf("turn shim log over: %w", err)
		}
	}
	log, err := os.OpenFile(logPath, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("open shim log: %w", err)
	}
	defer log.Close()
	cmd := exec.Command(w.a.opts.Binary, "shim", "--dir", dir)
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start shim: %w", err)
	}
	p, ok := procOf(cmd.Process.Pid)
	if !ok {
		reap(cmd.Process.Pid)
		return fmt.Errorf("shim ended at once: %s", lastLine(logPath))
	}
	w.child = p
	// Its exit is seen through a pidfd and collected by reapChild.
	cmd.Process.Release() //nolint:errcheck // only frees the handle
	return nil
}

// reapChild collects the exit status of a shim that this agent started.
func (w *worker) reapChild(l local) {
	if w.child.pid == 0 || l.shim && l.shimProc == w.child {
		return
	}
	ws, ok := reap(w.child.pid)
	if !ok && w.child.alive() {
		return
	}
	pid := w.child.pid
	w.child = procID{}
	switch {
	case !ok:
	case ws.Exited() && ws.ExitStatus() == 0:
		w.starts = 0
		w.nextStart = time.Time{}
		w.a.event(w.vm, "shim-exited", 0, "shim (pid %d) ended in order", pid)
	default:
		text := fmt.Sprintf("shim (pid %d) failed with exit status %d: %s", pid, ws.ExitStatus(), lastLine(w.a.vmFile(w.vm, shimapi.LogFile)))
		if ws.Signaled() { // its log knows nothing of that
			text = fmt.Sprintf("shim (pid %d) was ended by signal %s", pid, unix.SignalName(ws.Signal()))
		}
		if w.starts > 0 && w.filling() {
			w.problem("start-failed", model.Critical, text, "see shim.log in the VM's directory; it is tried again by itself")
		} else {
			w.a.event(w.vm, "shim-failed", 0, "%s", text)
		}
	}
}

// filling reports whether the record still waits for a shim here to get its
// memory filled: one that fails then has failed to start.
func (w *worker) filling() bool {
	v, ok := w.a.store.VM(w.vm)
	rec, me := v.Record.Record, w.a.cfg.Name
	return ok && (rec.Mode == model.ModeStarting && rec.Primary.Host == me || rec.Mode == model.ModeSyncing && rec.Secondary.Host == me)
}

// watch has the worker woken when the shim, or else the QEMU, ends.
func (w *worker) watch(l local) {
	p := l.shimProc
	if !l.shim {
		if !l.qemu {
			return
		}
		p = l.qemuProc
	}
	if p == w.watched {
		return
	}
	w.watched = p
	stop := w.a.closing[0]
	w.a.wg.Go(func() { p.watchExit(int(stop.Fd()), w.wake) })
}

// end ends what lives of the VM here and clears away what a dead shim cannot.
func (w *worker) end(ctx context.Context, l local) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	var err error
	if l.shim {
		err = l.shimProc.kill(ctx)
	}
	// QEMU after its shim: the shim would report its guest's death as a failure.
	for _, f := range []string{shimapi.QEMUPID, shimapi.NextQEMUPID} {
		if q, ok := qemuOf(w.a.vmFile(w.vm, f)); ok {
			err = errors.Join(err, q.kill(ctx))
		}
	}
	if err != nil {
		w.problem("orphan", model.Critical, "a process of the VM cannot be ended: "+err.Error(), "restart the host if it stays so")
		return
	}
	// The mount's server is dead: nothing can be read from it any more.
	mem := w.a.vmFile(w.vm, "mem")
	if err := unix.Unmount(mem, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EPERM) {
		w.a.log.Warn("unmount of a dead guest's memory failed", "vm", w.vm, "error", err)
	}
	w.see(w.survey())
}
