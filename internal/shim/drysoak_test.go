//go:build soak

package shim

import (
	"flag"
	"fmt"
	"testing"
	"time"

	"perdure/internal/blockstore"
	"perdure/internal/model"
)

// The same flags as those of the end-to-end tests, which make soak passes to all.
var (
	_        = flag.Bool("soak", false, "run the long tests; here they are built in")
	soakFor  = flag.Duration("soak-for", 10*time.Minute, "how long random faults are made")
	soakSeed = flag.Uint64("soak-seed", 0, "seed of the random faults (0: from the clock)")
	soakPart = flag.String("soak-part", "1/1", "which part of a crash matrix is played: 2/3 is every third cell, from the second on")
)

// TestSoakReplicatedDisk makes faults below a replicated disk at random.
func TestSoakReplicatedDisk(t *testing.T) { runDryFaults(t, model.LevelCA, *soakSeed, *soakFor) }

// TestSoakPairKilled plays the whole crash matrix.
func TestSoakPairKilled(t *testing.T) {
	runDryKills(t, model.LevelCA, soakCells(t, dryMatrix(model.LevelCA)), *soakSeed, time.Hour)
}

// soakCells is the part of a matrix that was asked for.
func soakCells(t *testing.T, cells []dryCase) (out []dryCase) {
	var k, n int
	if _, err := fmt.Sscanf(*soakPart, "%d/%d", &k, &n); err != nil || k < 1 || k > n {
		t.Fatalf("-soak-part %q is not K/N with K from 1 to N", *soakPart)
	}
	for i := k - 1; i < len(cells); i += n {
		out = append(out, cells[i])
	}
	return out
}

// TestSoakResyncOfALargeDisk: 200 GiB, of which almost all is a hole; the time of a
// resync follows what has changed, and the memory of the shims is bounded.
func TestSoakResyncOfALargeDisk(t *testing.T) {
	const size = 200 << 30
	r := newResyncRig(t, size)
	chunks := int64(size / blockstore.ChunkSize)
	var took []time.Duration
	for _, n := range []int64{chunks / 1000, chunks / 100} {
		sent, d := r.outage(n)
		took = append(took, d)
		t.Logf("200 GiB, %.1f %% changed: %d MiB sent in %.1f s, %.0f MB/s; peak memory of the shims %d and %d MiB", 100*float64(n)/float64(chunks), sent>>20,
			d.Seconds(), float64(sent)/1e6/d.Seconds(), r.w.hosts["a"].peakMemory()>>20, r.w.hosts["b"].peakMemory()>>20)
		if sent < n*blockstore.ChunkSize || sent > n*blockstore.ChunkSize*11/10 {
			t.Errorf("%d bytes were sent for %d that had changed", sent, n*blockstore.ChunkSize)
		}
		for _, h := range r.w.hosts {
			// A constant, most of it the session's credit, and what grows with the disk.
			if m := h.peakMemory(); m > 256<<20+size/(1<<40>>10)*(40<<20>>10) {
				t.Errorf("the shim of host %s has used %d MiB", h.name, m>>20)
			}
		}
	}
	ratio := took[1].Seconds() / took[0].Seconds()
	t.Logf("ten times as much took %.1f times as long", ratio)
	if ratio > 30 {
		t.Error("the time does not follow the change")
	}
}

// TestSoakFTDisk makes faults below the disk of a VM of level ft at random.
func TestSoakFTDisk(t *testing.T) { runDryFaults(t, model.LevelFT, *soakSeed, *soakFor) }

// TestSoakFTPairKilled plays the whole crash matrix of level ft.
func TestSoakFTPairKilled(t *testing.T) {
	runDryKills(t, model.LevelFT, soakCells(t, dryMatrix(model.LevelFT)), *soakSeed, time.Hour)
}
