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
	return o
}

// server is what the connections of one Serve share.
type server struct {
	exports map[string]Backend
	opts    Options
	pool    bufferPool

	mu    sync.Mutex
	conns map[net.Conn]struct{}
	over  bool
}

// Serve answers clients on ln until ctx ends (then it returns nil) or ln fails.
// It owns ln from the start, and has closed it, all connections, and ended all
// requests when it returns; a backend that ignores its context is waited for.
// The map must not be changed while it is served. An empty export name asks for
// the export "" or, if there is exactly one export, for that.
func Serve(ctx context.Context, ln net.Listener, exports map[string]Backend, opts Options) error {
	s := &server{exports: exports, opts: opts.withDefaults(), conns: map[net.Conn]struct{}{}}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// ln is closed before the connections: none is accepted that nobody would close.
	stop := context.AfterFunc(ctx, func() { _ = ln.Close() })
	defer stop()

	var conns sync.WaitGroup
	var err error
	for {
		var nc net.Conn
		if nc, err = ln.Accept(); err != nil {
			if ctx.Err() == nil && passing(err) && pause(ctx, 20*time.Millisecond) {
				continue
			}
			break
		}
		if !s.add(nc) {
			_ = nc.Close()
			continue
		}
		conns.Go(func() {
			defer s.remove(nc)
			export, err := s.serveConn(ctx, nc)
			if s.opts.Closed != nil {
				s.opts.Closed(export, err)
			}
		})
	}
	stopped := ctx.Err() != nil
	cancel()
	_ = ln.Close()
	s.closeAll()
	conns.Wait()
	if stopped {
		return nil
	}
	return fmt.Errorf("accept NBD client: %w", err)
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

func (s *server) add(c net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.over || len(s.conns) >= s.opts.MaxConns {
		return false
	}
	s.conns[c] = struct{}{}
	return true
}

func (s *server) remove(c net.Conn) {
	_ = c.Close()
	s.mu.Lock()
	delete(s.conns, c)
	s.mu.Unlock()
}

func (s *server) closeAll() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.over = true
	for c := range s.conns {
		_ = c.Close()
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
