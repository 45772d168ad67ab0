package blockstore

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"path/filepath"

	"perdure/internal/vfs"
)

// An image that lies elsewhere than the other files of its replica, at a path that
// somebody gave, may be exchanged for another one while nobody looks: a device is swapped,
// a file system is not mounted or set back to a snapshot, a backup is copied over it. The metadata
// would then call data good that are not there. So such an image carries a stamp behind
// the disk's last byte: whose it is, a random identity, and a number that grows each time the
// replica is opened for writing and each time it is closed in order. The metadata hold identity and number; Open
// refuses what does not fit (ErrImage).
//
// Order: the stamp is durable before the metadata say its number, so that a crash
// between leaves a stamp that is one ahead. It has two slots, written in turn.

// StampSize is how many bytes an image elsewhere needs behind the disk's own.
const StampSize = 2 * stampSlot

const (
	stampSlot    = 4096
	stampUsed    = 512
	stampVersion = 1
)

var stampMagic = [8]byte{'P', 'D', 'R', 'S', 'T', 'M', 'P', '\n'}

// ErrImage says that what is at the path of an image is not the image of the replica,
// or not as the replica left it: nothing in it may be believed.
var ErrImage = errors.New("not the image of this replica")

// Stamp says whose an image is that lies elsewhere than the other files of its replica.
type Stamp struct {
	VM   string // UUID of the VM
	Disk string // id
	Host string // name of the host
}

// stamp is what a slot holds.
type stamp struct {
	Stamp
	id  [16]byte // of this replica, random
	seq uint64   // from 1
}

func newStampID() (id [16]byte) {
	rand.Read(id[:]) // never fails
	return id
}

func (t stamp) encode() []byte {
	b := make([]byte, stampSlot)
	copy(b, stampMagic[:])
	le := binary.LittleEndian
	le.PutUint32(b[8:], stampVersion)
	le.PutUint64(b[16:], t.seq)
	copy(b[24:40], t.id[:])
	for i, s := range []string{t.VM, t.Disk, t.Host} {
		at := 64 + 64*i
		b[at] = byte(len(s))
		copy(b[at+1:at+64], s)
	}
	le.PutUint32(b[stampUsed-4:], crc32.Checksum(b[:stampUsed-4], castagnoli))
	return b
}

func decodeStamp(b []byte) (t stamp, err error) {
	le := binary.LittleEndian
	if len(b) < stampUsed || [8]byte(b[:8]) != stampMagic || le.Uint32(b[stampUsed-4:]) != crc32.Checksum(b[:stampUsed-4], castagnoli) {
		return t, ErrCorrupt
	}
	if v := le.Uint32(b[8:]); v > stampVersion {
		return t, fmt.Errorf("stamp version %d, this release knows %d: %w", v, stampVersion, ErrVersion)
	}
	t.seq = le.Uint64(b[16:])
	copy(t.id[:], b[24:40])
	for i, s := range []*string{&t.VM, &t.Disk, &t.Host} {
		at := 64 + 64*i
		n := int(b[at])
		if n > maxString {
			return t, ErrCorrupt
		}
		*s = string(b[at+1 : at+1+n])
	}
	return t, nil
}

// readStamp returns the newer stamp at an offset; false: there is none.
func readStamp(f vfs.File, at int64) (best stamp, ok bool, err error) {
	size, err := f.Size()
	if err != nil || at < 0 || size < at+StampSize {
		return best, false, err
	}
	b := make([]byte, StampSize)
	if _, err := f.ReadAt(b, at); err != nil {
		return best, false, err
	}
	for i := range 2 {
		t, err := decodeStamp(b[i*stampSlot:][:stampSlot])
		if errors.Is(err, ErrVersion) {
			return best, false, err
		}
		if err == nil && t.seq > best.seq {
			best, ok = t, true
		}
	}
	return best, ok, nil
}

// writeStamp writes the slot that is not the newest, durably.
func writeStamp(f vfs.File, at int64, t stamp) error {
	if _, err := f.WriteAt(t.encode(), at+int64(t.seq%2)*stampSlot); err != nil {
		return fmt.Errorf("write stamp: %w", err)
	}
	return f.Sync()
}

// stampPlace is where the stamp of an image of that many bytes lies, as Create and Grow choose it.
func stampPlace(size int64) int64 { return (size - StampSize) / stampSlot * stampSlot }

// ProbeStamp looks at the end of a file or device for the stamp of a replica; false: there is none.
// ErrVersion: one of a newer release.
func ProbeStamp(fsys vfs.FS, path string) (s Stamp, ok bool, err error) {
	f, err := fsys.OpenRead(path)
	if err != nil {
		return s, false, err
	}
	defer func() { _ = f.Close() }() // only read
	n, err := f.Size()
	if err != nil {
		return s, false, err
	}
	t, ok, err := readStamp(f, stampPlace(n))
	return t.Stamp, ok, err
}

// fits says why a stamp is not the one that the metadata name, or nil.
func (m metaRecord) fits(f vfs.File) (stamp, error) {
	wrong := func(f string, args ...any) error {
		return fmt.Errorf("%s %s: %w", m.Image, fmt.Sprintf(f, args...), ErrImage)
	}
	if m.version < placedVersion {
		return stamp{}, wrong("has nothing by which it could be told")
	}
	t, ok, err := readStamp(f, m.stampAt)
	switch {
	case err != nil:
		return t, err
	case !ok:
		return t, wrong("does not carry the stamp of this replica: another device or file is there, or it was written over")
	case t.VM != m.VM || t.Disk != m.Disk:
		return t, wrong("carries the stamp of disk %q of the VM %s", t.Disk, t.VM)
	case !bytes.Equal(t.id[:], m.stampID[:]):
		return t, wrong("carries the stamp of another replica of this disk (host %s)", t.Host)
	case t.seq < m.stampSeq:
		return t, wrong("is older than the metadata (stamp %d, %d expected): it was set back to a copy or snapshot", t.seq, m.stampSeq)
	case t.seq > m.stampSeq+1:
		return t, wrong("is newer than the metadata (stamp %d, %d expected): the metadata were set back to a copy", t.seq, m.stampSeq)
	}
	return t, nil
}

// missingImage makes an image that is not there a wrong one: the metadata say nothing of
// what may come to lie at its path.
func missingImage(path string, err error) error {
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return fmt.Errorf("%s is not there (is its file system mounted, its device attached?): %w: %w", path, ErrImage, err)
}

// CheckImage compares the image of a replica, where it lies elsewhere, with the
// metadata. It takes no lock and changes nothing; of a replica in use it may be a
// moment old, which is no error. ErrImage, ErrVersion, or what kept it from looking.
func CheckImage(fsys vfs.FS, dir, id string) error {
	m, err := metaOf(fsys, dir, id)
	if err == nil && m.Image != "" {
		err = m.checkImage(fsys)
	}
	if err != nil {
		return fmt.Errorf("look at the image of %s: %w", id, err)
	}
	return nil
}

func metaOf(fsys vfs.FS, dir, id string) (m metaRecord, err error) {
	f, err := fsys.OpenRead(paths(dir, id).meta)
	if err != nil {
		return m, err
	}
	m, err = readMeta(f)
	_ = f.Close() // only read
	return m, err
}

func (m metaRecord) checkImage(fsys vfs.FS) error {
	f, err := fsys.OpenRead(m.Image)
	if err != nil {
		return missingImage(m.Image, err)
	}
	defer func() { _ = f.Close() }() // only read
	_, err = m.fits(f)
	return err
}

// bumpStamp gives the image the next number, durably, where it lies elsewhere; the metadata
// are to say the same number with their next change.
func (s *Store) bumpStamp() error {
	s.metaMu.Lock()
	m, t := s.meta, s.stamp
	s.metaMu.Unlock()
	if m.Image == "" {
		return nil
	}
	t.seq++
	s.point("stamp.write")
	if err := writeStamp(s.raw, m.stampAt, t); err != nil {
		return s.fail("write of the stamp", err)
	}
	s.metaMu.Lock()
	s.stamp = t
	s.metaMu.Unlock()
	s.point("stamp.written")
	return nil
}

// placeImage makes an image elsewhere, and stamps it. It returns where the stamp is, and
// whether the file was made.
func placeImage(fsys vfs.FS, p Params, t stamp) (at int64, made bool, err error) {
	if ok, err := fsys.Exists(p.Image); err != nil {
		return 0, false, err
	} else if !ok {
		if p.Device || p.Adopt {
			return 0, false, fmt.Errorf("open %s: %w", p.Image, fs.ErrNotExist)
		}
		f, err := fsys.Create(p.Image)
		if err != nil {
			return 0, false, err
		}
		if err := f.Close(); err != nil {
			return 0, false, err
		}
		made = true
	}
	at, err = stampImage(fsys, p, t)
	if err != nil {
		if made {
			_ = fsys.Remove(p.Image) // the error that matters is err
		}
		return 0, false, err
	}
	if !p.Device {
		err = fsys.SyncDir(filepath.Dir(p.Image))
	}
	return at, made, err
}

// stampImage makes room in an image and stamps it.
func stampImage(fsys vfs.FS, p Params, t stamp) (at int64, err error) {
	f, err := fsys.OpenLocked(p.Image)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if p.Device {
		at, err = fitDevice(f, p)
	} else {
		at, err = fitFile(f, p)
	}
	if err != nil {
		return 0, err
	}
	// What is left of an earlier stamp must not seem newer.
	if err := f.Zero(at, StampSize, false); err != nil {
		return 0, err
	}
	return at, writeStamp(f, at, t)
}

func fitDevice(f vfs.File, p Params) (at int64, err error) {
	n, err := f.Size()
	if err != nil {
		return 0, err
	}
	if at = stampPlace(n); at < p.Size {
		return 0, fmt.Errorf("%s has %d bytes, the disk %d and its stamp %d", p.Image, n, p.Size, StampSize)
	}
	if p.zeroed() {
		for off := int64(0); off < p.Size; off += wipeStep {
			if err := f.Zero(off, min(wipeStep, p.Size-off), true); err != nil {
				return 0, err
			}
		}
	}
	return at, nil
}

func fitFile(f vfs.File, p Params) (at int64, err error) {
	n, err := f.Size()
	if err != nil {
		return 0, err
	}
	if p.Adopt && n > p.Size {
		return 0, fmt.Errorf("image of %d bytes is larger than the disk of %d", n, p.Size)
	}
	if !p.Adopt && n > 0 {
		if err := f.Truncate(0); err != nil {
			return 0, err
		}
	}
	return p.Size, f.Truncate(p.Size + StampSize)
}

// dropImage ends the life of an image elsewhere as this replica's: its stamp goes,
// and unless keep says otherwise a file too. A file that is kept is as long as the disk, as
// raw images are. An image that cannot be reached, is in use or is not this replica's
// is left alone.
func dropImage(fsys vfs.FS, m metaRecord, keep bool) error {
	f, err := fsys.OpenLocked(m.Image)
	if err != nil {
		return fmt.Errorf("%s is left as it is: %w", m.Image, err)
	}
	_, err = m.fits(f)
	if err == nil {
		if err = f.Zero(m.stampAt, StampSize, false); err == nil {
			err = f.Sync()
		}
	}
	if err == nil && keep && !m.Device {
		if err = f.Truncate(m.Size); err == nil {
			err = f.Sync()
		}
	}
	err = errors.Join(err, f.Close())
	if err == nil && !keep && !m.Device {
		if err = fsys.Remove(m.Image); err == nil {
			err = fsys.SyncDir(filepath.Dir(m.Image))
		}
	}
	if err != nil {
		return fmt.Errorf("%s is left as it is: %w", m.Image, err)
	}
	return nil
}
