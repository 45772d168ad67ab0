package agent

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"perdure/api"
	"perdure/internal/blockstore"
	"perdure/internal/model"
	"perdure/internal/shimapi"
	"perdure/internal/testenv"
	"perdure/internal/vfs"
)

// ended follows an operation to its end.
func (h *host) ended(op api.Operation, err error) error {
	h.t.Helper()
	if err != nil {
		return err
	}
	eventually(h.t, "operation ends", 40*time.Second, func() bool {
		op, err = h.ag.Operation(h.t.Context(), op.ID)
		return err != nil || op.State != api.OperationRunning
	})
	if err != nil {
		return err
	}
	if op.Error != nil {
		return op.Error.Err()
	}
	return nil
}

func (h *host) attach(vm string, req api.AttachDisk) error {
	h.t.Helper()
	if err := req.Validate(); err != nil {
		return err
	}
	op, err := h.ag.AttachDisk(h.t.Context(), vm, req)
	return h.ended(op, err)
}

func (h *host) detach(vm, disk string, del bool) error {
	h.t.Helper()
	op, err := h.ag.DetachDisk(h.t.Context(), vm, disk, api.DetachDisk{Delete: del})
	return h.ended(op, err)
}

func (h *host) resize(vm, disk string, size int64) error {
	h.t.Helper()
	op, err := h.ag.ResizeDisk(h.t.Context(), vm, disk, api.ResizeDisk{Size: size})
	return h.ended(op, err)
}

func (h *host) replace(vm, disk, host string) error {
	h.t.Helper()
	op, err := h.ag.ReplaceDisk(h.t.Context(), vm, disk, api.ReplaceDisk{Host: host})
	return h.ended(op, err)
}

// specDisks are "ID SIZE/MiB @SLOT" by the store.
func (h *host) specDisks(vm string) string {
	h.t.Helper()
	spec, err := h.ag.store.Spec(h.t.Context(), vm)
	if err != nil {
		h.t.Fatal(err)
	}
	var out []string
	for _, d := range model.PinSlots(spec.Disks) {
		out = append(out, fmt.Sprintf("%s %d @%x", d.ID, d.Size>>20, d.Slot))
	}
	return strings.Join(out, ", ")
}

func (h *host) wantDisks(vm, want string) {
	h.t.Helper()
	if got := h.specDisks(vm); got != want {
		h.t.Fatalf("disks %q, want %q", got, want)
	}
}

// files lists the names of what a VM has in its disk directory here, without the
// files that belong to a replica beside its metadata.
func (h *host) files(vm string) []string {
	var out []string
	for _, p := range []string{"*.meta", "*.raw", keptDir + "/*"} {
		m, _ := filepath.Glob(filepath.Join(h.cfg.VMDir(vm), shimapi.DiskDir, p))
		for _, f := range m {
			rel, _ := filepath.Rel(filepath.Join(h.cfg.VMDir(vm), shimapi.DiskDir), f)
			out = append(out, rel)
		}
	}
	slices.Sort(out)
	return out
}

func (h *host) wantFiles(vm string, want ...string) {
	h.t.Helper()
	if got := h.files(vm); !slices.Equal(got, want) {
		h.t.Fatalf("host %s has %v, want %v", h.cfg.Name, got, want)
	}
}

func TestDisksOfStoppedVM(t *testing.T) {
	t.Parallel()
	testenv.Tool(t, "qemu-img")
	a := firstHost(t)
	ctx, dir := t.Context(), t.TempDir()
	a.create(api.CreateVM{Name: "v1", Memory: 16 << 20, Disks: []api.CreateDisk{{Size: 4 << 20}, {Size: 1 << 20}}})
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	check(a.attach("v1", api.AttachDisk{Size: 2 << 20}))
	a.wantDisks("v1", "disk0 4 @10, disk1 1 @11, disk2 2 @12")
	// What is taken away leaves its slot, and nothing else moves.
	check(a.detach("v1", "disk1", false))
	a.wantDisks("v1", "disk0 4 @10, disk2 2 @12")
	a.wantFiles("v1", "disk0.meta", "disk0.raw", "disk2.meta", "disk2.raw", "kept/disk1-1.raw")
	check(a.attach("v1", api.AttachDisk{From: "disk1-1", ID: "old"}))
	a.wantDisks("v1", "disk0 4 @10, disk2 2 @12, old 1 @11")
	a.wantFiles("v1", "disk0.meta", "disk0.raw", "disk2.meta", "disk2.raw", "old.meta", "old.raw")
	check(a.detach("v1", "old", true))
	a.wantFiles("v1", "disk0.meta", "disk0.raw", "disk2.meta", "disk2.raw")

	img := filepath.Join(dir, "i.raw")
	check(os.WriteFile(img, slices.Repeat([]byte("x"), 3<<20), 0o600))
	check(a.attach("v1", api.AttachDisk{Image: &api.File{Path: img}, ID: "data"}))
	a.wantDisks("v1", "disk0 4 @10, disk2 2 @12, data 3 @11")
	got, err := os.ReadFile(filepath.Join(a.cfg.VMDir("v1"), shimapi.DiskDir, "data.raw"))
	if err != nil || string(got) != strings.Repeat("x", 3<<20) {
		t.Errorf("the image is not what the disk holds: %v", err)
	}
	check(a.resize("v1", "data", 5<<20))
	a.wantDisks("v1", "disk0 4 @10, disk2 2 @12, data 5 @11")
	l, err := a.ag.Disks(ctx, "v1")
	check(err)
	if len(l) != 3 || l[2].Size != 5<<20 || len(l[2].Replicas) != 1 || l[2].Replicas[0].Size != 5<<20 || !l[2].Replicas[0].Exists || l[2].Replicas[0].OwnState != model.UpToDate || len(l[2].Replicas[0].Damage) != 0 {
		t.Errorf("%+v", l)
	}

	// Left over by an agent that ended in the middle: of no concern to a new disk.
	d := filepath.Join(a.cfg.VMDir("v1"), shimapi.DiskDir)
	check(os.WriteFile(filepath.Join(d, "half.raw"), []byte("half"), 0o600))
	check(a.attach("v1", api.AttachDisk{Size: 1 << 20, ID: "half"}))
	check(a.detach("v1", "half", true))
	check(blockstore.Create(vfs.OS{}, d, blockstore.Params{ID: "whole", VM: "another", Size: 1 << 20, State: model.UpToDate}))
	check(a.attach("v1", api.AttachDisk{Size: 2 << 20, ID: "whole"}))
	if kept := a.files("v1"); !slices.Contains(kept, "kept/whole-1.raw") {
		t.Errorf("what lay there is lost: %v", kept)
	}
}

// TestDiskRefusals: bad input is refused with what is wrong, and changes nothing.
func TestDiskRefusals(t *testing.T) {
	t.Parallel()
	qemuImg := testenv.Tool(t, "qemu-img")
	a := firstHost(t)
	ctx, dir := t.Context(), t.TempDir()
	for _, n := range []string{"v1", "v2"} {
		a.create(api.CreateVM{Name: n, Memory: 16 << 20, Disks: []api.CreateDisk{{Size: 4 << 20}}})
	}
	before, files := a.specDisks("v1"), a.files("v1")
	image := func(name string, args ...string) *api.File {
		path := filepath.Join(dir, name)
		if out, err := exec.Command(qemuImg, append(append([]string{"create", "-q"}, args...), path)...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return &api.File{Path: path}
	}
	sized := func(f *api.File, size string) *api.File {
		if out, err := exec.Command(qemuImg, "resize", "-q", f.Path, size).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return f
	}
	base := image("base.qcow2", "-f", "qcow2", "-o", "size=2M")
	backed := image("backed.qcow2", "-f", "qcow2", "-F", "qcow2", "-b", base.Path)
	apart := image("apart.qcow2", "-f", "qcow2", "-o", "size=2M,data_file="+filepath.Join(dir, "data.raw"))
	raw := &api.File{Path: filepath.Join(dir, "big.raw")}
	if err := os.WriteFile(raw.Path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	big := sized(raw, "8M")
	theirs := &api.File{Path: filepath.Join(a.cfg.VMDir("v2"), shimapi.DiskDir, "disk0.raw")}
	own := &api.File{Path: filepath.Join(a.cfg.VMDir("v1"), shimapi.DiskDir, "disk0.raw")}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(theirs.Path, link); err != nil {
		t.Fatal(err)
	}
	for what, c := range map[string]struct {
		req   api.AttachDisk
		class api.Class
		part  string
	}{
		"backing file":         {api.AttachDisk{Image: backed}, api.Invalid, "backing file"},
		"external data":        {api.AttachDisk{Image: apart}, api.Invalid, "another file"},
		"smaller than image":   {api.AttachDisk{Image: big, Size: 4 << 20}, api.Invalid, "below that of its image"},
		"another VM's disk":    {api.AttachDisk{Image: theirs, Format: "raw"}, api.Refused, `disk disk0 of VM "v2"`},
		"the same, by a link":  {api.AttachDisk{Image: &api.File{Path: link}, Format: "raw"}, api.Refused, `disk disk0 of VM "v2"`},
		"its own disk":         {api.AttachDisk{Image: own, Format: "raw"}, api.Refused, `disk disk0 of VM "v1"`},
		"duplicate":            {api.AttachDisk{Size: 1 << 20, ID: "disk0"}, api.Conflict, "already"},
		"size 0":               {api.AttachDisk{}, api.Invalid, "out of range"},
		"odd size":             {api.AttachDisk{Size: 1<<20 + 512}, api.Invalid, "multiple"},
		"bad name":             {api.AttachDisk{Size: 1 << 20, ID: "../x"}, api.Invalid, "not allowed"},
		"no such file":         {api.AttachDisk{Image: &api.File{Path: dir + "/none"}}, api.Invalid, "no such file"},
		"not an image":         {api.AttachDisk{Image: &api.File{Path: dir}}, api.Invalid, "not a regular file"},
		"nothing detached":     {api.AttachDisk{From: "disk7-1"}, api.NotFound, "no detached disk"},
		"more than the device": {api.AttachDisk{Size: api.MaxDisk}, api.Invalid, "free in"},
	} {
		if what == "more than the device" {
			if free, err := diskFree(dir); err != nil || free > api.MaxDisk {
				continue
			}
		}
		wantErr(t, what, a.attach("v1", c.req), c.class, c.part)
	}
	wantErr(t, "unknown VM", a.attach("v9", api.AttachDisk{Size: 1 << 20}), api.NotFound, `no VM "v9"`)
	wantErr(t, "detach unknown disk", a.detach("v1", "disk9", true), api.NotFound, `no disk "disk9"`)
	wantErr(t, "resize down", a.resize("v1", "disk0", 2<<20), api.Refused, "would be lost")
	wantErr(t, "resize unknown disk", a.resize("v1", "disk9", 8<<20), api.NotFound, `no disk "disk9"`)
	wantErr(t, "replace on unknown host", a.replace("v1", "disk0", "zz"), api.NotFound, `no host "zz"`)
	wantErr(t, "replace the only one", a.replace("v1", "disk0", "a"), api.Refused, "only UpToDate")
	wantErr(t, "replace unknown disk", a.replace("v1", "disk9", "a"), api.NotFound, `no disk "disk9"`)
	if _, err := a.ag.Disks(ctx, "v9"); api.ClassOf(err) != api.NotFound {
		t.Error(err)
	}
	a.wantDisks("v1", before)
	a.wantFiles("v1", files...)

	for n := 1; n < model.DiskSlots; n++ {
		if err := a.attach("v2", api.AttachDisk{Size: 1 << 20}); err != nil {
			t.Fatal(err)
		}
	}
	wantErr(t, "too many", a.attach("v2", api.AttachDisk{Size: 1 << 20}), api.Refused, "more are not possible")

	// The machine of these tests has no hot-plug.
	if err := a.ag.StartVM(ctx, "v1", api.StartVM{}); err != nil {
		t.Fatal(err)
	}
	a.await("v1", "simplex", simplex)
	wantErr(t, "attach on q35", a.attach("v1", api.AttachDisk{Size: 1 << 20}), api.Refused, "hot-plug")
	wantErr(t, "detach on q35", a.detach("v1", "disk0", false), api.Refused, "hot-plug")
	a.wantDisks("v1", before)
	a.wantFiles("v1", files...)
}

// hotplugVM makes a protected VM of a machine that has hot-plug.
func hotplugVM(t *testing.T, a *host) {
	t.Helper()
	a.create(api.CreateVM{Name: "v1", Level: model.LevelFT, Memory: 16 << 20, Disks: []api.CreateDisk{{Size: 4 << 20}}})
	err := a.ag.store.ChangeSpec(t.Context(), "v1", func(s model.VMSpec, r model.Record) (model.VMSpec, model.Record, error) {
		s.Machine = "pc-i440fx-7.2"
		return s, r, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := a.ag.StartVM(t.Context(), "v1", api.StartVM{}); err != nil {
		t.Fatal(err)
	}
	a.await("v1", "duplex", duplex)
}

func (h *host) guestDisks(vm string) string {
	l, ok := h.ag.liveDisks(h.t.Context(), vm)
	if !ok {
		return "?"
	}
	var out []string
	for _, d := range l {
		out = append(out, fmt.Sprintf("%s %d @%x", d.ID, d.Size>>20, d.Slot))
	}
	return strings.Join(out, ", ")
}

// TestDisksOfRunningVM changes the disks of a protected VM, asked of either host, with
// guests that refuse and agents that end in the middle.
func TestDisksOfRunningVM(t *testing.T) {
	t.Parallel()
	testenv.Root(t)
	a, b, _ := trio(t)
	hotplugVM(t, a)
	whole := func(want string) {
		t.Helper()
		a.await("v1", "duplex again", duplex)
		a.wantDisks("v1", want)
		if got := a.guestDisks("v1"); got != want {
			t.Fatalf("the guest has %q, not %q", got, want)
		}
	}
	if err := b.attach("v1", api.AttachDisk{Size: 2 << 20, ID: "data"}); err != nil {
		t.Fatal(err)
	}
	whole("disk0 4 @10, data 2 @11")
	b.wantFiles("v1", "data.meta", "data.raw", "disk0.meta", "disk0.raw")
	if err := a.resize("v1", "data", 3<<20); err != nil {
		t.Fatal(err)
	}
	whole("disk0 4 @10, data 3 @11")
	if rep, err := blockstore.Inspect(vfs.OS{}, filepath.Join(b.cfg.VMDir("v1"), shimapi.DiskDir, "data")); err != nil || rep.Meta.Size != 3<<20 {
		t.Errorf("the other host's replica did not grow: %+v %v", rep.Meta, err)
	}

	refuse := filepath.Join(a.cfg.VMDir("v1"), "refuse-disks")
	if err := os.WriteFile(refuse, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	wantErr(t, "the guest refuses a disk", a.attach("v1", api.AttachDisk{Size: 1 << 20}), api.Refused, "does not want to")
	a.wantFiles("v1", "data.meta", "data.raw", "disk0.meta", "disk0.raw")
	whole("disk0 4 @10, data 3 @11")
	wantErr(t, "the guest keeps a disk", b.detach("v1", "data", true), api.Refused, "does not want to")
	whole("disk0 4 @10, data 3 @11")

	// An agent that ended after the specification was changed: nothing is filled
	// before the guest has the disk, and that goes by itself.
	if err := a.ended(a.ag.ReplaceDisk(t.Context(), "v1", "data", api.ReplaceDisk{})); err != nil {
		t.Fatal(err)
	}
	a.await("v1", "duplex after a replica was replaced", duplex)
	w := a.ag.workerOf("v1")
	w.holdDisks(true)
	if err := a.ag.shimOpHere(t.Context(), "v1", shimapi.Op{Op: "unprotect"}); err != nil {
		t.Fatal(err)
	}
	a.await("v1", "simplex", simplex)
	dir := filepath.Join(a.cfg.VMDir("v1"), shimapi.DiskDir)
	spec, err := a.ag.store.Spec(context.Background(), "v1")
	if err != nil {
		t.Fatal(err)
	}
	if err := blockstore.Create(vfs.OS{}, dir, blockstore.Params{ID: "late", VM: spec.UUID, Size: 1 << 20, State: model.UpToDate}); err != nil {
		t.Fatal(err)
	}
	err = a.ag.store.ChangeSpec(t.Context(), "v1", func(s model.VMSpec, r model.Record) (model.VMSpec, model.Record, error) {
		s.Disks = append(model.PinSlots(s.Disks), model.DiskSpec{ID: "late", Size: 1 << 20, Slot: 0x12})
		return s, r, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	a.off()
	a.on()
	eventually(t, "people are told that the guest's disks differ", 20*time.Second, func() bool {
		vm, err := a.ag.VM(t.Context(), "v1")
		return err == nil && slices.ContainsFunc(vm.Problems, func(p model.Problem) bool { return p.Code == "disks-differ" })
	})
	if rec := a.record("v1"); rec.Mode != model.ModeSimplex {
		t.Errorf("it is filled with disks that differ: %s", rec.Mode)
	}
	if err := os.Remove(refuse); err != nil {
		t.Fatal(err)
	}
	whole("disk0 4 @10, data 3 @11, late 1 @12")

	if err := b.detach("v1", "data", false); err != nil {
		t.Fatal(err)
	}
	whole("disk0 4 @10, late 1 @12")
	a.wantFiles("v1", "disk0.meta", "disk0.raw", "kept/data-1.raw", "late.meta", "late.raw")
	b.wantFiles("v1", "disk0.meta", "disk0.raw", "late.meta", "late.raw")
	wantErr(t, "the replica that the guest runs from", a.replace("v1", "disk0", "a"), api.Refused, "runs VM")
}

// TestDiskChangeThatTakesLong: a change that the shim has not ended yet is neither a failed one, whose
// replica may be removed and whose specification is taken back, nor a done one.
func TestDiskChangeThatTakesLong(t *testing.T) {
	t.Parallel()
	testenv.Root(t)
	a, _, _ := trio(t)
	hotplugVM(t, a)
	slow := filepath.Join(a.cfg.VMDir("v1"), "slow-disks")
	if err := os.WriteFile(slow, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	op, err := a.ag.AttachDisk(t.Context(), "v1", api.AttachDisk{Size: 2 << 20, ID: "data"})
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the guest is being given the disk", 20*time.Second, func() bool {
		op, err = a.ag.Operation(t.Context(), op.ID)
		return err == nil && (op.Text == "the guest gets it" || op.State != api.OperationRunning)
	})
	time.Sleep(1500 * time.Millisecond) // so long it takes, and longer than the agent asks again
	if op, err = a.ag.Operation(t.Context(), op.ID); err != nil || op.State != api.OperationRunning {
		t.Errorf("the operation is %s while its shim is at it: %s", op.State, op.Text)
	}
	a.wantDisks("v1", "disk0 4 @10, data 2 @11")
	a.wantFiles("v1", "data.meta", "data.raw", "disk0.meta", "disk0.raw")
	if err := os.Remove(slow); err != nil {
		t.Fatal(err)
	}
	if err := a.ended(op, nil); err != nil {
		t.Error(err)
	}
	a.await("v1", "duplex again", duplex)
	if got := a.guestDisks("v1"); got != "disk0 4 @10, data 2 @11" {
		t.Errorf("the guest has %q", got)
	}
}
