package agent

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"perdure/api"
	"perdure/internal/authority"
	"perdure/internal/blockstore"
	"perdure/internal/model"
	"perdure/internal/shimapi"
	"perdure/internal/testenv"
	"perdure/internal/vfs"
)

// loop makes a block device of some bytes, all zero, and returns it with the file behind it.
func loop(t *testing.T, size int64) (dev, back string) {
	t.Helper()
	testenv.Root(t)
	losetup := testenv.Tool(t, "losetup")
	back = filepath.Join(t.TempDir(), "back")
	if err := os.WriteFile(back, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(back, size); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(losetup, "--find", "--show", back).Output()
	testenv.Need(t, err == nil, "needs loop devices")
	dev = strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command(losetup, "-d", dev).CombinedOutput(); err != nil {
			t.Errorf("losetup -d %s: %v %s", dev, err, out)
		}
	})
	return dev, back
}

func (h *host) replaceAt(vm, disk string, req api.ReplaceDisk) error {
	h.t.Helper()
	if err := req.Validate(); err != nil {
		return err
	}
	// Leadership moves to the witness after the start, and agents are restarted here.
	eventually(h.t, "the cluster decides", 20*time.Second, h.ag.store.Quorum)
	op, err := h.ag.ReplaceDisk(h.t.Context(), vm, disk, req)
	return h.ended(op, err)
}

// lies asserts where the replica of a disk on a host is, and is to be, as people are shown it.
func (h *host) lies(vm, disk, on, want string) {
	h.t.Helper()
	l, err := h.ag.Disks(h.t.Context(), vm)
	if err != nil {
		h.t.Fatal(err)
	}
	n := slices.IndexFunc(l, func(d api.VMDisk) bool { return d.ID == disk })
	if n < 0 {
		h.t.Fatalf("no disk %s", disk)
	}
	for _, r := range l[n].Replicas {
		if r.Host != on {
			continue
		}
		if r.Path != want || !r.Exists {
			h.t.Errorf("the replica of %s on %s lies at %q, want %q (%+v)", disk, on, r.Path, want, r)
		}
		if strings.Contains(want, "/"+shimapi.DiskDir+"/") {
			want = ""
		}
		if r.Place != want {
			h.t.Errorf("the replica of %s on %s is to lie at %q, want %q", disk, on, r.Place, want)
		}
		return
	}
	h.t.Errorf("no replica of %s on %s", disk, on)
}

func (h *host) raw(vm, disk string) string {
	return filepath.Join(h.cfg.VMDir(vm), shimapi.DiskDir, disk+".raw")
}

func there(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// TestPlaces has replicas lie elsewhere: moved there and back, through restarts of agents and
// takeovers, and gone with their VM.
func TestPlaces(t *testing.T) {
	t.Parallel()
	testenv.Root(t)
	a, b, _ := trio(t)
	dir := t.TempDir()
	dev, back := loop(t, 4<<20+blockstore.StampSize)
	hotplugVM(t, a)
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	again := func() { t.Helper(); a.await("v1", "duplex again", duplex) }

	file := filepath.Join(dir, "web.raw")
	check(a.replaceAt("v1", "disk0", api.ReplaceDisk{Host: "b", Path: file}))
	again()
	a.lies("v1", "disk0", "b", file)
	a.lies("v1", "disk0", "a", a.raw("v1", "disk0"))
	b.wantFiles("v1", "disk0.meta")
	if st, err := os.Stat(file); err != nil || st.Size() != 4<<20+blockstore.StampSize {
		t.Errorf("%v %v", st, err)
	}

	// To a device, asked of the other host; the file is gone with the replica.
	check(b.replaceAt("v1", "disk0", api.ReplaceDisk{Path: dev}))
	again()
	b.lies("v1", "disk0", "b", dev)
	if there(file) {
		t.Error("the file of the old replica is left")
	}
	// The agents find it again, and so does who makes it anew.
	b.off()
	b.on()
	a.off()
	a.on()
	again()
	check(a.replaceAt("v1", "disk0", api.ReplaceDisk{Host: "b"}))
	again()
	a.lies("v1", "disk0", "b", dev)

	// Another disk, with a place on each host.
	fa, fb := filepath.Join(dir, "data-a"), filepath.Join(dir, "data-b")
	check(b.attach("v1", api.AttachDisk{ID: "data", Size: 1 << 20, Paths: map[string]string{"": fa, "b": fb}}))
	again()
	a.lies("v1", "data", "a", fa)
	a.lies("v1", "data", "b", fb)
	check(a.resize("v1", "data", 2<<20))
	again()
	if st, err := os.Stat(fb); err != nil || st.Size() != 2<<20+blockstore.StampSize {
		t.Errorf("%v %v", st, err)
	}
	wantErr(t, "a device that is too small for more", a.resize("v1", "disk0", 8<<20), api.Invalid, "the replica would need")
	a.wantDisks("v1", "disk0 4 @10, data 2 @11")
	check(a.detach("v1", "data", false))
	again()
	// That of the running guest is the shim's to make larger, and those of these tests have no disks.
	if st, err := os.Stat(fa); err != nil || st.Size() != 1<<20 {
		t.Errorf("the data of the detached disk: %v %v", st, err)
	}
	if there(fb) {
		t.Error("the other host's replica is left")
	}
	spec, err := a.ag.store.Spec(t.Context(), "v1")
	if err != nil || len(spec.Places) != 1 || spec.Places[0] != (model.DiskPlace{Disk: "disk0", Host: "b", Path: dev}) {
		t.Errorf("places %+v %v", spec.Places, err)
	}

	// A move that broke off when the specification had the new place, and nothing else was done.
	w := a.ag.workerOf("v1")
	w.holdDisks(true)
	check(a.ag.shimOpHere(t.Context(), "v1", shimapi.Op{Op: "unprotect"}))
	a.await("v1", "simplex", simplex)
	set := func(path string) {
		t.Helper()
		check(a.ag.store.ChangeSpec(t.Context(), "v1", func(s model.VMSpec, r model.Record) (model.VMSpec, model.Record, error) {
			s.Places = s.WithPlaces(model.DiskPlace{Disk: "disk0", Host: "b", Path: path})
			r, err := authority.Outdate(r, "b")
			return s, r, err
		}))
	}
	set(filepath.Join(dir, "none/web.raw")) // which is refused now: the old one stays
	eventually(t, "nothing of the VM lives on the other host", 20*time.Second, func() bool {
		err = b.ag.prepareSecondary(t.Context(), "v1")
		return err != nil && !strings.Contains(err.Error(), "has not ended yet")
	})
	wantErr(t, "a place that is refused by now", err, api.Invalid, "there is no directory")
	check(blockstore.CheckImage(vfs.OS{}, filepath.Join(b.cfg.VMDir("v1"), shimapi.DiskDir), "disk0"))
	set(file)
	w.holdDisks(false)
	w.wake()
	again()
	a.lies("v1", "disk0", "b", file)
	check(a.replaceAt("v1", "disk0", api.ReplaceDisk{Host: "b", Path: dev}))
	again()

	// Another device under the same path: nothing is believed, and nothing is lost, before somebody says so.
	other := bytes.Repeat([]byte("other"), 1000)
	f, err := os.OpenFile(back, os.O_RDWR, 0)
	check(err)
	_, err = f.WriteAt(make([]byte, blockstore.StampSize), 4<<20)
	check(err)
	_, err = f.WriteAt(other, 4096)
	check(err)
	check(f.Close())
	check(exec.Command("blockdev", "--flushbufs", dev).Run())
	wantErr(t, "a device that holds data", a.replaceAt("v1", "disk0", api.ReplaceDisk{Host: "b"}), api.Invalid, "the device holds data")
	w.holdDisks(true)
	check(a.ag.shimOpHere(t.Context(), "v1", shimapi.Op{Op: "unprotect"}))
	eventually(t, "nothing of the VM lives on the other host", 20*time.Second, func() bool {
		err = b.ag.prepareSecondary(t.Context(), "v1")
		return err != nil && !strings.Contains(err.Error(), "has not ended yet")
	})
	if !errors.Is(err, blockstore.ErrImage) || !strings.Contains(err.Error(), "does not carry the stamp") {
		t.Errorf("another device was taken: %v", err)
	}
	got := make([]byte, len(other))
	f, err = os.Open(dev)
	check(err)
	_, err = f.ReadAt(got, 4096)
	check(err)
	check(f.Close())
	if !bytes.Equal(got, other) {
		t.Error("the other device was written to")
	}
	w.holdDisks(false)
	check(a.replaceAt("v1", "disk0", api.ReplaceDisk{Host: "b", Overwrite: true}))
	again()

	// The device becomes longer: the replica is known although its stamp is not at the end, and can grow.
	check(os.Truncate(back, 8<<20))
	check(exec.Command("losetup", "-c", dev).Run())
	check(a.replaceAt("v1", "disk0", api.ReplaceDisk{Host: "b"}))
	again()
	check(os.Truncate(back, 12<<20))
	check(exec.Command("losetup", "-c", dev).Run())
	check(a.replaceAt("v1", "disk0", api.ReplaceDisk{Host: "b", Path: dev + "/../" + filepath.Base(dev)}))
	again()
	check(a.resize("v1", "disk0", 6<<20))
	again()
	rep, err := blockstore.Inspect(vfs.OS{}, filepath.Join(b.cfg.VMDir("v1"), shimapi.DiskDir, "disk0"))
	if err != nil || rep.Meta.Size != 6<<20 || rep.Image != dev || len(rep.Problems) > 0 {
		t.Errorf("%+v %v", rep, err)
	}

	check(a.ag.StopVM(t.Context(), "v1"))
	a.await("v1", "stopped", func(r model.Record) bool { return r.Mode == model.ModeStopped })
	check(a.replaceAt("v1", "disk0", api.ReplaceDisk{Host: "b", Path: file}))
	a.lies("v1", "disk0", "b", file)
	if _, ok, err := blockstore.ProbeStamp(vfs.OS{}, dev); err != nil || ok {
		t.Errorf("the device is still stamped: %v %v", ok, err)
	}
	check(a.ag.DeleteVM(t.Context(), "v1", api.DeleteVM{}))
	if there(file) {
		t.Error("the file of the deleted VM is left")
	}
}

// TestImportElsewhere fills a file and a device from images; what was there before is gone to the
// last byte, and so is what was made once the VM is deleted.
func TestImportElsewhere(t *testing.T) {
	t.Parallel()
	testenv.Tool(t, "qemu-img")
	dev, back := loop(t, 4<<20+blockstore.StampSize)
	a := firstHost(t)
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	dir := t.TempDir()
	content := bytes.Repeat([]byte("image!!\n"), 1<<17)
	image, file, made := filepath.Join(dir, "image"), filepath.Join(dir, "file.raw"), filepath.Join(dir, "made.raw")
	check(os.WriteFile(image, content, 0o600))
	check(os.WriteFile(file, bytes.Repeat([]byte{0xee}, 4<<20), 0o600))
	check(os.WriteFile(back, bytes.Repeat([]byte{0xee}, 4<<20+blockstore.StampSize), 0o600))
	check(exec.Command("blockdev", "--flushbufs", dev).Run())
	from := func(path string) api.CreateDisk {
		return api.CreateDisk{Image: &api.File{Path: image}, Size: 4 << 20, Paths: map[string]string{"": path}, Overwrite: true}
	}
	a.create(api.CreateVM{Name: "v1", Memory: 16 << 20, Disks: []api.CreateDisk{from(dev), from(file), from(made)}})
	check(a.attach("v1", api.AttachDisk{Size: 1 << 20})) // beside them, in the state directory
	for _, p := range []string{dev, file, made} {
		got, err := os.ReadFile(p)
		check(err)
		if len(got) != 4<<20+blockstore.StampSize || !bytes.Equal(got[:len(content)], content) || !blockstore.IsZero(got[len(content):4<<20]) {
			t.Errorf("%s is not the image, and zeroes behind it", p)
		}
	}
	a.lies("v1", "disk0", "a", dev)
	a.lies("v1", "disk1", "a", file)
	check(a.ag.DeleteVM(t.Context(), "v1", api.DeleteVM{}))
	if there(file) || there(made) {
		t.Error("files of the deleted VM are left")
	}
	if _, ok, err := blockstore.ProbeStamp(vfs.OS{}, dev); ok || err != nil {
		t.Errorf("the device is still stamped: %v", err)
	}

	// A VM whose second disk is refused leaves nothing of the first.
	check(os.WriteFile(image, append([]byte("QFI\xfb\x00\x00\x00\x03"), content...), 0o600))
	if err := a.tryCreate(api.CreateVM{Name: "v1", Memory: 16 << 20, Disks: []api.CreateDisk{{Size: 1 << 20, Paths: map[string]string{"": made}}, from(file)}}); err == nil {
		t.Error("a broken image was imported")
	}
	if there(file) || there(made) {
		t.Error("files of a VM that was not made are left")
	}
}
