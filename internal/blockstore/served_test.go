package blockstore_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"perdure/internal/blockstore"
	"perdure/internal/model"
	"perdure/internal/nbd"
	"perdure/internal/testenv"
	"perdure/internal/vfs"
)

// These tests put a Volume behind the NBD server, as the shim does.

var (
	_ nbd.Backend   = (*blockstore.Volume)(nil)
	_ nbd.Allocator = (*blockstore.Volume)(nil)
)

func newVolume(t testing.TB, size int64) *blockstore.Volume {
	t.Helper()
	dir := t.TempDir()
	if err := blockstore.Create(vfs.OS{}, dir, blockstore.Params{ID: "disk0", Size: size, State: model.UpToDate}); err != nil {
		t.Fatal(err)
	}
	s, err := blockstore.Open(vfs.OS{}, dir, "disk0", blockstore.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Replay(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return blockstore.NewVolume(s, blockstore.VolumeOptions{})
}

func serve(t testing.TB, v *blockstore.Volume) (sock string) {
	t.Helper()
	sock = filepath.Join(t.TempDir(), "nbd.sock")
	ln, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- nbd.Serve(ctx, ln, map[string]nbd.Backend{"disk0": v}, nbd.Options{}) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return sock
}

// epochs cuts and commits until ctx ends, as a shim would, without a peer.
func epochs(ctx context.Context, t testing.TB, v *blockstore.Volume, every time.Duration) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for e := model.Epoch(1); ; e++ {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-v.Full():
		}
		w := v.Cut()
		if err := errors.Join(v.Store().Persist(1, e, w), v.Commit(w)); err != nil {
			t.Error(err)
			return
		}
	}
}

// TestQEMUOnAHeldVolume copies an image in and out while epochs go on.
func TestQEMUOnAHeldVolume(t *testing.T) {
	img, qio := testenv.Tool(t, "qemu-img"), testenv.Tool(t, "qemu-io")
	v := newVolume(t, 32<<20)
	sock := serve(t, v)
	if err := v.SetMode(blockstore.Held); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var shim sync.WaitGroup
	shim.Go(func() { epochs(ctx, t, v, 2*time.Millisecond) })
	run := func(name string, args ...string) {
		t.Helper()
		if out, err := exec.Command(name, args...).CombinedOutput(); err != nil || strings.Contains(string(out), "failed") {
			t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
		}
	}
	url, file := "nbd+unix:///disk0?socket="+sock, filepath.Join(t.TempDir(), "x.raw")
	run(img, "create", "-f", "raw", file, "32M")
	run(qio, "-f", "raw", file, "-c", "write -P 1 0 5M", "-c", "write -P 2 9M 3M", "-c", "write -P 3 31M 1M")
	run(img, "convert", "-n", "-f", "raw", "-O", "raw", file, url)
	run(img, "compare", "-f", "raw", "-F", "raw", file, url)
	run(qio, "-f", "raw", url, "-c", "aio_write -P 4 512 5120", "-c", "aio_write -P 5 1M 2M", "-c", "aio_write -z -u 9M 2M", "-c", "aio_flush",
		"-c", "write -f -P 6 20M 4k", "-c", "flush", "-c", "read -P 4 512 5120", "-c", "read -P 5 1M 2M", "-c", "read -P 0 9M 2M",
		"-c", "read -P 2 11M 1M", "-c", "read -P 6 20M 4k", "-c", "read -P 1 0 512", "-c", "read -P 1 5632 512")
	cancel()
	shim.Wait()
	run(img, "convert", "-f", "raw", "-O", "raw", url, file)
	if err := v.SetMode(blockstore.Direct); err != nil {
		t.Fatal(err)
	}
	run(img, "compare", "-f", "raw", "-F", "raw", file, url)
}

// attach shakes hands the old way, which is the shortest.
func attach(b testing.TB, sock string) net.Conn {
	b.Helper()
	c, err := net.Dial("unix", sock)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = c.Close() })
	hello := binary.BigEndian.AppendUint32(nil, 3)
	hello = append(hello, "IHAVEOPT\x00\x00\x00\x01\x00\x00\x00\x05disk0"...)
	if _, err := io.ReadFull(c, make([]byte, 18)); err != nil {
		b.Fatal(err)
	}
	if _, err := c.Write(hello); err != nil {
		b.Fatal(err)
	}
	if _, err := io.ReadFull(c, make([]byte, 10)); err != nil {
		b.Fatal(err)
	}
	return c
}

func request(cmd uint16, cookie, off uint64, n uint32, payload []byte) []byte {
	p := binary.BigEndian.AppendUint32(nil, 0x25609513)
	p = binary.BigEndian.AppendUint16(p, 0)
	p = binary.BigEndian.AppendUint16(p, cmd)
	p = binary.BigEndian.AppendUint64(p, cookie)
	p = binary.BigEndian.AppendUint64(p, off)
	p = binary.BigEndian.AppendUint32(p, n)
	return append(p, payload...)
}

// BenchmarkWrite4K is the whole way of a random 4 KiB write: socket, server, volume.
func BenchmarkWrite4K(b *testing.B) {
	for _, mode := range []blockstore.Mode{blockstore.Direct, blockstore.Held} {
		for _, depth := range []int{1, 32} {
			name := map[blockstore.Mode]string{blockstore.Direct: "direct", blockstore.Held: "held"}[mode]
			b.Run(fmt.Sprintf("%s/QD%d", name, depth), func(b *testing.B) {
				v := newVolume(b, 256<<20)
				c := attach(b, serve(b, v))
				ctx, cancel := context.WithCancel(context.Background())
				var shim sync.WaitGroup
				if mode == blockstore.Held {
					if err := v.SetMode(mode); err != nil {
						b.Fatal(err)
					}
					shim.Go(func() { epochs(ctx, b, v, 25*time.Millisecond) })
				}
				b.SetBytes(4096)
				b.ReportAllocs()
				b.ResetTimer()
				slots := make(chan struct{}, depth)
				go func() {
					p := request(1, 0, 0, 4096, bytes.Repeat([]byte("x"), 4096))
					for i := range b.N {
						slots <- struct{}{}
						binary.BigEndian.PutUint64(p[16:], uint64(i*7919%65536)*4096)
						if _, err := c.Write(p); err != nil {
							return
						}
					}
				}()
				var h [16]byte
				for range b.N {
					if _, err := io.ReadFull(c, h[:]); err != nil {
						b.Fatal(err)
					}
					<-slots
				}
				b.StopTimer()
				cancel()
				shim.Wait()
				if mode == blockstore.Held {
					if err := v.SetMode(blockstore.Direct); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

// BenchmarkPersist is what a flush in an epoch costs: a record, made durable.
func BenchmarkPersist(b *testing.B) {
	for _, blocks := range []int{1, 16, 256} {
		b.Run(fmt.Sprintf("blocks=%d", blocks), func(b *testing.B) {
			v := newVolume(b, 256<<20)
			ctx := context.Background()
			if err := v.SetMode(blockstore.Held); err != nil {
				b.Fatal(err)
			}
			p := bytes.Repeat([]byte("x"), 4096)
			for e := model.Epoch(1); b.Loop(); e++ {
				for i := range blocks {
					if err := v.WriteAt(ctx, p, int64((int(e)*7919+i*13)%65536)*4096, false); err != nil {
						b.Fatal(err)
					}
				}
				_ = v.Flush(ctx)
				w := v.Cut()
				if err := errors.Join(v.Store().Persist(1, e, w), v.Commit(w)); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkCut is what an epoch of 1,000 blocks costs while the guest stands still, and after.
func BenchmarkCut(b *testing.B) {
	v := newVolume(b, 256<<20)
	ctx := context.Background()
	if err := v.SetMode(blockstore.Held); err != nil {
		b.Fatal(err)
	}
	p := bytes.Repeat([]byte("x"), 4096)
	var cut, encode time.Duration
	var buf []byte
	for b.Loop() {
		for i := range int64(1000) {
			if err := v.WriteAt(ctx, p, i*7919%65536*4096, false); err != nil {
				b.Fatal(err)
			}
		}
		t := time.Now()
		w := v.Cut()
		cut += time.Since(t)
		t = time.Now()
		buf = w.AppendTo(buf[:0])
		encode += time.Since(t)
		if err := v.Commit(w); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(cut.Nanoseconds())/float64(b.N), "ns/cut")
	b.ReportMetric(float64(encode.Nanoseconds())/float64(b.N), "ns/encode")
}
