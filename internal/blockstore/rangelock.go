package blockstore

import "sync"

// rangeLock serialises requests whose byte ranges overlap, in the order in
// which they came. It is meant for some tens of requests at a time.
type rangeLock struct {
	mu   sync.Mutex
	list []*rangeEntry // in order of arrival, waiting and running
	free []*rangeEntry
}

type rangeEntry struct {
	start, end int64
	wake       chan struct{} // holds a token when the entry may run
	waiting    bool
}

// lock waits until no earlier request overlaps start … end-1.
func (l *rangeLock) lock(start, end int64) *rangeEntry {
	l.mu.Lock()
	var e *rangeEntry
	if n := len(l.free); n > 0 {
		e, l.free = l.free[n-1], l.free[:n-1]
	} else {
		e = &rangeEntry{wake: make(chan struct{}, 1)}
	}
	e.start, e.end = start, end
	e.waiting = l.blocked(e, len(l.list))
	l.list = append(l.list, e)
	wait := e.waiting
	l.mu.Unlock()
	if wait {
		<-e.wake
	}
	return e
}

// blocked reports whether one of the first n entries overlaps e.
func (l *rangeLock) blocked(e *rangeEntry, n int) bool {
	for _, x := range l.list[:n] {
		if x.start < e.end && e.start < x.end {
			return true
		}
	}
	return false
}

// unlock lets those run that waited for e alone.
func (l *rangeLock) unlock(e *rangeEntry) {
	l.mu.Lock()
	defer l.mu.Unlock()
	at := 0
	for i, x := range l.list {
		if x == e {
			at = i
			break
		}
	}
	l.list = append(l.list[:at], l.list[at+1:]...)
	for i := at; i < len(l.list); i++ {
		if x := l.list[i]; x.waiting && !l.blocked(x, i) {
			x.waiting = false
			x.wake <- struct{}{}
		}
	}
	l.free = append(l.free, e)
}
