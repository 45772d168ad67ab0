//go:build bench

package shim

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"testing"
	"time"

	"perdure/internal/blockstore"
	"perdure/internal/model"
	"perdure/internal/peer"
	"perdure/internal/pki"
	"perdure/internal/shimapi"
	"perdure/internal/vfs"
)

// The figures of a resync, for make bench: each is a line "resync-figure NAME VALUE".
// Two shims in processes of their own, without a guest, connected directly.

func figure(t *testing.T, name string, v float64) {
	t.Logf("resync-figure %s %g", name, v)
}

// direct takes the forwarders out of the links: sessions from now on have none.
func (r *resyncRig) direct() {
	r.w.store.mu.Lock()
	defer r.w.store.mu.Unlock()
	r.w.store.place = func(e shimapi.Endpoint) shimapi.Endpoint { return e }
}

// afresh takes the secondary away together with its replica, has so many chunks
// written from the disk's beginning on, and returns what filling it took.
func (r *resyncRig) afresh(chunks int64) (sent int64, took time.Duration) {
	r.t.Helper()
	_, s := (&dryKills{w: r.w}).seats()
	s.powerOff(true, nil)
	r.w.until("simplex", 20*time.Second, func(m model.Record) bool { return m.Mode == model.ModeSimplex })
	if err := blockstore.Remove(s.disk(), filepath.Join(s.dir, shimapi.DiskDir), "disk0"); err != nil {
		r.t.Fatal(err)
	}
	conn, err := r.w.dial(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	writeChunks(r.t, conn, chunks, 1)
	_ = conn.Close()
	before := r.ended()
	s.powerOn()
	r.w.untilDuplex(10 * time.Minute)
	r.awaitEnded(before + 1)
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.sent, r.took
}

// storeRates writes chunks to a replica by itself, and reads them, MB/s.
func storeRates(t *testing.T, size, chunks, every int64, piece int64) (write, read float64) {
	t.Helper()
	dir := t.TempDir()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(blockstore.Create(vfs.OS{}, dir, blockstore.Params{ID: "disk0", VM: "vm", Size: size, State: model.UpToDate}))
	st, err := blockstore.Open(vfs.OS{}, dir, "disk0", blockstore.Options{})
	must(err)
	defer st.Close()
	_, err = st.Replay()
	must(err)
	p := make([]byte, piece)
	_, _ = rand.Read(p)
	begun := time.Now()
	total := chunks * blockstore.ChunkSize
	for i := int64(0); i*piece < total; i++ {
		if every > 1 && i%sumChunks == 0 { // as a target knows what comes
			var list []int64
			for k := i; k < i+sumChunks && k*piece < total; k++ {
				list = append(list, k*every*piece/blockstore.ExtentSize)
			}
			must(st.Expect(list))
		}
		must(st.WriteAt(p, i*every*piece))
	}
	must(st.Flush())
	write = float64(total) / 1e6 / time.Since(begun).Seconds()
	begun = time.Now()
	for i := int64(0); i*piece < total; i++ {
		must(st.ReadAt(p, i*every*piece))
	}
	return write, float64(total) / 1e6 / time.Since(begun).Seconds()
}

// linkRate is what a session of its own carries in messages as a copy has them, MB/s.
func linkRate(t *testing.T, near, far *peer.Session, total, piece int64) float64 {
	t.Helper()
	ended := make(chan error, 1)
	go func() {
		for got := int64(0); got < total; {
			m, err := far.Recv(t.Context())
			if err != nil {
				ended <- err
				return
			}
			got += int64(len(m.Payload))
		}
		ended <- nil
	}()
	p := make([]byte, piece)
	_, _ = rand.Read(p)
	begun := time.Now()
	for n := int64(0); n < total; n += piece {
		if err := near.Send(t.Context(), 1, p); err != nil {
			t.Fatal(err)
		}
	}
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	return float64(total) / 1e6 / time.Since(begun).Seconds()
}

// benchSession is a session between two hosts on the loopback device.
func benchSession(b *testing.T) (near, far *peer.Session) {
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

// TestBenchResync measures a full resync of 1 GiB, and one of 1 % of 64 GiB in
// isolated chunks, beside what disk and link do by themselves in the same run.
func TestBenchResync(t *testing.T) {
	const size = 64 << 30
	const full, part = int64(1<<30) / blockstore.ChunkSize, int64(size) / blockstore.ChunkSize / 100
	near, far := benchSession(t)
	figure(t, "link", linkRate(t, near, far, 1<<30, 1<<20))
	figure(t, "link-64k", linkRate(t, near, far, 1<<30, blockstore.ChunkSize))
	write, read := storeRates(t, size, full, 1, 1<<20)
	figure(t, "write", write)
	figure(t, "read", read)
	write, read = storeRates(t, size, part, 100, blockstore.ChunkSize)
	figure(t, "write-isolated", write)
	figure(t, "read-isolated", read)
	r := newResyncRig(t, size)
	r.direct()
	for name, f := range map[string]func() (int64, time.Duration){
		"full":     func() (int64, time.Duration) { return r.afresh(full) },
		"isolated": func() (int64, time.Duration) { return r.outage(part) },
	} {
		sent, took := f()
		t.Logf("%s: %d bytes in %v", name, sent, took)
		figure(t, name, float64(sent)/1e6/took.Seconds())
	}
}

// TestBenchMemory measures what a disk's size costs a shim: the most it had in memory
// with a disk of a TiB and with one of a GiB, after a resync of as many bytes.
func TestBenchMemory(t *testing.T) {
	for _, size := range []int64{1 << 30, 1 << 40} {
		t.Run(fmt.Sprintf("%dGiB", size>>30), func(t *testing.T) {
			r := newResyncRig(t, size)
			r.direct()
			r.outage(4096)
			var most int64
			for _, h := range r.w.hosts {
				most = max(most, h.peakMemory())
			}
			figure(t, fmt.Sprintf("memory-%d", size>>30), float64(most)/(1<<20))
		})
	}
}
