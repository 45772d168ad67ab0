package nbd_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"perdure/internal/blockstore"
	"perdure/internal/testenv"
)

// What QEMU's own test-suite asks of NBD servers, quorum and mirror, where it
// applies to exports that a shim serves; docs/nbd.md has the table.

// failing is a disk whose changes, or reads, fail when they are told to.
type failing struct {
	*blockstore.Volume
	changes, reads atomic.Pointer[syscall.Errno]
}

func errOf(p *atomic.Pointer[syscall.Errno]) error {
	if e := p.Load(); e != nil {
		return *e
	}
	return nil
}

func set(p *atomic.Pointer[syscall.Errno], e syscall.Errno) {
	if e == 0 {
		p.Store(nil)
		return
	}
	p.Store(&e)
}

func (f *failing) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := errOf(&f.reads); err != nil {
		return err
	}
	return f.Volume.ReadAt(ctx, p, off)
}

func (f *failing) WriteAt(ctx context.Context, p []byte, off int64, fua bool) error {
	if err := errOf(&f.changes); err != nil {
		return err
	}
	return f.Volume.WriteAt(ctx, p, off, fua)
}

func (f *failing) Zero(ctx context.Context, off, n int64, fua, punch bool) error {
	if err := errOf(&f.changes); err != nil {
		return err
	}
	return f.Volume.Zero(ctx, off, n, fua, punch)
}

func failingDisk(t *testing.T, size int64) (f *failing, sock string) {
	f = &failing{Volume: newVolume(t, size)}
	sock = filepath.Join(t.TempDir(), "s")
	export(t, sock, f)
	return f, sock
}

// quorumOf makes a daemon with a quorum of exports, served as one.
func quorumOf(t *testing.T, options dict, socks ...string) (d *daemon, top string) {
	d = startDaemon(t)
	var children []string
	for n, s := range socks {
		name := fmt.Sprintf("c%d", n)
		d.do("blockdev-add", nbdNode(name, s, 0))
		children = append(children, name)
	}
	q := dict{"node-name": "q", "driver": "quorum", "children": children}
	for k, v := range options {
		q[k] = v
	}
	d.do("blockdev-add", q)
	return d, d.serveNode("q")
}

// refused runs qemu-io commands of which the last is to fail.
func refused(t *testing.T, image string, commands ...string) string {
	t.Helper()
	args := []string{"-f", "raw", image}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	out, err := try(t, testenv.Tool(t, "qemu-io"), args...)
	if err == nil && !strings.Contains(out, "failed") && !strings.Contains(out, "rror") {
		t.Fatalf("%v succeeded:\n%s", commands, out)
	}
	return out
}

// TestQuorumOfThree: all children get all writes; a damaged one is outvoted and
// reported, and repaired where that was asked for; two different ones break the quorum.
func TestQuorumOfThree(t *testing.T) {
	var socks, uris []string
	for range 3 {
		_, sock, uri := exported(t, 4<<20)
		socks, uris = append(socks, sock), append(uris, uri)
	}
	d, top := quorumOf(t, dict{"vote-threshold": 2}, socks...)
	io(t, top, "write -P 0x32 0 4M", "flush")
	for _, u := range uris {
		io(t, u, "read -P 0x32 0 4M")
	}
	io(t, uris[1], "write -P 0x42 0 4M", "flush")
	io(t, top, "read -P 0x32 0 4M")
	if e := d.wait("QUORUM_REPORT_BAD"); e["node-name"] != "c1" {
		t.Error("blamed for the damage: ", e)
	}
	io(t, uris[1], "read -P 0x42 0 4M") // nobody asked for it to be repaired

	_, mending := quorumOf(t, dict{"vote-threshold": 2, "rewrite-corrupted": true}, socks...)
	io(t, mending, "read -P 0x32 0 4M")
	io(t, uris[1], "read -P 0x32 0 4M")

	io(t, uris[0], "write -P 0x41 0 64k")
	io(t, uris[1], "write -P 0x42 0 64k")
	refused(t, top, "read 0 64k")
	d.wait("QUORUM_FAILURE")
	io(t, top, "read -P 0x32 64k 1M") // the rest is as it was
}

// TestQuorumVerifies: two children in blkverify mode answer as long as they agree.
func TestQuorumVerifies(t *testing.T) {
	_, sock1, _ := exported(t, 2<<20)
	_, sock2, uri2 := exported(t, 2<<20)
	_, top := quorumOf(t, dict{"vote-threshold": 2, "blkverify": true}, sock1, sock2)
	io(t, top, "write -P 7 0 2M", "write -z 512k 64k", "discard 1M 64k", "flush", "read -P 7 0 512k", "read -P 0 512k 64k")
	io(t, uri2, "read -P 7 0 512k", "read -P 0 512k 64k")
}

// TestQuorumWithErrors: a child that answers with errors is reported with the
// operation, and the others go on.
func TestQuorumWithErrors(t *testing.T) {
	f, sock := failingDisk(t, 2<<20)
	_, sock1, uri1 := exported(t, 2<<20)
	_, sock2, uri2 := exported(t, 2<<20)
	d, top := quorumOf(t, dict{"vote-threshold": 2}, sock, sock1, sock2)
	io(t, top, "write -P 1 0 2M")
	for _, x := range []struct {
		what    string
		err     *atomic.Pointer[syscall.Errno]
		command string
	}{{"read", &f.reads, "read -P 1 0 64k"}, {"write", &f.changes, "write -P 1 64k 64k"}} {
		for _, e := range []syscall.Errno{syscall.EIO, syscall.ENOSPC} {
			set(x.err, e)
			io(t, top, x.command)
			got := d.wait("QUORUM_REPORT_BAD")
			if got["node-name"] != "c0" || got["type"] != x.what || got["error"] == nil {
				t.Errorf("%s with %v: %v", x.what, e, got)
			}
			set(x.err, 0)
		}
	}
	io(t, top, "write -P 1 0 2M")
	compare(t, uri1, uri2)
}

// TestMirrorRepairsQuorum puts a fresh export in the place of a quorum's child.
func TestMirrorRepairsQuorum(t *testing.T) {
	var socks, uris []string
	for range 4 {
		_, sock, uri := exported(t, 4<<20)
		socks, uris = append(socks, sock), append(uris, uri)
	}
	d, top := quorumOf(t, dict{"vote-threshold": 2}, socks[:3]...)
	io(t, top, "write -P 3 0 4M")
	io(t, uris[1], "write -P 9 1M 64k") // its disk rots
	d.do("blockdev-add", nbdNode("fresh", socks[3], 0))
	d.do("blockdev-mirror", dict{"job-id": "r", "device": "q", "target": "fresh", "sync": "full", "replaces": "c1"})
	d.wait("BLOCK_JOB_READY")
	d.do("block-job-complete", dict{"device": "r"})
	if e := d.wait("BLOCK_JOB_COMPLETED"); e["error"] != nil {
		t.Fatal(e)
	}
	io(t, top, "write -P 4 2M 1M", "flush")
	compare(t, uris[0], uris[3])
	io(t, uris[1], "read -P 9 1M 64k", "read -P 3 2M 1M") // nothing reaches the old one
}

// TestMirrorTargets: a target that fails ends the job, or is reported and left
// alone, as was asked for; a target with room again takes the rest; a cancelled
// mirror leaves both sides usable; source and target of different sizes are refused.
func TestMirrorTargets(t *testing.T) {
	start := func(t *testing.T, onError string, e syscall.Errno) (d *daemon, f *failing, src, dst string) {
		_, sock, uri := exported(t, 8<<20)
		io(t, uri, "write -P 5 0 8M")
		f, target := failingDisk(t, 8<<20)
		d = startDaemon(t)
		d.do("blockdev-add", nbdNode("src", sock, 0))
		d.do("blockdev-add", nbdNode("dst", target, 0))
		set(&f.changes, e)
		d.do("blockdev-mirror", dict{"job-id": "m", "device": "src", "target": "dst", "sync": "full", "on-target-error": onError})
		return d, f, uri, uriOf(target)
	}
	t.Run("report", func(t *testing.T) {
		d, _, src, _ := start(t, "report", syscall.EIO)
		if e := d.wait("BLOCK_JOB_COMPLETED"); e["error"] == nil {
			t.Fatal("the job has not noticed: ", e)
		}
		io(t, src, "read -P 5 0 8M")
	})
	t.Run("stop and resume", func(t *testing.T) {
		d, f, src, dst := start(t, "enospc", syscall.ENOSPC)
		if e := d.wait("BLOCK_JOB_ERROR"); e["action"] != "stop" || e["operation"] != "write" {
			t.Fatal(e)
		}
		set(&f.changes, 0)
		d.do("block-job-resume", dict{"device": "m"})
		d.wait("BLOCK_JOB_READY")
		d.do("block-job-complete", dict{"device": "m"})
		if e := d.wait("BLOCK_JOB_COMPLETED"); e["error"] != nil {
			t.Fatal(e)
		}
		compare(t, src, dst)
	})
	t.Run("cancel", func(t *testing.T) {
		d, _, src, dst := start(t, "report", 0)
		d.wait("BLOCK_JOB_READY")
		d.do("block-job-cancel", dict{"device": "m"})
		d.wait("BLOCK_JOB_COMPLETED") // a mirror that is ready ends with equal sides
		compare(t, src, dst)
		io(t, src, "write -P 6 0 64k")
		io(t, dst, "read -P 5 0 64k")
	})
	t.Run("sizes", func(t *testing.T) {
		_, sock1, _ := exported(t, 1<<20)
		_, sock2, _ := exported(t, 2<<20)
		d := startDaemon(t)
		d.do("blockdev-add", nbdNode("src", sock1, 0))
		d.do("blockdev-add", nbdNode("dst", sock2, 0))
		if err := d.in.Encode(dict{"execute": "blockdev-mirror", "arguments": dict{"job-id": "m", "device": "src", "target": "dst", "sync": "full"}}); err != nil {
			t.Fatal(err)
		}
		for {
			if m := d.next(); m["error"] != nil || m["event"] == "BLOCK_JOB_COMPLETED" && m["data"].(map[string]any)["error"] != nil {
				return
			} else if m["event"] == "BLOCK_JOB_READY" {
				t.Fatal("a mirror of one disk onto a larger one: ", m)
			}
		}
	})
}

// TestJobsOutliveTheServer: backup and mirror to an export whose server goes away
// and comes back end as they should, and can be cancelled meanwhile.
func TestJobsOutliveTheServer(t *testing.T) {
	for _, job := range []string{"blockdev-backup", "blockdev-mirror"} {
		for _, cancel := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, cancelled=%v", job, cancel), func(t *testing.T) {
				_, sock, src := exported(t, 20<<20)
				io(t, src, "write -P 5 0 20M")
				v, target := newVolume(t, 20<<20), filepath.Join(t.TempDir(), "s")
				stop := export(t, target, v)
				d := startDaemon(t)
				d.do("blockdev-add", nbdNode("src", sock, 0))
				d.do("blockdev-add", nbdNode("dst", target, 60))
				d.do(job, dict{"job-id": "j", "device": "src", "target": "dst", "sync": "full", "speed": 1 << 20})
				for end := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
					jobs, _ := d.do("query-block-jobs", nil).([]any)
					if len(jobs) == 1 && jobs[0].(map[string]any)["offset"].(float64) > 0 {
						break
					}
					if time.Now().After(end) {
						t.Fatal("the job does not move: ", jobs)
					}
				}
				stop()
				if cancel {
					began := time.Now()
					d.do("block-job-cancel", dict{"device": "j", "force": true})
					d.wait("BLOCK_JOB_CANCELLED")
					if took := time.Since(began); took > 5*time.Second {
						t.Errorf("to cancel a job without a server took %v", took)
					}
					export(t, target, v)
					io(t, uriOf(target), "write -P 1 0 64k", "read -P 1 0 64k")
					return
				}
				d.do("block-job-set-speed", dict{"device": "j", "speed": 0})
				export(t, target, v)
				if job == "blockdev-mirror" {
					d.wait("BLOCK_JOB_READY")
					d.do("block-job-complete", dict{"device": "j"})
				}
				if e := d.wait("BLOCK_JOB_COMPLETED"); e["error"] != nil {
					t.Fatal(e)
				}
				compare(t, src, uriOf(target))
			})
		}
	}
}

// TestClientsThatCameTooEarly: a client with a timeout for its first connection
// waits for the server; without one, or when it is over, it fails.
func TestClientsThatCameTooEarly(t *testing.T) {
	qio := testenv.Tool(t, "qemu-io")
	v := must(t, qio, "--version")
	testenv.Need(t, !strings.Contains(v, "version 5.") && !strings.Contains(v, "version 6."), "open-timeout is there from QEMU 7.0 on: "+v)
	sock := filepath.Join(t.TempDir(), "s")
	open := func(seconds int) []string {
		return []string{"--image-opts", "-c", "read -P 0 0 1M", fmt.Sprintf("driver=nbd,export=disk0,open-timeout=%d,server.type=unix,server.path=%s", seconds, sock)}
	}
	done := make(chan string, 1)
	go func() {
		out, err := try(t, qio, open(60)...)
		done <- fmt.Sprint(out, err)
	}()
	for _, seconds := range []int{0, 1} {
		if out, err := try(t, qio, open(seconds)...); err == nil {
			t.Errorf("without a server, for %d s: %s", seconds, out)
		}
	}
	select {
	case out := <-done:
		t.Fatal("without a server: ", out)
	default:
	}
	export(t, sock, newVolume(t, 1<<20))
	if out := <-done; !strings.Contains(out, "read 1048576/1048576") {
		t.Error(out)
	}
}

// TestConnectionsShareEverything: what one connection wrote another one reads at
// once, and a third one's flush makes durable.
func TestConnectionsShareEverything(t *testing.T) {
	_, sock, _ := exported(t, 4<<20)
	nbdsh(t, sock, `
clients = []
for i in range(3):
    c = nbd.NBD()
    c.connect_uri(uri)
    assert c.can_multi_conn()
    clients.append(c)
a, b, c = clients
assert a.pread(1 << 20, 0) == bytes(1 << 20)
for n in range(1, 20):
    data = bytes([n]) * (1 << 20)
    b.pwrite(data, 0)
    c.flush()
    assert a.pread(1 << 20, 0) == data
a.trim(1 << 20, 0)
b.flush()
assert c.pread(1 << 20, 0) == bytes(1 << 20)
for x in clients: x.shutdown()
`)
}

// TestNamesThatAreNotServed: another export name, and metadata contexts of QEMU's
// own server, are refused, and the server goes on.
func TestNamesThatAreNotServed(t *testing.T) {
	_, sock, uri := exported(t, 1<<20)
	qio, img := testenv.Tool(t, "qemu-io"), testenv.Tool(t, "qemu-img")
	if out, err := try(t, qio, "-f", "raw", "nbd+unix:///other?socket="+sock, "-c", "read 0 512"); err == nil || !strings.Contains(out, "other") && !strings.Contains(out, "not available") {
		t.Errorf("%v: %s", err, out)
	}
	for _, context := range []string{"qemu:dirty-bitmap:b", "qemu:allocation-depth"} {
		out, err := try(t, img, "map", "--output=json", "--image-opts", "driver=nbd,export=disk0,server.type=unix,server.path="+sock+",x-dirty-bitmap="+context)
		if err == nil {
			t.Errorf("%s: %s", context, out)
		}
	}
	io(t, uri, "write -P 1 0 4k", "read -P 1 0 4k")
}

// short is a disk that ends within a block of its volume.
type short struct {
	*blockstore.Volume
	size int64
}

func (s short) Size() int64 { return s.size }

// TestSizesThatEndWithinABlock: a disk may end at any multiple of 512 bytes; what
// lies in its last block is read, written, zeroed, mapped and copied like the rest.
func TestSizesThatEndWithinABlock(t *testing.T) {
	const size = 1<<20 + 512
	v := newVolume(t, 2<<20)
	sock := filepath.Join(t.TempDir(), "s")
	export(t, sock, short{v, size})
	uri := uriOf(sock)
	io(t, uri, "write -P 1 0 1049088", "read -P 1 1048064 1k", "write -P 2 1M 512", "read -P 1 1048064 512", "read -P 2 1M 512", "write -z 1M 512", "read -P 0 1M 512",
		"read -P 1 1048064 512", "discard 1M 512", "read -P 0 1M 512")
	refused(t, uri, "read 1M 1k")
	refused(t, uri, "write 1M 1k")
	out := filepath.Join(t.TempDir(), "copy.raw")
	must(t, testenv.Tool(t, "nbdcopy"), uri, out)
	if st, err := os.Stat(out); err != nil || st.Size() != size {
		t.Fatal(st, err)
	}
	compare(t, uri, out)
	var m []struct{ Start, Length int64 }
	if err := json.Unmarshal([]byte(must(t, testenv.Tool(t, "qemu-img"), "map", "-f", "raw", "--output=json", uri)), &m); err != nil {
		t.Fatal(err)
	}
	end := int64(0)
	for _, e := range m {
		if e.Start != end {
			t.Fatal("the map has a gap: ", m)
		}
		end += e.Length
	}
	if end != size {
		t.Fatalf("the map ends at %d of %d", end, size)
	}
}

// TestOrdinaryRequests is what QEMU asks of every protocol: patterns over the whole
// disk in many sizes, many requests at once, windows on a part of the disk, bounds,
// zeroes with sharp edges, a client that leaves with requests under way, copies
// of parts, and a throw-away layer on top.
func TestOrdinaryRequests(t *testing.T) {
	_, sock, uri := exported(t, 64<<20)
	io(t, uri, "write -P 0xa 0 64M", "read -P 0xa 0 64M", "read -P 0xa 63M 1M")
	var many []string
	for n := range 64 {
		many = append(many, fmt.Sprintf("aio_write -P %d %dk 61k", n+1, n*64))
	}
	many = append(many, "aio_flush")
	for n := range 64 {
		many = append(many, fmt.Sprintf("aio_read -P %d %dk 61k", n+1, n*64), fmt.Sprintf("read -P 0xa %dk 3k", n*64+61))
	}
	if out := io(t, uri, append(many, "aio_flush")...); strings.Contains(out, "failed") {
		t.Fatal(out)
	}
	io(t, uri, "writev -P 3 8M 512 1k 4k 64k", "readv -P 3 8M 512 1k 4k 64k", "read -P 0xa 8459776 4k")
	for _, beyond := range []string{"read 64M 512", "write 64M 512", "read 67108352 1k", "write 67108352 1k", "write -z 67108352 1k", "read 1P 512"} {
		refused(t, uri, beyond)
	}
	// Zeroes stop where they are to stop, whatever blocks the disk has.
	for _, x := range []struct{ off, n int }{{512, 512}, {4096, 4096}, {3584, 1024}, {1024, 64 << 10}, {65536 - 512, 131072 + 1024}} {
		at := 16<<20 + x.off
		for _, how := range []string{"write -z", "write -z -u", "discard"} {
			io(t, uri, "write -P 5 16M 1M", fmt.Sprintf("%s %d %d", how, at, x.n), fmt.Sprintf("read -P 5 16M %d", x.off), fmt.Sprintf("read -P 0 %d %d", at, x.n),
				fmt.Sprintf("read -P 5 %d %d", at+x.n, 1<<20-x.off-x.n))
		}
	}
	// A window is a disk of its own.
	window := func(off, size int) string {
		return fmt.Sprintf("driver=raw,offset=%d,size=%d,file.driver=nbd,file.export=disk0,file.server.type=unix,file.server.path=%s", off, size, sock)
	}
	must(t, testenv.Tool(t, "qemu-io"), "--image-opts", window(20<<20, 1<<20), "-c", "write -P 6 0 1M", "-c", "write -z 512k 4k", "-c", "discard 768k 4k")
	io(t, uri, "read -P 0xa 19M 1M", "read -P 6 20M 512k", "read -P 0 21495808 4k", "read -P 0 21757952 4k", "read -P 0xa 21M 1M")
	if out, err := try(t, testenv.Tool(t, "qemu-io"), "--image-opts", window(20<<20, 1<<20), "-c", "write 1M 512"); err == nil && !strings.Contains(out, "rror") && !strings.Contains(out, "failed") {
		t.Error("beyond a window:", out)
	}
	// Whoever leaves with requests under way leaves a server that goes on.
	_, _ = try(t, testenv.Tool(t, "qemu-io"), "-f", "raw", uri, "-c", "aio_write -P 7 32M 4M", "-c", "aio_read 32M 4M", "-c", "abort")
	io(t, uri, "read -P 0xa 40M 4M")
	// Parts are copied by dd, in and out.
	part := filepath.Join(t.TempDir(), "part.raw")
	must(t, testenv.Tool(t, "qemu-img"), "dd", "-f", "raw", "-O", "raw", "bs=1M", "skip=20", "count=22", "if="+uri, "of="+part)
	io(t, part, "read -P 6 0 512k", "read -P 0xa 1M 1M")
	// Nothing of a layer on top arrives.
	must(t, testenv.Tool(t, "qemu-io"), "-s", "-f", "raw", uri, "-c", "write -P 8 50M 1M", "-c", "read -P 8 50M 1M")
	io(t, uri, "read -P 0xa 50M 1M")
}
