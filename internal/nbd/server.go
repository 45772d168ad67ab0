package nbd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"syscall"
	"time"
)

// Options bound what clients may use; the zero value is good for a Unix socket
// that serves one QEMU.
type Options struct {
	MaxConns         int           // connections at once, further ones are closed; 0: 32
	MaxInflightBytes int64         // payload and reply buffers of one connection; 0: 64 MiB
	MaxRequests      int           // requests of one connection being carried out; 0: 32
	HandshakeTimeout time.Duration // for the whole handshake; 0: 10 s
	Grace            time.Duration // for requests under way when the server is stopped; 0: 1 s, below: none

	// Took, if set, is told how long each request took in the backend that the client
	// had to wait for; it is called from many goroutines at once and must be quick.
	Took func(d time.Duration)

	// Cut, if set, ends all connections for each element, without answering what is
	// under way: a client that connects again asks anew. The context of what is under way
	// has ended before such a client is served, and nothing more of a connection that was
	// cut is begun.
	Cut <-chan struct{}

	// Closed, if set, is called once for each connection that ended, with the export
	// ("" if none was chosen) and why: nil after a proper goodbye. It may be called
	// from several goroutines at once.
	Closed func(export string, err error)
}

func (o Options) withDefaults() Options {
	if o.MaxConns <= 0 {
		o.MaxConns = 32
	}
	if o.MaxInflightBytes <= 0 {
		o.MaxInflightBytes = 64 << 20
	}
	if o.MaxRequests <= 0 {
		o.MaxRequests = 32
	}
	if o.HandshakeTimeout <= 0 {
		o.HandshakeTimeout = 10 * time.Second
	}
	if o.Grace == 0 {
		o.Grace = time.Second
	}
	return o
}

// server is what the connections of one Serve share.
type server struct {
	exports map[string]Backend
	opts    Options
	pool    bufferPool

	mu    sync.Mutex
	conns map[*slot]struct{}
	over  bool
}

// slot is one connection as the server sees it. What can end it is guarded by server.mu.
type slot struct {
	nc   net.Conn
	link link // once in transmission
	stop context.CancelFunc
}

// Serve answers clients on ln until ctx ends (then it returns nil) or ln fails.
// It owns ln from the start, and has closed it, all connections, and ended all
// requests when it returns; a backend that ignores its context is waited for.
// The map must not be changed while it is served. An empty export name asks for
// the export "" or, if there is exactly one export, for that.
//
// When ctx ends, what was received is still carried out and answered for as
// long as Options.Grace allows. What takes longer is not answered at all: an
// error would reach the guest, whereas a client that finds its connection
// closed may send the request again to the server's successor.
func Serve(ctx context.Context, ln net.Listener, exports map[string]Backend, opts Options) error {
	s := &server{exports: exports, opts: opts.withDefaults(), conns: map[*slot]struct{}{}}
	// ln is closed before the connections: none is accepted that nobody would close.
	stop := context.AfterFunc(ctx, func() { _ = ln.Close() })
	defer stop()
	// Requests outlive ctx for as long as the grace lasts.
	work, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()

	var cutting sync.WaitGroup
	defer cutting.Wait()
	over, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	cutting.Go(func() {
		for over.Err() == nil {
			select {
			case <-s.opts.Cut:
				s.cut()
			case <-over.Done():
			}
		}
	})
	var conns sync.WaitGroup
	err := s.accept(ctx, work, ln, &conns)
	stopped := ctx.Err() != nil
	_ = ln.Close()
	s.hush()
	late := time.AfterFunc(s.opts.Grace, func() {
		s.cut() // before the cancelling, whose errors must not be sent
		cancel()
	})
	conns.Wait()
	late.Stop()
	if stopped {
		return nil
	}
	return fmt.Errorf("accept NBD client: %w", err)
}

// accept starts the connections of clients until ln or ctx ends.
func (s *server) accept(ctx, work context.Context, ln net.Listener, conns *sync.WaitGroup) error {
	for {
		nc, err := ln.Accept()
		if err != nil {
			if ctx.Err() == nil && passing(err) && pause(ctx, 20*time.Millisecond) {
				continue
			}
			return err
		}
		own, stop := context.WithCancel(work)
		sl := &slot{nc: nc, stop: stop}
		if !s.add(sl) {
			stop()
			_ = nc.Close()
			continue
		}
		conns.Go(func() {
			defer stop()
			export, err := s.serveConn(own, sl)
			s.remove(sl)
			if s.opts.Closed != nil {
				s.opts.Closed(export, err)
			}
		})
	}
}

// passing reports whether an error of Accept says nothing about the listener:
// the client was gone before, or file descriptors have run out for now.
func passing(err error) bool {
	return errors.Is(err, syscall.ECONNABORTED) || errors.Is(err, syscall.EMFILE) ||
		errors.Is(err, syscall.ENFILE) || errors.Is(err, syscall.ENOBUFS) || errors.Is(err, syscall.ENOMEM)
}

// pause waits for d; false when ctx ended first.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

func (s *server) add(sl *slot) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.over || len(s.conns) >= s.opts.MaxConns {
		return false
	}
	s.conns[sl] = struct{}{}
	return true
}

// transmits notes that a connection has left the handshake.
func (s *server) transmits(sl *slot, l link) {
	s.mu.Lock()
	defer s.mu.Unlock()
	sl.link = l
	if s.over {
		l.hush()
	}
}

func (s *server) remove(sl *slot) {
	s.mu.Lock()
	delete(s.conns, sl)
	s.mu.Unlock()
}

// hush ends the reading of requests, and whatever is no further than the handshake.
func (s *server) hush() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.over = true
	for sl := range s.conns {
		if sl.link != nil {
			sl.link.hush()
		} else {
			_ = sl.nc.Close()
		}
	}
}

// cut ends all connections. First what leads to the client: the errors of requests
// that end with their context must not reach it.
func (s *server) cut() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for sl := range s.conns {
		if sl.link != nil {
			sl.link.cut()
			sl.stop()
		}
	}
}

// lookup finds an export by the name a client sent.
func (s *server) lookup(name string) (string, Backend, bool) {
	if b, ok := s.exports[name]; ok {
		return name, b, true
	}
	if name == "" && len(s.exports) == 1 {
		for n, b := range s.exports {
			return n, b, true
		}
	}
	return "", nil, false
}
