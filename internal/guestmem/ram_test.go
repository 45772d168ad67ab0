package guestmem

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"perdure/internal/testenv"
)

const testSize = 32 << 20

// apply copies a set into a model of the memory.
func apply(model []byte, ps *PageSet) {
	for off, data := range ps.Extents() {
		copy(model[off:], data)
	}
}

func mustCut(t testing.TB, r *RAM) *PageSet {
	t.Helper()
	if err := r.Flush(); err != nil {
		t.Fatal(err)
	}
	ps, err := r.Cut()
	if err != nil {
		t.Fatal(err)
	}
	return ps
}

// same fails the test at the first page that differs.
func same(t testing.TB, what string, got, want []byte) {
	t.Helper()
	if bytes.Equal(got, want) {
		return
	}
	for o := 0; o < len(want); o += PageSize {
		if !bytes.Equal(got[o:o+PageSize], want[o:o+PageSize]) {
			t.Fatalf("%s: memory differs at page %#x", what, o/PageSize)
		}
	}
}

func TestEpochsEqualMemory(t *testing.T) {
	r := openRAM(t, testSize)
	g := startGuest(t, r.Path(), testSize)
	if err := r.Attach(); err != nil {
		t.Fatal(err)
	}
	r.SetMode(Collect)
	model, pages := make([]byte, testSize), 0
	for epoch := range 40 {
		g.do("run 3 %d", epoch)
		if epoch%3 == 0 { // a flush while it runs must not disturb
			if err := r.Flush(); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(5 * time.Millisecond) // let the guest write; any length will do
		g.do("halt")
		ps := mustCut(t, r)
		pages += ps.Pages()
		apply(model, ps)
		ps.Release()
		if epoch%8 == 7 {
			same(t, "epoch", model, g.memory())
		}
	}
	if pages < 1000 {
		t.Errorf("%d pages in all epochs: the guest hardly ran", pages)
	}
	nums := []int64{0, 1, 77, testSize/PageSize - 1}
	h, err := r.Hash(nums)
	if err != nil {
		t.Fatal(err)
	}
	for i, n := range nums {
		if h[i] != pageHash(model[n*PageSize:(n+1)*PageSize]) {
			t.Errorf("hash of page %d differs", n)
		}
	}
	if err := r.Err(); err != nil {
		t.Error(err)
	}
}

// TestSweepAndEpochs copies the memory while the guest runs, then epochs, into a second RAM, as a pair does.
func TestSweepAndEpochs(t *testing.T) {
	a, b := openRAM(t, testSize), openRAM(t, testSize)
	ga, gb := startGuest(t, a.Path(), testSize), startGuest(t, b.Path(), testSize)
	ga.do("run 2 1")
	ga.do("halt")
	for _, r := range []*RAM{a, b} {
		if err := r.Attach(); err != nil {
			t.Fatal(err)
		}
		r.SetMode(Collect)
	}
	enc := NewEncoder(EncoderConfig{})
	send := func(f []byte) error { return DecodePages(f, testSize, b.Store) }
	ga.do("run 2 2")
	err := a.Sweep(context.Background(), 0, func(off int64, data []byte) error {
		_, err := enc.EncodeRun(off, data, send)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for range 5 {
		ga.do("halt")
		ps := mustCut(t, a)
		if _, err := enc.Encode(ps, send); err != nil {
			t.Fatal(err)
		}
		ps.Release()
		same(t, "standby", gb.memory(), ga.memory())
		ga.do("run 2 3")
	}
	ga.do("halt")
	if ps := mustCut(t, b); ps.Pages() != 0 {
		t.Errorf("%d stored pages came back as written", ps.Pages())
	}
	gb.do("dirty 10 7 1")
	ps := mustCut(t, b)
	if ps.Pages() != 10 {
		t.Errorf("%d pages tracked on stored memory, want 10", ps.Pages())
	}
	ps.Release()
	if s := a.Stats(); s.SweptTo != testSize || s.Collected != 0 {
		t.Errorf("stats %+v", s)
	}
}

func TestSweepEndsWithItsFunction(t *testing.T) {
	r := openRAM(t, testSize)
	g := startGuest(t, r.Path(), testSize)
	if err := r.Attach(); err != nil {
		t.Fatal(err)
	}
	g.do("rewrite 4000 2 1")
	stop, n := errors.New("stop"), 0
	err := r.Sweep(context.Background(), 0, func(int64, []byte) error { n++; return stop })
	if !errors.Is(err, stop) || n != 1 {
		t.Fatal(err, n)
	}
	ctx, cancel := context.WithCancel(context.Background())
	err = r.Sweep(ctx, 0, func(int64, []byte) error { cancel(); return nil })
	if !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	var pages int
	last := int64(-1)
	err = r.Sweep(context.Background(), 2<<20, func(off int64, data []byte) error {
		if off <= last {
			t.Errorf("offset %d after %d", off, last)
		}
		last = off
		pages += len(data) / PageSize
		return nil
	})
	if want := (testSize - 2<<20) / PageSize / 2; err != nil || pages != want-96 && pages != want {
		t.Fatal(err, pages, want)
	}
}

func TestFailedWriteVoids(t *testing.T) {
	r := openRAM(t, testSize)
	g := startGuest(t, r.Path(), testSize)
	if err := r.Attach(); err != nil {
		t.Fatal(err)
	}
	r.SetMode(Collect)
	g.do("dirty 50 2 1")
	var n atomic.Int32
	bad := func(int64, int) unix.Errno {
		if n.Add(1) == 20 {
			return unix.EIO
		}
		return 0
	}
	r.dev.hook.Store(&bad)
	if err := r.Flush(); !errors.Is(err, ErrVoid) {
		t.Fatalf("flush after a failed WRITE: %v", err)
	}
	r.dev.hook.Store(nil)
	if _, err := r.Cut(); !errors.Is(err, ErrVoid) {
		t.Fatalf("cut of a void epoch: %v", err)
	}
	g.do("dirty 5 2 2")
	if err := r.Flush(); !errors.Is(err, ErrVoid) {
		t.Fatalf("the next flush forgot: %v", err)
	}
	r.Restart()
	// Everything again: the sweep plus the next cut are the whole memory.
	model := make([]byte, testSize)
	if err := r.Sweep(context.Background(), 0, func(off int64, d []byte) error { copy(model[off:], d); return nil }); err != nil {
		t.Fatal(err)
	}
	g.do("dirty 9 3 3")
	ps := mustCut(t, r)
	apply(model, ps)
	ps.Release()
	same(t, "after restart", model, g.memory())
	if r.Err() != nil {
		t.Error("a void epoch is not a lost memory:", r.Err())
	}
}

func TestPagesRewrittenBetweenCuts(t *testing.T) {
	r := openRAM(t, testSize)
	g := startGuest(t, r.Path(), testSize)
	if err := r.Attach(); err != nil {
		t.Fatal(err)
	}
	r.SetMode(Collect)
	g.do("rewrite 3000 1 1")
	mustFlush(t, r)
	before := r.Stats().PoolBytes
	for i := range 10 {
		g.do("rewrite 3000 1 %d", i+2)
		mustFlush(t, r)
	}
	if after := r.Stats().PoolBytes; after > before+2*chunkSize {
		t.Errorf("buffers grew from %d to %d bytes by rewriting the same pages", before, after)
	}
	if c := r.Collected(); c != 3000*PageSize {
		t.Errorf("collected %d bytes", c)
	}
	ps := mustCut(t, r)
	model := make([]byte, testSize)
	apply(model, ps)
	if ps.Pages() != 3000 {
		t.Errorf("%d pages", ps.Pages())
	}
	ps.Release()
	ps.Release()
	same(t, "last content", model, g.memory())
}

// TestNothingOutlivesDiscard: a page that was collected, and changed again while pages were discarded, must
// not come back with its old content after a new full copy.
func TestNothingOutlivesDiscard(t *testing.T) {
	r := openRAM(t, testSize)
	g := startGuest(t, r.Path(), testSize)
	if err := r.Attach(); err != nil {
		t.Fatal(err)
	}
	r.SetMode(Collect)
	g.do("rewrite 100 1 1")
	mustFlush(t, r)
	r.SetMode(Discard)
	g.do("rewrite 100 1 2")
	mustFlush(t, r)
	r.SetMode(Collect)
	if n := r.Collected(); n != 0 {
		t.Errorf("%d bytes are left of the time before", n)
	}
	model := make([]byte, testSize)
	if err := r.Sweep(t.Context(), 0, func(off int64, d []byte) error { copy(model[off:], d); return nil }); err != nil {
		t.Fatal(err)
	}
	ps := mustCut(t, r)
	apply(model, ps)
	ps.Release()
	same(t, "after a new full copy", model, g.memory())
}

func mustFlush(t testing.TB, r *RAM) {
	t.Helper()
	if err := r.Flush(); err != nil {
		t.Fatal(err)
	}
}

func TestPressureFires(t *testing.T) {
	r := openRAM(t, testSize, func(c *Config) { c.CollectLimit = 1 << 20 })
	g := startGuest(t, r.Path(), testSize)
	if err := r.Attach(); err != nil {
		t.Fatal(err)
	}
	r.SetMode(Collect)
	g.do("dirty 200 1 1")
	mustFlush(t, r)
	select {
	case <-r.Pressure():
		t.Fatal("pressure below the limit")
	default:
	}
	g.do("dirty 400 1 1")
	mustFlush(t, r)
	select {
	case <-r.Pressure():
	default:
		t.Fatal("no pressure at the limit")
	}
}

// TestDroppedPageIsLoss drops the page cache under memory that nobody locked.
func TestDroppedPageIsLoss(t *testing.T) {
	r := openRAM(t, testSize)
	if err := r.Attach(); err != nil {
		t.Fatal(err)
	}
	r.SetMode(Collect)
	page := bytes.Repeat([]byte{5}, PageSize)
	if err := r.Store(3*PageSize, page); err != nil {
		t.Fatal(err)
	}
	dropCache(t, r.Path())
	if _, err := r.Hash([]int64{3}); err == nil {
		t.Skip("the kernel kept the page")
	}
	select {
	case <-r.Failed():
	case <-time.After(5 * time.Second):
		t.Fatal("the loss was not reported")
	}
	if !errors.Is(r.Err(), ErrLost) {
		t.Error(r.Err())
	}
	if _, err := r.Cut(); !errors.Is(err, ErrVoid) {
		t.Error("cut of lost memory:", err)
	}
}

// TestHelperKeepsLock passes a locked file to the helper: as long as it lives, the lock is held.
func TestHelperKeepsLock(t *testing.T) {
	file := t.TempDir() + "/run.lock"
	lock := func() (*os.File, error) {
		f, err := os.OpenFile(file, os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		return f, unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	}
	f, err := lock()
	if err != nil {
		t.Fatal(err)
	}
	r := openRAM(t, testSize, func(c *Config) { c.LockFD = f })
	f.Close()
	g, err := lock()
	g.Close()
	if !errors.Is(err, unix.EWOULDBLOCK) {
		t.Error("lock is free while the helper lives:", err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	g, err = lock()
	g.Close()
	if err != nil {
		t.Error("lock is held after close:", err)
	}
}

func TestHelperDeathIsLoss(t *testing.T) {
	r := openRAM(t, testSize)
	if err := r.Attach(); err != nil {
		t.Fatal(err)
	}
	_ = r.help.cmd.Process.Kill()
	select {
	case <-r.Failed():
	case <-time.After(5 * time.Second):
		t.Fatal("not noticed")
	}
	if err := r.Flush(); !errors.Is(err, ErrVoid) {
		t.Error(err)
	}
}

func TestOpenRefuses(t *testing.T) {
	testenv.Root(t)
	dir := t.TempDir()
	for _, c := range []Config{
		{Dir: dir, Size: 4095, Helper: []string{"x"}},
		{Dir: dir, Size: 0, Helper: []string{"x"}},
		{Dir: dir, Size: 4096},
		{Size: 4096, Helper: []string{"x"}},
		{Dir: dir, Size: 4096, Helper: []string{"/nonexistent"}},
		{Dir: dir, Size: 4096, Helper: []string{"x"}, CollectLimit: -1},
	} {
		if r, err := Open(context.Background(), c); err == nil {
			r.Close()
			t.Errorf("opened %+v", c)
		}
	}
	r := openRAM(t, testSize)
	if _, err := Open(context.Background(), r.cfg); err == nil {
		t.Error("mounted over a live mount")
	}
	if err := r.Flush(); !errors.Is(err, errNotAttached) {
		t.Error("flush before attach:", err)
	}
}

func TestOpenThroughSymlink(t *testing.T) {
	link := t.TempDir() + "/with space"
	if err := os.Symlink(t.TempDir(), link); err != nil {
		t.Fatal(err)
	}
	openRAM(t, testSize, func(c *Config) { c.Dir = link + "/me m" })
}

func TestCloseWithGuestMapped(t *testing.T) {
	r := openRAM(t, testSize)
	g := startGuest(t, r.Path(), testSize)
	if err := r.Attach(); err != nil {
		t.Fatal(err)
	}
	g.do("dirty 1000 1 1")
	start := time.Now()
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if d := time.Since(start); d > helperGrace {
		t.Errorf("close took %v", d)
	}
	if _, err := findMount(r.cfg.Dir); !errors.Is(err, os.ErrNotExist) {
		t.Error("still mounted:", err)
	}
	g.do("dirty 1000 1 2") // the memory is still there
}

func TestProbe(t *testing.T) {
	testenv.Root(t)
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	start := time.Now()
	if err := Probe(context.Background(), dir, []string{"/usr/bin/env", roleEnv + "=helper", exe}); err != nil {
		t.Fatal(err)
	}
	t.Logf("took %v", time.Since(start))
	if left, _ := filepath.Glob(dir + "/*"); len(left) != 0 {
		t.Error("left behind:", left)
	}
}
