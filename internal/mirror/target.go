package mirror

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"slices"
	"sync"
)

// Target is the side that follows: it carries out what a Source sends.
type Target struct {
	replicas []Replica
	answer   Send
	data     Send
	fail     func(error)
	flying   []flying // by disk

	slots chan struct{} // bounds work
	work  sync.WaitGroup

	mu     sync.Mutex
	failed bool
}

// maxWork is how many requests that may take long are carried out at once.
const maxWork = 32

// quickWrite is up to which length a write is carried out where it is received:
// it goes to the page cache.
const quickWrite = 256 << 10

// NewTarget returns a Target of these replicas. answer sends to the Source's
// Done, data to its Data; their errors are not the Target's affair. fail is called at the first
// change that cannot be carried out.
func NewTarget(replicas []Replica, answer, data Send, fail func(error)) *Target {
	return &Target{replicas: replicas, answer: answer, data: data, fail: fail, flying: make([]flying, len(replicas)), slots: make(chan struct{}, maxWork)}
}

// flying are the changes of one disk that are being carried out beside the stream.
type flying struct {
	mu   sync.Mutex
	list []*flight
}

type flight struct {
	off, end int64
	over     chan struct{}
}

func (f *flying) begin(off, end int64) *flight {
	x := &flight{off, end, make(chan struct{})}
	f.mu.Lock()
	f.list = append(f.list, x)
	f.mu.Unlock()
	return x
}

func (f *flying) end(x *flight) {
	f.mu.Lock()
	f.list = slices.DeleteFunc(f.list, func(o *flight) bool { return o == x })
	f.mu.Unlock()
	close(x.over)
}

// before lists those under way in a range.
func (f *flying) before(off, end int64) (out []*flight) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, x := range f.list {
		if x.off < end && off < x.end {
			out = append(out, x)
		}
	}
	return out
}

// Take carries out one message of the Source, or begins to. Its error says that
// the message is malformed. It owns payload from now on.
//
// Requests are carried out side by side, but for those that overlap: a later one
// waits for the changes before it. (A Source sends no change that overlaps one which it
// has no answer to, unless it gave up waiting for its own disk.) A FLUSH covers only
// what was answered.
func (t *Target) Take(payload []byte) error {
	h, data, err := t.decode(payload)
	if err != nil {
		return err
	}
	f := &t.flying[h.Disk]
	first := f.before(h.Off, h.Off+h.Len)
	switch {
	case h.Flags&flagMore != 0:
		await(first)
		t.carryOut(h, data)
		return nil
	case h.Op == opWrite && len(data) <= quickWrite && h.Flags&flagFUA == 0 && len(first) == 0:
		t.carryOut(h, data)
		return nil
	}
	var mine *flight
	if h.Op != opRead {
		mine = f.begin(h.Off, h.Off+h.Len)
	}
	t.slots <- struct{}{}
	t.work.Add(1)
	go func() {
		defer func() { <-t.slots; t.work.Done() }()
		await(first)
		if mine == nil {
			t.read(h)
			return
		}
		t.carryOut(h, data)
		f.end(mine)
	}()
	return nil
}

// await waits for changes that came before, and so have their slots already.
func await(first []*flight) {
	for _, x := range first {
		<-x.over
	}
}

// read answers a read. One that fails ends nothing: it may be that the Source has what is damaged here.
func (t *Target) read(h head) {
	r, ctx := t.replicas[h.Disk], context.Background()
	answer := readHead{ID: h.ID}
	var p []byte
	n, hole, err := r.Extent(ctx, h.Off, h.Len)
	if err == nil && hole && n == h.Len {
		answer.Status = readZeroes
	} else {
		p = make([]byte, h.Len)
		if err = r.ReadAt(ctx, p, h.Off); err != nil {
			answer.Status, p = readFailed, []byte(err.Error())
		} else if len(bytes.TrimLeft(p, "\x00")) == 0 {
			answer.Status, p = readZeroes, nil
		}
	}
	if t.hasFailed() {
		return
	}
	_ = t.data(answer.encode(), p) // a broken stream is noticed by its owner
}

func (t *Target) hasFailed() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.failed
}

// Settle waits until everything that was taken has been carried out. It must
// not be called while Take may be.
func (t *Target) Settle() { t.work.Wait() }

func (t *Target) decode(p []byte) (h head, data []byte, err error) {
	if len(p) < headSize {
		return h, nil, fmt.Errorf("mirrored request: %d bytes, at least %d wanted", len(p), headSize)
	}
	if _, err := binary.Decode(p[:headSize], binary.LittleEndian, &h); err != nil {
		return h, nil, fmt.Errorf("mirrored request: %w", err)
	}
	data = p[headSize:]
	if int64(h.Disk) >= int64(len(t.replicas)) {
		return h, nil, fmt.Errorf("mirrored request for disk %d, there are %d", h.Disk, len(t.replicas))
	}
	size := t.replicas[h.Disk].Size()
	if h.Off < 0 || h.Len < 0 || h.Off > size || h.Len > size-h.Off {
		return h, nil, fmt.Errorf("mirrored request %d: range %d+%d is outside of disk %d of %d bytes", h.ID, h.Off, h.Len, h.Disk, size)
	}
	want, allowed := int64(0), uint8(0)
	switch h.Op {
	case opWrite:
		want, allowed = h.Len, flagFUA|flagMore
	case opZero:
		allowed = flagFUA | flagPunch
	case opFlush:
	case opRead:
		if h.Len == 0 || h.Len > maxPiece {
			return h, nil, fmt.Errorf("mirrored read %d of %d bytes, 1 to %d are allowed", h.ID, h.Len, maxPiece)
		}
	default:
		return h, nil, fmt.Errorf("mirrored request %d: unknown operation %d", h.ID, h.Op)
	}
	if int64(len(data)) != want || h.Flags&^allowed != 0 {
		return h, nil, fmt.Errorf("mirrored request %d (operation %d): %d bytes of data, %d announced, flags %#x", h.ID, h.Op, len(data), want, h.Flags)
	}
	return h, data, nil
}

// carryOut does one request and answers it, unless one failed before.
func (t *Target) carryOut(h head, data []byte) {
	r, ctx := t.replicas[h.Disk], context.Background()
	var err error
	switch h.Op {
	case opWrite:
		// FUA covers the pieces before as well.
		if err = r.WriteAt(ctx, data, h.Off, false); err == nil && h.Flags&flagFUA != 0 {
			err = r.Flush(ctx)
		}
	case opZero:
		err = r.Zero(ctx, h.Off, h.Len, h.Flags&flagFUA != 0, h.Flags&flagPunch != 0)
	case opFlush:
		err = r.Flush(ctx)
	}
	t.mu.Lock()
	first := err != nil && !t.failed
	t.failed = t.failed || err != nil
	failed := t.failed
	t.mu.Unlock()
	if first {
		t.fail(fmt.Errorf("mirrored request on disk %d: %w", h.Disk, err))
	}
	if failed || h.Flags&flagMore != 0 {
		return
	}
	_ = t.answer(binary.LittleEndian.AppendUint64(nil, h.ID)) // a broken stream is noticed by its owner
}
