// Package chardev is the shim's end of a guest's character devices: serial
// console and guest-agent port. What the guest writes is held back with the
// epoch that wrote it, like frames; what goes to the guest is held back while
// it is stopped, since QEMU would move ring indices in memory behind the
// checkpoint's back.
//
// Concurrency: all methods may be called from any goroutine; Hold, Cut and
// Unhold belong to the one who stops the guest. A Port reads always.
//
// Not guaranteed: a client that does not read is cut off, and output that was
// released while nobody was attached is kept only in the history (64 KiB).
package chardev

import (
	"context"
	"io"
	"time"
)

// Options of Listen.
type Options struct {
	// History is the size of the ring of released output in bytes; 0 means 64 KiB, negative none.
	History int
	// MaxHeld bounds held output in bytes; 0 means 1 MiB. OnBound is called when
	// it is crossed, from the reading goroutine; it must not block. Beyond twice the bound reading stops: QEMU's
	// character devices wait then, its main loop does not.
	MaxHeld int
	OnBound func(held int)
}

// Port is the shim's end of one character device.
type Port struct{}

// Listen makes the Unix socket at path (an old one is replaced) and serves the
// QEMU that connects to it, again after each reconnection.
func Listen(path string, o Options) (*Port, error) { panic("not yet") }

// Connected reports whether QEMU is connected.
func (p *Port) Connected() bool { panic("not yet") }

// SetHeld chooses between holding output until Release (true) and passing it on
// at once (false; the state after Listen). Switching to false releases what is held.
func (p *Port) SetHeld(held bool) { panic("not yet") }

// Arrived has an element whenever held output arrived since it was last read.
func (p *Port) Arrived() <-chan struct{} { panic("not yet") }

// Waiting returns how many bytes are held and not cut yet, and since when.
func (p *Port) Waiting() (bytes int, since time.Time) { panic("not yet") }

// Hold waits until QEMU has read everything sent to the guest and keeps further
// input back. To be called before the guest is stopped.
func (p *Port) Hold(ctx context.Context) error { panic("not yet") }

// Unhold lets input flow again; to be called when the guest runs.
func (p *Port) Unhold() { panic("not yet") }

// Cut returns, while the guest is stopped, exactly what it wrote since the last Cut. The caller keeps the slice.
func (p *Port) Cut() []byte { panic("not yet") }

// Release passes the output of an epoch on to the attached clients and the history.
func (p *Port) Release(b []byte) { panic("not yet") }

// Write sends input to the guest. It waits while Hold stands or QEMU reads slowly.
func (p *Port) Write(ctx context.Context, b []byte) error { panic("not yet") }

// Attach connects a client: it gets the history if asked for, then output as
// it is released, and what it sends goes to the guest. Attach returns when rw ends (io.EOF gives nil),
// ctx ends, the Port is closed, or the client reads too slowly. rw is not closed, except when it is an io.Closer and ctx ended.
func (p *Port) Attach(ctx context.Context, rw io.ReadWriter, history bool) error { panic("not yet") }

// History returns a copy of the released output that is kept.
func (p *Port) History() []byte { panic("not yet") }

// Close removes the socket, ends all clients and waits for the goroutines.
func (p *Port) Close() error { panic("not yet") }
