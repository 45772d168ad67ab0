package agent

import (
	"context"
	"errors"
	"sort"
	"time"

	"perdure/api"
	"perdure/internal/model"
)

// eventKey tells an event of one host from all others.
type eventKey struct {
	host string
	seq  uint64
}

// Events implements httpapi.Service: the timelines of all hosts, merged by time.
// What a host that does not answer has seen is missing.
func (a *Agent) Events(ctx context.Context, name string, q api.EventQuery, emit func(model.Event) error) error {
	here, _ := a.events.since(name, 0)
	if _, err := a.find(ctx, name); err != nil && len(here) == 0 {
		return err
	}
	if api.Forwarded(ctx) {
		return a.eventsHere(ctx, name, q, emit)
	}
	all := here
	lists := make(chan []model.Event)
	others := a.otherHosts(true)
	for _, h := range others {
		go func() {
			lctx, cancel := context.WithTimeout(ctx, 2*time.Second)
			defer cancel()
			lists <- a.eventsOf(lctx, h.Name, name, q.Since)
		}()
	}
	for range others {
		all = append(all, <-lists...)
	}
	sort.SliceStable(all, func(i, j int) bool { return all[i].Time.Before(all[j].Time) })
	seen := map[eventKey]bool{}
	for _, ev := range all {
		k := eventKey{ev.Host, ev.Seq}
		if seen[k] || !ev.Time.After(q.Since) {
			continue
		}
		seen[k] = true
		if err := emit(ev); err != nil {
			return err
		}
	}
	if !q.Follow {
		return nil
	}
	return a.followAll(ctx, name, seen, emit)
}

func (a *Agent) eventsOf(ctx context.Context, host, vm string, since time.Time) []model.Event {
	p, _, err := a.peer(host)
	if err != nil {
		return nil
	}
	var out []model.Event
	err = p.api.Events(api.WithForwarded(ctx), vm, api.EventQuery{Since: since}, func(ev model.Event) error {
		out = append(out, ev)
		return nil
	})
	if err != nil {
		a.log.Debug("events of another host cannot be read", "vm", vm, "from", host, "error", err)
	}
	return out
}

// eventsHere gives this host's own events.
func (a *Agent) eventsHere(ctx context.Context, name string, q api.EventQuery, emit func(model.Event) error) error {
	var seq uint64
	for {
		list, more := a.events.since(name, seq)
		for _, ev := range list {
			seq = max(seq, ev.Seq)
			if !ev.Time.After(q.Since) {
				continue
			}
			if err := emit(ev); err != nil {
				return err
			}
		}
		if !q.Follow {
			return nil
		}
		select {
		case <-more:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// followAll gives events of all hosts as they come. A host that goes away is
// asked again until it is back; nothing is given twice.
func (a *Agent) followAll(ctx context.Context, name string, seen map[eventKey]bool, emit func(model.Event) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ch := make(chan model.Event)
	send := func(ev model.Event) error {
		select {
		case ch <- ev:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	started := map[string]bool{}
	follow := func() {
		for _, h := range a.otherHosts(false) {
			if started[h.Name] {
				continue
			}
			started[h.Name] = true
			go a.followHost(ctx, h.Name, name, send)
		}
	}
	go a.eventsHere(ctx, name, api.EventQuery{Follow: true}, send) //nolint:errcheck // it ends with ctx
	follow()
	tick := time.NewTicker(5 * time.Second)
	defer tick.Stop()
	for {
		select {
		case ev := <-ch:
			k := eventKey{ev.Host, ev.Seq}
			if seen[k] {
				continue
			}
			seen[k] = true
			if err := emit(ev); err != nil {
				return err
			}
		case <-tick.C:
			follow()
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (a *Agent) followHost(ctx context.Context, host, vm string, send func(model.Event) error) {
	// A little is asked for again, since clocks differ; what was seen is left out.
	since := time.Now().Add(-time.Minute)
	for ctx.Err() == nil {
		p, _, err := a.peer(host)
		if err == nil {
			err = p.api.Events(api.WithForwarded(ctx), vm, api.EventQuery{Follow: true, Since: since}, func(ev model.Event) error {
				return send(ev)
			})
		}
		if errors.Is(err, context.Canceled) || !sleep(ctx, time.Second) {
			return
		}
	}
}
