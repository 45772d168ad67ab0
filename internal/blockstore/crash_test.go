package blockstore

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"math/rand"
	"strings"
	"testing"

	"perdure/internal/model"
	"perdure/internal/vfs"
)

// The crash tests run a scenario on a file system that crashes at a chosen
// operation, open the replica that is found then, and compare it with what the
// scenario knows. All is told in units: one direct write, or one epoch. A write
// stamps whole blocks with the number of its unit.

// unit is one direct write or one epoch.
type unit struct {
	blocks  map[int64]bool // written
	seq     uint64         // journal record, 0: none
	inPlace bool           // its way into the image has begun
}

// world runs a scenario and remembers what is promised.
type world struct {
	v       *Volume
	units   []*unit // by stamp-1
	durable int     // all units up to here must be found
	epoch   model.Epoch
	cuts    []*cutUnit
	open    *unit // the epoch that collects writes
	flushed int   // held mode: last unit that a FLUSH covers
	window  bool
	late    int // the same for FLUSHes in the stop window
}

type cutUnit struct {
	w        *EpochWrites
	u        *unit
	promises int // all units up to here are durable when this epoch is persisted
}

func (x *world) newUnit() *unit {
	u := &unit{blocks: map[int64]bool{}}
	x.units = append(x.units, u)
	return u
}

func stampBlock(stamp int) []byte {
	b := make([]byte, BlockSize)
	for i := 0; i < BlockSize; i += 4 {
		binary.LittleEndian.PutUint32(b[i:], uint32(stamp))
	}
	return b
}

// step carries out one word of a scenario: "w3,4" write blocks 3 and 4, "W3" the same
// with FUA, "flush", "stop" (begin of the stop window), "cut", "persist", "append"
// (without sync), "sync", "commit", "trim", "held", "direct", "meta".
func (x *world) step(word string) error {
	ctx := context.Background()
	switch {
	case word[0] == 'w' || word[0] == 'W':
		return x.write(ctx, word)
	case word == "flush":
		return x.flush(ctx)
	case word == "stop":
		x.window = true
		x.v.BeginStop()
	case word == "cut":
		c := &cutUnit{w: x.v.Cut(), u: x.open, promises: x.flushed}
		x.open, x.window = nil, false
		x.flushed = max(x.flushed, x.late)
		x.cuts = append(x.cuts, c)
	case word == "persist", word == "append":
		return x.persist(word == "persist")
	case word == "sync":
		if err := x.v.store.Sync(); err != nil {
			return err
		}
		x.synced()
	case word == "commit":
		c := x.cuts[0]
		x.cuts = x.cuts[1:]
		if c.u != nil {
			c.u.inPlace = true
		}
		if err := x.v.Commit(c.w); err != nil {
			return err
		}
		x.durable = max(x.durable, c.promises)
	case word == "trim":
		return x.v.store.Trim()
	case word == "meta":
		return x.v.store.SetMeta(func(m *Meta) { m.Term++ })
	case word == "held":
		return x.v.SetMode(Held)
	case word == "direct":
		next := x.v.store.journal.next
		if x.open != nil {
			x.open.inPlace, x.open.seq = true, next // it is journaled if it was flushed
		}
		if err := x.v.SetMode(Direct); err != nil {
			return err
		}
		if x.open != nil && x.v.store.journal.next == next {
			x.open.seq = 0
		}
		x.durable = max(x.durable, x.flushed, x.late)
		x.open, x.window = nil, false
	default:
		panic(word)
	}
	return nil
}

func (x *world) write(ctx context.Context, word string) error {
	u := x.open
	if u == nil {
		u = x.newUnit()
	}
	if x.v.mode == Held {
		x.open = u
	} else {
		u.inPlace = true
	}
	stamp := len(x.units)
	for f := range strings.SplitSeq(word[1:], ",") {
		var n int64
		if _, err := fmt.Sscan(f, &n); err != nil {
			panic(err)
		}
		u.blocks[n] = true
		if err := x.v.WriteAt(ctx, stampBlock(stamp), n*BlockSize, word[0] == 'W'); err != nil {
			return err
		}
	}
	if word[0] == 'W' {
		x.promise()
	}
	return nil
}

// promise notes that the guest was told that all its writes are durable.
func (x *world) promise() {
	switch {
	case x.v.mode == Direct:
		x.durable = len(x.units)
	case x.window:
		x.late = len(x.units)
	default:
		x.flushed = len(x.units)
	}
}

func (x *world) flush(ctx context.Context) error {
	if err := x.v.Flush(ctx); err != nil {
		return err
	}
	x.promise()
	return nil
}

// persist journals the oldest cut epoch that is not journaled yet.
func (x *world) persist(sync bool) error {
	for _, c := range x.cuts {
		if c.w.seq != 0 || c.w.synced || c.u == nil && !c.w.before {
			continue
		}
		x.epoch++
		var err error
		if sync {
			err = x.v.store.Persist(1, x.epoch, c.w)
		} else {
			err = x.v.store.Append(1, x.epoch, c.w)
		}
		if c.u != nil {
			// The record may be complete on disk even if the call failed.
			if c.u.seq = c.w.seq; c.u.seq == 0 {
				c.u.seq = x.v.store.journal.next
			}
		}
		if err != nil {
			return err
		}
		if sync {
			x.durable = max(x.durable, c.promises)
		}
		return nil
	}
	return nil
}

// synced: everything appended, and every direct write, is durable; units that
// were neither appended nor applied are not.
func (x *world) synced() {
	for i, u := range x.units {
		if u.seq == 0 && !u.inPlace {
			return
		}
		x.durable = max(x.durable, i+1)
	}
}

// check opens what a crash left and compares.
//
// again ≥ 0 makes the first replay crash too, at that operation if it takes so many.
func (x *world) check(m *vfs.Mem, again int, keep func() bool) error {
	s, err := Open(m, "/d", "disk0", Options{NoAutoTrim: true})
	if err != nil {
		return err
	}
	before := s.meta.trimmed
	if again >= 0 {
		base := m.Ops()
		m.SetHook(func(op vfs.Op) error {
			if op.Index >= base+again {
				return vfs.ErrCrashed
			}
			return nil
		})
		_, _ = s.Replay()
		m = m.Crash(keep)
		if s, err = Open(m, "/d", "disk0", Options{NoAutoTrim: true}); err != nil {
			return err
		}
	}
	n, err := s.Replay()
	if err != nil {
		return err
	}
	after := s.meta.trimmed
	if again < 0 && after != before+uint64(n) {
		return fmt.Errorf("replayed %d epochs from record %d to %d", n, before, after)
	}
	// Every journaled unit that was promised is replayed now or was trimmed before.
	for i, u := range x.units[:x.durable] {
		if u.seq > after {
			return fmt.Errorf("unit %d, record %d, was promised; replay ended with record %d", i+1, u.seq, after)
		}
	}
	p := make([]byte, s.Size())
	if err := s.ReadAt(p, 0); err != nil {
		return err
	}
	for b := range int64(testBlocks) {
		got := p[b*BlockSize : (b+1)*BlockSize]
		stamp := int(binary.LittleEndian.Uint32(got))
		if !bytes.Equal(got, stampBlock(stamp)) {
			if !x.mayTear(b) {
				return fmt.Errorf("block %d is torn", b)
			}
			continue
		}
		if err := x.allowed(b, stamp, before, after); err != nil {
			return err
		}
	}
	return nil
}

// mayTear: a block may only be torn by a write in place that was not promised.
func (x *world) mayTear(b int64) bool {
	for i, u := range x.units {
		if i >= x.durable && u.inPlace && u.blocks[b] {
			return true
		}
	}
	return false
}

// allowed judges the stamp of a block, given that records before+1 … after were replayed.
func (x *world) allowed(b int64, stamp int, before, after uint64) error {
	replayed, floor := 0, 0
	for i, u := range x.units {
		if !u.blocks[b] {
			continue
		}
		if u.seq > before && u.seq <= after {
			replayed = i + 1
		}
		if i < x.durable {
			floor = i + 1
		}
	}
	if replayed > 0 {
		// Replay comes last, so its newest record decides; and it must not have put
		// an older block over a promised one.
		if stamp != replayed || stamp < floor {
			return fmt.Errorf("block %d has unit %d; unit %d was replayed, %d promised", b, stamp, replayed, floor)
		}
		return nil
	}
	if stamp == floor {
		return nil
	}
	if stamp < floor || stamp > len(x.units) || !x.units[stamp-1].blocks[b] {
		return fmt.Errorf("block %d has unit %d, unit %d was promised", b, stamp, floor)
	}
	if !x.units[stamp-1].inPlace {
		return fmt.Errorf("block %d has unit %d, which neither committed nor was replayed", b, stamp)
	}
	return nil
}

// run carries a scenario out on a fresh file system up to the first error.
func runScenario(t *testing.T, words []string, stopAt int) (*world, *vfs.Mem) {
	t.Helper()
	m := vfs.NewMem()
	x := &world{v: NewVolume(openStore(t, m, "/d"), VolumeOptions{})}
	base := m.Ops()
	m.SetHook(func(op vfs.Op) error {
		if stopAt >= 0 && op.Index >= base+stopAt {
			return vfs.ErrCrashed
		}
		return nil
	})
	for _, w := range words {
		if err := x.step(w); err != nil {
			if stopAt < 0 {
				t.Fatalf("%s: %v", w, err)
			}
			return x, m
		}
	}
	return x, m
}

// keeps are the ways a crash treats unsynced data.
func keeps(seed int64) map[string]func() bool {
	rng := rand.New(rand.NewSource(seed))
	k := map[string]func() bool{
		"none": func() bool { return false },
		"all":  func() bool { return true },
	}
	for i, share := range []float64{0.2, 0.8, 0.97} {
		k[fmt.Sprintf("some%d", i)] = func() bool { return rng.Float64() < share }
	}
	// Long stretches survive and are lost in turns, so that whole writes do.
	up := true
	k["stretches"] = func() bool {
		if rng.Intn(25) == 0 {
			up = !up
		}
		return up
	}
	return k
}

// crashEverywhere runs a scenario once for each operation and each way of losing data.
func crashEverywhere(t *testing.T, words []string, seed int64) int {
	t.Helper()
	_, m := runScenario(t, words, -1)
	cases := 0
	_, fresh := runScenario(t, nil, -1)
	for stop := 0; stop <= m.Ops()-fresh.Ops(); stop++ {
		for name, keep := range keeps(seed + int64(stop)) {
			x, m := runScenario(t, words, stop)
			m = m.Crash(keep)
			again := -1
			if stop%3 == 0 {
				again = stop / 3 % 6
			}
			if err := x.check(m, again, keep); err != nil {
				t.Fatalf("seed %d, crash at operation %d, %s survives: %v\nscenario: %s", seed, stop, name, err, strings.Join(words, " "))
			}
			cases++
		}
	}
	return cases
}

func TestCrashAtEveryOperation(t *testing.T) {
	cases := 0
	for _, s := range []string{
		// Direct: flushed writes survive, others may.
		"w1,2 w2,3 flush w3 W4 w1 meta w1 flush",
		// One epoch after the other, no flush; then a flush that covers them.
		"held w1,2 cut persist commit w2,3 cut persist commit w3 flush cut persist commit w1 cut persist",
		// Flush within, more epochs in flight, commit late.
		"held w1,2,3 flush cut persist w1,4 cut append w2,5 flush cut persist commit commit commit trim w9 cut persist commit",
		// The stop window.
		"held w1 stop flush cut persist commit w2 stop flush cut persist commit stop flush cut persist commit",
		// Direct writes over journaled epochs; the journal must not come back over them.
		"held w1,2 flush cut persist commit w3 cut persist commit direct w1 w2 flush w3 w1 held w1 cut persist commit flush cut persist commit",
		"held w1,2 flush cut persist commit direct w1,2 held flush w5 cut persist sync commit w1 cut persist",
		// Epochs without a flush over both files of the journal: a gap between them ends the replay.
		"held w1,2 cut append w3,4 cut append w1,5 cut append w2,3 cut append w4 cut append commit commit commit commit commit",
		// Leaving held mode with an open epoch that was flushed.
		"held w1 cut append w2,3 flush commit direct w4 flush",
		// The journal takes turns (half of its limit is eight small records).
		"held " + strings.Repeat("w1,2 cut persist w3 flush cut persist commit commit ", 6) + "trim " +
			strings.Repeat("w2,4 flush cut persist commit trim w5 cut append commit ", 5),
	} {
		cases += crashEverywhere(t, strings.Fields(s), 1)
	}
	t.Logf("%d crashes", cases)
}

// randomScenario makes a legal sequence of steps.
func randomScenario(rng *rand.Rand, n int) []string {
	var words []string
	held, cuts, journaled := false, 0, 0
	for len(words) < n {
		var w string
		switch k := rng.Intn(20); {
		case k < 7:
			w = fmt.Sprintf("w%d,%d", rng.Intn(6), rng.Intn(6))
			if rng.Intn(8) == 0 {
				w = "W" + w[1:]
			}
		case k < 9:
			w = "flush"
		case k < 12 && held:
			if rng.Intn(2) == 0 {
				words = append(words, "stop")
				if rng.Intn(2) == 0 {
					words = append(words, "flush")
				}
			}
			w = "cut"
			cuts++
		case k < 15 && journaled < cuts:
			w = "persist"
			journaled++
		case k < 18 && journaled > 0:
			w = "commit"
			cuts--
			journaled--
		case k == 18:
			w = []string{"trim", "sync", "meta"}[rng.Intn(3)]
		case k == 19 && !held:
			w, held = "held", true
		case k == 19 && cuts == 0:
			w, held = "direct", false
		default:
			continue
		}
		words = append(words, w)
	}
	return words
}

func TestCrashInRandomScenarios(t *testing.T) {
	cases := 0
	for seed := range int64(10) {
		cases += crashEverywhere(t, randomScenario(rand.New(rand.NewSource(seed)), 40), seed)
	}
	t.Logf("%d crashes", cases)
}

// The replica's creation and removal are all or nothing at each operation.
func TestCrashInCreate(t *testing.T) {
	for stop := range 40 {
		for name, keep := range keeps(int64(stop)) {
			m := vfs.NewMem()
			m.SetHook(func(op vfs.Op) error {
				if op.Index >= stop {
					return vfs.ErrCrashed
				}
				return nil
			})
			err := Create(m, "/d", testParams())
			m = m.Crash(keep)
			ok, _ := Exists(m, "/d", "disk0")
			if err == nil && !ok {
				t.Fatalf("operation %d, %s: created and not there", stop, name)
			}
			if ok {
				if got := stamps(t, openStore(t, m, "/d")); !bytes.Equal(got, make([]byte, testBlocks)) {
					t.Fatal("not empty")
				}
				m.SetHook(nil)
			}
			if err := Remove(m, "/d", "disk0"); err != nil {
				t.Fatal(err)
			}
			openStore(t, m, "/d")
		}
	}
}

// A complete record behind a torn one must not come back when the torn one's
// number and place are used again in a later life.
func TestStaleRecordsStayAway(t *testing.T) {
	m := vfs.NewMem()
	s := openStore(t, m, "/d")
	for e := range 3 {
		if err := s.Append(1, model.Epoch(e+1), epochOf(byte(e+1), int64(e))); err != nil {
			t.Fatal(err)
		}
	}
	m = m.Crash(func() bool { return true })
	// Tear the second record, as a crash may.
	f, err := m.Open("/d/disk0.journal0")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(make([]byte, 512), recordTotal(BlockSize)+1024); err != nil {
		t.Fatal(err)
	}
	s = openStore(t, m, "/d")
	if got := stamps(t, s); got[0] != 1 || got[1] != 0 || got[2] != 0 {
		t.Fatal(got[:4])
	}
	for e := range 2 { // up to the place of the second and third
		if err := s.Append(1, model.Epoch(e+1), epochOf(9, 8)); err != nil {
			t.Fatal(err)
		}
	}
	m = m.Crash(func() bool { return true })
	if got := stamps(t, openStore(t, m, "/d")); got[2] != 0 || got[8] != 9 {
		t.Fatal("a stale record was replayed", got[:10])
	}
}
