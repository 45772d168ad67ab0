package qemu

import (
	"encoding/json"
	"sync"
	"time"
)

// Event is one QMP event.
type Event struct {
	Name string // e.g. "SHUTDOWN"
	Data json.RawMessage
	Time time.Time // by QEMU's clock
}

const (
	eventsSoft = 1024  // beyond it events that nobody depends on are dropped
	eventsHard = 16384 // beyond it, of each kind only the newest is kept
)

// stateEvent reports events that change what a caller may do next.
func stateEvent(name string) bool {
	switch name {
	case "STOP", "RESUME", "SHUTDOWN", "POWERDOWN", "RESET", "SUSPEND", "SUSPEND_DISK", "WAKEUP",
		"GUEST_PANICKED", "GUEST_CRASHLOADED", "WATCHDOG", "BLOCK_IO_ERROR", "MIGRATION", "MEMORY_FAILURE":
		return true
	}
	return false
}

// eventQueue stands between the reader, which must never wait, and the one
// who takes the events, who may be slow.
type eventQueue struct {
	out chan Event

	mu    sync.Mutex
	list  []Event
	ended bool
	wake  chan struct{}
}

func newEventQueue() *eventQueue {
	q := &eventQueue{out: make(chan Event, 64), wake: make(chan struct{}, 1)}
	go q.pump()
	return q
}

func (q *eventQueue) put(e Event) {
	q.mu.Lock()
	switch {
	case len(q.list) >= eventsHard:
		for i := range q.list {
			if q.list[i].Name == e.Name {
				q.list = append(q.list[:i], q.list[i+1:]...)
				break
			}
		}
		q.list = append(q.list, e)
	case len(q.list) < eventsSoft || stateEvent(e.Name):
		q.list = append(q.list, e)
	}
	q.mu.Unlock()
	q.kick()
}

func (q *eventQueue) end() {
	q.mu.Lock()
	q.ended = true
	q.mu.Unlock()
	q.kick()
}

func (q *eventQueue) kick() {
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// pump ends with the connection: what is left then is delivered as far as the
// channel's buffer takes it, so that a caller who went away holds nothing up.
func (q *eventQueue) pump() {
	defer close(q.out)
	for range q.wake {
		for {
			q.mu.Lock()
			list, ended := q.list, q.ended
			q.list = nil
			q.mu.Unlock()
			for _, e := range list {
				if !q.deliver(e) {
					return
				}
			}
			if len(list) == 0 {
				if ended {
					return
				}
				break
			}
		}
	}
}

// deliver waits for the reader of the channel, but not beyond the connection's end.
func (q *eventQueue) deliver(e Event) bool {
	for {
		select {
		case q.out <- e:
			return true
		default:
		}
		q.mu.Lock()
		ended := q.ended
		q.mu.Unlock()
		if ended {
			return false
		}
		select {
		case q.out <- e:
			return true
		case <-q.wake: // perhaps the end; look again
		}
	}
}
