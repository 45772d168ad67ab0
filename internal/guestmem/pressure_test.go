package guestmem

import (
	"strconv"
	"testing"
	"time"

	"perdure/internal/testenv"
)

// TestGuestThatDirtiesAllTheTime checks that the kernel's throttling of writers does not make a guest
// stall for seconds, with and without somebody who flushes.
func TestGuestThatDirtiesAllTheTime(t *testing.T) {
	testenv.Slow(t)
	const size = 512 << 20
	for _, c := range []struct {
		name     string
		interval time.Duration // between flushes, 0 for none
		mode     Mode
	}{
		{"collect every 50 ms", 50 * time.Millisecond, Collect},
		{"discard every 500 ms", 500 * time.Millisecond, Discard},
		{"nobody flushes", 0, Discard},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := openRAM(t, size)
			g := startGuest(t, r.Path(), size)
			if err := r.Attach(); err != nil {
				t.Fatal(err)
			}
			r.SetMode(c.mode)
			g.do("run 2 1")
			var pages int
			var longest time.Duration
			for end := time.Now().Add(3 * time.Second); time.Now().Before(end); {
				if c.interval == 0 {
					time.Sleep(100 * time.Millisecond)
					continue
				}
				time.Sleep(c.interval)
				ps := mustCut(t, r)
				pages += ps.Pages()
				ps.Release()
				longest = max(longest, r.Stats().LastFlush)
			}
			ns, _ := strconv.ParseInt(g.do("halt"), 10, 64)
			stall := time.Duration(ns)
			s := r.Stats()
			t.Logf("longest stall of a write %v; longest flush %v, %d flushes, %d pages; buffers %d MiB", stall, longest, s.Flushes, pages, s.PoolBytes>>20)
			if stall > 2*time.Second {
				t.Errorf("the guest stalled for %v", stall)
			}
			if err := r.Err(); err != nil {
				t.Error(err)
			}
		})
	}
}
