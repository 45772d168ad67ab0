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
	"iter"
	"log/slog"
	"os"
	"time"
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
}

// Open starts the helper, mounts the RAM file and begins to serve it. The
// helper is started before the mount exists. On failure nothing is left behind.
func Open(ctx context.Context, cfg Config) (*RAM, error) { return nil, errors.ErrUnsupported }

// RAM is one mounted RAM file.
type RAM struct{ cfg Config }

// Path returns the path of the RAM file, the mem-path of QEMU.
func (r *RAM) Path() string { return r.cfg.Dir + "/ram" }

// Size returns the size of the RAM in bytes.
func (r *RAM) Size() int64 { return r.cfg.Size }

// Attach makes the helper open the file, and drops the dirty zeroes of QEMU's
// preallocation by one flush in mode Discard, which stays set. Call it when
// QEMU has opened and preallocated the file (QMP answers), before anything is
// loaded into it that must be collected.
func (r *RAM) Attach() error { return errors.ErrUnsupported }

// SetMode sets what happens with pages from now on. What was collected before stays.
func (r *RAM) SetMode(m Mode) {}

// Flush makes the kernel hand over every dirty page and returns when all of
// them are here. Called with the guest stopped it makes the set that Cut
// returns complete; called while the guest runs it only shortens the next
// flush. After an error the collected memory is void (ErrVoid) until Restart.
func (r *RAM) Flush() error { return errors.ErrUnsupported }

// Cut takes everything collected since the last Cut. Call it only after a
// successful Flush and while the guest is still stopped. It fails with ErrVoid
// if pages were lost. The caller owns the set and must Release it.
func (r *RAM) Cut() (*PageSet, error) { return nil, errors.ErrUnsupported }

// Restart drops what was collected and clears ErrVoid. The caller must send
// all memory again.
func (r *RAM) Restart() {}

// Store pushes pages into the page cache of the file, where the waiting QEMU
// sees them at once. They stay clean: they do not come back as collected
// pages. off and len(data) must be multiples of PageSize.
func (r *RAM) Store(off int64, data []byte) error { return errors.ErrUnsupported }

// Sweep calls fn for all non-zero memory from offset from on, in ascending
// order, in runs of whole pages (at most 1 MiB). data is valid until fn
// returns. The guest may run: set mode Collect before, and what changes behind
// the sweep is in a later Cut. After an error of fn the sweep ends with it.
// Only one Sweep runs at a time. Progress: everything below off+len(data) is done.
func (r *RAM) Sweep(ctx context.Context, from int64, fn func(off int64, data []byte) error) error {
	return errors.ErrUnsupported
}

// Hash returns the XXH3 64-bit hash of each page (by page number) as the guest sees it now.
func (r *RAM) Hash(pages []int64) ([]uint64, error) { return nil, errors.ErrUnsupported }

// Failed is closed when the memory is lost or no longer tracked; Err says why.
func (r *RAM) Failed() <-chan struct{} { return nil }

// Err returns nil, or why Failed is closed (wraps ErrLost).
func (r *RAM) Err() error { return nil }

// Collected returns the bytes that wait for the next Cut.
func (r *RAM) Collected() int64 { return 0 }

// Pressure delivers a value when Collected reached Config.CollectLimit: the epoch
// should be cut early. At most one value is pending.
func (r *RAM) Pressure() <-chan struct{} { return nil }

// Stats returns counters.
func (r *RAM) Stats() Stats { return Stats{} }

// Close ends the connection, unmounts, and reaps the helper. It never waits
// for QEMU, which may still have the file mapped. It is idempotent.
func (r *RAM) Close() error { return nil }

// PageSet is the memory of one epoch: every page that changed, once, with its
// last content. It is not safe for concurrent use, except for reading.
type PageSet struct{}

// Pages returns the number of pages.
func (p *PageSet) Pages() int { return 0 }

// Bytes returns Pages times PageSize.
func (p *PageSet) Bytes() int64 { return 0 }

// Extents yields the pages in order of arrival, in runs of whole pages. The data is valid until Release.
func (p *PageSet) Extents() iter.Seq2[int64, []byte] { return nil }

// PageNumbers returns the numbers of all pages, ascending (for the audit).
func (p *PageSet) PageNumbers() []int64 { return nil }

// Release gives the buffers back. The set is empty afterwards.
func (p *PageSet) Release() {}

// EncoderConfig tunes an Encoder; the zero value is usable.
type EncoderConfig struct {
	Parallel      int   // frames compressed at the same time, default 2
	NoCompress    bool  // never compress
	LinkRate      int64 // bytes per second that the links carry, 0 unknown; compression that is slower than sending is skipped
	SkipUnchanged bool  // keep a 64-bit hash per page and leave out pages sent before with the same content
	Size          int64 // bytes of RAM, needed by SkipUnchanged only
}

// Encoder turns page sets into frames. It adapts to what it sees. One caller at a time.
type Encoder struct{}

// NewEncoder returns an encoder.
func NewEncoder(cfg EncoderConfig) *Encoder { return nil }

// EncodeStats says what an Encode did.
type EncodeStats struct {
	Pages, ZeroPages, SkippedPages int   // all, of these zero, of these left out as unchanged
	Frames                         int   // frames emitted
	Bytes                          int64 // bytes of all frames
}

// Encode calls emit with each frame of the set, in order. The frame is valid until emit returns.
func (e *Encoder) Encode(ps *PageSet, emit func(frame []byte) error) (EncodeStats, error) {
	return EncodeStats{}, errors.ErrUnsupported
}

// EncodeRun appends one frame that holds one run of pages (for Sweep, at most 256 KiB of
// data per frame; longer runs give several frames) and calls emit as Encode does.
func (e *Encoder) EncodeRun(off int64, data []byte, emit func(frame []byte) error) error {
	return errors.ErrUnsupported
}

// Reset forgets what was sent (SkipUnchanged): call it when the other side starts from nothing.
func (e *Encoder) Reset() {}

// DecodePages checks a frame whole and then calls fn for each run of pages in it
// (off and len(data) are multiples of PageSize, off+len(data) ≤ size). Nothing is
// handed to fn before the checksum of the decoded pages was found right.
// data is valid until fn returns.
func DecodePages(frame []byte, size int64, fn func(off int64, data []byte) error) error {
	return errors.ErrUnsupported
}

// HelperMain is the main of the helper process; it returns the exit status.
func HelperMain(args []string) int { return 2 }

// Probe mounts a small RAM under dir and checks that this kernel tracks dirty
// pages as the package needs it. It takes about a second and leaves nothing behind.
func Probe(ctx context.Context, dir string, helper []string) error { return errors.ErrUnsupported }

// CheckLimits returns what is wrong with limits of this process and host for RAM
// of size bytes, in words for people; none if all is well.
func CheckLimits(size int64) []string { return nil }

// HardenProcess locks the memory of this process, marks it as one that cleans dirty
// memory (PR_SET_IO_FLUSHER) and lowers its OOM score. Best effort: the
// error says what did not work.
func HardenProcess() error { return errors.ErrUnsupported }
