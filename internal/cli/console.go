package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"perdure/api"
	"perdure/internal/model"
)

const escapeKey = 0x1d // Ctrl-]

func (a *app) vmConsoleCommand() *cobra.Command {
	var limit time.Duration
	c := a.named("console", "Connect to the serial console", func(ctx context.Context, cl *api.Client, args []string) error {
		if limit < 0 {
			return api.Errorf(api.Invalid, "--for %s is not allowed; it must not be below 0", limit)
		}
		return a.console(ctx, cl, args[0], limit)
	})
	c.Long = `Connects the terminal to the serial console of a VM. Ctrl-] leaves. The console
stays connected through a takeover: it reconnects by itself and says so. Where
the input is no terminal it is sent as it is, and its end ends nothing: output
goes on until the VM stops, the command is interrupted or --for is over.`
	c.Flags().DurationVar(&limit, "for", 0, "leave after this time (default: stay)")
	return c
}

// consoleSession is one perdure vm console. The input is read by one goroutine
// for the whole session, since a read of a terminal cannot be taken back; it
// writes to whichever connection there is.
type consoleSession struct {
	a    *app
	cl   *api.Client
	vm   string
	quit context.CancelFunc // the person left

	mu   sync.Mutex
	conn net.Conn // nil while there is none; what is typed then is dropped

	tail []byte // end of what was shown, to leave out what is repeated
}

func (a *app) console(ctx context.Context, cl *api.Client, vm string, limit time.Duration) error {
	conn, err := cl.Console(ctx, vm)
	if err != nil {
		return err
	}
	ctx, quit := context.WithCancel(ctx)
	defer quit()
	if limit > 0 {
		t := time.AfterFunc(limit, quit)
		defer t.Stop()
	}
	s := &consoleSession{a: a, cl: cl, vm: vm, quit: quit}
	if a.inTTY {
		f := a.in.(*os.File)
		old, err := term.MakeRaw(int(f.Fd()))
		if err != nil {
			conn.Close()
			return fmt.Errorf("set terminal raw: %w", err)
		}
		defer term.Restore(int(f.Fd()), old) //nolint:errcheck // nothing more can be done for the terminal
		s.note("connected to %s; Ctrl-] leaves", vm)
	}
	go s.input() // ends with the input, or with the process
	return s.run(ctx, conn)
}

// note writes a dim line on the error stream; in raw mode lines need a return.
func (s *consoleSession) note(format string, args ...any) {
	end := "\n"
	if s.a.inTTY {
		end = "\r\n"
	}
	text := fmt.Sprintf("[perdure: "+format+"]", args...)
	fmt.Fprint(s.a.err, s.a.paintErr(dim, text)+end)
}

func (s *consoleSession) set(c net.Conn) {
	s.mu.Lock()
	s.conn = c
	s.mu.Unlock()
}

func (s *consoleSession) input() {
	buf := make([]byte, 4096)
	for {
		n, err := s.a.in.Read(buf)
		b := buf[:n]
		left := false
		if s.a.inTTY {
			if i := bytes.IndexByte(b, escapeKey); i >= 0 {
				b, left = b[:i], true
			}
		}
		s.mu.Lock()
		c := s.conn
		s.mu.Unlock()
		if c != nil && len(b) > 0 {
			c.Write(b) //nolint:errcheck // the reading side notices a broken connection
		}
		if left {
			s.quit()
		}
		if left || err != nil {
			return
		}
	}
}

// run shows output, and connects again when a connection ends, until the
// person leaves or the VM is stopped.
func (s *consoleSession) run(ctx context.Context, conn net.Conn) error {
	for again := false; ; again = true {
		stop := context.AfterFunc(ctx, func() { conn.Close() })
		s.set(conn)
		err := s.show(conn, again)
		s.set(nil)
		stop()
		conn.Close()
		if ctx.Err() != nil {
			return s.left(ctx)
		}
		if err != nil {
			return fmt.Errorf("write console output: %w", err)
		}
		lost := s.a.now()
		s.note("connection to the console ended; looking for %s", s.vm)
		if conn, err = s.reconnect(ctx); err != nil || conn == nil {
			if ctx.Err() != nil {
				return s.left(ctx)
			}
			return err
		}
		where := ""
		if vm, err := s.cl.VM(ctx, s.vm); err == nil && vm.Primary != "" {
			where = " on " + vm.Primary
		}
		s.note("connected again%s after %s", where, s.a.now().Sub(lost).Round(time.Millisecond))
	}
}

// left is the end by Ctrl-], --for or a signal: only the last is an error, and
// it shows in the caller's own context, so it is always fine here.
func (s *consoleSession) left(context.Context) error {
	if s.a.inTTY {
		s.note("left")
	}
	return nil
}

// reconnect returns nil without an error when the VM has stopped.
func (s *consoleSession) reconnect(ctx context.Context) (net.Conn, error) {
	for wait := 50 * time.Millisecond; ; wait = min(2*wait, time.Second) {
		try, cancel := context.WithTimeout(ctx, 5*time.Second)
		conn, err := s.cl.Console(try, s.vm)
		cancel()
		if err == nil {
			return conn, nil
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		switch api.ClassOf(err) {
		case api.NotFound, api.Forbidden, api.Invalid:
			return nil, err
		case api.Conflict:
			if vm, e := s.cl.VM(ctx, s.vm); e == nil && vm.Mode == model.ModeStopped {
				s.note("%s has stopped", s.vm)
				return nil, nil
			}
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(wait):
		}
	}
}

const (
	tailLen   = 256       // bytes that are looked for in a repeated history
	tailMin   = 16        // fewer prove nothing
	burstLen  = 256 << 10 // history of a console is not longer
	burstTime = 200 * time.Millisecond
)

// show copies output until the connection ends. A new connection begins with
// recent history: what was shown before is left out.
func (s *consoleSession) show(conn net.Conn, again bool) error {
	if again && len(s.tail) >= tailMin {
		if err := s.showNew(conn); err != nil {
			return err
		}
	}
	buf := make([]byte, 32<<10)
	for {
		n, err := conn.Read(buf)
		if werr := s.write(buf[:n]); werr != nil {
			return werr
		}
		if err != nil {
			return nil //nolint:nilerr // the stream has ended, and is asked for anew
		}
	}
}

// showNew reads the burst that a connection begins with and shows what comes
// after the end of what was shown before.
func (s *consoleSession) showNew(conn net.Conn) error {
	conn.SetReadDeadline(time.Now().Add(burstTime)) //nolint:errcheck // the read below fails instead
	var burst bytes.Buffer
	_, err := io.CopyN(&burst, conn, burstLen)
	conn.SetReadDeadline(time.Time{}) //nolint:errcheck // as above
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, io.EOF) {
		return s.write(burst.Bytes())
	}
	b := burst.Bytes()
	if i := bytes.LastIndex(b, s.tail); i >= 0 {
		b = b[i+len(s.tail):]
	}
	return s.write(b)
}

func (s *consoleSession) write(b []byte) error {
	if len(b) == 0 {
		return nil
	}
	s.tail = append(s.tail, b...)
	if len(s.tail) > tailLen {
		s.tail = append(s.tail[:0], s.tail[len(s.tail)-tailLen:]...)
	}
	_, err := s.a.out.Write(b)
	return err
}
