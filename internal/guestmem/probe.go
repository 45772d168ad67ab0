package guestmem

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

const (
	probeSize  = 8 << 20
	probeDelay = 30 * time.Millisecond
	probeLimit = 20 * time.Second
)

// Probe mounts a small RAM under dir and checks that this kernel tracks dirty
// pages as the package needs it: a flush waits for the replies to its WRITEs, FSYNC comes after
// them, a store of one byte sends exactly its page, the page can be dirtied again and is
// sent again, and pages pushed into the page cache do not come back. It takes
// well under a second and leaves nothing behind. The error says in words what the kernel does wrong.
func Probe(ctx context.Context, dir string, helper []string) (err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("probe guest memory: %w", err)
	}
	tmp, err := os.MkdirTemp(dir, "probe-")
	if err != nil {
		return fmt.Errorf("probe guest memory: %w", err)
	}
	defer os.RemoveAll(tmp)
	r, err := Open(ctx, Config{Dir: filepath.Join(tmp, "mem"), Size: probeSize, Helper: helper})
	if err != nil {
		return fmt.Errorf("probe guest memory: %w", err)
	}
	defer func() {
		if cerr := r.Close(); err == nil && cerr != nil {
			err = fmt.Errorf("probe guest memory: %w", cerr)
		}
	}()
	done := make(chan error, 1)
	go func() { done <- (&prober{r: r}).run() }()
	select {
	case err = <-done:
	case <-ctx.Done():
		err = ctx.Err()
	case <-time.After(probeLimit):
		err = errors.New("the kernel does not answer")
	}
	if err != nil {
		return fmt.Errorf("probe guest memory: %w", err)
	}
	return nil
}

type prober struct{ r *RAM }

// poke is a store of one byte by a pretended guest.
func (p *prober) poke(off int64, v byte) error {
	if err := p.r.help.pokeByte(off, v); err != nil {
		return fmt.Errorf("store a byte at %#x: %w", off, err)
	}
	return nil
}

// expect flushes and compares what arrives with the pages wanted, each with value v at its first byte.
func (p *prober) expect(what string, v byte, want ...int64) error {
	if err := p.r.Flush(); err != nil {
		return err
	}
	ps, err := p.r.Cut()
	if err != nil {
		return err
	}
	defer ps.Release()
	if got := ps.PageNumbers(); !slices.Equal(got, want) {
		return fmt.Errorf("%s: the kernel sent pages %v, not %v", what, got, want)
	}
	for off, data := range ps.Extents() {
		if data[0] != v {
			return fmt.Errorf("%s: page %d arrived with other content than was stored", what, off/PageSize)
		}
	}
	return nil
}

func (p *prober) run() error {
	r := p.r
	if err := r.Attach(); err != nil {
		return err
	}
	for off := int64(0); off < probeSize; off += PageSize { // as preallocation does
		if err := p.poke(off, 0); err != nil {
			return err
		}
	}
	if err := r.Flush(); err != nil {
		return err
	}
	r.SetMode(Collect)
	if err := p.expect("after a flush with nothing stored", 0); err != nil {
		return err
	}
	var answered atomic.Int64
	slow := func(int64, int) unix.Errno {
		time.Sleep(probeDelay) // the answer is late on purpose; nothing is waited for
		answered.Add(1)
		return 0
	}
	const first, second = 700, 1200
	for v := byte(1); v <= 2; v++ { // the second time: the page must be tracked again
		if err := errors.Join(p.poke(first*PageSize, v), p.poke(second*PageSize, v)); err != nil {
			return err
		}
		r.dev.hook.Store(&slow)
		start := time.Now()
		err := p.expect("after a store to two pages", v, first, second)
		r.dev.hook.Store(nil)
		if err != nil {
			return err
		}
		if took := time.Since(start); took < probeDelay || answered.Load() != 2*int64(v) || r.dev.late.Load() != 0 {
			return fmt.Errorf("the flush did not wait for the answers to its WRITEs (took %v)", took)
		}
	}
	if err := p.expect("after a flush with nothing stored since", 0); err != nil {
		return err
	}
	return p.stored()
}

// stored checks the way into the page cache.
func (p *prober) stored() error {
	page := make([]byte, PageSize)
	page[0] = 9
	const n = 900
	if err := p.r.Store(n*PageSize, page); err != nil {
		return err
	}
	h, err := p.r.Hash([]int64{n})
	if err != nil {
		return err
	}
	if h[0] != pageHash(page) {
		return errors.New("a page pushed into the page cache does not show there")
	}
	if err := p.expect("after pushing a page into the page cache", 0); err != nil {
		return err
	}
	if err := p.poke(n*PageSize, 10); err != nil {
		return err
	}
	return p.expect("after a store to a page that was pushed", 10, n)
}
