package nbd_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"perdure/internal/blockstore"
	"perdure/internal/model"
	"perdure/internal/nbd"
	"perdure/internal/testenv"
	"perdure/internal/vfs"
)

// These tests let other people's clients work on a Volume, as a guest's QEMU does.

// newVolume makes a replica of size bytes and opens it.
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

// export serves a disk as disk0; stop ends the server, which can be started
// again on the same socket.
func export(t testing.TB, sock string, b nbd.Backend) (stop func()) {
	t.Helper()
	_ = os.Remove(sock)
	ln, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- nbd.Serve(ctx, ln, map[string]nbd.Backend{"disk0": b}, nbd.Options{}) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(stop)
	return stop
}

// exported is a new volume on a socket, and its URI.
func exported(t testing.TB, size int64) (v *blockstore.Volume, sock, uri string) {
	t.Helper()
	v = newVolume(t, size)
	sock = filepath.Join(t.TempDir(), "s")
	export(t, sock, v)
	return v, sock, uriOf(sock)
}

func uriOf(sock string) string { return "nbd+unix:///disk0?socket=" + sock }

// try runs a program to its end.
func try(t testing.TB, name string, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	return string(out), err
}

func must(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := try(t, name, args...)
	if err != nil || strings.Contains(out, "verification failed") {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return out
}

// io runs qemu-io commands on an image.
func io(t testing.TB, image string, commands ...string) string {
	t.Helper()
	args := []string{"-f", "raw", image}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	return must(t, testenv.Tool(t, "qemu-io"), args...)
}

func TestNBDInfo(t *testing.T) {
	info := testenv.Tool(t, "nbdinfo")
	_, sock, uri := exported(t, 64<<20)
	io(t, uri, "write -P 1 1M 1M", "write -P 2 8M 64k")

	var j struct {
		Protocol string
		Exports  []struct {
			Name  string `json:"export-name"`
			Size  int64  `json:"export-size"`
			Min   int    `json:"block_size_minimum"`
			Pref  int    `json:"block_size_preferred"`
			Max   int    `json:"block_size_maximum"`
			RO    bool   `json:"is_read_only"`
			Cache bool   `json:"can_cache"`
			DF    bool   `json:"can_df"`
			Flush bool   `json:"can_flush"`
			FUA   bool   `json:"can_fua"`
			Multi bool   `json:"can_multi_conn"`
			Trim  bool   `json:"can_trim"`
			Zero  bool   `json:"can_zero"`
		}
	}
	out := must(t, info, "--json", uri)
	if err := json.Unmarshal([]byte(out), &j); err != nil || len(j.Exports) != 1 {
		t.Fatalf("%v: %s", err, out)
	}
	e := j.Exports[0]
	if j.Protocol != "newstyle-fixed" || e.Name != "disk0" || e.Size != 64<<20 || e.Min != nbd.MinBlock || e.Pref != nbd.PreferredBlock || e.Max != nbd.MaxBlock ||
		e.RO || !e.Cache || !e.DF || !e.Flush || !e.FUA || !e.Multi || !e.Trim || !e.Zero {
		t.Fatal(out)
	}
	if !strings.Contains(out, "base:allocation") {
		t.Error("no metadata context in", out)
	}
	if list := must(t, info, "--list", "nbd+unix:///?socket="+sock); !strings.Contains(list, `"disk0"`) {
		t.Error(list)
	}
	var m []struct{ Offset, Length, Type int64 }
	if err := json.Unmarshal([]byte(must(t, info, "--map", "--json", uri)), &m); err != nil {
		t.Fatal(err)
	}
	data := map[int64]int64{}
	end := int64(0)
	for _, x := range m {
		if x.Offset != end {
			t.Fatalf("map %v has a gap", m)
		}
		end += x.Length
		if x.Type == 0 {
			data[x.Offset] = x.Length
		}
	}
	if end != 64<<20 || len(data) != 2 || data[1<<20] != 1<<20 || data[8<<20] != 64<<10 {
		t.Fatal(m)
	}
	if out, err := try(t, info, "nbd+unix:///other?socket="+sock); err == nil {
		t.Fatal("another name is served:", out)
	}
	for _, can := range [][]string{{"--can", "structured-reply"}, {"--can", "multi-conn"}, {"--can", "fua"}, {"--can", "cache"}} {
		must(t, info, append(can, uri)...)
	}
	if _, err := try(t, info, "--is", "tls", uri); err == nil {
		t.Fatal("TLS without TLS")
	}
}

// TestCopies moves an image in and out with each program that copies, over
// several connections where it can.
func TestCopies(t *testing.T) {
	img, cp := testenv.Tool(t, "qemu-img"), testenv.Tool(t, "nbdcopy")
	dir := t.TempDir()
	src := filepath.Join(dir, "src.raw")
	must(t, img, "create", "-f", "raw", src, "48M")
	io(t, src, "write -P 1 0 3M", "write -P 2 7M 513k", "write -P 3 40M 8M", "write -P 4 20M 512")
	for name, in := range map[string]func(uri string) []string{
		"nbdcopy":                func(uri string) []string { return []string{cp, src, uri} },
		"nbdcopy, 4 connections": func(uri string) []string { return []string{cp, "--connections=4", "--requests=16", src, uri} },
		"nbdcopy, simple, flush": func(uri string) []string { return []string{cp, "--synchronous", "--flush", src, uri} },
		"nbdcopy, allocated":     func(uri string) []string { return []string{cp, "--allocated", src, uri} },
		"qemu-img convert":       func(uri string) []string { return []string{img, "convert", "-n", "-f", "raw", "-O", "raw", src, uri} },
		"qemu-img convert, wild": func(uri string) []string {
			return []string{img, "convert", "-n", "-W", "-m", "16", "-f", "raw", "-O", "raw", src, uri}
		},
		"qemu-img convert, direct": func(uri string) []string {
			return []string{img, "convert", "-n", "-t", "none", "-f", "raw", "-O", "raw", src, uri}
		},
	} {
		t.Run(name, func(t *testing.T) {
			_, _, uri := exported(t, 48<<20)
			io(t, uri, "write -P 9 0 48M") // what was there before must go
			args := in(uri)
			must(t, args[0], args[1:]...)
			must(t, img, "compare", "-f", "raw", "-F", "raw", src, uri)
			out := filepath.Join(t.TempDir(), "out.raw")
			must(t, cp, uri, out)
			must(t, img, "compare", "-s", "-f", "raw", "-F", "raw", src, out)
		})
	}
	// Holes stay holes on both ways.
	_, _, uri := exported(t, 48<<20)
	must(t, cp, src, uri)
	var m []struct {
		Start, Length int64
		Data          bool
	}
	if err := json.Unmarshal([]byte(must(t, img, "map", "-f", "raw", "--output=json", uri)), &m); err != nil {
		t.Fatal(err)
	}
	var data int64
	for _, e := range m {
		if e.Data {
			data += e.Length
		}
	}
	if data < 11<<20 || data > 14<<20 {
		t.Fatalf("%d bytes of data after a sparse copy", data)
	}
}

// TestFioVerifies writes with checksums at several depths and reads them back.
func TestFioVerifies(t *testing.T) {
	fio := testenv.Tool(t, "fio")
	_, _, uri := exported(t, 64<<20)
	for _, job := range [][]string{
		{"--bs=4k", "--iodepth=1", "--io_size=4M"}, {"--bs=512-64k", "--bs_unaligned=0", "--blockalign=512", "--iodepth=16", "--io_size=32M", "--serialize_overlap=1"}, {"--bs=4k", "--iodepth=64", "--io_size=24M"}, {"--bs=1M", "--iodepth=8", "--io_size=64M"},
	} {
		args := append([]string{"--name=v", "--ioengine=nbd", "--uri=" + uri, "--rw=randwrite", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1",
			"--randseed=7", "--thread", "--size=64M", "--fsync=64", "--verify_state_save=0"}, job...)
		if strings.Contains(strings.Join(job, " "), "512-") {
			args[5] = "--verify=pattern" // headers do not fit into 512 bytes of each kind
			args = append(args, "--verify_pattern=%o")
		}
		if out := must(t, fio, args...); !strings.Contains(out, "err= 0") {
			t.Fatal(out)
		}
	}
}

// nbdsh runs Python on libnbd. h is not connected yet; uri and sock are set.
func nbdsh(t testing.TB, sock, script string) string {
	t.Helper()
	sh := testenv.Tool(t, "nbdsh")
	// The bindings are the distribution's, and so the Python must be.
	t.Setenv("PATH", "/usr/bin:"+os.Getenv("PATH"))
	head := fmt.Sprintf("sock=%q\nuri=%q\n", sock, uriOf(sock)) + `
def fails(what, errno_, fn, *a, **k):
    try:
        fn(*a, **k)
    except nbd.Error as e:
        assert e.errnum == errno_, (what, e.string, e.errnum)
        return e.string
    raise AssertionError(what + " did not fail")
`
	return must(t, sh, "-c", head+script)
}

// TestIllegalRequestsOfLibnbd sends, with strict mode off, what libnbd would not
// let pass, and goes on afterwards on the same connection.
func TestIllegalRequestsOfLibnbd(t *testing.T) {
	_, sock, _ := exported(t, 1<<20)
	for _, structured := range []string{"True", "False"} {
		nbdsh(t, sock, `
import errno
h.set_request_structured_replies(`+structured+`)
if `+structured+`: h.add_meta_context("base:allocation")
h.set_strict_mode(0)
h.connect_uri(uri)
size = h.get_size()
assert size == 1 << 20
big = bytearray(1024)
fails("read beyond", errno.EINVAL, h.pread, 1024, size - 512)
fails("read far beyond", errno.EINVAL, h.pread, 512, 1 << 62)
fails("write beyond", errno.ENOSPC, h.pwrite, big, size - 512)
fails("zero beyond", errno.ENOSPC, h.zero, 1024, size - 512)
fails("trim beyond", errno.EINVAL, h.trim, 1024, size - 512)
fails("cache beyond", errno.EINVAL, h.cache, 1024, size - 512)
fails("unaligned read", errno.EINVAL, h.pread, 512, 1)
fails("unaligned length", errno.EINVAL, h.pread, 513, 0)
fails("unaligned write", errno.EINVAL, h.pwrite, bytearray(100), 0)
fails("unaligned zero", errno.EINVAL, h.zero, 100, 0)
fails("unaligned trim", errno.EINVAL, h.trim, 512, 3)
fails("empty read", errno.EINVAL, h.pread, 0, 0)
fails("empty write", errno.EINVAL, h.pwrite, bytearray(0), 0)
fails("empty zero", errno.EINVAL, h.zero, 0, 0)
fails("empty trim", errno.EINVAL, h.trim, 0, 0)
fails("huge zero", errno.ENOSPC, h.zero, (1 << 32) - 512, 0)
fails("huge trim", errno.EINVAL, h.trim, (1 << 32) - 512, 0)
fails("strange flag of read", errno.EINVAL, h.pread, 512, 0, 1 << 9)
fails("strange flag of write", errno.EINVAL, h.pwrite, bytearray(512), 0, 1 << 12)
fails("REQ_ONE on write", errno.EINVAL, h.pwrite, bytearray(512), 0, nbd.CMD_FLAG_REQ_ONE)
fails("NO_HOLE on trim", errno.EINVAL, h.trim, 512, 0, nbd.CMD_FLAG_NO_HOLE)
fails("FAST_ZERO not offered", errno.EINVAL, h.zero, 512, 0, nbd.CMD_FLAG_FAST_ZERO)
fails("strange flag of flush", errno.EINVAL, h.flush, nbd.CMD_FLAG_DF)
if `+structured+`:
    fails("status beyond", errno.EINVAL, h.block_status, 1024, size - 512, lambda *a: 0)
    fails("status of nothing", errno.EINVAL, h.block_status, 0, 0, lambda *a: 0)
    h.pread(512, 0, nbd.CMD_FLAG_DF)
else:
    fails("DF without structured replies", errno.EINVAL, h.pread, 512, 0, nbd.CMD_FLAG_DF)
h.pwrite(b"x" * 512, 0, nbd.CMD_FLAG_FUA)
assert h.pread(512, 0, nbd.CMD_FLAG_FUA) == b"x" * 512
h.flush(nbd.CMD_FLAG_FUA)
h.shutdown()
`)
	}
}

// TestLibnbd uses each request as it is meant.
func TestLibnbd(t *testing.T) {
	_, sock, _ := exported(t, 8<<20)
	nbdsh(t, sock, `
h.set_opt_mode(True)
h.connect_unix(sock)
names = []
h.opt_list(lambda name, desc: names.append(name) or 0)
assert names == ["disk0"], names
h.set_export_name("nope")
fails("unknown export", 2, h.opt_info)
h.set_export_name("disk0")
h.set_full_info(True)
h.opt_info()
assert h.get_size() == 8 << 20 and h.get_canonical_export_name() == "disk0"
ctx = []
h.opt_list_meta_context(lambda name: ctx.append(name) or 0)
assert ctx == ["base:allocation"], ctx
h.add_meta_context("base:allocation")
h.add_meta_context("qemu:allocation-depth")
h.opt_go()
assert h.can_meta_context("base:allocation") and not h.can_meta_context("qemu:allocation-depth")
assert h.get_structured_replies_negotiated()

h.pwrite(b"a" * 65536, 65536)
h.zero(4096, 65536 + 4096, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
h.cache(1 << 20, 0)
h.trim(16384, 65536 + 32768, nbd.CMD_FLAG_FUA)
want = b"a" * 4096 + bytes(4096) + b"a" * 24576 + bytes(16384) + b"a" * 16384
assert h.pread(65536, 65536) == want
got = []
def chunk(buf, off, status, err):
    got.append((off, len(buf), status)); return 0
h.pread_structured(65536, 65536, chunk, nbd.CMD_FLAG_DF)
assert got == [(65536, 65536, nbd.READ_DATA)], got

def status(n, off, flags=0):
    e = []
    def cb(name, o, entries, err):
        assert name == "base:allocation" and o == off
        e.extend(entries); return 0
    h.block_status(n, off, cb, flags)
    return [(e[i], e[i + 1]) for i in range(0, len(e), 2)]
all_ = status(8 << 20, 0)
assert sum(n for n, _ in all_) == 8 << 20 and all_[0] == (65536, 3), all_
assert status((8 << 20) - 4096, 4096, nbd.CMD_FLAG_REQ_ONE) == [(61440, 3)]
assert status(512, 65536, nbd.CMD_FLAG_REQ_ONE) == [(512, 0)]
assert status(512, (8 << 20) - 512) == [(512, 3)]
assert status(8192, 65536 + 28672) == [(4096, 0), (4096, 3)], status(8192, 65536 + 28672)

# Many at once: all are answered, each with its own data.
bufs, cookies = [], []
for i in range(200):
    h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(bytes([i]) * 4096)), (1 << 20) + i * 4096, lambda *a: 1)
while h.aio_in_flight() > 0: h.poll(-1)
for i in range(200):
    b = nbd.Buffer(4096); bufs.append(b)
    h.aio_pread(b, (1 << 20) + i * 4096, lambda *a: 1)
while h.aio_in_flight() > 0: h.poll(-1)
assert all(bytes(b.to_bytearray()) == bytes([i]) * 4096 for i, b in enumerate(bufs))

# What one connection flushed another one sees.
h2 = nbd.NBD(); h2.connect_uri(uri)
assert h.can_multi_conn()
h.pwrite(b"z" * 4096, 0); h.flush()
assert h2.pread(4096, 0) == b"z" * 4096
h2.pwrite(b"y" * 4096, 0, nbd.CMD_FLAG_FUA)
assert h.pread(4096, 0) == b"y" * 4096
h.shutdown(); h2.shutdown()

# Leaving in the middle of the handshake is proper.
h3 = nbd.NBD(); h3.set_opt_mode(True); h3.connect_unix(sock); h3.opt_abort()
# So is the oldest way in.
h4 = nbd.NBD(); h4.set_handshake_flags(0); h4.connect_uri(uri)
assert h4.get_size() == 8 << 20 and h4.pread(4096, 0) == b"y" * 4096
h4.shutdown()
`)
}

// TestLargestRequests go through whole, and one more block is refused.
func TestLargestRequests(t *testing.T) {
	_, sock, uri := exported(t, 80<<20)
	io(t, uri, "write -P 5 0 "+strconv.Itoa(nbd.MaxBlock), "read -P 5 0 "+strconv.Itoa(nbd.MaxBlock))
	nbdsh(t, sock, `
import errno
h.set_strict_mode(0)
h.connect_uri(uri)
n = 32 << 20
assert h.pread(n, 0) == b"\x05" * n
h.pwrite(b"\x06" * n, n)
fails("too long", errno.EOVERFLOW, h.pread, n + 512, 0)
fails("too long", errno.EINVAL, h.pwrite, bytearray(n + 512), 0)
h.zero(70 << 20, 0)
assert h.pread(n, n) == bytes(n)
h.shutdown()
`)
}

// TestReadBytesEqualTheImage closes the circle: what clients wrote is in the image.
func TestReadBytesEqualTheImage(t *testing.T) {
	v, _, uri := exported(t, 4<<20)
	io(t, uri, "aio_write -P 1 0 1M", "aio_write -P 2 512k 1M", "aio_flush", "write -P 7 3M 512", "flush")
	got := make([]byte, 512)
	if err := v.Store().ReadAt(got, 3<<20); err != nil || !bytes.Equal(got, bytes.Repeat([]byte{7}, 512)) {
		t.Fatal(err, got[:8])
	}
}
