package shim

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"perdure/internal/bitmap"
	"perdure/internal/blockstore"
	"perdure/internal/model"
	"perdure/internal/vfs"
)

// askSize makes a disk that takes more than a window of questions, if its chunks are
// asked one by one; the last chunk is a short one.
const askSize = 40<<20 + 12<<10

// askSide is one replica, without a shim.
type askSide struct {
	st  *blockstore.Store
	vol *blockstore.Volume
}

func newAskSide(t *testing.T, opts blockstore.Options) *askSide {
	t.Helper()
	mem := vfs.NewMem()
	if err := blockstore.Create(mem, "/d", blockstore.Params{ID: "disk0", VM: "vm", Size: askSize, State: model.UpToDate}); err != nil {
		t.Fatal(err)
	}
	st, err := blockstore.Open(mem, "/d", "disk0", opts)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := st.Replay(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = st.Close() })
	return &askSide{st, blockstore.NewVolume(st, blockstore.VolumeOptions{})}
}

func (s *askSide) image(t *testing.T) []byte {
	t.Helper()
	p := make([]byte, askSize)
	if err := s.st.ReadAt(p, 0); err != nil {
		t.Fatal(err)
	}
	return p
}

func (s *askSide) write(t *testing.T, rnd *rand.Rand, chunk int64) {
	t.Helper()
	p := make([]byte, min(blockstore.ChunkSize, askSize-chunk*blockstore.ChunkSize))
	for i := 0; i < len(p); i += 4 {
		binary.LittleEndian.PutUint32(p[i:], rnd.Uint32())
	}
	if err := s.vol.WriteAt(t.Context(), p, chunk*blockstore.ChunkSize, false); err != nil {
		t.Fatal(err)
	}
}

// askPair is a source and a target, with the messages of a resync between them in
// one stream, as a session has it; the target answers in a goroutine of its own.
type askPair struct {
	t        *testing.T
	src, dst *askSide
	d        *differences
	stream   chan askMessage
	done     chan struct{}
	answers  answerer
	sent     []int64 // chunks whose data was sent
	most     int     // questions that were open at once
	asked    int     // questions
	before   func(chunk int64)
	answer   func(no int, kind uint8, p []byte) // nil: handed over as it is
}

type askMessage struct {
	kind  uint8
	p     []byte
	chunk int64
}

func newAskPair(t *testing.T, opts blockstore.Options) *askPair {
	p := &askPair{t: t, src: newAskSide(t, opts), dst: newAskSide(t, opts), stream: make(chan askMessage, 4096), done: make(chan struct{})}
	p.d = &differences{st: p.src.st, asks: newQuestions(), gone: make(chan struct{}), moved: func(int64) {}}
	p.d.send = func(kind uint8, content ...[]byte) error {
		p.asked++
		p.most = max(p.most, p.d.asks.open())
		p.stream <- askMessage{kind: kind, p: bytes.Join(content, nil)}
		return nil
	}
	p.d.copy = func(c int64) error {
		if p.before != nil {
			p.before(c)
		}
		b := make([]byte, min(blockstore.ChunkSize, askSize-c*blockstore.ChunkSize))
		if err := p.src.st.ReadAt(b, c*blockstore.ChunkSize); err != nil {
			return err
		}
		p.sent = append(p.sent, c)
		p.stream <- askMessage{p: b, chunk: c}
		return nil
	}
	go p.target()
	t.Cleanup(func() { close(p.stream); <-p.done })
	return p
}

// target is what a standby does.
func (p *askPair) target() {
	defer close(p.done)
	no := 0
	for m := range p.stream {
		if m.kind == 0 {
			err := p.answers.coming(p.dst.st, 0, m.chunk*blockstore.ChunkSize)
			if err == nil {
				err = p.dst.st.WriteAt(m.p, m.chunk*blockstore.ChunkSize)
			}
			if err != nil {
				p.t.Error(err)
			}
			continue
		}
		var head, sums []byte
		var x *question
		var err error
		kind := kindDiskAnswer
		if m.kind == kindDiskSums {
			var h sumsHead
			kind, head, sums = kindDiskDiffer, m.p[:binary.Size(h)], m.p[binary.Size(h):]
			err = unpack(head, &h)
			x = &question{runs: []askRun{{h.First, int64(h.Count)}}, chunks: int(h.Count)}
		} else {
			head, x, sums, err = decodeAsk(m.p, func(uint32) (int64, bool) { return p.dst.st.Chunks(), true })
		}
		if err != nil {
			p.t.Error(err)
			continue
		}
		differs, err := p.answers.answer(p.dst.st, x, sums)
		if err != nil {
			p.t.Error(err)
			continue
		}
		reply := append(bytes.Clone(head), differs...)
		no++
		if p.answer != nil {
			p.answer(no, kind, reply)
		} else if err := p.d.asks.take(kind, reply); err != nil {
			p.t.Error(err)
		}
	}
}

// settle waits until the target has taken all that was sent.
func (p *askPair) settle() {
	close(p.stream)
	<-p.done
	p.stream, p.done = make(chan askMessage, 4096), make(chan struct{})
	go p.target()
}

func marksOf(chunks int64, set ...int64) *bitmap.Bitmap {
	b := bitmap.New(chunks)
	for _, c := range set {
		b.Set(c)
	}
	return b
}

// TestAskDifferences: exactly what differs among what is marked is sent, whatever the
// marks look like, with a target of this release and one of the release before, and
// with an activity log that holds far less than what is written.
func TestAskDifferences(t *testing.T) {
	for name, oneRun := range map[string]bool{"lists of runs": false, "the release before": true} {
		t.Run(name, func(t *testing.T) {
			rnd := rand.New(rand.NewPCG(1, 2))
			p := newAskPair(t, blockstore.Options{Activity: 4})
			p.d.oneRun = oneRun
			chunks := p.src.st.Chunks()
			for round := range 6 {
				marks, want := bitmap.New(chunks), []int64{}
				for c := range chunks {
					if round == 0 || rnd.IntN(1+round) == 0 {
						marks.Set(c)
						if rnd.IntN(2) == 0 || c == chunks-1 {
							p.src.write(t, rnd, c)
							want = append(want, c)
						}
					}
				}
				p.sent = nil
				if err := p.d.run(t.Context(), marks); err != nil {
					t.Fatal(err)
				}
				p.settle()
				if !slices.Equal(p.sent, want) {
					t.Fatalf("round %d: chunks %v were sent, want %v", round, p.sent, want)
				}
				if !bytes.Equal(p.src.image(t), p.dst.image(t)) {
					t.Fatalf("round %d: the replicas differ", round)
				}
			}
			if p.most > askWindow {
				t.Errorf("%d questions were on their way, at most %d may be", p.most, askWindow)
			}
		})
	}
}

// TestAskWindow: many isolated chunks share a question; the window is used, and never
// exceeded; and no data goes before the question after its own, while there is one.
func TestAskWindow(t *testing.T) {
	rnd := rand.New(rand.NewPCG(3, 4))
	p := newAskPair(t, blockstore.Options{})
	chunks := p.src.st.Chunks()
	var marks []int64
	for c := int64(0); c < chunks; c += 2 {
		marks = append(marks, c)
		p.src.write(t, rnd, c)
	}
	if err := p.d.run(t.Context(), marksOf(chunks, marks...)); err != nil {
		t.Fatal(err)
	}
	if want := (len(marks) + askRuns - 1) / askRuns; p.asked != want {
		t.Errorf("%d questions for %d chunks, want %d", p.asked, len(marks), want)
	}
	// Small ones, as when the guest is yielded to: the window fills.
	p.d.oneRun, p.asked, p.most = true, 0, 0
	var perQuestion int
	p.before = func(c int64) {
		perQuestion++
		if left := len(marks) - p.asked; left > 0 && p.asked < perQuestion+1 {
			t.Fatalf("data of question %d goes before question %d", perQuestion, p.asked+1)
		}
	}
	for _, c := range marks {
		p.src.write(t, rnd, c)
	}
	if err := p.d.run(t.Context(), marksOf(chunks, marks...)); err != nil {
		t.Fatal(err)
	}
	if p.most != askWindow {
		t.Errorf("at most %d questions were on their way, want %d", p.most, askWindow)
	}
	p.settle()
	if !bytes.Equal(p.src.image(t), p.dst.image(t)) {
		t.Error("the replicas differ")
	}
}

// TestAskWritesMeanwhile: the guest writes between question and data, to chunks that
// are on their way and to such as were found equal. All of it is tracked, and there
// after one more round.
func TestAskWritesMeanwhile(t *testing.T) {
	rnd := rand.New(rand.NewPCG(5, 6))
	p := newAskPair(t, blockstore.Options{Activity: 4})
	chunks := p.src.st.Chunks()
	for c := int64(0); c < chunks; c += 3 {
		p.src.write(t, rnd, c)
	}
	all := bitmap.New(chunks)
	all.SetRange(0, chunks)
	p.src.vol.StartTracking()
	hit := map[int64]bool{}
	p.before = func(c int64) {
		for range 2 {
			w := rnd.Int64N(chunks)
			hit[w] = true
			p.src.write(t, rnd, w)
		}
	}
	if err := p.d.run(t.Context(), all); err != nil {
		t.Fatal(err)
	}
	dirty := p.src.vol.TakeDirty()
	for c := range hit {
		if !dirty.Test(c) {
			t.Errorf("the guest wrote chunk %d meanwhile, and nobody knows", c)
		}
	}
	p.before = nil
	for c := range chunks {
		if dirty.Test(c) {
			if err := p.d.copy(c); err != nil {
				t.Fatal(err)
			}
		}
	}
	p.settle()
	if !bytes.Equal(p.src.image(t), p.dst.image(t)) {
		t.Error("the replicas differ")
	}
}

// TestAskAnswers: whatever a target answers but the one right thing is refused; what
// had been asked is not taken for answered by it.
func TestAskAnswers(t *testing.T) {
	runs := []askRun{{3, 2}, {9, 1}}
	head := func(no uint64) []byte { return pack(askHead{No: no, Disk: 1, Runs: 2, Chunks: 3}) }
	fill := func(n int) *questions {
		q := newQuestions()
		for range n {
			q.put(&question{disk: 1, runs: runs, chunks: 3, kind: kindDiskAnswer, head: head(q.number())})
		}
		return q
	}
	good := func(no uint64) []byte { return append(head(no), 0, 1, 0) }
	for name, c := range map[string]struct {
		kind uint8
		p    []byte
	}{
		"out of order":   {kindDiskAnswer, good(2)},
		"never asked":    {kindDiskAnswer, good(7)},
		"too short":      {kindDiskAnswer, good(1)[:len(good(1))-1]},
		"too long":       {kindDiskAnswer, append(good(1), 0)},
		"only a head":    {kindDiskAnswer, head(1)},
		"no head":        {kindDiskAnswer, []byte{1}},
		"empty":          {kindDiskAnswer, nil},
		"other kind":     {kindDiskDiffer, good(1)},
		"other disk":     {kindDiskAnswer, append(pack(askHead{No: 1, Disk: 2, Runs: 2, Chunks: 3}), 0, 1, 0)},
		"neither 0 or 1": {kindDiskAnswer, append(head(1), 0, 2, 0)},
	} {
		q := fill(2)
		if q.take(c.kind, c.p) == nil {
			t.Errorf("%s: taken", name)
		}
		if err := q.take(kindDiskAnswer, good(1)); err != nil {
			t.Errorf("%s: then the right answer is refused: %v", name, err)
		}
	}
	q := fill(2)
	for no := uint64(1); no <= 2; no++ {
		if err := q.take(kindDiskAnswer, good(no)); err != nil {
			t.Fatal(err)
		}
		if q.take(kindDiskAnswer, good(no)) == nil {
			t.Errorf("answer %d was taken twice", no)
		}
	}
	if x, err := q.next(t.Context(), nil); err != nil || !bytes.Equal(x.differs, []byte{0, 1, 0}) {
		t.Errorf("the answer is %v, %v", x, err)
	}
	if newQuestions().take(kindDiskAnswer, good(1)) == nil {
		t.Error("an answer was taken before anything was asked")
	}
}

// TestAskLost: a session that is lost with a full window ends the copy, and so does
// the end of the shim.
func TestAskLost(t *testing.T) {
	for _, how := range []string{"session", "shim"} {
		rnd := rand.New(rand.NewPCG(7, 8))
		p := newAskPair(t, blockstore.Options{})
		chunks := p.src.st.Chunks()
		var marks []int64
		for c := int64(0); c < chunks; c += 2 {
			marks = append(marks, c)
			p.src.write(t, rnd, c)
		}
		p.d.oneRun = true
		gone := make(chan struct{})
		p.d.gone = gone
		ctx, cancel := context.WithCancel(t.Context())
		full := make(chan struct{})
		p.answer = func(no int, kind uint8, b []byte) {
			switch {
			case no < 20:
				_ = p.d.asks.take(kind, b)
			case no == 20: // from here on nothing comes
				close(full)
			}
		}
		ended := make(chan error, 1)
		go func() { ended <- p.d.run(ctx, marksOf(chunks, marks...)) }()
		<-full
		want := errSessionGone
		if how == "session" {
			close(gone)
		} else {
			want = context.Canceled
			cancel()
		}
		select {
		case err := <-ended:
			if !errors.Is(err, want) {
				t.Errorf("%s: %v", how, err)
			}
		case <-time.After(20 * time.Second):
			t.Fatalf("%s: the copy waits for ever", how)
		}
		if n := p.d.asks.open(); n > askWindow {
			t.Errorf("%s: %d questions on their way", how, n)
		}
		cancel()
	}
}

// TestAskBounds: a target reads nothing for a question that does not fit its disk.
func TestAskBounds(t *testing.T) {
	const total = 1000
	ask := func(h askHead, runs []askRun, sums int) []byte {
		return slices.Concat(pack(h), pack(runs), make([]byte, sums))
	}
	chunks := func(d uint32) (int64, bool) { return total, d == 0 }
	if _, x, sums, err := decodeAsk(ask(askHead{Runs: 2, Chunks: 3}, []askRun{{0, 2}, {total - 1, 1}}, 48), chunks); err != nil || len(x.runs) != 2 || len(sums) != 48 {
		t.Fatalf("a good question: %v", err)
	}
	many := make([]askRun, askRuns+1)
	for i := range many {
		many[i] = askRun{int64(2 * i), 1}
	}
	for name, p := range map[string][]byte{
		"empty":             nil,
		"short head":        make([]byte, askHeadSize-1),
		"nothing":           ask(askHead{}, nil, 0),
		"no run":            ask(askHead{Chunks: 1}, nil, 16),
		"disk":              ask(askHead{Disk: 1, Runs: 1, Chunks: 1}, []askRun{{0, 1}}, 16),
		"disk that wraps":   ask(askHead{Disk: math.MaxUint32, Runs: 1, Chunks: 1}, []askRun{{0, 1}}, 16),
		"behind the end":    ask(askHead{Runs: 1, Chunks: 1}, []askRun{{total, 1}}, 16),
		"over the end":      ask(askHead{Runs: 1, Chunks: 2}, []askRun{{total - 1, 2}}, 32),
		"before the begin":  ask(askHead{Runs: 1, Chunks: 1}, []askRun{{-1, 1}}, 16),
		"sum overflows":     ask(askHead{Runs: 1, Chunks: 2}, []askRun{{math.MaxInt64, 2}}, 32),
		"count overflows":   ask(askHead{Runs: 1, Chunks: 1}, []askRun{{1, math.MaxInt64}}, 16),
		"negative count":    ask(askHead{Runs: 2, Chunks: 1}, []askRun{{5, -1}, {6, 2}}, 16),
		"no count":          ask(askHead{Runs: 2, Chunks: 1}, []askRun{{5, 0}, {6, 1}}, 16),
		"least first":       ask(askHead{Runs: 1, Chunks: 1}, []askRun{{math.MinInt64, 1}}, 16),
		"overlapping":       ask(askHead{Runs: 2, Chunks: 4}, []askRun{{5, 2}, {6, 2}}, 64),
		"descending":        ask(askHead{Runs: 2, Chunks: 2}, []askRun{{5, 1}, {3, 1}}, 32),
		"fewer than said":   ask(askHead{Runs: 1, Chunks: 3}, []askRun{{5, 2}}, 48),
		"more than said":    ask(askHead{Runs: 1, Chunks: 1}, []askRun{{5, 2}}, 16),
		"digests missing":   ask(askHead{Runs: 1, Chunks: 2}, []askRun{{5, 2}}, 31),
		"digests too many":  ask(askHead{Runs: 1, Chunks: 2}, []askRun{{5, 2}}, 33),
		"too many runs":     ask(askHead{Runs: askRuns + 1, Chunks: askRuns + 1}, many, 16*(askRuns+1)),
		"too many chunks":   ask(askHead{Runs: 1, Chunks: sumChunks + 1}, []askRun{{0, sumChunks + 1}}, 16*(sumChunks+1)),
		"runs that wrap":    ask(askHead{Runs: math.MaxUint32, Chunks: 1}, []askRun{{0, 1}}, 16),
		"chunks that wrap":  ask(askHead{Runs: 1, Chunks: math.MaxUint32}, []askRun{{0, 1}}, 16),
		"one run, not said": ask(askHead{Runs: 1, Chunks: 2}, []askRun{{0, 1}, {2, 1}}, 32),
	} {
		if _, x, _, err := decodeAsk(p, chunks); err == nil {
			t.Errorf("%s: taken as %+v", name, x.runs)
		}
	}
}

// TestAskOldBounds: nor for one of the release before.
func TestAskOldBounds(t *testing.T) {
	s := newAskSide(t, blockstore.Options{})
	st := &standby{inst: &instance{stores: []*blockstore.Store{s.st}}}
	chunks := s.st.Chunks()
	for name, h := range map[string]sumsHead{
		"disk": {Disk: 1, Count: 1}, "disk that wraps": {Disk: math.MaxUint32, Count: 1}, "none": {Count: 0}, "too many": {Count: sumChunks + 1},
		"behind the end": {Count: 1, First: chunks}, "over the end": {Count: 2, First: chunks - 1}, "before": {Count: 1, First: -1},
		"overflow": {Count: 2, First: math.MaxInt64}, "least": {Count: 1, First: math.MinInt64},
	} {
		if st.takeSums(append(pack(h), make([]byte, 16*int(min(h.Count, 1000)))...)) == nil {
			t.Errorf("%s: taken", name)
		}
	}
}

// FuzzAsk: no question makes a target read outside a disk.
func FuzzAsk(f *testing.F) {
	f.Add(slices.Concat(pack(askHead{Runs: 2, Chunks: 3}), pack([]askRun{{0, 2}, {999, 1}}), make([]byte, 48)))
	f.Fuzz(func(t *testing.T, p []byte) {
		_, x, sums, err := decodeAsk(p, func(d uint32) (int64, bool) { return 1000, d < 2 })
		if err != nil {
			return
		}
		n, at := 0, int64(0)
		_ = x.each(func(i int, c int64) error {
			if i != n || c < at || c >= 1000 {
				t.Fatalf("chunk %d at place %d of %+v", c, i, x.runs)
			}
			n, at = n+1, c+1
			return nil
		})
		if n != x.chunks || len(sums) != 16*n || n > sumChunks {
			t.Fatalf("%d chunks and %d bytes of digests in %+v", n, len(sums), x)
		}
	})
}
