package shim

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"syscall"

	"perdure/internal/blockstore"
)

// diskTrouble reports whether an error says that a disk of this host is of no use
// until somebody replaces it. A full one heals by itself.
func diskTrouble(err error) bool {
	for _, e := range []error{syscall.EIO, syscall.ENXIO, syscall.ENODEV, syscall.EROFS, syscall.ESTALE, syscall.EREMOTEIO,
		syscall.ETIMEDOUT, syscall.EBADMSG, syscall.EUCLEAN, blockstore.ErrCorrupt, blockstore.ErrChecksum, blockstore.ErrImage} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// noteDiskFailed tells of a disk of this host that has failed; the agent does not
// ask this host to hold a copy of the VM before it was replaced. What is no
// failure of a disk is not told.
func (s *Shim) noteDiskFailed(err error) {
	if !diskTrouble(err) || s.ctx.Err() != nil {
		return
	}
	s.tl.add("disk-failed", 0, 0, "a disk of this host has failed: %s", diskCause(err))
}

// noteGuestError is noteDiskFailed for a request of the guest that failed, by
// QEMU's BLOCK_IO_ERROR.
func (s *Shim) noteGuestError(data []byte) {
	var e struct {
		NoSpace bool   `json:"nospace"`
		Reason  string `json:"reason"`
	}
	if json.Unmarshal(data, &e) == nil && !e.NoSpace {
		s.tl.add("disk-failed", 0, 0, "a disk of this host has failed: %s", e.Reason)
	}
}

// diskCause is what an error of a replica comes down to, in one line.
func diskCause(err error) string {
	var no syscall.Errno
	switch {
	case errors.Is(err, syscall.ETIMEDOUT):
		return "it does not answer"
	case errors.As(err, &no):
		return no.Error()
	case errors.Is(err, blockstore.ErrChecksum):
		return blockstore.ErrChecksum.Error()
	}
	return strings.Join(strings.Fields(fmt.Sprintf("%.300s", err)), " ")
}

// lostEvent names what happened to a disk of this host.
func lostEvent(err error) string {
	if diskTrouble(err) {
		return "disk-failed"
	}
	return "disk-lost"
}
