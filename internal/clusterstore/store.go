// Package clusterstore is the cluster's memory: an embedded etcd member with
// typed keys. It holds who the hosts are, what VMs there are and, one key per
// VM, the authority record that decides who may run it.
//
// Purpose and guarantees. A record is only ever replaced by compare-and-swap on
// its revision, and Record is a linearizable read: these two confirm rights.
// Everything else here (View, Changed, Endpoints, Hosts, Health) comes from a
// local copy that may be old and confirms nothing.
//
// Concurrency. A Store may be used by any number of goroutines. Open starts,
// Close ends and waits for everything the store owns.
//
// Failure. Every call ends within its deadline (Config.OpTimeout, at most 2 s by
// default) whatever etcd, its disk or the network do. Without quorum reads fail
// and swaps end with an unknown outcome. An outcome is called a conflict only
// where etcd itself said that the revision was another; any doubt is unknown:
// the request may have been carried out or may still be.
//
// Not guaranteed: that a member whose disk fails stays alive. etcd ends its
// process when it cannot write its log, which is the agent's; VMs do not notice.
package clusterstore

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
)

// Errors of the store.
var (
	ErrNotFound    = errors.New("not found in the cluster store")
	ErrExists      = errors.New("exists already in the cluster store")
	ErrUnavailable = errors.New("cluster store does not answer (no quorum, or it is starting)")
	ErrConflict    = errors.New("changed in the cluster store meanwhile")
)

// Config says how a member runs.
type Config struct {
	Name       string // this host's name; also the member's
	Dir        string // data directory
	PeerAddr   string // IP:port for the other members
	ClientAddr string // IP:port for health probes and further clients
	CertFile   string // host certificate, PEM
	KeyFile    string
	CAFile     string
	AllowedCN  string        // common name that both sides must show; empty: any of the authority
	Heartbeat  time.Duration // 0: 100 ms
	Election   time.Duration // 0: 1 s
	OpTimeout  time.Duration // 0: 2 s; every call ends within it
	JoinWait   time.Duration // 0: 15 s; how long a first start waits until the others know of this member

	// Initial names all members with their peer URLs, this one included. It is
	// read at the first start only.
	Initial map[string]string
	// Existing: the first start joins a cluster to which this member was added
	// (AddMember); else it makes a new one.
	Existing bool
	// Prefer reports whether a member, by name, should lead: the witness. It is
	// called often and must not block. Nil: nobody is preferred.
	Prefer func(name string) bool

	Logger *slog.Logger // nil: none
}

func (c *Config) defaults() {
	if c.Heartbeat == 0 {
		c.Heartbeat = 100 * time.Millisecond
	}
	if c.Election == 0 {
		c.Election = time.Second
	}
	if c.OpTimeout == 0 {
		c.OpTimeout = 2 * time.Second
	}
	if c.JoinWait == 0 {
		c.JoinWait = 15 * time.Second
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
}

// maxInFlight bounds calls whose caller has given up but which etcd has not
// ended yet; beyond it calls fail at once instead of piling up.
const maxInFlight = 512

// Store is an open member.
type Store struct {
	cfg    Config
	etcd   *embed.Etcd
	cli    *clientv3.Client
	health *prober
	cache  *cache
	flight chan struct{}

	cancel  context.CancelFunc
	wg      sync.WaitGroup
	ready   chan struct{} // closed when the member takes requests
	fatal   chan struct{} // closed when etcd ended by itself; err says why
	errOnce sync.Once
	err     atomic.Value // error
}

// Open starts the member and returns as soon as its process is up; whether it
// has found the others is told by Ready. ctx bounds the start only.
func Open(ctx context.Context, cfg Config) (*Store, error) {
	cfg.defaults()
	tlsInfo := cfg.tlsInfo()
	probeTLS, err := tlsInfo.ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("open cluster store: read certificates: %w", err)
	}
	e, err := cfg.start(ctx)
	if err != nil {
		return nil, fmt.Errorf("open cluster store: %w", err)
	}
	run, cancel := context.WithCancel(context.Background())
	s := &Store{
		cfg:    cfg,
		etcd:   e,
		cli:    v3client.New(e.Server),
		flight: make(chan struct{}, maxInFlight),
		cancel: cancel,
		ready:  make(chan struct{}),
		fatal:  make(chan struct{}),
	}
	s.cache = newCache()
	s.health = newProber(s, &http.Client{Transport: &http.Transport{
		TLSClientConfig: probeTLS, ForceAttemptHTTP2: false, MaxIdleConnsPerHost: 2,
		IdleConnTimeout: 30 * time.Second, TLSHandshakeTimeout: probeTimeout,
	}})
	s.own(func() { s.supervise(run) })
	s.own(func() { s.watchLoop(run) })
	s.own(func() { s.health.run(run) })
	s.own(func() { s.leadLoop(run) })
	return s, nil
}

// start starts etcd. A member that joins asks whichever of the others answers
// first who belongs to the cluster, and one of them may not have heard of it
// yet: then it asks again.
func (c *Config) start(ctx context.Context) (*embed.Etcd, error) {
	end := time.Now().Add(c.JoinWait)
	for {
		ec, err := c.embed()
		if err != nil {
			return nil, err
		}
		e, err := startEtcd(ctx, ec)
		var ne *net.OpError
		if err == nil || !c.Existing || HasData(c.Dir) || errors.As(err, &ne) || time.Now().After(end) {
			return e, err
		}
		c.Logger.Debug("the cluster store does not know this member yet", "error", err)
		if !sleep(ctx, 300*time.Millisecond) {
			return nil, err
		}
	}
}

// startEtcd gives StartEtcd, which takes no context, a bound.
func startEtcd(ctx context.Context, ec *embed.Config) (*embed.Etcd, error) {
	type res struct {
		e   *embed.Etcd
		err error
	}
	ch := make(chan res, 1)
	go func() {
		e, err := embed.StartEtcd(ec)
		ch <- res{e, err}
	}()
	select {
	case r := <-ch:
		return r.e, r.err
	case <-ctx.Done():
		go func() {
			if r := <-ch; r.e != nil {
				r.e.Server.Stop()
				r.e.Close()
			}
		}()
		return nil, fmt.Errorf("start etcd: %w", context.Cause(ctx))
	}
}

func (s *Store) own(f func()) {
	s.wg.Add(1)
	go func() {
		defer s.wg.Done()
		f()
	}()
}

// supervise watches the member's life.
func (s *Store) supervise(ctx context.Context) {
	ready := s.etcd.Server.ReadyNotify()
	for {
		select {
		case <-ready:
			close(s.ready)
			ready = nil
		case err := <-s.etcd.Err():
			s.fail(fmt.Errorf("cluster store ended: %w", orStopped(err)))
			return
		case <-s.etcd.Server.StopNotify():
			s.fail(errors.New("cluster store ended: the member stopped (was it removed from the cluster?)"))
			return
		case <-ctx.Done():
			return
		}
	}
}

func orStopped(err error) error {
	if err == nil {
		return errors.New("stopped")
	}
	return err
}

func (s *Store) fail(err error) {
	s.errOnce.Do(func() {
		s.err.Store(err)
		close(s.fatal)
	})
}

// Ready is closed when the member has found a quorum once since it started.
func (s *Store) Ready() <-chan struct{} { return s.ready }

// Done is closed when the member ended by itself; Err then says why.
func (s *Store) Done() <-chan struct{} { return s.fatal }

// Err says why the member ended, nil while it runs.
func (s *Store) Err() error {
	err, _ := s.err.Load().(error)
	return err
}

// WaitReady waits until the member takes requests, ended or ctx ends.
func (s *Store) WaitReady(ctx context.Context) error {
	select {
	case <-s.ready:
		return nil
	case <-s.fatal:
		return s.Err()
	case <-ctx.Done():
		return fmt.Errorf("wait for the cluster store: %w", context.Cause(ctx))
	}
}

// Close ends the member and waits.
func (s *Store) Close() {
	s.cancel()
	select {
	case <-s.ready:
	default:
		// Close of a member that never got ready waits for ever for its
		// listeners' servers, which only exist once it is; stop it first.
		s.etcd.Server.Stop()
	}
	s.wg.Wait()
	s.cli.Close()
	s.etcd.Close()
	s.health.client.CloseIdleConnections()
}

func (c *Config) tlsInfo() transport.TLSInfo {
	t := transport.TLSInfo{
		CertFile: c.CertFile, KeyFile: c.KeyFile, TrustedCAFile: c.CAFile,
		ClientCertAuth: true,
		// Members are judged by authority and common name, not by the address
		// they come from: a host has several.
		SkipClientSANVerify: true,
	}
	if c.AllowedCN != "" {
		t.AllowedCNs = []string{c.AllowedCN}
	}
	return t
}

func (c *Config) embed() (*embed.Config, error) {
	ec := embed.NewConfig()
	ec.Name = c.Name
	ec.Dir = c.Dir
	peer, client := url.URL{Scheme: "https", Host: c.PeerAddr}, url.URL{Scheme: "https", Host: c.ClientAddr}
	ec.ListenPeerUrls, ec.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
	ec.ListenClientUrls, ec.AdvertiseClientUrls = []url.URL{client}, []url.URL{client}
	ec.PeerTLSInfo, ec.ClientTLSInfo = c.tlsInfo(), c.tlsInfo()
	ec.TlsMinVersion = "TLS1.3"
	ec.TickMs = uint(c.Heartbeat.Milliseconds())
	ec.ElectionMs = uint(c.Election.Milliseconds())
	ec.EnableGRPCGateway = false
	ec.AutoCompactionMode = embed.CompactorModeRevision
	ec.AutoCompactionRetention = "5000"
	ec.QuotaBackendBytes = 512 << 20
	ec.MaxLearners = 16 // each joining host is a learner until it has caught up
	ec.ZapLoggerBuilder = embed.NewZapLoggerBuilder(newZap(c.Logger))
	ec.LogLevel = "warn"
	ec.InitialClusterToken = "perdure"
	ec.ClusterState = embed.ClusterStateFlagNew
	if c.Existing {
		ec.ClusterState = embed.ClusterStateFlagExisting
	}
	initial := c.Initial
	if len(initial) == 0 {
		initial = map[string]string{c.Name: peer.String()}
	}
	names := make([]string, 0, len(initial))
	for n := range initial {
		names = append(names, n)
	}
	sort.Strings(names)
	var parts []string
	for _, n := range names {
		parts = append(parts, n+"="+initial[n])
	}
	ec.InitialCluster = strings.Join(parts, ",")
	if err := ec.Validate(); err != nil {
		return nil, fmt.Errorf("configure etcd: %w", err)
	}
	return ec, nil
}

// HasData reports whether a data directory holds a member already, so that a
// start will not make a new, empty one.
func HasData(dir string) bool {
	_, err := os.Stat(filepath.Join(dir, "member", "wal"))
	return err == nil
}

// do runs one call to etcd in its own goroutine, so that not even a member that
// hangs in its disk keeps the caller longer than the deadline.
func (s *Store) do(ctx context.Context, f func(ctx context.Context) error) error {
	select {
	case <-s.fatal:
		return fmt.Errorf("%w: %w", ErrUnavailable, s.Err())
	default:
	}
	select {
	case s.flight <- struct{}{}:
	default:
		return fmt.Errorf("%w: too many calls wait for it", ErrUnavailable)
	}
	ctx, cancel := context.WithTimeout(ctx, s.cfg.OpTimeout)
	ch := make(chan error, 1)
	go func() {
		defer func() { <-s.flight }()
		defer cancel()
		ch <- f(ctx)
	}()
	select {
	case err := <-ch:
		return err
	case <-ctx.Done():
		// The call may have ended in the same moment: its own word is better.
		select {
		case err := <-ch:
			return err
		default:
		}
		return fmt.Errorf("%w: %w", ErrUnavailable, context.Cause(ctx))
	}
}
