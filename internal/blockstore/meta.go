package blockstore

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"path/filepath"

	"perdure/internal/model"
	"perdure/internal/replica"
	"perdure/internal/vfs"
)

// Errors that callers tell apart.
var (
	// ErrCorrupt says that a file of the replica is damaged beyond what a crash can do.
	ErrCorrupt = errors.New("replica is damaged")
	// ErrVersion says that a file was written by a newer release.
	ErrVersion = errors.New("format of a newer release")
	// ErrState says that a call is not allowed in the state the replica or volume is in.
	ErrState = errors.New("not allowed in this state")
)

// Meta is the durable description of a replica.
type Meta struct {
	VM      string // UUID of the VM; never changes
	Disk    string // disk id; never changes
	Size    int64  // bytes; never changes (for now)
	Image   string // path of the file or block device that is the image; empty: DIR/ID.raw. Never changes
	Device  bool   // Image is a block device. Never changes
	Term    model.Term
	Branch  model.BranchID
	Run     model.RunID
	State   model.ReplicaState
	Lineage replica.Lineage
	Clean   bool // the last user closed it properly; kept by Open and Close
}

// metaRecord is what a slot holds: Meta, and what journal and checksums need.
type metaRecord struct {
	Meta
	version     uint32 // as read; 1 until Replay or Discard
	seq         uint64 // of this slot; the higher one counts
	incarnation uint64 // journal records of another one are stale
	trimmed     uint64 // journal records up to here are durable in the image
	sums        bool   // block checksums are kept
	complete    bool   // a checksum of 0 means a block of zeroes, and not "unknown"

	// Of an image that lies elsewhere, see stamp.go.
	stampAt  int64    // where its stamp is, bytes
	stampID  [16]byte // its identity
	stampSeq uint64   // its number
}

// Layout of the metadata file: two slots of slotSize. The first slotUsed bytes of
// a slot are as in version 1, with a checksum of their own, so that a release
// that knows only that version sees a newer one, and not damage. All numbers are
// little-endian.
const (
	slotSize    = 4096
	slotUsed    = 512
	metaVersion = 2
	// placedVersion is that of a replica whose image lies elsewhere: a release that
	// does not know stamps must not open it.
	placedVersion = 3
	maxString     = 63   // bytes of vm, disk, branch and run
	maxImage      = 1022 // bytes of the image's path

	atLineage = slotUsed
	atImage   = atLineage + replica.EncodedSize
	atStamp   = atImage + 2 + maxImage

	flagSums     = 1 << 0
	flagComplete = 1 << 1
	flagDevice   = 1 << 2
	// flagBound says that the number of the slot is repeated behind all else. A checksum over
	// bytes that end with their own checksum does not depend on them, so that of the slot
	// alone would take a new beginning for the beginning of an old rest.
	flagBound = 1 << 3

	atBound = slotSize - 12
)

var (
	metaMagic  = [8]byte{'P', 'D', 'R', 'M', 'E', 'T', 'A', '\n'}
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
	stateCodes = []model.ReplicaState{"", model.UpToDate, model.Outdated, model.Inconsistent}
)

// validate refuses what a slot cannot hold.
func (m Meta) validate() error {
	if m.Size <= 0 || m.Size%BlockSize != 0 {
		return fmt.Errorf("disk size %d is not a positive multiple of %d", m.Size, BlockSize)
	}
	for _, s := range []string{m.VM, m.Disk, string(m.Branch), string(m.Run)} {
		if len(s) > maxString {
			return fmt.Errorf("%.80q is longer than %d bytes", s, maxString)
		}
	}
	if len(m.Image) > maxImage || m.Image != "" && !filepath.IsAbs(m.Image) {
		return fmt.Errorf("image %.80q is not an absolute path of at most %d bytes", m.Image, maxImage)
	}
	if stateCode(m.State) == 0 {
		return fmt.Errorf("unknown replica state %.40q", m.State)
	}
	return m.Lineage.Validate()
}

func stateCode(s model.ReplicaState) byte {
	for i, c := range stateCodes {
		if c == s {
			return byte(i)
		}
	}
	return 0
}

// encode returns the slot, in the version of m; m must be valid.
func (m metaRecord) encode() []byte {
	b := make([]byte, slotSize)
	copy(b, metaMagic[:])
	le := binary.LittleEndian
	le.PutUint32(b[8:], m.version)
	le.PutUint64(b[16:], m.seq)
	le.PutUint64(b[24:], uint64(m.Size))
	le.PutUint64(b[32:], uint64(m.Term))
	le.PutUint64(b[40:], m.incarnation)
	le.PutUint64(b[48:], m.trimmed)
	b[56] = stateCode(m.State)
	if m.Clean {
		b[57] = 1
	}
	if m.sums {
		b[58] |= flagSums
	}
	if m.complete {
		b[58] |= flagComplete
	}
	if m.Device {
		b[58] |= flagDevice
	}
	if m.version >= 2 {
		b[58] |= flagBound
	}
	for i, s := range []string{m.VM, m.Disk, string(m.Branch), string(m.Run)} {
		at := 64 + 64*i
		b[at] = byte(len(s))
		copy(b[at+1:at+64], s)
	}
	le.PutUint32(b[slotUsed-4:], crc32.Checksum(b[:slotUsed-4], castagnoli))
	if m.version < 2 {
		return b[:slotUsed]
	}
	m.Lineage.AppendTo(b[atLineage:atLineage])
	le.PutUint16(b[atImage:], uint16(len(m.Image)))
	copy(b[atImage+2:], m.Image)
	if m.version >= placedVersion {
		le.PutUint64(b[atStamp:], uint64(m.stampAt))
		le.PutUint64(b[atStamp+8:], m.stampSeq)
		copy(b[atStamp+16:], m.stampID[:])
	}
	le.PutUint64(b[atBound:], m.seq)
	le.PutUint32(b[slotSize-4:], crc32.Checksum(b[:slotSize-4], castagnoli))
	return b
}

// decodeSlot reads a slot. ErrCorrupt: it holds nothing, or was torn.
func decodeSlot(b []byte) (metaRecord, error) {
	le := binary.LittleEndian
	var m metaRecord
	if len(b) < slotUsed || [8]byte(b[:8]) != metaMagic ||
		le.Uint32(b[slotUsed-4:]) != crc32.Checksum(b[:slotUsed-4], castagnoli) {
		return m, ErrCorrupt
	}
	m.version = le.Uint32(b[8:])
	if m.version > placedVersion {
		return m, fmt.Errorf("metadata version %d, this release knows %d: %w", m.version, placedVersion, ErrVersion)
	}
	m.seq = le.Uint64(b[16:])
	m.Size = int64(le.Uint64(b[24:]))
	m.Term = model.Term(le.Uint64(b[32:]))
	m.incarnation = le.Uint64(b[40:])
	m.trimmed = le.Uint64(b[48:])
	if int(b[56]) >= len(stateCodes) {
		return m, ErrCorrupt
	}
	m.State = stateCodes[b[56]]
	m.Clean = b[57] == 1
	var s [4]string
	for i := range s {
		at := 64 + 64*i
		n := int(b[at])
		if n > maxString {
			return m, ErrCorrupt
		}
		s[i] = string(b[at+1 : at+1+n])
	}
	m.VM, m.Disk, m.Branch, m.Run = s[0], s[1], model.BranchID(s[2]), model.RunID(s[3])
	if m.version >= 2 && m.decodeRest(b) != nil || m.validate() != nil {
		return m, ErrCorrupt
	}
	return m, nil
}

// decodeRest reads what version 2 added.
func (m *metaRecord) decodeRest(b []byte) (err error) {
	le := binary.LittleEndian
	if len(b) < slotSize || le.Uint32(b[slotSize-4:]) != crc32.Checksum(b[:slotSize-4], castagnoli) {
		return ErrCorrupt // torn between the sectors
	}
	if b[58]&flagBound != 0 && le.Uint64(b[atBound:]) != m.seq {
		return ErrCorrupt // torn behind the first one
	}
	m.sums, m.complete = b[58]&flagSums != 0, b[58]&flagComplete != 0
	if m.Lineage, err = replica.DecodeLineage(b[atLineage:]); err != nil {
		return err
	}
	n := int(le.Uint16(b[atImage:]))
	if n > maxImage {
		return ErrCorrupt
	}
	m.Image = string(b[atImage+2:][:n])
	if m.version >= placedVersion {
		m.Device = b[58]&flagDevice != 0
		m.stampAt, m.stampSeq = int64(le.Uint64(b[atStamp:])), le.Uint64(b[atStamp+8:])
		copy(m.stampID[:], b[atStamp+16:])
		if m.Image == "" || m.stampAt < m.Size {
			return ErrCorrupt
		}
	}
	return nil
}

// readMeta returns the newer valid slot.
func readMeta(f vfs.File) (metaRecord, error) {
	var best metaRecord
	size, err := f.Size()
	if err != nil {
		return best, err
	}
	for i := range int64(2) {
		if size < i*slotSize+slotUsed {
			continue
		}
		b := make([]byte, min(slotSize, size-i*slotSize))
		if _, err := f.ReadAt(b, i*slotSize); err != nil {
			return best, err
		}
		m, err := decodeSlot(b)
		if errors.Is(err, ErrVersion) {
			return best, err
		}
		if err == nil && m.seq > best.seq {
			best = m
		}
	}
	if best.seq == 0 {
		return best, fmt.Errorf("no valid slot: %w", ErrCorrupt)
	}
	return best, nil
}

// writeMeta overwrites the slot that is not the newest and makes it durable.
func writeMeta(f vfs.File, m metaRecord) error {
	if _, err := f.WriteAt(m.encode(), int64(m.seq%2)*slotSize); err != nil {
		return err
	}
	return f.Sync()
}
