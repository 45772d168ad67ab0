package shim

import (
	"bytes"
	"context"
	"log/slog"
	"testing"

	"perdure/internal/blockstore"
	"perdure/internal/model"
	"perdure/internal/replica"
	"perdure/internal/vfs"
)

// diskHost is one host of a pair without a guest: a replica and its machine.
type diskHost struct {
	t    *testing.T
	name string
	mem  *vfs.Mem
	s    *Shim
	d    *disks
	st   *blockstore.Store
}

const disksSize = 64 << 20

func newDiskHost(t *testing.T, name string, state model.ReplicaState) *diskHost {
	t.Helper()
	h := &diskHost{t: t, name: name, mem: vfs.NewMem()}
	if err := blockstore.Create(h.mem, "/d", blockstore.Params{ID: "disk0", VM: "vm", Size: disksSize, State: state}); err != nil {
		t.Fatal(err)
	}
	return h
}

// open is a shim's start in a term.
func (h *diskHost) open(term model.Term, run model.RunID) {
	h.t.Helper()
	st, err := blockstore.Open(h.mem, "/d", "disk0", blockstore.Options{})
	if err != nil {
		h.t.Fatal(err)
	}
	clean := st.Meta().Clean
	if _, err := st.Replay(); err != nil {
		h.t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	h.s = &Shim{log: log, tl: newTimeline("vm", h.name, nil, log), ctx: context.Background()}
	h.s.cfg.Host, h.s.cfg.Spec.UUID = h.name, "vm"
	h.s.mode.Term, h.s.mode.Run = term, run
	h.st = st
	h.d = newDisks(h.s, &instance{log: log, stores: []*blockstore.Store{st}, clean: []bool{clean}})
}

func (h *diskHost) must(err error) {
	h.t.Helper()
	if err != nil {
		h.t.Fatalf("host %s: %v", h.name, err)
	}
}

func (h *diskHost) fill(b byte, off, n int64) {
	h.t.Helper()
	h.must(h.st.WriteAt(bytes.Repeat([]byte{b}, int(n)), off))
}

func (h *diskHost) image() []byte {
	h.t.Helper()
	p := make([]byte, disksSize)
	h.must(h.st.ReadAt(p, 0))
	return p
}

// fillFrom plays a resync from src to dst, as the two shims do, and returns how
// many chunks were copied. during runs while it is under way.
func fillFrom(src, dst *diskHost, first model.Epoch, during func()) int64 {
	t := src.t
	t.Helper()
	g := replica.Generation{Term: src.s.mode.Term, Run: src.s.mode.Run}
	_, err := dst.d.all(replica.EvGrant{Kind: replica.GrantTarget})
	dst.must(err)
	_, err = src.d.all(replica.EvGrant{Kind: replica.GrantSource, Line: g})
	src.must(err)
	_, err = dst.d.meet(hello{Host: src.name, UUID: "vm", Disks: src.d.hello()}, "")
	dst.must(err)
	theirs := dst.d.hello()
	words, err := src.d.meet(hello{Host: dst.name, UUID: "vm", Term: g.Term, Disks: theirs}, dst.s.mode.Run+"x")
	src.must(err)
	var pump func(from, to *diskHost, words []diskWord)
	pump = func(from, to *diskHost, words []diskWord) {
		from.must(from.d.sendWords(words, func(kind uint8, content ...[]byte) error {
			p := bytes.Join(content, nil)
			if kind == kindDiskMarks {
				return to.d.takeMarks(p)
			}
			back, err := to.d.takeWord(p)
			if err == nil {
				pump(to, from, back)
			}
			return err
		}))
	}
	pump(src, dst, words)
	if copying, _, refused := src.d.state(); !copying {
		t.Fatalf("nothing is copied: %q, %s", refused, replica.FormatJudgement(src.d.judgement(0)))
	}
	if during != nil {
		during()
	}
	marks, copied := src.st.Missing(), int64(0)
	buf, old := make([]byte, blockstore.ChunkSize), make([]byte, blockstore.ChunkSize)
	for at := int64(0); ; {
		c, _, ok := marks.Next(at, 1)
		if !ok {
			break
		}
		at = c + 1
		src.must(src.st.ReadAt(buf, c*blockstore.ChunkSize))
		dst.must(dst.st.ReadAt(old, c*blockstore.ChunkSize))
		if src.d.compares(0) && bytes.Equal(buf, old) {
			continue // digests tell
		}
		dst.must(dst.st.WriteAt(buf, c*blockstore.ChunkSize))
		copied++
	}
	src.d.attach(first)
	_, err = src.d.all(replica.EvCaughtUp{})
	src.must(err)
	words, err = src.d.all(replica.EvRestSent{})
	src.must(err)
	pump(src, dst, words)
	words, err = dst.d.all(replica.EvBoundary{})
	dst.must(err)
	dst.d.attach(first)
	pump(dst, src, words)
	if _, whole, _ := src.d.state(); !whole {
		t.Fatal("the source does not know the target to be whole")
	}
	if !bytes.Equal(src.image(), dst.image()) {
		t.Fatal("the copies differ after the resync")
	}
	return copied
}

// both does an epoch on both hosts.
func both(e model.Epoch, off int64, b byte, hosts ...*diskHost) {
	for _, h := range hosts {
		v := blockstore.NewVolume(h.st, blockstore.VolumeOptions{})
		h.must(v.SetMode(blockstore.Held))
		h.must(v.WriteAt(context.Background(), bytes.Repeat([]byte{b}, blockstore.BlockSize), off, false))
		h.must(v.Flush(context.Background()))
		w := v.Cut()
		h.must(h.st.Persist(1, e, w))
		h.must(h.st.Apply(e))
		h.d.committed(e)
	}
}

// TestDisksOutage: an outage of the secondary, then of the primary, cost what was
// written meanwhile, with real stores.
func TestDisksOutage(t *testing.T) {
	a, b := newDiskHost(t, "a", model.UpToDate), newDiskHost(t, "b", model.Inconsistent)
	a.open(1, "aa")
	a.must(a.d.alone())
	a.fill(1, 0, 32<<20)
	b.open(2, "bb")
	a.s.mode.Term = 2
	if n := fillFrom(a, b, 10, func() { a.fill(2, 5<<20, 1<<20) }); n != disksSize/blockstore.ChunkSize {
		t.Errorf("the first copy has %d chunks", n)
	}
	a.s.mode.Term, b.s.mode.Term = 3, 3
	for e := model.Epoch(10); e < 20; e++ {
		both(e, int64(e)<<20, byte(e), a, b)
	}
	for _, h := range []*diskHost{a, b} {
		h.must(h.st.Flush())
	}
	a.st.PeerDurable(b.st.DurableThrough())
	b.st.PeerDurable(a.st.DurableThrough())
	both(20, 40<<20, 20, a, b)

	// b is lost; a goes on alone.
	b.must(b.st.Close())
	a.must(a.d.lost())
	a.s.mode.Term = 4
	a.must(a.d.alone())
	a.fill(3, 50<<20, 300<<10)
	b.open(5, "bc")
	a.s.mode.Term = 5
	n := fillFrom(a, b, 30, nil)
	if j := a.d.judgement(0); j.Row != "peer-missed-last" {
		t.Errorf("judged %s", replica.FormatJudgement(j))
	}
	if n < 5 || n > 5+2*blockstore.ExtentSize/blockstore.ChunkSize {
		t.Errorf("%d chunks were copied; 6 were written, and 1 was on its way", n)
	}
	a.s.mode.Term, b.s.mode.Term = 6, 6
	both(30, 41<<20, 30, a, b)

	// a's power fails in the middle of an epoch that b does not have; b takes over.
	both(31, 42<<20, 31, a)
	n = 0
	mem := a.mem.Crash(func() bool { n++; return n%2 == 0 }) // some of what was not synced survives
	_ = a.st.Close()                                         // of a host without power
	a.mem = mem
	b.must(b.d.lost())
	b.s.mode.Term = 7
	b.must(b.d.alone())
	b.fill(4, 60<<20, 64<<10)
	want := b.image()
	a.open(8, "ac")
	b.s.mode.Term = 8
	if n := fillFrom(b, a, 40, nil); n > 8 {
		t.Errorf("%d chunks were copied back", n)
	}
	if !bytes.Equal(a.image(), want) {
		t.Error("the old primary kept what nobody else has")
	}
	a.must(a.st.Close())
	b.must(b.st.Close())
}

// TestDisksSplitBrain: two copies that were both written alone are not merged.
func TestDisksSplitBrain(t *testing.T) {
	a, b := newDiskHost(t, "a", model.UpToDate), newDiskHost(t, "b", model.Inconsistent)
	a.open(1, "aa")
	a.must(a.d.alone())
	b.open(2, "bb")
	a.s.mode.Term = 2
	fillFrom(a, b, 10, nil)
	for _, h := range []*diskHost{a, b} {
		h.must(h.d.lost())
	}
	a.s.mode.Term, b.s.mode.Term = 4, 5 // no store hands that out
	a.must(a.d.alone())
	b.must(b.d.alone())
	a.fill(1, 0, 4096)
	b.fill(2, 4096, 4096)
	ia, ib := a.image(), b.image()
	b.must(b.st.Close())
	b.open(6, "bc")
	a.s.mode.Term = 6
	_, err := a.d.all(replica.EvGrant{Kind: replica.GrantSource, Line: replica.Generation{Term: 6, Run: "aa"}})
	a.must(err)
	words, err := a.d.meet(hello{Host: "b", UUID: "vm", Term: 6, Disks: b.d.hello()}, "bc")
	a.must(err)
	if len(words) != 1 || words[0].Message.Kind != replica.MsgRefuse {
		t.Fatalf("said %+v", words)
	}
	if _, _, refused := a.d.state(); refused == "" {
		t.Error("no reason is given")
	}
	if p := a.s.tl.problems(); len(p) != 1 || p[0].Code != "split-brain" {
		t.Errorf("problems %+v", p)
	}
	if !bytes.Equal(a.image(), ia) || !bytes.Equal(b.image(), ib) {
		t.Error("a copy was changed")
	}
	a.must(a.st.Close())
	b.must(b.st.Close())
}
