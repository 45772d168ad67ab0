package shim

import (
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"perdure/internal/model"
)

// The crash matrix: two shims in processes of their own, each killed outright at
// every point between two durable steps, in every part that a shim plays.

// dryPoints are those of the store and those of the pair, by level.
var dryPoints = map[model.Level][]string{
	model.LevelCA: append(slices.Clone(commonPoints), "full.begin", "takeover.begin", "takeover.flushed", "takeover.durable", "alone.begin", "alone.durable", "refill.begin"),
	model.LevelFT: append(slices.Clone(commonPoints), "journal.write", "journal.synced", "journal.apply", "epoch.journaled", "takeover.applied", "takeover.line",
		"leave.line", "leave.committed"),
}

var commonPoints = []string{
	"image.write", "image.written", "image.sync", "image.synced", "log.write", "log.written", "log.synced", "log.leave", "sums.written",
	"bitmap.save", "bitmap.saved", "meta.write", "meta.written",
	"replica.persist", "replica.marked", "replica.persisted", "copy.chunk", "copy.flushed", "full.durable", "boot.claimed",
}

// dryPart is what a shim does when it is killed.
type dryPart string

const (
	partTarget   dryPart = "as target and secondary" // from its start on
	partPromoted dryPart = "promoted"                // from the other side's end on: takeover, alone, source of a resync
	partLeft     dryPart = "left by the secondary"   // a primary whose secondary is killed
	partRefill   dryPart = "filled anew"             // a primary whose disk failed, and gets a new one; level ca
	partBoot     dryPart = "booting"                 // both were killed, this side is first again
)

var dryParts = []dryPart{partTarget, partPromoted, partLeft, partBoot}

// dryCase is one cell of the matrix.
type dryCase struct {
	point string
	part  dryPart
	after int
}

// dryMatrix lists the cells: each part comes by the points of the store, and by
// those of the pair that belong to it.
func dryMatrix(level model.Level) (out []dryCase) {
	own := map[string][]dryPart{"copy.": {partTarget, partBoot}, "full.": {partTarget, partBoot}, "takeover.": {partPromoted},
		"alone.": {partLeft}, "leave.": {partLeft}, "epoch.": {partTarget, partBoot}, "boot.": {partBoot}, "refill.": {partRefill}}
	if level == model.LevelCA {
		for _, p := range []string{"image.write", "image.synced", "log.synced", "meta.write", "meta.written", "sums.written"} {
			out = append(out, dryCase{p, partRefill, 0})
		}
	}
	for _, p := range dryPoints[level] {
		kind := p[:strings.Index(p, ".")+1]
		for _, part := range append(slices.Clone(dryParts), own[kind]...) {
			if slices.Contains(out, dryCase{p, part, 0}) {
				continue
			}
			parts, few := own[kind]
			if few && !slices.Contains(parts, part) {
				continue
			}
			out = append(out, dryCase{p, part, 0})
			if !few {
				out = append(out, dryCase{p, part, 2})
			}
		}
	}
	return out
}

// dryKills plays cells.
type dryKills struct {
	t *testing.T
	w *dry
	l *dryLoad
}

func newDryKills(t *testing.T, level model.Level, seed uint64) *dryKills {
	k := &dryKills{t: t, w: newDryAt(t, level, true, drySize, dryOptions())}
	k.l = newDryLoad(k.w, seed)
	k.w.untilDuplex(30 * time.Second)
	k.l.begin()
	t.Cleanup(func() { k.l.end() })
	return k
}

func (k *dryKills) seats() (primary, secondary *dryHost) {
	p := k.w.hosts[k.w.store.get().Record.Primary.Host]
	return p, p.other()
}

// cell kills a shim as c says and checks what both sides make of it. It reports
// whether the point was reached.
func (k *dryKills) cell(c dryCase) bool {
	k.t.Helper()
	primary, secondary := k.seats()
	victim := secondary
	var refilled *dryLife
	switch c.part {
	case partTarget:
		k.again(victim, c, true)
	case partPromoted:
		k.again(victim, c, false)
		k.duplex()
		k.arm(victim)
		k.kill(primary)
	case partLeft:
		// The victim becomes primary first, unarmed; then its new secondary goes.
		k.again(victim, c, false)
		k.duplex()
		k.kill(primary)
		k.duplex()
		k.arm(victim)
		k.kill(victim.other())
	case partRefill:
		k.again(victim, c, false)
		k.duplex()
		k.kill(primary)
		k.duplex()
		refilled = victim.now()
		k.refill(victim, refilled)
	case partBoot:
		victim = primary
		victim.powerOff(true, nil)
		secondary.powerOff(true, nil)
		victim.point, victim.after, victim.armed = c.point, c.after, true
		victim.powerOn()
		secondary.powerOn()
	}
	var hit bool
	if c.part == partRefill {
		hit = refilled != nil && closed(refilled.gone)
	} else {
		hit = k.awaitKill(victim, c)
	}
	k.duplex()
	if c.part == partRefill {
		k.mend()
	}
	if err := k.l.progress(20, 30*time.Second); err != nil {
		k.t.Fatalf("%+v: %v", c, err)
	}
	k.l.end()
	defer k.l.begin()
	err := k.w.same(20 * time.Second)
	if err == nil {
		err = k.l.settle()
	}
	if err == nil && k.w.guest != nil {
		err = k.w.guest.quiet(20 * time.Second)
	}
	if err != nil {
		k.t.Fatalf("%+v: %v", c, err)
	}
	return hit
}

// refill has the disk of a primary fail and be filled anew, during which its life may end.
func (k *dryKills) refill(h *dryHost, l *dryLife) {
	k.t.Helper()
	if err := k.l.progress(50, 30*time.Second); err != nil { // the pair is settled
		k.t.Fatal(err)
	}
	if l == nil || h.now() != l {
		return // it has ended by itself
	}
	l.gate.spoil(true)
	carried := func() bool { return k.w.store.get().Record.Replicas[h.name].State == model.Inconsistent }
	for end := time.Now().Add(20 * time.Second); !carried() && !closed(l.gone); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			k.t.Fatal("nobody notices that a disk has failed")
		}
	}
	l.gate.spoil(false)
	l.gate.arm()
	k.mend()
	for end := time.Now().Add(2 * time.Second); !closed(l.gone) && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
	}
	l.gate.disarm()
}

// mend gives the primary's host a new disk until it is taken or not needed.
func (k *dryKills) mend() {
	f := &dryFaults{t: k.t, w: k.w}
	for end := time.Now().Add(3 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		rec := k.w.store.get().Record
		if bothGood(rec) || rec.Mode != model.ModeDuplex {
			return
		}
		f.replace(k.w.hosts[rec.Primary.Host])
	}
}

func (k *dryKills) duplex() {
	k.t.Helper()
	k.w.until("duplex", 60*time.Second, func(r model.Record) bool {
		return r.Mode == model.ModeDuplex && k.w.hosts["a"].now() != nil && k.w.hosts["b"].now() != nil
	})
}

// again starts a host's shim anew, to be killed at a point.
func (k *dryKills) again(h *dryHost, c dryCase, armed bool) {
	h.powerOff(true, nil)
	h.point, h.after, h.armed = c.point, c.after, armed
	h.powerOn()
	for end := time.Now().Add(20 * time.Second); h.now() == nil && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
	}
}

func (k *dryKills) arm(h *dryHost) {
	if l := h.now(); l != nil {
		l.gate.arm()
	}
}

// kill ends a shim for good, and its agent starts the next one.
func (k *dryKills) kill(h *dryHost) {
	h.powerOff(true, nil)
	h.powerOn()
}

// awaitKill waits until the victim's point was reached, or the pair is whole and
// busy without it. A life that ended in another way counts as not reached.
func (k *dryKills) awaitKill(h *dryHost, c dryCase) bool {
	k.t.Helper()
	var l *dryLife
	began, calm := time.Now(), time.Now()
	for ; ; time.Sleep(2 * time.Millisecond) {
		if l == nil {
			if n := h.now(); n != nil && n.point == c.point {
				l = n
			}
		}
		if l != nil {
			select {
			case <-l.gone:
				return true
			default:
			}
		}
		if k.w.store.get().Record.Mode != model.ModeDuplex {
			calm = time.Now()
		}
		if time.Since(calm) > 1500*time.Millisecond || time.Since(began) > 20*time.Second {
			if l != nil {
				l.gate.disarm() // not while the disk is being looked at
			}
			return false
		}
	}
}

// runDryKills plays cells in random order, until d is over.
func runDryKills(t *testing.T, level model.Level, cells []dryCase, seed uint64, d time.Duration) {
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 7))
	rnd.Shuffle(len(cells), func(i, j int) { cells[i], cells[j] = cells[j], cells[i] })
	k := newDryKills(t, level, seed)
	began, hits, played := time.Now(), 0, 0
	asked, reached := map[string]bool{}, map[string]bool{}
	for _, c := range cells {
		if time.Since(began) > d {
			break
		}
		start := time.Now()
		hit := k.cell(c)
		played++
		asked[c.point] = true
		if hit {
			hits++
			reached[c.point] = true
		}
		t.Logf("%-18s %-26s after %d: killed %-5v %5.2f s", c.point, c.part, c.after, hit, time.Since(start).Seconds())
	}
	k.l.end()
	t.Logf("%d of %d cells, killed in %d; %+v", played, len(cells), hits, k.l.count())
	if hits == 0 {
		t.Error("nothing was killed: this test shows nothing")
	}
	for _, p := range slices.Sorted(maps.Keys(asked)) {
		if played >= len(dryMatrix(level)) && !reached[p] {
			t.Errorf("no shim came by the point %s", p)
		}
	}
	k.l.begin()
}

// TestPairKilledAtPoints plays some cells of the crash matrix; make soak plays all.
func TestPairKilledAtPoints(t *testing.T) {
	playSome(t, model.LevelCA)
}

func playSome(t *testing.T, level model.Level) {
	cells := dryMatrix(level)
	rand.Shuffle(len(cells), func(i, j int) { cells[i], cells[j] = cells[j], cells[i] })
	runDryKills(t, level, cells[:6], 0, 12*time.Second)
}

// TestEveryPointIsInAMatrix: a point that the product comes by is in a crash
// matrix of a pair, or it is said here where else a process is killed there.
func TestEveryPointIsInAMatrix(t *testing.T) {
	played := map[string]bool{
		// Of a single store, by blockstore's TestKilledAtEachPoint:
		"repair.write": true,                        // needs damage
		"stamp.write":  true, "stamp.written": true, // need an image that lies elsewhere
	}
	for _, points := range dryPoints {
		for _, p := range points {
			played[p] = true
		}
	}
	found := map[string]bool{}
	call := regexp.MustCompile(`\.point\("([^"]*)"\)`)
	files, err := filepath.Glob("../*/*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if strings.HasSuffix(f, "_test.go") {
			continue
		}
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range call.FindAllStringSubmatch(string(b), -1) {
			found[m[1]] = true
			if !played[m[1]] {
				t.Errorf("%s: the point %s is in no crash matrix", f, m[1])
			}
		}
	}
	for p := range played {
		if !found[p] {
			t.Errorf("the point %s is in a crash matrix, and nothing comes by it", p)
		}
	}
}
