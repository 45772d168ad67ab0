package nbd

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"net"
	"testing"
	"time"
)

func handshakeSeeds() [][]byte {
	start := binary.BigEndian.AppendUint32(nil, flagFixedNewstyle|flagNoZeroes)
	join := func(opts ...[]byte) []byte { return bytes.Join(append([][]byte{start}, opts...), nil) }
	return [][]byte{
		join(optionBytes(optExportName, []byte("disk0"))),
		join(optionBytes(optGo, append(lstring("disk0"), 0, 1, 0, 3))),
		join(optionBytes(optList, nil), optionBytes(optAbort, nil)),
		join(optionBytes(optStructuredReply, nil), optionBytes(optListMetaContext, metaQuery("disk0")),
			optionBytes(optSetMetaContext, metaQuery("disk0", contextAllocation)), optionBytes(optGo, append(lstring(""), 0, 0))),
		join(optionBytes(optInfo, []byte{255, 255, 255, 255})),
		join(optionBytes(77, make([]byte, maxOption+1))),
		{0, 0, 0, 0},
		{},
	}
}

// FuzzHandshake feeds a handshake from memory. Whatever comes, it ends, with an
// error or with an export that exists, and answers no more than it was asked.
func FuzzHandshake(f *testing.F) {
	for _, s := range handshakeSeeds() {
		f.Add(s)
	}
	s := &server{exports: map[string]Backend{"disk0": newMemDisk(8192)}, opts: Options{}.withDefaults()}
	f.Fuzz(func(t *testing.T, in []byte) {
		var out bytes.Buffer
		ses, err := s.negotiate(bufio.NewReader(bytes.NewReader(in)), &out)
		if (err == nil) != (ses.backend != nil) {
			t.Fatalf("session %+v with error %v", ses, err)
		}
		if limit := 1024 + 16*len(in); out.Len() > limit {
			t.Fatalf("%d bytes in, %d bytes out", len(in), out.Len())
		}
	})
}

// FuzzTransmission sends raw bytes in transmission. The server must neither
// panic nor hang, whatever comes, and pass only legal ranges to the backend.
func FuzzTransmission(f *testing.F) {
	f.Add(true, requestBytes(cmdRead, 0, 1, 0, 4096, nil))
	f.Add(false, requestBytes(cmdWrite, cmdFlagFUA, 1, 512, 512, make([]byte, 512)))
	f.Add(true, append(requestBytes(cmdBlockStatus, cmdFlagReqOne, 2, 0, 8192, nil), requestBytes(cmdDisc, 0, 0, 0, 0, nil)...))
	f.Add(true, append(requestBytes(cmdTrim, 0, 2, 0, 8192, nil), requestBytes(cmdFlush, 0, 3, 0, 0, nil)...))
	f.Add(true, requestBytes(cmdWriteZeroes, cmdFlagNoHole, 2, 4096, 4096, nil))
	f.Add(false, requestBytes(cmdRead, 0, 1, 1<<63, 1<<31, nil))
	f.Fuzz(func(t *testing.T, structured bool, in []byte) {
		d := &strictDisk{memDisk: newMemDisk(8192)}
		s := &server{exports: map[string]Backend{"": d}, opts: Options{MaxRequests: 3, MaxInflightBytes: 64 << 10}.withDefaults()}
		ours, theirs := net.Pipe()
		done := make(chan struct{})
		go func() {
			defer close(done)
			_, _ = s.serveConn(context.Background(), &slot{nc: ours})
			_ = ours.Close()
		}()
		go func() { _, _ = io.Copy(io.Discard, theirs) }()
		_ = theirs.SetWriteDeadline(time.Now().Add(5 * time.Second))
		start := binary.BigEndian.AppendUint32(nil, flagFixedNewstyle|flagNoZeroes)
		if structured {
			start = append(start, optionBytes(optStructuredReply, nil)...)
			start = append(start, optionBytes(optSetMetaContext, metaQuery("", contextAllocation))...)
		}
		start = append(start, optionBytes(optGo, append(lstring(""), 0, 0))...)
		_, _ = theirs.Write(append(start, in...))
		_ = theirs.Close()
		select {
		case <-done:
		case <-time.After(10 * time.Second):
			t.Fatal("the server hangs")
		}
		if d.bad != "" {
			t.Fatal(d.bad)
		}
	})
}

// strictDisk notes requests that should never have come through.
type strictDisk struct {
	*memDisk
	bad string
}

func (d *strictDisk) see(what string, off, n int64) {
	if off < 0 || n <= 0 || off%MinBlock != 0 || n%MinBlock != 0 || off > d.Size() || n > d.Size()-off {
		d.mu.Lock()
		d.bad = what
		d.mu.Unlock()
	}
}

func (d *strictDisk) ReadAt(ctx context.Context, p []byte, off int64) error {
	d.see("illegal read", off, int64(len(p)))
	return d.memDisk.ReadAt(ctx, p, off)
}

func (d *strictDisk) WriteAt(ctx context.Context, p []byte, off int64, fua bool) error {
	d.see("illegal write", off, int64(len(p)))
	return d.memDisk.WriteAt(ctx, p, off, fua)
}

func (d *strictDisk) Zero(ctx context.Context, off, n int64, fua, punch bool) error {
	d.see("illegal zero", off, n)
	return d.memDisk.Zero(ctx, off, n, fua, punch)
}

func FuzzDecodeRequest(f *testing.F) {
	f.Add(requestBytes(cmdWrite, cmdFlagFUA, 7, 4096, 4096, nil), int64(1<<20))
	f.Fuzz(func(t *testing.T, in []byte, size int64) {
		if len(in) < requestSize || size < 0 {
			return
		}
		r, err := decodeRequest(in)
		if err != nil || r.cmd == cmdFlush {
			return
		}
		if r.check(terms{size, true, true, true}) == accepted {
			if end := r.off + uint64(r.length); end < r.off || end > uint64(size) || r.length == 0 || r.off%MinBlock != 0 {
				t.Fatalf("%+v passed for size %d", r, size)
			}
		}
	})
}
