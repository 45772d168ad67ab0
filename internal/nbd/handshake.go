package nbd

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sort"
)

// session is the result of a handshake.
type session struct {
	name       string
	backend    Backend
	size       int64
	structured bool
	status     bool // base:allocation was chosen for this export
	statusFor  string
	fastZero   bool
}

// terms is what decides which requests are legal.
func (s *session) terms() terms {
	return terms{size: s.size, structured: s.structured, status: s.status, fastZero: s.fastZero}
}

// errAbort says that the client ended the handshake properly.
var errAbort = errors.New("nbd: client ended the handshake")

// handshake is the state while options are haggled. Its writer is buffered;
// each option is answered whole and then flushed, so a client that does not
// read stalls until the deadline of the connection.
type handshake struct {
	srv      *server
	r        *bufio.Reader
	w        *bufio.Writer
	noZeroes bool
	session  session
}

// negotiate runs the handshake on a fresh connection.
func (s *server) negotiate(r *bufio.Reader, w io.Writer) (session, error) {
	h := &handshake{srv: s, r: r, w: bufio.NewWriterSize(w, 4096)}
	h.put(uint64(magicInit), uint64(magicOption), uint16(flagFixedNewstyle|flagNoZeroes))
	if err := h.w.Flush(); err != nil {
		return session{}, fmt.Errorf("greet: %w", err)
	}
	var b [4]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return session{}, fmt.Errorf("read client flags: %w", err)
	}
	flags := binary.BigEndian.Uint32(b[:])
	if flags&^(flagFixedNewstyle|flagNoZeroes) != 0 {
		return session{}, fmt.Errorf("unknown client flags %#x", flags)
	}
	h.noZeroes = flags&flagNoZeroes != 0
	for range maxOptions {
		done, err := h.option(flags&flagFixedNewstyle != 0)
		if err != nil {
			return session{}, err
		}
		if err := h.w.Flush(); err != nil {
			return session{}, fmt.Errorf("answer option: %w", err)
		}
		if done {
			return h.session, nil
		}
	}
	return session{}, fmt.Errorf("more than %d options", maxOptions)
}

// option reads and answers one option; done when transmission begins.
func (h *handshake) option(fixed bool) (done bool, err error) {
	var hd [16]byte
	if _, err := io.ReadFull(h.r, hd[:]); err != nil {
		return false, fmt.Errorf("read option: %w", err)
	}
	if binary.BigEndian.Uint64(hd[:]) != magicOption {
		return false, errors.New("option without magic number")
	}
	opt, n := binary.BigEndian.Uint32(hd[8:]), binary.BigEndian.Uint32(hd[12:])
	if !fixed && opt != optExportName {
		// Without fixed newstyle there is no way to refuse an option.
		return false, fmt.Errorf("option %d of a client without fixed newstyle", opt)
	}
	if n > maxOption {
		if n > maxSkip || opt == optExportName {
			return false, fmt.Errorf("option %d of %d bytes", opt, n)
		}
		if _, err := h.r.Discard(int(n)); err != nil {
			return false, fmt.Errorf("skip option: %w", err)
		}
		if opt == optAbort {
			return h.abort()
		}
		h.refuse(opt, repErrTooBig, "option is too long")
		return false, nil
	}
	data := make([]byte, n)
	if _, err := io.ReadFull(h.r, data); err != nil {
		return false, fmt.Errorf("read option: %w", err)
	}
	switch opt {
	case optExportName:
		return h.exportName(string(data))
	case optAbort:
		return h.abort()
	case optList:
		h.list(data)
	case optInfo, optGo:
		return h.info(opt, data), nil
	case optStructuredReply:
		if n != 0 {
			h.refuse(opt, repErrInvalid, "no data is expected")
			break
		}
		h.session.structured = true
		h.reply(opt, repAck, nil)
	case optListMetaContext, optSetMetaContext:
		h.metaContext(opt, data)
	default:
		h.refuse(opt, repErrUnsup, "option is not supported")
	}
	return false, nil
}

// abort ends the handshake as the client wishes, whatever else it sent with it.
func (h *handshake) abort() (bool, error) {
	h.reply(optAbort, repAck, nil)
	_ = h.w.Flush() // the client may be gone already, and is right to be
	return false, errAbort
}

// exportName is the old way into transmission; it cannot be refused but by hanging up.
func (h *handshake) exportName(name string) (bool, error) {
	if !h.choose(name) {
		return false, fmt.Errorf("unknown export %.64q", name)
	}
	h.put(uint64(h.session.size), h.transmissionFlags(h.session.backend))
	if !h.noZeroes {
		_, _ = h.w.Write(make([]byte, 124)) // errors stick to the writer until Flush
	}
	return true, nil
}

// choose makes name the export of the session.
func (h *handshake) choose(name string) bool {
	full, b, ok := h.srv.lookup(name)
	if !ok {
		return false
	}
	h.session.name, h.session.backend, h.session.size = full, b, b.Size()
	_, h.session.fastZero = b.(FastZeroer)
	// Contexts that were set for another export do not count.
	h.session.status = h.session.status && h.session.statusFor == full
	return true
}

func (h *handshake) list(data []byte) {
	if len(data) != 0 {
		h.refuse(optList, repErrInvalid, "no data is expected")
		return
	}
	names := make([]string, 0, len(h.srv.exports))
	for n := range h.srv.exports {
		names = append(names, n)
	}
	sort.Strings(names)
	for _, n := range names {
		b := binary.BigEndian.AppendUint32(nil, uint32(len(n)))
		h.reply(optList, repServer, append(b, n...))
	}
	h.reply(optList, repAck, nil)
}

// info answers NBD_OPT_INFO and NBD_OPT_GO; true when transmission begins.
func (h *handshake) info(opt uint32, data []byte) bool {
	name, rest, ok := cutString(data)
	if !ok || len(rest) < 2 || len(rest) != 2+2*int(binary.BigEndian.Uint16(rest)) {
		h.refuse(opt, repErrInvalid, "malformed request")
		return false
	}
	full, b, ok := h.srv.lookup(name)
	if !ok {
		h.refuse(opt, repErrUnknown, "no such export")
		return false
	}
	p := binary.BigEndian.AppendUint16(nil, infoExport)
	p = binary.BigEndian.AppendUint64(p, uint64(b.Size()))
	h.reply(opt, repInfo, binary.BigEndian.AppendUint16(p, h.transmissionFlags(b)))
	for q := rest[2:]; len(q) > 0; q = q[2:] {
		if binary.BigEndian.Uint16(q) == infoName {
			h.reply(opt, repInfo, append(binary.BigEndian.AppendUint16(nil, infoName), full...))
			break // once is enough, however often it is asked for
		}
	}
	// Sent unasked too: a request that is not aligned to MinBlock will be refused.
	p = binary.BigEndian.AppendUint16(nil, infoBlockSize)
	p = binary.BigEndian.AppendUint32(p, MinBlock)
	p = binary.BigEndian.AppendUint32(p, PreferredBlock)
	h.reply(opt, repInfo, binary.BigEndian.AppendUint32(p, MaxBlock))
	h.reply(opt, repAck, nil)
	return opt == optGo && h.choose(name)
}

// metaContext answers NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT.
func (h *handshake) metaContext(opt uint32, data []byte) {
	if opt == optSetMetaContext {
		h.session.status = false // a failed attempt leaves none
	}
	if !h.session.structured {
		h.refuse(opt, repErrInvalid, "structured replies come first")
		return
	}
	name, rest, ok := cutString(data)
	if !ok || len(rest) < 4 {
		h.refuse(opt, repErrInvalid, "malformed request")
		return
	}
	queries := binary.BigEndian.Uint32(rest)
	rest = rest[4:]
	match := opt == optListMetaContext && queries == 0
	for range queries {
		var q string
		if q, rest, ok = cutString(rest); !ok {
			h.refuse(opt, repErrInvalid, "malformed query")
			return
		}
		match = match || q == contextAllocation || opt == optListMetaContext && q == contextNamespace
	}
	if len(rest) != 0 {
		h.refuse(opt, repErrInvalid, "data after the last query")
		return
	}
	full, b, ok := h.srv.lookup(name)
	if !ok {
		h.refuse(opt, repErrUnknown, "no such export")
		return
	}
	if _, can := b.(Allocator); match && can {
		var id uint32
		if opt == optSetMetaContext {
			h.session.status, h.session.statusFor = true, full
			id = allocationID
		}
		h.reply(opt, repMetaContext, append(binary.BigEndian.AppendUint32(nil, id), contextAllocation...))
	}
	h.reply(opt, repAck, nil)
}

func (h *handshake) transmissionFlags(b Backend) uint16 {
	f := uint16(tfHasFlags | tfSendFlush | tfSendFUA | tfSendTrim | tfSendWriteZeroes | tfCanMultiConn | tfSendCache)
	if _, ok := b.(FastZeroer); ok {
		f |= tfSendFastZero
	}
	if h.session.structured {
		f |= tfSendDF
	}
	return f
}

// cutString takes a string with a 32-bit length in front off b.
func cutString(b []byte) (s string, rest []byte, ok bool) {
	if len(b) < 4 {
		return "", nil, false
	}
	n := binary.BigEndian.Uint32(b)
	if n > maxName || int(n) > len(b)-4 {
		return "", nil, false
	}
	return string(b[4 : 4+n]), b[4+n:], true
}

// put writes numbers, big-endian. Errors stick to the writer until Flush.
func (h *handshake) put(v ...any) {
	for _, x := range v {
		_ = binary.Write(h.w, binary.BigEndian, x)
	}
}

func (h *handshake) reply(opt, typ uint32, data []byte) {
	h.put(uint64(magicReply), opt, typ, uint32(len(data)))
	_, _ = h.w.Write(data)
}

func (h *handshake) refuse(opt, typ uint32, why string) {
	h.reply(opt, typ, []byte(why))
}
