// Package netbuf holds back what a guest sends: it diverts the frames of one
// NIC out of a running QEMU into this process, tells exactly which of them
// belong to the epoch that just ended, and gives them back for sending once
// that epoch is held by the other host.
//
// Concurrency: one goroutine per Diverter reads always, whether anybody wants
// the frames or not, since a full socket would block QEMU's main loop. All methods
// may be called from any goroutine; Hold, Drain and Unhold belong to the one who stops the guest.
//
// Not guaranteed: frames are not kept for ever. Beyond twice Options.MaxBytes
// whole frames are dropped, as a network may, and counted.
package netbuf

import (
	"context"
	"encoding/json"
	"time"
)

// Commander carries out QMP commands; *qemu.QMP is one.
type Commander interface {
	Execute(ctx context.Context, command string, args any) (json.RawMessage, error)
}

// Options of Divert.
type Options struct {
	// MaxBytes is the bound of held output of this NIC; 0 means 8 MiB.
	MaxBytes int64
	// OnBound is called once each time the bound is crossed upwards, from the
	// reading goroutine: the guest must be stopped soon. It must not block.
	OnBound func(nic string, held int64)
}

// Diverter is the diversion of one NIC.
type Diverter struct{}

// Stats of a Diverter since it began.
type Stats struct {
	Frames, Bytes uint64 // arrived from the guest
	Released      uint64 // frames
	Dropped       uint64 // frames beyond the hard bound
}

// Frames are the frames of one epoch of one NIC. Whoever holds them calls
// Release or Drop, once.
type Frames struct{}

// Len returns the number of frames.
func (f Frames) Len() int { panic("not yet") }

// Bytes returns their size.
func (f Frames) Bytes() int64 { panic("not yet") }

// Since returns when the oldest arrived.
func (f Frames) Since() time.Time { panic("not yet") }

// Drop forgets them.
func (f Frames) Drop() { panic("not yet") }

// Divert begins to hold the frames of NIC nicID. Only while the guest is stopped and
// the tap's gate shut. Two Unix sockets are made in sockDir for a moment.
func Divert(ctx context.Context, q Commander, nicID, sockDir string, o Options) (*Diverter, error) {
	panic("not yet")
}

// NIC returns the id of the NIC.
func (d *Diverter) NIC() string { panic("not yet") }

// Arrived has an element whenever frames arrived since it was last read.
func (d *Diverter) Arrived() <-chan struct{} { panic("not yet") }

// Waiting returns what is held and not yet drained, and since when the oldest waits.
func (d *Diverter) Waiting() (frames int, bytes int64, since time.Time) { panic("not yet") }

// Hold waits until QEMU has taken everything that Release has written, and keeps
// Release from writing more. To be called before the guest is stopped: a stopped guest's
// QEMU would leave what it takes lying in a queue until the next frame comes.
func (d *Diverter) Hold(ctx context.Context) error { panic("not yet") }

// Unhold lets Release write again; to be called when the guest runs.
func (d *Diverter) Unhold() { panic("not yet") }

// Drain returns, while the guest is stopped, exactly the frames it sent since
// the last Drain.
func (d *Diverter) Drain(ctx context.Context) (Frames, error) { panic("not yet") }

// Release sends the frames out of the host. Frames of different epochs are
// sent in the order of the calls. While Hold stands, it waits.
func (d *Diverter) Release(ctx context.Context, f Frames) error { panic("not yet") }

// Stats returns the counters.
func (d *Diverter) Stats() Stats { panic("not yet") }

// Err returns why the diversion broke (QEMU's end, mostly), or nil.
func (d *Diverter) Err() error { panic("not yet") }

// Remove ends the diversion: the guest's frames go straight out again. Only
// while the guest is stopped and after Drain and Release of the last frames.
func (d *Diverter) Remove(ctx context.Context) error { panic("not yet") }

// Close forgets everything held and ends the goroutine, without a word to QEMU (which is gone or about to be).
func (d *Diverter) Close() error { panic("not yet") }
