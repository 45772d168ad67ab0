package bitmap

import (
	"testing"

	"pgregory.net/rapid"
)

// model is the set both types are compared with.
type model map[int64]bool

func (m model) put(start, end int64, in bool) {
	for i := start; i < end; i++ {
		if in {
			m[i] = true
		} else {
			delete(m, i)
		}
	}
}

func TestBitmapAgainstModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.Int64Range(1, 300).Draw(t, "n")
		b, m := New(n), model{}
		for range rapid.IntRange(0, 30).Draw(t, "ops") {
			s := rapid.Int64Range(0, n).Draw(t, "start")
			e := rapid.Int64Range(0, n).Draw(t, "end")
			switch rapid.IntRange(0, 5).Draw(t, "op") {
			case 0:
				b.SetRange(s, e)
				m.put(s, e, true)
			case 1:
				b.ClearRange(s, e)
				m.put(s, e, false)
			case 2:
				if s < n {
					b.Set(s)
					m[s] = true
				}
			case 3:
				if s < n {
					b.Clear(s)
					delete(m, s)
				}
			case 4:
				o := New(n)
				o.SetRange(s, e)
				b.Or(o)
				m.put(s, e, true)
			}
		}
		if b.Count() != int64(len(m)) {
			t.Fatalf("count %d, want %d", b.Count(), len(m))
		}
		got := model{}
		limit := rapid.Int64Range(0, 9).Draw(t, "max")
		for at := int64(0); ; {
			s, e, ok := b.Next(at, limit)
			if !ok {
				break
			}
			if s < at || e <= s || limit > 0 && e-s > limit {
				t.Fatalf("Next(%d,%d) = %d,%d", at, limit, s, e)
			}
			got.put(s, e, true)
			at = e
		}
		for i := range n {
			if b.Test(i) != m[i] || got[i] != m[i] {
				t.Fatalf("bit %d: test %v, next %v, want %v", i, b.Test(i), got[i], m[i])
			}
		}
	})
}

func TestRangesAgainstModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const n = 80
		var r Ranges
		m := model{}
		for range rapid.IntRange(0, 40).Draw(t, "ops") {
			s := rapid.Int64Range(0, n).Draw(t, "start")
			e := rapid.Int64Range(0, n).Draw(t, "end")
			in := rapid.Bool().Draw(t, "add")
			if in {
				r.Add(s, e)
			} else {
				r.Remove(s, e)
			}
			m.put(s, e, in)
			last := int64(-1)
			for _, x := range r.All() {
				if x.Start <= last || x.Len() <= 0 {
					t.Fatalf("not sorted, disjoint and apart: %v", r.All())
				}
				last = x.End
			}
			for i := range int64(n) {
				x, ok := r.Find(i)
				if ok != m[i] || ok && (i < x.Start || i >= x.End) || r.Overlaps(i, i+1) != m[i] {
					t.Fatalf("Find(%d) = %v %v, want %v in %v", i, x, ok, m[i], r.All())
				}
			}
		}
	})
}

func BenchmarkRangesAdd(b *testing.B) {
	for b.Loop() {
		var r Ranges
		for i := range int64(10000) {
			r.Add((i*7919)%100000*2, (i*7919)%100000*2+1)
		}
	}
}
