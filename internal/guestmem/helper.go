package guestmem

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"sync/atomic"
	"syscall"
	"unsafe"

	"github.com/zeebo/xxh3"
	"golang.org/x/sys/unix"
)

// The helper process. The process that serves the mount must not hold the file
// (its own exit would wait for itself), so the helper does everything that needs
// the file open: flush, sweep, hash. It reads the file instead of mapping it: a second
// mapping would be one more place for the kernel to visit for each page that it cleans.
//
// It inherits three sockets (SOCK_SEQPACKET; commands, sweep, hash; one request and one reply
// at a time each, except sweep, which is pipelined) and a memfd through which the data goes. It ends when its parent does.

// Descriptors of the helper.
const (
	helperCtlFD   = 3
	helperSweepFD = 4
	helperHashFD  = 5
	helperMemFD   = 6
)

// Commands on the first socket: one byte, then the arguments.
const (
	cmdAttach = 'a' // path
	cmdFlush  = 'f'
	cmdPoke   = 'p' // offset (8 bytes), value (1 byte): the store of a pretended guest, for Probe
)

// Layout of the shared memfd.
const (
	sweepSlots = 4
	sweepChunk = 1 << 20
	hashBatch  = 8192 // page numbers per request
	hashOffset = sweepSlots * sweepChunk
	sharedSize = hashOffset + hashBatch*8
)

type sweepReq struct {
	Off  uint64
	Len  uint32
	Slot uint32
}

type sweepReply struct {
	Errno   uint32
	Len     uint32
	NonZero [sweepChunk / PageSize / 64]uint64 // a bit per page
}

func isZero(p []byte) bool { return bytes.Equal(p, zeroes[:len(p)]) }

// HelperMain is the main of the helper process; it returns the exit status. It
// takes no arguments (what it needs is inherited) and must not be run by hand.
func HelperMain(args []string) int {
	if _, err := unix.GetsockoptInt(helperCtlFD, unix.SOL_SOCKET, unix.SO_TYPE); err != nil {
		fmt.Fprintln(os.Stderr, "flusher: is started by the shim only, not by hand")
		return 2
	}
	// What stops the shim stops the helper, by the end of its sockets; a Ctrl-C meant for others must not.
	signal.Ignore(syscall.SIGINT, syscall.SIGHUP)
	for fd := helperCtlFD; fd <= helperMemFD; fd++ {
		unix.CloseOnExec(fd)
	}
	shared, err := unix.Mmap(helperMemFD, 0, sharedSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		fmt.Fprintln(os.Stderr, "flusher: map shared memory:", err)
		return 1
	}
	// It must run when memory is short, for it is what makes memory clean.
	// The shim reports what of this is not allowed here: it does the same for itself.
	_ = HardenProcess()
	debug.SetGCPercent(400)
	h := &helper{shared: shared}
	h.fd.Store(-1)
	go h.serve(helperSweepFD, h.sweep)
	go h.serve(helperHashFD, h.hash)
	runtime.LockOSThread()
	h.serve(helperCtlFD, h.command)
	return 0
}

type helper struct {
	fd     atomic.Int64 // of the RAM file, -1 before attach
	shared []byte
	poke   []byte // writable mapping, for cmdPoke
}

// serve answers requests until the other end is closed. Any other trouble ends the
// process: the parent sees it at once, and nothing is kept here.
func (h *helper) serve(fd int, handle func(req []byte) []byte) {
	buf := make([]byte, 8192)
	for {
		n, err := readRetry(fd, buf)
		if err == nil && n > 0 {
			if _, err = unix.Write(fd, handle(buf[:n])); err == nil {
				continue
			}
		}
		os.Exit(0)
	}
}

func errnoOf(err error) uint32 {
	if err == nil {
		return 0
	}
	var e unix.Errno
	if errors.As(err, &e) {
		return uint32(e)
	}
	return uint32(unix.EIO)
}

func (h *helper) command(req []byte) []byte {
	var e uint32
	switch req[0] {
	case cmdAttach:
		e = errnoOf(h.attach(string(req[1:])))
	case cmdFlush:
		if fd := h.fd.Load(); fd < 0 {
			e = uint32(unix.EBADF)
		} else {
			// fdatasync, not sync_file_range: before Linux 6.16 the latter did not wait for the server.
			e = errnoOf(unix.Fdatasync(int(fd)))
		}
	case cmdPoke:
		e = errnoOf(h.store(args[pokeReq](req[1:])))
	default:
		e = uint32(unix.ENOSYS)
	}
	return append([]byte(nil), bytesOf(&e)...)
}

// attach opens the file, also for writing: the kernel can only write pages back while somebody has it open so.
func (h *helper) attach(path string) error {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	if old := h.fd.Swap(int64(fd)); old >= 0 {
		unix.Close(int(old))
	}
	return nil
}

type pokeReq struct {
	Off   uint64
	Value uint64
}

func (h *helper) store(r pokeReq) error {
	fd := int(h.fd.Load())
	if h.poke == nil {
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return err
		}
		m, err := unix.Mmap(fd, 0, int(st.Size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			return err
		}
		h.poke = m
	}
	if r.Off >= uint64(len(h.poke)) {
		return unix.EINVAL
	}
	h.poke[r.Off] = byte(r.Value)
	return nil
}

func (h *helper) sweep(req []byte) []byte {
	q := args[sweepReq](req)
	var out sweepReply
	out.Errno, out.Len = uint32(unix.EINVAL), q.Len
	if q.Slot < sweepSlots && q.Len <= sweepChunk {
		buf := h.shared[q.Slot*sweepChunk:][:q.Len]
		out.Errno = errnoOf(h.readFull(buf, int64(q.Off)))
		for p := 0; out.Errno == 0 && p < len(buf)/PageSize; p++ {
			if !isZero(buf[p*PageSize : (p+1)*PageSize]) {
				out.NonZero[p/64] |= 1 << (p % 64)
			}
		}
	}
	return append([]byte(nil), bytesOf(&out)...)
}

func (h *helper) readFull(buf []byte, off int64) error {
	fd := int(h.fd.Load())
	for len(buf) > 0 {
		n, err := unix.Pread(fd, buf, off)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return err
		case n == 0:
			return unix.ENXIO // beyond the end
		}
		buf, off = buf[n:], off+int64(n)
	}
	return nil
}

// pageHash is the hash that Hash returns.
func pageHash(p []byte) uint64 { return xxh3.Hash(p) }

// hash replaces each page number in the shared memory by the page's hash.
func (h *helper) hash(req []byte) []byte {
	n := args[uint64](req)
	e := uint32(unix.EINVAL)
	if n <= hashBatch {
		e = 0
		list := unsafe.Slice((*uint64)(unsafe.Pointer(&h.shared[hashOffset])), n)
		page := make([]byte, PageSize)
		for i, p := range list {
			if e = errnoOf(h.readFull(page, int64(p)*PageSize)); e != 0 {
				break
			}
			list[i] = pageHash(page)
		}
	}
	return append([]byte(nil), bytesOf(&e)...)
}
