package replica

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"perdure/internal/model"
)

var update = flag.Bool("update", false, "rewrite testdata/*.txt from what the code does")

// TestScenarios plays testdata/*.txt: lines that begin with "> " are what
// happens, the lines below each are what follows. Run with -update to rewrite
// them, and read the difference as an operator would.
func TestScenarios(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("find scenarios: %v, %d files", err, len(files))
	}
	for _, f := range files {
		t.Run(strings.TrimSuffix(filepath.Base(f), ".txt"), func(t *testing.T) {
			raw, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			p := &play{t: t, machines: map[string]*Machine{}, copies: map[string]Copy{}}
			for _, line := range strings.Split(strings.TrimRight(string(raw), "\n"), "\n") {
				switch {
				case strings.HasPrefix(line, "> "):
					p.line("%s", line)
					p.command(strings.Fields(line[2:]))
				case strings.HasPrefix(line, "#"), line == "":
					p.line("%s", line)
				}
			}
			if *update {
				if err := os.WriteFile(f, []byte(p.out.String()), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if got := p.out.String(); got != string(raw) {
				t.Errorf("%s differs; now:\n%s", f, got)
			}
		})
	}
}

// play is one scenario: copies by host, and the machines that own them.
type play struct {
	t        *testing.T
	out      strings.Builder
	machines map[string]*Machine
	copies   map[string]Copy
}

func (p *play) line(format string, args ...any) { fmt.Fprintf(&p.out, format+"\n", args...) }

// generation reads "TERMrun" or "TERMrun/branch", as in 5a or 5a/x.
func (p *play) generation(s string) Generation {
	s, branch, _ := strings.Cut(s, "/")
	term, err := strconv.Atoi(strings.TrimRight(s, "abcdefghijklmnopqrstuvwxyz"))
	if err != nil {
		p.t.Fatalf("generation %q: %v", s, err)
	}
	return Generation{Term: model.Term(term), Branch: model.BranchID(branch), Run: model.RunID(strings.TrimLeft(s, "0123456789"))}
}

func (p *play) copyOf(words []string) Copy {
	c := Copy{VM: "vm", Disk: "disk0", Size: 1 << 30, State: model.UpToDate}
	past := 0
	for _, w := range words {
		k, v, _ := strings.Cut(w, "=")
		switch k {
		case "UpToDate", "Outdated", "Inconsistent":
			c.State = model.ReplicaState(k)
		case "clean":
			c.Clean = true
		case "primary":
			c.Primary = true
		case "discarded":
			c.Discarded = true
		case "empty":
			c.BaseEmpty = true
		case "current":
			c.Current = p.generation(v)
		case "base":
			c.Base = p.generation(v)
		case "toward":
			c.Toward = p.generation(v)
		case "before":
			c.History[past] = p.generation(v)
			past++
		case "disk":
			c.Disk = v
		case "size":
			n, err := strconv.ParseInt(v, 10, 64)
			if err != nil {
				p.t.Fatal(err)
			}
			c.Size = n
		default:
			p.t.Fatalf("unknown word %q", w)
		}
	}
	return c
}

func other(host string) string { return map[string]string{"a": "b", "b": "a"}[host] }

func (p *play) step(host string, ev Event) {
	var sent []Message
	persist := false
	for _, a := range p.machines[host].Step(ev) {
		p.line("    %s: %s", host, FormatAction(a))
		switch a := a.(type) {
		case ActSend:
			sent = append(sent, a.Message)
		case ActPersist:
			persist = true
			c := p.copies[host]
			c.State, c.Lineage, c.Clean = a.State, a.Lineage, a.Clean
			p.copies[host] = c
		}
	}
	if persist {
		p.step(host, EvPersisted{})
	}
	for _, m := range sent {
		if to := other(host); p.machines[to] != nil {
			p.step(to, EvMessage{m})
		}
	}
}

// command carries out one line: HOST WHAT …, or "judge".
func (p *play) command(w []string) {
	if w[0] == "judge" {
		p.line("    a: %s", FormatJudgement(Judge(p.copies["a"], p.copies["b"])))
		p.line("    b: %s", FormatJudgement(Judge(p.copies["b"], p.copies["a"])))
		return
	}
	host := w[0]
	switch w[1] {
	case "meets": // a session, with host as the source
		to := other(host)
		mine, theirs := p.copies[host], p.copies[to]
		p.line("    %s finds: %s", host, FormatJudgement(Judge(mine, theirs)))
		p.step(to, EvHello{Copy: mine})
		p.step(host, EvHello{Copy: theirs, Empty: p.generation("99z")})
	case "copy":
		p.copies[host] = p.copyOf(w[2:])
	case "open":
		m := New()
		p.machines[host] = &m
		p.step(host, EvOpen{p.copies[host]})
	case "granted":
		for k, name := range grantNames {
			if name == w[2] {
				g := EvGrant{Kind: GrantKind(k)}
				if len(w) > 3 {
					g.Line = p.generation(w[3])
				}
				p.step(host, g)
			}
		}
	case "caught-up":
		p.step(host, EvCaughtUp{})
	case "rest-sent":
		p.step(host, EvRestSent{})
	case "boundary":
		p.step(host, EvBoundary{})
	case "loses":
		p.step(host, EvLost{})
	case "fails":
		p.step(host, EvFailed{Reason: "input/output error"})
	case "closes":
		p.step(host, EvClose{})
	case "dies":
		delete(p.machines, host)
	default:
		p.t.Fatalf("unknown command %q", w)
	}
}
