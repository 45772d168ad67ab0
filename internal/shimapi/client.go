package shimapi

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"perdure/internal/model"
)

// unixHTTP returns an HTTP client whose every connection goes to one Unix socket.
func unixHTTP(socket string) *http.Client {
	return &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
		MaxIdleConns:    4,
		IdleConnTimeout: 30 * time.Second,
	}}
}

// call does one JSON request. A nil in sends no body, a nil out reads none.
func call(ctx context.Context, c *http.Client, method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return fmt.Errorf("encode request %s: %w", path, err)
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://unix"+path, body)
	if err != nil {
		return fmt.Errorf("build request %s: %w", path, err)
	}
	resp, err := c.Do(req)
	if err != nil {
		return fmt.Errorf("call %s: %w", path, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode >= 300 {
		msg, _ := io.ReadAll(io.LimitReader(resp.Body, 4096))
		return fmt.Errorf("call %s: %s: %s", path, resp.Status, bytes.TrimSpace(msg))
	}
	if out == nil {
		return nil
	}
	if err := json.NewDecoder(resp.Body).Decode(out); err != nil {
		return fmt.Errorf("decode answer of %s: %w", path, err)
	}
	return nil
}

// AgentClient is a shim's way to its agent. Safe for concurrent use; every
// call fails while the agent is down and works again when it is back.
type AgentClient struct {
	vm string
	c  *http.Client
}

// NewAgentClient returns a client for the agent at socket, speaking for vm.
func NewAgentClient(socket, vm string) *AgentClient {
	return &AgentClient{vm: vm, c: unixHTTP(socket)}
}

func (a *AgentClient) path(p string, kv ...string) string {
	q := url.Values{"vm": {a.vm}}
	for i := 0; i+1 < len(kv); i += 2 {
		q.Set(kv[i], kv[i+1])
	}
	return p + "?" + q.Encode()
}

// Read does a linearizable read of the record.
func (a *AgentClient) Read(ctx context.Context) (ReadResult, error) {
	var r ReadResult
	err := call(ctx, a.c, http.MethodGet, a.path("/v1/record"), nil, &r)
	return r, err
}

// Swap asks for a compare-and-swap. An error means that nothing is known of
// the outcome, exactly as SwapUnknown does.
func (a *AgentClient) Swap(ctx context.Context, rev model.Revision, rec model.Record) SwapResult {
	var r SwapResult
	req := SwapRequest{VM: a.vm, Revision: rev, Record: rec}
	if err := call(ctx, a.c, http.MethodPost, "/v1/record/swap", req, &r); err != nil {
		return SwapResult{Outcome: SwapUnknown, Error: err.Error()}
	}
	return r
}

// Endpoints lists where the shims of this VM listen, as far as the agent knows.
func (a *AgentClient) Endpoints(ctx context.Context) ([]Endpoint, error) {
	var r []Endpoint
	err := call(ctx, a.c, http.MethodGet, a.path("/v1/endpoints"), nil, &r)
	return r, err
}

// Publish makes this shim's endpoint known.
func (a *AgentClient) Publish(ctx context.Context, e Endpoint) error {
	return call(ctx, a.c, http.MethodPut, a.path("/v1/endpoint"), e, nil)
}

// Watch blocks until the record may have become newer than rev, or some
// seconds have passed. It is only a hint: what it returns confirms no right.
func (a *AgentClient) Watch(ctx context.Context, rev model.Revision) (model.Revision, error) {
	var r struct {
		Revision model.Revision `json:"revision"`
	}
	err := call(ctx, a.c, http.MethodGet, a.path("/v1/watch", "rev", strconv.FormatInt(int64(rev), 10)), nil, &r)
	return r.Revision, err
}

// Event hands an event to the agent's timeline.
func (a *AgentClient) Event(ctx context.Context, e model.Event) error {
	return call(ctx, a.c, http.MethodPost, "/v1/event", e, nil)
}

// ShimClient is an agent's way to one shim.
type ShimClient struct {
	socket string
	c      *http.Client
}

// NewShimClient returns a client for the shim that listens on socket.
func NewShimClient(socket string) *ShimClient {
	return &ShimClient{socket: socket, c: unixHTTP(socket)}
}

// Status asks what the shim does now.
func (s *ShimClient) Status(ctx context.Context) (Status, error) {
	var r Status
	err := call(ctx, s.c, http.MethodGet, "/v1/status", nil, &r)
	return r, err
}

// Op asks for an operation; a refusal comes back as an error with the shim's words.
func (s *ShimClient) Op(ctx context.Context, op Op) (OpResult, error) {
	var r OpResult
	err := call(ctx, s.c, http.MethodPost, "/v1/op", op, &r)
	if err == nil && r.Error != "" {
		err = fmt.Errorf("%s: %s", op.Op, r.Error)
	}
	return r, err
}

// Console opens the serial console: a raw stream in both directions that
// begins with the recent history. The caller closes it.
func (s *ShimClient) Console(ctx context.Context) (net.Conn, error) {
	return Upgrade(ctx, "unix", s.socket, "/v1/console")
}

// Agent opens the guest-agent port: a raw stream in both directions, shared
// with all others who opened it. It ends at once where this shim does not run
// the guest. The caller closes it.
func (s *ShimClient) Agent(ctx context.Context) (net.Conn, error) {
	return Upgrade(ctx, "unix", s.socket, "/v1/agent")
}

// Close drops idle connections.
func (s *ShimClient) Close() { s.c.CloseIdleConnections() }
