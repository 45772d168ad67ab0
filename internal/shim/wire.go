package shim

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"time"

	"github.com/klauspost/compress/s2"

	"perdure/internal/model"
)

// wireVersion is the version of what shims say to each other; a shim speaks
// with the version before its own as well (docs/peer-protocol.md).
const wireVersion = 1

// Kinds of ordered messages, primary to secondary unless said.
const (
	kindSyncPages    uint8 = 1 + iota // pages of the full copy: one frame of guestmem
	kindSyncDisk                      // disk blocks of the full copy
	kindEpochBegin                    // beginHeader
	kindEpochPages                    // one frame of guestmem
	kindEpochDisk                     // disk index, encoded writes
	kindEpochFrames                   // NIC index, frames that the secondary releases (switchover)
	kindEpochDevices                  // endHeader, device state, console output, audit
	kindEpochEnd                      // endTally
	kindSynced                        // secondary to primary: full, as of an epoch
	kindSyncFlush                     // make the copy so far durable
	kindSyncFlushed                   // secondary to primary: it is
	kindHandOver                      // switchover: the secondary may claim
	kindInput                         // inputHead, frames that the guest got and may have to get again
	kindDiskWord                      // either way: diskWord
	kindDiskMarks                     // secondary to primary: marksHead, words of a bitmap
	kindDiskSums                      // sumsHead, digests of chunks
	kindDiskDiffer                    // secondary to primary: sumsHead, one byte per chunk, 1: differs
	_                                 // these two were reports of what is durable
	_                                 // and are urgent now
)

// Kinds of urgent messages: small, sent on every link, may come twice or out of order.
const (
	urgentBeat    uint8 = 1 + iota // beat, primary to secondary
	urgentAck                      // beat, secondary to primary: answers a beat or a complete epoch
	urgentDead                     // run whose guest or memory is gone for sure
	urgentTerm                     // term that the sender has read in the record
	urgentAlarm                    // text: the sender found that the pair is not sound
	urgentDurable                  // either way: by disk, the epoch up to which all is durable (u64 each)
	urgentWant                     // either way: make durable what you have, and report
)

// hello opens every session; each side judges the other's.
type hello struct {
	Version int          `json:"version"`
	VM      string       `json:"vm"`
	UUID    string       `json:"uuid"`
	Host    string       `json:"host"`
	Run     model.RunID  `json:"run"`      // whose memory the sender holds
	NextRun model.RunID  `json:"next_run"` // a standby: what it will be called once it is full
	First   model.Epoch  `json:"first"`    // a primary: number of the first epoch to come
	Term    model.Term   `json:"term"`
	Mode    model.Mode   `json:"mode"`
	Machine string       `json:"machine"` // digest of the machine that the guest sees
	QEMU    string       `json:"qemu"`
	Branch  string       `json:"branch,omitempty"`
	Spec    model.VMSpec `json:"spec"`
	Scrub   int          `json:"scrub,omitempty"`  // scrubVersion, where the sender answers those messages
	Resync  int          `json:"resync,omitempty"` // resyncVersion, likewise
	Disks   []diskHello  `json:"disks"`            // the sender's copies, in the order of the specification
}

func (h hello) encode() []byte {
	b, err := json.Marshal(h)
	if err != nil {
		panic("encode hello: " + err.Error()) // plain values always encode
	}
	return b
}

func decodeHello(b []byte) (hello, error) {
	var h hello
	if err := json.Unmarshal(b, &h); err != nil {
		return h, fmt.Errorf("decode hello: %w", err)
	}
	if h.Version != wireVersion {
		return h, fmt.Errorf("decode hello of host %q: protocol version %d, want %d", h.Host, h.Version, wireVersion)
	}
	return h, nil
}

// runBytes is a RunID on the wire.
type runBytes [16]byte

func packRun(r model.RunID) (b runBytes) {
	// What is no run id packs to what equals none: whoever gets it refuses it.
	if n, err := hex.Decode(b[:], []byte(r)); err != nil || n != len(b) {
		return runBytes{}
	}
	return b
}

func (b runBytes) id() model.RunID {
	if b == (runBytes{}) {
		return ""
	}
	return model.RunID(hex.EncodeToString(b[:]))
}

// beat is a heartbeat of the pair and its answer. The answer returns SentAt,
// so that the primary knows as of when its right was confirmed.
type beat struct {
	Term   uint64
	Run    runBytes // of the side that sends
	SentAt int64    // CLOCK_BOOTTIME of the primary, nanoseconds
	Epoch  uint64   // answer: newest epoch that the secondary holds whole
}

func (b beat) encode() []byte { return pack(b) }

func decodeBeat(p []byte) (b beat, err error) { return b, unpack(p, &b) }

func (b beat) sentAt() time.Duration { return time.Duration(b.SentAt) }

// beginHeader opens an epoch.
type beginHeader struct {
	Term  uint64
	Run   runBytes
	Epoch uint64
	Flags uint32
}

// endTally closes an epoch and says what it must consist of (epoch.Tally).
type endTally struct {
	Term  uint64
	Run   runBytes
	Epoch uint64
	Parts uint64
	Bytes uint64
	Sum   uint32
}

// diskPart heads a piece of one disk's writes, or of one NIC's frames.
type diskPart struct {
	Disk uint32
	More uint32 // 1: another piece follows
}

// inputHead heads frames that were sent to the guest (hostnet.Inbox).
type inputHead struct {
	NIC   uint32
	Zero  uint32
	Epoch uint64 // the first epoch whose state contains what the guest made of them
}

// diskChunk heads a piece of the full copy of a disk.
type diskChunk struct {
	Disk uint32
	Off  int64
	Len  uint32
	Zero uint32 // 1: no data follows, the range is zero
}

// maxPart bounds one message of an epoch or of the full copy, in bytes.
const maxPart = 1 << 20

// Flags of an epoch.
const (
	flagFlush  uint32 = 1 << iota // the guest flushed: durable before the acknowledgement
	flagSync                      // first whole epoch after the full copy
	flagFinal                     // last epoch of this primary: switchover
	flagPaused                    // a person wants the VM paused
	flagOff                       // the guest powered itself off
	flagFault                     // the guest stands still by panic or I/O error
)

// endHeader heads the last part of an epoch.
type endHeader struct {
	Term      uint64
	Epoch     uint64
	Flags     uint32
	PageCount uint32
	Frames    uint32 // number of kindEpochPages messages
	Disks     uint32 // number of kindEpochDisk messages
	DevLen    uint32 // length of the device state, decoded
	DevCRC    uint32 // CRC32C of it
	DevWire   uint32 // its length as sent
	DevDelta  uint32 // 1: XOR against the device state of the epoch before
	Console   uint32 // length of console output released with this epoch
	Audits    uint32 // number of audited pages: (page, hash) pairs of 16 bytes
	GuestNS   int64  // guest time since boot at the stop
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// packDevices compresses a device state, against the one before where there
// is one: it hardly changes from one epoch to the next.
func packDevices(dev, prev []byte) (wire []byte, delta bool) {
	if prev == nil {
		return s2.Encode(nil, dev), false
	}
	return s2.Encode(nil, xor(dev, prev)), true
}

// xor returns a with the common part XOR-ed with b.
func xor(a, b []byte) []byte {
	x := bytes.Clone(a)
	for i := range min(len(a), len(b)) {
		x[i] ^= b[i]
	}
	return x
}

// maxDevices bounds a device state: QEMU's is some 100 KiB.
const maxDevices = 64 << 20

// unpackDevices is the reverse of packDevices; the checksum is of the result.
func unpackDevices(h endHeader, wire, prev []byte) ([]byte, error) {
	if h.DevLen > maxDevices {
		return nil, fmt.Errorf("device state of epoch %d: %d bytes, at most %d allowed", h.Epoch, h.DevLen, maxDevices)
	}
	n, err := s2.DecodedLen(wire)
	if err != nil {
		return nil, fmt.Errorf("device state of epoch %d: %w", h.Epoch, err)
	}
	if n != int(h.DevLen) {
		return nil, fmt.Errorf("device state of epoch %d: decodes to %d bytes, want %d", h.Epoch, n, h.DevLen)
	}
	dev, err := s2.Decode(nil, wire)
	if err != nil {
		return nil, fmt.Errorf("device state of epoch %d: %w", h.Epoch, err)
	}
	if h.DevDelta != 0 {
		if prev == nil {
			return nil, fmt.Errorf("device state of epoch %d: a delta without the state before", h.Epoch)
		}
		dev = xor(dev, prev)
	}
	if c := crc32.Checksum(dev, castagnoli); c != h.DevCRC {
		return nil, fmt.Errorf("device state of epoch %d: checksum %08x, want %08x", h.Epoch, c, h.DevCRC)
	}
	return dev, nil
}

// pack and unpack write fixed-size structs, little endian.
func pack(v any) []byte {
	b, err := binary.Append(nil, binary.LittleEndian, v)
	if err != nil {
		panic("encode wire header: " + err.Error()) // only for types without a fixed size
	}
	return b
}

func unpack(p []byte, v any) error {
	n, err := binary.Decode(p, binary.LittleEndian, v)
	if err != nil {
		return fmt.Errorf("decode %T: %d bytes, want %d: %w", v, len(p), binary.Size(v), err)
	}
	if n != len(p) {
		return fmt.Errorf("decode %T: %d bytes, want %d", v, len(p), n)
	}
	return nil
}
