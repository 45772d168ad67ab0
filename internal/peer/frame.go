package peer

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
)

// Protocol versions spoken by this build. Version N reads N-1; see docs/peer-protocol.md.
const (
	versionMin = 1
	versionMax = 1
)

// headerLen is the length of every frame's header:
//
//	0  u32 CRC-32C (Castagnoli) of all that follows, payload included
//	4  u8  type
//	5  u8  flags (data: first, last)
//	6  u8  kind (data, urgent), else 0
//	7  u8  0
//	8  u32 length of the payload
//	12 u32 total length of the message (first data frame of it), else 0
//	16 u64 sequence number (data, urgent, ping, pong), else 0
//
// All numbers are big-endian. The checksum is there although TLS authenticates
// what is on the wire: a frame rests in user memory for as long as it may have to
// be sent again, beside buffers that are used over and over; a flipped bit or a
// bug there would otherwise end, well encrypted, in the memory of a standby. It
// is made when the caller's bytes are copied and checked after decryption. A bad
// one costs the link, not the session: the frame comes again over another.
const headerLen = 24

// Frame types.
const (
	typeHello   = 1 // dialler, first frame of a link
	typeWelcome = 2 // listener's answer
	typeRefuse  = 3 // listener's answer, then the link is closed
	typeData    = 4
	typeAck     = 5
	typePing    = 6 // carries an ack block
	typePong    = 7 // echoes the ping's payload up to the ack block
	typeUrgent  = 8
	typeBye     = 9
)

// Flags of a data frame.
const (
	flagFirst = 1
	flagLast  = 2
)

// maxRanges bounds the ranges in one ack block.
const maxRanges = 32

// errFrame is the class of everything a strict reader refuses.
var errFrame = errors.New("bad frame")

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// header is a decoded frame header.
type header struct {
	typ, flags, kind uint8
	length, total    uint32
	seq              uint64
}

// putHeader writes the header of the frame in buf, whose payload is already in
// place behind it, and seals it with the checksum.
func putHeader(buf []byte, h header) {
	buf[4], buf[5], buf[6], buf[7] = h.typ, h.flags, h.kind, 0
	binary.BigEndian.PutUint32(buf[8:], h.length)
	binary.BigEndian.PutUint32(buf[12:], h.total)
	binary.BigEndian.PutUint64(buf[16:], h.seq)
	binary.BigEndian.PutUint32(buf[0:], crc32.Checksum(buf[4:headerLen+int(h.length)], castagnoli))
}

// parseHeader decodes and checks what can be checked without the payload, so
// that a reader never allocates more than a frame of its type may hold.
func parseHeader(b []byte) (header, error) {
	if len(b) < headerLen {
		return header{}, fmt.Errorf("read header: %d bytes: %w", len(b), errFrame)
	}
	h := header{
		typ: b[4], flags: b[5], kind: b[6],
		length: binary.BigEndian.Uint32(b[8:]),
		total:  binary.BigEndian.Uint32(b[12:]),
		seq:    binary.BigEndian.Uint64(b[16:]),
	}
	bad := func(what string) (header, error) {
		return header{}, fmt.Errorf("read header of type %d: %s: %w", h.typ, what, errFrame)
	}
	if b[7] != 0 {
		return bad("reserved byte is set")
	}
	var most uint32
	switch h.typ {
	case typeData:
		most = maxPayload
		if h.flags&^(flagFirst|flagLast) != 0 {
			return bad("unknown flag")
		}
		if h.flags&flagFirst == 0 && h.total != 0 {
			return bad("total in a later frame")
		}
		if h.total > MaxMessage {
			return bad("message too long")
		}
	case typeUrgent:
		most = MaxUrgent
	case typeHello, typeWelcome:
		most = MaxHello + 128
	case typeRefuse, typeBye:
		most = maxReason + 8
	case typeAck:
		most = ackLen(maxRanges)
	case typePing:
		most = 8 + ackLen(maxRanges)
	case typePong:
		most = 8
	default:
		return bad("unknown type")
	}
	if h.length > most {
		return bad("payload too long")
	}
	if h.typ != typeData && (h.flags != 0 || h.total != 0) {
		return bad("flag or total where there is none")
	}
	if h.typ != typeData && h.typ != typeUrgent && h.kind != 0 {
		return bad("kind where there is none")
	}
	return h, nil
}

// checkSum verifies the checksum of a whole frame given in two pieces.
func checkSum(head, payload []byte) error {
	sum := crc32.Update(crc32.Checksum(head[4:headerLen], castagnoli), castagnoli, payload)
	if sum != binary.BigEndian.Uint32(head) {
		return fmt.Errorf("read frame of type %d: checksum differs: %w", head[4], errFrame)
	}
	return nil
}

// readFrame reads one frame. alloc gives the buffer of its payload.
func readFrame(r io.Reader, head []byte, alloc func(int) []byte) (header, []byte, error) {
	if _, err := io.ReadFull(r, head[:headerLen]); err != nil {
		return header{}, nil, err
	}
	h, err := parseHeader(head)
	if err != nil {
		return header{}, nil, err
	}
	p := alloc(int(h.length))
	if _, err := io.ReadFull(r, p); err != nil {
		return header{}, nil, err
	}
	return h, p, checkSum(head, p)
}

// appendFrame appends a whole small frame to b.
func appendFrame(b []byte, h header, payload []byte) []byte {
	at := len(b)
	h.length = uint32(len(payload))
	b = append(b, make([]byte, headerLen)...)
	b = append(b, payload...)
	putHeader(b[at:], h)
	return b
}

// seqRange is [from, to) of data sequence numbers.
type seqRange struct{ from, to uint64 }

// ackBlock is what a receiver tells: everything below next has arrived, and the
// ranges; the sender may have spent limit bytes of credit since the beginning;
// linkBytes of data frames were read on this very connection.
type ackBlock struct {
	next, limit, linkBytes uint64
	ranges                 []seqRange // ascending, disjoint, above next
}

// ackLen is the encoded length with n ranges:
// u64 next, u64 limit, u64 linkBytes, u32 count, then u64 from, u64 to each.
func ackLen(n int) uint32 { return uint32(28 + 16*n) }

func appendAck(b []byte, a ackBlock) []byte {
	b = binary.BigEndian.AppendUint64(b, a.next)
	b = binary.BigEndian.AppendUint64(b, a.limit)
	b = binary.BigEndian.AppendUint64(b, a.linkBytes)
	b = binary.BigEndian.AppendUint32(b, uint32(len(a.ranges)))
	for _, r := range a.ranges {
		b = binary.BigEndian.AppendUint64(b, r.from)
		b = binary.BigEndian.AppendUint64(b, r.to)
	}
	return b
}

func parseAck(b []byte) (ackBlock, error) {
	if len(b) < int(ackLen(0)) {
		return ackBlock{}, fmt.Errorf("read ack: %d bytes: %w", len(b), errFrame)
	}
	a := ackBlock{
		next:      binary.BigEndian.Uint64(b),
		limit:     binary.BigEndian.Uint64(b[8:]),
		linkBytes: binary.BigEndian.Uint64(b[16:]),
	}
	n := binary.BigEndian.Uint32(b[24:])
	if n > maxRanges || len(b) != int(ackLen(int(n))) {
		return ackBlock{}, fmt.Errorf("read ack: %d ranges in %d bytes: %w", n, len(b), errFrame)
	}
	last := a.next
	for b = b[28:]; len(b) > 0; b = b[16:] {
		r := seqRange{binary.BigEndian.Uint64(b), binary.BigEndian.Uint64(b[8:])}
		// A range that touches the one before it would have been merged with it.
		if r.from <= last || r.to <= r.from {
			return ackBlock{}, fmt.Errorf("read ack: range %d-%d after %d: %w", r.from, r.to, last, errFrame)
		}
		last = r.to
		a.ranges = append(a.ranges, r)
	}
	return a, nil
}

// nonce names a session (dialler's) or the listener's side of it.
type nonce [16]byte

var helloMagic = [8]byte{'P', 'E', 'R', 'D', 'P', 'E', 'E', 'R'}

// hello opens a link (typeHello), welcome answers it (typeWelcome). Encoded:
// magic 8, u16 lowest version, u16 highest version, session nonce 16, listener
// nonce 16 (zero in a hello that may found the session), u8 link index, u8 link
// count, u16 zero, u64 credit limit, then the opaque hello to the end.
// A welcome has both versions equal: the one to be spoken.
type hello struct {
	low, high     uint16
	session, peer nonce
	index, links  uint8
	limit         uint64
	opaque        []byte
}

const helloLen = 8 + 4 + 32 + 4 + 8

func appendHello(b []byte, h hello) []byte {
	b = append(b, helloMagic[:]...)
	b = binary.BigEndian.AppendUint16(b, h.low)
	b = binary.BigEndian.AppendUint16(b, h.high)
	b = append(b, h.session[:]...)
	b = append(b, h.peer[:]...)
	b = append(b, h.index, h.links, 0, 0)
	b = binary.BigEndian.AppendUint64(b, h.limit)
	return append(b, h.opaque...)
}

func parseHello(b []byte) (hello, error) {
	if len(b) < helloLen || len(b) > helloLen+MaxHello {
		return hello{}, fmt.Errorf("read hello: %d bytes: %w", len(b), errFrame)
	}
	if [8]byte(b[:8]) != helloMagic {
		return hello{}, fmt.Errorf("read hello: not this protocol: %w", errFrame)
	}
	h := hello{
		low: binary.BigEndian.Uint16(b[8:]), high: binary.BigEndian.Uint16(b[10:]),
		session: nonce(b[12:28]), peer: nonce(b[28:44]),
		index: b[44], links: b[45],
		limit:  binary.BigEndian.Uint64(b[48:]),
		opaque: append([]byte(nil), b[helloLen:]...),
	}
	switch {
	case b[46] != 0 || b[47] != 0:
		return hello{}, fmt.Errorf("read hello: reserved bytes are set: %w", errFrame)
	case h.low == 0 || h.low > h.high:
		return hello{}, fmt.Errorf("read hello: versions %d to %d: %w", h.low, h.high, errFrame)
	case h.links < 1 || h.links > MaxLinks || h.index >= h.links:
		return hello{}, fmt.Errorf("read hello: link %d of %d: %w", h.index, h.links, errFrame)
	case h.session == nonce{}:
		return hello{}, fmt.Errorf("read hello: no nonce: %w", errFrame)
	case h.limit < MinWindow || h.limit > MaxWindow:
		return hello{}, fmt.Errorf("read hello: credit of %d bytes: %w", h.limit, errFrame)
	}
	return h, nil
}

// Codes of refuse and bye frames: u16 code, then text for people.
const (
	codeVersion = 1 // no common version
	codeBusy    = 2 // another session lives; come again
	codeGone    = 3 // that session is over
	codeClosed  = 4 // bye: Close was called
	codeSilent  = 5 // bye: this side has heard nothing for too long
	codeBroken  = 6 // bye: this side saw the protocol broken
)

func appendCode(b []byte, code uint16, text string) []byte {
	b = binary.BigEndian.AppendUint16(b, code)
	return append(b, text[:min(len(text), maxReason)]...)
}

func parseCode(b []byte) (uint16, string, error) {
	if len(b) < 2 || len(b) > 2+maxReason {
		return 0, "", fmt.Errorf("read reason: %d bytes: %w", len(b), errFrame)
	}
	return binary.BigEndian.Uint16(b), string(b[2:]), nil
}
