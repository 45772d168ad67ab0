package blockstore

import (
	"testing"

	"perdure/internal/model"
	"perdure/internal/vfs"
)

// TestExpect: extents that are announced together enter the activity log with one
// sync, also where others have to leave first; a list longer than the log takes is no
// error; one outside the disk is.
func TestExpect(t *testing.T) {
	const limit, size = 64, 1 << 30 // 256 extents
	mem := vfs.NewMem()
	if err := Create(mem, "/d", Params{ID: "disk0", VM: "vm", Size: size, State: model.UpToDate}); err != nil {
		t.Fatal(err)
	}
	s, err := Open(mem, "/d", "disk0", Options{Activity: limit, NoAutoTrim: true})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := s.Replay(); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, ChunkSize)
	for no := int64(0); no < 256; no += 16 {
		var list []int64
		for i := range int64(16) {
			list = append(list, no+i)
		}
		before := s.Activity().Commits
		if err := s.Expect(list); err != nil {
			t.Fatal(err)
		}
		for _, no := range list {
			p[0]++
			if err := s.WriteAt(p, no*ExtentSize); err != nil {
				t.Fatal(err)
			}
		}
		if n := s.Activity().Commits - before; n > 2 { // what leaves, and what comes
			t.Errorf("16 extents from %d on cost %d syncs of the log", no, n)
		}
		if a := s.Activity(); a.Extents > limit {
			t.Fatalf("%d extents in a log for %d", a.Extents, limit)
		}
	}
	var all []int64
	for no := range int64(256) {
		all = append(all, no)
	}
	if err := s.Expect(all); err != nil {
		t.Error(err)
	}
	if s.Expect(nil) != nil {
		t.Error("no extent is an error")
	}
	for _, no := range []int64{-1, 256, 1 << 40} {
		if s.Expect([]int64{0, no}) == nil {
			t.Errorf("extent %d of 256 is accepted", no)
		}
	}
}
