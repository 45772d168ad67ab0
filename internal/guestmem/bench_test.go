package guestmem

import (
	"fmt"
	"slices"
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
	report(b, all)
}

// BenchmarkPause measures what a flush while the guest runs saves of the flush that it stands still for.
func BenchmarkPause(b *testing.B) {
	const size = 256 << 20
	for _, pre := range []bool{false, true} {
		b.Run(fmt.Sprintf("20000 pages a second, every 100 ms/preflush=%v", pre), func(b *testing.B) {
			r := openRAM(b, size)
			g := startGuest(b, r.Path(), size)
			if err := r.Attach(); err != nil {
				b.Fatal(err)
			}
			r.SetMode(Collect)
			var all []float64
			pages := 0
			for b.Loop() {
				g.do("pace 20000")
				time.Sleep(100 * time.Millisecond)
				if pre {
					mustFlush(b, r)
				}
				g.do("halt")
				t := time.Now()
				mustFlush(b, r)
				all = append(all, float64(time.Since(t).Microseconds()))
				ps, err := r.Cut()
				if err != nil {
					b.Fatal(err)
				}
				pages += ps.Pages()
				ps.Release()
			}
			report(b, all)
			b.ReportMetric(float64(pages)/float64(len(all)), "pages")
		})
	}
}

func report(b *testing.B, us []float64) {
	slices.Sort(us)
	b.ReportMetric(us[len(us)/10], "µs-p10")
	b.ReportMetric(us[len(us)/2], "µs-median")
	b.ReportMetric(us[len(us)*99/100], "µs-p99")
	b.ReportMetric(0, "ns/op")
}

func median(v []float64) float64 {
	slices.Sort(v)
	return v[len(v)/2]
}
