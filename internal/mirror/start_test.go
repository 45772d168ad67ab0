package mirror

import (
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
)

// put writes by one of the two ways, which must not differ in anything.
func put(ctx context.Context, e *Export, p []byte, off int64, fua bool) error {
	if !fua && rand.IntN(2) == 0 {
		mine := slices.Clone(p)
		done := make(chan error, 2)
		if e.StartWrite(ctx, mine, off, func(err error) { clear(mine); done <- err }) {
			return <-done
		}
	}
	return e.WriteAt(ctx, p, off, fua)
}

// TestStartedWritesEndOnce: however answers, Alone and Close meet, each is
// answered once, and the Source is free for what needs it for itself.
func TestStartedWritesEndOnce(t *testing.T) {
	for round := range 300 {
		src := NewSource([]Replica{newMem(1 << 20)})
		sent := make(chan uint64, 64)
		err := src.Join(func(parts ...[]byte) error {
			id := uint64(0)
			for i := range 8 {
				id |= uint64(parts[0][i]) << (8 * i)
			}
			sent <- id
			return nil
		}, func() error { return nil })
		if err != nil {
			t.Fatal(err)
		}
		const n = 16
		var counts [n]int
		var mu sync.Mutex
		var all, begun sync.WaitGroup
		for i := range n {
			all.Add(1)
			begun.Go(func() {
				ok := src.Export(0).StartWrite(t.Context(), make([]byte, 4096), int64(i)*8192, func(error) {
					mu.Lock()
					counts[i]++
					first := counts[i] == 1
					mu.Unlock()
					if first {
						all.Done()
					}
				})
				if !ok { // after Alone or Close
					mu.Lock()
					counts[i]++
					mu.Unlock()
					all.Done()
				}
			})
		}
		var race sync.WaitGroup
		race.Go(func() {
			for k := range rand.IntN(n) {
				_ = k
				select {
				case id := <-sent:
					var b [8]byte
					for i := range b {
						b[i] = byte(id >> (8 * i))
					}
					if err := src.Done(b[:]); err != nil {
						t.Error(err)
					}
				default:
				}
			}
		})
		if round%3 != 0 {
			race.Go(src.Alone)
		}
		if round%3 != 1 {
			race.Go(src.Close)
		}
		race.Wait()
		begun.Wait()
		if round%3 == 1 {
			src.Alone()
		} else {
			src.Close()
		}
		all.Wait()
		for i, c := range counts {
			if c != 1 {
				t.Fatalf("round %d: write %d was answered %d times", round, i, c)
			}
		}
		src.gate.Lock() // nobody has it any more
		src.gate.Unlock()
		if l := src.Export(0).overlap.Load(); len(l.list) != 0 {
			t.Fatalf("round %d: %d ranges are still held", round, len(l.list))
		}
	}
}

// TestStartWriteDoesNotWaitForAnother: what overlaps is refused, not begun.
func TestStartWriteDoesNotWaitForAnother(t *testing.T) {
	src := NewSource([]Replica{newMem(1 << 20)})
	defer src.Close()
	e := src.Export(0)
	none := func(err error) { t.Error("called", err) }
	if e.StartWrite(t.Context(), make([]byte, 512), 0, none) {
		t.Fatal("there is no peer to wait for")
	}
	if err := src.Join(func(...[]byte) error { return nil }, func() error { return nil }); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	if !e.StartWrite(t.Context(), make([]byte, 4096), 4096, func(err error) { done <- err }) {
		t.Fatal("not begun")
	}
	if e.StartWrite(t.Context(), make([]byte, 4096), 1024, none) {
		t.Fatal("begun over another")
	}
	select {
	case err := <-done:
		t.Fatal("answered without the peer:", err)
	default:
	}
	src.Alone()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}
