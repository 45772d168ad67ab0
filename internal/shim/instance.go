package shim

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"perdure/internal/blockstore"
	"perdure/internal/chardev"
	"perdure/internal/guestmem"
	"perdure/internal/hostnet"
	"perdure/internal/mirror"
	"perdure/internal/model"
	"perdure/internal/nbd"
	"perdure/internal/netbuf"
	"perdure/internal/qemu"
	"perdure/internal/shimapi"
	"perdure/internal/vfs"
)

// startTimeout bounds how long a QEMU may take to answer: it allocates and
// locks all of the guest's memory first.
const startTimeout = 2 * time.Minute

// instance is one QEMU with everything around it. It decides nothing.
type instance struct {
	cfg    shimapi.Config
	log    *slog.Logger
	ft     bool // memory on FUSE, output diverted
	ram    *guestmem.RAM
	proc   *qemu.Process
	qmp    *qemu.QMP
	serial *chardev.Port
	gagent *chardev.Port
	// agentUse is held for reading by those outside who are connected to the
	// guest agent, and for writing while the shim itself talks to it.
	agentUse *sync.RWMutex
	nics     []*netbuf.Diverter
	outlets  []*hostnet.Tap // by NIC, where paired: the way out of released frames and announcements
	stores   []*blockstore.Store
	clean    []bool // by disk: its last user had closed it properly
	vols     []*blockstore.Volume
	closers  *storeClosers // the same for all instances that follow each other, as hot is
	hot      *hotDisks
	mirror   *mirror.Source // level ca: the disks as the guest sees them
	carrier  atomic.Pointer[diskCarrier]
	watches  map[string]*vfs.Watch // by disk, level ca; guarded by mu
	nbdCuts  []chan struct{}       // by NBD server: ends its connections; guarded by mu
	latency  *latencyMeter         // of the guest's disk requests
	slots    []*diskSlot           // the disks as QEMU sees them, whatever the level
	taps     []string
	tapSet   int  // which of two names the taps have, see tapName
	beside   bool // built while another QEMU of this VM still runs the guest, see level.go
	undo     []func()
	lasting  []func()      // undoes what a successor on this host takes over; mu
	pidFile  string        // in cfg.Dir; empty once a successor's stands in its place; mu
	bound    chan struct{} // held output crossed its bound
	at       func(string)  // see point

	closeOnce sync.Once

	mu      sync.Mutex
	fresh   []*blockstore.Store // being filled in place of failed ones, see carry.go
	running bool
	since   time.Time     // of running
	ran     time.Duration // before
}

// ports lists the character devices that exist.
func (i *instance) ports() []*chardev.Port {
	var out []*chardev.Port
	for _, p := range []*chardev.Port{i.serial, i.gagent} {
		if p != nil {
			out = append(out, p)
		}
	}
	return out
}

func tapNames(spec model.VMSpec) []string {
	var out []string
	for n := range spec.NICs {
		out = append(out, tapName(spec.UUID, n, 0))
	}
	return out
}

// build makes everything and starts QEMU, paused. With incoming it is a
// standby, and waits for a state where there will be one. On failure nothing is
// left behind.
func build(ctx context.Context, cfg shimapi.Config, incoming bool, lock *os.File, helper []string, log *slog.Logger) (inst *instance, err error) {
	i := &instance{cfg: cfg, hot: new(hotDisks), closers: new(storeClosers), log: log, ft: cfg.Spec.Level == model.LevelFT, bound: make(chan struct{}, 1), agentUse: new(sync.RWMutex), latency: new(latencyMeter)}
	defer func() {
		if err != nil {
			i.close()
		}
	}()
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	steps := []struct {
		what string
		do   func() error
	}{
		{"make taps", i.makeTaps},
		{"mount guest memory", func() error { return i.mountRAM(ctx, lock, helper) }},
		{"open disks", func() error { return i.openDisks(incoming) }},
		{"listen for character devices", i.listenPorts},
		{"make UEFI variables", i.makeNVRAM},
		{"start QEMU", func() error { return i.start(ctx, incoming, lock) }},
		{"attach to guest memory", i.attachRAM},
		{"divert output", func() error { return i.divert(ctx) }},
	}
	for _, s := range steps {
		if err := s.do(); err != nil {
			return nil, fmt.Errorf("%s: %w", s.what, err)
		}
	}
	return i, nil
}

func (i *instance) onClose(f func()) { i.undo = append(i.undo, f) }

// onEnd is for what outlives one QEMU: disks and character devices.
func (i *instance) onEnd(f func()) { i.lasting = append(i.lasting, f) }

func (i *instance) makeTaps() error {
	for n, nic := range i.cfg.Spec.NICs {
		tap, bridge := tapName(i.cfg.Spec.UUID, n, i.tapSet), nic.Bridge
		if i.beside {
			bridge = "" // the other has the guest's place there
		} else if err := hostnet.DeleteTap(tapName(i.cfg.Spec.UUID, n, 1-i.tapSet)); err != nil { // of a shim that was killed
			return err
		}
		if err := hostnet.CreateTap(tap, bridge, i.cfg.Spec.Name+" "+nic.ID); err != nil {
			return err
		}
		i.onClose(func() {
			if err := hostnet.DeleteTap(tap); err != nil {
				i.log.Warn("remove tap", "tap", tap, "error", err)
			}
		})
		i.taps = append(i.taps, tap)
		out, err := hostnet.OpenTap(tap)
		if err != nil {
			return err
		}
		i.onClose(func() { out.Close() })
		i.outlets = append(i.outlets, out)
	}
	return nil
}

func (i *instance) mountRAM(ctx context.Context, lock *os.File, helper []string) error {
	if !i.ft {
		return nil
	}
	ram, err := guestmem.Open(ctx, guestmem.Config{Dir: filepath.Join(i.cfg.Dir, "mem"), Size: i.cfg.Spec.Memory,
		Helper: helper, LockFD: lock, Log: i.log})
	if err != nil {
		return err
	}
	i.ram = ram
	i.onClose(func() { ram.Close() })
	return nil
}

// openDisks opens the replicas, with everything that their journals hold, and
// serves them by NBD.
func (i *instance) openDisks(incoming bool) error {
	hot, closers := i.hot, i.closers
	i.onEnd(func() { // whatever disks there are then
		hot.close()
		closers.close()
	})
	if len(i.cfg.Spec.Disks) == 0 {
		return nil
	}
	dir := filepath.Join(i.cfg.Dir, shimapi.DiskDir)
	_, opts := storageOf(i.cfg)
	i.at = opts.At
	exports := map[string]nbd.Backend{}
	for _, d := range i.cfg.Spec.Disks {
		if incoming {
			if err := makeReplica(i.cfg, d); err != nil {
				return err
			}
		}
		st, err := blockstore.Open(i.diskFS(d.ID), dir, d.ID, opts)
		if err != nil {
			return fmt.Errorf("disk %s: %w", d.ID, err)
		}
		i.closers.add(func() { st.Close() })
		i.stores = append(i.stores, st)
		i.clean = append(i.clean, st.Meta().Clean)
		n, err := st.Replay()
		if err != nil {
			return fmt.Errorf("replay journal of disk %s: %w", d.ID, err)
		}
		i.log.Info("journal replayed", "disk", d.ID, "epochs", n)
		v := blockstore.NewVolume(st, blockstore.VolumeOptions{})
		i.vols = append(i.vols, v)
		exports[d.ID] = v
	}
	i.mirrorDisks(exports)
	i.slotDisks(exports)
	ln, err := listenUnix(i.nbdPath())
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	cut := i.nbdCut()
	go func() {
		defer close(done)
		if err := nbd.Serve(ctx, ln, exports, nbd.Options{Took: i.latency.took, Cut: cut}); err != nil && ctx.Err() == nil {
			i.log.Error("disk server ended", "error", err)
		}
	}()
	i.onEnd(func() { cancel(); ln.Close(); <-done })
	i.onClose(i.closeMirror) // what waits for the peer is not waited for
	return nil
}

func (i *instance) nbdPath() string { return filepath.Join(i.cfg.Dir, "nbd.sock") }

func listenUnix(path string) (net.Listener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("remove old socket: %w", err)
	}
	ln, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	return ln, nil
}

func (i *instance) listenPorts() error {
	full := func(int) { i.signalBound() }
	var err error
	if i.serial, err = chardev.Listen(filepath.Join(i.cfg.Dir, "serial.sock"), chardev.Options{OnBound: full}); err != nil {
		return err
	}
	i.onEnd(func() { i.serial.Close() })
	if i.gagent, err = chardev.Listen(filepath.Join(i.cfg.Dir, "agent.sock"), chardev.Options{OnBound: full}); err != nil {
		return err
	}
	i.onEnd(func() { i.gagent.Close() })
	return nil
}

// makeNVRAM gives a VM with UEFI its variables, once: they hold what its
// operating system wrote about how it boots.
func (i *instance) makeNVRAM() error {
	if i.cfg.FirmwareCode == "" {
		return nil
	}
	path := filepath.Join(i.cfg.Dir, shimapi.NVRAMFile)
	if _, err := os.Stat(path); err == nil || !errors.Is(err, os.ErrNotExist) {
		return err
	}
	b, err := os.ReadFile(i.cfg.FirmwareVars)
	if err != nil {
		return err
	}
	return vfs.ReplaceFile(vfs.OS{}, path, b)
}

func (i *instance) signalBound() {
	select {
	case i.bound <- struct{}{}:
	default:
	}
}

// machine describes the QEMU process of this host.
func (i *instance) machine(incoming bool) qemu.Machine {
	m := qemu.FromSpec(i.cfg.Spec)
	m.Incoming = i.beside || incoming && i.ft // a standby below ft boots
	m.Sandbox, m.QEMU = i.cfg.Sandbox, qemu.ParseVersion(i.cfg.QEMUVersion)
	m.QMPPath = i.path("qmp.sock")
	m.SerialPath = filepath.Join(i.cfg.Dir, "serial.sock")
	m.AgentPath = filepath.Join(i.cfg.Dir, "agent.sock")
	m.Kernel, m.Initrd, m.Append = i.cfg.KernelPath, i.cfg.InitrdPath, i.cfg.Spec.Append
	if i.cfg.Spec.VNC {
		m.VNCPath = i.path("vnc.sock")
	}
	if i.cfg.FirmwareCode != "" {
		m.Firmware = &qemu.Firmware{Code: i.cfg.FirmwareCode, Vars: filepath.Join(i.cfg.Dir, shimapi.NVRAMFile)}
	}
	if i.ram != nil {
		m.MemPath = i.ram.Path()
	}
	for n := range m.Disks {
		m.Disks[n].Socket, m.Disks[n].Export = i.socketOf(m.Disks[n].ID), m.Disks[n].ID
	}
	for n := range m.NICs {
		m.NICs[n].Tap, m.NICs[n].FD = i.taps[n], qemu.FirstFile+n
	}
	return m
}

func (i *instance) start(ctx context.Context, incoming bool, lock *os.File) error {
	args, err := qemu.Args(i.machine(incoming))
	if err != nil {
		return err
	}
	logPath := filepath.Join(i.cfg.Dir, "qemu.log")
	if i.beside {
		// Both write to the one log.
	} else if err := os.Rename(logPath, logPath+".1"); err != nil && !errors.Is(err, os.ErrNotExist) { // what it says is quoted
		return fmt.Errorf("turn QEMU's log over: %w", err)
	}
	var files []*os.File
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	for _, out := range i.outlets {
		f, err := out.Inherit()
		if err != nil {
			return err
		}
		files = append(files, f)
	}
	if i.pidFile = shimapi.QEMUPID; i.beside {
		i.pidFile = shimapi.NextQEMUPID
	}
	i.proc, err = qemu.Start(ctx, i.cfg.QEMU, args, qemu.StartOptions{LockFile: lock, Files: files, LogPath: logPath,
		PIDFile: filepath.Join(i.cfg.Dir, i.pidFile), OOMScoreAdj: -500, Dir: i.cfg.Dir})
	if err != nil {
		return err
	}
	i.onClose(i.kill)
	dctx, dialled := context.WithCancelCause(ctx)
	defer dialled(nil)
	go func() { // nobody waits for one that has ended
		select {
		case <-i.proc.Exited():
			dialled(errors.New("QEMU has ended"))
		case <-dctx.Done():
		}
	}()
	i.qmp, err = qemu.DialQMP(dctx, i.path("qmp.sock"), i.proc.LogTail)
	if err != nil {
		select {
		case <-i.proc.Exited():
			r, _ := i.proc.Wait(context.Background()) // it has ended
			return errors.New(r.String())
		default:
			return err
		}
	}
	i.onClose(func() { i.qmp.Close() })
	i.watchDying(ctx)
	return nil
}

// watchDying makes the end of QEMU known as early as the kernel can tell: a
// command that waits for a dying QEMU would wait until its memory is taken down.
func (i *instance) watchDying(ctx context.Context) {
	tids, err := i.qmp.VCPUThreads(ctx)
	if err != nil {
		i.log.Warn("the end of QEMU may be noticed late", "error", err)
	}
	i.proc.WatchThreads(append(tids, i.proc.PID()))
	go func() { // ends with QEMU, which close ends
		<-i.proc.Dying()
		i.qmp.Abort()
		began := time.Now()
		if r, err := i.proc.Wait(context.Background()); err == nil {
			i.log.Info("QEMU has ended", "how", r.String(), "took_ms", ms(time.Since(began)))
		}
	}()
}

// kill ends QEMU and waits until it is gone.
func (i *instance) kill() {
	if err := i.proc.Kill(); err != nil {
		i.log.Error("kill QEMU", "error", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if _, err := i.proc.Wait(ctx); err != nil {
		i.log.Error("QEMU does not end", "error", err)
		return
	}
	i.removePID()
}

// removePID removes the pid file of a QEMU that is gone, unless it is another's by now.
func (i *instance) removePID() {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.pidFile != "" {
		os.Remove(filepath.Join(i.cfg.Dir, i.pidFile))
	}
}

func (i *instance) attachRAM() error {
	if i.ram == nil {
		return nil
	}
	return i.ram.Attach()
}

func (i *instance) divert(ctx context.Context) error {
	if !i.ft {
		return nil
	}
	for _, nic := range i.cfg.Spec.NICs {
		d, err := netbuf.Divert(ctx, i.qmp, nic.ID, i.cfg.Dir, netbuf.Options{OnBound: func(string, int64) { i.signalBound() }})
		if err != nil {
			return fmt.Errorf("%s: %w", nic.ID, err)
		}
		i.onClose(func() { d.Close() })
		i.nics = append(i.nics, d)
	}
	return nil
}

// close ends QEMU and takes everything away, in the reverse order.
func (i *instance) close() {
	i.closeOnce.Do(func() {
		for n := len(i.undo) - 1; n >= 0; n-- {
			i.undo[n]()
		}
		i.mu.Lock()
		lasting := i.lasting
		i.lasting = nil
		i.mu.Unlock()
		for n := len(lasting) - 1; n >= 0; n-- {
			lasting[n]()
		}
	})
}

// noteRunning keeps the account of guest time, and returns how long the guest
// had stood still.
func (i *instance) noteRunning(on bool) (stood time.Duration) {
	i.mu.Lock()
	defer i.mu.Unlock()
	now := time.Now()
	switch {
	case i.running:
		i.ran += now.Sub(i.since)
	case !on:
		return 0 // still standing, since the same moment
	case !i.since.IsZero():
		stood = now.Sub(i.since)
	}
	i.running, i.since = on, now
	return stood
}

// guestTime is how long the guest's CPUs have been let run on this host.
func (i *instance) guestTime() time.Duration {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.running {
		return i.ran + time.Since(i.since)
	}
	return i.ran
}

// waiting tells what output is held and not captured yet.
func (i *instance) waiting() (any bool, bytes int64, since time.Time) {
	note := func(n int64, s time.Time) {
		if n == 0 {
			return
		}
		any, bytes = true, bytes+n
		if since.IsZero() || s.Before(since) {
			since = s
		}
	}
	for _, d := range i.nics {
		_, b, s := d.Waiting()
		note(b, s)
	}
	for _, p := range i.ports() {
		b, s := p.Waiting()
		note(int64(b), s)
	}
	return any, bytes, since
}

func (i *instance) diskHeld() int64 {
	var n int64
	for _, v := range i.vols {
		n += v.HeldBytes()
	}
	return n
}
