package mirror

// Still runs f while no change is under way on either side in a range of disk n, and
// returns its error; changes in the range wait meanwhile, so f should be short.
// What f finds equal or different on the two sides is so.
func (s *Source) Still(n int, off, length int64, f func() error) error {
	for {
		o := s.Export(n).overlap.Load()
		if e := o.lock(off, off+length); e != nil {
			defer o.unlock(e)
			return f()
		}
	}
}
