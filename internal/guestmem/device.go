package guestmem

import (
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	rootNode = 1
	fileNode = 2
	fileName = "ram"

	maxWrite = 1 << 20 // bytes of one WRITE; the most that kernels allow unasked
	maxRead  = 1 << 20
	// Scattered dirty pages are one WRITE each, all in flight at once: fewer
	// than this and the flush waits for replies in the middle.
	maxBackground = 2048

	foreverSec = 1 << 31 // attributes never change
)

// device serves one FUSE connection. It reads requests straight from
// /dev/fuse instead of through a library, so that the pages of a WRITE land in
// the buffers of the epoch with the kernel's own copy and no second one, and so
// that the descriptor is closed on exec.
//
// A request that is answered late must not hold up the others: several readers
// take requests side by side.
type device struct {
	fd   int
	size int64
	col  *collector
	pool *pool

	// owned holds a bit per page whose content exists only in the page cache.
	// The kernel asking for such a page means that it dropped it.
	owned ownedPages

	lost func(error) // reports loss of memory; called at most a few times

	// hook, for tests and Probe, runs before a WRITE is accepted; an error fails the WRITE.
	hook atomic.Pointer[func(off int64, n int) unix.Errno]

	writing                          atomic.Int64 // WRITEs being handled
	late                             atomic.Int64 // FSYNCs that came while a WRITE was being handled
	writes, writtenPages, reads, syn atomic.Uint64

	closing atomic.Bool
	wg      sync.WaitGroup
}

// ownedPages is a bitmap that several readers set at the same time.
type ownedPages []atomic.Uint64

func (o ownedPages) set(p uint32)      { o[p/64].Or(1 << (p % 64)) }
func (o ownedPages) unset(p uint32)    { o[p/64].And(^uint64(1 << (p % 64))) }
func (o ownedPages) has(p uint32) bool { return o[p/64].Load()&(1<<(p%64)) != 0 }

// setRun sets n bits from p on.
func (o ownedPages) setRun(p, n uint32) {
	for n > 0 {
		k := min(64-p%64, n)
		o[p/64].Or((^uint64(0) >> (64 - k)) << (p % 64))
		p, n = p+k, n-k
	}
}

// openDevice opens /dev/fuse and mounts it on dir.
func openDevice(dir string) (int, error) {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open /dev/fuse: %w", err)
	}
	opts := fmt.Sprintf("fd=%d,rootmode=40000,user_id=%d,group_id=%d,max_read=%d", fd, unix.Geteuid(), unix.Getegid(), maxRead)
	if err := unix.Mount("perdure-ram", dir, "fuse.perdure-ram", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOATIME, opts); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("mount guest memory on %s: %w", dir, err)
	}
	return fd, nil
}

// start reads and answers INIT and starts the readers.
func (d *device) start() error {
	buf := make([]byte, 64<<10)
	n, err := readRetry(d.fd, buf)
	if err != nil {
		return fmt.Errorf("read FUSE INIT: %w", err)
	}
	h := (*inHeader)(unsafe.Pointer(&buf[0]))
	in := (*initIn)(unsafe.Pointer(&buf[inHeaderSize]))
	if n < inHeaderSize+int(unsafe.Sizeof(*in)) || h.Opcode != opInit || in.Major != fuseMajor || in.Minor < fuseMinor {
		return fmt.Errorf("speak FUSE with the kernel: it offers %d.%d, %d.%d is needed", in.Major, in.Minor, fuseMajor, fuseMinor)
	}
	want := uint32(capAsyncRead | capBigWrites | capMaxPages | capExplicitInvalData)
	if in.Flags&capMaxPages == 0 || in.Flags&capBigWrites == 0 {
		return errors.New("speak FUSE with the kernel: it has no large writes")
	}
	out := initOut{
		Major: fuseMajor, Minor: fuseMinor, MaxReadahead: maxRead, Flags: want & in.Flags,
		MaxBackground: maxBackground, CongestionThreshold: maxBackground * 3 / 4,
		MaxWrite: maxWrite, TimeGran: 1, MaxPages: maxWrite / PageSize,
	}
	if errno := reply(d.fd, h.Unique, 0, bytesOf(&out)); errno != 0 {
		return fmt.Errorf("answer FUSE INIT: %w", errno)
	}
	for range max(2, min(4, runtime.NumCPU())) {
		r := &reader{d: d, head: make([]byte, inHeaderSize+writeInSize)}
		if err := r.refill(); err != nil {
			return err
		}
		d.wg.Add(1)
		go r.run()
	}
	return nil
}

// bytesOf returns the memory of *v.
func bytesOf[T any](v *T) []byte { return unsafe.Slice((*byte)(unsafe.Pointer(v)), unsafe.Sizeof(*v)) }

// reply answers the request unique. errno is 0 or the error; data follows the header.
func reply(fd int, unique uint64, errno unix.Errno, data []byte) unix.Errno {
	var buf [outHeaderSize + 128]byte
	h := (*outHeader)(unsafe.Pointer(&buf[0]))
	h.Unique, h.Error = unique, -int32(errno)
	h.Len = uint32(outHeaderSize + len(data))
	if len(data) <= len(buf)-outHeaderSize {
		n := outHeaderSize + copy(buf[outHeaderSize:], data)
		// A raw call: the answer is taken without waiting, and telling the
		// scheduler would cost more than the call.
		_, _, e := syscall.RawSyscall(unix.SYS_WRITE, uintptr(fd), uintptr(unsafe.Pointer(&buf[0])), uintptr(n))
		return e
	}
	iov := [2]unix.Iovec{{Base: &buf[0], Len: outHeaderSize}, {Base: &data[0], Len: uint64(len(data))}}
	_, _, e := syscall.Syscall(unix.SYS_WRITEV, uintptr(fd), uintptr(unsafe.Pointer(&iov[0])), 2)
	runtime.KeepAlive(data)
	return e
}

func readRetry(fd int, buf []byte) (int, error) {
	for {
		n, err := unix.Read(fd, buf)
		if err != unix.EINTR {
			return n, err
		}
	}
}

// store pushes one piece of at most storeChunk bytes into the page cache.
func (d *device) store(off int64, data []byte) unix.Errno {
	var buf [outHeaderSize + 24]byte
	h := (*outHeader)(unsafe.Pointer(&buf[0]))
	h.Error, h.Len = notifyStore, uint32(len(buf)+len(data))
	s := (*notifyStoreOut)(unsafe.Pointer(&buf[outHeaderSize]))
	s.NodeID, s.Offset, s.Size = fileNode, uint64(off), uint32(len(data))
	iov := [2]unix.Iovec{{Base: &buf[0], Len: uint64(len(buf))}, {Base: &data[0], Len: uint64(len(data))}}
	_, _, e := syscall.Syscall(unix.SYS_WRITEV, uintptr(d.fd), uintptr(unsafe.Pointer(&iov[0])), 2)
	runtime.KeepAlive(data)
	return e
}

// reader takes requests, one at a time. The two chunks are where the next WRITE's pages will
// land: the rest of cur, then next.
type reader struct {
	d         *device
	head      []byte
	cur, next *chunk
	pos       int // in cur
	iov       [3]unix.Iovec
	segs      [2]segment
	args      [4096]byte
}

// refill gets the chunks that are missing.
func (r *reader) refill() (err error) {
	if r.cur == nil {
		if r.cur, err = r.d.pool.get(); err != nil {
			return err
		}
	}
	if r.next == nil {
		r.next, err = r.d.pool.get()
	}
	return err
}

func (r *reader) run() {
	defer r.d.wg.Done()
	err := r.loop()
	for _, c := range []*chunk{r.cur, r.next} {
		if c != nil {
			r.d.pool.put(c)
		}
	}
	if err != nil && !r.d.closing.Load() {
		r.d.lost(err)
	}
}

func (r *reader) loop() error {
	d := r.d
	for {
		r.iov = [3]unix.Iovec{
			{Base: &r.head[0], Len: uint64(len(r.head))},
			{Base: &r.cur.mem[r.pos%chunkSize], Len: uint64(chunkSize - r.pos)},
			{Base: &r.next.mem[0], Len: chunkSize},
		}
		n, _, e := syscall.Syscall(unix.SYS_READV, uintptr(d.fd), uintptr(unsafe.Pointer(&r.iov[0])), 3)
		switch e {
		case 0:
		case unix.EINTR, unix.EAGAIN, unix.ENOENT: // ENOENT: the request was taken back
			continue
		case unix.ENODEV:
			return errors.New("FUSE connection was aborted or unmounted")
		default:
			return fmt.Errorf("read FUSE request: %w", e)
		}
		h := (*inHeader)(unsafe.Pointer(&r.head[0]))
		if int(n) < inHeaderSize || h.Len != uint32(n) {
			return fmt.Errorf("read FUSE request: %d bytes are not a request", n)
		}
		if h.Opcode == opWrite && int(n) >= inHeaderSize+writeInSize {
			if err := r.write(h.Unique, int(n)-inHeaderSize-writeInSize); err != nil {
				return err
			}
			continue
		}
		r.other(h, int(n)-inHeaderSize)
	}
}

// segments says where the n bytes behind the head have landed.
func (r *reader) segments(n int) []segment {
	a := min(n, chunkSize-r.pos)
	r.segs = [2]segment{{r.cur, r.pos, a}, {r.next, 0, n - a}}
	return r.segs[:]
}

func (r *reader) write(unique uint64, n int) error {
	d := r.d
	in := (*writeIn)(unsafe.Pointer(&r.head[inHeaderSize]))
	d.writing.Add(1)
	errno := unix.Errno(0)
	if h := d.hook.Load(); h != nil {
		errno = (*h)(int64(in.Offset), n)
	}
	if errno == 0 && (in.Offset%PageSize != 0 || n%PageSize != 0 || n != int(in.Size) || n > maxWrite ||
		in.Offset > uint64(d.size) || in.Offset+uint64(n) > uint64(d.size)) {
		errno = unix.EINVAL
	}
	var err error
	if errno == 0 {
		err = r.accept(uint32(in.Offset/PageSize), n)
		if err != nil {
			errno = unix.EIO
		}
	}
	// The pages are collected, or lost, from here on: the reply may make the kernel end the flush.
	if errno != 0 && (in.WriteFlags&writeCache != 0 || errno == unix.EIO) {
		d.col.fail(fmt.Errorf("take %d bytes at %#x from the kernel: %w", n, in.Offset, errno))
	}
	d.writing.Add(-1)
	if errno != 0 {
		reply(d.fd, unique, errno, nil)
		return err
	}
	out := writeOut{Size: uint32(n)}
	// An error here means that nobody waits any more (aborted): the next read says so.
	reply(d.fd, unique, 0, bytesOf(&out))
	return nil
}

// accept hands the pages to the collector and moves the place for the next WRITE behind what it kept.
func (r *reader) accept(first uint32, n int) error {
	d := r.d
	d.writes.Add(1)
	d.writtenPages.Add(uint64(n / PageSize))
	segs := r.segments(n)
	kept := d.col.add(first, segs)
	if kept == 0 && d.col.discards() {
		r.own(first, segs)
		return nil
	}
	d.owned.setRun(first, uint32(n/PageSize))
	r.pos += kept
	if r.pos >= chunkSize {
		d.pool.put(r.cur)
		r.cur, r.next, r.pos = r.next, nil, r.pos-chunkSize
		return r.refill()
	}
	return nil
}

// own notes which discarded pages hold something: the zeroes of a preallocation can be
// made again if the kernel drops them, anything else cannot.
func (r *reader) own(first uint32, segs []segment) {
	for _, s := range segs {
		for o := 0; o < s.n; o += PageSize {
			if isZero(s.c.page(uint32((s.pos + o) / PageSize))) {
				r.d.owned.unset(first)
			} else {
				r.d.owned.set(first)
			}
			first++
		}
	}
}

// other answers everything that is not a WRITE. n is the length of the arguments.
func (r *reader) other(h *inHeader, n int) {
	d := r.d
	// The arguments begin in the head and go on where pages would land.
	a := r.args[:0]
	a = append(a, r.head[inHeaderSize:inHeaderSize+min(n, writeInSize)]...)
	if more := n - writeInSize; more > 0 && len(a)+more <= len(r.args) {
		for _, s := range r.segments(more) {
			a = append(a, s.c.mem[s.pos:s.pos+s.n]...)
		}
	}
	switch h.Opcode {
	case opForget, opBatchForget, opInterrupt, opNotifyReply:
		return // have no answer
	case opRead:
		d.read(h.Unique, h.NodeID, a)
		return
	case opFsync:
		if d.writing.Load() != 0 {
			d.late.Add(1)
		}
		d.syn.Add(1)
		reply(d.fd, h.Unique, 0, nil)
		return
	}
	data, errno := d.meta(h, a)
	reply(d.fd, h.Unique, errno, data)
}

// args reads a T from the start of a; a request cut short gives zeroes.
func args[T any](a []byte) (v T) {
	copy(bytesOf(&v), a)
	return v
}

// meta answers what concerns names and attributes.
func (d *device) meta(h *inHeader, a []byte) ([]byte, unix.Errno) {
	switch h.Opcode {
	case opLookup:
		if h.NodeID != rootNode || string(a) != fileName+"\x00" {
			return nil, unix.ENOENT
		}
		out := entryOut{NodeID: fileNode, Generation: 1, EntryValid: foreverSec, AttrValid: foreverSec, Attr: d.attr(fileNode)}
		return bytesOf(&out), 0
	case opGetattr:
		out := attrOut{Valid: foreverSec, Attr: d.attr(h.NodeID)}
		return bytesOf(&out), 0
	case opSetattr:
		// Times, modes and owners are accepted and ignored; the size is fixed.
		if in := args[setattrIn](a); in.Valid&attrSize != 0 && (h.NodeID != fileNode || in.Size != uint64(d.size)) {
			return nil, unix.EPERM
		}
		out := attrOut{Valid: foreverSec, Attr: d.attr(h.NodeID)}
		return bytesOf(&out), 0
	case opOpen:
		out := openOut{OpenFlags: openKeepCache | openNoFlush}
		return bytesOf(&out), 0
	case opOpendir:
		out := openOut{}
		return bytesOf(&out), 0
	case opReaddir:
		return d.readdir(args[readIn](a)), 0
	case opStatfs:
		pages := uint64(d.size / PageSize)
		out := statfsOut{Blocks: pages, Files: 1, Bsize: PageSize, Frsize: PageSize, Namelen: 255}
		return bytesOf(&out), 0
	case opRelease, opReleasedir, opFlush, opAccess, opDestroy:
		return nil, 0
	}
	return nil, unix.ENOSYS
}

func (d *device) attr(node uint64) attr {
	a := attr{Ino: node, Nlink: 1, Blksize: PageSize, UID: uint32(unix.Geteuid()), GID: uint32(unix.Getegid())}
	if node == rootNode {
		a.Mode, a.Nlink = unix.S_IFDIR|0o700, 2
		return a
	}
	a.Mode, a.Size, a.Blocks = unix.S_IFREG|0o600, uint64(d.size), uint64(d.size)/512
	return a
}

func (d *device) readdir(in readIn) []byte {
	if in.Offset > 0 {
		return nil
	}
	var buf [32]byte
	h := (*direntHead)(unsafe.Pointer(&buf[0]))
	h.Ino, h.Off, h.Namelen, h.Type = fileNode, 1, uint32(len(fileName)), unix.DT_REG
	copy(buf[unsafe.Sizeof(*h):], fileName)
	return buf[:]
}

// zeroes answers READs and is never written.
var zeroes [maxRead]byte

// read answers with zeroes, unless the kernel asks for what only it had.
func (d *device) read(unique, node uint64, a []byte) {
	in := args[readIn](a)
	d.reads.Add(1)
	n := int64(min(in.Size, maxRead))
	if node != fileNode || in.Offset >= uint64(d.size) {
		reply(d.fd, unique, 0, nil)
		return
	}
	n = min(n, d.size-int64(in.Offset))
	for p := in.Offset / PageSize; p*PageSize < in.Offset+uint64(n); p++ {
		if d.owned.has(uint32(p)) {
			d.lost(fmt.Errorf("the kernel dropped page %#x of the guest's memory and asks for it back (is the memory locked?)", p*PageSize))
			reply(d.fd, unique, unix.EIO, nil)
			return
		}
	}
	reply(d.fd, unique, 0, zeroes[:n])
}
