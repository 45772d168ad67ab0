package blockstore

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"

	"perdure/internal/model"
	"perdure/internal/vfs"
)

// BlockSize is the unit of held writes and of the journal, in bytes.
const BlockSize = 4096

// ChunkSize is the unit of dirty tracking, in bytes.
const ChunkSize = 64 << 10

// Params describes a replica to be made.
type Params struct {
	ID     string // disk id; names the files
	VM     string // UUID of the VM
	Size   int64  // bytes, a positive multiple of BlockSize
	Term   model.Term
	Branch model.BranchID
	Run    model.RunID
	State  model.ReplicaState
	Adopt  bool // DIR/ID.raw exists (an imported image) and becomes the image; it is extended to Size, never cut
}

// Options of an open store; the zero value is good.
type Options struct {
	JournalLimit int64 // bytes of journal, over both its files, from which on it is trimmed; 0: 64 MiB
	NoAutoTrim   bool  // trim only when Trim, Flush or Close is called (for tests)
}

// Store is one replica of one disk on this host. After Open, Replay or Discard
// must be called before anything is written.
type Store struct {
	id   string
	size int64
	opts Options
	raw  vfs.File
	file vfs.File // metadata

	failed atomic.Pointer[error]

	setting sync.Mutex // one SetMeta at a time
	metaMu  sync.Mutex
	meta    metaRecord

	// imageMu serialises fdatasync of the image. written counts direct writes after
	// they were carried out, durable is the count that the last sync covers; equal
	// means that no direct write waits for a sync.
	imageMu sync.Mutex
	written atomic.Uint64
	durable atomic.Uint64
	copied  atomic.Int64 // bytes written in place since the trimmer was last asked to sync them

	journal journal
}

func paths(dir, id string) (raw, meta string, journals [2]string) {
	p := filepath.Join(dir, id)
	return p + ".raw", p + ".meta", [2]string{p + ".journal0", p + ".journal1"}
}

// Exists reports whether dir holds a replica of disk id.
func Exists(fsys vfs.FS, dir, id string) (bool, error) {
	_, meta, _ := paths(dir, id)
	return fsys.Exists(meta)
}

// Create makes a replica, durable on return: nothing but holes, or the adopted
// image. A replica that exists is refused (fs.ErrExist), as are left-overs of a
// half-made one; Remove clears them. The metadata is written last: what has
// none is no replica.
func Create(fsys vfs.FS, dir string, p Params) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("create replica of %s: %w", p.ID, err)
		}
	}()
	m := metaRecord{seq: 1, incarnation: 1, Meta: Meta{VM: p.VM, Disk: p.ID, Size: p.Size, Term: p.Term,
		Branch: p.Branch, Run: p.Run, State: p.State, Clean: true}}
	if err := m.validate(); err != nil {
		return err
	}
	raw, meta, journals := paths(dir, p.ID)
	if ok, err := fsys.Exists(meta); err != nil {
		return err
	} else if ok {
		return fs.ErrExist
	}
	if err := createImage(fsys, raw, p); err != nil {
		return err
	}
	for _, j := range journals {
		if err := fsys.Remove(j); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		f, err := fsys.Create(j)
		if err != nil {
			return err
		}
		if err := f.Close(); err != nil {
			return err
		}
	}
	if err := fsys.SyncDir(dir); err != nil {
		return err
	}
	slots := make([]byte, 2*slotSize)
	copy(slots[slotSize*(m.seq%2):], m.encode())
	return vfs.ReplaceFile(fsys, meta, slots)
}

func createImage(fsys vfs.FS, path string, p Params) error {
	open := fsys.Create
	if p.Adopt {
		open = fsys.Open
	}
	f, err := open(path)
	if err != nil {
		return err
	}
	size, err := f.Size()
	if err == nil && size > p.Size {
		err = fmt.Errorf("image of %d bytes is larger than the disk of %d", size, p.Size)
	}
	if err == nil && size < p.Size {
		err = f.Truncate(p.Size)
	}
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}

// Remove deletes a replica and what is left of a half-made or half-removed one.
// The metadata goes first. Removing what is not there is no error.
func Remove(fsys vfs.FS, dir, id string) error {
	raw, meta, journals := paths(dir, id)
	for _, group := range [][]string{{meta}, {meta + ".tmp", journals[0], journals[1], raw}} {
		for _, p := range group {
			if err := fsys.Remove(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("remove replica of %s: %w", id, err)
			}
		}
		if err := fsys.SyncDir(dir); err != nil {
			return fmt.Errorf("remove replica of %s: %w", id, err)
		}
	}
	return nil
}

// Open opens a replica. It changes nothing yet; the next call is Replay, or
// Discard for a replica that is about to be overwritten.
func Open(fsys vfs.FS, dir, id string, o Options) (_ *Store, err error) {
	if o.JournalLimit <= 0 {
		o.JournalLimit = 64 << 20
	}
	s := &Store{id: id, opts: o}
	defer func() {
		if err != nil {
			_ = s.closeFiles() // the error that matters is err
			err = fmt.Errorf("open replica of %s: %w", id, err)
		}
	}()
	raw, meta, journals := paths(dir, id)
	if s.file, err = fsys.Open(meta); err != nil {
		return nil, err
	}
	if s.meta, err = readMeta(s.file); err != nil {
		return nil, err
	}
	if s.meta.Disk != id {
		return nil, fmt.Errorf("metadata of disk %.64q: %w", s.meta.Disk, ErrCorrupt)
	}
	s.size = s.meta.Size
	if s.raw, err = fsys.Open(raw); err != nil {
		return nil, err
	}
	if n, err := s.raw.Size(); err != nil {
		return nil, err
	} else if n < s.size {
		return nil, fmt.Errorf("image has %d bytes, the disk %d: %w", n, s.size, ErrCorrupt)
	}
	for i, p := range journals {
		if s.journal.areas[i].file, err = fsys.Open(p); err != nil {
			return nil, err
		}
	}
	s.journal.key = journalKey(s.meta.Meta)
	return s, nil
}

func (s *Store) closeFiles() error {
	var errs []error
	for _, f := range []vfs.File{s.raw, s.file, s.journal.areas[0].file, s.journal.areas[1].file} {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	return errors.Join(errs...)
}

// Close makes everything durable, notes in the metadata that the replica was
// left in order, and closes the files. No other call may be under way or
// follow. Epochs that were appended and not applied stay in the journal, and
// the replica does not count as left in order. After a sticky failure only the
// files are closed, and that failure is returned.
func (s *Store) Close() error {
	s.journal.stop()
	err := s.Err()
	if err == nil && s.journal.isReady() {
		if err = s.Flush(); err == nil && s.Pending() == 0 {
			err = s.changeMeta(func(m *metaRecord) { m.Clean = true })
		}
	}
	return errors.Join(err, s.closeFiles())
}

// Err is the sticky failure, or nil while the replica is good.
func (s *Store) Err() error {
	if p := s.failed.Load(); p != nil {
		return *p
	}
	return nil
}

// fail makes err stick and returns the failure that sticks.
func (s *Store) fail(what string, err error) error {
	err = fmt.Errorf("%s of %s failed, the replica is given up: %w", what, s.id, err)
	s.failed.CompareAndSwap(nil, &err)
	return s.Err()
}

// Meta returns the metadata as last made durable.
func (s *Store) Meta() Meta {
	s.metaMu.Lock()
	defer s.metaMu.Unlock()
	return s.meta.Meta
}

// SetMeta lets fn change the metadata and returns when the change is durable.
// VM, Disk, Size and Clean are not fn's to change.
//
// A replica that stops being Inconsistent is made durable first: whoever reads
// that it is good must find it so. That takes as long as the disk needs for what
// was copied since the last sync; see WriteAt, and call Flush beforehand, while
// nobody waits.
func (s *Store) SetMeta(fn func(*Meta)) error {
	s.setting.Lock()
	defer s.setting.Unlock()
	old := s.Meta()
	m := old
	fn(&m)
	if old.State == model.Inconsistent && m.State != model.Inconsistent {
		if err := s.Flush(); err != nil {
			return err
		}
	}
	return s.changeMeta(func(r *metaRecord) {
		r.Term, r.Branch, r.Run, r.State = m.Term, m.Branch, m.Run, m.State
	})
}

func (s *Store) changeMeta(fn func(*metaRecord)) error {
	s.metaMu.Lock()
	defer s.metaMu.Unlock()
	if err := s.Err(); err != nil {
		return err
	}
	m := s.meta
	fn(&m)
	if err := m.validate(); err != nil {
		return fmt.Errorf("change metadata of %s: %w", s.id, err)
	}
	m.seq++
	if err := writeMeta(s.file, m); err != nil {
		// Which of the two slots counts is not known any more.
		return s.fail("metadata write", err)
	}
	s.meta = m
	return nil
}

// Size is the disk's length in bytes.
func (s *Store) Size() int64 { return s.size }

// check refuses a range that is not within the disk, and everything after a failure.
func (s *Store) check(off, n int64) error {
	if off < 0 || n < 0 || off > s.size || n > s.size-off {
		return fmt.Errorf("range %d+%d is outside of %s: %w", off, n, s.id, syscall.EINVAL)
	}
	return s.Err()
}

// checkWrite is check for changes, which have to wait for Replay.
func (s *Store) checkWrite(off, n int64) error {
	if !s.journal.isReady() {
		return fmt.Errorf("write %s before its journal was replayed: %w", s.id, ErrState)
	}
	return s.check(off, n)
}

// ReadAt fills p from the image in place.
func (s *Store) ReadAt(p []byte, off int64) error {
	if err := s.check(off, int64(len(p))); err != nil {
		return err
	}
	if _, err := s.raw.ReadAt(p, off); err != nil {
		if errors.Is(err, io.EOF) {
			err = ErrCorrupt // the image was cut under our feet
		}
		return fmt.Errorf("read %s: %w", s.id, err)
	}
	return nil
}

// WriteAt writes p in place. It is durable after the next Flush or Sync. While
// the replica is Inconsistent, and so being copied, the store syncs it by itself
// every 32 MiB, in the background: at the end little is left to do.
func (s *Store) WriteAt(p []byte, off int64) error {
	if err := s.checkWrite(off, int64(len(p))); err != nil {
		return err
	}
	if s.copied.Add(int64(len(p))) >= copyStep {
		s.copied.Store(0)
		if s.Meta().State == model.Inconsistent {
			s.journal.askTrim()
		}
	}
	// Counted afterwards, and also when it failed: some of it may have been written.
	defer s.written.Add(1)
	if _, err := s.raw.WriteAt(p, off); err != nil {
		return fmt.Errorf("write %s: %w", s.id, err)
	}
	return nil
}

const copyStep = 32 << 20

// Zero makes a range of the image read as zeroes, in place; with punch the
// space is given back. It is durable after the next Flush or Sync.
func (s *Store) Zero(off, n int64, punch bool) error {
	if err := s.checkWrite(off, n); err != nil || n == 0 {
		return err
	}
	defer s.written.Add(1)
	if err := s.raw.Zero(off, n, punch); err != nil {
		return fmt.Errorf("zero %s: %w", s.id, err)
	}
	return nil
}

// Flush makes everything durable that was written, appended or applied before,
// and forgets the journal's applied records. It may take as long as the disk
// needs for all that was applied since the journal was last trimmed.
func (s *Store) Flush() error {
	if err := s.syncImage(s.needsTrim); err != nil {
		return err
	}
	return s.syncJournal()
}

// syncImage makes the image durable and then trims the journal up to what had
// been applied before, if a direct write waits for it or more says so.
func (s *Store) syncImage(more func() bool) error {
	if err := s.Err(); err != nil {
		return err
	}
	if s.durable.Load() == s.written.Load() && !more() {
		return nil
	}
	s.imageMu.Lock()
	defer s.imageMu.Unlock()
	count := s.written.Load()
	if s.durable.Load() == count && !more() {
		return nil // somebody else's sync covered it while we waited
	}
	through := s.journal.appliedThrough()
	if err := s.raw.Sync(); err != nil {
		return s.fail("sync of the image", err)
	}
	// Persist, then say so: a record that is not replayed any more must be in the image.
	if err := s.trimThrough(through); err != nil {
		return err
	}
	s.durable.Store(count)
	return nil
}

// Wipe turns the image into one hole, for a full copy. It is refused unless the
// metadata says Inconsistent and no epoch is pending. Durable after the next Flush.
func (s *Store) Wipe() error {
	if st := s.Meta().State; st != model.Inconsistent {
		return fmt.Errorf("wipe %s, which is %s: %w", s.id, st, ErrState)
	}
	if s.Pending() != 0 {
		return fmt.Errorf("wipe %s with epochs pending: %w", s.id, ErrState)
	}
	// In pieces: some file systems hold a lock all along.
	for off := int64(0); off < s.size; off += wipeStep {
		if err := s.Zero(off, min(wipeStep, s.size-off), true); err != nil {
			return err
		}
	}
	return nil
}

const wipeStep = 1 << 30

// Extent returns the length of the run at off that is all data or all hole, at
// most n (> 0). A run ends at multiples of BlockSize, or at off+n.
func (s *Store) Extent(off, n int64) (length int64, hole bool, err error) {
	if err := s.check(off, n); err != nil {
		return 0, false, err
	}
	length, hole, err = s.raw.Extent(off, n)
	if err != nil {
		return 0, false, fmt.Errorf("look for holes in %s: %w", s.id, err)
	}
	end := off + length
	if end < off+n && end%BlockSize != 0 {
		// The file system's blocks are smaller than ours; a part hole counts as data.
		if hole && end-end%BlockSize > off {
			return end - end%BlockSize - off, true, nil
		}
		end = min(end-end%BlockSize+BlockSize, off+n)
		hole = false
	}
	return end - off, hole, nil
}

// NextData finds the next data at or after off that is not all zero, and reads
// it into buf, whose length must be a positive multiple of BlockSize: n bytes
// from start on, both multiples of BlockSize if off is. Holes and zero blocks
// before, and zero blocks behind, are left out. io.EOF: there is none.
func (s *Store) NextData(off int64, buf []byte) (start int64, n int, err error) {
	for off < s.size {
		length, hole, err := s.Extent(off, s.size-off)
		if err != nil {
			return 0, 0, err
		}
		if hole {
			off += length
			continue
		}
		p := buf[:min(int64(len(buf)), length)]
		if err := s.ReadAt(p, off); err != nil {
			return 0, 0, err
		}
		first, last := 0, len(p)
		for first < last && IsZero(p[first:min(first+BlockSize, last)]) {
			first += BlockSize
		}
		if first >= last {
			off += int64(len(p))
			continue
		}
		for last-BlockSize > first && last%BlockSize == 0 && IsZero(p[last-BlockSize:last]) {
			last -= BlockSize
		}
		return off + int64(first), copy(buf, p[first:last]), nil
	}
	return 0, 0, io.EOF
}

// IsZero reports whether p holds only zeroes.
func IsZero(p []byte) bool {
	for len(p) > BlockSize {
		if [BlockSize]byte(p) != zeroBlock {
			return false
		}
		p = p[BlockSize:]
	}
	return string(p) == string(zeroBlock[:len(p)])
}

// zeroBlock is never written to.
var zeroBlock [BlockSize]byte
