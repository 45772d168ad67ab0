//go:build bench

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"perdure/internal/blockstore"
	"perdure/internal/diskcheck/diskserver"
	"perdure/internal/model"
	"perdure/internal/testenv"
	"perdure/internal/vfs"
)

var (
	benchDiskRounds  = flag.Int("bench-disk-rounds", 5, "how often each row of the disk table is measured with each server")
	benchDiskOnly    = flag.String("bench-disk-only", "", "measure only the rows of the disk tables whose names match this regular expression")
	benchDiskSeconds = flag.Int("bench-disk-seconds", 4, "how long one of these measurements takes")
)

// diskServer is one program that exports the same raw file by NBD.
type diskServer struct {
	name string
	// args of the program, given the socket and the image; the export is "disk0" or the default one.
	args  func(sock, image string) []string
	env   []string
	ready func() // before it is measured; nil: nothing
}

// diskRow is one line of the table.
type diskRow struct {
	name  string
	rw    string
	block int
	depth int
}

// What reads comes first: other servers' writes make the checksums of an image wrong.
var diskRows = []diskRow{
	{"1 MiB sequential read", "read", 1 << 20, 4},
	{"4 KiB random write, QD1", "randwrite", 4 << 10, 1},
	{"4 KiB random write, QD32", "randwrite", 4 << 10, 32},
	{"1 MiB sequential write", "write", 1 << 20, 4},
}

// sample is what one run of fio against one server gave.
type sample struct {
	perSecond float64 // requests
	cpuMicros float64 // of the server, per request
	p99       float64 // microseconds
}

// TestBenchDisk compares the unreplicated export with qemu-nbd and nbdkit, each
// with its default cache mode, which is the page cache, on the same file. The
// servers take turns within a round, so that what else the machine does hits
// all of them; the median of the rounds counts.
func TestBenchDisk(t *testing.T) {
	b := &bench{t: t, res: results{Time: time.Now().UTC(), Version: "disk servers", Accel: "none"}}
	defer b.write()
	fio := testenv.Tool(t, "fio")
	qemuNBD, nbdkit := testenv.Tool(t, "qemu-nbd"), testenv.Tool(t, "nbdkit")
	dir := filepath.Join(suite.dir, "bench-disk")
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	image := benchReplica(t, dir, benchDiskSize, false)

	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	servers := []diskServer{
		{"perdure", func(sock, _ string) []string { return []string{self} }, nil, nil},
		{"qemu-nbd", func(sock, image string) []string {
			return []string{qemuNBD, "-f", "raw", "-t", "-k", sock, "-x", "disk0", image}
		}, nil, nil},
		{"nbdkit", func(sock, image string) []string { return []string{nbdkit, "-f", "-U", sock, "file", image} }, nil, nil},
	}
	for _, row := range diskRows {
		if !rowWanted(row.name) {
			continue
		}
		got := make([][]sample, len(servers))
		for range *benchDiskRounds {
			for i, s := range servers {
				sock := filepath.Join(dir, s.name+".sock")
				s.env = diskserver.Env(dir, sock)
				got[i] = append(got[i], runDisk(t, fio, s, row, sock, image))
			}
		}
		b.diskRow(row, servers, got)
	}
}

// rowWanted says whether a row is to be measured.
func rowWanted(name string) bool {
	return regexp.MustCompile(*benchDiskOnly).MatchString(name)
}

// diskRow notes the medians of one row.
func (b *bench) diskRow(row diskRow, servers []diskServer, got [][]sample) {
	of := func(i int, f func(sample) float64) float64 {
		x := make([]float64, len(got[i]))
		for k, s := range got[i] {
			x[k] = f(s)
		}
		return median(x)
	}
	rate := func(s sample) float64 { return s.perSecond }
	ours, best := of(0, rate), 0.0
	var detail []string
	for i, s := range servers {
		r := of(i, rate)
		if i > 0 {
			best = max(best, r)
		}
		detail = append(detail, fmt.Sprintf("%s %.0f/s, %.1f µs CPU, p99 %.0f µs", s.name, r,
			of(i, func(s sample) float64 { return s.cpuMicros }), of(i, func(s sample) float64 { return s.p99 })))
	}
	var series []float64
	for k := range got[0] {
		series = append(series, got[0][k].perSecond/max(got[1][k].perSecond, got[2][k].perSecond))
	}
	b.atLeast("disk, "+row.name+", over the better of qemu-nbd and nbdkit", ours/best, 1, "x", strings.Join(detail, "; "), series...)
	if row.block == 4<<10 {
		cpu := of(0, func(s sample) float64 { return s.cpuMicros })
		b.res.Figures = append(b.res.Figures, figure{Name: "disk, " + row.name + ", CPU of the server per write", Value: cpu, Unit: "µs", Goal: "stated", Met: true})
	}
}

// runDisk starts a server, lets fio work on it, and ends it.
func runDisk(t *testing.T, fio string, s diskServer, row diskRow, sock, image string) sample {
	t.Helper()
	_ = os.Remove(sock)
	syscall.Sync() // what an earlier run left dirty, in any image, must not be written back during this one
	args := s.args(sock, image)
	srv := exec.Command(args[0], args[1:]...)
	srv.Env = append(os.Environ(), s.env...)
	srv.Stdout, srv.Stderr = os.Stderr, os.Stderr
	// Nothing of a bench that is ended outlives it. The signal comes with the end of the thread.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	srv.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	if err := srv.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- srv.Wait() }()
	defer func() {
		_ = srv.Process.Signal(syscall.SIGTERM)
		<-ended
	}()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if _, err := os.Stat(sock); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s does not listen on %s", s.name, sock)
		}
	}
	if s.ready != nil {
		s.ready()
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Duration(*benchDiskSeconds)*time.Second+time.Minute)
	defer cancel()
	report := sock + ".fio"
	cmd := exec.CommandContext(ctx, fio, "--name=x", "--ioengine=nbd", "--uri=nbd+unix:///disk0?socket="+sock, "--rw="+row.rw,
		"--bs="+strconv.Itoa(row.block), "--iodepth="+strconv.Itoa(row.depth), "--time_based", "--runtime="+strconv.Itoa(*benchDiskSeconds),
		"--ramp_time=1", "--randrepeat=1", "--refill_buffers=0", "--thread", "--output-format=json", "--output="+report)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	before := cpuTime(t, srv.Process.Pid)
	if err := cmd.Run(); err != nil {
		t.Fatalf("fio on %s: %v: %s%s", s.name, err, out.String(), errs.String())
	}
	used := cpuTime(t, srv.Process.Pid) - before
	var res struct {
		Jobs []struct {
			Read, Write struct {
				IOPS float64
				Ops  float64 `json:"total_ios"`
				CLat struct {
					Percentile map[string]float64
				} `json:"clat_ns"`
			}
		}
	}
	data, err := os.ReadFile(report)
	if at := bytes.IndexByte(data, '{'); err == nil && at >= 0 { // it says other things there too
		err = json.Unmarshal(data[at:], &res)
	}
	if err != nil || len(res.Jobs) != 1 {
		t.Fatalf("what fio says on %s: %v: %s%s", s.name, err, out.String(), errs.String())
	}
	side := res.Jobs[0].Write
	if strings.HasSuffix(row.rw, "read") {
		side = res.Jobs[0].Read
	}
	// The ramp is in the CPU time but not in the count of requests.
	share := float64(*benchDiskSeconds) / float64(*benchDiskSeconds+1)
	return sample{side.IOPS, float64(used.Microseconds()) * share / max(side.Ops, 1), side.CLat.Percentile["99.000000"] / 1000}
}

// cpuTime is what a process has used so far, in user and kernel mode.
func cpuTime(t *testing.T, pid int) time.Duration {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	f := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	u, _ := strconv.Atoi(f[11])
	k, _ := strconv.Atoi(f[12])
	return time.Duration(u+k) * (time.Second / 100)
}

// benchDiskSize is the length of the disks that are compared.
const benchDiskSize = 1 << 30

// benchReplica makes a replica in dir and writes all of it, so that no run pays for
// allocation. It returns the path of the image.
func benchReplica(t *testing.T, dir string, size int64, noSums bool) string {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.MkdirAll(dir, 0o700))
	must(blockstore.Create(vfs.OS{}, dir, blockstore.Params{ID: "disk0", Size: size, State: model.UpToDate, NoChecksums: noSums}))
	s, err := blockstore.Open(vfs.OS{}, dir, "disk0", blockstore.Options{})
	must(err)
	_, err = s.Replay()
	must(err)
	p := slices.Repeat([]byte("perdure\n"), 128<<10)
	for off := int64(0); off < size; off += int64(len(p)) {
		must(s.WriteAt(p, off))
	}
	must(s.Close())
	return filepath.Join(dir, "disk0.raw")
}
