package agent

import (
	"context"
	"errors"
	"net"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"perdure/internal/clusterstore"
	"perdure/internal/config"
)

const (
	alinkEvery   = 5 * time.Second
	alinkTimeout = time.Second
)

// alinkState is what this host saw of one A-link address of another host last.
type alinkState struct {
	up  bool
	rtt time.Duration
}

// alinks holds the states by address.
type alinks struct {
	mu sync.Mutex
	by map[string]alinkState
}

func (l *alinks) of(addr string) (alinkState, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	s, ok := l.by[addr]
	return s, ok
}

// watchALinks asks every A-link address of the other hosts now and then whether
// it answers. It is for people: pairs judge their links by themselves, each
// heartbeat, and nothing is decided by this.
func (a *Agent) watchALinks(ctx context.Context) {
	for sleep(ctx, alinkEvery) {
		own := a.cfg.ALinkAddrs()
		by := map[string]alinkState{}
		var mu sync.Mutex
		var wg sync.WaitGroup
		for _, h := range a.store.Hosts() {
			if h.Name == a.cfg.Name || h.Role != string(config.RoleHost) {
				continue
			}
			for n, addr := range h.ALinks {
				local := ""
				if len(own) == len(h.ALinks) {
					local = own[n]
				}
				wg.Go(func() {
					st := askALink(ctx, local, addr, a.alinkPort(h))
					mu.Lock()
					by[addr] = st
					mu.Unlock()
				})
			}
		}
		wg.Wait()
		a.links.mu.Lock()
		a.links.by = by
		a.links.mu.Unlock()
	}
}

// alinkPort is a port that a host's own programs may listen on; that nothing
// does, on an A-link, is an answer too.
func (a *Agent) alinkPort(h clusterstore.HostView) int {
	if _, port, err := net.SplitHostPort(h.API); err == nil {
		if n, err := strconv.Atoi(port); err == nil {
			return n
		}
	}
	return a.cfg.LAN.APIPort
}

// askALink tries a TCP connection from local (empty: any address) to addr. One
// that is refused has crossed the link both ways as one that is accepted has.
func askALink(ctx context.Context, local, addr string, port int) alinkState {
	d := net.Dialer{Timeout: alinkTimeout}
	if ip := net.ParseIP(local); ip != nil {
		d.LocalAddr = &net.TCPAddr{IP: ip}
	}
	start := time.Now()
	c, err := d.DialContext(ctx, "tcp", net.JoinHostPort(addr, strconv.Itoa(port)))
	took := time.Since(start)
	if err == nil {
		c.Close()
	} else if !errors.Is(err, unix.ECONNREFUSED) {
		return alinkState{}
	}
	return alinkState{up: true, rtt: took}
}
