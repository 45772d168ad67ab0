package hostnet

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// setSocket changes the elements of the gate's set. It speaks netlink itself:
// one system call to send a batch, one to hear of it, since this happens many
// times a second for each VM. One caller at a time.
type setSocket struct {
	fd  int
	seq uint32
	buf []byte
	in  []byte
}

// answerTimeout bounds the wait for the kernel, which answers within the
// system call unless another process holds its rule set.
const answerTimeout = 2 * time.Second

func openSetSocket() (*setSocket, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("open netfilter socket: %w", err)
	}
	tv := unix.NsecToTimeval(answerTimeout.Nanoseconds())
	err = unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	if err = errors.Join(err, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv)); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("open netfilter socket: %w", err)
	}
	return &setSocket{fd: fd, in: make([]byte, 64<<10)}, nil
}

func (s *setSocket) close() error { return unix.Close(s.fd) }

// renew adds, deletes and adds each tap in one transaction. The first makes
// the second possible; only the third restarts the timeout, since older
// kernels leave an element that is there alone. At no moment in between is the tap shut.
func (s *setSocket) renew(taps []string, d time.Duration) error {
	s.begin()
	s.message(unix.NFT_MSG_NEWSETELEM, unix.NLM_F_CREATE, taps, d)
	s.message(unix.NFT_MSG_DELSETELEM, 0, taps, 0)
	s.message(unix.NFT_MSG_NEWSETELEM, unix.NLM_F_CREATE|unix.NLM_F_ACK, taps, d)
	return s.commit()
}

// remove adds the taps first, so that one that is shut already does not fail the batch.
func (s *setSocket) remove(taps []string) error {
	s.begin()
	s.message(unix.NFT_MSG_NEWSETELEM, unix.NLM_F_CREATE, taps, maxOpen)
	s.message(unix.NFT_MSG_DELSETELEM, unix.NLM_F_ACK, taps, 0)
	return s.commit()
}

func (s *setSocket) begin() {
	s.buf = s.buf[:0]
	s.control(unix.NFNL_MSG_BATCH_BEGIN)
}

// control appends the beginning or the end of a batch.
func (s *setSocket) control(kind uint16) {
	at := s.header(kind, unix.NLM_F_REQUEST)
	s.buf = append(s.buf, unix.AF_UNSPEC, 0, 0, unix.NFNL_SUBSYS_NFTABLES) // the last two big-endian
	s.length(at)
}

// header appends a netlink header; length fills in its length field later.
func (s *setSocket) header(kind, flags uint16) (at int) {
	s.seq++
	at = len(s.buf)
	s.buf = append(s.buf, 0, 0, 0, 0)
	s.buf = binary.NativeEndian.AppendUint16(s.buf, kind)
	s.buf = binary.NativeEndian.AppendUint16(s.buf, flags)
	s.buf = binary.NativeEndian.AppendUint32(s.buf, s.seq)
	s.buf = append(s.buf, 0, 0, 0, 0)
	return at
}

func (s *setSocket) length(at int) {
	binary.NativeEndian.PutUint32(s.buf[at:], uint32(len(s.buf)-at))
}

// open and shut bracket a nested attribute.
func (s *setSocket) open(kind uint16) (at int) {
	at = len(s.buf)
	s.buf = append(s.buf, 0, 0)
	s.buf = binary.NativeEndian.AppendUint16(s.buf, kind|unix.NLA_F_NESTED)
	return at
}

func (s *setSocket) shut(at int) {
	binary.NativeEndian.PutUint16(s.buf[at:], uint16(len(s.buf)-at))
}

func (s *setSocket) attribute(kind uint16, value []byte) {
	s.buf = binary.NativeEndian.AppendUint16(s.buf, uint16(4+len(value)))
	s.buf = binary.NativeEndian.AppendUint16(s.buf, kind)
	s.buf = append(s.buf, value...)
	for len(s.buf)%4 != 0 {
		s.buf = append(s.buf, 0)
	}
}

// message appends a change of set elements; d of 0 leaves the timeout out.
func (s *setSocket) message(kind, flags uint16, taps []string, d time.Duration) {
	at := s.header(unix.NFNL_SUBSYS_NFTABLES<<8|kind, unix.NLM_F_REQUEST|flags)
	s.buf = append(s.buf, unix.NFPROTO_BRIDGE, 0, 0, 0)
	s.attribute(unix.NFTA_SET_ELEM_LIST_TABLE, []byte(tableName+"\x00"))
	s.attribute(unix.NFTA_SET_ELEM_LIST_SET, []byte(setName+"\x00"))
	list := s.open(unix.NFTA_SET_ELEM_LIST_ELEMENTS)
	for _, t := range taps {
		elem := s.open(unix.NFTA_LIST_ELEM)
		key := s.open(unix.NFTA_SET_ELEM_KEY)
		var name [unix.IFNAMSIZ]byte // as the kernel compares it
		copy(name[:], t)
		s.attribute(unix.NFTA_DATA_VALUE, name[:])
		s.shut(key)
		if d > 0 {
			s.attribute(unix.NFTA_SET_ELEM_TIMEOUT, binary.BigEndian.AppendUint64(nil, uint64(d.Milliseconds())))
		}
		s.shut(elem)
	}
	s.shut(list)
	s.length(at)
}

// commit sends the batch and waits for the answer to its last message, which
// asked for one, or for the first error. The kernel carries out all of the batch or nothing.
func (s *setSocket) commit() error {
	first, last := uint32(0), s.seq
	first = binary.NativeEndian.Uint32(s.buf[8:])
	s.control(unix.NFNL_MSG_BATCH_END)
	if err := unix.Sendto(s.fd, s.buf, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("change set elements: %w", err)
	}
	for {
		n, _, err := unix.Recvfrom(s.fd, s.in, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("change set elements: no answer: %w", err)
		}
		for b := s.in[:n]; len(b) >= unix.NLMSG_HDRLEN; {
			size := int(binary.NativeEndian.Uint32(b))
			if size < unix.NLMSG_HDRLEN || size > len(b) {
				return errors.New("change set elements: malformed answer")
			}
			// Answers to an earlier batch may still be there after its first error.
			seq := binary.NativeEndian.Uint32(b[8:])
			if binary.NativeEndian.Uint16(b[4:]) == unix.NLMSG_ERROR && seq-first <= last-first && size >= unix.NLMSG_HDRLEN+4 {
				if e := int32(binary.NativeEndian.Uint32(b[unix.NLMSG_HDRLEN:])); e != 0 {
					return fmt.Errorf("change set elements: %w", unix.Errno(-e))
				}
				if seq == last {
					return nil
				}
			}
			b = b[min((size+3)&^3, len(b)):]
		}
	}
}
