package agent

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sort"
	"time"

	"perdure/api"
	"perdure/internal/blockstore"
	"perdure/internal/clusterstore"
	"perdure/internal/config"
	"perdure/internal/model"
	"perdure/internal/shimapi"
	"perdure/internal/vfs"
)

// forgetWait is how long a host waits for the end of what lives of a deleted VM.
const forgetWait = 10 * time.Second

var errStillLives = errors.New("something of the VM still lives here")

// probeWait is how long a request waits for the first look at the host's QEMU.
const probeWait = 20 * time.Second

// plan is a VM that was checked and may be made.
type plan struct {
	spec    model.VMSpec
	images  map[string]image // by disk
	device  map[string]bool  // by disk: its place here is a block device
	kernel  string           // paths of files to store as blobs
	initrd  string
	start   bool
	release []func() // gives uploads back
}

func (p *plan) done() {
	for _, f := range p.release {
		f()
	}
}

// CreateVM implements httpapi.Service.
func (a *Agent) CreateVM(ctx context.Context, req api.CreateVM) (api.Operation, error) {
	switch _, err := a.store.Spec(ctx, req.Name); {
	case err == nil:
		return api.Operation{}, api.Errorf(api.Conflict, "there is a VM %q already", req.Name)
	case !errors.Is(err, clusterstore.ErrNotFound):
		return api.Operation{}, storeError(req.Name, err)
	}
	host, err := a.createHost(req.Host)
	if err != nil {
		return api.Operation{}, err
	}
	if host != a.cfg.Name {
		if api.Forwarded(ctx) {
			return api.Operation{}, api.Errorf(api.Invalid, "this is host %s, not %s", a.cfg.Name, host)
		}
		return a.createElsewhere(ctx, req, host)
	}
	p, err := a.planVM(ctx, req)
	if err != nil {
		return api.Operation{}, err
	}
	op, err := a.ops.begin("create", req.Name, func(ctx context.Context, op *operation) error {
		defer p.done()
		return a.makeVM(ctx, op, p)
	})
	if err != nil {
		p.done()
	}
	return op, err
}

// createHost chooses the host of the first replica.
func (a *Agent) createHost(asked string) (string, error) {
	if asked == "" && a.cfg.Role == config.RoleHost {
		return a.cfg.Name, nil
	}
	if asked == "" {
		others := a.otherHosts(true)
		if len(others) == 0 {
			return "", api.Errorf(api.Unavailable, "no host that runs VMs is alive")
		}
		sort.Slice(others, func(i, j int) bool { return others[i].MemoryFree > others[j].MemoryFree })
		return others[0].Name, nil
	}
	if asked == a.cfg.Name && a.cfg.Role == config.RoleHost {
		return asked, nil
	}
	for _, h := range a.store.Hosts() {
		switch {
		case h.Name != asked:
		case h.Role != string(config.RoleHost):
			return "", api.Errorf(api.Refused, "%s is a witness and runs no VMs", asked)
		case !h.Alive:
			return "", api.Errorf(api.Unavailable, "host %s gives no sign of life", asked)
		default:
			return asked, nil
		}
	}
	return "", api.Errorf(api.NotFound, "there is no host %q", asked)
}

// createElsewhere has another host make the VM: files go there first.
func (a *Agent) createElsewhere(ctx context.Context, req api.CreateVM, host string) (api.Operation, error) {
	p, _, err := a.peer(host)
	if err != nil {
		return api.Operation{}, err
	}
	req.Host = host
	if !req.UsesPaths() {
		return p.api.CreateVM(api.WithForwarded(ctx), req)
	}
	return a.ops.begin("create", req.Name, func(ctx context.Context, op *operation) error {
		fctx := api.WithForwarded(ctx)
		reports := map[string]func(int64){}
		op.say("sending files to host " + host)
		err := p.api.Send(fctx, &req, func(file string, done, total int64) {
			if reports[file] == nil {
				reports[file] = op.track("upload", total)
			}
			reports[file](done)
		})
		if err != nil {
			return err
		}
		remote, err := p.api.CreateVM(fctx, req)
		if err != nil {
			return err
		}
		for {
			op.mirror(remote)
			switch remote.State {
			case api.OperationDone:
				return nil
			case api.OperationFailed:
				return remote.Error.Err()
			}
			if !sleep(ctx, 200*time.Millisecond) {
				cctx, cancel := context.WithTimeout(api.WithForwarded(context.WithoutCancel(ctx)), 5*time.Second)
				defer cancel()
				return errors.Join(context.Cause(ctx), p.api.CancelOperation(cctx, remote.ID))
			}
			if remote, err = p.api.Operation(fctx, remote.ID, 0); err != nil {
				return fmt.Errorf("follow operation on host %s: %w", host, err)
			}
		}
	})
}

// planVM checks everything that can be checked before anything is made.
func (a *Agent) planVM(ctx context.Context, req api.CreateVM) (_ *plan, err error) {
	p := &plan{images: map[string]image{}, device: map[string]bool{}, start: req.Start}
	defer func() {
		if err != nil {
			p.done()
		}
	}()
	m, err := a.awaitMachine(ctx)
	if err != nil {
		return nil, err
	}
	if err := a.checkUEFI(req); err != nil {
		return nil, err
	}
	if req.Level == model.LevelFT {
		if err := a.checkTracking(); err != nil {
			return nil, api.Errorf(api.Refused, "VM %q of level %s is refused: %w", req.Name, req.Level, err).
				WithAction("create it on another host (--host), or with another kernel or QEMU there; see perdure host show %s", a.cfg.Name)
		}
	}
	total, _ := meminfo()
	if total > 0 && req.Memory > total {
		return nil, api.Errorf(api.Invalid, "memory %s is beyond host %s, which has %s", api.FormatSize(req.Memory), a.cfg.Name, api.FormatSize(total))
	}
	for i, n := range req.NICs {
		if err := checkBridge(n.Bridge); err != nil {
			return nil, api.Errorf(api.Invalid, "network card %d: %w on host %s", i, err, a.cfg.Name)
		}
	}
	p.spec = a.specOf(req, m)
	if err := a.checkMACs(p.spec); err != nil {
		return nil, err
	}
	if err := a.planFiles(ctx, req, p); err != nil {
		return nil, err
	}
	var need int64
	for _, d := range p.spec.Disks {
		if _, ok := p.spec.Place(d.ID, a.cfg.Name); !ok {
			need += d.Size
		}
	}
	free, err := diskFree(a.cfg.Path("vms"))
	if err != nil {
		return nil, err
	}
	if need > free {
		return nil, api.Errorf(api.Invalid, "the disks of VM %q need %s; host %s has %s free in %s", req.Name, api.FormatSize(need), a.cfg.Name, api.FormatSize(free), a.cfg.StateDir)
	}
	return p, nil
}

// planFiles looks at the images and files of a request and decides the disks.
func (a *Agent) planFiles(ctx context.Context, req api.CreateVM, p *plan) error {
	take := func(what string, f *api.File) (string, error) {
		path, release, err := a.uploads.take(what, f)
		if err != nil {
			return "", err
		}
		p.release = append(p.release, release)
		return path, nil
	}
	for i, d := range req.Disks {
		id := fmt.Sprintf("disk%d", i)
		size := d.Size
		if d.Image != nil {
			path, err := take("image of "+id, d.Image)
			if err != nil {
				return err
			}
			img, err := a.probeImage(ctx, "image of "+id, path, d.Format)
			if err != nil {
				return err
			}
			if size == 0 {
				size = max(img.size, api.MinDisk)
			}
			if size < img.size {
				return api.Errorf(api.Invalid, "%s: size %s is below that of its image, %s", id, api.FormatSize(size), api.FormatSize(img.size))
			}
			p.images[id] = img
		}
		p.spec.Disks = append(p.spec.Disks, model.DiskSpec{ID: id, Size: size})
		places, device, release, err := a.planPlaces(ctx, p.spec, p.spec.Disks[i], d.Paths, d.Overwrite, p.spec.Places)
		if err != nil {
			return err
		}
		p.release = append(p.release, release)
		if img, ok := p.images[id]; ok {
			at, _ := model.VMSpec{Places: places}.Place(id, a.cfg.Name)
			if err := notOnto(id, &img, at.Path); err != nil {
				return err
			}
		}
		p.spec.Places, p.device[id] = append(p.spec.Places, places...), device
	}
	for _, b := range []struct {
		what string
		f    *api.File
		to   *string
	}{{"kernel", req.Kernel, &p.kernel}, {"initrd", req.Initrd, &p.initrd}} {
		if b.f == nil {
			continue
		}
		path, err := take(b.what, b.f)
		if err != nil {
			return err
		}
		st, err := os.Stat(path)
		switch {
		case err != nil:
			return api.Errorf(api.Invalid, "%s: %w", b.what, err)
		case !st.Mode().IsRegular() || st.Size() == 0:
			return api.Errorf(api.Invalid, "%s: %s is not a regular file with something in it", b.what, path)
		}
		*b.to = path
		name := b.f.Name
		if name == "" {
			name = filepath.Base(path)
		}
		blob := &model.Blob{Name: name}
		if b.what == "kernel" {
			p.spec.Kernel = blob
		} else {
			p.spec.Initrd = blob
		}
	}
	return nil
}

func (a *Agent) awaitMachine(ctx context.Context) (Machine, error) {
	ctx, cancel := context.WithTimeout(ctx, probeWait)
	defer cancel()
	for a.machine.Load() == nil {
		if !sleep(ctx, 50*time.Millisecond) {
			return Machine{}, api.Errorf(api.Unavailable, "host %s is still trying out its QEMU", a.cfg.Name)
		}
	}
	m := *a.machine.Load()
	if m.QEMU == "" {
		return m, api.Errorf(api.Refused, "host %s has no QEMU that can be used (%s)", a.cfg.Name, a.cfg.QEMU).
			WithAction("run perdure doctor on that host")
	}
	return m, nil
}

// specOf pins what both hosts must build alike: the oldest machine type and the
// accelerator that every host offers.
func (a *Agent) specOf(req api.CreateVM, m Machine) model.VMSpec {
	s := model.VMSpec{
		Name: req.Name, UUID: newUUID(), Level: req.Level, VCPUs: req.VCPUs, Memory: req.Memory,
		Disks: []model.DiskSpec{}, NICs: []model.NICSpec{}, Append: req.Append, UEFI: req.UEFI, VNC: req.VNC,
		Machine: m.Type, CPU: req.CPU, Virtio: req.Virtio, Accel: m.Accel, TSCHz: m.TSCHz, FT: req.FT, Created: time.Now().UTC().Truncate(time.Millisecond),
	}
	oldest := m.QEMU
	for _, h := range a.otherHosts(true) {
		if h.QEMU == "" {
			continue
		}
		if h.Accel != "kvm" {
			s.Accel = "tcg"
		}
		if olderVersion(h.QEMU, oldest) && h.Machine != "" {
			oldest, s.Machine = h.QEMU, h.Machine
		}
	}
	// So that its level can become ft while it runs.
	s.SteadyTime = s.Accel == "kvm" && s.TSCHz > 0
	if s.CPU == "" {
		s.CPU = "max"
		if s.Accel == m.Accel && m.CPU != "" {
			s.CPU = m.CPU
		}
	}
	for i, n := range req.NICs {
		mac := n.MAC
		if hw, err := net.ParseMAC(mac); err == nil {
			mac = hw.String()
		} else {
			mac = newMAC()
		}
		s.NICs = append(s.NICs, model.NICSpec{ID: fmt.Sprintf("net%d", i), Bridge: n.Bridge, MAC: mac})
	}
	return s
}

// checkMACs refuses a hardware address that another VM has.
func (a *Agent) checkMACs(spec model.VMSpec) error {
	taken := map[string]string{}
	for _, v := range a.store.VMs() {
		for _, n := range v.Spec.NICs {
			taken[n.MAC] = v.Spec.Name
		}
	}
	for _, n := range spec.NICs {
		if vm := taken[n.MAC]; vm != "" {
			return api.Errorf(api.Conflict, "%s: hardware address %s belongs to VM %q already", n.ID, n.MAC, vm)
		}
	}
	return nil
}

func newUUID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// newMAC draws an address of the range that QEMU uses.
func newMAC() string {
	var b [3]byte
	rand.Read(b[:]) // never fails
	return fmt.Sprintf("52:54:00:%02x:%02x:%02x", b[0], b[1], b[2])
}

// makeVM carries a plan out: everything is made in a hidden directory, moved to
// its place and then entered in the store. Where a step fails, the steps before
// it are undone.
func (a *Agent) makeVM(ctx context.Context, op *operation, p *plan) (err error) {
	name := p.spec.Name
	stage, err := os.MkdirTemp(a.cfg.Path("vms"), ".new-")
	if err != nil {
		return fmt.Errorf("make VM %q: %w", name, err)
	}
	undo := func() { a.removeVMFiles(stage) }
	defer func() {
		if err != nil {
			undo()
		}
	}()
	if err := os.Mkdir(filepath.Join(stage, shimapi.DiskDir), 0o700); err != nil {
		return fmt.Errorf("make VM %q: %w", name, err)
	}
	if err := a.makeBlobs(op, p); err != nil {
		return err
	}
	if err := a.makeDisks(ctx, op, p, filepath.Join(stage, shimapi.DiskDir)); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(stage, uuidFile), []byte(p.spec.UUID), 0o600); err != nil {
		return fmt.Errorf("make VM %q: %w", name, err)
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	dir := a.cfg.VMDir(name)
	if err := a.clearWay(ctx, name); err != nil {
		return err
	}
	if err := os.Rename(stage, dir); err != nil {
		return fmt.Errorf("make VM %q: %w", name, err)
	}
	undo = func() { a.removeVMFiles(dir) }
	if err := syncDir(a.cfg.Path("vms")); err != nil {
		return err
	}
	rec := model.Record{VM: name, Mode: model.ModeStopped, Level: p.spec.Level, Wanted: model.WantStopped,
		Primary: model.Seat{Host: a.cfg.Name}, Replicas: map[string]model.Replica{a.cfg.Name: {State: model.UpToDate}}, Reason: "created"}
	if err := a.enter(ctx, p.spec, rec, &undo); err != nil {
		return err
	}
	a.event(name, "created", 0, "VM created on host %s (level %s, %d vCPU, %s)", a.cfg.Name, p.spec.Level, p.spec.VCPUs, api.FormatSize(p.spec.Memory))
	if p.start {
		undo = func() {} // it exists now; a start that fails leaves it stopped
		return a.StartVM(ctx, name, api.StartVM{Host: a.cfg.Name})
	}
	return nil
}

// enter writes the new VM to the store. Where the outcome is not known, it is
// read until it is; if even that fails the files stay, since the VM may exist.
func (a *Agent) enter(ctx context.Context, spec model.VMSpec, rec model.Record, undo *func()) error {
	err := a.store.CreateVM(ctx, spec, rec)
	if errors.Is(err, clusterstore.ErrExists) {
		return a.existsNow(ctx, spec)
	}
	if err == nil {
		return nil
	}
	for range 10 {
		// A second try settles the first: one of both is refused.
		err = a.store.CreateVM(ctx, spec, rec)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, clusterstore.ErrExists):
			return a.existsNow(ctx, spec)
		}
		if !sleep(context.WithoutCancel(ctx), 500*time.Millisecond) {
			break
		}
	}
	*undo = func() {}
	return api.Errorf(api.Timeout, "the cluster store did not say whether VM %q was entered; its files stay in %s", spec.Name, a.cfg.VMDir(spec.Name)).
		WithAction("look at the VM when the cluster has a quorum again; if it is not there, remove the directory")
}

// existsNow tells our own VM, entered by a try whose answer was lost, from another one.
func (a *Agent) existsNow(ctx context.Context, spec model.VMSpec) error {
	if got, err := a.store.Spec(ctx, spec.Name); err == nil && got.UUID == spec.UUID {
		return nil
	}
	return api.Errorf(api.Conflict, "there is a VM %q already", spec.Name)
}

// clearWay moves what an earlier VM of the same name left behind aside.
func (a *Agent) clearWay(ctx context.Context, name string) error {
	dir := a.cfg.VMDir(name)
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if !lockFree(filepath.Join(dir, shimapi.LockFile)) {
		return api.Errorf(api.Conflict, "something of an earlier VM %q still runs on host %s", name, a.cfg.Name)
	}
	move := func(context.Context) error {
		old, err := os.ReadFile(filepath.Join(dir, uuidFile))
		if err != nil {
			old = []byte("unknown")
		}
		return a.moveAside(name, string(old))
	}
	if w := a.workerOf(name); w != nil {
		return w.between(ctx, move)
	}
	return move(ctx)
}

func (a *Agent) makeBlobs(op *operation, p *plan) error {
	for _, b := range []struct {
		path string
		blob *model.Blob
	}{{p.kernel, p.spec.Kernel}, {p.initrd, p.spec.Initrd}} {
		if b.blob == nil {
			continue
		}
		op.say("storing " + b.blob.Name)
		f, err := os.Open(b.path)
		if err != nil {
			return api.Errorf(api.Invalid, "open %s: %w", b.blob.Name, err)
		}
		got, err := a.storeBlob(f, b.blob.Name)
		f.Close()
		if err != nil {
			return err
		}
		*b.blob = got
	}
	return nil
}

func (a *Agent) makeDisks(ctx context.Context, op *operation, p *plan, dir string) error {
	for _, d := range p.spec.Disks {
		img, has := p.images[d.ID]
		if has {
			op.say("importing " + filepath.Base(img.path) + " as " + d.ID)
			at, _ := p.spec.Place(d.ID, a.cfg.Name)
			if err := a.importTo(ctx, img, d.Size, filepath.Join(dir, d.ID+".raw"), at.Path, p.device[d.ID], op.track("import", img.size)); err != nil {
				return err
			}
		}
		params := blockstore.Params{ID: d.ID, VM: p.spec.UUID, Size: d.Size, State: model.UpToDate, Adopt: has}
		if at, ok := p.spec.Place(d.ID, a.cfg.Name); ok {
			if p.device[d.ID] && !has {
				op.say("clearing " + at.Path)
			}
			params.Image, params.Device, params.Host = at.Path, p.device[d.ID], a.cfg.Name
		}
		if err := blockstore.Create(vfs.OS{}, dir, params); err != nil {
			return fmt.Errorf("make disk %s: %w", d.ID, err)
		}
	}
	return nil
}

// forget asks a host to remove what it holds of a deleted VM.
type forget struct {
	UUID string `json:"uuid"`
}

// DeleteVM implements httpapi.Service. The store forgets the VM first, so that
// nothing can start it while its disks go.
func (a *Agent) DeleteVM(ctx context.Context, name string, req api.DeleteVM) error {
	spec, err := a.store.Spec(ctx, name)
	if err != nil {
		return storeError(name, err)
	}
	cur, err := a.store.Record(ctx, name)
	if err != nil {
		return storeError(name, err)
	}
	if cur.Record.Mode != model.ModeStopped {
		return api.Errorf(api.Conflict, "VM %q is not stopped (mode %s on %s)", name, cur.Record.Mode, cur.Record.Primary.Host).
			WithAction("stop it first: perdure vm stop %s", name)
	}
	hosts := sortedKeys(cur.Record.Replicas)
	for _, h := range hosts {
		if _, err := a.holdsOn(ctx, h, name); err != nil && !req.Force {
			return api.Errorf(api.Unavailable, "host %s holds a replica of VM %q and does not answer", h, name).
				WithAction("bring it back, or repeat with --force and leave the replica behind there")
		}
	}
	err = a.store.DeleteVM(ctx, name, cur.Revision)
	switch {
	case errors.Is(err, clusterstore.ErrConflict):
		return api.Errorf(api.Conflict, "VM %q was changed meanwhile; look at it again", name)
	case err != nil:
		return storeError(name, err)
	}
	var left []error
	for _, h := range hosts {
		if h == a.cfg.Name {
			err = a.forgetVM(ctx, name, spec.UUID)
		} else {
			fctx, cancel := context.WithTimeout(ctx, 20*time.Second)
			err = a.ask(fctx, h, "POST", "forget", name, forget{spec.UUID}, nil)
			cancel()
		}
		if err != nil {
			left = append(left, fmt.Errorf("host %s: %w", h, err))
		}
	}
	a.log.Info("VM deleted", "vm", name, "left_behind", errors.Join(left...))
	if len(left) > 0 && !req.Force {
		return api.Errorf(api.Internal, "VM %q is deleted, but files of it are left behind: %w", name, errors.Join(left...))
	}
	return nil
}

// forgetVM removes this host's files of a VM that the store, read linearizably,
// does not know any more.
func (a *Agent) forgetVM(ctx context.Context, name, uuid string) error {
	switch spec, err := a.store.Spec(ctx, name); {
	case err == nil && spec.UUID == uuid:
		return fmt.Errorf("VM %q exists", name)
	case err != nil && !errors.Is(err, clusterstore.ErrNotFound):
		return err
	}
	remove := func(context.Context) error {
		dir := a.cfg.VMDir(name)
		own, err := os.ReadFile(filepath.Join(dir, uuidFile))
		if errors.Is(err, os.ErrNotExist) || err == nil && string(own) != uuid {
			return nil // nothing of that VM is here
		}
		lock, ok, err := tryLock(filepath.Join(dir, shimapi.LockFile))
		switch {
		case err != nil:
			return err
		case !ok:
			return fmt.Errorf("%w: VM %q", errStillLives, name)
		}
		defer lock.release()
		a.events.forget(name)
		return a.removeVMFiles(dir)
	}
	// A shim needs a moment to end after the record said that the VM is stopped.
	ctx, cancel := context.WithTimeout(ctx, forgetWait)
	defer cancel()
	for {
		var err error
		if w := a.workerOf(name); w != nil {
			err = w.between(ctx, remove)
		} else {
			err = remove(ctx)
		}
		if !errors.Is(err, errStillLives) || !sleep(ctx, 100*time.Millisecond) {
			return err
		}
	}
}

func sortedKeys[V any](m map[string]V) []string {
	out := make([]string, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	sort.Strings(out)
	return out
}
