package netbuf

import (
	"context"
	"encoding/binary"
	"fmt"
)

// vnetHeader is the length of the virtio-net header that a guest with
// VIRTIO_F_VERSION_1 or mergeable buffers uses (virtio 1.2, 5.1.6); without
// either it is 10. The tap has the same.
const vnetHeader = 12

// Inject sends one Ethernet frame out of the host as if the guest had sent
// it, through the same way as released frames. The caller holds the right to
// let output leave. The header is as long as that of the guest's last frame, or,
// while it has sent none here, as most guests have it.
func (d *Diverter) Inject(ctx context.Context, frame []byte) error {
	d.mu.Lock()
	header := d.header
	d.mu.Unlock()
	b := make([]byte, prefix+header, prefix+header+len(frame))
	binary.BigEndian.PutUint32(b, uint32(header+len(frame)))
	binary.BigEndian.PutUint32(b[4:], uint32(header))
	b = append(b, frame...)
	return d.Release(ctx, Frames{frames: 1, bytes: int64(len(b)), parts: []*buffer{{data: b, whole: len(b), end: len(b), frames: 1}}})
}

// AppendTo appends the frames in the form in which QEMU speaks, for another
// host to send them (ParseFrames). They stay the caller's.
func (f Frames) AppendTo(b []byte) []byte {
	for _, p := range f.parts {
		b = append(b, p.data[:p.whole]...)
	}
	return b
}

// ParseFrames is the reverse of AppendTo. It keeps b.
func ParseFrames(b []byte) (Frames, error) {
	f := Frames{bytes: int64(len(b))}
	for at := 0; at < len(b); f.frames++ {
		if len(b)-at < prefix {
			return Frames{}, fmt.Errorf("parse frames: %d bytes left, a head takes %d", len(b)-at, prefix)
		}
		n := int(binary.BigEndian.Uint32(b[at:]))
		if n > maxFrame-prefix || n > len(b)-at-prefix {
			return Frames{}, fmt.Errorf("parse frames: frame of %d bytes, %d are left, %d allowed", n, len(b)-at-prefix, maxFrame-prefix)
		}
		at += prefix + n
	}
	if f.frames > 0 {
		f.parts = []*buffer{{data: b, whole: len(b), end: len(b), frames: f.frames}}
	}
	return f, nil
}
