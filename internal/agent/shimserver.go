package agent

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"perdure/api"
	"perdure/internal/clusterstore"
	"perdure/internal/model"
	"perdure/internal/shimapi"
)

// watchLimit bounds a long poll; the shim asks again.
const watchLimit = 10 * time.Second

func newTLSListener(l net.Listener, cfg *tls.Config) net.Listener {
	cfg.NextProtos = []string{"http/1.1"} // an upgrade to a raw stream needs it
	return tls.NewListener(l, cfg)
}

// servers returns the two HTTP servers with their listeners: the Unix socket
// (shims and API) and the LAN (other agents and API).
func (a *Agent) servers(ctx context.Context) map[*http.Server]net.Listener {
	rest := http.NotFoundHandler()
	if a.opts.API != nil {
		rest = a.opts.API(a)
	}
	local := http.NewServeMux()
	local.HandleFunc("GET /v1/record", a.serveRecord)
	local.HandleFunc("POST /v1/record/swap", a.serveSwap)
	local.HandleFunc("GET /v1/endpoints", a.serveEndpoints)
	local.HandleFunc("PUT /v1/endpoint", a.servePublish)
	local.HandleFunc("GET /v1/watch", a.serveWatch)
	local.HandleFunc("POST /v1/event", a.serveEvent)
	local.Handle("/", rest)

	lan := http.NewServeMux()
	lan.Handle("/agent/", a.noStrangers(a.fromHosts(a.peerHandler())))
	lan.Handle("/", a.noStrangers(rest))

	server := func(h http.Handler) *http.Server {
		return &http.Server{
			Handler: h, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 64 << 10,
			BaseContext: func(net.Listener) context.Context { return ctx },
			ErrorLog:    slog.NewLogLogger(a.log.Handler(), slog.LevelDebug),
		}
	}
	return map[*http.Server]net.Listener{server(local): a.unix, server(lan): a.lan}
}

func answer(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(v) //nolint:errcheck // the caller has gone
}

// vmOf returns the VM a request is about, or answers it.
func vmOf(w http.ResponseWriter, r *http.Request) (string, bool) {
	vm := r.URL.Query().Get("vm")
	if err := api.CheckName("VM", vm); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return "", false
	}
	return vm, true
}

func decode(w http.ResponseWriter, r *http.Request, v any) bool {
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 1<<20)).Decode(v); err != nil {
		http.Error(w, "decode request: "+err.Error(), http.StatusBadRequest)
		return false
	}
	return true
}

func (a *Agent) serveRecord(w http.ResponseWriter, r *http.Request) {
	vm, ok := vmOf(w, r)
	if !ok {
		return
	}
	cur, err := a.store.Record(r.Context(), vm)
	switch {
	case err == nil:
		answer(w, shimapi.ReadResult{OK: true, Found: true, Current: cur})
	case errors.Is(err, clusterstore.ErrNotFound):
		answer(w, shimapi.ReadResult{OK: true})
	default:
		answer(w, shimapi.ReadResult{Error: err.Error()})
	}
}

func (a *Agent) serveSwap(w http.ResponseWriter, r *http.Request) {
	var req shimapi.SwapRequest
	if !decode(w, r, &req) {
		return
	}
	// Not the request's context: a caller that went away must not turn a swap
	// that is on its way into an unknown one without need. The store bounds it.
	res := a.store.SwapRecord(context.WithoutCancel(r.Context()), req)
	if res.Outcome == shimapi.SwapDone {
		a.log.Info("record changed", "vm", req.VM, "term", req.Record.Term, "mode", req.Record.Mode,
			"primary", req.Record.Primary.Host, "secondary", req.Record.Secondary.Host, "reason", req.Record.Reason)
		a.kick(req.VM)
	}
	answer(w, res)
}

func (a *Agent) serveEndpoints(w http.ResponseWriter, r *http.Request) {
	vm, ok := vmOf(w, r)
	if !ok {
		return
	}
	v, _ := a.store.VM(vm)
	out := make([]shimapi.Endpoint, 0, len(v.Endpoints))
	for _, e := range v.Endpoints {
		out = append(out, e)
	}
	answer(w, out)
}

func (a *Agent) servePublish(w http.ResponseWriter, r *http.Request) {
	vm, ok := vmOf(w, r)
	if !ok {
		return
	}
	var e shimapi.Endpoint
	if !decode(w, r, &e) {
		return
	}
	e.Host = a.cfg.Name // a shim speaks for its own host only
	if err := a.store.PutEndpoint(r.Context(), vm, e); err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// serveWatch answers when the record may be newer than rev. Deletion counts.
func (a *Agent) serveWatch(w http.ResponseWriter, r *http.Request) {
	vm, ok := vmOf(w, r)
	if !ok {
		return
	}
	rev, err := strconv.ParseInt(r.URL.Query().Get("rev"), 10, 64)
	if err != nil {
		http.Error(w, "rev is not a number", http.StatusBadRequest)
		return
	}
	limit := time.NewTimer(watchLimit)
	defer limit.Stop()
	was := true
	for {
		changed := a.store.Changed()
		v, known := a.store.VM(vm)
		if int64(v.Record.Revision) > rev || (was && !known && a.store.Loaded() && rev > 0) {
			answer(w, map[string]model.Revision{"revision": v.Record.Revision})
			return
		}
		was = known
		select {
		case <-changed:
		case <-limit.C:
			answer(w, map[string]model.Revision{"revision": v.Record.Revision})
			return
		case <-r.Context().Done():
			return
		}
	}
}

func (a *Agent) serveEvent(w http.ResponseWriter, r *http.Request) {
	var ev model.Event
	if !decode(w, r, &ev) {
		return
	}
	if err := api.CheckName("VM", ev.VM); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	ev.Host = a.cfg.Name
	a.keepEvent(ev)
	a.noteDisk(ev)
	a.statuses.drop(ev.VM)
	w.WriteHeader(http.StatusNoContent)
}

// fromHosts lets in callers only that showed a host's certificate.
// noStrangers refuses a host that is not in the cluster any more; callers that
// show no certificate are judged by what they ask for.
func (a *Agent) noStrangers(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if from, err := peerHost(r); err == nil && a.stranger(from) {
			http.Error(w, "host "+from+" is not in this cluster (any more)", http.StatusForbidden)
			return
		}
		next.ServeHTTP(w, r)
	})
}

func (a *Agent) fromHosts(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, err := peerHost(r); err != nil {
			http.Error(w, "a host's certificate of this cluster is needed: "+err.Error(), http.StatusForbidden)
			return
		}
		if !strings.HasPrefix(r.URL.Path, "/agent/v1/") {
			http.NotFound(w, r)
			return
		}
		next.ServeHTTP(w, r)
	})
}
