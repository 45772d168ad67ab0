package shim

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"time"

	"perdure/internal/authority"
	"perdure/internal/blockstore"
	"perdure/internal/epoch"
	"perdure/internal/guestmem"
	"perdure/internal/hostnet"
	"perdure/internal/mirror"
	"perdure/internal/model"
	"perdure/internal/peer"
	"perdure/internal/shimapi"
)

// standby fills and follows: it is the secondary's side of one session.
type standby struct {
	s     *Shim
	inst  *instance
	disks *disks
	next  model.RunID // what the memory here is called once it is full

	ctx    context.Context
	cancel context.CancelFunc
	work   sync.WaitGroup
	ln     *peer.Listener
	target *mirror.Target // level ca, once the primary has spoken
	// answers to questions of a resync; of the goroutine that receives.
	answers answerer
	early   earlyFlush
	// tryCtx ends all trials: a takeover waits for none.
	tryCtx   context.Context
	endTries context.CancelFunc
	applyQ   chan *whole
	// between takes work that needs the memory to stand still at the boundary of
	// the epoch that was applied last.
	between chan func(*whole)
	// following takes such work too, once for each epoch; see tryNext.
	following chan func(*whole)
	each      bool          // nothing is applied before the last one was tried; applier only
	trying    sync.Mutex    // held by a trial
	drain     chan struct{} // closed when nothing will be received any more
	idle      chan struct{} // closed when the applier has ended

	mu       sync.Mutex
	sess     *peer.Session
	pair     epoch.Pair
	books    *epoch.Secondary
	acking   bool
	full     bool
	epochs   map[model.Epoch]*whole // complete, not yet applied; the newest is kept
	newest   *whole
	applyErr error  // why the applier ended before its time
	primal   string // the primary's host
	input    []seenInput
	inputLen int
	live     []*hostnet.Inbox // by NIC, after a takeover: where input goes at once
	carried  bool             // the time of carrying is over

	// Receiving ends with recvCtx, which outlasts a takeover for a moment.
	recvCtx context.Context
	endRecv context.CancelFunc
	drained sync.Once  // closes drain
	recvMu  sync.Mutex // held while a message is taken
	taken   bool       // with recvMu: nothing but input is taken any more

	scrub *scrubServer // answers verify and read repair

	appliedMu   sync.Mutex
	appliedTo   model.Epoch   // in place here
	appliedMore chan struct{} // closed, and made anew, with each

	// receiver only
	cur  *whole
	prev []byte
}

// whole is one epoch as received.
type whole struct {
	epoch   model.Epoch
	flags   uint32
	head    endHeader
	frames  [][]byte
	wires   [][]byte // encoded writes by disk
	disks   []*blockstore.EpochWrites
	dev     []byte
	output  [][]byte // frames by NIC that leave after the takeover
	console []byte
	audit   []pageHash
}

// startStandby builds the waiting QEMU and listens for the primary.
func (s *Shim) startStandby() {
	st := &standby{s: s, next: newRun(), applyQ: make(chan *whole, 8), drain: make(chan struct{}), idle: make(chan struct{}),
		between: make(chan func(*whole)), following: make(chan func(*whole)),
		epochs: map[model.Epoch]*whole{}, appliedMore: make(chan struct{})}
	st.ctx, st.cancel = context.WithCancel(s.ctx)
	st.tryCtx, st.endTries = context.WithCancel(st.ctx)
	st.recvCtx, st.endRecv = context.WithCancel(s.ctx)
	s.mu.Lock()
	s.stby = st
	s.mu.Unlock()
	st.goWork(func() {
		if err := st.open(); err != nil && st.ctx.Err() == nil {
			s.tl.add("standby-failed", 0, 0, "%v", err)
			s.noteDiskFailed(err)
			s.startFailed(err)
		}
	})
}

func (st *standby) goWork(f func()) {
	st.work.Add(1)
	go func() { defer st.work.Done(); f() }()
}

func (st *standby) open() error {
	s := st.s
	start := time.Now()
	inst, err := build(st.ctx, s.cfg, true, s.lock, s.self, s.log)
	if err != nil {
		return fmt.Errorf("build standby: %w", err)
	}
	s.mu.Lock()
	s.inst, st.inst = inst, inst
	st.disks = newDisks(s, inst)
	s.mu.Unlock()
	if inst.mirror != nil {
		st.target = st.newTarget()
	}
	s.tl.add("standby", 0, time.Since(start), "standby waits on host %s", s.cfg.Host)
	st.goWork(st.watchQEMU)

	me := s.hello()
	me.NextRun, me.Scrub, me.Resync = st.next, scrubVersion, resyncVersion
	me.Disks = st.disks.hello()
	local := make([]string, len(s.cfg.ALinkAddrs))
	copy(local, s.cfg.ALinkAddrs)
	st.ln, err = peer.Listen(st.ctx, peer.Config{TLS: s.tls, Verify: s.verifyHost(""), Hello: me.encode(), Local: local,
		Silence: s.silence(), Log: s.log, Urgent: st.onUrgent})
	if err != nil {
		return fmt.Errorf("listen on the A-links: %w", err)
	}
	ep := shimapi.Endpoint{Host: s.cfg.Host, Addrs: st.ln.Addrs(), Nonce: string(st.next)}
	for st.ctx.Err() == nil {
		ctx, cancel := context.WithTimeout(st.ctx, 2*time.Second)
		err := s.agent.Publish(ctx, ep)
		cancel()
		if err == nil {
			break
		}
		sleep(st.ctx, 100*time.Millisecond)
	}
	return st.serve()
}

// watchQEMU ends the standby when its QEMU or its memory goes.
func (st *standby) watchQEMU() {
	var noMemory <-chan struct{}
	if st.inst.ram != nil {
		noMemory = st.inst.ram.Failed()
	}
	select {
	case <-st.inst.proc.Dying():
		if st.ctx.Err() == nil {
			st.s.post(authority.EvGuestEnded{Reason: "the standby's QEMU ended: " + st.inst.proc.LogTail(500)})
		}
	case <-noMemory:
		if st.ctx.Err() == nil {
			st.s.post(authority.EvGuestEnded{Reason: "the standby's memory is lost: " + st.inst.ram.Err().Error()})
		}
	case <-st.ctx.Done():
	}
}

// serve accepts the primary's one session and follows it to its end.
func (st *standby) serve() error {
	sess, err := st.ln.Accept(st.ctx)
	if err != nil {
		return fmt.Errorf("wait for the primary: %w", err)
	}
	h, err := decodeHello(sess.PeerHello())
	if err == nil {
		err = st.s.judge(h, "")
	}
	if err == nil {
		err = st.s.judgePrimary(h)
	}
	if err == nil {
		err = st.meet(h)
	}
	if err != nil {
		sess.Close(err.Error())
		return err
	}
	st.mu.Lock()
	st.sess, st.primal = sess, h.Host
	st.pair = epoch.Pair{Term: h.Term, Primary: h.Run, Secondary: st.next}
	st.books = epoch.NewSecondary(st.pair, h.First)
	if !st.acking {
		st.books.StopAcking()
	}
	st.scrub = st.newScrubServer()
	st.mu.Unlock()
	st.s.tl.add("sync-started", 0, 0, "host %s fills this standby", h.Host)
	st.s.post(authority.EvPeerUp{Host: h.Host, Run: h.Run, Term: h.Term, Mode: h.Mode})
	if st.target == nil {
		st.goWork(st.applier)
	}
	err = st.follow(sess)
	st.scrub.close()
	st.drained.Do(func() { close(st.drain) })
	if st.ctx.Err() == nil && !st.isTaken() {
		st.s.tl.add("peer-lost", st.newestEpoch(), 0, "primary on host %s: %v", h.Host, err)
		st.s.post(authority.EvPeerLost{})
	}
	return nil
}

// follow receives until the session is lost, and then takes what is left of it.
func (st *standby) follow(sess *peer.Session) error {
	for {
		m, err := sess.Recv(st.recvCtx)
		if err != nil {
			if errors.Is(err, peer.ErrLost) {
				for _, m := range sess.Leftover() {
					if st.takeOne(m) != nil {
						break
					}
				}
			}
			return err
		}
		if err := st.takeOne(m); err != nil {
			st.alarm(err.Error())
			sess.Close(err.Error())
			return err
		}
	}
}

// alarm tells the primary that this pair is not sound.
func (st *standby) alarm(text string) {
	st.s.tl.add("pair-unsound", st.newestEpoch(), 0, "%s", text)
	st.mu.Lock()
	sess := st.sess
	st.mu.Unlock()
	if sess != nil {
		sess.Urgent(urgentAlarm, []byte(text[:min(len(text), 500)]))
	}
}

func (st *standby) newestEpoch() model.Epoch {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.newest == nil {
		return 0
	}
	return st.newest.epoch
}

// takeOne takes a message, unless this standby has become the VM: then only
// what was sent to the guest matters.
func (st *standby) takeOne(m peer.Message) error {
	st.recvMu.Lock()
	defer st.recvMu.Unlock()
	if st.taken && m.Kind != kindInput {
		return nil
	}
	return st.take(m)
}

func (st *standby) isTaken() bool {
	st.recvMu.Lock()
	defer st.recvMu.Unlock()
	return st.taken
}

// take handles one ordered message.
func (st *standby) take(m peer.Message) error {
	if mirrorKind(m.Kind) && st.target == nil || memoryKind(m.Kind) && st.target != nil {
		return fmt.Errorf("message of kind %d, which has no place at level %s", m.Kind, st.s.cfg.Spec.Level)
	}
	switch m.Kind {
	case kindMirror:
		return st.target.Take(m.Payload)
	case kindMirrorFull:
		return st.mirrorFull(m.Payload)
	case kindSyncPages:
		return guestmem.DecodePages(m.Payload, st.inst.ram.Size(), st.inst.ram.Store)
	case kindSyncDisk:
		return st.takeChunk(m.Payload)
	case kindSyncFlush:
		return st.flushCopy()
	case kindDiskWord, kindDiskSums, kindDiskAsk:
		return st.takeDiskMessage(m)
	case kindEpochBegin:
		return st.takeBegin(m.Payload)
	case kindEpochPages, kindEpochDisk, kindEpochFrames, kindEpochDevices:
		return st.takePart(m)
	case kindEpochEnd:
		return st.takeEnd(m.Payload)
	case kindInput:
		return st.takeInput(m.Payload)
	case kindScrubAsk:
		return st.takeScrub(m)
	case kindHandOver:
		b, err := decodeBeat(m.Payload)
		if err != nil {
			return err
		}
		st.s.post(authority.EvSwitchover{Run: b.Run.id(), Term: model.Term(b.Term)})
		return nil
	}
	return fmt.Errorf("message of unknown kind %d", m.Kind)
}

var chunkHead = binary.Size(diskChunk{})

// takeChunk writes a piece of the full copy to the replica, which is Inconsistent meanwhile.
func (st *standby) takeChunk(p []byte) error {
	var c diskChunk
	if len(p) < chunkHead {
		return fmt.Errorf("piece of a disk: %d bytes, at least %d wanted", len(p), chunkHead)
	}
	if err := unpack(p[:chunkHead], &c); err != nil {
		return err
	}
	data := p[chunkHead:]
	st.inst.point("copy.chunk")
	if int64(c.Disk) >= int64(len(st.inst.stores)) || c.Zero == 0 && len(data) != int(c.Len) || c.Zero != 0 && len(data) != 0 {
		return fmt.Errorf("piece of disk %d: %d bytes, %d announced; there are %d disks", c.Disk, len(data), c.Len, len(st.inst.stores))
	}
	store := st.inst.stores[c.Disk]
	if err := st.answers.coming(store, int(c.Disk), c.Off); err != nil {
		return err
	}
	st.flushAhead(store, int64(len(data)))
	if c.Zero != 0 {
		return store.Zero(c.Off, int64(c.Len), true)
	}
	return store.WriteAt(data, c.Off)
}

// flushCopy makes the copy so far durable while the guest still runs unheld,
// and says so: the last step to being full is short then.
func (st *standby) flushCopy() error {
	for n, store := range st.inst.stores {
		if err := store.Flush(); err != nil {
			return fmt.Errorf("flush disk %d: %w", n, err)
		}
	}
	st.inst.point("copy.flushed")
	return st.sess.Send(st.ctx, kindSyncFlushed)
}

func (st *standby) takeBegin(p []byte) error {
	var b beginHeader
	if err := unpack(p, &b); err != nil {
		return err
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	id := epoch.Pair{Term: model.Term(b.Term), Primary: b.Run.id(), Secondary: st.next}
	if err := st.books.Begin(id, model.Epoch(b.Epoch), b.Flags&flagSync != 0, b.Flags&flagFlush != 0 || b.Flags&flagSync != 0); err != nil {
		return err
	}
	st.cur = &whole{epoch: model.Epoch(b.Epoch), flags: b.Flags, wires: make([][]byte, len(st.inst.stores)),
		disks: make([]*blockstore.EpochWrites, len(st.inst.stores))}
	return nil
}

func (st *standby) takePart(m peer.Message) error {
	st.mu.Lock()
	if st.cur == nil {
		st.mu.Unlock()
		return errors.New("part of an epoch that has not begun")
	}
	err := st.books.Part(st.cur.epoch, m.Kind, m.Payload)
	st.mu.Unlock()
	if err != nil {
		return err
	}
	switch m.Kind {
	case kindEpochPages:
		st.cur.frames = append(st.cur.frames, m.Payload)
	case kindEpochDisk:
		return st.takeDisk(m.Payload)
	case kindEpochFrames:
		return st.takeFrames(m.Payload)
	case kindEpochDevices:
		return st.takeDevices(m.Payload)
	}
	return nil
}

var diskHead = binary.Size(diskPart{})

func (st *standby) takeDisk(p []byte) error {
	var d diskPart
	if len(p) < diskHead {
		return fmt.Errorf("disk writes: %d bytes, at least %d wanted", len(p), diskHead)
	}
	if err := unpack(p[:diskHead], &d); err != nil {
		return err
	}
	if int(d.Disk) >= len(st.cur.wires) {
		return fmt.Errorf("writes for disk %d, there are %d", d.Disk, len(st.cur.wires))
	}
	st.cur.wires[d.Disk] = append(st.cur.wires[d.Disk], p[diskHead:]...)
	if d.More != 0 {
		return nil
	}
	w, err := blockstore.Decode(st.cur.wires[d.Disk], st.inst.stores[d.Disk].Size())
	if err != nil {
		return fmt.Errorf("writes for disk %d: %w", d.Disk, err)
	}
	st.cur.disks[d.Disk] = w
	return nil
}

// takeFrames collects output that this host releases when it takes over.
func (st *standby) takeFrames(p []byte) error {
	var d diskPart
	if len(p) < diskHead {
		return fmt.Errorf("frames: %d bytes, at least %d wanted", len(p), diskHead)
	}
	if err := unpack(p[:diskHead], &d); err != nil {
		return err
	}
	if int(d.Disk) >= len(st.inst.nics) {
		return fmt.Errorf("frames of network card %d, there are %d", d.Disk, len(st.inst.nics))
	}
	if st.cur.output == nil {
		st.cur.output = make([][]byte, len(st.inst.nics))
	}
	st.cur.output[d.Disk] = append(st.cur.output[d.Disk], p[diskHead:]...)
	return nil
}

var (
	endHead   = binary.Size(endHeader{})
	auditSize = binary.Size(pageHash{})
)

func (st *standby) takeDevices(p []byte) error {
	c := st.cur
	if len(p) < endHead {
		return fmt.Errorf("device state: %d bytes, at least %d wanted", len(p), endHead)
	}
	if err := unpack(p[:endHead], &c.head); err != nil {
		return err
	}
	p = p[endHead:]
	h := c.head
	if want := int64(h.DevWire) + int64(h.Console) + int64(h.Audits)*int64(auditSize); int64(len(p)) != want {
		return fmt.Errorf("device state of epoch %d: %d bytes, %d announced", c.epoch, len(p), want)
	}
	dev, err := unpackDevices(h, p[:h.DevWire], st.prev)
	if err != nil {
		return err
	}
	c.dev, st.prev = dev, dev
	c.flags |= h.Flags
	p = p[h.DevWire:]
	c.console, p = p[:h.Console], p[h.Console:]
	c.audit = make([]pageHash, h.Audits)
	return unpack(p, c.audit)
}

// takeEnd completes an epoch: from here on it may be used.
func (st *standby) takeEnd(p []byte) error {
	var t endTally
	if err := unpack(p, &t); err != nil {
		return err
	}
	c := st.cur
	if c == nil || c.dev == nil {
		return errors.New("end of an epoch without device state")
	}
	st.mu.Lock()
	id := epoch.Pair{Term: model.Term(t.Term), Primary: t.Run.id(), Secondary: st.next}
	acts, err := st.books.End(id, model.Epoch(t.Epoch), epoch.Tally{Parts: t.Parts, Bytes: t.Bytes, Sum: t.Sum})
	if err == nil {
		st.epochs[c.epoch] = c
		st.newest = c
	}
	st.cur = nil
	st.mu.Unlock()
	if err != nil {
		return err
	}
	if err := st.journal(c); err != nil {
		st.s.noteDiskFailed(err)
		st.s.post(authority.EvGuestEnded{Reason: "disk of the standby: " + err.Error()})
		return err
	}
	st.inst.point("epoch.journaled")
	st.mu.Lock()
	acts = append(dropJournal(acts), st.books.Durable(c.epoch)...)
	st.mu.Unlock()
	if c.flags&flagSync != 0 {
		if err := st.becomeFull(c); err != nil {
			return err
		}
	}
	return st.carryOut(acts)
}

// dropJournal leaves out the journal actions: every epoch is journalled before
// anything else is done with it.
func dropJournal(acts []epoch.Action) []epoch.Action {
	out := acts[:0]
	for _, a := range acts {
		if a.Kind != epoch.Journal {
			out = append(out, a)
		}
	}
	return out
}

// journal writes the epoch's disk writes to the journals, durable as far as flushed.
func (st *standby) journal(c *whole) error {
	for n, w := range c.disks {
		if w == nil || w.Empty() {
			continue
		}
		if err := st.inst.stores[n].Persist(st.pair.Term, c.epoch, w); err != nil {
			return err
		}
	}
	return nil
}

// becomeFull makes the replica good for use, durably, and tells both the
// authority and the primary that everything is here as of this epoch.
func (st *standby) becomeFull(c *whole) error {
	if err := st.disksWhole(c.epoch); err != nil {
		return err
	}
	st.inst.point("full.durable")
	st.mu.Lock()
	st.full = true
	sess := st.sess
	st.mu.Unlock()
	if st.target == nil {
		st.goWork(st.trials)
	}
	st.s.post(authority.EvFilled{Run: st.next, Epoch: c.epoch})
	b := beat{Term: uint64(st.pair.Term), Run: packRun(st.next), Epoch: uint64(c.epoch)}
	if err := sess.Send(st.ctx, kindSynced, b.encode()); err != nil && !errors.Is(err, peer.ErrLost) {
		return err
	}
	return nil
}

// carryOut does what the books allow: acknowledge and apply.
func (st *standby) carryOut(acts []epoch.Action) error {
	for _, a := range acts {
		switch a.Kind {
		case epoch.Ack:
			st.ack(0, a.Epoch)
		case epoch.Apply:
			st.mu.Lock()
			c := st.epochs[a.Epoch]
			st.mu.Unlock()
			select {
			case st.applyQ <- c:
			case <-st.ctx.Done():
				return st.ctx.Err()
			}
		}
	}
	return nil
}

// ack acknowledges everything up to epoch n.
//
// Invariant: mu is held from looking at acking to handing the note to the
// session, so that nothing is acknowledged after setAcking(false) returned.
func (st *standby) ack(sentAt int64, n model.Epoch) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if !st.acking || st.sess == nil {
		return
	}
	b := beat{Term: uint64(st.pair.Term), Run: packRun(st.next), SentAt: sentAt, Epoch: uint64(n)}
	if st.target != nil {
		st.s.gate.promise()
	}
	st.sess.Urgent(urgentAck, b.encode())
}

// setAcking lets epochs be acknowledged, or not, from its return on.
func (st *standby) setAcking(on bool) {
	st.mu.Lock()
	st.acking = on
	var acts []epoch.Action
	if st.books != nil {
		if on {
			acts, _ = st.books.ResumeAcking()
		} else {
			st.books.StopAcking()
		}
	}
	st.mu.Unlock()
	for _, a := range acts {
		if a.Kind == epoch.Ack {
			st.ack(0, a.Epoch)
		}
	}
}

// onUrgent is called from the goroutines that read links.
func (st *standby) onUrgent(kind uint8, payload []byte) {
	if kind == urgentDurable || kind == urgentWant {
		st.disks.takeReport(kind, payload)
		return
	}
	b, err := decodeBeat(payload)
	if err != nil {
		return
	}
	s := st.s
	switch kind {
	case urgentBeat:
		st.mu.Lock()
		ok := st.books != nil && st.full && model.Term(b.Term) == st.pair.Term && b.Run.id() == st.pair.Primary
		var n model.Epoch
		if ok {
			n, _ = st.books.NewestAcked()
		}
		st.mu.Unlock()
		if ok {
			st.ack(b.SentAt, n)
		}
	case urgentDead:
		go s.post(authority.EvPeerDead{Run: b.Run.id(), Released: b.Epoch != 0})
	case urgentTerm:
		go s.post(authority.EvPeerTerm{Term: model.Term(b.Term)})
	}
}

// applier puts complete epochs into the waiting QEMU's memory and onto the
// disks, in order, and compares the audited pages.
func (st *standby) applier() {
	defer close(st.idle)
	var last *whole
	tried := true // last, by following
	for {
		applyQ, following := st.applyQ, st.following
		var patience <-chan time.Time
		var end <-chan struct{}
		if st.each && !tried {
			applyQ, patience, end = nil, time.After(eachPatience), st.tryCtx.Done()
		} else {
			following = nil
		}
		select {
		case c := <-applyQ:
			if err := st.apply(c); err != nil {
				st.s.noteDiskFailed(err)
				st.mu.Lock()
				st.applyErr = err
				st.mu.Unlock()
				st.s.post(authority.EvGuestEnded{Reason: fmt.Sprintf("apply epoch %d: %v", c.epoch, err)})
				return
			}
			last, tried = c, false
		case job := <-following:
			job(last)
			tried = true
		case <-patience:
			st.each = false
		case <-end:
			st.each = false
		case job := <-st.between:
			if st.tryCtx.Err() != nil {
				last = nil // tells the trial that there is nothing to try any more
			}
			job(last)
		case <-st.drain:
			st.each = false
			if len(st.applyQ) == 0 {
				return
			}
			// What is queued is applied first; select picks at random.
		case <-st.ctx.Done():
			return
		}
	}
}

func (st *standby) apply(c *whole) error {
	for _, f := range c.frames {
		if err := guestmem.DecodePages(f, st.inst.ram.Size(), st.inst.ram.Store); err != nil {
			return fmt.Errorf("memory: %w", err)
		}
	}
	c.frames = nil
	for n, w := range c.disks {
		if w == nil || w.Empty() {
			continue
		}
		if err := st.inst.stores[n].Apply(c.epoch); err != nil {
			return fmt.Errorf("disk %d: %w", n, err)
		}
	}
	st.disks.committed(c.epoch)
	st.noteApplied(c.epoch)
	if len(c.console) > 0 {
		st.inst.serial.Release(c.console)
	}
	if err := st.compare(c); err != nil {
		return err
	}
	st.mu.Lock()
	_, err := st.books.Applied(c.epoch)
	delete(st.epochs, c.epoch)
	st.mu.Unlock()
	return err
}

// compare is the continuous audit: the pages that the primary hashed while
// stopped must be the same here.
func (st *standby) compare(c *whole) error {
	if len(c.audit) == 0 {
		return nil
	}
	pages := make([]int64, len(c.audit))
	for n, a := range c.audit {
		pages[n] = int64(a.Page)
		if pages[n] >= st.inst.ram.Size()/guestmem.PageSize {
			return fmt.Errorf("audit of page %d, the memory ends before", a.Page)
		}
	}
	got, err := st.inst.ram.Hash(pages)
	if err != nil {
		return fmt.Errorf("audit: %w", err)
	}
	for n, a := range c.audit {
		if got[n] != a.Hash {
			text := fmt.Sprintf("memory differs in page %d after epoch %d (hash %016x, primary %016x)", a.Page, c.epoch, got[n], a.Hash)
			st.alarm(text)
			return errors.New(text)
		}
	}
	return nil
}

func (st *standby) close() {
	st.cancel()
	st.endRecv()
	st.mu.Lock()
	sess := st.sess
	st.mu.Unlock()
	if sess != nil {
		sess.Close("the standby ends")
	}
	if st.ln != nil {
		st.ln.Close()
	}
	st.work.Wait()
}

func (st *standby) tell(a authority.ActTell) {
	st.mu.Lock()
	sess := st.sess
	st.mu.Unlock()
	if sess != nil {
		tellPeer(sess, a)
	}
}

// fill adds to a status what the standby knows.
func (st *standby) fill(out *shimapi.Status) {
	st.mu.Lock()
	defer st.mu.Unlock()
	out.State = model.StateHeld
	if st.newest != nil {
		out.Epoch = st.newest.epoch
	}
	if st.sess == nil {
		return
	}
	for _, l := range st.sess.Links() {
		out.Links = append(out.Links, shimapi.LinkStatus{Index: l.Index, Up: l.Up, RTTMS: ms(l.RTT), Sent: l.SentBytes, Recv: l.RecvBytes})
	}
}
