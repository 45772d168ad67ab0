package blockstore

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"
	"sync"
	"syscall"

	"perdure/internal/model"
	"perdure/internal/vfs"
)

// DefaultActivity is how many extents may be in the activity log: 8 GiB.
const DefaultActivity = 2048

// MaxActivity is how many extents the file of the log can hold.
const MaxActivity = (logSlot - logHead) / 4

// The file of the activity log: two slots, written in turns, each with the whole
// set. A set is some KiB, and what costs is the sync, not the bytes.
const (
	logSlot    = 16 << 10
	logHead    = 64
	logVersion = 1
	logAlign   = 4096

	logSumsOnly = 1 << 31 // in an extent's number: only its checksums are in doubt
	maxExtents  = logSumsOnly - 1
)

var logMagic = [8]byte{'P', 'D', 'R', 'A', 'L', 'O', 'G', '\n'}

// activity is the activity log: the set of extents ("hot") in which this replica
// and its peer, or the image and its checksums, may differ after a crash. An
// extent is in the file, durably, before the first write into it is begun.
//
// Invariant: an extent leaves the file only when every write in it is durable
// here, its checksums are in their file, and what the peer did not report durable
// is in the file of the bitmap.
//
// In steady state a write finds its extent hot and pays two short critical
// sections. A write into a cold extent waits for one sync of the log, which it
// shares with all that wait at that moment; when the log is full, an eighth of it
// leaves at once.
//
// Locks: mu may be held while missing.mu is taken, nothing else. busy is held by
// the one goroutine that writes the file, without mu.
type activity struct {
	s    *Store
	file vfs.File
	key  uint32

	mu       sync.Mutex
	cond     sync.Cond
	index    []int32 // by extent: place in entries + 1; 0: cold
	entries  []extent
	free     []int32
	clock    uint64
	waiting  int  // goroutines in cond.Wait
	busy     bool // somebody writes the file
	attached bool
	epoch    model.Epoch // what ends now belongs to it
	peer     model.Epoch // the peer has made durable all up to here
	leaves   uint64      // how many extents have left
	inDoubt  int         // extents with checksums in doubt
	next     int64       // extent after the last one that was logged in sequence
	ahead    int         // how many are logged ahead when that goes on
	at       int64       // extent to which the sequence has come
	coming   bool        // more of it is being logged in the background
	commits  uint64
	ask      chan struct{}

	cache sumCache

	// Of the goroutine that is busy.
	seq        uint64
	buf        []byte
	news       []int32
	victims    []int32
	unreadable int // of the victims of the last leave: how many have checksums in doubt whose blocks cannot be read
}

type extentState uint8

const (
	exFree    extentState = iota
	exPending             // not in the file yet
	exHot
	exLeaving // may leave; whoever wants to write makes it hot again
	exGone    // left out of the file that is being written; out of it when that is durable
)

// extent is a member of the log.
type extent struct {
	no    int64
	state extentState
	refs  int32  // writes under way
	used  uint64 // clock of the last use
	local uint64 // count of changes (Store.changes) behind the last one in here

	// While a peer is attached: chunks written since the peer last had everything,
	// in two generations, and the epochs of the last writes in each.
	mask, oldMask   uint64
	epoch, oldEpoch model.Epoch

	page  *sumPage // nil while no checksums are kept
	dirty bool     // page is newer than its file
	doubt *doubts  // nil: all checksums hold
	// sumsOnly: kept beyond an orderly end for its checksums alone.
	sumsOnly bool
}

// span is how many extents may be asked for at once.
func (a *activity) span() int64 { return int64(max(1, len(a.entries)/4)) }

func extents(size int64) int64 { return (size + ExtentSize - 1) / ExtentSize }

// open reads the log. Nothing in it: damaged says that no slot was whole.
func (a *activity) open(s *Store, f vfs.File, limit int) (found []uint32, damaged bool, err error) {
	a.s, a.file, a.key = s, f, s.journal.key
	a.cond.L = &a.mu
	a.ask = make(chan struct{}, 1)
	n := extents(s.size)
	if n > maxExtents {
		return nil, false, fmt.Errorf("disk of %d bytes is too large", s.size)
	}
	found, seq, err := readLog(f, a.key)
	if errors.Is(err, ErrCorrupt) {
		damaged, err = true, nil
	}
	if err != nil {
		return nil, false, err
	}
	found = slices.DeleteFunc(found, func(e uint32) bool { return int64(e&^logSumsOnly) >= n })
	a.seq = seq
	size := int(min(max(int64(limit), int64(len(found)), 4), n))
	a.index = make([]int32, n)
	a.entries = make([]extent, size)
	a.free = make([]int32, 0, size)
	for i := size - 1; i >= 0; i-- {
		a.free = append(a.free, int32(i))
	}
	a.next, a.at = -1, -1
	return found, damaged, nil
}

// createLog fills the file, so that no later write needs space.
func createLog(f vfs.File, key uint32) error {
	b := make([]byte, 2*logSlot)
	copy(b[logSlot:], encodeLog(nil, key, 1, nil)) // slot seq mod 2
	if _, err := f.WriteAt(b, 0); err != nil {
		return err
	}
	return f.Sync()
}

func encodeLog(b []byte, key uint32, seq uint64, list []uint32) []byte {
	total := (logHead + 4*len(list) + logAlign - 1) / logAlign * logAlign
	b = slices.Grow(b[:0], total)[:total]
	clear(b)
	le := binary.LittleEndian
	copy(b, logMagic[:])
	le.PutUint32(b[8:], logVersion)
	le.PutUint32(b[12:], key)
	le.PutUint64(b[16:], seq)
	le.PutUint32(b[24:], uint32(len(list)))
	for i, e := range list {
		le.PutUint32(b[logHead+4*i:], e)
	}
	le.PutUint32(b[28:], logSum(b, len(list)))
	return b
}

// logSum is the checksum of a slot, of all but itself.
func logSum(b []byte, count int) uint32 {
	c := crc32.Update(0, castagnoli, b[:28])
	return crc32.Update(c, castagnoli, b[32:logHead+4*count])
}

// readLog returns the newest whole set. ErrCorrupt: there is none.
func readLog(f vfs.File, key uint32) (list []uint32, seq uint64, err error) {
	size, err := f.Size()
	if err != nil {
		return nil, 0, err
	}
	b := make([]byte, logSlot)
	for i := range int64(2) {
		if size < (i+1)*logSlot {
			continue
		}
		if _, err := f.ReadAt(b, i*logSlot); err != nil {
			return nil, 0, err
		}
		l, n, err := decodeLog(b, key)
		if errors.Is(err, ErrVersion) {
			return nil, 0, err
		}
		if err == nil && n > seq {
			list, seq = l, n
		}
	}
	if seq == 0 {
		return nil, 0, fmt.Errorf("activity log: no valid slot: %w", ErrCorrupt)
	}
	return list, seq, nil
}

func decodeLog(b []byte, key uint32) (list []uint32, seq uint64, err error) {
	le := binary.LittleEndian
	if [8]byte(b[:8]) != logMagic {
		return nil, 0, ErrCorrupt
	}
	count := int64(le.Uint32(b[24:]))
	if count > MaxActivity || le.Uint32(b[28:]) != logSum(b, int(count)) {
		return nil, 0, ErrCorrupt
	}
	if v := le.Uint32(b[8:]); v != logVersion {
		return nil, 0, fmt.Errorf("activity log version %d, this release knows %d: %w", v, logVersion, ErrVersion)
	}
	if le.Uint32(b[12:]) != key {
		return nil, 0, ErrCorrupt
	}
	list = make([]uint32, count)
	for i := range list {
		list[i] = le.Uint32(b[logHead+4*i:])
	}
	return list, le.Uint64(b[16:]), nil
}

// restore makes hot what a crash left in the log: the peer may lack all of it, and
// checksums are not trusted there.
func (a *activity) restore(found []uint32) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	change := a.s.changes.Add(1) // it may not be durable: only a process may have died
	for _, v := range found {
		no := int64(v &^ logSumsOnly)
		if a.index[no] != 0 {
			continue
		}
		e := a.admit(no)
		e.state, e.local = exHot, change
		if v&logSumsOnly == 0 {
			a.s.miss.setMask(no, ^uint64(0))
		}
		if a.s.sums.on() {
			page, err := a.s.sums.read(no)
			if err != nil {
				return err
			}
			e.page, e.doubt = page, newDoubts()
			a.inDoubt++
		}
	}
	return nil
}

// admit gives a cold extent a place. mu is held, and there is one.
func (a *activity) admit(no int64) *extent {
	i := a.free[len(a.free)-1]
	a.free = a.free[:len(a.free)-1]
	a.clock++
	a.entries[i] = extent{no: no, state: exPending, used: a.clock}
	a.index[no] = i + 1
	return &a.entries[i]
}

// find returns the member, or nil. mu is held.
func (a *activity) find(no int64) *extent {
	if i := a.index[no]; i != 0 {
		return &a.entries[i-1]
	}
	return nil
}

// begin announces a change of n bytes at off, all within one extent, and returns
// when the extent is hot, durably. end follows in any case but an error.
func (a *activity) begin(off, n int64) (*extent, *doubts, error) {
	no := off / ExtentSize
	first, last := off%ExtentSize/ChunkSize, (off%ExtentSize+n-1)/ChunkSize
	mask := ^uint64(0) << first & (^uint64(0) >> (63 - last))
	a.mu.Lock()
	defer a.mu.Unlock()
	e := a.find(no)
	if e == nil || e.state != exHot {
		if err := a.heat(no, no); err != nil {
			return nil, nil, err
		}
		e = a.find(no)
	}
	if no == a.at+1 {
		a.at = no
		a.keepAhead()
	}
	a.clock++
	e.used = a.clock
	if a.attached {
		if e.refs == 0 {
			a.forget(e)
		}
		e.mask |= mask
	} else {
		a.s.miss.setMask(no, mask)
	}
	e.refs++
	return e, e.doubt, nil
}

// forget drops what the peer has reported of an extent without writes under way.
func (a *activity) forget(e *extent) {
	switch {
	case a.peer >= e.epoch:
		e.mask, e.oldMask = 0, 0
	case a.peer >= e.oldEpoch:
		e.oldMask, e.oldEpoch, e.mask = e.mask, e.epoch, 0
	}
}

// end says that a change was carried out, or failed.
func (a *activity) end(e *extent) {
	change := a.s.changes.Add(1)
	a.mu.Lock()
	e.refs--
	e.local = change
	e.dirty = e.page != nil
	if a.attached {
		e.epoch = max(e.epoch, a.epoch)
	}
	if a.waiting > 0 {
		a.cond.Broadcast()
	}
	a.mu.Unlock()
}

// warm makes up to span extents from first on hot, with one sync. It is only a
// hint: they may have left again before begin.
func (a *activity) warm(first, last int64) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.heat(first, min(last, first+a.span()-1))
}

func (a *activity) wait() {
	a.waiting++
	a.cond.Wait()
	a.waiting--
}

// heat returns when the extents first … last are hot; nothing keeps them so once
// mu is given up. mu is held, but not all along.
func (a *activity) heat(first, last int64) error {
	for {
		if err := a.s.Err(); err != nil {
			return err
		}
		cold, hot, gone := 0, true, false
		for no := first; no <= last; no++ {
			e := a.find(no)
			switch {
			case e == nil:
				cold++
			case e.state == exLeaving:
				e.state = exHot
			case e.state == exGone:
				gone = true
			case e.state == exPending:
				hot = false
			}
		}
		if cold == 0 && hot && !gone {
			return nil
		}
		if !gone && cold > 0 && cold <= len(a.free) {
			a.add(first, last)
			cold = 0
		}
		var err error
		switch {
		case a.busy:
			a.wait()
		case cold > 0 && !gone:
			err = a.makeRoom(cold, first, last)
		default:
			err = a.commit()
		}
		if err != nil {
			return err
		}
	}
}

// add makes the cold ones among first … last pending, and some behind them
// where extents are logged one after the other: a sequential write would pay a
// sync for each 4 MiB otherwise.
func (a *activity) add(first, last int64) {
	inSequence := first == a.next
	if !inSequence {
		a.ahead = 0
	}
	a.next, a.at = last+1, last
	for no := first; no <= last; no++ {
		if a.index[no] == 0 {
			a.admit(no)
		}
	}
	if inSequence {
		a.addAhead()
	}
}

// maxAhead bounds how many extents are logged ahead: 256 MiB, which a fast disk
// takes in the time of one sync of a slow one. After a crash they are compared.
const maxAhead = 64

// addAhead makes extents behind those of a sequence pending, twice as many as the
// last time, and reports how many. Unless the log has room for all of the disk, a
// quarter of it is left to others.
func (a *activity) addAhead() (added int) {
	spare := len(a.entries) / 4
	if len(a.entries) == len(a.index) {
		spare = 0
	}
	a.ahead = min(max(2*a.ahead, 1), maxAhead)
	for ; added < a.ahead && a.next < int64(len(a.index)) && len(a.free) > spare; added++ {
		if a.index[a.next] != 0 {
			break
		}
		a.admit(a.next)
		a.next++
	}
	return added
}

// keepAhead has more extents logged in the background once a sequence has come
// through half of those that were, so that it never waits for the sync.
func (a *activity) keepAhead() {
	if a.coming || a.ahead == 0 || a.at >= a.next || a.at < a.next-int64(a.ahead+1)/2 || a.s.opts.NoAutoTrim || a.addAhead() == 0 {
		return
	}
	a.coming = true
	a.s.background.Go(func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		for a.busy {
			a.wait()
		}
		if a.s.Err() == nil {
			_ = a.commit() // what stays pending is tried again by whoever writes there, who is told
		}
		a.coming = false
	})
}

// commit writes the set as it is now, without what is gone, and makes it durable.
// An error that is not fatal to the store leaves pending what is pending and gone
// what is gone: which of two sets is in the file is not known then, and both have
// all that is hot. mu is held, but not all along; nobody is busy.
func (a *activity) commit() error {
	a.busy = true
	list := make([]uint32, 0, len(a.entries)-len(a.free))
	a.news = a.news[:0]
	for i := range a.entries {
		e := &a.entries[i]
		switch e.state {
		case exFree, exGone:
			continue
		case exPending:
			a.news = append(a.news, int32(i))
		}
		v := uint32(e.no)
		if e.sumsOnly {
			v |= logSumsOnly
		}
		list = append(list, v)
	}
	a.mu.Unlock()
	err := a.loadPages(a.news)
	if err == nil {
		err = a.write(list)
	}
	a.mu.Lock()
	a.busy = false
	a.commits++
	if err == nil {
		for _, i := range a.news {
			a.entries[i].state = exHot
		}
		for i := range a.entries {
			if a.entries[i].state == exGone {
				a.drop(int32(i))
			}
		}
	}
	a.cond.Broadcast()
	return err
}

// write puts a set into the slot whose turn it is. The caller is busy.
func (a *activity) write(list []uint32) error {
	slices.Sort(list)
	a.s.point("log.write")
	a.buf = encodeLog(a.buf, a.key, a.seq+1, list)
	if _, err := a.file.WriteAt(a.buf, int64((a.seq+1)%2)*logSlot); err != nil {
		return fmt.Errorf("write the activity log of %s: %w", a.s.id, err)
	}
	a.s.point("log.written")
	if err := a.file.Sync(); err != nil {
		return a.s.fail("sync of the activity log", err)
	}
	a.s.point("log.synced")
	a.seq++
	return nil
}

// drop frees the place of an extent that has left. mu is held.
func (a *activity) drop(i int32) {
	e := &a.entries[i]
	if e.page != nil {
		a.cache.put(e.no, e.page)
	}
	a.leaves++
	a.index[e.no] = 0
	*e = extent{}
	a.free = append(a.free, i)
}

// ready reports whether the peer has all of an extent, as far as it counts.
func (a *activity) ready(e *extent) bool {
	return e.state == exHot && e.refs == 0 && (!a.attached || a.peer >= e.epoch)
}

// makeRoom lets extents leave, at least need if it can and an eighth of all
// normally, but none of first … last; where none may, it waits for a change.
// mu is held, but not all along; nobody is busy.
func (a *activity) makeRoom(need int, first, last int64) error {
	synced := a.s.synced.Load()
	durable := 0
	a.victims = a.victims[:0]
	for i := range a.entries {
		e := &a.entries[i]
		if a.ready(e) && (e.no < first || e.no > last) {
			a.victims = append(a.victims, int32(i))
			if e.local <= synced && e.doubt == nil {
				durable++
			}
		}
	}
	if len(a.victims) == 0 {
		a.askPeer()
		a.wait()
		return nil
	}
	target := max(need, len(a.entries)/8)
	if durable >= target {
		a.victims = slices.DeleteFunc(a.victims, func(i int32) bool { return a.entries[i].local > synced || a.entries[i].doubt != nil })
	}
	slices.SortFunc(a.victims, func(x, y int32) int {
		p, q := &a.entries[x], &a.entries[y]
		if (p.doubt != nil) != (q.doubt != nil) {
			return cmp.Compare(boolInt(p.doubt != nil), boolInt(q.doubt != nil))
		}
		return cmp.Compare(p.used, q.used)
	})
	a.victims = a.victims[:min(target, len(a.victims))]
	if err := a.leave(a.victims); err != nil {
		return err
	}
	if a.unreadable == len(a.victims) && len(a.free) == 0 {
		// None of these will ever leave. Others may, when their writes have ended or
		// the peer has reported them.
		for i := range a.entries {
			if e := &a.entries[i]; e.doubt == nil && (e.no < first || e.no > last) {
				if !a.ready(e) {
					a.askPeer()
					a.wait()
				}
				return nil
			}
		}
		return fmt.Errorf("no room in the activity log of %s: blocks whose checksums are in doubt cannot be read: %w", a.s.id, syscall.EIO)
	}
	if a.attached && len(a.free) < len(a.entries)/8 {
		a.askPeer() // before somebody has to wait
	}
	return nil
}

func boolInt(b bool) int {
	if b {
		return 1
	}
	return 0
}

// leave takes victims, which are ready, out of the log. mu is held, but not all
// along; nobody is busy.
func (a *activity) leave(victims []int32) error {
	a.busy, a.unreadable = true, 0
	for _, i := range victims {
		a.entries[i].state = exLeaving
	}
	err := a.settle(victims)
	a.busy = false
	for _, i := range victims {
		e := &a.entries[i]
		if e.state != exLeaving {
			continue // somebody wants to write there again
		}
		e.state = exHot
		if err == nil && e.doubt == nil {
			e.state = exGone
		}
	}
	if err != nil {
		a.cond.Broadcast()
		return err
	}
	return a.commit()
}

// settle makes true what must be true before victims leave: their writes and
// checksums are durable, and so is the bitmap. mu is held, but not all along.
func (a *activity) settle(victims []int32) error {
	synced, unsynced, behind := a.s.synced.Load(), false, false
	for _, i := range victims {
		e := &a.entries[i]
		unsynced = unsynced || e.local > synced
		behind = behind || a.s.miss.behind(e.no)
	}
	a.mu.Unlock()
	defer a.mu.Lock()
	if unsynced {
		if err := a.s.syncImage(func() bool { return true }); err != nil {
			return err
		}
	}
	if a.s.sums.on() {
		if err := a.s.saveSums(victims); err != nil {
			return err
		}
	}
	a.s.point("log.leave")
	if !behind {
		return nil
	}
	return a.s.saveMissing(false)
}

// askPeer tells the owner that extents wait for the peer. mu is held.
func (a *activity) askPeer() {
	if !a.attached {
		return
	}
	select {
	case a.ask <- struct{}{}:
	default:
	}
}

// wake lets everybody look again, after a failure of the store.
func (a *activity) wake() {
	if a.cond.L == nil {
		return
	}
	a.mu.Lock()
	a.cond.Broadcast()
	a.mu.Unlock()
}

// attach begins to count on the peer's reports; epochs count from first on.
func (a *activity) attach(first model.Epoch) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.detachLocked()
	a.epoch = max(first, 1)
	a.peer = a.epoch - 1
	a.attached = true
}

// detach puts into the bitmap what the peer did not report durable.
func (a *activity) detach() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.detachLocked()
}

func (a *activity) detachLocked() {
	for i := range a.entries {
		e := &a.entries[i]
		if e.state == exFree {
			continue
		}
		if a.attached && (e.refs > 0 || a.peer < e.epoch) {
			m := e.mask
			if a.peer < e.oldEpoch {
				m |= e.oldMask
			}
			a.s.miss.setMask(e.no, m)
		}
		e.mask, e.oldMask, e.epoch, e.oldEpoch = 0, 0, 0, 0
	}
	a.attached = false
	a.cond.Broadcast()
}

// peerDurable notes a report of the peer.
func (a *activity) peerDurable(through model.Epoch) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.attached && through > a.peer {
		a.peer = through
		a.cond.Broadcast()
	}
}

// reach says that what ends from now on belongs to epoch e, or a later one.
func (a *activity) reach(e model.Epoch) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.epoch = max(a.epoch, e)
}

func (a *activity) epochNow() model.Epoch {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.epoch
}

// close empties the log. What has checksums in doubt stays, and is marked so that
// the next start does not take it for a difference from the peer: all is durable
// here, and what the peer may lack is in the bitmap. No other call is under way.
func (a *activity) close() error {
	a.detach()
	if err := a.s.saveMissing(true); err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for i := range a.entries {
		e := &a.entries[i]
		e.sumsOnly = e.doubt != nil
	}
	a.victims = a.victims[:0]
	for i := range a.entries {
		if e := &a.entries[i]; e.state == exHot && e.doubt == nil {
			a.victims = append(a.victims, int32(i))
		}
	}
	if len(a.victims) == 0 && a.inDoubt == 0 {
		return nil
	}
	return a.leave(a.victims)
}

// warmRuns makes the extents of an epoch hot with one sync, as far as there is
// room at once.
func (a *activity) warmRuns(runs []run) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	added := int64(0)
	for _, r := range runs {
		for no := r.start / blocksPerExtent; no <= (r.start+r.count-1)/blocksPerExtent; no++ {
			if added == a.span() || len(a.free) == 0 {
				break
			}
			if a.index[no] == 0 {
				a.admit(no)
				added++
			}
		}
	}
	if added < 2 {
		return nil // what is pending is taken along by whoever begins to write there
	}
	for a.busy {
		a.wait()
	}
	if err := a.s.Err(); err != nil {
		return err
	}
	return a.commit()
}

// quiesce waits until nobody writes the file. Nobody may begin to meanwhile.
func (a *activity) quiesce() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for a.busy {
		a.wait()
	}
}

// freshPages forgets all checksums in memory, where the file has none any more.
// No block is being read or written.
func (a *activity) freshPages() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.cache = sumCache{}
	a.inDoubt = 0
	for i := range a.entries {
		if e := &a.entries[i]; e.state != exFree {
			e.page, e.doubt, e.dirty = new(sumPage), nil, false
		}
	}
	return nil
}

// dropPages forgets that there are checksums.
func (a *activity) dropPages() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.cache = sumCache{}
	a.inDoubt = 0
	for i := range a.entries {
		e := &a.entries[i]
		e.page, e.doubt, e.dirty = nil, nil, false
	}
}
