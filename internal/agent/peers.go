package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"sync"
	"time"

	"perdure/api"
	"perdure/internal/clusterstore"
	"perdure/internal/config"
	"perdure/internal/model"
	"perdure/internal/pki"
	"perdure/internal/shimapi"
)

// peerTimeout bounds a question to another agent.
const peerTimeout = time.Second

// peers are the connections to other agents. A host is judged by the name in
// its certificate, so an address that moved to another host is noticed.
type peers struct {
	id *pki.Identity
	mu sync.Mutex
	by map[string]*peerConn // by name and address
}

type peerConn struct {
	api  *api.Client
	http *http.Client
}

func newPeers(id *pki.Identity) *peers { return &peers{id: id, by: map[string]*peerConn{}} }

func (p *peers) get(name, addr string) (*peerConn, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	key := name + " " + addr
	if c := p.by[key]; c != nil {
		return c, nil
	}
	conf := p.id.ClientTLS(name)
	c, err := api.New(api.Options{Servers: []string{addr}, TLS: conf})
	if err != nil {
		return nil, err
	}
	d := &net.Dialer{Timeout: 2 * time.Second}
	pc := &peerConn{api: c, http: &http.Client{Transport: &http.Transport{
		TLSClientConfig: conf.Clone(), DialContext: d.DialContext, MaxIdleConnsPerHost: 4, IdleConnTimeout: 30 * time.Second,
	}}}
	p.by[key] = pc
	return pc, nil
}

func (p *peers) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.by {
		c.api.Close()
		c.http.CloseIdleConnections()
	}
}

// peer returns the connections to another host.
func (a *Agent) peer(host string) (*peerConn, clusterstore.HostView, error) {
	for _, h := range a.store.Hosts() {
		if h.Name == host {
			c, err := a.peers.get(h.Name, h.API)
			return c, h, err
		}
	}
	return nil, clusterstore.HostView{}, api.Errorf(api.NotFound, "there is no host %q", host)
}

// otherHosts lists the other hosts that run VMs; alive ones only where asked.
func (a *Agent) otherHosts(alive bool) []clusterstore.HostView {
	var out []clusterstore.HostView
	for _, h := range a.store.Hosts() {
		if h.Name != a.cfg.Name && h.Role == string(config.RoleHost) && (h.Alive || !alive) {
			out = append(out, h)
		}
	}
	return out
}

// ask does one request to another agent's own interface.
func (a *Agent) ask(ctx context.Context, host, method, path, vm string, in, out any) error {
	c, h, err := a.peer(host)
	if err != nil {
		return err
	}
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return fmt.Errorf("ask host %s: %w", host, err)
		}
		body = bytes.NewReader(b)
	}
	u := url.URL{Scheme: "https", Host: h.API, Path: "/agent/v1/" + path, RawQuery: url.Values{"vm": {vm}}.Encode()}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), body)
	if err != nil {
		return fmt.Errorf("ask host %s: %w", host, err)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return api.Errorf(api.Unavailable, "host %s does not answer: %w", host, err)
	}
	defer resp.Body.Close()
	data, err := readLimited(resp.Body, 1<<20)
	switch {
	case err != nil:
		return api.Errorf(api.Unavailable, "host %s broke off: %w", host, err)
	case resp.StatusCode >= 300:
		p := api.Problem{}
		if json.Unmarshal(data, &p) != nil || p.Detail == "" {
			p.Detail = string(bytes.TrimSpace(data))
		}
		p.Status = resp.StatusCode
		e := p.Err()
		from := api.Errorf(e.Class, "host %s: %w", host, e)
		from.Action = e.Action
		return from
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(data, out); err != nil {
		return fmt.Errorf("ask host %s: decode answer: %w", host, err)
	}
	return nil
}

// holds is what an agent says of a VM on its host, by its own eyes.
type holds struct {
	Settled bool       `json:"settled"` // the agent has looked; nothing is just starting
	Empty   bool       `json:"empty"`   // no shim, no QEMU, run lock free
	Shim    bool       `json:"shim"`    // a shim lives, and answers if Role is set
	Role    string     `json:"role"`
	Run     string     `json:"run"`
	Term    model.Term `json:"term"`
}

// peerHandler is the agents' own interface under /agent/v1; callers are hosts
// of this cluster.
func (a *Agent) peerHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /agent/v1/holds", a.vmCall(func(ctx context.Context, vm string, _ *http.Request) (any, error) {
		return a.holds(ctx, vm)
	}))
	mux.HandleFunc("POST /agent/v1/claim", a.vmCall(func(ctx context.Context, vm string, r *http.Request) (any, error) {
		var dead model.Seat
		if err := json.NewDecoder(io.LimitReader(r.Body, 4096)).Decode(&dead); err != nil {
			return nil, err
		}
		// The caller is the primary's own host and has seen that nothing of that
		// run is left: its name is in its certificate.
		if from, err := peerHost(r); err != nil || from != dead.Host {
			return nil, fmt.Errorf("host %q cannot speak for %q", from, dead.Host)
		}
		return a.claim(ctx, vm, dead)
	}))
	mux.HandleFunc("POST /agent/v1/prepare", a.vmCall(func(ctx context.Context, vm string, _ *http.Request) (any, error) {
		return struct{}{}, a.prepareSecondary(ctx, vm)
	}))
	mux.HandleFunc("POST /agent/v1/op", a.vmCall(func(ctx context.Context, vm string, r *http.Request) (any, error) {
		var op shimapi.Op
		if err := json.NewDecoder(io.LimitReader(r.Body, 4096)).Decode(&op); err != nil {
			return nil, err
		}
		return struct{}{}, a.shimOpHere(ctx, vm, op)
	}))
	mux.HandleFunc("GET /agent/v1/verify", a.vmCall(func(ctx context.Context, vm string, _ *http.Request) (any, error) {
		return a.verifyHere(ctx, vm)
	}))
	mux.HandleFunc("GET /agent/v1/replicas", a.vmCall(func(ctx context.Context, vm string, _ *http.Request) (any, error) {
		return a.replicasHere(ctx, vm)
	}))
	mux.HandleFunc("POST /agent/v1/discard", a.vmCall(func(ctx context.Context, vm string, _ *http.Request) (any, error) {
		return struct{}{}, a.discardHere(ctx, vm)
	}))
	mux.HandleFunc("GET /agent/v1/disks", a.vmCall(func(ctx context.Context, vm string, _ *http.Request) (any, error) {
		h := a.replicasOfVM(ctx, vm)
		return h, h.err
	}))
	mux.HandleFunc("POST /agent/v1/place", a.vmCall(func(ctx context.Context, _ string, r *http.Request) (any, error) {
		var req placeAsk
		if err := json.NewDecoder(io.LimitReader(r.Body, 64<<10)).Decode(&req); err != nil {
			return nil, err
		}
		return a.placeHere(ctx, req)
	}))
	mux.HandleFunc("POST /agent/v1/renew-replica", a.vmCall(func(ctx context.Context, vm string, r *http.Request) (any, error) {
		var req renewReplica
		if err := json.NewDecoder(io.LimitReader(r.Body, 4096)).Decode(&req); err != nil {
			return nil, err
		}
		return struct{}{}, a.renewHere(ctx, vm, req)
	}))
	mux.HandleFunc("POST /agent/v1/forget", a.vmCall(func(ctx context.Context, vm string, r *http.Request) (any, error) {
		var f forget
		if err := json.NewDecoder(io.LimitReader(r.Body, 4096)).Decode(&f); err != nil {
			return nil, err
		}
		return struct{}{}, a.forgetVM(ctx, vm, f.UUID)
	}))
	mux.HandleFunc("POST /agent/v1/renew", a.hostCall(func(_ context.Context, from string, r *http.Request) (any, error) {
		var req renewal
		if err := json.NewDecoder(io.LimitReader(r.Body, 64<<10)).Decode(&req); err != nil {
			return nil, err
		}
		cert, err := a.issueRenewal(from, []byte(req.CSR), time.Now())
		return renewed{string(cert)}, err
	}))
	return mux
}

// hostCall serves a call that is about the calling host itself.
func (a *Agent) hostCall(f func(ctx context.Context, from string, r *http.Request) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		from, err := peerHost(r)
		var v any
		if err == nil {
			v, err = f(r.Context(), from, r)
		}
		reply(w, v, err)
	}
}

func (a *Agent) vmCall(f func(ctx context.Context, vm string, r *http.Request) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		vm, ok := vmOf(w, r)
		if !ok {
			return
		}
		v, err := f(r.Context(), vm, r)
		if errors.Is(err, clusterstore.ErrUnavailable) {
			err = storeError(vm, err)
		}
		reply(w, v, err)
	}
}

// reply answers another agent: v, or err as a problem.
func reply(w http.ResponseWriter, v any, err error) {
	if err == nil {
		answer(w, v)
		return
	}
	p := api.ProblemOf(err)
	var e *api.Error
	if !errors.As(err, &e) { // a plain reason for saying no
		p.Class, p.Status = api.Refused, api.Refused.Info().Status
	}
	w.Header().Set("Content-Type", "application/problem+json")
	w.WriteHeader(p.Status)
	json.NewEncoder(w).Encode(p) //nolint:errcheck // the caller has gone
}

func peerHost(r *http.Request) (string, error) { return pki.PeerHost(r.TLS) }

// holds looks at what of a VM lives on this host.
func (a *Agent) holds(ctx context.Context, vm string) (holds, error) {
	w := a.workerOf(vm)
	if w == nil {
		// No worker: the manager has not seen the VM here. Nothing lives here if
		// the lock is free and nobody is about to start.
		if !a.store.Loaded() {
			return holds{}, api.Errorf(api.Unavailable, "agent has just started")
		}
		return holds{Settled: true, Empty: lockFree(a.vmFile(vm, shimapi.LockFile))}, nil
	}
	l := w.facts()
	h := holds{Settled: l.settled, Empty: l.empty(), Shim: l.shim}
	if l.shim {
		sctx, cancel := context.WithTimeout(ctx, 700*time.Millisecond)
		defer cancel()
		c := a.shim(vm)
		defer c.Close()
		if st, err := c.Status(sctx); err == nil {
			h.Role, h.Run, h.Term = string(st.Role), string(st.Run), st.Term
		}
	}
	return h, nil
}

// claim tells this host's shim of a VM that the primary's memory is gone for
// certain, so that it takes over at once.
func (a *Agent) claim(ctx context.Context, vm string, dead model.Seat) (any, error) {
	cur, err := a.store.Record(ctx, vm)
	if err != nil {
		return nil, err
	}
	rec := cur.Record
	if rec.Primary != dead || rec.Secondary.Host != a.cfg.Name || rec.Mode != model.ModeDuplex {
		return nil, fmt.Errorf("record of %q does not say so any more (mode %s, primary %s)", vm, rec.Mode, rec.Primary.Host)
	}
	// Once begun it is carried out, whether the caller still listens or not.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 3*time.Second)
	defer cancel()
	a.event(vm, "primary-empty", rec.Term, "host %s lost the memory of the VM; the secondary here is told to go on", dead.Host)
	c := a.shim(vm)
	defer c.Close()
	_, err = c.Op(ctx, shimapi.Op{Op: "peer-dead", Host: dead.Host, Value: string(dead.Run)})
	return struct{}{}, err
}
