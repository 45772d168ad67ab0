package mirror

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"syscall"
	"testing"
	"time"
)

// mem is a replica in memory that knows what of it is durable.
type mem struct {
	mu      sync.Mutex
	data    []byte
	durable []byte
	fail    error
	rfail   error  // of reads
	slow    func() // before each change
}

func newMem(n int) *mem { return &mem{data: make([]byte, n), durable: make([]byte, n)} }

func (m *mem) Size() int64 { return int64(len(m.data)) }

func (m *mem) change(f func()) error {
	if m.slow != nil {
		m.slow()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.fail != nil {
		return m.fail
	}
	f()
	return nil
}

func (m *mem) ReadAt(_ context.Context, p []byte, off int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.rfail != nil {
		return m.rfail
	}
	copy(p, m.data[off:])
	return nil
}

func (m *mem) WriteAt(_ context.Context, p []byte, off int64, fua bool) error {
	return m.change(func() {
		copy(m.data[off:], p)
		if fua {
			copy(m.durable, m.data)
		}
	})
}

func (m *mem) Zero(_ context.Context, off, n int64, fua, _ bool) error {
	return m.change(func() {
		clear(m.data[off : off+n])
		if fua {
			copy(m.durable, m.data)
		}
	})
}

func (m *mem) Flush(context.Context) error {
	return m.change(func() { copy(m.durable, m.data) })
}

func (m *mem) Extent(_ context.Context, _, n int64) (int64, bool, error) { return n, false, nil }

func (m *mem) bytes(durable bool) []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	if durable {
		return bytes.Clone(m.durable)
	}
	return bytes.Clone(m.data)
}

// rig is a Source and a Target with a stream between them that can be cut.
type rig struct {
	t      *testing.T
	mine   *mem
	theirs *mem
	src    *Source
	dst    *Target
	stream chan []byte
	failed chan error

	mu   sync.Mutex
	cut  bool // answers get lost from now on, and so does what is sent
	over chan struct{}
}

var errCut = errors.New("cut")

func newRig(t *testing.T, size int) *rig {
	r := &rig{t: t, mine: newMem(size), theirs: newMem(size), stream: make(chan []byte, 64), failed: make(chan error, 1), over: make(chan struct{})}
	r.src = NewSource([]Replica{r.mine})
	r.dst = NewTarget([]Replica{r.theirs}, func(parts ...[]byte) error {
		if r.isCut() {
			return errCut
		}
		return r.src.Done(bytes.Join(parts, nil))
	}, func(parts ...[]byte) error {
		if r.isCut() {
			return errCut
		}
		return r.src.Data(bytes.Join(parts, nil))
	}, func(err error) { r.failed <- err })
	go func() {
		defer close(r.over)
		for p := range r.stream {
			if err := r.dst.Take(p); err != nil {
				t.Errorf("take: %v", err)
			}
		}
		r.dst.Settle()
	}()
	t.Cleanup(func() { r.src.Close(); close(r.stream); <-r.over })
	return r
}

func (r *rig) isCut() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.cut
}

func (r *rig) cutNow() {
	r.mu.Lock()
	r.cut = true
	r.mu.Unlock()
}

func (r *rig) send(parts ...[]byte) error {
	if r.isCut() {
		return errCut
	}
	r.stream <- bytes.Join(parts, nil)
	return nil
}

func (r *rig) join() {
	r.t.Helper()
	if err := r.src.Join(r.send, func() error { return nil }); err != nil {
		r.t.Fatal(err)
	}
}

// TestAnsweredMeansBoth writes at random from many sides, with overlaps, and
// looks after each answer whether the other side has it, durably where asked for.
func TestAnsweredMeansBoth(t *testing.T) {
	const size, clients = 64 << 10, 8
	r := newRig(t, size)
	jitter := func() { time.Sleep(time.Duration(rand.IntN(200)) * time.Microsecond) }
	r.mine.slow, r.theirs.slow = jitter, jitter
	r.join()
	e, ctx := r.src.Export(0), context.Background()
	var wg sync.WaitGroup
	for c := range clients {
		wg.Add(1)
		go func() {
			defer wg.Done()
			rnd := rand.New(rand.NewPCG(uint64(c), 1))
			own := int64(c) * 4096 // nobody else writes here
			for n := range 60 {
				p := bytes.Repeat([]byte{byte(1 + n)}, 512)
				off := own + int64(rnd.IntN(8))*512
				fua := rnd.IntN(3) == 0
				if err := put(ctx, e, p, off, fua); err != nil {
					t.Errorf("write: %v", err)
				}
				durable := fua
				if rnd.IntN(4) == 0 {
					if err := e.Flush(ctx); err != nil {
						t.Errorf("flush: %v", err)
					}
					durable = true
				}
				for _, m := range []*mem{r.mine, r.theirs} {
					if got := m.bytes(durable)[off : off+512]; !bytes.Equal(got, p) {
						t.Errorf("client %d, write %d: answered (durable %v), and one side has %d, want %d", c, n, durable, got[0], p[0])
						return
					}
				}
				// A place where all write, over one another.
				at := int64(clients*4096) + int64(rnd.IntN(16))*512
				if rnd.IntN(5) == 0 {
					err := e.Zero(ctx, at, 1024, rnd.IntN(2) == 0, true)
					if err != nil {
						t.Errorf("zero: %v", err)
					}
				} else if err := put(ctx, e, bytes.Repeat([]byte{byte(c*30 + n)}, 1024), at, false); err != nil {
					t.Errorf("write: %v", err)
				}
			}
		}()
	}
	wg.Wait()
	if !bytes.Equal(r.mine.bytes(false), r.theirs.bytes(false)) {
		t.Error("the replicas differ although all is quiet: overlapping requests had two orders")
	}
}

// TestLongWrite is cut in pieces on the wire, and durable as a whole.
func TestLongWrite(t *testing.T) {
	const size = 5<<20 + 4096
	r := newRig(t, size)
	r.join()
	p := make([]byte, size-4096)
	for n := range p {
		p[n] = byte(n >> 12)
	}
	if err := put(context.Background(), r.src.Export(0), p, 2048, true); err != nil {
		t.Fatal(err)
	}
	for _, m := range []*mem{r.mine, r.theirs} {
		if !bytes.Equal(m.bytes(true)[2048:2048+len(p)], p) {
			t.Error("a long write is not whole, or not durable")
		}
	}
}

// TestNothingIsAnsweredAlone loses the peer: no change is answered until Alone,
// and then all are.
func TestNothingIsAnsweredAlone(t *testing.T) {
	r := newRig(t, 64<<10)
	r.join()
	e, ctx := r.src.Export(0), context.Background()
	if err := put(ctx, e, make([]byte, 512), 0, false); err != nil {
		t.Fatal(err)
	}
	r.cutNow()
	answers := make(chan error, 4)
	go func() { answers <- put(ctx, e, bytes.Repeat([]byte{7}, 512), 0, false) }()
	go func() { answers <- put(ctx, e, bytes.Repeat([]byte{7}, 512), 256, false) }() // behind the first
	go func() { answers <- e.Zero(ctx, 8192, 512, false, true) }()
	go func() { answers <- e.Flush(ctx) }()
	for end := time.Now().Add(20 * time.Second); r.src.Oldest() == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("nothing waits for the peer")
		}
	}
	select {
	case err := <-answers:
		t.Fatalf("a change was answered (%v) while only this side has it and nobody said that this is enough", err)
	case <-time.After(100 * time.Millisecond):
	}
	r.src.Alone()
	for range 4 {
		if err := <-answers; err != nil {
			t.Errorf("after Alone: %v", err)
		}
	}
	if r.src.Joined() || r.src.Oldest() != 0 {
		t.Error("still joined after Alone")
	}
	if err := e.Flush(ctx); err != nil {
		t.Error(err)
	}
}

// TestJoinUnderLoad joins while writes are under way: what was written before is
// in the rest, what comes after goes to both; nothing is in neither.
func TestJoinUnderLoad(t *testing.T) {
	for round := range 20 {
		r := newRig(t, 32<<10)
		e, ctx := r.src.Export(0), context.Background()
		stop := make(chan struct{})
		var wg sync.WaitGroup
		for c := range 4 {
			wg.Add(1)
			go func() {
				defer wg.Done()
				for n := 0; ; n++ {
					select {
					case <-stop:
						return
					default:
					}
					if err := put(ctx, e, bytes.Repeat([]byte{byte(n)}, 4096), int64(c)*8192+int64(n%2)*4096, false); err != nil {
						t.Errorf("write: %v", err)
					}
				}
			}()
		}
		time.Sleep(time.Duration(round) * 100 * time.Microsecond)
		err := r.src.Join(r.send, func() error {
			return r.theirs.WriteAt(ctx, r.mine.bytes(false), 0, false) // the copy
		})
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Millisecond)
		close(stop)
		wg.Wait()
		if !bytes.Equal(r.mine.bytes(false), r.theirs.bytes(false)) {
			t.Fatalf("round %d: the replicas differ", round)
		}
	}
}

// TestTargetFails: a target that cannot write says so once and answers nothing.
func TestTargetFails(t *testing.T) {
	r := newRig(t, 64<<10)
	r.theirs.fail = syscall.EIO
	r.join()
	answer := make(chan error, 1)
	go func() { answer <- put(context.Background(), r.src.Export(0), make([]byte, 512), 0, false) }()
	if err := <-r.failed; !errors.Is(err, syscall.EIO) {
		t.Errorf("failed with %v", err)
	}
	select {
	case err := <-answer:
		t.Fatalf("answered (%v) although the peer has failed", err)
	case <-time.After(50 * time.Millisecond):
	}
	r.src.Close()
	if err := <-answer; !errors.Is(err, syscall.ESHUTDOWN) {
		t.Errorf("after Close: %v", err)
	}
}

// TestLocalFailure answers with the local error at once.
func TestLocalFailure(t *testing.T) {
	r := newRig(t, 64<<10)
	r.mine.fail = syscall.ENOSPC
	r.join()
	if err := put(context.Background(), r.src.Export(0), make([]byte, 512), 0, false); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("got %v", err)
	}
}

// TestMalformed: whatever comes, a target refuses what is no request of its disks.
func TestMalformed(t *testing.T) {
	m := newMem(8192)
	none := func(...[]byte) error { return nil }
	d := NewTarget([]Replica{m}, none, none, func(error) {})
	enc := func(h head, data int) []byte { return append(h.encode(), make([]byte, data)...) }
	for name, p := range map[string][]byte{
		"empty":         nil,
		"short":         make([]byte, headSize-1),
		"no operation":  enc(head{}, 0),
		"unknown":       enc(head{Op: 9}, 0),
		"other disk":    enc(head{Op: opFlush, Disk: 1}, 0),
		"beyond":        enc(head{Op: opWrite, Off: 8000, Len: 512}, 512),
		"before":        enc(head{Op: opWrite, Off: -512, Len: 512}, 512),
		"overflow":      enc(head{Op: opZero, Off: 1, Len: 1<<63 - 1}, 0),
		"negative":      enc(head{Op: opZero, Len: -1}, 0),
		"too few bytes": enc(head{Op: opWrite, Len: 512}, 511),
		"too many":      enc(head{Op: opZero, Len: 512}, 1),
		"flag":          enc(head{Op: opFlush, Flags: flagFUA}, 0),
		"empty read":    enc(head{Op: opRead}, 0),
		"long read":     enc(head{Op: opRead, Len: 8193}, 0),
		"read flag":     enc(head{Op: opRead, Len: 1, Flags: flagFUA}, 0),
		"unknown flag":  enc(head{Op: opZero, Len: 1, Flags: 0x80}, 0),
	} {
		if err := d.Take(p); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	if err := d.Take(enc(head{Op: opWrite, Off: 7680, Len: 512}, 512)); err != nil {
		t.Errorf("a good request: %v", err)
	}
	d.Settle()
}

func FuzzTake(f *testing.F) {
	f.Add(head{Op: opWrite, Len: 4}.encode())
	f.Add(append(head{Op: opWrite, Len: 4}.encode(), 1, 2, 3, 4))
	f.Add(head{Op: opZero, Len: 100, Flags: flagPunch}.encode())
	f.Add(head{Op: opRead, Len: 100}.encode())
	f.Fuzz(func(t *testing.T, p []byte) {
		none := func(...[]byte) error { return nil }
		d := NewTarget([]Replica{newMem(8192)}, none, none, func(err error) { t.Error(err) })
		_ = d.Take(p) // must neither panic nor reach outside of the disk
		d.Settle()
	})
}

func Example() {
	a, b := newMem(4096), newMem(4096)
	src := NewSource([]Replica{a})
	dst := NewTarget([]Replica{b}, func(p ...[]byte) error { return src.Done(bytes.Join(p, nil)) },
		func(p ...[]byte) error { return src.Data(bytes.Join(p, nil)) }, func(error) {})
	_ = src.Join(func(p ...[]byte) error { return dst.Take(bytes.Join(p, nil)) }, func() error { return nil })
	_ = src.Export(0).WriteAt(context.Background(), []byte("both"), 0, true)
	fmt.Println(string(a.data[:4]), string(b.durable[:4]))
	// Output: both both
}
