package guestmem

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
)

// fakeSet makes a page set without a mount.
func fakeSet(t testing.TB, pages int64) *collector {
	t.Helper()
	p := &pool{floor: 4}
	t.Cleanup(p.close)
	c := newCollector(p, pages, 1<<40)
	c.setMode(Collect)
	return c
}

// put adds one page to what is collected.
func put(t testing.TB, c *collector, page uint32, content []byte) {
	t.Helper()
	ch, err := c.pool.get()
	if err != nil {
		t.Fatal(err)
	}
	copy(ch.mem, content)
	c.add(page, []segment{{ch, 0, PageSize}})
	c.pool.put(ch)
}

func randomPage(r *rand.Rand, kind int) []byte {
	p := make([]byte, PageSize)
	switch kind {
	case 0: // zero
	case 1: // text-like
		for i := range p {
			p[i] = "the quick brown fox "[(i+int(r.Uint32()%3))%20]
		}
	default:
		for i := range p {
			p[i] = byte(r.Uint32())
		}
	}
	return p
}

func TestFramesCarryPages(t *testing.T) {
	const pages = 5000
	for _, cfg := range []EncoderConfig{{}, {NoCompress: true}, {Parallel: 1, LinkRate: 1}, {SkipUnchanged: true, Size: pages * PageSize}} {
		t.Run(fmt.Sprintf("%+v", cfg), func(t *testing.T) {
			r := rand.New(rand.NewPCG(1, 2))
			e := NewEncoder(cfg)
			model, copied := make([]byte, pages*PageSize), make([]byte, pages*PageSize)
			c := fakeSet(t, pages)
			for range 5 {
				p := r.IntN(pages)
				for i := range 700 {
					if i%10 == 0 {
						p = r.IntN(pages)
					}
					p = (p + 1) % pages
					b := randomPage(r, r.IntN(3))
					put(t, c, uint32(p), b)
					copy(model[p*PageSize:], b)
				}
				ps, err := c.cut()
				if err != nil {
					t.Fatal(err)
				}
				st, err := e.Encode(ps, func(f []byte) error {
					if len(f) > MaxFrame {
						t.Errorf("frame of %d bytes", len(f))
					}
					return DecodePages(f, pages*PageSize, func(off int64, data []byte) error {
						copy(copied[off:], data)
						return nil
					})
				})
				if err != nil || st.Pages != ps.Pages() {
					t.Fatal(st, err)
				}
				ps.Release()
				if !bytes.Equal(model, copied) {
					t.Fatal("memory differs after decoding")
				}
			}
		})
	}
}

func TestEncoderSkipsUnchanged(t *testing.T) {
	c := fakeSet(t, 100)
	e := NewEncoder(EncoderConfig{SkipUnchanged: true, Size: 100 * PageSize})
	encode := func() EncodeStats {
		for i := range uint32(10) {
			put(t, c, i, bytes.Repeat([]byte{byte(i)}, PageSize)) // page 0 is zero
		}
		ps, _ := c.cut()
		defer ps.Release()
		st, err := e.Encode(ps, func([]byte) error { return nil })
		if err != nil {
			t.Fatal(err)
		}
		return st
	}
	if st := encode(); st.SkippedPages != 0 || st.ZeroPages != 1 || st.Frames != 1 {
		t.Fatalf("first time: %+v", st)
	}
	if st := encode(); st.SkippedPages != 10 || st.Frames != 0 || st.Bytes != 0 {
		t.Fatalf("second time: %+v", st)
	}
	e.Reset()
	if st := encode(); st.SkippedPages != 0 {
		t.Fatalf("after reset: %+v", st)
	}
}

func TestEncodeStopsAtEmitError(t *testing.T) {
	c := fakeSet(t, 1000)
	for i := range uint32(1000) {
		put(t, c, i, bytes.Repeat([]byte{1}, PageSize))
	}
	ps, _ := c.cut()
	defer ps.Release()
	e := NewEncoder(EncoderConfig{})
	want, calls := errors.New("link down"), 0
	if _, err := e.Encode(ps, func([]byte) error { calls++; return want }); !errors.Is(err, want) || calls != 1 {
		t.Fatal(err, calls)
	}
	if st, err := e.Encode(ps, func([]byte) error { return nil }); err != nil || st.Pages != 1000 {
		t.Fatal("encoder is not usable after an error:", st, err)
	}
}

func TestZeroPagesCostNothing(t *testing.T) {
	e := NewEncoder(EncoderConfig{})
	n := 0
	st, err := e.EncodeRun(0, make([]byte, 64*PageSize), func(f []byte) error { n += len(f); return nil })
	if err != nil || st.ZeroPages != 64 || n != frameHead+rangeSize {
		t.Fatal(st, err, n)
	}
}

func TestAdapterBacksOff(t *testing.T) {
	var a adapter
	tried := 0
	for range 1000 {
		if a.try() {
			tried++
			a.pays(100, 100, 0)
		}
	}
	if tried > 30 {
		t.Errorf("tried %d of 1000 incompressible frames", tried)
	}
	for range adaptBackMax {
		a.try()
	}
	a.pays(100, 10, 0)
	for range 10 {
		if !a.try() {
			t.Fatal("still off after compression paid")
		}
	}
}

func TestDecodeRefuses(t *testing.T) {
	e := NewEncoder(EncoderConfig{})
	var good []byte
	data := append(bytes.Repeat([]byte{7}, 2*PageSize), make([]byte, PageSize)...)
	if _, err := e.EncodeRun(PageSize, data, func(f []byte) error { good = bytes.Clone(f); return nil }); err != nil {
		t.Fatal(err)
	}
	const size = 4 * PageSize
	never := func(int64, []byte) error { t.Error("called for a bad frame"); return nil }
	if err := DecodePages(good, size, func(int64, []byte) error { return nil }); err != nil {
		t.Fatal(err)
	}
	if err := DecodePages(good, 3*PageSize, never); !errors.Is(err, ErrFrame) {
		t.Error("pages beyond the end:", err)
	}
	for i := range good {
		bad := bytes.Clone(good)
		bad[i] ^= 0x10
		if err := DecodePages(bad, size, never); !errors.Is(err, ErrFrame) {
			t.Fatalf("byte %d changed: %v", i, err)
		}
		if err := DecodePages(good[:i], size, never); !errors.Is(err, ErrFrame) {
			t.Fatalf("cut at %d: %v", i, err)
		}
	}
	if err := DecodePages(append(bytes.Clone(good), 0), size, never); !errors.Is(err, ErrFrame) {
		t.Error("a byte too many:", err)
	}
}

func FuzzDecodePages(f *testing.F) {
	e := NewEncoder(EncoderConfig{})
	for _, d := range [][]byte{bytes.Repeat([]byte{7}, 2*PageSize), make([]byte, 5*PageSize)} {
		_, _ = e.EncodeRun(0, d, func(b []byte) error { f.Add(bytes.Clone(b)); return nil })
	}
	const size = 64 * PageSize
	f.Fuzz(func(t *testing.T, frame []byte) {
		check := func(off int64, data []byte) error {
			if off < 0 || off%PageSize != 0 || len(data) == 0 || len(data)%PageSize != 0 || off+int64(len(data)) > size {
				t.Fatalf("run %d+%d", off, len(data))
			}
			return nil
		}
		_ = DecodePages(frame, size, check)
		// Past the checksum too: make it right for frames that are not compressed.
		if len(frame) > frameHead && frame[1] == 0 {
			n := int(binary.LittleEndian.Uint16(frame[2:]))
			if h := frameHead + n*rangeSize; h <= len(frame) {
				binary.LittleEndian.PutUint64(frame[16:], checksum(frame[frameHead:h], frame[h:]))
				_ = DecodePages(frame, size, check)
			}
		}
	})
}

func BenchmarkEncode(b *testing.B) {
	r := rand.New(rand.NewPCG(1, 2))
	for kind, name := range []string{"zero", "text", "random"} {
		for _, cfg := range []EncoderConfig{{}, {NoCompress: true}, {SkipUnchanged: true, Size: 8 << 20}} {
			b.Run(fmt.Sprintf("%s/nocompress=%v/skip=%v", name, cfg.NoCompress, cfg.SkipUnchanged), func(b *testing.B) {
				const pages = 2000
				c := fakeSet(b, pages)
				for i := range uint32(pages) {
					put(b, c, i, randomPage(r, kind))
				}
				ps, _ := c.cut()
				defer ps.Release()
				e := NewEncoder(cfg)
				b.SetBytes(pages * PageSize)
				var st EncodeStats
				for b.Loop() {
					e.Reset()
					st, _ = e.Encode(ps, func([]byte) error { return nil })
				}
				b.ReportMetric(float64(st.Bytes)/float64(pages*PageSize), "sent/raw")
			})
		}
	}
}

func BenchmarkDecode(b *testing.B) {
	r := rand.New(rand.NewPCG(1, 2))
	for kind, name := range []string{"zero", "text", "random"} {
		b.Run(name, func(b *testing.B) {
			var data []byte
			for range 64 {
				data = append(data, randomPage(r, kind)...)
			}
			var frame []byte
			_, _ = NewEncoder(EncoderConfig{}).EncodeRun(0, data, func(f []byte) error { frame = bytes.Clone(f); return nil })
			b.SetBytes(int64(len(data)))
			for b.Loop() {
				if err := DecodePages(frame, 1<<30, func(int64, []byte) error { return nil }); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
