package epoch

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"perdure/internal/model"
)

// TestScenarios plays testdata/*.txt; see testdata/README.md for the language.
func TestScenarios(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scenarios: %v", err)
	}
	for _, f := range files {
		t.Run(filepath.Base(f), func(t *testing.T) {
			b, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			var p player
			for i, line := range strings.Split(string(b), "\n") {
				line, _, _ = strings.Cut(line, "#")
				if line = strings.TrimSpace(line); line == "" {
					continue
				}
				event, want, checks := strings.Cut(line, "->")
				got := p.play(strings.Fields(event))
				if checks && got != strings.TrimSpace(want) {
					t.Errorf("%s:%d: %s -> %s, want %s", f, i+1, strings.TrimSpace(event), got, strings.TrimSpace(want))
				}
			}
		})
	}
}

// player carries out events of the scenario language.
type player struct {
	pair  Pair
	p     *Primary
	s     *Secondary
	tally Tally // what the primary would send
}

func (y *player) play(f []string) string {
	num := func(i int) model.Epoch {
		n, err := strconv.ParseUint(f[i], 10, 64)
		if err != nil {
			panic(fmt.Sprintf("bad number in %q", f))
		}
		return model.Epoch(n)
	}
	pairAt := func(i int) Pair {
		run := func(s string) model.RunID { return model.RunID(strings.TrimPrefix(s, "-")) }
		return Pair{model.Term(num(i)), run(f[i+1]), run(f[i+2])}
	}
	has := func(w string) bool { return slices.Contains(f, w) }
	switch f[0] {
	case "pair":
		y.pair = pairAt(1)
		return "ok"
	case "primary":
		y.pair = pairAt(1)
		y.p, y.s = NewPrimary(y.pair, num(5)), nil
		return "ok"
	case "secondary":
		y.pair = pairAt(1)
		y.s, y.p = NewSecondary(y.pair, num(5)), nil
		return "ok"
	}
	if y.p != nil {
		return y.primary(f, num, pairAt, has)
	}
	return y.secondary(f, num, pairAt, has)
}

func (y *player) primary(f []string, num func(int) model.Epoch, pairAt func(int) Pair, has func(string) bool) string {
	switch f[0] {
	case "capture":
		c := Capture{Epoch: num(1), Full: has("full"), Flush: has("flush")}
		if i := slices.Index(f, "held"); i > 0 {
			c.Held = int64(num(i + 1))
		}
		return outcome(nil, y.p.Captured(c))
	case "sent":
		return outcome(nil, y.p.Sent(num(1)))
	case "acked":
		return result(y.p.Acked(y.pair, num(1)))
	case "durable":
		return result(y.p.Durable(num(1)), nil)
	case "void":
		return result(y.p.Void(has("begun")), nil)
	case "advance":
		return outcome(nil, y.p.Advance(pairAt(1)))
	case "alone":
		return result(y.p.Alone(), nil)
	case "held":
		return fmt.Sprint(y.p.Held())
	}
	panic(fmt.Sprintf("unknown event %q", f))
}

func (y *player) secondary(f []string, num func(int) model.Epoch, pairAt func(int) Pair, has func(string) bool) string {
	switch f[0] {
	case "begin":
		err := y.s.Begin(y.pair, num(1), has("full"), has("flush"))
		if err == nil {
			y.tally = Tally{}
		}
		return outcome(nil, err)
	case "part":
		err := y.s.Part(num(1), 1, []byte(f[2]))
		if err == nil {
			y.tally.Add(1, []byte(f[2][:1]), []byte(f[2][1:]))
		}
		return outcome(nil, err)
	case "end":
		t := y.tally
		if has("short") {
			t.Parts++
		}
		if has("changed") {
			t.Sum ^= 1
		}
		return result(y.s.End(y.pair, num(1), t))
	case "abort":
		return outcome(nil, y.s.Abort(num(1)))
	case "durable":
		return result(y.s.Durable(num(1)), nil)
	case "applied":
		return result(y.s.Applied(num(1)))
	case "stop":
		y.s.StopAcking()
		return "ok"
	case "resume":
		return result(y.s.ResumeAcking())
	case "advance":
		return outcome(nil, y.s.Advance(pairAt(1)))
	case "takeover":
		return result(y.s.Takeover())
	case "newest":
		if n, ok := y.s.Newest(); ok {
			return fmt.Sprint(n)
		}
		return "none"
	}
	panic(fmt.Sprintf("unknown event %q", f))
}

func result(acts []Action, err error) string {
	if err != nil || len(acts) > 0 {
		return outcome(acts, err)
	}
	return "none"
}

func outcome(acts []Action, err error) string {
	for name, class := range map[string]error{"pair": ErrPair, "order": ErrOrder, "never sent": ErrNeverSent,
		"tally": ErrTally, "busy": ErrBusy, "ended": ErrEnded} {
		if errors.Is(err, class) {
			return "error " + name
		}
	}
	if err != nil {
		return "error without a class: " + err.Error()
	}
	if len(acts) == 0 {
		return "ok"
	}
	var out []string
	for _, a := range acts {
		out = append(out, a.String())
	}
	return strings.Join(out, ", ")
}
