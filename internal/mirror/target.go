package mirror

import (
	"context"
	"encoding/binary"
	"fmt"
	"sync"
)

// Target is the side that follows: it carries out what a Source sends.
type Target struct {
	replicas []Replica
	answer   Send
	fail     func(error)

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
// Done; its errors are not the Target's affair. fail is called at the first
// request that cannot be carried out.
func NewTarget(replicas []Replica, answer Send, fail func(error)) *Target {
	return &Target{replicas: replicas, answer: answer, fail: fail, slots: make(chan struct{}, maxWork)}
}

// Take carries out one message of the Source, or begins to. Its error says that
// the message is malformed. It owns payload from now on.
//
// Requests are carried out side by side: the Source sends none that overlaps one
// which it has no answer to yet, and a FLUSH covers only what was answered.
func (t *Target) Take(payload []byte) error {
	h, data, err := t.decode(payload)
	if err != nil {
		return err
	}
	if h.Op == opWrite && len(data) <= quickWrite && h.Flags&flagFUA == 0 || h.Flags&flagMore != 0 {
		t.carryOut(h, data)
		return nil
	}
	t.slots <- struct{}{}
	t.work.Add(1)
	go func() {
		defer func() { <-t.slots; t.work.Done() }()
		t.carryOut(h, data)
	}()
	return nil
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
