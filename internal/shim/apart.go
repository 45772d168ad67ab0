package shim

import (
	"time"

	"perdure/internal/model"
)

// apartPatience is how long a lost pair may wait for the cluster's word before
// people are told: with a majority the word comes within some tenths of a second.
const apartPatience = 2 * time.Second

// pairApart is the code of the problem that a lost pair waits for a decision.
const pairApart = "pair-apart"

// tellApart says so when a pair that was lost at lostAt is still the record's
// duplex: the two sides do not reach each other, and nobody decides which one
// goes on. A lost session is not taken up again, so only a decision ends it.
func (pr *pair) tellApart(lostAt time.Time) {
	s := pr.p.s
	s.mu.Lock()
	mode := s.mode.Mode
	s.mu.Unlock()
	if mode != model.ModeDuplex || time.Since(lostAt) < apartPatience {
		return
	}
	s.tl.problem(model.Problem{Code: pairApart, Severity: model.Critical,
		Text:   "the second copy on host " + pr.host + " is out of reach, and no majority of the voters says which side goes on: output waits, and the guest stops at its bound",
		Action: "bring back enough hosts or the witness for a majority; it goes on by itself"})
}
