package netbuf

import (
	"encoding/binary"
	"fmt"
)

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
