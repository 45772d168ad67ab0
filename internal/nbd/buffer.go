package nbd

import (
	"math/bits"
	"sync"
)

// headRoom is the space in front of a buffer's data, for the header of the
// reply: header and data then leave in one system call. 32 keeps data aligned.
const headRoom = 32

// buffer holds the payload of one request or reply.
type buffer struct {
	all   []byte // headRoom + capacity of its class
	data  []byte // all[headRoom : headRoom+length]
	class int
}

// cost is what the buffer takes from the budget.
func (b *buffer) cost() int64 { return int64(len(b.all)) }

const (
	minClass   = 12 // 4 KiB
	maxClass   = 25 // 32 MiB
	keepClass  = 20 // larger buffers go back to the garbage collector at once
	numClasses = maxClass - minClass + 1
)

// bufferPool recycles buffers in classes of powers of two. Safe for concurrent use.
type bufferPool struct{ classes [numClasses]sync.Pool }

// classOf returns the class whose buffers hold n bytes, 0 ≤ n ≤ MaxBlock.
func classOf(n uint32) int {
	if n <= 1<<minClass {
		return minClass
	}
	return bits.Len32(n - 1)
}

// costOf is the cost of the buffer that get(n) would return.
func costOf(n uint32) int64 { return headRoom + 1<<classOf(n) }

// get returns a buffer for n bytes of data, with any content.
func (p *bufferPool) get(n uint32) *buffer {
	c := classOf(n)
	b, _ := p.classes[c-minClass].Get().(*buffer)
	if b == nil {
		b = &buffer{all: make([]byte, headRoom+1<<c), class: c}
	}
	b.data = b.all[headRoom : headRoom+int(n)]
	return b
}

// put takes a buffer back.
func (p *bufferPool) put(b *buffer) {
	if b.class <= keepClass {
		p.classes[b.class-minClass].Put(b)
	}
}

// budget bounds the bytes of buffers in use on one connection.
type budget struct {
	mu    sync.Mutex
	freed sync.Cond
	left  int64
	total int64
	over  bool
}

func newBudget(n int64) *budget {
	b := &budget{left: n, total: n}
	b.freed.L = &b.mu
	return b
}

// take waits until n bytes are free and takes them; false when the budget was
// closed. A request larger than the whole budget is let through alone.
func (b *budget) take(n int64) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	for b.left < n && b.left < b.total && !b.over {
		b.freed.Wait()
	}
	b.left -= n
	return !b.over
}

// tryTake is take where that need not wait.
func (b *budget) tryTake(n int64) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.over || b.left < n && b.left < b.total {
		return false
	}
	b.left -= n
	return true
}

// give returns n bytes.
func (b *budget) give(n int64) {
	b.mu.Lock()
	b.left += n
	b.mu.Unlock()
	b.freed.Signal()
}

// close wakes the waiter for good.
func (b *budget) close() {
	b.mu.Lock()
	b.over = true
	b.mu.Unlock()
	b.freed.Broadcast()
}
