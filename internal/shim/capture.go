package shim

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"time"

	"perdure/internal/blockstore"
	"perdure/internal/guestmem"
	"perdure/internal/model"
	"perdure/internal/netbuf"
	"perdure/internal/qemu"
)

// captured is one epoch as the primary holds it until its output has left.
type captured struct {
	epoch   model.Epoch
	flags   uint32
	at      time.Time // when the guest was stopped
	done    time.Time // when it went on
	dev     []byte
	pages   *guestmem.PageSet
	disks   []*blockstore.EpochWrites // by disk, nil entries: nothing written
	frames  []netbuf.Frames           // by NIC
	input   [][]byte                  // by NIC: frames that the guest got since the epoch before
	ports   [][]byte                  // by character device
	audit   []pageHash
	since   time.Time // when the oldest output in it came
	held    int64
	guestNS int64

	phase phases
	mark  time.Time // end of the last phase

	acked     time.Time // when the secondary's acknowledgement came; guarded by pair.mu
	committed bool      // its disk writes are applied in place; one goroutine at a time

	persisted chan struct{} // closed when its disk writes are in the local journal, durable as far as flushed
	released  chan struct{} // closed when its output has left
}

// phases says where the pause went.
type phases struct{ stop, save, flush, rest, cont time.Duration }

// pageHash is one audited page.
type pageHash struct {
	Page uint64
	Hash uint64
}

// Audited pages: some that changed, some from anywhere, of every so many epochs.
const (
	auditEvery   = 8
	auditChanged = 4
	auditRandom  = 4
)

// preFlushPages is how many dirty pages the last epoch had for an extra flush
// before the next stop to pay: below, the flush costs more than it saves.
const preFlushPages = 300

// flush reports whether a disk write of this epoch was promised to be durable.
func (c *captured) flush() bool {
	for _, w := range c.disks {
		if w != nil && (w.FlushWithin() || w.FlushBefore()) {
			return true
		}
	}
	return false
}

// capture stops the guest and takes everything that makes up one epoch: device
// state, dirty pages, held output, disk writes. stopped, if given, runs first
// while the guest stands still. With stay the guest is left standing.
//
// The order matters: devices before the flush, since saving them may write to
// guest memory; the flush before the output is read, since it takes longest and
// reading finds everything the guest ever sent in any order.
func (p *primary) capture(flags uint32, stay bool, stopped func() error) (c *captured, err error) {
	p.ramMu.Lock()
	defer p.ramMu.Unlock()
	ctx, cancel := context.WithTimeout(p.ctx, qmpTimeout)
	defer cancel()

	if err := p.holdInput(ctx); err != nil {
		return nil, err
	}
	defer p.unholdInput()
	if p.lastPages > preFlushPages {
		// Most of a large dirty set is collected while the guest still runs; what
		// it dirties meanwhile comes with the flush that counts.
		if err := p.inst.ram.Flush(); err != nil {
			return nil, fmt.Errorf("collect memory: %w", err)
		}
	}
	for _, v := range p.inst.vols {
		v.BeginStop()
	}
	c = &captured{flags: flags, at: time.Now(), mark: time.Now(), persisted: make(chan struct{}), released: make(chan struct{})}
	// What comes while the guest stops waits in the tap, and belongs to the next
	// epoch. A frame that slips in between comes twice where it must be repeated.
	input := p.input.take()
	c.input = input
	defer func() {
		if err != nil {
			p.input.giveBack(input)
		}
	}()
	start := bootNow()
	st, err := p.stopAndSave(ctx, c)
	if err != nil {
		return nil, err
	}
	for _, v := range p.inst.vols {
		v.Stopped(st.At)
	}
	if stopped != nil {
		if err := stopped(); err != nil {
			return nil, err
		}
	}
	if !st.WasRunning {
		p.stands(st.Status)
		if st.Status == qemu.StatusShutdown {
			c.flags |= flagOff
		} else if p.isFaulted() {
			c.flags |= flagFault
		}
	}
	if err := p.take(ctx, c); err != nil {
		return nil, errors.Join(err, p.contUnless(stay || !st.WasRunning))
	}
	if err := p.contUnless(stay || !st.WasRunning); err != nil {
		return nil, err
	}
	c.lap(&c.phase.cont)
	c.done = time.Now()
	c.guestNS = int64(p.inst.guestTime())
	p.lastPages = c.pages.Pages()
	p.pacer.Captured(start, bootNow())
	p.s.stats.captured(c)
	return c, nil
}

// stopAndSave stops the guest and saves its devices. QEMU is told both at once
// unless input was left unread at the stop, which must be settled in between.
func (p *primary) stopAndSave(ctx context.Context, c *captured) (st qemu.Stopped, err error) {
	q := p.inst.qmp
	for _, port := range p.inst.ports() {
		if !port.Quiet() {
			if st, err = p.stop(); err != nil {
				return st, err
			}
			c.lap(&c.phase.stop)
			return st, p.settleAndSave(ctx, c)
		}
	}
	st, c.dev, err = q.StopAndSave(ctx, nil, func(qemu.Stopped) error {
		p.inst.noteRunning(false)
		c.lap(&c.phase.stop)
		return nil
	})
	if err == nil && c.dev == nil { // it stood still already
		c.dev, err = q.SaveDevices(ctx, nil)
	}
	c.lap(&c.phase.save)
	return st, err
}

// settleAndSave makes sure that QEMU reads no input any more, then saves.
func (p *primary) settleAndSave(ctx context.Context, c *captured) error {
	for _, port := range p.inst.ports() {
		err := port.Settle(ctx, func(ctx context.Context) error { _, _, err := p.inst.qmp.Status(ctx); return err })
		if err != nil {
			return fmt.Errorf("settle input of a character device: %w", err)
		}
	}
	var err error
	if c.dev, err = p.inst.qmp.SaveDevices(ctx, nil); err != nil {
		return fmt.Errorf("save device state: %w", err)
	}
	c.lap(&c.phase.save)
	return nil
}

// lap notes how long a phase took that ends now.
func (c *captured) lap(d *time.Duration) {
	now := time.Now()
	*d, c.mark = now.Sub(c.mark), now
}

// contUnless lets the guest run on, unless something else made it stand still.
func (p *primary) contUnless(stay bool) error {
	if stay {
		return nil
	}
	return p.resume()
}

func (p *primary) holdInput(ctx context.Context) error {
	for _, port := range p.inst.ports() {
		if err := port.Hold(ctx); err != nil {
			return fmt.Errorf("hold input of a character device: %w", err)
		}
	}
	return nil
}

func (p *primary) unholdInput() {
	for _, port := range p.inst.ports() {
		port.Unhold()
	}
}

// take collects the state of the stopped guest.
func (p *primary) take(ctx context.Context, c *captured) error {
	i := p.inst
	var err error
	if _, _, c.since = i.waiting(); c.since.IsZero() {
		c.since = c.at
	}
	if err := i.ram.Flush(); err != nil {
		return fmt.Errorf("collect memory: %w", err)
	}
	if c.pages, err = i.ram.Cut(); err != nil {
		return fmt.Errorf("collect memory: %w", err)
	}
	c.lap(&c.phase.flush)
	for _, d := range i.nics {
		f, err := d.Drain(ctx)
		if err != nil {
			return fmt.Errorf("collect output of %s: %w", d.NIC(), err)
		}
		c.held += f.Bytes()
		c.frames = append(c.frames, f)
	}
	for _, port := range i.ports() {
		b := port.Cut()
		c.held += int64(len(b))
		c.ports = append(c.ports, b)
	}
	for _, v := range i.vols {
		c.disks = append(c.disks, v.Cut())
	}
	p.mu.Lock()
	p.last++
	c.epoch = p.last
	p.mu.Unlock()
	if c.epoch%auditEvery == 0 || c.flags&flagSync != 0 {
		if c.audit, err = p.auditPages(c.pages); err != nil {
			return fmt.Errorf("audit memory: %w", err)
		}
	}
	c.lap(&c.phase.rest)
	return nil
}

// auditPages hashes some pages as the guest sees them, for the secondary to
// compare with what it has after applying.
func (p *primary) auditPages(ps *guestmem.PageSet) ([]pageHash, error) {
	var pages []int64
	for off, data := range ps.Extents() {
		if len(pages) >= auditChanged {
			break
		}
		pages = append(pages, (off+rand.Int64N(int64(len(data))))/guestmem.PageSize)
	}
	for range auditRandom {
		pages = append(pages, rand.Int64N(p.s.cfg.Spec.Memory/guestmem.PageSize))
	}
	sums, err := p.inst.ram.Hash(pages)
	if err != nil {
		return nil, err
	}
	out := make([]pageHash, len(pages))
	for n := range pages {
		out[n] = pageHash{uint64(pages[n]), sums[n]}
	}
	return out, nil
}

// end builds the closing message of an epoch against the device state before it.
func (c *captured) end(h endHeader, prev []byte) []byte {
	wire, delta := packDevices(c.dev, prev)
	h.Epoch, h.Flags, h.GuestNS = uint64(c.epoch), c.flags, c.guestNS
	h.PageCount = uint32(c.pages.Pages())
	h.DevLen, h.DevWire, h.DevCRC = uint32(len(c.dev)), uint32(len(wire)), crc32.Checksum(c.dev, castagnoli)
	if delta {
		h.DevDelta = 1
	}
	if len(c.ports) > 0 {
		h.Console = uint32(len(c.ports[0]))
	}
	h.Audits = uint32(len(c.audit))
	out := append(pack(h), wire...)
	if len(c.ports) > 0 {
		out = append(out, c.ports[0]...)
	}
	return append(out, pack(c.audit)...)
}
