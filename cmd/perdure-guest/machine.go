package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// machine is the guest as the control service sees it.
type machine struct {
	closeLogs func()

	mu    sync.Mutex
	disks []disk
	meter *exec.Cmd
	dirt  *exec.Cmd
}

// disk is one virtual disk that could be mounted.
type disk struct {
	dev, dir string
	check    string // what the check at boot found
	mounted  bool
}

// mountPoints are those of the first disks that hold data. A disk with
// partitions is what the guest was booted from, and left alone.
var (
	mountPoints = []string{"/data", "/data1"}
	diskNames   = []string{"vda", "vdb", "vdc"}
)

// mountDisks makes a file system where a disk is blank, replays the journal,
// checks and mounts. What fails is said on the console and in BootCheck.
func (m *machine) mountDisks() {
	for _, name := range diskNames {
		if len(m.disks) == len(mountPoints) {
			return
		}
		k := disk{dev: "/dev/" + name, dir: mountPoints[len(m.disks)]}
		if _, err := os.Stat(k.dev); err != nil {
			continue
		}
		if parts, _ := filepath.Glob("/sys/block/" + name + "/" + name + "[0-9]*"); len(parts) > 0 {
			continue
		}
		check, err := prepareDisk(k.dev, k.dir)
		if err != nil {
			k.check = "FAILED: " + err.Error()
			fmt.Printf("disk %s: %v\n", k.dev, err)
		} else {
			k.check, k.mounted = check, true
		}
		m.disks = append(m.disks, k)
	}
}

func prepareDisk(dev, dir string) (check string, err error) {
	blank, err := isBlank(dev)
	if err != nil {
		return "", err
	}
	if blank {
		out, err := exec.Command("/sbin/mke2fs", "-q", "-F", "-t", "ext4", "-m", "0", "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard", dev).CombinedOutput()
		if err != nil {
			return "", fmt.Errorf("make file system: %w: %s", err, bytes.TrimSpace(out))
		}
		check = "new"
	} else {
		// Mounting replays the journal; only then can a check that changes nothing be clean.
		if err := mountDisk(dev, dir); err != nil {
			return "", err
		}
		if err := unix.Unmount(dir, 0); err != nil {
			return "", fmt.Errorf("unmount %s: %w", dir, err)
		}
		if check, err = fsck(dev); err != nil {
			return "", err
		}
	}
	return check, mountDisk(dev, dir)
}

func isBlank(dev string) (bool, error) {
	f, err := os.Open(dev)
	if err != nil {
		return false, fmt.Errorf("open disk: %w", err)
	}
	defer f.Close()
	b := make([]byte, 64<<10)
	if _, err := io.ReadFull(f, b); err != nil {
		return false, fmt.Errorf("read disk: %w", err)
	}
	return bytes.Equal(b, make([]byte, len(b))), nil
}

func mountDisk(dev, dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("make %s: %w", dir, err)
	}
	if err := unix.Mount(dev, dir, "ext4", unix.MS_NOATIME, "errors=remount-ro"); err != nil {
		return fmt.Errorf("mount %s: %w", dev, err)
	}
	return nil
}

// fsck checks without changing anything: "clean", or what was found.
func fsck(dev string) (string, error) {
	out, err := exec.Command("/sbin/e2fsck", "-f", "-n", dev).CombinedOutput()
	var ee *exec.ExitError
	switch {
	case err == nil:
		return "clean", nil
	case errors.As(err, &ee):
		return fmt.Sprintf("ERRORS (%v): %s", err, strings.Join(strings.Fields(string(out)), " ")), nil
	}
	return "", fmt.Errorf("check file system: %w", err)
}

func (m *machine) dirs() (out []string) {
	for _, d := range m.disks {
		if !d.mounted { // the second disk must not take the first one's place
			break
		}
		out = append(out, d.dir)
	}
	return out
}

// BootCheck says what the check at boot found on each disk.
func (m *machine) BootCheck() string {
	if len(m.disks) == 0 {
		return "none"
	}
	var out []string
	for _, d := range m.disks {
		out = append(out, d.check)
	}
	return strings.Join(out, ",")
}

// Fsck unmounts a disk, checks it and mounts it again.
func (m *machine) Fsck(dir string) (string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, d := range m.disks {
		if d.dir != dir {
			continue
		}
		if err := unix.Unmount(dir, 0); err != nil {
			return "", fmt.Errorf("unmount %s: %w", dir, err)
		}
		text, err := fsck(d.dev)
		return text, errors.Join(err, mountDisk(d.dev, dir))
	}
	return "", fmt.Errorf("%s is not mounted", dir)
}

func (m *machine) shutDown(how int) error {
	if m.closeLogs != nil {
		m.closeLogs()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	unix.Sync()
	for _, d := range m.disks {
		if d.mounted {
			if err := unix.Unmount(d.dir, 0); err != nil {
				_ = unix.Mount("", d.dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, "") // the last that can be tried
			}
		}
	}
	if err := unix.Reboot(how); err != nil {
		return fmt.Errorf("reboot: %w", err)
	}
	return nil
}

// PowerOff ends the guest in order.
func (m *machine) PowerOff() error { return m.shutDown(unix.LINUX_REBOOT_CMD_POWER_OFF) }

// Reboot boots the guest again, in order.
func (m *machine) Reboot() error { return m.shutDown(unix.LINUX_REBOOT_CMD_RESTART) }

// Panic crashes the kernel.
func (m *machine) Panic() error {
	if err := os.WriteFile("/proc/sys/kernel/sysrq", []byte("1"), 0); err != nil {
		return fmt.Errorf("allow sysrq: %w", err)
	}
	if err := os.WriteFile("/proc/sysrq-trigger", []byte("c"), 0); err != nil {
		return fmt.Errorf("trigger panic: %w", err)
	}
	return nil
}

// Shell runs a shell command; its status becomes the error.
func (m *machine) Shell(ctx context.Context, cmd string, out io.Writer) error {
	c := exec.CommandContext(ctx, "/bin/busybox", "sh", "-c", cmd)
	c.Stdout, c.Stderr = out, out
	return c.Run()
}
