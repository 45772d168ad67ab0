package peer

import "sync"

// bufSize is the capacity of pooled buffers: a whole data frame.
const bufSize = headerLen + maxPayload

// bufPool keeps the buffers of large frames. Small ones are left to the
// garbage collector. Safe for concurrent use.
type bufPool struct{ p sync.Pool }

func (b *bufPool) get(n int) []byte {
	if n <= bufSize/2 {
		return make([]byte, n)
	}
	if v, ok := b.p.Get().(*[bufSize]byte); ok {
		return v[:n]
	}
	return new([bufSize]byte)[:n]
}

// put takes a buffer that nobody else holds.
func (b *bufPool) put(buf []byte) {
	if cap(buf) == bufSize {
		b.p.Put((*[bufSize]byte)(buf[:bufSize]))
	}
}
