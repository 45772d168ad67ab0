package vfs

import (
	"sync/atomic"
	"time"
)

// Watch is a file system that knows how long its operations have been under way,
// so that an owner with a clock can tell a device that does not answer. It ends
// nothing: an operation that the kernel holds stays held.
//
// Watching costs two atomic operations per call, and no memory.
type Watch struct {
	FS
	now   func() time.Duration // monotonic
	slots [watchSlots]atomic.Int64
	next  atomic.Uint32
}

// watchSlots is how many operations are watched at a time; more than that are not.
const watchSlots = 256

// NewWatch returns fsys, watched. now is a monotonic clock, from any start above 0.
func NewWatch(fsys FS, now func() time.Duration) *Watch { return &Watch{FS: fsys, now: now} }

// Oldest is for how long the oldest operation has been under way; 0: none is.
func (w *Watch) Oldest() time.Duration {
	oldest := int64(0)
	for i := range w.slots {
		if t := w.slots[i].Load(); t != 0 && (oldest == 0 || t < oldest) {
			oldest = t
		}
	}
	if oldest == 0 {
		return 0
	}
	return max(w.now()-time.Duration(oldest), 1)
}

// begin takes a slot, if one is free nearby.
func (w *Watch) begin() *atomic.Int64 {
	t := max(int64(w.now()), 1)
	for range watchSlots / 4 {
		s := &w.slots[w.next.Add(1)%watchSlots]
		if s.CompareAndSwap(0, t) {
			return s
		}
	}
	return nil
}

func endWatch(s *atomic.Int64) {
	if s != nil {
		s.Store(0)
	}
}

func (w *Watch) file(f File, err error) (File, error) {
	if err != nil {
		return nil, err
	}
	return &watchFile{f, w}, nil
}

// Open implements FS.
func (w *Watch) Open(path string) (File, error) { return w.file(w.FS.Open(path)) }

// OpenLocked implements FS.
func (w *Watch) OpenLocked(path string) (File, error) { return w.file(w.FS.OpenLocked(path)) }

// Create implements FS.
func (w *Watch) Create(path string) (File, error) { return w.file(w.FS.Create(path)) }

type watchFile struct {
	File
	w *Watch
}

func (f *watchFile) ReadAt(p []byte, off int64) (int, error) {
	s := f.w.begin()
	n, err := f.File.ReadAt(p, off)
	endWatch(s)
	return n, err
}

func (f *watchFile) WriteAt(p []byte, off int64) (int, error) {
	s := f.w.begin()
	n, err := f.File.WriteAt(p, off)
	endWatch(s)
	return n, err
}

func (f *watchFile) Zero(off, n int64, punch bool) error {
	s := f.w.begin()
	err := f.File.Zero(off, n, punch)
	endWatch(s)
	return err
}

func (f *watchFile) Sync() error {
	s := f.w.begin()
	err := f.File.Sync()
	endWatch(s)
	return err
}

// Drop implements Dropper, where the file below does.
func (f *watchFile) Drop(off, n int64) error {
	if d, ok := f.File.(Dropper); ok {
		return d.Drop(off, n)
	}
	return nil
}

// Prefetch implements Prefetcher, where the file below does. On a full queue of the
// disk it may wait, so it is watched.
func (f *watchFile) Prefetch(off, n int64) error {
	p, ok := f.File.(Prefetcher)
	if !ok {
		return nil
	}
	s := f.w.begin()
	err := p.Prefetch(off, n)
	endWatch(s)
	return err
}
