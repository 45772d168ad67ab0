package blockstore

import (
	"context"
	"errors"

	"perdure/internal/bitmap"
	"perdure/internal/model"
	"perdure/internal/vfs"
)

// This file holds the signatures that other packages may be written against;
// the bodies follow.

var errStub = errors.New("blockstore: not built yet")

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
	Adopt  bool // DIR/ID.raw exists already (an imported image) and is taken over; extended to Size, never cut
}

// Options of an open store; the zero value is good.
type Options struct {
	JournalLimit int64 // bytes of journal after which it is trimmed; 0: 64 MiB
	NoAutoTrim   bool  // trim only when Trim is called (tests)
}

// Meta is the durable description of a replica.
type Meta struct {
	VM     string // never changes
	Disk   string // never changes
	Size   int64  // never changes (for now)
	Term   model.Term
	Branch model.BranchID
	Run    model.RunID
	State  model.ReplicaState
	Clean  bool // the last user closed it properly
}

// Store is one replica of one disk on this host.
type Store struct{}

func Create(fs vfs.FS, dir string, p Params) error                            { return errStub }
func Exists(fs vfs.FS, dir, id string) (bool, error)                          { return false, errStub }
func Remove(fs vfs.FS, dir, id string) error                                  { return errStub }
func Open(fs vfs.FS, dir, id string, o Options) (*Store, error)               { return nil, errStub }
func (s *Store) Replay() (epochs int, err error)                              { return 0, errStub }
func (s *Store) Meta() Meta                                                   { return Meta{} }
func (s *Store) SetMeta(fn func(*Meta)) error                                 { return errStub }
func (s *Store) Size() int64                                                  { return 0 }
func (s *Store) ReadAt(p []byte, off int64) error                             { return errStub }
func (s *Store) WriteAt(p []byte, off int64) error                            { return errStub }
func (s *Store) Zero(off, n int64, punch bool) error                          { return errStub }
func (s *Store) Flush() error                                                 { return errStub }
func (s *Store) Extent(off, n int64) (length int64, hole bool, err error)     { return 0, false, errStub }
func (s *Store) NextData(off int64, buf []byte) (start int64, n int, e error) { return 0, 0, errStub } // io.EOF at the end
func (s *Store) Append(t model.Term, e model.Epoch, w *EpochWrites) error     { return errStub }
func (s *Store) Sync() error                                                  { return errStub }
func (s *Store) Persist(t model.Term, e model.Epoch, w *EpochWrites) error    { return errStub } // Append and the Sync that w obliges to
func (s *Store) Apply(through model.Epoch) error                              { return errStub } // all appended epochs up to through, in order
func (s *Store) Trim() error                                                  { return errStub }
func (s *Store) Discard() error                                               { return errStub } // forget the journal (sync target)
func (s *Store) Wipe() error                                                  { return errStub } // the image becomes one hole; only while Inconsistent
func (s *Store) Err() error                                                   { return errStub } // sticky failure
func (s *Store) Close() error                                                 { return errStub }

// EpochWrites is what one epoch did to one disk.
type EpochWrites struct{}

func (w *EpochWrites) Empty() bool                      { return true }  // nothing written and no obligation
func (w *EpochWrites) Bytes() int64                     { return 0 }     // bytes of data (zeroes not counted)
func (w *EpochWrites) FlushWithin() bool                { return false } // durable with this epoch, before its output leaves
func (w *EpochWrites) FlushBefore() bool                { return false } // the epochs before it durable, before its output leaves
func (w *EpochWrites) AppendTo(dst []byte) []byte       { return dst }
func Decode(b []byte, size int64) (*EpochWrites, error) { return nil, errStub } // keeps b

// Mode of a Volume.
type Mode int

const (
	Direct Mode = iota // simplex: in place
	Held               // duplex: in memory until the epoch commits
)

// VolumeOptions of a Volume; the zero value is good.
type VolumeOptions struct {
	HeldLimit int64 // bytes held after which Full fires; 0: 64 MiB
}

// Volume is the disk as the guest sees it; it implements nbd.Backend.
type Volume struct{}

func NewVolume(s *Store, o VolumeOptions) *Volume                                  { return nil }
func (v *Volume) Size() int64                                                      { return 0 }
func (v *Volume) ReadAt(ctx context.Context, p []byte, off int64) error            { return errStub }
func (v *Volume) WriteAt(ctx context.Context, p []byte, off int64, fua bool) error { return errStub }
func (v *Volume) Zero(ctx context.Context, off, n int64, fua, punch bool) error    { return errStub }
func (v *Volume) Flush(ctx context.Context) error                                  { return errStub }
func (v *Volume) Extent(ctx context.Context, off, n int64) (l int64, hole bool, e error) {
	return 0, false, errStub
}
func (v *Volume) Mode() Mode                  { return Direct }
func (v *Volume) SetMode(m Mode) error        { return errStub } // guest stopped; to Direct: all cut epochs committed; the open one is applied
func (v *Volume) BeginStop()                  {}                 // before QMP stop: a FLUSH from here on counts for the next epoch
func (v *Volume) EndStop()                    {}                 // after cont, when no Cut was made
func (v *Volume) Cut() *EpochWrites           { return nil }     // guest stopped; ends the stop window
func (v *Volume) Commit(w *EpochWrites) error { return errStub } // in the order of Cut; w must not be used any more
func (v *Volume) HeldBytes() int64            { return 0 }
func (v *Volume) Full() <-chan struct{}       { return nil } // one token each time HeldLimit is passed
func (v *Volume) StartTracking()              {}
func (v *Volume) TakeDirty() *bitmap.Bitmap   { return nil } // chunks of ChunkSize written since the last call
func (v *Volume) StopTracking()               {}
func (v *Volume) Store() *Store               { return nil }
