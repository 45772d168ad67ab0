package nbd

import (
	"bytes"
	"context"
	"testing"
	"time"
)

// stuckDisk is a disk whose WRITEs at offset 0 do not come back before release, whatever
// becomes of their context, as those that the kernel holds.
type stuckDisk struct {
	*memDisk
	begun   chan context.Context
	release chan struct{}
}

func (d *stuckDisk) WriteAt(ctx context.Context, p []byte, off int64, fua bool) error {
	if off == 0 {
		d.begun <- ctx
		<-d.release
	}
	return d.memDisk.WriteAt(ctx, p, off, fua)
}

// TestCutIsForGood: what a client had sent before it was cut off, and what was read of it but
// not begun, is never carried out: the client asks anew, and what it has written since would be undone.
func TestCutIsForGood(t *testing.T) {
	d := &stuckDisk{newMemDisk(1 << 20), make(chan context.Context, 1), make(chan struct{})}
	cut := make(chan struct{})
	ended := make(chan struct{}, 2)
	sock := serveDisks(t, map[string]Backend{"disk0": d}, Options{Cut: cut, MaxRequests: 1, Closed: func(string, error) { ended <- struct{}{} }})
	c := open(t, sock, "disk0", true)
	// In one piece, so that the second waits in the server's buffer.
	c.send(t, append(requestBytes(cmdWrite, 0, 1, 0, 4096, bytes.Repeat([]byte{1}, 4096)),
		requestBytes(cmdWrite, 0, 2, 4096, 4096, bytes.Repeat([]byte{1}, 4096))...))
	ctx := <-d.begun
	if ctx.Err() != nil {
		t.Fatal("the request has ended before it was cut off")
	}
	cut <- struct{}{}
	if _, err := c.receive(0); err == nil {
		t.Error("the request that hung was answered")
	}
	again := open(t, sock, "disk0", true)
	if ctx.Err() == nil {
		t.Error("a new client is served, and the requests of the one that was cut off have not ended")
	}
	for _, b := range []byte{1, 2} { // asked anew, then something newer
		if r := again.do(t, cmdWrite, 0, 4096, 4096, bytes.Repeat([]byte{b}, 4096)); r.errno != 0 {
			t.Fatal(r.errno)
		}
	}
	close(d.release)
	select {
	case <-ended:
	case <-time.After(20 * time.Second):
		t.Fatal("the connection that was cut off does not end")
	}
	if r := again.do(t, cmdRead, 0, 4096, 4096, nil); r.errno != 0 || r.data[0] != 2 {
		t.Errorf("read %d, errno %d: what the client wrote last was undone by a request of the connection before", r.data[0], r.errno)
	}
}
