package peer

// dedupSpan is how far back a double of an urgent note is recognised; what is
// older is dropped, since its first copy was long since delivered or is stale.
const dedupSpan = 1024

// dedup tells first copies of numbered notes from later ones. Numbers begin at 1.
type dedup struct {
	top  uint64
	seen [dedupSpan / 64]uint64 // bit n%dedupSpan: n was seen, for top-dedupSpan < n ≤ top
}

// fresh reports whether n was not seen before, and notes it.
func (d *dedup) fresh(n uint64) bool {
	if n == 0 || n+dedupSpan <= d.top {
		return false
	}
	if n > d.top {
		if n-d.top >= dedupSpan {
			d.seen = [dedupSpan / 64]uint64{}
		} else {
			for m := d.top + 1; m < n; m++ {
				d.seen[m%dedupSpan/64] &^= 1 << (m % 64)
			}
		}
		d.top = n
		d.seen[n%dedupSpan/64] |= 1 << (n % 64)
		return true
	}
	word, bit := n%dedupSpan/64, uint64(1)<<(n%64)
	if d.seen[word]&bit != 0 {
		return false
	}
	d.seen[word] |= bit
	return true
}
