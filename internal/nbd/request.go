package nbd

import (
	"encoding/binary"
	"errors"
)

// request is one decoded request header.
type request struct {
	flags  uint16
	cmd    uint16
	cookie uint64
	off    uint64
	length uint32
}

// errMagic ends a connection: where the next request begins is not known any more.
var errMagic = errors.New("nbd: request without magic number")

// decodeRequest reads a header of requestSize bytes. It judges nothing but the magic number.
func decodeRequest(b []byte) (request, error) {
	if binary.BigEndian.Uint32(b[0:]) != magicRequest {
		return request{}, errMagic
	}
	return request{
		flags:  binary.BigEndian.Uint16(b[4:]),
		cmd:    binary.BigEndian.Uint16(b[6:]),
		cookie: binary.BigEndian.Uint64(b[8:]),
		off:    binary.BigEndian.Uint64(b[16:]),
		length: binary.BigEndian.Uint32(b[24:]),
	}, nil
}

// refusal is why a request does not go to the backend. The text is for people;
// clients without structured replies see only the number.
type refusal struct {
	errno uint32
	why   string
}

// accepted is the refusal of what is not refused.
var accepted refusal

// terms is what the client and the server agreed on, as far as it decides which
// requests are legal.
type terms struct {
	size       int64
	structured bool
	status     bool // BLOCK_STATUS
	fastZero   bool
}

// check says whether a request may go to the backend. Whoever passes it asks for
// a range that is aligned, not empty, and within the disk (but for FLUSH, which
// has none).
func (r request) check(t terms) refusal {
	beyond := uint32(errInvalid)
	var allowed uint16
	switch r.cmd {
	case cmdRead:
		if t.structured {
			allowed = cmdFlagDF
		}
		if r.length > MaxBlock {
			if t.structured {
				return refusal{errOverflow, "READ is longer than the largest block size"}
			}
			return refusal{errInvalid, "READ is longer than the largest block size"}
		}
	case cmdWrite:
		if r.length > MaxBlock {
			return refusal{errInvalid, "WRITE is longer than the largest block size"}
		}
		beyond = errNoSpace
	case cmdTrim, cmdCache:
	case cmdWriteZeroes:
		allowed = cmdFlagNoHole
		if t.fastZero {
			allowed |= cmdFlagFastZero
		}
		beyond = errNoSpace
	case cmdBlockStatus:
		if !t.status {
			return refusal{errInvalid, "no metadata context was chosen"}
		}
		allowed = cmdFlagReqOne
	case cmdFlush:
		// Offset and length are reserved; old clients are known to leave them set.
		if r.flags&^cmdFlagFUA != 0 {
			return refusal{errInvalid, "unknown flag"}
		}
		return accepted
	default:
		return refusal{errInvalid, "unknown request"}
	}
	// FUA is legal with each command and without meaning where nothing is written.
	if r.flags&^(allowed|cmdFlagFUA) != 0 {
		return refusal{errInvalid, "flag is unknown or not for this request"}
	}
	if r.length == 0 || r.off%MinBlock != 0 || r.length%MinBlock != 0 {
		return refusal{errInvalid, "range is empty or not aligned to 512 bytes"}
	}
	if r.off > uint64(t.size) || uint64(r.length) > uint64(t.size)-r.off {
		return refusal{beyond, "range ends behind the disk"}
	}
	return accepted
}
