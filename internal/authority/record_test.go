package authority

import (
	"errors"
	"strings"
	"testing"

	"perdure/internal/model"
)

// life returns one record of each mode, made by the transitions themselves.
func life(t *testing.T) map[string]model.Record {
	t.Helper()
	rs := map[string]model.Record{}
	step := func(name string, r model.Record, err error) model.Record {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if err := Validate(r); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		rs[name] = r
		return r
	}
	r := baseRecord()
	r.Replicas["b"] = model.Replica{State: model.Outdated}
	r = step("stopped", r, nil)
	n, err := Start(r, "a")
	r = step("starting", n, err)
	n, err = Booted(r, "a", "r1")
	r = step("simplex", n, err)
	n, err = Assign(r, "b")
	r = step("syncing", n, err)
	n, err = Duplex(r, "b", "r2")
	r = step("duplex", n, err)
	n, err = SetSurvivor(r, "a", true)
	step("survivor", n, err)
	n.Level = model.LevelCA
	step("survivor ca", n, nil)
	r.Level = model.LevelCA
	step("duplex ca", r, nil)
	n, err = LostReplica(r)
	step("carried", n, err)
	return rs
}

func TestTransitions(t *testing.T) {
	rs := life(t)
	facts := func(host string, other Other) Facts {
		return Facts{Host: host, OwnEmpty: true, Other: other, Durable: true}
	}
	for _, c := range []struct {
		name  string
		from  string
		do    func(model.Record) (model.Record, error)
		class error      // nil: allowed
		mode  model.Mode // when allowed
	}{
		{"lost secondary", "duplex", LostSecondary, nil, model.ModeSimplex},
		{"lost while syncing", "syncing", LostSecondary, nil, model.ModeSimplex},
		{"lost without one", "simplex", LostSecondary, ErrMode, ""},
		{"lost as survivor", "survivor", LostSecondary, nil, model.ModeSimplex},
		{"replica lost at level ft", "duplex", LostReplica, ErrLevel, ""},
		{"replica lost", "duplex ca", LostReplica, nil, model.ModeDuplex},
		{"replica lost as survivor", "survivor ca", LostReplica, nil, model.ModeDuplex},
		{"replica lost twice", "carried", LostReplica, ErrReplica, ""},
		{"replica lost in simplex", "simplex", LostReplica, ErrMode, ""},
		{"replica back that was not lost", "duplex ca", RegainedReplica, ErrReplica, ""},
		{"replica back", "carried", RegainedReplica, nil, model.ModeDuplex},
		{"carried: lost secondary", "carried", LostSecondary, ErrReplica, ""},
		{"carried: survivor", "carried", func(r model.Record) (model.Record, error) { return SetSurvivor(r, "a", true) }, ErrReplica, ""},
		{"carried: takeover", "carried", func(r model.Record) (model.Record, error) { return TakeOver(r, model.Seat{Host: "b", Run: "r2"}) }, nil, model.ModeSimplex},
		{"carried: power-off", "carried", PowerOff, nil, model.ModeStopped},
		{"carried: start from the failed disk", "carried", func(r model.Record) (model.Record, error) { return StartFromDisk(r, facts("a", OtherEmpty)) }, ErrReplica, ""},
		{"carried: start from the good disk", "carried", func(r model.Record) (model.Record, error) { return StartFromDisk(r, facts("b", OtherEmpty)) }, nil, model.ModeStarting},
		{"takeover", "duplex", func(r model.Record) (model.Record, error) { return TakeOver(r, model.Seat{Host: "b", Run: "r2"}) }, nil, model.ModeSimplex},
		{"takeover by another run", "duplex", func(r model.Record) (model.Record, error) { return TakeOver(r, model.Seat{Host: "b", Run: "r9"}) }, ErrSeat, ""},
		{"takeover without memory", "duplex", func(r model.Record) (model.Record, error) { return TakeOver(r, model.Seat{Host: "b"}) }, ErrSeat, ""},
		{"takeover by a stranger", "duplex", func(r model.Record) (model.Record, error) { return TakeOver(r, model.Seat{Host: "c", Run: "r2"}) }, ErrSeat, ""},
		{"takeover while syncing", "syncing", func(r model.Record) (model.Record, error) { return TakeOver(r, model.Seat{Host: "b", Run: "r2"}) }, ErrMode, ""},
		{"takeover from stopped", "stopped", func(r model.Record) (model.Record, error) { return TakeOver(r, model.Seat{Host: "b", Run: "r2"}) }, ErrMode, ""},
		{"takeover against a survivor", "survivor", func(r model.Record) (model.Record, error) { return TakeOver(r, model.Seat{Host: "b", Run: "r2"}) }, ErrSurvivor, ""},
		{"switchover by a survivor", "survivor", Switchover, nil, model.ModeSimplex},
		{"power-off", "duplex", PowerOff, nil, model.ModeStopped},
		{"power-off twice", "stopped", PowerOff, ErrMode, ""},
		{"survivor by the other", "duplex", func(r model.Record) (model.Record, error) { return SetSurvivor(r, "b", true) }, ErrSeat, ""},
		{"survivor taken by the other", "survivor", func(r model.Record) (model.Record, error) { return SetSurvivor(r, "b", false) }, ErrSeat, ""},
		{"survivor in simplex", "simplex", func(r model.Record) (model.Record, error) { return SetSurvivor(r, "a", true) }, ErrMode, ""},
		{"boot elsewhere", "starting", func(r model.Record) (model.Record, error) { return Booted(r, "b", "r3") }, ErrSeat, ""},
		{"assign the primary's host", "simplex", func(r model.Record) (model.Record, error) { return Assign(r, "a") }, ErrArgument, ""},
		{"duplex with the wrong host", "syncing", func(r model.Record) (model.Record, error) { return Duplex(r, "c", "r3") }, ErrSeat, ""},
		{"disk: duplex, not asked", "duplex", func(r model.Record) (model.Record, error) { return StartFromDisk(r, facts("a", OtherUnknown)) }, ErrAlive, ""},
		{"disk: duplex, memory there", "duplex", func(r model.Record) (model.Record, error) { return StartFromDisk(r, facts("a", OtherHolds)) }, ErrAlive, ""},
		{"disk: duplex, empty", "duplex", func(r model.Record) (model.Record, error) { return StartFromDisk(r, facts("a", OtherEmpty)) }, nil, model.ModeStarting},
		{"disk: duplex, secondary's host", "duplex", func(r model.Record) (model.Record, error) { return StartFromDisk(r, facts("b", OtherSilent)) }, nil, model.ModeStarting},
		{"disk: survivor's own", "survivor", func(r model.Record) (model.Record, error) { return StartFromDisk(r, facts("a", OtherHolds)) }, nil, model.ModeStarting},
		{"disk: against a survivor", "survivor", func(r model.Record) (model.Record, error) { return StartFromDisk(r, facts("b", OtherEmpty)) }, ErrSurvivor, ""},
		{"disk: simplex, own", "simplex", func(r model.Record) (model.Record, error) { return StartFromDisk(r, facts("a", OtherUnknown)) }, nil, model.ModeStarting},
		{"disk: simplex, Outdated", "simplex", func(r model.Record) (model.Record, error) { return StartFromDisk(r, facts("b", OtherEmpty)) }, ErrReplica, ""},
		{"disk: syncing, Inconsistent", "syncing", func(r model.Record) (model.Record, error) { return StartFromDisk(r, facts("b", OtherEmpty)) }, ErrReplica, ""},
		{"disk: ahead of the record", "simplex", func(r model.Record) (model.Record, error) {
			f := facts("a", OtherUnknown)
			f.DiskTerm = r.Term + 1
			return StartFromDisk(r, f)
		}, ErrAhead, ""},
		{"disk: other branch", "simplex", func(r model.Record) (model.Record, error) {
			f := facts("a", OtherUnknown)
			f.DiskBranch = "x"
			return StartFromDisk(r, f)
		}, ErrBranch, ""},
		{"disk: not durable", "simplex", func(r model.Record) (model.Record, error) {
			f := facts("a", OtherUnknown)
			f.Durable = false
			return StartFromDisk(r, f)
		}, ErrReplica, ""},
		{"disk: memory here", "simplex", func(r model.Record) (model.Record, error) {
			f := facts("a", OtherUnknown)
			f.OwnEmpty = false
			return StartFromDisk(r, f)
		}, ErrAlive, ""},
		{"disk: wanted stopped", "simplex", func(r model.Record) (model.Record, error) {
			r.Wanted = model.WantStopped
			return StartFromDisk(r, facts("a", OtherUnknown))
		}, ErrWanted, ""},
		{"force from memory", "survivor", func(r model.Record) (model.Record, error) { return Force(r, "b", "r2", "x") }, nil, model.ModeSimplex},
		{"force from disk", "simplex", func(r model.Record) (model.Record, error) { return Force(r, "b", "", "x") }, nil, model.ModeStarting},
		{"force without a branch", "simplex", func(r model.Record) (model.Record, error) { return Force(r, "b", "", "") }, ErrBranch, ""},
		{"force from half a copy", "syncing", func(r model.Record) (model.Record, error) { return Force(r, "b", "", "x") }, ErrReplica, ""},
		{"outdate what runs", "simplex", func(r model.Record) (model.Record, error) { return Outdate(r, "a") }, ErrSeat, ""},
		{"outdate in a pair", "duplex", func(r model.Record) (model.Record, error) { return Outdate(r, "b") }, ErrMode, ""},
		{"outdate what is old", "simplex", func(r model.Record) (model.Record, error) { return Outdate(r, "b") }, nil, model.ModeSimplex},
		{"outdate nobody's", "simplex", func(r model.Record) (model.Record, error) { return Outdate(r, "z") }, ErrReplica, ""},
		{"discard in use", "duplex", func(r model.Record) (model.Record, error) { return Discard(r, "b") }, ErrReplica, ""},
		{"discard old", "simplex", func(r model.Record) (model.Record, error) { return Discard(r, "b") }, nil, model.ModeSimplex},
		{"wanted paused", "duplex", func(r model.Record) (model.Record, error) { return SetWanted(r, model.WantPaused) }, nil, model.ModeDuplex},
		{"level while alone", "simplex", func(r model.Record) (model.Record, error) { return SetLevel(r, model.LevelNone) }, nil, model.ModeSimplex},
		{"level while stopped", "stopped", func(r model.Record) (model.Record, error) { return SetLevel(r, model.LevelCA) }, nil, model.ModeStopped},
		{"level while protected", "duplex", func(r model.Record) (model.Record, error) { return SetLevel(r, model.LevelCA) }, ErrMode, ""},
		{"level while filling", "syncing", func(r model.Record) (model.Record, error) { return SetLevel(r, model.LevelNone) }, ErrMode, ""},
		{"level while starting", "starting", func(r model.Record) (model.Record, error) { return SetLevel(r, model.LevelFT) }, ErrMode, ""},
		{"level unknown", "simplex", func(r model.Record) (model.Record, error) { return SetLevel(r, model.LevelHA) }, ErrArgument, ""},
		{"wanted running while stopped", "stopped", func(r model.Record) (model.Record, error) { return SetWanted(r, model.WantRunning) }, ErrMode, ""},
	} {
		t.Run(strings.ReplaceAll(c.name, " ", "-"), func(t *testing.T) {
			before := FormatRecord(rs[c.from])
			n, err := c.do(rs[c.from].Clone())
			if got := FormatRecord(rs[c.from]); got != before {
				t.Errorf("the record given was changed: %s", got)
			}
			if c.class != nil {
				if !errors.Is(err, c.class) {
					t.Fatalf("error %v, want class %v", err, c.class)
				}
				t.Log(err)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if n.Mode != c.mode {
				t.Errorf("mode %s, want %s", n.Mode, c.mode)
			}
			if n.Mode != rs[c.from].Mode && n.Term != rs[c.from].Term+1 {
				t.Errorf("term %d after %d", n.Term, rs[c.from].Term)
			}
			if err := Validate(n); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestValidateRefuses(t *testing.T) {
	for name, spoil := range map[string]func(*model.Record){
		"one host twice":      func(r *model.Record) { r.Secondary.Host = "a" },
		"one run twice":       func(r *model.Record) { r.Secondary.Run = r.Primary.Run },
		"no primary":          func(r *model.Record) { r.Primary = model.Seat{} },
		"no term":             func(r *model.Record) { r.Term = 0 },
		"mode":                func(r *model.Record) { r.Mode = "quorate" },
		"wanted":              func(r *model.Record) { r.Wanted = "" },
		"empty secondary":     func(r *model.Record) { r.Secondary.Run = "" },
		"survivor elsewhere":  func(r *model.Record) { r.Survivor = "b" },
		"secondary Outdated":  func(r *model.Record) { r.Replicas["b"] = model.Replica{State: model.Outdated} },
		"third UpToDate":      func(r *model.Record) { r.Replicas["c"] = model.Replica{State: model.UpToDate} },
		"branch":              func(r *model.Record) { r.Branch = "x" },
		"replica ahead":       func(r *model.Record) { r.Replicas["b"] = model.Replica{State: model.UpToDate, Term: 99} },
		"simplex, pair":       func(r *model.Record) { r.Mode = model.ModeSimplex },
		"starting with a run": func(r *model.Record) { r.Mode, r.Secondary = model.ModeStarting, model.Seat{} },
		"carried at level ft": func(r *model.Record) { r.Replicas["a"] = model.Replica{State: model.Inconsistent} },
		"carried, Outdated": func(r *model.Record) {
			r.Level, r.Replicas["a"] = model.LevelCA, model.Replica{State: model.Outdated}
		},
		"carried by a survivor": func(r *model.Record) {
			r.Level, r.Survivor, r.Replicas["a"] = model.LevelCA, "a", model.Replica{State: model.Inconsistent}
		},
	} {
		r := life(t)["duplex"].Clone()
		spoil(&r)
		if err := Validate(r); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestLateAnswer: an answer to a swap that a read has settled meanwhile says
// nothing new, and no alarm is raised because it is older.
func TestLateAnswer(t *testing.T) {
	w := &world{cfg: &scenario{}}
	initDuplex(w)
	a := w.h[0].side
	var asked ActSwap
	for _, act := range a.Step(EvPeerLost{}) {
		if s, ok := act.(ActSwap); ok {
			asked = s
		}
	}
	done := model.Versioned{Record: asked.Record, Revision: asked.Revision + 1}
	later := done
	later.Revision += 3
	a.Step(EvPeerTerm{Term: done.Record.Term})
	a.Step(EvRecord{Versioned: later, Found: true})
	if a.Output() != OutputFree || a.Unresolved() {
		t.Fatalf("after the read: output %s, unresolved %v", a.Output(), a.Unresolved())
	}
	if acts := a.Step(EvSwap{ID: asked.ID, Outcome: Done, Current: done}); len(acts) != 0 {
		t.Errorf("late answer: %v", acts)
	}
	if acts := a.Step(EvSwap{ID: asked.ID, Outcome: Unknown}); len(acts) != 0 {
		t.Errorf("late unknown: %v", acts)
	}
}

// TestDeleted: a deleted record ends whatever lives of it.
func TestDeleted(t *testing.T) {
	for h := range 2 {
		w := &world{cfg: &scenario{}}
		initDuplex(w)
		s := w.h[h].side
		s.Step(EvPeerTerm{Term: 99})
		acts := s.Step(EvRecord{})
		if _, ok := acts[len(acts)-1].(ActEnd); !ok || !s.Ended() || s.Output() != OutputNone || s.Acking() {
			t.Errorf("%s: %v", hostNames[h], acts)
		}
		if acts := s.Step(EvPeerLost{}); acts != nil {
			t.Errorf("%s after its end: %v", hostNames[h], acts)
		}
	}
}

func TestOutdate(t *testing.T) {
	r := model.Record{VM: "v", Term: 4, Mode: model.ModeStopped, Level: model.LevelFT, Wanted: model.WantStopped, Primary: model.Seat{Host: "a"},
		Replicas: map[string]model.Replica{"a": {State: model.UpToDate, Term: 4}, "b": {State: model.UpToDate, Term: 4}}}
	n, err := Outdate(r, "b")
	if err != nil || n.Replicas["b"].State != model.Outdated || n.Replicas["a"].State != model.UpToDate || n.Term != 4 || r.Replicas["b"].State != model.UpToDate {
		t.Errorf("%+v, %v", n, err)
	}
	if err := Validate(n); err != nil {
		t.Error(err)
	}
	// The last good one stays good.
	if m, err := Outdate(n, "a"); !errors.Is(err, ErrReplica) {
		t.Errorf("%+v, %v", m, err)
	}
}
