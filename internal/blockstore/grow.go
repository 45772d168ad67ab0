package blockstore

// MissingBytes is how much the peer may lack by the bitmap, in bytes; what the
// activity log says in addition is not counted.
func (s *Store) MissingBytes() int64 {
	s.miss.mu.Lock()
	defer s.miss.mu.Unlock()
	return min(s.miss.bits.Count()*ChunkSize, s.size)
}
