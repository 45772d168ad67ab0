package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// ErrClosed means that the monitor connection ended, usually because QEMU did.
var ErrClosed = errors.New("QMP connection closed")

// dialRetry is how often DialQMP looks for a QEMU that is still starting.
const dialRetry = 5 * time.Millisecond

// QMP is a connection to QEMU's machine monitor. One QEMU serves one
// connection at a time.
type QMP struct {
	conn    *net.UnixConn
	logTail func(n int) string
	events  *eventQueue
	closing atomic.Bool
	done    chan struct{}

	wmu   sync.Mutex // held while commands are put into pending and written
	buf   []byte
	armed bool // the beginning of the next command has been written

	mu       sync.Mutex
	pending  []*call               // commands without a reply, in the order in which QEMU answers
	watchers map[string]chan Event // internal listeners, by event name
	suspect  bool                  // something but Stop may have stopped the guest since the last Cont
	err      error

	stopMu sync.Mutex // Stop, Cont: one of them at a time
	save   saver
}

// call is one command that waits for its reply.
type call struct {
	command string
	args    []byte // JSON, nil for none
	// swallow is an event that this command causes and nobody else needs to
	// hear of; seen says that it came. Both belong to the reader until reply.
	swallow string
	seen    bool
	at      time.Time // of the event
	reply   chan reply
}

type reply struct {
	value   json.RawMessage
	seen    bool      // the call's event came
	at      time.Time // and when, by QEMU's clock
	suspect bool      // an event that tells of another reason to stand still came since the last Cont
	err     error
}

// Error is an error that QEMU itself answered.
type Error struct {
	Command string
	Class   string
	Desc    string
}

// Error implements error.
func (e *Error) Error() string { return "QEMU refused " + e.Command + ": " + e.Desc }

// message is everything that QEMU may send.
type message struct {
	Greeting json.RawMessage `json:"QMP"`
	Return   json.RawMessage `json:"return"`
	Error    *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
	Event     string          `json:"event"`
	Data      json.RawMessage `json:"data"`
	Timestamp struct {
		Seconds      int64 `json:"seconds"`
		Microseconds int64 `json:"microseconds"`
	} `json:"timestamp"`
}

// DialQMP connects to the monitor at path and waits, until ctx ends, for QEMU
// to be there. logTail, which may be nil, is asked for the tail of QEMU's log when
// the connection ends, to be quoted in errors (Process.LogTail fits).
func DialQMP(ctx context.Context, path string, logTail func(n int) string) (*QMP, error) {
	conn, err := dialUnix(ctx, path)
	if err != nil {
		return nil, err
	}
	q := &QMP{conn: conn, logTail: logTail, events: newEventQueue(), done: make(chan struct{}),
		watchers: map[string]chan Event{}}
	greeted := make(chan struct{})
	go q.read(greeted)
	select {
	case <-greeted:
	case <-q.done:
		return nil, fmt.Errorf("connect to QEMU's monitor: %w", q.Err())
	case <-ctx.Done():
		q.Close()
		return nil, fmt.Errorf("wait for the greeting of QEMU's monitor at %s (does another client hold it?): %w", path, ctx.Err())
	}
	if _, err := q.Execute(ctx, "qmp_capabilities", nil); err != nil {
		q.Close()
		return nil, fmt.Errorf("connect to QEMU's monitor: %w", err)
	}
	return q, nil
}

func dialUnix(ctx context.Context, path string) (*net.UnixConn, error) {
	t := time.NewTicker(dialRetry)
	defer t.Stop()
	for {
		var d net.Dialer
		c, err := d.DialContext(ctx, "unix", path)
		if err == nil {
			return c.(*net.UnixConn), nil
		}
		if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ECONNREFUSED) {
			return nil, fmt.Errorf("connect to QEMU's monitor: %w", err)
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return nil, fmt.Errorf("connect to QEMU's monitor: %w; last: %w", ctx.Err(), err)
		}
	}
}

// Close ends the connection and waits for its goroutines; QEMU goes on.
func (q *QMP) Close() error {
	q.closing.Store(true)
	err := q.conn.Close()
	<-q.done
	q.save.close()
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// Done is closed when the connection has ended; Err then says why.
func (q *QMP) Done() <-chan struct{} { return q.done }

// Err returns why the connection ended, or nil while it stands.
func (q *QMP) Err() error {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.err
}

// Events delivers QEMU's events. Events that tell of a run state are never
// lost; others are dropped while the reader is far behind. STOP and RESUME
// events caused by this connection's own Stop and Cont are not delivered.
// The channel is closed after the connection's end. One reader.
func (q *QMP) Events() <-chan Event { return q.events.out }

// Execute carries out a command and returns its result. args is marshalled to
// JSON; nil means none. An error answered by QEMU is an *Error. When ctx ends
// first, the command may still be carried out.
func (q *QMP) Execute(ctx context.Context, command string, args any) (json.RawMessage, error) {
	return q.ExecuteFile(ctx, command, args, nil)
}

// ExecuteFile is Execute with a file descriptor passed along, as getfd and
// add-fd take it. The caller keeps f.
func (q *QMP) ExecuteFile(ctx context.Context, command string, args any, f *os.File) (json.RawMessage, error) {
	var raw []byte
	if args != nil {
		var err error
		if raw, err = json.Marshal(args); err != nil {
			return nil, fmt.Errorf("marshal arguments of %s: %w", command, err)
		}
	}
	c := newCall(command, raw, "")
	if err := q.send(f, c); err != nil {
		return nil, err
	}
	r := c.wait(ctx)
	return r.value, r.err
}

// HumanCommand carries out a command of the human monitor and returns its output.
func (q *QMP) HumanCommand(ctx context.Context, line string) (string, error) {
	raw, err := q.Execute(ctx, "human-monitor-command", map[string]string{"command-line": line})
	if err != nil {
		return "", err
	}
	var s string
	if err := json.Unmarshal(raw, &s); err != nil {
		return "", fmt.Errorf("read output of %q: %w", line, err)
	}
	return s, nil
}

func newCall(command string, args []byte, swallow string) *call {
	return &call{command: command, args: args, swallow: swallow, reply: make(chan reply, 1)}
}

// beginning is what each command begins with. QEMU's monitor reads one byte at
// a time and runs through its event loop for each, at several microseconds a byte. So
// commands are kept short (no ids: QEMU answers in order), and the beginning
// of the next one is sent with each, to be read while QEMU is busy or idle.
const beginning = `{"execute":"`

// send writes commands with one system call; QEMU carries them out in order.
func (q *QMP) send(f *os.File, calls ...*call) error {
	q.wmu.Lock()
	defer q.wmu.Unlock()
	b := q.buf[:0]
	for _, c := range calls {
		if !q.armed {
			b = append(b, beginning...)
		}
		b = append(b, c.command...)
		b = append(b, '"')
		if c.args != nil {
			b = append(b, `,"arguments":`...)
			b = append(b, c.args...)
		}
		b = append(b, '}')
		q.armed = false
	}
	b = append(b, beginning...)
	q.armed = true
	q.buf = b

	q.mu.Lock()
	if q.err != nil {
		q.mu.Unlock()
		return fmt.Errorf("%s: %w", calls[0].command, q.err)
	}
	q.pending = append(q.pending, calls...)
	q.mu.Unlock()
	err := q.write(b, f)
	if err == nil {
		return nil
	}
	// What QEMU has got of it nobody knows; and the reader knows better why.
	q.conn.Close()
	<-q.done
	return fmt.Errorf("%s: %w", calls[0].command, errors.Join(q.Err(), err))
}

func (q *QMP) write(b []byte, f *os.File) error {
	if f == nil {
		_, err := q.conn.Write(b)
		return err
	}
	rc, err := f.SyscallConn() // not Fd(), which would make f blocking
	if err != nil {
		return err
	}
	var werr error
	err = rc.Control(func(fd uintptr) {
		var n int
		n, _, werr = q.conn.WriteMsgUnix(b, syscall.UnixRights(int(fd)), nil)
		if werr == nil && n < len(b) {
			_, werr = q.conn.Write(b[n:])
		}
	})
	return errors.Join(err, werr)
}

// wait returns the reply. If ctx ends first, the reader still takes the reply
// when it comes.
func (c *call) wait(ctx context.Context) reply {
	select {
	case r := <-c.reply:
		return r
	case <-ctx.Done():
		return reply{err: fmt.Errorf("wait for QEMU's reply to %s: %w", c.command, ctx.Err())}
	}
}

// read is the connection's only reader.
func (q *QMP) read(greeted chan struct{}) {
	d := json.NewDecoder(q.conn) // no bound on the size of a message
	var err error
	for {
		var m message
		if err = d.Decode(&m); err != nil {
			break
		}
		switch {
		case m.Event != "":
			q.event(&m)
		case m.Greeting != nil:
			close(greeted)
		default:
			q.answer(&m)
		}
	}
	q.fail(err)
}

func (q *QMP) answer(m *message) {
	q.mu.Lock()
	if len(q.pending) == 0 {
		q.mu.Unlock()
		return // an error about something that was no command; none of ours is that
	}
	c := q.pending[0]
	q.pending = q.pending[1:]
	r := reply{value: m.Return, seen: c.seen, at: c.at, suspect: q.suspect}
	if c.swallow == "RESUME" && m.Error == nil {
		q.suspect = false
	}
	q.mu.Unlock()
	if m.Error != nil {
		r.err = &Error{Command: c.command, Class: m.Error.Class, Desc: m.Error.Desc}
	}
	c.reply <- r
}

func (q *QMP) event(m *message) {
	e := Event{Name: m.Event, Data: m.Data, Time: time.Unix(m.Timestamp.Seconds, m.Timestamp.Microseconds*1000)}
	q.mu.Lock()
	own := false
	if e.Name == "STOP" || e.Name == "RESUME" {
		for _, c := range q.pending {
			if c.swallow == e.Name {
				c.seen, c.at, own = true, e.Time, true
				break
			}
		}
	}
	if !own && stateEvent(e.Name) {
		q.suspect = true
	}
	w := q.watchers[e.Name]
	q.mu.Unlock()
	if w != nil {
		select {
		case w <- e:
		default: // it has room for all that can come
		}
	}
	if !own {
		q.events.put(e)
	}
}

// watch lets the reader hand events of one name to an operation as well.
func (q *QMP) watch(name string) (events <-chan Event, end func()) {
	ch := make(chan Event, 64)
	q.mu.Lock()
	q.watchers[name] = ch
	q.mu.Unlock()
	return ch, func() {
		q.mu.Lock()
		delete(q.watchers, name)
		q.mu.Unlock()
	}
}

// fail ends every call, once, with the reason.
func (q *QMP) fail(cause error) {
	err := ErrClosed
	if !q.closing.Load() {
		if errors.Is(cause, io.EOF) || errors.Is(cause, syscall.ECONNRESET) {
			err = fmt.Errorf("%w by QEMU", ErrClosed)
		} else {
			err = fmt.Errorf("%w: %w", ErrClosed, cause)
		}
		if q.logTail != nil {
			if s := q.logTail(tailBytes); s != "" {
				err = fmt.Errorf("%w; its log ends: %s", err, s)
			}
		}
	}
	q.conn.Close()
	q.mu.Lock()
	q.err = err
	calls := q.pending
	q.pending = nil
	q.mu.Unlock()
	for _, c := range calls {
		c.reply <- reply{err: fmt.Errorf("%s: %w", c.command, err)}
	}
	q.events.end()
	close(q.done)
}
