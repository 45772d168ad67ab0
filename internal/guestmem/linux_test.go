package guestmem

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"perdure/internal/testenv"
)

// guestDirEnv names a directory with vmlinuz and initrd.gz (perdure lab guest build makes one).
const guestDirEnv = "PERDURE_TEST_GUEST"

// BenchmarkLinux checkpoints an idle Linux under TCG every 100 ms and says what its
// epochs are made of: how much is zero, unchanged, compressible, and where the pause goes.
func BenchmarkLinux(b *testing.B) {
	testenv.QEMU(b)
	dir := os.Getenv(guestDirEnv)
	if dir == "" {
		b.Skip("set " + guestDirEnv + " to a directory with vmlinuz and initrd.gz")
	}
	for _, size := range []int64{256 << 20, 4 << 30} {
		for _, pre := range []bool{false, true} {
			b.Run(fmt.Sprintf("%dMiB/preflush %v", size>>20, pre), func(b *testing.B) { benchLinux(b, dir, size, pre) })
		}
	}
}

func benchLinux(b *testing.B, dir string, size int64, pre bool) {
	r := openRAM(b, size)
	start := time.Now()
	q := startQEMU(b, r, "tcg", "-bios", "bios-256k.bin", "-cpu", "max", "-kernel", filepath.Join(dir, "vmlinuz"), "-initrd", filepath.Join(dir, "initrd.gz"),
		"-append", "console=ttyS0 quiet panic=-1")
	b.Logf("preallocated after %v", time.Since(start))
	start = time.Now()
	if err := r.Attach(); err != nil {
		b.Fatal(err)
	}
	b.Logf("attached in %v", time.Since(start))
	q.do("cont", nil)
	time.Sleep(20 * time.Second) // boots; there is nothing to wait for without a console
	r.SetMode(Collect)
	start = time.Now()
	var sweep EncodeStats
	enc := NewEncoder(EncoderConfig{})
	count := func([]byte) error { return nil }
	if err := r.Sweep(b.Context(), 0, func(off int64, d []byte) error {
		s, err := enc.EncodeRun(off, d, count)
		sweep.add(s)
		return err
	}); err != nil {
		b.Fatal(err)
	}
	b.Logf("swept in %v: %+v", time.Since(start), sweep)
	skip := NewEncoder(EncoderConfig{SkipUnchanged: true, Size: size})
	mustCut(b, r).Release()
	var all, flush, cost, costSkip []float64
	var plain, skipped EncodeStats
	for b.Loop() {
		time.Sleep(100 * time.Millisecond)
		if pre {
			mustFlush(b, r)
		}
		t0 := time.Now()
		q.do("stop", nil)
		t1 := time.Now()
		ps := mustCut(b, r)
		t2 := time.Now()
		q.do("cont", nil)
		all = append(all, float64(time.Since(t0).Microseconds()))
		flush = append(flush, float64(t2.Sub(t1).Microseconds()))
		t3 := time.Now()
		s, _ := enc.Encode(ps, count)
		cost = append(cost, float64(time.Since(t3).Microseconds()))
		plain.add(s)
		t3 = time.Now()
		s, _ = skip.Encode(ps, count)
		costSkip = append(costSkip, float64(time.Since(t3).Microseconds()))
		skipped.add(s)
		ps.Release()
	}
	n := float64(len(all))
	report(b, all)
	b.ReportMetric(median(flush), "µs-flush")
	b.ReportMetric(median(cost), "µs-encode")
	b.ReportMetric(median(costSkip), "µs-encode-skip")
	b.ReportMetric(float64(plain.Pages)/n, "pages")
	b.ReportMetric(float64(plain.ZeroPages)/n, "zero")
	b.ReportMetric(float64(skipped.SkippedPages)/n, "unchanged")
	b.ReportMetric(float64(plain.Bytes)/n, "bytes")
	b.ReportMetric(float64(skipped.Bytes)/n, "bytes-skip")
}
