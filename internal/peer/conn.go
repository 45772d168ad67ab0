package peer

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// linkConn is one TCP connection under TLS. It notes when bytes of the peer
// arrive, below TLS, so that a slow link in the middle of a large frame does not
// look silent.
type linkConn struct {
	raw   *net.TCPConn
	tls   *tls.Conn
	r     io.Reader
	heard atomic.Int64
	owner atomic.Pointer[Session]

	// TLS writes a record of 16 KiB at a time; corked, they gather here and leave
	// in one system call per frame. The lock is for the rare records that TLS
	// writes from the reading side (key updates).
	wmu    sync.Mutex
	corked bool
	wbuf   []byte

	// Of whoever writes: the writer of the link, or a sender in its place. Guarded by
	// the session's lock.
	writing bool
	batch   []byte // used while writing, without the lock
}

// timedConn is what TLS reads from and writes to.
type timedConn struct {
	*net.TCPConn
	c *linkConn
}

// errStale is returned to a reader whose session went silent before it looked.
var errStale = errors.New("session was silent for too long")

// Read notes the time, after having compared it with the last one; see hear.
func (t timedConn) Read(b []byte) (int, error) {
	n, err := t.TCPConn.Read(b)
	if n <= 0 {
		return n, err
	}
	now := Now()
	if s := t.c.owner.Load(); s != nil && !s.hear(now) {
		return 0, errStale
	}
	later(&t.c.heard, now)
	return n, err
}

// Write sends at once, or gathers while the connection is corked.
func (t timedConn) Write(b []byte) (int, error) {
	c := t.c
	c.wmu.Lock()
	defer c.wmu.Unlock()
	if c.corked {
		c.wbuf = append(c.wbuf, b...)
		return len(b), nil
	}
	return t.TCPConn.Write(b)
}

// bind makes the connection count as a sign of life of s.
func (c *linkConn) bind(s *Session) {
	later(&s.heard, time.Duration(c.heard.Load()))
	c.owner.Store(s)
}

// wrap prepares a TCP connection and does the handshake as far as identity goes.
func wrap(raw *net.TCPConn, cfg *Config, dialler bool, deadline time.Time) (*linkConn, error) {
	if err := tune(raw, cfg.Silence); err != nil {
		return nil, err
	}
	c := &linkConn{raw: raw}
	if dialler {
		c.tls = tls.Client(timedConn{raw, c}, cfg.TLS)
	} else {
		c.tls = tls.Server(timedConn{raw, c}, cfg.TLS)
	}
	c.r = c.tls
	if err := raw.SetDeadline(deadline); err != nil {
		return nil, fmt.Errorf("set deadline: %w", err)
	}
	if err := c.tls.Handshake(); err != nil {
		return nil, fmt.Errorf("shake hands: %w", err)
	}
	st := c.tls.ConnectionState()
	if st.Version != tls.VersionTLS13 || len(st.PeerCertificates) == 0 {
		return nil, fmt.Errorf("shake hands: no TLS 1.3 or no certificate: %w", errIdentity)
	}
	if err := cfg.Verify(st); err != nil {
		return nil, fmt.Errorf("verify peer: %w: %w", errIdentity, err)
	}
	return c, nil
}

// errIdentity is the class of peers that are not who they should be.
var errIdentity = errors.New("not the peer")

// Checkpoints and their acknowledgements go before the frames of bridges that
// are carried over the same A-link (hostnet): a guest's output waits for them.
const (
	dscpTOS  = 6 << 5 // DSCP CS6, for the switches between the hosts
	priority = 6      // for this host's own queue; after the DSCP, which sets it as well
)

func first(fd int, v4 bool) error {
	level, opt := unix.IPPROTO_IPV6, unix.IPV6_TCLASS
	if v4 {
		level, opt = unix.IPPROTO_IP, unix.IP_TOS
	}
	if err := unix.SetsockoptInt(fd, level, opt, dscpTOS); err != nil {
		return fmt.Errorf("tune socket: set DSCP: %w", err)
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PRIORITY, priority); err != nil {
		return fmt.Errorf("tune socket: set priority: %w", err)
	}
	return nil
}

// tune sets what heartbeats need of a socket that also carries bulk data.
func tune(raw *net.TCPConn, silence time.Duration) error {
	rc, err := raw.SyscallConn()
	if err != nil {
		return fmt.Errorf("tune socket: %w", err)
	}
	var serr error
	set := func(fd, opt, v int) {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, opt, v); err != nil && serr == nil {
			serr = fmt.Errorf("tune socket: option %d: %w", opt, err)
		}
	}
	v4 := false
	if a, ok := raw.LocalAddr().(*net.TCPAddr); ok {
		v4 = a.IP.To4() != nil
	}
	err = rc.Control(func(fd uintptr) {
		set(int(fd), unix.TCP_NODELAY, 1)
		// What the kernel has not sent yet delays everything urgent behind it.
		set(int(fd), unix.TCP_NOTSENT_LOWAT, 128<<10)
		// A dead path frees its socket soon; the link's silence is noticed earlier.
		set(int(fd), unix.TCP_USER_TIMEOUT, int(max(2*silence, time.Second)/time.Millisecond))
		if err := first(int(fd), v4); err != nil && serr == nil {
			serr = err
		}
	})
	if err != nil {
		return fmt.Errorf("tune socket: %w", err)
	}
	return serr
}

// writeAll writes small frames and a large one, as one piece.
func (c *linkConn) writeAll(batch, body []byte) error {
	if err := c.cork(true); err != nil {
		return err
	}
	for _, b := range [...][]byte{batch, body} {
		if len(b) == 0 {
			continue
		}
		if _, err := c.tls.Write(b); err != nil {
			return err
		}
	}
	return c.cork(false)
}

// cork begins to gather; uncorking writes what has gathered.
func (c *linkConn) cork(on bool) error {
	c.wmu.Lock()
	defer c.wmu.Unlock()
	c.corked = on
	if on || len(c.wbuf) == 0 {
		return nil
	}
	_, err := c.raw.Write(c.wbuf)
	c.wbuf = c.wbuf[:0]
	return err
}

// leave says goodbye and shuts the sending half, so that the goodbye is not
// overtaken by a reset; the reader closes the rest by the deadline. Without a
// goodbye there is nothing to wait for.
func (c *linkConn) leave(bye []byte) {
	if bye == nil {
		c.raw.Close()
		return
	}
	if _, err := c.tls.Write(bye); err != nil {
		c.raw.Close()
		return
	}
	if err := c.raw.CloseWrite(); err != nil {
		c.raw.Close()
	}
}
