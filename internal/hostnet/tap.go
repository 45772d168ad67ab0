package hostnet

import (
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// Lengths of the header that goes before each frame on a tap's file: without
// and with the number of merged buffers (virtio 1.2, 5.1.6).
const (
	vnetHeaderShort = 10
	vnetHeaderLong  = 12
)

// Tap is the file of a tap, shared with the QEMU that inherits it. What is
// written to it comes out of the host as if the guest had sent it, whatever
// QEMU does; the Gate applies. While it is open the tap has a carrier, also
// after QEMU has ended.
//
// Concurrency: all methods may be called from any goroutine; after Close they fail.
type Tap struct {
	name string
	mu   sync.RWMutex // held for writing by Close: a number in use is never another file's
	fd   int
}

// OpenTap attaches to a tap made by CreateTap to which nobody is attached.
func OpenTap(name string) (*Tap, error) {
	// Not by package os: its poller must not see the file before it is a tap's.
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open tap %s: /dev/net/tun: %w", name, err)
	}
	req, err := unix.NewIfreq(name)
	if err == nil {
		req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("open tap %s: %w", name, err)
	}
	return &Tap{name: name, fd: fd}, nil
}

// Name returns the device's name.
func (t *Tap) Name() string { return t.name }

// Inherit returns a duplicate of the file for a child process; the caller
// closes it.
func (t *Tap) Inherit() (*os.File, error) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	fd, err := unix.FcntlInt(uintptr(t.fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("duplicate file of tap %s: %w", t.name, err)
	}
	return os.NewFile(uintptr(fd), t.name), nil
}

// Send implements netbuf.Outlet: one frame behind a virtio-net header of
// header bytes (10 or 12). The guest's driver decides which of them the tap
// wants at this moment, so a frame that was held across its restart is adapted.
// A tap that cannot take the frame at once refuses it. A driver that restarts in
// the very moment of sending may garble one frame.
func (t *Tap) Send(frame []byte, header int) error {
	if header != vnetHeaderShort && header != vnetHeaderLong || len(frame) < header {
		return fmt.Errorf("send on tap %s: %d bytes with a header of %d: 10 or 12 are possible", t.name, len(frame), header)
	}
	t.mu.RLock()
	defer t.mu.RUnlock()
	want, err := unix.IoctlGetInt(t.fd, unix.TUNGETVNETHDRSZ)
	if err != nil {
		return fmt.Errorf("send on tap %s: %w", t.name, err)
	}
	if want == header {
		_, err = unix.Write(t.fd, frame)
	} else {
		head := make([]byte, max(want, vnetHeaderShort))
		copy(head, frame[:vnetHeaderShort])
		_, err = unix.Writev(t.fd, [][]byte{head, frame[header:]})
	}
	if err != nil {
		return fmt.Errorf("send %d bytes on tap %s, header % x (the tap's has %d bytes): %w", len(frame), t.name, frame[:header], want, err)
	}
	return nil
}

// SendPlain sends a frame without a header, such as an announcement.
func (t *Tap) SendPlain(frame []byte) error {
	return t.Send(append(make([]byte, vnetHeaderShort, vnetHeaderShort+len(frame)), frame...), vnetHeaderShort)
}

// Close detaches; the tap is persistent and stays.
func (t *Tap) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	fd := t.fd
	t.fd = -1
	if err := unix.Close(fd); err != nil {
		return fmt.Errorf("close tap %s: %w", t.name, err)
	}
	return nil
}
