package blockstore

import "fmt"

// Expect says that somebody is about to write into these extents (offset divided by
// ExtentSize): as many as there is room for in the activity log enter it with one sync,
// instead of one each when the writes come. It is a hint: an extent may have left
// again before it is written. Of a list longer than a quarter of the log the rest is left out.
func (s *Store) Expect(extents []int64) error {
	if err := s.checkWrite(0, 0); err != nil {
		return err
	}
	for _, no := range extents {
		if no < 0 || no >= int64(len(s.act.index)) {
			return fmt.Errorf("extent %d of %s, which has %d", no, s.id, len(s.act.index))
		}
	}
	return s.act.warmList(extents)
}

// warmList makes extents of a list hot, with one sync for as many as there is room
// for. Where nothing may leave the log, it does nothing.
func (a *activity) warmList(list []int64) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	list = list[:min(int64(len(list)), a.span())]
	for made := false; ; made = true {
		for a.busy {
			a.wait()
		}
		if err := a.s.Err(); err != nil {
			return err
		}
		cold := 0
		for _, no := range list {
			if a.index[no] == 0 {
				cold++
			}
		}
		if cold < 2 {
			return nil // whoever writes there pays no more
		}
		if cold <= len(a.free) || made {
			break
		}
		if !a.someReady() {
			return nil
		}
		if err := a.makeRoom(cold, 0, -1); err != nil {
			return err
		}
	}
	added := 0
	for _, no := range list {
		if a.index[no] == 0 && len(a.free) > 0 {
			a.admit(no)
			added++
		}
	}
	if added == 0 {
		return nil
	}
	return a.commit()
}

// someReady reports whether an extent might leave. mu is held.
func (a *activity) someReady() bool {
	for i := range a.entries {
		if a.ready(&a.entries[i]) {
			return true
		}
	}
	return false
}
