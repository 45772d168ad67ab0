package shim

import (
	"context"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"perdure/internal/blockstore"
	"perdure/internal/model"
	"perdure/internal/shimapi"
	"perdure/internal/vfs"
)

// How carried disks, changes of disks and of the level, and takeovers meet.

func (h *dryHost) ask(op shimapi.Op) (string, error) {
	h.w.t.Helper()
	c := shimapi.NewShimClient(filepath.Join(h.dir, shimapi.SocketFile))
	defer c.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	r, err := c.Op(ctx, op)
	return r.Text, err
}

func (h *dryHost) eventually(what string, ok func(st shimapi.Status) bool) {
	h.w.t.Helper()
	c := shimapi.NewShimClient(filepath.Join(h.dir, shimapi.SocketFile))
	defer c.Close()
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		st, err := c.Status(ctx)
		cancel()
		if err == nil && ok(st) {
			return
		}
		if time.Now().After(end) {
			h.w.t.Fatalf("host %s: never %s: %+v, %v", h.name, what, st, err)
		}
	}
}

// TestReplaceWaitsForTheRecord: as long as the record calls a replica good that has
// failed, because there is no majority to say otherwise, nobody takes it away.
func TestReplaceWaitsForTheRecord(t *testing.T) {
	w := newDry(t, false)
	f := &dryFaults{t: t, w: w, l: newDryLoad(w, 1), r: rand.New(rand.NewPCG(1, 1))}
	w.untilDuplex(30 * time.Second)
	f.l.begin()
	defer func() { f.l.end() }()
	if err := f.l.progress(50, 30*time.Second); err != nil {
		t.Fatal(err)
	}
	a := w.hosts["a"]
	w.store.cut(true, "a", "b")
	a.mem.SetHook(func(op vfs.Op) error {
		if changes(op) {
			return syscall.ENOSPC
		}
		return nil
	})
	a.eventually("waiting for the record", func(st shimapi.Status) bool {
		for _, p := range st.Problems {
			if p.Code == problemCarried {
				return true
			}
		}
		return false
	})
	a.mem.SetHook(nil)
	if _, err := a.ask(shimapi.Op{Op: "disk-replace", Value: "disk0"}); err == nil || !strings.Contains(err.Error(), "cluster") {
		t.Errorf("replaced while the record calls it good: %v", err)
	}
	m, _, err := blockstore.Peek(a.disk(), filepath.Join(a.dir, shimapi.DiskDir), "disk0")
	if err != nil || m.State != model.UpToDate {
		t.Errorf("the replica that the record calls UpToDate is %s, %v", m.State, err)
	}
	w.store.cut(false, "a", "b")
	f.recover()
}
