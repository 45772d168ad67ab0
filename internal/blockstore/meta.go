package blockstore

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"perdure/internal/model"
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
	VM     string // UUID of the VM; never changes
	Disk   string // disk id; never changes
	Size   int64  // bytes; never changes (for now)
	Term   model.Term
	Branch model.BranchID
	Run    model.RunID
	State  model.ReplicaState
	Clean  bool // the last user closed it properly; kept by Open and Close
}

// metaRecord is what a slot holds: Meta, and what the journal needs.
type metaRecord struct {
	Meta
	seq         uint64 // of this slot; the higher one counts
	incarnation uint64 // journal records of another one are stale
	trimmed     uint64 // journal records up to here are durable in the image
}

// Layout of the metadata file: two slots of slotSize, the first slotUsed bytes
// of each in use, so that a slot is one sector and its write is not torn by
// disks that keep their promise. All numbers are little-endian.
const (
	slotSize    = 4096
	slotUsed    = 512
	metaVersion = 1
	maxString   = 63 // bytes of vm, disk, branch and run
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
	if stateCode(m.State) == 0 {
		return fmt.Errorf("unknown replica state %.40q", m.State)
	}
	return nil
}

func stateCode(s model.ReplicaState) byte {
	for i, c := range stateCodes {
		if c == s {
			return byte(i)
		}
	}
	return 0
}

// encode returns the slot; m must be valid.
func (m metaRecord) encode() []byte {
	b := make([]byte, slotUsed)
	copy(b, metaMagic[:])
	le := binary.LittleEndian
	le.PutUint32(b[8:], metaVersion)
	le.PutUint64(b[16:], m.seq)
	le.PutUint64(b[24:], uint64(m.Size))
	le.PutUint64(b[32:], uint64(m.Term))
	le.PutUint64(b[40:], m.incarnation)
	le.PutUint64(b[48:], m.trimmed)
	b[56] = stateCode(m.State)
	if m.Clean {
		b[57] = 1
	}
	for i, s := range []string{m.VM, m.Disk, string(m.Branch), string(m.Run)} {
		at := 64 + 64*i
		b[at] = byte(len(s))
		copy(b[at+1:at+64], s)
	}
	le.PutUint32(b[slotUsed-4:], crc32.Checksum(b[:slotUsed-4], castagnoli))
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
	if v := le.Uint32(b[8:]); v != metaVersion {
		return m, fmt.Errorf("metadata version %d, this release knows %d: %w", v, metaVersion, ErrVersion)
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
	if m.validate() != nil {
		return m, ErrCorrupt
	}
	return m, nil
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
		b := make([]byte, slotUsed)
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
