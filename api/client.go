package api

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Media type of event streams and protocol name of the console.
const (
	EventMediaType  = "application/jsonl"
	ConsoleProtocol = "perdure-stream"
)

const (
	dialTimeout = 5 * time.Second
	// callTimeout bounds a call without a deadline of its own, past what the
	// server takes at most.
	callTimeout = 90 * time.Second
	// silence after which an event stream counts as broken; the server gives a
	// sign of life three times as often.
	streamSilence = 15 * time.Second
)

// Options says where an agent is. Either Socket or Servers is set.
type Options struct {
	Socket  string   // path of the Unix socket
	Servers []string // HOST:PORT, tried in turn until one answers
	TLS     *tls.Config
}

// Client calls one agent, or one of several. It may be used concurrently.
type Client struct {
	http  *http.Client
	where string
	tls   *tls.Config
	dial  func(ctx context.Context) (net.Conn, error)
}

// LoadTLS reads a client certificate with its key and the cluster's authority
// from PEM files.
func LoadTLS(certFile, keyFile, caFile string) (*tls.Config, error) {
	for _, f := range []struct{ what, path string }{{"certificate", certFile}, {"key", keyFile}, {"certificate authority", caFile}} {
		if f.path == "" {
			return nil, Errorf(Invalid, "a server is given but no client %s; give --cert, --key and --ca together", f.what)
		}
	}
	cert, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		return nil, Errorf(Invalid, "load client certificate: %w", err)
	}
	pem, err := os.ReadFile(caFile)
	if err != nil {
		return nil, Errorf(Invalid, "load certificate authority: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, Errorf(Invalid, "load certificate authority: %s holds no certificate", caFile)
	}
	return &tls.Config{
		Certificates: []tls.Certificate{cert},
		RootCAs:      pool,
		MinVersion:   tls.VersionTLS13,
		// Any host of the cluster may answer, at whatever address it has: the chain
		// is checked in full below, only the name is free.
		InsecureSkipVerify: true, //nolint:gosec // see above
		VerifyConnection:   func(cs tls.ConnectionState) error { return verifyChain(cs, pool) },
	}, nil
}

func verifyChain(cs tls.ConnectionState, roots *x509.CertPool) error {
	_, err := cs.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
	if err != nil {
		return &tls.CertificateVerificationError{UnverifiedCertificates: cs.PeerCertificates, Err: err}
	}
	return nil
}

// New makes a client; nothing is dialled before the first call.
func New(o Options) (*Client, error) {
	c := &Client{}
	// A host that lost its power is noticed in seconds, also by who only listens.
	d := &net.Dialer{Timeout: dialTimeout, KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 2 * time.Second, Interval: time.Second, Count: 4}}
	switch {
	case o.Socket != "" && len(o.Servers) > 0:
		return nil, Errorf(Invalid, "both a socket (%s) and a server (%s) are given; give one of both", o.Socket, strings.Join(o.Servers, ","))
	case o.Socket != "":
		c.where = o.Socket
		c.dial = func(ctx context.Context) (net.Conn, error) { return d.DialContext(ctx, "unix", o.Socket) }
	case len(o.Servers) > 0:
		if o.TLS == nil {
			return nil, Errorf(Invalid, "server %s needs a client certificate", strings.Join(o.Servers, ","))
		}
		for _, s := range o.Servers {
			if _, _, err := net.SplitHostPort(s); err != nil {
				return nil, Errorf(Invalid, "server %q is not HOST:PORT", s)
			}
		}
		c.where, c.tls = strings.Join(o.Servers, ","), o.TLS
		c.dial = func(ctx context.Context) (net.Conn, error) { return dialAny(ctx, d, o.Servers, o.TLS) }
	default:
		return nil, Errorf(Invalid, "neither a socket nor a server is given")
	}
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) { return c.dial(ctx) }
	// The scheme is http throughout: the dial function has done TLS already, to
	// whichever server answered.
	c.http = &http.Client{Transport: &http.Transport{DialContext: dial, MaxIdleConns: 4, IdleConnTimeout: 30 * time.Second}}
	return c, nil
}

// dialAny tries the servers in turn; a silent one costs its share of the time.
func dialAny(ctx context.Context, d *net.Dialer, servers []string, conf *tls.Config) (net.Conn, error) {
	var errs []error
	for _, s := range servers {
		per, cancel := context.WithTimeout(ctx, dialTimeout)
		if len(servers) > 1 {
			cancel()
			per, cancel = context.WithTimeout(ctx, 2*time.Second)
		}
		conn, err := (&tls.Dialer{NetDialer: d, Config: conf}).DialContext(per, "tcp", s)
		cancel()
		if err == nil {
			return conn, nil
		}
		errs = append(errs, fmt.Errorf("%s: %w", s, err))
		if ctx.Err() != nil {
			break
		}
	}
	return nil, errors.Join(errs...)
}

// Local reports whether the agent is reached by a Unix socket, so that both
// sides see the same files.
func (c *Client) Local() bool { return c.tls == nil }

// Where says who is asked, for messages.
func (c *Client) Where() string { return c.where }

// Close drops idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

func (c *Client) request(ctx context.Context, method, path string, body io.Reader) (*http.Request, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://perdure"+Prefix+path, body)
	if err != nil {
		return nil, Errorf(Invalid, "make request: %w", err)
	}
	if Forwarded(ctx) {
		req.Header.Set(ForwardedHeader, "1")
	}
	return req, nil
}

// do carries one call out. in and out may be nil.
func (c *Client) do(ctx context.Context, method, path string, in, out any) error {
	if _, has := ctx.Deadline(); !has {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, callTimeout)
		defer cancel()
	}
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return Errorf(Internal, "encode request: %w", err)
		}
		body = bytes.NewReader(b)
	}
	req, err := c.request(ctx, method, path, body)
	if err != nil {
		return err
	}
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	return c.finish(ctx, req, out)
}

// finish sends a request and decodes its answer.
func (c *Client) finish(ctx context.Context, req *http.Request, out any) error {
	resp, err := c.http.Do(req)
	if err != nil {
		return c.transportError(ctx, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode >= 300 {
		return readProblem(resp)
	}
	if out == nil || resp.StatusCode == http.StatusNoContent {
		return nil
	}
	if err := json.NewDecoder(resp.Body).Decode(out); err != nil {
		if ctx.Err() != nil {
			return c.transportError(ctx, ctx.Err())
		}
		return Errorf(Unavailable, "read answer of %s: %w", c.where, err)
	}
	return nil
}

// transportError says in people's words why nobody answered.
func (c *Client) transportError(ctx context.Context, err error) error {
	var ue *url.Error
	if errors.As(err, &ue) {
		err = ue.Err
	}
	var pe *os.PathError
	var verify *tls.CertificateVerificationError
	var oe *net.OpError
	switch {
	case errors.Is(ctx.Err(), context.Canceled):
		return context.Canceled
	case ctx.Err() != nil:
		return Errorf(Timeout, "agent at %s gave no answer in time: %w", c.where, ctx.Err())
	case errors.As(err, &verify):
		return Errorf(Forbidden, "agent at %s shows a certificate of another cluster: %w", c.where, err).
			WithAction("check that --ca names the certificate authority of the cluster you mean")
	case c.tls != nil && errors.As(err, &oe) && oe.Op == "remote error": // a TLS alert
		return Errorf(Forbidden, "agent at %s does not accept the client certificate: %w", c.where, err).
			WithAction("use a certificate that was issued by this cluster")
	case errors.Is(err, syscall.EACCES) || errors.As(err, &pe) && errors.Is(pe, os.ErrPermission):
		return Errorf(Forbidden, "agent socket %s: permission denied", c.where).WithAction("become root, or use --server with a client certificate")
	case c.Local() && errors.Is(err, os.ErrNotExist):
		return Errorf(Unavailable, "no agent at %s: there is no such socket", c.where).
			WithAction("start the agent (perdure agent), or name its socket with --socket or PERDURE_SOCKET")
	case c.Local() && errors.Is(err, syscall.ECONNREFUSED):
		return Errorf(Unavailable, "no agent at %s: the socket is there but nobody listens", c.where).WithAction("start the agent (perdure agent)")
	}
	return Errorf(Unavailable, "agent at %s cannot be reached: %w", c.where, err)
}

// readProblem turns an error answer into an error.
func readProblem(resp *http.Response) error {
	b, _ := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	p := Problem{}
	if json.Unmarshal(b, &p) != nil || p.Detail == "" {
		p.Detail = strings.TrimSpace(string(b))
		if p.Detail == "" {
			p.Detail = resp.Status
		}
	}
	p.Status = resp.StatusCode
	return p.Err()
}

func get[T any](ctx context.Context, c *Client, path string) (T, error) {
	var v T
	err := c.do(ctx, http.MethodGet, path, nil, &v)
	return v, err
}

func vmPath(name string, more ...string) string {
	p := "/vms/" + url.PathEscape(name)
	for _, m := range more {
		p += "/" + m
	}
	return p
}

// Cluster returns the cluster as the agent sees it.
func (c *Client) Cluster(ctx context.Context) (Cluster, error) {
	return get[Cluster](ctx, c, "/cluster")
}

// Hosts lists all members.
func (c *Client) Hosts(ctx context.Context) ([]Host, error) {
	l, err := get[HostList](ctx, c, "/hosts")
	return l.Hosts, err
}

// Host returns one member.
func (c *Client) Host(ctx context.Context, name string) (Host, error) {
	if err := CheckName("host", name); err != nil {
		return Host{}, err
	}
	return get[Host](ctx, c, "/hosts/"+url.PathEscape(name))
}

// RemoveHost takes a host that does not come back out of the cluster.
func (c *Client) RemoveHost(ctx context.Context, name string) error {
	if err := CheckName("host", name); err != nil {
		return err
	}
	return c.do(ctx, http.MethodDelete, "/hosts/"+url.PathEscape(name), nil, nil)
}

// CreateToken makes a join token.
func (c *Client) CreateToken(ctx context.Context, req CreateToken) (Token, error) {
	var t Token
	err := c.do(ctx, http.MethodPost, "/tokens", req, &t)
	return t, err
}

// Join asks to become a member; see JoinRequest.
func (c *Client) Join(ctx context.Context, req JoinRequest) (JoinReply, error) {
	var r JoinReply
	err := c.do(ctx, http.MethodPost, "/join", req, &r)
	return r, err
}

// VMs lists all VMs.
func (c *Client) VMs(ctx context.Context) ([]VM, error) {
	l, err := get[VMList](ctx, c, "/vms")
	return l.VMs, err
}

// VM returns one VM.
func (c *Client) VM(ctx context.Context, name string) (VM, error) {
	if err := CheckName("VM", name); err != nil {
		return VM{}, err
	}
	return get[VM](ctx, c, vmPath(name))
}

// CreateVM creates a VM; follow the operation with Operation.
func (c *Client) CreateVM(ctx context.Context, req CreateVM) (Operation, error) {
	var o Operation
	err := c.do(ctx, http.MethodPost, "/vms", req, &o)
	return o, err
}

// DeleteVM removes a stopped VM.
func (c *Client) DeleteVM(ctx context.Context, name string, req DeleteVM) error {
	if err := CheckName("VM", name); err != nil {
		return err
	}
	return c.do(ctx, http.MethodDelete, vmPath(name)+"?force="+strconv.FormatBool(req.Force), nil, nil)
}

func (c *Client) action(ctx context.Context, name, verb string, req any) error {
	if err := CheckName("VM", name); err != nil {
		return err
	}
	return c.do(ctx, http.MethodPost, vmPath(name, verb), req, nil)
}

// StartVM starts a stopped VM.
func (c *Client) StartVM(ctx context.Context, name string, req StartVM) error {
	return c.action(ctx, name, "start", req)
}

// StopVM presses the guest's power button.
func (c *Client) StopVM(ctx context.Context, name string) error {
	return c.action(ctx, name, "stop", nil)
}

// KillVM ends the instance at once.
func (c *Client) KillVM(ctx context.Context, name string) error {
	return c.action(ctx, name, "kill", nil)
}

// PauseVM lets the guest stand still.
func (c *Client) PauseVM(ctx context.Context, name string) error {
	return c.action(ctx, name, "pause", nil)
}

// ResumeVM lets a paused guest go on.
func (c *Client) ResumeVM(ctx context.Context, name string) error {
	return c.action(ctx, name, "resume", nil)
}

// SetLevel changes the level of a VM; of a running one the change has only begun when it returns.
func (c *Client) SetLevel(ctx context.Context, name string, req SetLevel) error {
	return c.action(ctx, name, "level", req)
}

// ProtectVM fills a secondary, or gives it up.
func (c *Client) ProtectVM(ctx context.Context, name string, req ProtectVM) error {
	return c.action(ctx, name, "protect", req)
}

// SwitchoverVM moves the VM to its secondary.
func (c *Client) SwitchoverVM(ctx context.Context, name string, req SwitchoverVM) error {
	return c.action(ctx, name, "switchover", req)
}

// TakeoverVM lets a host take the VM over.
func (c *Client) TakeoverVM(ctx context.Context, name string, req TakeoverVM) error {
	return c.action(ctx, name, "takeover", req)
}

// TakeoverRisk says what a takeover could lose.
func (c *Client) TakeoverRisk(ctx context.Context, name, host string) (TakeoverRisk, error) {
	if err := CheckName("VM", name); err != nil {
		return TakeoverRisk{}, err
	}
	return get[TakeoverRisk](ctx, c, vmPath(name, "takeover")+"?host="+url.QueryEscape(host))
}

// Operation returns an operation, at its end or after at most wait (≤ 60 s).
func (c *Client) Operation(ctx context.Context, id string, wait time.Duration) (Operation, error) {
	return get[Operation](ctx, c, "/operations/"+url.PathEscape(id)+"?wait_ms="+strconv.FormatInt(wait.Milliseconds(), 10))
}

// Operations lists the operations of the host that answers.
func (c *Client) Operations(ctx context.Context) ([]Operation, error) {
	l, err := get[OperationList](ctx, c, "/operations")
	return l.Operations, err
}

// CancelOperation ends an operation and undoes what it made.
func (c *Client) CancelOperation(ctx context.Context, id string) error {
	return c.do(ctx, http.MethodDelete, "/operations/"+url.PathEscape(id), nil, nil)
}
