package shim

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"perdure/internal/authority"
	"perdure/internal/epoch"
	"perdure/internal/guestmem"
	"perdure/internal/model"
	"perdure/internal/netbuf"
	"perdure/internal/peer"
	"perdure/internal/shimapi"
)

// pair is the primary's side of one session with one secondary, from the first
// byte of the full copy to the loss or the end. A pair that is lost stays lost.
type pair struct {
	p     *primary
	host  string
	term  model.Term // of the session: the record's when filling began
	begun time.Time

	ctx    context.Context
	cancel context.CancelFunc
	work   sync.WaitGroup
	enc    *guestmem.Encoder

	sendQ chan *captured
	poke  chan struct{} // something was queued for the committer
	gate  chan struct{} // something about the gate changed

	flushed  chan struct{} // the secondary's copy is durable
	flushing atomic.Bool   // while that is waited for
	moved    atomic.Int64  // bytes of the full copy that were sent
	asks     *questions    // to the secondary, what it lacks of the disks
	oneRun   bool          // it is of the release before: one run of chunks a question
	governor *governor     // of the copy of disks; the filling's own
	scrub    *scrubClient  // asks the secondary for verify and read repair
	whole    atomic.Bool   // the secondary said that it holds everything

	mu       sync.Mutex
	sess     *peer.Session
	peerRun  model.RunID
	books    *epoch.Primary
	flights  map[model.Epoch]*captured // captured, and output not left yet
	acts     []epoch.Action            // commits and releases for the committer, in order
	caught   bool
	lost     bool
	lostAt   time.Time // when lost was set
	left     bool      // settled by the runner: the committer does nothing any more
	progress []model.Progress
	lastDisk []diskChunk   // what the copy still owes, sent with the first epoch
	owesLast bool          // and that it was the last
	copied   map[int]int64 // bytes that went over the link, by disk
	slow     *epoch.SlowWatch
	lastWord *authority.ActTell // that this side's guest is dead

	prevDev []byte // sender only
}

func newPair(p *primary, host string, term model.Term) *pair {
	pr := &pair{p: p, host: host, term: term, begun: time.Now(), enc: guestmem.NewEncoder(guestmem.EncoderConfig{SkipUnchanged: true, Size: p.s.cfg.Spec.Memory}),
		sendQ: make(chan *captured, 2*epoch.MaxInFlight), poke: make(chan struct{}, 1), gate: make(chan struct{}, 1), flushed: make(chan struct{}, 1), asks: newQuestions(),
		flights: map[model.Epoch]*captured{}, copied: map[int]int64{}, slow: epoch.NewSlowWatch(2*time.Second, 5*time.Second)}
	pr.ctx, pr.cancel = context.WithCancel(p.ctx)
	return pr
}

func (pr *pair) goWork(f func()) {
	pr.work.Add(1)
	go func() { defer pr.work.Done(); f() }()
}

// identity is what every message of this pair carries.
func (pr *pair) identity() epoch.Pair {
	return epoch.Pair{Term: pr.term, Primary: pr.p.s.run(), Secondary: pr.peerRun}
}

func (s *Shim) run() model.RunID {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mode.Run
}

// adopt takes the session that was dialled into use.
func (pr *pair) adopt(sess *peer.Session, h hello) {
	pr.mu.Lock()
	pr.sess, pr.peerRun = sess, h.NextRun
	pr.oneRun = h.Resync < resyncVersion
	if h.Scrub >= scrubVersion {
		pr.scrub = newScrubClient(pr.sendKind)
	}
	pr.books = epoch.NewPrimary(epoch.Pair{Term: pr.term, Primary: pr.p.s.run(), Secondary: h.NextRun}, pr.p.lastEpoch()+1)
	pr.mu.Unlock()
	pr.goWork(pr.watchLost)
	pr.goWork(pr.receive)
	if pr.p.inst.mirror != nil {
		return
	}
	pr.goWork(pr.sender)
	pr.goWork(pr.committer)
}

func (pr *pair) isLost() bool {
	pr.mu.Lock()
	defer pr.mu.Unlock()
	return pr.lost
}

func (pr *pair) caughtUp() bool {
	pr.mu.Lock()
	defer pr.mu.Unlock()
	return pr.caught && !pr.lost
}

func (pr *pair) inFlight() int {
	pr.mu.Lock()
	defer pr.mu.Unlock()
	// Epochs that are acknowledged but have not left count too, beyond a few:
	// a gate that does not open must not let them pile up.
	return max(pr.books.InFlight(), len(pr.flights)-maxUnreleased)
}

// maxUnreleased is how many acknowledged epochs may wait for the gate before
// they hold back further captures as unacknowledged ones do.
const maxUnreleased = 4

func (pr *pair) isLeft() bool {
	pr.mu.Lock()
	defer pr.mu.Unlock()
	return pr.left
}

// watchLost tells the authority once when the session is gone.
func (pr *pair) watchLost() {
	select {
	case <-pr.sess.Lost():
		if pr.isLeft() {
			return
		}
		pr.markLost()
		pr.p.s.tl.add("peer-lost", 0, 0, "secondary on host %s: %v", pr.host, pr.sess.Cause())
		pr.p.s.post(authority.EvPeerLost{})
		pr.p.kick()
	case <-pr.ctx.Done():
	}
}

func (pr *pair) markLost() {
	pr.mu.Lock()
	if !pr.lost {
		pr.lost, pr.lostAt = true, time.Now()
	}
	pr.mu.Unlock()
}

// fail gives the pair up because something about it is not sound.
func (pr *pair) fail() { pr.markLost() }

// receive takes the ordered messages of the secondary.
func (pr *pair) receive() {
	for {
		m, err := pr.sess.Recv(pr.ctx)
		if err != nil {
			return
		}
		if m.Kind == kindSyncFlushed {
			select {
			case pr.flushed <- struct{}{}:
			default:
			}
		}
		if err := pr.takeDisk(m); err != nil {
			pr.unsound(err)
			return
		}
		if m.Kind == kindMirrored || m.Kind == kindMirrorData {
			take := pr.p.inst.mirror.Done
			if m.Kind == kindMirrorData {
				take = pr.p.inst.mirror.Data
			}
			if err := take(m.Payload); err != nil {
				pr.unsound(err)
				return
			}
		}
		if m.Kind == kindScrubAnswer && pr.scrub != nil {
			if err := pr.scrub.take(m.Payload); err != nil {
				pr.unsound(err)
				return
			}
		}
		if m.Kind != kindSynced {
			continue
		}
		b, err := decodeBeat(m.Payload)
		if err != nil || b.Run.id() != pr.peerRun || model.Term(b.Term) != pr.term {
			pr.p.s.log.Warn("message of another pair ignored", "error", err)
			continue
		}
		pr.whole.Store(true)
		pr.fetchFrom()
		pr.p.inst.markMirrored()
		if pr.p.inst.mirror != nil {
			pr.p.s.tl.add("synced", 0, time.Since(pr.begun), "host %s holds the disks as they are here", pr.host)
		} else {
			pr.p.s.tl.add("synced", model.Epoch(b.Epoch), time.Since(pr.begun), "host %s holds everything as of epoch %d", pr.host, b.Epoch)
		}
		pr.p.s.post(authority.EvSynced{Host: pr.host, Run: pr.peerRun, Epoch: model.Epoch(b.Epoch)})
	}
}

// onUrgent is called from the goroutines that read links.
func (pr *pair) onUrgent(kind uint8, payload []byte) {
	if pr.isLeft() {
		return // a word of a pair that is past
	}
	s := pr.p.s
	switch kind {
	case urgentDurable, urgentWant:
		pr.p.disks.takeReport(kind, payload)
	case urgentAck:
		if b, err := decodeBeat(payload); err == nil {
			pr.onAck(b)
		}
	case urgentDead:
		if b, err := decodeBeat(payload); err == nil {
			go s.post(authority.EvPeerDead{Run: b.Run.id(), Released: b.Epoch != 0})
		}
	case urgentTerm:
		if b, err := decodeBeat(payload); err == nil {
			go s.post(authority.EvPeerTerm{Term: model.Term(b.Term)})
		}
	case urgentAlarm:
		text := string(payload)
		go func() {
			s.tl.problem(model.Problem{Code: "pair-unsound", Severity: model.Critical,
				Text:   fmt.Sprintf("host %s: %s", pr.host, text),
				Action: "none: the secondary is filled anew; if it comes back, check the memory of both hosts"})
			pr.markLost()
			pr.giveUpPair(text)
		}()
	}
}

// onAck takes an acknowledgement: it confirms the right as of when the
// question was sent, and all epochs up to b.Epoch.
func (pr *pair) onAck(b beat) {
	pr.mu.Lock()
	if pr.books == nil || pr.lost || pr.left || model.Term(b.Term) != pr.term || b.Run.id() != pr.peerRun {
		pr.mu.Unlock()
		return
	}
	var acts []epoch.Action
	id := pr.books.Pair()
	for _, n := range pr.books.Open() {
		if n > model.Epoch(b.Epoch) {
			break
		}
		a, err := pr.books.Acked(id, n)
		if err == nil {
			acts = append(acts, a...)
			if c := pr.flights[n]; c != nil {
				c.acked = time.Now()
				pr.p.latency.Store(int64(time.Since(c.done)))
			}
		}
	}
	pr.enqueue(acts)
	pr.mu.Unlock()
	if b.SentAt != 0 {
		pr.p.s.gate.confirm(b.sentAt())
		pr.gateChanged()
	}
	if len(acts) > 0 {
		pr.p.kick()
	}
}

// enqueue hands commits and releases to the committer. mu is held.
func (pr *pair) enqueue(acts []epoch.Action) {
	if len(acts) == 0 {
		return
	}
	pr.acts = append(pr.acts, acts...)
	select {
	case pr.poke <- struct{}{}:
	default:
	}
}

// dequeue takes the oldest of what waits for the committer.
func (pr *pair) dequeue() (a epoch.Action, c *captured, ok bool) {
	pr.mu.Lock()
	defer pr.mu.Unlock()
	if len(pr.acts) == 0 || pr.left {
		return a, nil, false
	}
	a, pr.acts = pr.acts[0], pr.acts[1:]
	return a, pr.flights[a.Epoch], true
}

func (pr *pair) gateChanged() {
	select {
	case pr.gate <- struct{}{}:
	default:
	}
}

// beat asks the secondary to confirm the right, and watches for one that
// acknowledges too slowly.
func (pr *pair) beat() {
	pr.mu.Lock()
	sess, lost, lostAt := pr.sess, pr.lost, pr.lostAt
	pr.mu.Unlock()
	slow := pr.slow.Observe(bootNow(), pr.owed())
	if lost {
		pr.tellApart(lostAt)
	}
	if sess == nil || lost {
		return
	}
	b := beat{Term: uint64(pr.term), Run: packRun(pr.p.s.run()), SentAt: int64(bootNow())}
	sess.Urgent(urgentBeat, b.encode())
	if id := pr.ownDisk(); id != "" && pr.p.s.isDuplex() {
		err := fmt.Errorf("disk %s of this host: no answer for %v: %w", id, stallLimit, syscall.ETIMEDOUT)
		pr.p.s.noteDiskFailed(err)
		pr.p.guestEnded(err.Error())
		return
	}
	if slow {
		pr.markLost()
		pr.p.s.tl.problem(model.Problem{Code: "secondary-slow", Severity: model.Warning,
			Text:   fmt.Sprintf("host %s took more than 2 s to acknowledge for 5 s", pr.host),
			Action: "look at the A-links and the load of that host; protection is tried again by itself"})
		pr.p.s.post(authority.EvUnprotect{Reason: "the secondary is too slow"})
	}
}

// owed is for how long the secondary has owed an answer, 0 if it owes none. What it has
// acknowledged waits for this host, or for the gate.
func (pr *pair) owed() (oldest time.Duration) {
	if m := pr.p.inst.mirror; m != nil {
		if pr.p.carries() {
			return 0 // slow or not, it holds the only good copy
		}
		return m.Oldest()
	}
	pr.mu.Lock()
	defer pr.mu.Unlock()
	for _, c := range pr.flights {
		if c.acked.IsZero() {
			oldest = max(oldest, time.Since(c.done))
		}
	}
	return oldest
}

// ownDisk names a disk of this host that does not answer, at a level that keeps epochs, where
// what the secondary holds waits for it: the guest is better off there. "": there is none.
func (pr *pair) ownDisk() string {
	i := pr.p.inst
	if i.mirror != nil {
		return "" // see watchDisks
	}
	waits := time.Duration(0)
	pr.mu.Lock()
	for _, c := range pr.flights {
		if !c.acked.IsZero() {
			waits = max(waits, time.Since(c.acked))
		}
	}
	pr.mu.Unlock()
	if waits < stallLimit {
		return ""
	}
	return i.standingDisk(stallLimit)
}

// send registers a captured epoch and queues it. The runner calls it.
func (pr *pair) send(c *captured) {
	pr.mu.Lock()
	err := pr.books.Captured(epoch.Capture{Epoch: c.epoch, Held: c.held, Flush: c.flush(), Full: c.flags&flagSync != 0})
	if err == nil {
		pr.flights[c.epoch] = c
	}
	pr.mu.Unlock()
	if err != nil {
		pr.p.guestEnded("internal: " + err.Error())
		return
	}
	pr.goWork(func() { pr.persist(c) })
	select {
	case pr.sendQ <- c:
	case <-pr.ctx.Done():
	}
}

// persist makes the disk writes of an epoch durable here, as far as flushed.
func (pr *pair) persist(c *captured) {
	if err := pr.p.persistEpoch(c, pr.term, pr.prevPersisted(c)); err != nil {
		if pr.isLost() || pr.ctx.Err() != nil {
			return // leaving the pair does it again, and waits for a disk with room
		}
		pr.p.s.noteDiskFailed(err)
		pr.p.guestEnded("disk: " + err.Error())
		return
	}
	close(c.persisted)
	pr.mu.Lock()
	pr.enqueue(pr.books.Durable(c.epoch))
	pr.mu.Unlock()
}

// prevPersisted returns the channel of the epoch before, if it is still open.
func (pr *pair) prevPersisted(c *captured) <-chan struct{} {
	pr.mu.Lock()
	defer pr.mu.Unlock()
	if b := pr.flights[c.epoch-1]; b != nil {
		return b.persisted
	}
	return nil
}

// persistEpoch writes the epoch's disk writes to the journals, after those of the epoch before.
func (p *primary) persistEpoch(c *captured, term model.Term, before <-chan struct{}) error {
	if before != nil {
		select {
		case <-before:
		case <-p.ctx.Done():
			return p.ctx.Err()
		}
	}
	for n, w := range c.disks {
		if w == nil || w.Empty() {
			continue
		}
		if err := p.inst.stores[n].Persist(term, c.epoch, w); err != nil {
			return fmt.Errorf("journal of disk %s: %w", p.s.cfg.Spec.Disks[n].ID, err)
		}
	}
	return nil
}

// sender puts epochs on the wire, one after the other.
func (pr *pair) sender() {
	for {
		select {
		case c := <-pr.sendQ:
			if err := pr.transmit(c); err != nil {
				if !errors.Is(err, peer.ErrLost) && pr.ctx.Err() == nil {
					pr.p.s.log.Error("send epoch", "epoch", c.epoch, "error", err)
					pr.markLost()
					pr.p.s.post(authority.EvUnprotect{Reason: err.Error()})
				}
				return
			}
		case <-pr.ctx.Done():
			return
		}
	}
}

// transmit sends one epoch whole. Parts are tallied in the order they are sent.
func (pr *pair) transmit(c *captured) error {
	defer c.pages.Release()
	var tally epoch.Tally
	var sent int
	part := func(kind uint8, content ...[]byte) error {
		tally.Add(kind, content...)
		for _, b := range content {
			sent += len(b)
		}
		return pr.sess.Send(pr.ctx, kind, content...)
	}
	if err := pr.sendLastDisk(); err != nil {
		return err
	}
	id := pr.identity()
	flush := uint32(0)
	if c.flush() {
		flush = flagFlush
	}
	begin := beginHeader{Term: uint64(id.Term), Run: packRun(id.Primary), Epoch: uint64(c.epoch), Flags: c.flags | flush}
	if err := pr.sess.Send(pr.ctx, kindEpochBegin, pack(begin)); err != nil {
		return err
	}
	h := endHeader{Term: uint64(id.Term)}
	_, err := pr.enc.Encode(c.pages, func(frame []byte) error {
		h.Frames++
		return part(kindEpochPages, frame)
	})
	if err != nil {
		return fmt.Errorf("encode pages: %w", err)
	}
	for n, w := range c.disks {
		if w == nil || w.Empty() {
			continue
		}
		h.Disks++
		if err := pr.sendDisk(n, w.AppendTo(nil), part); err != nil {
			return err
		}
	}
	if c.flags&flagFinal != 0 {
		for n, f := range c.frames {
			if err := pr.sendFrames(n, f.AppendTo(nil), part); err != nil {
				return err
			}
		}
	}
	if err := part(kindEpochDevices, c.end(h, pr.prevDev)); err != nil {
		return err
	}
	pr.prevDev = c.dev
	pr.mu.Lock()
	err = pr.books.Sent(c.epoch)
	pr.mu.Unlock()
	if err != nil {
		return err
	}
	end := endTally{Term: uint64(id.Term), Run: packRun(id.Primary), Epoch: uint64(c.epoch), Parts: tally.Parts, Bytes: tally.Bytes, Sum: tally.Sum}
	if err := pr.sess.Send(pr.ctx, kindEpochEnd, pack(end)); err != nil {
		return err
	}
	pr.p.s.stats.transferred(sent)
	return nil
}

// sendDisk sends the encoded writes of one disk in messages of at most maxPart.
func (pr *pair) sendDisk(disk int, wire []byte, part func(uint8, ...[]byte) error) error {
	for first := true; first || len(wire) > 0; first = false {
		n := min(len(wire), maxPart)
		head := pack(diskPart{Disk: uint32(disk), More: boolByte(len(wire) > n)})
		if err := part(kindEpochDisk, head, wire[:n]); err != nil {
			return err
		}
		wire = wire[n:]
	}
	return nil
}

// sendFrames sends the held frames of one NIC, for the secondary to release.
func (pr *pair) sendFrames(nic int, wire []byte, part func(uint8, ...[]byte) error) error {
	for first := true; first || len(wire) > 0; first = false {
		n := min(len(wire), maxPart)
		if err := part(kindEpochFrames, pack(diskPart{Disk: uint32(nic), More: boolByte(len(wire) > n)}), wire[:n]); err != nil {
			return err
		}
		wire = wire[n:]
	}
	return nil
}

func boolByte(b bool) uint32 {
	if b {
		return 1
	}
	return 0
}

// committer applies disk writes in place and lets output leave, in order.
func (pr *pair) committer() {
	for {
		a, c, ok := pr.dequeue()
		if !ok {
			select {
			case <-pr.poke:
				continue
			case <-pr.ctx.Done():
				return
			}
		}
		if c == nil {
			continue
		}
		switch a.Kind {
		case epoch.Commit:
			if err := pr.commit(c); err != nil && pr.ctx.Err() == nil && !pr.isLost() {
				pr.p.s.noteDiskFailed(err)
				pr.p.guestEnded("disk: " + err.Error())
				return
			}
		case epoch.Release:
			pr.release(c)
		}
	}
}

// commit applies the disk writes of an epoch that both hosts hold, once.
func (pr *pair) commit(c *captured) error {
	if c.committed {
		return nil
	}
	select {
	case <-c.persisted:
	default:
		// Never before: persist still reads these writes, and what it appends to the
		// journal would be older than what is in place.
		select {
		case <-c.persisted:
		case <-pr.ctx.Done():
			return pr.ctx.Err()
		}
	}
	for n, w := range c.disks {
		if w == nil {
			continue
		}
		if err := pr.p.inst.vols[n].Commit(w); err != nil {
			return fmt.Errorf("disk %s: %w", pr.p.s.cfg.Spec.Disks[n].ID, err)
		}
	}
	c.committed = true
	pr.p.disks.committed(c.epoch)
	return nil
}

// release lets the output of an epoch leave, when the gate is open.
func (pr *pair) release(c *captured) {
	for {
		if pr.p.letGo(c) {
			pr.mu.Lock()
			delete(pr.flights, c.epoch)
			pr.mu.Unlock()
			pr.p.kick()
			return
		}
		t := time.NewTimer(beatInterval)
		select {
		case <-pr.gate:
		case <-t.C:
		case <-pr.ctx.Done():
			t.Stop()
			return
		}
		t.Stop()
	}
}

// letGo writes the output of one epoch if the gate is open.
func (p *primary) letGo(c *captured) bool {
	open, err := p.s.gate.whileOpen(func() error {
		var errs []error
		for n, f := range c.frames {
			if c.flags&flagFinal == 0 { // those of a hand-over leave from the host that goes on
				errs = append(errs, f.Send(p.s.gate.pieced(p.inst.outlets[n])))
			}
		}
		for n, b := range c.ports {
			p.inst.ports()[n].Release(b)
		}
		return errors.Join(errs...)
	})
	if !open {
		return false
	}
	if err != nil && p.ctx.Err() == nil {
		p.s.log.Warn("release output", "epoch", c.epoch, "error", err)
	}
	if c.held > 0 {
		p.s.stats.released(time.Since(c.since))
	}
	close(c.released)
	return true
}

// releaseFrames lets frames by NIC leave.
func (p *primary) releaseFrames(frames []netbuf.Frames) {
	for n, f := range frames {
		for p.ctx.Err() == nil {
			open, err := p.s.gate.whileOpen(func() error { return f.Send(p.s.gate.pieced(p.inst.outlets[n])) })
			if err != nil && p.ctx.Err() == nil {
				p.s.log.Warn("release output", "error", err)
			}
			if open {
				break
			}
			sleep(p.ctx, time.Millisecond)
		}
	}
}

// leave ends the pair's goroutines; what is in flight is settled by commitAlone.
func (pr *pair) leave() {
	pr.mu.Lock()
	pr.left = true
	sess := pr.sess
	pr.mu.Unlock()
	pr.cancel()
	if sess != nil {
		go sess.Close("simplex")
	}
	pr.work.Wait()
}

// commitAlone commits everything that has not left, acknowledged or not, in
// order, after simplex was granted. The guest stands still and the pair's
// goroutines have ended. It returns what is still to be released. After an
// error it may be called again.
func (pr *pair) commitAlone() ([]*captured, error) {
	pr.mu.Lock()
	pr.books.Alone()
	flights := pr.sortedFlights()
	pr.mu.Unlock()
	for _, c := range flights {
		c.pages.Release()
		select {
		case <-c.persisted:
		default:
			if err := pr.p.persistEpoch(c, pr.term, nil); err != nil {
				return nil, err
			}
			close(c.persisted)
		}
		if err := pr.commit(c); err != nil {
			return nil, err
		}
	}
	return flights, nil
}

// sortedFlights lists the epochs whose output has not left, oldest first. mu is held.
func (pr *pair) sortedFlights() []*captured {
	var out []*captured
	for _, n := range slices.Sorted(maps.Keys(pr.flights)) {
		out = append(out, pr.flights[n])
	}
	return out
}

// releaseAlone lets the output of those epochs leave; the guest runs again, its
// new output waits behind.
func (pr *pair) releaseAlone(flights []*captured) {
	for _, c := range flights {
		select {
		case <-c.released:
			continue
		default:
		}
		for !pr.p.letGo(c) && pr.p.ctx.Err() == nil {
			sleep(pr.p.ctx, time.Millisecond)
		}
	}
}

// hangUp ends the session and nothing else.
func (pr *pair) hangUp(reason string) {
	pr.mu.Lock()
	sess := pr.sess
	pr.mu.Unlock()
	if sess != nil {
		sess.Close(reason)
	}
}

func (pr *pair) close(reason string) {
	pr.hangUp(reason)
	pr.cancel()
	pr.work.Wait()
}

// tell sends a word of the authority to the secondary.
func (pr *pair) tell(a authority.ActTell) {
	pr.mu.Lock()
	sess := pr.sess
	if a.Kind == authority.TellDead {
		pr.lastWord = &a
	}
	pr.mu.Unlock()
	if sess == nil {
		return
	}
	tellPeer(sess, a)
}

// tellPeer sends an authority's word; best effort, as the authority expects.
func tellPeer(sess *peer.Session, a authority.ActTell) {
	switch a.Kind {
	case authority.TellDead:
		b := beat{Term: uint64(a.Term), Run: packRun(a.Run)}
		if a.Released {
			b.Epoch = 1
		}
		sess.Urgent(urgentDead, b.encode())
	case authority.TellTerm:
		sess.Urgent(urgentTerm, beat{Term: uint64(a.Term), Run: packRun(a.Run)}.encode())
	case authority.TellSwitchover:
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = sess.Send(ctx, kindHandOver, beat{Term: uint64(a.Term), Run: packRun(a.Run)}.encode())
	}
}

// fillStatus adds what this pair knows; the caller holds primary.mu.
func (pr *pair) fillStatus(st *shimapi.Status) {
	pr.mu.Lock()
	defer pr.mu.Unlock()
	st.Sync = append(st.Sync, pr.progress...)
	if pr.sess == nil {
		return
	}
	for _, l := range pr.sess.Links() {
		st.Links = append(st.Links, shimapi.LinkStatus{Index: l.Index, Up: l.Up, RTTMS: ms(l.RTT), Sent: l.SentBytes, Recv: l.RecvBytes})
	}
}
