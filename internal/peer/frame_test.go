package peer

import (
	"bytes"
	"errors"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

func TestFramesSurviveTheWire(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		ranges := []seqRange{}
		at := rapid.Uint64Range(0, 1<<40).Draw(t, "next")
		a := ackBlock{next: at, limit: rapid.Uint64().Draw(t, "limit"), linkBytes: rapid.Uint64().Draw(t, "bytes")}
		for range rapid.IntRange(0, maxRanges).Draw(t, "ranges") {
			from := at + rapid.Uint64Range(1, 100).Draw(t, "gap")
			at = from + rapid.Uint64Range(1, 100).Draw(t, "length")
			ranges = append(ranges, seqRange{from, at})
		}
		a.ranges = ranges
		got, err := parseAck(appendAck(nil, a))
		if err != nil || got.next != a.next || got.limit != a.limit || got.linkBytes != a.linkBytes || !slices.Equal(got.ranges, ranges) {
			t.Fatalf("%+v became %+v, %v", a, got, err)
		}
		h := hello{low: 1, high: 3, session: nonce{1}, peer: nonce{2}, index: 1, links: 2, limit: MinWindow,
			opaque: rapid.SliceOfN(rapid.Byte(), 0, 100).Draw(t, "opaque")}
		back, err := parseHello(appendHello(nil, h))
		if err != nil || back.session != h.session || back.links != 2 || !bytes.Equal(back.opaque, h.opaque) {
			t.Fatalf("%+v became %+v, %v", h, back, err)
		}
	})
}

func TestASingleFlippedBitIsFound(t *testing.T) {
	frame := appendFrame(nil, header{typ: typeUrgent, kind: 3, seq: 9}, []byte("some words"))
	alloc := func(n int) []byte { return make([]byte, n) }
	if _, _, err := readFrame(bytes.NewReader(frame), make([]byte, headerLen), alloc); err != nil {
		t.Fatal(err)
	}
	for bit := range len(frame) * 8 {
		bad := slices.Clone(frame)
		bad[bit/8] ^= 1 << (bit % 8)
		if _, _, err := readFrame(bytes.NewReader(bad), make([]byte, headerLen), alloc); err == nil {
			t.Fatalf("bit %d flipped: accepted", bit)
		}
	}
}

// FuzzReadFrame: whatever comes, nothing panics, nothing large is allocated for
// a small claim, and what is accepted is what a writer would have written.
func FuzzReadFrame(f *testing.F) {
	f.Add(appendFrame(nil, header{typ: typePing, seq: 1}, appendAck(make([]byte, 8), ackBlock{next: 1, ranges: []seqRange{{3, 4}}})))
	f.Add(appendFrame(nil, header{typ: typeHello}, appendHello(nil, hello{low: 1, high: 1, session: nonce{1}, links: 1, limit: MinWindow})))
	f.Add(appendFrame(nil, header{typ: typeData, flags: flagFirst | flagLast, total: 3, seq: 5}, []byte("abc")))
	f.Add(appendFrame(nil, header{typ: typeBye}, appendCode(nil, codeClosed, "done")))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, p, err := readFrame(bytes.NewReader(b), make([]byte, headerLen), func(n int) []byte {
			if n > maxPayload {
				t.Fatalf("would allocate %d bytes", n)
			}
			return make([]byte, n)
		})
		if err != nil {
			return
		}
		if again := appendFrame(nil, h, p); !bytes.Equal(again, b[:len(again)]) {
			t.Fatal("accepted what no writer writes")
		}
		switch h.typ {
		case typeAck:
			if a, err := parseAck(p); err == nil && !bytes.Equal(appendAck(nil, a), p) {
				t.Fatal("accepted an ack that no writer writes")
			}
		case typeHello, typeWelcome:
			if g, err := parseHello(p); err == nil && !bytes.Equal(appendHello(nil, g), p) {
				t.Fatal("accepted a hello that no writer writes")
			}
		case typeBye, typeRefuse:
			parseCode(p)
		}
	})
}

// FuzzReceiver feeds arbitrary data frames: it may only refuse, and never hold
// more than its window.
func FuzzReceiver(f *testing.F) {
	f.Add([]byte{0, 3, 10, 1, 2, 5})
	f.Add([]byte{0, 1, 200, 0, 2, 200, 1, 3, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		r := newReceiver(64 << 10)
		for len(b) >= 3 {
			h := header{typ: typeData, seq: r.next + uint64(b[0]%16), flags: b[1] & 3, kind: b[1] >> 2}
			size := int(b[2]) * 256
			if h.flags&flagFirst != 0 {
				h.total = uint32(size)
				if b[1]&4 != 0 {
					h.total *= 2
				}
			}
			b = b[3:]
			if _, _, err := r.accept(h, make([]byte, size), 0); err != nil {
				if !errors.Is(err, errProtocol) {
					t.Fatal(err)
				}
				return
			}
			held := 0
			for _, m := range append(r.inbox, r.cur) {
				for _, p := range m.frames {
					held += len(p)
				}
			}
			for _, d := range r.ahead {
				held += len(d.payload)
			}
			if held > 64<<10 {
				t.Fatalf("holds %d bytes", held)
			}
			if len(b) > 0 && b[0]&128 != 0 {
				if m, ok := r.take(); ok && len(m.message(new(bufPool)).Payload) != m.total {
					t.Fatal("a message is not as long as it says")
				}
			}
		}
	})
}

// Frames in any order, with doubles, become the messages that were cut.
func TestReceiverPutsAnyOrderRight(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var pool bufPool
		var frames [][]byte
		var want []int
		seq := uint64(0)
		for range rapid.IntRange(1, 8).Draw(t, "messages") {
			n := rapid.IntRange(0, 4*maxPayload).Draw(t, "size")
			fs := cut(seq, uint8(len(want)), [][]byte{make([]byte, n)}, n, &pool)
			seq += uint64(len(fs))
			for _, f := range fs {
				frames = append(frames, f.buf)
			}
			want = append(want, n)
		}
		order := rapid.Permutation(frames).Draw(t, "order")
		order = append(order, rapid.SliceOfN(rapid.SampledFrom(frames), 0, 5).Draw(t, "doubles")...)
		r := newReceiver(MinWindow)
		got := map[uint64]bool{}
		for _, f := range order {
			h, err := parseHeader(f)
			if err != nil {
				t.Fatal(err)
			}
			fresh, _, err := r.accept(h, slices.Clone(f[headerLen:]), 0)
			if err != nil || fresh == got[h.seq] {
				t.Fatalf("frame %d: fresh %v, %v", h.seq, fresh, err)
			}
			got[h.seq] = true
			last := r.next
			for _, x := range r.ranges {
				if x.from <= last || x.to <= x.from {
					t.Fatalf("ranges %v above %d", r.ranges, r.next)
				}
				for q := x.from; q < x.to; q++ {
					if !got[q] {
						t.Fatalf("%d is not there", q)
					}
				}
				last = x.to
			}
		}
		for i, n := range want {
			m, ok := r.take()
			if !ok || int(m.kind) != i || len(m.message(&pool).Payload) != n {
				t.Fatalf("message %d: %v", i, ok)
			}
		}
		if r.accepted != r.consumed || len(r.ahead) != 0 || len(r.ranges) != 0 {
			t.Fatalf("left: %d accepted, %d consumed", r.accepted, r.consumed)
		}
	})
}

func TestDedup(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var d dedup
		seen := map[uint64]bool{}
		top := uint64(0)
		for range rapid.IntRange(1, 200).Draw(t, "notes") {
			lo := uint64(0)
			if top > 3*dedupSpan/2 {
				lo = top - 3*dedupSpan/2
			}
			n := rapid.Uint64Range(lo, top+3*dedupSpan/2).Draw(t, "n")
			want := n != 0 && !seen[n] && n+dedupSpan > top
			if got := d.fresh(n); got != want {
				t.Fatalf("note %d below %d: fresh %v, want %v", n, top, got, want)
			}
			seen[n] = true
			top = max(top, n)
		}
	})
}
