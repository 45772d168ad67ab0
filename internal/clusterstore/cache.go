package clusterstore

import (
	"context"
	"encoding/json"
	"sort"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"perdure/internal/model"
	"perdure/internal/shimapi"
)

// VMView is what the local copy holds of one VM. It may be old.
type VMView struct {
	Spec      model.VMSpec
	Record    model.Versioned
	Endpoints map[string]shimapi.Endpoint // by host
	// Unprotected: a person gave the second copy up; none is made until asked for.
	Unprotected bool
	Verify      model.VerifySchedule
}

// cache is the local copy of all keys, fed by a watch.
type cache struct {
	mu      sync.Mutex
	vms     map[string]VMView // values are replaced, never changed
	hosts   map[string]HostInfo
	alive   map[string]string // nonce by host
	cluster ClusterInfo
	rev     int64
	changed chan struct{}
	asOf    time.Time
}

func newCache() *cache {
	c := &cache{changed: make(chan struct{})}
	c.clear()
	return c
}

func (c *cache) clear() {
	c.vms, c.hosts, c.alive = map[string]VMView{}, map[string]HostInfo{}, map[string]string{}
}

func (c *cache) notify() {
	close(c.changed)
	c.changed = make(chan struct{})
}

// set takes one key over; values that cannot be decoded are left out (a newer
// version of the program may have written them).
func (c *cache) set(kv *mvccpb.KeyValue) {
	key := string(kv.Key)
	if vm, rest, ok := splitVM(key); ok {
		c.setVM(vm, rest, kv)
		return
	}
	switch {
	case key == clusterKey:
		_ = json.Unmarshal(kv.Value, &c.cluster)
	case len(key) > len(hostDir) && key[:len(hostDir)] == hostDir:
		var h HostInfo
		if json.Unmarshal(kv.Value, &h) == nil {
			c.hosts[key[len(hostDir):]] = h
		}
	case len(key) > len(aliveDir) && key[:len(aliveDir)] == aliveDir:
		c.alive[key[len(aliveDir):]] = string(kv.Value)
	}
}

func (c *cache) setVM(vm, rest string, kv *mvccpb.KeyValue) {
	v := c.vms[vm]
	switch {
	case rest == "spec":
		var spec model.VMSpec
		if json.Unmarshal(kv.Value, &spec) != nil {
			return
		}
		v.Spec = spec
	case rest == "record":
		rec, err := versioned(kv)
		if err != nil {
			return
		}
		v.Record = rec
	case rest == "unprotected":
		v.Unprotected = true
	case rest == "verify":
		v.Verify = model.VerifySchedule{}
		_ = json.Unmarshal(kv.Value, &v.Verify) // what is not understood is the default
	case len(rest) > len("endpoint/") && rest[:len("endpoint/")] == "endpoint/":
		var e shimapi.Endpoint
		if json.Unmarshal(kv.Value, &e) != nil {
			return
		}
		m := map[string]shimapi.Endpoint{rest[len("endpoint/"):]: e}
		for h, o := range v.Endpoints {
			if _, ok := m[h]; !ok {
				m[h] = o
			}
		}
		v.Endpoints = m
	default:
		return
	}
	c.vms[vm] = v
}

func (c *cache) del(key string) {
	if vm, rest, ok := splitVM(key); ok {
		v, known := c.vms[vm]
		switch {
		case !known:
		case rest == "spec" || rest == "record":
			delete(c.vms, vm)
		case rest == "unprotected":
			v.Unprotected = false
			c.vms[vm] = v
		case rest == "verify":
			v.Verify = model.VerifySchedule{}
			c.vms[vm] = v
		case len(rest) > len("endpoint/"):
			m := map[string]shimapi.Endpoint{}
			for h, e := range v.Endpoints {
				if h != rest[len("endpoint/"):] {
					m[h] = e
				}
			}
			v.Endpoints = m
			c.vms[vm] = v
		}
		return
	}
	switch {
	case len(key) > len(hostDir) && key[:len(hostDir)] == hostDir:
		delete(c.hosts, key[len(hostDir):])
	case len(key) > len(aliveDir) && key[:len(aliveDir)] == aliveDir:
		delete(c.alive, key[len(aliveDir):])
	}
}

// watchLoop keeps the copy up to date: read all, then follow. Where the watch
// breaks (compaction, overload) everything is read again.
//
// It does not wait for a quorum: an agent that restarts without one must see
// what it knew, to show it and to find its VMs.
func (s *Store) watchLoop(ctx context.Context) {
	for ctx.Err() == nil {
		rev, err := s.loadAll(ctx)
		if err == nil {
			s.follow(ctx, rev+1)
		}
		if !sleep(ctx, 100*time.Millisecond) {
			return
		}
	}
}

func (s *Store) loadAll(ctx context.Context) (int64, error) {
	var resp *clientv3.GetResponse
	err := s.do(ctx, func(ctx context.Context) error {
		// Serializable: a copy for hints must come up without quorum too.
		r, err := s.cli.Get(ctx, root, clientv3.WithPrefix(), clientv3.WithSerializable())
		if err == nil {
			resp = r
		}
		return err
	})
	if err != nil {
		return 0, err
	}
	c := s.cache
	c.mu.Lock()
	defer c.mu.Unlock()
	c.clear()
	for _, kv := range resp.Kvs {
		c.set(kv)
	}
	c.rev, c.asOf = resp.Header.Revision, time.Now()
	c.notify()
	return resp.Header.Revision, nil
}

func (s *Store) follow(ctx context.Context, rev int64) {
	wctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ch := s.cli.Watch(wctx, root, clientv3.WithPrefix(), clientv3.WithRev(rev))
	for resp := range ch {
		if resp.Err() != nil {
			return
		}
		c := s.cache
		c.mu.Lock()
		for _, ev := range resp.Events {
			if ev.Type == mvccpb.DELETE {
				c.del(string(ev.Kv.Key))
			} else {
				c.set(ev.Kv)
			}
		}
		c.rev, c.asOf = resp.Header.Revision, time.Now()
		if len(resp.Events) > 0 {
			c.notify()
		}
		c.mu.Unlock()
	}
}

// Changed returns a channel that is closed at the next change of the local
// copy. Take it before looking, so that no change is missed.
func (s *Store) Changed() <-chan struct{} {
	s.cache.mu.Lock()
	defer s.cache.mu.Unlock()
	return s.cache.changed
}

// Loaded reports whether the local copy was filled at least once.
func (s *Store) Loaded() bool {
	s.cache.mu.Lock()
	defer s.cache.mu.Unlock()
	return !s.cache.asOf.IsZero()
}

// VMs returns the local copy of all VMs that have a specification and a record,
// sorted by name. It may be old.
func (s *Store) VMs() []VMView {
	s.cache.mu.Lock()
	defer s.cache.mu.Unlock()
	out := make([]VMView, 0, len(s.cache.vms))
	for _, v := range s.cache.vms {
		if v.Spec.Name != "" && v.Record.Revision != 0 {
			out = append(out, v)
		}
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Spec.Name < out[j].Spec.Name })
	return out
}

// VM returns the local copy of one VM. It may be old.
func (s *Store) VM(name string) (VMView, bool) {
	s.cache.mu.Lock()
	defer s.cache.mu.Unlock()
	v, ok := s.cache.vms[name]
	return v, ok && v.Spec.Name != "" && v.Record.Revision != 0
}

// HostView is what the local copy holds of one host. It may be old.
type HostView struct {
	HostInfo
	Alive bool   // its lease stands
	Nonce string // of its agent's present life
}

// Hosts returns the local copy of all hosts, sorted by name. It may be old.
func (s *Store) Hosts() []HostView {
	s.cache.mu.Lock()
	defer s.cache.mu.Unlock()
	out := make([]HostView, 0, len(s.cache.hosts))
	for n, h := range s.cache.hosts {
		nonce, alive := s.cache.alive[n]
		out = append(out, HostView{HostInfo: h, Alive: alive, Nonce: nonce})
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Name < out[j].Name })
	return out
}

// ClusterCached returns the local copy of the cluster's name; it may be empty.
func (s *Store) ClusterCached() ClusterInfo {
	s.cache.mu.Lock()
	defer s.cache.mu.Unlock()
	return s.cache.cluster
}

// AsOf is when the local copy last changed.
func (s *Store) AsOf() time.Time {
	s.cache.mu.Lock()
	defer s.cache.mu.Unlock()
	return s.cache.asOf
}
