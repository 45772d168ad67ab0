package diskcheck_test

import (
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"perdure/internal/diskcheck"
	"perdure/internal/diskcheck/diskserver"
)

// TestRollBack takes a guest back to a mark, with its disk, or with one that was not
// taken back, or too far: the check says which.
func TestRollBack(t *testing.T) {
	const units = 32
	for _, x := range []struct{ name, want string }{
		{"with its disk", ""},
		{"the disk stays", "no disk answers like this"},
		{"the disk goes too far", "no disk answers like this"},
	} {
		t.Run(x.name, func(t *testing.T) {
			d := &brokenDisk{p: make([]byte, units*4096), old: make([]byte, units*4096)}
			dial, _ := serve(t, d)
			var gate sync.RWMutex
			r := diskcheck.New(diskcheck.Config{Dial: dial, Export: diskserver.Disk, Units: units, Seed: 1, Depth: 4, Conns: 2, Gate: &gate})
			load := func() []byte {
				if err := r.Load(t.Context(), 1500); err != nil {
					t.Fatal(err)
				}
				d.mu.Lock()
				defer d.mu.Unlock()
				return slices.Clone(d.p)
			}
			early := load()
			then := load()
			gate.Lock()
			m := r.Mark()
			gate.Unlock()
			later := load()
			if err := r.Undone(later); err != nil {
				t.Fatal("before anything was undone:", err)
			}
			gate.Lock()
			if err := r.RollBack(m); err != nil {
				t.Fatal(err)
			}
			if err := r.Undone(later); err == nil {
				t.Error("what was undone is not found in an image")
			}
			if err := r.Undone(then); err != nil {
				t.Error(err)
			}
			d.mu.Lock()
			switch x.name {
			case "with its disk":
				copy(d.p, then)
			case "the disk goes too far":
				copy(d.p, early)
			}
			d.mu.Unlock()
			gate.Unlock()
			load()
			err := r.Check(limit)
			if x.want == "" && err != nil || x.want != "" && (err == nil || !strings.Contains(err.Error(), x.want)) {
				t.Error(err)
			}
		})
	}
}

// TestRollBackBehindASettle: one settled history back is remembered, two are not.
func TestRollBackBehindASettle(t *testing.T) {
	d := &brokenDisk{p: make([]byte, 8*4096), old: make([]byte, 8*4096)}
	dial, _ := serve(t, d)
	r := diskcheck.New(diskcheck.Config{Dial: dial, Export: diskserver.Disk, Units: 8, Seed: 1})
	work := func() {
		if err := r.Load(t.Context(), 200); err != nil {
			t.Fatal(err)
		}
	}
	work()
	m, then := r.Mark(), slices.Clone(d.p)
	work()
	if err := r.Settle(t.Context(), limit); err != nil {
		t.Fatal(err)
	}
	work()
	if err := r.RollBack(m); err != nil {
		t.Fatal(err)
	}
	copy(d.p, then)
	work()
	for range 2 {
		if err := r.Settle(t.Context(), limit); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.RollBack(m); err == nil {
		t.Error("a guest goes back behind what was settled twice, and nobody minds")
	}
}

// TestLostBut: a disk that lost its power need not have obeyed flushes that nobody
// can know of, and must have obeyed those before a write that is left.
func TestLostBut(t *testing.T) {
	const units = 16
	for _, x := range []struct {
		name string
		ok   bool
	}{{"all is lost since long ago", true}, {"and somebody knew", false}, {"a later write is left", false}} {
		t.Run(x.name, func(t *testing.T) {
			d := &brokenDisk{p: make([]byte, units*4096), old: make([]byte, units*4096)}
			dial, _ := serve(t, d)
			r := diskcheck.New(diskcheck.Config{Dial: dial, Export: diskserver.Disk, Units: units, Seed: 3})
			load := func() []byte {
				if err := r.Load(t.Context(), 600); err != nil {
					t.Fatal(err)
				}
				return slices.Clone(d.p)
			}
			long := load()
			load()
			last := load()
			seen := time.Time{}
			switch x.name {
			case "and somebody knew":
				seen = time.Now()
			case "a later write is left":
				for u := 0; u < len(last); u += 4096 {
					if !slices.Equal(last[u:u+16], make([]byte, 16)) {
						copy(long[u:u+4096], last[u:])
						break
					}
				}
			}
			if s := r.Survived(long); s.After(seen) {
				seen = s
			}
			r.Lost(seen, long)
			copy(d.p, long)
			if err := r.ReadAll(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := r.Check(limit); (err == nil) != x.ok {
				t.Error(err)
			}
		})
	}
}
