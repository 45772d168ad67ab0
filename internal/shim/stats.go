package shim

import (
	"sort"
	"sync"
	"time"

	"perdure/internal/model"
)

// window holds the last values of one quantity.
type window struct {
	v [1024]float64
	n int
}

func (w *window) add(x float64) { w.v[w.n%len(w.v)] = x; w.n++ }

func (w *window) quantiles() model.Quantiles {
	n := min(w.n, len(w.v))
	if n == 0 {
		return model.Quantiles{}
	}
	s := append([]float64(nil), w.v[:n]...)
	sort.Float64s(s)
	return model.Quantiles{P50: s[n/2], P99: s[n*99/100]}
}

// checkpointStats collects what the primary measures; safe for concurrent use.
type checkpointStats struct {
	mu                                     sync.Mutex
	interval, pause, pages, bytes, heldFor window
	count                                  uint64
	phase                                  [5]window
	lost                                   time.Duration
	last                                   time.Time
}

// captured notes one checkpoint.
func (c *checkpointStats) captured(e *captured) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.last.IsZero() {
		c.interval.add(ms(e.at.Sub(c.last)))
	}
	pause := e.done.Sub(e.at)
	c.last = e.at
	c.count++
	c.lost += pause
	c.pause.add(ms(pause))
	c.pages.add(float64(e.pages.Pages()))
	for n, d := range []time.Duration{e.phase.stop, e.phase.save, e.phase.flush, e.phase.rest, e.phase.cont} {
		c.phase[n].add(ms(d))
	}
}

func (c *checkpointStats) transferred(bytes int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.bytes.add(float64(bytes))
}

// released notes how long the oldest frame of an epoch was held.
func (c *checkpointStats) released(held time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.heldFor.add(ms(held))
}

func (c *checkpointStats) snapshot() model.CheckpointStats {
	c.mu.Lock()
	defer c.mu.Unlock()
	return model.CheckpointStats{
		Count: c.count, IntervalMS: c.interval.quantiles().P50,
		PauseMS: c.pause.quantiles(), DirtyPages: c.pages.quantiles(),
		TransferBytes: c.bytes.quantiles(), HeldOutputMS: c.heldFor.quantiles(),
		TimeLostMS: ms(c.lost),
		Phases: model.PausePhases{Stop: c.phase[0].quantiles().P50, Save: c.phase[1].quantiles().P50, Flush: c.phase[2].quantiles().P50,
			Rest: c.phase[3].quantiles().P50, Cont: c.phase[4].quantiles().P50},
	}
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
