package clusterstore

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sort"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	probeEvery   = 500 * time.Millisecond
	probeTimeout = 400 * time.Millisecond
	leadEvery    = time.Second
)

// Member is a member of the store as this one sees it.
type Member struct {
	ID        uint64
	Name      string // empty: added, never started yet
	PeerURL   string
	ClientURL string
	Learner   bool // does not vote yet
	Self      bool
	Leader    bool

	// Up: it answered the last health probe, which needs it to know a leader
	// and to read through it.
	Up bool
	// LostFor: how long it has failed all probes while this member itself could
	// read through a quorum; 0 while it is up, or nothing can be said.
	LostFor time.Duration
}

// Members lists the members from this member's own books, also without quorum,
// sorted by name.
func (s *Store) Members() []Member {
	srv := s.etcd.Server
	lead := srv.Lead()
	var out []Member
	for _, m := range srv.Cluster().Members() {
		mm := Member{ID: uint64(m.ID), Name: m.Name, Learner: m.IsLearner,
			Self: m.ID == srv.MemberID(), Leader: lead != 0 && uint64(m.ID) == lead}
		if len(m.PeerURLs) > 0 {
			mm.PeerURL = m.PeerURLs[0]
		}
		if len(m.ClientURLs) > 0 {
			mm.ClientURL = m.ClientURLs[0]
		}
		mm.Up, mm.LostFor = s.health.of(mm)
		out = append(out, mm)
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Name < out[j].Name })
	return out
}

// Quorum reports whether this member could read through a quorum at its last
// try, at most about a second ago.
func (s *Store) Quorum() bool { return s.health.quorum() }

// Leader is the name of the leading member as far as this one knows; empty: none.
func (s *Store) Leader() string {
	for _, m := range s.Members() {
		if m.Leader {
			return m.Name
		}
	}
	return ""
}

// AddMember makes room for a new member and returns all members with their peer
// URLs for its first start. It comes in as a learner, which takes no part in any
// majority, and is made a voter by the leader when it has caught up: a joining
// host that dies half-way cannot cost the cluster its quorum.
func (s *Store) AddMember(ctx context.Context, name, peerURL string) (map[string]string, error) {
	if err := s.dropUnstarted(ctx, peerURL); err != nil {
		return nil, err
	}
	for _, m := range s.Members() {
		if m.Name == name {
			return nil, fmt.Errorf("add member %q: %w", name, ErrExists)
		}
	}
	resp, err := s.addLearner(ctx, peerURL)
	if err != nil {
		return nil, fmt.Errorf("add member %q: %w", name, err)
	}
	out := map[string]string{}
	for _, m := range resp.Members {
		n := m.Name
		if m.ID == resp.Member.ID {
			n = name
		}
		if n == "" {
			// Another one that is just joining: etcd wants it counted, the name
			// does not matter.
			n = fmt.Sprintf("joining-%x", m.ID)
		}
		if len(m.PeerURLs) > 0 {
			out[n] = m.PeerURLs[0]
		}
	}
	return out, nil
}

// addLearner repeats the request while the store says that it is not settled
// yet: it wants every voter to have been connected for five seconds.
func (s *Store) addLearner(ctx context.Context, peerURL string) (*clientv3.MemberAddResponse, error) {
	for {
		var resp *clientv3.MemberAddResponse
		err := s.do(ctx, func(ctx context.Context) error {
			r, err := s.cli.MemberAddAsLearner(ctx, []string{peerURL})
			if err == nil {
				resp = r
			}
			return err
		})
		if err == nil {
			return resp, nil
		}
		if !errors.Is(err, rpctypes.ErrUnhealthy) || !sleep(ctx, 300*time.Millisecond) {
			return nil, err
		}
	}
}

// dropUnstarted removes what an earlier, broken-off join left behind.
func (s *Store) dropUnstarted(ctx context.Context, peerURL string) error {
	for _, m := range s.Members() {
		if m.Name == "" && m.PeerURL == peerURL {
			if err := s.RemoveMember(ctx, m.ID); err != nil {
				return err
			}
		}
	}
	return nil
}

// RemoveMember takes a member out of the cluster for good.
func (s *Store) RemoveMember(ctx context.Context, id uint64) error {
	err := s.do(ctx, func(ctx context.Context) error {
		_, err := s.cli.MemberRemove(ctx, id)
		return err
	})
	if err != nil {
		return fmt.Errorf("remove member %x: %w", id, err)
	}
	return nil
}

// leadLoop does what the leader owes the cluster: it makes learners voters, and
// hands the lead to the preferred member while that is healthy.
func (s *Store) leadLoop(ctx context.Context) {
	select {
	case <-s.ready:
	case <-ctx.Done():
		return
	}
	var notBefore time.Time
	for sleep(ctx, leadEvery) {
		if s.etcd.Server.Lead() != uint64(s.etcd.Server.MemberID()) {
			continue
		}
		members := s.Members()
		s.promote(ctx, members)
		if s.cfg.Prefer == nil || s.cfg.Prefer(s.cfg.Name) || time.Now().Before(notBefore) {
			continue
		}
		for _, m := range members {
			if m.Self || m.Learner || !m.Up || m.Name == "" || !s.cfg.Prefer(m.Name) {
				continue
			}
			err := s.do(ctx, func(ctx context.Context) error {
				_, err := s.cli.MoveLeader(ctx, m.ID)
				return err
			})
			// After a failure the lead stays for a while: moving costs the
			// cluster a moment without a leader each time.
			notBefore = time.Now().Add(10 * time.Second)
			s.cfg.Logger.Debug("moved the store's lead", "to", m.Name, "error", err)
			break
		}
	}
}

func (s *Store) promote(ctx context.Context, members []Member) {
	for _, m := range members {
		if !m.Learner || m.Name == "" {
			continue
		}
		err := s.do(ctx, func(ctx context.Context) error {
			_, err := s.cli.MemberPromote(ctx, m.ID)
			return err
		})
		if err == nil {
			s.cfg.Logger.Info("host votes now", "host", m.Name)
		} else {
			s.cfg.Logger.Debug("member cannot vote yet", "host", m.Name, "error", err)
		}
	}
}

// prober judges members by their health endpoint.
type prober struct {
	s      *Store
	client *http.Client

	mu       sync.Mutex
	state    map[uint64]*probe
	quorumOK bool
}

type probe struct {
	up        bool
	lostSince time.Time // zero: not lost
	busy      bool
}

func newProber(s *Store, c *http.Client) *prober {
	return &prober{s: s, client: c, state: map[uint64]*probe{}}
}

func (p *prober) quorum() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.quorumOK
}

func (p *prober) of(m Member) (up bool, lost time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if m.Self {
		return p.quorumOK, 0
	}
	st := p.state[m.ID]
	if st == nil {
		return false, 0
	}
	if !st.lostSince.IsZero() {
		lost = time.Since(st.lostSince)
	}
	return st.up, lost
}

func (p *prober) run(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	for sleep(ctx, probeEvery) {
		wg.Add(1)
		go func() {
			defer wg.Done()
			p.round(ctx)
		}()
	}
}

// round probes this member's own access to a quorum and every other member once.
func (p *prober) round(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	err := p.s.do(ctx, func(ctx context.Context) error {
		_, err := p.s.cli.Get(ctx, clusterKey)
		return err
	})
	p.mu.Lock()
	p.quorumOK = err == nil
	p.mu.Unlock()

	known := map[uint64]bool{}
	var wg sync.WaitGroup
	for _, m := range p.s.Members() {
		known[m.ID] = true
		if m.Self || m.Name == "" || m.ClientURL == "" || !p.begin(m.ID) {
			continue
		}
		wg.Add(1)
		go func() {
			defer wg.Done()
			// Its own bound: the quorum read may have used up the round's.
			pctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), probeTimeout)
			defer cancel()
			p.end(m.ID, p.ask(pctx, m.ClientURL))
		}()
	}
	wg.Wait()
	p.mu.Lock()
	for id := range p.state {
		if !known[id] {
			delete(p.state, id)
		}
	}
	p.mu.Unlock()
}

func (p *prober) begin(id uint64) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	st := p.state[id]
	if st == nil {
		st = &probe{}
		p.state[id] = st
	}
	if st.busy {
		return false
	}
	st.busy = true
	return true
}

func (p *prober) end(id uint64, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	st := p.state[id]
	if st == nil {
		return
	}
	st.busy = false
	st.up = ok
	switch {
	case ok, !p.quorumOK:
		// Without a quorum of our own nothing can be said of another: it may be
		// us who are cut off, and during an election all look ill.
		st.lostSince = time.Time{}
	case st.lostSince.IsZero():
		st.lostSince = time.Now()
	}
}

// ask reads the member's health. It covers its process, its disk (alarms) and
// its way to a leader.
func (p *prober) ask(ctx context.Context, url string) bool {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url+"/health", nil)
	if err != nil {
		return false
	}
	resp, err := p.client.Do(req)
	if err != nil {
		return false
	}
	resp.Body.Close()
	return resp.StatusCode == http.StatusOK
}
