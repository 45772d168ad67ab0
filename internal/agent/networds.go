package agent

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net"
	"reflect"
	"strconv"
	"sync"
	"time"

	"perdure/internal/config"
	"perdure/internal/netpath"
	"perdure/internal/pki"
)

const (
	wordEvery   = 100 * time.Millisecond // between two words on a link
	wordLost    = time.Second            // of silence after which a link counts as cut
	wordVersion = 1
	maxWord     = 64 << 10 // bytes of a line
)

// netWord is one line on a link: what a host says of its bridges.
type netWord struct {
	Version int                     `json:"version"`
	Bridges map[string]netpath.Word `json:"bridges"`
}

// netWords exchanges words with the other hosts, over each A-link by itself:
// when the LAN is cut, the A-links are all there is. See docs/network.md.
type netWords struct {
	a      *Agent
	change func()

	mu    sync.Mutex
	mine  map[string]netpath.Word
	fresh chan struct{} // closed and replaced when mine changes
	peer  map[string]*netPeer
	aim   map[string]string // tunnel end → address it was turned to
}

type netPeer struct {
	words map[string]netpath.Word
	links map[int]*netLink // by A-link
}

type netLink struct {
	heard  time.Time
	remote net.IP
	gen    uint64 // of the connection
	dialer bool   // somebody dials it
}

func newNetWords(a *Agent, change func()) *netWords {
	return &netWords{a: a, change: change, fresh: make(chan struct{}), peer: map[string]*netPeer{}, aim: map[string]string{}}
}

// say replaces what is told to the others.
func (w *netWords) say(words map[string]netpath.Word) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if reflect.DeepEqual(words, w.mine) {
		return
	}
	w.mine = words
	close(w.fresh)
	w.fresh = make(chan struct{})
}

func (w *netWords) get(host string, link int) (*netPeer, *netLink) {
	p := w.peer[host]
	if p == nil {
		p = &netPeer{links: map[int]*netLink{}}
		w.peer[host] = p
	}
	l := p.links[link]
	if l == nil {
		l = &netLink{}
		p.links[link] = l
	}
	return p, l
}

// best returns the link to use: the first that is not silent.
func (p *netPeer) best() *netLink {
	for i := range 8 {
		if l := p.links[i]; l != nil && l.remote != nil && time.Since(l.heard) < wordLost {
			return l
		}
	}
	return nil
}

// remote returns the address of a host on an A-link that works, or nil.
func (w *netWords) remote(host string) net.IP {
	w.mu.Lock()
	defer w.mu.Unlock()
	if p := w.peer[host]; p != nil {
		if l := p.best(); l != nil {
			return l.remote
		}
	}
	return nil
}

// moved reports whether a tunnel end was turned elsewhere before, and notes it.
func (w *netWords) moved(end string, to net.IP) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	old := w.aim[end]
	w.aim[end] = to.String()
	return old != to.String()
}

// peers lists the other hosts with what they say of a bridge.
func (w *netWords) peers(bridge string) []netpath.Peer {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []netpath.Peer
	for _, h := range w.a.otherHosts(false) {
		p := w.peer[h.Name]
		if p == nil {
			out = append(out, netpath.Peer{Name: h.Name})
			continue
		}
		word, knows := p.words[bridge]
		out = append(out, netpath.PeerOf(h.Name, w.a.cfg.Name, knows && p.best() != nil, word))
	}
	return out
}

// run listens and dials until ctx ends.
func (w *netWords) run(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	for i, l := range w.a.cfg.ALinks {
		wg.Go(func() { w.listen(ctx, &wg, i, l) })
	}
	for {
		for _, h := range w.a.otherHosts(false) {
			if h.Name < w.a.cfg.Name {
				continue // the one whose name comes first dials
			}
			for i := range min(len(h.ALinks), len(w.a.cfg.ALinks)) {
				w.mu.Lock()
				_, l := w.get(h.Name, i)
				start := !l.dialer
				l.dialer = true
				w.mu.Unlock()
				if start {
					wg.Go(func() { w.dial(ctx, h.Name, h.ALinks[i], i) })
				}
			}
		}
		if !sleep(ctx, time.Second) {
			return
		}
	}
}

func (w *netWords) listen(ctx context.Context, wg *sync.WaitGroup, i int, link config.ALink) {
	conf := w.a.id.ServerTLS(true)
	slots := make(chan struct{}, 64)
	for ctx.Err() == nil {
		var lc net.ListenConfig
		l, err := lc.Listen(ctx, "tcp", net.JoinHostPort(link.Address, strconv.Itoa(w.a.cfg.CarryPort)))
		if err != nil {
			w.a.log.Debug("listen for words about networks", "error", err)
			sleep(ctx, time.Second)
			continue
		}
		stop := context.AfterFunc(ctx, func() { l.Close() })
		for {
			c, err := l.Accept()
			if err != nil {
				break
			}
			select {
			case slots <- struct{}{}:
			default:
				c.Close()
				continue
			}
			wg.Go(func() {
				defer func() { <-slots }()
				t := tls.Server(c, conf)
				if w.shake(ctx, t) {
					st := t.ConnectionState()
					if host, err := pki.PeerHost(&st); err == nil {
						w.serve(ctx, t, host, i)
					}
				}
				c.Close()
			})
		}
		stop()
		l.Close()
		sleep(ctx, time.Second)
	}
}

func (w *netWords) shake(ctx context.Context, t *tls.Conn) bool {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	return t.HandshakeContext(ctx) == nil
}

func (w *netWords) dial(ctx context.Context, host, addr string, i int) {
	d := net.Dialer{Timeout: time.Second, LocalAddr: &net.TCPAddr{IP: net.ParseIP(w.a.cfg.ALinks[i].Address)}}
	conf := w.a.id.ClientTLS(host)
	for {
		c, err := d.DialContext(ctx, "tcp", net.JoinHostPort(addr, strconv.Itoa(w.a.cfg.CarryPort)))
		if err == nil {
			t := tls.Client(c, conf)
			if w.shake(ctx, t) {
				w.serve(ctx, t, host, i)
			}
			c.Close()
		}
		if !sleep(ctx, 200*time.Millisecond) {
			return
		}
	}
}

// serve exchanges words on one connection until it breaks.
func (w *netWords) serve(ctx context.Context, c *tls.Conn, host string, link int) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(ctx, func() { c.NetConn().Close() })()
	w.mu.Lock()
	_, l := w.get(host, link)
	l.gen++
	gen := l.gen
	w.mu.Unlock()
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer cancel()
		w.tellAll(ctx, c)
	}()
	w.hear(c, host, link, gen)
	cancel()
	<-done
	w.mu.Lock()
	if l.gen == gen {
		l.heard = time.Time{}
	}
	w.mu.Unlock()
	w.change()
}

func (w *netWords) tellAll(ctx context.Context, c *tls.Conn) {
	tick := time.NewTicker(wordEvery)
	defer tick.Stop()
	enc := json.NewEncoder(c)
	for {
		w.mu.Lock()
		word, fresh := netWord{Version: wordVersion, Bridges: w.mine}, w.fresh
		w.mu.Unlock()
		if c.SetWriteDeadline(time.Now().Add(wordLost)) != nil || enc.Encode(word) != nil {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-fresh:
		}
	}
}

func (w *netWords) hear(c *tls.Conn, host string, link int, gen uint64) {
	addr, ok := c.RemoteAddr().(*net.TCPAddr)
	if !ok {
		return
	}
	sc := bufio.NewScanner(c)
	sc.Buffer(make([]byte, 4096), maxWord)
	for c.SetReadDeadline(time.Now().Add(2*wordLost)) == nil && sc.Scan() {
		word, err := parseWord(sc.Bytes())
		if err != nil {
			w.a.log.Warn("word about networks is not understood", "from", host, "error", err)
			return
		}
		w.mu.Lock()
		p, l := w.get(host, link)
		if l.gen != gen {
			w.mu.Unlock()
			return // another connection has taken its place
		}
		changed := time.Since(l.heard) >= wordLost || !reflect.DeepEqual(p.words, word.Bridges)
		l.heard, l.remote, p.words = time.Now(), addr.IP, word.Bridges
		w.mu.Unlock()
		if changed {
			w.change()
		}
	}
}

// parseWord reads one line. What it says can only choose a way, so little has
// to be checked: that there is not too much of it.
func parseWord(line []byte) (netWord, error) {
	var w netWord
	if err := json.Unmarshal(line, &w); err != nil {
		return w, fmt.Errorf("read word: %w", err)
	}
	if w.Version != wordVersion {
		return w, fmt.Errorf("read word: version %d, this host knows %d", w.Version, wordVersion)
	}
	if len(w.Bridges) > 64 {
		return w, fmt.Errorf("read word: %d bridges, at most 64 are possible", len(w.Bridges))
	}
	return w, nil
}
