//go:build bench

package e2e

import (
	"fmt"
	"os/exec"
	"regexp"
	"strconv"
	"testing"
	"time"
)

var resyncFigure = regexp.MustCompile(`resync-figure ([a-z0-9-]+) ([0-9.e+]+)`)

// resyncRounds bounds how often a resync is measured: each round takes a minute or two.
const resyncRounds = 3

// TestBenchResync compares a resync with what disk and link do by themselves in the
// same run, and says what a large disk costs in memory. The measurements are tests of
// package shim: two shims, no guest, the loopback device.
func TestBenchResync(t *testing.T) {
	b := &bench{t: t, res: results{Time: time.Now().UTC(), Version: "resync", Accel: "none"}}
	defer b.write()
	b.resync()
	b.diskMemory()
}

// shimFigures runs a test of package shim so often and collects what it says.
func (b *bench) shimFigures(test string, rounds int) map[string][]float64 {
	got := map[string][]float64{}
	for range rounds {
		out, err := exec.Command("go", "test", "-count", "1", "-tags", "bench", "-v", "-run", "^"+test+"$", "perdure/internal/shim").CombinedOutput()
		if err != nil {
			b.t.Fatalf("%s: %v\n%s", test, err, out)
		}
		for _, m := range resyncFigure.FindAllStringSubmatch(string(out), -1) {
			v, err := strconv.ParseFloat(m[2], 64)
			if err != nil {
				b.t.Fatalf("%s says %q: %v", test, m[0], err)
			}
			got[m[1]] = append(got[m[1]], v)
		}
	}
	return got
}

func (b *bench) resync() {
	const full, part = "disk, resync, 1 GiB in full, over the least of link, source's read and target's write",
		"disk, resync, 1 % of 64 GiB in chunks far from each other, over the least of link, source's read and target's write"
	if !rowWanted(full) && !rowWanted(part) {
		return
	}
	got := b.shimFigures("TestBenchResync", min(*benchDiskRounds, resyncRounds))
	for _, row := range []struct{ name, what, link, read, write string }{
		{full, "full", "link", "read", "write"}, {part, "isolated", "link-64k", "read-isolated", "write-isolated"},
	} {
		if len(got[row.what]) == 0 || len(got[row.link]) == 0 || len(got[row.read]) == 0 || len(got[row.write]) == 0 {
			b.t.Fatalf("figures are missing: %v", got)
		}
		rate, link, read, write := median(got[row.what]), median(got[row.link]), median(got[row.read]), median(got[row.write])
		var series []float64
		for k, v := range got[row.what] {
			series = append(series, v/min(got[row.link][k], got[row.read][k], got[row.write][k]))
		}
		b.atLeast(row.name, rate/min(link, read, write), 0.8, "x", fmt.Sprintf("%.0f MB/s; link %.0f, read %.0f, write %.0f MB/s", rate, link, read, write), series...)
	}
}

func (b *bench) diskMemory() {
	const name = "disk, memory of a shim per TiB"
	if !rowWanted(name) {
		return
	}
	got := b.shimFigures("TestBenchMemory", min(*benchDiskRounds, resyncRounds))
	if len(got["memory-1"]) == 0 || len(got["memory-1024"]) == 0 {
		b.t.Fatalf("figures are missing: %v", got)
	}
	small, large := median(got["memory-1"]), median(got["memory-1024"])
	b.atMost(name, max(large-small, 0), 40, "MiB", fmt.Sprintf("most ever in memory, after a resync: %.0f MiB with 1 TiB, %.0f MiB with 1 GiB", large, small))
}
