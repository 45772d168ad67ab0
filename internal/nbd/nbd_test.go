package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

func TestReadWrite(t *testing.T) {
	for _, structured := range []bool{false, true} {
		t.Run(fmt.Sprintf("structured=%v", structured), func(t *testing.T) {
			d := newMemDisk(1 << 20)
			c := open(t, serveDisks(t, map[string]Backend{"disk0": d}, Options{}), "disk0", structured)
			if c.size != 1<<20 || c.flags&(tfSendFlush|tfSendFUA|tfSendTrim|tfSendWriteZeroes|tfCanMultiConn) !=
				tfSendFlush|tfSendFUA|tfSendTrim|tfSendWriteZeroes|tfCanMultiConn {
				t.Fatalf("size %d flags %#x", c.size, c.flags)
			}
			p := bytes.Repeat([]byte("abcdefgh"), 128)
			if r := c.do(t, cmdWrite, cmdFlagFUA, 512, 1024, p); r.errno != 0 {
				t.Fatal(r.errno)
			}
			if r := c.do(t, cmdRead, 0, 512, 1024, nil); r.errno != 0 || !bytes.Equal(r.data, p) {
				t.Fatal("read back other data")
			}
			if r := c.do(t, cmdFlush, 0, 0, 0, nil); r.errno != 0 || d.flushes != 1 || d.fua != 1 {
				t.Fatalf("flush %d: %d flushes, %d fua", r.errno, d.flushes, d.fua)
			}
			if r := c.do(t, cmdWriteZeroes, cmdFlagNoHole, 512, 512, nil); r.errno != 0 || d.data[512] != 0 || !d.alloc[0] {
				t.Fatal("write zeroes")
			}
			if r := c.do(t, cmdTrim, 0, 0, 65536, nil); r.errno != 0 || d.data[1024] != 0 || d.alloc[0] {
				t.Fatal("trim")
			}
		})
	}
}

func TestBlockStatus(t *testing.T) {
	d := newMemDisk(1 << 20)
	sock := serveDisks(t, map[string]Backend{"disk0": d}, Options{})
	c := open(t, sock, "disk0", true)
	for _, off := range []uint64{8192, 12288, 65536} {
		c.do(t, cmdWrite, 0, off, 4096, make([]byte, 4096))
	}
	want := []uint32{8192, 3, 8192, 0, 49152, 3, 4096, 0, 978944, 3}
	r := c.do(t, cmdBlockStatus, 0, 0, 1<<20, nil)
	got := make([]uint32, len(r.data)/4)
	for i := range got {
		got[i] = binary.BigEndian.Uint32(r.data[4*i:])
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Fatalf("got %v want %v", got, want)
	}
	if r = c.do(t, cmdBlockStatus, cmdFlagReqOne, 4096, 65536, nil); len(r.data) != 8 || binary.BigEndian.Uint32(r.data) != 4096 {
		t.Fatalf("one extent: % x", r.data)
	}
	if r = open(t, sock, "disk0", false).do(t, cmdBlockStatus, 0, 0, 4096, nil); r.errno != errInvalid {
		t.Fatal("block status without negotiation")
	}
}

func TestIllegalRequestsAreRefusedAndTheConnectionGoesOn(t *testing.T) {
	d := newMemDisk(1 << 20)
	sock := serveDisks(t, map[string]Backend{"disk0": d}, Options{})
	for _, structured := range []bool{false, true} {
		c := open(t, sock, "disk0", structured)
		tooLong := uint32(errInvalid)
		if structured {
			tooLong = errOverflow
		}
		for _, q := range []struct {
			cmd, flags uint16
			off        uint64
			n          uint32
			errno      uint32
		}{
			{cmdRead, 0, 1 << 20, 512, errInvalid},
			{cmdRead, 0, 1<<64 - 512, 1024, errInvalid},
			{cmdRead, 0, 0, 0, errInvalid},
			{cmdRead, 0, 1, 512, errInvalid},
			{cmdRead, 0, 0, 513, errInvalid},
			{cmdRead, 0, 0, MaxBlock + 512, tooLong},
			{cmdRead, 0, 0, 1<<32 - 512, tooLong},
			{cmdRead, cmdFlagNoHole, 0, 512, errInvalid},
			{cmdWrite, 0, 1<<20 - 512, 1024, errNoSpace},
			{cmdWrite, 0, 0, MaxBlock + 512, errInvalid},
			{cmdWrite, 1 << 9, 0, 512, errInvalid},
			{cmdTrim, 0, 0, 1<<32 - 512, errInvalid},
			{cmdWriteZeroes, 0, 1 << 30, 512, errNoSpace},
			{cmdWriteZeroes, 1 << 4, 0, 512, errInvalid},
			{cmdFlush, cmdFlagDF, 0, 0, errInvalid},
			{cmdCache, 0, 0, 0, errInvalid},
			{65535, 0, 0, 512, errInvalid},
		} {
			var payload []byte
			if q.cmd == cmdWrite {
				payload = make([]byte, q.n)
			}
			if r := c.do(t, q.cmd, q.flags, q.off, q.n, payload); r.errno != q.errno {
				t.Errorf("%+v structured=%v: error %d", q, structured, r.errno)
			}
		}
		if r := c.do(t, cmdRead, cmdFlagFUA, 0, 512, nil); r.errno != 0 {
			t.Fatal("the connection does not go on")
		}
	}
}

func TestBackendErrors(t *testing.T) {
	d := newMemDisk(1 << 20)
	c := open(t, serveDisks(t, map[string]Backend{"": d}, Options{}), "", true)
	for err, want := range map[error]uint32{
		errors.New("x"): errIO, syscall.ENOSPC: errNoSpace, syscall.EIO: errIO,
		fmt.Errorf("write: %w", syscall.EROFS): errPerm, context.Canceled: errShutdown,
	} {
		d.mu.Lock()
		d.fail = err
		d.mu.Unlock()
		for _, cmd := range []uint16{cmdRead, cmdTrim, cmdFlush, cmdBlockStatus} {
			if r := c.do(t, cmd, 0, 0, 4096, nil); r.errno != want {
				t.Errorf("command %d, %v: error %d, want %d", cmd, err, r.errno, want)
			}
		}
	}
}

func TestOutOfOrder(t *testing.T) {
	d := newMemDisk(1 << 20)
	d.gate = make(chan struct{})
	c := open(t, serveDisks(t, map[string]Backend{"disk0": d}, Options{}), "disk0", true)
	c.send(t, requestBytes(cmdRead, 0, 1, 0, 4096, nil))
	c.send(t, requestBytes(cmdRead, 0, 2, 4096, 4096, nil))
	if r, err := c.receive(4096); err != nil || r.cookie != 2 {
		t.Fatalf("first answer %v %v", r.cookie, err)
	}
	close(d.gate)
	if r, err := c.receive(4096); err != nil || r.cookie != 1 {
		t.Fatalf("second answer %v %v", r.cookie, err)
	}
}

// A backend that hangs must not hold a client: cut off, it connects again and asks anew.
func TestCut(t *testing.T) {
	d := newMemDisk(1 << 20)
	d.gate = make(chan struct{})
	cut := make(chan struct{})
	sock := serveDisks(t, map[string]Backend{"disk0": d}, Options{Cut: cut})
	c := open(t, sock, "disk0", true)
	c.send(t, requestBytes(cmdRead, 0, 1, 0, 4096, nil)) // hangs
	if r := c.do(t, cmdRead, 0, 4096, 4096, nil); r.errno != 0 {
		t.Fatal(r.errno)
	}
	cut <- struct{}{}
	if _, err := c.receive(4096); err == nil {
		t.Error("the request that hung was answered")
	}
	again := open(t, sock, "disk0", true)
	if r := again.do(t, cmdRead, 0, 4096, 4096, nil); r.errno != 0 {
		t.Errorf("after the cut: %d", r.errno)
	}
	close(d.gate)
}

// A client that asks for everything and reads nothing must not make the server
// allocate more than the budget, nor keep Serve from ending.
func TestMemoryIsBoundedForAClientThatNeverReads(t *testing.T) {
	d := newMemDisk(32 << 20)
	inuse := func(b *budget) int64 {
		b.mu.Lock()
		defer b.mu.Unlock()
		return b.total - b.left
	}
	b := newBudget(8 << 20)
	if !b.take(20<<20) || inuse(b) != 20<<20 {
		t.Fatal("a request larger than the budget must pass alone")
	}
	took := make(chan bool, 1)
	go func() { took <- b.take(1) }()
	b.give(20 << 20)
	if !<-took {
		t.Fatal("waiter was not woken")
	}
	b.close()
	if b.take(1) {
		t.Fatal("closed budget gives")
	}

	sock := serveDisks(t, map[string]Backend{"disk0": d}, Options{MaxInflightBytes: 4 << 20})
	c := open(t, sock, "disk0", false)
	_ = c.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
	for i := uint64(0); ; i++ {
		if _, err := c.Write(requestBytes(cmdRead, 0, i, 0, 1<<20, nil)); err != nil {
			break // the server has stopped reading
		}
	}
	// Another client is served meanwhile.
	if r := open(t, sock, "disk0", false).do(t, cmdRead, 0, 0, 4096, nil); r.errno != 0 {
		t.Fatal(r.errno)
	}
}

func TestHandshake(t *testing.T) {
	d := newMemDisk(1 << 20)
	sock := serveDisks(t, map[string]Backend{"disk0": d, "disk1": newMemDisk(8192)}, Options{})
	c := dial(t, sock)
	c.greet(t, flagFixedNewstyle)
	var names []string
	for _, r := range c.option(t, optList, nil) {
		if r.typ == repServer {
			names = append(names, string(r.data[4:]))
		}
	}
	if strings.Join(names, " ") != "disk0 disk1" {
		t.Fatal(names)
	}
	for _, q := range []struct {
		opt  uint32
		data []byte
		want uint32
	}{
		{optList, []byte{1}, repErrInvalid},
		{5, nil, repErrUnsup},
		{11, nil, repErrUnsup},
		{1 << 30, []byte("x"), repErrUnsup},
		{optInfo, nil, repErrInvalid},
		{optInfo, append(lstring("nope"), 0, 0), repErrUnknown},
		{optGo, append(lstring(""), 0, 0), repErrUnknown},
		{optGo, append(lstring("disk0"), 0, 9), repErrInvalid},
		{optGo, []byte{255, 255, 255, 255, 0, 0}, repErrInvalid},
		{optInfo, append(lstring("disk0"), 0, 1, 0, 1), repAck},
		{optSetMetaContext, metaQuery("disk0", contextAllocation), repErrInvalid}, // no structured replies yet
		{optStructuredReply, []byte{0}, repErrInvalid},
		{optStructuredReply, nil, repAck},
		{optListMetaContext, metaQuery("disk0"), repMetaContext},
		{optListMetaContext, metaQuery("disk0", "base:"), repMetaContext},
		{optListMetaContext, metaQuery("disk0", "qemu:"), repAck},
		{optSetMetaContext, metaQuery("disk0", "base:"), repAck},
		{optSetMetaContext, metaQuery("nope", contextAllocation), repErrUnknown},
		{optSetMetaContext, append(metaQuery("disk0", contextAllocation), 1), repErrInvalid},
		{optSetMetaContext, append(lstring("disk0"), 255, 255, 255, 255), repErrInvalid},
		{optSetMetaContext, metaQuery("disk0", contextAllocation), repMetaContext},
		{optInfo, make([]byte, maxOption+1), repErrTooBig},
	} {
		r := c.option(t, q.opt, q.data)
		typ := r[0].typ
		if q.want == repAck {
			typ = r[len(r)-1].typ
		}
		if typ != q.want {
			t.Errorf("option %d % x: %#x, want %#x", q.opt, q.data[:min(len(q.data), 16)], typ, q.want)
		}
	}
	// The context was set for disk0; disk1 must not offer it.
	if r := c.option(t, optGo, append(lstring("disk1"), 0, 0)); r[len(r)-1].typ != repAck {
		t.Fatal("go")
	}
	c.structured = true
	if r := c.do(t, cmdBlockStatus, 0, 0, 4096, nil); r.errno != errInvalid {
		t.Fatal("context leaked to another export")
	}

	c = dial(t, sock)
	c.greet(t, flagFixedNewstyle)
	c.send(t, optionBytes(optExportName, []byte("disk0")))
	b := c.read(t, 10+124)
	if binary.BigEndian.Uint64(b) != 1<<20 {
		t.Fatal("export name: size")
	}
	if r := c.do(t, cmdRead, 0, 0, 512, nil); r.errno != 0 {
		t.Fatal(r.errno)
	}
	c.send(t, requestBytes(cmdDisc, 0, 0, 0, 0, nil))
	if n, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Fatalf("after DISC: %d %v", n, err)
	}

	c = dial(t, sock)
	c.greet(t, flagFixedNewstyle)
	if r := c.option(t, optAbort, nil); r[0].typ != repAck {
		t.Fatal("abort")
	}
}

func TestClosedIsTold(t *testing.T) {
	type end struct {
		export string
		err    error
	}
	ends := make(chan end, 10)
	sock := serveDisks(t, map[string]Backend{"disk0": newMemDisk(8192)}, Options{
		HandshakeTimeout: 50 * time.Millisecond,
		Closed:           func(e string, err error) { ends <- end{e, err} },
	})
	c := open(t, sock, "disk0", false)
	c.send(t, requestBytes(cmdDisc, 0, 0, 0, 0, nil))
	if e := <-ends; e.export != "disk0" || e.err != nil {
		t.Fatal(e)
	}
	c = open(t, sock, "disk0", false)
	c.send(t, make([]byte, requestSize))
	if e := <-ends; !errors.Is(e.err, errMagic) {
		t.Fatal(e)
	}
	_ = dial(t, sock) // says nothing
	if e := <-ends; e.export != "" || e.err == nil {
		t.Fatal(e)
	}
}

func TestServeEndsWithBusyClients(t *testing.T) {
	d := newMemDisk(1 << 20)
	d.gate = make(chan struct{})
	sock := serveDisks(t, map[string]Backend{"disk0": d}, Options{MaxConns: 2})
	c := open(t, sock, "disk0", false)
	c.send(t, requestBytes(cmdRead, 0, 1, 0, 4096, nil))
	_ = open(t, sock, "disk0", false)
	x := dial(t, sock) // one too many
	if _, err := io.ReadAll(x); err != nil && !errors.Is(err, syscall.ECONNRESET) {
		t.Fatal(err)
	}
	// The cleanup of serveDisks fails the test if Serve does not end.
}

func TestManyConcurrentClients(t *testing.T) {
	d := newMemDisk(1 << 20)
	sock := serveDisks(t, map[string]Backend{"disk0": d}, Options{})
	var wg sync.WaitGroup
	for k := range 4 {
		c := open(t, sock, "disk0", k%2 == 0)
		wg.Go(func() {
			const depth, rounds = 16, 20
			base := uint64(k) << 18
			for r := range rounds {
				for i := range uint64(depth) {
					p := bytes.Repeat([]byte{byte(r), byte(i), byte(k), 7}, 1024)
					_, _ = c.Write(requestBytes(cmdWrite, 0, i, base+i*4096, 4096, p))
				}
				for range depth {
					if rep, err := c.receive(0); err != nil || rep.errno != 0 {
						t.Error(err, rep.errno)
						return
					}
				}
				for i := range uint64(depth) {
					_, _ = c.Write(requestBytes(cmdRead, 0, i, base+i*4096, 4096, nil))
				}
				for range depth {
					rep, err := c.receive(4096)
					if err != nil || !bytes.Equal(rep.data[:4], []byte{byte(r), byte(rep.cookie), byte(k), 7}) {
						t.Error(err, rep.cookie)
						return
					}
				}
			}
		})
	}
	wg.Wait()
}

func BenchmarkWrite4K(b *testing.B) {
	for _, depth := range []int{1, 32} {
		b.Run(fmt.Sprintf("QD%d", depth), func(b *testing.B) {
			c := open(b, serveDisks(b, map[string]Backend{"disk0": newMemDisk(64 << 20)}, Options{}), "disk0", false)
			_ = c.SetDeadline(time.Time{})
			b.SetBytes(4096)
			b.ReportAllocs()
			b.ResetTimer()
			pump(b, c, depth, b.N)
		})
	}
}

// pump keeps depth 4 KiB writes in flight until n are answered.
func pump(b testing.TB, c *client, depth, n int) {
	slots := make(chan struct{}, depth)
	go func() {
		p := requestBytes(cmdWrite, 0, 0, 0, 4096, bytes.Repeat([]byte("x"), 4096))
		for i := range n {
			slots <- struct{}{}
			binary.BigEndian.PutUint64(p[16:], uint64(i*7919%16384)*4096)
			if _, err := c.Write(p); err != nil {
				return
			}
		}
	}()
	var h [simpleSize]byte
	for range n {
		if _, err := io.ReadFull(c, h[:]); err != nil {
			b.Fatal(err)
		}
		<-slots
	}
}
