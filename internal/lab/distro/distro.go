// Package distro builds a disk image with a real distribution in it: Debian
// bookworm made by debootstrap, with systemd, PostgreSQL, the QEMU guest agent,
// and GRUB for BIOS and UEFI. The long tests run it where the demo guest, which
// is made for Perdure, would prove too little.
//
// Build needs root, since debootstrap does; it needs no loop device, and every
// mount and process of the build lives in namespaces that end with it. Packages
// come from the mirror that this machine's apt is configured with. The result is kept
// in a cache directory under a digest of the recipe, so that it is built once; builds
// of one recipe in several processes wait for each other. A build that fails or is
// killed leaves at most a directory that the next one removes.
//
// Not guaranteed: that two builds give the same bytes (the mirror moves on), or
// that the guest is safe to show to anybody: root logs in on the console without
// a password, and PostgreSQL trusts its network.
package distro

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"perdure/internal/lab/bootdisk"
)

// The files of a built image, in its directory.
const (
	diskFile   = "disk.raw"
	kernelFile = "vmlinuz"
	initrdFile = "initrd.img"
)

// Layout of the disk, bytes: an EFI system partition, then the root.
const (
	rootOffset = 4 << 20
	rootSize   = 1532 << 20
	rootUUID   = "7065726d-7572-4465-8064-656269616e31"
)

// RootOffset is where the root file system begins on the disk, bytes, and
// RootPartition its number.
const (
	RootOffset    = rootOffset
	RootPartition = 1
)

// Append is the kernel command line for a boot without the image's boot loader.
const Append = "root=UUID=" + rootUUID + " ro console=ttyS0 tsc=reliable mitigations=off panic=0"

// User, Database and Port are how PostgreSQL is spoken to, without a password.
const (
	User     = "postgres"
	Database = "postgres"
	Port     = 5432
)

// Options of Build.
type Options struct {
	Address string // of the guest's first card, e.g. "10.77.0.150/24"
	Cache   string // default: the user's cache directory
	Mirror  string // default: that of this machine's apt
	Log     *slog.Logger
}

// Image is a built image. The files are shared by all who asked for it: they
// are to be read only.
type Image struct {
	Disk   string // raw
	Kernel string // of the image, for a boot without its boot loader
	Initrd string
	IP     string // of the guest
}

// Build returns the image, from the cache or built anew, which takes minutes.
func Build(ctx context.Context, o Options) (Image, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	addr, err := netip.ParsePrefix(o.Address)
	if err != nil {
		return Image{}, fmt.Errorf("build guest image: address %q: %w", o.Address, err)
	}
	if o.Cache == "" {
		c, err := os.UserCacheDir()
		if err != nil {
			c = "/var/cache"
		}
		o.Cache = filepath.Join(c, "perdure")
	}
	store := filepath.Join(o.Cache, "distro")
	if err := os.MkdirAll(store, 0o755); err != nil {
		return Image{}, fmt.Errorf("make cache: %w", err)
	}
	unlock, err := lock(filepath.Join(store, "lock"))
	if err != nil {
		return Image{}, err
	}
	defer unlock()
	dir := filepath.Join(store, digest(o.Address))
	img := Image{Disk: filepath.Join(dir, diskFile), Kernel: filepath.Join(dir, kernelFile), Initrd: filepath.Join(dir, initrdFile), IP: addr.Addr().String()}
	if _, err := os.Stat(dir); err == nil { // renamed into place when it was whole
		return img, nil
	}
	if err := build(ctx, o, store, dir); err != nil {
		return Image{}, fmt.Errorf("build guest image: %w", err)
	}
	return img, nil
}

// lock makes builds wait for each other.
func lock(path string) (func(), error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, fmt.Errorf("lock cache: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock cache: %w", err)
	}
	return func() { f.Close() }, nil
}

// digest names a recipe.
func digest(address string) string {
	h := sha256.New()
	files := recipeFiles(address)
	names := make([]string, 0, len(files))
	for n := range files {
		names = append(names, n)
	}
	slices.Sort(names)
	for _, n := range names {
		fmt.Fprintf(h, "%s\x00%s\x00", n, files[n])
	}
	fmt.Fprintf(h, "%s\x00%s\x00%s\x00%d %d", suite, strings.Join(packages, ","), setupScript, rootOffset, rootSize)
	return hex.EncodeToString(h.Sum(nil))[:16]
}

func build(ctx context.Context, o Options, store, dir string) error {
	if os.Geteuid() != 0 {
		return errors.New("debootstrap needs root")
	}
	old, _ := filepath.Glob(filepath.Join(store, ".new-*")) // of builds that were killed; the lock is ours
	for _, d := range old {
		if err := os.RemoveAll(d); err != nil {
			return fmt.Errorf("remove what an earlier build left: %w", err)
		}
	}
	tmp, err := os.MkdirTemp(store, ".new-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	if o.Mirror == "" {
		if o.Mirror, err = mirror(ctx); err != nil {
			return err
		}
	}
	root, out := filepath.Join(tmp, "root"), filepath.Join(tmp, "out")
	if err := os.Mkdir(out, 0o755); err != nil {
		return err
	}
	for _, s := range []struct {
		what string
		do   func() error
	}{
		{"install packages", func() error {
			return isolated(ctx, "debootstrap", "--variant=minbase", "--include="+strings.Join(packages, ","), suite, root, o.Mirror)
		}},
		{"write configuration", func() error { return writeTree(root, recipeFiles(o.Address)) }},
		{"set the guest up", func() error {
			return isolated(ctx, "sh", "-euc", `mount -t proc proc "$1/proc"; mount -t sysfs sys "$1/sys"; exec chroot "$1" /bin/sh -eux -c "$2"`, "sh", root, setupScript)
		}},
		{"take the kernel", func() error { return takeKernel(root, out) }},
		{"make the disk", func() error { return makeDisk(ctx, root, filepath.Join(out, diskFile)) }},
	} {
		o.Log.Info("building the guest image: " + s.what)
		if err := s.do(); err != nil {
			return fmt.Errorf("%s: %w", s.what, err)
		}
	}
	return os.Rename(out, dir)
}

// isolated runs a program in mount and PID namespaces of its own: whatever it
// mounts or starts ends with it.
func isolated(ctx context.Context, program string, args ...string) error {
	path, err := exec.LookPath(program)
	if err != nil {
		if path = filepath.Join("/usr/sbin", program); !executable(path) {
			return fmt.Errorf("the program %s is missing (Debian: debootstrap; make setup with --soak installs it)", program)
		}
	}
	c := exec.CommandContext(ctx, "unshare", append([]string{"--mount", "--propagation=private", "--pid", "--fork", "--kill-child", "--mount-proc", "--", path}, args...)...)
	c.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive", "PATH=/usr/sbin:/usr/bin:/sbin:/bin")
	if p := aptProxy(ctx); p != "" {
		c.Env = append(c.Env, "http_proxy="+p)
	}
	out, err := c.CombinedOutput()
	if err != nil {
		return fmt.Errorf("run %s: %w: %s", program, err, tail(out, 12))
	}
	return nil
}

func executable(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0
}

// tail returns the last n lines of a program's output.
func tail(b []byte, n int) string {
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// mirror asks apt where this machine gets Debian from.
func mirror(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "apt-get", "indextargets", "--format", "$(CODENAME) $(REPO_URI)", "Created-By: Packages", "Origin: Debian", "Component: main").Output()
	if err != nil {
		return "", fmt.Errorf("ask apt for its mirror: %w (is this Debian? then: apt-get update)", err)
	}
	m := chooseMirror(string(out))
	if m == "" {
		return "", errors.New("ask apt for its mirror: its lists name no archive of Debian (apt-get update reads them anew)")
	}
	return m, nil
}

// chooseMirror takes the archive of the suite itself, or else that of another
// release: archives hold all releases. Updates and security do not.
func chooseMirror(targets string) string {
	found := ""
	for line := range strings.Lines(targets) {
		name, uri, ok := strings.Cut(strings.TrimSpace(line), " ")
		switch {
		case !ok || strings.Contains(name, "-"):
		case name == suite:
			return uri
		case found == "":
			found = uri
		}
	}
	return found
}

// aptProxy is the proxy that apt uses; debootstrap does not ask apt.
func aptProxy(ctx context.Context) string {
	out, err := exec.CommandContext(ctx, "apt-config", "dump", "--format", "%v%n", "Acquire::http::Proxy").Output()
	if err != nil {
		return "" // not needed where there is none
	}
	p, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
	if p == "DIRECT" || p == "false" {
		return ""
	}
	return p
}

// writeTree writes files below root. An empty one is a link to /dev/null: what
// systemd calls masked.
func writeTree(root string, files map[string]string) error {
	for name, text := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		var err error
		if text == "" {
			err = os.Symlink("/dev/null", path)
		} else {
			err = os.WriteFile(path, []byte(text), 0o644)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// takeKernel copies kernel and initramfs out of the tree.
func takeKernel(root, out string) error {
	for pattern, to := range map[string]string{"vmlinuz-*": kernelFile, "initrd.img-*": initrdFile} {
		m, err := filepath.Glob(filepath.Join(root, "boot", pattern))
		if err != nil || len(m) != 1 {
			return fmt.Errorf("%d files %s in /boot instead of one", len(m), pattern)
		}
		b, err := os.ReadFile(m[0])
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(out, to), b, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// makeDisk puts the tree on a disk that boots.
func makeDisk(ctx context.Context, root, disk string) error {
	esp := bootdisk.Partition{Type: bootdisk.TypeESP, Offset: bootdisk.FirstPartition, Size: bootdisk.ESPSize}
	f, err := os.Create(disk)
	if err != nil {
		return err
	}
	err = f.Truncate(rootOffset + rootSize)
	if err = errors.Join(err, bootdisk.WriteTable(f, bootdisk.Partition{Type: bootdisk.TypeLinux, Offset: rootOffset, Size: rootSize}, esp), f.Close()); err != nil {
		return err
	}
	// The features are named, so that the GRUB of today reads what the mke2fs of tomorrow makes.
	var stderr bytes.Buffer
	c := exec.CommandContext(ctx, "mke2fs", "-q", "-F", "-t", "ext4", "-L", "root", "-U", rootUUID, "-m", "1",
		"-O", "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum",
		"-E", fmt.Sprintf("offset=%d", rootOffset), "-d", root, disk, fmt.Sprintf("%dk", rootSize>>10))
	c.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	if c.Path == "mke2fs" || c.Err != nil {
		c.Path, c.Err = "/usr/sbin/mke2fs", nil
	}
	c.Stderr = &stderr
	if err := c.Run(); err != nil {
		return fmt.Errorf("make file system: %w: %s", err, tail(stderr.Bytes(), 3))
	}
	return bootdisk.Install(ctx, disk, RootPartition, esp)
}
