package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"perdure/internal/blockstore"
	"perdure/internal/model"
	"perdure/internal/nbd"
	"perdure/internal/qemu"
	"perdure/internal/replica"
	"perdure/internal/shimapi"
	"perdure/internal/vfs"
)

// The disks of a running guest are changed while it runs alone, when all that
// happens to a disk happens on this host. What they shall be is the specification's
// matter, which the agent changes in the cluster store; see docs/disks.md for the order.
// The shim is only told the list and makes the guest's disks so. The list that it
// says it has (Status.Disks) is what QEMU has, and the pair is not filled before both agree:
// the two sides compare their machines when they meet (machineDigest).

// unplugLimit is how long a guest may take to let go of a disk. It is below what
// the agent waits for the whole operation.
const unplugLimit = 20 * time.Second

// leftLimit is how long the leaving of a pair that the record has ended may take.
const leftLimit = 5 * time.Second

// hotStopLimit is how long the end of a disk's server is waited for: longer than its
// grace (nbd.Options), after which only what the kernel holds is left.
const hotStopLimit = 5 * time.Second

var errDisksChange = errors.New(shimapi.DisksChanging)

// hotDisk is what a disk has that was given to the running guest: a server of its own.
type hotDisk struct {
	socket string
	stop   func()
}

// hotDisks are the servers of such disks, by disk. Safe for concurrent use.
type hotDisks struct {
	mu   sync.Mutex
	by   map[string]hotDisk
	made int // names sockets
}

// serveHot offers b on a socket of its own.
func (i *instance) serveHot(id string, b nbd.Backend) (hotDisk, error) {
	i.hot.mu.Lock()
	i.hot.made++
	h := hotDisk{socket: filepath.Join(i.cfg.Dir, fmt.Sprintf("nbd-%d.sock", i.hot.made))}
	i.hot.mu.Unlock()
	ln, err := listenUnix(h.socket)
	if err != nil {
		return h, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	cut := i.nbdCut()
	go func() {
		defer close(done)
		if err := nbd.Serve(ctx, ln, map[string]nbd.Backend{id: b}, nbd.Options{Took: i.latency.took, Cut: cut}); err != nil && ctx.Err() == nil {
			i.log.Error("disk server ended", "disk", id, "error", err)
		}
	}()
	h.stop = sync.OnceFunc(func() {
		cancel()
		ln.Close()
		select {
		case <-done:
		case <-time.After(hotStopLimit): // a request stands in a device that does not answer
			i.log.Error("requests to a disk do not end", "disk", id)
		}
	})
	return h, nil
}

// setHot notes the server of a disk and ends the one before; nil ends it only.
func (i *instance) setHot(id string, h *hotDisk) {
	i.hot.mu.Lock()
	old, had := i.hot.by[id]
	delete(i.hot.by, id)
	if h != nil {
		if i.hot.by == nil {
			i.hot.by = map[string]hotDisk{}
		}
		i.hot.by[id] = *h
	}
	i.hot.mu.Unlock()
	if had {
		old.stop()
	}
}

// close ends all of them.
func (d *hotDisks) close() {
	d.mu.Lock()
	by := d.by
	d.by = nil
	d.mu.Unlock()
	for _, h := range by {
		h.stop()
	}
}

// storeClosers close the replicas that the disks were opened with, by disk, each
// once. Safe for concurrent use.
type storeClosers struct {
	mu   sync.Mutex
	list []func()
}

func (c *storeClosers) add(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.list = append(c.list, sync.OnceFunc(f))
}

func (c *storeClosers) at(n int) func() {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.list[n]
}

func (c *storeClosers) set(n int, f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.list[n] = sync.OnceFunc(f)
}

func (c *storeClosers) drop(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.list = without(c.list, n)
}

func (c *storeClosers) close() {
	c.mu.Lock()
	list := c.list
	c.mu.Unlock()
	for _, f := range list {
		f()
	}
}

// socketOf is where QEMU finds a disk.
func (i *instance) socketOf(id string) string {
	i.hot.mu.Lock()
	defer i.hot.mu.Unlock()
	if h, ok := i.hot.by[id]; ok {
		return h.socket
	}
	return i.nbdPath()
}

// diskStatus lists the disks that the guest has, as QEMU has them.
func (s *Shim) diskStatus() []shimapi.DiskStatus {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.inst == nil || s.prim == nil {
		return nil
	}
	out := []shimapi.DiskStatus{}
	stores := s.inst.storeList()
	for n, d := range model.PinSlots(s.cfg.Spec.Disks) {
		if n >= len(stores) {
			break
		}
		st := stores[n]
		out = append(out, shimapi.DiskStatus{DiskSpec: d, Missing: min(st.MissingCount()*blockstore.ChunkSize, st.Size())})
	}
	return out
}

// disksNow returns the disks of the guest and whether they are being changed.
func (s *Shim) disksNow() (list []model.DiskSpec, changing bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return model.PinSlots(s.cfg.Spec.Disks), s.changing
}

// setDisks makes the disks of the running guest what the agent says. Some of it may
// have been done when it returns an error: Status.Disks tells.
func (s *Shim) setDisks(ctx context.Context, value string) (string, error) {
	var want shimapi.SetDisks
	if err := json.Unmarshal([]byte(value), &want); err != nil {
		return "", fmt.Errorf("list of disks: %w", err)
	}
	p := s.primary()
	if p == nil {
		return "", errNotRunning
	}
	if err := s.holdDisks(); err != nil {
		return "", err
	}
	defer s.releaseDisks()
	if s.verify != nil {
		if err := s.verify.yield(ctx); err != nil {
			return "", err
		}
	}
	// The record may say so a moment before the pair is left here.
	for end := time.Now().Add(leftLimit); ; {
		err := p.aloneNow(ctx)
		if err == nil {
			break
		}
		if ctx.Err() != nil || p.ctx.Err() != nil || time.Now().After(end) {
			return "", err
		}
		sleep(ctx, 50*time.Millisecond)
	}
	// Who asks may go away: once begun it goes to its end, since nobody could go on with half a disk.
	ctx = context.WithoutCancel(ctx)
	have, _ := s.disksNow()
	steps, err := diskSteps(have, want.Disks)
	if err != nil {
		return "", err
	}
	for _, step := range steps {
		began := time.Now()
		what, err := p.carryOut(ctx, step)
		if err != nil {
			return "", err
		}
		s.tl.add("disk-"+string(step.kind), 0, time.Since(began), "%s", what)
	}
	return fmt.Sprintf("%d changes", len(steps)), nil
}

// holdDisks has the caller alone change the disks of the guest, until releaseDisks. No
// pair is filled meanwhile, and no level changed.
func (s *Shim) holdDisks() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.changing:
		return errDisksChange
	case !s.change.over(): // which builds another QEMU for the disks as they were
		return errLevelChanges
	}
	s.changing = true
	return nil
}

func (s *Shim) releaseDisks() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.changing = false
}

// aloneNow refuses while a second copy is there or being made.
func (p *primary) aloneNow(ctx context.Context) error {
	return p.ask(ctx, func() error {
		p.s.mu.Lock()
		mode := p.s.mode.Mode
		p.s.mu.Unlock()
		if p.pair != nil || p.held || p.mirrored || p.carries() || mode != model.ModeSimplex {
			return fmt.Errorf("the VM is %s: its disks are changed while it runs without a second copy only", mode)
		}
		if p.isOff() {
			return errors.New("the guest is powering off")
		}
		return nil
	})
}

func (p *primary) isOff() bool { return p.standing == standsOff || p.standing == standsFinal }

type diskStepKind string

const (
	diskAdd    diskStepKind = "added"
	diskRemove diskStepKind = "removed"
	diskGrow   diskStepKind = "resized"
)

type diskStep struct {
	kind diskStepKind
	d    model.DiskSpec
}

// diskSteps is what leads from one list of disks to another: first what goes, so
// that its slot is free, then what grows, then what comes.
func diskSteps(have, want []model.DiskSpec) ([]diskStep, error) {
	have, want = model.PinSlots(have), model.PinSlots(want)
	find := func(l []model.DiskSpec, id string) int {
		return slices.IndexFunc(l, func(d model.DiskSpec) bool { return d.ID == id })
	}
	var steps []diskStep
	for _, d := range have {
		if find(want, d.ID) < 0 {
			steps = append(steps, diskStep{diskRemove, d})
		}
	}
	last, fresh := -1, false
	for n, d := range want {
		if find(want, d.ID) != n {
			return nil, fmt.Errorf("disk %s is listed twice", d.ID)
		}
		at := find(have, d.ID)
		if at < 0 {
			fresh = true
			continue
		}
		switch h := have[at]; {
		case fresh || at < last:
			return nil, fmt.Errorf("disk %s changes its place in the list", d.ID)
		case h.Slot != d.Slot:
			return nil, fmt.Errorf("disk %s is at slot %#x, and was to be at %#x: a running guest's disk does not move", d.ID, h.Slot, d.Slot)
		case d.Size < h.Size:
			return nil, fmt.Errorf("disk %s has %d bytes and does not become smaller (%d)", d.ID, h.Size, d.Size)
		case d.Size > h.Size:
			steps = append(steps, diskStep{diskGrow, d})
		}
		last = at
	}
	for _, d := range want {
		if find(have, d.ID) < 0 {
			steps = append(steps, diskStep{diskAdd, d})
		}
	}
	return steps, nil
}

func (p *primary) carryOut(ctx context.Context, step diskStep) (string, error) {
	d := step.d
	switch step.kind {
	case diskRemove:
		return fmt.Sprintf("disk %s was taken from the running guest", d.ID), p.unplug(ctx, d.ID)
	case diskGrow:
		return fmt.Sprintf("disk %s has %d bytes now", d.ID, d.Size), p.growDisk(ctx, d)
	}
	return fmt.Sprintf("disk %s was given to the running guest at slot %#x", d.ID, d.Slot), p.plug(ctx, d)
}

// openReplica opens this host's replica of a disk, whole and of the size that the
// disk has.
func (p *primary) openReplica(d model.DiskSpec) (*blockstore.Store, error) {
	_, opts := storageOf(p.inst.cfg)
	st, err := blockstore.Open(p.inst.diskFS(d.ID), filepath.Join(p.inst.cfg.Dir, shimapi.DiskDir), d.ID, opts)
	if err != nil {
		return nil, fmt.Errorf("disk %s: %w", d.ID, err)
	}
	if _, err = st.Replay(); err == nil {
		switch m := st.Meta(); {
		case m.VM != p.s.cfg.Spec.UUID:
			err = fmt.Errorf("it belongs to another VM (%s)", m.VM)
		case m.State == model.Inconsistent:
			err = errors.New("it is Inconsistent")
		case m.Size != d.Size:
			err = fmt.Errorf("it has %d bytes, the disk %d", m.Size, d.Size)
		}
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("replica of disk %s: %w", d.ID, err), st.Close())
	}
	return st, nil
}

// plug gives the running guest a disk whose replica is there, whole.
func (p *primary) plug(ctx context.Context, d model.DiskSpec) (err error) {
	i, s := p.inst, p.s
	m := i.machine(false)
	if err := m.CanHotplug(); err != nil {
		return err
	}
	if i.cfg.Spec.Level == model.LevelCA && i.mirror == nil {
		return errors.New("a VM of level ca that was started without a disk takes none while it runs")
	}
	st, err := p.openReplica(d)
	if err != nil {
		return err
	}
	closeStore := sync.OnceFunc(func() { st.Close() })
	var undo []func()
	defer func() {
		if err == nil {
			return
		}
		for n := len(undo) - 1; n >= 0; n-- {
			undo[n]()
		}
	}()
	undo = append(undo, closeStore)
	s.mu.Lock()
	term, branch, run := s.mode.Term, s.record.Record.Branch, s.mode.Run
	s.mu.Unlock()
	clean := st.Meta().Clean
	if err := st.SetMeta(func(m *blockstore.Meta) { m.State, m.Term, m.Branch, m.Run = model.UpToDate, term, branch, run }); err != nil {
		return fmt.Errorf("mark disk %s: %w", d.ID, err)
	}
	k, err := p.disks.openDisk(st, clean)
	if err != nil {
		return err
	}
	v := blockstore.NewVolume(st, blockstore.VolumeOptions{})
	var b servedDisk = v
	if i.mirror != nil {
		e, err := i.mirror.Add(v)
		if err != nil {
			return err
		}
		b = e
		v.SetFetch(e.Fetch)
		undo = append(undo, func() { i.mirror.Remove(len(i.vols), func() {}) }) //nolint:errcheck // it was the last, and there is no peer
	}
	slot := newSlot(b)
	h, err := i.serveHot(d.ID, slot)
	if err != nil {
		return err
	}
	undo = append(undo, h.stop)
	qctx, cancel := context.WithTimeout(ctx, qmpTimeout)
	defer cancel()
	if err := i.qmp.PlugDisk(qctx, &m, qemu.Disk{ID: d.ID, Export: d.ID, Socket: h.socket, Slot: d.Slot, BootIndex: d.Slot - model.FirstDiskSlot + 1}); err != nil {
		return err
	}
	// The guest has it: from here on nothing fails.
	i.setHot(d.ID, &h)
	p.swapDisks(func() {
		i.stores, i.clean, i.vols = append(slices.Clone(i.stores), st), append(slices.Clone(i.clean), clean), append(slices.Clone(i.vols), v)
		i.slots = append(slices.Clone(i.slots), slot)
		i.closers.add(closeStore)
		p.disks.list = append(p.disks.list, k)
		s.cfg.Spec.Disks = append(model.PinSlots(s.cfg.Spec.Disks), d)
		i.cfg.Spec.Disks = s.cfg.Spec.Disks
	})
	p.watchRepairs(len(i.vols)-1, st)
	p.forward(v.Full())
	return nil
}

// swapDisks changes the lists of disks for all who read them. No pair is there: its
// goroutines, which number the disks, are not. f waits for nothing.
//
// The order of the locks: disks.mu is held by machines that look at what s.mu guards, and
// without s.mu the gate is not renewed.
func (p *primary) swapDisks(f func()) {
	p.s.markMu.Lock()
	defer p.s.markMu.Unlock()
	p.disks.mu.Lock()
	defer p.disks.mu.Unlock()
	p.s.mu.Lock()
	defer p.s.mu.Unlock()
	p.inst.mu.Lock()
	defer p.inst.mu.Unlock()
	f()
}

// openDisk makes the machine of one more replica, with a line of this host's own: the
// record grants it to who runs alone.
func (d *disks) openDisk(st *blockstore.Store, clean bool) (disk, error) {
	k := disk{store: st, m: replica.New(), unclean: !clean}
	c := copyOf(st.Meta())
	c.Clean = clean
	k.m.Step(replica.EvOpen{Copy: c})
	queue := []replica.Event{replica.EvGrant{Kind: replica.GrantAlone, Line: d.line()}}
	for ; len(queue) > 0; queue = queue[1:] {
		for _, a := range k.m.Step(queue[0]) {
			switch a := a.(type) {
			case replica.ActPersist:
				if err := d.persist(&k, a); err != nil {
					return k, fmt.Errorf("disk %s: %w", c.Disk, err)
				}
				queue = append(queue, replica.EvPersisted{})
			case replica.ActAlarm:
				return k, fmt.Errorf("disk %s: %s", c.Disk, a.Text)
			}
		}
	}
	if k.m.Rule() != replica.RuleAlone {
		return k, fmt.Errorf("disk %s is not to be written: %s", c.Disk, k.m.Phase())
	}
	return k, nil
}

// unplug takes a disk from the running guest. A guest that does not let go keeps it.
func (p *primary) unplug(ctx context.Context, id string) error {
	m := p.inst.machine(false)
	ctx, cancel := context.WithTimeout(ctx, unplugLimit+qmpTimeout)
	defer cancel()
	err := p.inst.qmp.UnplugDisk(ctx, &m, id, unplugLimit)
	if errors.Is(err, qemu.ErrNotReleased) {
		return fmt.Errorf("%w; unmount it in the guest, and see that the guest takes part in hot-plug (ACPI), or stop the VM", err)
	}
	if err != nil {
		return err
	}
	return p.dropDisk(id)
}

// dropDisk ends the serving of a disk that the guest has no more. The caller alone changes the disks.
func (p *primary) dropDisk(id string) error {
	i, s := p.inst, p.s
	s.mu.Lock()
	n := slices.IndexFunc(s.cfg.Spec.Disks, func(d model.DiskSpec) bool { return d.ID == id })
	s.mu.Unlock()
	if n < 0 {
		return nil
	}
	var closeStore func()
	drop := func() {
		p.swapDisks(func() {
			closeStore = i.closers.at(n)
			delete(i.watches, id)
			i.stores, i.clean, i.vols = without(i.stores, n), without(i.clean, n), without(i.vols, n)
			i.slots, p.disks.list = without(i.slots, n), without(p.disks.list, n)
			i.closers.drop(n)
			s.cfg.Spec.Disks = without(model.PinSlots(s.cfg.Spec.Disks), n)
			i.cfg.Spec.Disks = s.cfg.Spec.Disks
		})
	}
	if i.mirror == nil {
		drop()
	} else if err := i.mirror.Remove(n, drop); err != nil {
		return err
	}
	i.setHot(id, nil)
	closeStore()
	return nil
}

func without[T any](l []T, n int) []T { return slices.Delete(slices.Clone(l), n, n+1) }

// guestLetGo handles a disk of which QEMU says that the guest has let go. Where it
// was asked to, who asked does the rest. The guest may be late, though, or have thrown it
// out by itself: then what QEMU has is not what the specification says, and the agent
// gives it the disk again.
func (p *primary) guestLetGo(id string) {
	if id == "" {
		return
	}
	if p.pair != nil {
		// The other side's device is still there: no state fits to it any more.
		p.pair.unsound(fmt.Errorf("the guest has thrown out disk %s", id))
	}
	p.s.goWork(func() { p.s.takeOut(id) })
}

// takeOut drops a disk that the guest has let go of, as soon as the VM is alone and nothing
// else is done with its disks. Whoever asked the guest for it has done so by then.
func (s *Shim) takeOut(id string) {
	for ; s.ctx.Err() == nil; sleep(s.ctx, 100*time.Millisecond) {
		p := s.primary() // a change of level makes another one
		if p == nil {
			return
		}
		if s.holdDisks() != nil {
			continue
		}
		if done := p.takeOutNow(id); done {
			s.releaseDisks()
			return
		}
		s.releaseDisks()
	}
}

// takeOutNow reports whether nothing is left to do. The caller alone changes the disks.
func (p *primary) takeOutNow(id string) bool {
	s := p.s
	if disks, _ := s.disksNow(); !slices.ContainsFunc(disks, func(d model.DiskSpec) bool { return d.ID == id }) {
		return true
	}
	ctx, cancel := context.WithTimeout(p.ctx, qmpTimeout)
	defer cancel()
	if p.aloneNow(ctx) != nil {
		return false
	}
	if gone, err := p.inst.qmp.Unplugged(ctx, id); err != nil || !gone {
		return err == nil // it was given again
	}
	if s.verify != nil && s.verify.yield(ctx) != nil {
		return false
	}
	err := p.inst.qmp.DropDisk(ctx, id)
	if err == nil {
		err = p.dropDisk(id)
	}
	s.tl.add("disk-let-go", 0, 0, "the guest has let go of disk %s by itself", id)
	if err != nil && p.ctx.Err() == nil {
		s.log.Error("drop a disk that the guest has let go of", "disk", id, "error", err)
	}
	return true
}

// growDisk makes a disk of the running guest larger. The guest stands still while the
// replica is closed, made larger and opened again.
func (p *primary) growDisk(ctx context.Context, d model.DiskSpec) error {
	s := p.s
	s.mu.Lock()
	n := slices.IndexFunc(s.cfg.Spec.Disks, func(x model.DiskSpec) bool { return x.ID == d.ID })
	var st *blockstore.Store
	if n >= 0 {
		st = p.inst.store(n)
	}
	s.mu.Unlock()
	if st == nil {
		return fmt.Errorf("there is no disk %s", d.ID)
	}
	if err := st.Flush(); err != nil { // while nobody waits for it
		return fmt.Errorf("flush disk %s: %w", d.ID, err)
	}
	return p.ask(ctx, func() error {
		stopped, err := p.stop()
		if err != nil {
			return err
		}
		err = p.exchange(n, d)
		if p.ctx.Err() == nil && stopped.WasRunning {
			err = errors.Join(err, p.resume())
		}
		return err
	})
}

// exchange is growDisk while the guest stands still. Where the replica cannot be made
// larger it is opened again as it was. If even that fails there is no disk any more, and the
// instance ends.
func (p *primary) exchange(n int, d model.DiskSpec) error {
	i, s := p.inst, p.s
	dir := filepath.Join(i.cfg.Dir, shimapi.DiskDir)
	now := s.cfg.Spec.Disks[n]
	i.closers.at(n)()
	grown := blockstore.Grow(vfs.OS{}, dir, d.ID, d.Size)
	if grown == nil {
		now.Size = d.Size
	}
	back := func() error {
		st, err := p.openReplica(now)
		if err != nil && grown != nil { // it may have become larger all the same
			now.Size = d.Size
			st, err = p.openReplica(now)
		}
		if err != nil {
			return err
		}
		st.Detach()
		v := blockstore.NewVolume(st, blockstore.VolumeOptions{})
		var b servedDisk = v
		if i.mirror != nil {
			e, err := i.mirror.Replace(n, v)
			if err != nil {
				return errors.Join(err, st.Close())
			}
			b = e
			v.SetFetch(e.Fetch)
		}
		slot := newSlot(b)
		h, err := i.serveHot(d.ID, slot)
		if err != nil {
			return errors.Join(err, st.Close())
		}
		ctx, cancel := context.WithTimeout(p.ctx, qmpTimeout)
		defer cancel()
		if err := i.qmp.SwapDisk(ctx, qemu.Disk{ID: d.ID, Export: d.ID, Socket: h.socket}, now.Size); err != nil {
			h.stop()
			return errors.Join(err, st.Close())
		}
		i.setHot(d.ID, &h)
		p.swapDisks(func() {
			i.stores, i.vols, i.slots = slices.Clone(i.stores), slices.Clone(i.vols), slices.Clone(i.slots)
			i.stores[n], i.vols[n], i.slots[n] = st, v, slot
			i.closers.set(n, func() { st.Close() })
			k := &p.disks.list[n]
			k.store = st
			k.m.Resized(now.Size)
			s.cfg.Spec.Disks = model.PinSlots(s.cfg.Spec.Disks)
			s.cfg.Spec.Disks[n].Size = now.Size
			i.cfg.Spec.Disks = s.cfg.Spec.Disks
		})
		p.watchRepairs(n, st)
		p.forward(v.Full())
		return nil
	}
	if err := back(); err != nil {
		p.guestEnded(fmt.Sprintf("disk %s cannot be opened again after it was made larger: %v", d.ID, err))
		return errors.Join(grown, err)
	}
	return grown
}
