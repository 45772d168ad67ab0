package replica

import (
	"errors"
	"testing"

	"perdure/internal/model"
	"pgregory.net/rapid"
)

func genGeneration() *rapid.Generator[Generation] {
	name := rapid.StringMatching(`[0-9a-z]{0,32}`)
	return rapid.Custom(func(t *rapid.T) Generation {
		return Generation{Term: model.Term(rapid.Uint64().Draw(t, "term")), Branch: model.BranchID(name.Draw(t, "branch")), Run: model.RunID(name.Draw(t, "run"))}
	})
}

func genLineage() *rapid.Generator[Lineage] {
	return rapid.Custom(func(t *rapid.T) Lineage {
		g := genGeneration()
		l := Lineage{Current: g.Draw(t, "current"), Base: g.Draw(t, "base"), Toward: g.Draw(t, "toward"), Primary: rapid.Bool().Draw(t, "primary"), BaseEmpty: rapid.Bool().Draw(t, "empty")}
		for i := range l.History {
			l.History[i] = g.Draw(t, "past")
		}
		return l
	})
}

func TestEncoding(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		l := genLineage().Draw(t, "l")
		if err := l.Validate(); err != nil {
			t.Fatal(err)
		}
		b := l.AppendTo(nil)
		if len(b) != EncodedSize {
			t.Fatalf("%d bytes, %d wanted", len(b), EncodedSize)
		}
		got, err := DecodeLineage(b)
		if err != nil || got != l {
			t.Fatalf("%+v, %v; want %+v", got, err, l)
		}
		// Whatever is accepted is what would be written: one encoding for each lineage.
		i := rapid.IntRange(0, len(b)-1).Draw(t, "at")
		b[i] ^= byte(rapid.IntRange(1, 255).Draw(t, "flip"))
		if got, err := DecodeLineage(b); err == nil && string(got.AppendTo(nil)) != string(b) {
			t.Fatalf("byte %d changed: read as %+v, written otherwise", i, got)
		} else if err != nil && !errors.Is(err, ErrFormat) {
			t.Fatal(err)
		}
		if _, err := DecodeLineage(b[:i]); !errors.Is(err, ErrFormat) {
			t.Fatalf("%d bytes: %v", i, err)
		}
	})
}

func TestValidateRefusesNames(t *testing.T) {
	for _, name := range []string{"123456789012345678901234567890123", "a\x00b"} {
		for _, l := range []Lineage{{Current: Generation{Branch: model.BranchID(name)}}, {History: [HistoryLen]Generation{{}, {Run: model.RunID(name)}}}} {
			if err := l.Validate(); !errors.Is(err, ErrFormat) {
				t.Errorf("%q: %v", name, err)
			}
		}
	}
}

// Both sides must come to one verdict, whatever the metadata say.
func TestJudgeMirrors(t *testing.T) {
	gens := []Generation{{}, {Term: 1, Run: "a"}, {Term: 2, Run: "b"}, {Term: 3, Branch: "x", Run: "c"}}
	states := []model.ReplicaState{model.UpToDate, model.Outdated, model.Inconsistent}
	rapid.Check(t, func(t *rapid.T) {
		one := func(n string) Copy {
			g := rapid.SampledFrom(gens)
			c := Copy{VM: "v", Disk: "d", Size: 4096, State: rapid.SampledFrom(states).Draw(t, n+"state"), Clean: rapid.Bool().Draw(t, n+"clean")}
			c.Current, c.Base, c.Toward, c.History[0] = g.Draw(t, n+"cur"), g.Draw(t, n+"base"), g.Draw(t, n+"toward"), g.Draw(t, n+"past")
			c.Primary, c.BaseEmpty = rapid.Bool().Draw(t, n+"primary"), rapid.Bool().Draw(t, n+"empty")
			return c
		}
		a, b := one("a"), one("b")
		ja, jb := Judge(a, b), Judge(b, a)
		if ja.Verdict == 0 || ja.Row == "" || ja.Verdict != jb.Verdict.Mirror() || ja.Row != jb.Row || ja.ByBitmap != jb.ByBitmap || ja.Resume != jb.Resume || ja.Stale != jb.Stale {
			t.Fatalf("%+v\n%+v\n%+v\n%+v", a, b, ja, jb)
		}
	})
}
