package bitmap

import "sort"

// Range is the half-open interval Start … End-1.
type Range struct{ Start, End int64 }

// Len is how many numbers the range holds.
func (r Range) Len() int64 { return r.End - r.Start }

// Ranges is a set of numbers kept as sorted, disjoint, non-adjacent intervals.
// The zero value is empty. Adding costs a binary search and a move of the
// intervals behind; it suits sets of up to some ten thousand intervals.
type Ranges struct{ r []Range }

// Len is the number of intervals (not of numbers).
func (s *Ranges) Len() int { return len(s.r) }

// All returns the intervals in ascending order; valid until the next change.
func (s *Ranges) All() []Range { return s.r }

// Add puts start … end-1 into the set. An empty range changes nothing.
func (s *Ranges) Add(start, end int64) {
	if start >= end {
		return
	}
	// lo: first interval that touches or follows start; hi: first beyond end.
	lo := sort.Search(len(s.r), func(i int) bool { return s.r[i].End >= start })
	hi := lo + sort.Search(len(s.r)-lo, func(i int) bool { return s.r[lo+i].Start > end })
	if lo < hi {
		start = min(start, s.r[lo].Start)
		end = max(end, s.r[hi-1].End)
	}
	s.replace(lo, hi, Range{start, end})
}

// Remove takes start … end-1 out of the set.
func (s *Ranges) Remove(start, end int64) {
	if start >= end {
		return
	}
	lo := sort.Search(len(s.r), func(i int) bool { return s.r[i].End > start })
	hi := lo + sort.Search(len(s.r)-lo, func(i int) bool { return s.r[lo+i].Start >= end })
	if lo == hi {
		return
	}
	first, last := s.r[lo], s.r[hi-1]
	var keep [2]Range
	k := keep[:0]
	if first.Start < start {
		k = append(k, Range{first.Start, start})
	}
	if last.End > end {
		k = append(k, Range{end, last.End})
	}
	s.replace(lo, hi, k...)
}

// Find returns the interval that holds i.
func (s *Ranges) Find(i int64) (Range, bool) {
	k := sort.Search(len(s.r), func(j int) bool { return s.r[j].End > i })
	if k < len(s.r) && s.r[k].Start <= i {
		return s.r[k], true
	}
	return Range{}, false
}

// Overlaps reports whether any of start … end-1 is in the set.
func (s *Ranges) Overlaps(start, end int64) bool {
	k := sort.Search(len(s.r), func(j int) bool { return s.r[j].End > start })
	return k < len(s.r) && s.r[k].Start < end && start < end
}

// replace puts with in place of the intervals lo … hi-1.
func (s *Ranges) replace(lo, hi int, with ...Range) {
	d := len(with) - (hi - lo)
	old := len(s.r)
	for range d {
		s.r = append(s.r, Range{})
	}
	copy(s.r[hi+d:], s.r[hi:old])
	s.r = s.r[:old+d]
	copy(s.r[lo:], with)
}
