package shim

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"sync"

	"perdure/internal/bitmap"
	"perdure/internal/blockstore"
	"perdure/internal/model"
	"perdure/internal/replica"
)

// disks drives one replica.Machine for each disk of an instance: what a copy of
// a disk is worth, what it shares with the peer's, and who fills whom. It makes
// metadata and marks durable before it returns; words for the peer's machines are
// returned, to be sent without the lock.
type disks struct {
	s    *Shim
	inst *instance

	mu   sync.Mutex
	list []disk
	news chan struct{} // a machine moved
	want chan struct{} // the peer waits for what is not durable here yet, see reports
}

type disk struct {
	m       replica.Machine
	store   *blockstore.Store
	theirs  *bitmap.Bitmap // the target's marks, as they come in
	copying bool
	whole   bool
	unclean bool // a crash left this copy; its activity log names whole extents
	rest    bool // the rest of the copy is to be sent with the next epoch
	refused string
	pending *replica.ActPersist // could not be written: tried again before anything else
}

// diskHello is what a hello says of one copy.
type diskHello struct {
	Disk    string             `json:"disk"`
	Size    int64              `json:"size"`
	State   model.ReplicaState `json:"state"`
	Clean   bool               `json:"clean,omitempty"`
	Lineage []byte             `json:"lineage"` // encoded as in the metadata
}

// diskWord is a message of one disk's machine to the peer's.
type diskWord struct {
	Disk    int             `json:"disk"`
	Message replica.Message `json:"message"`
}

// copyOf is what a replica's metadata say.
func copyOf(m blockstore.Meta) replica.Copy {
	return replica.Copy{VM: m.VM, Disk: m.Disk, Size: m.Size, State: m.State, Clean: m.Clean, Lineage: m.Lineage}
}

// newDisks takes over the replicas of an instance whose journals were replayed.
func newDisks(s *Shim, inst *instance) *disks {
	d := &disks{s: s, inst: inst, list: make([]disk, len(inst.stores)), news: make(chan struct{}, 1), want: make(chan struct{}, 1)}
	for n, st := range inst.stores {
		d.list[n].store = st
		c := copyOf(st.Meta())
		c.Clean = n < len(inst.clean) && inst.clean[n] // as it was found; replaying the journal ended that
		d.list[n].unclean = !c.Clean
		d.list[n].m = replica.New()
		d.list[n].m.Step(replica.EvOpen{Copy: c})
	}
	return d
}

// hello describes all copies.
func (d *disks) hello() []diskHello {
	d.mu.Lock()
	defer d.mu.Unlock()
	out := []diskHello{}
	for n := range d.list {
		c := d.list[n].m.Copy()
		out = append(out, diskHello{c.Disk, c.Size, c.State, c.Clean, c.AppendTo(nil)})
	}
	return out
}

// line is what a line that begins now is called.
func (d *disks) line() replica.Generation {
	d.s.mu.Lock()
	defer d.s.mu.Unlock()
	return replica.Generation{Term: d.s.mode.Term, Branch: d.s.record.Record.Branch, Run: d.s.mode.Run}
}

// meet gives the machines what the peer's hello says. run is the standby's.
func (d *disks) meet(h hello, run model.RunID) ([]diskWord, error) {
	if len(h.Disks) != len(d.list) {
		return nil, fmt.Errorf("host %s speaks of %d disks, this VM has %d", h.Host, len(h.Disks), len(d.list))
	}
	var words []diskWord
	for n, dh := range h.Disks {
		l, err := replica.DecodeLineage(dh.Lineage)
		if err != nil {
			return nil, fmt.Errorf("disk %s of host %s: %w", dh.Disk, h.Host, err)
		}
		c := replica.Copy{VM: h.UUID, Disk: dh.Disk, Size: dh.Size, State: dh.State, Clean: dh.Clean, Lineage: l}
		w, err := d.step(n, replica.EvHello{Copy: c, Empty: replica.Generation{Term: h.Term, Run: run}})
		if err != nil {
			return nil, err
		}
		words = append(words, w...)
		d.mu.Lock()
		j := d.list[n].m.Judgement()
		d.mu.Unlock()
		d.s.log.Info("compared replicas", "disk", dh.Disk, "verdict", replica.FormatJudgement(j))
	}
	return words, nil
}

// all feeds one event to every machine.
func (d *disks) all(ev replica.Event) ([]diskWord, error) {
	var words []diskWord
	for n := range d.list {
		w, err := d.step(n, ev)
		if err != nil {
			return words, err
		}
		words = append(words, w...)
	}
	return words, nil
}

// alone begins a line of this host's own, durably, where that has not been done:
// the record grants it. Nothing is written before it returned.
func (d *disks) alone() error {
	if _, err := d.all(replica.EvGrant{Kind: replica.GrantAlone, Line: d.line()}); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for n := range d.list {
		if k := &d.list[n]; k.m.Rule() != replica.RuleAlone {
			return fmt.Errorf("disk %s is not to be written: %s, %s", k.m.Copy().Disk, k.m.Phase(), k.refused)
		}
	}
	return nil
}

// lost notes that the session with the peer is over: all that it did not report
// durable is marked when this returns.
func (d *disks) lost() error {
	_, err := d.all(replica.EvLost{})
	return err
}

// step feeds one event to one machine and carries out what it answers.
func (d *disks) step(n int, ev replica.Event) (words []diskWord, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	k := &d.list[n]
	queue := []replica.Event{ev}
	if k.pending != nil {
		if err := d.persist(k, *k.pending); err != nil {
			return nil, err
		}
		k.pending = nil
		queue = []replica.Event{replica.EvPersisted{}, ev}
	}
	for ; len(queue) > 0; queue = queue[1:] {
		for _, a := range k.m.Step(queue[0]) {
			d.s.log.Debug("disk", "disk", k.m.Copy().Disk, "action", replica.FormatAction(a))
			switch a := a.(type) {
			case replica.ActPersist:
				if err := d.persist(k, a); err != nil {
					k.pending = &a
					return words, err
				}
				queue = append(queue, replica.EvPersisted{})
			case replica.ActSend:
				words = append(words, diskWord{n, a.Message})
			case replica.ActCopy:
				k.copying = true
			case replica.ActSendRest:
				k.copying, k.rest = false, true
			case replica.ActWhole:
				k.whole = true
			case replica.ActLosing:
				d.s.tl.add("replica-overwritten", 0, 0, "disk %s: this host's copy (%s, %s) is overwritten; until that has ended there is no copy to start from here",
					a.Copy.Disk, a.Copy.State, a.Copy.Current)
			case replica.ActAlarm:
				k.refused = a.Text
				d.s.tl.problem(model.Problem{Code: a.Code, Severity: model.Critical, Text: "disk " + k.m.Copy().Disk + ": " + a.Text,
					Action: "nothing is overwritten; see docs/replication.md for what the two copies hold, and decide which one to give up"})
			}
		}
	}
	if _, over := ev.(replica.EvLost); over {
		k.copying, k.whole, k.rest, k.theirs, k.refused = false, false, false, nil, ""
	}
	select {
	case d.news <- struct{}{}:
	default:
	}
	return words, nil
}

// persist carries out one change of metadata with its marks, in their order.
func (d *disks) persist(k *disk, a replica.ActPersist) error {
	st := k.store
	d.inst.point("replica.persist")
	defer d.inst.point("replica.persisted")
	save := true
	switch a.Marks {
	case replica.MarksFresh, replica.MarksOwn:
		st.Detach() // a crash finds it in the activity log: nothing has to be synced
		save = false
	case replica.MarksTheirs, replica.MarksNew:
		if k.theirs == nil {
			return errors.New("a target said that its marks are complete, and sent none")
		}
		st.MarkMissingSet(k.theirs)
	case replica.MarksAll:
		st.MarkMissing(0, st.Chunks())
	default:
		save = false
	}
	if save {
		if err := st.SaveMissing(); err != nil {
			return err
		}
		if a.Marks != replica.MarksAll {
			k.theirs = nil
		}
	}
	d.inst.point("replica.marked")
	d.s.mu.Lock()
	term, branch, run := d.s.mode.Term, d.s.record.Record.Branch, d.s.mode.Run
	d.s.mu.Unlock()
	if m := st.Meta(); m.State != a.State || m.Lineage != a.Lineage {
		err := st.SetMeta(func(m *blockstore.Meta) {
			m.State, m.Lineage = a.State, a.Lineage
			if a.State == model.UpToDate && term >= m.Term {
				m.Term, m.Branch, m.Run = term, branch, run
			}
		})
		if err != nil {
			return err
		}
	}
	switch a.Marks {
	case replica.MarksWipe:
		if err := st.Wipe(); err != nil {
			return err
		}
		st.ClearMissing(0, st.Chunks())
	case replica.MarksClear:
		st.ClearMissing(0, st.Chunks())
		return st.SaveMissing()
	}
	return nil
}

// state reports whether every machine of a source is copying, or has its peer
// whole, and the reason why one refuses.
func (d *disks) state() (copying, whole bool, refused string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	copying, whole = true, true
	for n := range d.list {
		k := &d.list[n]
		copying, whole = copying && k.copying, whole && k.whole
		if k.refused != "" {
			refused = k.refused
		}
	}
	return copying, whole, refused
}

// judgement is what was found of the peer's copy of one disk.
func (d *disks) judgement(n int) replica.Judgement {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.list[n].m.Judgement()
}

// wholesale reports whether a disk's copy is made into a wiped one, so that holes
// need not be sent.
func (d *disks) wholesale(n int) bool {
	j := d.judgement(n)
	return !j.ByBitmap && !d.compares(n)
}

// compares reports whether digests are compared first: the target may hold much
// of the data already. That is so after a crash of either, because an activity log
// names extents of 4 MiB, of which most are equal.
func (d *disks) compares(n int) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	j := d.list[n].m.Judgement()
	if j.ByBitmap {
		// At level ca all that was written since the last copy is marked.
		return j.Resume || d.list[n].unclean || !d.list[n].m.PeerClean() || d.inst.mirror != nil
	}
	return d.list[n].m.PeerHasData()
}

// sendWords passes words on, marks first where a word needs them.
func (d *disks) sendWords(words []diskWord, send func(kind uint8, content ...[]byte) error) error {
	for _, w := range words {
		if w.Message.Kind == replica.MsgMarks {
			if err := d.sendMarks(w.Disk, send); err != nil {
				return err
			}
		}
		b, err := json.Marshal(w)
		if err != nil {
			return fmt.Errorf("encode word of a disk: %w", err)
		}
		if err := send(kindDiskWord, b); err != nil {
			return err
		}
	}
	return nil
}

// marksHead heads a piece of a bitmap: 64-bit words follow.
type marksHead struct {
	Disk  uint32
	First int64 // chunk, a multiple of 64
}

// sendMarks sends what may differ here, by this side's own books.
func (d *disks) sendMarks(n int, send func(kind uint8, content ...[]byte) error) error {
	b := d.list[n].store.Missing()
	const most = maxPart / 8 * 64 // chunks in a piece
	for first := int64(0); first < b.Len(); first += most {
		var words []byte
		for c := first; c < min(first+most, b.Len()); c += 64 {
			words = binary.LittleEndian.AppendUint64(words, b.Word(c))
		}
		if err := send(kindDiskMarks, pack(marksHead{uint32(n), first}), words); err != nil {
			return err
		}
	}
	return nil
}

// takeMarks takes in a piece of the peer's marks.
func (d *disks) takeMarks(p []byte) error {
	var h marksHead
	head := binary.Size(h)
	if len(p) < head {
		return fmt.Errorf("marks of a disk: %d bytes, at least %d wanted", len(p), head)
	}
	if err := unpack(p[:head], &h); err != nil {
		return err
	}
	p = p[head:]
	d.mu.Lock()
	defer d.mu.Unlock()
	if int(h.Disk) >= len(d.list) {
		return fmt.Errorf("marks of disk %d, there are %d", h.Disk, len(d.list))
	}
	k := &d.list[h.Disk]
	chunks := k.store.Chunks()
	if k.theirs == nil {
		k.theirs = bitmap.New(chunks)
	}
	if h.First < 0 || h.First%64 != 0 || len(p)%8 != 0 || h.First+int64(len(p))*8 > (chunks+63)/64*64 {
		return fmt.Errorf("marks of disk %d: %d bytes at chunk %d of %d", h.Disk, len(p), h.First, chunks)
	}
	for c := h.First; len(p) > 0; c, p = c+64, p[8:] {
		w := binary.LittleEndian.Uint64(p)
		if left := chunks - c; left < 64 {
			w &= 1<<left - 1
		}
		k.theirs.OrWord(c, w)
	}
	return nil
}

// takeWord hands a word of the peer's machine to its counterpart, and returns the answer.
func (d *disks) takeWord(p []byte) ([]diskWord, error) {
	var w diskWord
	if err := json.Unmarshal(p, &w); err != nil {
		return nil, fmt.Errorf("decode word of a disk: %w", err)
	}
	if w.Disk < 0 || w.Disk >= len(d.list) {
		return nil, fmt.Errorf("word of disk %d, there are %d", w.Disk, len(d.list))
	}
	if err := w.Message.Lineage.Validate(); err != nil {
		return nil, fmt.Errorf("word of disk %d: %w", w.Disk, err)
	}
	return d.step(w.Disk, replica.EvMessage{Message: w.Message})
}

// attach makes the stores count on the peer's reports from epoch e on.
func (d *disks) attach(e model.Epoch) {
	for _, st := range d.inst.stores {
		st.Attach(e)
	}
}

// committed notes that an epoch is in place on all disks.
func (d *disks) committed(e model.Epoch) {
	for _, st := range d.inst.stores {
		st.Committed(e)
	}
}
