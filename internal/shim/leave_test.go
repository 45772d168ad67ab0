package shim

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"perdure/internal/authority"
	"perdure/internal/blockstore"
	"perdure/internal/chardev"
	"perdure/internal/epoch"
	"perdure/internal/guestmem"
	"perdure/internal/model"
	"perdure/internal/vfs"
)

// These tests leave a pair while epochs are on their way through it: not
// acknowledged, acknowledged and waiting for the disk, or committed and waiting
// for the gate. Whatever was captured is the past of the only copy that is left:
// all of it must be on the disk, and all of its output must leave, once and in order.

const leaveBlocks = 16

// leaveRig is a primary that holds a pair, without QEMU and without a session:
// the real pair with its committer, a real volume on a file system in memory,
// a console and a gate.
type leaveRig struct {
	t    *testing.T
	mem  *vfs.Mem
	vol  *blockstore.Volume
	p    *primary
	pr   *pair
	sent model.Epoch
	said strings.Builder   // what the guest said in captured epochs
	want [leaveBlocks]byte // first byte of each block as the guest wrote it
	caps map[model.Epoch]*captured
}

const leaveTerm, leavePeer = model.Term(3), model.RunID("00000000000000000000000000000002")

func newLeaveRig(t *testing.T) *leaveRig {
	t.Helper()
	r := &leaveRig{t: t, mem: vfs.NewMem(), caps: map[model.Epoch]*captured{}}
	size := int64(leaveBlocks * blockstore.BlockSize)
	if err := blockstore.Create(r.mem, "/d", blockstore.Params{ID: "disk0", Size: size, State: model.UpToDate}); err != nil {
		t.Fatal(err)
	}
	r.vol = r.open()
	port, err := chardev.Listen(filepath.Join(t.TempDir(), "serial"), chardev.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { port.Close() })
	ctx, cancel := context.WithCancel(context.Background())
	log := slog.New(slog.DiscardHandler)
	s := &Shim{log: log, ctx: ctx, events: make(chan authority.Event, 100), tl: newTimeline("vm1", "a", nil, log),
		gate: newGatekeeper(openGateKernel{}, []string{"pd0"})}
	s.cfg.Spec = model.VMSpec{Memory: 1 << 20, Disks: []model.DiskSpec{{ID: "disk0", Size: size}}}
	s.mode.Run = "00000000000000000000000000000001"
	s.gate.setRule(ruleAcked)
	i := &instance{log: log, serial: port, vols: []*blockstore.Volume{r.vol}, stores: []*blockstore.Store{r.vol.Store()}}
	r.p = &primary{s: s, inst: i, wake: make(chan struct{}, 1), held: true, ctx: ctx, cancel: cancel}
	r.p.disks = newDisks(s, i)
	r.pr = newPair(r.p, "b", leaveTerm)
	r.pr.peerRun = leavePeer
	r.pr.books = epoch.NewPrimary(epoch.Pair{Term: leaveTerm, Primary: s.mode.Run, Secondary: leavePeer}, 1)
	r.pr.goWork(r.pr.committer)
	if err := r.vol.SetMode(blockstore.Held); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.mem.SetHook(nil); cancel(); r.pr.work.Wait() })
	return r
}

// open opens the disk with all that its journal holds.
func (r *leaveRig) open() *blockstore.Volume {
	r.t.Helper()
	st, err := blockstore.Open(r.mem, "/d", "disk0", blockstore.Options{})
	if err != nil {
		r.t.Fatal(err)
	}
	if _, err := st.Replay(); err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { st.Close() })
	return blockstore.NewVolume(st, blockstore.VolumeOptions{})
}

// write is the guest's: b into a block. With fua the guest waits until it is durable.
func (r *leaveRig) write(block int, b byte, fua bool) {
	r.t.Helper()
	buf := make([]byte, blockstore.BlockSize)
	buf[0] = b
	if err := r.vol.WriteAt(context.Background(), buf, int64(block*blockstore.BlockSize), fua); err != nil {
		r.t.Fatal(err)
	}
	r.want[block] = b
}

// capture closes an epoch as the runner does and puts it on the wire.
func (r *leaveRig) capture() {
	r.t.Helper()
	r.sent++
	said := fmt.Sprintf("epoch %d\n", r.sent)
	r.said.WriteString(said)
	now := time.Now()
	c := &captured{epoch: r.sent, at: now, done: now, since: now, held: int64(len(said)), pages: &guestmem.PageSet{},
		disks: []*blockstore.EpochWrites{r.vol.Cut()}, ports: [][]byte{[]byte(said)},
		persisted: make(chan struct{}), released: make(chan struct{})}
	if r.sent == 1 {
		c.flags = flagSync
	}
	r.caps[r.sent] = c
	r.pr.send(c)
	<-r.pr.sendQ
	r.pr.mu.Lock()
	err := r.pr.books.Sent(c.epoch)
	r.pr.mu.Unlock()
	if err != nil {
		r.t.Fatal(err)
	}
}

// ack is the secondary's word that it holds all up to n. With confirm it
// answers a beat of now, which opens the gate.
func (r *leaveRig) ack(n model.Epoch, confirm bool) {
	b := beat{Term: uint64(leaveTerm), Run: packRun(leavePeer), Epoch: uint64(n)}
	if confirm {
		b.SentAt = int64(bootNow())
	}
	r.pr.onUrgent(urgentAck, b.encode())
}

// until waits for a state of the pair.
func (r *leaveRig) until(what string, ok func() bool) {
	r.t.Helper()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(100 * time.Microsecond) {
		r.pr.mu.Lock()
		done := ok()
		r.pr.mu.Unlock()
		if done {
			return
		}
		if time.Now().After(end) {
			r.t.Fatalf("waited for: %s", what)
		}
	}
}

// settle leaves the pair in the order of primary.leavePair and leaveHeld.
// between runs when the pair has been left and nothing is settled yet.
func (r *leaveRig) settle(between func()) {
	r.t.Helper()
	r.pr.leave()
	if between != nil {
		between()
	}
	r.p.s.gate.setRule(ruleFree)
	flights, err := r.pr.commitAlone()
	if err != nil {
		r.t.Fatalf("commit alone: %v", err)
	}
	if err := r.vol.SetMode(blockstore.Direct); err != nil {
		r.t.Fatalf("the VM would be killed here: %v", err)
	}
	r.pr.releaseAlone(flights)
}

// check looks at what is left of the past: in the running VM, and, after a
// further write and the loss of power, on the disk.
func (r *leaveRig) check() {
	r.t.Helper()
	if got, want := string(r.p.inst.serial.History()), r.said.String(); got != want {
		r.t.Errorf("the guest said %q, %q came out", want, got)
	}
	for n, c := range r.caps {
		select {
		case <-c.released:
		default:
			r.t.Errorf("epoch %d never counts as released: who waits for that waits for ever", n)
		}
	}
	if len(r.p.s.events) > 0 || r.p.ctx.Err() != nil {
		r.t.Errorf("the guest was given up: %d events for the authority, %v", len(r.p.s.events), r.p.ctx.Err())
	}
	r.content("the guest reads", r.vol)
	r.write(0, 0xee, true)
	r.write(leaveBlocks-1, 0xee, true)
	r.mem = r.mem.Crash(func() bool { return true })
	r.content("after the loss of power", r.open())
}

func (r *leaveRig) content(when string, v *blockstore.Volume) {
	r.t.Helper()
	buf := make([]byte, blockstore.BlockSize)
	for n, want := range r.want {
		if err := v.ReadAt(context.Background(), buf, int64(n*blockstore.BlockSize)); err != nil {
			r.t.Fatal(err)
		}
		if buf[0] != want {
			r.t.Errorf("%s %#x in block %d, the guest wrote %#x", when, buf[0], n, want)
		}
	}
}

// stall makes operations of the file system wait. hit is closed with the first
// that does; let goes on with all of them.
func (r *leaveRig) stall(match func(vfs.Op) bool) (hit chan struct{}, let func()) {
	hit = make(chan struct{})
	wait := make(chan struct{})
	var once, free sync.Once
	r.mem.SetHook(func(op vfs.Op) error {
		if match(op) {
			once.Do(func() { close(hit) })
			<-wait
		}
		return nil
	})
	let = func() { free.Do(func() { close(wait) }) }
	r.t.Cleanup(let) // before the rig's own
	return hit, let
}

func inImage(op vfs.Op) bool   { return op.Kind == "write" && strings.HasSuffix(op.Path, ".raw") }
func inJournal(op vfs.Op) bool { return op.Kind == "write" && strings.Contains(op.Path, ".journal") }

// TestLeaveWithLateAck delivers the acknowledgement when the pair has been left
// and what is open is not settled yet. It opens nothing that comes later either.
func TestLeaveWithLateAck(t *testing.T) {
	r := newLeaveRig(t)
	r.write(0, 1, false)
	r.write(1, 1, true)
	r.capture()
	r.write(1, 2, false) // the open epoch
	r.settle(func() { r.ack(1, true) })
	r.check()
	r.p.s.gate.setRule(ruleAcked) // of the next pair, which has confirmed nothing
	r.ack(2, true)
	if r.p.s.gate.hasRight() {
		t.Error("a word of the pair before gave the next one the right to send")
	}
}

// TestLeaveWithSlowDisk leaves while commits of acknowledged epochs lag behind.
func TestLeaveWithSlowDisk(t *testing.T) {
	r := newLeaveRig(t)
	hit, let := r.stall(inImage)
	for n := range 6 {
		r.write(n%4, byte(n+1), false)
		r.capture()
		r.ack(r.sent, true)
	}
	<-hit // the committer is in the first
	r.write(2, 0x77, false)
	r.capture() // one that nobody acknowledged
	go func() {
		r.until("left", func() bool { return r.pr.left })
		let()
	}()
	r.settle(nil)
	r.check()
}

// TestLeaveWithGateClosed leaves while the committer waits for the gate with
// acknowledged, committed epochs that say something but write nothing.
func TestLeaveWithGateClosed(t *testing.T) {
	for _, writes := range []bool{false, true} {
		r := newLeaveRig(t)
		for n := range 5 {
			if writes {
				r.write(n, byte(n+1), false)
			}
			r.capture()
			r.ack(r.sent, false)
		}
		r.until("the committer waits for the gate", func() bool { return len(r.pr.acts) == 8 })
		r.settle(nil)
		r.check()
	}
}

// TestLeaveWithSlowJournal leaves while an acknowledged epoch is still being
// written to this host's journal: nobody may touch its writes meanwhile.
func TestLeaveWithSlowJournal(t *testing.T) {
	r := newLeaveRig(t)
	hit, let := r.stall(inJournal)
	r.write(3, 1, false)
	r.write(4, 1, false)
	r.capture()
	<-hit
	r.ack(1, true)
	r.until("the committer has the epoch", func() bool { return len(r.pr.acts) == 1 })
	touched := false
	go func() {
		<-r.pr.ctx.Done()
		// The committer has all the time in the world to do wrong.
		for end := time.Now().Add(50 * time.Millisecond); time.Now().Before(end) && !touched; time.Sleep(time.Millisecond) {
			touched = r.vol.HeldBytes() == 0
		}
		let()
	}()
	r.settle(nil)
	if touched {
		t.Error("the epoch was committed while its journal was being written")
	}
	r.check()
}

// TestLeaveAtRandom leaves at any moment of a busy pair: acknowledgements come
// from another goroutine, before, while and after, and the disk is slow at times.
func TestLeaveAtRandom(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	rounds := 150
	if testing.Short() {
		rounds = 30
	}
	for round := range rounds {
		rnd := rand.New(rand.NewPCG(seed, uint64(round)))
		ok := t.Run(fmt.Sprint(round), func(t *testing.T) { leaveAtRandom(t, rnd) })
		if !ok {
			t.Fatalf("seed %d, round %d", seed, round)
		}
	}
}

func leaveAtRandom(t *testing.T, rnd *rand.Rand) {
	r := newLeaveRig(t)
	slow := time.Duration(rnd.IntN(3)) * 100 * time.Microsecond
	r.mem.SetHook(func(op vfs.Op) error {
		if inImage(op) || inJournal(op) {
			time.Sleep(slow) // the disk's own time
		}
		return nil
	})
	acks := make(chan model.Epoch, 100)
	confirm := rnd.IntN(2) == 0
	var acker sync.WaitGroup
	acker.Go(func() {
		for n := range acks {
			r.ack(n, confirm)
		}
	})
	for range 1 + rnd.IntN(8) {
		for range rnd.IntN(4) {
			r.write(rnd.IntN(leaveBlocks), byte(rnd.Uint32()), rnd.IntN(4) == 0)
		}
		r.until("room for an epoch", func() bool { return r.pr.books.InFlight() < epoch.MaxInFlight })
		r.capture()
		if r.sent%2 == 0 {
			acks <- r.sent
		}
	}
	r.write(rnd.IntN(leaveBlocks), byte(rnd.Uint32()), false)
	acks <- r.sent
	if rnd.IntN(2) == 0 {
		time.Sleep(time.Duration(rnd.IntN(300)) * time.Microsecond) // a moment to leave at
	}
	r.settle(func() { acks <- r.sent })
	close(acks)
	acker.Wait()
	r.check()
}

// TestOwnDiskIsNotTheSecondary: an epoch that the secondary has acknowledged, and that waits for the
// disk of this host, is no debt of the secondary: dropping it would leave the VM alone with
// the disk that does not answer.
func TestOwnDiskIsNotTheSecondary(t *testing.T) {
	d := stallLimit
	defer func() { stallLimit = d }()
	stallLimit = 50 * time.Millisecond
	r := newLeaveRig(t)
	r.p.inst.watches = map[string]*vfs.Watch{"disk0": vfs.NewWatch(r.mem, bootNow)}
	f, err := r.p.inst.watches["disk0"].Create("/d/other") // what stands is seen by the watch
	if err != nil {
		t.Fatal(err)
	}
	hit, let := r.stall(func(op vfs.Op) bool { return inJournal(op) || op.Kind == "sync" && op.Path == "/d/other" })
	r.write(1, 1, true)
	r.capture()
	<-hit
	time.Sleep(2 * time.Millisecond) // it ages
	if r.pr.owed() == 0 || r.pr.ownDisk() != "" {
		t.Errorf("not acknowledged yet: owed for %v, the own disk %q", r.pr.owed(), r.pr.ownDisk())
	}
	r.ack(1, true)
	if n := r.pr.owed(); n != 0 {
		t.Errorf("the secondary has acknowledged all, and owes something for %v", n)
	}
	time.Sleep(2 * stallLimit)
	if id := r.pr.ownDisk(); id != "" {
		t.Errorf("disk %s is blamed while no operation of it stands", id)
	}
	synced := make(chan error, 1)
	go func() { synced <- f.Sync() }()
	r.until("the own disk is found", func() bool {
		r.pr.mu.Unlock()
		defer r.pr.mu.Lock()
		return r.pr.ownDisk() == "disk0"
	})
	let()
	if err := <-synced; err != nil {
		t.Error(err)
	}
	r.until("released", func() bool { return len(r.pr.flights) == 0 })
	if id := r.pr.ownDisk(); id != "" {
		t.Errorf("disk %s is blamed after it has answered", id)
	}
	r.settle(nil)
	r.check()
}
