package blockstore

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"slices"

	"perdure/internal/model"
	"perdure/internal/vfs"
)

// A journal record: header, EpochWrites in its encoding, padding, trailer. It
// begins and ends at multiples of recordAlign, so that writing one never
// touches a sector of another. All numbers are little-endian.
const (
	recordVersion = 1
	recordAlign   = 4096
	recordHead    = 64
	recordTail    = 16
)

var (
	recordMagic = [8]byte{'P', 'D', 'R', 'J', 'R', 'E', 'C', '\n'}
	recordDone  = [8]byte{'P', 'D', 'R', 'D', 'O', 'N', 'E', '\n'}
)

// recordHeader is what a record says about itself.
type recordHeader struct {
	incarnation uint64 // must be that of the metadata
	seq         uint64 // grows by one with each record
	term        model.Term
	epoch       model.Epoch
	length      int64 // of the payload
	sum         uint32
	key         uint32 // of the disk it belongs to
}

// total is the length of the record on disk for a payload of n bytes.
func recordTotal(n int64) int64 {
	return (recordHead + n + recordTail + recordAlign - 1) / recordAlign * recordAlign
}

// journalKey ties records to a disk, so that a file put in the wrong place is not replayed.
func journalKey(m Meta) uint32 {
	return crc32.Checksum([]byte(m.VM+"\x00"+m.Disk), castagnoli)
}

// appendRecord builds a record for w in dst[:0].
func appendRecord(dst []byte, h recordHeader, w *EpochWrites) []byte {
	dst = slices.Grow(dst[:0], int(recordTotal(int64(w.EncodedLen()))))
	dst = w.AppendTo(dst[:recordHead])
	payload := dst[recordHead:]
	h.length, h.sum = int64(len(payload)), crc32.Checksum(payload, castagnoli)
	n := len(dst)
	dst = dst[:recordTotal(h.length)]
	clear(dst[n:])

	le, b := binary.LittleEndian, dst[:recordHead]
	copy(b, recordMagic[:])
	le.PutUint16(b[8:], recordVersion)
	le.PutUint16(b[10:], recordHead)
	le.PutUint32(b[12:], h.sum)
	le.PutUint64(b[16:], h.incarnation)
	le.PutUint64(b[24:], h.seq)
	le.PutUint64(b[32:], uint64(h.term))
	le.PutUint64(b[40:], uint64(h.epoch))
	le.PutUint64(b[48:], uint64(h.length))
	le.PutUint32(b[56:], h.key)
	le.PutUint32(b[60:], crc32.Checksum(b[:60], castagnoli))
	t := dst[len(dst)-recordTail:]
	copy(t, recordDone[:])
	le.PutUint64(t[8:], h.seq)
	return dst
}

// errTorn says that there is no complete record here.
var errTorn = errors.New("no complete record")

// decodeHeader reads a record's header.
func decodeHeader(b []byte) (recordHeader, error) {
	le := binary.LittleEndian
	var h recordHeader
	if len(b) < recordHead || [8]byte(b[:8]) != recordMagic || le.Uint32(b[60:]) != crc32.Checksum(b[:60], castagnoli) {
		return h, errTorn
	}
	if v := le.Uint16(b[8:]); v != recordVersion {
		return h, fmt.Errorf("journal record version %d, this release knows %d: %w", v, recordVersion, ErrVersion)
	}
	h = recordHeader{incarnation: le.Uint64(b[16:]), seq: le.Uint64(b[24:]), term: model.Term(le.Uint64(b[32:])),
		epoch: model.Epoch(le.Uint64(b[40:])), length: int64(le.Uint64(b[48:])), sum: le.Uint32(b[12:]), key: le.Uint32(b[56:])}
	if le.Uint16(b[10:]) != recordHead || h.length < 0 {
		return h, errTorn
	}
	return h, nil
}

// readHeader reads the header at off; errTorn at the end of the file too.
func readHeader(f vfs.File, off, size int64) (recordHeader, error) {
	if off+recordAlign > size {
		return recordHeader{}, errTorn
	}
	var b [recordHead]byte
	if _, err := f.ReadAt(b[:], off); err != nil {
		return recordHeader{}, err
	}
	h, err := decodeHeader(b[:])
	if err == nil && (h.length > size-off || off+recordTotal(h.length) > size) {
		err = errTorn
	}
	return h, err
}

// readRecord reads and checks the record at off, whose header is known.
func readRecord(f vfs.File, off int64, h recordHeader, diskSize int64) (*EpochWrites, error) {
	b := make([]byte, recordTotal(h.length))
	if _, err := f.ReadAt(b, off); err != nil {
		if errors.Is(err, io.EOF) {
			err = errTorn
		}
		return nil, err
	}
	t := b[len(b)-recordTail:]
	payload := b[recordHead : recordHead+h.length]
	if [8]byte(t[:8]) != recordDone || binary.LittleEndian.Uint64(t[8:]) != h.seq ||
		crc32.Checksum(payload, castagnoli) != h.sum {
		return nil, errTorn
	}
	w, err := Decode(payload, diskSize)
	if err != nil && !errors.Is(err, ErrVersion) {
		// The checksum holds, so this is what was written: no crash makes that.
		return nil, fmt.Errorf("journal record %d: %w: %w", h.seq, ErrCorrupt, err)
	}
	return w, err
}
