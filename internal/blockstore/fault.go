package blockstore

import (
	"errors"
	"io/fs"
	"syscall"
)

// Fault is what kind of trouble an error of a Store or Volume means.
type Fault uint8

// The faults, in the order of how much is lost.
const (
	NoFault   Fault = iota
	BadCall         // the caller's mistake: nothing is wrong with the replica
	BadBlocks       // some blocks cannot be read or are damaged: Repair them
	NoSpace         // the file system is full: nothing is lost, room helps
	BadMedium       // the device fails: the replica should be given up
	Gone            // the device, or the file system, is not there any more
	Failed          // the replica is given up: a sync failed, or what it holds is damaged
)

func (f Fault) String() string {
	return [...]string{"no fault", "bad call", "bad blocks", "no space", "medium error", "device gone", "replica failed"}[f]
}

// Classify tells what an error means for the replica. That a device does not
// answer at all is no error and not seen here: see vfs.Watch and Store.GiveUp.
func (s *Store) Classify(err error) Fault {
	var bad *BlockError
	switch {
	case err == nil:
		return NoFault
	case gone(err):
		return Gone
	case s.Err() != nil, errors.Is(err, ErrCorrupt), errors.Is(err, ErrVersion):
		return Failed
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT), errors.Is(err, syscall.EFBIG):
		return NoSpace
	case errors.As(err, &bad):
		return BadBlocks
	case errors.Is(err, ErrState), errors.Is(err, ErrEncoding), errors.Is(err, syscall.EINVAL):
		return BadCall
	}
	return BadMedium
}

func gone(err error) bool {
	for _, e := range []error{syscall.ENXIO, syscall.ENODEV, syscall.ESHUTDOWN, syscall.ENOTCONN, syscall.ESTALE, syscall.EROFS, fs.ErrNotExist, fs.ErrClosed} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}
