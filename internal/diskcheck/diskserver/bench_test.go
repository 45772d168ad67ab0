package diskserver

import (
	"bytes"
	"context"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"perdure/internal/blockstore"
	"perdure/internal/mirror"
	"perdure/internal/model"
	"perdure/internal/vfs"
)

func TestMain(m *testing.M) {
	Main()
	os.Exit(m.Run())
}

const benchSize, benchBlock = 256 << 20, 4096

// benchReplica makes a replica whose blocks are all there.
func benchReplica(b *testing.B, dir string) *blockstore.Store {
	b.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		b.Fatal(err)
	}
	if err := blockstore.Create(vfs.OS{}, dir, blockstore.Params{ID: Disk, VM: "vm", Size: benchSize, State: model.UpToDate}); err != nil {
		b.Fatal(err)
	}
	st, err := blockstore.Open(vfs.OS{}, dir, Disk, blockstore.Options{})
	if err != nil {
		b.Fatal(err)
	}
	if _, err := st.Replay(); err != nil {
		b.Fatal(err)
	}
	v := blockstore.NewVolume(st, blockstore.VolumeOptions{})
	some := bytes.Repeat([]byte{5}, 1<<20)
	for off := int64(0); off < benchSize; off += int64(len(some)) {
		if err := v.WriteAt(b.Context(), some, off, false); err != nil {
			b.Fatal(err)
		}
	}
	if err := v.Flush(b.Context()); err != nil {
		b.Fatal(err)
	}
	return st
}

// BenchmarkMirroredWrite compares a 4 KiB write that is mirrored to another process
// over a session on the loopback device with what it is made of: a write of one side, and a round trip of as many
// bytes between the same processes. Reported are medians and 99 % values, in µs. The other side's replica has the
// same file system, so the write of this side stands for that one's own.
func BenchmarkMirroredWrite(b *testing.B) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(b.Context()))
	defer cancel()
	dir := b.TempDir()
	if err := benchReplica(b, filepath.Join(dir, "far")).Close(); err != nil {
		b.Fatal(err)
	}
	near := benchReplica(b, filepath.Join(dir, "near"))
	defer near.Close()
	v := blockstore.NewVolume(near, blockstore.VolumeOptions{})
	sess, stop, err := other(ctx, filepath.Join(dir, "far"))
	if err != nil {
		b.Fatal(err)
	}
	defer stop()
	src := mirror.NewSource([]mirror.Replica{v})
	defer src.Close()
	echo := make(chan struct{}, 1)
	if err := join(ctx, src, sess, func() { echo <- struct{}{} }); err != nil {
		b.Fatal(err)
	}
	data := bytes.Repeat([]byte{7}, benchBlock)
	at := func() int64 { return rand.Int64N(benchSize/benchBlock) * benchBlock }
	var own, trip, both []time.Duration
	took := func(to *[]time.Duration, f func() error) {
		start := time.Now()
		if err := f(); err != nil {
			b.Fatal(err)
		}
		*to = append(*to, time.Since(start))
	}
	for b.Loop() {
		took(&own, func() error { return v.WriteAt(ctx, data, at(), false) })
		took(&trip, func() error {
			err := sess.Send(ctx, kindEcho, data)
			if err == nil {
				select {
				case <-echo:
				case <-sess.Lost():
					err = sess.Cause()
				}
			}
			return err
		})
		took(&both, func() error { return src.Export(0).WriteAt(ctx, data, at(), false) })
	}
	us := func(l []time.Duration, percent int) float64 {
		slices.Sort(l)
		return float64(l[(len(l)-1)*percent/100].Nanoseconds()) / 1000
	}
	for _, q := range []struct {
		percent int
		name    string
	}{{50, "p50"}, {99, "p99"}} {
		b.ReportMetric(us(own, q.percent), "own-µs-"+q.name)
		b.ReportMetric(us(trip, q.percent), "trip-µs-"+q.name)
		b.ReportMetric(us(both, q.percent), "mirrored-µs-"+q.name)
		b.ReportMetric(us(both, q.percent)/(us(own, q.percent)+us(trip, q.percent)), "ratio-"+q.name)
	}
}

// BenchmarkMirroredSequential writes 1 MiB after the other, four at a time, to both sides.
func BenchmarkMirroredSequential(b *testing.B) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(b.Context()))
	defer cancel()
	dir := b.TempDir()
	if err := benchReplica(b, filepath.Join(dir, "far")).Close(); err != nil {
		b.Fatal(err)
	}
	near := benchReplica(b, filepath.Join(dir, "near"))
	defer near.Close()
	sess, stop, err := other(ctx, filepath.Join(dir, "far"))
	if err != nil {
		b.Fatal(err)
	}
	defer stop()
	src := mirror.NewSource([]mirror.Replica{blockstore.NewVolume(near, blockstore.VolumeOptions{})})
	defer src.Close()
	if err := join(ctx, src, sess, func() {}); err != nil {
		b.Fatal(err)
	}
	const piece, depth = 1 << 20, 4
	data := bytes.Repeat([]byte{7}, piece)
	b.SetBytes(piece)
	slots, failed := make(chan struct{}, depth), make(chan error, depth)
	for n := int64(0); b.Loop(); n++ {
		slots <- struct{}{}
		go func() {
			defer func() { <-slots }()
			if err := src.Export(0).WriteAt(ctx, data, n*piece%benchSize, false); err != nil {
				failed <- err
			}
		}()
	}
	for range depth {
		slots <- struct{}{}
	}
	select {
	case err := <-failed:
		b.Fatal(err)
	default:
	}
}
