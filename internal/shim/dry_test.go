package shim

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"perdure/internal/authority"
	"perdure/internal/blockstore"
	"perdure/internal/model"
	"perdure/internal/pki"
	"perdure/internal/shimapi"
	"perdure/internal/vfs"
)

// A dry world is two hosts with everything of level ca but a guest: real shims
// with their authority, record, gate, session, mirror, resync and disk server. A
// QEMU that does nothing takes the guest's place (hollow_test.go); agents that do
// the least of what real ones do start what the record asks for. The test is the
// guest's disk driver, and what it is told counts only if it could have got out.

const (
	dryActivity = 4        // extents in the activity log: they come and go all the time
	drySize     = 48 << 20 // of the disk, 12 extents, where nothing else is said
	dryDetect   = 400      // ms of silence
)

// dry is such a world.
type dry struct {
	*world
	real  bool // shims are processes, on the real file system
	size  int64
	opts  blockstore.Options // of the stores
	hosts map[string]*dryHost
	guest *dryGuest // level ft
	begin func()    // starts the agents; at level ft when the guest has something to do
	stop  context.CancelFunc
	done  sync.WaitGroup

	outMu sync.Mutex
	out   *dryLife             // whose answers got out last
	moved func(from time.Time) // another one's are about to
}

// dryHost is one host. What is guarded by mu is the host's power and what lives there.
type dryHost struct {
	w     *dry
	name  string
	dir   string
	links []*dryLink // to its listener

	mu    sync.Mutex
	mem   *vfs.Mem // its disk, where shims are no processes
	on    bool
	life  *dryLife
	lives int
	point string // where the next shim is killed, and whether from its start on
	after int
	armed bool
	asked time.Time // to protect
}

// dryLife is one shim from its start to its end.
type dryLife struct {
	h    *dryHost
	shim *Shim // in this process
	cmd  *exec.Cmd
	gate noteGate
	// point is where its process is to be killed.
	point string
	end   context.CancelFunc
	last  atomic.Int64  // when an answer got out last, in Unix nanoseconds
	done  chan error    // once, when it has ended
	over  chan struct{} // closed when nothing of it may be heard any more
	once  sync.Once
	gone  chan struct{} // closed when it has ended
	err   error         // valid once gone is closed
}

func newDry(t *testing.T, real bool) *dry {
	return newDryOf(t, real, drySize, dryOptions())
}

func dryOptions() blockstore.Options {
	return blockstore.Options{Activity: dryActivity, JournalLimit: 64 << 10}
}

func newDryOf(t *testing.T, real bool, size int64, opts blockstore.Options) *dry {
	t.Helper()
	return newDryAt(t, model.LevelCA, real, size, opts)
}

// newDryAt makes a world for a VM of level ca or ft. At level ft a dryGuest is the guest.
func newDryAt(t *testing.T, level model.Level, real bool, size int64, opts blockstore.Options) *dry {
	t.Helper()
	ca, err := pki.NewCA("test", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(self, filepath.Join(dir, hollowQEMU)); err != nil {
		t.Fatal(err)
	}
	w := &dry{real: real, size: size, opts: opts, hosts: map[string]*dryHost{}, world: &world{t: t, dir: dir, ca: ca, hosts: map[string]*testHost{},
		store: &store{t: t, endpoints: map[string]shimapi.Endpoint{}, down: map[string]bool{}, changed: make(chan struct{})}}}
	ft := model.DefaultFTPolicy()
	ft.DetectMS = dryDetect
	w.spec = model.VMSpec{Name: "vm1", UUID: "6b6f1f0e-0000-4000-8000-000000000001", Level: level, VCPUs: 1,
		Memory: 16 << 20, Machine: "pc-i440fx-7.2", CPU: "max", Accel: "tcg", FT: ft, Disks: []model.DiskSpec{{ID: "disk0", Size: size}}}
	w.store.cur = model.Versioned{Revision: 1, Record: model.Record{VM: "vm1", Term: 1, Mode: model.ModeStarting, Level: level,
		Primary: model.Seat{Host: "a"}, Replicas: map[string]model.Replica{"a": {State: model.UpToDate, Term: 0}}, Wanted: model.WantRunning}}
	for _, name := range []string{"a", "b"} {
		w.addDryHost(name)
	}
	w.store.place = w.route
	old := storageOf
	storageOf = func(c shimapi.Config) (vfs.FS, blockstore.Options) {
		return w.hosts[c.Host].disk(), opts
	}
	a := w.hosts["a"]
	err = blockstore.Create(a.disk(), filepath.Join(a.dir, shimapi.DiskDir), blockstore.Params{ID: "disk0", VM: w.spec.UUID, Size: size, State: model.UpToDate})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	w.stop = cancel
	if level == model.LevelFT {
		w.guest = newDryGuest(t, w)
	}
	t.Cleanup(func() {
		cancel()
		w.done.Wait()
		for _, h := range w.hosts {
			h.powerOff(true, nil)
			if w.real && level == model.LevelFT {
				_ = unix.Unmount(filepath.Join(h.dir, "mem"), unix.MNT_DETACH) // of a shim that was killed; else there is none
			}
		}
		storageOf = old
	})
	w.begin = func() {
		for _, h := range w.hosts {
			w.done.Go(func() { h.agent(ctx) })
		}
	}
	if w.guest == nil {
		w.begin()
	}
	return w
}

func (w *dry) addDryHost(name string) {
	h := &dryHost{w: w, name: name, dir: filepath.Join(w.dir, name), on: true, mem: vfs.NewMem()}
	if err := os.MkdirAll(filepath.Join(h.dir, shimapi.DiskDir), 0o755); err != nil {
		w.t.Fatal(err)
	}
	key, csr, err := pki.NewRequest(name)
	if err != nil {
		w.t.Fatal(err)
	}
	cert, err := w.ca.IssueHost(csr, name, []net.IP{net.IPv4(127, 0, 0, 1)}, time.Now())
	if err != nil {
		w.t.Fatal(err)
	}
	for f, b := range map[string][]byte{"ca.crt": w.ca.CertPEM(), "host.crt": cert, "host.key": key} {
		if err := os.WriteFile(filepath.Join(h.dir, f), b, 0o600); err != nil {
			w.t.Fatal(err)
		}
	}
	w.store.agent(w.t, name, filepath.Join(h.dir, "agent.sock.host"))
	for range 2 {
		h.links = append(h.links, newDryLink(w.t))
	}
	w.hosts[name] = h
}

// route has the links of a host lead to where its shim listens now.
func (w *dry) route(e shimapi.Endpoint) shimapi.Endpoint {
	for n, l := range w.hosts[e.Host].links {
		l.set(func() { l.target = e.Addrs[n] })
		e.Addrs[n] = l.ln.Addr().String()
	}
	return e
}

// allLinks does something to every link: whoever listens, both use them.
func (w *dry) allLinks(f func(*dryLink)) {
	for _, h := range w.hosts {
		for _, l := range h.links {
			f(l)
		}
	}
}

func (h *dryHost) other() *dryHost {
	if h.name == "a" {
		return h.w.hosts["b"]
	}
	return h.w.hosts["a"]
}

// disk is where the host keeps its replicas.
func (h *dryHost) disk() vfs.FS {
	if h.w.real {
		return vfs.OS{}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.mem
}

func (h *dryHost) now() *dryLife {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.life
}

// agent starts what the record asks for and has its shim protect the VM.
func (h *dryHost) agent(ctx context.Context) {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			h.tend(ctx)
		case <-ctx.Done():
			return
		}
	}
}

func (h *dryHost) tend(ctx context.Context) {
	h.mu.Lock()
	on, life := h.on, h.life
	if life != nil {
		select {
		case <-life.gone:
			h.life, life = nil, nil
		default:
		}
	}
	h.mu.Unlock()
	if !on || h.w.store.isDown(h.name) {
		return
	}
	v := h.w.store.get()
	rec := v.Record
	switch {
	case life != nil && rec.Mode == model.ModeSimplex && rec.Primary.Host == h.name:
		h.protect(ctx, life, rec)
	case life != nil:
	case rec.Mode == model.ModeStarting && rec.Primary.Host == h.name, rec.Mode == model.ModeSyncing && rec.Secondary.Host == h.name:
		h.start()
	case rec.Replicas[h.name].State == model.UpToDate && (rec.Mode != model.ModeSyncing || rec.Primary.Host == h.name):
		h.fromDisk(v)
	}
}

// protect asks the shim to fill the other host's, where that has power and nothing lives.
func (h *dryHost) protect(ctx context.Context, life *dryLife, rec model.Record) {
	o := h.other()
	o.mu.Lock()
	free := o.on && o.life == nil
	o.mu.Unlock()
	if !free || time.Since(h.asked) < 150*time.Millisecond || h.w.store.isDown(o.name) {
		return
	}
	c := shimapi.NewShimClient(filepath.Join(h.dir, shimapi.SocketFile))
	defer c.Close()
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	if st, err := c.Status(ctx); err != nil || st.Role != shimapi.RolePrimary || st.Run != rec.Primary.Run {
		return
	}
	h.asked = time.Now()
	_, _ = c.Op(ctx, shimapi.Op{Op: "protect", Host: o.name}) // refused: the next look tries again
}

// fromDisk starts the VM from the replica here, by the rules of the authority.
func (h *dryHost) fromDisk(v model.Versioned) {
	o, rec := h.other(), v.Record
	facts := authority.Facts{Host: h.name, OwnEmpty: true}
	o.mu.Lock()
	if o.on && o.life == nil {
		facts.Other = authority.OtherEmpty
	}
	o.mu.Unlock()
	if facts.Other == authority.OtherEmpty && rec.Mode == model.ModeDuplex && rec.Primary.Host == o.name && rec.Replicas[o.name].State == model.UpToDate {
		return // it is the primary's to start
	}
	if _, err := authority.StartFromDisk(rec, with(facts, true, rec.Term, rec.Branch)); err != nil {
		return // nothing to look at the disks for
	}
	st, err := blockstore.Open(h.disk(), filepath.Join(h.dir, shimapi.DiskDir), "disk0", blockstore.Options{Activity: h.w.opts.Activity, NoAutoTrim: true})
	if err != nil {
		h.w.t.Logf("host %s: look at the disk: %v", h.name, err)
		return
	}
	_, err = st.Replay()
	m := st.Meta()
	if err = errors.Join(err, st.Close()); err != nil {
		h.w.t.Logf("host %s: look at the disk: %v", h.name, err)
		return
	}
	next, err := authority.StartFromDisk(rec, with(facts, m.State == model.UpToDate, m.Term, m.Branch))
	if err != nil {
		h.w.t.Logf("host %s: %v", h.name, err)
		return
	}
	h.w.store.swap(v.Revision, next)
}

func with(f authority.Facts, durable bool, term model.Term, branch model.BranchID) authority.Facts {
	f.Durable, f.DiskTerm, f.DiskBranch = durable, term, branch
	return f
}

// start starts a shim here.
func (h *dryHost) start() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.on || h.life != nil {
		return
	}
	h.lives++
	cfg := shimapi.Config{Version: 1, Host: h.name, Spec: h.w.spec, Dir: h.dir, AgentSocket: filepath.Join(h.dir, "agent.sock.host"),
		ALinkAddrs: []string{"127.0.0.1", "127.0.0.1"}, CertFile: filepath.Join(h.dir, "host.crt"), KeyFile: filepath.Join(h.dir, "host.key"),
		CAFile: filepath.Join(h.dir, "ca.crt"), QEMU: filepath.Join(h.w.dir, hollowQEMU)}
	l := &dryLife{h: h, done: make(chan error, 1), over: make(chan struct{}), gone: make(chan struct{})}
	gate := filepath.Join(h.dir, fmt.Sprintf("gate%d", h.lives))
	var err error
	if l.gate, err = openNoteGate(gate); err != nil {
		h.w.t.Error(err)
		return
	}
	if h.w.real {
		err = l.process(shimOrder{Config: cfg, Gate: gate, Log: filepath.Join(h.dir, "shim.log"), Point: h.point, After: h.after,
			Activity: h.w.opts.Activity, Journal: h.w.opts.JournalLimit})
		if h.armed {
			l.gate.arm()
		}
		l.point, h.point = h.point, ""
	} else {
		err = l.inside(cfg, gate)
	}
	if err != nil {
		h.w.t.Logf("host %s: start shim: %v", h.name, err)
		return
	}
	h.life = l
	go func() {
		l.err = <-l.done
		l.silence()
		if h.w.real {
			signalHollow(h.dir, syscall.SIGKILL) // as an agent does with the QEMU of a dead shim
		}
		close(l.gone)
	}()
}

func (l *dryLife) inside(cfg shimapi.Config, gate string) error {
	log := slog.New(slog.NewTextHandler(&testWriter{t: l.h.w.t, prefix: l.h.name}, &slog.HandlerOptions{Level: slog.LevelDebug}))
	s, err := openHollow(cfg, gate, log)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	l.shim, l.end = s, cancel
	go func() { l.done <- s.Run(ctx) }()
	return nil
}

func (l *dryLife) process(o shimOrder) error {
	b, err := json.Marshal(o)
	if err != nil {
		return err
	}
	order := filepath.Join(l.h.dir, "order.json")
	if err := os.WriteFile(order, b, 0o600); err != nil {
		return err
	}
	l.cmd = exec.Command("/proc/self/exe", hollowShim, order)
	l.cmd.Stderr = os.Stderr
	if err := l.cmd.Start(); err != nil {
		return err
	}
	l.end = func() { _ = l.cmd.Process.Kill() }
	go func() { l.done <- l.cmd.Wait() }()
	return nil
}

// silence makes sure that nothing of a life is heard any more.
func (l *dryLife) silence() { l.once.Do(func() { close(l.over) }) }

// powerOff ends everything on a host. What was not synced survives where keep
// says so; nil: all of it, as when only the processes die. abrupt also tells the
// other side, as a kernel does for a process that is gone.
func (h *dryHost) powerOff(abrupt bool, keep func() bool) {
	h.mu.Lock()
	h.on = false
	l, mem := h.life, h.mem
	h.mu.Unlock()
	if keep == nil {
		keep = func() bool { return true }
	}
	if l == nil {
		if !h.w.real {
			h.mu.Lock()
			h.mem = mem.Crash(keep)
			h.mu.Unlock()
		}
		return
	}
	l.silence()
	h.w.store.cut(true, h.name)
	if !h.w.real {
		h.w.allLinks(func(k *dryLink) { k.set(func() { k.hole = true }) })
		fresh := mem.Crash(keep)
		h.mu.Lock()
		h.mem = fresh
		h.mu.Unlock()
	}
	l.end()
	if abrupt {
		h.w.allLinks((*dryLink).cut)
	}
	select {
	case <-l.gone:
	case <-time.After(30 * time.Second):
		h.w.t.Errorf("shim of host %s does not end", h.name)
	}
	h.mu.Lock()
	h.life = nil
	h.mu.Unlock()
}

// powerOn lets the host's agent begin.
func (h *dryHost) powerOn() {
	h.w.allLinks(func(l *dryLink) { l.cut(); l.heal() })
	h.w.store.cut(false, h.name)
	h.mu.Lock()
	h.on = true
	h.mu.Unlock()
}

// dial connects to the disk of the instance whose output passes, if there is one.
func (w *dry) dial(ctx context.Context) (net.Conn, error) {
	if w.guest != nil {
		return w.guest.dial(ctx)
	}
	for {
		for _, h := range w.hosts {
			l := h.now()
			if l == nil || !l.gate.isOpen() {
				continue
			}
			if nc, err := net.Dial("unix", filepath.Join(h.dir, "nbd.sock")); err == nil {
				w.letsOut(l)
				return &outlet{Conn: nc, l: l}, nil
			}
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// letsOut notes from which instance answers get out from now on.
func (w *dry) letsOut(l *dryLife) {
	w.outMu.Lock()
	defer w.outMu.Unlock()
	if w.out != nil && w.out != l && w.moved != nil {
		w.moved(time.Unix(0, w.out.last.Load()))
	}
	if w.out != l {
		l.last.Store(time.Now().UnixNano())
	}
	w.out = l
}

// outlet is the guest as seen from outside: what its disk answered is known when
// the gate lets it out.
type outlet struct {
	net.Conn
	l *dryLife
}

func (o *outlet) Read(p []byte) (int, error) {
	n, err := o.Conn.Read(p)
	for n > 0 && !o.l.gate.isOpen() {
		select {
		case <-o.l.over:
			_ = o.Close()
			return 0, io.ErrClosedPipe
		case <-time.After(time.Millisecond):
		}
	}
	select {
	case <-o.l.over: // the gate is a frozen note of a host that is gone
		_ = o.Close()
		return 0, io.ErrClosedPipe
	default:
	}
	o.l.last.Store(time.Now().UnixNano())
	return n, err
}

// untilDuplex waits until the VM is protected, by lives that were there.
func (w *dry) untilDuplex(d time.Duration) model.Record {
	w.t.Helper()
	return w.until("duplex", d, func(r model.Record) bool { return r.Mode == model.ModeDuplex })
}

// image reads a replica's image as it is.
func (h *dryHost) image() ([]byte, error) {
	path := filepath.Join(h.dir, shimapi.DiskDir, "disk0.raw")
	if m, _, err := blockstore.Peek(h.disk(), filepath.Join(h.dir, shimapi.DiskDir), "disk0"); err == nil && m.Image != "" {
		path = m.Image
	}
	f, err := h.disk().OpenRead(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	p := make([]byte, h.w.size)
	_, err = f.ReadAt(p, 0)
	return p, err
}

// same waits until the two replicas are equal, while nobody writes and the record
// says that they are a pair.
func (w *dry) same(d time.Duration) error {
	var a, b []byte
	for end := time.Now().Add(d); ; time.Sleep(20 * time.Millisecond) {
		var err, berr error
		a, err = w.hosts["a"].image()
		b, berr = w.hosts["b"].image()
		if err = errors.Join(err, berr); err != nil {
			return err
		}
		rec := w.store.get().Record
		if bothGood(rec) && bytes.Equal(a, b) {
			return nil
		}
		if time.Now().After(end) {
			for off := 0; off < len(a); off += 4096 {
				if !bytes.Equal(a[off:off+4096], b[off:off+4096]) {
					return fmt.Errorf("the replicas differ at offset %d; the record is %+v", off, rec)
				}
			}
			return fmt.Errorf("the replicas are equal; the record is %+v", rec)
		}
	}
}
