package shim

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"perdure/internal/diskcheck"
	"perdure/internal/model"
	"perdure/internal/shimapi"
	"perdure/internal/vfs"
)

// dryLoad is what a guest does with its disk meanwhile: several programs at
// several depths, each in an extent of its own, all checked.
type dryLoad struct {
	w    *dry
	runs []*diskcheck.Run

	stop context.CancelFunc
	busy sync.WaitGroup // loads
	done sync.WaitGroup
}

// dryDepths are the depths of the programs.
var dryDepths = []int{1, 4, 8, 16, 32, 2}

// dryUnits is how many sectors program n uses: so many that overlapping requests
// are common, and still can be judged.
func dryUnits(n int) int { return 96 + 16*dryDepths[n] }

// dryStart is where the part of the disk begins that program n uses. One lies on
// both sides of an extent's end.
func dryStart(n int) int64 {
	if n == 3 {
		return 20<<20 - int64(dryUnits(n))/2*vfs.Sector
	}
	return int64(n) * (7 << 20)
}

func newDryLoad(w *dry, seed uint64) *dryLoad {
	l := &dryLoad{w: w}
	w.moved = func(from time.Time) {
		for _, r := range l.runs {
			r.TakenOver(from)
		}
	}
	var gate *sync.RWMutex
	if w.guest != nil {
		gate = &w.guest.gate
	}
	for n, depth := range dryDepths {
		start := dryStart(n)
		l.runs = append(l.runs, diskcheck.New(diskcheck.Config{Dial: w.dial, Export: "disk0", Seed: seed + uint64(n), Unit: vfs.Sector, Units: dryUnits(n), Span: 16,
			Depth: depth, Conns: 1 + n%2, Start: start, Gate: gate}))
	}
	if w.guest != nil {
		w.guest.runs = l.runs
		w.begin()
	}
	return l
}

// begin lets the guest work until end.
func (l *dryLoad) begin() {
	ctx, stop := context.WithCancel(context.Background())
	l.stop = stop
	for _, r := range l.runs {
		r.Rest(false)
		l.busy.Go(func() {
			for ctx.Err() == nil {
				// A handshake may be cut as well.
				if err := r.Load(ctx, 1<<30); err == nil {
					return
				}
				sleep(ctx, 5*time.Millisecond)
			}
		})
	}
	l.done.Go(func() { l.report(ctx) })
}

// report tells the QEMU of the running instance of errors, as its disk driver does.
func (l *dryLoad) report(ctx context.Context) {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	seen := l.count().Errors
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		n := l.count().Errors
		if n == seen {
			continue
		}
		seen = n
		if l.w.guest != nil {
			l.w.guest.fail()
			continue
		}
		for _, h := range l.w.hosts {
			if life := h.now(); life != nil && life.gate.isOpen() {
				signalHollow(h.dir, syscall.SIGUSR1)
			}
		}
	}
}

// end lets what is under way be answered, where it can be.
func (l *dryLoad) end() {
	for _, r := range l.runs {
		r.Rest(true)
	}
	cut := time.AfterFunc(5*time.Second, l.stop)
	l.busy.Wait()
	cut.Stop()
	l.cut()
}

// cut leaves what is under way without an answer.
func (l *dryLoad) cut() {
	l.stop()
	l.busy.Wait()
	l.done.Wait()
}

func (l *dryLoad) count() (s diskcheck.Stats) {
	for _, r := range l.runs {
		k := r.Stats()
		s.Reads, s.Writes, s.Flushes, s.Errors, s.Lost, s.Dials = s.Reads+k.Reads, s.Writes+k.Writes, s.Flushes+k.Flushes, s.Errors+k.Errors, s.Lost+k.Lost, s.Dials+k.Dials
	}
	return s
}

// progress waits until n more writes were answered.
func (l *dryLoad) progress(n int64, d time.Duration) error {
	goal := l.count().Writes + n
	for end := time.Now().Add(d); l.count().Writes < goal; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			return fmt.Errorf("the disk has not answered %d writes within %v: %+v", n, d, l.count())
		}
	}
	return nil
}

// each does something with every run, with a limit.
func (l *dryLoad) each(d time.Duration, f func(ctx context.Context, r *diskcheck.Run) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	defer cancel()
	var errs []error
	for n, r := range l.runs {
		if err := f(ctx, r); err != nil {
			errs = append(errs, fmt.Errorf("run %d: %w", n, err))
		}
	}
	return errors.Join(errs...)
}

// settle checks what the guest was told up to now, while it does nothing.
func (l *dryLoad) settle() error {
	return l.each(2*time.Minute, func(ctx context.Context, r *diskcheck.Run) error { return r.Settle(ctx, 30*time.Second) })
}

// dryFault breaks something while the guest works, and mends it before it returns.
type dryFault struct {
	name string
	do   func(f *dryFaults)
	rot  bool // the replicas differ afterwards, until what differs is written
}

// dryFaults is one run of them.
type dryFaults struct {
	t *testing.T
	w *dry
	l *dryLoad
	r *rand.Rand
}

func (f *dryFaults) pause(from, to time.Duration) {
	time.Sleep(from + time.Duration(f.r.Int64N(int64(to-from)))) // how long the fault lasts
}

// seat is the host of the primary, or of the other one.
func (f *dryFaults) seat(primary bool) *dryHost {
	h := f.w.hosts[f.w.store.get().Record.Primary.Host]
	if primary {
		return h
	}
	return h.other()
}

func (f *dryFaults) some() bool { return f.r.IntN(2) == 0 }

// crash ends one host; alone is how long the other one has for itself.
func (f *dryFaults) crash(primary, kill bool) {
	h := f.seat(primary)
	var keep func() bool
	if !kill {
		keep = f.some
	}
	h.powerOff(kill, keep)
	// Where the other one's copy had failed before, this was the only one: it has lost
	// what was not flushed, like any disk.
	if rec := f.w.store.get().Record; !kill && f.w.guest == nil && rec.Replicas[h.other().name].State == model.Inconsistent {
		f.l.cut()
		for _, r := range f.l.runs {
			r.PowerLost()
		}
		defer f.l.begin()
	}
	f.pause(50*time.Millisecond, time.Second)
	h.powerOn()
}

// both ends both hosts at once. Without power what was not flushed may be gone.
func (f *dryFaults) both(kill bool) {
	a, b := f.w.hosts["a"], f.w.hosts["b"]
	if f.some() {
		a, b = b, a
	}
	f.l.end()
	f.l.begin() // with requests under way, and none that were sent to a host before
	time.Sleep(time.Duration(f.r.IntN(30)) * time.Millisecond)
	for _, h := range []*dryHost{a, b} {
		if l := h.now(); l != nil {
			l.silence()
		}
	}
	var keep func() bool
	if !kill {
		keep = f.some
	}
	a.powerOff(kill, keep)
	b.powerOff(kill, keep)
	f.l.cut()
	if !kill && f.w.guest == nil { // a guest of level ft notices by itself
		for _, r := range f.l.runs {
			r.PowerLost()
		}
	}
	a.powerOn()
	if f.some() {
		f.pause(10*time.Millisecond, 300*time.Millisecond)
	}
	b.powerOn()
	f.l.begin()
}

// disk has the disk of a host fail, as hook says, until it is mended.
func (f *dryFaults) disk(primary bool, from, to time.Duration, hook func(op vfs.Op) error) {
	h := f.seat(primary)
	h.mu.Lock()
	mem := h.mem
	h.mu.Unlock()
	mem.SetHook(hook)
	f.pause(from, to)
	mem.SetHook(nil)
}

// rot changes bytes in the image of a host, where the guest reads.
func (f *dryFaults) rot(primary bool) {
	h := f.seat(primary)
	// A checksum that a crash left in doubt tells nothing until it was computed anew.
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		l := h.now()
		if l == nil {
			return // it is just being replaced
		}
		l.shim.mu.Lock()
		inst := l.shim.inst
		l.shim.mu.Unlock()
		if inst != nil && len(inst.stores) == 1 && inst.stores[0].InDoubt() == 0 {
			break
		}
		if time.Now().After(end) {
			f.t.Error("checksums stay in doubt")
			return
		}
	}
	file, err := h.disk().Open(filepath.Join(h.dir, shimapi.DiskDir, "disk0.raw"))
	if err != nil {
		f.t.Error(err)
		return
	}
	defer file.Close()
	for range 1 + f.r.IntN(4) {
		n := f.r.IntN(len(f.l.runs))
		off := dryStart(n) + f.r.Int64N(int64(dryUnits(n)-1)*vfs.Sector)
		p := make([]byte, 1+f.r.IntN(64))
		_, err := file.ReadAt(p, off)
		for n := range p {
			p[n] ^= byte(1 + f.r.IntN(255))
		}
		if err == nil {
			_, err = file.WriteAt(p, off)
		}
		if err != nil {
			f.t.Error(err)
		}
	}
	f.pause(50*time.Millisecond, 400*time.Millisecond)
}

func changes(op vfs.Op) bool { return op.Kind == "write" || op.Kind == "zero" }

// dryFaultList is all of them. primary is chosen by the caller.
func dryFaultList() []dryFault {
	side := func(name string, do func(f *dryFaults, primary bool)) []dryFault {
		return []dryFault{{name: name + ", of the primary", do: func(f *dryFaults) { do(f, true) }},
			{name: name + ", of the secondary", do: func(f *dryFaults) { do(f, false) }}}
	}
	var out []dryFault
	out = append(out, side("shim killed", func(f *dryFaults, p bool) { f.crash(p, true) })...)
	out = append(out, side("host without power", func(f *dryFaults, p bool) { f.crash(p, false) })...)
	out = append(out, side("disk fails", func(f *dryFaults, p bool) {
		var n atomic.Int64
		every := int64(1 + f.r.IntN(20))
		f.disk(p, 100*time.Millisecond, 600*time.Millisecond, func(op vfs.Op) error {
			if (changes(op) || op.Kind == "read") && n.Add(1)%every == 0 {
				return syscall.EIO
			}
			return nil
		})
	})...)
	out = append(out, side("disk is full", func(f *dryFaults, p bool) {
		f.disk(p, 100*time.Millisecond, 600*time.Millisecond, func(op vfs.Op) error {
			if changes(op) {
				return syscall.ENOSPC
			}
			return nil
		})
	})...)
	out = append(out, side("syncs fail", func(f *dryFaults, p bool) {
		f.disk(p, 100*time.Millisecond, 600*time.Millisecond, func(op vfs.Op) error {
			if op.Kind == "sync" {
				return syscall.EIO
			}
			return nil
		})
	})...)
	out = append(out, side("disk is slow", func(f *dryFaults, p bool) {
		f.disk(p, 200*time.Millisecond, time.Second, func(op vfs.Op) error {
			time.Sleep(3 * time.Millisecond) // the fault itself
			return nil
		})
	})...)
	out = append(out, side("disk stands", func(f *dryFaults, p bool) {
		release := make(chan struct{})
		f.disk(p, 100*time.Millisecond, 1500*time.Millisecond, func(op vfs.Op) error {
			if changes(op) || op.Kind == "sync" {
				<-release
			}
			return nil
		})
		if f.some() {
			f.pause(10*time.Millisecond, 500*time.Millisecond) // a new one works, while requests stand in the old one
		}
		close(release)
	})...)
	for _, rot := range side("disk rots", func(f *dryFaults, p bool) { f.rot(p) }) {
		rot.rot = true
		out = append(out, rot)
	}
	links := func(name string, from, to time.Duration, set func(l *dryLink)) dryFault {
		return dryFault{name: name, do: func(f *dryFaults) {
			f.w.allLinks(func(l *dryLink) { l.set(func() { set(l) }) })
			f.pause(from, to)
			f.w.allLinks(func(l *dryLink) { l.heal() })
		}}
	}
	then := func(name string, primary bool) dryFault {
		return dryFault{name: name, do: func(f *dryFaults) {
			f.disk(true, 50*time.Millisecond, 300*time.Millisecond, func(op vfs.Op) error {
				if changes(op) {
					return syscall.EIO
				}
				return nil
			})
			f.crash(primary, f.some())
		}}
	}
	return append(out,
		then("disk of the primary fails, then its host", true),
		then("disk of the primary fails, then the secondary", false),
		dryFault{name: "links cut off", do: func(f *dryFaults) { f.w.allLinks((*dryLink).cut) }},
		links("links swallow everything", 50*time.Millisecond, 1500*time.Millisecond, func(l *dryLink) { l.hole = true }),
		links("links drip", 300*time.Millisecond, time.Second, func(l *dryLink) { l.piece, l.delay = 700, 500*time.Microsecond }),
		links("links are slow", 300*time.Millisecond, time.Second, func(l *dryLink) { l.delay = 15 * time.Millisecond }),
		dryFault{name: "both shims killed", do: func(f *dryFaults) { f.both(true) }},
		dryFault{name: "both hosts without power", do: func(f *dryFaults) { f.both(false) }},
	)
}

// recover waits for the pair, and helps as a person does.
func (f *dryFaults) recover() {
	f.t.Helper()
	for end := time.Now().Add(60 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		rec := f.w.store.get().Record
		if bothGood(rec) {
			return
		}
		if rec.Mode == model.ModeDuplex {
			f.replace(f.w.hosts[rec.Primary.Host])
		}
		if rec.Mode == model.ModeSimplex {
			f.resume(f.w.hosts[rec.Primary.Host])
		}
		if time.Now().After(end) {
			dumpGoroutines(f.t)
			f.t.Fatalf("the VM is not protected again: %+v", rec)
		}
	}
}

// bothGood reports whether both replicas are good.
func bothGood(rec model.Record) bool {
	for _, h := range []string{"a", "b"} {
		if rec.Replicas[h].State != model.UpToDate {
			return false
		}
	}
	return rec.Mode == model.ModeDuplex
}

// replace gives the primary's host a new disk in place of one that failed, and
// whose requests the secondary carries.
func (f *dryFaults) replace(h *dryHost) {
	f.op(h, shimapi.Op{Op: "disk-replace", Value: "disk0"})
}

// op asks something of a host's shim. Refused: the next look tries again.
func (f *dryFaults) op(h *dryHost, op shimapi.Op) {
	c := shimapi.NewShimClient(filepath.Join(h.dir, shimapi.SocketFile))
	defer c.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	_, _ = c.Op(ctx, op)
}

// resume lets a guest go on that stands still because its only disk failed.
func (f *dryFaults) resume(h *dryHost) {
	c := shimapi.NewShimClient(filepath.Join(h.dir, shimapi.SocketFile))
	defer c.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if st, err := c.Status(ctx); err == nil && st.Role == shimapi.RolePrimary && st.State == model.StateFault {
		f.op(h, shimapi.Op{Op: "resume"})
	}
}

// round makes one fault and checks what is left.
func (f *dryFaults) round(fault dryFault) {
	f.t.Helper()
	fault.do(f)
	f.recover()
	if err := f.l.progress(50, 30*time.Second); err != nil {
		f.t.Fatal(err)
	}
	f.l.end()
	defer f.l.begin()
	var err error
	if !fault.rot {
		err = f.w.same(20 * time.Second)
	}
	// Blocks that rotted, or that a failed write left torn, are written again: what
	// is left of them is known to nobody, and was not served.
	if err == nil {
		err = f.l.each(20*time.Second, func(ctx context.Context, r *diskcheck.Run) error { return r.WriteAll(ctx) })
	}
	if err == nil {
		err = f.w.same(20 * time.Second)
	}
	if err == nil {
		err = f.l.settle()
	}
	if err == nil && f.w.guest != nil {
		err = f.w.guest.quiet(20 * time.Second)
	}
	if err != nil {
		dumpGoroutines(f.t)
		f.t.Fatal(err)
	}
}

// dumpGoroutines keeps what everything waits for, where CHECK_DUMP says.
func dumpGoroutines(t *testing.T) {
	if path := os.Getenv("PERDURE_TEST_DUMP"); path != "" {
		buf := make([]byte, 16<<20)
		if err := os.WriteFile(path, buf[:runtime.Stack(buf, true)], 0o600); err != nil {
			t.Log(err)
		}
	}
}

// runDryFaults makes faults at random until the time is over, at least one.
func runDryFaults(t *testing.T, level model.Level, seed uint64, d time.Duration) {
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	t.Logf("seed %d", seed)
	limit := stallLimit
	t.Cleanup(func() { stallLimit = limit }) // when the world has ended
	stallLimit = time.Second
	w := newDryAt(t, level, false, drySize, dryOptions())
	f := &dryFaults{t: t, w: w, l: newDryLoad(w, seed), r: rand.New(rand.NewPCG(seed, 11))}
	w.untilDuplex(30 * time.Second)
	f.l.begin()
	defer func() { f.l.end() }()
	list := dryFaultList()
	f.r.Shuffle(len(list), func(i, k int) { list[i], list[k] = list[k], list[i] })
	began, rounds := time.Now(), 0
	for ; time.Since(began) < d; rounds++ {
		fault := list[rounds%len(list)]
		start := time.Now()
		f.round(fault)
		t.Logf("%2d %-40s %6.2f s, primary now %s", rounds, fault.name, time.Since(start).Seconds(), w.store.get().Record.Primary.Host)
	}
	f.l.end()
	t.Logf("%d faults, %+v", rounds, f.l.count())
	if w.guest != nil {
		w.guest.account()
	}
	f.l.begin()
}

// TestReplicatedDiskUnderFaults is the disk of a VM of level ca as a guest sees
// it, while everything below it breaks.
func TestReplicatedDiskUnderFaults(t *testing.T) {
	runDryFaults(t, model.LevelCA, 0, 15*time.Second)
}
