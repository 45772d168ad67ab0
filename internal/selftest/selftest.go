// Package selftest proves on the machine it runs on what Level 3 rests on: that
// this kernel, this QEMU and this accelerator together hand over every page
// that a guest dirties. It boots a small guest that writes known patterns,
// checkpoints it many times, and compares the collected copy with the guest's
// memory byte for byte.
//
// Prove runs in the calling goroutine, starts one QEMU of its own and leaves
// nothing behind. It proves what it saw, under the load of that moment.
package selftest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"perdure/internal/guestmem"
	"perdure/internal/qemu"
)

// Options of Prove.
type Options struct {
	QEMU   string
	Accel  string   // "kvm" or "tcg"
	Type   string   // versioned machine type
	Helper []string // argv of the memory helper
	Memory int64    // bytes; 0: 64 MiB
	Rounds int      // checkpoints; 0: 40
	TSCHz  int64
	Log    *slog.Logger
}

// Result of a proof.
type Result struct {
	Rounds  int
	Pages   int // dirty pages collected in all rounds
	Compare int // bytes compared after each of the compared rounds
	Pause   time.Duration
}

// The memory below 1 MiB from here on shows device memory and firmware, not RAM.
const (
	holeStart = 0xa0000
	holeEnd   = 0x100000
)

// Prove runs the proof, with its files below dir.
func Prove(ctx context.Context, dir string, o Options) (r Result, err error) {
	if o.Memory == 0 {
		o.Memory = 64 << 20
	}
	if o.Rounds == 0 {
		o.Rounds = 40
	}
	dir, err = os.MkdirTemp(dir, "selftest-*")
	if err != nil {
		return r, fmt.Errorf("make directory: %w", err)
	}
	defer os.RemoveAll(dir)
	ram, err := guestmem.Open(ctx, guestmem.Config{Dir: filepath.Join(dir, "mem"), Size: o.Memory, Helper: o.Helper, Log: o.Log, CollectLimit: o.Memory})
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, ram.Close()) }()
	proc, q, err := startGuest(ctx, dir, ram.Path(), o)
	if err != nil {
		return r, err
	}
	defer func() {
		q.Close()
		err = errors.Join(err, proc.Kill())
		_, werr := proc.Wait(context.WithoutCancel(ctx))
		err = errors.Join(err, werr)
	}()
	if err := ram.Attach(); err != nil {
		return r, err
	}
	return prove(ctx, dir, ram, q, o)
}

func startGuest(ctx context.Context, dir, mem string, o Options) (*qemu.Process, *qemu.QMP, error) {
	kernel := filepath.Join(dir, "guest")
	if err := os.WriteFile(kernel, patternGuest(o.Memory), 0o600); err != nil {
		return nil, nil, fmt.Errorf("write guest: %w", err)
	}
	args, err := qemu.Args(qemu.Machine{Name: "selftest", UUID: "00000000-0000-4000-8000-000000000000", Type: o.Type, Accel: o.Accel, VCPUs: 1,
		Memory: o.Memory, FT: true, TSCHz: o.TSCHz, MemPath: mem, QMPPath: filepath.Join(dir, "qmp"), Kernel: kernel})
	if err != nil {
		return nil, nil, err
	}
	proc, err := qemu.Start(ctx, o.QEMU, args, qemu.StartOptions{LogPath: filepath.Join(dir, "log"), Dir: dir, Temporary: true})
	if err != nil {
		return nil, nil, err
	}
	q, err := qemu.DialQMP(ctx, filepath.Join(dir, "qmp"), proc.LogTail)
	if err != nil {
		return nil, nil, errors.Join(err, proc.Kill())
	}
	return proc, q, nil
}

func prove(ctx context.Context, dir string, ram *guestmem.RAM, q *qemu.QMP, o Options) (r Result, err error) {
	shadow := make([]byte, o.Memory)
	ram.SetMode(guestmem.Collect)
	if err := q.Cont(ctx); err != nil {
		return r, err
	}
	var pauses time.Duration
	for n := range o.Rounds {
		// The first copy is taken while the guest runs, as the product does it.
		if n == 0 {
			err := ram.Sweep(ctx, 0, func(off int64, data []byte) error { copy(shadow[off:], data); return nil })
			if err != nil {
				return r, err
			}
		}
		start := time.Now()
		if _, err := q.Stop(ctx); err != nil {
			return r, err
		}
		if err := ram.Flush(); err != nil {
			return r, err
		}
		ps, err := ram.Cut()
		if err != nil {
			return r, err
		}
		pauses += time.Since(start)
		for off, data := range ps.Extents() {
			copy(shadow[off:], data)
		}
		r.Pages += ps.Pages()
		ps.Release()
		r.Rounds++
		if n%8 == 0 || n == o.Rounds-1 {
			if err := compare(ctx, dir, q, shadow); err != nil {
				return r, fmt.Errorf("checkpoint %d: %w", n+1, err)
			}
			r.Compare = len(shadow)
		}
		if err := q.Cont(ctx); err != nil {
			return r, err
		}
		// The guest needs some time to dirty something; how much does not matter.
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			return r, ctx.Err()
		}
	}
	r.Pause = pauses / time.Duration(r.Rounds)
	if r.Pages < 50*r.Rounds {
		return r, fmt.Errorf("the guest dirtied only %d pages in %d checkpoints: it did not run as it should", r.Pages, r.Rounds)
	}
	return r, nil
}

// compare holds the copy against what QEMU itself says the guest's memory is.
func compare(ctx context.Context, dir string, q *qemu.QMP, shadow []byte) error {
	for _, part := range [][2]int64{{0, holeStart}, {holeEnd, int64(len(shadow))}} {
		path := filepath.Join(dir, "dump")
		if err := q.PMemSave(ctx, part[0], part[1]-part[0], path); err != nil {
			return fmt.Errorf("dump guest memory: %w", err)
		}
		got, err := os.ReadFile(path)
		os.Remove(path)
		if err != nil {
			return fmt.Errorf("read guest memory: %w", err)
		}
		want := shadow[part[0]:part[1]]
		if bytes.Equal(got, want) {
			continue
		}
		bad, first := 0, int64(-1)
		for off := 0; off < len(got); off += guestmem.PageSize {
			if !bytes.Equal(got[off:off+guestmem.PageSize], want[off:off+guestmem.PageSize]) {
				if bad++; first < 0 {
					first = part[0] + int64(off)
				}
			}
		}
		return fmt.Errorf("%d pages differ from the guest's memory, the first at %#x: dirty pages were missed", bad, first)
	}
	return nil
}
