package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"perdure/api"
	"perdure/internal/config"
	"perdure/internal/httpapi"
	"perdure/internal/model"
	"perdure/internal/pki"
	"perdure/internal/shimapi"
	"perdure/internal/testenv"
)

var _ httpapi.Service = (*Agent)(nil)

// host is one agent of a test cluster; its state stays while it is off.
type host struct {
	t    *testing.T
	cfg  config.Config
	ag   *Agent
	stop context.CancelFunc
	done chan error
	// prove stands for the proof of dirty tracking; nil: none.
	prove func(ctx context.Context, qemu string, m Machine, dir string) (Proof, error)
}

func hostConfig(t *testing.T, name string, role config.Role) config.Config {
	t.Helper()
	c := config.Default()
	c.Name, c.Role = name, role
	c.StateDir = filepath.Join(shortDir(t), name)
	c.BootWait = config.Duration(1500 * time.Millisecond)
	c.LAN.Address = "127.0.0.1"
	for _, p := range []*int{&c.LAN.APIPort, &c.LAN.EtcdPeerPort, &c.LAN.EtcdClientPort} {
		*p = freePort(t)
	}
	return c
}

var lastPort atomic.Int32

// freePort returns a port that nobody listens on. It is below those that the
// kernel gives to outgoing connections, so that none of the many that tests make
// side by side takes it before its owner does.
func freePort(t *testing.T) int {
	t.Helper()
	const first, count = 20000, 12000
	for range count {
		port := first + (os.Getpid()*97+int(lastPort.Add(1)))%count
		if l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port)); err == nil {
			l.Close()
			return port
		}
	}
	t.Fatal("no free port")
	return 0
}

// shortDir keeps socket paths below their limit, which t.TempDir does not.
func shortDir(t *testing.T) string {
	t.Helper()
	d, err := os.MkdirTemp("", "pag")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(d) })
	return d
}

func (h *host) on() {
	h.t.Helper()
	log := slog.New(slog.DiscardHandler)
	if os.Getenv("PERDURE_TEST_LOG") != "" {
		log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	ctx, cancel := context.WithTimeout(h.t.Context(), 30*time.Second)
	defer cancel()
	var err error
	h.ag, err = Open(ctx, h.cfg.StateDir, Options{
		Log: log, Version: "test", Prove: h.prove,
		Probe: func(context.Context, string) (Machine, error) {
			return Machine{QEMU: "7.2.1", Accel: "tcg", Type: "pc-q35-7.2"}, nil
		},
		API: func(a *Agent) http.Handler {
			return httpapi.New(httpapi.Options{Service: a, Log: log}).Handler()
		},
	})
	if err != nil {
		h.t.Fatalf("open agent %s: %v", h.cfg.Name, err)
	}
	run, stop := context.WithCancel(context.Background())
	h.stop, h.done = stop, make(chan error, 1)
	ag, done := h.ag, h.done
	go func() { done <- ag.Run(run) }()
}

// off ends the agent; shims go on.
func (h *host) off() {
	h.t.Helper()
	if h.ag == nil {
		return
	}
	h.stop()
	if err := <-h.done; err != nil {
		h.t.Errorf("agent %s ended with %v", h.cfg.Name, err)
	}
	h.ag.Close()
	h.ag = nil
}

// killVM ends what lives of a VM here, all at one instant as far as that goes.
func (h *host) killVM(vm string, qemuToo bool) {
	h.t.Helper()
	dir := h.cfg.VMDir(vm)
	if p, ok := shimOf(dir, shimapi.PIDFile); ok {
		syscall.Kill(p.pid, syscall.SIGKILL)
		eventually(h.t, "shim ends", 5*time.Second, func() bool { return !p.alive() })
	}
	if p, ok := qemuOf(filepath.Join(dir, shimapi.QEMUPID)); ok && qemuToo {
		syscall.Kill(p.pid, syscall.SIGKILL)
		eventually(h.t, "QEMU ends", 5*time.Second, func() bool { return !p.alive() })
	}
}

func eventually(t *testing.T, what string, limit time.Duration, cond func() bool) {
	t.Helper()
	end := time.Now().Add(limit)
	for !cond() {
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", limit, what)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// trio is a cluster of two hosts and a witness.
func trio(t *testing.T) (a, b, w *host) {
	t.Helper()
	a = firstHost(t)
	b = joined(t, a, "b", config.RoleHost)
	w = joined(t, a, "w", config.RoleWitness)
	eventually(t, "three voters and all hosts known", 40*time.Second, func() bool {
		n := 0
		for _, m := range a.ag.store.Members() {
			if !m.Learner && m.Up {
				n++
			}
		}
		hosts, _ := a.ag.Hosts(t.Context())
		ok := n == 3 && len(hosts) == 3
		for _, v := range hosts {
			ok = ok && v.State == api.HostAlive && (v.QEMU != "" || v.Role == api.RoleWitness)
		}
		return ok
	})
	return a, b, w
}

func firstHost(t *testing.T) *host {
	t.Helper()
	h := &host{t: t, cfg: hostConfig(t, "a", config.RoleHost)}
	if err := Init(h.cfg, "test"); err != nil {
		t.Fatal(err)
	}
	h.on()
	t.Cleanup(h.cleanup)
	if err := h.ag.store.WaitReady(t.Context()); err != nil {
		t.Fatal(err)
	}
	return h
}

func (h *host) cleanup() {
	entries, _ := os.ReadDir(h.cfg.Path("vms"))
	h.off()
	for _, e := range entries {
		h.killVM(e.Name(), true)
	}
}

func joined(t *testing.T, via *host, name string, role config.Role) *host {
	t.Helper()
	h := &host{t: t, cfg: hostConfig(t, name, role)}
	if err := Join(t.Context(), h.cfg, token(t, via, role), "test"); err != nil {
		t.Fatal(err)
	}
	h.on()
	t.Cleanup(h.cleanup)
	return h
}

func token(t *testing.T, via *host, role config.Role) string {
	t.Helper()
	tok, err := via.ag.CreateToken(t.Context(), api.CreateToken{Role: api.HostRole(role), TTLMS: 60_000})
	if err != nil {
		t.Fatal(err)
	}
	return tok.Text
}

func (h *host) record(vm string) model.Record {
	cur, err := h.ag.store.Record(h.t.Context(), vm)
	if err != nil {
		return model.Record{}
	}
	return cur.Record
}

func (h *host) await(vm, what string, cond func(model.Record) bool) model.Record {
	h.t.Helper()
	var rec model.Record
	end := time.Now().Add(30 * time.Second)
	for {
		rec = h.record(vm)
		// What is asked of the agent next is judged by its copy of the record.
		if v, ok := h.ag.store.VM(vm); cond(rec) && ok && cond(v.Record.Record) {
			return rec
		}
		if time.Now().After(end) {
			h.t.Fatalf("VM %s is not %s: %+v\n%s", vm, what, rec, h.story(vm))
		}
		time.Sleep(30 * time.Millisecond)
	}
}

func (h *host) story(vm string) string {
	var b strings.Builder
	h.ag.Events(h.t.Context(), vm, api.EventQuery{}, func(e model.Event) error {
		fmt.Fprintf(&b, "%s %s %s: %s\n", e.Time.Format("15:04:05.000"), e.Host, e.Type, e.Text)
		return nil
	})
	return b.String()
}

func duplex(r model.Record) bool  { return r.Mode == model.ModeDuplex }
func simplex(r model.Record) bool { return r.Mode == model.ModeSimplex }

func (h *host) create(req api.CreateVM) {
	h.t.Helper()
	if err := req.Validate(); err != nil {
		h.t.Fatal(err)
	}
	op, err := h.ag.CreateVM(h.t.Context(), req)
	if err != nil {
		h.t.Fatal(err)
	}
	eventually(h.t, "creation ends", 30*time.Second, func() bool {
		op, err = h.ag.Operation(h.t.Context(), op.ID)
		return err != nil || op.State != api.OperationRunning
	})
	if op.State != api.OperationDone {
		h.t.Fatalf("%+v %v", op, err)
	}
}

func TestClusterSetup(t *testing.T) {
	t.Parallel()
	a, b, w := trio(t)
	ctx := t.Context()
	eventually(t, "b knows of three voters", 20*time.Second, func() bool { c, err := b.ag.Cluster(ctx); return err == nil && len(c.Voters) == 3 })
	c, err := b.ag.Cluster(ctx)
	if err != nil || !c.Quorum || len(c.Voters) != 3 || c.Name != "test" || c.ID == "" {
		t.Fatalf("%+v, %v", c, err)
	}
	eventually(t, "the witness leads", 20*time.Second, func() bool { c, _ := a.ag.Cluster(ctx); return c.Leader == "w" })
	if _, err := os.Stat(w.cfg.PKIPath("ca.key")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the witness holds the authority's key: %v", err)
	}
	st, err := os.Stat(a.cfg.AgentSocket())
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("socket %v, %v", st.Mode(), err)
	}

	// A token lets one in, of its kind, under a name that is free.
	tok := token(t, b, config.RoleHost)
	dup := hostConfig(t, "a", config.RoleHost)
	wantErr(t, "a name twice", Join(ctx, dup, tok, "test"), api.Conflict, "there is a host")
	wantErr(t, "a witness by a host's token", Join(ctx, hostConfig(t, "x", config.RoleWitness), tok, "test"), api.Invalid, "lets a host in")
	wantErr(t, "nonsense", Join(ctx, hostConfig(t, "x", config.RoleHost), "hello", "test"), api.Invalid, "malformed")
	stranger, err := pki.NewToken(strings.Repeat("ab", 32), []string{a.cfg.APIAddr()}, false, time.Now().Add(time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	wantErr(t, "a cluster of another authority", Join(ctx, hostConfig(t, "x", config.RoleHost), stranger.String(), "test"), api.Forbidden, "does not belong to the cluster of the token")
	late, err := pki.NewToken(strings.Repeat("ab", 32), []string{a.cfg.APIAddr()}, false, time.Now().Add(-time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	wantErr(t, "an expired token", Join(ctx, hostConfig(t, "x", config.RoleHost), late.String(), "test"), api.Invalid, "expired")

	// The witness, which holds no key, passes the request on to a host that does.
	tok = token(t, w, config.RoleHost)
	used := hostConfig(t, "x", config.RoleHost)
	if err := Join(ctx, used, tok, "test"); err != nil {
		t.Fatal(err)
	}
	again := hostConfig(t, "y", config.RoleHost)
	wantErr(t, "a used token", Join(ctx, again, tok, "test"), api.Forbidden, "used already")
	for _, c := range []config.Config{dup, again} {
		if _, err := os.Stat(c.StateDir); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left behind: %v", c.StateDir, err)
		}
	}

	// State directories: in use, of a host already, of another version.
	_, err = Open(ctx, a.cfg.StateDir, Options{})
	wantErr(t, "two agents", err, api.Conflict, "another agent")
	wantErr(t, "init twice", Init(used, "x"), api.Conflict, "already")
	if err := os.WriteFile(filepath.Join(used.StateDir, versionFile), []byte("99\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = Open(ctx, used.StateDir, Options{})
	wantErr(t, "another version", err, api.Conflict, `format "99"`)
	wantErr(t, "init over another version", Init(used, "x"), api.Conflict, `format "99"`)
	_, err = Open(ctx, filepath.Join(used.StateDir, "nix"), Options{})
	wantErr(t, "no state", err, api.Conflict, "holds no host")

	taken := hostConfig(t, "z", config.RoleHost)
	l, err := net.Listen("tcp", taken.APIAddr())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	wantErr(t, "port taken", Init(taken, "x"), api.Conflict, "lan.api_port")
}

func wantErr(t *testing.T, what string, err error, class api.Class, part string) {
	t.Helper()
	if err == nil || api.ClassOf(err) != class || !strings.Contains(err.Error(), part) {
		t.Errorf("%s: error %v (class %s), want class %s and %q in it", what, err, api.ClassOf(err), class, part)
	}
}

func TestProtectedLife(t *testing.T) {
	t.Parallel()
	testenv.Root(t)
	a, b, w := trio(t)
	ctx := t.Context()
	kernel := filepath.Join(t.TempDir(), "vmlinuz")
	if err := os.WriteFile(kernel, []byte("a kernel"), 0o600); err != nil {
		t.Fatal(err)
	}
	a.create(api.CreateVM{Name: "v1", Level: model.LevelFT, Memory: 16 << 20, Disks: []api.CreateDisk{{Size: 1 << 20}, {Size: 2 << 20}},
		Kernel: &api.File{Path: kernel}, Append: "console=ttyS0", Start: true})
	rec := a.await("v1", "duplex", duplex)
	if rec.Primary.Host != "a" || rec.Secondary.Host != "b" || rec.Replicas["b"].State != model.UpToDate {
		t.Fatalf("%+v", rec)
	}
	spec, err := a.ag.store.Spec(ctx, "v1")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(b.cfg.BlobPath(spec.Kernel.SHA256)); err != nil {
		t.Errorf("the kernel was not fetched: %v", err)
	}

	// Seen alike from everywhere, the witness included.
	for _, h := range []*host{a, b, w} {
		eventually(t, "state is seen from "+h.cfg.Name, 10*time.Second, func() bool {
			v, err := h.ag.VM(ctx, "v1")
			return err == nil && v.State == model.StateRunning && v.Mode == model.ModeDuplex && v.Epoch == 7
		})
	}
	conn, err := w.ag.Console(ctx, "v1")
	if err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 64)
	n, _ := conn.Read(buf)
	conn.Close()
	if got := string(buf[:n]); got != "console on a\n" {
		t.Errorf("console says %q", got)
	}

	// The agent restarts during all this: the shim is the same one.
	before, ok := shimOf(a.cfg.VMDir("v1"), shimapi.PIDFile)
	if !ok {
		t.Fatal("no shim")
	}
	a.off()
	eventually(t, "without an agent the state is unknown elsewhere", 10*time.Second, func() bool {
		v, err := b.ag.VM(ctx, "v1")
		return err == nil && v.State == model.StateUnknown
	})
	a.on()
	eventually(t, "shim is found again", 10*time.Second, func() bool {
		v, err := b.ag.VM(ctx, "v1")
		return err == nil && v.State == model.StateRunning
	})
	if after, ok := shimOf(a.cfg.VMDir("v1"), shimapi.PIDFile); !ok || after != before {
		t.Errorf("shim %v became %v", before, after)
	}

	// A planned change of sides, then the way back by itself.
	if err := w.ag.SwitchoverVM(ctx, "v1", api.SwitchoverVM{}); err != nil {
		t.Fatal(err)
	}
	b.await("v1", "duplex on b", func(r model.Record) bool { return duplex(r) && r.Primary.Host == "b" && r.Secondary.Host == "a" })

	// The primary's memory is lost while its agent lives: it tells the other side.
	b.killVM("v1", true)
	a.await("v1", "duplex on a", func(r model.Record) bool { return duplex(r) && r.Primary.Host == "a" && r.Secondary.Host == "b" })
	if s := a.story("v1"); !strings.Contains(s, "memory-lost") || !strings.Contains(s, "primary-empty") {
		t.Errorf("events do not tell what happened:\n%s", s)
	}

	// A person's wish outlives everything; protection can be given up.
	if err := b.ag.PauseVM(ctx, "v1"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "paused", 5*time.Second, func() bool { v, _ := b.ag.VM(ctx, "v1"); return v.State == model.StatePaused })
	if err := b.ag.ResumeVM(ctx, "v1"); err != nil {
		t.Fatal(err)
	}
	if err := b.ag.ProtectVM(ctx, "v1", api.ProtectVM{Off: true}); err != nil {
		t.Fatal(err)
	}
	a.await("v1", "simplex", simplex)
	time.Sleep(1500 * time.Millisecond)
	if r := a.record("v1"); !simplex(r) {
		t.Errorf("it was protected again although a person gave it up: %+v", r)
	}
	if err := b.ag.ProtectVM(ctx, "v1", api.ProtectVM{}); err != nil {
		t.Fatal(err)
	}
	a.await("v1", "duplex again", duplex)

	wantErr(t, "delete while it runs", a.ag.DeleteVM(ctx, "v1", api.DeleteVM{}), api.Conflict, "not stopped")
	wantErr(t, "start while it runs", a.ag.StartVM(ctx, "v1", api.StartVM{}), api.Conflict, "not stopped")
	if err := b.ag.KillVM(ctx, "v1"); err != nil {
		t.Fatal(err)
	}
	a.await("v1", "stopped", func(r model.Record) bool { return r.Mode == model.ModeStopped })
	wantErr(t, "op on a stopped one", b.ag.StopVM(ctx, "v1"), api.Conflict, "stopped")
	for _, h := range []*host{a, b} {
		eventually(t, "nothing runs any more on "+h.cfg.Name, 10*time.Second, func() bool {
			return lockFree(filepath.Join(h.cfg.VMDir("v1"), shimapi.LockFile))
		})
	}
	eventually(t, "deleted", 10*time.Second, func() bool { return b.ag.DeleteVM(ctx, "v1", api.DeleteVM{}) == nil })
	for _, h := range []*host{a, b} {
		if _, err := os.Stat(h.cfg.VMDir("v1")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("files are left on %s: %v", h.cfg.Name, err)
		}
	}
	_, err = a.ag.VM(ctx, "v1")
	wantErr(t, "deleted VM", err, api.NotFound, "v1")
}

func TestSurvivorRight(t *testing.T) {
	t.Parallel()
	a, b, w := trio(t)
	a.create(api.CreateVM{Name: "v1", Level: model.LevelFT, Memory: 16 << 20, Start: true})
	a.await("v1", "duplex", duplex)
	time.Sleep(time.Second)
	if r := a.record("v1"); r.Survivor != "" {
		t.Fatalf("survivor without need: %+v", r)
	}
	start := time.Now()
	w.off()
	a.await("v1", "survivor", func(r model.Record) bool { return r.Survivor == "a" })
	t.Logf("survivor %v after the loss of the witness", time.Since(start))
	held := func() bool {
		v, err := b.ag.VM(t.Context(), "v1")
		if err != nil {
			return false
		}
		for _, p := range v.Problems {
			if p.Code == "fake-survivor" {
				return true
			}
		}
		return false
	}
	eventually(t, "the shim was told", 5*time.Second, held)

	// The agent of the primary restarts: the right stays, the shim is told again.
	a.off()
	a.on()
	eventually(t, "still held", 20*time.Second, func() bool { return a.record("v1").Survivor == "a" && held() })

	w.on()
	a.await("v1", "no survivor", func(r model.Record) bool { return duplex(r) && r.Survivor == "" })
	eventually(t, "the shim gave it up", 5*time.Second, func() bool { return !held() })
}

func TestOrphanAndFailingStart(t *testing.T) {
	t.Parallel()
	a := firstHost(t)
	a.create(api.CreateVM{Name: "v1", Memory: 16 << 20, Disks: []api.CreateDisk{{Size: 1 << 20}}, Start: true})
	rec := a.await("v1", "simplex", simplex)
	dir := a.cfg.VMDir("v1")
	var qemu procID
	eventually(t, "there is a QEMU", 10*time.Second, func() (ok bool) { qemu, ok = qemuOf(filepath.Join(dir, shimapi.QEMUPID)); return ok })
	a.killVM("v1", false)
	again := a.await("v1", "started again", func(r model.Record) bool { return simplex(r) && r.Primary.Run != rec.Primary.Run })
	if qemu.alive() {
		t.Error("the orphaned QEMU lives")
	}
	if again.Term < rec.Term+2 {
		t.Errorf("terms %d, %d: the start was not a grant of its own", rec.Term, again.Term)
	}
	if s := a.story("v1"); !strings.Contains(s, "guest-lost") || !strings.Contains(s, "start-from-disk") {
		t.Errorf("events:\n%s", s)
	}

	// A start that fails is said, tried again, and can be given up.
	if err := a.ag.KillVM(t.Context(), "v1"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "ended", 10*time.Second, func() bool { return lockFree(filepath.Join(dir, shimapi.LockFile)) })
	if err := os.WriteFile(filepath.Join(dir, "fail"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := a.ag.StartVM(t.Context(), "v1", api.StartVM{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the failure is a problem of the VM", 10*time.Second, func() bool {
		v, err := a.ag.VM(t.Context(), "v1")
		if err != nil || v.State != model.StateStarting {
			return false
		}
		for _, p := range v.Problems {
			if p.Code == "start-failed" && strings.Contains(p.Text, "the test wants this start to fail") {
				return true
			}
		}
		return false
	})
	if err := os.Remove(filepath.Join(dir, "fail")); err != nil {
		t.Fatal(err)
	}
	a.await("v1", "started after all", simplex)
}

func TestPowerLossOfBoth(t *testing.T) {
	t.Parallel()
	a, b, _ := trio(t)
	a.create(api.CreateVM{Name: "v1", Level: model.LevelFT, Memory: 16 << 20, Disks: []api.CreateDisk{{Size: 1 << 20}}, Start: true})
	// A fake shim does not write the replica's own metadata; a VM with a disk
	// could not be started from b then.
	a.await("v1", "duplex", duplex)
	for _, h := range []*host{a, b} {
		h.off()
	}
	for _, h := range []*host{a, b} {
		h.killVM("v1", true)
	}
	// Only the primary's host returns; the other one's memory would have
	// precedence, so it is waited for.
	start := time.Now()
	a.on()
	rec := a.await("v1", "started from disk", func(r model.Record) bool { return simplex(r) && r.Primary.Host == "a" })
	if d := time.Since(start); d < a.cfg.BootWait.D() {
		t.Errorf("started after %v, before boot_wait was over", d)
	}
	if rec.Replicas["b"].State != model.Outdated {
		t.Errorf("%+v", rec)
	}
	b.on()
	a.await("v1", "duplex", duplex)
}

func TestWithoutQuorumNothingIsTouched(t *testing.T) {
	t.Parallel()
	a, b, w := trio(t)
	a.create(api.CreateVM{Name: "v1", Level: model.LevelFT, Memory: 16 << 20, Start: true})
	a.await("v1", "duplex", duplex)
	b.off()
	w.off()
	p, ok := shimOf(a.cfg.VMDir("v1"), shimapi.PIDFile)
	if !ok {
		t.Fatal("no shim")
	}
	eventually(t, "loss of quorum is said", 10*time.Second, func() bool { c, _ := a.ag.Cluster(t.Context()); return !c.Quorum })
	a.off()
	a.on() // it cannot even read the record
	time.Sleep(2 * time.Second)
	if !p.alive() {
		t.Fatal("the VM was touched without a quorum")
	}
	eventually(t, "what runs here is seen without a quorum", 10*time.Second, func() bool {
		v, err := a.ag.VM(t.Context(), "v1")
		return err == nil && v.State == model.StateRunning
	})
	wantErr(t, "kill", a.ag.KillVM(t.Context(), "v1"), api.Unavailable, "quorum")
	if !p.alive() {
		t.Fatal("the VM was ended without a quorum")
	}
	w.on()
	eventually(t, "quorum is back", 30*time.Second, func() bool {
		v, err := a.ag.VM(t.Context(), "v1")
		return err == nil && v.State == model.StateRunning && a.ag.store.Quorum()
	})
	if now, ok := shimOf(a.cfg.VMDir("v1"), shimapi.PIDFile); !ok || now != p {
		t.Errorf("shim %v became %v", p, now)
	}
}

func TestCreateRefuses(t *testing.T) {
	t.Parallel()
	qemuImg := testenv.Tool(t, "qemu-img")
	a := firstHost(t)
	ctx, dir := t.Context(), t.TempDir()
	img := func(name string, args ...string) string {
		p := filepath.Join(dir, name)
		if out, err := exec.Command(qemuImg, append([]string{"create", "-q"}, append(args, p, "4M")...)...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return p
	}
	base := img("base.qcow2", "-f", "qcow2")
	child := img("child.qcow2", "-f", "qcow2", "-b", base, "-F", "qcow2")
	text := filepath.Join(dir, "text")
	if err := os.WriteFile(text, []byte("this is no image"), 0o600); err != nil {
		t.Fatal(err)
	}
	disk := func(d api.CreateDisk) api.CreateVM { return api.CreateVM{Name: "v1", Disks: []api.CreateDisk{d}} }
	file := func(p string) *api.File { return &api.File{Path: p} }
	for name, tc := range map[string]struct {
		req   api.CreateVM
		class api.Class
		part  string
	}{
		"backing file":    {disk(api.CreateDisk{Image: file(child)}), api.Invalid, "backing file"},
		"no image":        {disk(api.CreateDisk{Image: file(text)}), api.Invalid, "no disk image"},
		"not qcow2":       {disk(api.CreateDisk{Image: file(text), Format: "qcow2"}), api.Invalid, "no image that can be read"},
		"missing":         {disk(api.CreateDisk{Image: file(filepath.Join(dir, "nix"))}), api.Invalid, "no such file"},
		"directory":       {disk(api.CreateDisk{Image: file(dir)}), api.Invalid, "not a regular file"},
		"too small":       {disk(api.CreateDisk{Image: file(base), Size: 1 << 20}), api.Invalid, "below that of its image"},
		"beyond the disk": {disk(api.CreateDisk{Size: 60 << 40}), api.Invalid, "free in"},
		"beyond memory":   {api.CreateVM{Name: "v1", Memory: 4 << 40}, api.Invalid, "beyond host a"},
		"bridge":          {api.CreateVM{Name: "v1", NICs: []api.CreateNIC{{Bridge: "nobridge0"}}}, api.Invalid, `no bridge "nobridge0"`},
		"host":            {api.CreateVM{Name: "v1", Host: "nix"}, api.NotFound, `no host "nix"`},
		"UEFI":            {api.CreateVM{Name: "v1", Level: model.LevelFT, UEFI: true}, api.Refused, "variable store"},
		"kernel":          {api.CreateVM{Name: "v1", Kernel: file(dir)}, api.Invalid, "kernel"},
		"upload":          {api.CreateVM{Name: "v1", Kernel: &api.File{Upload: "abc"}}, api.NotFound, "no upload"},
	} {
		if err := tc.req.Validate(); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		_, err := a.ag.CreateVM(ctx, tc.req)
		wantErr(t, name, err, tc.class, tc.part)
	}
	if e, _ := os.ReadDir(a.cfg.Path("vms")); len(e) != 0 {
		t.Errorf("left behind: %v", e)
	}

	// What is good is imported; the name is then taken.
	up, err := a.ag.Upload(ctx, "base", strings.NewReader("an initrd"))
	if err != nil {
		t.Fatal(err)
	}
	a.create(api.CreateVM{Name: "v1", Disks: []api.CreateDisk{{Image: file(base), Size: 8 << 20}}, Kernel: file(text), Initrd: &api.File{Upload: up.ID}})
	if st, err := os.Stat(filepath.Join(a.cfg.VMDir("v1"), shimapi.DiskDir, "disk0.raw")); err != nil || st.Size() != 8<<20 {
		t.Errorf("%v, %v", st, err)
	}
	again := api.CreateVM{Name: "v1"}
	if err := again.Validate(); err != nil {
		t.Fatal(err)
	}
	_, err = a.ag.CreateVM(ctx, again)
	wantErr(t, "two of one name", err, api.Conflict, "already")
	if e, _ := os.ReadDir(a.cfg.Path("uploads")); len(e) != 0 {
		t.Errorf("the upload is left: %v", e)
	}

	// Cancelled in the middle: nothing is left.
	var mu sync.Mutex
	mu.Lock()
	op, err := a.ag.ops.begin("create", "v2", func(ctx context.Context, op *operation) error {
		mu.Lock()
		p := &plan{images: map[string]image{}, spec: model.VMSpec{Name: "v2", UUID: newUUID(), Disks: []model.DiskSpec{{ID: "disk0", Size: 1 << 20}}}}
		return a.ag.makeVM(ctx, op, p)
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := a.ag.CancelOperation(ctx, op.ID); err != nil {
		t.Fatal(err)
	}
	mu.Unlock()
	eventually(t, "cancelled", 5*time.Second, func() bool { o, _ := a.ag.Operation(ctx, op.ID); return o.State == api.OperationFailed })
	if e, _ := os.ReadDir(a.cfg.Path("vms")); len(e) != 1 {
		t.Errorf("left behind: %v", e)
	}
}

// TestProtectionThatBeginsLate has a shim that accepts an attempt some time
// before the record says so: that is no failure, and nobody is told of one.
func TestProtectionThatBeginsLate(t *testing.T) {
	t.Parallel()
	testenv.Root(t)
	ctx := t.Context()
	a := firstHost(t)
	joined(t, a, "b", config.RoleHost)
	eventually(t, "b is known", 20*time.Second, func() bool {
		h, err := a.ag.Host(ctx, "b")
		return err == nil && h.QEMU != "" && h.State == api.HostAlive
	})
	a.create(api.CreateVM{Name: "v1", Level: model.LevelFT, Memory: 16 << 20})
	slow := filepath.Join(a.cfg.VMDir("v1"), "slow")
	if err := os.WriteFile(slow, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := a.ag.StartVM(ctx, "v1", api.StartVM{Host: "a"}); err != nil {
		t.Fatal(err)
	}
	asked := func() (n int) {
		err := a.ag.Events(ctx, "v1", api.EventQuery{}, func(e model.Event) error {
			if e.Type == "protecting" {
				n++
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	eventually(t, "an attempt is accepted", 20*time.Second, func() bool { return asked() > 0 })
	for end := time.Now().Add(4 * minProtectDelay); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		v, _ := a.ag.VM(ctx, "v1")
		if n := asked(); n > 1 || len(v.Problems) > 0 {
			t.Fatalf("%d attempts, problems %+v", n, v.Problems)
		}
	}
	if err := os.Remove(slow); err != nil {
		t.Fatal(err)
	}
	a.await("v1", "protected", duplex)
}

// TestProtectionThatFails has a standby that never comes to be: people are told
// at once and until the VM is protected, also while the next attempt is under way.
func TestProtectionThatFails(t *testing.T) {
	t.Parallel()
	testenv.Root(t)
	ctx := t.Context()
	a := firstHost(t)
	b := joined(t, a, "b", config.RoleHost)
	eventually(t, "b is known", 20*time.Second, func() bool {
		h, err := a.ag.Host(ctx, "b")
		return err == nil && h.QEMU != "" && h.State == api.HostAlive
	})
	told := func() (text string) {
		v, _ := a.ag.VM(ctx, "v1")
		for _, p := range v.Problems {
			if p.Code == "unprotected" {
				text = p.Text
			}
		}
		return text
	}
	a.create(api.CreateVM{Name: "v1", Level: model.LevelFT, Memory: 16 << 20})
	spec, err := a.ag.store.Spec(ctx, "v1")
	if err != nil {
		t.Fatal(err)
	}
	if err := b.ag.ownDir(spec); err != nil {
		t.Fatal(err)
	}
	fail := filepath.Join(b.cfg.VMDir("v1"), "fail")
	if err := os.WriteFile(fail, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := a.ag.StartVM(ctx, "v1", api.StartVM{Host: "a"}); err != nil {
		t.Fatal(err)
	}
	syncing := func(r model.Record) bool { return r.Mode == model.ModeSyncing }
	for range 2 {
		first := a.await("v1", "being filled", syncing)
		// What the shim of the primary does when the standby dies.
		if err := a.ag.shimOpHere(ctx, "v1", shimapi.Op{Op: "unprotect"}); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the failure is told", 20*time.Second, func() bool { return strings.Contains(told(), "on host b failed") })
		a.await("v1", "tried again", func(r model.Record) bool { return syncing(r) && r.Term > first.Term })
		if text := told(); !strings.Contains(text, "on host b failed") {
			t.Errorf("during the next attempt people are told %q", text)
		}
	}
	if err := os.Remove(fail); err != nil {
		t.Fatal(err)
	}
	a.await("v1", "protected", duplex)
	eventually(t, "the problem is gone", 20*time.Second, func() bool { return told() == "" })
}
