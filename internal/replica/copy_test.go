package replica

import (
	"testing"
	"time"

	"perdure/internal/bitmap"
	"pgregory.net/rapid"
)

// A copy ends with equal contents, whatever the guest writes, in which order
// runs land, and how often either side starts anew.
func TestCursorCopiesAll(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.Int64Range(1, 40).Draw(t, "chunks")
		marks := bitmap.New(n)
		src, dst := make([]int, n), make([]int, n)
		version := 0
		write := func(c int64) { version++; src[c] = version; marks.Set(c) }
		for range rapid.IntRange(0, 40).Draw(t, "before") {
			write(rapid.Int64Range(0, n-1).Draw(t, "chunk"))
		}
		type flying struct {
			start int64
			data  []int
		}
		cur, air := NewCursor(rapid.Int64Range(1, 20).Draw(t, "window")), []flying(nil)
		find := func(from, limit int64) (int64, int64, bool) { return marks.Next(from, limit) }
		land := func(i int) {
			f := air[i]
			air = append(air[:i], air[i+1:]...)
			copy(dst[f.start:], f.data)
			if end, ok := cur.Landed(f.start); ok {
				marks.ClearRange(f.start, end)
			}
		}
		send := func() bool {
			s, e, ok := cur.Next(find, 1, rapid.Int64Range(1, 8).Draw(t, "most"))
			if ok {
				for _, f := range air {
					if s < f.start+int64(len(f.data)) && f.start < e {
						t.Fatalf("run %d…%d overlaps one on its way", s, e)
					}
				}
				air = append(air, flying{s, append([]int(nil), src[s:e]...)})
			}
			return ok
		}
		for range rapid.IntRange(0, 60).Draw(t, "steps") {
			switch rapid.IntRange(0, 5).Draw(t, "what") {
			case 0, 1:
				send()
			case 2, 3:
				if len(air) > 0 {
					land(rapid.IntRange(0, len(air)-1).Draw(t, "landing"))
				}
			case 4:
				c := rapid.Int64Range(0, n-1).Draw(t, "chunk")
				write(c)
				cur.Written(c, c+1)
			case 5: // a crash: what was on its way is forgotten, the marks are not
				cur, air = NewCursor(4), nil
			}
		}
		for marks.Count() > 0 || len(air) > 0 {
			sent := send()
			if !sent && len(air) == 0 {
				t.Fatalf("%d chunks are marked and nothing is sent", marks.Count())
			}
			if len(air) > 0 {
				land(0)
			}
		}
		for c := range src {
			if src[c] != dst[c] && src[c] != 0 {
				t.Fatalf("chunk %d: %d at the source, %d at the target", c, src[c], dst[c])
			}
		}
		if cur.Flying() != 0 {
			t.Fatalf("%d bytes are on their way for ever", cur.Flying())
		}
	})
}

// A disk that carries 400 MiB/s: beyond that, the guest's I/O is late.
func TestPaceYields(t *testing.T) {
	cfg := DefaultPace()
	now := time.Duration(0)
	p := NewPace(cfg, now)
	const guest, disk = 100 << 20, 400 << 20
	run := func(windows int, busy bool) (late int, sum float64) {
		for range windows {
			ios, l := 0, 0
			if busy {
				ios = 100
				if guest+p.Rate() > disk {
					l = 50
					late++
				}
			}
			sum += float64(p.Rate())
			now += cfg.Window
			p.GuestIO(now, ios, l)
		}
		return late, sum / float64(windows)
	}
	if run(5, false); p.Rate() < disk {
		t.Fatalf("beside an idle guest %d bytes/s", p.Rate())
	}
	run(20, true)
	late, mean := run(200, true)
	if late > 40 {
		t.Errorf("the guest was late in %d windows of 200", late)
	}
	if mean < 0.5*(disk-guest) {
		t.Errorf("mean rate %.0f of %d possible", mean, disk-guest)
	}
	if run(5, false); p.Rate() < disk {
		t.Errorf("beside a guest that is idle again %d bytes/s", p.Rate())
	}
	for range 100 { // always late: the floor holds
		now += cfg.Window
		p.GuestIO(now, 10, 10)
	}
	if p.Rate() != cfg.Floor {
		t.Errorf("rate %d, the floor is %d", p.Rate(), cfg.Floor)
	}
}

func TestPaceWaits(t *testing.T) {
	cfg := PaceConfig{Floor: 1000, Ceiling: 10000, Limit: time.Millisecond, Window: 100 * time.Millisecond}
	now := time.Duration(0)
	p := NewPace(cfg, now)
	var sent int64
	for now < 10*time.Second {
		now += p.Wait(now, 500)
		sent += 500
		now += time.Millisecond
	}
	if sent < 80000 || sent > 110000 {
		t.Errorf("%d bytes in %v at 10000 bytes/s", sent, now)
	}
}

func TestGauge(t *testing.T) {
	g := NewGauge(0, 1000)
	if g.ETA() >= 0 {
		t.Errorf("an end is told before anything is known: %v", g.ETA())
	}
	for s := 1; s <= 5; s++ {
		g.At(time.Duration(s)*time.Second, int64(1000-100*s))
	}
	if g.Done() != 500 || g.Total() != 1000 || g.ETA() < 4.9 || g.ETA() > 5.1 {
		t.Errorf("done %d of %d, %v seconds left", g.Done(), g.Total(), g.ETA())
	}
	g.At(6*time.Second, 1200) // the guest was faster
	if g.Total() != 1200 || g.Done() != 0 {
		t.Errorf("done %d of %d", g.Done(), g.Total())
	}
	for s := 7; s < 20; s++ {
		g.At(time.Duration(s)*time.Second, 1200)
	}
	g.At(21*time.Second, 1300)
	if g.ETA() >= 0 {
		t.Errorf("an end is told although nothing shrinks: %v", g.ETA())
	}
	if g.At(22*time.Second, 0); g.ETA() != 0 {
		t.Errorf("%v seconds left of nothing", g.ETA())
	}
}
