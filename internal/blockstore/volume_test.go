package blockstore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand"
	"runtime"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"perdure/internal/model"
	"perdure/internal/vfs"
)

// pair is a primary's volume and a secondary's store, and what each must hold.
type pair struct {
	t         *rapid.T
	v         *Volume
	sec       *Store
	disk      []byte // what the guest must read
	image     []byte // what the primary's image must hold
	cuts      []*EpochWrites
	snaps     [][]byte // disk at each cut
	epoch     model.Epoch
	lastImage []byte
}

func newPair(t *rapid.T, tb testing.TB) *pair {
	a, b := openStore(tb, vfs.NewMem(), "/d"), openStore(tb, vfs.NewMem(), "/d")
	n := a.Size()
	return &pair{t: t, v: NewVolume(a, VolumeOptions{}), sec: b, disk: make([]byte, n), image: make([]byte, n)}
}

func (p *pair) must(err error) {
	p.t.Helper()
	if err != nil {
		p.t.Fatal(err)
	}
}

// sectors draws a range at multiples of 512.
func (p *pair) sectors() (off, n int64) {
	total := int64(len(p.disk)) / 512
	a := rapid.Int64Range(0, total-1).Draw(p.t, "off")
	k := rapid.Int64Range(1, min(40, total-a)).Draw(p.t, "n")
	return a * 512, k * 512
}

func (p *pair) step(ctx context.Context, stamp byte) {
	held := p.v.Mode() == Held
	switch rapid.SampledFrom([]string{"write", "write", "write", "zero", "read", "flush", "cut", "cut", "commit", "mode", "stop"}).Draw(p.t, "step") {
	case "write":
		off, n := p.sectors()
		data := filled(stamp, int(n))
		p.must(p.v.WriteAt(ctx, data, off, rapid.Bool().Draw(p.t, "fua")))
		clear(data) // the volume must have copied it
		copy(p.disk[off:], filled(stamp, int(n)))
	case "zero":
		off, n := p.sectors()
		p.must(p.v.Zero(ctx, off, n, false, rapid.Bool().Draw(p.t, "punch")))
		clear(p.disk[off : off+n])
	case "read":
		off, n := p.sectors()
		got := make([]byte, n)
		p.must(p.v.ReadAt(ctx, got, off))
		if !bytes.Equal(got, p.disk[off:off+n]) {
			p.t.Fatalf("read %d+%d differs", off, n)
		}
	case "flush":
		p.must(p.v.Flush(ctx))
	case "stop":
		p.v.BeginStop()
		p.must(p.v.Flush(ctx))
		if rapid.Bool().Draw(p.t, "resumed") {
			p.v.EndStop()
		}
	case "cut":
		if held {
			p.cuts = append(p.cuts, p.v.Cut())
			p.snaps = append(p.snaps, bytes.Clone(p.disk))
		}
	case "commit":
		if len(p.cuts) > 0 {
			p.commit()
		}
	case "mode":
		if !held {
			p.must(p.v.SetMode(Held))
			return
		}
		if len(p.cuts) > 0 {
			nonEmpty := false
			for _, w := range p.cuts {
				nonEmpty = nonEmpty || w.layer != nil
			}
			if err := p.v.SetMode(Direct); nonEmpty && !errors.Is(err, ErrState) {
				p.t.Fatal("left mode held with epochs in flight:", err)
			} else if !nonEmpty {
				p.must(err)
				p.cuts, p.snaps = nil, nil
				copy(p.image, p.disk)
			}
			return
		}
		p.must(p.v.SetMode(Direct))
		copy(p.image, p.disk)
	}
	if p.v.Mode() == Direct {
		copy(p.image, p.disk)
	}
}

// commit carries the oldest cut epoch through both hosts.
func (p *pair) commit() {
	w, snap := p.cuts[0], p.snaps[0]
	p.cuts, p.snaps = p.cuts[1:], p.snaps[1:]
	p.epoch++
	if len(p.cuts) > 0 && p.cuts[0].layer != nil && w.layer != nil {
		if err := p.v.Commit(p.cuts[0]); !errors.Is(err, ErrState) {
			p.t.Fatal("committed out of order:", err)
		}
	}
	if rapid.Bool().Draw(p.t, "journaled here") {
		p.must(p.v.store.Persist(1, p.epoch, w))
	}
	d, err := Decode(w.AppendTo(nil), p.v.Size())
	p.must(err)
	p.must(p.sec.Persist(1, p.epoch, d))
	p.must(p.v.Commit(w))
	p.must(p.sec.Apply(p.epoch))
	copy(p.image, snap)
}

// checkImage holds up the invariant: the image has committed epochs, no more.
func (p *pair) checkImage() {
	got := make([]byte, len(p.image))
	p.must(p.v.store.ReadAt(got, 0))
	if !bytes.Equal(got, p.image) {
		p.t.Fatal("the image in place is not as of the last commit")
	}
	if len(p.cuts) == 0 && p.v.Mode() == Direct && p.v.HeldBytes() != 0 {
		p.t.Fatalf("%d bytes held by nothing", p.v.HeldBytes())
	}
}

func TestVolumeAgainstModel(t *testing.T) {
	ctx := context.Background()
	rapid.Check(t, func(rt *rapid.T) {
		p := newPair(rt, t)
		p.v.StartTracking()
		p.lastImage = bytes.Clone(p.image)
		for i := range rapid.IntRange(1, 60).Draw(rt, "steps") {
			p.step(ctx, byte(i+1))
			p.checkImage()
			if rapid.IntRange(0, 9).Draw(rt, "take") == 0 {
				p.checkDirty()
			}
		}
		got := make([]byte, len(p.disk))
		p.must(p.v.ReadAt(ctx, got, 0))
		if !bytes.Equal(got, p.disk) {
			rt.Fatal("the disk differs at the end")
		}
		p.checkDirty()
	})
}

// checkDirty: whatever changed in the image is marked.
func (p *pair) checkDirty() {
	b := p.v.TakeDirty()
	for c := range b.Len() {
		lo, hi := c*ChunkSize, min((c+1)*ChunkSize, int64(len(p.image)))
		if !b.Test(c) && !bytes.Equal(p.image[lo:hi], p.lastImage[lo:hi]) {
			p.t.Fatalf("chunk %d changed and is not marked", c)
		}
	}
	copy(p.lastImage, p.image)
}

// Both replicas are equal when everything was held from the start.
func TestReplicasStayEqual(t *testing.T) {
	ctx := context.Background()
	rapid.Check(t, func(rt *rapid.T) {
		p := newPair(rt, t)
		p.must(p.v.SetMode(Held))
		for e := range rapid.IntRange(1, 12).Draw(rt, "epochs") {
			for i := range rapid.IntRange(0, 6).Draw(rt, "writes") {
				off, n := p.sectors()
				if i%3 == 2 {
					p.must(p.v.Zero(ctx, off, n, false, i%2 == 0))
				} else {
					p.must(p.v.WriteAt(ctx, filled(byte(e*16+i+1), int(n)), off, false))
				}
			}
			p.cuts, p.snaps = append(p.cuts, p.v.Cut()), append(p.snaps, nil)
			if rapid.Bool().Draw(rt, "commit") {
				p.commit()
			}
		}
		for len(p.cuts) > 0 {
			p.commit()
		}
		a, b := make([]byte, len(p.disk)), make([]byte, len(p.disk))
		p.must(p.v.store.ReadAt(a, 0))
		p.must(p.sec.ReadAt(b, 0))
		if !bytes.Equal(a, b) || p.v.HeldBytes() != 0 {
			rt.Fatal("replicas differ")
		}
	})
}

func TestObligations(t *testing.T) {
	ctx := context.Background()
	v := NewVolume(openStore(t, vfs.NewMem(), "/d"), VolumeOptions{})
	if err := v.SetMode(Held); err != nil {
		t.Fatal(err)
	}
	e := model.Epoch(0)
	expect := func(what string, within, before bool) {
		t.Helper()
		w := v.Cut()
		if w.FlushWithin() != within || w.FlushBefore() != before {
			t.Fatalf("%s: within %v before %v", what, w.FlushWithin(), w.FlushBefore())
		}
		e++
		if err := v.Store().Persist(1, e, w); err != nil {
			t.Fatal(err)
		}
		if err := v.Commit(w); err != nil {
			t.Fatal(err)
		}
	}
	flush := func() { _ = v.Flush(ctx) }
	write := func() { _ = v.WriteAt(ctx, filled(1, BlockSize), 0, false) }

	flush()
	expect("direct writes before", false, true)
	flush()
	expect("nothing since", false, false)
	write()
	expect("no flush", false, false)
	flush()
	expect("covers the epoch before", false, true)
	write()
	flush()
	write()
	expect("flush within", true, false)
	write()
	v.BeginStop()
	flush()
	flush()
	expect("in the stop window", false, false)
	expect("counts for the next", false, true)
	write()
	v.BeginStop()
	flush()
	v.Stopped(time.Now().Add(time.Second))
	expect("before the guest stood still", true, false)
	write()
	expect("no flush", false, false)
	v.BeginStop()
	flush()
	v.Stopped(time.Now().Add(time.Second))
	expect("before it stood still, and nothing written", false, true)
	write()
	v.BeginStop()
	at := time.Now()
	time.Sleep(time.Millisecond) // QEMU's own comes after its word of it, which is told in microseconds
	flush()
	v.Stopped(at)
	expect("after it stood still", false, false)
	expect("counts for the next, too", false, true)
	write()
	v.BeginStop()
	flush()
	v.Stopped(time.Time{})
	expect("nobody knows since when", true, false)
	write()
	v.BeginStop()
	v.stopFrom = v.stopFrom.Add(-time.Second) // by both clocks
	flush()
	v.Stopped(at)
	expect("after it stood still, for long", false, false)
	expect("counts for the next as well", false, true)
	v.BeginStop()
	flush()
	expect("nothing to make durable", false, false)
	expect("nor after", false, false)
	write()
	v.BeginStop()
	flush()
	v.EndStop()
	expect("window without a cut", true, false)
	_ = v.WriteAt(ctx, filled(1, BlockSize), 0, true)
	expect("FUA", true, false)
	if !v.Cut().Empty() {
		t.Fatal("not empty")
	}
	write()
	v.BeginStop()
	flush()
	w := v.Cut()
	if err := v.Commit(w); err != nil {
		t.Fatal(err)
	}
	if err := v.SetMode(Direct); err != nil { // the flush of the window is still owed
		t.Fatal(err)
	}
	if v.store.durable.Load() != v.store.written.Load() {
		t.Fatal("a flush was forgotten on the way to direct mode")
	}
}

func TestLimits(t *testing.T) {
	ctx := context.Background()
	v := NewVolume(openStore(t, vfs.NewMem(), "/d"), VolumeOptions{HeldLimit: 8 * BlockSize})
	if err := v.SetMode(Held); err != nil {
		t.Fatal(err)
	}
	write := func(n int64) {
		t.Helper()
		if err := v.WriteAt(ctx, filled(1, BlockSize), n*BlockSize, false); err != nil {
			t.Fatal(err)
		}
	}
	for n := range int64(7) {
		write(n)
		write(n) // again costs nothing
	}
	select {
	case <-v.Full():
		t.Fatal("too early")
	default:
	}
	write(7)
	<-v.Full()
	if v.HeldBytes() != 8*BlockSize {
		t.Fatal(v.HeldBytes())
	}
	w := v.Cut()
	for n := range int64(8) {
		write(n)
	}
	begin := time.Now()
	write(9)
	if time.Since(begin) < overLimitDelay/2 {
		t.Fatal("not slowed down")
	}
	if err := v.Commit(w); err != nil {
		t.Fatal(err)
	}
	if v.HeldBytes() != 9*BlockSize {
		t.Fatal(v.HeldBytes())
	}
	// A TRIM of everything costs next to nothing.
	if err := v.Zero(ctx, 0, v.Size(), false, true); err != nil {
		t.Fatal(err)
	}
	w = v.Cut()
	if n := len(w.AppendTo(nil)); n > 20 {
		t.Fatalf("%d bytes for a TRIM", n)
	}
	if err := v.Commit(w); err != nil {
		t.Fatal(err)
	}
	if v.HeldBytes() != 0 {
		t.Fatal(v.HeldBytes())
	}
	if n, hole, err := v.Extent(ctx, 0, v.Size()); n != v.Size() || !hole || err != nil {
		t.Fatal(n, hole, err)
	}
}

func TestLeavingHeldModeOnAFullDiskCanBeRepeated(t *testing.T) {
	ctx := context.Background()
	m := vfs.NewMem()
	v := NewVolume(openStore(t, m, "/d"), VolumeOptions{})
	if err := v.SetMode(Held); err != nil {
		t.Fatal(err)
	}
	if err := v.WriteAt(ctx, filled(3, BlockSize), 0, true); err != nil {
		t.Fatal(err)
	}
	full := errors.New("full")
	m.SetHook(func(op vfs.Op) error {
		if op.Kind == "write" && op.Path == "/d/disk0.raw" {
			return full
		}
		return nil
	})
	if err := v.SetMode(Direct); !errors.Is(err, full) || v.Mode() != Held {
		t.Fatal(err)
	}
	m.SetHook(nil)
	if err := v.SetMode(Direct); err != nil || v.Mode() != Direct {
		t.Fatal(err)
	}
	if got := stamps(t, v.Store()); got[0] != 3 {
		t.Fatal(got)
	}
}

// TestConcurrentGuest runs requests, cuts and commits at once; run it with -race.
func TestConcurrentGuest(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	dir := t.TempDir()
	if err := Create(vfs.OS{}, dir, testParams()); err != nil {
		t.Fatal(err)
	}
	s, err := Open(vfs.OS{}, dir, "disk0", Options{JournalLimit: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Replay(); err != nil {
		t.Fatal(err)
	}
	v := NewVolume(s, VolumeOptions{})
	v.StartTracking()
	var guests sync.WaitGroup
	for g := range int64(4) {
		guests.Go(func() {
			// Each guest thread has sectors of its own in every block, so blocks are shared.
			rng := rand.New(rand.NewSource(g))
			var last [testBlocks]byte
			for i := range 400 {
				n := rng.Int63n(testBlocks)
				off := n*BlockSize + g*1024
				stamp := byte(i%250 + 1)
				var err error
				switch rng.Intn(5) {
				case 0:
					stamp = 0
					err = v.Zero(ctx, off, 1024, false, true)
				case 1:
					err = v.Flush(ctx)
					stamp = last[n]
				default:
					err = v.WriteAt(ctx, filled(stamp, 1024), off, rng.Intn(9) == 0)
				}
				last[n] = stamp
				got := make([]byte, 1024)
				if err == nil {
					err = v.ReadAt(ctx, got, off)
				}
				if err == nil && !bytes.Equal(got, filled(stamp, 1024)) {
					err = fmt.Errorf("guest %d block %d: read %d, want %d", g, n, got[0], stamp)
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	var shim sync.WaitGroup
	shim.Go(func() {
		for e := model.Epoch(1); ctx.Err() == nil; e++ {
			if e%16 == 0 {
				if err := v.SetMode(Direct); err != nil {
					t.Error(err)
				}
				_, _, _ = v.Extent(ctx, 0, v.Size())
				_ = v.TakeDirty()
			}
			if e%16 == 4 {
				if err := v.SetMode(Held); err != nil {
					t.Error(err)
				}
			}
			w := v.Cut()
			if err := errors.Join(v.Store().Persist(1, e, w), v.Commit(w)); err != nil {
				t.Error(err)
				return
			}
		}
	})
	guests.Wait()
	cancel()
	shim.Wait()
	if err := v.SetMode(Direct); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestRangeLock(t *testing.T) {
	var l rangeLock
	a := l.lock(0, 10)
	b := l.lock(10, 20)
	order := make(chan string, 3)
	start := func(name string, from, to int64, queued int) {
		go func() {
			e := l.lock(from, to)
			order <- name
			l.unlock(e)
		}()
		for { // until it is in the queue
			l.mu.Lock()
			n := len(l.list)
			l.mu.Unlock()
			if n == queued {
				return
			}
			runtime.Gosched()
		}
	}
	start("first", 5, 15, 3)
	start("second", 9, 30, 4) // must not overtake, although it waits for b alone when a is gone
	l.unlock(b)
	l.unlock(a)
	if x, y := <-order, <-order; x != "first" || y != "second" {
		t.Fatal(x, y)
	}
}
