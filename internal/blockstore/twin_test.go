package blockstore

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand"
	"strings"
	"syscall"
	"testing"

	"perdure/internal/bitmap"
	"perdure/internal/model"
	"perdure/internal/vfs"
)

// Twins are the two replicas of a disk, each on a file system of its own that can
// crash. They check the invariant that incremental resync rests on: after any
// crash of either or both, every block in which the images differ is in the
// activity log or the bitmap of one of them.

const twinExtents = 16

type twins struct {
	rng    *rand.Rand
	fs     [2]*vfs.Mem
	s      [2]*Store
	epoch  model.Epoch
	stamp  int
	touch  map[int64]bool // blocks ever written
	joined bool           // both get every write
	resync []int64        // chunks still to copy while joined
	copied []int64        // copied and not cleared yet
	log    []string
	early  bool // mutant: reports what is not durable
}

func twinParams() Params {
	p := testParams()
	p.Size = twinExtents * ExtentSize
	return p
}

func openTwin(m *vfs.Mem) (*Store, error) { return openTwinOn(m, "/d") }

func openTwinOn(m vfs.FS, dir string) (*Store, error) {
	s, err := Open(m, dir, "disk0", Options{JournalLimit: 64 << 10, NoAutoTrim: true, Activity: 5})
	if err != nil {
		return nil, err
	}
	_, err = s.Replay()
	return s, err
}

func newTwins(t *testing.T, seed int64) *twins {
	w := &twins{rng: rand.New(rand.NewSource(seed)), touch: map[int64]bool{}, epoch: 1, joined: true}
	for i := range w.s {
		w.fs[i] = vfs.NewMem()
		if err := Create(w.fs[i], "/d", twinParams()); err != nil {
			t.Fatal(err)
		}
		var err error
		if w.s[i], err = openTwin(w.fs[i]); err != nil {
			t.Fatal(err)
		}
		w.s[i].Attach(w.epoch)
	}
	return w
}

// report makes both sides tell what they have durable.
func (w *twins) report(flush bool) error {
	if flush {
		for _, s := range w.s {
			if err := s.Flush(); err != nil {
				return err
			}
		}
	}
	if !w.joined {
		return nil
	}
	a, b := w.s[0].DurableThrough(), w.s[1].DurableThrough()
	if w.early {
		a, b = w.epoch, w.epoch
	}
	w.s[0].PeerDurable(b)
	w.s[1].PeerDurable(a)
	return nil
}

// line ends an epoch on both sides.
func (w *twins) line() {
	for i, s := range w.s {
		if i == 0 || w.joined {
			s.Committed(w.epoch)
		}
	}
	w.epoch++
}

// room reports before anybody would have to wait for it: one step touches three extents at most.
func (w *twins) room() error {
	for i, s := range w.s {
		if st := s.Activity(); st.Attached && st.Extents+3 > st.Limit && (i == 0 || w.joined) {
			w.line()
			return w.report(true)
		}
	}
	return nil
}

func (w *twins) both(do func(s *Store) error) error {
	order := []int{0, 1}
	if w.rng.Intn(2) == 0 {
		order = []int{1, 0}
	}
	for _, i := range order {
		if i == 1 && !w.joined {
			continue
		}
		if err := do(w.s[i]); err != nil {
			return err
		}
	}
	return nil
}

func (w *twins) block() int64 {
	n := w.rng.Int63n(twinExtents)*blocksPerExtent + w.rng.Int63n(3)*16 + w.rng.Int63n(3)
	w.touch[n] = true
	return n
}

func (w *twins) step() error {
	if err := w.room(); err != nil {
		return err
	}
	w.stamp++
	k := w.rng.Intn(24)
	switch {
	case k < 9:
		n := w.block()
		w.note("write %d", n)
		data := stampBlock(w.stamp)
		off := n * BlockSize
		if w.rng.Intn(4) == 0 { // a part of a block
			data, off = data[:1024], off+512
		}
		return w.both(func(s *Store) error { return s.WriteAt(data, off) })
	case k < 10:
		n := w.block()
		w.note("zero %d", n)
		return w.both(func(s *Store) error { return s.Zero(n*BlockSize, BlockSize, w.stamp%2 == 0) })
	case k < 13 && w.joined && len(w.resync) == 0:
		return w.oneEpoch()
	case k < 15:
		w.note("flush")
		return w.report(true)
	case k < 17:
		w.note("line")
		w.line()
		return w.report(w.rng.Intn(2) == 0)
	case k < 18 && w.joined:
		w.note("part")
		w.part()
	case k < 20 && !w.joined:
		w.note("join")
		return w.join()
	case k < 23 && len(w.resync) > 0:
		return w.copyOne()
	case k == 23:
		w.note("save")
		return w.s[0].SaveMissing()
	}
	return nil
}

func (w *twins) note(f string, args ...any) { w.log = append(w.log, fmt.Sprintf(f, args...)) }

// oneEpoch carries writes through journals, as a protected VM does.
func (w *twins) oneEpoch() error {
	l := newLayer()
	for range w.rng.Intn(3) + 1 {
		b := new(block)
		copy(b[:], stampBlock(w.stamp))
		l.blocks[w.block()] = b
	}
	mk := func() *EpochWrites { return &EpochWrites{layer: l, within: w.stamp%3 == 0} }
	w.note("epoch %d", w.epoch)
	e := w.epoch
	if err := w.s[1].Persist(1, e, mk()); err != nil {
		return err
	}
	if w.rng.Intn(2) == 0 {
		if err := w.s[0].Persist(1, e, mk()); err != nil {
			return err
		}
		if err := w.s[0].Apply(e); err != nil {
			return err
		}
	} else if err := w.s[0].applyDirect(mk()); err != nil {
		return err
	}
	if err := w.s[1].Apply(e); err != nil {
		return err
	}
	w.line()
	return nil
}

func (w *twins) part() {
	w.joined = false
	w.resync, w.copied = nil, nil
	for _, s := range w.s {
		s.Detach()
	}
}

// join connects again: what either side names is copied, beside new writes.
func (w *twins) join() error {
	u := w.s[1].Missing()
	w.s[0].MarkMissingSet(u)
	if err := w.s[0].SaveMissing(); err != nil {
		return err
	}
	w.s[1].ClearMissing(0, w.s[1].Chunks()) // the source has it, durably
	w.resync = nil
	for at := int64(0); ; {
		start, end, ok := w.s[0].NextMissing(at, 1)
		if !ok {
			break
		}
		w.resync = append(w.resync, start)
		at = end
	}
	for _, s := range w.s {
		s.Attach(w.epoch)
	}
	w.joined = true
	return nil
}

func (w *twins) copyOne() error {
	c := w.resync[0]
	w.note("copy %d", c)
	p := make([]byte, ChunkSize)
	err := w.s[0].ReadStable(p, c*ChunkSize, func() error {
		if IsZero(p) {
			return w.s[1].Zero(c*ChunkSize, ChunkSize, true)
		}
		return w.s[1].WriteAt(p, c*ChunkSize)
	})
	if err != nil {
		return err
	}
	w.resync = w.resync[1:]
	if w.copied = append(w.copied, c); len(w.copied) < 8 && len(w.resync) > 0 {
		return nil
	}
	if err := w.s[1].Flush(); err != nil {
		return err
	}
	for _, c := range w.copied {
		w.s[0].ClearMissing(c, c+1)
	}
	w.copied = nil
	return nil
}

// recover opens again what has crashed, and compares.
func (w *twins) recover(crashed [2]bool, keep func() bool) error {
	union := bitmap.New(w.s[0].Chunks())
	for i := range w.s {
		if crashed[i] {
			w.fs[i] = w.fs[i].Crash(keep)
			s, err := openTwin(w.fs[i])
			if err != nil {
				return err
			}
			w.s[i] = s
		} else {
			w.s[i].Detach()
		}
		union.Or(w.s[i].Missing())
	}
	var p [2][BlockSize]byte
	for n := range w.touch {
		for i := range p {
			if err := w.s[i].ReadAt(p[i][:], n*BlockSize); err != nil {
				return fmt.Errorf("replica %d: %w", i, err)
			}
		}
		if p[0] != p[1] && !union.Test(n*BlockSize/ChunkSize) {
			return fmt.Errorf("block %d (extent %d) differs, and neither replica knows", n, n/blocksPerExtent)
		}
	}
	return nil
}

// again goes on after a crash: all that is named is copied, and then nothing differs.
func (w *twins) again() error {
	w.joined, w.resync, w.copied = false, nil, nil
	for _, s := range w.s {
		s.Detach()
		for {
			more, err := s.Reassure()
			if err != nil {
				return err
			}
			if !more {
				break
			}
		}
	}
	if err := w.join(); err != nil {
		return err
	}
	for len(w.resync) > 0 {
		if err := w.room(); err != nil {
			return err
		}
		if err := w.copyOne(); err != nil {
			return err
		}
	}
	var p [2][BlockSize]byte
	for n := range w.touch {
		for i := range p {
			if err := w.s[i].ReadAt(p[i][:], n*BlockSize); err != nil {
				return err
			}
		}
		if !bytes.Equal(p[0][:], p[1][:]) {
			return fmt.Errorf("block %d differs after the resync", n)
		}
	}
	return nil
}

// crashTwins runs one seed with a crash after so many operations, of one side or
// both; lie names files whose syncs do nothing. ended: it was over before.
func crashTwins(seed int64, w *twins, who [2]bool, stop int, keep func() bool, lie string) (ended bool, err error) {
	ops := 0
	hook := func(op vfs.Op) error {
		if op.Kind == "read" {
			return nil
		}
		if ops++; ops > stop {
			return vfs.ErrCrashed
		}
		return nil
	}
	for i := range who {
		if lie != "" {
			w.fs[i].SetLie(func(path string) bool { return strings.HasSuffix(path, lie) })
		}
		if who[i] {
			w.fs[i].SetHook(hook)
		}
	}
	for i := 0; i < 60 && err == nil; i++ {
		err = w.step()
	}
	ended = err == nil
	if err != nil && !errors.Is(err, vfs.ErrCrashed) {
		return ended, err
	}
	for i := range who {
		w.fs[i].SetHook(nil)
		w.fs[i].SetLie(nil)
	}
	if err := w.recover(who, keep); err != nil {
		return ended, err
	}
	if stop%4 == int(seed)%4 {
		if err := w.again(); err != nil {
			return ended, fmt.Errorf("resync: %w", err)
		}
	}
	return ended, nil
}

// An operation that fails once, without a crash: what the error leaves in doubt is
// known as well, whether the process lives on or is started again.
func TestWhatDiffersIsKnownAfterErrors(t *testing.T) {
	cases, seeds := 0, int64(2)
	if testing.Short() {
		seeds = 2
	}
	for seed := range seeds {
		for stop := 0; ; stop++ {
			w := newTwins(t, seed)
			ops, side := 0, stop%2
			fault := []error{syscall.EIO, syscall.ENOSPC}[stop/2%2]
			w.fs[side].SetHook(func(op vfs.Op) error {
				if op.Kind == "read" {
					return nil
				}
				if ops++; ops == stop/2+1 {
					return fault
				}
				return nil
			})
			var err error
			for i := 0; i < 60 && err == nil; i++ {
				err = w.step()
			}
			if err == nil && ops <= stop/2 {
				break
			}
			if err != nil && !errors.Is(err, fault) {
				t.Fatal(seed, stop, err)
			}
			w.fs[side].SetHook(nil)
			var again [2]bool
			again[side] = w.s[side].Err() != nil || stop%3 == 0
			if rerr := w.recover(again, func() bool { return w.rng.Intn(2) == 0 }); rerr != nil {
				t.Fatalf("seed %d, operation %d of side %d failed with %v (%v), started again %v: %v\n%s", seed, stop/2, side, fault, err, again, rerr, strings.Join(w.log, ", "))
			}
			if stop%5 == 0 {
				if rerr := w.again(); rerr != nil {
					t.Fatalf("seed %d, operation %d of side %d failed: resync: %v\n%s", seed, stop/2, side, rerr, strings.Join(w.log, ", "))
				}
			}
			cases++
		}
	}
	t.Logf("%d errors", cases)
}

// everyTwin tries crashes of one or both sides until one of them shows a fault.
func everyTwin(t *testing.T, seeds int64, early bool, lie string) (cases int, fault error) {
	t.Helper()
	for seed := range seeds {
		for k, who := range [][2]bool{{true, false}, {false, true}, {true, true}} {
			for stop := k; ; stop += 3 {
				ended := false
				for name, keep := range keeps(seed*1000 + int64(stop)) {
					if (len(name)+stop)%3 != 0 && name != "none" {
						continue
					}
					cases++
					w := newTwins(t, seed)
					w.early = early
					var err error
					if ended, err = crashTwins(seed, w, who, stop, keep, lie); err != nil {
						return cases, fmt.Errorf("seed %d, %v crashed after %d operations, %s survives: %w\n%s", seed, who, stop, name, err, strings.Join(w.log, ", "))
					}
				}
				if ended {
					break
				}
			}
		}
	}
	return cases, nil
}

func TestWhatDiffersIsKnown(t *testing.T) {
	seeds := int64(4)
	if testing.Short() {
		seeds = 2
	}
	cases, err := everyTwin(t, seeds, false, "")
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d crashes", cases)
}

// Each of these faults must be found, or TestWhatDiffersIsKnown proves nothing.
func TestTwinsFindMutants(t *testing.T) {
	for _, lie := range []string{".log", ".bitmap", ".sums", ".raw"} {
		if cases, err := everyTwin(t, 40, false, lie); err == nil {
			t.Errorf("syncs of %s do nothing, and %d crashes did not show it", lie, cases)
		} else {
			t.Logf("%s: after %d crashes: %.100v", lie, cases, err)
		}
	}
	if cases, err := everyTwin(t, 40, true, ""); err == nil {
		t.Errorf("what is not durable was reported as durable, and %d crashes did not show it", cases)
	}
}
