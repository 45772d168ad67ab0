// Package guestmem keeps a guest's RAM as a file on a FUSE mount that this
// process serves, and lets the kernel's page cache do the dirty tracking: a
// flush hands over exactly the pages that changed since the last one.
//
// Concurrency: the methods of RAM are safe for concurrent use unless their
// comment says otherwise. Flush, Cut, Attach and Restart belong to one caller
// (the checkpoint loop).
//
// Failure: a failed WRITE or flush voids what is being collected (ErrVoid);
// the kernel has already called the pages clean, so everything has to be
// resent after Restart. Loss of the memory itself (a page the kernel asks back,
// a dead connection) is final: Failed is closed and Err says why.
//
// What it does not guarantee: it does not stop the guest (the caller does,
// around Flush and Cut), it does not order memory against devices or disks,
// and it does not keep a copy of the memory: the page cache is the only one.
package guestmem

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// PageSize is the unit of dirty tracking, in bytes.
const PageSize = 4096

// ErrVoid is wrapped by errors of Flush and Cut after a WRITE or a flush failed: pages
// were lost on their way here. Restart, then send everything again (Sweep).
var ErrVoid = errors.New("collected memory is void")

// ErrLost is wrapped by Err when the memory itself is gone or no longer tracked.
var ErrLost = errors.New("guest memory is lost")

// Mode says what happens with pages that the kernel hands over.
type Mode int32

// The modes. A new RAM discards.
const (
	Discard Mode = iota // drop them: nobody holds a copy that has to follow
	Collect             // keep them for the next Cut
)

// Config describes a RAM file. Dir, Size and Helper are required.
type Config struct {
	Dir          string       // mount point, made if absent
	Size         int64        // bytes, a positive multiple of PageSize
	Helper       []string     // argv of the helper process; its main must call HelperMain
	LockFD       *os.File     // inherited by the helper and otherwise not touched; may be nil
	CollectLimit int64        // bytes collected at which Pressure fires; 0 means a quarter of Size
	Log          *slog.Logger // may be nil
}

// Stats are counters since Open.
type Stats struct {
	Writes, WrittenPages uint64        // WRITE requests and the pages in them
	Reads                uint64        // READ requests (page cache misses)
	Flushes              uint64        // completed flushes
	LastFlush            time.Duration // how long the last flush took
	Collected            int64         // bytes waiting for the next Cut
	PoolBytes            int64         // bytes of page buffers held, in use or kept for reuse
	SweptTo              int64         // offset below which the last Sweep is done
}

// storeChunk bounds one push into the page cache: the kernel pins its pages meanwhile.
const storeChunk = 128 << 10

// poolFloor is how many bytes of page buffers a RAM that collects holds at least: enough for
// some epochs of a guest that does little, without mapping memory while it stands still.
const poolFloor = 24 << 20

// RAM is one mounted RAM file.
type RAM struct {
	cfg  Config
	pool *pool
	col  *collector
	dev  *device
	help *flusher
	devn mountID

	flushMu   sync.Mutex
	attached  bool // guarded by flushMu
	flushes   atomic.Uint64
	lastFlush atomic.Int64
	swept     atomic.Int64

	failOnce sync.Once
	failed   chan struct{}
	failErr  error // valid after failed is closed

	closeOnce sync.Once
	closeErr  error
}

func (c *Config) validate() error {
	switch {
	case c.Dir == "":
		return errors.New("configure guest memory: no directory")
	case c.Size <= 0 || c.Size%PageSize != 0 || c.Size/PageSize > math.MaxUint32:
		return fmt.Errorf("configure guest memory: size %d is not a positive multiple of %d", c.Size, PageSize)
	case len(c.Helper) == 0:
		return errors.New("configure guest memory: no helper")
	case c.CollectLimit < 0:
		return errors.New("configure guest memory: collect limit below 0")
	case os.Getpagesize() != PageSize:
		return fmt.Errorf("configure guest memory: pages of this machine have %d bytes, only %d is known", os.Getpagesize(), PageSize)
	}
	return nil
}

// Open starts the helper, mounts the RAM file and begins to serve it. The
// helper is started before the mount exists. On failure nothing is left behind.
func Open(ctx context.Context, cfg Config) (_ *RAM, err error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	if cfg.Dir, err = realDir(cfg.Dir); err != nil {
		return nil, fmt.Errorf("find guest memory directory: %w", err)
	}
	if cfg.CollectLimit == 0 {
		cfg.CollectLimit = max(cfg.Size/4, chunkSize)
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if err := prepareDir(cfg.Dir); err != nil {
		return nil, err
	}
	r := &RAM{cfg: cfg, pool: &pool{floor: poolFloor / chunkSize}, failed: make(chan struct{})}
	var undo []func()
	defer func() {
		if err != nil {
			for _, f := range slices.Backward(undo) {
				f()
			}
		}
	}()
	r.col = newCollector(r.pool, cfg.Size/PageSize, cfg.CollectLimit)
	if r.help, err = startFlusher(cfg); err != nil {
		return nil, err
	}
	undo = append(undo, func() { _ = r.help.close() })
	fd, err := openDevice(cfg.Dir)
	if err != nil {
		return nil, err
	}
	r.dev = &device{fd: fd, size: cfg.Size, col: r.col, pool: r.pool, lost: r.fail,
		owned: make(ownedPages, (cfg.Size/PageSize+63)/64)}
	undo = append(undo, func() { _ = r.disconnect() })
	if r.devn, err = findMount(cfg.Dir); err != nil {
		return nil, err
	}
	if err := r.dev.start(); err != nil {
		return nil, err
	}
	if err := tuneBDI(r.devn); err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("open guest memory: %w", err)
	}
	go r.watchHelper()
	return r, nil
}

// watchHelper ends with the helper, which Close ends at the latest.
func (r *RAM) watchHelper() {
	<-r.help.done
	if !r.dev.closing.Load() {
		r.fail(fmt.Errorf("helper process ended by itself: %w", cmpErr(r.help.err, errHelperGone)))
	}
}

func cmpErr(err, other error) error {
	if err != nil {
		return err
	}
	return other
}

// fail declares the memory lost.
func (r *RAM) fail(err error) {
	r.failOnce.Do(func() {
		r.failErr = fmt.Errorf("%w: %w", ErrLost, err)
		r.cfg.Log.Error("guest memory lost", "dir", r.cfg.Dir, "error", err)
		r.col.fail(err)
		close(r.failed)
	})
}

// Path returns the path of the RAM file, the mem-path of QEMU.
func (r *RAM) Path() string { return filepath.Join(r.cfg.Dir, fileName) }

// Size returns the size of the RAM in bytes.
func (r *RAM) Size() int64 { return r.cfg.Size }

// Attach makes the helper open the file, and drops the dirty zeroes of QEMU's
// preallocation by one flush in mode Discard, which stays set. Call it when
// QEMU has opened and preallocated the file (QMP answers), before anything is
// loaded into it that must be collected.
func (r *RAM) Attach() error {
	r.col.setMode(Discard)
	if err := r.help.attach(r.Path()); err != nil {
		return fmt.Errorf("attach helper to guest memory: %w", err)
	}
	r.flushMu.Lock()
	r.attached = true
	r.flushMu.Unlock()
	return r.Flush()
}

// SetMode sets what happens with pages from now on. A change begins anew: what was
// collected before is dropped, ErrVoid is cleared, and whoever changes to
// Collect must send all memory (Sweep) besides the sets of later Cuts.
func (r *RAM) SetMode(m Mode) {
	if m == Collect {
		r.pool.fill()
	}
	r.col.setMode(m)
}

// Flush makes the kernel hand over every dirty page and returns when all of
// them are here. Called with the guest stopped it makes the set that Cut
// returns complete; called while the guest runs it only shortens the next
// flush. After an error the collected memory is void (ErrVoid) until Restart.
func (r *RAM) Flush() error {
	r.flushMu.Lock()
	defer r.flushMu.Unlock()
	if !r.attached {
		return fmt.Errorf("flush guest memory: %w", errNotAttached)
	}
	start, syn := time.Now(), r.dev.syn.Load()
	err := r.help.flush()
	if err == nil && r.dev.syn.Load() == syn {
		err = errors.New("the kernel sent no FSYNC")
	}
	if err != nil {
		r.col.fail(fmt.Errorf("flush: %w", err))
	}
	if err := r.Err(); err != nil {
		return fmt.Errorf("flush guest memory: %w: %w", ErrVoid, err)
	}
	if err := r.col.voided(); err != nil {
		return fmt.Errorf("flush guest memory: %w", err)
	}
	r.lastFlush.Store(int64(time.Since(start)))
	r.flushes.Add(1)
	return nil
}

// Cut takes everything collected since the last Cut. Call it only after a
// successful Flush and while the guest is still stopped. It fails with ErrVoid
// if pages were lost. The caller owns the set and must Release it.
func (r *RAM) Cut() (*PageSet, error) {
	if err := r.Err(); err != nil {
		return nil, fmt.Errorf("cut guest memory: %w: %w", ErrVoid, err)
	}
	return r.col.cut()
}

// Restart drops what was collected and clears ErrVoid. The caller must send
// all memory again.
func (r *RAM) Restart() { r.col.restart() }

// Store pushes pages into the page cache of the file, where the waiting QEMU
// sees them at once. They stay clean: they do not come back as collected
// pages. off and len(data) must be multiples of PageSize.
func (r *RAM) Store(off int64, data []byte) error {
	if off < 0 || off%PageSize != 0 || len(data)%PageSize != 0 || off > r.cfg.Size || int64(len(data)) > r.cfg.Size-off {
		return fmt.Errorf("store guest memory: %d bytes at %d are not whole pages of it", len(data), off)
	}
	for len(data) > 0 {
		n := min(len(data), storeChunk)
		// Before the store: from then on the page cache has the only copy.
		r.dev.owned.setRun(uint32(off/PageSize), uint32(n/PageSize))
		if errno := r.dev.store(off, data[:n]); errno != 0 {
			return fmt.Errorf("store guest memory at %#x: %w", off, errno)
		}
		off, data = off+int64(n), data[n:]
	}
	return nil
}

// Sweep calls fn for all non-zero memory from offset from on, in ascending
// order, in runs of whole pages (at most 1 MiB). data is valid until fn
// returns. The guest may run: set mode Collect before, and what changes behind
// the sweep is in a later Cut. After an error of fn the sweep ends with it.
// Only one Sweep runs at a time; fn must not call Close. Stats tells how far it is.
func (r *RAM) Sweep(ctx context.Context, from int64, fn func(off int64, data []byte) error) error {
	if from < 0 || from%PageSize != 0 || from > r.cfg.Size {
		return fmt.Errorf("sweep guest memory: offset %d is not a page of it", from)
	}
	r.swept.Store(from)
	if err := r.help.sweep(ctx, from, r.cfg.Size, &r.swept, fn); err != nil {
		return fmt.Errorf("sweep guest memory: %w", err)
	}
	return nil
}

// Hash returns the XXH3 64-bit hash of each page (by page number) as the guest sees it now.
func (r *RAM) Hash(pages []int64) ([]uint64, error) {
	list := make([]uint64, len(pages))
	for i, p := range pages {
		if p < 0 || p >= r.cfg.Size/PageSize {
			return nil, fmt.Errorf("hash guest memory: no page %d", p)
		}
		list[i] = uint64(p)
	}
	if err := r.help.hash(list); err != nil {
		return nil, fmt.Errorf("hash guest memory: %w", err)
	}
	return list, nil
}

// Failed is closed when the memory is lost or no longer tracked; Err says why.
func (r *RAM) Failed() <-chan struct{} { return r.failed }

// Err returns nil, or why Failed is closed (wraps ErrLost).
func (r *RAM) Err() error {
	select {
	case <-r.failed:
		return r.failErr
	default:
		return nil
	}
}

// Collected returns the bytes that wait for the next Cut.
func (r *RAM) Collected() int64 { return r.col.bytes.Load() }

// Pressure delivers a value when Collected reached Config.CollectLimit: the epoch
// should be cut early. At most one value is pending; Cut takes it back.
func (r *RAM) Pressure() <-chan struct{} { return r.col.pressure }

// Stats returns counters.
func (r *RAM) Stats() Stats {
	return Stats{
		Writes: r.dev.writes.Load(), WrittenPages: r.dev.writtenPages.Load(), Reads: r.dev.reads.Load(),
		Flushes: r.flushes.Load(), LastFlush: time.Duration(r.lastFlush.Load()),
		Collected: r.col.bytes.Load(), PoolBytes: r.pool.bytes(), SweptTo: r.swept.Load(),
	}
}

// Close ends the connection, unmounts, and reaps the helper. It never waits
// for QEMU, which may still have the file mapped. It is idempotent. Sets that were cut stay valid
// until their Release.
func (r *RAM) Close() error {
	r.closeOnce.Do(func() {
		derr := r.disconnect()
		r.closeErr = errors.Join(derr, r.help.close())
		r.col.restart()
		r.pool.close()
	})
	return r.closeErr
}

// disconnect aborts the connection, so that nobody waits for this process any more, unmounts, and waits for the readers.
func (r *RAM) disconnect() error {
	r.dev.closing.Store(true)
	abortErr := abortConnection(r.devn)
	// With MNT_FORCE the kernel aborts the connection too, in case the first way was closed.
	err := unix.Unmount(r.cfg.Dir, unix.MNT_FORCE|unix.MNT_DETACH)
	if err != nil {
		err = errors.Join(fmt.Errorf("unmount %s: %w", r.cfg.Dir, err), abortErr)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		r.dev.wg.Wait()
		unix.Close(r.dev.fd)
	}()
	select {
	case <-done:
	case <-time.After(closeGrace):
		err = errors.Join(err, errors.New("end FUSE readers: they still wait"))
	}
	return err
}

// closeGrace is how long readers may take to notice that the connection is gone.
const closeGrace = 3 * time.Second
