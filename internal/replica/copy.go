package replica

import "time"

// Cursor goes over the marked chunks of a disk, in windows that are on their way
// at the same time. It keeps no set: what is marked is the store's bitmap, so a
// crash of either side loses nothing, and a copy that is resumed goes on with
// what is marked still. A chunk that the guest writes while it is on its way is
// marked again and comes by once more.
type Cursor struct {
	at     int64 // next chunk to look at
	flying map[int64]flight
	window int64 // most bytes on their way
	bytes  int64 // on their way
}

type flight struct {
	end   int64
	bytes int64
	again bool // written meanwhile: stays marked
}

// NewCursor returns a cursor that lets at most window bytes be on their way.
func NewCursor(window int64) *Cursor {
	return &Cursor{window: max(window, 1), flying: map[int64]flight{}}
}

// Next returns the next run of marked chunks that is not on its way, and false
// when there is none now: everything marked is on its way, or the window is full.
// find returns the first run of marked chunks at or after a chunk, at most as
// many as the limit says. chunk is the size of a chunk, bytes; at most most
// chunks are returned.
func (c *Cursor) Next(find func(from, limit int64) (start, end int64, ok bool), chunk, most int64) (start, end int64, ok bool) {
	if c.bytes >= c.window {
		return 0, 0, false
	}
	from, wrapped := c.at, c.at == 0
	for {
		start, end, ok = find(from, most)
		if !ok {
			if wrapped {
				return 0, 0, false
			}
			from, wrapped = 0, true
			continue
		}
		if start, end, ok = c.free(start, end); ok {
			c.flying[start] = flight{end: end, bytes: (end - start) * chunk}
			c.bytes += (end - start) * chunk
			c.at = end
			return start, end, true
		}
		from = end
	}
}

// free cuts from a run what is on its way; the run's end is where to look on if
// nothing is left.
func (c *Cursor) free(start, end int64) (int64, int64, bool) {
	for again := true; again; {
		again = false
		for s, f := range c.flying {
			switch {
			case s <= start && start < f.end:
				start, again = f.end, true
			case start < s && s < end:
				end, again = s, true
			}
		}
	}
	if start >= end {
		return start, start, false
	}
	return start, end, true
}

// Written notes that the guest wrote chunks start … end-1. The store marks them
// first.
func (c *Cursor) Written(start, end int64) {
	for s, f := range c.flying {
		if s < end && start < f.end {
			f.again = true
			c.flying[s] = f
		}
	}
}

// Landed notes that the target has the run that begins with start, durably, and
// returns it; its marks may go exactly if clear.
func (c *Cursor) Landed(start int64) (end int64, clear bool) {
	f, ok := c.flying[start]
	if !ok {
		return start, false
	}
	delete(c.flying, start)
	c.bytes -= f.bytes
	return f.end, !f.again
}

// Flying is how many bytes are on their way.
func (c *Cursor) Flying() int64 { return c.bytes }

// Pace says how fast a copy may go beside the guest. While the guest does no I/O
// it goes as fast as it can. Otherwise the rate is halved whenever the guest's
// I/O took longer than it may, and raised by a fixed step when it did not, as TCP
// shares a link; it never falls below a floor, so that a copy ends.
type Pace struct {
	cfg     PaceConfig
	rate    float64 // bytes per second
	credit  float64 // bytes that may go at once
	at      time.Duration
	window  time.Duration // begin of the window of observation
	ios     int
	late    int
	holding bool // a guest was seen that has to be yielded to
}

// PaceConfig bounds a Pace.
type PaceConfig struct {
	Floor   int64         // bytes per second, at least
	Ceiling int64         // bytes per second, at most; 0: no limit
	Limit   time.Duration // what an I/O of the guest may take beside the copy
	Window  time.Duration // of observation
}

// DefaultPace suits local disks and a link of its own.
func DefaultPace() PaceConfig {
	return PaceConfig{Floor: 8 << 20, Limit: 10 * time.Millisecond, Window: 200 * time.Millisecond}
}

// NewPace begins unlimited. Times are since any fixed moment.
func NewPace(cfg PaceConfig, now time.Duration) *Pace {
	p := &Pace{cfg: cfg, at: now, window: now}
	p.rate = p.top()
	return p
}

func (p *Pace) top() float64 {
	if p.cfg.Ceiling > 0 {
		return float64(p.cfg.Ceiling)
	}
	return 16 << 30
}

// GuestIO notes I/O of the guest: how many requests ended, and how many of them
// took longer than Limit.
func (p *Pace) GuestIO(now time.Duration, ios, late int) {
	p.ios += ios
	p.late += late
	p.turn(now)
}

// turn ends a window of observation and draws the conclusion.
func (p *Pace) turn(now time.Duration) {
	if now-p.window < p.cfg.Window {
		return
	}
	floor, top := float64(p.cfg.Floor), p.top()
	switch {
	case p.ios == 0:
		p.rate, p.holding = top, false
	case p.late*20 > p.ios: // one in twenty: the guest's 95th percentile
		if !p.holding { // what the disk really carries is not known yet
			p.rate = min(p.rate, 512<<20)
		}
		p.rate, p.holding = max(p.rate/2, floor), true
	case p.holding:
		p.rate = min(p.rate+max(floor, p.rate/16), top)
	}
	p.rate = min(p.rate, top)
	p.ios, p.late, p.window = 0, 0, now
}

// Rate is what is allowed now, bytes per second.
func (p *Pace) Rate() int64 { return int64(p.rate) }

// Wait takes n bytes and returns how long to wait before they are sent.
func (p *Pace) Wait(now time.Duration, n int64) time.Duration {
	p.turn(now)
	if now > p.at {
		p.credit = min(p.credit+p.rate*(now-p.at).Seconds(), p.rate*p.cfg.Window.Seconds())
		p.at = now
	}
	p.credit -= float64(n)
	if p.credit >= 0 {
		return 0
	}
	return time.Duration(-p.credit / p.rate * float64(time.Second))
}

// Gauge tells how far a copy is and when it ends. What the guest dirties again
// counts against it, so the end is told from how fast the rest shrinks.
type Gauge struct {
	total int64
	left  int64
	sent  int64
	rate  float64 // bytes per second by which the rest shrinks, smoothed
	at    time.Duration
	from  int64 // left at the time at
	begun bool
}

// NewGauge begins with left bytes to copy.
func NewGauge(now time.Duration, left int64) *Gauge {
	return &Gauge{total: left, left: left, at: now, from: left}
}

// At notes what is left, bytes.
func (g *Gauge) At(now time.Duration, left int64) {
	g.left = left
	g.total = max(g.total, left)
	dt := (now - g.at).Seconds()
	if dt < 0.5 {
		return
	}
	r := float64(g.from-left) / dt
	if g.begun {
		r = 0.7*g.rate + 0.3*r
	}
	g.rate, g.begun, g.at, g.from = r, true, now, left
}

// Sent counts bytes that went over the link.
func (g *Gauge) Sent(n int64) { g.sent += n }

// Done, Total and Bytes are what a status shows: bytes done of a total, and what
// went over the link for it.
func (g *Gauge) Done() int64 { return g.total - g.left }

// Total is the most that was ever to be copied, bytes.
func (g *Gauge) Total() int64 { return g.total }

// Bytes is what went over the link.
func (g *Gauge) Bytes() int64 { return g.sent }

// Rate is by how many bytes per second the rest shrinks lately; 0: not known, or it does not.
func (g *Gauge) Rate() int64 { return int64(max(g.rate, 0)) }

// ETA is how long the rest takes, seconds; negative: not known, or the guest
// dirties as fast as is copied.
func (g *Gauge) ETA() float64 {
	switch {
	case g.left == 0:
		return 0
	case !g.begun || g.rate <= 0:
		return -1
	}
	return float64(g.left) / g.rate
}
