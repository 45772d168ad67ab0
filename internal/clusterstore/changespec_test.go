package clusterstore

import (
	"errors"
	"testing"

	"perdure/internal/model"
	"perdure/internal/shimapi"
)

// TestChangeSpec: specification and record change together or not at all, whoever is in between.
func TestChangeSpec(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	s := f.first("a")
	ctx := t.Context()
	spec, rec := testVM("v1")
	if err := s.CreateVM(ctx, spec, rec); err != nil {
		t.Fatal(err)
	}
	to := func(l model.Level) func(model.VMSpec, model.Record) (model.VMSpec, model.Record, error) {
		return func(s model.VMSpec, r model.Record) (model.VMSpec, model.Record, error) {
			s.Level, r.Level = l, l
			return s, r, nil
		}
	}
	is := func(want model.Level) model.Versioned {
		t.Helper()
		sp, err := s.Spec(ctx, "v1")
		if err != nil {
			t.Fatal(err)
		}
		v, err := s.Record(ctx, "v1")
		if err != nil || sp.Level != want || v.Record.Level != want {
			t.Fatalf("specification says %s, record %s (%v), want %s", sp.Level, v.Record.Level, err, want)
		}
		return v
	}
	if err := s.ChangeSpec(ctx, "v1", to(model.LevelCA)); err != nil {
		t.Fatal(err)
	}
	was := is(model.LevelCA)
	no := errors.New("no")
	if err := s.ChangeSpec(ctx, "v1", func(sp model.VMSpec, r model.Record) (model.VMSpec, model.Record, error) {
		sp.Level, r.Level = model.LevelNone, model.LevelNone
		return sp, r, no
	}); !errors.Is(err, no) {
		t.Error(err)
	}
	is(model.LevelCA)
	if err := s.ChangeSpec(ctx, "nix", to(model.LevelFT)); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
	// A swap of a shim in between: the function is asked again, with what that swap wrote.
	calls := 0
	err := s.ChangeSpec(ctx, "v1", func(sp model.VMSpec, r model.Record) (model.VMSpec, model.Record, error) {
		if calls++; calls == 1 {
			n := r.Clone()
			n.Term = 7
			if res := s.SwapRecord(ctx, shimapi.SwapRequest{VM: "v1", Revision: was.Revision, Record: n}); res.Outcome != shimapi.SwapDone {
				t.Errorf("%+v", res)
			}
		} else if r.Term != 7 {
			t.Errorf("the second time the record is of term %d", r.Term)
		}
		return to(model.LevelFT)(sp, r)
	})
	if err != nil || calls != 2 {
		t.Errorf("%d calls, %v", calls, err)
	}
	if v := is(model.LevelFT); v.Record.Term != 7 {
		t.Errorf("what a shim wrote is gone: term %d", v.Record.Term)
	}
	// And a shim that asks by what it read before is told.
	if res := s.SwapRecord(ctx, shimapi.SwapRequest{VM: "v1", Revision: was.Revision, Record: was.Record}); res.Outcome != shimapi.SwapConflict || res.Current.Record.Level != model.LevelFT {
		t.Errorf("%+v", res)
	}
	// Others all the time.
	err = s.ChangeSpec(ctx, "v1", func(sp model.VMSpec, r model.Record) (model.VMSpec, model.Record, error) {
		cur, err := s.Record(ctx, "v1")
		if err != nil {
			t.Fatal(err)
		}
		n := cur.Record.Clone()
		n.Term++
		s.SwapRecord(ctx, shimapi.SwapRequest{VM: "v1", Revision: cur.Revision, Record: n})
		return to(model.LevelNone)(sp, r)
	})
	if !errors.Is(err, ErrConflict) {
		t.Error(err)
	}
	is(model.LevelFT)
}
