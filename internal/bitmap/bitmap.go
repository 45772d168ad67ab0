// Package bitmap holds dirty sets: Bitmap, a fixed-size set of chunk numbers,
// and Ranges, a growing set of half-open intervals.
//
// Both are plain values for one goroutine at a time; a caller that shares one
// brings its own lock. Nothing here does I/O, so nothing fails; an index out of
// bounds is a programming error and panics, as with a slice. Neither type is a
// disk format.
package bitmap

import "math/bits"

// Bitmap is a set of the numbers 0 … Len()-1, one bit each. The zero value is
// an empty set of length 0.
type Bitmap struct {
	n     int64
	count int64
	words []uint64
}

// New returns an empty set that can hold the numbers 0 … n-1.
func New(n int64) *Bitmap {
	return &Bitmap{n: n, words: make([]uint64, (n+63)/64)}
}

// Len is the number of bits, set or not.
func (b *Bitmap) Len() int64 { return b.n }

// Count is how many bits are set.
func (b *Bitmap) Count() int64 { return b.count }

// Test reports whether i is in the set.
func (b *Bitmap) Test(i int64) bool {
	b.check(i)
	return b.words[i>>6]&(1<<(i&63)) != 0
}

// Set adds i.
func (b *Bitmap) Set(i int64) {
	b.check(i)
	w, m := &b.words[i>>6], uint64(1)<<(i&63)
	if *w&m == 0 {
		*w |= m
		b.count++
	}
}

// Clear removes i.
func (b *Bitmap) Clear(i int64) {
	b.check(i)
	w, m := &b.words[i>>6], uint64(1)<<(i&63)
	if *w&m != 0 {
		*w &^= m
		b.count--
	}
}

// SetRange adds start … end-1. An empty range changes nothing.
func (b *Bitmap) SetRange(start, end int64) { b.each(start, end, true) }

// ClearRange removes start … end-1. An empty range changes nothing.
func (b *Bitmap) ClearRange(start, end int64) { b.each(start, end, false) }

// Reset removes all.
func (b *Bitmap) Reset() {
	clear(b.words)
	b.count = 0
}

// Or adds all of o, which must be of the same length.
func (b *Bitmap) Or(o *Bitmap) {
	if b.n != o.n {
		panic("bitmap: Or of sets of different length")
	}
	b.count = 0
	for i, w := range o.words {
		b.words[i] |= w
		b.count += int64(bits.OnesCount64(b.words[i]))
	}
}

// Next returns the first run start … end-1 of set bits at or after from, and
// false when there is none. The run is maximal, but never longer than max
// (max ≤ 0: no limit) and never starts before from.
func (b *Bitmap) Next(from, max int64) (start, end int64, ok bool) {
	start = b.scan(from, 0)
	if start >= b.n {
		return 0, 0, false
	}
	end = b.scan(start, ^uint64(0))
	if max > 0 && end-start > max {
		end = start + max
	}
	return start, end, true
}

// scan returns the first bit at or after from that differs from the bits of
// same (all zero or all ones), or n.
func (b *Bitmap) scan(from int64, same uint64) int64 {
	if from >= b.n {
		return b.n
	}
	i := from >> 6
	w := (b.words[i] ^ same) >> (from & 63) << (from & 63)
	for w == 0 {
		i++
		if i == int64(len(b.words)) {
			return b.n
		}
		w = b.words[i] ^ same
	}
	return min(i<<6+int64(bits.TrailingZeros64(w)), b.n)
}

func (b *Bitmap) each(start, end int64, set bool) {
	if start >= end {
		return
	}
	b.check(start)
	b.check(end - 1)
	for start < end {
		i := start >> 6
		stop := min((i+1)<<6, end)
		mask := ^uint64(0) << (start & 63) & (^uint64(0) >> (63 - (stop-1)&63))
		old := b.words[i]
		if set {
			b.words[i] |= mask
		} else {
			b.words[i] &^= mask
		}
		b.count += int64(bits.OnesCount64(b.words[i])) - int64(bits.OnesCount64(old))
		start = stop
	}
}

func (b *Bitmap) check(i int64) {
	if i < 0 || i >= b.n {
		panic("bitmap: index out of range")
	}
}

// Word returns the 64 bits from i on, which is a multiple of 64, the lowest first.
func (b *Bitmap) Word(i int64) uint64 {
	b.check(i)
	return b.words[i>>6]
}

// OrWord adds the bits of w to the 64 from i on, which is a multiple of 64, and
// reports whether that changed anything. Bits beyond the end are left out.
func (b *Bitmap) OrWord(i int64, w uint64) bool {
	b.check(i)
	if left := b.n - i; left < 64 {
		w &= 1<<left - 1
	}
	p := &b.words[i>>6]
	added := w &^ *p
	*p |= added
	b.count += int64(bits.OnesCount64(added))
	return added != 0
}

// Clone returns a copy.
func (b *Bitmap) Clone() *Bitmap {
	return &Bitmap{n: b.n, count: b.count, words: append([]uint64(nil), b.words...)}
}
