// Package guestsvc holds the services of the demo guest: what runs inside the
// VM so that clients outside can tell whether it went on where it was, started
// anew, or lost something.
//
//	port  service
//	7     echo: every byte comes back
//	9     counter: a line in, "N HASH\n" out; N and the SHA-256 chain over all lines
//	      live in memory only. The first word of a line names the counter, so
//	      that several clients have one each.
//	10    log: a line in, appended to DATA/log and fsync-ed, "N\n" out (N = lines
//	      in the log); "LIST" prints all lines, then "END N"
//	12    the same on the second disk
//	11    control: see Server.control
//
// Every service speaks lines over TCP and serves each connection in a
// goroutine of its own, owned by Server.Serve. A failed write or fsync of the
// log answers "ERR …" and is never retried; the line may or may not be there.
package guestsvc

import (
	"bufio"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
)

// Ports of the services.
const (
	PortEcho    = 7
	PortCounter = 9
	PortLog     = 10
	PortControl = 11
	PortLog1    = 12
)

// Machine is what the control service can do to the machine it runs on.
type Machine interface {
	PowerOff() error                  // ends the guest in order
	Reboot() error                    // the same, and boots again
	Panic() error                     // crashes the kernel; returns only on failure
	Fsck(dir string) (string, error)  // checks the file system mounted there, says what was found
	BootCheck() string                // what the check at boot found
	Meter(on bool) error              // starts or stops a process that counts CPU work at the lowest priority
	MeterCount() (uint64, error)      // work done so far, in units of hashing 4 KiB
	Dirty(mbs, seconds, mb int) error // dirties memory in the background: mbs MB/s (0: as fast as it can) in a buffer of mb MB; seconds 0 stops
	Shell(ctx context.Context, cmd string, out io.Writer) error
}

// Server serves all services.
type Server struct {
	Data    []string // directories of the disks, in order; may be empty
	Machine Machine  // nil: control commands that need it are refused

	mu       sync.Mutex
	counters map[string]*counter
	logs     [2]logFile
}

type counter struct {
	n     uint64
	chain [32]byte
}

// Count adds a line (with its newline) to the counter that its first word
// names, and returns the number of lines and the chain after it.
func (s *Server) Count(line []byte) (n uint64, chain [32]byte) {
	key, _, _ := strings.Cut(strings.TrimSuffix(string(line), "\n"), " ")
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.counters == nil {
		s.counters = map[string]*counter{}
	}
	c := s.counters[key]
	if c == nil {
		c = &counter{}
		s.counters[key] = c
	}
	c.n++
	c.chain = NextChain(c.chain, line)
	return c.n, c.chain
}

// NextChain is the chain after one more line: SHA-256 of chain and line.
func NextChain(chain [32]byte, line []byte) [32]byte {
	return sha256.Sum256(append(chain[:], line...))
}

// Listen opens all ports on one address; base is added to each port.
func Listen(host string, base int) (map[int]net.Listener, error) {
	ls := map[int]net.Listener{}
	for _, p := range []int{PortEcho, PortCounter, PortLog, PortControl, PortLog1} {
		l, err := net.Listen("tcp", fmt.Sprintf("%s:%d", host, base+p))
		if err != nil {
			for _, l := range ls {
				l.Close()
			}
			return nil, fmt.Errorf("listen on port %d: %w", base+p, err)
		}
		ls[p] = l
	}
	return ls, nil
}

// Serve serves the listeners, keyed by the service's port, until ctx ends.
// It returns when every connection has been closed.
func (s *Server) Serve(ctx context.Context, ls map[int]net.Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	for port, l := range ls {
		handle := s.handler(port)
		wg.Go(func() {
			for {
				c, err := l.Accept()
				if err != nil {
					if errors.Is(err, net.ErrClosed) {
						return
					}
					continue
				}
				wg.Go(func() {
					stop := context.AfterFunc(ctx, func() { c.Close() })
					defer stop()
					defer c.Close()
					handle(ctx, c)
				})
			}
		})
	}
	<-ctx.Done()
	for _, l := range ls {
		l.Close()
	}
	wg.Wait()
	return context.Cause(ctx)
}

func (s *Server) handler(port int) func(context.Context, net.Conn) {
	switch port {
	case PortEcho:
		return func(_ context.Context, c net.Conn) { _, _ = io.Copy(c, c) }
	case PortCounter:
		return func(_ context.Context, c net.Conn) {
			lines(c, func(line []byte) error {
				n, chain := s.Count(line)
				_, err := fmt.Fprintf(c, "%d %x\n", n, chain)
				return err
			})
		}
	case PortLog:
		return func(_ context.Context, c net.Conn) { s.serveLog(0, c) }
	case PortLog1:
		return func(_ context.Context, c net.Conn) { s.serveLog(1, c) }
	default:
		return func(ctx context.Context, c net.Conn) { s.ServeControl(ctx, c) }
	}
}

// lines calls fn for each whole line, newline included, until it fails.
func lines(r io.Reader, fn func([]byte) error) {
	br := bufio.NewReader(r)
	for {
		line, err := br.ReadBytes('\n')
		if err != nil || fn(line) != nil {
			return
		}
	}
}

// logFile is the durable log of one disk.
type logFile struct {
	mu sync.Mutex
	f  *os.File
	n  int
}

var errNoDisk = errors.New("there is no such disk")

// path is where the log of a disk lies.
func (s *Server) logPath(i int) (string, error) {
	if i >= len(s.Data) {
		return "", errNoDisk
	}
	return filepath.Join(s.Data[i], "log"), nil
}

// open opens the log, counts its lines and cuts off a torn last one, which was
// never acknowledged. The caller holds the lock.
func (l *logFile) open(path string) error {
	if l.f != nil {
		return nil
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return fmt.Errorf("open log: %w", err)
	}
	br := bufio.NewReader(f)
	var size int64
	n := 0
	for {
		line, err := br.ReadBytes('\n')
		if err == io.EOF {
			break
		}
		if err != nil {
			f.Close()
			return fmt.Errorf("read log: %w", err)
		}
		size += int64(len(line))
		n++
	}
	if err := f.Truncate(size); err != nil {
		f.Close()
		return fmt.Errorf("cut torn line: %w", err)
	}
	if _, err := f.Seek(size, io.SeekStart); err != nil {
		f.Close()
		return fmt.Errorf("seek log: %w", err)
	}
	if d, err := os.Open(filepath.Dir(path)); err == nil { // the name must be durable too
		err = d.Sync()
		d.Close()
		if err != nil {
			f.Close()
			return fmt.Errorf("make log durable: %w", err)
		}
	}
	l.f, l.n = f, n
	return nil
}

func (l *logFile) append(path string, line []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.open(path); err != nil {
		return 0, err
	}
	if _, err := l.f.Write(line); err != nil {
		return 0, fmt.Errorf("append: %w", err)
	}
	if err := l.f.Sync(); err != nil {
		return 0, fmt.Errorf("fsync: %w", err)
	}
	l.n++
	return l.n, nil
}

// close lets go of the file, so that the disk can be unmounted.
func (l *logFile) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closeLocked()
}

// closeLocked is close for who holds mu.
func (l *logFile) closeLocked() {
	if l.f != nil {
		l.f.Close()
		l.f = nil
	}
}

func (l *logFile) list(path string, w io.Writer) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.open(path); err != nil {
		return err
	}
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("open log: %w", err)
	}
	defer f.Close()
	bw := bufio.NewWriterSize(w, 1<<16)
	if _, err := io.Copy(bw, f); err != nil {
		return fmt.Errorf("list log: %w", err)
	}
	fmt.Fprintf(bw, "END %d\n", l.n)
	return bw.Flush()
}

func (s *Server) serveLog(i int, c net.Conn) {
	path, perr := s.logPath(i)
	lines(c, func(line []byte) error {
		if perr != nil {
			_, err := fmt.Fprintf(c, "ERR %v\n", perr)
			return err
		}
		if string(line) == "LIST\n" {
			if err := s.logs[i].list(path, c); err != nil {
				fmt.Fprintf(c, "ERR %v\n", err)
				return err
			}
			return nil
		}
		n, err := s.logs[i].append(path, line)
		if err != nil {
			fmt.Fprintf(c, "ERR %v\n", err)
			return err
		}
		_, err = fmt.Fprintf(c, "%d\n", n)
		return err
	})
}

// CloseLogs lets go of all files on the disks; the next line opens them again.
func (s *Server) CloseLogs() {
	for i := range s.logs {
		s.logs[i].close()
	}
}
