// Package agent is the assembly that runs once on every host: it is a member of
// the cluster store, serves the API and the shims of its host, and makes what
// runs agree with what the records say.
//
// Purpose. It starts and finds shims, names secondaries, writes the survivor
// right, starts VMs from disk after a loss of power, and carries out what people
// ask. It never decides who may run a VM by itself: every change of a record is
// a transition of package authority written by compare-and-swap on a record that
// was read linearizably.
//
// Concurrency. One goroutine per VM (worker) does everything slow for that VM;
// a manager starts workers. All methods of Agent may be called from anywhere.
//
// Failure. The agent may crash, hang or be upgraded at any moment: shims are
// sessions of their own and go on; the next agent finds them by their pid files
// and sockets. Without quorum it changes nothing and keeps everything. It never
// deletes state because somebody did not answer.
//
// Not guaranteed: that what View-like methods return still holds, and that a
// shim which hangs is noticed sooner than its silence is noticed by its peer.
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"perdure/api"
	"perdure/internal/clusterstore"
	"perdure/internal/config"
	"perdure/internal/model"
	"perdure/internal/pki"
	"perdure/internal/shimapi"
)

// Machine is what a host's QEMU can do, found out by trying.
type Machine struct {
	QEMU  string // version, "7.2.22"; empty: none that can be used
	Accel string // "kvm" or "tcg": the best that runs a 64-bit guest
	Type  string // newest versioned machine type, "pc-i440fx-7.2"
	TSCHz int64  // TSC frequency of its KVM guests, hertz; 0: unknown
	// Sandbox says that QEMU's seccomp filter was tried and works.
	Sandbox bool
	CPU     string // default CPU model for guests under Accel; empty: a built-in one
}

// Options of an agent.
type Options struct {
	Log     *slog.Logger // nil: none
	Version string       // of Perdure, for people
	// Binary is the program whose "shim --dir DIR" runs a VM; default: this one.
	Binary string
	// Probe finds out what the host's QEMU can do; it may take some seconds.
	// Nil: only its version is asked for, and TCG assumed.
	Probe func(ctx context.Context, qemu string) (Machine, error)
	// Prove proves dirty tracking with a guest of type m, in a process of its own
	// with its files below dir; it may take some seconds. The error says that it could not be
	// run. Nil: nothing is proved, and nothing refused for it.
	Prove func(ctx context.Context, qemu string, m Machine, dir string) (Proof, error)
	// API makes the REST interface of the agent. It has to judge callers by
	// their certificates itself. Nil: none is served.
	API func(*Agent) http.Handler
}

// Agent is the open agent of one host.
type Agent struct {
	cfg   config.Config
	opts  Options
	log   *slog.Logger
	id    *pki.Identity
	store *clusterstore.Store
	life  string // nonce of this life of the agent

	lock      *runLock
	unix, lan net.Listener
	events    *events
	peers     *peers
	ops       *operations
	uploads   *uploads
	statuses  *statusCache
	machine   atomic.Pointer[Machine] // nil: not probed yet
	tracking  atomic.Pointer[Proof]   // nil: not proved yet
	member    membership
	links     alinks
	renewal   renewing // housekeep's own
	nets      *networks
	verifying verifying
	failed    failedDisks
	places    heldPlaces
	changed   chan struct{} // this host's own words have changed

	mu      sync.Mutex
	workers map[string]*worker
	closing [2]*os.File // a pipe whose read end is ready once the agent closes
	wg      sync.WaitGroup
}

// Open takes the state directory stateDir into use: it checks its version and
// its configuration, listens and starts the cluster store. It does not wait for
// a quorum.
func Open(ctx context.Context, stateDir string, opts Options) (_ *Agent, err error) {
	if err := checkVersion(stateDir); err != nil {
		return nil, err
	}
	cfg, err := config.Load(filepath.Join(stateDir, config.FileName))
	if err != nil {
		return nil, api.Errorf(api.Invalid, "%w", err)
	}
	cfg.StateDir = stateDir // it may have been moved
	a := &Agent{cfg: cfg, opts: opts, log: opts.Log, life: randomID(8), workers: map[string]*worker{}}
	if a.log == nil {
		a.log = slog.New(slog.DiscardHandler)
	}
	a.log = a.log.With("host", cfg.Name)
	if a.opts.Binary == "" {
		if a.opts.Binary, err = os.Executable(); err != nil {
			return nil, fmt.Errorf("open agent: find own program: %w", err)
		}
	}
	if a.member, err = loadMembership(stateDir); err != nil {
		return nil, err
	}
	a.events = newEvents(cfg.Name, cfg.VMDir)
	a.ops = newOperations(cfg.Name)
	a.uploads = &uploads{dir: cfg.Path("uploads")}
	a.statuses = newStatusCache()
	a.changed = make(chan struct{}, 1)
	a.nets = newNetworks(a)
	if err := a.loadIdentity(); err != nil {
		return nil, err
	}
	a.peers = newPeers(a.id)
	defer func() {
		if err != nil {
			a.release()
		}
	}()
	if err := a.takeDir(); err != nil {
		return nil, err
	}
	if err := a.listen(); err != nil {
		return nil, err
	}
	a.store, err = clusterstore.Open(ctx, clusterstore.Config{
		Name: cfg.Name, Dir: cfg.EtcdDir(), PeerAddr: cfg.PeerAddr(), ClientAddr: cfg.ClientAddr(),
		CertFile: cfg.PKIPath("host.crt"), KeyFile: cfg.PKIPath("host.key"), CAFile: cfg.PKIPath("ca.crt"), AllowedCN: pki.HostCN,
		Heartbeat: cfg.Etcd.Heartbeat.D(), Election: cfg.Etcd.Election.D(),
		Initial: a.member.Initial, Existing: a.member.Existing, Prefer: a.isWitness, Logger: a.log,
	})
	if err != nil {
		return nil, fmt.Errorf("open agent: %w", err)
	}
	return a, nil
}

func (a *Agent) loadIdentity() error {
	var parts [3][]byte
	for i, n := range []string{"ca.crt", "host.crt", "host.key"} {
		data, err := os.ReadFile(a.cfg.PKIPath(n))
		if err != nil {
			return fmt.Errorf("open agent: read identity: %w", err)
		}
		parts[i] = data
	}
	id, err := pki.NewIdentity(parts[0], parts[1], parts[2], time.Now())
	if err != nil {
		return api.Errorf(api.Conflict, "ca.crt, host.crt and host.key in %s do not belong together: %w", filepath.Dir(a.cfg.PKIPath("ca.crt")), err).
			WithAction("put the host's own files back; where they are lost, remove the host and let it join anew")
	}
	if id.Host() != a.cfg.Name {
		return api.Errorf(api.Invalid, "the certificate in %s is host %q's; config.toml says name = %q", a.cfg.PKIPath("host.crt"), id.Host(), a.cfg.Name)
	}
	a.id = id
	return nil
}

// takeDir makes sure that one agent at a time uses the state directory.
func (a *Agent) takeDir() error {
	for _, d := range []string{"run", "vms", "blobs", "uploads"} {
		if err := os.MkdirAll(a.cfg.Path(d), 0o700); err != nil {
			return fmt.Errorf("open agent: %w", err)
		}
	}
	lock, ok, err := tryLock(a.cfg.Path("run", "agent.lock"))
	if err != nil {
		return fmt.Errorf("open agent: %w", err)
	}
	if !ok {
		return api.Errorf(api.Conflict, "another agent uses %s already", a.cfg.StateDir)
	}
	a.lock = lock
	r, w, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("open agent: %w", err)
	}
	a.closing = [2]*os.File{r, w}
	return nil
}

func (a *Agent) listen() error {
	sock := a.cfg.AgentSocket()
	// The lock is held, so a socket in the way is a dead agent's.
	if err := os.Remove(sock); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("open agent: remove old socket: %w", err)
	}
	// The mask is the process's; nothing else makes files at this time.
	old := unix.Umask(0o177)
	l, err := net.Listen("unix", sock)
	unix.Umask(old)
	if err != nil {
		return fmt.Errorf("open agent: listen for root and shims: %w", err)
	}
	a.unix = l
	// The store listens later, and would end the agent with less to say.
	if err := checkPorts(a.cfg); err != nil {
		return err
	}
	lan, err := net.Listen("tcp", a.cfg.APIAddr())
	if err != nil {
		return api.Errorf(api.Conflict, "cannot listen on %s (lan.address, lan.api_port): %w", a.cfg.APIAddr(), err)
	}
	a.lan = newTLSListener(lan, a.id.ServerTLS(true))
	return nil
}

// release gives back what Open took; parts may be missing.
func (a *Agent) release() {
	for _, l := range []net.Listener{a.unix, a.lan} {
		if l != nil {
			l.Close()
		}
	}
	for _, f := range a.closing {
		if f != nil {
			f.Close()
		}
	}
	if a.lock != nil {
		a.lock.release()
	}
}

// Run works until ctx ends (nil) or the cluster store ends by itself (its
// error). VMs go on in both cases.
func (a *Agent) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	a.log.Info("agent runs", "role", a.cfg.Role, "state_dir", a.cfg.StateDir, "api", a.cfg.APIAddr(), "version", a.opts.Version)
	servers := a.servers(ctx)
	loops := []func(context.Context){a.publish, a.keepAlive, a.housekeep}
	if a.cfg.Role == config.RoleHost {
		loops = append(loops, a.probe, a.manage, a.watchALinks, a.nets.run)
	}
	for _, f := range loops {
		a.wg.Go(func() { f(ctx) })
	}
	for srv, l := range servers {
		a.wg.Go(func() {
			if err := srv.Serve(l); err != nil && ctx.Err() == nil {
				cancel(fmt.Errorf("serve %s: %w", l.Addr(), err))
			}
		})
	}
	select {
	case <-ctx.Done():
	case <-a.store.Done():
		cancel(a.store.Err())
	}
	cause := context.Cause(ctx)
	cancel(cause)
	for srv := range servers {
		srv.Close()
	}
	a.closing[1].Close() // ends the watches of processes
	a.closing[1] = nil
	a.ops.cancelAll()
	a.wg.Wait()
	if errors.Is(cause, context.Canceled) {
		a.log.Info("agent ends; VMs go on")
		return nil
	}
	a.log.Error("agent ends; VMs go on", "error", cause)
	return cause
}

// Close gives everything back. Run must have returned, or never been called.
func (a *Agent) Close() {
	a.store.Close()
	a.peers.close()
	a.release()
}

// Name is the name of this host.
func (a *Agent) Name() string { return a.cfg.Name }

// isWitness reports whether a member is a witness, as far as is known here.
func (a *Agent) isWitness(name string) bool {
	if name == a.cfg.Name {
		return a.cfg.Role == config.RoleWitness
	}
	if a.store == nil {
		return false
	}
	for _, h := range a.store.Hosts() {
		if h.Name == name {
			return h.Role == string(config.RoleWitness)
		}
	}
	return false
}

// event notes something that this agent did or saw.
func (a *Agent) event(vm, typ string, term model.Term, text string, args ...any) {
	ev := model.Event{Time: time.Now(), Host: a.cfg.Name, VM: vm, Type: typ, Term: term, Text: fmt.Sprintf(text, args...)}
	a.log.Info(ev.Text, "vm", vm, "event", typ, "term", term)
	a.keepEvent(ev)
}

func (a *Agent) keepEvent(ev model.Event) {
	if err := a.events.add(ev); err != nil {
		a.log.Error("timeline of a VM cannot be written; it is kept in memory only", "vm", ev.VM, "error", err)
	}
}

// vmFile is a file in a VM's directory.
func (a *Agent) vmFile(vm, name string) string { return filepath.Join(a.cfg.VMDir(vm), name) }

func (a *Agent) shim(vm string) *shimapi.ShimClient {
	return shimapi.NewShimClient(a.vmFile(vm, shimapi.SocketFile))
}
