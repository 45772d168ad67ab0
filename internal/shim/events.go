package shim

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"perdure/internal/model"
	"perdure/internal/shimapi"
)

// timeline sends what happens to the VM to the agent and to the log. Events
// wait, bounded, while the agent is away; the data plane never waits for it.
type timeline struct {
	vm, host string
	agent    *shimapi.AgentClient
	log      *slog.Logger

	mu     sync.Mutex
	queue  []model.Event
	wake   chan struct{}
	term   model.Term
	probs  map[string]model.Problem
	order  []string
	change chan struct{} // closed and replaced when a problem comes or goes
}

// maxQueuedEvents bounds the memory of a shim whose agent is gone for long;
// the oldest are dropped first.
const maxQueuedEvents = 1000

func newTimeline(vm, host string, agent *shimapi.AgentClient, log *slog.Logger) *timeline {
	return &timeline{vm: vm, host: host, agent: agent, log: log, wake: make(chan struct{}, 1),
		probs: map[string]model.Problem{}, change: make(chan struct{})}
}

// add notes an event. d is how long it took, or 0.
func (t *timeline) add(typ string, epoch model.Epoch, d time.Duration, text string, args ...any) {
	e := model.Event{Time: time.Now(), Host: t.host, VM: t.vm, Type: typ, Epoch: epoch, DurationMS: ms(d), Text: fmt.Sprintf(text, args...)}
	t.log.Info(e.Text, "event", typ, "epoch", epoch, "took_ms", e.DurationMS)
	t.mu.Lock()
	e.Term = t.term
	if len(t.queue) >= maxQueuedEvents {
		t.queue = t.queue[1:]
	}
	t.queue = append(t.queue, e)
	t.mu.Unlock()
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

func (t *timeline) setTerm(term model.Term) {
	t.mu.Lock()
	t.term = term
	t.mu.Unlock()
}

// problem raises a named problem, or changes its text.
func (t *timeline) problem(p model.Problem) {
	t.mu.Lock()
	old, had := t.probs[p.Code]
	t.probs[p.Code] = p
	if !had {
		t.order = append(t.order, p.Code)
	}
	t.mu.Unlock()
	if !had || old != p {
		t.add("problem", 0, 0, "%s: %s", p.Code, p.Text)
	}
}

// solved takes a problem away.
func (t *timeline) solved(code string) {
	t.mu.Lock()
	_, had := t.probs[code]
	delete(t.probs, code)
	for i, c := range t.order {
		if c == code {
			t.order = append(t.order[:i:i], t.order[i+1:]...)
			break
		}
	}
	t.mu.Unlock()
	if had {
		t.add("problem-solved", 0, 0, "%s: solved", code)
	}
}

func (t *timeline) problems() []model.Problem {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := make([]model.Problem, 0, len(t.order))
	for _, c := range t.order {
		out = append(out, t.probs[c])
	}
	return out
}

// run delivers until ctx ends, then tries once more for what is left.
func (t *timeline) run(ctx context.Context) {
	retry := 100 * time.Millisecond
	for {
		select {
		case <-t.wake:
		case <-ctx.Done():
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
			t.deliver(last)
			cancel()
			return
		}
		for !t.deliver(ctx) && ctx.Err() == nil {
			timer := time.NewTimer(retry)
			select {
			case <-timer.C:
			case <-ctx.Done():
			}
			timer.Stop()
			retry = min(2*retry, 2*time.Second)
		}
		retry = 100 * time.Millisecond
	}
}

// deliver sends what is queued and reports whether nothing is left.
func (t *timeline) deliver(ctx context.Context) bool {
	for {
		t.mu.Lock()
		if len(t.queue) == 0 {
			t.mu.Unlock()
			return true
		}
		e := t.queue[0]
		t.mu.Unlock()
		if err := t.agent.Event(ctx, e); err != nil {
			return false
		}
		t.mu.Lock()
		if len(t.queue) > 0 && t.queue[0].Time.Equal(e.Time) {
			t.queue = t.queue[1:]
		}
		t.mu.Unlock()
	}
}
