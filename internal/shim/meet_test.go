package shim

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"perdure/internal/blockstore"
	"perdure/internal/mirror"
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

// TestRenewedReplicaOutlivesQEMU: a replica that took the place of a failed one is closed
// as the others are: when the QEMU that writes to it has ended, whatever the level was
// changed to meanwhile. Closed before, it would call itself clean, with writes behind that.
func TestRenewedReplicaOutlivesQEMU(t *testing.T) {
	open := func(state model.ReplicaState) *blockstore.Store {
		mem := vfs.NewMem()
		if err := blockstore.Create(mem, "/d", blockstore.Params{ID: "disk0", Size: 1 << 20, State: state}); err != nil {
			t.Fatal(err)
		}
		st, err := blockstore.Open(mem, "/d", "disk0", blockstore.Options{})
		if err == nil {
			_, err = st.Replay()
		}
		if err != nil {
			t.Fatal(err)
		}
		return st
	}
	old, renewed := open(model.UpToDate), open(model.Inconsistent)
	log := slog.New(slog.DiscardHandler)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	s := &Shim{log: log, ctx: ctx, tl: newTimeline("vm1", "a", nil, log)}
	s.cfg.Spec = model.VMSpec{Level: model.LevelCA, Disks: []model.DiskSpec{{ID: "disk0", Size: 1 << 20}}}
	i := &instance{cfg: s.cfg, log: log, hot: new(hotDisks), closers: new(storeClosers), stores: []*blockstore.Store{old},
		vols: []*blockstore.Volume{blockstore.NewVolume(old, blockstore.VolumeOptions{})}}
	i.cfg.Dir = t.TempDir()
	i.onEnd(i.closers.close)
	i.closers.add(func() { old.Close() })
	i.mirror = mirror.NewSource(i.replicas())
	i.onClose(func() { // QEMU ends
		if renewed.Meta().Clean || old.Meta().Clean {
			t.Error("a replica was closed while QEMU was still there")
		}
	})
	p := &primary{s: s, inst: i, ctx: ctx}
	p.disks = newDisks(s, i)
	c := &diskCarrier{p: p}
	i.fresh = append(i.fresh, renewed)
	if err := c.adopt(0, renewed, blockstore.NewVolume(renewed, blockstore.VolumeOptions{})); err != nil {
		t.Fatal(err)
	}
	old.GiveUp(syscall.EIO)
	i.again(model.LevelNone).close()
	if !renewed.Meta().Clean {
		t.Error("the new replica was not closed")
	}
}
