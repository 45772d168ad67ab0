package clusterstore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"perdure/internal/model"
)

// The keys; see the table in docs. Names hold no slash.
const (
	root       = "/perdure/"
	clusterKey = root + "cluster"
	hostDir    = root + "host/"
	aliveDir   = root + "alive/"
	vmDir      = root + "vm/"
	tokenDir   = root + "token/"
)

func vmPrefix(vm string) string          { return vmDir + vm + "/" }
func specKey(vm string) string           { return vmPrefix(vm) + "spec" }
func recordKey(vm string) string         { return vmPrefix(vm) + "record" }
func unprotectedKey(vm string) string    { return vmPrefix(vm) + "unprotected" }
func endpointKey(vm, host string) string { return vmPrefix(vm) + "endpoint/" + host }

// ClusterInfo is what the cluster is called.
type ClusterInfo struct {
	ID   string `json:"id"`
	Name string `json:"name"`
}

// HostInfo is what a host says of itself; it is published at each start and
// whenever it changes.
type HostInfo struct {
	Name        string   `json:"name"`
	Role        string   `json:"role"` // "host" or "witness"
	API         string   `json:"api"`  // IP:port of the agent's API
	ALinks      []string `json:"alinks"`
	CPUs        int      `json:"cpus"`
	MemoryTotal int64    `json:"memory_total"` // bytes
	MemoryFree  int64    `json:"memory_free"`  // MemAvailable in bytes, now and then
	Accel       string   `json:"accel"`        // "kvm" or "tcg"
	QEMU        string   `json:"qemu"`         // version, "7.2.22"; empty: none that can be used
	Machine     string   `json:"machine"`      // newest versioned machine type, "pc-i440fx-7.2"
	CPU         string   `json:"cpu"`          // default CPU model under Accel
	Version     string   `json:"version"`      // of Perdure
	StateDir    string   `json:"state_dir"`
	// Tracking says whether the host's dirty tracking is proved, which level ft
	// rests on; TrackingText is what the proof found.
	Tracking     Tracking `json:"tracking,omitempty"`
	TrackingText string   `json:"tracking_text,omitempty"`
	// CertificateEnds is when the host's certificate does; it is renewed long before.
	CertificateEnds time.Time     `json:"certificate_ends,omitzero"`
	Networks        []HostNetwork `json:"networks,omitempty"`
	FailedDisks     []FailedDisk  `json:"failed_disks,omitempty"`
}

// FailedDisk is a disk of a host that failed under a VM and was not replaced yet.
type FailedDisk struct {
	VM    string    `json:"vm"`
	Text  string    `json:"text"`
	Since time.Time `json:"since"`
}

// HostNetwork is what a host says of one bridge that others may carry.
type HostNetwork struct {
	Bridge    string          `json:"bridge"`
	Uplinks   []string        `json:"uplinks"`
	Good      bool            `json:"good"`                 // the uplink works
	CarriedBy string          `json:"carried_by,omitempty"` // host over which the frames go
	Carries   []string        `json:"carries,omitempty"`    // hosts whose frames go over this one
	Since     time.Time       `json:"since,omitzero"`       // of the present way
	Problems  []model.Problem `json:"problems,omitempty"`
}

// Tracking is the state of a host's proof of dirty tracking.
type Tracking string

// The states of a proof.
const (
	TrackingUnknown Tracking = "" // not said: an older version, or a witness
	TrackingPending Tracking = "pending"
	TrackingProved  Tracking = "proved"
	TrackingFailed  Tracking = "failed"
)

// Token is what the cluster keeps of a join token.
type Token struct {
	ID         string    `json:"id"`
	SecretHash string    `json:"secret_hash"`
	Role       string    `json:"role"`
	Expires    time.Time `json:"expires"`
}

// PutCluster names the cluster where it has no name yet and returns what it is
// called.
func (s *Store) PutCluster(ctx context.Context, c ClusterInfo) (ClusterInfo, error) {
	val, err := json.Marshal(c)
	if err != nil {
		return c, fmt.Errorf("name cluster: %w", err)
	}
	ok, err := s.txn(ctx, []clientv3.Cmp{clientv3.Compare(clientv3.CreateRevision(clusterKey), "=", 0)},
		[]clientv3.Op{clientv3.OpPut(clusterKey, string(val))})
	if err != nil {
		return c, fmt.Errorf("name cluster: %w", err)
	}
	if ok {
		return c, nil
	}
	return s.Cluster(ctx)
}

// Cluster reads what the cluster is called.
func (s *Store) Cluster(ctx context.Context) (ClusterInfo, error) {
	var c ClusterInfo
	if err := s.getJSON(ctx, clusterKey, &c); err != nil {
		return c, fmt.Errorf("read cluster name: %w", err)
	}
	return c, nil
}

// PutHost publishes a host.
func (s *Store) PutHost(ctx context.Context, h HostInfo) error {
	val, err := json.Marshal(h)
	if err != nil {
		return fmt.Errorf("publish host %q: %w", h.Name, err)
	}
	if _, err := s.txn(ctx, nil, []clientv3.Op{clientv3.OpPut(hostDir+h.Name, string(val))}); err != nil {
		return fmt.Errorf("publish host %q: %w", h.Name, err)
	}
	return nil
}

// DeleteHost forgets what a host has published.
func (s *Store) DeleteHost(ctx context.Context, name string) error {
	if _, err := s.txn(ctx, nil, []clientv3.Op{clientv3.OpDelete(hostDir + name)}); err != nil {
		return fmt.Errorf("forget host %q: %w", name, err)
	}
	return nil
}

// Host reads a host's own words linearizably; ErrNotFound where there is none.
func (s *Store) Host(ctx context.Context, name string) (HostInfo, error) {
	var h HostInfo
	if err := s.getJSON(ctx, hostDir+name, &h); err != nil {
		return h, fmt.Errorf("read host %q: %w", name, err)
	}
	return h, nil
}

// PutToken stores a join token until it expires.
func (s *Store) PutToken(ctx context.Context, t Token) error {
	val, err := json.Marshal(t)
	if err != nil {
		return fmt.Errorf("store token: %w", err)
	}
	if _, err := s.txn(ctx, nil, []clientv3.Op{clientv3.OpPut(tokenDir+t.ID, string(val))}); err != nil {
		return fmt.Errorf("store token: %w", err)
	}
	return nil
}

// UseToken takes a token out of the store if its secret's hash and role are the
// given ones and it has not expired at now. It succeeds for one caller only.
// ErrNotFound covers a wrong secret too, so that nobody learns which it was. It returns when the
// token would have expired.
func (s *Store) UseToken(ctx context.Context, id, secretHash, role string, now time.Time) (expires time.Time, err error) {
	key := tokenDir + id
	var t Token
	if err := s.getJSON(ctx, key, &t); err != nil {
		return time.Time{}, fmt.Errorf("use token: %w", err)
	}
	if t.SecretHash != secretHash || t.Role != role || !now.Before(t.Expires) {
		return time.Time{}, fmt.Errorf("use token: %w", ErrNotFound)
	}
	val, err := json.Marshal(t)
	if err != nil {
		return time.Time{}, fmt.Errorf("use token: %w", err)
	}
	ok, err := s.txn(ctx, []clientv3.Cmp{clientv3.Compare(clientv3.Value(key), "=", string(val))},
		[]clientv3.Op{clientv3.OpDelete(key)})
	if err != nil {
		return time.Time{}, fmt.Errorf("use token: %w", err)
	}
	if !ok {
		return time.Time{}, fmt.Errorf("use token: %w", ErrNotFound)
	}
	return t.Expires, nil
}

// SweepTokens removes tokens that expired before now.
func (s *Store) SweepTokens(ctx context.Context, now time.Time) error {
	var dead []string
	err := s.do(ctx, func(ctx context.Context) error {
		r, err := s.cli.Get(ctx, tokenDir, clientv3.WithPrefix())
		if err != nil {
			return fmt.Errorf("%w: %w", ErrUnavailable, err)
		}
		for _, kv := range r.Kvs {
			var t Token
			if json.Unmarshal(kv.Value, &t) == nil && !now.Before(t.Expires) {
				dead = append(dead, string(kv.Key))
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("sweep tokens: %w", err)
	}
	for _, k := range dead {
		if _, err := s.txn(ctx, nil, []clientv3.Op{clientv3.OpDelete(k)}); err != nil {
			return fmt.Errorf("sweep tokens: %w", err)
		}
	}
	return nil
}

// AliveTTL is how long a host counts as alive after it last said so.
const AliveTTL = 3 * time.Second

// KeepAlive says that a host is alive until ctx ends, under a lease. nonce is
// new with each boot of the host's agent. It never gives up and returns ctx's
// error. Being alive here is a hint for placement; it confirms no right.
func (s *Store) KeepAlive(ctx context.Context, host, nonce string) error {
	for {
		err := s.keepAliveOnce(ctx, host, nonce)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			s.cfg.Logger.Debug("alive lease lost", "host", host, "error", err)
		}
		if !sleep(ctx, 300*time.Millisecond) {
			return ctx.Err()
		}
	}
}

func (s *Store) keepAliveOnce(ctx context.Context, host, nonce string) error {
	var id clientv3.LeaseID
	err := s.do(ctx, func(ctx context.Context) error {
		g, err := s.cli.Grant(ctx, int64(AliveTTL/time.Second))
		if err != nil {
			return fmt.Errorf("grant: %w", err)
		}
		if _, err := s.cli.Put(ctx, aliveDir+host, nonce, clientv3.WithLease(g.ID)); err != nil {
			return fmt.Errorf("put: %w", err)
		}
		id = g.ID
		return nil
	})
	if err != nil {
		return err
	}
	lastOK := time.Now()
	for sleep(ctx, AliveTTL/4) {
		err := s.do(ctx, func(ctx context.Context) error {
			_, err := s.cli.KeepAliveOnce(ctx, id)
			return err
		})
		switch {
		case err == nil:
			lastOK = time.Now()
		case time.Since(lastOK) > AliveTTL || !errors.Is(err, ErrUnavailable):
			return fmt.Errorf("renew: %w", err)
		}
	}
	// A host that goes of its own will says so; nobody waits for the lease.
	bye, cancel := context.WithTimeout(context.WithoutCancel(ctx), 500*time.Millisecond)
	defer cancel()
	_ = s.do(bye, func(ctx context.Context) error {
		_, err := s.cli.Revoke(ctx, id)
		return err
	})
	return ctx.Err()
}

// sleep waits and reports false where ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// SetUnprotected notes that a person gave a VM's second copy up, or wants it back.
func (s *Store) SetUnprotected(ctx context.Context, vm string, off bool) error {
	op := clientv3.OpDelete(unprotectedKey(vm))
	if off {
		op = clientv3.OpPut(unprotectedKey(vm), "1")
	}
	ok, err := s.txn(ctx, []clientv3.Cmp{clientv3.Compare(clientv3.CreateRevision(specKey(vm)), ">", 0)}, []clientv3.Op{op})
	if err == nil && !ok {
		err = ErrNotFound
	}
	if err != nil {
		return fmt.Errorf("note protection of %q: %w", vm, err)
	}
	return nil
}

// splitVM takes a key below vmDir apart: VM and the rest ("spec", "record",
// "endpoint/HOST").
func splitVM(key string) (vm, rest string, ok bool) {
	k, ok := strings.CutPrefix(key, vmDir)
	if !ok {
		return "", "", false
	}
	return strings.Cut(k, "/")
}
