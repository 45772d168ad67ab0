package mirror

import (
	"errors"
	"slices"
)

// errJoined refuses a change of the disks while a peer follows: both sides number them alike.
var errJoined = errors.New("the disks of a mirror that has a peer do not change")

// Add takes another disk in, as the last one. Only while there is no peer.
func (s *Source) Add(r Replica) (*Export, error) {
	s.gate.RLock() // against Join
	defer s.gate.RUnlock()
	if s.link.Load() != nil {
		return nil, errJoined
	}
	e := s.newExport(len(s.disks()), r)
	s.set(append(slices.Clone(s.disks()), e))
	return e, nil
}

// Remove takes disk n out, which nobody uses any more; those behind it move up. Only
// while there is no peer. also does the same to what else numbers the disks; no peer joins
// before it has returned.
func (s *Source) Remove(n int, also func()) error {
	s.gate.RLock() // against Join
	defer s.gate.RUnlock()
	if s.link.Load() != nil {
		return errJoined
	}
	also()
	s.set(slices.Delete(slices.Clone(s.disks()), n, n+1))
	return nil
}

// Replace puts another replica, of another size perhaps, in the place of disk n's.
// Only while there is no peer. What was handed out for the disk before is not used any more.
func (s *Source) Replace(n int, r Replica) (*Export, error) {
	s.gate.RLock() // against Join
	defer s.gate.RUnlock()
	if s.link.Load() != nil {
		return nil, errJoined
	}
	e := s.newExport(n, r)
	list := slices.Clone(s.disks())
	list[n] = e
	s.set(list)
	return e, nil
}

// set puts another list of disks in force, numbered anew. gate is held, shared: no peer
// joins meanwhile, and without one nobody asks for a number. One at a time, which the callers see to.
func (s *Source) set(list []*Export) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, e := range list {
		e.n.Store(int64(i))
	}
	s.exports.Store(&list)
}
