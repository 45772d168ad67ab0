package shim

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"perdure/internal/bitmap"
	"perdure/internal/blockstore"
	"perdure/internal/model"
	"perdure/internal/replica"
	"perdure/internal/shimapi"
	"perdure/internal/vfs"
)

// TestRefillGoesOn: the filling of a new replica is interrupted by the loss of its host,
// the guest goes on on the other one. The resync from there compares everything, sends
// what is missing, and takes nothing of what is there on trust: not what the guest has
// changed since, not what never was of this line, not what lost power half written.
func TestRefillGoesOn(t *testing.T) {
	for seed := range uint64(3) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			rnd := rand.New(rand.NewPCG(seed, 9))
			b, a := newDiskHost(t, "b", model.UpToDate), newDiskHost(t, "a", model.Inconsistent)
			b.open(1, "bb")
			b.must(b.d.alone())
			b.fill(1, 0, 48<<20)
			a.open(2, "aa")
			b.s.mode.Term = 2
			fillFrom(b, a, 10, nil)
			line := b.st.Meta().Lineage.Current

			// a's disk is replaced: what beginRefill notes, then pieces, in any order.
			a.must(a.st.Close())
			a = newDiskHost(t, "a", model.Inconsistent)
			a.open(3, "ab")
			a.must(a.st.SetMeta(refilled(line)))
			const pieces = disksSize / (256 << 10)
			filled := 0
			for _, n := range rnd.Perm(pieces)[:pieces*3/4] {
				p := make([]byte, 256<<10)
				b.must(b.st.ReadAt(p, int64(n)*256<<10))
				a.must(a.st.WriteAt(p, int64(n)*256<<10))
				filled++
			}
			strange := int64(rnd.IntN(pieces))
			if seed == 1 { // of no line at all
				a.fill(0xee, strange*256<<10, 256<<10)
			}
			if seed == 2 {
				a.must(a.st.Flush())
			}
			mem := a.mem.Crash(func() bool { return rnd.IntN(2) == 0 })
			_ = a.st.Close() // of a host without power
			a.mem = mem
			b.must(b.d.lost())
			b.s.mode.Term = 4
			b.must(b.d.alone())
			for range 5 {
				b.fill(byte(2+rnd.IntN(200)), int64(rnd.IntN(disksSize>>16))<<16, 64<<10)
			}
			a.open(5, "ac")
			b.s.mode.Term = 5
			if m := a.st.Meta(); m.State != model.Inconsistent {
				t.Fatalf("a partial copy is %s", m.State)
			}
			n := fillFrom(b, a, 20, nil) // compares the images at its end
			if j := b.d.judgement(0); j.Verdict != replica.SourceFull || j.ByBitmap || j.Resume {
				t.Errorf("judged %s: bitmaps know nothing of what happened to this copy", replica.FormatJudgement(j))
			}
			if seed == 2 {
				if most := int64(pieces-filled+1)*4 + 5; n > most {
					t.Errorf("%d chunks were sent, although all but %d were there, durably", n, most)
				}
			}
			a.must(a.st.Close())
			b.must(b.st.Close())
		})
	}
}

// TestResyncCharges: beside a guest that is yielded to, a chunk that differs counts
// once for the pace, one that is equal half; an idle guest holds nothing up.
func TestResyncCharges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rnd := rand.New(rand.NewPCG(1, 1))
		p := newAskPair(t, blockstore.Options{})
		chunks := p.src.st.Chunks()
		all := bitmap.New(chunks)
		all.SetRange(0, chunks)
		const rate = 8 << 20
		run := func(ceiling int64) time.Duration {
			m := &latencyMeter{}
			p.d.governor = newGovernor(m, 0, ceiling)
			defer p.d.governor.close()
			copyOf := p.d.copy
			p.d.copy = func(c int64) error {
				if err := p.d.governor.wait(t.Context(), blockstore.ChunkSize/2); err != nil {
					return err
				}
				return copyOf(c)
			}
			defer func() { p.d.copy = copyOf }()
			begun := time.Now()
			if err := p.d.run(t.Context(), all); err != nil {
				t.Fatal(err)
			}
			p.settle()
			return time.Since(begun)
		}
		near := func(what string, got, want time.Duration) {
			if got < want*9/10 || got > want*11/10+100*time.Millisecond {
				t.Errorf("%s: %v, want %v", what, got, want)
			}
		}
		whole := time.Duration(askSize/(rate>>10)) * time.Second >> 10
		for c := range chunks {
			p.src.write(t, rnd, c)
		}
		near("all differs", run(rate), whole)
		near("all is equal", run(rate), whole/2)
		if d := run(0); d > 100*time.Millisecond {
			t.Errorf("beside an idle guest the pace costs %v", d)
		}
		if !bytes.Equal(p.src.image(t), p.dst.image(t)) {
			t.Error("the replicas differ")
		}
	})
}

// TestChunksAtOnce: full questions while nobody minds, small ones at the floor.
func TestChunksAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &latencyMeter{}
		g := newGovernor(m, 0, 0)
		defer g.close()
		if n := g.chunksAtOnce(256); n != 256 {
			t.Errorf("beside an idle guest %d chunks at once", n)
		}
		stop := guestIO(m, func() time.Duration { return time.Second })
		for range 200 {
			_ = g.wait(context.Background(), 64<<10)
			time.Sleep(50 * time.Millisecond)
		}
		if n := g.chunksAtOnce(256); n < 1 || n > 16 {
			t.Errorf("at the floor %d chunks at once", n)
		}
		stop()
		var none *governor
		if none.chunksAtOnce(7) != 7 {
			t.Error("without a governor fewer than asked for")
		}
	})
}

// TestReplicaHalfMade: a host that died at any moment while its replica was removed or
// made anew has a standby again; a replica that is whole is left as it is.
func TestReplicaHalfMade(t *testing.T) {
	mem := vfs.NewMem()
	old := storageOf
	storageOf = func(shimapi.Config) (vfs.FS, blockstore.Options) { return mem, blockstore.Options{} }
	t.Cleanup(func() { storageOf = old })
	d := model.DiskSpec{ID: "disk0", Size: 8 << 20}
	cfg := shimapi.Config{Dir: "/v", Spec: model.VMSpec{UUID: "vm", Disks: []model.DiskSpec{d}}}
	dir := "/v/" + shimapi.DiskDir
	errCut := errors.New("the power is gone")
	for at := 0; ; at++ {
		_ = blockstore.Abandon(mem, dir, d.ID)
		if err := makeReplica(cfg, d); err != nil {
			t.Fatal(err)
		}
		left := at
		mem.SetHook(func(vfs.Op) error {
			if left--; left < 0 {
				return errCut
			}
			return nil
		})
		err := blockstore.Abandon(mem, dir, d.ID)
		if err == nil {
			err = makeReplica(cfg, d)
		}
		mem.SetHook(nil)
		if again := makeReplica(cfg, d); again != nil {
			t.Fatalf("cut off after %d operations: %v", at, again)
		}
		st, oerr := blockstore.Open(mem, dir, d.ID, blockstore.Options{})
		if oerr != nil {
			t.Fatalf("cut off after %d operations: %v", at, oerr)
		}
		seq := st.Meta()
		_ = st.Close()
		if err := makeReplica(cfg, d); err != nil || seq.State != model.Inconsistent {
			t.Fatalf("%v, %s", err, seq.State)
		}
		if err == nil {
			if at < 5 {
				t.Fatalf("only %d operations", at)
			}
			return
		}
	}
}
