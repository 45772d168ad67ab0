package netbuf

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"sync"
	"time"
)

// Outlet is where released frames leave the host: *hostnet.Tap is one.
type Outlet interface {
	// Send sends one Ethernet frame behind its virtio-net header, which is header
	// bytes long. It does not block.
	Send(frame []byte, header int) error
}

// Frames are the frames of one epoch of one NIC. Whoever holds them calls
// Send or Drop, once.
type Frames struct {
	parts  []*buffer
	frames int
	bytes  int64
	since  time.Time
}

// Len returns the number of frames.
func (f Frames) Len() int { return f.frames }

// Bytes returns their size, with headers.
func (f Frames) Bytes() int64 { return f.bytes }

// Since returns when the oldest arrived; zero if there is none.
func (f Frames) Since() time.Time { return f.since }

// Send sends all of them, in order, and forgets them. The caller holds the right
// to let output leave. A frame that cannot be sent is lost, as on any network;
// the others are sent all the same, and the first error is returned.
func (f Frames) Send(out Outlet) error {
	defer f.Drop()
	var failed error
	lost := 0
	for _, p := range f.parts {
		for b := p.data[:p.whole]; len(b) > 0; {
			n, header := int(binary.BigEndian.Uint32(b)), int(binary.BigEndian.Uint32(b[4:]))
			frame := b[prefix : prefix+n]
			b = b[prefix+n:]
			if announcement(frame) {
				continue
			}
			if err := out.Send(frame, header); err != nil {
				lost++
				failed = cmp.Or(failed, err)
			}
		}
	}
	if failed != nil {
		return fmt.Errorf("send frames: %d of %d lost: %w", lost, f.frames, failed)
	}
	return nil
}

// announcement recognises what QEMU sends by itself when it goes on after a
// load, which comes without the header that it is said to have. Whoever moves a
// guest announces it in its own way.
func announcement(frame []byte) bool {
	const broadcast, rarp = "\xff\xff\xff\xff\xff\xff", "\x80\x35"
	return len(frame) == 60 && string(frame[:6]) == broadcast && string(frame[12:14]) == rarp
}

// Drop forgets them.
func (f Frames) Drop() {
	for _, p := range f.parts {
		p.free()
	}
}

const (
	bufferSize = 256 << 10 // two of the largest frames, or a thousand small ones
	smallPart  = 16 << 10
)

// buffer holds frames as they came: they go back in the same form.
type buffer struct {
	data   []byte
	whole  int // end of the last complete frame
	end    int // end of what was read
	frames int
	home   *sync.Pool // nil: not pooled
}

func newPool() *sync.Pool {
	p := &sync.Pool{}
	p.New = func() any { return &buffer{data: make([]byte, bufferSize), home: p} }
	return p
}

func (b *buffer) room() int { return len(b.data) - b.end }

// reset forgets the complete frames; there must be nothing behind them.
func (b *buffer) reset() { b.whole, b.end, b.frames = 0, 0, 0 }

func (b *buffer) free() {
	if b.home != nil {
		b.reset()
		b.home.Put(b)
	}
}
