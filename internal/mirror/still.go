package mirror

import (
	"context"
	"errors"
)

// Still runs f while no change is under way on either side in a range of disk n, and
// returns its error; changes in the range wait meanwhile, so f should be short.
// What f finds equal or different on the two sides is so. ctx ends the waiting, not f.
func (s *Source) Still(ctx context.Context, n int, off, length int64, f func() error) error {
	for {
		o := s.Export(n).overlap.Load()
		e, err := o.lock(ctx, off, off+length)
		if errors.Is(err, errGivenUp) {
			continue // others count by now
		}
		if err != nil {
			return err
		}
		defer o.unlock(e)
		return f()
	}
}
