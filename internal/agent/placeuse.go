package agent

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Who uses a file or a block device. The kernel's exclusive claim (O_EXCL) decides about
// devices; the rest finds words for it, and what claims nothing.

// errOpen says that somebody has a file or device open, which may be in passing.
var errOpen = errors.New("it is in use")

// inUse says by what a file or device is in use. own: it is the replica's own image,
// which the VM's shim may have open.
func inUse(s spot, own bool) error {
	if !s.device() {
		if dev := loopOf(s); dev != "" {
			return fmt.Errorf("it is in use: loop device %s is made from it", dev)
		}
		if what := swapOf(s); what != "" {
			return errors.New(what)
		}
		if own {
			return nil
		}
		return openedBy(s)
	}
	if at := mountOf(s.st.Rdev); at != "" {
		return fmt.Errorf("the device is in use: it is mounted on %s", at)
	}
	if what := swapOf(s); what != "" {
		return errors.New(what)
	}
	if h := holdersOf(s.st.Rdev); len(h) > 0 {
		return fmt.Errorf("the device is in use by %s", strings.Join(h, ", "))
	}
	if own {
		return nil
	}
	if err := openedBy(s); err != nil {
		return err
	}
	fd, err := unix.Open(s.real, unix.O_RDWR|unix.O_EXCL|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("%w: the kernel says that something has claimed the device (a mount, LVM, RAID, swap, another program)", errOpen)
	case err != nil:
		return fmt.Errorf("it cannot be opened: %w", err)
	}
	return unix.Close(fd)
}

func sysBlock(rdev uint64) string {
	return fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(rdev), unix.Minor(rdev))
}

// wholeOf is the disk that a partition is of, or the device itself.
func wholeOf(rdev uint64) uint64 {
	dir, err := filepath.EvalSymlinks(sysBlock(rdev))
	if err != nil {
		return rdev
	}
	if _, err := os.Stat(filepath.Join(dir, "partition")); err != nil {
		return rdev
	}
	return devOf(filepath.Join(filepath.Dir(dir), "dev"), rdev)
}

// devOf reads a "MAJOR:MINOR" of sysfs.
func devOf(file string, otherwise uint64) uint64 {
	b, err := os.ReadFile(file)
	if err != nil {
		return otherwise
	}
	var major, minor uint32
	if _, err := fmt.Sscanf(string(b), "%d:%d", &major, &minor); err != nil {
		return otherwise
	}
	return unix.Mkdev(major, minor)
}

// overlaps reports whether two block devices are the same, or one is a partition of the other.
func overlaps(a, b uint64) bool {
	return a == b || wholeOf(a) == b || wholeOf(b) == a
}

// lower lists what a device lies on: itself, the file of a loop device, the devices below
// a device-mapper or RAID device, and so on.
func (s spot) lower() []spot {
	out := []spot{s}
	for n := 0; n < len(out) && len(out) < 64; n++ {
		if !out[n].device() {
			continue
		}
		dir := sysBlock(wholeOf(out[n].st.Rdev))
		if b, err := os.ReadFile(dir + "/loop/backing_file"); err == nil {
			if t, err := spotOf(strings.TrimSpace(string(b))); err == nil {
				out = append(out, t)
			}
		}
		slaves, _ := os.ReadDir(dir + "/slaves") // there are none
		for _, e := range slaves {
			if t, err := spotOf("/dev/" + e.Name()); err == nil {
				out = append(out, t)
			}
		}
	}
	return out
}

// holdersOf names what is built on a device or on a partition of it.
func holdersOf(rdev uint64) []string {
	var out []string
	dir := sysBlock(rdev)
	dirs, _ := filepath.Glob(dir + "/*/partition") // the pattern is good
	all := []string{dir}
	for _, p := range dirs {
		all = append(all, filepath.Dir(p))
	}
	for _, d := range all {
		entries, _ := os.ReadDir(d + "/holders") // there are none
		for _, e := range entries {
			name := e.Name()
			if b, err := os.ReadFile(filepath.Join(d, "holders", name, "dm", "name")); err == nil {
				name += " (device mapper " + strings.TrimSpace(string(b)) + ")"
			}
			out = append(out, name)
		}
	}
	return out
}

// loopOf names the loop device that is made from a file.
func loopOf(s spot) string {
	files, _ := filepath.Glob("/sys/block/loop*/loop/backing_file") // the pattern is good
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		var st unix.Stat_t
		if unix.Stat(strings.TrimSpace(string(b)), &st) == nil && st.Dev == s.st.Dev && st.Ino == s.st.Ino {
			return "/dev/" + filepath.Base(filepath.Dir(filepath.Dir(f)))
		}
	}
	return ""
}

// mountOf is where a device, or a partition of it, is mounted.
func mountOf(rdev uint64) string {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return ""
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		w := strings.Fields(sc.Text())
		if len(w) < 5 {
			continue
		}
		var major, minor uint32
		if _, err := fmt.Sscanf(w[2], "%d:%d", &major, &minor); err != nil || major == 0 {
			continue
		}
		if overlaps(unix.Mkdev(major, minor), rdev) {
			return w[4]
		}
	}
	return ""
}

// swapOf says that a file or device is swapped to.
func swapOf(s spot) string {
	b, err := os.ReadFile("/proc/swaps")
	if err != nil {
		return ""
	}
	for _, line := range strings.Split(string(b), "\n")[1:] {
		w := strings.Fields(line)
		if len(w) == 0 {
			continue
		}
		if t, err := spotOf(w[0]); err == nil && t.exists && s.same(t) {
			return "it is in use as swap space"
		}
	}
	return ""
}

// openedBy names a process that has a file or device open.
func openedBy(s spot) error {
	procs, _ := filepath.Glob("/proc/[0-9]*") // the pattern is good
	for _, p := range procs {
		pid, _ := strconv.Atoi(filepath.Base(p))
		if pid == os.Getpid() {
			continue
		}
		fds, _ := os.ReadDir(p + "/fd") // it has ended, or may not be looked at
		for _, fd := range fds {
			var st unix.Stat_t
			if unix.Stat(p+"/fd/"+fd.Name(), &st) != nil {
				continue
			}
			if s.device() && st.Mode&unix.S_IFMT == unix.S_IFBLK && st.Rdev == s.st.Rdev || !s.device() && st.Dev == s.st.Dev && st.Ino == s.st.Ino {
				name, _ := os.ReadFile(p + "/comm") // for people
				return fmt.Errorf("%w: process %d (%s) has it open", errOpen, pid, strings.TrimSpace(string(name)))
			}
		}
	}
	return nil
}
