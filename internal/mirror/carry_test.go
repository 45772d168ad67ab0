package mirror

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// failing makes changes and reads of a replica fail from now on.
func (m *mem) failing(changes, reads error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.fail, m.rfail = changes, reads
}

// record is the owner of a Source: it decides, some time after it was told.
type record struct {
	src   *Source
	news  chan string
	agree bool
}

func (r *rig) own() *record {
	o := &record{src: r.src, news: make(chan string, 16), agree: true}
	r.src.Own(Owner{
		Lost: func(disk int, err error) bool {
			o.news <- fmt.Sprintf("lost %d: %v", disk, err)
			return o.agree
		},
		Back: func() { o.news <- "back" },
	})
	return o
}

func (o *record) wait(t *testing.T, want string) {
	t.Helper()
	select {
	case got := <-o.news:
		if got != want {
			t.Fatalf("the owner heard %q, want %q", got, want)
		}
	case <-time.After(20 * time.Second):
		t.Fatalf("the owner never heard %q", want)
	}
}

// waits fails the test if there is an answer.
func waits(t *testing.T, answers <-chan error, why string) {
	t.Helper()
	select {
	case err := <-answers:
		t.Fatalf("answered with %v: %s", err, why)
	case <-time.After(100 * time.Millisecond):
	}
}

func inTime(t *testing.T, answers <-chan error) error {
	t.Helper()
	select {
	case err := <-answers:
		return err
	case <-time.After(20 * time.Second):
		t.Fatal("no answer")
		return nil
	}
}

func fill(b byte, n int) []byte { return bytes.Repeat([]byte{b}, n) }

// TestCarried: the local replica fails. Reads go on at once, changes when the
// record allows it, and the guest sees no error.
func TestCarried(t *testing.T) {
	for _, op := range []string{"write", "zero", "flush", "read"} {
		t.Run(op, func(t *testing.T) {
			r := newRig(t, 64<<10)
			o := r.own()
			r.join()
			e, ctx := r.src.Export(0), context.Background()
			if err := put(ctx, e, fill(7, 4096), 4096, false); err != nil {
				t.Fatal(err)
			}
			r.mine.failing(syscall.EIO, syscall.EIO)
			answers := make(chan error, 1)
			read := make([]byte, 4096)
			go func() {
				switch op {
				case "write":
					answers <- put(ctx, e, fill(9, 4096), 4096, false)
				case "zero":
					answers <- e.Zero(ctx, 4096, 4096, false, true)
				case "flush":
					answers <- e.Flush(ctx)
				case "read":
					answers <- e.ReadAt(ctx, read, 4096)
				}
			}()
			o.wait(t, "lost 0: input/output error")
			if op == "read" {
				if err := inTime(t, answers); err != nil || read[0] != 7 || read[4095] != 7 {
					t.Fatalf("read: %v, %d", err, read[0])
				}
			} else {
				waits(t, answers, "only the peer has it, and the record does not say so")
			}
			other := make(chan error, 1)
			go func() { other <- put(ctx, e, fill(5, 4096), 8192, true) }()
			waits(t, other, "only the peer has it, and the record does not say so")
			r.src.Carry(true)
			if err := inTime(t, other); err != nil {
				t.Error(err)
			}
			if op != "read" {
				if err := inTime(t, answers); err != nil {
					t.Errorf("%s: %v", op, err)
				}
			}
			if got := r.theirs.bytes(true)[8192]; got != 5 {
				t.Errorf("the peer has %d", got)
			}
			if err := e.ReadAt(ctx, read, 8192); err != nil || read[0] != 5 {
				t.Errorf("read what was written: %v, %d", err, read[0])
			}
			if n, hole, err := e.Extent(ctx, 0, 4096); n != 4096 || hole || err != nil {
				t.Errorf("extent %d, hole %v, %v", n, hole, err)
			}
			if got := fmt.Sprint(r.src.Carried()); got != "[0]" {
				t.Errorf("carried: %s", got)
			}
			select {
			case n := <-o.news:
				t.Errorf("told again: %s", n)
			default:
			}
		})
	}
}

// TestNotCarried: where the owner does not agree, and for what is the caller's
// fault, the guest gets the error.
func TestNotCarried(t *testing.T) {
	r := newRig(t, 64<<10)
	o := r.own()
	r.join()
	e, ctx := r.src.Export(0), context.Background()
	r.mine.failing(syscall.EINVAL, nil)
	if err := put(ctx, e, fill(1, 512), 0, false); !errors.Is(err, syscall.EINVAL) || len(o.news) != 0 {
		t.Errorf("a bad call: %v, %d news", err, len(o.news))
	}
	o.agree = false
	r.mine.failing(syscall.ENOSPC, syscall.EIO)
	if err := put(ctx, e, fill(1, 512), 0, false); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("write: %v", err)
	}
	if err := e.ReadAt(ctx, make([]byte, 512), 0); !errors.Is(err, syscall.EIO) {
		t.Errorf("read: %v", err)
	}
	r.mine.failing(nil, nil)
	if err := put(ctx, e, fill(2, 512), 0, false); err != nil || r.mine.bytes(false)[0] != 2 {
		t.Errorf("after there was room again: %v", err)
	}
}

// TestAloneBeforeCarried: the replica fails, and the peer is dropped before the
// record allowed to carry: the guest gets the error, and the replica is used again.
func TestAloneBeforeCarried(t *testing.T) {
	r := newRig(t, 64<<10)
	o := r.own()
	r.join()
	e, ctx := r.src.Export(0), context.Background()
	r.mine.failing(syscall.ENOSPC, nil)
	answers := make(chan error, 1)
	go func() { answers <- put(ctx, e, fill(1, 512), 0, false) }()
	o.wait(t, "lost 0: no space left on device")
	waits(t, answers, "nobody decided")
	r.src.Alone()
	if err := inTime(t, answers); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("the guest was told %v", err)
	}
	r.mine.failing(nil, nil)
	if err := put(ctx, e, fill(3, 512), 0, false); err != nil || r.mine.bytes(false)[0] != 3 {
		t.Errorf("with room again: %v", err)
	}
}

// TestNobodyIsLeft: a carried disk whose peer is lost answers nothing until it
// is closed, and then all at once.
func TestNobodyIsLeft(t *testing.T) {
	r := newRig(t, 64<<10)
	o := r.own()
	r.join()
	e, ctx := r.src.Export(0), context.Background()
	r.src.Carry(true)
	r.mine.failing(syscall.EIO, syscall.EIO)
	if err := put(ctx, e, fill(1, 512), 0, false); err != nil {
		t.Fatal(err)
	}
	o.wait(t, "lost 0: input/output error")
	r.cutNow()
	answers := make(chan error, 4)
	go func() { answers <- put(ctx, e, fill(2, 512), 0, false) }()
	go func() { answers <- e.Flush(ctx) }()
	go func() { answers <- e.ReadAt(ctx, make([]byte, 512), 4096) }()
	go func() { answers <- e.Fetch(make([]byte, 512), 8192) }()
	waits(t, answers, "nobody has it")
	r.src.Close()
	for range 4 {
		if err := inTime(t, answers); !errors.Is(err, syscall.ESHUTDOWN) {
			t.Errorf("after Close: %v", err)
		}
	}
}

// TestStalled: a replica that does not answer at all is given up from outside;
// what comes afterwards does not wait for it, in the same range neither.
func TestStalled(t *testing.T) {
	r := newRig(t, 64<<10)
	o := r.own()
	release := make(chan struct{})
	var stall atomic.Bool
	r.mine.slow = func() {
		if stall.Load() {
			<-release
		}
	}
	r.join()
	e, ctx := r.src.Export(0), context.Background()
	stall.Store(true)
	stuck := make(chan error, 1)
	go func() { stuck <- put(ctx, e, fill(1, 4096), 0, false) }()
	waits(t, stuck, "the local replica stands")
	if !r.src.GiveUp(0, syscall.ETIMEDOUT) {
		t.Fatal("not given up")
	}
	o.wait(t, "lost 0: connection timed out")
	r.src.Carry(true)
	again := make(chan error, 1)
	go func() { again <- put(ctx, e, fill(2, 4096), 0, false) }()
	if err := inTime(t, again); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 4096)
	if err := e.ReadAt(ctx, p, 0); err != nil || p[0] != 2 {
		t.Errorf("read %d, %v", p[0], err)
	}
	if r.src.GiveUp(0, syscall.ETIMEDOUT) {
		t.Error("given up twice")
	}
	close(release)
	if err := inTime(t, stuck); err != nil {
		t.Errorf("the write that had been stuck: %v", err)
	}
}

// TestPeerReads: what the peer reads is as of everything sent before, long reads
// are whole, and an error there is an error here, of this read only.
func TestPeerReads(t *testing.T) {
	const size = 5<<20 + 4096
	r := newRig(t, size)
	r.own()
	r.join()
	r.src.Carry(true)
	r.mine.failing(syscall.EIO, syscall.EIO)
	r.theirs.slow = func() { time.Sleep(time.Duration(rand.IntN(300)) * time.Microsecond) }
	e, ctx := r.src.Export(0), context.Background()
	var wg sync.WaitGroup
	for c := range 8 {
		wg.Go(func() {
			for n := range 40 {
				off := int64(c) * (64 << 10)
				want := fill(byte(1+n), 16<<10)
				if err := put(ctx, e, want, off, n%3 == 0); err != nil {
					t.Errorf("write: %v", err)
				}
				got := make([]byte, len(want))
				if err := e.ReadAt(ctx, got, off); err != nil || !bytes.Equal(got, want) {
					t.Errorf("client %d read %d after %d, %v", c, got[0], want[0], err)
					return
				}
			}
		})
	}
	wg.Wait()
	all := make([]byte, size)
	if err := e.ReadAt(ctx, all, 0); err != nil || !bytes.Equal(all, r.theirs.bytes(false)) {
		t.Errorf("a long read: %v", err)
	}
	r.theirs.failing(nil, syscall.EIO)
	if err := e.ReadAt(ctx, all[:4096], 0); !errors.Is(err, syscall.EIO) {
		t.Errorf("what the peer cannot read: %v", err)
	}
	r.theirs.failing(nil, nil)
	if err := e.ReadAt(ctx, all[:4096], 0); err != nil {
		t.Errorf("afterwards: %v", err)
	}
	if o := r.src.Oldest(); o != 0 {
		t.Errorf("a request is %v old although all is quiet", o)
	}
}

// TestFetchGivesUp: a block that has to be fetched again and again is not repaired.
func TestFetchGivesUp(t *testing.T) {
	r := newRig(t, 64<<10)
	o := r.own()
	if err := r.src.Export(0).Fetch(make([]byte, 4096), 0); err == nil {
		t.Error("fetched without a peer")
	}
	r.join()
	e := r.src.Export(0)
	if err := e.WriteAt(context.Background(), fill(8, 4096), 4096, false); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 4096)
	for n := range fetchOften {
		if err := e.Fetch(p, 4096); err != nil || p[9] != 8 {
			t.Fatalf("fetch %d: %v, %d", n, err, p[9])
		}
		if len(r.src.Carried()) > 0 {
			t.Fatalf("given up after %d", n)
		}
	}
	if err := e.Fetch(p, 4096); err != nil {
		t.Fatal(err)
	}
	o.wait(t, "lost 0: block at 4096 is damaged again and again: input/output error")
}

// TestRefill fills a new replica while the guest writes, and goes back to it. Then
// the new one fails too: nothing may be answered by the peer alone before the
// owner has said so anew.
func TestRefill(t *testing.T) {
	const size = 4<<20 + 8192
	r := newRig(t, size)
	o := r.own()
	r.join()
	e, ctx := r.src.Export(0), context.Background()
	if err := put(ctx, e, fill(1, 1<<20), 100<<10, false); err != nil {
		t.Fatal(err)
	}
	fresh := newMem(size)
	if err := r.src.Refill(ctx, 0, fresh, func(int64) {}, func() error { return nil }); !errors.Is(err, ErrNotCarried) {
		t.Fatalf("refilled what is whole: %v", err)
	}
	r.mine.failing(syscall.EIO, syscall.EIO)
	r.src.Carry(true)
	if err := put(ctx, e, fill(2, 4096), 0, false); err != nil {
		t.Fatal(err)
	}
	o.wait(t, "lost 0: input/output error")
	if err := r.src.Refill(ctx, 0, newMem(512), func(int64) {}, nil); err == nil {
		t.Error("refilled with a replica of another size")
	}

	stop := make(chan struct{})
	var wg sync.WaitGroup
	for c := range 4 {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(c), 2))
			for n := 0; ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				p, off := fill(byte(n), 4096*(1+rnd.IntN(4))), rnd.Int64N(size/4096-4)*4096
				var err error
				switch rnd.IntN(6) {
				case 0:
					err = e.Flush(ctx)
				case 1:
					err = e.Zero(ctx, off, int64(len(p)), false, true)
				case 2:
					err = e.ReadAt(ctx, p, off)
				default:
					err = put(ctx, e, p, off, rnd.IntN(8) == 0)
				}
				if err != nil {
					t.Errorf("while refilling: %v", err)
				}
			}
		})
	}
	var copied atomic.Int64
	told := false
	err := r.src.Refill(ctx, 0, fresh, func(n int64) { copied.Store(max(n, copied.Load())) }, func() error {
		told = true
		if !bytes.Equal(fresh.bytes(true), r.theirs.bytes(false)) {
			t.Error("called whole while the copy is not, or not durably")
		}
		return nil
	})
	if err != nil || !told || copied.Load() != size {
		t.Fatalf("refill: %v, told %v, %d bytes", err, told, copied.Load())
	}
	o.wait(t, "back")
	time.Sleep(5 * time.Millisecond)
	close(stop)
	wg.Wait()
	if !bytes.Equal(fresh.bytes(false), r.theirs.bytes(false)) {
		t.Error("the replicas differ although all is quiet")
	}
	p := make([]byte, 4096)
	r.theirs.failing(nil, syscall.EIO) // who reads there is found out
	if err := e.ReadAt(ctx, p, 0); err != nil {
		t.Errorf("reads are not local again: %v", err)
	}
	fresh.failing(syscall.EIO, nil)
	answers := make(chan error, 1)
	go func() { answers <- put(ctx, e, fill(9, 4096), 0, false) }()
	o.wait(t, "lost 0: input/output error")
	waits(t, answers, "the record may say that this side has it")
	r.src.Carry(true)
	if err := inTime(t, answers); err != nil {
		t.Error(err)
	}
}

// TestRefillFails: the new replica fails as well, or the peer cannot be read, or
// it cannot be called good; the guest notices nothing.
func TestRefillFails(t *testing.T) {
	const size = 1 << 20
	for name, spoil := range map[string]func(r *rig, fresh *mem) func() error{
		"writes": func(_ *rig, fresh *mem) func() error { fresh.failing(syscall.EIO, nil); return nil },
		"peer":   func(r *rig, _ *mem) func() error { r.theirs.failing(nil, syscall.EIO); return nil },
		"whole":  func(*rig, *mem) func() error { return func() error { return syscall.EIO } },
		"late": func(r *rig, fresh *mem) func() error {
			return func() error { // a write on its way while the whole is declared
				fresh.failing(syscall.EIO, nil)
				return fresh.Flush(context.Background())
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, size)
			r.own()
			r.join()
			e, ctx := r.src.Export(0), context.Background()
			r.src.Carry(true)
			r.mine.failing(syscall.EIO, syscall.EIO)
			if err := put(ctx, e, fill(1, size), 0, false); err != nil {
				t.Fatal(err)
			}
			fresh := newMem(size)
			whole := spoil(r, fresh)
			if whole == nil {
				whole = func() error { return nil }
			}
			if err := r.src.Refill(ctx, 0, fresh, func(int64) {}, whole); !errors.Is(err, syscall.EIO) {
				t.Errorf("refill: %v", err)
			}
			r.theirs.failing(nil, nil)
			if err := put(ctx, e, fill(2, 4096), 0, true); err != nil {
				t.Errorf("write afterwards: %v", err)
			}
			if err := r.src.Refill(ctx, 0, newMem(size), func(int64) {}, func() error { return nil }); err != nil {
				t.Errorf("the second try: %v", err)
			}
		})
	}
}

// TestMalformedData: an answer to a read that is none ends the session, and never panics.
func TestMalformedData(t *testing.T) {
	r := newRig(t, 64<<10)
	r.join()
	l := r.src.link.Load()
	ask := func() (uint64, *pending) {
		p := &pending{since: time.Now(), buf: make([]byte, 512), done: make(chan struct{})}
		l.mu.Lock()
		p.id = l.next.Add(1)
		l.waiting[p.id] = p
		l.mu.Unlock()
		return p.id, p
	}
	write := &pending{done: make(chan struct{})}
	l.mu.Lock()
	l.waiting[l.next.Add(1)] = write
	l.mu.Unlock()
	if err := r.src.Data(readHead{ID: l.next.Load()}.encode()); err == nil {
		t.Error("data for a write: taken")
	}
	for name, f := range map[string]func() []byte{
		"empty":     func() []byte { return nil },
		"short":     func() []byte { return make([]byte, readHeadSize-1) },
		"never":     func() []byte { return readHead{ID: 1 << 40}.encode() },
		"too short": func() []byte { id, _ := ask(); return append(readHead{ID: id}.encode(), make([]byte, 511)...) },
		"too long":  func() []byte { id, _ := ask(); return append(readHead{ID: id}.encode(), make([]byte, 513)...) },
		"zeroes":    func() []byte { id, _ := ask(); return append(readHead{ID: id, Status: readZeroes}.encode(), 0) },
		"status":    func() []byte { id, _ := ask(); return readHead{ID: id, Status: 9}.encode() },
	} {
		if err := r.src.Data(f()); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	id, p := ask()
	l.forget(p)
	if err := r.src.Data(append(readHead{ID: id}.encode(), make([]byte, 512)...)); err != nil {
		t.Errorf("an answer that nobody waits for any more: %v", err)
	}
	if err := r.src.Done(binary.LittleEndian.AppendUint64(nil, func() uint64 { id, _ := ask(); return id }())); err == nil {
		t.Error("a bare answer to a read: taken")
	}
}

// TestTwoDisks: each disk is carried by itself, and the owner hears that all is
// well when the last of them is whole.
func TestTwoDisks(t *testing.T) {
	const size = 1 << 20
	r := newRig(t, size)
	more, theirs := newMem(size), newMem(size)
	r.src = NewSource([]Replica{r.mine, more})
	done := func(parts ...[]byte) error { return r.src.Done(bytes.Join(parts, nil)) }
	data := func(parts ...[]byte) error { return r.src.Data(bytes.Join(parts, nil)) }
	dst := NewTarget([]Replica{r.theirs, theirs}, done, data, func(err error) { t.Error(err) })
	o := r.own()
	if err := r.src.Join(func(parts ...[]byte) error { return dst.Take(bytes.Join(parts, nil)) }, func() error { return nil }); err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	write := func(n int, b byte) {
		t.Helper()
		if err := put(ctx, r.src.Export(n), fill(b, 4096), 0, false); err != nil {
			t.Fatal(err)
		}
	}
	r.mine.failing(syscall.EIO, syscall.EIO)
	write(1, 1)
	if n := len(r.src.Carried()); n != 0 {
		t.Fatalf("%d disks are carried", n)
	}
	r.src.Carry(true)
	write(0, 2)
	o.wait(t, "lost 0: input/output error")
	write(1, 3)
	if more.bytes(false)[0] != 3 {
		t.Error("the good disk is not written any more")
	}
	more.failing(syscall.ENOSPC, nil)
	write(1, 4)
	o.wait(t, "lost 1: no space left on device")
	for n := range 2 {
		fresh := newMem(size)
		if err := r.src.Refill(ctx, n, fresh, func(int64) {}, func() error { return nil }); err != nil {
			t.Fatal(err)
		}
		write(n, 7)
		if fresh.bytes(false)[0] != 7 {
			t.Error("the new replica is not written")
		}
		if n == 0 && len(o.news) > 0 {
			t.Errorf("the owner heard %q while the other disk is carried", <-o.news)
		}
	}
	o.wait(t, "back")
}

// TestUnreadableOnBoth: what neither side can read costs no replica.
func TestUnreadableOnBoth(t *testing.T) {
	r := newRig(t, 64<<10)
	o := r.own()
	r.join()
	r.mine.failing(nil, fmt.Errorf("block 0: %w", ErrUnreadable))
	if err := r.src.Export(0).ReadAt(context.Background(), make([]byte, 4096), 0); !errors.Is(err, syscall.EIO) {
		t.Errorf("read: %v", err)
	}
	if len(o.news)+len(r.src.Carried()) > 0 {
		t.Error("the replica was given up")
	}
}
