package blockstore

import "perdure/internal/bitmap"

// layer is what one epoch wrote so far: whole blocks, and ranges of zeroes that
// cost the same however long they are. A block lies over a range. While its
// epoch is open a layer changes under Volume.mu; afterwards never.
type layer struct {
	blocks map[int64]*block
	keep   bitmap.Ranges // zeroes that stay allocated
	punch  bitmap.Ranges // zeroes whose space is given back
	ranges int           // Add calls on keep and punch, for the accounting
	taken  int           // blocks allocated; some may have been zeroed away since
}

func newLayer() *layer { return &layer{blocks: map[int64]*block{}} }

func (l *layer) empty() bool { return len(l.blocks) == 0 && l.ranges == 0 }

// rangeCost is what a range counts for in the bytes held.
const rangeCost = 64

// held is how many bytes of memory the layer takes, about.
func (l *layer) held() int64 {
	return int64(l.taken)*BlockSize + int64(l.keep.Len()+l.punch.Len())*rangeCost
}

// find returns the content of a block: nil and true for zeroes.
func (l *layer) find(n int64) (*block, bool) {
	if b, ok := l.blocks[n]; ok {
		return b, true
	}
	if l.ranges > 0 {
		if _, ok := l.punch.Find(n); ok {
			return nil, true
		}
		if _, ok := l.keep.Find(n); ok {
			return nil, true
		}
	}
	return nil, false
}

// zero turns the blocks first … end-1 into zeroes.
func (l *layer) zero(first, end int64, punch bool) {
	if end-first < int64(len(l.blocks)) {
		for n := first; n < end; n++ {
			delete(l.blocks, n)
		}
	} else {
		for n := range l.blocks {
			if n >= first && n < end {
				delete(l.blocks, n)
			}
		}
	}
	on, off := &l.keep, &l.punch
	if punch {
		on, off = off, on
	}
	off.Remove(first, end)
	on.Add(first, end)
	l.ranges++
}
