package shim

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"perdure/internal/blockstore"
	"perdure/internal/model"
)

// resyncRig is a pair of processes whose secondary is away while the guest writes.
type resyncRig struct {
	t  *testing.T
	w  *dry
	mu sync.Mutex
	// sent is how many bytes the last copy took, and took how long it was under way.
	sent   int64
	took   time.Duration
	copied model.Event // the last "disk-copied"
	seen   int         // copies that have ended
}

func newResyncRig(t *testing.T, size int64) *resyncRig {
	r := &resyncRig{t: t, w: newDryOf(t, true, size, blockstore.Options{})}
	r.w.store.mu.Lock()
	r.w.store.seen = r.event
	r.w.store.mu.Unlock()
	r.w.untilDuplex(60 * time.Second)
	r.awaitEnded(1)
	return r
}

func (r *resyncRig) event(e model.Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch e.Type {
	case "disk-copied":
		r.copied = e
		var disk string
		var of int64
		if _, err := fmt.Sscanf(e.Text, "disk %s %d bytes of %d sent", &disk, &r.sent, &of); err != nil {
			r.t.Errorf("event %q: %v", e.Text, err)
		}
	case "synced":
		// Without the start of the standby. Both events are of one host, so in order.
		r.took = time.Duration(r.copied.DurationMS*float64(time.Millisecond)) + e.Time.Sub(r.copied.Time)
		r.seen++
	}
}

// ended is how many copies have ended, as far as events have told.
func (r *resyncRig) ended() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.seen
}

// awaitEnded waits until so many copies have: events come later than the record.
func (r *resyncRig) awaitEnded(n int) {
	r.t.Helper()
	for end := time.Now().Add(20 * time.Second); r.ended() < n; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			r.t.Fatal("no event tells the end of the resync")
		}
	}
}

// outage takes the secondary away, has so many whole chunks written, evenly over
// the disk, and returns what the resync afterwards sent and took.
func (r *resyncRig) outage(chunks int64) (sent int64, took time.Duration) {
	r.t.Helper()
	_, s := (&dryKills{w: r.w}).seats()
	s.powerOff(true, nil)
	r.w.until("simplex", 20*time.Second, func(m model.Record) bool { return m.Mode == model.ModeSimplex })
	conn, err := r.w.dial(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	writeChunks(r.t, conn, chunks, r.w.size/blockstore.ChunkSize/chunks)
	_ = conn.Close()
	before := r.ended()
	s.powerOn()
	r.w.untilDuplex(10 * time.Minute)
	r.awaitEnded(before + 1)
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.sent, r.took
}

// writeChunks writes every so many chunks one that has not been there before.
func writeChunks(t *testing.T, conn net.Conn, n, every int64) {
	t.Helper()
	must := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	_, err := io.ReadFull(conn, make([]byte, 18))
	must(err)
	hello := binary.BigEndian.AppendUint32(nil, 3)
	hello = append(hello, "IHAVEOPT\x00\x00\x00\x01\x00\x00\x00\x05disk0"...)
	_, err = conn.Write(hello)
	must(err)
	_, err = io.ReadFull(conn, make([]byte, 10))
	must(err)
	slots, answered := make(chan struct{}, 16), make(chan error, 1)
	go func() {
		var h [16]byte
		for range n {
			if _, err := io.ReadFull(conn, h[:]); err != nil {
				answered <- err
				return
			}
			if e := binary.BigEndian.Uint32(h[4:]); e != 0 {
				answered <- fmt.Errorf("the disk answers with error %d", e)
				return
			}
			<-slots
		}
		answered <- nil
	}()
	stamp := uint64(time.Now().UnixNano())
	p := make([]byte, 28+blockstore.ChunkSize)
	for i := range n {
		slots <- struct{}{}
		binary.BigEndian.PutUint32(p, 0x25609513)
		binary.BigEndian.PutUint16(p[6:], 1)
		binary.BigEndian.PutUint64(p[8:], uint64(i))
		binary.BigEndian.PutUint64(p[16:], uint64(i*every*blockstore.ChunkSize))
		binary.BigEndian.PutUint32(p[24:], blockstore.ChunkSize)
		for k := 28; k < len(p); k += 512 {
			binary.BigEndian.PutUint64(p[k:], stamp+uint64(i)<<16+uint64(k))
		}
		_, err := conn.Write(p)
		must(err)
	}
	must(<-answered)
}

// peakMemory is the most that the shim of a host has had in memory, in bytes.
func (h *dryHost) peakMemory() int64 {
	l := h.now()
	if l == nil {
		return 0
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", l.cmd.Process.Pid))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(b)) {
		var kib int64
		if n, _ := fmt.Sscanf(line, "VmHWM: %d kB", &kib); n == 1 {
			return kib << 10
		}
	}
	return 0
}

// TestResyncFollowsTheChange: after an outage exactly the chunks that were written
// meanwhile go over the link.
func TestResyncFollowsTheChange(t *testing.T) {
	r := newResyncRig(t, 1<<30)
	for _, chunks := range []int64{16, 160} { // 0.1 % and 1 %
		sent, took := r.outage(chunks)
		t.Logf("%d chunks of %d: %d bytes sent in %v", chunks, r.w.size/blockstore.ChunkSize, sent, took)
		if sent != chunks*blockstore.ChunkSize {
			t.Errorf("%d bytes were sent for %d bytes that had changed", sent, chunks*blockstore.ChunkSize)
		}
	}
}
