package shim

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"perdure/internal/blockstore"
	"perdure/internal/model"
	"perdure/internal/shimapi"
	"perdure/internal/vfs"
)

// What stands in for a guest where only its disks matter: a QEMU that answers
// its monitor and does nothing, and a gate that notes until when it is open. The
// guest's requests are then a test's own, by the disk server's socket, and its
// output is what passes that gate. This program is all of it, by its name or
// first argument.

const (
	hollowQEMU = "hollow-qemu" // the name that makes this program one
	hollowShim = "hollow-shim" // the argument that makes it a shim, see shimMain
)

// hollowMain does nothing unless this process is a part of a test's world.
func hollowMain() {
	switch {
	case filepath.Base(os.Args[0]) == hollowQEMU:
		if err := qemuMain(os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, "hollow QEMU:", err)
			os.Exit(1)
		}
		os.Exit(0)
	case len(os.Args) == 3 && os.Args[1] == hollowShim:
		if err := shimMain(os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, "shim:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
}

// hollowPlug is how long a hollow QEMU takes to plug a device.
const hollowPlug = 300 * time.Millisecond

// hollowDevices are those that a hollow QEMU was given while it ran.
type hollowDevices struct {
	event func(name string, data any)
	mu    sync.Mutex
	list  map[string]bool
}

func (d *hollowDevices) set(id string, on bool) {
	d.mu.Lock()
	had := d.list[id]
	delete(d.list, id)
	if on {
		d.list[id] = true
	}
	d.mu.Unlock()
	if had && !on {
		d.event("DEVICE_DELETED", map[string]string{"device": id, "path": "/machine/peripheral/" + id})
	}
}

func (d *hollowDevices) named(key string) []map[string]string {
	d.mu.Lock()
	defer d.mu.Unlock()
	out := []map[string]string{}
	for id := range d.list {
		out = append(out, map[string]string{key: id})
	}
	return out
}

func (d *hollowDevices) throwOut() {
	for _, m := range d.named("id") {
		d.set(m["id"], false)
	}
}

// noteGate is a kernel's gate that can be looked at from another process: a file
// holds until when it is open, in nanoseconds of CLOCK_BOOTTIME. Behind that it
// says whether the process may be killed at its point, and whether its disk fails.
type noteGate struct{ note *[3]int64 }

func openNoteGate(path string) (noteGate, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return noteGate{}, err
	}
	defer f.Close()
	const size = int(unsafe.Sizeof([3]int64{}))
	if err := f.Truncate(int64(size)); err != nil {
		return noteGate{}, err
	}
	b, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return noteGate{}, err
	}
	return noteGate{(*[3]int64)(unsafe.Pointer(&b[0]))}, nil // mapped for as long as the process lives
}

func (g noteGate) arm()        { atomic.StoreInt64(&g.note[1], 1) }
func (g noteGate) disarm()     { atomic.StoreInt64(&g.note[1], 0) }
func (g noteGate) armed() bool { return atomic.LoadInt64(&g.note[1]) != 0 }

// spoil has the disk of the process fail, or work again.
func (g noteGate) spoil(on bool) {
	n := int64(0)
	if on {
		n = 1
	}
	atomic.StoreInt64(&g.note[2], n)
}

func (g noteGate) spoilt() error {
	if atomic.LoadInt64(&g.note[2]) != 0 {
		return syscall.EIO
	}
	return nil
}

// spoiltFS is a file system whose open files fail while their gate says so.
type spoiltFS struct {
	vfs.FS
	g noteGate
}

func (s spoiltFS) file(f vfs.File, err error) (vfs.File, error) {
	if err != nil {
		return nil, err
	}
	return spoiltFile{f, s.g}, nil
}

func (s spoiltFS) Open(path string) (vfs.File, error)       { return s.file(s.FS.Open(path)) }
func (s spoiltFS) OpenLocked(path string) (vfs.File, error) { return s.file(s.FS.OpenLocked(path)) }
func (s spoiltFS) Create(path string) (vfs.File, error)     { return s.file(s.FS.Create(path)) }

type spoiltFile struct {
	vfs.File
	g noteGate
}

func (f spoiltFile) WriteAt(p []byte, off int64) (int, error) {
	if err := f.g.spoilt(); err != nil {
		return 0, err
	}
	return f.File.WriteAt(p, off)
}

func (g noteGate) Open(_ []string, d time.Duration) error {
	atomic.StoreInt64(&g.note[0], int64(bootNow()+d))
	return nil
}

func (g noteGate) Shut([]string) error {
	atomic.StoreInt64(&g.note[0], 0)
	return nil
}

// isOpen reports whether output passes now.
func (g noteGate) isOpen() bool { return int64(bootNow()) < atomic.LoadInt64(&g.note[0]) }

// openHollow is Open for a shim of such a world: its gate has something to open.
func openHollow(cfg shimapi.Config, gate string, log *slog.Logger) (*Shim, error) {
	g, err := openNoteGate(gate)
	if err != nil {
		return nil, err
	}
	var helper []string
	if cfg.Spec.Level == model.LevelFT {
		helper = []string{"/proc/self/exe", "flusher"} // see TestMain
	}
	s, err := Open(cfg, helper, g, log)
	if err != nil {
		return nil, err
	}
	s.gate.taps = []string{"hollow"}
	return s, nil
}

// shimOrder tells a shim's process what to be.
type shimOrder struct {
	Config shimapi.Config
	Gate   string
	Log    string
	// Where it is killed, once it is armed: at Point, when it has passed it After times.
	Point string
	After int
	// Activity and Journal are the store's options.
	Activity int
	Journal  int64
}

// shimMain is a shim in a process of its own.
func shimMain(order string) error {
	b, err := os.ReadFile(order)
	if err != nil {
		return err
	}
	var o shimOrder
	if err := json.Unmarshal(b, &o); err != nil {
		return err
	}
	armed, err := openNoteGate(o.Gate)
	if err != nil {
		return err
	}
	var count atomic.Int64
	storageOf = func(shimapi.Config) (vfs.FS, blockstore.Options) {
		return spoiltFS{vfs.OS{}, armed}, blockstore.Options{Activity: o.Activity, JournalLimit: o.Journal, At: func(p string) {
			if p == o.Point && armed.armed() && count.Add(1) == int64(o.After)+1 {
				_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
				select {}
			}
		}}
	}
	f, err := os.OpenFile(o.Log, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	s, err := openHollow(o.Config, o.Gate, slog.New(slog.NewTextHandler(f, &slog.HandlerOptions{Level: slog.LevelDebug})))
	if err != nil {
		return err
	}
	return s.Run(context.Background())
}

// signalHollow sends a signal to the QEMU whose pid file is in dir.
func signalHollow(dir string, sig syscall.Signal) {
	b, err := os.ReadFile(filepath.Join(dir, shimapi.QEMUPID))
	if err != nil {
		return // none was started
	}
	pid, err := strconv.Atoi(strings.Fields(string(b) + " 0")[0])
	if err != nil || pid <= 1 {
		return
	}
	name, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil || !strings.Contains(string(name), hollowQEMU) {
		return // gone, and the number is another's
	}
	_ = syscall.Kill(pid, sig)
}
