package shim

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"perdure/internal/blockstore"
	"perdure/internal/guestmem"
	"perdure/internal/lab/guest"
	"perdure/internal/model"
	"perdure/internal/pki"
	"perdure/internal/shimapi"
	"perdure/internal/testenv"
	"perdure/internal/vfs"
)

func TestMain(m *testing.M) {
	hollowMain()
	if len(os.Args) > 1 && os.Args[1] == "flusher" {
		os.Exit(guestmem.HelperMain(os.Args[2:]))
	}
	os.Exit(testenv.Main(m))
}

// store is the cluster store of a test: one record under compare-and-swap.
type store struct {
	mu        sync.Mutex
	cur       model.Versioned
	endpoints map[string]shimapi.Endpoint
	changed   chan struct{}
	down      map[string]bool                         // hosts whose agent does not answer
	place     func(shimapi.Endpoint) shimapi.Endpoint // what a published endpoint becomes; nil: itself
	seen      func(model.Event)                       // of every event; nil: nothing more
	t         *testing.T
}

func (s *store) swap(rev model.Revision, rec model.Record) shimapi.SwapResult {
	s.mu.Lock()
	defer s.mu.Unlock()
	if rev != s.cur.Revision {
		return shimapi.SwapResult{Outcome: shimapi.SwapConflict, Current: s.cur}
	}
	s.cur = model.Versioned{Record: rec, Revision: rev + 1}
	close(s.changed)
	s.changed = make(chan struct{})
	s.t.Logf("record: term %d %s primary %v secondary %v (%s)", rec.Term, rec.Mode, rec.Primary, rec.Secondary, rec.Reason)
	return shimapi.SwapResult{Outcome: shimapi.SwapDone, Current: s.cur}
}

// cut has the store of some hosts not answer, or answer again.
func (s *store) cut(down bool, hosts ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, h := range hosts {
		s.down[h] = down
	}
}

func (s *store) isDown(host string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.down[host]
}

func (s *store) get() model.Versioned {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cur
}

// agent serves the store to the shims of one host, as an agent does.
func (s *store) agent(t *testing.T, host, socket string) {
	mux := http.NewServeMux()
	reply := func(w http.ResponseWriter, v any) { json.NewEncoder(w).Encode(v) }
	mux.HandleFunc("GET /v1/record", func(w http.ResponseWriter, r *http.Request) {
		reply(w, shimapi.ReadResult{OK: true, Found: true, Current: s.get()})
	})
	mux.HandleFunc("POST /v1/record/swap", func(w http.ResponseWriter, r *http.Request) {
		var q shimapi.SwapRequest
		if err := json.NewDecoder(r.Body).Decode(&q); err != nil {
			http.Error(w, err.Error(), 400)
			return
		}
		reply(w, s.swap(q.Revision, q.Record))
	})
	mux.HandleFunc("GET /v1/endpoints", func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		defer s.mu.Unlock()
		out := []shimapi.Endpoint{}
		for _, e := range s.endpoints {
			out = append(out, e)
		}
		reply(w, out)
	})
	mux.HandleFunc("PUT /v1/endpoint", func(w http.ResponseWriter, r *http.Request) {
		var e shimapi.Endpoint
		json.NewDecoder(r.Body).Decode(&e)
		if s.place != nil {
			e = s.place(e)
		}
		s.mu.Lock()
		s.endpoints[e.Host] = e
		s.mu.Unlock()
	})
	mux.HandleFunc("GET /v1/watch", func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		changed, cur := s.changed, s.cur
		s.mu.Unlock()
		var rev model.Revision
		fmt.Sscan(r.URL.Query().Get("rev"), &rev)
		if cur.Revision <= rev {
			select {
			case <-changed:
			case <-r.Context().Done():
			case <-time.After(2 * time.Second):
			}
		}
		reply(w, map[string]any{"revision": s.get().Revision})
	})
	mux.HandleFunc("POST /v1/event", func(w http.ResponseWriter, r *http.Request) {
		var e model.Event
		json.NewDecoder(r.Body).Decode(&e)
		if s.seen != nil {
			s.seen(e)
		}
		t.Logf("%s %s: %-14s term %d epoch %d %6.1f ms  %s", e.Time.Format("05.000"), e.Host, e.Type, e.Term, e.Epoch, e.DurationMS, e.Text)
	})
	ln, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if s.isDown(host) {
			http.Error(w, "no quorum", http.StatusServiceUnavailable)
			return
		}
		mux.ServeHTTP(w, r)
	})}
	go srv.Serve(ln)
	t.Cleanup(func() { srv.Close() })
}

// world is two hosts on this machine without networks of their own.
type world struct {
	t     *testing.T
	dir   string
	store *store
	spec  model.VMSpec
	guest guest.Guest
	ca    *pki.CA
	hosts map[string]*testHost
}

type testHost struct {
	w    *world
	name string
	dir  string
	shim *Shim
	done chan error
	stop context.CancelFunc
}

type openGateKernel struct{}

func (openGateKernel) Open([]string, time.Duration) error { return nil }
func (openGateKernel) Shut([]string) error                { return nil }

func newWorld(t *testing.T, memMiB, disks int) *world {
	t.Helper()
	testenv.QEMU(t)
	testenv.Slow(t)
	dir := t.TempDir()
	bin := filepath.Join(dir, "perdure-guest")
	cmd := exec.Command("go", "build", "-o", bin, "perdure/cmd/perdure-guest")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build guest program: %v\n%s", err, out)
	}
	g, err := guest.Build(t.Context(), guest.Options{Dir: dir, Program: bin})
	if err != nil {
		t.Fatal(err)
	}
	ca, err := pki.NewCA("test", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, dir: dir, guest: g, ca: ca, hosts: map[string]*testHost{},
		store: &store{t: t, endpoints: map[string]shimapi.Endpoint{}, down: map[string]bool{}, changed: make(chan struct{})}}
	w.spec = model.VMSpec{Name: "vm1", UUID: "6b6f1f0e-0000-4000-8000-000000000001", Level: model.LevelFT, VCPUs: 1,
		Memory: int64(memMiB) << 20, Machine: "pc-q35-7.2", CPU: "max", Accel: "tcg", Append: guest.AppendFor(), FT: model.DefaultFTPolicy()}
	for n := range disks {
		w.spec.Disks = append(w.spec.Disks, model.DiskSpec{ID: fmt.Sprintf("disk%d", n), Size: 64 << 20})
	}
	w.store.cur = model.Versioned{Revision: 1, Record: model.Record{VM: "vm1", Term: 1, Mode: model.ModeStarting, Level: model.LevelFT,
		Primary: model.Seat{Host: "a"}, Replicas: map[string]model.Replica{"a": {State: model.UpToDate, Term: 0}}, Wanted: model.WantRunning}}
	for _, name := range []string{"a", "b"} {
		w.addHost(name)
	}
	return w
}

func (w *world) addHost(name string) {
	t := w.t
	h := &testHost{w: w, name: name, dir: filepath.Join(w.dir, name)}
	if err := os.MkdirAll(filepath.Join(h.dir, shimapi.DiskDir), 0o755); err != nil {
		t.Fatal(err)
	}
	key, csr, err := pki.NewRequest(name)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := w.ca.IssueHost(csr, name, []net.IP{net.IPv4(127, 0, 0, 1)}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	for f, b := range map[string][]byte{"ca.crt": w.ca.CertPEM(), "host.crt": cert, "host.key": key} {
		if err := os.WriteFile(filepath.Join(h.dir, f), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	w.store.agent(t, name, filepath.Join(h.dir, "agent.sock.host"))
	if name == "a" {
		for _, d := range w.spec.Disks {
			err := blockstore.Create(vfs.OS{}, filepath.Join(h.dir, shimapi.DiskDir), blockstore.Params{ID: d.ID, VM: w.spec.UUID, Size: d.Size, State: model.UpToDate})
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	w.hosts[name] = h
}

// start runs the shim of this host in this process.
func (h *testHost) start() {
	t := h.w.t
	t.Helper()
	cfg := shimapi.Config{Version: 1, Host: h.name, Spec: h.w.spec, Dir: h.dir, AgentSocket: filepath.Join(h.dir, "agent.sock.host"),
		ALinkAddrs: []string{"127.0.0.1", "127.0.0.1"}, CertFile: filepath.Join(h.dir, "host.crt"), KeyFile: filepath.Join(h.dir, "host.key"),
		CAFile: filepath.Join(h.dir, "ca.crt"), QEMU: testenv.QEMU(t), KernelPath: h.w.guest.Kernel, InitrdPath: h.w.guest.Initrd}
	log := slog.New(slog.NewTextHandler(&testWriter{t: t, prefix: h.name}, &slog.HandlerOptions{Level: slog.LevelDebug}))
	s, err := Open(cfg, []string{"/proc/self/exe", "flusher"}, openGateKernel{}, log)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	h.shim, h.stop, h.done = s, cancel, make(chan error, 1)
	go func() { h.done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		select {
		case <-h.done:
		case <-time.After(30 * time.Second):
			t.Errorf("shim of host %s does not end", h.name)
		}
	})
}

// testWriter sends a shim's log to the test's.
type testWriter struct {
	t      *testing.T
	prefix string
}

func (w *testWriter) Write(p []byte) (int, error) {
	if os.Getenv("PERDURE_TEST_LOG") != "" {
		fmt.Fprintf(os.Stderr, "%s %s", w.prefix, p)
	}
	return len(p), nil
}

// until waits for a condition of the record.
func (w *world) until(what string, d time.Duration, ok func(model.Record) bool) model.Record {
	w.t.Helper()
	deadline := time.After(d)
	for {
		w.store.mu.Lock()
		cur, changed := w.store.cur, w.store.changed
		w.store.mu.Unlock()
		if ok(cur.Record) {
			return cur.Record
		}
		select {
		case <-changed:
		case <-deadline:
			w.t.Fatalf("waited %v for: %s; the record is %+v", d, what, cur.Record)
		}
	}
}

// untilStatus waits for a condition of a shim's own word.
func (h *testHost) untilStatus(what string, d time.Duration, ok func(shimapi.Status) bool) shimapi.Status {
	h.w.t.Helper()
	for end := time.Now().Add(d); ; {
		st := h.shim.Status()
		if ok(st) {
			return st
		}
		if time.Now().After(end) {
			h.w.t.Fatalf("waited %v for: %s; host %s says %+v", d, what, h.name, st)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func (h *testHost) op(op shimapi.Op) {
	h.w.t.Helper()
	c := shimapi.NewShimClient(filepath.Join(h.dir, shimapi.SocketFile))
	defer c.Close()
	if _, err := c.Op(h.w.t.Context(), op); err != nil {
		h.w.t.Fatal(err)
	}
}

// console follows the serial console of the shim on this host.
func (h *testHost) console() *console {
	h.w.t.Helper()
	c := shimapi.NewShimClient(filepath.Join(h.dir, shimapi.SocketFile))
	conn, err := c.Console(h.w.t.Context())
	if err != nil {
		h.w.t.Fatal(err)
	}
	k := &console{}
	h.w.t.Cleanup(func() { conn.Close(); c.Close() })
	go func() {
		buf := make([]byte, 4096)
		for {
			n, err := conn.Read(buf)
			k.mu.Lock()
			k.text = append(k.text, buf[:n]...)
			k.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	return k
}

type console struct {
	mu   sync.Mutex
	text []byte
}

func (k *console) String() string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return string(k.text)
}

func (k *console) until(t *testing.T, what string, d time.Duration) {
	t.Helper()
	for end := time.Now().Add(d); !strings.Contains(k.String(), what); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("no %q on the console within %v; it says:\n%s", what, d, k)
		}
	}
}

var _ io.Writer = (*testWriter)(nil)
