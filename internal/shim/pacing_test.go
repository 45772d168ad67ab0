package shim

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// copyFor lets a copy go as fast as it may, in pieces of 64 KiB on a disk that
// carries disk bytes per second, and returns what it reached.
func copyFor(g *governor, d time.Duration, disk int64) int64 {
	const piece = 64 << 10
	var n int64
	for end := time.Now().Add(d); time.Now().Before(end); n += piece {
		if g.wait(context.Background(), piece) != nil {
			break
		}
		time.Sleep(time.Duration(piece * int64(time.Second) / disk))
	}
	return int64(float64(n) / d.Seconds())
}

// guestIO lets a guest do a request every 2 ms until stopped; late says whether it
// took longer than it may.
func guestIO(m *latencyMeter, took func() time.Duration) (stop func()) {
	over := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-over:
				return
			case <-time.After(2 * time.Millisecond):
				m.took(took())
			}
		}
	})
	return func() { close(over); wg.Wait() }
}

// TestGovernor: full speed beside an idle guest, and beside one whose requests are
// quick; less when they get slow, never below the floor; and at once full speed again
// when the guest falls quiet, even while a long wait is under way.
func TestGovernor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const disk, floor = 200 << 20, 4 << 20
		m := &latencyMeter{}
		stop := guestIO(m, func() time.Duration { return 300 * time.Microsecond })
		time.Sleep(10 * time.Second)
		stop()
		if l := m.allowed(); l != minLatencyLimit {
			t.Errorf("beside a quick disk a request may take %v", l)
		}
		g := newGovernor(m, floor, 0)
		if got := copyFor(g, 2*time.Second, disk); got < disk/10*9 {
			t.Errorf("beside an idle guest %d bytes/s of %d", got, disk)
		}
		stop = guestIO(m, func() time.Duration { return time.Millisecond })
		if got := copyFor(g, 2*time.Second, disk); got < disk/10*9 {
			t.Errorf("beside a guest with quick requests %d bytes/s of %d", got, disk)
		}
		stop()
		stop = guestIO(m, func() time.Duration { return 50 * time.Millisecond })
		copyFor(g, 10*time.Second, disk)
		got := copyFor(g, 10*time.Second, disk)
		if got > 2*floor || got < floor/2 {
			t.Errorf("beside a guest with slow requests %d bytes/s, the floor is %d", got, floor)
		}
		waited := make(chan time.Duration)
		go func() {
			begun := time.Now()
			_ = g.wait(context.Background(), 100*floor) // 100 s at the floor
			waited <- time.Since(begun)
		}()
		synctest.Wait()
		stop()
		if d := <-waited; d > time.Second {
			t.Errorf("the guest fell quiet, and the copy still waited %v", d)
		}
		if got := copyFor(g, 2*time.Second, disk); got < disk/10*9 {
			t.Errorf("beside a guest that fell quiet %d bytes/s of %d", got, disk)
		}
		g.close()
	})
}

// TestGovernorYields: a guest whose requests are slow only because of the copy gets
// its latency back, and the copy goes on.
func TestGovernorYields(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const disk, floor = 200 << 20, 4 << 20
		m := &latencyMeter{}
		g := newGovernor(m, floor, 0)
		defer g.close()
		var mu sync.Mutex
		var late, total int
		stop := guestIO(m, func() time.Duration {
			g.mu.Lock()
			rate := g.pace.Rate()
			g.mu.Unlock()
			took := time.Millisecond
			if rate > disk/2 { // the disk is busy then
				took = 40 * time.Millisecond
			}
			mu.Lock()
			defer mu.Unlock()
			if total++; took > minLatencyLimit {
				late++
			}
			return took
		})
		copyFor(g, 20*time.Second, disk)
		mu.Lock()
		late, total = 0, 0
		mu.Unlock()
		got := copyFor(g, 60*time.Second, disk)
		stop()
		if late*4 > total {
			t.Errorf("%d of %d requests were late beside the copy", late, total)
		}
		if got < disk/8 {
			t.Errorf("%d bytes/s of %d that the guest leaves", got, disk/2)
		}
	})
}

// TestGovernorSlowDisk: where requests are slow by themselves, that is no reason to
// hold a copy up.
func TestGovernorSlowDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const disk = 50 << 20
		m := &latencyMeter{}
		slow := func() time.Duration { return 30 * time.Millisecond }
		stop := guestIO(m, slow)
		time.Sleep(10 * time.Second)
		stop()
		g := newGovernor(m, 1<<20, 0)
		stop = guestIO(m, slow)
		if got := copyFor(g, 5*time.Second, disk); got < disk/10*9 {
			t.Errorf("%d bytes/s of %d", got, disk)
		}
		stop()
		g.close()
		// What requests took beside the copy is no measure for the next.
		before := m.allowed()
		g = newGovernor(m, 1<<20, 0)
		stop = guestIO(m, func() time.Duration { return time.Second })
		time.Sleep(time.Minute)
		stop()
		g.close()
		if after := m.allowed(); after != before {
			t.Errorf("a request may take %v, and %v before a copy that slowed all down", after, before)
		}
	})
}

// TestGovernorCeiling: a verify keeps to its rate, and ends its waits with its context.
func TestGovernorCeiling(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGovernor(&latencyMeter{}, 1<<20, 16<<20)
		defer g.close()
		if got := copyFor(g, 20*time.Second, 1<<30); got > 17<<20 || got < 15<<20 {
			t.Errorf("%d bytes/s, the rate is %d", got, 16<<20)
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if err := g.wait(ctx, 1<<40); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a wait of a day ended with %v", err)
		}
		var none *governor
		if err := none.wait(ctx, 1<<40); err != nil {
			t.Error(err)
		}
		none.close()
	})
}
