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
func decodeRequest(b *[requestSize]byte) (request, error) {
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

// check says whether a request may go to a backend of the given size: 0, or the
// error number to answer with. Whoever passes it asks for a range that is
// aligned, not empty, and within the disk. status tells whether block status
// was negotiated, structured whether structured replies were.
func (r request) check(size int64, structured, status bool) uint32 {
	var allowed uint16
	beyond := uint32(errInvalid)
	switch r.cmd {
	case cmdRead:
		if structured {
			allowed = cmdFlagDF
		}
		if r.length > MaxBlock {
			return errInvalid
		}
	case cmdWrite:
		if r.length > MaxBlock {
			return errInvalid
		}
		beyond = errNoSpace
	case cmdTrim:
	case cmdWriteZeroes:
		allowed = cmdFlagNoHole
		beyond = errNoSpace
	case cmdBlockStatus:
		if !status {
			return errInvalid
		}
		allowed = cmdFlagReqOne
	case cmdFlush:
		// Offset and length are reserved; old clients are known to leave them set.
		if r.flags&^cmdFlagFUA != 0 {
			return errInvalid
		}
		return 0
	default:
		return errInvalid
	}
	// FUA is legal with each command and without meaning where nothing is written.
	if r.flags&^(allowed|cmdFlagFUA) != 0 {
		return errInvalid
	}
	if r.length == 0 || r.off%MinBlock != 0 || r.length%MinBlock != 0 {
		return errInvalid
	}
	if r.off > uint64(size) || uint64(r.length) > uint64(size)-r.off {
		return beyond
	}
	return 0
}
