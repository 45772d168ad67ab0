package shim

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"perdure/internal/blockstore"
	"perdure/internal/diskcheck"
	"perdure/internal/mirror"
	"perdure/internal/model"
	"perdure/internal/nbd"
	"perdure/internal/vfs"
)

// carryWorld is a mirrored disk without a guest: two real stores on file systems
// in memory, a client that makes random requests by NBD, and a record that is
// changed some time after somebody asked for it.
type carryWorld struct {
	t    *testing.T
	rnd  *rand.Rand // of the faults
	size int64
	mem  [2]*vfs.Mem // of a, which runs the guest, and b
	st   [2]*blockstore.Store
	src  *mirror.Source
	news chan string
	over chan struct{} // closed: nothing changes any more

	mu   sync.Mutex
	lost bool // the record says that a's replica does not count
	sock string
}

func (w *carryWorld) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *carryWorld) openStore(mem *vfs.Mem) *blockstore.Store {
	w.t.Helper()
	st, err := blockstore.Open(mem, "/d", "disk0", blockstore.Options{})
	w.must(err)
	_, err = st.Replay()
	w.must(err)
	return st
}

func (w *carryWorld) newStore(state model.ReplicaState) (*vfs.Mem, *blockstore.Store) {
	w.t.Helper()
	mem := vfs.NewMem()
	w.must(blockstore.Create(mem, "/d", blockstore.Params{ID: "disk0", VM: "vm", Size: w.size, State: state}))
	return mem, w.openStore(mem)
}

// serve serves a disk by NBD until stop is called; clients dial the last one served.
func (w *carryWorld) serve(b nbd.Backend) (stop func()) {
	w.t.Helper()
	path := filepath.Join(w.t.TempDir(), "nbd")
	ln, err := net.Listen("unix", path)
	w.must(err)
	w.mu.Lock()
	w.sock = path
	w.mu.Unlock()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- nbd.Serve(ctx, ln, map[string]nbd.Backend{"disk0": b}, nbd.Options{Grace: 20 * time.Millisecond})
	}()
	return func() {
		cancel()
		if err := <-done; err != nil {
			w.t.Error(err)
		}
	}
}

func (w *carryWorld) dial(ctx context.Context) (net.Conn, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return (&net.Dialer{}).DialContext(ctx, "unix", w.sock)
}

// pair mirrors a to b.
func (w *carryWorld) pair() {
	var vols [2]mirror.Replica
	for n := range w.st {
		state := model.UpToDate
		w.mem[n], w.st[n] = w.newStore(state)
		vols[n] = blockstore.NewVolume(w.st[n], blockstore.VolumeOptions{})
	}
	w.src = mirror.NewSource(vols[:1])
	w.src.Own(mirror.Owner{
		Lost: func(_ int, err error) bool { w.news <- "lost"; return true },
		Back: func() { w.news <- "back" },
	})
	vols[0].(*blockstore.Volume).SetFetch(w.src.Export(0).Fetch)
	stream := make(chan []byte, 64)
	answer := func(take func([]byte) error) mirror.Send {
		return func(parts ...[]byte) error { return take(bytes.Join(parts, nil)) }
	}
	dst := mirror.NewTarget(vols[1:], answer(w.src.Done), answer(w.src.Data), func(err error) {
		select {
		case <-w.over: // what was on its way when the power failed
		default:
			w.t.Error(err)
		}
	})
	go func() {
		for p := range stream {
			if err := dst.Take(p); err != nil {
				w.t.Error(err)
			}
		}
	}()
	w.must(w.src.Join(func(parts ...[]byte) error { stream <- bytes.Join(parts, nil); return nil }, func() error { return nil }))
}

// decide is the authority: it hears of things in their order, and the record
// follows after a while.
func (w *carryWorld) decide(pause func()) {
	for {
		var what string
		select {
		case what = <-w.news:
		case <-w.over:
			return
		}
		pause()
		w.mu.Lock()
		select {
		case <-w.over:
			w.mu.Unlock()
			return
		default:
		}
		w.lost = what == "lost"
		w.mu.Unlock()
		if what == "lost" {
			w.src.Carry(true) // after the record
		}
	}
}

// spoil makes operations of a's file system fail from now on.
func (w *carryWorld) spoil(kind int) {
	some := rand.New(rand.NewPCG(w.rnd.Uint64(), 1))
	var mu sync.Mutex
	w.mem[0].SetHook(func(op vfs.Op) error {
		mu.Lock()
		defer mu.Unlock()
		switch {
		case kind == 0 && strings.HasSuffix(op.Path, ".raw"): // the image is gone
			return syscall.EIO
		case kind == 1 && (op.Kind == "write" || op.Kind == "zero" || op.Kind == "truncate"):
			return syscall.ENOSPC
		case kind == 2 && op.Kind == "sync":
			return syscall.EIO
		case kind == 3 && strings.HasSuffix(op.Path, ".raw") && some.IntN(3) == 0: // now and then
			return syscall.EIO
		case kind == 4:
			return syscall.ENXIO
		}
		return nil
	})
}

// replace gives a a new disk, which may fail as well while it is filled.
func (w *carryWorld) replace() error {
	mem, st := w.newStore(model.Inconsistent)
	fails := w.rnd.IntN(4) == 0
	if fails {
		at := 1 + w.rnd.IntN(20)
		mem.SetHook(func(op vfs.Op) error {
			if op.Kind != "read" && op.Index > at {
				return syscall.EIO
			}
			return nil
		})
	}
	v := blockstore.NewVolume(st, blockstore.VolumeOptions{})
	return w.src.Refill(context.Background(), 0, v, func(int64) {}, func() error {
		if err := st.SetMeta(func(m *blockstore.Meta) { m.State = model.UpToDate }); err != nil {
			return err
		}
		v.SetFetch(w.src.Export(0).Fetch)
		w.mem[0], w.st[0] = mem, st
		return nil
	})
}

// TestCarriedDisks lets the disk of the running side fail in every way and be
// replaced, while a client reads, writes and flushes. It never sees an error. Then
// the power of both hosts fails, and the disk is started from any replica that the
// record calls good: its history must be that of one disk.
func TestCarriedDisks(t *testing.T) {
	rounds := 12
	if testing.Short() {
		rounds = 3
	}
	first := uint64(time.Now().UnixNano())
	for n := range rounds {
		seed := first + uint64(n)
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			t.Parallel()
			t.Logf("seed %d", seed)
			carryRound(t, seed)
		})
	}
}

func carryRound(t *testing.T, seed uint64) {
	rnd := rand.New(rand.NewPCG(seed, 0))
	w := &carryWorld{t: t, rnd: rnd, size: 4 << 20, news: make(chan string, 64), over: make(chan struct{})}
	w.pair()
	stop := w.serve(w.src.Export(0))
	slow := time.Duration(1+rnd.IntN(10)) * time.Millisecond
	var decided sync.WaitGroup
	decided.Go(func() { w.decide(func() { time.Sleep(slow) }) })
	run := diskcheck.New(diskcheck.Config{Dial: w.dial, Export: "disk0", Seed: seed, Unit: 512, Units: 128, Span: 16, Depth: 4, Conns: 2})
	ctx, cancel := context.WithCancel(context.Background())
	loaded := make(chan error, 1)
	go func() { loaded <- run.Load(ctx, 1<<30) }()
	step := func() { time.Sleep(time.Duration(1+rnd.IntN(25)) * time.Millisecond) }
	faults := 1 + rnd.IntN(4)
	var said []string
	for n := range faults {
		step()
		kind := rnd.IntN(5)
		w.spoil(kind)
		if n == faults-1 && rnd.IntN(2) == 0 {
			said = append(said, fmt.Sprintf("fault %d, in the middle of it", kind))
			break // before the record says so, or just after
		}
		w.until("the disk is carried", func() bool { return len(w.src.Carried()) > 0 && w.isLost() })
		step()
		said = append(said, fmt.Sprintf("fault %d", kind))
		if rnd.IntN(3) == 0 {
			continue // the next fault meets a carried disk
		}
		for {
			err := w.replace()
			if err == nil {
				said = append(said, "replaced")
				break
			}
			if errors.Is(err, mirror.ErrNotCarried) {
				step() // the record does not say yet that it is lost again
			}
			said = append(said, "not replaced")
		}
	}
	step()
	// The power of both fails.
	w.mu.Lock()
	close(w.over)
	lost := w.lost
	w.mu.Unlock()
	cancel()
	if err := <-loaded; err != nil {
		t.Error(err)
	}
	w.src.Close()
	stop()
	decided.Wait()
	stats := run.Stats()
	if stats.Errors > 0 {
		t.Errorf("the client saw %d errors (%v)", stats.Errors, said)
	}
	side := 1
	if !lost && rnd.IntN(2) == 0 {
		side = 0
	}
	run.PowerLost()
	w.mem[side].SetHook(nil)
	after := w.openStore(w.mem[side].Crash(func() bool { return rnd.IntN(2) == 0 }))
	if after.Meta().State != model.UpToDate {
		t.Errorf("the record says that the replica is good, and it says itself that it is %s", after.Meta().State)
	}
	defer w.serve(blockstore.NewVolume(after, blockstore.VolumeOptions{}))()
	w.must(run.ReadAll(context.Background()))
	if err := run.Check(time.Minute); err != nil {
		t.Errorf("started from %c: %v", 'a'+rune(side), err)
	}
	t.Logf("%v; record lost %v, started from %c; %d reads, %d writes, %d flushes", said, lost, 'a'+rune(side), stats.Reads, stats.Writes, stats.Flushes)
}

func (w *carryWorld) isLost() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.lost
}

func (w *carryWorld) until(what string, ok func() bool) {
	w.t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			w.t.Fatalf("never: %s", what)
		}
	}
}

// rot changes a byte in an image under its store's feet.
func (w *carryWorld) rot(side int, off int64) {
	w.t.Helper()
	f, err := w.mem[side].OpenRead("/d/disk0.raw")
	w.must(err)
	defer f.Close()
	p := make([]byte, 1)
	_, err = f.ReadAt(p, off)
	w.must(err)
	g, err := w.mem[side].Open("/d/disk0.raw")
	w.must(err)
	defer g.Close()
	_, err = g.WriteAt([]byte{p[0] ^ 0x40}, off)
	w.must(err)
}

// TestMirrorRepairsRot: a block that rots on the running side is answered from the
// secondary's and repaired; one that rots on both is an error of the guest's, and
// costs no replica.
func TestMirrorRepairsRot(t *testing.T) {
	w := &carryWorld{t: t, rnd: rand.New(rand.NewPCG(1, 1)), size: 4 << 20, news: make(chan string, 64), over: make(chan struct{})}
	w.pair()
	defer w.src.Close()
	defer close(w.over)
	e, ctx := w.src.Export(0), context.Background()
	want := bytes.Repeat([]byte("perdure!"), 1024)
	w.must(e.WriteAt(ctx, want, 1<<20, false))
	w.must(e.Flush(ctx))
	got := make([]byte, len(want))
	w.rot(0, 1<<20+5000)
	w.must(e.ReadAt(ctx, got, 1<<20))
	if !bytes.Equal(got, want) {
		t.Error("rot was served")
	}
	if found, repaired := w.st[0].Damage(); found == 0 || repaired != 1 {
		t.Errorf("%d blocks found bad, %d repaired", found, repaired)
	}
	w.rot(0, 1<<20+100)
	w.must(e.WriteAt(ctx, []byte("part of a block that is bad"), 1<<20+512, false))
	copy(want[512:], "part of a block that is bad")
	w.must(w.st[0].ReadAt(got, 1<<20))
	if !bytes.Equal(got, want) {
		t.Error("the rest of a block that was written in part is not repaired")
	}
	w.rot(0, 1<<20+4096)
	w.rot(1, 1<<20+4096)
	if err := e.ReadAt(ctx, got, 1<<20); !errors.Is(err, mirror.ErrUnreadable) {
		t.Errorf("read of what is bad on both: %v", err)
	}
	if len(w.news)+len(w.src.Carried()) > 0 {
		t.Error("a replica was given up for a block")
	}
	w.must(e.WriteAt(ctx, want, 1<<20, false)) // whole blocks: good again
	w.must(e.ReadAt(ctx, got, 1<<20))
}
