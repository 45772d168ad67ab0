// Package vfs is the seam between the block store and the file system: OS, the
// real one; Mem, one in memory that can crash and then loses what was not
// synced; and error injection on the latter.
//
// It offers exactly what internal/blockstore needs, with the durability rules
// of Linux spelled out:
//
//   - data written to a file is durable after File.Sync (fdatasync) returned nil;
//   - a name made, renamed or removed is durable after FS.SyncDir returned nil;
//   - after a failed Sync nothing is known about the data written since the last
//     good one, and syncing again proves nothing: the file must be given up.
//
// Concurrency: all methods may be called from several goroutines at once, as on
// the kernel's own files. Overlapping concurrent writes have no order unless the
// caller gives them one. Nothing is retried here and nothing is logged.
package vfs

import (
	"errors"
	"fmt"
	"path/filepath"
)

// ErrInUse says that another open file, of this process or another one, holds
// what OpenLocked asks for.
var ErrInUse = errors.New("in use")

// FS is a file system. Paths are those of the host.
type FS interface {
	// Open opens an existing file for reading and writing; fs.ErrNotExist if there is none.
	Open(path string) (File, error)
	// OpenLocked is Open for one user at a time: ErrInUse if another one has it. A
	// block device is refused as long as anybody (a mounted file system, LVM, device
	// mapper) claims it. The lock ends with Close, and with the process.
	OpenLocked(path string) (File, error)
	// OpenRead opens an existing file for reading only; changing it fails.
	OpenRead(path string) (File, error)
	// Create makes a new file with mode 0600; fs.ErrExist if there is one.
	Create(path string) (File, error)
	// Rename replaces newPath with oldPath, atomically.
	Rename(oldPath, newPath string) error
	// Remove deletes a file; fs.ErrNotExist if there is none.
	Remove(path string) error
	// Exists reports whether a path is there.
	Exists(path string) (bool, error)
	// SyncDir makes the names in a directory durable.
	SyncDir(path string) error
}

// File is an open file.
type File interface {
	// ReadAt fills p or returns an error; reading past the end is io.ErrUnexpectedEOF or io.EOF.
	ReadAt(p []byte, off int64) (int, error)
	// WriteAt writes all of p or returns an error; then any part of it may have been written.
	WriteAt(p []byte, off int64) (int, error)
	// Zero makes a range within the file read as zeroes. With punch the space is given back
	// where the file system can; without, it stays (or becomes) allocated.
	Zero(off, n int64, punch bool) error
	// Extent returns the length of the run at off that is all data or all hole, at most n.
	// Where the file system cannot tell, all is data.
	Extent(off, n int64) (length int64, hole bool, err error)
	// Size is the file's length in bytes.
	Size() (int64, error)
	// Truncate sets the file's length; new bytes read as zeroes.
	Truncate(size int64) error
	// Sync makes data and length durable.
	Sync() error
	// Close gives the file up; it makes nothing durable.
	Close() error
}

// Dropper is implemented by files whose content is cached by the system.
type Dropper interface {
	// Drop asks the system to forget what it has cached of a range and what is
	// written back already, so that it is read from the medium next.
	Drop(off, n int64) error
}

// Prefetcher is implemented by files whose content is cached by the system.
type Prefetcher interface {
	// Prefetch asks the system to read a range, and no more than that, before
	// somebody waits for it. Without it the system guesses, and where small reads
	// come at regular distances may read all that lies between.
	Prefetch(off, n int64) error
}

// ReplaceFile makes path hold exactly data, atomically and durably: after a
// crash the old content is there or the new one, and once it has returned nil,
// the new one. It uses path + ".tmp".
func ReplaceFile(fsys FS, path string, data []byte) error {
	tmp := path + ".tmp"
	if ok, err := fsys.Exists(tmp); err != nil {
		return fmt.Errorf("replace %s: %w", path, err)
	} else if ok {
		// Left over from a crash; it never was relied on.
		if err := fsys.Remove(tmp); err != nil {
			return fmt.Errorf("replace %s: %w", path, err)
		}
	}
	f, err := fsys.Create(tmp)
	if err != nil {
		return fmt.Errorf("replace %s: %w", path, err)
	}
	_, err = f.WriteAt(data, 0)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = fsys.Rename(tmp, path)
	}
	if err == nil {
		err = fsys.SyncDir(filepath.Dir(path))
	}
	if err != nil {
		return fmt.Errorf("replace %s: %w", path, err)
	}
	return nil
}
