package lab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// cgroupRoot finds where cgroup v2 is mounted: /sys/fs/cgroup on most systems,
// /sys/fs/cgroup/unified or elsewhere on hybrid ones. No controller is needed.
func cgroupRoot() (string, error) {
	ms, err := readMounts("/proc/self/mountinfo")
	if err != nil {
		return "", err
	}
	for _, m := range ms {
		if m.fstype == "cgroup2" {
			return m.point, nil
		}
	}
	return "", errors.New("find cgroup v2: it is not mounted (try: mount -t cgroup2 cgroup2 /sys/fs/cgroup)")
}

// cgroupPIDs lists all processes of a cgroup and of those below it.
func cgroupPIDs(cg string) ([]int, error) {
	var pids []int
	err := filepath.WalkDir(cg, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			if errors.Is(err, os.ErrNotExist) {
				return nil
			}
			return err
		}
		if !d.IsDir() {
			return nil
		}
		b, err := os.ReadFile(filepath.Join(p, "cgroup.procs"))
		if err != nil {
			if gone(err) {
				return nil
			}
			return err
		}
		for _, f := range strings.Fields(string(b)) {
			if pid, err := strconv.Atoi(f); err == nil && pid > 0 {
				pids = append(pids, pid)
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list processes of %s: %w", filepath.Base(cg), err)
	}
	return pids, nil
}

func gone(err error) bool {
	return errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV)
}

func cgroupFrozen(cg string) bool {
	b, err := os.ReadFile(filepath.Join(cg, "cgroup.freeze"))
	return err == nil && strings.TrimSpace(string(b)) == "1"
}

// cgroupEvent reads one flag of cgroup.events.
func cgroupEvent(cg, key string) (bool, error) {
	b, err := os.ReadFile(filepath.Join(cg, "cgroup.events"))
	if err != nil {
		return false, err
	}
	return slices.Contains(strings.Split(string(b), "\n"), key+" 1"), nil
}

// waitCgroup waits until the flag of cgroup.events has the value.
func waitCgroup(ctx context.Context, cg, key string, want bool, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		v, err := cgroupEvent(cg, key)
		if gone(err) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read cgroup.events: %w", err)
		}
		if v == want {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for %q to become %t in %s: %w", key, want, filepath.Base(cg), context.Cause(ctx))
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// freezeCgroup stops or continues every process of the cgroup. Stopping waits
// until all stand still. A task in an uninterruptible call of the kernel, such
// as one that waits for a FUSE server that is already frozen, never counts as
// frozen, but it cannot return to its program either: it is enough that none runs.
func freezeCgroup(ctx context.Context, cg string, freeze bool) error {
	v := "0"
	if freeze {
		v = "1"
	}
	if err := os.WriteFile(filepath.Join(cg, "cgroup.freeze"), []byte(v), 0); err != nil {
		return fmt.Errorf("freeze or thaw: %w", err)
	}
	for quiet := 0; ; {
		err := waitCgroup(ctx, cg, "frozen", freeze, 50*time.Millisecond)
		if err == nil || ctx.Err() != nil || !freeze || !errors.Is(err, context.DeadlineExceeded) {
			return err
		}
		running, err := anyRuns(cg)
		if err != nil {
			return err
		}
		if running {
			quiet = 0
		} else if quiet++; quiet == 3 {
			return nil
		}
	}
}

// anyRuns reports whether any thread of the cgroup is on a processor or waits
// for one; a thread about to freeze is made runnable first.
func anyRuns(cg string) (bool, error) {
	pids, err := cgroupPIDs(cg)
	if err != nil {
		return false, err
	}
	for _, pid := range pids {
		stats, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
		if err != nil {
			return false, fmt.Errorf("list threads: %w", err)
		}
		for _, f := range stats {
			b, err := os.ReadFile(f)
			if err != nil {
				continue // it ended just now
			}
			if _, after, ok := strings.Cut(string(b), ") "); ok && strings.HasPrefix(after, "R") {
				return true, nil
			}
		}
	}
	return false, nil
}

// killCgroup ends every process of the cgroup at one instant and waits until
// none is left. FUSE connections of its mounts are aborted: a process that
// waits for a dead server would not end, nor would its mount.
func killCgroup(ctx context.Context, cg string) error {
	if _, err := os.Stat(cg); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	// Frozen first: while some are killed, others must not see it and react.
	if err := os.WriteFile(filepath.Join(cg, "cgroup.freeze"), []byte("1"), 0); err != nil {
		return fmt.Errorf("freeze: %w", err)
	}
	conns, err := fuseConnections(cg) // only while they live is it known which are theirs
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(cg, "cgroup.kill"), []byte("1"), 0); err != nil {
		return fmt.Errorf("kill: %w", err)
	}
	if err := abortFUSE(conns); err != nil {
		return err
	}
	if err := waitCgroup(ctx, cg, "populated", false, 30*time.Second); err != nil {
		return fmt.Errorf("kill processes: %w", err)
	}
	return nil
}

// removeCgroup kills what is in the cgroup and removes it with those below.
func removeCgroup(ctx context.Context, cg string) error {
	if err := killCgroup(ctx, cg); err != nil {
		return err
	}
	var dirs []string
	err := filepath.WalkDir(cg, func(p string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, p)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("list cgroups: %w", err)
	}
	slices.Reverse(dirs) // children first
	for _, d := range dirs {
		for try := 0; ; try++ {
			err := unix.Rmdir(d)
			if err == nil || errors.Is(err, unix.ENOENT) {
				break
			}
			// A process that was just reaped may hold its cgroup a moment longer.
			if !errors.Is(err, unix.EBUSY) || try == 200 || ctx.Err() != nil {
				return fmt.Errorf("remove cgroup %s: %w", d, err)
			}
			time.Sleep(5 * time.Millisecond)
		}
	}
	return nil
}

type mount struct {
	major, minor int
	point        string
	fstype       string
}

// readMounts parses a mountinfo file.
func readMounts(file string) ([]mount, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, fmt.Errorf("read mounts: %w", err)
	}
	defer f.Close()
	var ms []mount
	sc := bufio.NewScanner(f)
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		left, right, ok := strings.Cut(sc.Text(), " - ")
		fs := strings.Fields(left)
		if !ok || len(fs) < 5 {
			continue
		}
		var m mount
		if _, err := fmt.Sscanf(fs[2], "%d:%d", &m.major, &m.minor); err != nil {
			continue
		}
		m.point = unescapeMount(fs[4])
		m.fstype, _, _ = strings.Cut(right, " ")
		ms = append(ms, m)
	}
	if err := sc.Err(); err != nil {
		return nil, fmt.Errorf("read mounts: %w", err)
	}
	return ms, nil
}

var mountEscapes = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)

func unescapeMount(s string) string { return mountEscapes.Replace(s) }

// fuseConnections returns the FUSE connections (device minors) that are mounted
// in mount namespaces of the cgroup's processes and in none outside it.
func fuseConnections(cg string) ([]int, error) {
	pids, err := cgroupPIDs(cg)
	if err != nil {
		return nil, err
	}
	mine := map[int]bool{}
	seen := map[string]bool{}
	for _, pid := range pids {
		ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", pid))
		if err != nil || seen[ns] {
			continue
		}
		seen[ns] = true
		ms, err := readMounts(fmt.Sprintf("/proc/%d/mountinfo", pid))
		if err != nil {
			continue // it ended just now
		}
		for _, m := range ms {
			if m.fstype == "fuse" || strings.HasPrefix(m.fstype, "fuse.") {
				mine[m.minor] = true
			}
		}
	}
	outside, err := readMounts("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	for _, m := range outside { // mounts of the machine that the host's namespace inherited
		delete(mine, m.minor)
	}
	var out []int
	for c := range mine {
		out = append(out, c)
	}
	return out, nil
}

// abortFUSE aborts connections through fusectl, which is mounted for the
// moment where it is not.
func abortFUSE(conns []int) error {
	if len(conns) == 0 {
		return nil
	}
	const ctl = "/sys/fs/fuse/connections"
	if ents, err := os.ReadDir(ctl); err == nil && len(ents) == 0 {
		if err := unix.Mount("fusectl", ctl, "fusectl", 0, ""); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount fusectl: %w", err)
		}
		defer func() { _ = unix.Unmount(ctl, unix.MNT_DETACH) }() // where it stays, it does no harm
	}
	for _, c := range conns {
		err := os.WriteFile(filepath.Join(ctl, strconv.Itoa(c), "abort"), []byte("1"), 0)
		if err != nil && !gone(err) {
			return fmt.Errorf("abort FUSE connection %d: %w", c, err)
		}
	}
	return nil
}

// detachMounts unmounts what is mounted below dir in this mount namespace.
// There is nothing unless somebody mounted by hand; removing files across a
// mount would be worse than a mount too few.
func detachMounts(dir string) error {
	ms, err := readMounts("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	slices.Reverse(ms)
	for _, m := range ms {
		if !strings.HasPrefix(m.point, dir+"/") {
			continue
		}
		if err := unix.Unmount(m.point, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("unmount %s: %w", m.point, err)
		}
	}
	return nil
}
