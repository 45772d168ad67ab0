package shim

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"perdure/internal/blockstore"
	"perdure/internal/mirror"
	"perdure/internal/model"
	"perdure/internal/peer"
	"perdure/internal/pki"
	"perdure/internal/vfs"
)

// BenchmarkMirroredWrite compares a 4 KiB write that is mirrored over a real
// session on the loopback device with what it is made of: a write on each side,
// and a round trip of as many bytes. Reported are medians and 99 % values, in µs.
func BenchmarkMirroredWrite(b *testing.B) {
	const size, block = 256 << 20, 4096
	var vols [2]*blockstore.Volume
	for n := range vols {
		dir := filepath.Join(b.TempDir(), "disks")
		if err := os.MkdirAll(dir, 0o755); err != nil {
			b.Fatal(err)
		}
		err := blockstore.Create(vfs.OS{}, dir, blockstore.Params{ID: "disk0", VM: "vm", Size: size, State: model.UpToDate})
		if err != nil {
			b.Fatal(err)
		}
		st, err := blockstore.Open(vfs.OS{}, dir, "disk0", blockstore.Options{})
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { st.Close() })
		if _, err := st.Replay(); err != nil {
			b.Fatal(err)
		}
		vols[n] = blockstore.NewVolume(st, blockstore.VolumeOptions{})
		zero := make([]byte, 1<<20) // all blocks are there, and all of the activity log is warm
		for off := int64(0); off < size; off += int64(len(zero)) {
			if err := vols[n].WriteAt(b.Context(), zero, off, false); err != nil {
				b.Fatal(err)
			}
		}
		if err := vols[n].Flush(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
	near, far := benchSession(b)
	src := mirror.NewSource([]mirror.Replica{vols[0]})
	dst := mirror.NewTarget([]mirror.Replica{vols[1]}, func(p ...[]byte) error { return far.Send(b.Context(), kindMirrored, p...) },
		func(p ...[]byte) error { return far.Send(b.Context(), kindMirrorData, p...) }, func(err error) { b.Error(err) })
	const kindEcho = 200
	echo := make(chan struct{}, 1)
	go func() {
		for m, err := far.Recv(b.Context()); err == nil; m, err = far.Recv(b.Context()) {
			if m.Kind == kindEcho {
				err = far.Send(b.Context(), kindEcho, m.Payload[:8])
			} else {
				err = dst.Take(m.Payload)
			}
			if err != nil {
				return
			}
		}
	}()
	go func() {
		for m, err := near.Recv(b.Context()); err == nil; m, err = near.Recv(b.Context()) {
			if m.Kind == kindEcho {
				echo <- struct{}{}
			} else if src.Done(m.Payload) != nil {
				return
			}
		}
	}()
	err := src.Join(func(p ...[]byte) error { return near.Send(b.Context(), kindMirror, p...) }, func() error { return nil })
	if err != nil {
		b.Fatal(err)
	}
	data := bytes.Repeat([]byte{7}, block)
	at := func() int64 { return rand.Int64N(size/block) * block }
	var own, trip, both []time.Duration
	took := func(to *[]time.Duration, f func() error) {
		start := time.Now()
		if err := f(); err != nil {
			b.Fatal(err)
		}
		*to = append(*to, time.Since(start))
	}
	for b.Loop() {
		took(&own, func() error { return vols[1].WriteAt(b.Context(), data, at(), false) })
		took(&trip, func() error {
			err := near.Send(b.Context(), kindEcho, data)
			if err == nil {
				select {
				case <-echo:
				case <-near.Lost():
					err = errors.New("the session was lost")
				}
			}
			return err
		})
		took(&both, func() error { return src.Export(0).WriteAt(b.Context(), data, at(), false) })
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
	src.Close()
}

// benchSession is a session between two hosts on the loopback device.
func benchSession(b *testing.B) (near, far *peer.Session) {
	b.Helper()
	ca, err := pki.NewCA("bench", time.Now())
	if err != nil {
		b.Fatal(err)
	}
	conf := func(name string) peer.Config {
		key, csr, err := pki.NewRequest(name)
		if err != nil {
			b.Fatal(err)
		}
		cert, err := ca.IssueHost(csr, name, []net.IP{net.IPv4(127, 0, 0, 1)}, time.Now())
		if err != nil {
			b.Fatal(err)
		}
		id, err := pki.NewIdentity(ca.CertPEM(), cert, key, time.Now())
		if err != nil {
			b.Fatal(err)
		}
		c, client := id.ServerTLS(false), id.ClientTLS("")
		c.RootCAs, c.InsecureSkipVerify, c.VerifyConnection = client.RootCAs, true, client.VerifyConnection
		c.GetClientCertificate = client.GetClientCertificate
		return peer.Config{TLS: c, Verify: func(tls.ConnectionState) error { return nil }, Hello: []byte(name), Silence: 10 * time.Second,
			Local: []string{"127.0.0.1"}, Log: slog.New(slog.DiscardHandler)}
	}
	ctx := context.WithoutCancel(b.Context())
	ln, err := peer.Listen(ctx, conf("b"))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { ln.Close() })
	dial := conf("a")
	dial.Remote = ln.Addrs()
	if near, err = peer.Dial(ctx, dial); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { near.Close("end") })
	if far, err = ln.Accept(ctx); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { far.Close("end") })
	return near, far
}
