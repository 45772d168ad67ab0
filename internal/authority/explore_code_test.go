package authority

import (
	"perdure/internal/model"
)

// The canonical encoding of a world: two worlds with the same code behave the
// same. Revisions and swap numbers are relative, so that a retry that changed
// nothing leads back to the state it came from.

func hostCode(h string) byte {
	switch h {
	case "":
		return 0
	case "a":
		return 1
	}
	return 2
}

func runCode(r model.RunID) byte {
	if r == "" {
		return 0
	}
	return r[1]
}

var modeCodes = map[model.Mode]byte{"": 0, model.ModeStopped: 1, model.ModeStarting: 2, model.ModeSimplex: 3, model.ModeSyncing: 4, model.ModeDuplex: 5}

func bits(bs ...bool) byte {
	var v byte
	for i, b := range bs {
		if b {
			v |= 1 << i
		}
	}
	return v
}

func appendRecord(b []byte, r model.Record) []byte {
	b = append(b, byte(r.Term), modeCodes[r.Mode], hostCode(r.Primary.Host), runCode(r.Primary.Run),
		hostCode(r.Secondary.Host), runCode(r.Secondary.Run), hostCode(r.Survivor), byte(len(r.Branch)), r.Wanted[0], r.Level[0])
	for _, h := range hostNames {
		rep := r.Replicas[h]
		if rep.State == "" {
			b = append(b, 0, 0)
			continue
		}
		b = append(b, rep.State[0], byte(len(rep.Branch)))
	}
	return b
}

func (w *world) appendVersioned(b []byte, v model.Versioned) []byte {
	if v.Revision == 0 {
		return append(b, 255)
	}
	b = append(b, byte(w.rec.Revision-v.Revision))
	if v.Revision == w.rec.Revision {
		return b
	}
	return appendRecord(b, v.Record)
}

func (w *world) appendSide(b []byte, s *Side) []byte {
	b = append(b, s.phase[0]^s.phase[1]<<3, runCode(s.run), byte(s.epoch), byte(s.named), byte(s.out),
		bits(s.reading, s.reread, s.wentBack, s.retrySet, s.mayAsk, s.ack),
		bits(s.drop, s.dropFinal, s.detachTold, s.caughtUp, s.stopWanted, s.handing, s.survOn, s.survRead),
		bits(s.survOff, s.detached, s.peerLost, s.claimDue, s.deadFree, s.protRead, s.tellTerm), bits(s.survPast, s.survAnew, s.diskLost, s.diskBack, s.carry),
		hostCode(s.synced.Host), runCode(s.synced.Run), hostCode(s.protect), runCode(s.deadRun), runCode(s.consentRun), byte(s.consentTerm), byte(len(s.branch)))
	if s.reading {
		b = append(b, byte(w.rec.Revision-s.readFrom))
	}
	b = w.appendVersioned(b, s.rec)
	b = append(b, byte(len(s.asked)))
	for _, a := range s.asked {
		b = append(b, byte(s.lastID-a.id), bits(a.answered, a.rewrite))
		b = appendRecord(b, a.record)
	}
	return b
}

func (w *world) appendHost(b []byte, hs *hostState) []byte {
	b = append(b, bits(hs.down, hs.frozen, hs.side != nil, hs.dead, hs.refill), byte(hs.disk.inst), byte(hs.disk.n))
	if hs.side == nil {
		return b
	}
	b = append(b, bits(hs.retry, hs.claim, hs.session, hs.booting, hs.running, hs.off, hs.acking, hs.part), bits(hs.link, hs.begun),
		byte(hs.mem.inst), byte(hs.mem.n), byte(hs.acked), runCode(hs.ackRun), byte(hs.syncStage), byte(hs.swap.state))
	switch hs.swap.state {
	case 1:
		b = append(b, byte(hs.side.lastID-hs.swap.id), byte(w.rec.Revision-hs.swap.rev))
		b = appendRecord(b, hs.swap.rec)
	case 2:
		b = append(b, byte(hs.side.lastID-hs.swap.id), hs.swap.out[0])
		b = w.appendVersioned(b, hs.swap.cur)
	}
	if hs.read.asked {
		b = w.appendVersioned(b, hs.read.v)
	}
	return w.appendSide(b, hs.side)
}

func (m message) code() [12]byte {
	var t byte
	if m.tell != "" {
		t = m.tell[0]
	}
	return [12]byte{byte(m.to), byte(m.kind), runCode(m.run), runCode(m.toRun), byte(m.at.inst), byte(m.at.n), bits(m.full, m.released), byte(m.term), t}
}

// code returns the canonical encoding. Messages are a set: their order on the
// way means nothing.
func (w *world) code(b []byte) []byte {
	b = appendRecord(b[:0], w.rec.Record)
	for i := range w.h {
		b = w.appendHost(b, &w.h[i])
	}
	l := w.left
	for _, v := range [...]int8{l.epoch, l.crash, l.power, l.freeze, l.lost, l.connect, l.protect, l.survOn, l.survOff, l.off, l.handover, l.silence, l.start, l.blind, l.paused, l.unknown, l.unread, l.disk, l.diskFail, l.refill, l.level, w.runs} {
		b = append(b, byte(v))
	}
	codes := make([][12]byte, len(w.msgs))
	for i, m := range w.msgs {
		codes[i] = m.code()
		for j := i; j > 0 && string(codes[j][:]) < string(codes[j-1][:]); j-- {
			codes[j], codes[j-1] = codes[j-1], codes[j]
		}
	}
	for _, c := range codes {
		b = append(b, c[:]...)
	}
	b = append(b, 254, byte(len(w.orphans)))
	for _, o := range w.orphans {
		b = append(b, byte(w.rec.Revision-o.rev))
		b = appendRecord(b, o.rec)
	}
	for _, in := range w.insts {
		b = append(b, byte(in.from.inst), byte(in.from.n), byte(in.rel), byte(in.host))
	}
	for _, v := range w.hist {
		b = append(b, byte(w.rec.Revision-v.Revision))
		b = appendRecord(b, v.Record)
	}
	return b
}
