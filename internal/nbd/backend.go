package nbd

import (
	"context"
	"errors"
	"syscall"
)

// Backend is one disk. All methods may be called concurrently. Offsets and
// lengths are in bytes, multiples of MinBlock, within Size and not empty. The
// context ends when the server is stopped and its grace is over, and when the
// connection is cut off (Options.Cut), not when the client goes away. A buffer passed in must not be kept after the method has
// returned.
type Backend interface {
	// Size is the length of the disk; it must not change while it is served.
	Size() int64
	// ReadAt fills p.
	ReadAt(ctx context.Context, p []byte, off int64) error
	// WriteAt writes all of p; with fua it is durable when WriteAt returns nil.
	WriteAt(ctx context.Context, p []byte, off int64, fua bool) error
	// Zero makes the range read as zeroes; punch allows to give the space back.
	Zero(ctx context.Context, off, n int64, fua, punch bool) error
	// Flush makes every write durable that had returned before Flush was called.
	Flush(ctx context.Context) error
}

// Allocator is implemented by a Backend that can tell holes from data; it is
// then offered as the metadata context base:allocation.
type Allocator interface {
	// Extent returns the length, 1 … n, of the run at off that is all hole (reads as
	// zeroes) or all data.
	Extent(ctx context.Context, off, n int64) (length int64, hole bool, err error)
}

// FastZeroer is implemented by a Backend that knows when zeroing is cheap;
// clients may then ask for zeroes on the condition that they are.
type FastZeroer interface {
	// FastZero reports whether Zero with the same arguments would be quicker than
	// writing the range. It does not block, and may say no whenever it is not sure.
	FastZero(off, n int64, punch bool) bool
}

// Waiter is implemented by a Backend whose requests may have to wait for more
// than this host's memory, page cache or disk, for a peer say. While Waits is
// true the server carries all requests out side by side; otherwise it finds out
// by itself where that is worth it.
type Waiter interface {
	// Waits is called for each request, and must not block.
	Waits() bool
}

// Cacher is implemented by a Backend that can use the hint that a range will be
// read soon. Without it the hint is acknowledged and has no effect.
type Cacher interface {
	Cache(ctx context.Context, off, n int64) error
}

// errnoOf maps an error of a backend to what the protocol knows. ENOTSUP is
// only for zeroes that would not be fast, so a backend's own becomes EINVAL.
func errnoOf(err error) uint32 {
	switch {
	case err == nil:
		return 0
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT), errors.Is(err, syscall.EFBIG):
		return errNoSpace
	case errors.Is(err, syscall.EPERM), errors.Is(err, syscall.EROFS), errors.Is(err, syscall.EACCES):
		return errPerm
	case errors.Is(err, syscall.ENOMEM):
		return errNoMem
	case errors.Is(err, syscall.EINVAL), errors.Is(err, syscall.ENOTSUP), errors.Is(err, syscall.EOPNOTSUPP):
		return errInvalid
	case errors.Is(err, context.Canceled), errors.Is(err, syscall.ESHUTDOWN):
		return errShutdown
	default:
		return errIO
	}
}
