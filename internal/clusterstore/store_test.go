package clusterstore

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"perdure/internal/model"
	"perdure/internal/pki"
	"perdure/internal/shimapi"
)

// farm is a cluster on loopback, for tests.
type farm struct {
	t      *testing.T
	ca     *pki.CA
	dir    string
	prefer func(string) bool
	cfgs   map[string]Config
	stores map[string]*Store
}

func newFarm(t *testing.T) *farm {
	t.Helper()
	ca, err := pki.NewCA("test", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	f := &farm{t: t, ca: ca, dir: t.TempDir(), cfgs: map[string]Config{}, stores: map[string]*Store{}}
	t.Cleanup(func() {
		var wg sync.WaitGroup
		for _, s := range f.stores {
			wg.Add(1)
			go func() { defer wg.Done(); s.Close() }()
		}
		wg.Wait()
	})
	return f
}

func freeAddr(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func (f *farm) config(name string, ca *pki.CA) Config {
	f.t.Helper()
	dir := filepath.Join(f.dir, name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		f.t.Fatal(err)
	}
	key, csr, err := pki.NewRequest(name)
	if err != nil {
		f.t.Fatal(err)
	}
	cert, err := ca.IssueHost(csr, name, []net.IP{net.IPv4(127, 0, 0, 1)}, time.Now())
	if err != nil {
		f.t.Fatal(err)
	}
	for n, b := range map[string][]byte{"ca.crt": ca.CertPEM(), "host.crt": cert, "host.key": key} {
		if err := os.WriteFile(filepath.Join(dir, n), b, 0o600); err != nil {
			f.t.Fatal(err)
		}
	}
	return Config{
		Name: name, Dir: filepath.Join(dir, "etcd"),
		PeerAddr: freeAddr(f.t), ClientAddr: freeAddr(f.t),
		CAFile: filepath.Join(dir, "ca.crt"), CertFile: filepath.Join(dir, "host.crt"), KeyFile: filepath.Join(dir, "host.key"),
		AllowedCN: pki.HostCN, Prefer: f.prefer,
	}
}

func (f *farm) open(name string) *Store {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.t.Context(), 30*time.Second)
	defer cancel()
	s, err := Open(ctx, f.cfgs[name])
	if err != nil {
		f.t.Fatalf("open %s: %v", name, err)
	}
	f.stores[name] = s
	return s
}

func (f *farm) close(name string) {
	f.stores[name].Close()
	delete(f.stores, name)
}

func (f *farm) first(name string) *Store {
	f.t.Helper()
	f.cfgs[name] = f.config(name, f.ca)
	s := f.open(name)
	f.ready(s)
	return s
}

func (f *farm) ready(s *Store) {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.t.Context(), 30*time.Second)
	defer cancel()
	if err := s.WaitReady(ctx); err != nil {
		f.t.Fatal(err)
	}
}

func (f *farm) join(via *Store, name string) *Store {
	f.t.Helper()
	cfg := f.config(name, f.ca)
	ctx, cancel := context.WithTimeout(f.t.Context(), 30*time.Second)
	defer cancel()
	initial, err := via.AddMember(ctx, name, "https://"+cfg.PeerAddr)
	if err != nil {
		f.t.Fatal(err)
	}
	cfg.Initial, cfg.Existing = initial, true
	f.cfgs[name] = cfg
	s := f.open(name)
	f.ready(s)
	return s
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

func (f *farm) trio() (a, b, c *Store) {
	f.t.Helper()
	a = f.first("a")
	b = f.join(a, "b")
	c = f.join(a, "c")
	eventually(f.t, "three voters", 30*time.Second, func() bool { return voters(a) == 3 && voters(c) == 3 })
	return a, b, c
}

func voters(s *Store) (n int) {
	for _, m := range s.Members() {
		if !m.Learner {
			n++
		}
	}
	return n
}

func testVM(name string) (model.VMSpec, model.Record) {
	return model.VMSpec{Name: name, Level: model.LevelFT, VCPUs: 1, Memory: 64 << 20},
		model.Record{VM: name, Mode: model.ModeStopped, Wanted: model.WantStopped,
			Replicas: map[string]model.Replica{"a": {State: model.UpToDate}}}
}

func TestOneMember(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	s := f.first("a")
	ctx := t.Context()
	spec, rec := testVM("v1")
	if err := s.CreateVM(ctx, spec, rec); err != nil {
		t.Fatal(err)
	}
	if err := s.CreateVM(ctx, spec, rec); !errors.Is(err, ErrExists) {
		t.Errorf("second VM of one name: %v", err)
	}
	v, err := s.Record(ctx, "v1")
	if err != nil || v.Revision == 0 || v.Record.Replicas["a"].State != model.UpToDate {
		t.Fatalf("%+v, %v", v, err)
	}
	if _, err := s.Record(ctx, "nix"); !errors.Is(err, ErrNotFound) {
		t.Errorf("unknown VM: %v", err)
	}

	next := v.Record.Clone()
	next.Term, next.Mode = 1, model.ModeStarting
	done := s.SwapRecord(ctx, shimapi.SwapRequest{VM: "v1", Revision: v.Revision, Record: next})
	if done.Outcome != shimapi.SwapDone || done.Current.Revision <= v.Revision {
		t.Fatalf("%+v", done)
	}
	lost := s.SwapRecord(ctx, shimapi.SwapRequest{VM: "v1", Revision: v.Revision, Record: next})
	if lost.Outcome != shimapi.SwapConflict || lost.Current.Record.Term != 1 || lost.Current.Revision != done.Current.Revision {
		t.Fatalf("%+v", lost)
	}
	if r := s.SwapRecord(ctx, shimapi.SwapRequest{VM: "v2", Revision: v.Revision, Record: next}); r.Outcome != shimapi.SwapConflict {
		t.Errorf("swap under another name: %+v", r)
	}

	if err := s.PutEndpoint(ctx, "v1", shimapi.Endpoint{Host: "a", Addrs: []string{"x:1"}, Nonce: "n"}); err != nil {
		t.Fatal(err)
	}
	if err := s.PutEndpoint(ctx, "nix", shimapi.Endpoint{Host: "a"}); !errors.Is(err, ErrNotFound) {
		t.Errorf("endpoint of an unknown VM: %v", err)
	}
	eventually(t, "the copy follows", 5*time.Second, func() bool {
		v, ok := s.VM("v1")
		return ok && v.Record.Revision == done.Current.Revision && v.Endpoints["a"].Nonce == "n"
	})
	if err := s.DeleteVM(ctx, "v1", v.Revision); !errors.Is(err, ErrConflict) {
		t.Errorf("delete at an old revision: %v", err)
	}
	changed := s.Changed()
	if err := s.DeleteVM(ctx, "v1", done.Current.Revision); err != nil {
		t.Fatal(err)
	}
	select {
	case <-changed:
	case <-time.After(5 * time.Second):
		t.Fatal("no hint")
	}
	eventually(t, "the copy forgets", 5*time.Second, func() bool { return len(s.VMs()) == 0 })
	gone := s.SwapRecord(ctx, shimapi.SwapRequest{VM: "v1", Revision: done.Current.Revision, Record: next})
	if gone.Outcome != shimapi.SwapConflict || gone.Current.Revision != 0 {
		t.Errorf("swap of a deleted record: %+v", gone)
	}
}

func TestTokensAliveHosts(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	s := f.first("a")
	ctx, now := t.Context(), time.Now()
	tok := Token{ID: "t1", SecretHash: pki.HashSecret("s"), Role: "host", Expires: now.Add(time.Minute)}
	if err := s.PutToken(ctx, tok); err != nil {
		t.Fatal(err)
	}
	for name, use := range map[string]func() error{
		"wrong secret": func() error { _, err := s.UseToken(ctx, "t1", "x", "host", now); return err },
		"wrong role":   func() error { _, err := s.UseToken(ctx, "t1", tok.SecretHash, "witness", now); return err },
		"expired":      func() error { _, err := s.UseToken(ctx, "t1", tok.SecretHash, "host", now.Add(time.Hour)); return err },
		"unknown":      func() error { _, err := s.UseToken(ctx, "t2", tok.SecretHash, "host", now); return err },
	} {
		if err := use(); !errors.Is(err, ErrNotFound) {
			t.Errorf("%s: %v", name, err)
		}
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	wins := 0
	for range 8 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			if _, err := s.UseToken(ctx, "t1", tok.SecretHash, "host", now); err == nil {
				mu.Lock()
				wins++
				mu.Unlock()
			}
		}()
	}
	wg.Wait()
	if wins != 1 {
		t.Errorf("the token let %d in", wins)
	}

	if c, err := s.PutCluster(ctx, ClusterInfo{ID: "1", Name: "n"}); err != nil || c.ID != "1" {
		t.Fatal(c, err)
	}
	if c, err := s.PutCluster(ctx, ClusterInfo{ID: "2", Name: "m"}); err != nil || c.ID != "1" {
		t.Errorf("the cluster was renamed: %v %v", c, err)
	}
	if err := s.PutHost(ctx, HostInfo{Name: "a", Role: "host"}); err != nil {
		t.Fatal(err)
	}
	actx, stop := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- s.KeepAlive(actx, "a", "boot1") }()
	alive := func() bool {
		h := s.Hosts()
		return len(h) == 1 && h[0].Alive && h[0].Nonce == "boot1"
	}
	eventually(t, "alive", 5*time.Second, alive)
	deadline := time.Now().Add(AliveTTL + time.Second)
	for time.Now().Before(deadline) {
		if !alive() {
			t.Fatal("the lease was not renewed")
		}
		time.Sleep(50 * time.Millisecond)
	}
	stop()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	eventually(t, "a goodbye is seen at once", time.Second, func() bool { return !alive() })
}

func TestThreeMembersOneDies(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	f.prefer = func(n string) bool { return n == "c" }
	a, b, _ := f.trio()
	eventually(t, "the preferred member leads", 30*time.Second, func() bool { return a.Leader() == "c" && b.Leader() == "c" })

	ctx := t.Context()
	spec, rec := testVM("v1")
	if err := b.CreateVM(ctx, spec, rec); err != nil {
		t.Fatal(err)
	}
	v, err := a.Record(ctx, "v1")
	if err != nil {
		t.Fatal(err)
	}

	// A host that does not lead goes: swaps go on at once.
	f.close("a")
	next := v.Record.Clone()
	next.Term = 1
	start := time.Now()
	r := b.SwapRecord(ctx, shimapi.SwapRequest{VM: "v1", Revision: v.Revision, Record: next})
	if r.Outcome != shimapi.SwapDone {
		t.Fatalf("%+v", r)
	}
	t.Logf("swap after the loss of a follower: %v", time.Since(start))
	eventually(t, "the loss is seen", 10*time.Second, func() bool {
		for _, m := range b.Members() {
			if m.Name == "a" {
				return !m.Up && m.LostFor > time.Second
			}
		}
		return false
	})

	// It comes back with its data, though the configuration says "new".
	a = f.open("a")
	f.ready(a)
	got, err := a.Record(ctx, "v1")
	if err != nil || got.Record.Term != 1 {
		t.Fatalf("%+v, %v", got, err)
	}

	// The leader goes: within an election swaps go on.
	f.close("c")
	cur := got
	eventually(t, "a new leader takes swaps", 15*time.Second, func() bool {
		next := cur.Record.Clone()
		next.Term++
		r := b.SwapRecord(ctx, shimapi.SwapRequest{VM: "v1", Revision: cur.Revision, Record: next})
		if r.Outcome == shimapi.SwapUnknown {
			if v, err := b.Record(ctx, "v1"); err == nil {
				cur = v
			}
		}
		return r.Outcome == shimapi.SwapDone
	})
}

func TestQuorumLostNeverBlocks(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	a, _, _ := f.trio()
	ctx := t.Context()
	spec, rec := testVM("v1")
	if err := a.CreateVM(ctx, spec, rec); err != nil {
		t.Fatal(err)
	}
	v, err := a.Record(ctx, "v1")
	if err != nil {
		t.Fatal(err)
	}
	f.close("b")
	f.close("c")

	within := func(what string, f func()) {
		t.Helper()
		start := time.Now()
		f()
		if d := time.Since(start); d > 2200*time.Millisecond {
			t.Errorf("%s took %v", what, d)
		}
	}
	next := v.Record.Clone()
	next.Term = 1
	within("swap", func() {
		r := a.SwapRecord(ctx, shimapi.SwapRequest{VM: "v1", Revision: v.Revision, Record: next})
		if r.Outcome != shimapi.SwapUnknown || r.Error == "" {
			t.Errorf("%+v", r)
		}
	})
	within("read", func() {
		if _, err := a.Record(ctx, "v1"); !errors.Is(err, ErrUnavailable) {
			t.Error(err)
		}
	})
	within("swap with less time", func() {
		cctx, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
		defer cancel()
		start := time.Now()
		r := a.SwapRecord(cctx, shimapi.SwapRequest{VM: "v1", Revision: v.Revision, Record: next})
		if r.Outcome != shimapi.SwapUnknown || time.Since(start) > time.Second {
			t.Errorf("%+v after %v", r, time.Since(start))
		}
	})
	eventually(t, "no quorum is said", 5*time.Second, func() bool { return !a.Quorum() })
	if len(a.VMs()) != 1 {
		t.Error("the copy for hints was lost with the quorum")
	}
	for _, m := range a.Members() {
		if m.LostFor > 0 {
			t.Errorf("without a quorum of its own it says that %s is lost", m.Name)
		}
	}

	// A member alone starts, is not ready, answers from its copy never as a
	// right, and closes.
	f.close("a")
	a = f.open("a")
	within("read before ready", func() {
		if _, err := a.Record(ctx, "v1"); !errors.Is(err, ErrUnavailable) {
			t.Error(err)
		}
	})
	eventually(t, "the copy for hints is there without a quorum", 5*time.Second, func() bool { return len(a.VMs()) == 1 })
	closed := make(chan struct{})
	go func() { f.close("a"); close(closed) }()
	select {
	case <-closed:
	case <-time.After(20 * time.Second):
		t.Fatal("a member that never got ready does not close")
	}

	// The first swap was unknown; when the quorum is back it is one of both.
	f.open("a")
	b := f.open("b")
	f.ready(b)
	got, err := b.Record(ctx, "v1")
	if err != nil || got.Record.Term > 1 {
		t.Fatalf("%+v, %v", got, err)
	}
}

func TestForeignAuthorityIsRefused(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	a := f.first("a")
	other, err := pki.NewCA("other", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	cfg := f.config("evil", other)
	cfg.Initial = map[string]string{"a": "https://" + f.cfgs["a"].PeerAddr, "evil": "https://" + cfg.PeerAddr}
	cfg.Existing, cfg.JoinWait = true, time.Second
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	s, err := Open(ctx, cfg)
	if err == nil {
		s.Close()
		t.Fatal("a member of another authority got in")
	}
	if _, err := a.AddMember(t.Context(), "a", "https://127.0.0.1:1"); !errors.Is(err, ErrExists) {
		t.Errorf("two members of one name: %v", err)
	}
}

func TestPortTaken(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	cfg := f.config("a", f.ca)
	l, err := net.Listen("tcp", cfg.PeerAddr)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	s, err := Open(ctx, cfg)
	if err == nil {
		s.Close()
		t.Fatal("a taken port was not noticed")
	}
	if want := fmt.Sprint(l.Addr().(*net.TCPAddr).Port); !strings.Contains(err.Error(), want) {
		t.Errorf("%v does not name port %s", err, want)
	}
}
