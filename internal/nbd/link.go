package nbd

import (
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// link is what a connection reads from and writes to in transmission. One
// goroutine reads and one writes at a time.
type link interface {
	io.Reader
	io.Writer // writes everything or fails
	// hush ends reading, and cut reading and writing; both wake who waits, may be
	// called at any time before Close, and more than once.
	hush()
	cut()
	Close() error
}

// takeOver makes nc the link of a connection. A socket leaves Go's poller: a
// blocking call is one system call and one wake-up where the poller needs
// three and two, and each connection is worth a thread. What is not a socket is
// used as it is. nc must not be used any more if err is nil.
func takeOver(nc net.Conn) (link, error) {
	sc, ok := nc.(syscall.Conn)
	if !ok {
		return netLink{nc}, nil
	}
	rc, err := sc.SyscallConn()
	if err != nil {
		return nil, err
	}
	fd := -1
	cerr := rc.Control(func(orig uintptr) {
		if fd, err = unix.FcntlInt(orig, unix.F_DUPFD_CLOEXEC, 0); err != nil {
			return
		}
		// A READ's answer should go out in one piece; the default holds less than 256 KiB.
		// Without the privilege the system's limit applies, which is right too.
		if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, sendBuffer) != nil {
			_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, sendBuffer)
		}
	})
	if err = errors.Join(cerr, err); err != nil {
		return nil, err
	}
	// Closing takes the socket out of the poller; the duplicate keeps it open. Only
	// then may it block: the two share that flag.
	if err := nc.Close(); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	if err := unix.SetNonblock(fd, false); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	return &fdLink{fd: fd}, nil
}

// sendBuffer is the socket's buffer for answers, in bytes. What waits in it is
// the kernel's memory and bounded by it.
const sendBuffer = 2 << 20

// fdLink is a blocking socket.
type fdLink struct {
	fd int

	mu     sync.Mutex // keeps hush and cut from a descriptor that means something else by now
	closed bool
}

func (l *fdLink) Read(p []byte) (int, error) {
	for {
		n, err := unix.Read(l.fd, p)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 0, err
		case n == 0 && len(p) > 0:
			return 0, io.EOF
		default:
			return n, nil
		}
	}
}

func (l *fdLink) Write(p []byte) (done int, err error) {
	for done < len(p) {
		n, err := unix.Write(l.fd, p[done:])
		if err != nil && !errors.Is(err, unix.EINTR) {
			return done, err
		}
		done += max(n, 0)
	}
	return done, nil
}

func (l *fdLink) hush() { l.shutdown(unix.SHUT_RD) }
func (l *fdLink) cut()  { l.shutdown(unix.SHUT_RDWR) }

func (l *fdLink) shutdown(how int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.closed {
		_ = unix.Shutdown(l.fd, how) // fails when the client is gone, which is the same
	}
}

func (l *fdLink) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil
	}
	l.closed = true
	return unix.Close(l.fd)
}

// netLink is any other connection.
type netLink struct{ net.Conn }

func (l netLink) hush() { _ = l.SetReadDeadline(time.Unix(1, 0)) }
func (l netLink) cut()  { _ = l.Conn.Close() }
