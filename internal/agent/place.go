package agent

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"perdure/api"
	"perdure/internal/blockstore"
	"perdure/internal/model"
	"perdure/internal/shimapi"
	"perdure/internal/vfs"
)

// A replica may lie at a path that a person gave: a file on another file system, or a
// block device. The host where it will be looks at the path before anything is changed
// anywhere, and again when the replica is made; what is in use by anything, or belongs
// to another disk, is refused. Who opens it takes it exclusively (vfs.OpenLocked) and
// compares its stamp (blockstore.ErrImage), so what slips in between does no harm.

// placeWait bounds a look at a path: a device may not answer.
const placeWait = 20 * time.Second

// passing is how long something may have a file or device open in passing: udev looks at each device
// that was written to, and a process that is about to start another one shares its files with it.
const passing = 500 * time.Millisecond

// placeAsk is a path to be looked at.
type placeAsk struct {
	VM        string   `json:"vm"`
	UUID      string   `json:"uuid"`
	Disk      string   `json:"disk"`
	Size      int64    `json:"size"`
	Path      string   `json:"path"`
	Overwrite bool     `json:"overwrite,omitempty"` // what is there may be lost
	Others    []string `json:"others,omitempty"`    // paths that the same request gives to other disks here
	Grow      int64    `json:"grow,omitempty"`      // present size of a disk whose replica there is to become larger
}

// placeFound is what a path turned out to be.
type placeFound struct {
	Device bool `json:"device"`
}

// placeOn has a host look at a path there.
func (a *Agent) placeOn(ctx context.Context, host string, ask placeAsk) (found placeFound, err error) {
	ctx, cancel := context.WithTimeout(ctx, placeWait)
	defer cancel()
	if host == a.cfg.Name {
		if found, err = a.placeHere(ctx, ask); err != nil {
			err = fmt.Errorf("host %s: %w", host, err)
		}
		return found, err
	}
	if err := a.checkHost(host); err != nil {
		return found, err
	}
	return found, a.ask(ctx, host, "POST", "place", ask.VM, ask, &found)
}

// placeHere looks at a path on this host, and changes nothing.
func (a *Agent) placeHere(ctx context.Context, ask placeAsk) (placeFound, error) {
	var found placeFound
	answers, err := answersIn(ctx, func() (err error) {
		found, err = a.lookAtPlace(ask)
		return err
	})
	if !answers {
		return placeFound{}, api.Errorf(api.Timeout, "path %s for disk %s of VM %q: it does not answer", ask.Path, ask.Disk, ask.VM)
	}
	return found, err
}

// answersIn runs f, which asks a file or device that may not answer. Then it returns false, f
// stays held by the kernel, and nothing that it writes is to be read.
func answersIn(ctx context.Context, f func() error) (bool, error) {
	ch := make(chan error, 1)
	go func() { ch <- f() }()
	select {
	case err := <-ch:
		return true, err
	case <-ctx.Done():
		return false, nil
	}
}

// heldPlaces are the paths on this host for which a replica is being made: they belong to
// its disk from before the look at them on, so that two requests at a time do not take the same.
type heldPlaces struct {
	mu   sync.Mutex
	list []*placeClaim
}

// holdPlace makes a path belong to a disk until the result is called.
func (a *Agent) holdPlace(ask placeAsk) (release func()) {
	h, c := &a.places, &placeClaim{ask.VM, ask.UUID, ask.Disk, ask.Path}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.list = append(h.list, c)
	return func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.list = slices.DeleteFunc(h.list, func(o *placeClaim) bool { return o == c })
	}
}

// placeError refuses a path, with the thing and the value named.
func placeError(ask placeAsk, f string, args ...any) *api.Error {
	return api.Errorf(api.Invalid, "path %s for disk %s of VM %q: %w", ask.Path, ask.Disk, ask.VM, fmt.Errorf(f, args...))
}

func (a *Agent) lookAtPlace(ask placeAsk) (placeFound, error) {
	if err := api.CheckPlace(ask.Path); err != nil {
		return placeFound{}, err
	}
	if ask.Grow > 0 {
		return placeFound{}, growAt(ask)
	}
	s, err := spotOf(ask.Path)
	if err != nil {
		return placeFound{}, placeError(ask, "%w", err)
	}
	if err := a.notOurs(ask, s); err != nil {
		return placeFound{}, err
	}
	if err := s.kind(); err != nil {
		return placeFound{}, placeError(ask, "%w", err)
	}
	found := placeFound{Device: s.device()}
	if err := a.claimed(ask, s); err != nil {
		return found, err
	}
	if !s.exists {
		return found, a.roomFor(ask, s)
	}
	own, err := a.stampAt(ask, s)
	if err != nil {
		return found, err
	}
	err = inUse(s, own)
	for end := time.Now().Add(passing); errors.Is(err, errOpen) && time.Now().Before(end); err = inUse(s, own) {
		time.Sleep(passing / 10)
	}
	if err != nil {
		return found, placeError(ask, "%w", err).WithAction("nothing was changed; give a path that nothing else uses")
	}
	if err := fits(ask, s, own); err != nil {
		return found, err
	}
	return found, nil
}

// spot is what a path leads to.
type spot struct {
	path   string // as given
	real   string // without symbolic links
	exists bool
	st     unix.Stat_t
}

func spotOf(path string) (s spot, err error) {
	s.path = filepath.Clean(path)
	s.real, err = filepath.EvalSymlinks(s.path)
	if err == nil {
		s.exists = true
		if err := unix.Stat(s.real, &s.st); err != nil {
			return s, fmt.Errorf("look at it: %w", err)
		}
		return s, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return s, plainPath(err)
	}
	if to, err := os.Readlink(s.path); err == nil {
		return s, fmt.Errorf("it is a symbolic link to %s, which does not exist", to)
	}
	dir, err := filepath.EvalSymlinks(filepath.Dir(s.path))
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return s, fmt.Errorf("there is no directory %s; directories are not made", filepath.Dir(s.path))
		}
		return s, plainPath(err)
	}
	s.real = filepath.Join(dir, filepath.Base(s.path))
	return s, nil
}

// plainPath takes the call's name out of an error of the file system.
func plainPath(err error) error {
	var p *fs.PathError
	if errors.As(err, &p) {
		return fmt.Errorf("%s: %w", p.Path, p.Err)
	}
	return err
}

func (s spot) device() bool { return s.exists && s.st.Mode&unix.S_IFMT == unix.S_IFBLK }

// kind refuses what is neither a file nor a block device, nor can become a file.
func (s spot) kind() error {
	if !s.exists {
		for _, d := range []string{"/dev", "/proc", "/sys"} {
			if within(s.real, d) {
				return fmt.Errorf("there is no such device, and no file is made below %s", d)
			}
		}
		return nil
	}
	switch s.st.Mode & unix.S_IFMT {
	case unix.S_IFREG, unix.S_IFBLK:
		return nil
	case unix.S_IFDIR:
		return fmt.Errorf("it is a directory; allowed are a file (give its name too, such as %s) and a block device", filepath.Join(s.path, "disk.raw"))
	}
	return errors.New("it is neither a file nor a block device")
}

func within(path, dir string) bool { return path == dir || strings.HasPrefix(path, dir+"/") }

// same reports whether two paths lead to the same file, or to devices that overlap.
func (s spot) same(o spot) bool {
	switch {
	case !s.exists || !o.exists:
		return s.real == o.real
	case s.device() && o.device():
		return overlaps(s.st.Rdev, o.st.Rdev)
	}
	return s.st.Dev == o.st.Dev && s.st.Ino == o.st.Ino
}

// notOurs refuses paths below the agent's own directory, by whatever name.
func (a *Agent) notOurs(ask placeAsk, s spot) error {
	own, err := os.Stat(a.cfg.StateDir)
	if err != nil {
		return fmt.Errorf("look at the state directory: %w", err)
	}
	for dir := filepath.Dir(s.real); ; dir = filepath.Dir(dir) {
		if st, err := os.Stat(dir); err == nil && os.SameFile(st, own) {
			rel, _ := filepath.Rel(dir, s.real)
			whose := "the agent's own"
			if p := strings.Split(rel, "/"); len(p) > 2 && p[0] == "vms" {
				whose = fmt.Sprintf("that of VM %q", p[1])
			}
			return placeError(ask, "it is in the state directory %s of host %s (%s); allowed are paths outside of it", a.cfg.StateDir, a.cfg.Name, whose).
				WithAction("leave the path out to keep a replica in the state directory")
		}
		if dir == "/" {
			return nil
		}
	}
}

// placeClaim is a path that belongs to a disk.
type placeClaim struct {
	vm, uuid, disk string
	path           string
}

// claims lists the paths that belong to disks of VMs here: those where replicas are, those
// where they are being made, and those where they are to be made.
func (a *Agent) claims() []placeClaim {
	var out []placeClaim
	a.places.mu.Lock()
	for _, c := range a.places.list {
		out = append(out, *c)
	}
	a.places.mu.Unlock()
	for _, v := range a.store.VMs() {
		for _, p := range v.Spec.Places {
			if p.Host == a.cfg.Name {
				out = append(out, placeClaim{v.Spec.Name, v.Spec.UUID, p.Disk, p.Path})
			}
		}
	}
	files, _ := filepath.Glob(a.cfg.Path("vms") + "/*/" + shimapi.DiskDir + "/*.meta") // the pattern is good
	for _, f := range files {
		id := strings.TrimSuffix(filepath.Base(f), ".meta")
		m, err := blockstore.ReadMeta(vfs.OS{}, filepath.Dir(f), id)
		if err != nil {
			continue // who opens it says what is wrong
		}
		c := placeClaim{vm: filepath.Base(filepath.Dir(filepath.Dir(f))), uuid: m.VM, disk: id, path: m.Image}
		if c.path == "" {
			c.path = strings.TrimSuffix(f, ".meta") + ".raw"
		}
		out = append(out, c)
	}
	return out
}

// claimed refuses a path that another disk has, or is being given by the same request.
func (a *Agent) claimed(ask placeAsk, s spot) error {
	for _, o := range ask.Others {
		if t, err := spotOf(o); err == nil && s.same(t) {
			return placeError(ask, "it is given to another disk of this VM too (%s)", o)
		}
	}
	lower := s.lower()
	for _, c := range a.claims() {
		if c.uuid == ask.UUID && c.disk == ask.Disk {
			continue
		}
		t, err := spotOf(c.path)
		if err != nil {
			continue
		}
		for _, l := range lower {
			if !l.same(t) {
				continue
			}
			way := ""
			if c.path != s.path {
				way = fmt.Sprintf(" (%s)", c.path)
			}
			return api.Errorf(api.Refused, "path %s for disk %s of VM %q: it is disk %s of VM %q%s; each disk needs a file or device of its own", ask.Path, ask.Disk, ask.VM, c.disk, c.vm, way)
		}
	}
	return nil
}

// stampAt reports whether the stamp of this very replica is there. That of
// another one is refused: its data may be the last of their kind.
func (a *Agent) stampAt(ask placeAsk, s spot) (own bool, err error) {
	// A device that was made longer since has the stamp where its metadata say.
	dir := a.vmFile(ask.VM, shimapi.DiskDir)
	if m, err := blockstore.ReadMeta(vfs.OS{}, dir, ask.Disk); err == nil && m.VM == ask.UUID && m.Image == s.path && blockstore.CheckImage(vfs.OS{}, dir, ask.Disk) == nil {
		return true, nil
	}
	t, ok, err := blockstore.ProbeStamp(vfs.OS{}, s.real)
	switch {
	case errors.Is(err, blockstore.ErrVersion):
		return false, placeError(ask, "it is a replica of a newer release of Perdure (%w); it is not written over", err)
	case err != nil:
		return false, placeError(ask, "read it: %w", plainPath(err))
	case !ok:
		return false, nil
	case t.VM == ask.UUID && t.Disk == ask.Disk && t.Host == a.cfg.Name:
		return true, nil
	case t.VM == ask.UUID && t.Disk == ask.Disk:
		return false, placeError(ask, "it is the replica of this disk on host %s; each host needs a file or device of its own", t.Host)
	}
	whose := t.VM
	for _, v := range a.store.VMs() {
		if v.Spec.UUID == t.VM {
			whose = fmt.Sprintf("%q", v.Spec.Name)
		}
	}
	return false, placeError(ask, "it holds the replica of disk %s of VM %s (host %s) by the stamp at its end; it is not written over", t.Disk, whose, t.Host).
		WithAction("detach that disk where it is in use; where it is not needed any more, remove the file, or clear the last 8 KiB of the device (%s)", s.path)
}

// imageMagic are the beginnings of disk images that are not raw.
var imageMagic = []struct{ magic, name string }{{"QFI\xfb", "qcow2"}, {"KDMV", "vmdk"}, {"conectix", "vpc"}, {"vhdxfile", "vhdx"}, {"QED\x00", "qed"}}

// fits refuses what is too small, what is another kind of image, and, unless it was agreed
// to, what holds data.
func fits(ask placeAsk, s spot, own bool) error {
	f, err := os.OpenFile(s.real, os.O_RDWR, 0)
	if err != nil {
		return placeError(ask, "it cannot be written: %w", plainPath(err)).WithAction("see permissions, attributes (lsattr) and whether the file system is mounted read-only")
	}
	defer f.Close()
	size, err := f.Seek(0, 2)
	if err != nil {
		return placeError(ask, "find its size: %w", plainPath(err))
	}
	if !s.device() {
		head := make([]byte, 104)
		n, _ := f.ReadAt(head, 0)
		if err := otherImage(head[:n], f, own); err != nil {
			return placeError(ask, "%w", err).WithAction("to have a disk filled from it, give it as the image (perdure disk attach VM --image)")
		}
	}
	need := ask.Size
	if s.device() {
		need += blockstore.StampSize
	}
	if size < need {
		if s.device() {
			return placeError(ask, "it has %s (%d bytes), the replica needs %d: the disk's %s and %d bytes behind it", api.FormatSize(size), size, need, api.FormatSize(ask.Size), blockstore.StampSize)
		}
		return placeError(ask, "the file has %d bytes, the disk %d (%s); give a name that does not exist yet, or a file that is large enough", size, ask.Size, api.FormatSize(ask.Size))
	}
	if !own && !ask.Overwrite {
		what, err := holdsData(f, size, s.device())
		if err != nil {
			return placeError(ask, "read it: %w", plainPath(err))
		}
		if what != "" {
			return placeError(ask, "%s, which would be lost", what).WithAction("give another path, or repeat with --overwrite if nobody needs it")
		}
	}
	if !s.device() {
		var st unix.Statfs_t
		if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
			return placeError(ask, "read the free space: %w", err)
		}
		return enough(ask, int64(st.Bavail)*st.Bsize+s.st.Blocks*512, s.path)
	}
	return nil
}

func otherImage(head []byte, f *os.File, own bool) error {
	for _, m := range imageMagic {
		if own || !strings.HasPrefix(string(head), m.magic) {
			continue
		}
		if m.name == "qcow2" && len(head) >= 20 {
			off, n := binary.BigEndian.Uint64(head[8:]), binary.BigEndian.Uint32(head[16:])
			if off != 0 && n > 0 && n < 1024 {
				name := make([]byte, n)
				if _, err := f.ReadAt(name, int64(off)); err == nil {
					return fmt.Errorf("it is a qcow2 image with the backing file %q; a replica is raw", name)
				}
			}
		}
		return fmt.Errorf("it is a %s image; a replica is raw", m.name)
	}
	return nil
}

// holdsData says what seems to be on a file or device; empty: nothing.
func holdsData(f *os.File, size int64, device bool) (string, error) {
	if !device {
		at, err := unix.Seek(int(f.Fd()), 0, unix.SEEK_DATA)
		switch {
		case errors.Is(err, unix.ENXIO):
			return "", nil // all hole
		case err == nil && at < size:
			return fmt.Sprintf("the file holds data (%s)", api.FormatSize(size)), nil
		}
	}
	// File systems, partition tables, LVM and encryption are known by their beginnings, some by their ends.
	const head, tail = 1 << 20, 64 << 10
	for _, r := range [][2]int64{{0, min(head, size)}, {max(size-tail, 0), size}} {
		b := make([]byte, r[1]-r[0])
		if _, err := f.ReadAt(b, r[0]); err != nil {
			return "", err
		}
		if !blockstore.IsZero(b) {
			return "the device holds data (its first MiB or its end is not all zero)", nil
		}
	}
	return "", nil
}

// roomFor checks that a file can be made, and would fit.
func (a *Agent) roomFor(ask placeAsk, s spot) error {
	dir := filepath.Dir(s.real)
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EISDIR) || errors.Is(err, unix.ENOENT) {
		// The file system knows no files without a name: one is made and taken away again.
		fd, err = unix.Open(s.real, unix.O_CREAT|unix.O_EXCL|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
		if err == nil {
			defer os.Remove(s.real)
		}
	}
	if err != nil {
		return placeError(ask, "no file can be made in %s: %w", dir, err).WithAction("see permissions, and whether the file system is mounted read-only")
	}
	defer unix.Close(fd)
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil {
		return placeError(ask, "read the free space: %w", err)
	}
	return enough(ask, int64(st.Bavail)*st.Bsize, dir)
}

func enough(ask placeAsk, free int64, where string) error {
	if ask.Size+blockstore.StampSize > free {
		return placeError(ask, "the disk has %s; %s are free in %s", api.FormatSize(ask.Size), api.FormatSize(free), where)
	}
	return nil
}

// placed completes the description of a replica that is to be made here by the place that the
// specification gives it, after a look at that place. When the replica was made, or not, release is to be called.
func (a *Agent) placed(ctx context.Context, spec model.VMSpec, p blockstore.Params) (_ blockstore.Params, release func(), err error) {
	at, ok := spec.Place(p.ID, a.cfg.Name)
	if !ok {
		return p, func() {}, nil
	}
	ctx, cancel := context.WithTimeout(ctx, placeWait)
	defer cancel()
	ask := placeAsk{VM: spec.Name, UUID: spec.UUID, Disk: p.ID, Size: p.Size, Path: at.Path, Overwrite: at.Overwrite}
	release = a.holdPlace(ask)
	found, err := a.placeHere(ctx, ask)
	if err != nil {
		release()
		return p, nil, err
	}
	p.Image, p.Device, p.Host = filepath.Clean(at.Path), found.Device, a.cfg.Name
	return p, release, nil
}

// checkImage says why the image of a replica that lies elsewhere is not what its metadata speak of.
func (a *Agent) checkImage(ctx context.Context, vm, disk string) error {
	ctx, cancel := context.WithTimeout(ctx, placeWait/2)
	defer cancel()
	answers, err := answersIn(ctx, func() error { return blockstore.CheckImage(vfs.OS{}, a.vmFile(vm, shimapi.DiskDir), disk) })
	if !answers {
		err = fmt.Errorf("the image of %s does not answer", disk)
	}
	if err != nil {
		err = fmt.Errorf("%w; perdure disk replace %s %s --host %s makes it anew", err, vm, disk, a.cfg.Name)
	}
	return err
}

// removeReplica removes this host's replica of a disk. An image elsewhere that cannot be removed
// with it is left behind.
func (a *Agent) removeReplica(vm, disk string) error {
	left, err := blockstore.Release(vfs.OS{}, a.vmFile(vm, shimapi.DiskDir), disk, false)
	if left != nil {
		a.log.Warn("the image of a removed replica is left behind", "vm", vm, "disk", disk, "error", left)
	}
	return err
}

// misplaced reports whether a replica here lies elsewhere than the specification says: its
// making anew there broke off.
func (a *Agent) misplaced(spec model.VMSpec, disk string) bool {
	m, err := blockstore.ReadMeta(vfs.OS{}, a.vmFile(spec.Name, shimapi.DiskDir), disk)
	at, ok := spec.Place(disk, a.cfg.Name)
	return err == nil && (ok && m.Image != filepath.Clean(at.Path) || !ok && m.Image != "")
}
