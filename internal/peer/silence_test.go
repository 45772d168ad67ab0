package peer

import (
	"testing"
	"time"
)

func TestPatienceStretchesWithGapsAndForgetsThem(t *testing.T) {
	cfg := &Config{Silence: 300 * time.Millisecond, MaxSilence: 600 * time.Millisecond}
	var p patience
	at := func(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }
	want := func(now, limit float64) {
		t.Helper()
		p.settle(at(now), cfg)
		if got := time.Duration(p.limit.Load()); got != at(limit) {
			t.Errorf("at %v s: %v, want %v s", now, got, limit)
		}
	}
	want(0, 0.3)
	p.note(at(0.05), at(1), cfg) // an ordinary gap changes nothing
	want(1, 0.3)
	p.note(at(0.1), at(2), cfg)
	want(2, 0.4)
	p.note(at(0.29), at(3), cfg) // bounded
	want(3, 0.6)
	want(9, 0.6)
	want(11, 0.6) // still within the span before
	want(22, 0.3)
}
