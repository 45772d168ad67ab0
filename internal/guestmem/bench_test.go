package guestmem

import (
	"fmt"
	"sort"
	"testing"
	"time"
)

func BenchmarkFlush(b *testing.B) {
	for _, size := range []int64{256 << 20, 4 << 30} {
		b.Run(fmt.Sprintf("%dMiB", size>>20), func(b *testing.B) {
			r := openRAM(b, size)
			g := startGuest(b, r.Path(), size)
			if err := r.Attach(); err != nil {
				b.Fatal(err)
			}
			r.SetMode(Collect)
			for _, n := range []int64{0, 80, 500, 2000, 20000} {
				for _, stride := range []int64{1, 3} {
					if n*stride*PageSize > size {
						continue
					}
					b.Run(fmt.Sprintf("pages=%d/stride=%d", n, stride), func(b *testing.B) {
						benchFlush(b, r, g, n, stride)
					})
				}
			}
		})
	}
}

func benchFlush(b *testing.B, r *RAM, g *guest, n, stride int64) {
	var all []float64
	v := 0
	for b.Loop() {
		b.StopTimer()
		v++
		g.do("dirty %d %d %d", n, stride, v)
		b.StartTimer()
		t := time.Now()
		if err := r.Flush(); err != nil {
			b.Fatal(err)
		}
		ps, err := r.Cut()
		all = append(all, float64(time.Since(t).Microseconds()))
		b.StopTimer()
		if err != nil || int64(ps.Pages()) != n {
			b.Fatalf("%d pages, want %d: %v", ps.Pages(), n, err)
		}
		ps.Release()
		b.StartTimer()
	}
	sort.Float64s(all)
	b.ReportMetric(all[len(all)/2], "µs-median")
	b.ReportMetric(all[len(all)*99/100], "µs-p99")
}
