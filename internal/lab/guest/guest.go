// Package guest builds the demo guest: the kernel of the distribution's cloud
// image package, and an initramfs with a static busybox, the file system tools
// and the program perdure-guest as its first process.
//
// The kernel package is downloaded by apt-get once and kept, unpacked, in the
// user's cache directory; after that a build needs no network and takes about
// a second. The same inputs give the same files. Build may run in several
// processes at once: results are renamed into place.
package guest

import (
	"bytes"
	"compress/gzip"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// Names of the files of a built guest.
const (
	KernelFile = "vmlinuz"
	InitrdFile = "initrd.gz"
)

// Append is the kernel command line for the guest, without its addresses. The
// kernel stays in panic (panic=0), so that it can be seen to have panicked; the
// TSC is trusted, since it is the clock that goes on during a checkpoint.
const Append = "console=ttyS0 quiet panic=0 tsc=reliable"

// modules the guest loads; those ending in "?" are left out where the kernel has none.
var modules = []string{"virtio_pci", "virtio_net", "virtio_blk", "virtio_rng?", "virtio_console", "ext4", "crc32c_generic?", "button?", "evdev?", "pvpanic_mmio?", "pvpanic_pci?", "virtio_gpu?"}

// Options of Build.
type Options struct {
	Dir     string // where KernelFile and InitrdFile go; made if missing
	Program string // static perdure-guest; default: beside this executable
	Cache   string // default: the user's cache directory
	Log     *slog.Logger
}

// Guest is a built guest.
type Guest struct {
	Kernel string // path
	Initrd string // path
}

// AppendFor returns the kernel command line of a guest with these addresses
// ("10.77.0.50/24"), one per network card.
func AppendFor(cidr ...string) string {
	s := Append
	for i, c := range cidr {
		if i == 0 {
			s += " perdure.ip=" + c
		} else {
			s += fmt.Sprintf(" perdure.ip%d=%s", i, c)
		}
	}
	return s
}

// Build builds the guest.
func Build(ctx context.Context, o Options) (Guest, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Program == "" {
		exe, err := os.Executable()
		if err != nil {
			return Guest{}, fmt.Errorf("find own executable: %w", err)
		}
		o.Program = filepath.Join(filepath.Dir(exe), "perdure-guest")
	}
	if _, err := os.Stat(o.Program); err != nil {
		return Guest{}, fmt.Errorf("find the guest's program: %w (make build makes it beside perdure)", err)
	}
	if o.Cache == "" {
		c, err := os.UserCacheDir()
		if err != nil {
			c = "/var/cache"
		}
		o.Cache = filepath.Join(c, "perdure")
	}
	kernel, mods, err := findKernel(ctx, o)
	if err != nil {
		return Guest{}, err
	}
	if err := os.MkdirAll(o.Dir, 0o755); err != nil {
		return Guest{}, fmt.Errorf("make guest directory: %w", err)
	}
	g := Guest{Kernel: filepath.Join(o.Dir, KernelFile), Initrd: filepath.Join(o.Dir, InitrdFile)}
	image, err := os.ReadFile(kernel)
	if err != nil {
		return Guest{}, fmt.Errorf("read kernel: %w", err)
	}
	if err := place(g.Kernel, image); err != nil {
		return Guest{}, err
	}
	initrd, err := makeInitrd(o.Program, mods)
	if err != nil {
		return Guest{}, fmt.Errorf("build initramfs: %w", err)
	}
	return g, place(g.Initrd, initrd)
}

// place writes a file so that it is there whole or not at all.
func place(name string, b []byte) error {
	f, err := os.CreateTemp(filepath.Dir(name), ".new")
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	defer os.Remove(f.Name())
	_, err = f.Write(b)
	err = errors.Join(err, f.Chmod(0o644), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return nil
}

// findKernel returns the kernel image and the directory of its modules, from
// the cache or else from the distribution's package.
func findKernel(ctx context.Context, o Options) (image, mods string, err error) {
	store := filepath.Join(o.Cache, "kernel")
	if image, mods, ok := cachedKernel(store); ok {
		return image, mods, nil
	}
	if _, err := exec.LookPath("apt-get"); err != nil {
		return "", "", fmt.Errorf("get the guest's kernel: it comes from Debian's package linux-image-cloud-amd64, and there is no apt-get here; unpack such a package into %s/PACKAGE", store)
	}
	if err := os.MkdirAll(store, 0o755); err != nil {
		return "", "", fmt.Errorf("make cache: %w", err)
	}
	tmp, err := os.MkdirTemp(store, ".new")
	if err != nil {
		return "", "", fmt.Errorf("make cache: %w", err)
	}
	defer os.RemoveAll(tmp)
	pkg, err := downloadKernel(ctx, o, tmp)
	if err != nil {
		return "", "", fmt.Errorf("get the guest's kernel: %w", err)
	}
	// Another process may have been faster; its result is as good.
	if err := os.Rename(filepath.Join(tmp, "root"), filepath.Join(store, pkg)); err != nil && !errors.Is(err, os.ErrExist) {
		return "", "", fmt.Errorf("keep kernel: %w", err)
	}
	image, mods, ok := cachedKernel(store)
	if !ok {
		return "", "", fmt.Errorf("get the guest's kernel: package %s holds none", pkg)
	}
	return image, mods, nil
}

// cachedKernel finds an unpacked kernel whose modules are indexed.
func cachedKernel(store string) (image, mods string, ok bool) {
	deps, _ := filepath.Glob(filepath.Join(store, "*", "lib", "modules", "*", "modules.dep"))
	slices.Sort(deps)
	slices.Reverse(deps) // newest last in name order, near enough
	for _, d := range deps {
		mods = filepath.Dir(d)
		version := filepath.Base(mods)
		image = filepath.Join(mods, "..", "..", "..", "boot", "vmlinuz-"+version)
		if _, err := os.Stat(image); err == nil {
			return image, mods, true
		}
	}
	return "", "", false
}

// downloadKernel unpacks the package that linux-image-cloud-amd64 stands for
// into tmp/root and indexes its modules.
func downloadKernel(ctx context.Context, o Options, tmp string) (pkg string, err error) {
	pkg, err = kernelPackage(ctx)
	if err != nil {
		o.Log.Info("reading package lists")
		if out, uerr := exec.CommandContext(ctx, "apt-get", "update", "-q").CombinedOutput(); uerr != nil {
			return "", fmt.Errorf("read package lists: %w: %s", uerr, lastLine(out))
		}
		if pkg, err = kernelPackage(ctx); err != nil {
			return "", err
		}
	}
	o.Log.Info("downloading the guest's kernel", "package", pkg)
	// apt's own user, which downloads, must reach the directory.
	if err := os.Chmod(tmp, 0o755); err != nil {
		return "", err
	}
	get := func() ([]byte, error) {
		c := exec.CommandContext(ctx, "apt-get", "download", "-q", pkg)
		c.Dir = tmp
		return c.CombinedOutput()
	}
	if out, err := get(); err != nil {
		// Lists that are older than the archive name packages that are gone.
		_ = exec.CommandContext(ctx, "apt-get", "update", "-q").Run()
		if out2, err := get(); err != nil {
			return "", fmt.Errorf("download %s: %w: %s %s", pkg, err, lastLine(out), lastLine(out2))
		}
	}
	debs, _ := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if len(debs) != 1 {
		return "", fmt.Errorf("download %s: %d files instead of one", pkg, len(debs))
	}
	root := filepath.Join(tmp, "root")
	if out, err := exec.CommandContext(ctx, "dpkg", "-x", debs[0], root).CombinedOutput(); err != nil {
		return "", fmt.Errorf("unpack %s: %w: %s", pkg, err, lastLine(out))
	}
	// Packages with a merged /usr keep modules below usr/lib.
	if _, err := os.Stat(filepath.Join(root, "lib", "modules")); errors.Is(err, os.ErrNotExist) {
		if err := os.Symlink("usr/lib", filepath.Join(root, "lib")); err != nil {
			return "", err
		}
	}
	vers, err := os.ReadDir(filepath.Join(root, "lib", "modules"))
	if err != nil || len(vers) != 1 {
		return "", fmt.Errorf("unpack %s: no modules of one kernel in it", pkg)
	}
	if out, err := exec.CommandContext(ctx, tool("depmod"), "-b", root, vers[0].Name()).CombinedOutput(); err != nil {
		return "", fmt.Errorf("index modules: %w: %s", err, lastLine(out))
	}
	return pkg, nil
}

var dependsRE = regexp.MustCompile(`(?m)^\s*Depends: (linux-image-[0-9]\S*)`)

// kernelPackage asks apt which package the newest cloud kernel is.
func kernelPackage(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "apt-cache", "depends", "linux-image-cloud-amd64").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("find kernel package: %w: %s", err, lastLine(out))
	}
	m := dependsRE.FindSubmatch(out)
	if m == nil {
		return "", errors.New("find kernel package: apt knows no linux-image-cloud-amd64")
	}
	return string(m[1]), nil
}

func lastLine(b []byte) string {
	b = bytes.TrimSpace(b)
	return string(b[bytes.LastIndexByte(b, '\n')+1:])
}

// tool finds a program that may lie where a user's PATH does not lead.
func tool(name string) string {
	if p, err := exec.LookPath(name); err == nil {
		return p
	}
	return filepath.Join("/usr/sbin", name)
}

func makeInitrd(program, mods string) ([]byte, error) {
	var out bytes.Buffer
	zw, err := gzip.NewWriterLevel(&out, gzip.BestSpeed)
	if err != nil {
		return nil, err
	}
	c := newCPIO(zw)
	for _, d := range []string{"dev", "proc", "sys", "run", "tmp", "data", "data1", "bin", "sbin", "modules"} {
		c.dir(d)
	}
	c.char("dev/console", 0o600, 5, 1) // the kernel opens it for the first process
	if err := addStatic(c, "init", program); err != nil {
		return nil, err
	}
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		return nil, fmt.Errorf("find busybox: %w (Debian: busybox-static)", err)
	}
	if err := addStatic(c, "bin/busybox", busybox); err != nil {
		return nil, err
	}
	for _, applet := range []string{"sh", "ls", "cat", "ps", "top", "free", "dmesg", "ip", "ping", "mount", "df", "date", "uptime", "kill", "sleep", "dd", "sync", "vi"} {
		c.symlink("bin/"+applet, "busybox")
	}
	if err := addDynamic(c, tool("mke2fs"), tool("e2fsck")); err != nil {
		return nil, err
	}
	idx, err := readModules(mods)
	if err != nil {
		return nil, err
	}
	files, err := idx.order(modules)
	if err != nil {
		return nil, err
	}
	var list strings.Builder
	for _, f := range files {
		b, err := idx.read(f)
		if err != nil {
			return nil, err
		}
		name := moduleName(f) + ".ko"
		c.file("modules/"+name, 0o644, b)
		fmt.Fprintln(&list, name)
	}
	c.file("modules/list", 0o644, []byte(list.String()))
	if err := errors.Join(c.close(), zw.Close()); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

// addStatic adds a program that needs no libraries.
func addStatic(c *cpioWriter, name, src string) error {
	f, err := elf.Open(src)
	if err != nil {
		return fmt.Errorf("read %s: %w", src, err)
	}
	defer f.Close()
	if libs, err := f.ImportedLibraries(); err == nil && len(libs) > 0 {
		return fmt.Errorf("%s is not static, it needs %s (Debian: install busybox-static; perdure-guest: build with CGO_ENABLED=0)", src, strings.Join(libs, ", "))
	}
	b, err := os.ReadFile(src)
	if err != nil {
		return fmt.Errorf("read %s: %w", src, err)
	}
	c.file(name, 0o755, b)
	return nil
}

var lddRE = regexp.MustCompile(`(?m)(/\S+) \(0x`)

// addDynamic adds programs to /sbin together with the libraries they name, at
// the paths where their loader looks for them.
func addDynamic(c *cpioWriter, programs ...string) error {
	have := map[string]bool{}
	for _, p := range programs {
		b, err := os.ReadFile(p)
		if err != nil {
			return fmt.Errorf("read program: %w (Debian: e2fsprogs)", err)
		}
		c.file("sbin/"+filepath.Base(p), 0o755, b)
		out, err := exec.Command("ldd", p).Output()
		if err != nil {
			return fmt.Errorf("list libraries of %s: %w", p, err)
		}
		for _, m := range lddRE.FindAllSubmatch(out, -1) {
			lib := string(m[1])
			if have[lib] {
				continue
			}
			have[lib] = true
			b, err := os.ReadFile(lib)
			if err != nil {
				return fmt.Errorf("read library: %w", err)
			}
			c.file(lib, 0o755, b)
		}
	}
	return nil
}
