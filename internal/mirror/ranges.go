package mirror

import (
	"context"
	"slices"
	"sync"
)

// ranges lets requests whose bytes overlap run one after the other, in the order
// in which they came. It is meant for some tens of requests at a time.
type ranges struct {
	mu   sync.Mutex
	list []*held // in order of arrival, waiting and running
	over bool    // see abandon
}

type held struct {
	start, end int64
	wake       chan struct{} // closed when the entry may run, or never will
	waiting    bool
	gone       bool // refused, and not in the list
}

// lock waits until no earlier request overlaps start … end-1. It fails with
// errGivenUp when the ranges are abandoned, and with the cause of ctx when that ends before.
func (r *ranges) lock(ctx context.Context, start, end int64) (*held, error) {
	e := &held{start: start, end: end}
	r.mu.Lock()
	if r.over {
		r.mu.Unlock()
		return nil, errGivenUp
	}
	if e.waiting = r.blocked(e, len(r.list)); e.waiting {
		e.wake = make(chan struct{})
	}
	r.list = append(r.list, e)
	wait := e.wake
	r.mu.Unlock()
	if wait == nil {
		return e, nil
	}
	select {
	case <-wait:
	case <-ctx.Done():
		if !r.refused(e) {
			r.unlock(e)
		}
		return nil, context.Cause(ctx)
	}
	if e.gone {
		return nil, errGivenUp
	}
	return e, nil
}

func (r *ranges) refused(e *held) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return e.gone
}

// abandon refuses all that wait, and all that come. Those that run go on.
func (r *ranges) abandon() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.over = true
	r.list = slices.DeleteFunc(r.list, func(x *held) bool {
		if x.waiting {
			x.waiting, x.gone = false, true
			close(x.wake)
		}
		return x.gone
	})
}

func (r *ranges) abandoned() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.over
}

// blocked reports whether one of the first n entries overlaps e. mu is held.
func (r *ranges) blocked(e *held, n int) bool {
	for _, x := range r.list[:n] {
		if x.start < e.end && e.start < x.end {
			return true
		}
	}
	return false
}

// unlock takes e out, which runs or waits, and lets those run that waited for e alone.
func (r *ranges) unlock(e *held) {
	r.mu.Lock()
	defer r.mu.Unlock()
	at := 0
	for r.list[at] != e {
		at++
	}
	r.list = append(r.list[:at], r.list[at+1:]...)
	for i := at; i < len(r.list); i++ {
		if x := r.list[i]; x.waiting && !r.blocked(x, i) {
			x.waiting = false
			close(x.wake)
		}
	}
}
