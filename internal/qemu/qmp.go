package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"time"
)

// ErrClosed means that the monitor connection ended, usually because QEMU did.
var ErrClosed = errors.New("QMP connection closed")

// QMP is a connection to QEMU's machine monitor. One QEMU serves one
// connection at a time.
type QMP struct{}

// Error is an error that QEMU itself answered.
type Error struct {
	Command string
	Class   string
	Desc    string
}

// Error implements error.
func (e *Error) Error() string { panic("not yet") }

// Event is one QMP event.
type Event struct {
	Name string // e.g. "SHUTDOWN"
	Data json.RawMessage
	Time time.Time // QEMU's clock
}

// DialQMP connects to the monitor at path and waits, until ctx ends, for
// QEMU to be there. logTail, which may be nil, is asked for the tail of QEMU's log
// when the connection ends, to be quoted in errors (Process.LogTail fits).
func DialQMP(ctx context.Context, path string, logTail func(n int) string) (*QMP, error) {
	panic("not yet")
}

// Close ends the connection; QEMU goes on.
func (q *QMP) Close() error { panic("not yet") }

// Done is closed when the connection has ended, Err then says why.
func (q *QMP) Done() <-chan struct{} { panic("not yet") }

// Err returns why the connection ended, or nil.
func (q *QMP) Err() error { panic("not yet") }

// Events delivers QEMU's events. Events that tell of a run state are never
// lost; others are dropped while the reader is far behind. STOP and RESUME
// events caused by this connection's own Stop and Cont are not delivered.
// The channel is closed after the connection's end. One reader.
func (q *QMP) Events() <-chan Event { panic("not yet") }

// Execute carries out a command and returns its result. An error answered by
// QEMU is an *Error. When ctx ends first, the command may still be carried out.
func (q *QMP) Execute(ctx context.Context, command string, args any) (json.RawMessage, error) {
	panic("not yet")
}

// ExecuteFile is Execute with a file descriptor passed along, as getfd and
// add-fd take it.
func (q *QMP) ExecuteFile(ctx context.Context, command string, args any, f *os.File) (json.RawMessage, error) {
	panic("not yet")
}

// HumanCommand carries out a command of the human monitor and returns its output.
func (q *QMP) HumanCommand(ctx context.Context, line string) (string, error) { panic("not yet") }
