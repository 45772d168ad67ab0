package shim

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"perdure/internal/authority"
	"perdure/internal/blockstore"
	"perdure/internal/mirror"
	"perdure/internal/model"
	"perdure/internal/replica"
	"perdure/internal/shimapi"
	"perdure/internal/vfs"
)

// Level ca: a disk of the host that runs the guest fails. The mirror serves it from
// the secondary's replica; the record says so before the first write that only
// the secondary holds is answered (authority.EvReplicaLost, ActCarry). The guest
// notices nothing. When the disk was replaced its replica is filled from the
// secondary while the guest works, and the record says so again.

// problemCarried stands while a disk of this host is carried by the secondary.
const problemCarried = "disk-carried"

// stallLimit is for how long an operation of a local disk may be under way at
// level ca before the disk counts as failed: less than guests wait for theirs.
var stallLimit = 20 * time.Second // tests are in a hurry

// A disk that was given up because it did not answer, and has answered everything
// since, is filled anew by itself: after healAfter, and healEvery at the most.
const (
	healAfter = 30 * time.Second
	healEvery = 10 * time.Minute
)

// diskCarrier is what a primary of level ca knows of its own disks.
type diskCarrier struct {
	p    *primary
	news chan func() // told by the mirror, in order; see mirror.Owner

	mu      sync.Mutex
	why     map[int]error     // by disk: what was lost and is not back
	granted bool              // the record says so
	silent  map[int]time.Time // by disk: when it was last without an answer
	healed  map[int]time.Time // and was last filled because it answered again
	filling map[int]*model.Progress
	begun   map[int]time.Time
	gauges  map[int]*replica.Gauge // of what is filled
	paces   map[int]*governor      // likewise
}

// newCarrier makes p the owner of its instance's mirror.
func newCarrier(p *primary) *diskCarrier {
	c := &diskCarrier{p: p, news: make(chan func(), 64), why: map[int]error{}, filling: map[int]*model.Progress{}, begun: map[int]time.Time{}, gauges: map[int]*replica.Gauge{}, paces: map[int]*governor{},
		silent: map[int]time.Time{}, healed: map[int]time.Time{}}
	p.goWork(func() {
		for {
			select {
			case f := <-c.news:
				f()
			case <-p.ctx.Done():
				return
			}
		}
	})
	p.inst.carrier.Store(c)
	return c
}

// own has the mirror's news go to the carrier, once there is one.
func (i *instance) ownMirror() {
	i.mirror.Own(mirror.Owner{
		Lost: func(n int, err error) bool {
			c := i.carrier.Load()
			return c != nil && c.lost(n, err)
		},
		Back: func() {
			if c := i.carrier.Load(); c != nil {
				c.tell(func() { c.p.s.post(authority.EvReplicaBack{}) })
			}
		},
		Pace: func(ctx context.Context, n int, bytes int64) error {
			c := i.carrier.Load()
			if c == nil {
				return nil
			}
			return c.pace(ctx, n, bytes)
		},
	})
	for n, v := range i.vols {
		v.SetFetch(i.mirror.Export(n).Fetch)
	}
}

func (c *diskCarrier) tell(f func()) {
	select {
	case c.news <- f:
	case <-c.p.ctx.Done():
	}
}

// lost judges an error of a local replica: true where the guest goes on with the
// secondary's. It is called with locks held, see mirror.Owner.
func (c *diskCarrier) lost(n int, err error) bool {
	p := c.p
	p.mu.Lock()
	pr := p.cur
	p.mu.Unlock()
	if pr == nil || pr.isLost() || p.ctx.Err() != nil {
		return false
	}
	if !p.s.isDuplex() {
		// The secondary is not one by the record yet. What it has may be more than is here.
		c.tell(func() { pr.unsound(fmt.Errorf("disk %s of this host failed: %w", p.diskID(n), err)) })
		return false
	}
	c.mu.Lock()
	c.why[n] = err
	c.mu.Unlock()
	c.tell(func() {
		p.s.log.Error("disk lost", "disk", p.diskID(n), "error", err)
		p.s.tl.add(lostEvent(err), 0, 0, "disk %s of this host has failed: %s", p.diskID(n), diskCause(err))
		p.s.post(authority.EvReplicaLost{Reason: fmt.Sprintf("disk %s: %v", p.diskID(n), err)})
		time.AfterFunc(time.Second, c.showProblem) // that the record waits, if it does
	})
	return true
}

func (p *primary) diskID(n int) string { return p.s.cfg.Spec.Disks[n].ID }

// showProblem says which disks are carried, or that none is any more.
func (c *diskCarrier) showProblem() {
	p := c.p
	c.mu.Lock()
	var ids, why []string
	for n := range p.s.cfg.Spec.Disks {
		if err := c.why[n]; err != nil {
			ids = append(ids, p.diskID(n))
			why = append(why, diskCause(err))
		}
	}
	granted := c.granted
	c.mu.Unlock()
	if len(ids) == 0 {
		p.s.tl.solved(problemCarried)
		return
	}
	peer := p.s.peerHost()
	if !granted {
		p.s.tl.problem(model.Problem{Code: problemCarried, Severity: model.Critical,
			Text: fmt.Sprintf("the copy on host %s of disk %s has failed (%s); what the guest writes waits until the cluster has noted that the one of host %s is the only good one",
				p.s.cfg.Host, strings.Join(ids, ", "), strings.Join(why, "; "), peer),
			Action: "none, it takes milliseconds; if it stays so, bring a majority of the voters back"})
		return
	}
	p.s.tl.problem(model.Problem{Code: problemCarried, Severity: model.Critical,
		Text: fmt.Sprintf("the copy on host %s of disk %s has failed (%s); the guest works on the one of host %s, which is the only good one",
			p.s.cfg.Host, strings.Join(ids, ", "), strings.Join(why, "; "), peer),
		Action: fmt.Sprintf("replace the disk of host %s, then: perdure disk replace %s %s --host %s; if host %s is lost before, the VM stops",
			p.s.cfg.Host, p.s.cfg.Spec.Name, ids[0], p.s.cfg.Host, peer)})
}

// peerHost is the other host of the pair.
func (s *Shim) peerHost() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mode.PeerHost
}

// setCarry puts the right to answer for the secondary alone in force, or ends it,
// before it returns.
func (s *Shim) setCarry(on bool) {
	p := s.primary()
	if p == nil || p.carrier == nil {
		return
	}
	p.inst.mirror.Carry(on)
	p.carrier.mu.Lock()
	p.carrier.granted = on
	p.carrier.mu.Unlock()
	if !on {
		return
	}
	p.carrier.showProblem()
	s.tl.add("disk-carried", 0, 0, "the guest goes on with the disks of host %s", s.peerHost())
	for _, n := range p.inst.mirror.Carried() {
		p.carrier.retireStore(n)
	}
}

// retireStore gives up what is left of a replica that failed. Its own metadata
// say so where they still can be written: they may be all that is left one day.
func (c *diskCarrier) retireStore(n int) {
	c.mu.Lock()
	why := c.why[n]
	c.mu.Unlock()
	st := c.p.inst.store(n)
	if why == nil || st.Err() != nil {
		return
	}
	if errors.Is(why, syscall.ETIMEDOUT) {
		st.GiveUp(why) // what is written there would wait for ever
		return
	}
	c.p.s.goWork(func() {
		c.p.s.markMu.Lock()
		defer c.p.s.markMu.Unlock()
		if st.Meta().State == model.UpToDate {
			_ = st.SetMeta(func(m *blockstore.Meta) { m.State = model.Outdated }) // the record counts
		}
		st.GiveUp(why)
	})
}

// recorded notes what the record says of this host's replicas while duplex.
func (c *diskCarrier) recorded(r model.Replica) {
	c.mu.Lock()
	back := r.State == model.UpToDate && len(c.why) > 0 && len(c.p.inst.mirror.Carried()) == 0
	if back {
		clear(c.why)
	}
	c.mu.Unlock()
	if back {
		c.p.s.tl.add("disk-restored", 0, 0, "the disks of this host are whole again: each write goes to both hosts")
		c.showProblem()
	}
}

// dropped notes that the secondary was dropped before anything was carried: the
// errors of this host's disks are the guest's affair.
func (c *diskCarrier) dropped() {
	if len(c.p.inst.mirror.Carried()) > 0 {
		return
	}
	c.mu.Lock()
	clear(c.why)
	c.mu.Unlock()
	c.showProblem()
}

// carries reports whether the secondary holds the only good copy of a disk.
func (p *primary) carries() bool {
	return p.carrier != nil && len(p.inst.mirror.Carried()) > 0
}

// watchDisks gives up disks that do not answer any more.
func (c *diskCarrier) watchDisks() {
	i := c.p.inst
	disks, changing := c.p.s.disksNow()
	if changing {
		return // the numbers of the disks too
	}
	for n, d := range disks {
		i.mu.Lock()
		w, cuts, slots := i.watches[d.ID], i.nbdCuts, i.slots
		i.mu.Unlock()
		if w == nil || n >= len(slots) {
			continue
		}
		c.heal(n, d.ID, w)
		if w.Oldest() < stallLimit || !i.mirror.GiveUp(n, fmt.Errorf("no answer for %v: %w", stallLimit, syscall.ETIMEDOUT)) {
			continue
		}
		slots[n].renew()
		for _, cut := range cuts { // what waits in the kernel waits on: QEMU connects again and asks anew
			select {
			case cut <- struct{}{}:
			default:
			}
		}
	}
}

// standingDisk names a disk of this host in which an operation has been under way for limit; "": none.
func (i *instance) standingDisk(limit time.Duration) string {
	i.mu.Lock()
	defer i.mu.Unlock()
	for id, w := range i.watches {
		if w.Oldest() >= limit {
			return id
		}
	}
	return ""
}

// standingTooLong is how long an operation of a local disk may be under way when somebody
// asks for the second copy to be given up: the disk may be about to fail.
var standingTooLong = 5 * time.Second

// mayLeave refuses to give the second copy up while a disk of this host does not answer.
func (s *Shim) mayLeave() error {
	p := s.primary()
	if p == nil || !s.isDuplex() {
		return nil
	}
	if id := p.inst.standingDisk(standingTooLong); id != "" {
		return fmt.Errorf("disk %s of this host has not answered for more than %v: the copy on host %s may be all that is good; wait until it answers or has failed", id, standingTooLong, s.peerHost())
	}
	return nil
}

// heal has a disk filled anew that did not answer once and does again.
func (c *diskCarrier) heal(n int, id string, w *vfs.Watch) {
	now := time.Now()
	c.mu.Lock()
	due := c.granted && errors.Is(c.why[n], syscall.ETIMEDOUT) && c.filling[n] == nil
	if !due || w.Oldest() > stallLimit/10 {
		c.silent[n] = now
	}
	due = due && now.Sub(c.silent[n]) > healAfter && now.Sub(c.healed[n]) > healEvery
	if due {
		c.healed[n] = now
	}
	c.mu.Unlock()
	if !due {
		return
	}
	c.p.goWork(func() {
		c.p.s.tl.add("disk-answers", 0, 0, "disk %s of this host answers again", id)
		if _, err := c.p.replaceDisk(id); err != nil && c.p.ctx.Err() == nil {
			c.p.s.tl.add("disk-fill-failed", 0, 0, "disk %s could not be made anew: %v", id, err)
		}
	})
}

// nbdCut is what ends the connections of one more server of disks.
func (i *instance) nbdCut() <-chan struct{} {
	cut := make(chan struct{}, 1)
	i.mu.Lock()
	i.nbdCuts = append(i.nbdCuts, cut)
	i.mu.Unlock()
	return cut
}

// store is the replica of disk n now.
func (i *instance) store(n int) *blockstore.Store {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.stores[n]
}

// storeList is all of them.
func (i *instance) storeList() []*blockstore.Store {
	i.mu.Lock()
	defer i.mu.Unlock()
	return append([]*blockstore.Store(nil), i.stores...)
}

// diskFS is the file system under the replica of a disk, watched: for level ca, which the VM may come to have.
func (i *instance) diskFS(id string) vfs.FS {
	fsys, _ := storageOf(i.cfg)
	w := vfs.NewWatch(fsys, bootNow)
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.watches == nil {
		i.watches = map[string]*vfs.Watch{}
	}
	i.watches[id] = w
	return w
}

// replaceDisk makes the replica of a carried disk anew and fills it from the
// secondary. It returns when the new one is open; the rest is told by events.
func (p *primary) replaceDisk(value string) (string, error) {
	at, err := shimapi.ParseReplaceDisk(value)
	if err != nil {
		return "", err
	}
	id, n := at.Disk, -1
	for k, d := range p.s.cfg.Spec.Disks {
		if d.ID == id {
			n = k
		}
	}
	c := p.carrier
	switch {
	case n < 0:
		return "", fmt.Errorf("VM %q has no disk %q", p.s.cfg.Spec.Name, id)
	case c == nil:
		return "", fmt.Errorf("at level %s the host that runs the VM has good disks, or it does not run there: replace the disk of the other host", p.s.cfg.Spec.Level)
	}
	c.mu.Lock()
	why, busy, granted := c.why[n], c.filling[n] != nil, c.granted
	if why != nil && !busy && granted {
		c.filling[n], c.begun[n] = &model.Progress{What: "disk " + id, Total: p.s.cfg.Spec.Disks[n].Size, ETASeconds: -1}, time.Now()
		c.gauges[n] = replica.NewGauge(0, c.filling[n].Total)
	}
	c.mu.Unlock()
	switch {
	case why == nil:
		return "", fmt.Errorf("the replica of disk %s on host %s is good: there is nothing to replace", id, p.s.cfg.Host)
	case busy:
		return "", fmt.Errorf("disk %s is being filled already", id)
	case !granted:
		// Until then it may be all that is left of what was written.
		return "", fmt.Errorf("the cluster has not noted yet that the replica of disk %s on host %s has failed: bring a majority of the voters back first", id, p.s.cfg.Host)
	}
	st, err := c.freshStore(n, at)
	if err != nil {
		c.endFilling(n)
		return "", err
	}
	p.s.tl.add("disk-filling", 0, 0, "the new disk %s is filled from host %s", id, p.s.peerHost())
	p.goWork(func() { c.refill(n, st) })
	return fmt.Sprintf("filling disk %s from host %s", id, p.s.peerHost()), nil
}

func (c *diskCarrier) endFilling(n int) {
	c.mu.Lock()
	delete(c.filling, n)
	c.mu.Unlock()
}

// freshStore takes away what is left of a failed replica and makes an empty one,
// which says that it is Inconsistent until it is filled. Without a place it is made where the old one was.
func (c *diskCarrier) freshStore(n int, at shimapi.ReplaceDisk) (_ *blockstore.Store, err error) {
	p, i := c.p, c.p.inst
	d, dir := p.s.cfg.Spec.Disks[n], filepath.Join(p.s.cfg.Dir, shimapi.DiskDir)
	old := i.store(n)
	old.GiveUp(errors.New("it is replaced"))
	closed := make(chan struct{})
	go func() { _ = old.Close(); close(closed) }() // a device that does not answer is not waited for
	answers := false
	select {
	case <-closed:
		answers = true
	case <-time.After(2 * time.Second):
	}
	if m := old.Meta(); at.Path == "" {
		at.Path, at.Device = m.Image, m.Device
	}
	fsys, opts := storageOf(i.cfg)
	drop := blockstore.Remove
	if !answers {
		drop = blockstore.Abandon
	}
	params := blockstore.Params{ID: d.ID, VM: p.s.cfg.Spec.UUID, Size: d.Size, State: model.Inconsistent}
	if at.Path != "" && at.Path != model.StatePlace {
		params.Image, params.Device, params.Host = at.Path, at.Device, p.s.cfg.Host
	}
	if err := drop(fsys, dir, d.ID); err != nil {
		return nil, err
	}
	err = blockstore.Create(fsys, dir, params)
	if err != nil {
		return nil, err
	}
	st, err := blockstore.Open(i.diskFS(d.ID), dir, d.ID, opts) // the old one's is not watched any more
	if err != nil {
		return nil, err
	}
	i.mu.Lock()
	i.fresh = append(i.fresh, st)
	i.mu.Unlock()
	if _, err := st.Replay(); err != nil {
		return nil, err
	}
	return st, nil
}

// refill copies the disk from the secondary, and makes the new replica this host's.
func (c *diskCarrier) refill(n int, st *blockstore.Store) {
	p, id := c.p, c.p.diskID(n)
	defer c.endFilling(n)
	v := blockstore.NewVolume(st, blockstore.VolumeOptions{})
	begun := time.Now()
	var err error
	if st.Meta().Image != "" {
		err = st.Wipe() // a device keeps what it held
	}
	if err == nil {
		err = c.beginRefill(n, st)
	}
	if err == nil {
		defer c.paced(n)()
		err = p.inst.mirror.Refill(p.ctx, n, v, func(done int64) { c.progress(n, done) }, func() error { return c.adopt(n, st, v) })
	}
	if err == nil {
		p.s.tl.add("disk-filled", 0, time.Since(begun), "disk %s is whole again on this host", id)
		return
	}
	if p.ctx.Err() != nil {
		return
	}
	p.s.tl.add("disk-fill-failed", 0, time.Since(begun), "disk %s could not be filled: %v", id, err)
	c.mu.Lock()
	c.why[n] = fmt.Errorf("the new one could not be filled: %w", err)
	c.mu.Unlock()
	st.GiveUp(err)
	if p.inst.store(n) == st { // it failed in the moment in which it was adopted
		go p.inst.closers.at(n)()
	} else {
		p.inst.notFresh(st)
		go func() { _ = st.Close() }() // its space is needed, and it may hang
	}
	c.showProblem()
}

// beginRefill notes, durably, which line the data belongs to that the new replica is
// about to get. It stays Inconsistent. Is the filling interrupted, the guest goes on
// on the other host, and this replica becomes the target of a resync from there: what it
// says then is not believed, but it is a reason to compare digests of everything
// instead of making it empty, so that only what is missing is sent.
func (c *diskCarrier) beginRefill(n int, st *blockstore.Store) error {
	d := c.p.disks
	d.mu.Lock()
	line := d.list[n].m.Copy().Current // the secondary's too
	d.mu.Unlock()
	c.p.inst.point("refill.begin")
	err := st.SetMeta(refilled(line))
	if err != nil {
		return fmt.Errorf("begin to fill disk %s: %w", c.p.diskID(n), err)
	}
	return nil
}

// refilled is what the metadata of a replica say that is filled with data of a line.
func refilled(line replica.Generation) func(*blockstore.Meta) {
	return func(m *blockstore.Meta) {
		m.State, m.Lineage = model.Inconsistent, replica.Lineage{Current: line, Toward: line}
	}
}

// paced makes the filling of a disk yield to the guest's requests, until the
// function that it returns is called.
func (c *diskCarrier) paced(n int) (end func()) {
	g := newGovernor(c.p.inst.latency, 0, 0)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.paces[n] = g
	return func() {
		g.close()
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.paces, n)
	}
}

// pace waits until a filling may go on by a piece of so many bytes.
func (c *diskCarrier) pace(ctx context.Context, n int, bytes int64) error {
	c.mu.Lock()
	g := c.paces[n]
	c.mu.Unlock()
	return g.wait(ctx, bytes)
}

// adopt makes a filled replica good for use, durably, and this instance's own.
// Nothing changes on the disk meanwhile. The record is asked afterwards: until it
// says so nobody starts from this replica.
func (c *diskCarrier) adopt(n int, st *blockstore.Store, v *blockstore.Volume) error {
	p, i := c.p, c.p.inst
	p.s.mu.Lock()
	term, branch, run := p.s.mode.Term, p.s.record.Record.Branch, p.s.mode.Run
	p.s.mu.Unlock()
	p.disks.mu.Lock()
	defer p.disks.mu.Unlock()
	k := &p.disks.list[n]
	lineage := k.m.Copy().Lineage // as the secondary's: they hold the same
	err := st.SetMeta(func(m *blockstore.Meta) {
		m.State, m.Term, m.Branch, m.Run, m.Lineage = model.UpToDate, term, branch, run, lineage
	})
	if err != nil {
		return fmt.Errorf("mark disk %s: %w", p.diskID(n), err)
	}
	v.SetFetch(i.mirror.Export(n).Fetch)
	p.watchRepairs(n, st)
	k.store = st
	i.mu.Lock()
	i.stores[n], i.vols[n] = st, v
	i.mu.Unlock()
	i.closers.set(n, func() { st.Close() }) // the old one is being closed, or stands still
	i.notFresh(st)
	return nil
}

func (c *diskCarrier) progress(n int, done int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if f := c.filling[n]; f != nil {
		f.Done = max(f.Done, done)
		g := c.gauges[n]
		g.At(time.Since(c.begun[n]), f.Total-f.Done)
		f.ETASeconds, f.Rate = g.ETA(), g.Rate()
	}
}

// fillStatus adds what is being filled.
func (c *diskCarrier) fillStatus(st *shimapi.Status) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for n := range c.p.s.cfg.Spec.Disks {
		if f := c.filling[n]; f != nil {
			st.Sync = append(st.Sync, *f)
		}
	}
}

// notFresh notes that a new replica is somebody else's to close.
func (i *instance) notFresh(st *blockstore.Store) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.fresh = slices.DeleteFunc(i.fresh, func(f *blockstore.Store) bool { return f == st })
}

// closeFresh closes the replicas that were still being filled; the guest's requests end
// with the mirror, which closes before.
func (i *instance) closeFresh() {
	i.mu.Lock()
	fresh := i.fresh
	i.fresh = nil
	i.mu.Unlock()
	for _, st := range fresh {
		_ = st.Close() // one that failed has said so
	}
}

// giveUpPair ends a pair that is not sound: the secondary is dropped; where it
// holds the only good copy of a disk, this side ends, and the VM goes on there.
func (pr *pair) giveUpPair(reason string) {
	if pr.p.carries() {
		pr.p.guestEnded("the pair is given up (" + reason + ") while the disks of this host have failed")
		return
	}
	pr.p.s.post(authority.EvUnprotect{Reason: reason})
}

// doDisk carries out an operation on a disk of this host.
func (s *Shim) doDisk(op shimapi.Op) (string, error) {
	p := s.primary()
	if p == nil {
		return "", errNotRunning
	}
	return p.replaceDisk(op.Value)
}
