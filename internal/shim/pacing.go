package shim

import (
	"context"
	"math/bits"
	"sync"
	"sync/atomic"
	"time"

	"perdure/internal/blockstore"
	"perdure/internal/replica"
)

// latencyMeter counts the disk requests of the guest, and those that took longer
// than they may beside a copy. What they take when nothing is copied sets the measure:
// a disk that is slow by itself must not hold a copy up for ever.
type latencyMeter struct {
	ios, late atomic.Int64
	limit     atomic.Int64 // nanoseconds
	busy      atomic.Int32 // copies under way: what requests take now is no measure

	mu     sync.Mutex
	counts [24]int64 // of requests without a copy, by the length of their time in µs
	total  int64
}

// Bounds of what a request may take beside a copy; in between it is twice what nineteen
// of twenty take without.
const (
	minLatencyLimit = 10 * time.Millisecond
	maxLatencyLimit = 250 * time.Millisecond
	meterMemory     = 8192 // requests after which those before count half
)

// took notes a request of the guest; nbd.Options.Took.
func (m *latencyMeter) took(d time.Duration) {
	m.ios.Add(1)
	if l := m.limit.Load(); l > 0 && int64(d) > l {
		m.late.Add(1)
	}
	if m.busy.Load() > 0 {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.counts[min(bits.Len64(uint64(d.Microseconds())), len(m.counts)-1)]++
	if m.total++; m.total < meterMemory {
		return
	}
	m.total = 0
	for i := range m.counts {
		m.counts[i] /= 2
		m.total += m.counts[i]
	}
}

// allowed is what a request may take beside a copy.
func (m *latencyMeter) allowed() time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	rest := m.total / 20
	for i := len(m.counts) - 1; i > 0; i-- {
		if rest -= m.counts[i]; rest < 0 {
			return min(max(2*(time.Microsecond<<i), minLatencyLimit), maxLatencyLimit)
		}
	}
	return minLatencyLimit
}

// governor lets a copy or a verify go as fast as the guest's requests allow: at
// full speed (or the ceiling) while the guest does nothing, slower when its requests
// take long, never below a floor. A nil governor lets everything go.
type governor struct {
	m     *latencyMeter
	begun time.Time

	mu        sync.Mutex
	pace      *replica.Pace
	ios, late int64 // of m, as far as pace was told
}

// newGovernor begins a copy; its end is close. ceiling: bytes per second, 0: none.
func newGovernor(m *latencyMeter, floor, ceiling int64) *governor {
	if m == nil {
		return nil
	}
	cfg := replica.DefaultPace()
	if floor > 0 {
		cfg.Floor = floor
	}
	cfg.Ceiling = ceiling
	cfg.Limit = m.allowed()
	m.limit.Store(int64(cfg.Limit))
	m.busy.Add(1)
	return &governor{m: m, begun: time.Now(), pace: replica.NewPace(cfg, 0), ios: m.ios.Load(), late: m.late.Load()}
}

func (g *governor) close() {
	if g != nil {
		g.m.busy.Add(-1)
	}
}

// wait takes n bytes and waits until they may go.
func (g *governor) wait(ctx context.Context, n int64) error {
	for g != nil {
		d := g.debt(n)
		if d <= 0 {
			break
		}
		// In short steps: the guest may fall quiet meanwhile.
		sleep(ctx, min(d, replica.DefaultPace().Window))
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		n = 0
	}
	return nil
}

func (g *governor) debt(n int64) time.Duration {
	g.mu.Lock()
	defer g.mu.Unlock()
	now := time.Since(g.begun)
	ios, late := g.m.ios.Load(), g.m.late.Load()
	g.pace.GuestIO(now, int(ios-g.ios), int(late-g.late))
	g.ios, g.late = ios, late
	return g.pace.Wait(now, n)
}

// chunksAtOnce is how many chunks may be read at once, at most most: fewer while the
// guest is yielded to, since what is read at once on the other host is not paced there.
func (g *governor) chunksAtOnce(most int) int {
	if g == nil {
		return most
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	n := g.pace.Rate() / int64(time.Second/atOnce) / blockstore.ChunkSize
	return int(min(max(n, 1), int64(most)))
}

// atOnce is how long what is read at once may take at the pace that is held.
const atOnce = 50 * time.Millisecond
