package shim

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"perdure/internal/bitmap"
	"perdure/internal/blockstore"
)

// Which marked chunks does the target really lack? The source asks with digests,
// several questions ahead of the data, so that neither side waits for the other's
// disk or for the link. The target answers in order, and the source takes nothing else.

// resyncVersion is what a standby's hello says where it answers kindDiskAsk. One
// that does not is asked with kindDiskSums, a run at a time.
const resyncVersion = 1

const (
	// askWindow is how many questions may be on their way. Only digests and answers
	// wait, never data: some 8 × 256 × (16 + 17) bytes on either side.
	askWindow = 8
	// askRuns bounds the runs of one question.
	askRuns = sumChunks
)

// Kinds of ordered messages, after those of wire.go.
const (
	kindDiskAsk    uint8 = 90 + iota // primary to secondary: askHead, runs (askRun), digests
	kindDiskAnswer                   // secondary to primary: the question's askHead, one byte per chunk, 1: differs
)

// askHead heads a question about chunks of a disk, and the answer to it.
type askHead struct {
	No     uint64 // of the question, counted from 1 in a session
	Disk   uint32
	Runs   uint32
	Chunks uint32 // of all runs
	Zero   uint32
}

// askRun is a run of chunks; runs ascend and do not touch what came before.
type askRun struct {
	First int64
	Count int64
}

var (
	askHeadSize = binary.Size(askHead{})
	askRunSize  = binary.Size(askRun{})
)

// question is one that is on its way.
type question struct {
	disk    int
	runs    []askRun
	chunks  int
	kind    uint8  // of the answer
	head    []byte // with which the answer begins
	differs []byte // the answer: by chunk, 1: the target lacks it
}

// questions are those on their way, in order. Its methods may be called from any goroutine.
type questions struct {
	news chan struct{} // an answer came

	mu       sync.Mutex
	asked    uint64
	list     []*question // the oldest first
	answered int         // so many of them, from the oldest on
}

func newQuestions() *questions { return &questions{news: make(chan struct{}, 1)} }

// put notes a question that is about to be sent.
func (q *questions) put(x *question) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.list = append(q.list, x)
}

// number is that of the next question.
func (q *questions) number() uint64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.asked++
	return q.asked
}

// open is how many are on their way, or answered and not taken.
func (q *questions) open() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.list)
}

// take takes an answer in. It must be the one to the oldest question without:
// anything else is an error, after which the session must end. It never blocks.
func (q *questions) take(kind uint8, p []byte) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.answered == len(q.list) {
		return fmt.Errorf("an answer of %d bytes to digests that were not sent", len(p))
	}
	x := q.list[q.answered]
	if kind != x.kind || len(p) != len(x.head)+x.chunks || !bytes.Equal(p[:len(x.head)], x.head) {
		return fmt.Errorf("answer to the digests of %d chunks from %d of disk %d: kind %d, %d bytes (%x), not the answer to this question", x.chunks,
			x.runs[0].First, x.disk, kind, len(p), p[:min(len(p), len(x.head))])
	}
	differs := p[len(x.head):]
	for i, d := range differs {
		if d > 1 {
			return fmt.Errorf("answer to the digests of %d chunks from %d of disk %d: %d for chunk %d of it, only 0 and 1 are known", x.chunks,
				x.runs[0].First, x.disk, d, i)
		}
	}
	x.differs = differs
	q.answered++
	select {
	case q.news <- struct{}{}:
	default:
	}
	return nil
}

// next waits for the answer to the oldest question and returns it. gone ends the wait.
func (q *questions) next(ctx context.Context, gone <-chan struct{}) (*question, error) {
	for {
		q.mu.Lock()
		if q.answered > 0 {
			x := q.list[0]
			q.list, q.answered = q.list[1:], q.answered-1
			q.mu.Unlock()
			return x, nil
		}
		q.mu.Unlock()
		select {
		case <-q.news:
		case <-gone:
			return nil, errSessionGone
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// errSessionGone ends a wait for an answer; the session knows the cause.
var errSessionGone = errors.New("the session is lost")

// prefetch has the disk read at once what a question is about.
func (x *question) prefetch(st *blockstore.Store) {
	for _, r := range x.runs {
		st.Prefetch(r.First, r.First+r.Count)
	}
}

// each calls f for every chunk of a question, with its place in it.
func (x *question) each(f func(i int, chunk int64) error) error {
	i := 0
	for _, r := range x.runs {
		for c := r.First; c < r.First+r.Count; c++ {
			if err := f(i, c); err != nil {
				return err
			}
			i++
		}
	}
	return nil
}

// nextRuns takes marked chunks from at on for one question: at most so many, in at
// most so many runs. end is where the next question goes on.
func nextRuns(marks *bitmap.Bitmap, at int64, chunks, runs int) (out []askRun, count int, end int64) {
	for count < chunks && len(out) < runs {
		first, stop, ok := marks.Next(at, int64(chunks-count))
		if !ok {
			return out, count, marks.Len()
		}
		out = append(out, askRun{First: first, Count: stop - first})
		count, at = count+int(stop-first), stop
	}
	return out, count, at
}

// differences copies what the target lacks of one disk.
type differences struct {
	disk     int
	st       *blockstore.Store
	asks     *questions
	oneRun   bool // the target is of the release before
	governor *governor
	send     func(kind uint8, content ...[]byte) error // a question
	copy     func(chunk int64) error                   // sends a chunk's data
	gone     <-chan struct{}                           // the session is lost
	moved    func(chunks int64)                        // so many have been dealt with
}

// copyDiffering sends those of the marked chunks that the target lacks.
func (pr *pair) copyDiffering(n int, marks *bitmap.Bitmap, m *meter, done int64) error {
	buf := make([]byte, blockstore.ChunkSize)
	d := &differences{disk: n, st: pr.p.inst.stores[n], asks: pr.asks, oneRun: pr.oneRun, governor: pr.governor, send: pr.sendKind, gone: pr.sess.Lost(),
		copy:  func(chunk int64) error { return pr.copyChunk(n, chunk, buf, blockstore.ChunkSize/2) },
		moved: func(chunks int64) { m.at(done + chunks*blockstore.ChunkSize) }}
	err := d.run(pr.ctx, marks)
	if errors.Is(err, errSessionGone) {
		return pr.sess.Cause()
	}
	return err
}

// run goes over the marks. Questions are up to askWindow ahead of the data, so the
// next one is on its way before the data of the last. What the guest writes between
// a question and its data is tracked, and sent once more.
func (d *differences) run(ctx context.Context, marks *bitmap.Bitmap) error {
	for at, copied := int64(0), int64(0); ; {
		for d.asks.open() < askWindow && at < marks.Len() {
			runs := askRuns
			if d.oneRun {
				runs = 1
			}
			list, count, end := nextRuns(marks, at, d.governor.chunksAtOnce(sumChunks), runs)
			if at = end; count == 0 {
				break
			}
			if err := d.ask(ctx, &question{disk: d.disk, runs: list, chunks: count}); err != nil {
				return err
			}
			d.moved(copied) // asking is moving, too
		}
		if d.asks.open() == 0 {
			return nil
		}
		x, err := d.asks.next(ctx, d.gone)
		if err != nil {
			return err
		}
		err = x.each(func(i int, c int64) error {
			if copied++; x.differs[i] == 0 {
				return nil
			}
			return d.copy(c)
		})
		if err != nil {
			return err
		}
		d.moved(copied)
	}
}

// ask sends the digests of what a question is about. For the pace a chunk counts
// half here, where only disks are read, and half when its data is sent.
func (d *differences) ask(ctx context.Context, x *question) error {
	sums := make([]byte, 0, 16*x.chunks)
	x.prefetch(d.st)
	for _, r := range x.runs {
		err := d.st.Digest(r.First, r.First+r.Count, func(c blockstore.ChunkDigest) error {
			sums = append(sums, c.Sum[:]...)
			return d.governor.wait(ctx, blockstore.ChunkSize/2)
		})
		if err != nil {
			return err
		}
	}
	if d.oneRun {
		r := x.runs[0]
		x.kind, x.head = kindDiskDiffer, pack(sumsHead{Disk: uint32(x.disk), Count: uint32(r.Count), First: r.First})
		d.asks.put(x)
		return d.send(kindDiskSums, x.head, sums)
	}
	x.kind, x.head = kindDiskAnswer, pack(askHead{No: d.asks.number(), Disk: uint32(x.disk), Runs: uint32(len(x.runs)), Chunks: uint32(x.chunks)})
	d.asks.put(x)
	return d.send(kindDiskAsk, x.head, pack(x.runs), sums)
}

// copyChunk reads one chunk and sends it; cost is what it counts for the pace, bytes.
func (pr *pair) copyChunk(n int, chunk int64, buf []byte, cost int64) error {
	st := pr.p.inst.stores[n]
	off := chunk * blockstore.ChunkSize
	p := buf[:min(blockstore.ChunkSize, st.Size()-off)]
	if err := pr.governor.wait(pr.ctx, cost); err != nil {
		return err
	}
	if err := st.ReadAt(p, off); err != nil {
		return err
	}
	c := diskChunk{Disk: uint32(n), Off: off, Len: uint32(len(p))}
	if blockstore.IsZero(p) {
		c.Zero, p = 1, nil
	}
	return pr.sendChunk(c, p)
}

// decodeAsk takes a question apart, as it comes from the wire. What it is about
// lies within disks of so many chunks.
func decodeAsk(p []byte, chunks func(disk uint32) (int64, bool)) (head []byte, x *question, sums []byte, err error) {
	var h askHead
	if len(p) < askHeadSize {
		return nil, nil, nil, fmt.Errorf("digests of a disk: %d bytes, at least %d wanted", len(p), askHeadSize)
	}
	head, p = p[:askHeadSize], p[askHeadSize:]
	if err := unpack(head, &h); err != nil {
		return nil, nil, nil, err
	}
	total, ok := chunks(h.Disk)
	if !ok {
		return nil, nil, nil, fmt.Errorf("digests of disk %d, which is not there", h.Disk)
	}
	if h.Runs == 0 || h.Runs > askRuns || h.Chunks == 0 || h.Chunks > sumChunks || len(p) != int(h.Runs)*askRunSize+16*int(h.Chunks) {
		return nil, nil, nil, fmt.Errorf("digests of %d chunks in %d runs of disk %d: %d bytes", h.Chunks, h.Runs, h.Disk, len(p))
	}
	x = &question{disk: int(h.Disk), runs: make([]askRun, h.Runs), chunks: int(h.Chunks)}
	if err := unpack(p[:int(h.Runs)*askRunSize], x.runs); err != nil {
		return nil, nil, nil, err
	}
	at, sum := int64(0), int64(0)
	for _, r := range x.runs {
		// Count first: what is added must not overflow.
		if r.Count <= 0 || r.Count > int64(h.Chunks)-sum || r.First < at || r.First > total-r.Count {
			return nil, nil, nil, fmt.Errorf("digests of %d chunks from %d of disk %d, which has %d: out of order, or outside", r.Count, r.First, h.Disk, total)
		}
		at, sum = r.First+r.Count, sum+r.Count
	}
	if sum != int64(h.Chunks) {
		return nil, nil, nil, fmt.Errorf("digests of %d chunks of disk %d: its runs hold %d", h.Chunks, h.Disk, sum)
	}
	return head, x, p[int(h.Runs)*askRunSize:], nil
}

// answerer is the target's side: it compares, and remembers which extents are about
// to be written. What it is told comes in order, from one goroutine.
type answerer struct {
	due []dueWrites // by answer, the oldest first
}

// dueWrites are the extents that an answer has asked for.
type dueWrites struct {
	disk    int
	extents []int64 // ascending
}

// maxDue bounds what is remembered: it is only a hint.
const maxDue = 2 * askWindow

// answer compares what a question is about with what st holds; differs has one byte per chunk.
func (a *answerer) answer(st *blockstore.Store, x *question, sums []byte) (differs []byte, err error) {
	due := dueWrites{disk: x.disk}
	x.prefetch(st)
	differs = make([]byte, 0, x.chunks)
	for _, r := range x.runs {
		err := st.Digest(r.First, r.First+r.Count, func(d blockstore.ChunkDigest) error {
			i := len(differs)
			same := bytes.Equal(d.Sum[:], sums[16*i:16*i+16]) && d.Trust != blockstore.Broken && d.Trust != blockstore.Unreadable
			differs = append(differs, byte(boolByte(!same)))
			if e := d.Chunk * blockstore.ChunkSize / blockstore.ExtentSize; !same && (len(due.extents) == 0 || due.extents[len(due.extents)-1] != e) {
				due.extents = append(due.extents, e)
			}
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("compare disk %d: %w", x.disk, err)
		}
	}
	if len(due.extents) > 1 {
		if a.due = append(a.due, due); len(a.due) > maxDue {
			a.due = a.due[1:]
		}
	}
	return differs, nil
}

// coming says that a chunk at off is about to be written: the extents of the answer
// that asked for it are made ready with one sync, instead of one each.
func (a *answerer) coming(st *blockstore.Store, disk int, off int64) error {
	e := off / blockstore.ExtentSize
	for i, d := range a.due {
		if d.disk == disk && d.extents[0] == e {
			a.due = a.due[i+1:]
			return st.Expect(d.extents)
		}
	}
	return nil
}

// takeAsk answers a question of the primary.
func (st *standby) takeAsk(p []byte) error {
	head, x, sums, err := decodeAsk(p, func(disk uint32) (int64, bool) {
		if int64(disk) >= int64(len(st.inst.stores)) {
			return 0, false
		}
		return st.inst.stores[disk].Chunks(), true
	})
	if err != nil {
		return err
	}
	differs, err := st.answers.answer(st.inst.stores[x.disk], x, sums)
	if err != nil {
		return err
	}
	return st.sendKind(kindDiskAnswer, head, differs)
}

// takeSums answers a question of a primary of the release before.
func (st *standby) takeSums(p []byte) error {
	var h sumsHead
	head := binary.Size(h)
	if len(p) < head {
		return fmt.Errorf("digests of a disk: %d bytes, at least %d wanted", len(p), head)
	}
	if err := unpack(p[:head], &h); err != nil {
		return err
	}
	sums := p[head:]
	if int64(h.Disk) >= int64(len(st.inst.stores)) || h.Count == 0 || h.Count > sumChunks || len(sums) != 16*int(h.Count) {
		return fmt.Errorf("digests of %d chunks of disk %d: %d bytes", h.Count, h.Disk, len(sums))
	}
	if total := st.inst.stores[h.Disk].Chunks(); h.First < 0 || h.First > total-int64(h.Count) {
		return fmt.Errorf("digests of %d chunks from %d of disk %d, which has %d", h.Count, h.First, h.Disk, total)
	}
	differs, err := st.answers.answer(st.inst.stores[h.Disk], &question{disk: int(h.Disk), runs: []askRun{{h.First, int64(h.Count)}}, chunks: int(h.Count)}, sums)
	if err != nil {
		return err
	}
	return st.sendKind(kindDiskDiffer, pack(h), differs)
}

// flushEvery is how much of a copy the target writes before it begins to make that
// durable, while the rest comes: the flush at the end would find all of it undone, as
// the system begins by itself only when much of the memory is full of it.
const flushEvery = 64 << 20

// earlyFlush is how far that is. unflushed is of the goroutine that receives.
type earlyFlush struct {
	unflushed int64
	busy      atomic.Bool
}

// flushAhead notes that a piece of a copy is written to a store.
func (st *standby) flushAhead(store *blockstore.Store, n int64) {
	if st.early.unflushed += n; st.early.unflushed < flushEvery || !st.early.busy.CompareAndSwap(false, true) {
		return
	}
	st.early.unflushed = 0
	st.goWork(func() {
		defer st.early.busy.Store(false)
		_ = store.Flush() // one that failed has given the replica up, which the next write is told
	})
}
