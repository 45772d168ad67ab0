package epoch

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"perdure/internal/model"
)

// Pair is the identity under which epochs are exchanged. Each message that
// begins, ends or acknowledges an epoch carries it; all three must match.
type Pair struct {
	Term      model.Term
	Primary   model.RunID // run of the primary's memory
	Secondary model.RunID // run of the secondary's memory; empty while it is filled
}

// String is for error texts and logs.
func (p Pair) String() string {
	return fmt.Sprintf("term %d runs %.8s>%.8s", p.Term, string(p.Primary), string(p.Secondary))
}

// ActionKind says what the caller has to do.
type ActionKind uint8

// The actions.
const (
	Commit  ActionKind = iota + 1 // primary: both hosts hold the epoch; its held disk writes may be applied in place
	Release                       // primary: its output may leave
	Abort                         // primary: tell the secondary to forget the epoch it has begun to receive
	Journal                       // secondary: make the epoch's disk writes durable, then call Durable
	Ack                           // secondary: acknowledge to the primary
	Apply                         // secondary: apply pages and disk writes, then call Applied
	Ready                         // secondary: everything up to this epoch is applied; the guest may be resumed from it
)

// String returns the action in a word.
func (k ActionKind) String() string {
	switch k {
	case Commit:
		return "commit"
	case Release:
		return "release"
	case Abort:
		return "abort"
	case Journal:
		return "journal"
	case Ack:
		return "ack"
	case Apply:
		return "apply"
	case Ready:
		return "ready"
	}
	return fmt.Sprintf("action %d", uint8(k))
}

// Action is one thing to do, in order.
type Action struct {
	Kind  ActionKind
	Epoch model.Epoch
	Pair  Pair // of the epoch; for Ack: what the acknowledgement must carry
}

// String is for scenarios and logs.
func (a Action) String() string { return fmt.Sprintf("%s %d", a.Kind, a.Epoch) }

// Tally counts and checksums the parts of one epoch, in the order they are
// sent. Both sides keep one; the primary's travels with the end of the epoch.
// The zero value is ready to use.
type Tally struct {
	Parts uint64
	Bytes uint64
	Sum   uint32 // CRC-32C over kind, length and content of each part
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Add counts one part of the given kind.
func (t *Tally) Add(kind uint8, content ...[]byte) {
	var n uint64
	for _, c := range content {
		n += uint64(len(c))
	}
	var h [9]byte
	h[0] = kind
	binary.BigEndian.PutUint64(h[1:], n)
	t.Sum = crc32.Update(t.Sum, castagnoli, h[:])
	for _, c := range content {
		t.Sum = crc32.Update(t.Sum, castagnoli, c)
	}
	t.Parts++
	t.Bytes += n
}
