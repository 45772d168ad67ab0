// Package httpapi serves Perdure's REST interface: OpenAPI 3.1 at
// /openapi.json, JSON under /api/v1, errors as problem+json (RFC 9457), event
// streams as JSON lines and the serial console as a raw stream behind an HTTP
// upgrade. What is asked for is carried out by a Service, which the agent
// implements.
//
// A Server is made once and then used by any number of goroutines. Each
// request lives in the goroutine that net/http gives it; streams end when the
// caller goes, when the Service ends them, or when the context of Serve does.
// A panic in a handler is answered with status 500 and logged; the process
// goes on.
//
// Callers on a Unix socket are trusted as far as the socket's file mode lets
// them in. Callers over TLS need a client certificate that the listener has
// verified; only a join gets by without one, since it brings a token.
// Everything else is refused. The server does not decide who may do what
// beyond that: any certificate of the cluster may do everything.
package httpapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"reflect"
	"runtime/debug"
	"strings"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humago"

	"perdure/api"
	"perdure/internal/model"
)

const (
	maxBody        = 1 << 20 // bytes of a JSON request; files come by /uploads
	maxHeader      = 64 << 10
	pollInterval   = 100 * time.Millisecond // of a waiting request, on this side only
	maxWait        = 60 * time.Second
	streamInterval = 5 * time.Second // between signs of life on an idle stream
)

// Options of a Server. Only Service is needed.
type Options struct {
	Service Service
	Version string       // of Perdure, shown in the OpenAPI page
	Log     *slog.Logger // audit of changes, and panics; nil: nothing is logged
}

// Server is the REST interface of one agent.
type Server struct {
	svc     Service
	log     *slog.Logger
	handler http.Handler
	spec    *huma.OpenAPI
}

// New makes a server; it does no I/O.
func New(o Options) *Server {
	s := &Server{svc: o.Service, log: o.Log}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	version := o.Version
	if version == "" {
		version = "unknown"
	}
	mux := http.NewServeMux()
	cfg := huma.DefaultConfig("Perdure", version)
	cfg.Info.Description = "Virtual machines that outlive their hosts. Sizes are bytes, durations milliseconds, times RFC 3339."
	cfg.DocsPath, cfg.SchemasPath = "", "" // the documentation page would load scripts from elsewhere
	cfg.Components.Schemas = huma.NewMapRegistry("#/components/schemas/", schemaName)
	cfg.CreateHooks = nil // no $schema field in answers
	cfg.Transformers = append(cfg.Transformers, toProblem)
	h := humago.New(mux, cfg)
	s.spec = h.OpenAPI()
	s.registerCluster(h)
	s.registerVMs(h)
	s.registerRepair(h)
	s.registerDisks(h)
	s.registerTransfers(h)
	s.registerStreams(h, mux)
	delete(s.spec.Components.Schemas.Map(), "ErrorModel") // never sent, see toProblem
	delete(s.spec.Components.Schemas.Map(), "ErrorDetail")
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		writeProblem(w, api.Errorf(api.NotFound, "path %s with method %s does not exist; see /openapi.json", r.URL.Path, r.Method))
	})
	s.handler = s.guard(mux)
	return s
}

// Handler returns the whole interface, access control included. It must be
// served by an http.Server (which notes the local address in the context).
func (s *Server) Handler() http.Handler { return s.handler }

// OpenAPI returns the description of the interface, as served at /openapi.json.
func (s *Server) OpenAPI() ([]byte, error) {
	b, err := json.MarshalIndent(s.spec, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("encode OpenAPI: %w", err)
	}
	return b, nil
}

// Serve answers on one listener (Unix, or TLS with client certificates
// verified if given) until the context ends; streams are cut then. It may be
// called for several listeners at once. It closes the listener and returns nil
// at the end of the context.
func (s *Server) Serve(ctx context.Context, ln net.Listener) error {
	srv := NewHTTPServer(ctx, s.handler, s.log)
	stop := context.AfterFunc(ctx, func() { srv.Close() })
	defer stop()
	err := srv.Serve(ln)
	if ctx.Err() != nil && errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("serve API on %s: %w", ln.Addr(), err)
}

// NewHTTPServer returns an http.Server with the limits that suit this
// interface, for assemblies that mount more than it on one listener. All
// requests end with the context.
func NewHTTPServer(ctx context.Context, h http.Handler, log *slog.Logger) *http.Server {
	p := new(http.Protocols)
	p.SetHTTP1(true) // an upgrade needs HTTP/1.1
	srv := &http.Server{
		Handler:           h,
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    maxHeader,
		Protocols:         p,
		BaseContext:       func(net.Listener) context.Context { return ctx },
	}
	if log != nil {
		srv.ErrorLog = slog.NewLogLogger(log.Handler(), slog.LevelDebug)
	}
	return srv
}

// guard lets in who may come in, notes who it is, and keeps a panic from
// ending more than its request.
func (s *Server) guard(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer func() {
			if p := recover(); p != nil {
				if p == http.ErrAbortHandler { //nolint:errorlint // net/http compares it like this too
					panic(p)
				}
				s.log.Error("panic in API handler", "method", r.Method, "path", r.URL.Path, "panic", p, "stack", string(debug.Stack()))
				writeProblem(w, api.Errorf(api.Internal, "a defect stopped this request; the agent's log has the details"))
			}
		}()
		actor, ok := identify(r)
		if !ok && r.URL.Path != api.Prefix+"/join" {
			writeProblem(w, api.Errorf(api.Forbidden, "no client certificate of this cluster was shown").
				WithAction("use the host's Unix socket as root, or give --cert, --key and --ca"))
			return
		}
		ctx := api.WithActor(r.Context(), actor)
		if r.Header.Get(api.ForwardedHeader) != "" {
			ctx = api.WithForwarded(ctx)
		}
		if r.Method == http.MethodGet || r.Method == http.MethodHead {
			next.ServeHTTP(w, r.WithContext(ctx))
			return
		}
		rec := &recorder{ResponseWriter: w, status: http.StatusOK}
		next.ServeHTTP(rec, r.WithContext(ctx))
		s.log.Info("api request", "actor", actor, "from", r.RemoteAddr, "method", r.Method, "path", r.URL.Path, "status", rec.status)
	})
}

// recorder keeps the status for the audit line.
type recorder struct {
	http.ResponseWriter
	status int
}

func (r *recorder) WriteHeader(status int) {
	r.status = status
	r.ResponseWriter.WriteHeader(status)
}

// Unwrap lets http.ResponseController reach the connection.
func (r *recorder) Unwrap() http.ResponseWriter { return r.ResponseWriter }

// identify says who asks: "local" on a Unix socket, the certificate's name over TLS.
func identify(r *http.Request) (string, bool) {
	if isLocal(r.Context()) {
		return "local", true
	}
	if r.TLS != nil && len(r.TLS.VerifiedChains) > 0 {
		leaf := r.TLS.PeerCertificates[0]
		if len(leaf.DNSNames) > 0 {
			return leaf.DNSNames[0], true
		}
		return leaf.Subject.CommonName, true
	}
	return "", false
}

// isLocal reports whether a request came in by a Unix socket of this host.
func isLocal(ctx context.Context) bool {
	a, ok := ctx.Value(http.LocalAddrContextKey).(net.Addr)
	return ok && a.Network() == "unix"
}

func writeProblem(w http.ResponseWriter, err error) {
	p := api.ProblemOf(err)
	w.Header().Set("Content-Type", p.ContentType(""))
	w.WriteHeader(p.Status)
	json.NewEncoder(w).Encode(p) //nolint:errcheck // the caller has gone
}

// toProblem gives the errors that huma makes itself (schema validation, bodies
// too large) the same form as all others.
func toProblem(_ huma.Context, _ string, v any) (any, error) {
	m, ok := v.(*huma.ErrorModel)
	if !ok {
		return v, nil
	}
	detail := m.Detail
	for i, e := range m.Errors {
		sep := "; "
		if i == 0 {
			sep = ": "
		}
		detail += sep + e.Message
		if e.Location != "" {
			detail += " (" + strings.TrimPrefix(e.Location, "body.")
			if e.Value != nil && e.Location != "body" {
				detail += fmt.Sprintf(" is %v", e.Value)
			}
			detail += ")"
		}
	}
	p := &api.Problem{Title: m.Title, Status: m.Status, Detail: detail}
	p.Class = p.Err().Class
	return p, nil
}

// register adds one operation whose errors are problems.
func register[I, O any](s *Server, h huma.API, op huma.Operation, f func(context.Context, *I) (*O, error)) {
	op.Path = api.Prefix + op.Path
	op.MaxBodyBytes = maxBody
	if op.DefaultStatus == 0 && op.Method != http.MethodGet {
		op.DefaultStatus = http.StatusOK
	}
	op.Responses = map[string]*huma.Response{"default": nil} // keeps huma from describing its own; filled in below
	o := op
	defer func() { o.Responses["default"] = s.problemResponse(h) }()
	huma.Register(h, o, func(ctx context.Context, in *I) (*O, error) {
		out, err := f(ctx, in)
		if err != nil {
			return nil, api.ProblemOf(err)
		}
		return out, nil
	})
}

// schemaName keeps the two things called Problem apart: error answers and
// health problems.
func schemaName(t reflect.Type, hint string) string {
	if t == reflect.TypeFor[model.Problem]() {
		return "HealthProblem"
	}
	return huma.DefaultSchemaNamer(t, hint)
}

func (s *Server) problemResponse(h huma.API) *huma.Response {
	ref := huma.SchemaFromType(h.OpenAPI().Components.Schemas, problemType)
	return &huma.Response{
		Description: "Error",
		Content:     map[string]*huma.MediaType{"application/problem+json": {Schema: ref}},
	}
}
