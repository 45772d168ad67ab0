package shim

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"perdure/internal/diskcheck"
	"perdure/internal/shimapi"
)

// dryGuest is the guest of a VM of level ft in a dry world: it uses its disk, says
// numbers on its serial line, stands still when its QEMU is stopped, and goes back
// in time when a state of it is loaded. It knows what must not happen then.
//
// Its QEMU holds nothing of it but the number of a state; see hollow.
type dryGuest struct {
	t    *testing.T
	w    *dry
	ln   net.Listener
	work sync.WaitGroup
	ctx  context.Context
	end  context.CancelFunc
	runs []*diskcheck.Run // what it does with its disk

	// gate is held shared by whatever the guest does, and exclusively while it
	// stands still.
	gate sync.RWMutex
	// ctl: one change of where it runs, and whether, at a time.
	ctl    sync.Mutex
	states map[uint64]guestState
	state  uint64 // number of the newest one

	mu                 sync.Mutex
	cur                *guestSeat // where it runs, nil: nowhere
	said               []time.Time
	seen               uint64      // number that was let out last
	void               [][2]uint64 // numbers that were said by a guest that was given up: after, up to
	boots, loads, late int         // how often it began anew, went on elsewhere, and did so while the old one lived
	atStop             func()      // what the guest does yet while its QEMU has not heard that it is to stop; nil: nothing
	rotten             bool        // the images are not what was written to them: as a test did
}

// guestState is the guest at a stop.
type guestState struct {
	said  uint64
	marks []diskcheck.Mark
}

// guestSeat is one QEMU that the guest runs in, ran in, or may come to run in.
type guestSeat struct {
	g        *dryGuest
	h        *dryHost
	life     *dryLife
	incoming bool

	out  sync.Mutex
	enc  *json.Encoder
	dead chan struct{} // closed when the QEMU has gone, or its host

	// Guarded by g.ctl.
	frozen  bool // it holds the gate
	started bool // it has run here

	// Guarded by g.mu.
	running bool
	ghost   bool // the guest runs elsewhere; what is left here does not know
	conns   map[*guestConn]struct{}

	ghostMu sync.Mutex // held by each request of a ghost
	still   bool       // guarded by it: a ghost that stands still
}

func newDryGuest(t *testing.T, w *dry) *dryGuest {
	ln, err := net.Listen("unix", filepath.Join(w.dir, hollowSocket))
	if err != nil {
		t.Fatal(err)
	}
	g := &dryGuest{t: t, w: w, ln: ln, states: map[uint64]guestState{}}
	g.ctx, g.end = context.WithCancel(context.Background())
	g.work.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			stop := context.AfterFunc(g.ctx, func() { c.Close() })
			g.work.Go(func() {
				defer stop()
				g.serve(c)
			})
		}
	})
	g.work.Go(g.talk)
	t.Cleanup(func() {
		g.end()
		ln.Close()
		g.work.Wait()
	})
	return g
}

// serve is one QEMU from its start to its end.
func (g *dryGuest) serve(c net.Conn) {
	defer c.Close()
	d := json.NewDecoder(c)
	var hello lineMessage
	if d.Decode(&hello) != nil || g.w.hosts[filepath.Base(hello.Dir)] == nil {
		return
	}
	h := g.w.hosts[filepath.Base(hello.Dir)]
	s := &guestSeat{g: g, h: h, life: h.now(), incoming: hello.Incoming, enc: json.NewEncoder(c), dead: make(chan struct{}), conns: map[*guestConn]struct{}{}}
	if s.life == nil {
		return // it has lost its power already
	}
	asked := make(chan lineMessage)
	g.work.Go(func() {
		defer close(asked)
		for {
			var m lineMessage
			if d.Decode(&m) != nil {
				return
			}
			select {
			case asked <- m:
			case <-s.dead:
				return
			}
		}
	})
	s.tell(lineMessage{Do: "hello"})
	// Where the host is gone nothing counts any more, whatever its processes do yet.
	died := sync.OnceFunc(func() {
		close(s.dead)
		s.cut()
		c.Close()
	})
	defer died()
	g.work.Go(func() {
		select {
		case <-s.life.over:
			died()
		case <-s.dead:
		}
	})
	answers := make(chan lineMessage, 1)
	g.work.Go(func() {
		defer close(answers)
		for m := range asked {
			a := lineMessage{Do: m.Do}
			switch m.Do {
			case "stop":
				a.State = s.stop()
			case "cont":
				s.cont()
			case "load":
				if err := s.load(m.State); err != nil {
					a.Error = err.Error()
				}
			}
			s.tell(a)
		}
		died()
		s.leave()
	})
	for range answers { // until it has ended
	}
}

func (s *guestSeat) tell(m lineMessage) {
	s.out.Lock()
	defer s.out.Unlock()
	_ = s.enc.Encode(m) // a QEMU that is gone is noticed by reading
}

// stop makes the guest stand still, with nothing under way, and gives its state a number.
func (s *guestSeat) stop() uint64 {
	g := s.g
	g.mu.Lock()
	yet := g.atStop
	g.mu.Unlock()
	if yet != nil && !s.isGhost() {
		yet()
	} else if rand.IntN(4) == 0 {
		time.Sleep(time.Duration(rand.Int64N(int64(2 * time.Millisecond)))) // QEMU hears it when it hears it
	}
	g.ctl.Lock()
	defer g.ctl.Unlock()
	if s.isGhost() {
		s.ghostMu.Lock()
		defer s.ghostMu.Unlock()
		s.still = true
		return 0
	}
	s.freeze()
	g.mu.Lock()
	s.running = false
	st := guestState{said: uint64(len(g.said))}
	g.mu.Unlock()
	for _, r := range g.runs {
		st.marks = append(st.marks, r.Mark())
	}
	g.state++
	g.states[g.state] = st
	delete(g.states, g.state-5000)
	return g.state
}

// freeze takes the gate. ctl is held.
func (s *guestSeat) freeze() {
	if !s.frozen {
		s.g.gate.Lock()
		s.frozen = true
	}
}

func (s *guestSeat) thaw() {
	if s.frozen {
		s.frozen = false
		s.g.gate.Unlock()
	}
}

// cont lets the guest run here.
func (s *guestSeat) cont() {
	g := s.g
	g.ctl.Lock()
	defer g.ctl.Unlock()
	if s.isGhost() {
		s.ghostMu.Lock()
		defer s.ghostMu.Unlock()
		s.still = false
		return
	}
	if !s.incoming && !s.started {
		s.boot()
	}
	if !s.started {
		s.started = true
		g.work.Go(s.listen)
	}
	g.mu.Lock()
	s.running = true
	g.mu.Unlock()
	s.thaw()
}

// leave is the end of a QEMU.
func (s *guestSeat) leave() {
	g := s.g
	g.ctl.Lock()
	defer g.ctl.Unlock()
	g.mu.Lock()
	s.running = false
	if g.cur == s {
		g.cur = nil
	}
	g.mu.Unlock()
	s.thaw()
}

func (s *guestSeat) isGhost() bool {
	s.g.mu.Lock()
	defer s.g.mu.Unlock()
	return s.ghost
}

// take makes s the guest's seat, and leaves it frozen. What the guest did at the
// old one and was not answered, never will be. ctl is not held, and is when it returns.
func (s *guestSeat) take() {
	g := s.g
	g.mu.Lock()
	old := g.cur
	if g.cur = s; old != nil && old != s {
		old.ghost = true
	}
	g.mu.Unlock()
	if old != nil && old != s {
		old.cut() // or a stop under way there would wait for ever
	}
}

// from has the gate go over from an old seat. ctl is held.
func (s *guestSeat) from(old *guestSeat) {
	if old != nil && old.frozen {
		old.frozen, s.frozen = false, true
		old.ghostMu.Lock()
		old.still = true
		old.ghostMu.Unlock()
	}
	s.freeze()
}

// load brings the guest back to a state.
func (s *guestSeat) load(state uint64) error {
	g := s.g
	g.mu.Lock()
	old := g.cur
	g.mu.Unlock()
	s.take()
	g.ctl.Lock()
	defer g.ctl.Unlock()
	s.from(old)
	st, ok := g.states[state]
	if !ok {
		err := fmt.Errorf("state %d is loaded, which is of a guest that was given up, or too old; the newest is %d", state, g.state)
		g.t.Error(err)
		return err
	}
	for n := range g.states {
		if n > state {
			delete(g.states, n)
		}
	}
	g.mu.Lock()
	g.loads++
	if g.seen > st.said {
		g.t.Errorf("the guest goes on as of output %d, and output %d was seen already", st.said, g.seen)
	}
	g.giveUp(st.said)
	rotten := g.rotten
	g.mu.Unlock()
	var errs []error
	for n, r := range g.runs {
		errs = append(errs, r.RollBack(st.marks[n]))
	}
	if err := g.look(s.h); !rotten && !closed(s.life.over) { // else what was looked at is no disk
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		g.t.Errorf("takeover by host %s: %v", s.h.name, err)
	}
	if old != nil && !closed(old.dead) {
		g.mu.Lock()
		g.late++
		g.mu.Unlock()
		g.work.Go(old.haunt)
	}
	return nil
}

// giveUp makes the numbers void that were said after one. mu is held.
func (g *dryGuest) giveUp(after uint64) {
	if last := uint64(len(g.said)); last > after {
		g.void = append(g.void, [2]uint64{after, last})
	}
}

// look checks the images when the guest has gone to a host: nothing that was undone
// is in place on either, and this one's is what the guest had when it was stopped.
func (g *dryGuest) look(h *dryHost) error {
	var errs []error
	for _, x := range []*dryHost{h, h.other()} {
		p, err := x.image()
		if err != nil {
			if x == h {
				errs = append(errs, err)
			}
			continue // it is just losing its power, or has no replica yet
		}
		for _, r := range g.runs {
			if err := r.Undone(p); err != nil {
				errs = append(errs, fmt.Errorf("the image of host %s: %w", x.name, err))
			}
			if x == h {
				r.Saw(p)
			}
		}
	}
	return errors.Join(errs...)
}

// boot begins the guest anew, from its disk. ctl is held.
func (s *guestSeat) boot() {
	g := s.g
	g.mu.Lock()
	old := g.cur
	g.mu.Unlock()
	s.take()
	s.from(old)
	g.mu.Lock()
	defer g.mu.Unlock()
	g.boots++
	clear(g.states)
	if g.boots == 1 {
		return
	}
	if old != nil && !closed(old.dead) {
		g.t.Errorf("the guest begins anew on host %s while it runs on host %s", s.h.name, old.h.name)
	}
	var last time.Time // what was done until then, has been seen
	if g.seen > 0 {
		last = g.said[g.seen-1]
	}
	g.giveUp(g.seen)
	p, err := s.h.image()
	if err != nil && closed(s.life.over) {
		return // it has just lost its power again
	}
	if err != nil {
		g.t.Errorf("boot on host %s: %v", s.h.name, err)
		return
	}
	for _, r := range g.runs {
		if err := r.Undone(p); err != nil {
			g.t.Errorf("boot on host %s: %v", s.h.name, err)
		}
		if t := r.Survived(p); t.After(last) {
			last = t
		}
	}
	for _, r := range g.runs {
		r.Lost(last, p)
	}
}

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// talk says a number now and then.
func (g *dryGuest) talk() {
	for g.ctx.Err() == nil {
		sleep(g.ctx, time.Duration(rand.Int64N(int64(20*time.Millisecond))))
		g.speak()
	}
}

func (g *dryGuest) speak() {
	g.gate.RLock()
	defer g.gate.RUnlock()
	g.mu.Lock()
	s := g.cur
	if s == nil || !s.running {
		g.mu.Unlock()
		return
	}
	g.said = append(g.said, time.Now())
	n := len(g.said)
	g.mu.Unlock()
	s.tell(lineMessage{Say: fmt.Sprintf("t%d\n", n)})
}

// listen follows what is let out of the guest at s.
func (s *guestSeat) listen() {
	g := s.g
	ctx, stop := context.WithCancel(g.ctx)
	defer stop()
	g.work.Go(func() {
		select {
		case <-s.dead:
			stop()
		case <-ctx.Done():
		}
	})
	for ctx.Err() == nil {
		c := shimapi.NewShimClient(filepath.Join(s.h.dir, shimapi.SocketFile))
		conn, err := c.Console(ctx)
		if err != nil {
			sleep(ctx, 5*time.Millisecond)
			continue
		}
		end := context.AfterFunc(ctx, func() { conn.Close() })
		for r := bufio.NewReader(conn); ; {
			line, err := r.ReadString('\n')
			if err != nil {
				break
			}
			var n uint64
			if k, _ := fmt.Sscanf(line, "t%d\n", &n); k == 1 && strings.HasPrefix(line, "t") && !closed(s.dead) && !closed(s.life.over) {
				g.see(n)
			}
		}
		end()
		conn.Close()
		c.Close()
	}
}

// see notes that a number was let out.
func (g *dryGuest) see(n uint64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if n == 0 || n > uint64(len(g.said)) {
		g.t.Errorf("output %d was let out, which nobody has said", n)
		return
	}
	for _, v := range g.void {
		if n > v[0] && n <= v[1] {
			g.t.Errorf("output %d was let out, which was said by a guest that was given up", n)
		}
	}
	g.seen = max(g.seen, n)
}

// committed waits until all that the guest has done by now was seen.
func (g *dryGuest) committed(d time.Duration) error {
	var goal uint64
	for end := time.Now().Add(d); ; time.Sleep(2 * time.Millisecond) {
		g.mu.Lock()
		undone := slices.ContainsFunc(g.void, func(v [2]uint64) bool { return goal > v[0] && goal <= v[1] })
		if goal == 0 || undone {
			goal = uint64(len(g.said)) + 1
		}
		done := g.seen >= goal
		seen := g.seen
		g.mu.Unlock()
		if done {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("output %d was not let out within %v, the last is %d", goal, d, seen)
		}
	}
}

// haunt is what is left of the guest at a seat that it was taken from.
func (s *guestSeat) haunt() {
	g := s.g
	ctx, stop := context.WithCancel(g.ctx)
	defer stop()
	g.work.Go(func() {
		select {
		case <-s.dead:
			stop()
		case <-ctx.Done():
		}
	})
	nc, err := net.Dial("unix", filepath.Join(s.h.dir, "nbd.sock"))
	if err != nil {
		return
	}
	_ = g.runs[rand.IntN(len(g.runs))].Haunt(ctx, nc, func(request func()) error {
		for {
			s.ghostMu.Lock()
			if !s.still {
				break
			}
			s.ghostMu.Unlock()
			sleep(ctx, time.Millisecond)
			if ctx.Err() != nil {
				return ctx.Err()
			}
		}
		request()
		g.mu.Lock()
		g.said = append(g.said, time.Now())
		n := uint64(len(g.said))
		g.void = append(g.void, [2]uint64{n - 1, n})
		g.mu.Unlock()
		s.tell(lineMessage{Say: fmt.Sprintf("t%d\n", n)})
		s.ghostMu.Unlock()
		sleep(ctx, time.Millisecond)
		return ctx.Err()
	})
}

// fail tells the QEMU that a disk has answered with an error.
func (g *dryGuest) fail() {
	g.mu.Lock()
	s := g.cur
	g.mu.Unlock()
	if s != nil {
		s.tell(lineMessage{Fail: true})
	}
}

// guestConn is one connection of the guest to its disk, which ends with the QEMU.
type guestConn struct {
	net.Conn
	s *guestSeat
}

func (c *guestConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if closed(c.s.life.over) { // nobody has heard it
		return 0, net.ErrClosed
	}
	return n, err
}

func (c *guestConn) Close() error {
	c.s.g.mu.Lock()
	delete(c.s.conns, c)
	c.s.g.mu.Unlock()
	return c.Conn.Close()
}

// cut ends all connections at a seat.
func (s *guestSeat) cut() {
	s.g.mu.Lock()
	var all []net.Conn
	for c := range s.conns {
		all = append(all, c.Conn)
	}
	s.g.mu.Unlock()
	for _, c := range all {
		_ = c.Close()
	}
}

// dial connects to the disk where the guest runs, once it does.
func (g *dryGuest) dial(ctx context.Context) (net.Conn, error) {
	for ; ctx.Err() == nil; sleep(ctx, time.Millisecond) {
		g.mu.Lock()
		s := g.cur
		ok := s != nil && s.running && !closed(s.dead)
		g.mu.Unlock()
		if !ok {
			continue
		}
		nc, err := net.Dial("unix", filepath.Join(s.h.dir, "nbd.sock"))
		if err != nil {
			continue
		}
		c := &guestConn{nc, s}
		g.mu.Lock()
		if ok = g.cur == s && !closed(s.dead); ok {
			s.conns[c] = struct{}{}
		}
		g.mu.Unlock()
		if ok {
			return c, nil
		}
		_ = nc.Close()
	}
	return nil, ctx.Err()
}

// quiet checks that nothing that was undone is left anywhere, while the guest does
// nothing with its disk and both replicas are good, and waits until all was seen.
func (g *dryGuest) quiet(d time.Duration) error {
	for _, h := range g.w.hosts {
		p, err := h.image()
		if err != nil {
			return err
		}
		for _, r := range g.runs {
			if err := r.Undone(p); err != nil {
				return fmt.Errorf("the image of host %s: %w", h.name, err)
			}
		}
	}
	return g.committed(d)
}

// account says what the guest has been through.
func (g *dryGuest) account() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.t.Logf("the guest was stopped %d times, went on elsewhere %d times, in %d of them while the old one lived, and began anew %d times; of %d outputs %d were let out last",
		g.state, g.loads, g.late, g.boots-1, len(g.said), g.seen)
}
