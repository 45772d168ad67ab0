package mirror

import (
	"errors"
	"slices"
)

// errJoined refuses a change of the disks while a peer follows: both sides number them alike.
var errJoined = errors.New("the disks of a mirror that has a peer do not change")

// Add takes another disk in, as the last one. Only while there is no peer.
func (s *Source) Add(r Replica) (*Export, error) {
	s.gate.Lock()
	defer s.gate.Unlock()
	if s.link.Load() != nil {
		return nil, errJoined
	}
	e := &Export{s: s, n: len(s.exports), r: r}
	s.exports = append(slices.Clone(s.exports), e)
	return e, nil
}

// Remove takes disk n out, which nobody uses any more; those behind it move up. Only
// while there is no peer.
func (s *Source) Remove(n int) error {
	s.gate.Lock()
	defer s.gate.Unlock()
	if s.link.Load() != nil {
		return errJoined
	}
	s.exports = slices.Delete(slices.Clone(s.exports), n, n+1)
	for i, e := range s.exports {
		e.n = i
	}
	return nil
}

// Replace puts another replica, of another size perhaps, in the place of disk n's.
// Only while there is no peer. What was handed out for the disk before is not used any more.
func (s *Source) Replace(n int, r Replica) (*Export, error) {
	s.gate.Lock()
	defer s.gate.Unlock()
	if s.link.Load() != nil {
		return nil, errJoined
	}
	e := &Export{s: s, n: n, r: r}
	s.exports = slices.Clone(s.exports)
	s.exports[n] = e
	return e, nil
}
