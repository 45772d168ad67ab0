package guestmem

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// flusher is this process's end of the helper.
type flusher struct {
	cmd    *exec.Cmd
	ctl    *conn
	swp    *conn
	hsh    *conn
	shared []byte
	done   chan struct{} // closed when the helper has been reaped
	err    error         // of the helper's end, valid after done
}

// conn is one socket to the helper: blocking, one caller at a time.
type conn struct {
	mu     sync.Mutex
	fd     int
	closed bool // guarded by mu
}

var errHelperGone = errors.New("helper process has ended")

func (c *conn) send(req []byte) error {
	for {
		_, err := unix.Write(c.fd, req)
		if err != unix.EINTR {
			return err
		}
	}
}

func (c *conn) recv(buf []byte) error {
	n, err := readRetry(c.fd, buf)
	switch {
	case err != nil:
		return err
	case n == 0:
		return errHelperGone
	case n != len(buf):
		return fmt.Errorf("helper sent %d bytes, want %d", n, len(buf))
	}
	return nil
}

// call sends a command and returns the error number it is answered with, as an error.
func (c *conn) call(req []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return os.ErrClosed
	}
	if err := c.send(req); err != nil {
		return err
	}
	var e uint32
	if err := c.recv(bytesOf(&e)); err != nil {
		return err
	}
	if e != 0 {
		return unix.Errno(e)
	}
	return nil
}

// interrupt makes every call in progress and to come fail.
func (c *conn) interrupt() {
	// Fails only for a socket that the helper has closed already, which does the same.
	_ = unix.Shutdown(c.fd, unix.SHUT_RDWR)
}

func (c *conn) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closed {
		c.closed = true
		unix.Close(c.fd)
	}
}

// startFlusher starts the helper. Nothing of /dev/fuse or of the mount exists yet.
func startFlusher(cfg Config) (_ *flusher, err error) {
	f := &flusher{done: make(chan struct{})}
	var ours []*conn
	var theirs []*os.File
	defer func() {
		for _, t := range theirs {
			t.Close()
		}
		if err != nil {
			for _, c := range ours {
				c.interrupt()
				c.close()
			}
		}
	}()
	for range 3 {
		p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return nil, fmt.Errorf("make socket for helper: %w", err)
		}
		ours = append(ours, &conn{fd: p[0]})
		theirs = append(theirs, os.NewFile(uintptr(p[1]), "helper"))
	}
	f.ctl, f.swp, f.hsh = ours[0], ours[1], ours[2]
	mfd, err := unix.MemfdCreate("perdure-sweep", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make shared memory for helper: %w", err)
	}
	theirs = append(theirs, os.NewFile(uintptr(mfd), "memfd"))
	if err := unix.Ftruncate(mfd, sharedSize); err != nil {
		return nil, fmt.Errorf("size shared memory for helper: %w", err)
	}
	if f.shared, err = unix.Mmap(mfd, 0, sharedSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return nil, fmt.Errorf("map shared memory for helper: %w", err)
	}
	f.cmd = exec.Command(cfg.Helper[0], cfg.Helper[1:]...)
	f.cmd.Stderr = os.Stderr
	f.cmd.ExtraFiles = theirs
	if cfg.LockFD != nil {
		f.cmd.ExtraFiles = append(f.cmd.ExtraFiles[:len(theirs):len(theirs)], cfg.LockFD)
	}
	f.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := f.cmd.Start(); err != nil {
		_ = unix.Munmap(f.shared) // the start's error says more
		return nil, fmt.Errorf("start helper: %w", err)
	}
	go func() {
		f.err = f.cmd.Wait()
		close(f.done)
	}()
	return f, nil
}

func (f *flusher) attach(path string) error { return f.ctl.call(append([]byte{cmdAttach}, path...)) }
func (f *flusher) flush() error             { return f.ctl.call([]byte{cmdFlush}) }

func (f *flusher) pokeByte(off int64, v byte) error {
	q := pokeReq{Off: uint64(off), Value: uint64(v)}
	return f.ctl.call(append([]byte{cmdPoke}, bytesOf(&q)...))
}

// hash replaces page numbers by hashes, in place.
func (f *flusher) hash(list []uint64) error {
	for len(list) > 0 {
		n := uint64(min(len(list), hashBatch))
		if err := f.hashBatch(list[:n]); err != nil {
			return err
		}
		list = list[n:]
	}
	return nil
}

func (f *flusher) hashBatch(list []uint64) error {
	c := f.hsh
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return os.ErrClosed
	}
	shared := unsafe.Slice((*uint64)(unsafe.Pointer(&f.shared[hashOffset])), hashBatch)
	copy(shared, list)
	n := uint64(len(list))
	if err := c.send(bytesOf(&n)); err != nil {
		return err
	}
	var e uint32
	if err := c.recv(bytesOf(&e)); err != nil {
		return err
	}
	if e != 0 {
		return unix.Errno(e)
	}
	copy(list, shared)
	return nil
}

// sweep reads [from, size) through the helper and calls fn for the runs of non-zero pages. The helper
// works on the next pieces meanwhile.
func (f *flusher) sweep(ctx context.Context, from, size int64, done *atomic.Int64, fn func(off int64, data []byte) error) error {
	c := f.swp
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return os.ErrClosed
	}
	var asked [sweepSlots]sweepReq
	sent, got := 0, 0
	ask := func() error {
		if from >= size {
			return nil
		}
		q := &asked[sent%sweepSlots]
		*q = sweepReq{Off: uint64(from), Len: uint32(min(sweepChunk, size-from)), Slot: uint32(sent % sweepSlots)}
		sent++
		from += int64(q.Len)
		return c.send(bytesOf(q))
	}
	var first error // what ends the sweep; replies on their way are still taken, to stay in step
	for range sweepSlots - 1 {
		if first = ask(); first != nil {
			return first
		}
	}
	for got < sent {
		var r sweepReply
		if err := c.recv(bytesOf(&r)); err != nil {
			return err
		}
		q := asked[got%sweepSlots]
		got++
		if first == nil {
			first = ctx.Err()
		}
		if first == nil {
			first = ask()
		}
		if first == nil && r.Errno != 0 {
			first = unix.Errno(r.Errno)
		}
		if first == nil {
			if first = runs(&r, f.shared[q.Slot*sweepChunk:][:q.Len], int64(q.Off), fn); first == nil {
				done.Store(int64(q.Off) + int64(q.Len))
			}
		}
	}
	return first
}

// runs calls fn for each run of non-zero pages of data.
func runs(r *sweepReply, data []byte, off int64, fn func(off int64, data []byte) error) error {
	for p, n := 0, len(data)/PageSize; p < n; {
		if r.NonZero[p/64]&(1<<(p%64)) == 0 {
			p++
			continue
		}
		q := p + 1
		for q < n && r.NonZero[q/64]&(1<<(q%64)) != 0 {
			q++
		}
		if err := fn(off+int64(p)*PageSize, data[p*PageSize:q*PageSize]); err != nil {
			return err
		}
		p = q
	}
	return nil
}

// helperGrace is how long the helper may take to see that its sockets are closed.
const helperGrace = 2 * time.Second

// close ends and reaps the helper. It does not wait for the function of a Sweep that never
// returns: what such a sweep uses is given back when it does.
func (f *flusher) close() error {
	conns := []*conn{f.ctl, f.swp, f.hsh}
	for _, c := range conns {
		c.interrupt()
	}
	unused := make(chan struct{})
	go func() {
		defer close(unused)
		for _, c := range conns {
			c.close()
		}
		_ = unix.Munmap(f.shared) // only fails for memory that is not ours
	}()
	grace := time.After(helperGrace)
	select {
	case <-f.done:
	case <-grace:
		// It may be stopped. An error means that it has just ended.
		_ = f.cmd.Process.Kill()
		select {
		case <-f.done:
		case <-time.After(helperGrace):
			return fmt.Errorf("reap helper %d: it does not end", f.cmd.Process.Pid)
		}
	}
	select {
	case <-unused:
	case <-grace:
	}
	return nil
}
