package blockstore

import (
	"context"
	"fmt"
	"math/rand"
	"os"
	"runtime"
	"testing"

	"perdure/internal/vfs"
)

func benchVolume(b *testing.B, size int64, sums bool, activity int) *Volume {
	b.Helper()
	dir := b.TempDir()
	p := testParams()
	p.Size, p.NoChecksums = size, !sums
	if err := Create(vfs.OS{}, dir, p); err != nil {
		b.Fatal(err)
	}
	s, err := Open(vfs.OS{}, dir, "disk0", Options{Activity: activity})
	if err != nil {
		b.Fatal(err)
	}
	if _, err := s.Replay(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = s.Close() })
	return NewVolume(s, VolumeOptions{})
}

// BenchmarkStoreWrite4K is a random write in place into hot extents, without NBD
// and without a flush: what the store itself costs.
func BenchmarkStoreWrite4K(b *testing.B) {
	for _, sums := range []bool{false, true} {
		for _, n := range []int64{4096, 512, 64 << 10} {
			b.Run(fmt.Sprintf("sums=%v/n=%d", sums, n), func(b *testing.B) {
				v := benchVolume(b, 256<<20, sums, 0)
				ctx := context.Background()
				p := make([]byte, 256<<10)
				rand.New(rand.NewSource(1)).Read(p)
				for off := int64(0); off < v.Size(); off += int64(len(p)) {
					if err := v.WriteAt(ctx, p, off, false); err != nil {
						b.Fatal(err)
					}
				}
				if err := v.Flush(ctx); err != nil {
					b.Fatal(err)
				}
				commits := v.Store().Activity().Commits
				b.SetBytes(n)
				b.ReportAllocs()
				for i := 0; b.Loop(); i++ {
					if err := v.WriteAt(ctx, p[:n], int64(i)*7919%(v.Size()/n)*n, false); err != nil {
						b.Fatal(err)
					}
				}
				if v.Store().Activity().Commits != commits {
					b.Fatal("the activity log was written in steady state")
				}
			})
		}
	}
}

func BenchmarkStoreRead4K(b *testing.B) {
	for _, sums := range []bool{false, true} {
		b.Run(fmt.Sprintf("sums=%v", sums), func(b *testing.B) {
			v := benchVolume(b, 256<<20, sums, 0)
			ctx := context.Background()
			p := make([]byte, 256<<10)
			rand.New(rand.NewSource(1)).Read(p)
			for off := int64(0); off < v.Size(); off += int64(len(p)) {
				if err := v.WriteAt(ctx, p, off, false); err != nil {
					b.Fatal(err)
				}
			}
			b.SetBytes(4096)
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				if err := v.ReadAt(ctx, p[:4096], int64(i)*7919%(v.Size()/4096)*4096); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkFlushedWrite4K is a random write and a flush each, as a database does.
func BenchmarkFlushedWrite4K(b *testing.B) {
	for _, sums := range []bool{false, true} {
		b.Run(fmt.Sprintf("sums=%v", sums), func(b *testing.B) {
			v := benchVolume(b, 64<<20, sums, 0)
			ctx := context.Background()
			p := make([]byte, 4096)
			for off := int64(0); off < v.Size(); off += 4096 {
				if err := v.WriteAt(ctx, p, off, false); err != nil {
					b.Fatal(err)
				}
			}
			_ = v.Flush(ctx)
			for i := 0; b.Loop(); i++ {
				p[0] = byte(i)
				if err := v.WriteAt(ctx, p, int64(i)*7919%(v.Size()/4096)*4096, true); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkColdWrite4K writes over far more extents than the log holds: the worst case.
func BenchmarkColdWrite4K(b *testing.B) {
	for _, sums := range []bool{false, true} {
		b.Run(fmt.Sprintf("sums=%v", sums), func(b *testing.B) {
			v := benchVolume(b, 64<<30, sums, 256)
			ctx := context.Background()
			p := make([]byte, 4096)
			rng := rand.New(rand.NewSource(2))
			for b.Loop() {
				if err := v.WriteAt(ctx, p, rng.Int63n(v.Size()/4096)*4096, false); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(v.Store().Activity().Commits)/float64(b.N), "syncs/op")
		})
	}
}

// BenchmarkSequential1M writes 1 MiB after the other into cold extents.
func BenchmarkSequential1M(b *testing.B) {
	for _, sums := range []bool{false, true} {
		b.Run(fmt.Sprintf("sums=%v", sums), func(b *testing.B) {
			v := benchVolume(b, 4<<30, sums, 0)
			ctx := context.Background()
			p := make([]byte, 1<<20)
			b.SetBytes(1 << 20)
			for i := int64(0); b.Loop(); i++ {
				if err := v.WriteAt(ctx, p, i%4096<<20, false); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(v.Store().Activity().Commits)/float64(b.N), "syncs/op")
		})
	}
}

// The memory for a disk of 1 TiB, with everything in use: at most 40 MiB.
func TestMemoryPerTiB(t *testing.T) {
	if os.Getenv("GOFLAGS") == "-race" {
		t.Skip("the race detector takes memory of its own")
	}
	dir := t.TempDir()
	p := testParams()
	p.Size = 1 << 40
	if err := Create(vfs.OS{}, dir, p); err != nil {
		t.Fatal(err)
	}
	heap := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heap()
	s, err := Open(vfs.OS{}, dir, "disk0", Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	if _, err := s.Replay(); err != nil {
		t.Fatal(err)
	}
	// All of the log is in use, and the cache of checksums as well.
	for no := int64(0); no < DefaultActivity+cachedPages+DefaultActivity/8; no += s.act.span() {
		if err := s.act.warm(no, no+s.act.span()-1); err != nil {
			t.Fatal(err)
		}
	}
	s.MarkMissing(0, s.Chunks())
	used := heap() - before
	t.Logf("%.1f MiB for a disk of 1 TiB, %d extents hot", float64(used)/(1<<20), s.Activity().Extents)
	if used > 40<<20 {
		t.Fatal("too much")
	}
	runtime.KeepAlive(s)
}
