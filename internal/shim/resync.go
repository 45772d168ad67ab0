package shim

import (
	"errors"
	"fmt"
	"io"
	"time"

	"perdure/internal/bitmap"
	"perdure/internal/blockstore"
	"perdure/internal/model"
	"perdure/internal/peer"
	"perdure/internal/replica"
)

// sumChunks is how many chunks are compared by one message.
const sumChunks = 256

// sumsHead heads digests of chunks, and the answer to them; see askHead too.
type sumsHead struct {
	Disk  uint32
	Count uint32
	First int64 // chunk
}

func (pr *pair) sendKind(kind uint8, content ...[]byte) error {
	return pr.sess.Send(pr.ctx, kind, content...)
}

// meet compares this host's copies with those of the standby, and begins to turn
// them into targets.
func (pr *pair) meet(h hello) error {
	d := pr.p.disks
	if _, err := d.all(replica.EvGrant{Kind: replica.GrantSource, Line: replica.Generation{Term: pr.term, Branch: d.line().Branch, Run: d.line().Run}}); err != nil {
		return err
	}
	words, err := d.meet(h, h.NextRun)
	if err != nil {
		return err
	}
	return d.sendWords(words, pr.sendKind)
}

// awaitTarget waits until every copy of the standby may be written over.
func (pr *pair) awaitTarget() error {
	for {
		copying, _, refused := pr.p.disks.state()
		switch {
		case refused != "":
			return errors.New(refused)
		case copying:
			return nil
		}
		select {
		case <-pr.p.disks.news:
		case <-pr.sess.Lost():
			return pr.sess.Cause()
		case <-pr.ctx.Done():
			return pr.ctx.Err()
		}
	}
}

// takeDisk handles what a standby says of its disks.
func (pr *pair) takeDisk(m peer.Message) error {
	switch m.Kind {
	case kindDiskWord:
		words, err := pr.p.disks.takeWord(m.Payload)
		if err != nil {
			return err
		}
		return pr.p.disks.sendWords(words, pr.sendKind)
	case kindDiskMarks:
		return pr.p.disks.takeMarks(m.Payload)
	case kindDiskDiffer, kindDiskAnswer:
		return pr.asks.take(m.Kind, m.Payload)
	}
	return nil
}

// copyDisks sends what the standby's disks lack: by the marks of both where they
// tell it, else all that is not a hole.
func (pr *pair) copyDisks() error {
	var total, done int64
	begun := time.Now()
	marks := make([]*bitmap.Bitmap, len(pr.p.inst.stores))
	for n, st := range pr.p.inst.stores {
		if pr.p.disks.wholesale(n) {
			total += st.Size()
			continue
		}
		marks[n] = st.Missing()
		total += marks[n].Count() * blockstore.ChunkSize
	}
	pr.governor = newGovernor(pr.p.inst.latency, 0, 0)
	defer pr.governor.close()
	if total > 0 {
		m := pr.newMeter("disks", total)
		for n, st := range pr.p.inst.stores {
			var err error
			if marks[n] == nil {
				err = pr.copyWhole(n, m, done)
				done += st.Size()
			} else {
				err = pr.copyMarked(n, marks[n], m, done)
				done += marks[n].Count() * blockstore.ChunkSize
			}
			if err != nil {
				return err
			}
			m.at(done)
		}
	}
	for n, st := range pr.p.inst.stores {
		pr.p.s.tl.add("disk-copied", 0, time.Since(begun), "disk %s: %d bytes of %d sent to host %s (%s)", pr.p.s.cfg.Spec.Disks[n].ID,
			pr.sentOf(n), st.Size(), pr.host, replica.FormatJudgement(pr.p.disks.judgement(n)))
	}
	return nil
}

// sentOf is how many bytes of a disk went over the link in this copy.
func (pr *pair) sentOf(n int) int64 {
	pr.mu.Lock()
	defer pr.mu.Unlock()
	return pr.copied[n]
}

// copyWhole sends all of a disk that is not a hole, into a replica that is one.
func (pr *pair) copyWhole(n int, m *meter, done int64) error {
	st := pr.p.inst.stores[n]
	buf := make([]byte, maxPart)
	for off := int64(0); ; {
		start, got, err := st.NextData(off, buf)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := pr.governor.wait(pr.ctx, int64(got)); err != nil {
			return err
		}
		if err := pr.sendChunk(diskChunk{Disk: uint32(n), Off: start, Len: uint32(got)}, buf[:got]); err != nil {
			return err
		}
		off = start + int64(got)
		m.at(done + off)
	}
}

// copyMarked sends marked chunks; where the target may hold many of them already,
// those that its digests show to differ.
func (pr *pair) copyMarked(n int, marks *bitmap.Bitmap, m *meter, done int64) error {
	if pr.p.disks.compares(n) {
		return pr.copyDiffering(n, marks, m, done)
	}
	buf := make([]byte, blockstore.ChunkSize)
	for at, copied := int64(0), int64(0); ; {
		start, end, ok := marks.Next(at, sumChunks)
		if !ok {
			return nil
		}
		for c := start; c < end; c++ {
			if err := pr.copyChunk(n, c, buf, blockstore.ChunkSize); err != nil {
				return err
			}
		}
		at, copied = end, copied+end-start
		m.at(done + copied*blockstore.ChunkSize)
	}
}

// meet compares the standby's copies with the primary's.
func (st *standby) meet(h hello) error {
	d := st.disks
	if _, err := d.all(replica.EvGrant{Kind: replica.GrantTarget, Line: replica.Generation{Term: h.Term}}); err != nil {
		return err
	}
	_, err := d.meet(h, "")
	return err
}

// takeDiskMessage handles what the primary says of its disks.
func (st *standby) takeDiskMessage(m peer.Message) error {
	switch m.Kind {
	case kindDiskWord:
		words, err := st.disks.takeWord(m.Payload)
		if err != nil {
			return err
		}
		return st.disks.sendWords(words, st.sendKind)
	case kindDiskSums:
		return st.takeSums(m.Payload)
	case kindDiskAsk:
		return st.takeAsk(m.Payload)
	}
	return fmt.Errorf("message of kind %d about a disk", m.Kind)
}

func (st *standby) sendKind(kind uint8, content ...[]byte) error {
	return st.sess.Send(st.ctx, kind, content...)
}

// disksWhole makes the copies good for use, durably, as of an epoch that is in
// the journals, and says so to the primary's machines.
func (st *standby) disksWhole(e model.Epoch) error {
	words, err := st.disks.all(replica.EvBoundary{})
	if err != nil {
		return err
	}
	if len(words) != len(st.disks.list) {
		return errors.New("the copy ended before every disk was announced to be whole")
	}
	if st.target == nil {
		st.disks.attach(e)
	}
	st.goWork(func() { st.disks.reports(st.ctx.Done(), st.sess) })
	return st.disks.sendWords(words, st.sendKind)
}
