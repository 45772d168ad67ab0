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
	Adopt  bool // the image exists (an imported one) and is taken as it is; it is extended to Size, never cut
	// Image is the absolute path of a file or block device that becomes the image
	// instead of DIR/ID.raw; it needs StampSize bytes behind Size. Without Adopt what it held is
	// lost. A device (Device) is made to read as zeroes, unless the replica is Inconsistent.
	Image  string
	Device bool
	Host   string // name of this host, for the stamp of such an image
	// NoChecksums leaves the block checksums out, see Options.Checksums.
	NoChecksums bool
}

// zeroed reports whether the image is made to read as zeroes.
func (p Params) zeroed() bool {
	return !p.Adopt && (!p.Device || p.State != model.Inconsistent)
}

// Setting of something that the metadata remember.
type Setting uint8

// The settings.
const (
	Keep Setting = iota // as it is; a replica of metadata version 1 gets it
	On
	Off
)

// Options of an open store; the zero value is good.
type Options struct {
	JournalLimit int64 // bytes of journal, over both its files, from which on it is trimmed; 0: 64 MiB
	NoAutoTrim   bool  // no goroutine: trim only when Trim, Flush or Close is called, reassure never (for tests)
	Activity     int   // extents in the activity log, at most MaxActivity; 0: DefaultActivity
	Checksums    Setting
	// At is called at named points of each change, for tests that end the process there.
	At func(point string)
}

// Store is one replica of one disk on this host. After Open, Replay or Discard
// must be called before anything is written.
type Store struct {
	id   string
	size int64
	opts Options
	fsys vfs.FS
	at   files
	raw  vfs.File
	file vfs.File // metadata

	failed atomic.Pointer[error]

	blocks  rangeLock // of changes in place, by block
	buffers bufferPool
	act     activity
	miss    missing
	sums    sums
	lost    bool // the activity log was damaged

	badBlocks, repaired atomic.Int64
	onRepair            atomic.Pointer[func(off int64)]

	// changes counts whatever was carried out in the image, synced is the count that
	// the last sync of the image covers.
	changes, synced atomic.Uint64
	through         throughs
	digests         digestQueue
	watches         watches
	background      sync.WaitGroup
	stopping        chan struct{} // closed by Close
	closing         sync.Once

	setting sync.Mutex // one SetMeta at a time
	metaMu  sync.Mutex
	meta    metaRecord
	stamp   stamp // of an image that lies elsewhere, as last made durable

	// imageMu serialises fdatasync of the image. written counts direct writes after
	// they were carried out, durable is the count that the last sync covers; equal
	// means that no direct write waits for a sync.
	imageMu sync.Mutex
	written atomic.Uint64
	durable atomic.Uint64
	copied  atomic.Int64 // bytes written in place since the trimmer was last asked to sync them

	journal journal
}

// files are the paths of a replica.
type files struct {
	raw, meta, log, bits, sums string
	journals                   [2]string
}

func paths(dir, id string) files {
	p := filepath.Join(dir, id)
	return files{p + ".raw", p + ".meta", p + ".log", p + ".bitmap", p + ".sums", [2]string{p + ".journal0", p + ".journal1"}}
}

// Exists reports whether dir holds a replica of disk id.
func Exists(fsys vfs.FS, dir, id string) (bool, error) {
	return fsys.Exists(paths(dir, id).meta)
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
	m := metaRecord{version: metaVersion, seq: 1, incarnation: 1, Meta: Meta{VM: p.VM, Disk: p.ID, Size: p.Size, Term: p.Term,
		Branch: p.Branch, Run: p.Run, State: p.State, Image: p.Image, Device: p.Device, Clean: true}, sums: !p.NoChecksums}
	// A new image is all zeroes, so that its checksums are known.
	m.complete = m.sums && p.zeroed()
	if p.Image != "" {
		m.version, m.stampID, m.stampSeq = placedVersion, newStampID(), 1
	}
	if err := m.validate(); err != nil {
		return err
	}
	if len(p.Host) > maxString {
		return fmt.Errorf("%.80q is longer than %d bytes", p.Host, maxString)
	}
	at, last := paths(dir, p.ID), false
	if ok, err := fsys.Exists(at.meta); err != nil {
		return err
	} else if ok {
		return fs.ErrExist
	}
	if p.Image != "" {
		made := false
		m.stampAt, made, err = placeImage(fsys, p, stamp{Stamp{p.VM, p.ID, p.Host}, m.stampID, m.stampSeq})
		defer func() {
			if err != nil && m.stampAt > 0 && !last { // else the metadata may be there
				_ = dropImage(fsys, m, !made) // the error that matters is err
			}
		}()
	} else {
		err = createImage(fsys, at.raw, p)
	}
	if err != nil {
		return err
	}
	for _, j := range at.journals {
		if err := remake(fsys, j, func(vfs.File) error { return nil }); err != nil {
			return err
		}
	}
	if err := createSide(fsys, at, m); err != nil {
		return err
	}
	if err := fsys.SyncDir(dir); err != nil {
		return err
	}
	slots := make([]byte, 2*slotSize)
	copy(slots[slotSize*(m.seq%2):], m.encode())
	last = true
	return vfs.ReplaceFile(fsys, at.meta, slots)
}

// createSide makes activity log, bitmap and checksums, empty.
func createSide(fsys vfs.FS, at files, m metaRecord) error {
	if err := remake(fsys, at.log, func(f vfs.File) error { return createLog(f, journalKey(m.Meta)) }); err != nil {
		return err
	}
	if err := remake(fsys, at.bits, func(f vfs.File) error { return createMissing(f, m.Size) }); err != nil {
		return err
	}
	if !m.sums {
		return nil
	}
	return remake(fsys, at.sums, func(f vfs.File) error { return createSums(f, m.Size) })
}

// remake makes a file anew.
func remake(fsys vfs.FS, path string, fill func(vfs.File) error) error {
	if err := fsys.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := fsys.Create(path)
	if err != nil {
		return err
	}
	err = fill(f)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
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
// The metadata goes first. Removing what is not there is no error. An image
// elsewhere is deleted too where it is a file of this replica still; a block device
// keeps its content and loses its stamp. See Release.
func Remove(fsys vfs.FS, dir, id string) error {
	_, err := Release(fsys, dir, id, false)
	return err
}

// Release is Remove that can keep an image elsewhere: with keep it stays, as a raw image
// that belongs to nobody. left says why such an image was left as it was, if it was: it cannot be
// reached, is in use, or is not this replica's any more.
func Release(fsys vfs.FS, dir, id string, keep bool) (left, err error) {
	// The image first: without its stamp the metadata say nothing any more, and it
	// is known as long as they are there.
	if m, err := metaOf(fsys, dir, id); err == nil && m.Image != "" {
		left = dropImage(fsys, m, keep)
	}
	return left, Abandon(fsys, dir, id)
}

// Abandon is Remove that does not look at an image elsewhere, whose device may not answer.
func Abandon(fsys vfs.FS, dir, id string) error {
	at := paths(dir, id)
	for _, group := range [][]string{{at.meta}, {at.meta + ".tmp", at.journals[0], at.journals[1], at.log, at.bits, at.sums, at.raw}} {
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
	if o.Activity <= 0 {
		o.Activity = DefaultActivity
	}
	o.Activity = min(o.Activity, MaxActivity)
	s := &Store{id: id, opts: o, fsys: fsys, at: paths(dir, id), stopping: make(chan struct{})}
	defer func() {
		if err != nil {
			_ = s.closeFiles() // the error that matters is err
			err = fmt.Errorf("open replica of %s: %w", id, err)
		}
	}()
	if s.file, err = fsys.OpenLocked(s.at.meta); err != nil {
		return nil, err
	}
	if s.meta, err = readMeta(s.file); err != nil {
		return nil, err
	}
	if s.meta.Disk != id {
		return nil, fmt.Errorf("metadata of disk %.64q: %w", s.meta.Disk, ErrCorrupt)
	}
	s.size = s.meta.Size
	image := s.at.raw
	if s.meta.Image != "" {
		image = s.meta.Image
	}
	if s.raw, err = fsys.OpenLocked(image); err != nil {
		if s.meta.Image != "" {
			err = missingImage(image, err)
		}
		return nil, err
	}
	if s.meta.Image != "" {
		if s.stamp, err = s.meta.fits(s.raw); err != nil {
			return nil, err
		}
	}
	if n, err := s.raw.Size(); err != nil {
		return nil, err
	} else if n < s.size {
		return nil, fmt.Errorf("image %s has %d bytes, the disk %d: %w", image, n, s.size, ErrCorrupt)
	}
	for i, p := range s.at.journals {
		if s.journal.areas[i].file, err = fsys.Open(p); err != nil {
			return nil, err
		}
	}
	s.journal.key = journalKey(s.meta.Meta)
	if s.meta.version < metaVersion {
		return s, nil // Replay or Discard makes what is missing
	}
	return s, s.openSide()
}

// openSide opens activity log, bitmap and checksums. Nothing is changed.
func (s *Store) openSide() error {
	log, err := s.fsys.Open(s.at.log)
	if err != nil {
		return err
	}
	s.act.file = log
	found, damaged, err := s.act.open(s, log, s.opts.Activity)
	if err != nil {
		return err
	}
	bits, err := s.fsys.Open(s.at.bits)
	if err != nil {
		return err
	}
	s.miss.file = bits
	if err := s.miss.open(bits, s.journal.key, s.size); err != nil {
		return err
	}
	if s.meta.sums {
		if s.sums.file, err = s.fsys.Open(s.at.sums); err != nil {
			return err
		}
		s.sums.complete.Store(s.meta.complete && !damaged)
	}
	if damaged {
		// No crash does that. What differs from the peer is not known any more.
		s.lost = true
		s.miss.set(0, s.miss.bits.Len())
	}
	return s.act.restore(found)
}

// settleSide makes what a replica of an earlier version lacks, and what the
// settings ask for, before the first change. The metadata say so afterwards.
func (s *Store) settleSide() error {
	want := s.meta.sums || s.meta.version < metaVersion
	switch s.opts.Checksums {
	case On:
		want = true
	case Off:
		want = false
	}
	upgrade := s.meta.version < metaVersion
	if !upgrade && want == s.meta.sums && !s.lost {
		return nil
	}
	m := s.metaNow()
	fresh := upgrade || s.lost || !s.meta.sums
	m.sums, m.complete = want, want && s.meta.complete && !fresh
	if upgrade {
		if err := createSide(s.fsys, s.at, m); err != nil {
			return err
		}
	} else if want && fresh {
		if s.sums.file != nil {
			_ = s.sums.file.Close() // nothing in it counts any more
		}
		s.sums.file = nil
		if err := remake(s.fsys, s.at.sums, func(f vfs.File) error { return createSums(f, s.size) }); err != nil {
			return err
		}
	}
	if s.lost {
		if err := s.saveMissing(true); err != nil {
			return err
		}
		if _, err := s.act.file.WriteAt(encodeLog(nil, s.journal.key, 1, nil), logSlot); err != nil {
			return err
		}
		if err := s.act.file.Sync(); err != nil {
			return err
		}
		s.act.seq = 1
	}
	if err := s.fsys.SyncDir(filepath.Dir(s.at.meta)); err != nil {
		return err
	}
	if err := s.changeMeta(func(r *metaRecord) { r.version, r.sums, r.complete = max(r.version, metaVersion), m.sums, m.complete }); err != nil {
		return err
	}
	s.lost = false
	if upgrade {
		return s.openSide()
	}
	return s.reopenSums()
}

// reopenSums follows a changed setting. Nothing was read or written yet.
func (s *Store) reopenSums() (err error) {
	s.sums.complete.Store(s.meta.complete)
	if !s.meta.sums {
		f := s.sums.file
		s.sums.file = nil
		s.act.dropPages()
		if f != nil {
			if err := f.Close(); err != nil {
				return err
			}
			return s.fsys.Remove(s.at.sums)
		}
		return nil
	}
	if s.sums.file == nil {
		if s.sums.file, err = s.fsys.Open(s.at.sums); err != nil {
			return err
		}
	}
	return s.act.freshPages()
}

// point is where a test may end the process.
func (s *Store) point(name string) {
	if s.opts.At != nil {
		s.opts.At(name)
	}
}

func (s *Store) closeFiles() error {
	var errs []error
	for _, f := range []vfs.File{s.raw, s.journal.areas[0].file, s.journal.areas[1].file, s.act.file, s.miss.file, s.sums.file, s.file} {
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
	s.closing.Do(func() { close(s.stopping) })
	s.background.Wait()
	s.journal.stop()
	err := s.Err()
	if err == nil && s.journal.isReady() {
		if err = s.Flush(); err == nil {
			err = s.act.close()
		}
		if err == nil && s.Pending() == 0 {
			if err = s.bumpStamp(); err == nil {
				err = s.changeMeta(func(m *metaRecord) { m.Clean = true })
			}
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
	s.act.wake()
	return s.Err()
}

// GiveUp makes err stick, as a failed sync does: the owner has found that the
// replica is of no use any more (its device does not answer). Calls that the
// kernel holds are not ended by it.
func (s *Store) GiveUp(err error) { _ = s.fail("use", err) }

// Meta returns the metadata as last made durable.
func (s *Store) Meta() Meta {
	s.metaMu.Lock()
	defer s.metaMu.Unlock()
	return s.meta.Meta
}

// SetMeta lets fn change the metadata and returns when the change is durable.
// VM, Disk, Size, Image and Clean are not fn's to change.
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
		r.Term, r.Branch, r.Run, r.State, r.Lineage = m.Term, m.Branch, m.Run, m.State, m.Lineage
	})
}

func (s *Store) changeMeta(fn func(*metaRecord)) error {
	s.metaMu.Lock()
	defer s.metaMu.Unlock()
	if err := s.Err(); err != nil {
		return err
	}
	m := s.meta
	m.stampSeq = s.stamp.seq
	fn(&m)
	if err := m.validate(); err != nil {
		return fmt.Errorf("change metadata of %s: %w", s.id, err)
	}
	m.seq++
	s.point("meta.write")
	if err := writeMeta(s.file, m); err != nil {
		// Which of the two slots counts is not known any more.
		return s.fail("metadata write", err)
	}
	s.meta = m
	s.point("meta.written")
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

// ReadAt fills p from the image in place. A block that cannot be read or does not
// match its checksum is a BlockError.
func (s *Store) ReadAt(p []byte, off int64) error {
	if err := s.check(off, int64(len(p))); err != nil {
		return err
	}
	if off%BlockSize == 0 && len(p)%BlockSize == 0 {
		return s.readBlocks(p, off)
	}
	return s.readParts(p, off)
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
	l := s.lockBlocks(off, int64(len(p)))
	defer s.blocks.unlock(l)
	return s.writeRange(p, off)
}

const copyStep = 32 << 20

// Zero makes a range of the image read as zeroes, in place; with punch the
// space is given back. It is durable after the next Flush or Sync.
func (s *Store) Zero(off, n int64, punch bool) error {
	if err := s.checkWrite(off, n); err != nil || n == 0 {
		return err
	}
	defer s.written.Add(1)
	l := s.lockBlocks(off, n)
	defer s.blocks.unlock(l)
	return s.zeroRange(off, n, punch)
}

// Flush makes everything durable that was written, appended or applied before,
// and forgets the journal's applied records. It may take as long as the disk
// needs for all that was applied since the journal was last trimmed.
func (s *Store) Flush() error {
	if err := s.syncImage(s.needsSync); err != nil {
		return err
	}
	return s.syncJournal()
}

func (s *Store) needsSync() bool { return s.changes.Load() != s.synced.Load() || s.needsTrim() }

// syncImage makes the image durable and then trims the journal up to what had
// been applied before, if a direct write waits for it or more says so.
func (s *Store) syncImage(more func() bool) error {
	if err := s.Err(); err != nil {
		return err
	}
	done := s.through.inPlace()
	if s.durable.Load() == s.written.Load() && !more() {
		if s.synced.Load() == s.changes.Load() {
			s.through.imageSynced(done) // an epoch may have ended since
		}
		return nil
	}
	s.imageMu.Lock()
	defer s.imageMu.Unlock()
	count := s.written.Load()
	if s.durable.Load() == count && !more() {
		return nil // somebody else's sync covered it while we waited
	}
	changes, epoch := s.changes.Load(), s.through.inPlace()
	through := s.journal.appliedThrough()
	s.point("image.sync")
	if err := s.raw.Sync(); err != nil {
		return s.fail("sync of the image", err)
	}
	s.point("image.synced")
	s.synced.Store(changes)
	s.through.imageSynced(epoch)
	// Persist, then say so: a record that is not replayed any more must be in the image.
	if err := s.trimThrough(through); err != nil {
		return err
	}
	s.durable.Store(count)
	return nil
}

// Wipe turns the image into one hole, for a full copy. It is refused unless the
// metadata says Inconsistent and no epoch is pending. Durable on return, and so is
// that all checksums are known.
func (s *Store) Wipe() error {
	if st := s.Meta().State; st != model.Inconsistent {
		return fmt.Errorf("wipe %s, which is %s: %w", s.id, st, ErrState)
	}
	if s.Pending() != 0 {
		return fmt.Errorf("wipe %s with epochs pending: %w", s.id, ErrState)
	}
	if err := s.checkWrite(0, s.size); err != nil {
		return err
	}
	l := s.lockBlocks(0, s.size)
	defer s.blocks.unlock(l)
	// The activity log is not asked: everything is about to be copied anyway. The
	// checksums are forgotten before, and known again when all is durable.
	if err := s.forgetSums(); err != nil {
		return err
	}
	defer s.written.Add(1)
	// In pieces: some file systems hold a lock all along.
	for off := int64(0); off < s.size; off += wipeStep {
		if err := s.raw.Zero(off, min(wipeStep, s.size-off), true); err != nil {
			return fmt.Errorf("wipe %s: %w", s.id, err)
		}
		s.changes.Add(1)
	}
	if err := s.syncImage(func() bool { return true }); err != nil || !s.sums.on() {
		return err
	}
	if err := s.changeMeta(func(m *metaRecord) { m.complete = true }); err != nil {
		return err
	}
	s.sums.complete.Store(true)
	return nil
}

// forgetSums makes all checksums unknown, durably. All blocks are locked.
func (s *Store) forgetSums() error {
	if !s.sums.on() {
		return nil
	}
	s.sums.complete.Store(false)
	if err := s.changeMeta(func(m *metaRecord) { m.complete = false }); err != nil {
		return err
	}
	s.act.quiesce()
	if err := s.sums.file.Truncate(0); err != nil {
		return fmt.Errorf("empty the checksums of %s: %w", s.id, err)
	}
	if err := createSums(s.sums.file, s.size); err != nil {
		return fmt.Errorf("empty the checksums of %s: %w", s.id, err)
	}
	return s.act.freshPages()
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
