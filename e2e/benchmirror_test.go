//go:build bench

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"perdure/internal/diskcheck/diskserver"
	"perdure/internal/testenv"
)

// qsd is a qemu-storage-daemon on sock that exports image, of which the NBD server on
// port has a second copy: by quorum, or by the job that beginMirror begins.
func qsd(how, dir, sock, image string, port int) []string {
	args := []string{testenvQSD, "--blockdev", "driver=file,node-name=a0,filename=" + image + ",discard=unmap", "--blockdev", "driver=raw,node-name=a,file=a0"}
	far := fmt.Sprintf("driver=nbd,node-name=b,server.type=inet,server.host=127.0.0.1,server.port=%d,export=disk0", port)
	if how == "quorum with TLS" {
		args = append(args, "--object", "tls-creds-psk,id=t,endpoint=client,username=qemu,dir="+dir)
		far += ",tls-creds=t"
	}
	args = append(args, "--blockdev", far)
	top := "a"
	if strings.HasPrefix(how, "quorum") {
		top = "q"
		args = append(args, "--blockdev", "driver=quorum,node-name=q,vote-threshold=2,children.0=a,children.1=b")
	}
	return append(args, "--chardev", "socket,id=m,server=on,wait=off,path="+sock+".qmp", "--monitor", "chardev=m",
		"--nbd-server", "addr.type=unix,addr.path="+sock, "--export", "type=nbd,id=e,node-name="+top+",name=disk0,writable=on")
}

var testenvQSD = "qemu-storage-daemon"

// beginMirror has a storage daemon mirror what is written, before it is answered.
func beginMirror(t *testing.T, sock string) {
	t.Helper()
	c, err := net.Dial("unix", sock+".qmp")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	d := json.NewDecoder(c)
	ready := false
	for _, q := range []string{`{"execute":"qmp_capabilities"}`,
		`{"execute":"blockdev-mirror","arguments":{"job-id":"m","device":"a","target":"b","sync":"none","copy-mode":"write-blocking"}}`} {
		if _, err := c.Write([]byte(q)); err != nil {
			t.Fatal(err)
		}
		for {
			var m map[string]any
			if err := d.Decode(&m); err != nil {
				t.Fatal(err)
			}
			if m["error"] != nil {
				t.Fatalf("%s: %v", q, m["error"])
			}
			ready = ready || m["event"] == "BLOCK_JOB_READY"
			if _, ok := m["return"]; ok {
				break
			}
		}
	}
	for !ready { // until it is, writes are not copied before they are answered
		var m map[string]any
		if err := d.Decode(&m); err != nil {
			t.Fatal(err)
		}
		ready = m["event"] == "BLOCK_JOB_READY"
	}
}

// contender is one of the servers that are compared.
type contender struct {
	name  string
	start func(sock string) (args, env []string)
	far   bool // it needs the NBD server
	tls   bool // which speaks TLS
}

// mirrorReadRows are read from both sides of a quorum, and from the local one of the others.
var mirrorReadRows = []diskRow{
	{"1 MiB sequential read", "read", 1 << 20, 4},
	{"4 KiB random read, QD1", "randread", 4 << 10, 1},
	{"4 KiB random read, QD32", "randread", 4 << 10, 32},
}

// TestBenchMirroredDisk compares a disk that is mirrored write by write over a
// session on the loopback device with QEMU's quorum and blockdev-mirror of a local
// file and an NBD server on the same device; and block checksums with none.
func TestBenchMirroredDisk(t *testing.T) {
	b := &bench{t: t, res: results{Time: time.Now().UTC(), Version: "mirrored disks", Accel: "none"}}
	defer b.write()
	fio, qemuNBD := testenv.Tool(t, "fio"), testenv.Tool(t, "qemu-nbd")
	testenvQSD = testenv.Tool(t, "qemu-storage-daemon")
	dir := filepath.Join(suite.dir, "bench-mirror")
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	image := benchReplica(t, filepath.Join(dir, "a"), benchDiskSize, false)
	remote := benchReplica(t, filepath.Join(dir, "b"), benchDiskSize, false)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	port := freePort(t)
	far := []string{"-f", "raw", "-t", "-b", "127.0.0.1", "-p", strconv.Itoa(port), "-e", "8", "-x", "disk0"}
	if err := os.WriteFile(filepath.Join(dir, "keys.psk"), []byte("qemu:"+strings.Repeat("5a", 32)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	farTLS := []string{"--object", "tls-creds-psk,id=t,endpoint=server,dir=" + dir, "--tls-creds", "t"}
	ours := func(env func(sock string) []string) func(sock string) ([]string, []string) {
		return func(sock string) ([]string, []string) { return []string{self}, env(sock) }
	}
	theirs := func(how string) func(sock string) ([]string, []string) {
		return func(sock string) ([]string, []string) { return qsd(how, dir, sock, image, port), nil }
	}
	a, o := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	mirrors := []contender{
		{name: "perdure", start: ours(func(s string) []string { return diskserver.EnvMirrored(a, o, s) })},
		{name: "quorum", start: theirs("quorum"), far: true},
		{name: "blockdev-mirror", start: theirs("mirror"), far: true},
		{name: "quorum with TLS", start: theirs("quorum with TLS"), far: true, tls: true},
	}
	sums := []contender{
		{name: "with checksums", start: ours(func(s string) []string { return diskserver.Env(filepath.Join(dir, "sums"), s) })},
		{name: "without", start: ours(func(s string) []string { return diskserver.Env(filepath.Join(dir, "plain"), s) })},
	}
	measure := func(row diskRow, list []contender) [][]sample {
		got := make([][]sample, len(list))
		for range *benchDiskRounds {
			for i, c := range list {
				endFar := func() {}
				if c.far {
					args := slices.Clone(far)
					if c.tls {
						args = append(args, farTLS...)
					}
					endFar = startFar(t, exec.Command(qemuNBD, append(args, remote)...))
				}
				sock := filepath.Join(dir, strings.ReplaceAll(c.name, " ", "-")+".sock")
				args, env := c.start(sock)
				s := diskServer{name: c.name, args: func(string, string) []string { return args }, env: env}
				if c.name == "blockdev-mirror" {
					s.ready = func() { beginMirror(t, sock) }
				}
				if c.far {
					awaitPort(t, port)
				}
				got[i] = append(got[i], runDisk(t, fio, s, row, sock, image))
				endFar()
			}
		}
		return got
	}
	for _, row := range mirrorReadRows {
		b.compareIf("disk, mirrored, "+row.name+", over the better of quorum and blockdev-mirror", 1, mirrors[:3], row, measure)
	}
	for _, row := range diskRows {
		if row.rw != "read" {
			b.compareIf("disk, mirrored, "+row.name+", over the better of quorum and blockdev-mirror", 1.2, mirrors[:3], row, measure)
			b.compareIf("disk, mirrored, "+row.name+", over quorum with TLS as well", 1.2, []contender{mirrors[0], mirrors[3]}, row, measure)
		}
	}
	for _, d := range []string{"a", "b"} {
		_ = os.RemoveAll(filepath.Join(dir, d))
	}
	// Both have the very same file: how the page cache holds it differs from file to file, and counts for more than a
	// checksum. What is written without checksums makes them wrong, which diskRows sees to.
	image = benchReplica(t, filepath.Join(dir, "sums"), benchDiskSize, false)
	plain := benchReplica(t, filepath.Join(dir, "plain"), benchDiskSize, true)
	if err := errors.Join(os.Remove(plain), os.Link(image, plain)); err != nil {
		t.Fatal(err)
	}
	for _, row := range diskRows {
		b.compareIf("disk, "+row.name+", with block checksums over without", 0.9, sums, row, measure)
	}
	if rowWanted("disk, mirrored 4 KiB write, over the peer's own write and a round trip") {
		b.addedLatency()
	}
}

// startFar starts the NBD server on the other side. It ends by the function that is
// returned, at the latest with the test, however that ends, or with this process.
func startFar(t *testing.T, cmd *exec.Cmd) (end func()) {
	t.Helper()
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started, over, ended := make(chan error, 1), make(chan struct{}), make(chan struct{})
	go func() {
		runtime.LockOSThread() // the signal comes when the thread ends, not the process
		defer runtime.UnlockOSThread()
		defer close(ended)
		err := cmd.Start()
		started <- err
		if err != nil {
			return
		}
		<-over
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	end = sync.OnceFunc(func() { close(over); <-ended })
	t.Cleanup(end)
	return end
}

// compareIf measures and notes a row, if it is wanted: the first contender over the best of the others.
func (b *bench) compareIf(name string, goal float64, list []contender, row diskRow, measure func(diskRow, []contender) [][]sample) {
	if !rowWanted(name) {
		return
	}
	var others []string
	for _, c := range list[1:] {
		others = append(others, c.name)
	}
	got := measure(row, list)
	b.compared(name, goal, list[0].name, others, got)
	if list[0].name == "perdure" && row.rw == "randwrite" && len(list) == 3 {
		var cpu []float64
		for _, s := range got[0] {
			cpu = append(cpu, s.cpuMicros)
		}
		b.noted("disk, mirrored, "+row.name+", CPU of the primary's side per write", median(cpu), "µs", "", cpu...)
	}
}

// compared notes a ratio: the first one's median over the best of the others.
func (b *bench) compared(name string, goal float64, first string, others []string, got [][]sample) {
	rate := func(s []sample) float64 {
		var x []float64
		for _, k := range s {
			x = append(x, k.perSecond)
		}
		return median(x)
	}
	of := func(s []sample, f func(sample) float64) float64 {
		var x []float64
		for _, k := range s {
			x = append(x, f(k))
		}
		return median(x)
	}
	best := 0.0
	var detail []string
	for i, n := range append([]string{first}, others...) {
		if i > 0 {
			best = max(best, rate(got[i]))
		}
		detail = append(detail, fmt.Sprintf("%s %.0f/s, %.1f µs CPU, p99 %.0f µs", n, rate(got[i]), of(got[i], func(s sample) float64 { return s.cpuMicros }),
			of(got[i], func(s sample) float64 { return s.p99 })))
	}
	var series []float64
	for k := range got[0] {
		m := 0.0
		for _, o := range got[1:] {
			m = max(m, o[k].perSecond)
		}
		series = append(series, got[0][k].perSecond/m)
	}
	b.atLeast(name, rate(got[0])/best, goal, "x", strings.Join(detail, "; "), series...)
}

var metric = regexp.MustCompile(`([0-9.]+) (ratio|mirrored-µs|own-µs|trip-µs)-(p50|p99)`)

// addedLatency takes the figures of BenchmarkMirroredWrite, in which every write is
// measured beside what it is made of.
func (b *bench) addedLatency() {
	got := map[string][]float64{}
	for range *benchDiskRounds {
		out, err := exec.Command("go", "test", "-run", "^$", "-bench", "^BenchmarkMirroredWrite$", "-benchtime", "20000x", "perdure/internal/diskcheck/diskserver").CombinedOutput()
		if err != nil {
			b.t.Fatalf("BenchmarkMirroredWrite: %v\n%s", err, out)
		}
		for _, m := range metric.FindAllStringSubmatch(string(out), -1) {
			v, _ := strconv.ParseFloat(m[1], 64)
			got[m[2]+" "+m[3]] = append(got[m[2]+" "+m[3]], v)
		}
	}
	for _, q := range []string{"p50", "p99"} {
		if len(got["ratio "+q]) == 0 {
			b.t.Fatal("BenchmarkMirroredWrite reports no ratio")
		}
		b.atMost("disk, mirrored 4 KiB write, "+q+", over the peer's own write and a round trip", median(got["ratio "+q]), 1.3, "x",
			fmt.Sprintf("%.0f µs, own write %.0f, round trip %.0f", median(got["mirrored-µs "+q]), median(got["own-µs "+q]), median(got["trip-µs "+q])), got["ratio "+q]...)
	}
}

func freePort(t *testing.T) int {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().(*net.TCPAddr).Port
}

func awaitPort(t *testing.T, port int) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err == nil {
			_ = c.Close()
			return
		}
		if time.Now().After(end) {
			t.Fatalf("nobody listens on port %d: %v", port, err)
		}
	}
}
