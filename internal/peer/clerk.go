package peer

import "time"

// slowLink: a link whose round trip is beyond this and beyond three times the
// best one's gets no bulk data, since the row would wait for it.
const slowLink = 8 * time.Millisecond

// hedgeTick is the grain in which the age of frames is looked at.
const hedgeTick = 5 * time.Millisecond

// clerk is the session's only timer: heartbeats, silence, and frames that have
// been on the way for too long. Its lateness never makes anything unsafe, since
// readers and Recv check silence themselves.
func (s *Session) clerk() {
	defer s.wg.Done()
	t := time.NewTimer(0)
	defer t.Stop()
	for {
		select {
		case <-t.C:
		case <-s.kick:
		case <-s.lost:
			return
		}
		s.mu.Lock()
		wait := s.tick(Now())
		s.mu.Unlock()
		t.Reset(wait)
	}
}

// tick does what is due and says when to come again. Under the lock.
func (s *Session) tick(now time.Duration) time.Duration {
	if s.cause != nil || s.checkSilence(now) {
		return time.Hour
	}
	s.patience.settle(now, &s.cfg)
	limit := s.silence()
	next := s.LastHeard() + limit + time.Millisecond
	var best time.Duration = -1
	for _, l := range s.links {
		if !l.up {
			continue
		}
		quiet := now - time.Duration(l.heard.Load())
		if quiet > limit {
			l.drop("silent for "+quiet.Round(time.Millisecond).String(), false)
			continue
		}
		if now >= l.nextPing {
			if !l.pingDue {
				l.pingDue, l.pingAsked = true, now
			}
			l.nextPing = now + s.cfg.Ping
			l.wake.Signal()
		}
		next = min(next, l.nextPing)
		l.pace = l.rtt
		if l.pingOpen != 0 {
			l.pace = max(l.pace, now-l.pingOpen)
		}
		if l.pingDue { // the writer is stuck
			l.pace = max(l.pace, now-l.pingAsked)
		}
		if best < 0 || l.pace < best {
			best = l.pace
		}
	}
	s.rate(best)
	if len(s.out.frames) > 0 {
		s.hedge(now, max(hedgeMin, 4*best))
		next = min(next, now+hedgeTick)
	}
	return max(next-now, 0)
}

// rate decides which links take bulk data. The best one always does.
func (s *Session) rate(best time.Duration) {
	for _, l := range s.links {
		was := l.avoid
		l.avoid = l.up && l.pace > best && l.pace > max(slowLink, 3*best)
		if was && !l.avoid {
			l.wake.Signal()
		}
	}
}

// hedge gives frames that have been on the way for longer than age to the link
// that is best off. A frame is on two links at most, and all that are doubled at
// a time are bounded, so a congested pair of links is never made worse by more
// than hedgeMax.
func (s *Session) hedge(now, age time.Duration) {
	for _, l := range s.links {
		if !l.up {
			continue
		}
		for i := range l.fly {
			e := &l.fly[i]
			if now-e.at <= age {
				break
			}
			f := e.f
			if f.acked || f.links&^(1<<l.idx) != 0 {
				continue
			}
			to := s.other(l)
			n := int64(len(f.buf))
			if to == nil || (!f.hedged && s.out.hedged+n > hedgeMax) {
				return
			}
			if !f.hedged {
				f.hedged = true
				s.out.hedged += n
			}
			to.give(f)
			to.signal()
		}
	}
}

// other returns the fastest link that has room, except l.
func (s *Session) other(l *link) *link {
	var to *link
	for _, o := range s.links {
		if o == l || !o.up || o.avoid || int64(o.sentData-o.ackedData) >= o.cap+hedgeMax {
			continue
		}
		if to == nil || o.pace < to.pace {
			to = o
		}
	}
	return to
}
