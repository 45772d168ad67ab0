package diskcheck

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// Requests of the NBD protocol.
const (
	cmdRead        = 0
	cmdWrite       = 1
	cmdFlush       = 3
	cmdTrim        = 4
	cmdWriteZeroes = 6

	flagFUA = 1
)

// errLost says that a request was sent, perhaps, and not answered.
var errLost = errors.New("connection lost before the answer")

// answerError is an answer that says no.
type answerError uint32

func (e answerError) Error() string { return fmt.Sprintf("the disk answers with error %d", uint32(e)) }

// client is one connection in transmission, used by many goroutines.
type client struct {
	nc net.Conn

	sending sync.Mutex

	mu      sync.Mutex
	pending map[uint64]*call
	cookie  uint64
	dead    bool
}

type call struct {
	read []byte // filled by the answer
	done chan error
}

// attach shakes hands with the server on nc, and owns nc.
func attach(nc net.Conn, export string) (_ *client, err error) {
	defer func() {
		if err != nil {
			_ = nc.Close()
			err = fmt.Errorf("attach to export %q: %w", export, err)
		}
	}()
	_ = nc.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := io.ReadFull(nc, make([]byte, 18)); err != nil {
		return nil, err
	}
	b := binary.BigEndian.AppendUint32(nil, 3) // fixed newstyle, no zeroes
	b = append(b, "IHAVEOPT\x00\x00\x00\x01"...)
	b = binary.BigEndian.AppendUint32(b, uint32(len(export)))
	if _, err := nc.Write(append(b, export...)); err != nil {
		return nil, err
	}
	if _, err := io.ReadFull(nc, make([]byte, 10)); err != nil {
		return nil, err
	}
	_ = nc.SetDeadline(time.Time{})
	c := &client{nc: nc, pending: map[uint64]*call{}}
	go c.receive()
	return c, nil
}

// close ends the connection; requests under way are lost.
func (c *client) close() { _ = c.nc.Close() }

// receive answers calls until the connection ends.
func (c *client) receive() {
	var h [16]byte
	for {
		if _, err := io.ReadFull(c.nc, h[:]); err != nil || binary.BigEndian.Uint32(h[:]) != 0x67446698 {
			break
		}
		cookie := binary.BigEndian.Uint64(h[8:])
		c.mu.Lock()
		k := c.pending[cookie]
		delete(c.pending, cookie)
		c.mu.Unlock()
		if k == nil {
			break // an answer to nothing: this is no NBD any more
		}
		if e := binary.BigEndian.Uint32(h[4:]); e != 0 {
			k.done <- answerError(e)
			continue
		}
		if _, err := io.ReadFull(c.nc, k.read); err != nil {
			k.done <- errLost
			break
		}
		k.done <- nil
	}
	c.close()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.dead = true
	for _, k := range c.pending {
		k.done <- errLost
	}
	clear(c.pending)
}

// do sends one request and waits for its answer.
func (c *client) do(cmd, flags uint16, off int64, n int, payload, read []byte) error {
	k := &call{read: read, done: make(chan error, 1)}
	c.mu.Lock()
	if c.dead {
		c.mu.Unlock()
		return errLost
	}
	c.cookie++
	cookie := c.cookie
	c.pending[cookie] = k
	c.mu.Unlock()
	b := make([]byte, 0, 28+len(payload))
	b = binary.BigEndian.AppendUint32(b, 0x25609513)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, cmd)
	b = binary.BigEndian.AppendUint64(b, cookie)
	b = binary.BigEndian.AppendUint64(b, uint64(off))
	b = binary.BigEndian.AppendUint32(b, uint32(n))
	c.sending.Lock()
	_, err := c.nc.Write(append(b, payload...))
	c.sending.Unlock()
	if err != nil {
		c.close() // receive ends, and with it all calls
	}
	return <-k.done
}
