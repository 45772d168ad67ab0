package agent

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"time"

	"perdure/api"
	"perdure/internal/clusterstore"
	"perdure/internal/config"
	"perdure/internal/pki"
)

const (
	publishEvery = 10 * time.Second
	maxVoters    = 7
	joinTimeout  = 30 * time.Second
)

// publish tells the cluster who this host is, at once and whenever it changes.
func (a *Agent) publish(ctx context.Context) {
	if a.store.WaitReady(ctx) != nil {
		return
	}
	if !a.member.Started {
		a.member.Started = true
		if err := a.member.save(a.cfg.StateDir); err != nil {
			a.log.Error("membership cannot be noted; it is tried again at the next start", "error", err)
		}
	}
	var last clusterstore.HostInfo
	named := a.member.Existing
	for {
		wait := publishEvery
		if !named {
			_, err := a.store.PutCluster(ctx, clusterstore.ClusterInfo{ID: a.member.ID, Name: a.member.Name})
			named = err == nil
		}
		info := a.hostInfo()
		if differs(info, last) {
			if err := a.store.PutHost(ctx, info); err == nil {
				last = info
			} else {
				wait = time.Second
			}
		}
		if !named || last.Name == "" {
			wait = time.Second
		} else if a.cfg.Role == config.RoleHost && (a.machine.Load() == nil || info.Tracking == clusterstore.TrackingPending) {
			wait = 200 * time.Millisecond // QEMU is being tried, or tracking proved; the result is waited for
		}
		select {
		case <-ctx.Done():
			return
		case <-a.changed:
		case <-time.After(wait):
		}
	}
}

// hostChanged has this host's words published again.
func (a *Agent) hostChanged() {
	select {
	case a.changed <- struct{}{}:
	default:
	}
}

func (a *Agent) hostInfo() clusterstore.HostInfo {
	total, free := meminfo()
	info := clusterstore.HostInfo{
		Name: a.cfg.Name, Role: string(a.cfg.Role), API: a.cfg.APIAddr(), ALinks: a.cfg.ALinkAddrs(), CPUs: runtime.NumCPU(),
		MemoryTotal: total, MemoryFree: free, Version: a.opts.Version, StateDir: a.cfg.StateDir, CertificateEnds: a.id.Expires().UTC(),
		Networks: a.nets.now(), FailedDisks: a.failedNow(),
	}
	if m := a.machine.Load(); m != nil {
		info.QEMU, info.Accel, info.Machine, info.CPU = m.QEMU, m.Accel, m.Type, m.CPU
		info.Tracking, info.TrackingText = a.trackingNow()
		return info
	}
	// While QEMU is being tried out, what was found in the agent's earlier life
	// stands: a host that restarts is to be useful again at once.
	for _, h := range a.store.Hosts() {
		if h.Name == info.Name {
			info.QEMU, info.Accel, info.Machine, info.CPU = h.QEMU, h.Accel, h.Machine, h.CPU
			info.Tracking, info.TrackingText = h.Tracking, h.TrackingText
		}
	}
	return info
}

// differs ignores small changes of the free memory.
func differs(a, b clusterstore.HostInfo) bool {
	d := a.MemoryFree - b.MemoryFree
	if d < 0 {
		d = -d
	}
	if d > a.MemoryTotal/50 {
		return true
	}
	a.MemoryFree = b.MemoryFree
	return fmt.Sprint(a) != fmt.Sprint(b)
}

func (a *Agent) keepAlive(ctx context.Context) {
	if a.store.WaitReady(ctx) == nil {
		a.store.KeepAlive(ctx, a.cfg.Name, a.life) //nolint:errcheck // it ends with ctx only
	}
}

// housekeep removes what has outlived its time.
func (a *Agent) housekeep(ctx context.Context) {
	for {
		now := time.Now()
		a.uploads.sweep(now)
		a.ops.sweep(now)
		a.sweepBlobs(now)
		if a.store.Quorum() && a.store.Leader() == a.cfg.Name {
			if err := a.store.SweepTokens(ctx, now); err != nil {
				a.log.Debug("tokens cannot be swept", "error", err)
			}
		}
		wait := time.Minute
		if a.id.NeedsRenewal(now) {
			a.renewCertificate(ctx, now)
			wait = renewRetry
		}
		if !sleep(ctx, wait) {
			return
		}
	}
}

// probe finds out what the host's QEMU can do, again until it is found.
func (a *Agent) probe(ctx context.Context) {
	f := a.opts.Probe
	if f == nil {
		f = probeVersion
	}
	for delay := 5 * time.Second; ; delay = min(2*delay, 5*time.Minute) {
		m, err := f(ctx, a.cfg.QEMU)
		a.machine.Store(&m)
		if err == nil {
			a.log.Info("QEMU found", "version", m.QEMU, "accel", m.Accel, "machine", m.Type)
			a.proveTracking(ctx, m)
			return
		}
		a.log.Error("QEMU cannot be used; no VM can start here", "qemu", a.cfg.QEMU, "error", err)
		if !sleep(ctx, delay) {
			return
		}
	}
}

var qemuVersionRE = regexp.MustCompile(`version (\d+\.\d+(?:\.\d+)?)`)

// probeVersion is the probe of an agent that was given none.
func probeVersion(ctx context.Context, qemu string) (Machine, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, qemu, "--version").Output()
	if err != nil {
		return Machine{}, fmt.Errorf("run %s: %w", qemu, err)
	}
	m := qemuVersionRE.FindSubmatch(out)
	if m == nil {
		return Machine{}, fmt.Errorf("run %s: no version in its answer", qemu)
	}
	v := string(m[1])
	mm := strings.SplitN(v, ".", 3)
	return Machine{QEMU: v, Accel: "tcg", Type: "pc-i440fx-" + mm[0] + "." + mm[1]}, nil
}

// meminfo reads MemTotal and MemAvailable in bytes; 0 where they are not known.
func meminfo() (total, free int64) {
	f, err := os.Open("/proc/meminfo")
	if err != nil {
		return 0, 0
	}
	defer f.Close()
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		key, rest, _ := strings.Cut(sc.Text(), ":")
		fields := strings.Fields(rest)
		if len(fields) == 0 {
			continue
		}
		n, err := strconv.ParseInt(fields[0], 10, 64)
		if err != nil {
			continue
		}
		switch key {
		case "MemTotal":
			total = n << 10
		case "MemAvailable":
			free = n << 10
		}
	}
	return total, free
}

func memAvailable() int64 { _, free := meminfo(); return free }

// CreateToken implements httpapi.Service.
func (a *Agent) CreateToken(ctx context.Context, req api.CreateToken) (api.Token, error) {
	addrs := []string{a.cfg.APIAddr()}
	for _, h := range a.store.Hosts() {
		if h.Name != a.cfg.Name && h.Alive && len(addrs) < 3 {
			addrs = append(addrs, h.API)
		}
	}
	t, err := pki.NewToken(a.id.CAFingerprint(), addrs, req.Role == api.RoleWitness, time.Now().Add(time.Duration(req.TTLMS)*time.Millisecond))
	if err != nil {
		return api.Token{}, err
	}
	t.Cluster = a.store.ClusterCached().Name
	err = a.store.PutToken(ctx, clusterstore.Token{ID: t.ID, SecretHash: t.SecretHash(), Role: string(req.Role), Expires: t.Expires})
	if err != nil {
		return api.Token{}, storeError("", err)
	}
	return api.Token{ID: t.ID, Text: t.String(), Role: req.Role, Expires: t.Expires}, nil
}

// Join implements httpapi.Service: it lets a machine in that shows a valid token.
func (a *Agent) Join(ctx context.Context, req api.JoinRequest) (api.JoinReply, error) {
	ca, caKey, err := a.authority()
	if err != nil {
		return a.forwardJoin(ctx, req, err)
	}
	ctx, cancel := context.WithTimeout(ctx, joinTimeout)
	defer cancel()
	ips, err := a.checkJoin(req)
	if err != nil {
		return api.JoinReply{}, err
	}
	cert, err := ca.IssueHost([]byte(req.CSRPEM), req.Name, ips, time.Now())
	if err != nil {
		return api.JoinReply{}, api.Errorf(api.Invalid, "%w", err)
	}
	now := time.Now()
	tok := clusterstore.Token{ID: req.TokenID, SecretHash: pki.HashSecret(req.Secret), Role: string(req.Role)}
	expires, err := a.store.UseToken(ctx, tok.ID, tok.SecretHash, tok.Role, now)
	switch {
	case errors.Is(err, clusterstore.ErrNotFound):
		return api.JoinReply{}, api.Errorf(api.Forbidden, "%w", pki.ErrTokenUsed)
	case err != nil:
		return api.JoinReply{}, storeError("", err)
	}
	initial, err := a.store.AddMember(ctx, req.Name, req.PeerURL)
	if err != nil {
		// The token did not let anybody in: it is given back.
		tok.Expires = expires
		back := a.store.PutToken(context.WithoutCancel(ctx), tok)
		if errors.Is(err, clusterstore.ErrExists) {
			return api.JoinReply{}, api.Errorf(api.Conflict, "there is a host %q in the cluster already", req.Name)
		}
		return api.JoinReply{}, api.Errorf(api.Unavailable, "the cluster store cannot take host %q in now: %w", req.Name, errors.Join(err, back)).
			WithAction("try again when all voters are up")
	}
	info := a.store.ClusterCached()
	rep := api.JoinReply{ClusterID: info.ID, ClusterName: info.Name, CAPEM: string(ca.CertPEM()), CertPEM: string(cert),
		InitialCluster: initial, Peers: []string{a.cfg.APIAddr()}}
	if req.Role == api.RoleHost {
		rep.CAKeyPEM = string(caKey) // so that the cluster can let hosts in when the first one is gone
	}
	for _, h := range a.store.Hosts() {
		if h.Name != a.cfg.Name {
			rep.Peers = append(rep.Peers, h.API)
		}
	}
	a.log.Info("host joins", "name", req.Name, "role", req.Role, "peer_url", req.PeerURL)
	return rep, nil
}

func (a *Agent) authority() (*pki.CA, []byte, error) {
	cert, err := os.ReadFile(a.cfg.PKIPath("ca.crt"))
	if err != nil {
		return nil, nil, fmt.Errorf("read authority: %w", err)
	}
	key, err := os.ReadFile(a.cfg.PKIPath("ca.key"))
	if err != nil {
		return nil, nil, fmt.Errorf("read authority: %w", err)
	}
	ca, err := pki.LoadCA(cert, key)
	return ca, key, err
}

// forwardJoin passes a request on to a host that holds the authority's key.
func (a *Agent) forwardJoin(ctx context.Context, req api.JoinRequest, why error) (api.JoinReply, error) {
	if api.Forwarded(ctx) {
		return api.JoinReply{}, api.Errorf(api.Unavailable, "host %s does not hold the authority's key: %w", a.cfg.Name, why)
	}
	for _, h := range a.otherHosts(true) {
		p, _, err := a.peer(h.Name)
		if err != nil {
			continue
		}
		rep, err := p.api.Join(api.WithForwarded(ctx), req)
		if err == nil || api.ClassOf(err) != api.Unavailable {
			return rep, err
		}
	}
	return api.JoinReply{}, api.Errorf(api.Unavailable, "no host that holds the authority's key answers").
		WithAction("start the first host of the cluster, or another one that was joined as a host")
}

// checkJoin judges a request before anything is changed, and returns the
// addresses for the certificate.
func (a *Agent) checkJoin(req api.JoinRequest) ([]net.IP, error) {
	if !config.ValidName(req.Name) {
		return nil, api.Errorf(api.Invalid, "host name %q is not allowed; allowed: %s", req.Name, config.NameRule)
	}
	if req.Role != api.RoleHost && req.Role != api.RoleWitness {
		return nil, api.Errorf(api.Invalid, "role %q is not known; allowed are host and witness", req.Role)
	}
	if req.StateFormat != StateFormat {
		return nil, api.Errorf(api.Conflict, "host %q (Perdure %s) has state format %d, this cluster %d", req.Name, req.Version, req.StateFormat, StateFormat).
			WithAction("install the same version of Perdure on all hosts")
	}
	for _, h := range a.store.Hosts() {
		if h.Name == req.Name {
			return nil, api.Errorf(api.Conflict, "there is a host %q in the cluster already", req.Name).
				WithAction("give the new host another name (--name)")
		}
	}
	if n := len(a.store.Members()); n >= maxVoters {
		return nil, api.Errorf(api.Refused, "the cluster has %d voters; more than %d members are not available in this release", n, maxVoters)
	}
	u, err := url.Parse(req.PeerURL)
	if err != nil || u.Scheme != "https" || net.ParseIP(u.Hostname()) == nil || u.Port() == "" {
		return nil, api.Errorf(api.Invalid, "peer_url %q is not https://IP:PORT", req.PeerURL)
	}
	addrs := req.ALinks
	for _, ad := range req.Addrs {
		host, _, err := net.SplitHostPort(ad)
		if err != nil || net.ParseIP(host) == nil {
			return nil, api.Errorf(api.Invalid, "address %q is not IP:PORT", ad)
		}
		addrs = append(addrs, host)
	}
	for _, ad := range req.ALinks {
		if net.ParseIP(ad) == nil {
			return nil, api.Errorf(api.Invalid, "A-link address %q is not an IP address", ad)
		}
	}
	return hostIPs(u.Hostname(), addrs), nil
}

// Cluster implements httpapi.Service.
func (a *Agent) Cluster(context.Context) (api.Cluster, error) {
	info := a.store.ClusterCached()
	if info.ID == "" {
		info = clusterstore.ClusterInfo{ID: a.member.ID, Name: a.member.Name}
	}
	c := api.Cluster{ID: info.ID, Name: info.Name, Host: a.cfg.Name, Version: a.opts.Version, Quorum: a.store.Quorum(),
		CASHA256: a.id.CAFingerprint(), Voters: []api.Voter{}, Problems: a.clusterProblems()}
	for _, m := range a.store.Members() {
		if m.Learner || m.Name == "" {
			continue
		}
		lead := m.Leader && c.Quorum
		if lead {
			c.Leader = m.Name
		}
		c.Voters = append(c.Voters, api.Voter{Name: m.Name, Alive: m.Up || m.Self, Leader: lead})
	}
	return c, nil
}

// Hosts implements httpapi.Service.
func (a *Agent) Hosts(context.Context) ([]api.Host, error) {
	members := map[string]clusterstore.Member{}
	for _, m := range a.store.Members() {
		members[m.Name] = m
	}
	sits := map[string][]string{}
	for _, v := range a.store.VMs() {
		rec := v.Record.Record
		for _, s := range []string{rec.Primary.Host, rec.Secondary.Host} {
			if s != "" {
				sits[s] = append(sits[s], v.Spec.Name)
			}
		}
	}
	quorum := a.store.Quorum()
	out := []api.Host{}
	for _, h := range a.store.Hosts() {
		m, isMember := members[h.Name]
		v := api.Host{Name: h.Name, Role: api.HostRole(h.Role), State: api.HostUnknown, Voter: isMember && !m.Learner, Leader: m.Leader && quorum,
			Addrs: []string{h.API}, ALinks: []api.ALink{}, CPUs: h.CPUs, MemoryTotal: h.MemoryTotal, MemoryFree: h.MemoryFree,
			Accel: h.Accel, QEMU: h.QEMU, Tracking: api.Tracking(h.Tracking), TrackingText: h.TrackingText, Version: h.Version, StateDir: h.StateDir, CertificateEnds: h.CertificateEnds, VMs: append([]string{}, sits[h.Name]...)}
		v.Problems = hostProblems(h)
		switch {
		case h.Name == a.cfg.Name:
			v.State = api.HostAlive
		case !quorum:
		case h.Alive:
			v.State = api.HostAlive
		default:
			v.State = api.HostSilent
		}
		for _, l := range h.ALinks {
			link := api.ALink{Addr: l}
			if st, ok := a.links.of(l); ok && h.Name != a.cfg.Name {
				link.Up, link.RTTMS = &st.up, float64(st.rtt.Microseconds())/1000
			}
			v.ALinks = append(v.ALinks, link)
		}
		out = append(out, v)
	}
	return out, nil
}

// Host implements httpapi.Service.
func (a *Agent) Host(ctx context.Context, name string) (api.Host, error) {
	all, err := a.Hosts(ctx)
	if err != nil {
		return api.Host{}, err
	}
	for _, h := range all {
		if h.Name == name {
			return h, nil
		}
	}
	return api.Host{}, api.Errorf(api.NotFound, "there is no host %q", name)
}

// leftovers lists directories of VMs that the store does not know.
func (a *Agent) leftovers() []string {
	entries, err := filepath.Glob(a.cfg.Path("left", "*"))
	if err != nil {
		return nil
	}
	return entries
}
