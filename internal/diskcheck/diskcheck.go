package diskcheck

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Config of a Run. Zero values are good but for Dial and Export.
type Config struct {
	// Dial connects to the NBD server. It is called again whenever a connection was
	// lost, and may go to another place then.
	Dial   func(ctx context.Context) (net.Conn, error)
	Export string

	Seed  uint64
	Unit  int   // bytes of one register; 0: 4096. 512 where power is lost: a disk may tear a block
	Units int   // registers that are used; few means much contention; 0: 64
	Start int64 // offset of the first one
	Span  int   // registers that one request covers at most; 0: 4
	Depth int   // requests under way on one connection; 0: 8
	Conns int   // connections; 0: 1

	// Gate, if given, is held shared by each request from before it is sent until it
	// was noted. Who holds it exclusively has a guest that stands still with nothing under way.
	Gate *sync.RWMutex
}

func (c Config) withDefaults() Config {
	if c.Gate == nil {
		c.Gate = new(sync.RWMutex)
	}
	for p, v := range map[*int]int{&c.Unit: 4096, &c.Units: 64, &c.Span: 4, &c.Depth: 8, &c.Conns: 1} {
		if *p <= 0 {
			*p = v
		}
	}
	return c
}

// Stats count what a Run did.
type Stats struct {
	Reads, Writes, Flushes int64 // answered without error
	Errors                 int64 // answered with an error
	Lost                   int64 // not answered
	Dials                  int64
}

// Run is one history of one disk.
type Run struct {
	cfg   Config
	start time.Time
	stats [6]atomic.Int64
	value atomic.Uint64 // the last pattern that was handed out
	rest  atomic.Bool

	ghosts atomic.Uint64 // patterns of guests that were given up

	mu      sync.Mutex
	units   [][]entry // by unit, in no order
	flushes []entry
	losses  []entry
	moves   []entry
	from    int64 // when this history begins
	past    *past // what was before, if it was settled
	undone  []span
	rolls   int // how often it was rolled back
}

// New returns a Run without history.
func New(c Config) *Run {
	c = c.withDefaults()
	return &Run{cfg: c, start: time.Now(), units: make([][]entry, c.Units)}
}

// Stats of the Run so far.
func (r *Run) Stats() Stats {
	n := func(i int) int64 { return r.stats[i].Load() }
	return Stats{n(0), n(1), n(2), n(3), n(4), n(5)}
}

func (r *Run) now() int64 { return int64(time.Since(r.start)) }

// Load makes random requests until n of them were answered, or ctx ends. A lost
// connection is dialled again; Load fails when Dial does, unless ctx has ended.
func (r *Run) Load(ctx context.Context, n int) error {
	var left atomic.Int64
	left.Store(int64(n))
	errs := make(chan error, r.cfg.Conns)
	for k := range r.cfg.Conns {
		go func() { errs <- r.loadOne(ctx, k, &left) }()
	}
	var err error
	for range r.cfg.Conns {
		err = errors.Join(err, <-errs)
	}
	return err
}

// Rest lets each Load return once what is under way was answered; Rest(false)
// comes before the next one.
func (r *Run) Rest(on bool) { r.rest.Store(on) }

// loadOne is one connection of a Load, over all its lives.
func (r *Run) loadOne(ctx context.Context, k int, left *atomic.Int64) error {
	for left.Load() > 0 && ctx.Err() == nil && !r.rest.Load() {
		c, err := r.dial(ctx)
		if err != nil {
			if ctx.Err() != nil {
				return nil //nolint:nilerr // the load was told to end
			}
			return err
		}
		stop := context.AfterFunc(ctx, c.close)
		life := uint64(r.stats[5].Load())
		var depth sync.WaitGroup
		for d := range r.cfg.Depth {
			rnd := rand.New(rand.NewPCG(r.cfg.Seed, uint64(k)<<48|uint64(d)<<32|life))
			depth.Go(func() {
				for left.Load() > 0 && !r.rest.Load() {
					err := r.one(c, rnd)
					if errors.Is(err, errLost) {
						return
					}
					left.Add(-1)
				}
			})
		}
		depth.Wait()
		stop()
		c.close()
	}
	return nil
}

func (r *Run) dial(ctx context.Context) (*client, error) {
	r.stats[5].Add(1)
	nc, err := r.cfg.Dial(ctx)
	if err != nil {
		return nil, fmt.Errorf("dial the disk: %w", err)
	}
	return attach(nc, r.cfg.Export)
}

// one makes one random request and notes it.
func (r *Run) one(c *client, rnd *rand.Rand) error {
	at, n := rnd.IntN(r.cfg.Units), 1+rnd.IntN(r.cfg.Span)
	n = min(n, r.cfg.Units-at)
	var flags uint16
	if rnd.IntN(16) == 0 {
		flags = flagFUA
	}
	switch p := rnd.IntN(100); {
	case p < 45:
		return r.read(c, at, n)
	case p < 90:
		return r.write(c, cmdWrite, flags, at, n)
	case p < 93:
		return r.write(c, cmdTrim, flags, at, n)
	case p < 96:
		return r.write(c, cmdWriteZeroes, flags, at, n)
	default:
		return r.flush(c)
	}
}

// ReadAll reads every unit once, on a connection of its own, and notes it. It is
// called at the end, and wherever all must be legible.
func (r *Run) ReadAll(ctx context.Context) error {
	c, err := r.dial(ctx)
	if err != nil {
		return err
	}
	defer c.close()
	defer context.AfterFunc(ctx, c.close)()
	for u := range r.cfg.Units {
		if err := r.read(c, u, 1); err != nil {
			return fmt.Errorf("read unit %d: %w", u, err)
		}
	}
	return nil
}

// WriteAll writes every unit once, with one request, on a connection of its own,
// and notes it. It fails when the request does.
func (r *Run) WriteAll(ctx context.Context) error {
	c, err := r.dial(ctx)
	if err != nil {
		return err
	}
	defer c.close()
	defer context.AfterFunc(ctx, c.close)()
	return r.write(c, cmdWrite, 0, 0, r.cfg.Units)
}

// Settle reads every unit, flushes, and checks the history up to here, as Check
// does; then the history begins anew with what was read, so that long runs stay
// cheap to check. Nothing is under way, and what was not answered must not be
// able to happen any more: if it does, the next check finds it.
func (r *Run) Settle(ctx context.Context, limit time.Duration) error {
	c, err := r.dial(ctx)
	if err != nil {
		return err
	}
	defer c.close()
	defer context.AfterFunc(ctx, c.close)()
	r.mu.Lock()
	rolls := r.rolls
	for _, h := range r.units {
		for i := range h {
			if h[i].kind == writeOf && h[i].ret == never {
				h[i].maybe, h[i].ret = true, max(r.now(), h[i].call)
			}
		}
	}
	r.mu.Unlock()
	for u := range r.cfg.Units {
		if err := r.read(c, u, 1); err != nil {
			return fmt.Errorf("read unit %d: %w", u, err)
		}
	}
	if err := r.flush(c); err != nil {
		return fmt.Errorf("flush: %w", err)
	}
	if err := r.Check(limit); err != nil {
		return err
	}
	r.cfg.Gate.RLock() // not while the guest is taken elsewhere
	defer r.cfg.Gate.RUnlock()
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.rolls != rolls {
		return nil // the reads of just now are undone: the history goes on
	}
	r.past = &past{units: slices.Clone(r.units), flushes: r.flushes, losses: r.losses, moves: r.moves, from: r.from, to: r.now()}
	for u, h := range r.units {
		last := h[len(h)-1] // the read of just now
		r.units[u] = []entry{{kind: writeOf, value: last.value, call: last.call, ret: last.ret, durable: true}}
	}
	r.flushes, r.losses, r.moves = nil, nil, nil
	r.from = r.past.to
	return nil
}

// PowerLost notes that everything which was not flushed may be gone. No request
// is under way.
func (r *Run) PowerLost() {
	r.mu.Lock()
	defer r.mu.Unlock()
	t := r.now()
	r.losses = append(r.losses, entry{kind: lossOf, call: t, ret: r.now()})
}

// TakenOver notes that the disk is served by another instance, since some time
// between from and now: what was answered is there, and of what was not, even
// where somebody had read it, any part, as after a reboot. It is called before
// the new instance is used; requests may be under way.
func (r *Run) TakenOver(from time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.moves = append(r.moves, entry{kind: moveOf, call: int64(from.Sub(r.start)), ret: r.now()})
}

func (r *Run) offset(unit int) int64 { return r.cfg.Start + int64(unit)*int64(r.cfg.Unit) }

func (r *Run) read(c *client, at, n int) error {
	r.cfg.Gate.RLock()
	defer r.cfg.Gate.RUnlock()
	p := make([]byte, n*r.cfg.Unit)
	call := r.now()
	err := c.do(cmdRead, 0, r.offset(at), len(p), nil, p)
	ret := r.now()
	if r.count(0, err) {
		r.note(at, n, func(u int) entry {
			v := decode(p[(u-at)*r.cfg.Unit:][:r.cfg.Unit], u)
			return entry{kind: readOf, value: v, call: call, ret: ret}
		})
	}
	return err
}

func (r *Run) write(c *client, cmd, flags uint16, at, n int) error {
	r.cfg.Gate.RLock()
	defer r.cfg.Gate.RUnlock()
	var v uint64
	var p []byte
	if cmd == cmdWrite {
		v = r.value.Add(1)
		p = make([]byte, n*r.cfg.Unit)
		for u := range n {
			encode(p[u*r.cfg.Unit:][:r.cfg.Unit], at+u, v)
		}
	}
	r.mu.Lock()
	moves := len(r.moves)
	r.mu.Unlock()
	call := r.now()
	err := c.do(cmd, flags, r.offset(at), n*r.cfg.Unit, p, nil)
	e := entry{kind: writeOf, value: v, call: call, ret: r.now(), durable: flags&flagFUA != 0, moves: moves}
	if !r.count(1, err) {
		e.durable = false
		if e.maybe = !errors.Is(err, errLost); !e.maybe {
			e.ret = never
		}
	}
	r.note(at, n, func(int) entry { return e })
	return err
}

func (r *Run) flush(c *client) error {
	r.cfg.Gate.RLock()
	defer r.cfg.Gate.RUnlock()
	call := r.now()
	err := c.do(cmdFlush, 0, 0, 0, nil, nil)
	ret := r.now()
	if r.count(2, err) {
		r.mu.Lock()
		r.flushes = append(r.flushes, entry{kind: flushOf, call: call, ret: ret})
		r.mu.Unlock()
	}
	return err
}

// count keeps the statistics; true when the request was answered and is good.
func (r *Run) count(kind int, err error) bool {
	switch {
	case err == nil:
		r.stats[kind].Add(1)
	case errors.Is(err, errLost):
		r.stats[4].Add(1)
	default:
		r.stats[3].Add(1)
	}
	return err == nil
}

func (r *Run) note(at, n int, of func(u int) entry) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for u := at; u < at+n; u++ {
		r.units[u] = append(r.units[u], of(u))
	}
}

// torn is the value of a unit that holds no pattern of its own, whole.
const torn = ^uint64(0)

// encode fills p with a pattern that tells the unit and the write.
func encode(p []byte, unit int, v uint64) {
	for i := 0; i < len(p); i += 16 {
		binary.BigEndian.PutUint64(p[i:], v)
		binary.BigEndian.PutUint64(p[i+8:], uint64(unit)<<32|uint64(i))
	}
}

// decode returns which write a unit holds: 0 for zeroes, torn for what no write left.
func decode(p []byte, unit int) uint64 {
	v := binary.BigEndian.Uint64(p)
	for i := 0; i < len(p); i += 16 {
		want := uint64(unit)<<32 | uint64(i)
		if v == 0 {
			want = 0
		}
		if binary.BigEndian.Uint64(p[i:]) != v || binary.BigEndian.Uint64(p[i+8:]) != want {
			return torn
		}
	}
	return v
}
