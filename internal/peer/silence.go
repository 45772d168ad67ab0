package peer

import (
	"fmt"
	"sync/atomic"
	"time"
)

// gapSpan is how long a gap between signs of life is remembered, once or twice over.
const gapSpan = 10 * time.Second

// patience is how long the peer may be silent. It stretches with the gaps seen
// lately, within Config.Silence and Config.MaxSilence. The session's lock
// protects the gaps; limit may be read without.
type patience struct {
	limit  atomic.Int64
	recent time.Duration // longest gap since since
	before time.Duration // longest gap in the span before
	since  time.Duration
}

// note takes a gap that ended now.
func (p *patience) note(gap, now time.Duration, cfg *Config) {
	p.recent = max(p.recent, gap)
	p.settle(now, cfg)
}

// settle forgets old gaps and fixes the limit.
func (p *patience) settle(now time.Duration, cfg *Config) {
	if now-p.since > gapSpan {
		p.before, p.recent, p.since = p.recent, 0, now
	}
	gap := max(p.recent, p.before)
	p.limit.Store(int64(max(cfg.Silence, min(4*gap, cfg.MaxSilence))))
}

// silence returns how long the peer may be silent now.
func (s *Session) silence() time.Duration { return time.Duration(s.patience.limit.Load()) }

// hear notes a sign of life and reports whether it may be believed: not if the
// session was silent for too long before it. A process that was frozen must not
// take what waits in its sockets for a peer that lives.
func (s *Session) hear(now time.Duration) bool {
	gap := now - s.LastHeard()
	// The usual case must not take the lock: every read of every link comes here.
	if gap > 2*s.cfg.Ping {
		s.mu.Lock()
		if s.cause != nil || s.checkSilence(now) {
			s.mu.Unlock()
			return false
		}
		s.patience.note(gap, now, &s.cfg)
		s.mu.Unlock()
	}
	later(&s.heard, now)
	return true
}

// checkSilence loses the session if nothing was heard for too long. It is
// called under the lock, with a time read just before, wherever something that
// was received is about to be believed. Invariant: nothing is handed out whose
// predecessor on the wire is older than the limit.
func (s *Session) checkSilence(now time.Duration) bool {
	quiet := now - s.LastHeard()
	if quiet <= s.silence() {
		return false
	}
	detail := fmt.Sprintf("nothing heard for %v", quiet.Round(time.Millisecond))
	s.lose(&LostError{Cause: CauseSilent, Detail: detail}, codeSilent, detail)
	return true
}

// later moves a time forward only.
func later(at *atomic.Int64, now time.Duration) {
	for {
		old := at.Load()
		if int64(now) <= old || at.CompareAndSwap(old, int64(now)) {
			return
		}
	}
}
