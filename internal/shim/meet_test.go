package shim

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"perdure/internal/authority"
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

// spare makes a whole replica of one more disk on a host, and says how the VM's disks are
// called with it.
func (h *dryHost) spare(id string) (with []model.DiskSpec) {
	h.w.t.Helper()
	const size = 8 << 20
	err := blockstore.Create(h.disk(), filepath.Join(h.dir, shimapi.DiskDir), blockstore.Params{ID: id, VM: h.w.spec.UUID, Size: size, State: model.UpToDate})
	if err != nil {
		h.w.t.Fatal(err)
	}
	return append(model.PinSlots(h.w.spec.Disks), model.DiskSpec{ID: id, Size: size, Slot: model.FirstDiskSlot + len(h.w.spec.Disks)})
}

func setDisksOp(t *testing.T, list []model.DiskSpec) shimapi.Op {
	t.Helper()
	b, err := json.Marshal(shimapi.SetDisks{Disks: list})
	if err != nil {
		t.Fatal(err)
	}
	return shimapi.Op{Op: "disks", Value: string(b)}
}

func hasDisks(n int) func(shimapi.Status) bool {
	return func(st shimapi.Status) bool { return len(st.Disks) == n }
}

// newAlone is a world in which the VM runs alone on a, and nobody protects it.
func newAlone(t *testing.T) (*dry, *dryHost, *Shim) {
	t.Helper()
	w := newDry(t, false)
	w.hosts["b"].powerOff(true, nil)
	a := w.hosts["a"]
	a.eventually("alone", func(st shimapi.Status) bool {
		return st.Role == shimapi.RolePrimary && st.Mode == model.ModeSimplex && st.State == model.StateRunning
	})
	return w, a, a.now().shim
}

// TestPlugAcrossTheEndOfItsAgent: an agent that ends while a disk is given to the guest leaves
// no half of it behind.
func TestPlugAcrossTheEndOfItsAgent(t *testing.T) {
	_, a, _ := newAlone(t)
	list := a.spare("more")
	ctx, cancel := context.WithTimeout(context.Background(), hollowPlug/3)
	defer cancel()
	c := shimapi.NewShimClient(filepath.Join(a.dir, shimapi.SocketFile))
	defer c.Close()
	if _, err := c.Op(ctx, setDisksOp(t, list)); err == nil {
		t.Fatal("the disk was given before its agent ended")
	}
	a.eventually("the new disk", hasDisks(2))
	if _, err := a.ask(setDisksOp(t, list)); err != nil && !strings.Contains(err.Error(), errDisksChange.Error()) {
		t.Errorf("the next agent: %v", err)
	}
}

// TestThrownOut: a disk that the guest throws out is noticed, also in the moment in which
// a change of the disks ends, and is not taken away under a change of level.
func TestThrownOut(t *testing.T) {
	for name, busy := range map[string]func(s *Shim) (end func()){
		"alone": func(*Shim) func() { return func() {} },
		"disks": func(s *Shim) func() {
			s.mu.Lock()
			s.changing = true
			s.mu.Unlock()
			return func() { s.mu.Lock(); s.changing = false; s.mu.Unlock() }
		},
		"level": func(s *Shim) func() {
			c := &levelChange{s: s}
			s.mu.Lock()
			s.change = c
			s.mu.Unlock()
			return func() { c.end(nil) }
		},
	} {
		t.Run(name, func(t *testing.T) {
			w, a, s := newAlone(t)
			list := a.spare("more")
			if _, err := a.ask(setDisksOp(t, list)); err != nil {
				t.Fatal(err)
			}
			a.eventually("the new disk", hasDisks(2))
			end := busy(s)
			signalHollow(a.dir, syscall.SIGUSR2)
			if name != "alone" {
				time.Sleep(500 * time.Millisecond)
				if n := len(s.Status().Disks); n != 2 {
					t.Errorf("%d disks while another change lasts", n)
				}
			}
			end()
			a.eventually("without the disk", hasDisks(1))
			if _, err := a.ask(setDisksOp(t, list)); err != nil {
				t.Errorf("given again: %v", err)
			}
			_ = w
		})
	}
}

// TestNoPairWhileDisksChange: a protection that was granted in the moment in which the
// disks begin to change is given back: a pair numbers its disks.
func TestNoPairWhileDisksChange(t *testing.T) {
	w, _, s := newAlone(t)
	s.mu.Lock()
	s.changing = true
	s.mu.Unlock()
	w.hosts["b"].powerOn()
	if err := s.ask(context.Background(), authority.EvProtect{Host: "b"}); err != nil {
		t.Fatal(err)
	}
	term := w.store.get().Record.Term
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		rec := w.store.get().Record
		if rec.Mode == model.ModeSimplex && rec.Reason != "booted on a" {
			break // named, and dropped
		}
		if rec.Mode == model.ModeDuplex || time.Now().After(end) {
			t.Fatalf("the VM is %s, term %d after %d, while its disks change", rec.Mode, rec.Term, term)
		}
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		err := s.primary().aloneNow(context.Background()) // what the record says is heard a moment later
		if err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
	}
	s.mu.Lock()
	s.changing = false
	s.mu.Unlock()
	w.untilDuplex(30 * time.Second)
}

// TestSwapDisksHoldsUpNobody: whoever waits for the lists of disks, or for requests under way,
// does not hold the lock without which the gate is not renewed.
func TestSwapDisksHoldsUpNobody(t *testing.T) {
	_, a, s := newAlone(t)
	if _, err := a.ask(setDisksOp(t, a.spare("more"))); err != nil {
		t.Fatal(err)
	}
	p := s.primary()
	free := func(what string) {
		t.Helper()
		for range 50 {
			time.Sleep(2 * time.Millisecond)
			if !s.mu.TryLock() {
				continue
			}
			s.mu.Unlock()
			return
		}
		t.Errorf("the shim's lock is held by who waits for %s", what)
	}
	p.disks.mu.Lock() // as a machine of a disk does, which asks for the term then
	done := make(chan struct{})
	go func() { p.swapDisks(func() {}); close(done) }()
	time.Sleep(20 * time.Millisecond)
	free("the machines of the disks")
	p.disks.mu.Unlock()
	<-done

	begun, goOn := make(chan struct{}), make(chan struct{})
	var once sync.Once
	a.mem.SetHook(func(op vfs.Op) error {
		if op.Kind == "write" && strings.HasSuffix(op.Path, "disk0.raw") {
			once.Do(func() { close(begun); <-goOn })
		}
		return nil
	})
	wrote := make(chan error, 1)
	go func() { wrote <- p.inst.slots[0].WriteAt(context.Background(), make([]byte, 4096), 0, false) }()
	<-begun
	dropped := make(chan error, 1)
	go func() { dropped <- p.dropDisk("more") }()
	time.Sleep(20 * time.Millisecond)
	free("a request of another disk")
	close(goOn)
	if err := errors.Join(<-wrote, <-dropped); err != nil {
		t.Error(err)
	}
	a.eventually("without the disk", hasDisks(1))
}

// TestDiskThatStands: a disk of the primary's host does not answer any more, with requests
// of the guest in it that stay there. The guest goes on, the disk is replaced, the secondary is
// lost and the VM protected again; then what stood comes back. Nobody waits for it, and
// it changes nothing.
func TestDiskThatStands(t *testing.T) {
	d := stallLimit
	t.Cleanup(func() { stallLimit = d }) // when the world has ended
	stallLimit = 300 * time.Millisecond
	w := newDry(t, false)
	f := &dryFaults{t: t, w: w, l: newDryLoad(w, 5), r: rand.New(rand.NewPCG(5, 5))}
	w.untilDuplex(30 * time.Second)
	f.l.begin()
	defer func() { f.l.end() }()
	moves := func(what string) {
		t.Helper()
		if err := f.l.progress(200, 30*time.Second); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	moves("at first")
	primary, secondary := f.seat(true), f.seat(false)
	release := make(chan struct{})
	free := sync.OnceFunc(func() { close(release) })
	defer free()
	var standing atomic.Int64
	primary.mem.SetHook(func(op vfs.Op) error {
		if changes(op) && strings.HasSuffix(op.Path, "disk0.raw") {
			standing.Add(1)
			<-release
		}
		return nil
	})
	moves("with a disk that stands")
	if r := w.store.get().Record.Replicas[primary.name]; r.State != model.Inconsistent || standing.Load() == 0 {
		t.Fatalf("the replica that stands is %s, with %d requests in it", r.State, standing.Load())
	}
	primary.mem.SetHook(nil) // what stands in it stays there
	f.recover()
	moves("with a new disk")
	secondary.powerOff(true, nil)
	w.until("simplex", 30*time.Second, func(r model.Record) bool { return r.Mode == model.ModeSimplex })
	moves("alone")
	secondary.powerOn()
	w.untilDuplex(30 * time.Second)
	moves("protected again")
	if now := f.seat(true); now != primary {
		t.Fatalf("the VM runs on host %s", now.name)
	}
	free()
	moves("when what stood has come back")
	f.l.end()
	defer f.l.begin()
	if err := w.same(20 * time.Second); err != nil {
		t.Error(err)
	}
	if err := f.l.settle(); err != nil {
		t.Error(err)
	}
}

// TestNoLeavingWithADiskThatStands: who gives the second copy up for a moment, to change disks or level,
// does not do so while the disk of this host is not answering: it would be the only one.
func TestNoLeavingWithADiskThatStands(t *testing.T) {
	d := standingTooLong
	t.Cleanup(func() { standingTooLong = d })
	standingTooLong = 50 * time.Millisecond
	w := newDry(t, false)
	f := &dryFaults{t: t, w: w, l: newDryLoad(w, 7), r: rand.New(rand.NewPCG(7, 7))}
	w.untilDuplex(30 * time.Second)
	f.l.begin()
	defer func() { f.l.end() }()
	if err := f.l.progress(50, 30*time.Second); err != nil {
		t.Fatal(err)
	}
	h := f.seat(true)
	hit, release := make(chan struct{}), make(chan struct{})
	var once sync.Once
	free := sync.OnceFunc(func() { close(release) })
	defer free()
	h.mem.SetHook(func(op vfs.Op) error {
		if changes(op) {
			once.Do(func() { close(hit) })
			<-release
		}
		return nil
	})
	<-hit
	time.Sleep(2 * standingTooLong)
	for _, op := range []shimapi.Op{{Op: "unprotect"}, {Op: "level", Value: "none"}} {
		if _, err := h.ask(op); err == nil || !strings.Contains(err.Error(), "disk0") {
			t.Errorf("%s while the disk does not answer: %v", op.Op, err)
		}
	}
	if rec := w.store.get().Record; rec.Mode != model.ModeDuplex {
		t.Errorf("the VM is %s", rec.Mode)
	}
	h.mem.SetHook(nil)
	free()
	if err := f.l.progress(50, 30*time.Second); err != nil {
		t.Fatal(err)
	}
	if _, err := h.ask(shimapi.Op{Op: "unprotect"}); err != nil {
		t.Errorf("when it answers again: %v", err)
	}
	f.recover()
}
