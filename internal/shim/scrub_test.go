package shim

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"perdure/internal/blockstore"
	"perdure/internal/mirror"
	"perdure/internal/model"
	"perdure/internal/vfs"
)

const (
	scrubSize  = 4 << 20
	scrubBlock = blockstore.BlockSize
)

// scrubSide is one replica of a pair without shims.
type scrubSide struct {
	mem *vfs.Mem
	st  *blockstore.Store
	vol *blockstore.Volume
}

func newScrubSide(t *testing.T, noSums bool) *scrubSide {
	t.Helper()
	s := &scrubSide{mem: vfs.NewMem()}
	if err := blockstore.Create(s.mem, "/d", blockstore.Params{ID: "disk0", VM: "vm", Size: scrubSize, State: model.UpToDate, NoChecksums: noSums}); err != nil {
		t.Fatal(err)
	}
	var err error
	if s.st, err = blockstore.Open(s.mem, "/d", "disk0", blockstore.Options{}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.st.Replay(); err != nil {
		t.Fatal(err)
	}
	s.vol = blockstore.NewVolume(s.st, blockstore.VolumeOptions{})
	t.Cleanup(func() { _ = s.st.Close() })
	return s
}

// rot changes one byte of a block behind the store's back.
func (s *scrubSide) rot(t *testing.T, block int64) {
	t.Helper()
	f, err := s.mem.Open("/d/disk0.raw")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var b [1]byte
	off := block*scrubBlock + 77
	if _, err := f.ReadAt(b[:], off); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 0x40
	if _, err := f.WriteAt(b[:], off); err != nil {
		t.Fatal(err)
	}
}

// image is what is on the medium, right or wrong.
func (s *scrubSide) image(t *testing.T) []byte {
	t.Helper()
	f, err := s.mem.Open("/d/disk0.raw")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p := make([]byte, scrubSize)
	if _, err := f.ReadAt(p, 0); err != nil {
		t.Fatal(err)
	}
	return p
}

// scrubPair is two replicas with the messages of verify between them.
type scrubPair struct {
	t      *testing.T
	a, b   *scrubSide
	client *scrubClient
	server *scrubServer
	sc     *scrub
	work   sync.WaitGroup
}

func newScrubPair(t *testing.T, noSums ...bool) *scrubPair {
	off := func(n int) bool { return n < len(noSums) && noSums[n] }
	p := &scrubPair{t: t, a: newScrubSide(t, off(0)), b: newScrubSide(t, off(1))}
	ctx, cancel := context.WithCancel(context.Background())
	p.server = &scrubServer{stores: []*blockstore.Store{p.b.st}, send: func(_ uint8, parts ...[]byte) error {
		return p.client.take(bytes.Join(parts, nil))
	}}
	p.client = newScrubClient(func(_ uint8, parts ...[]byte) error {
		h, data, err := decodeScrub(bytes.Join(parts, nil))
		if err != nil {
			t.Error(err)
			return err
		}
		p.work.Add(1)
		go func() { defer p.work.Done(); p.server.answer(ctx, h, data) }()
		return nil
	})
	p.sc = &scrub{stores: []*blockstore.Store{p.a.st}, peer: p.client, host: "a", peerHost: "b",
		pace: func(context.Context, int64) error { return nil }, step: func() int64 { return 16 }}
	t.Cleanup(func() { cancel(); p.work.Wait(); p.server.close() })
	return p
}

func (p *scrubPair) verify() model.VerifiedDisk {
	p.t.Helper()
	d := model.VerifiedDisk{Disk: "disk0", Size: scrubSize}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := p.sc.disk(ctx, 0, &d, func() {}); err != nil {
		p.t.Fatal(err)
	}
	if d.Checked != scrubSize || d.Mismatches != d.Repaired+d.Rewritten+d.Left {
		p.t.Fatalf("the report does not add up: %+v", d)
	}
	return d
}

func (p *scrubPair) equal(want []byte) {
	p.t.Helper()
	for _, s := range []*scrubSide{p.a, p.b} {
		img := s.image(p.t)
		for b := int64(0); b < scrubSize/scrubBlock; b++ {
			if !bytes.Equal(img[b*scrubBlock:][:scrubBlock], want[b*scrubBlock:][:scrubBlock]) {
				p.t.Fatalf("block %d of side %v is not what the guest wrote last", b, map[bool]string{true: "a", false: "b"}[s == p.a])
			}
		}
	}
}

// epochs makes a pair of level ft: a guest that writes, reads and zeroes, epochs
// that are sent, committed and applied, each side at its own pace.
type epochs struct {
	*scrubPair
	seed  uint64
	guest sync.RWMutex // held for reading by a request: QEMU ends them before it stops
	told  []byte
	last  atomic.Uint64 // epoch captured last
	stop  chan struct{}
	done  sync.WaitGroup
	mu    sync.Mutex
	in    model.Epoch // applied on the secondary
	more  chan struct{}
}

func newEpochs(t *testing.T) *epochs {
	e := &epochs{scrubPair: newScrubPair(t), seed: uint64(time.Now().UnixNano()), told: make([]byte, scrubSize), stop: make(chan struct{}), more: make(chan struct{})}
	t.Logf("seed %d", e.seed)
	e.sc.ahead = func(lead model.Epoch) model.Epoch { return model.Epoch(e.last.Load()) + lead }
	e.server.inPlace = func(ctx context.Context, want model.Epoch) error {
		for {
			e.mu.Lock()
			in, more := e.in, e.more
			e.mu.Unlock()
			if in >= want {
				return nil
			}
			select {
			case <-more:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	}
	if err := e.a.vol.SetMode(blockstore.Held); err != nil {
		t.Fatal(err)
	}
	e.a.vol.SetFetch(func(p []byte, off int64) error {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		return e.client.read(ctx, 0, model.Epoch(e.last.Load()), p, off)
	})
	for _, s := range []*scrubSide{e.a, e.b} {
		s.st.Attach(1)
	}
	e.done.Add(2)
	go e.capture()
	go e.requests(rand.New(rand.NewPCG(e.seed, 1)))
	return e
}

type sent struct {
	epoch model.Epoch
	wire  []byte
	w     *blockstore.EpochWrites
}

func (e *epochs) capture() {
	defer e.done.Done()
	r := rand.New(rand.NewPCG(e.seed, 2))
	queues := [2]chan sent{make(chan sent, 4), make(chan sent, 4)}
	var apply sync.WaitGroup
	apply.Add(2)
	go func() { // the secondary
		defer apply.Done()
		for s := range queues[0] {
			d, err := blockstore.Decode(s.wire, scrubSize)
			if err == nil {
				err = errors.Join(e.b.st.Persist(1, s.epoch, d), e.b.st.Apply(s.epoch))
			}
			if err != nil {
				e.t.Error(err)
			}
			e.mu.Lock()
			e.in = s.epoch
			close(e.more)
			e.more = make(chan struct{})
			e.mu.Unlock()
		}
	}()
	go func() { // the primary's committer
		defer apply.Done()
		for s := range queues[1] {
			if err := e.a.vol.Commit(s.w); err != nil {
				e.t.Error(err)
			}
			e.a.st.Committed(s.epoch)
		}
	}()
	for over := false; !over; {
		select {
		case <-e.stop:
			over = true
		case <-time.After(time.Duration(r.IntN(1500)) * time.Microsecond):
		}
		e.guest.Lock()
		w := e.a.vol.Cut()
		n := model.Epoch(e.last.Add(1))
		e.guest.Unlock()
		s := sent{n, w.AppendTo(nil), w}
		queues[0] <- s
		queues[1] <- s
	}
	close(queues[0])
	close(queues[1])
	apply.Wait()
}

// requests is the guest; it knows what it wrote, and never reads anything else.
func (e *epochs) requests(r *rand.Rand) {
	defer e.done.Done()
	ctx := context.Background()
	for n := 0; ; n++ {
		select {
		case <-e.stop:
			return
		default:
		}
		off := r.Int64N(scrubSize/4*3/512-64) * 512 // some of the disk is left alone
		length := (1 + r.Int64N(64)) * 512
		e.guest.RLock()
		var err error
		switch r.IntN(5) {
		case 0, 1:
			p := make([]byte, length)
			if err = e.a.vol.ReadAt(ctx, p, off); err == nil && !bytes.Equal(p, e.told[off:off+length]) {
				err = fmt.Errorf("a read at %d was answered by something that was never written", off)
			}
		case 2:
			if err = e.a.vol.Zero(ctx, off, length, false, r.IntN(2) == 0); err == nil {
				clear(e.told[off : off+length])
			}
		default:
			p := bytes.Repeat([]byte{byte(1 + r.IntN(255))}, int(length))
			if err = e.a.vol.WriteAt(ctx, p, off, r.IntN(9) == 0); err == nil {
				copy(e.told[off:], p)
			}
		}
		e.guest.RUnlock()
		if err != nil {
			e.t.Error(err)
			return
		}
	}
}

func (e *epochs) quiet() {
	close(e.stop)
	e.done.Wait()
}

// TestVerifyWithEpochs: beside a guest that writes and epochs that are committed and
// applied at different times, no difference is ever seen that is none.
func TestVerifyWithEpochs(t *testing.T) {
	e := newEpochs(t)
	for range 3 {
		if d := e.verify(); d.Mismatches != 0 {
			t.Errorf("nothing is wrong, and it was found: %+v", d)
		}
	}
	e.quiet()
	e.equal(e.told)
}

// TestRotWithEpochs lets bits rot on both sides, never in both copies of a block,
// beside a guest that reads and writes: it never reads anything wrong, and in the end
// both replicas are what it wrote.
func TestRotWithEpochs(t *testing.T) {
	e := newEpochs(t)
	r := rand.New(rand.NewPCG(e.seed, 3))
	over, done := make(chan struct{}), make(chan struct{})
	var rotten atomic.Int64
	go func() {
		defer close(done)
		for {
			select {
			case <-over:
				return
			case <-time.After(time.Duration(r.IntN(400)) * time.Microsecond):
			}
			b := r.Int64N(scrubSize / scrubBlock)
			[]*scrubSide{e.a, e.b}[b%2].rot(t, b)
			rotten.Add(1)
		}
	}()
	var found, repaired int64
	for range 2 {
		d := e.verify()
		found, repaired = found+d.Mismatches, repaired+d.Repaired
	}
	close(over)
	<-done
	d := e.verify()
	if d.Left != 0 {
		t.Errorf("left: %+v", d)
	}
	if d := e.verify(); d.Mismatches != 0 {
		t.Errorf("after all was repaired: %+v", d)
	}
	e.quiet()
	e.equal(e.told)
	_, read := e.a.st.Damage()
	t.Logf("%d times rot; verify found %d blocks and repaired %d; on the primary's side %d were repaired, by verify or a read", rotten.Load(), found+d.Mismatches, repaired+d.Repaired, read)
	if repaired+d.Repaired == 0 {
		t.Error("verify repaired nothing: the test tests nothing")
	}
}

// TestVerifyMirrored: the same for a mirror, whose sides carry requests out in
// different order and at different times.
func TestVerifyMirrored(t *testing.T) {
	p := newScrubPair(t)
	jitter := func(v *blockstore.Volume) mirror.Replica { return slowReplica{v} }
	src := mirror.NewSource([]mirror.Replica{jitter(p.a.vol)})
	dst := mirror.NewTarget([]mirror.Replica{jitter(p.b.vol)}, func(parts ...[]byte) error { return src.Done(bytes.Join(parts, nil)) },
		func(parts ...[]byte) error { return src.Data(bytes.Join(parts, nil)) }, func(err error) { t.Error(err) })
	stream := make(chan []byte, 64)
	streamed := make(chan struct{})
	go func() {
		defer close(streamed)
		for m := range stream {
			if err := dst.Take(m); err != nil {
				t.Error(err)
			}
		}
		dst.Settle()
	}()
	if err := src.Join(func(parts ...[]byte) error { stream <- bytes.Join(parts, nil); return nil }, func() error { return nil }); err != nil {
		t.Fatal(err)
	}
	p.sc.still = src.Still
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	const guests = 4
	told := make([]byte, scrubSize)
	stop := make(chan struct{})
	var work sync.WaitGroup
	for g := range int64(guests) {
		work.Add(1)
		go func() {
			defer work.Done()
			r := rand.New(rand.NewPCG(seed, uint64(g)))
			for {
				select {
				case <-stop:
					return
				default:
				}
				// Blocks of its own, every fourth one.
				b := r.Int64N(scrubSize/scrubBlock/guests)*guests + g
				data := bytes.Repeat([]byte{byte(1 + r.IntN(255))}, scrubBlock)
				if err := src.Export(0).WriteAt(context.Background(), data, b*scrubBlock, r.IntN(20) == 0); err != nil {
					t.Error(err)
					return
				}
				copy(told[b*scrubBlock:], data)
			}
		}()
	}
	for range 4 {
		if d := p.verify(); d.Mismatches != 0 {
			t.Errorf("nothing is wrong, and it was found: %+v", d)
		}
	}
	r := rand.New(rand.NewPCG(seed, 99))
	var repaired int64
	for range 4 {
		for range 40 {
			b := r.Int64N(scrubSize / scrubBlock)
			[]*scrubSide{p.a, p.b}[b%2].rot(t, b)
		}
		d := p.verify()
		if d.Left != 0 {
			t.Errorf("left: %+v", d)
		}
		repaired += d.Repaired
	}
	close(stop)
	work.Wait()
	if d := p.verify(); d.Mismatches != 0 {
		t.Errorf("after all was repaired: %+v", d)
	}
	src.Close()
	close(stream)
	<-streamed
	p.equal(told)
	if repaired == 0 {
		t.Error("verify repaired nothing: the test tests nothing")
	}
}

// slowReplica takes its time before some writes.
type slowReplica struct{ *blockstore.Volume }

func (s slowReplica) WriteAt(ctx context.Context, p []byte, off int64, fua bool) error {
	if rand.IntN(4) == 0 {
		time.Sleep(time.Duration(rand.IntN(300)) * time.Microsecond)
	}
	return s.Volume.WriteAt(ctx, p, off, fua)
}

func (s *scrubSide) must(t *testing.T, block int64, b byte) {
	t.Helper()
	if err := s.st.WriteAt(bytes.Repeat([]byte{b}, scrubBlock), block*scrubBlock); err != nil {
		t.Fatal(err)
	}
}

// still is the mirror of a guest that does nothing.
func still(_ context.Context, _ int, _, _ int64, f func() error) error { return f() }

// TestVerifyBothBad: what nothing tells the truth about is left as it is, and named.
func TestVerifyBothBad(t *testing.T) {
	p := newScrubPair(t)
	p.sc.still = still
	for b := range int64(64) {
		p.a.must(t, b, byte(b))
		p.b.must(t, b, byte(b))
	}
	p.a.must(t, 3, 99) // both hold, and differ
	p.a.rot(t, 20)     // rot in both copies
	p.a.rot(t, 20)     // and twice is none: the same bit
	p.a.rot(t, 21)
	p.b.rot(t, 21)
	p.b.must(t, 21, 7) // and one was written since: it holds
	p.a.rot(t, 40)
	p.b.rot(t, 40)
	p.a.rot(t, 50)
	p.b.rot(t, 51)
	imgs := [][]byte{p.a.image(t), p.b.image(t)}
	d := p.verify()
	if d.Mismatches != 5 || d.Left != 2 || d.Repaired != 3 {
		t.Errorf("found %+v", d)
	}
	var text strings.Builder
	for _, r := range d.Ranges {
		fmt.Fprintf(&text, "%d+%d %s %s: %s\n", r.Off/scrubBlock, r.Len/scrubBlock, r.What, r.Host, r.Why)
	}
	want := `3+1 left : they differ, and the checksums of both hold
21+1 repaired a: it does not match its checksum
40+1 left : the checksum of neither holds
50+1 repaired a: it does not match its checksum
51+1 repaired b: it does not match its checksum
`
	if text.String() != want {
		t.Errorf("the report says\n%s, want\n%s", text.String(), want)
	}
	for n, s := range []*scrubSide{p.a, p.b} {
		for _, b := range []int64{3, 40} {
			if !bytes.Equal(s.image(t)[b*scrubBlock:][:scrubBlock], imgs[n][b*scrubBlock:][:scrubBlock]) {
				t.Errorf("block %d of side %d was changed, though nothing tells which is right", b, n)
			}
		}
	}
}

// TestVerifyAlone: one replica is judged by its own checksums, and nothing is written.
func TestVerifyAlone(t *testing.T) {
	p := newScrubPair(t)
	p.sc.peer = nil
	for b := range int64(16) {
		p.a.must(t, b, byte(b+1))
	}
	p.a.rot(t, 5)
	before := p.a.image(t)
	d := p.verify()
	if d.Mismatches != 1 || d.Left != 1 || d.Ranges[0].Off != 5*scrubBlock || d.Ranges[0].Host != "a" {
		t.Errorf("found %+v", d)
	}
	if !bytes.Equal(before, p.a.image(t)) {
		t.Error("the replica was changed")
	}
}

// TestVerifyWithoutChecksums: a side without checksums is repaired from the one that
// has them, and two without are left.
func TestVerifyWithoutChecksums(t *testing.T) {
	for _, c := range []struct {
		noA, noB       bool
		repaired, left int64
	}{{true, false, 1, 0}, {false, true, 1, 0}, {true, true, 0, 1}} {
		p := newScrubPair(t, c.noA, c.noB)
		p.sc.still = still
		for b := range int64(16) {
			p.a.must(t, b, byte(b+1))
			p.b.must(t, b, byte(b+1))
		}
		side := p.a
		if c.noB && !c.noA {
			side = p.b
		}
		side.rot(t, 9)
		if d := p.verify(); d.Mismatches != 1 || d.Repaired != c.repaired || d.Left != c.left {
			t.Errorf("%+v: found %+v", c, d)
		}
	}
}

// TestRepairYieldsToWrites: between the look and the repair the guest writes the
// block: what it wrote stays, on the side that is repaired, whichever that is.
func TestRepairYieldsToWrites(t *testing.T) {
	for _, wrong := range []string{"a", "b"} {
		p := newScrubPair(t)
		n := 0
		p.sc.still = func(_ context.Context, _ int, _, _ int64, f func() error) error {
			err := f()
			if n++; n == scrubSize/blockstore.ChunkSize/5+1+1 { // after the first look
				p.a.must(t, 30, 200)
				p.b.must(t, 30, 200)
			}
			return err
		}
		for b := range int64(64) {
			p.a.must(t, b, 1)
			p.b.must(t, b, 1)
		}
		map[string]*scrubSide{"a": p.a, "b": p.b}[wrong].rot(t, 30)
		n = scrubSize/blockstore.ChunkSize/5 + 1 - 1 // the first comparison finds it
		d := p.verify()
		if d.Mismatches != 1 || d.Rewritten != 1 {
			t.Errorf("%s wrong: found %+v", wrong, d)
		}
		for _, s := range []*scrubSide{p.a, p.b} {
			if img := s.image(t); img[30*scrubBlock] != 200 {
				t.Errorf("%s wrong: a repair undid a newer write: %d", wrong, img[30*scrubBlock])
			}
		}
	}
}

// TestScrubGarbage: questions that do not fit are refused, and cost nothing.
func TestScrubGarbage(t *testing.T) {
	p := newScrubPair(t)
	chunks := int64(scrubSize / blockstore.ChunkSize)
	for _, h := range []scrubHead{
		{Op: 0}, {Op: 99}, {Op: scrubDigest, Disk: 1, Count: 1}, {Op: scrubDigest, First: -1, Count: 1}, {Op: scrubDigest, Count: -1},
		{Op: scrubDigest, First: chunks, Count: 1}, {Op: scrubDigest, Count: sumChunks + 1}, {Op: scrubWarm, First: 1 << 62, Count: 1 << 62},
		{Op: scrubLook, First: chunks}, {Op: scrubLook, First: -1}, {Op: scrubFix, First: chunks},
		{Op: scrubRead, First: scrubSize, Count: 1}, {Op: scrubRead, Count: maxScrubRead + 1}, {Op: scrubRead, First: -4096, Count: 4096},
	} {
		if err := p.server.check(h); err == nil {
			t.Errorf("%+v is not refused", h)
		}
	}
	if _, _, err := decodeScrub([]byte("short")); err == nil {
		t.Error("a short message is not refused")
	}
	if _, _, err := decodeLook(make([]byte, 100)); err == nil {
		t.Error("a short look is not refused")
	}
	if err := p.client.take(pack(scrubHead{ID: 7})); err != nil { // nobody asked
		t.Error(err)
	}
	// The other side is told, and the session goes on.
	if _, err := p.client.digests(context.Background(), 0, 0, chunks, 1); err == nil || !strings.Contains(err.Error(), "the secondary") {
		t.Error(err)
	}
	// A repair of what was not looked at, and one with too little data.
	if _, err := p.client.fix(context.Background(), 0, 3, 1, make([]byte, blockstore.ChunkSize)); err == nil {
		t.Error("a chunk that was not looked at is repaired")
	}
	if _, _, err := p.client.look(context.Background(), 0, 0, 3); err != nil {
		t.Fatal(err)
	}
	if _, err := p.client.ask(context.Background(), scrubHead{Op: scrubFix, First: 3, Mask: 3}, make([]byte, scrubBlock)); err == nil {
		t.Error("a repair with too little data is not refused")
	}
}

// TestRepairIsDurable: when a verify has ended, what it repaired survives the loss of
// power on either side.
func TestRepairIsDurable(t *testing.T) {
	p := newScrubPair(t)
	p.sc.still = still
	for b := range int64(32) {
		p.a.must(t, b, 1)
		p.b.must(t, b, 1)
	}
	for _, s := range []*scrubSide{p.a, p.b} {
		if err := s.st.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	want := p.a.image(t)
	p.a.rot(t, 3)
	p.b.rot(t, 9)
	// What rotted did so on the medium.
	for _, s := range []*scrubSide{p.a, p.b} {
		f, err := s.mem.Open("/d/disk0.raw")
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(f.Sync(), f.Close()); err != nil {
			t.Fatal(err)
		}
	}
	if d := p.verify(); d.Repaired != 2 {
		t.Fatalf("found %+v", d)
	}
	for n, s := range []*scrubSide{p.a, p.b} {
		after := &scrubSide{mem: s.mem.Crash(func() bool { return false })}
		if !bytes.Equal(after.image(t), want) {
			t.Errorf("side %d: the repair is lost with the power", n)
		}
	}
}
