package authority

import (
	"strings"
	"testing"
)

// mutantCase is one broken rule and the small world in which it must show.
type mutantCase struct {
	name string
	mut  mutants
	init func(*world)
	left budget
	want string // part of the violation
}

func mutantCases() []mutantCase {
	return []mutantCase{
		{"no run check", mutants{noRunCheck: true}, initDuplex, budget{epoch: 2, crash: 1, blind: 1, lost: 1}, "rule 2"},
		{"no stricter-of-two", mutants{notStricter: true}, initSyncing, budget{epoch: 3, unknown: 1, lost: 1}, "rule"},
		{"survivor written by the other side", mutants{survivorByOther: true}, initDuplex, budget{epoch: 2, survOn: 1, lost: 2}, "rule"},
		{"claim without stopping acknowledgement", mutants{claimWhileAcking: true}, initDuplex, budget{epoch: 3, lost: 1}, "rule 1"},
		{"cached instead of linearizable read", mutants{anyRead: true}, initDuplex, budget{epoch: 2, lost: 2, unknown: 1}, "rule"},
		{"take over from stopped", mutants{takeOverStopped: true}, initDuplex, budget{epoch: 1, off: 1, lost: 1}, "stopped"},
		{"output free while simplex is only claimed", mutants{freeOnClaim: true}, initDuplex, budget{epoch: 2, lost: 2}, "rule"},
		{"acknowledged before complete", mutants{ackEarly: true}, initDuplex, budget{epoch: 2, lost: 1}, "rule"},
		{"output before its write is durable", mutants{notDurable: true}, initDuplex, budget{epoch: 2}, "rule 3"},
		{"start from a replica that is Outdated", mutants{startOutdated: true}, initDuplex, budget{epoch: 2, lost: 1, power: 1, disk: 1}, "rule"},
		{"empty primary boots over the live secondary", mutants{emptyBoots: true}, initDuplex, budget{epoch: 2, crash: 1, disk: 1}, "precedence"},
		{"boot leaves the other replica UpToDate", mutants{bootKeepsOthers: true}, initStopped, budget{epoch: 1, start: 1}, "rule 3"},
		{"lost secondary stays UpToDate", mutants{lostKeepsUpToDate: true}, initDuplex, budget{epoch: 2, lost: 1}, "rule 3"},
		{"a syncing secondary claims", mutants{syncingClaims: true}, initSyncing, budget{epoch: 3, lost: 2}, "rule"},
		{"takeover ignores the survivor right", mutants{ignoreSurvivor: true}, initDuplex, budget{epoch: 2, survOn: 1, lost: 2}, "rule"},
		{"survivor right used without reading it back", mutants{survivorUnread: true}, initDuplex, budget{epoch: 2, survOn: 1, lost: 2}, "rule"},
		{"survivor right given up while in use", mutants{offInUse: true}, initDuplex, budget{epoch: 2, survOn: 1, survOff: 2, lost: 2}, "rule"},
		{"survivor right taken up again on its old write", mutants{survivorStale: true}, initDuplex, budget{epoch: 2, survOn: 2, survOff: 2, lost: 2}, "rule"},
		{"carried before the record says so", mutants{carryEarly: true}, initDuplexCA, budget{epoch: 2, diskFail: 1}, "rule 3"},
		{"carried while the replica's return may be recorded", mutants{carryLate: true}, initDuplexCA, budget{epoch: 2, diskFail: 2, refill: 1}, "rule 3"},
		{"the loss of the replica is not recorded", mutants{lossUnrecorded: true, carryEarly: true}, initDuplexCA, budget{epoch: 2, diskFail: 1}, "rule 3"},
		{"a primary without a replica drops the secondary", mutants{lossDropsSecondary: true}, initCarried, budget{epoch: 2, lost: 1, protect: 1, connect: 1}, "rule"},
		{"a replica is whole before it is filled", mutants{backUnfilled: true}, initDuplexCA, budget{epoch: 2, diskFail: 1, refill: 1}, "rule 3"},
		{"duplex asked for while output is free", mutants{duplexEarly: true}, initSyncing, budget{epoch: 3, lost: 1}, "rule"},
	}
}

// TestMutants shows that the explorer sees: each broken rule must lead it to a
// violation, while the same world without the mutant has none.
func TestMutants(t *testing.T) {
	for _, c := range mutantCases() {
		t.Run(strings.ReplaceAll(c.name, " ", "-"), func(t *testing.T) {
			sc := &scenario{name: c.name, mut: c.mut, init: c.init, left: c.left, maxOut: 2, maxMsg: 2}
			res := explore(sc, 150_000)
			if res.viol == "" {
				t.Fatalf("mutant not found: %d states, %d transitions, depth %d, full %v", res.states, res.moves, res.depth, res.full)
			}
			sound := *sc
			sound.mut, sound.validate = mutants{}, true
			if res := explore(&sound, 2*res.states); res.viol != "" {
				t.Errorf("the same world without the mutant: %s\n%s", res.viol, story(&sound, res.trace))
			}
			t.Logf("found after %d states, depth %d\n%s", res.states, res.depth, story(sc, res.trace))
			if !strings.Contains(res.viol, c.want) {
				t.Errorf("violation %q, want one that says %q", res.viol, c.want)
			}
			if strings.HasPrefix(res.viol, "contract") {
				t.Errorf("violation of the explorer's own contract: %s", res.viol)
			}
		})
	}
}
