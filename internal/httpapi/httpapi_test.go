package httpapi_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"perdure/api"
	"perdure/internal/httpapi"
	"perdure/internal/httpapi/apitest"
	"perdure/internal/model"
)

// serveUnix serves a fake on a socket and returns a client for it.
func serveUnix(t *testing.T, f *apitest.Fake) (*api.Client, string) {
	t.Helper()
	sock := filepath.Join(t.TempDir(), "s")
	ln, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	serve(t, f, ln)
	c, err := api.New(api.Options{Socket: sock})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c, sock
}

func serve(t *testing.T, f *apitest.Fake, ln net.Listener) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	s := httpapi.New(httpapi.Options{Service: f, Version: "test"})
	go func() { done <- s.Serve(ctx, ln) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
}

func wantClass(t *testing.T, err error, c api.Class, parts ...string) {
	t.Helper()
	if err == nil || api.ClassOf(err) != c {
		t.Fatalf("error %v has class %s, want %s", err, api.ClassOf(err), c)
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("error %q does not say %q", err, p)
		}
	}
}

func TestRoundTrip(t *testing.T) {
	f := apitest.New()
	c, _ := serveUnix(t, f)
	ctx := t.Context()
	op, err := c.CreateVM(ctx, api.CreateVM{Name: "web", Level: model.LevelFT, Disks: []api.CreateDisk{{Size: 1 << 30}}, NICs: []api.CreateNIC{{Bridge: "lan"}}})
	if err != nil {
		t.Fatal(err)
	}
	if op, err = c.Operation(ctx, op.ID, 5*time.Second); err != nil || op.State != api.OperationDone {
		t.Fatalf("operation: %+v, %v", op, err)
	}
	vm, err := c.VM(ctx, "web")
	if err != nil || vm.State != model.StateStopped || vm.Memory != 512<<20 || vm.FT != model.DefaultFTPolicy() || len(vm.Disks) != 1 {
		t.Fatalf("VM: %+v, %v", vm, err)
	}
	if err := c.StartVM(ctx, "web", api.StartVM{}); err != nil {
		t.Fatal(err)
	}
	cond, err := api.ParseCondition("running")
	if err != nil {
		t.Fatal(err)
	}
	if r, err := c.Wait(ctx, "web", cond, 5*time.Second); err != nil || !r.Met || r.VM.State != model.StateRunning {
		t.Fatalf("wait: %+v, %v", r, err)
	}
	for what, do := range map[string]func() error{
		"pause":   func() error { return c.PauseVM(ctx, "web") },
		"resume":  func() error { return c.ResumeVM(ctx, "web") },
		"level":   func() error { return c.SetLevel(ctx, "web", api.SetLevel{Level: model.LevelCA}) },
		"protect": func() error { return c.ProtectVM(ctx, "web", api.ProtectVM{Host: "hostb"}) },
	} {
		if err := do(); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	if l, err := c.VMs(ctx); err != nil || len(l) != 1 {
		t.Errorf("VMs: %v, %v", l, err)
	}
	if l, err := c.Hosts(ctx); err != nil || len(l) != 3 {
		t.Errorf("Hosts: %v, %v", l, err)
	}
	if cl, err := c.Cluster(ctx); err != nil || !cl.Quorum {
		t.Errorf("Cluster: %v, %v", cl, err)
	}
	if tok, err := c.CreateToken(ctx, api.CreateToken{Role: api.RoleWitness}); err != nil || tok.Text == "" {
		t.Errorf("CreateToken: %v, %v", tok, err)
	}
	if ops, err := c.Operations(ctx); err != nil || len(ops) != 1 {
		t.Errorf("Operations: %v, %v", ops, err)
	}
}

func TestErrors(t *testing.T) {
	f := apitest.New()
	f.VMList["web"] = apitest.Protected("web")
	c, sock := serveUnix(t, f)
	ctx := t.Context()
	_, err := c.VM(ctx, "nosuch")
	wantClass(t, err, api.NotFound, `VM "nosuch" does not exist`)
	var e *api.Error
	if !errors.As(err, &e) || e.Action == "" {
		t.Errorf("the advice was lost: %#v", err)
	}
	_, err = c.VM(ctx, "Odd Name")
	wantClass(t, err, api.Invalid, "Odd Name", "a to z")
	_, err = c.CreateVM(ctx, api.CreateVM{Name: "web"})
	wantClass(t, err, api.Conflict, "exists already")
	_, err = c.CreateVM(ctx, api.CreateVM{Name: "x", Memory: 3 << 20})
	wantClass(t, err, api.Invalid, "memory 3MiB")
	_, err = c.CreateVM(ctx, api.CreateVM{Name: "x", Memory: 100 << 30})
	wantClass(t, err, api.Refused, "does not fit")
	wantClass(t, c.StartVM(ctx, "web", api.StartVM{}), api.Conflict)
	wantClass(t, c.TakeoverVM(ctx, "web", api.TakeoverVM{Host: "hostb", Force: true, Confirm: "wbe"}), api.Refused, "wbe")
	f.Update(func(f *apitest.Fake) { f.Fail["VMs"] = &apitest.Failure{Err: errors.New("boom"), Count: -1} })
	_, err = c.VMs(ctx)
	wantClass(t, err, api.Internal, "boom")

	// What huma and the router refuse has the same form.
	hc := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", sock)
	}}}
	defer hc.CloseIdleConnections()
	for _, tc := range []struct{ method, path, body, class, says string }{
		{"GET", "/nothing", "", "not_found", "/nothing"},
		{"POST", "/api/v1/vms", `{"name":"x","vcpus":"many"}`, "invalid", "vcpus"},
		{"POST", "/api/v1/vms", `{"name":"x","colour":"red"}`, "invalid", "colour"},
		{"POST", "/api/v1/vms", `{`, "invalid", ""},
		{"POST", "/api/v1/vms", `{"name":"` + strings.Repeat("x", 2<<20) + `"}`, "invalid", ""},
		{"GET", "/api/v1/vms/web/wait?for=state%3Dflying", "", "invalid", "flying"},
		{"GET", "/api/v1/vms/web/events?since=yesterday", "", "invalid", "yesterday"},
		{"GET", "/api/v1/vms/web/console", "", "invalid", "Upgrade"},
		{"GET", "/api/v1/blobs/abc", "", "invalid", "64"},
	} {
		req, _ := http.NewRequestWithContext(ctx, tc.method, "http://x"+tc.path, strings.NewReader(tc.body))
		if tc.body != "" {
			req.Header.Set("Content-Type", "application/json")
		}
		resp, err := hc.Do(req)
		if err != nil {
			t.Errorf("%s %s: %v", tc.method, tc.path, err)
			continue
		}
		b, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		var p api.Problem
		if err := json.Unmarshal(b, &p); err != nil || string(p.Class) != tc.class || p.Status != resp.StatusCode || !strings.Contains(p.Detail, tc.says) {
			t.Errorf("%s %s: status %d, %s (%v)", tc.method, tc.path, resp.StatusCode, b, err)
		}
		if ct := resp.Header.Get("Content-Type"); ct != "application/problem+json" {
			t.Errorf("%s %s: content type %q", tc.method, tc.path, ct)
		}
	}
}

func TestPanicIsAnswered(t *testing.T) {
	f := apitest.New()
	f.VMList["web"] = apitest.Protected("web")
	f.ConsoleFunc = func() (io.ReadWriteCloser, error) { panic("broken") }
	c, _ := serveUnix(t, f)
	_, err := c.Console(t.Context(), "web")
	wantClass(t, err, api.Internal, "defect")
}

func TestWait(t *testing.T) {
	f := apitest.New()
	f.VMList["web"] = apitest.Protected("web")
	c, _ := serveUnix(t, f)
	cond := func(s string) api.Condition {
		k, err := api.ParseCondition(s)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	if r, err := c.Wait(t.Context(), "web", cond("mode=simplex"), 300*time.Millisecond); err != nil || r.Met || r.VM == nil {
		t.Errorf("wait that ends: %+v, %v", r, err)
	}
	_, err := c.Wait(t.Context(), "gone", cond("running"), time.Second)
	wantClass(t, err, api.NotFound)
	if r, err := c.Wait(t.Context(), "gone", cond("absent"), time.Second); err != nil || !r.Met || r.VM != nil {
		t.Errorf("wait for absence: %+v, %v", r, err)
	}
	// A host that does not answer for a while is waited out.
	f.Update(func(f *apitest.Fake) {
		f.Fail["VM"] = &apitest.Failure{Err: api.Errorf(api.Unavailable, "no quorum"), Count: 3}
	})
	if r, err := c.Wait(t.Context(), "web", cond("mode=duplex"), 5*time.Second); err != nil || !r.Met {
		t.Errorf("wait through trouble: %+v, %v", r, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := c.Wait(ctx, "web", cond("mode=stopped"), time.Minute); err == nil {
		t.Error("a wait outlived its context")
	}
}

func event(seq uint64, host, typ string) model.Event {
	return model.Event{Seq: seq, Time: apitest.Epoch().Add(time.Duration(seq) * time.Second), Host: host, VM: "web", Type: typ, Term: 7, Text: typ + " happened"}
}

func TestEvents(t *testing.T) {
	f := apitest.New()
	f.VMList["web"] = apitest.Protected("web")
	f.EventLog = []model.Event{event(1, "hosta", "started"), event(2, "hosta", "duplex")}
	c, _ := serveUnix(t, f)
	var got []string
	collect := func(e model.Event) error { got = append(got, e.Type); return nil }
	if err := c.Events(t.Context(), "web", api.EventQuery{}, collect); err != nil || strings.Join(got, " ") != "started duplex" {
		t.Errorf("events %v, %v", got, err)
	}
	got = nil
	if err := c.Events(t.Context(), "web", api.EventQuery{Since: apitest.Epoch().Add(time.Second)}, collect); err != nil || strings.Join(got, " ") != "duplex" {
		t.Errorf("events since: %v, %v", got, err)
	}
	wantClass(t, c.Events(t.Context(), "nosuch", api.EventQuery{}, collect), api.NotFound)

	stop := errors.New("enough")
	seen := make(chan string, 8)
	done := make(chan error, 1)
	go func() {
		done <- c.Events(t.Context(), "web", api.EventQuery{Follow: true}, func(e model.Event) error {
			seen <- e.Type
			if e.Type == "takeover" {
				return stop
			}
			return nil
		})
	}()
	<-seen
	<-seen
	f.Update(func(f *apitest.Fake) { f.EventLog = append(f.EventLog, event(3, "hostb", "takeover")) })
	if typ := <-seen; typ != "takeover" {
		t.Errorf("followed to %s", typ)
	}
	if err := <-done; !errors.Is(err, stop) {
		t.Errorf("the error of emit was lost: %v", err)
	}
	f.Update(func(f *apitest.Fake) {
		f.Fail["EventsLater"] = &apitest.Failure{Err: api.Errorf(api.Unavailable, "hostb does not answer"), Count: -1}
	})
	wantClass(t, c.Events(t.Context(), "web", api.EventQuery{}, collect), api.Unavailable, "hostb")
}

func TestConsole(t *testing.T) {
	f := apitest.New()
	f.VMList["web"] = apitest.Protected("web")
	c, _ := serveUnix(t, f)
	_, err := c.Console(t.Context(), "web")
	wantClass(t, err, api.Conflict)
	f.Update(func(f *apitest.Fake) {
		f.ConsoleFunc = func() (io.ReadWriteCloser, error) { return apitest.Echo("login: ") }
	})
	conn, err := c.Console(t.Context(), "web")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	buf := make([]byte, 7)
	if _, err := io.ReadFull(conn, buf); err != nil || string(buf) != "login: " {
		t.Fatalf("history %q, %v", buf, err)
	}
	if _, err := conn.Write([]byte("bye\n")); err != nil {
		t.Fatal(err)
	}
	rest, err := io.ReadAll(conn)
	if err != nil || string(rest) != "BYE\n" {
		t.Errorf("rest %q, %v", rest, err)
	}
}

func TestUploadAndBlob(t *testing.T) {
	f := apitest.New()
	sum := strings.Repeat("ab", 32)
	f.Blobs[sum] = bytes.Repeat([]byte("k"), 100_000)
	c, _ := serveUnix(t, f)
	data := bytes.Repeat([]byte("image"), 1<<19) // larger than a JSON body may be
	var sent int64
	up, err := c.Upload(t.Context(), "x.img", bytes.NewReader(data), func(n int64) { sent = n })
	if err != nil || up.Size != int64(len(data)) || sent != up.Size {
		t.Errorf("upload: %+v, %d sent, %v", up, sent, err)
	}
	r, size, err := c.Blob(t.Context(), sum)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	if err != nil || size != 100_000 || !bytes.Equal(b, f.Blobs[sum]) {
		t.Errorf("blob: %d of %d bytes, %v", len(b), size, err)
	}
	_, _, err = c.Blob(t.Context(), strings.Repeat("00", 32))
	wantClass(t, err, api.NotFound)
}

func TestForwardedAndActor(t *testing.T) {
	f := apitest.New()
	f.VMList["web"] = apitest.Protected("web")
	spy := &spy{Fake: f}
	sock := filepath.Join(t.TempDir(), "s")
	ln, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- httpapi.New(httpapi.Options{Service: spy}).Serve(ctx, ln) }()
	defer func() { cancel(); <-done }()
	c, err := api.New(api.Options{Socket: sock})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.StopVM(t.Context(), "web"); err != nil || spy.forwarded || spy.actor != "local" {
		t.Errorf("plain: %v, %+v", err, spy)
	}
	if err := c.StopVM(api.WithForwarded(t.Context()), "web"); err != nil || !spy.forwarded {
		t.Errorf("forwarded: %v, %+v", err, spy)
	}
}

type spy struct {
	*apitest.Fake
	forwarded bool
	actor     string
}

func (s *spy) StopVM(ctx context.Context, _ string) error {
	s.forwarded, s.actor = api.Forwarded(ctx), api.Actor(ctx)
	return nil
}

// authority makes certificates for TestTLS.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "ca"}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{cert, key, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})}
}

// issue writes cert, key and ca files and returns their paths.
func (a *authority) issue(t *testing.T, name string) (cert, key, ca string) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}, DNSNames: []string{name}}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, &k.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	kd, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	write := func(n string, b []byte) string {
		p := filepath.Join(dir, n)
		if err := os.WriteFile(p, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	return write("c", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})),
		write("k", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: kd})), write("ca", a.pem)
}

func TestTLS(t *testing.T) {
	ours, theirs := newAuthority(t), newAuthority(t)
	certFile, keyFile, _ := ours.issue(t, "hosta")
	pair, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(ours.cert)
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := apitest.New()
	f.VMList["web"] = apitest.Protected("web")
	serve(t, f, tls.NewListener(tcp, &tls.Config{Certificates: []tls.Certificate{pair}, ClientAuth: tls.VerifyClientCertIfGiven, ClientCAs: pool}))
	addr := tcp.Addr().String()
	client := func(conf *tls.Config, servers ...string) *api.Client {
		t.Helper()
		c, err := api.New(api.Options{Servers: servers, TLS: conf})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(c.Close)
		return c
	}
	load := func(a *authority, ca string) *tls.Config {
		t.Helper()
		c, k, own := a.issue(t, "client")
		if ca == "" {
			ca = own
		}
		conf, err := api.LoadTLS(c, k, ca)
		if err != nil {
			t.Fatal(err)
		}
		return conf
	}
	_, _, ourCA := ours.issue(t, "x")

	good := client(load(ours, ""), "127.0.0.1:1", addr) // the first one does not answer
	if l, err := good.VMs(t.Context()); err != nil || len(l) != 1 {
		t.Fatalf("VMs over TLS: %v, %v", l, err)
	}
	_, err = good.CreateVM(t.Context(), api.CreateVM{Name: "x", Kernel: &api.File{Path: "/etc/shadow"}})
	wantClass(t, err, api.Invalid, "Unix socket")
	f.Update(func(f *apitest.Fake) {
		f.ConsoleFunc = func() (io.ReadWriteCloser, error) { return apitest.Echo("hi") }
	})
	conn, err := good.Console(t.Context(), "web")
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()

	// Files are uploaded, and used.
	img := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(img, []byte("image of a disk"), 0o600); err != nil {
		t.Fatal(err)
	}
	req := api.CreateVM{Name: "up", Disks: []api.CreateDisk{{Image: &api.File{Path: img}}}}
	if err := good.Send(t.Context(), &req, nil); err != nil || req.Disks[0].Image.Upload == "" || req.UsesPaths() {
		t.Fatalf("Send: %+v, %v", req.Disks[0].Image, err)
	}
	op, err := good.CreateVM(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	if op, err = good.Operation(t.Context(), op.ID, 5*time.Second); err != nil || op.State != api.OperationDone {
		t.Errorf("create from upload: %+v, %v", op, err)
	}

	wrongCA := client(load(ours, func() string { _, _, ca := theirs.issue(t, "x"); return ca }()), addr)
	_, err = wrongCA.VMs(t.Context())
	wantClass(t, err, api.Forbidden, "another cluster")
	stranger := client(load(theirs, ourCA), addr)
	_, err = stranger.VMs(t.Context())
	wantClass(t, err, api.Forbidden, "client certificate")

	nameless := client(&tls.Config{RootCAs: pool, ServerName: "hosta"}, addr)
	_, err = nameless.VMs(t.Context())
	wantClass(t, err, api.Forbidden, "certificate")
	if r, err := nameless.Join(t.Context(), api.JoinRequest{Name: "hostc", Role: api.RoleHost, Secret: "secret", Addrs: []string{}, ALinks: []string{}}); err != nil || r.ClusterID != "c1" {
		t.Errorf("join without certificate: %+v, %v", r, err)
	}
	_, err = nameless.Join(t.Context(), api.JoinRequest{Name: "hostc", Role: api.RoleHost, Secret: "guess", Addrs: []string{}, ALinks: []string{}})
	wantClass(t, err, api.Forbidden, "token")

	down := client(load(ours, ""), "127.0.0.1:1")
	_, err = down.VMs(t.Context())
	wantClass(t, err, api.Unavailable, "127.0.0.1:1")
}

// Plain TCP is no way in, whatever is asked.
func TestPlainTCPIsRefused(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	serve(t, apitest.New(), ln)
	resp, err := http.Get("http://" + ln.Addr().String() + "/api/v1/vms")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusForbidden {
		t.Errorf("status %d", resp.StatusCode)
	}
}

func TestNoAgent(t *testing.T) {
	c, err := api.New(api.Options{Socket: filepath.Join(t.TempDir(), "none")})
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.VMs(t.Context())
	wantClass(t, err, api.Unavailable, "no such socket")
}

func TestOpenAPI(t *testing.T) {
	c, _ := serveUnix(t, apitest.New())
	b, err := c.OpenAPI(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var spec struct {
		OpenAPI string                                `json:"openapi"`
		Paths   map[string]map[string]json.RawMessage `json:"paths"`
	}
	if err := json.Unmarshal(b, &spec); err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(spec.OpenAPI, "3.1") {
		t.Errorf("OpenAPI version %q", spec.OpenAPI)
	}
	for _, want := range []string{"get /api/v1/vms", "post /api/v1/vms", "get /api/v1/vms/{name}/console", "get /api/v1/vms/{name}/events", "post /api/v1/vms/{name}/takeover",
		"get /api/v1/vms/{name}/takeover", "post /api/v1/uploads", "get /api/v1/blobs/{id}", "post /api/v1/join"} {
		method, path, _ := strings.Cut(want, " ")
		if spec.Paths[path][method] == nil {
			t.Errorf("%s is not described", want)
		}
	}
	if bytes.Contains(b, []byte("ErrorModel")) {
		t.Error("errors are described as huma's own")
	}
}

// The page about the interface names every path and every error class.
func TestPageIsComplete(t *testing.T) {
	page, err := os.ReadFile("../../docs/api.md")
	if err != nil {
		t.Fatal(err)
	}
	b, err := httpapi.New(httpapi.Options{Service: apitest.New()}).OpenAPI()
	if err != nil {
		t.Fatal(err)
	}
	var spec struct {
		Paths map[string]map[string]json.RawMessage `json:"paths"`
	}
	if err := json.Unmarshal(b, &spec); err != nil {
		t.Fatal(err)
	}
	for path, methods := range spec.Paths {
		for m := range methods {
			if want := "`" + strings.ToUpper(m) + " " + strings.TrimPrefix(path, api.Prefix); !bytes.Contains(page, []byte(want)) {
				t.Errorf("docs/api.md does not name %s", want)
			}
		}
	}
	for _, c := range api.Classes() {
		if want := fmt.Sprintf("| `%s` | %d | %d |", c.Class, c.Status, c.Exit); !bytes.Contains(page, []byte(want)) {
			t.Errorf("docs/api.md has no row %s", want)
		}
	}
}
