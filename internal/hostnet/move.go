package hostnet

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Unread takes what waits in the tap for its QEMU, which will not read any more:
// the frames in the form that Inbox.Deliver takes, and how many they are. After
// an error they are those before it.
func (t *Tap) Unread() (waiting []byte, frames int, err error) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	header, err := unix.IoctlGetInt(t.fd, unix.TUNGETVNETHDRSZ)
	if err != nil {
		return nil, 0, fmt.Errorf("read tap %s: %w", t.name, err)
	}
	buf := make([]byte, maxSeen+vnetHeaderLong)
	for {
		n, err := unix.Read(t.fd, buf)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			return waiting, frames, nil
		case err != nil:
			return waiting, frames, fmt.Errorf("read tap %s: %w", t.name, err)
		}
		frames++
		if n < header || header < vnetHeaderShort { // no frame that could be handed on
			continue
		}
		waiting = binary.LittleEndian.AppendUint32(waiting, uint32(vnetHeaderShort+n-header))
		waiting = append(append(waiting, buf[:vnetHeaderShort]...), buf[header:n]...)
	}
}

// FrameBefore returns, of what Inbox.Take returned, the one frame that n others
// follow, in the same form; nil if there is none.
func FrameBefore(taken []byte, n int) []byte {
	var at []int
	end := 0
	for end+inboxPrefix <= len(taken) {
		at = append(at, end)
		end += inboxPrefix + int(binary.LittleEndian.Uint32(taken[end:]))
	}
	at = append(at, end)
	if n < 0 || n+2 > len(at) || at[len(at)-1-n] > len(taken) {
		return nil
	}
	return taken[at[len(at)-2-n]:at[len(at)-1-n]]
}
