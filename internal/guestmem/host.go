package guestmem

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// mountID is the device number of a mount: it names the connection and the bdi.
type mountID struct{ major, minor uint32 }

func (m mountID) bdi(file string) string {
	return fmt.Sprintf("/sys/class/bdi/%d:%d/%s", m.major, m.minor, file)
}

// readAhead is how many bytes the kernel fetches where a page is missing, which is so in preallocation only.
const readAhead = 16 << 20

const fusectlDir = "/sys/fs/fuse/connections"

// realDir returns the path of dir as the kernel's list of mounts spells it. dir itself is not
// looked at: it may be a dead mount.
func realDir(dir string) (string, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
		return "", err
	}
	parent, err := filepath.EvalSymlinks(filepath.Dir(dir))
	return filepath.Join(parent, filepath.Base(dir)), err
}

// prepareDir makes the mount point, and clears away the dead mount of a process that was killed.
func prepareDir(dir string) error {
	err := os.MkdirAll(dir, 0o700)
	if id, merr := findMount(dir); merr == nil {
		if !mountIsDead(dir) {
			return fmt.Errorf("mount guest memory on %s: something is mounted there (device %d:%d)", dir, id.major, id.minor)
		}
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount dead guest memory on %s: %w", dir, err)
		}
		return nil
	}
	if err != nil {
		return fmt.Errorf("make mount point of guest memory: %w", err)
	}
	return nil
}

// mountIsDead reports whether dir is a FUSE mount without a server. A server that is
// alive but does not answer is not dead.
func mountIsDead(dir string) bool {
	res := make(chan error, 1)
	go func() {
		_, err := os.Stat(dir)
		res <- err
	}()
	select {
	case err := <-res:
		return errors.Is(err, unix.ENOTCONN)
	case <-time.After(time.Second):
		return false
	}
}

// findMount looks the mount on dir up, without touching it: a stat would be a request to this very process.
func findMount(dir string) (mountID, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return mountID{}, fmt.Errorf("read mounts: %w", err)
	}
	defer f.Close()
	var id mountID
	found := false
	sc := bufio.NewScanner(f)
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		// 36 35 98:0 /root /mount/point options…
		w := strings.Fields(sc.Text())
		if len(w) < 5 || unescapeMount(w[4]) != dir {
			continue
		}
		maj, min, ok := strings.Cut(w[2], ":")
		a, err1 := strconv.ParseUint(maj, 10, 32)
		b, err2 := strconv.ParseUint(min, 10, 32)
		if ok && err1 == nil && err2 == nil {
			id, found = mountID{uint32(a), uint32(b)}, true // the last one is on top
		}
	}
	if err := sc.Err(); err != nil {
		return mountID{}, fmt.Errorf("read mounts: %w", err)
	}
	if !found {
		return mountID{}, fmt.Errorf("find mount on %s: %w", dir, os.ErrNotExist)
	}
	return id, nil
}

// unescapeMount undoes the octal escapes of mountinfo.
func unescapeMount(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// tuneBDI lifts FUSE's own limits on dirty pages: by default a FUSE mount may have
// 1 % of the host's dirty memory, and a guest that writes more is throttled.
func tuneBDI(m mountID) error {
	if err := os.WriteFile(m.bdi("max_ratio"), []byte("100"), 0); err != nil {
		return fmt.Errorf("lift limit of dirty guest memory: %w", err)
	}
	// Absent before Linux 6.2; CheckLimits says so.
	if err := os.WriteFile(m.bdi("strict_limit"), []byte("0"), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("lift strict limit of dirty guest memory: %w", err)
	}
	// Only makes preallocation faster: several READs are under way at a time.
	_ = os.WriteFile(m.bdi("read_ahead_kb"), []byte(strconv.Itoa(readAhead>>10)), 0)
	return nil
}

// abortConnection makes every request of the connection fail, those in progress too.
func abortConnection(m mountID) error {
	if m == (mountID{}) {
		return errors.New("abort FUSE connection: its number is not known")
	}
	file := filepath.Join(fusectlDir, strconv.FormatUint(uint64(m.major)<<20|uint64(m.minor), 10), "abort")
	err := os.WriteFile(file, []byte("1"), 0)
	if errors.Is(err, os.ErrNotExist) {
		if merr := unix.Mount("fusectl", fusectlDir, "fusectl", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); merr != nil && merr != unix.EBUSY {
			return fmt.Errorf("mount fusectl: %w", merr)
		}
		err = os.WriteFile(file, []byte("1"), 0)
	}
	if err != nil {
		return fmt.Errorf("abort FUSE connection: %w", err)
	}
	return nil
}

// CheckLimits returns what is wrong with limits of this process and host for RAM
// of size bytes, in words for people; none if all is well.
func CheckLimits(size int64) []string {
	var out []string
	add := func(format string, a ...any) { out = append(out, fmt.Sprintf(format, a...)) }
	if _, err := os.Stat("/dev/fuse"); err != nil {
		add("/dev/fuse is missing: load the module fuse")
	}
	if unix.Geteuid() != 0 {
		add("not root: cannot mount guest memory")
	}
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &lim); err == nil && lim.Cur != unix.RLIM_INFINITY &&
		lim.Cur < uint64(size)+(256<<20) && !canLockMemory() {
		add("the limit of locked memory is %d MiB, QEMU needs %d MiB: set LimitMEMLOCK=infinity", lim.Cur>>20, (size>>20)+256)
	}
	if v, err := readInt("/proc/sys/fs/fuse/max_pages_limit"); err == nil && v < maxWrite/PageSize {
		add("fs.fuse.max_pages_limit is %d: set it to %d or more, or flushes get slow", v, maxWrite/PageSize)
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err == nil && kernelBefore(unix.ByteSliceToString(u.Release[:]), 6, 2) {
		add("kernel %s cannot lift FUSE's strict limit of dirty memory (Linux 6.2 can): a guest that writes much is slowed down", unix.ByteSliceToString(u.Release[:]))
	}
	out = append(out, checkMemory(size)...)
	return out
}

func checkMemory(size int64) []string {
	avail, err := memAvailable()
	if err != nil {
		return []string{"cannot read /proc/meminfo: " + err.Error()}
	}
	var out []string
	if avail < size {
		out = append(out, fmt.Sprintf("%d MiB of memory are available, the guest needs %d MiB", avail>>20, size>>20))
	}
	ratio, err1 := readInt("/proc/sys/vm/dirty_ratio")
	bytes, err2 := readInt("/proc/sys/vm/dirty_bytes")
	if err1 != nil || err2 != nil {
		return append(out, "cannot read vm.dirty_ratio and vm.dirty_bytes")
	}
	limit := bytes
	if limit == 0 {
		limit = avail / 100 * ratio
	}
	// Between two checkpoints a guest may dirty some hundred MiB; beyond the limit the kernel makes it wait.
	const enough = 256 << 20
	if limit < enough {
		out = append(out, fmt.Sprintf("the kernel lets %d MiB be dirty on the whole host: raise vm.dirty_ratio or vm.dirty_bytes to %d MiB at least, or guests that write much are slowed down", limit>>20, enough>>20))
	}
	return out
}

func canLockMemory() bool {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	return unix.Capget(&hdr, &data[0]) == nil && data[0].Effective&(1<<unix.CAP_IPC_LOCK) != 0
}

func kernelBefore(release string, major, minor int) bool {
	var a, b int
	if n, _ := fmt.Sscanf(release, "%d.%d", &a, &b); n != 2 {
		return false
	}
	return a < major || a == major && b < minor
}

func readInt(file string) (int64, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
}

func memAvailable() (int64, error) {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "MemAvailable:"); ok {
			kb, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(v), " kB"), 10, 64)
			return kb << 10, err
		}
	}
	return 0, errors.New("no MemAvailable")
}

// mclOnFault locks pages when they are touched, not all of the address space that Go reserves.
const mclOnFault = 4

// oomScoreAdj makes this process one of the last to be killed for want of memory: its guest would fall with it.
const oomScoreAdj = "-900"

// HardenProcess locks the memory of this process, marks it as one that cleans dirty
// memory (PR_SET_IO_FLUSHER) and lowers its OOM score. Best effort: the
// error says what did not work. Children inherit the OOM score: reset it in
// those that should be killed first (QEMU should not be).
func HardenProcess() error {
	var errs []error
	if err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | mclOnFault); err != nil {
		errs = append(errs, fmt.Errorf("lock memory: %w", err))
	}
	// Per thread; this reaches all that exist, and later ones inherit it.
	if _, _, e := syscall.AllThreadsSyscall6(unix.SYS_PRCTL, unix.PR_SET_IO_FLUSHER, 1, 0, 0, 0, 0); e != 0 {
		errs = append(errs, fmt.Errorf("mark as cleaner of memory: %w", e))
	}
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte(oomScoreAdj), 0); err != nil {
		errs = append(errs, fmt.Errorf("lower OOM score: %w", err))
	}
	return errors.Join(errs...)
}
