package shim

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"perdure/internal/blockstore"
	"perdure/internal/mirror"
	"perdure/internal/model"
)

// mirrored is a pair of level ca on real stores, without a guest: what the guest
// was told is kept beside, to be compared.
type mirrored struct {
	t    *testing.T
	r    *rand.Rand
	term model.Term
	runs int
	p, s *diskHost
	src  *mirror.Source
	told []byte // as the guest knows the disk: all writes that were answered
	// loose are blocks that were written since the last FLUSH.
	loose map[int64]bool
}

func (m *mirrored) open(h *diskHost) {
	m.runs++
	h.open(m.term, model.RunID(fmt.Sprintf("%016x", m.runs)))
	h.d.inst.vols = []*blockstore.Volume{blockstore.NewVolume(h.st, blockstore.VolumeOptions{})}
}

// at gives both hosts the record's new term.
func (m *mirrored) at() {
	m.term++
	m.p.s.mode.Term, m.s.s.mode.Term = m.term, m.term
}

// protect fills the secondary while the guest writes, and mirrors from then on.
func (m *mirrored) protect() int64 {
	m.t.Helper()
	m.at()
	m.src = mirror.NewSource(m.p.d.inst.replicas())
	n := fillFrom(m.p, m.s, 1, nil)
	m.p.d.inst.mirror = m.src
	m.p.d.inst.markMirrored()
	m.s.st.Detach() // as a standby of level ca, which is never attached
	dst := mirror.NewTarget(m.s.d.inst.replicas(), func(parts ...[]byte) error { return m.src.Done(bytes.Join(parts, nil)) },
		func(parts ...[]byte) error { return m.src.Data(bytes.Join(parts, nil)) }, func(err error) { m.t.Error(err) })
	m.p.must(m.src.Join(func(parts ...[]byte) error { return dst.Take(bytes.Join(parts, nil)) }, func() error { return nil }))
	m.at()
	return n
}

// write lets the guest write a little.
func (m *mirrored) write() {
	m.t.Helper()
	e, ctx := m.src.Export(0), context.Background()
	for range 1 + m.r.IntN(30) {
		switch m.r.IntN(6) {
		case 0:
			m.p.must(e.Flush(ctx))
			clear(m.loose)
			continue
		case 1:
			off := m.r.Int64N(disksSize/blockstore.BlockSize-64) * blockstore.BlockSize
			n := (1 + m.r.Int64N(64)) * blockstore.BlockSize
			m.p.must(e.Zero(ctx, off, n, false, m.r.IntN(2) == 0))
			clear(m.told[off : off+n])
			m.loosen(off, n)
			continue
		}
		p := bytes.Repeat([]byte{byte(1 + m.r.IntN(255))}, (1+m.r.IntN(20))*blockstore.BlockSize)
		off := m.r.Int64N((disksSize-int64(len(p)))/blockstore.BlockSize) * blockstore.BlockSize
		m.p.must(e.WriteAt(ctx, p, off, false))
		copy(m.told[off:], p)
		m.loosen(off, int64(len(p)))
	}
}

func (m *mirrored) loosen(off, n int64) {
	for b := off / blockstore.BlockSize; b < (off+n)/blockstore.BlockSize; b++ {
		m.loose[b] = true
	}
}

// crash takes the power of a host: of what was not synced some survives.
func (m *mirrored) crash(h *diskHost) {
	mem := h.mem.Crash(func() bool { return m.r.IntN(2) == 0 })
	_ = h.st.Close() // of a host without power
	h.mem = mem
}

// holds checks what a host has that the guest goes on with: all that was answered,
// or, after the power of both was lost, all that was flushed.
func (m *mirrored) holds(h *diskHost, all bool) {
	m.t.Helper()
	img := h.image()
	for off := int64(0); off < disksSize; off += blockstore.BlockSize {
		b := img[off : off+blockstore.BlockSize]
		if bytes.Equal(b, m.told[off:off+blockstore.BlockSize]) || !all && m.loose[off/blockstore.BlockSize] {
			continue
		}
		m.t.Fatalf("host %s lacks block %d, which the guest was told it has", h.name, off/blockstore.BlockSize)
	}
	copy(m.told, img)
}

// TestMirroredDisks lets hosts of a mirrored VM crash at random, one or both, and
// checks after each that nothing answered is lost and that the copies become equal again.
func TestMirroredDisks(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	m := &mirrored{t: t, r: rand.New(rand.NewPCG(seed, 3)), term: 1, p: newDiskHost(t, "a", model.UpToDate), s: newDiskHost(t, "b", model.Inconsistent),
		told: make([]byte, disksSize), loose: map[int64]bool{}}
	t.Logf("seed %d", seed)
	m.open(m.p)
	m.p.must(m.p.d.alone())
	m.open(m.s)
	m.protect()
	for round := range 12 {
		m.write()
		what := m.r.IntN(3)
		t.Logf("round %d: %s", round, []string{"the secondary is lost", "the primary is lost", "both are lost"}[what])
		switch what {
		case 0:
			m.crash(m.s)
			m.at()
			m.p.must(m.p.d.lost())
			m.p.must(m.p.d.alone())
			m.src.Alone()
			m.write()
		case 1:
			m.crash(m.p)
			m.at()
			m.s.must(m.s.st.Flush())
			m.s.must(m.s.d.lost())
			m.s.must(m.s.d.alone())
			m.p, m.s = m.s, m.p
			m.holds(m.p, true)
			clear(m.loose) // it was flushed there
			m.src = mirror.NewSource(m.p.d.inst.replicas())
			m.write()
		case 2:
			m.crash(m.p)
			m.crash(m.s)
			if m.r.IntN(2) == 0 {
				m.p, m.s = m.s, m.p
			}
			m.term++
			m.open(m.p)
			m.p.must(m.p.d.alone())
			m.holds(m.p, false)
			clear(m.loose) // it has seen a loss of power
			m.src = mirror.NewSource(m.p.d.inst.replicas())
			m.write()
		}
		m.open(m.s)
		n := m.protect() // which checks that the copies are equal
		t.Logf("%d of %d chunks copied, as %s", n, disksSize/blockstore.ChunkSize, m.p.d.judgement(0).Row)
		m.holds(m.p, true)
	}
	m.write()
	m.p.must(m.src.Export(0).Flush(context.Background()))
	if !bytes.Equal(m.p.image(), m.s.image()) {
		t.Error("the copies differ although all is quiet")
	}
	m.p.must(m.p.st.Close())
	m.s.must(m.s.st.Close())
}
