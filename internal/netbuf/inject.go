package netbuf

import (
	"context"
	"encoding/binary"
)

// vnetHeader is the length of the virtio-net header that a guest with
// VIRTIO_F_VERSION_1 or mergeable buffers uses (virtio 1.2, 5.1.6).
const vnetHeader = 12

// Inject sends one Ethernet frame out of the host as if the guest had sent
// it, through the same way as released frames. The caller holds the right to
// let output leave.
func (d *Diverter) Inject(ctx context.Context, frame []byte) error {
	b := make([]byte, prefix+vnetHeader, prefix+vnetHeader+len(frame))
	binary.BigEndian.PutUint32(b, uint32(vnetHeader+len(frame)))
	binary.BigEndian.PutUint32(b[4:], vnetHeader)
	b = append(b, frame...)
	return d.Release(ctx, Frames{frames: 1, bytes: int64(len(b)), parts: []*buffer{{data: b, whole: len(b), end: len(b), frames: 1}}})
}
