package vfs

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// OS is the file system of the kernel. Its files may be block devices too, as
// far as the kernel lets them be zeroed and asked for holes.
type OS struct{}

var _ FS = OS{}

// smallZero is up to how many bytes zeroes are written instead of asked for:
// below it changing the allocation costs more than the data.
const smallZero = 64 << 10

// Open implements FS.
func (OS) Open(path string) (File, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	return osFile{f}, nil
}

// OpenLocked implements FS. A block device is claimed exclusively in the kernel, a
// file is locked with flock, which QEMU's tools, using other locks, do not mind.
func (OS) OpenLocked(path string) (File, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	flags := os.O_RDWR
	if isDevice(st) {
		flags |= os.O_EXCL
	}
	f, err := os.OpenFile(path, flags, 0)
	if errors.Is(err, unix.EBUSY) {
		return nil, fmt.Errorf("open %s: the block device is mounted or claimed by something else: %w", path, ErrInUse)
	} else if err != nil {
		return nil, err
	}
	o := osFile{f}
	err = o.control("lock", func(fd int) error { return unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) })
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = fmt.Errorf("open %s: another process has it open: %w", path, ErrInUse)
	}
	if err != nil {
		_ = f.Close() // the error that matters is err
		return nil, err
	}
	return o, nil
}

// OpenRead implements FS.
func (OS) OpenRead(path string) (File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	return osFile{f}, nil
}

// Create implements FS.
func (OS) Create(path string) (File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	return osFile{f}, nil
}

// Rename implements FS.
func (OS) Rename(oldPath, newPath string) error { return os.Rename(oldPath, newPath) }

// Remove implements FS.
func (OS) Remove(path string) error { return os.Remove(path) }

// Exists implements FS.
func (OS) Exists(path string) (bool, error) {
	_, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// SyncDir implements FS.
func (OS) SyncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	err = d.Sync()
	if cerr := d.Close(); err == nil {
		err = cerr
	}
	return err
}

// osFile is a file of the kernel. Only calls with an explicit offset are used,
// so the file position, which Extent moves, means nothing.
type osFile struct{ f *os.File }

func (o osFile) ReadAt(p []byte, off int64) (int, error)  { return o.f.ReadAt(p, off) }
func (o osFile) WriteAt(p []byte, off int64) (int, error) { return o.f.WriteAt(p, off) }
func (o osFile) Truncate(size int64) error                { return o.f.Truncate(size) }
func (o osFile) Close() error                             { return o.f.Close() }

// control runs fn on the descriptor, which stays open meanwhile.
func (o osFile) control(what string, fn func(fd int) error) error {
	rc, err := o.f.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	if err := rc.Control(func(fd uintptr) {
		for {
			if inner = fn(int(fd)); !errors.Is(inner, unix.EINTR) {
				return
			}
		}
	}); err != nil {
		return err
	}
	if inner != nil {
		return fmt.Errorf("%s %s: %w", what, o.f.Name(), inner)
	}
	return nil
}

func (o osFile) Sync() error {
	// A failed fdatasync must not be repeated (the second one succeeds although data
	// is lost), but one that was interrupted before it began may; EINTR says so.
	return o.control("sync", unix.Fdatasync)
}

func (o osFile) Zero(off, n int64, punch bool) error {
	if !punch && n <= smallZero {
		return o.writeZeroes(off, n)
	}
	mode := uint32(unix.FALLOC_FL_ZERO_RANGE | unix.FALLOC_FL_KEEP_SIZE)
	if punch {
		mode = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
	}
	err := o.control("zero", func(fd int) error { return unix.Fallocate(fd, mode, off, n) })
	// EINVAL: a block device whose sectors are larger than the range's alignment.
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EINVAL) {
		return o.writeZeroes(off, n)
	}
	return err
}

func (o osFile) writeZeroes(off, n int64) error {
	for n > 0 {
		k := min(n, int64(len(zeroes)))
		if _, err := o.f.WriteAt(zeroes[:k], off); err != nil {
			return err
		}
		off, n = off+k, n-k
	}
	return nil
}

// zeroes is never written to.
var zeroes = make([]byte, 256<<10)

func (o osFile) Extent(off, n int64) (length int64, hole bool, err error) {
	err = o.control("seek data", func(fd int) error {
		at, err := unix.Seek(fd, off, unix.SEEK_DATA)
		switch {
		case errors.Is(err, unix.ENXIO): // no data behind off
			length, hole = n, true
			return nil
		case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP):
			length, hole = n, false
			return nil
		case err != nil:
			return err
		case at > off:
			length, hole = min(n, at-off), true
			return nil
		}
		end, err := unix.Seek(fd, off, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		length, hole = min(n, max(end-off, 1)), false
		return nil
	})
	return length, hole, err
}

func (o osFile) Size() (int64, error) {
	var size int64
	err := o.control("size of", func(fd int) (err error) {
		// SEEK_END knows the size of block devices too; stat does not.
		size, err = unix.Seek(fd, 0, unix.SEEK_END)
		return err
	})
	return size, err
}

// Drop implements Dropper.
func (o osFile) Drop(off, n int64) error {
	return o.control("drop cache of", func(fd int) error { return unix.Fadvise(fd, off, n, unix.FADV_DONTNEED) })
}

// IsDevice reports whether a path leads to a block device; false for one that is not there.
func (OS) IsDevice(path string) (bool, error) {
	st, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil && isDevice(st), err
}

func isDevice(st fs.FileInfo) bool {
	return st.Mode()&(fs.ModeDevice|fs.ModeCharDevice) == fs.ModeDevice
}

// Prefetch implements Prefetcher.
func (o osFile) Prefetch(off, n int64) error {
	return o.control("prefetch", func(fd int) error { return unix.Fadvise(fd, off, n, unix.FADV_WILLNEED) })
}
