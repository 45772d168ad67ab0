package authority

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"testing"

	"perdure/internal/model"
)

var update = flag.Bool("update", false, "rewrite testdata/*.txt from what the code does")

// TestScenarios plays testdata/*.txt: lines that begin with "> " are what
// happens, the lines below each are what the sides do. Run with -update to
// rewrite them, and read the difference as an operator would.
func TestScenarios(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("find scenarios: %v, %d files", err, len(files))
	}
	sort.Strings(files)
	for _, f := range files {
		t.Run(strings.TrimSuffix(filepath.Base(f), ".txt"), func(t *testing.T) {
			raw, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			p := &play{sides: map[string]*Side{}, swaps: map[string]*ActSwap{}}
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

// play is one scenario: a store, the sides, the swaps they wait for, and those
// nobody waits for any more.
type play struct {
	out   strings.Builder
	rec   model.Versioned
	sides map[string]*Side
	swaps map[string]*ActSwap
	late  []ActSwap
}

func (p *play) line(format string, args ...any) { fmt.Fprintf(&p.out, format+"\n", args...) }

func (p *play) write(rec model.Record) {
	p.rec = model.Versioned{Record: rec, Revision: p.rec.Revision + 1}
	p.line("    store: revision %d, %s", p.rec.Revision, FormatRecord(rec))
	if err := Validate(rec); err != nil {
		p.line("    INVALID: %v", err)
	}
}

func (p *play) cas(a ActSwap) Outcome {
	if a.Revision != p.rec.Revision {
		return Conflict
	}
	p.write(a.Record)
	return Done
}

func (p *play) step(host string, ev Event) {
	s := p.sides[host]
	p.line("    %s: %s", host, FormatEvent(ev))
	for _, a := range s.Step(ev) {
		p.line("       -> %s", FormatAction(a))
		switch a := a.(type) {
		case ActSwap:
			p.swaps[host] = &a
		case ActEnd:
			delete(p.swaps, host)
		}
	}
}

func (p *play) agentDoes(rec model.Record, err error) {
	if err != nil {
		p.line("    refused: %v", err)
		return
	}
	p.write(rec)
}

// command carries out one line.
func (p *play) command(w []string) {
	switch w[0] {
	case "vm": // vm HOST=STATE …
		r := model.Record{VM: "vm", Level: model.LevelFT, Mode: model.ModeStopped, Wanted: model.WantStopped, Replicas: map[string]model.Replica{}}
		for _, f := range w[1:] {
			h, st, _ := strings.Cut(f, "=")
			r.Replicas[h] = model.Replica{State: model.ReplicaState(st)}
		}
		p.write(r)
	case "level": // ca, after vm or duplex
		p.rec.Record.Level = model.Level(w[1])
		for _, s := range p.sides {
			s.rec.Record.Level = model.Level(w[1])
		}
	case "duplex": // from stopped to duplex in one word
		for _, c := range []string{"vm a=UpToDate b=Outdated", "agent start a", "a starts", "a reads", "a filled r1", "a swaps", "a protect b", "a reads",
			"a swaps", "b starts", "b reads", "b hears a r1 3", "a hears b -", "a caught-up", "b filled r2 7", "a synced b r2 7", "a swaps", "b told-term 4", "b reads"} {
			n := p.out.Len()
			p.command(strings.Fields(c))
			kept := p.out.String()[:n]
			p.out.Reset()
			p.out.WriteString(kept)
		}
		p.line("    store: revision %d, %s", p.rec.Revision, FormatRecord(p.rec.Record))
	case "agent":
		p.agent(w[1:])
	case "late": // the oldest request nobody waits for is carried out
		a := p.late[0]
		p.late = p.late[1:]
		p.line("    store: late request: %s", p.cas(a))
	case "restore": // the store is restored to an older record
		p.rec.Revision -= 2
		p.rec.Record.Term--
	default:
		p.side(w[0], w[1], w[2:])
	}
}

func (p *play) agent(w []string) {
	r := p.rec.Record
	switch w[0] {
	case "start":
		p.agentDoes(Start(r, w[1]))
	case "start-from-disk": // HOST OTHER
		p.agentDoes(StartFromDisk(r, Facts{Host: w[1], OwnEmpty: true, Other: Other(w[2]), Durable: true, DiskTerm: r.Term, DiskBranch: r.Branch}))
	case "survivor":
		p.agentDoes(SetSurvivor(r, w[1], w[2] == "on"))
	case "wanted":
		p.agentDoes(SetWanted(r, model.Wanted(w[1])))
	case "discard":
		p.agentDoes(Discard(r, w[1]))
	case "force": // HOST BRANCH, from disk
		p.agentDoes(Force(r, w[1], "", model.BranchID(w[2])))
	}
}

func (p *play) side(host, what string, args []string) {
	arg := func(i int) string {
		if i < len(args) && args[i] != "-" {
			return args[i]
		}
		return ""
	}
	num := func(i int) uint64 {
		n, _ := strconv.ParseUint(arg(i), 10, 64)
		return n
	}
	switch what {
	case "starts":
		p.sides[host] = New(Config{Host: host, ClaimDelayMS: 5, RetryMS: 100})
		p.step(host, EvStart{})
	case "dies":
		delete(p.sides, host)
		if a := p.swaps[host]; a != nil {
			p.late = append(p.late, *a)
			delete(p.swaps, host)
		}
	case "reads":
		p.step(host, EvRecord{Versioned: p.rec, Found: p.rec.Revision > 0})
	case "reads-nothing":
		p.step(host, EvReadFailed{})
	case "swaps":
		a := *p.swaps[host]
		p.step(host, EvSwap{ID: a.ID, Outcome: p.cas(a), Current: p.rec})
	case "swaps-unheard": // carried out, the answer is lost
		a := *p.swaps[host]
		p.cas(a)
		p.step(host, EvSwap{ID: a.ID, Outcome: Unknown})
	case "swaps-late": // not carried out yet
		a := *p.swaps[host]
		p.late = append(p.late, a)
		p.step(host, EvSwap{ID: a.ID, Outcome: Unknown})
	case "filled":
		p.step(host, EvFilled{Run: model.RunID(arg(0)), Epoch: model.Epoch(num(1))})
	case "hears": // PEER RUN
		p.step(host, EvPeerUp{Host: arg(0), Run: model.RunID(arg(1)), Term: model.Term(num(2))})
	case "loses-peer":
		p.step(host, EvPeerLost{})
	case "peer-dead":
		p.step(host, EvPeerDead{Run: model.RunID(arg(0)), Released: arg(1) == "released"})
	case "caught-up":
		p.step(host, EvCaughtUp{})
	case "synced":
		p.step(host, EvSynced{Host: arg(0), Run: model.RunID(arg(1)), Epoch: model.Epoch(num(2))})
	case "guest-ended":
		p.step(host, EvGuestEnded{Reason: strings.Join(args, " ")})
	case "powered-off":
		p.step(host, EvPoweredOff{})
	case "protect":
		p.step(host, EvProtect{Host: arg(0)})
	case "unprotect":
		p.step(host, EvUnprotect{Reason: strings.Join(args, " ")})
	case "switched-over":
		p.step(host, EvSwitchedOver{})
	case "switchover":
		p.step(host, EvSwitchover{Run: model.RunID(arg(0)), Term: model.Term(num(1))})
	case "force":
		p.step(host, EvForce{Run: model.RunID(arg(0)), Branch: model.BranchID(arg(1))})
	case "survivor":
		p.step(host, EvSurvivor{On: arg(0) == "on"})
	case "timer":
		p.step(host, EvTimer{ID: TimerID(arg(0))})
	case "loses-replica":
		p.step(host, EvReplicaLost{Reason: strings.Join(args, " ")})
	case "replica-back":
		p.step(host, EvReplicaBack{})
	case "told-term":
		p.step(host, EvPeerTerm{Term: model.Term(num(0))})
	default:
		p.line("    UNKNOWN COMMAND %s", what)
	}
}
