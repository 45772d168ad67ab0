package blockstore

import (
	"bytes"
	"errors"
	"testing"

	"pgregory.net/rapid"
)

// drawLayer makes a layer by random writes and the blocks it should hold: the
// stamp of each, 0 for zeroes.
func drawLayer(t *rapid.T, blocks int64) (*layer, map[int64]byte) {
	l, want := newLayer(), map[int64]byte{}
	for range rapid.IntRange(0, 20).Draw(t, "ops") {
		first := rapid.Int64Range(0, blocks-1).Draw(t, "first")
		switch rapid.IntRange(0, 2).Draw(t, "op") {
		case 0:
			stamp := rapid.Byte().Draw(t, "stamp")
			b := new(block)
			for i := range b {
				b[i] = stamp
			}
			l.blocks[first] = b
			l.taken++
			want[first] = stamp
		default:
			end := rapid.Int64Range(first, blocks).Draw(t, "end")
			l.zero(first, end, rapid.Bool().Draw(t, "punch"))
			for n := first; n < end; n++ {
				want[n] = 0
			}
		}
	}
	return l, want
}

// content lists what runs hold, and fails if they are not in order and disjoint.
func content(t *rapid.T, runs []run) map[int64]byte {
	got := map[int64]byte{}
	end := int64(0)
	for _, r := range runs {
		if r.start < end || r.count <= 0 {
			t.Fatalf("runs out of order: %+v", runs)
		}
		end = r.start + r.count
		for n := r.start; n < end; n++ {
			got[n] = 0
		}
		n := r.start
		r.each(func(p []byte) {
			for ; len(p) > 0; p = p[BlockSize:] {
				got[n] = p[17]
				n++
			}
		})
		if r.kind == runData && n != end {
			t.Fatalf("run of %d blocks holds %d", r.count, n-r.start)
		}
	}
	return got
}

func same(a, b map[int64]byte) bool {
	if len(a) != len(b) {
		return false
	}
	for k, v := range a {
		if w, ok := b[k]; !ok || v != w {
			return false
		}
	}
	return true
}

func TestCoalesceEncodeDecode(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const blocks = 60
		l, want := drawLayer(t, blocks)
		w := &EpochWrites{layer: l, within: rapid.Bool().Draw(t, "within"), before: rapid.Bool().Draw(t, "before")}
		if got := content(t, w.all()); !same(got, want) {
			t.Fatalf("coalesced %v, want %v", got, want)
		}
		var data int64
		for n := range want {
			if want[n] != 0 {
				data += BlockSize
			}
		}
		if w.Bytes() != data {
			t.Fatalf("%d bytes, want %d", w.Bytes(), data)
		}
		b := w.AppendTo([]byte("head"))[4:]
		if len(b) > w.EncodedLen() || len(b) > int(data)+2+10*(1+2*len(w.all())) {
			t.Fatalf("%d bytes encoded for %d of data", len(b), data)
		}
		d, err := Decode(b, blocks*BlockSize)
		if err != nil {
			t.Fatal(err)
		}
		if got := content(t, d.all()); !same(got, want) || d.within != w.within || d.before != w.before {
			t.Fatalf("decoded %v, want %v", got, want)
		}
		if again := d.AppendTo(nil); !bytes.Equal(again, b) {
			t.Fatal("encoding again differs")
		}
		if len(want) > 0 {
			if _, err := Decode(b[:len(b)-1], blocks*BlockSize); !errors.Is(err, ErrEncoding) {
				t.Fatal("cut short:", err)
			}
		}
	})
}

func TestZeroesCostNothing(t *testing.T) {
	l := newLayer()
	for n := range int64(10000) {
		l.blocks[n] = new(block)
	}
	l.zero(1<<20, 1<<30, true)
	w := &EpochWrites{layer: l}
	if b := w.AppendTo(nil); len(b) > 20 {
		t.Fatalf("%d bytes for zeroes", len(b))
	}
}

func FuzzDecode(f *testing.F) {
	l := newLayer()
	b := new(block)
	b[9] = 1
	l.blocks[3], l.blocks[4], l.blocks[9] = b, b, new(block)
	l.zero(20, 30, true)
	l.zero(40, 50, false)
	f.Add((&EpochWrites{layer: l, within: true}).AppendTo(nil))
	f.Add((&EpochWrites{before: true}).AppendTo(nil))
	f.Add([]byte{1, 0, 1, 0, 0})
	f.Add([]byte{1, 0, 255, 255, 255, 255, 255, 255, 255, 255, 255, 1, 0, 0})
	f.Add([]byte{1, 0, 1, 255, 255, 255, 255, 255, 255, 255, 255, 255, 1, 1})
	f.Fuzz(func(t *testing.T, in []byte) {
		const size = 1 << 20
		w, err := Decode(in, size)
		if err != nil {
			return
		}
		end := int64(0)
		for _, r := range w.all() {
			if r.start < end || r.count < 1 || r.start+r.count > size/BlockSize || r.kind > runPunch ||
				r.kind == runData && int64(len(r.flat)) != r.count*BlockSize {
				t.Fatalf("bad run %+v", r)
			}
			end = r.start + r.count
		}
	})
}
