package agent

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"perdure/api"
	"perdure/internal/blockstore"
	"perdure/internal/model"
	"perdure/internal/shimapi"
	"perdure/internal/testenv"
	"perdure/internal/vfs"
)

// tree is what is in some directories, by content.
func tree(t *testing.T, dirs ...string) string {
	t.Helper()
	var b strings.Builder
	for _, dir := range dirs {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() && path != dir && filepath.Base(path) == "mnt" {
				return err
			}
			fmt.Fprintf(&b, "%s %s", path, d.Type())
			if d.Type().IsRegular() {
				data, err := os.ReadFile(path)
				if err != nil {
					return err
				}
				fmt.Fprintf(&b, " %d %x", len(data), sha256.Sum256(data))
			}
			b.WriteByte('\n')
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return b.String()
}

// TestBadPlaces gives replicas paths that must not be taken. Each is refused with an error that names
// the path, and neither the VM nor anything at the paths is changed.
func TestBadPlaces(t *testing.T) {
	t.Parallel()
	testenv.Root(t)
	qemuImg := testenv.Tool(t, "qemu-img")
	a := firstHost(t)
	b := joined(t, a, "w", "witness")
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	run := func(name string, args ...string) {
		t.Helper()
		out, err := exec.Command(testenv.Tool(t, name), args...).CombinedOutput()
		testenv.Need(t, err == nil, fmt.Sprintf("%s %v: %v %s", name, args, err, out))
	}
	file := func(name string, size int64, content string) string {
		t.Helper()
		check(os.WriteFile(at(name), []byte(content), 0o600))
		check(os.Truncate(at(name), size))
		return at(name)
	}
	const size = 4 << 20

	a.create(api.CreateVM{Name: "v1", Memory: 16 << 20, Disks: []api.CreateDisk{{Size: 1 << 20}}})
	dev2, back2 := loop(t, size+blockstore.StampSize)
	a.create(api.CreateVM{Name: "v2", Memory: 16 << 20, Disks: []api.CreateDisk{{Size: size, Paths: map[string]string{"a": at("v2.raw")}}, {Size: size, Paths: map[string]string{"": dev2}}}})

	check(os.Symlink(at("v2.raw"), at("link")))
	check(os.Link(at("v2.raw"), at("hard")))
	check(os.Symlink(at("nowhere"), at("dangling")))
	check(os.Symlink(a.cfg.StateDir, at("state")))
	check(os.Mkdir(at("folder"), 0o700))
	var st unix.Stat_t
	check(unix.Stat(dev2, &st))
	check(unix.Mknod(at("node"), unix.S_IFBLK|0o600, int(st.Rdev)))
	check(unix.Mkfifo(at("fifo"), 0o600))
	sock, err := net.Listen("unix", at("sock"))
	check(err)
	defer sock.Close()
	file("small.raw", size-4096, "")
	file("data.raw", size, "precious")
	run(qemuImg, "create", "-q", "-f", "qcow2", at("base.qcow2"), "4M")
	run(qemuImg, "create", "-q", "-f", "qcow2", "-b", at("base.qcow2"), "-F", "qcow2", at("top.qcow2"))
	run(qemuImg, "create", "-q", "-f", "vmdk", at("image.vmdk"), "4M")
	check(os.Truncate(at("top.qcow2"), size))

	// Replicas of disks that no VM here has: by their stamps.
	foreign := func(name string, p blockstore.Params) string {
		t.Helper()
		d := t.TempDir()
		p.Image, p.Size, p.State = at(name), size, model.UpToDate
		check(blockstore.Create(vfs.OS{}, d, p))
		return at(name)
	}
	v1, err := a.ag.store.Spec(t.Context(), "v1")
	check(err)
	foreign("other.raw", blockstore.Params{VM: "11111111-2222-4333-8444-555555555555", ID: "disk3", Host: "a"})
	foreign("peer.raw", blockstore.Params{VM: v1.UUID, ID: "disk1", Host: "b"})
	foreign("future.raw", blockstore.Params{VM: v1.UUID, ID: "disk1", Host: "a"})
	f, err := os.OpenFile(at("future.raw"), os.O_RDWR, 0)
	check(err)
	slot := make([]byte, 512)
	_, err = f.ReadAt(slot, size+4096)
	check(err)
	slot[8] = 99
	binary.LittleEndian.PutUint32(slot[508:], crc32.Checksum(slot[:508], crc32.MakeTable(crc32.Castagnoli)))
	_, err = f.WriteAt(slot, size+4096)
	check(err)
	check(f.Close())

	smallDev, _ := loop(t, size)
	fullDev, fullBack := loop(t, size+blockstore.StampSize)
	check(os.WriteFile(fullBack, append(make([]byte, 1080), "\x53\xef file system"...), 0o600))
	check(os.Truncate(fullBack, size+blockstore.StampSize))
	check(exec.Command("blockdev", "--flushbufs", fullDev).Run())
	mountedDev, _ := loop(t, 16<<20)
	run("mkfs.ext4", "-q", mountedDev)
	check(os.Mkdir(at("mnt"), 0o700))
	run("mount", mountedDev, at("mnt"))
	defer exec.Command("umount", at("mnt")).Run() //nolint:errcheck // it may be unmounted
	swapDev, _ := loop(t, 16<<20)
	run("mkswap", swapDev)
	swaps := exec.Command("swapon", swapDev).Run() == nil
	if swaps {
		defer exec.Command("swapoff", swapDev).Run() //nolint:errcheck // the loop device tells
	}
	claimedDev, _ := loop(t, size+blockstore.StampSize)
	claim, err := os.OpenFile(claimedDev, os.O_RDWR|os.O_EXCL, 0)
	check(err)
	defer claim.Close()
	openDev, _ := loop(t, size+blockstore.StampSize)
	file("open.raw", size, "")
	holder := exec.Command("sleep", "600")
	for _, p := range []string{openDev, at("open.raw")} {
		held, err := os.Open(p)
		check(err)
		holder.ExtraFiles = append(holder.ExtraFiles, held)
	}
	check(holder.Start())
	defer func() { _ = holder.Process.Kill(); _ = holder.Wait() }()
	for _, h := range holder.ExtraFiles {
		check(h.Close())
	}
	run("mount", "-t", "tmpfs", "-o", "size=1m", "none", func() string { check(os.Mkdir(at("tiny"), 0o700)); return at("tiny") }())
	defer exec.Command("umount", at("tiny")).Run() //nolint:errcheck // see above
	check(os.Mkdir(at("ro"), 0o700))
	run("mount", "-t", "tmpfs", "none", at("ro"))
	defer exec.Command("umount", at("ro")).Run() //nolint:errcheck // see above
	check(os.WriteFile(at("ro/file.raw"), make([]byte, size), 0o600))
	run("mount", "-o", "remount,ro", at("ro"))

	spec := func() string {
		s, err := a.ag.store.Spec(t.Context(), "v1")
		check(err)
		return fmt.Sprintf("%+v", s)
	}
	dirs := []string{dir, a.cfg.Path("vms"), filepath.Dir(back2), filepath.Dir(fullBack)}
	before, was := tree(t, dirs...), spec()
	own := filepath.Join(a.cfg.VMDir("v1"), shimapi.DiskDir)
	for _, c := range []struct {
		what, path string
		class      api.Class
		part       string
	}{
		{"not absolute", "web.raw", api.Invalid, `path "web.raw" of a replica is not absolute`},
		{"empty", "", api.Invalid, `path "" of a replica is not absolute`},
		{"too long", "/" + strings.Repeat("x", 1001), api.Invalid, "allowed are 1000"},
		{"a line end", "/tmp/a\nb", api.Invalid, "control character"},
		{"a directory by its name", dir + "/", api.Invalid, "is a directory's"},
		{"a directory", at("folder"), api.Invalid, "it is a directory"},
		{"no such directory", at("none/web.raw"), api.Invalid, "there is no directory " + at("none")},
		{"below a file", at("data.raw/web.raw"), api.Invalid, "not a directory"},
		{"a symbolic link to nothing", at("dangling"), api.Invalid, "which does not exist"},
		{"a pipe", at("fifo"), api.Invalid, "neither a file nor a block device"},
		{"a socket", at("sock"), api.Invalid, "neither a file nor a block device"},
		{"a character device", "/dev/null", api.Invalid, "neither a file nor a block device"},
		{"no such device", "/dev/no-such-device", api.Invalid, "there is no such device"},
		{"no files in /proc", "/proc/web.raw", api.Invalid, "no file is made below /proc"},

		{"another VM's file", at("v2.raw"), api.Refused, `it is disk disk0 of VM "v2"`},
		{"by a symbolic link", at("link"), api.Refused, `it is disk disk0 of VM "v2"`},
		{"by a hard link", at("hard"), api.Refused, `it is disk disk0 of VM "v2"`},
		{"another VM's device", dev2, api.Refused, `it is disk disk1 of VM "v2"`},
		{"by another name", at("node"), api.Refused, `it is disk disk1 of VM "v2"`},
		{"the agent's own directory", filepath.Join(a.cfg.StateDir, "web.raw"), api.Invalid, "(the agent's own)"},
		{"another VM's directory", filepath.Join(a.cfg.VMDir("v2"), "disks/x.raw"), api.Invalid, `(that of VM "v2")`},
		{"by a symbolic link", at("state/vms/v2/disks/disk0.raw"), api.Invalid, "it is in the state directory"},
		{"its own directory", filepath.Join(own, "x.raw"), api.Invalid, `(that of VM "v1")`},

		{"a smaller file", at("small.raw"), api.Invalid, "the file has 4190208 bytes, the disk 4194304 (4MiB)"},
		{"a smaller device", smallDev, api.Invalid, "it has 4MiB (4194304 bytes), the replica needs 4202496"},
		{"a qcow2 image with a backing file", at("top.qcow2"), api.Invalid, fmt.Sprintf("it is a qcow2 image with the backing file %q", at("base.qcow2"))},
		{"a qcow2 image", at("base.qcow2"), api.Invalid, "it is a qcow2 image; a replica is raw"},
		{"a vmdk image", at("image.vmdk"), api.Invalid, "it is a vmdk image; a replica is raw"},
		{"a replica of another disk", at("other.raw"), api.Invalid, "it holds the replica of disk disk3 of VM 11111111-2222-4333-8444-555555555555 (host a)"},
		{"the replica of another host", at("peer.raw"), api.Invalid, "it is the replica of this disk on host b"},
		{"a stamp of a newer release", at("future.raw"), api.Invalid, "stamp version 99"},
		{"a file with data", at("data.raw"), api.Invalid, "the file holds data (4MiB), which would be lost"},
		{"a device with data", fullDev, api.Invalid, "the device holds data"},

		{"a mounted device", mountedDev, api.Invalid, "it is mounted on " + at("mnt")},
		{"the file of a loop device", fullBack, api.Invalid, "loop device " + fullDev + " is made from it"},
		{"swap space", swapDev, api.Invalid, map[bool]string{true: "as swap space", false: "the device holds data"}[swaps]},
		{"a claimed device", claimedDev, api.Invalid, "the kernel says that something has claimed the device"},
		{"a device that a process has open", openDev, api.Invalid, fmt.Sprintf("process %d (sleep) has it open", holder.Process.Pid)},
		{"a file that a process has open", at("open.raw"), api.Invalid, fmt.Sprintf("process %d (sleep) has it open", holder.Process.Pid)},
		{"a file system that is too small", at("tiny/web.raw"), api.Invalid, "the disk has 4MiB; 1MiB are free in " + at("tiny")},
		{"a read-only file system", at("ro/web.raw"), api.Invalid, "read-only file system"},
		{"a read-only file", at("ro/file.raw"), api.Invalid, "it cannot be written"},
		{"no permission", "/sys/web.raw", api.Invalid, "no file is made below /sys"},
	} {
		err := a.attach("v1", api.AttachDisk{ID: "disk1", Size: size, Paths: map[string]string{"a": c.path}})
		wantErr(t, c.what, err, c.class, c.part)
		if err != nil && len(c.path) < 200 && !strings.Contains(err.Error(), strings.Trim(fmt.Sprintf("%q", c.path), `"`)) {
			t.Errorf("%s: the error does not name %s: %v", c.what, c.path, err)
		}
		if strings.Contains(c.part, "has it open") || strings.Contains(c.part, "claimed") {
			continue // looked at for a while
		}
		// The same of a whole VM, of which nothing is left then.
		if err := a.tryCreate(api.CreateVM{Name: "v3", Memory: 16 << 20, Disks: []api.CreateDisk{{Size: 1 << 20}, {Size: size, Paths: map[string]string{"": c.path}}}}); err == nil {
			t.Errorf("%s: a VM was made", c.what)
		}
	}
	wantErr(t, "no such host", a.attach("v1", api.AttachDisk{Size: size, Paths: map[string]string{"zz": at("x")}}), api.NotFound, `there is no host "zz"`)
	wantErr(t, "a witness", a.attach("v1", api.AttachDisk{Size: size, Paths: map[string]string{b.cfg.Name: at("x")}}), api.Refused, "w is a witness")
	wantErr(t, "two paths for one host", a.attach("v1", api.AttachDisk{Size: size, Paths: map[string]string{"": at("x"), "a": at("y")}}), api.Invalid, "two paths are given for host a")
	check(os.Link(at("v2.raw"), at("image.raw")))
	wantErr(t, "a placed replica as an image", a.attach("v1", api.AttachDisk{Image: &api.File{Path: at("image.raw")}}), api.Refused, `is disk disk0 of VM "v2"`)
	check(os.Remove(at("image.raw")))
	wantErr(t, "an image onto itself", a.attach("v1", api.AttachDisk{Image: &api.File{Path: at("data.raw")}, Overwrite: true, Paths: map[string]string{"": at("data.raw")}}), api.Invalid, "it is the image")
	for what, second := range map[string]string{"same path": at("new.raw"), "same path written otherwise": dir + "/../" + filepath.Base(dir) + "/new.raw"} {
		wantErr(t, what, a.tryCreate(api.CreateVM{Name: "v3", Memory: 16 << 20, Disks: []api.CreateDisk{
			{Size: 1 << 20, Paths: map[string]string{"": at("new.raw")}}, {Size: 1 << 20, Paths: map[string]string{"a": second}}}}), api.Invalid, "it is given to another disk of this VM too")
	}
	if got := tree(t, dirs...); got != before {
		t.Errorf("something was changed:\n%s\nwas\n%s", got, before)
	}
	if got := spec(); got != was {
		t.Errorf("the VM was changed: %s", got)
	}

	// What holds data is taken when somebody says so.
	check(a.attach("v1", api.AttachDisk{ID: "disk1", Size: size, Overwrite: true, Paths: map[string]string{"": at("data.raw")}}))
	check(a.attach("v1", api.AttachDisk{ID: "disk2", Size: size, Overwrite: true, Paths: map[string]string{"": fullDev}}))
	for _, p := range []string{at("data.raw"), fullDev} {
		f, err := os.Open(p)
		check(err)
		got := make([]byte, size)
		_, err = f.ReadAt(got, 0)
		check(err)
		check(f.Close())
		if !blockstore.IsZero(got) {
			t.Errorf("%s: an empty disk is not empty", p)
		}
	}
}

func (h *host) tryCreate(req api.CreateVM) error {
	h.t.Helper()
	if err := req.Validate(); err != nil {
		return err
	}
	op, err := h.ag.CreateVM(h.t.Context(), req)
	return h.ended(op, err)
}
