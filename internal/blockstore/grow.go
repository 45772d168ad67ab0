package blockstore

import (
	"errors"
	"fmt"

	"perdure/internal/vfs"
)

// Grow makes a replica that nobody has open larger; what is added reads as zeroes.
// Durable on return. The metadata are written last and hold the size that counts:
// a crash before leaves the old size, with files that are longer than it needs.
// A smaller size is refused, the same one is no error.
func Grow(fsys vfs.FS, dir, id string, size int64) (err error) {
	at := paths(dir, id)
	f, err := fsys.OpenLocked(at.meta)
	if err == nil {
		defer func() { err = errors.Join(err, f.Close()) }()
		err = grow(fsys, at, f, id, size)
	}
	if err != nil {
		return fmt.Errorf("make replica of %s larger: %w", id, err)
	}
	return nil
}

func grow(fsys vfs.FS, at files, f vfs.File, id string, size int64) error {
	m, err := readMeta(f)
	switch {
	case err != nil:
		return err
	case m.Disk != id:
		return fmt.Errorf("metadata of disk %.64q: %w", m.Disk, ErrCorrupt)
	case m.version < metaVersion:
		return fmt.Errorf("it is of an earlier release and was not opened since: %w", ErrState)
	case size == m.Size:
		return nil
	case size < m.Size:
		return fmt.Errorf("it has %d bytes, %d would lose data: %w", m.Size, size, ErrState)
	}
	next := m
	next.Size = size
	if err := next.validate(); err != nil {
		return err
	}
	if m.Image != "" {
		if m, err = moveStamp(fsys, f, m, size); err != nil {
			return err
		}
		next = m
		next.Size = size
	}
	if err := growImage(fsys, at, m, size); err != nil {
		return err
	}
	// Zero pages of the bitmap say "nothing is missing", zero checksums "a block of
	// zeroes" where all are known, and "unknown" else.
	if err := change(fsys, at.bits, func(b vfs.File) error { return growMissing(b, m.Size, size) }); err != nil {
		return err
	}
	if m.sums {
		if err := change(fsys, at.sums, func(s vfs.File) error { return createSums(s, size) }); err != nil {
			return err
		}
	}
	next.seq++
	return writeMeta(f, next)
}

// growImage makes room for size bytes. What a block device holds there is not ours.
func growImage(fsys vfs.FS, at files, m metaRecord, size int64) error {
	path := at.raw
	if m.Image != "" {
		path = m.Image
	}
	raw, err := fsys.OpenLocked(path)
	if err != nil {
		return err
	}
	n, err := raw.Size()
	if err == nil && n < size {
		err = raw.Truncate(size) // of an image elsewhere moveStamp has made it long enough
	}
	// What lies beyond the old size is of an attempt that broke off, or of the device's past.
	for off := m.Size; err == nil && off < min(n, size); off += wipeStep {
		err = raw.Zero(off, min(wipeStep, min(n, size)-off), true)
	}
	if err == nil {
		err = raw.Sync()
	}
	return errors.Join(err, raw.Close())
}

// growMissing adds the pages of a larger disk, all written, so that later no write needs space.
func growMissing(f vfs.File, from, to int64) error {
	zero := make([]byte, 2*bitsPage)
	for p := bitsPages(from); p < bitsPages(to); p++ {
		if _, err := f.WriteAt(zero, p*2*bitsPage); err != nil {
			return err
		}
	}
	return f.Sync()
}

// change opens a file and closes it again.
func change(fsys vfs.FS, path string, do func(vfs.File) error) error {
	f, err := fsys.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(do(f), f.Close())
}

// moveStamp makes room in an image elsewhere and moves its stamp behind the new end,
// where it is before the old place is given to the disk. It returns the metadata, durable, that say so.
func moveStamp(fsys vfs.FS, f vfs.File, m metaRecord, size int64) (_ metaRecord, err error) {
	raw, err := fsys.OpenLocked(m.Image)
	if err != nil {
		return m, missingImage(m.Image, err)
	}
	defer func() { err = errors.Join(err, raw.Close()) }()
	t, err := m.fits(raw)
	if err != nil || m.stampAt >= size {
		return m, err
	}
	n, err := raw.Size()
	if err != nil {
		return m, err
	}
	to := size
	if m.Device {
		if to = stampPlace(n); to < size {
			return m, fmt.Errorf("%s has %d bytes, the disk is to have %d and its stamp %d", m.Image, n, size, StampSize)
		}
	} else if err := raw.Truncate(max(n, size+StampSize)); err != nil {
		return m, err
	}
	t.seq++
	if err := raw.Zero(to, StampSize, false); err != nil {
		return m, err
	}
	if err := writeStamp(raw, to, t); err != nil {
		return m, err
	}
	m.stampAt, m.stampSeq, m.seq = to, t.seq, m.seq+1
	return m, writeMeta(f, m)
}
