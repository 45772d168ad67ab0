package mirror

import "context"

// StartWrite begins to write p on both sides, and calls done once it is answered, from
// any goroutine, possibly before StartWrite returns; until then p must not change. It returns false, with
// nothing begun, if it would have to wait for another request or cannot tell: WriteAt does
// it then. done must neither block nor call the Source. ctx is as for WriteAt.
//
// A client that has one request under way at a time is answered sooner by whoever
// hears of the peer's answer than by a goroutine that has to be woken for it.
func (e *Export) StartWrite(ctx context.Context, p []byte, off int64, done func(error)) bool {
	s := e.s
	if !s.gate.TryRLock() {
		return false
	}
	y := &stay{s: s}
	l, o := s.link.Load(), e.overlap.Load()
	var held *held
	if l != nil && !s.isClosed() {
		held = o.tryLock(off, off+int64(len(p)))
	}
	if held == nil {
		y.leave()
		return false
	}
	end := func(err error) {
		o.unlock(held)
		y.leave()
		done(err)
	}
	here := e.local.Load() // after the lock, see copyPiece
	var q *pending
	if here.r != nil && !o.abandoned() {
		q, _ = l.begin(ctx, head{Op: opWrite, Disk: uint32(e.n.Load()), Off: off, Len: int64(len(p))}, p, nil)
	}
	if q == nil {
		o.unlock(held)
		y.leave()
		return false
	}
	err := e.in(y, here, func(r Replica) error { return r.WriteAt(ctx, p, off, false) })
	switch {
	case err == nil:
		s.then(l, q, end)
	case !e.lose(here, err):
		end(err)
	default:
		go func() { end(s.await(ctx, l, q, false, err, nil)) }()
	}
	return true
}

func (s *Source) isClosed() bool {
	select {
	case <-s.closed:
		return true
	default:
		return false
	}
}

// then has f called when the peer has carried p out, which this side has; or does not
// count any more; or with ErrClosed. It is await without a goroutine.
func (s *Source) then(l *link, p *pending, f func(error)) {
	l.mu.Lock()
	over := l.waiting[p.id] != p
	if !over {
		p.then = f
	}
	l.mu.Unlock()
	if over {
		f(nil)
		return
	}
	// Whoever ends the link or the Source calls those that it finds; this one may have come too late for that.
	select {
	case <-l.alone:
		l.callAll(nil)
	default:
	}
	if s.isClosed() {
		l.callAll(ErrClosed)
	}
}

// callAll calls those that wait for an answer without a goroutine, each once.
func (l *link) callAll(err error) {
	var list []func(error)
	l.mu.Lock()
	for _, p := range l.waiting {
		if p.then != nil {
			list = append(list, p.then)
			p.then = nil
		}
	}
	l.mu.Unlock()
	for _, f := range list {
		f(err)
	}
}

// tryLock is lock where that need not wait; else nil.
func (r *ranges) tryLock(start, end int64) *held {
	e := &held{start: start, end: end}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.over || r.blocked(e, len(r.list)) {
		return nil
	}
	r.list = append(r.list, e)
	return e
}
