package blockstore

import (
	"context"
	"errors"
	"testing"

	"perdure/internal/model"
	"perdure/internal/vfs"
)

// Both sides digest as of the end of one epoch, however far each has come since.
func TestDigestAsOfAnEpoch(t *testing.T) {
	ctx := context.Background()
	v := NewVolume(openStore(t, vfs.NewMem(), "/d"), VolumeOptions{})
	sec := openStore(t, vfs.NewMem(), "/d")
	if err := v.SetMode(Held); err != nil {
		t.Fatal(err)
	}
	type result struct {
		d   []ChunkDigest
		err error
	}
	const asOf = 3
	var got [2]chan result
	for i, s := range []*Store{v.Store(), sec} {
		got[i] = make(chan result, 1)
		go func() {
			d, err := s.DigestAsOf(ctx, asOf, 0, s.Chunks())
			got[i] <- result{d, err}
		}()
		for waiting := false; !waiting; {
			s.digests.mu.Lock()
			waiting = len(s.digests.list) == 1
			s.digests.mu.Unlock()
		}
	}
	var snap []byte
	for e := model.Epoch(1); e <= 5; e++ {
		if err := v.WriteAt(ctx, filled(byte(e), 2*BlockSize), int64(e)*BlockSize, false); err != nil {
			t.Fatal(err)
		}
		if e == asOf {
			snap = make([]byte, v.Size())
			if err := v.ReadAt(ctx, snap, 0); err != nil {
				t.Fatal(err)
			}
		}
		w := v.Cut()
		d, err := Decode(w.AppendTo(nil), v.Size())
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(sec.Persist(1, e, d), v.Commit(w)); err != nil {
			t.Fatal(err)
		}
		v.Store().Committed(e)
	}
	if err := sec.Apply(5); err != nil { // all at once, later than the primary
		t.Fatal(err)
	}
	want := openStore(t, vfs.NewMem(), "/d")
	if err := want.WriteAt(snap, 0); err != nil {
		t.Fatal(err)
	}
	good := digests(t, want)
	for i := range got {
		r := <-got[i]
		if r.err != nil || len(r.d) != len(good) {
			t.Fatal(i, r.err)
		}
		for c := range good {
			if r.d[c] != good[c] {
				t.Errorf("side %d: chunk %d differs: %+v, want %+v", i, c, r.d[c], good[c])
			}
		}
	}
	if digests(t, sec)[0].Sum == good[0].Sum {
		t.Fatal("later epochs changed nothing")
	}
	if _, err := sec.DigestAsOf(ctx, 4, 0, 1); !errors.Is(err, ErrTooLate) {
		t.Fatal(err)
	}
	gone, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := sec.DigestAsOf(gone, 9, 0, 1); !errors.Is(err, context.Canceled) || len(sec.digests.list) != 0 {
		t.Fatal(err)
	}
}

func TestDurableThrough(t *testing.T) {
	s := openStore(t, vfs.NewMem(), "/d")
	expect := func(want model.Epoch) {
		t.Helper()
		if got := s.DurableThrough(); got != want {
			t.Fatalf("durable through %d, want %d", got, want)
		}
	}
	for e := model.Epoch(1); e <= 3; e++ {
		if err := s.Persist(1, e, epochOf(byte(e), int64(e))); err != nil {
			t.Fatal(err)
		}
	}
	expect(0)
	if err := s.Sync(); err != nil {
		t.Fatal(err)
	}
	expect(3) // in the journal
	if err := s.Apply(3); err != nil {
		t.Fatal(err)
	}
	// One epoch goes in place without the journal: it is durable with the image only.
	if err := s.applyDirect(epochOf(4, 4)); err != nil {
		t.Fatal(err)
	}
	s.Committed(4)
	if err := s.Persist(1, 5, epochOf(5, 5)); err != nil {
		t.Fatal(err)
	}
	if err := s.syncJournal(); err != nil {
		t.Fatal(err)
	}
	if got := s.DurableThrough(); got > 3 {
		t.Fatal("an epoch in no journal was called durable", got)
	}
	if err := s.Flush(); err != nil {
		t.Fatal(err)
	}
	expect(5)
	s.Committed(7) // epochs that wrote nothing
	if err := s.Flush(); err != nil {
		t.Fatal(err)
	}
	expect(7)
}

func TestClassify(t *testing.T) {
	s := openStore(t, vfs.NewMem(), "/d")
	if f := s.Classify(s.WriteAt([]byte{1}, -1)); f != BadCall {
		t.Fatal(f)
	}
	for _, c := range []struct {
		err  error
		want Fault
	}{{nil, NoFault}, {&BlockError{Err: ErrChecksum}, BadBlocks}, {ErrState, BadCall}, {vfs.ErrInUse, BadMedium}, {ErrCorrupt, Failed}} {
		if f := s.Classify(c.err); f != c.want {
			t.Errorf("%v: %v, want %v", c.err, f, c.want)
		}
	}
	s.GiveUp(errors.New("no answer"))
	if f := s.Classify(s.ReadAt(make([]byte, 512), 0)); f != Failed {
		t.Fatal(f)
	}
}
