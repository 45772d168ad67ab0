// Package apitest holds a Service without hosts, for tests of the surfaces: it
// keeps VMs in memory and moves them from state to state as a test says. It is
// safe for concurrent use, starts no goroutine, and knows nothing of what makes
// the real thing safe.
package apitest

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"perdure/api"
	"perdure/internal/model"
)

// Epoch is the time that everything in the fake was made at.
func Epoch() time.Time { return time.Date(2026, 3, 1, 3, 0, 0, 0, time.UTC) }

// Fake is a Service in memory. The fields may be set before it is used, and
// changed through Update afterwards.
type Fake struct {
	mu       sync.Mutex
	Info     api.Cluster
	HostList []api.Host
	VMList   map[string]*api.VM
	EventLog []model.Event
	Blobs    map[string][]byte
	Risk     api.TakeoverRisk
	// Fail makes the named method return an error, as often as its count says
	// (negative: always).
	Fail map[string]*Failure
	// Console answers; nil refuses.
	ConsoleFunc func() (io.ReadWriteCloser, error)
	// SlowOps is how many looks an operation needs until it is done.
	SlowOps int

	Verified       *model.VerifyReport
	VerifySchedule model.VerifySchedule
	Finds          func(*model.VerifiedDisk) // at the end of a verify
	Split          api.SplitBrain
	looks          int

	ops     map[string]*fakeOp
	next    map[string][]func(*api.VM) // what happens to a VM at each look
	uploads map[string][]byte
	changed chan struct{}
	Calls   []string // what was asked for, in order
}

// Failure of a method.
type Failure struct {
	Err   error
	Count int
}

type fakeOp struct {
	op    api.Operation
	looks int
	end   func() error
}

// New returns a cluster of two hosts and a witness, without VMs.
func New() *Fake {
	up := true
	host := func(n string, i int) api.Host {
		return api.Host{Name: n, Role: api.RoleHost, State: api.HostAlive, Voter: true, Addrs: []string{fmt.Sprintf("192.0.2.%d:7400", i)},
			ALinks: []api.ALink{{Addr: fmt.Sprintf("10.0.0.%d", i), Up: &up, RTTMS: 0.2}, {Addr: fmt.Sprintf("10.0.1.%d", i), Up: &up, RTTMS: 0.2}},
			CPUs:   4, MemoryTotal: 16 << 30, MemoryFree: 12 << 30, Accel: "kvm", QEMU: "7.2.22", Version: "0.1.0",
			StateDir: "/var/lib/perdure", VMs: []string{}, Problems: []model.Problem{}}
	}
	return &Fake{
		Info: api.Cluster{ID: "c1", Name: "test", Host: "hosta", Version: "0.1.0", Quorum: true, Leader: "witness",
			Voters:   []api.Voter{{Name: "hosta", Alive: true}, {Name: "hostb", Alive: true}, {Name: "witness", Alive: true, Leader: true}},
			CASHA256: strings.Repeat("ab", 32), Problems: []model.Problem{}},
		HostList: []api.Host{host("hosta", 1), host("hostb", 2),
			{Name: "witness", Role: api.RoleWitness, State: api.HostAlive, Voter: true, Leader: true, Addrs: []string{"192.0.2.3:7400"}, Version: "0.1.0",
				StateDir: "/var/lib/perdure", ALinks: []api.ALink{}, VMs: []string{}, Problems: []model.Problem{}}},
		VMList: map[string]*api.VM{}, Blobs: map[string][]byte{}, Fail: map[string]*Failure{}, ops: map[string]*fakeOp{},
		next: map[string][]func(*api.VM){}, uploads: map[string][]byte{}, SlowOps: 2, changed: make(chan struct{}),
	}
}

// Update changes the fake under its lock and wakes those who follow events.
func (f *Fake) Update(change func(*Fake)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change(f)
	close(f.changed)
	f.changed = make(chan struct{})
}

// called notes a call and returns the error it is to fail with. The lock is held.
func (f *Fake) called(method string, args ...string) error {
	f.Calls = append(f.Calls, strings.TrimSpace(method+" "+strings.Join(args, " ")))
	if fl := f.Fail[method]; fl != nil && fl.Count != 0 {
		fl.Count--
		return fl.Err
	}
	return nil
}

// vm finds a VM; the lock is held.
func (f *Fake) vm(name string) (*api.VM, error) {
	vm := f.VMList[name]
	if vm == nil {
		return nil, api.Errorf(api.NotFound, "VM %q does not exist", name).WithAction("see perdure vm list")
	}
	return vm, nil
}

func (f *Fake) host(name string) (*api.Host, error) {
	for i := range f.HostList {
		if f.HostList[i].Name == name {
			return &f.HostList[i], nil
		}
	}
	return nil, api.Errorf(api.NotFound, "host %q does not exist", name).WithAction("see perdure host list")
}

// Cluster implements httpapi.Service.
func (f *Fake) Cluster(context.Context) (api.Cluster, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.Info, f.called("Cluster")
}

// Hosts implements httpapi.Service.
func (f *Fake) Hosts(context.Context) ([]api.Host, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.HostList), f.called("Hosts")
}

// Host implements httpapi.Service.
func (f *Fake) Host(_ context.Context, name string) (api.Host, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.called("Host", name); err != nil {
		return api.Host{}, err
	}
	h, err := f.host(name)
	if err != nil {
		return api.Host{}, err
	}
	return *h, nil
}

// RemoveHost implements httpapi.Service.
func (f *Fake) RemoveHost(_ context.Context, name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.called("RemoveHost", name); err != nil {
		return err
	}
	h, err := f.host(name)
	if err != nil {
		return err
	}
	if h.State == api.HostAlive {
		return api.Errorf(api.Refused, "host %s is alive", name)
	}
	f.HostList = slices.DeleteFunc(f.HostList, func(h api.Host) bool { return h.Name == name })
	return nil
}

// CreateToken implements httpapi.Service.
func (f *Fake) CreateToken(_ context.Context, req api.CreateToken) (api.Token, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	err := f.called("CreateToken", string(req.Role), fmt.Sprint(req.TTLMS))
	return api.Token{ID: "t1", Text: "perdure1.t1.secret", Role: req.Role, Expires: Epoch().Add(time.Duration(req.TTLMS) * time.Millisecond)}, err
}

// Join implements httpapi.Service.
func (f *Fake) Join(_ context.Context, req api.JoinRequest) (api.JoinReply, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.called("Join", req.Name); err != nil {
		return api.JoinReply{}, err
	}
	if req.Secret != "secret" {
		return api.JoinReply{}, api.Errorf(api.Forbidden, "the token is not valid, was used or has expired").WithAction("make a new one: perdure token create")
	}
	return api.JoinReply{ClusterID: "c1", ClusterName: "test"}, nil
}

// VMs implements httpapi.Service.
func (f *Fake) VMs(context.Context) ([]api.VM, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var l []api.VM
	for _, vm := range f.VMList {
		l = append(l, *vm)
	}
	slices.SortFunc(l, func(a, b api.VM) int { return strings.Compare(a.Name, b.Name) })
	return l, f.called("VMs")
}

// VM implements httpapi.Service; each look carries out the next of what was planned.
func (f *Fake) VM(_ context.Context, name string) (api.VM, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.called("VM", name); err != nil {
		return api.VM{}, err
	}
	vm, err := f.vm(name)
	if err != nil {
		return api.VM{}, err
	}
	if todo := f.next[name]; len(todo) > 0 {
		f.next[name] = todo[1:]
		todo[0](vm)
	}
	return *vm, nil
}

// Plan makes each of the next looks at a VM change it.
func (f *Fake) Plan(name string, steps ...func(*api.VM)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.next[name] = steps
}

// CreateVM implements httpapi.Service.
func (f *Fake) CreateVM(_ context.Context, req api.CreateVM) (api.Operation, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.called("CreateVM", req.Name); err != nil {
		return api.Operation{}, err
	}
	if f.VMList[req.Name] != nil {
		return api.Operation{}, api.Errorf(api.Conflict, "VM %q exists already", req.Name)
	}
	host := req.Host
	if host == "" {
		host = "hosta"
	}
	h, err := f.host(host)
	if err != nil {
		return api.Operation{}, err
	}
	if req.Memory > h.MemoryFree {
		return api.Operation{}, api.Errorf(api.Refused, "memory %s does not fit: host %s has %s free", api.FormatSize(req.Memory), host, api.FormatSize(h.MemoryFree))
	}
	id := fmt.Sprintf("op%d", len(f.ops)+1)
	o := api.Operation{ID: id, Kind: "create", VM: req.Name, Host: host, State: api.OperationRunning, Text: "copying images", Started: Epoch()}
	for i := range req.Disks {
		o.Progress = append(o.Progress, model.Progress{What: fmt.Sprintf("disk%d", i), Total: 1 << 30, ETASeconds: 3})
	}
	f.ops[id] = &fakeOp{op: o, end: func() error { return f.create(req, host) }}
	return o, nil
}

// create makes the VM of an operation that ends; the lock is held.
func (f *Fake) create(req api.CreateVM, host string) error {
	spec := model.VMSpec{Name: req.Name, UUID: "00000000-0000-4000-8000-000000000001", Level: req.Level, VCPUs: req.VCPUs, Memory: req.Memory,
		Append: req.Append, UEFI: req.UEFI, VNC: req.VNC, Machine: "pc-q35-7.2", CPU: "x86-64-v2", Accel: "kvm", FT: req.FT, Created: Epoch()}
	if req.CPU != "" {
		spec.CPU = req.CPU
	}
	for i, d := range req.Disks {
		size := d.Size
		if d.Image != nil {
			b := f.uploads[d.Image.Upload]
			if d.Image.Path != "" {
				b, _ = os.ReadFile(d.Image.Path)
			}
			if !bytes.HasPrefix(b, []byte("QFI\xfb")) && !bytes.HasPrefix(b, []byte("image")) {
				return api.Errorf(api.Invalid, "image %s is no image that qemu-img knows", d.Image.Name)
			}
			size = max(size, 8<<20)
		}
		id := fmt.Sprintf("disk%d", i)
		spec.Disks = append(spec.Disks, model.DiskSpec{ID: id, Size: size})
		for h, p := range d.Paths {
			spec.Places = append(spec.Places, model.DiskPlace{Disk: id, Host: cmp.Or(h, host), Path: p, Overwrite: d.Overwrite})
		}
	}
	for i, n := range req.NICs {
		if n.MAC == "" {
			n.MAC = fmt.Sprintf("52:54:00:00:00:%02x", i+1)
		}
		spec.NICs = append(spec.NICs, model.NICSpec{ID: fmt.Sprintf("net%d", i), Bridge: n.Bridge, MAC: n.MAC})
	}
	if req.Kernel != nil {
		spec.Kernel = &model.Blob{Name: req.Kernel.Name}
	}
	if req.Initrd != nil {
		spec.Initrd = &model.Blob{Name: req.Initrd.Name}
	}
	rec := model.Record{VM: req.Name, Mode: model.ModeStopped, Level: req.Level, Wanted: model.WantStopped,
		Replicas: map[string]model.Replica{host: {State: model.UpToDate}}}
	vm := api.FromRecord(spec, rec)
	f.VMList[req.Name] = &vm
	if req.Start {
		return f.start(req.Name, host)
	}
	return nil
}

// start plans the way to running; the lock is held.
func (f *Fake) start(name, host string) error {
	vm := f.VMList[name]
	vm.Mode, vm.State, vm.Primary, vm.Wanted, vm.Term = model.ModeStarting, model.StateStarting, host, model.WantRunning, vm.Term+1
	f.next[name] = []func(*api.VM){func(*api.VM) {}, func(vm *api.VM) {
		vm.Mode, vm.State, vm.Term, vm.PrimaryRun = model.ModeSimplex, model.StateRunning, vm.Term+1, "0123456789abcdef0123456789abcdef"
	}}
	return nil
}

// change runs a change of a VM under the lock.
func (f *Fake) change(method, name string, arg any, do func(*api.VM) error) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.called(method, name, fmt.Sprint(arg)); err != nil {
		return err
	}
	vm, err := f.vm(name)
	if err != nil {
		return err
	}
	return do(vm)
}

func needsMode(vm *api.VM, what string, modes ...model.Mode) error {
	if !slices.Contains(modes, vm.Mode) {
		return api.Errorf(api.Conflict, "VM %s is %s; %s needs it %s", vm.Name, vm.Mode, what, strings.Trim(fmt.Sprint(modes), "[]"))
	}
	return nil
}

// StartVM implements httpapi.Service.
func (f *Fake) StartVM(_ context.Context, name string, req api.StartVM) error {
	return f.change("StartVM", name, req, func(vm *api.VM) error {
		if err := needsMode(vm, "a start", model.ModeStopped); err != nil {
			return err
		}
		host := req.Host
		if host == "" {
			host = "hosta"
		}
		if _, err := f.host(host); err != nil {
			return err
		}
		return f.start(name, host)
	})
}

func (f *Fake) stopped(name string) {
	f.next[name] = []func(*api.VM){func(*api.VM) {}, func(vm *api.VM) {
		vm.Mode, vm.State, vm.Wanted, vm.Primary, vm.Secondary, vm.PrimaryRun, vm.SecondaryRun = model.ModeStopped, model.StateStopped, model.WantStopped, "", "", "", ""
	}}
}

func running(vm *api.VM, what string) error {
	return needsMode(vm, what, model.ModeSimplex, model.ModeSyncing, model.ModeDuplex)
}

// StopVM implements httpapi.Service.
func (f *Fake) StopVM(_ context.Context, name string) error {
	return f.change("StopVM", name, "", func(vm *api.VM) error {
		if err := running(vm, "a stop"); err != nil {
			return err
		}
		f.stopped(name)
		return nil
	})
}

// KillVM implements httpapi.Service.
func (f *Fake) KillVM(_ context.Context, name string) error {
	return f.change("KillVM", name, "", func(vm *api.VM) error {
		if err := running(vm, "a kill"); err != nil {
			return err
		}
		f.stopped(name)
		return nil
	})
}

// DeleteVM implements httpapi.Service.
func (f *Fake) DeleteVM(_ context.Context, name string, req api.DeleteVM) error {
	return f.change("DeleteVM", name, req, func(vm *api.VM) error {
		if err := needsMode(vm, "removing it", model.ModeStopped); err != nil {
			return err
		}
		delete(f.VMList, name)
		return nil
	})
}

// PauseVM implements httpapi.Service.
func (f *Fake) PauseVM(_ context.Context, name string) error {
	return f.change("PauseVM", name, "", func(vm *api.VM) error {
		vm.State, vm.Wanted = model.StatePaused, model.WantPaused
		return running(vm, "a pause")
	})
}

// ResumeVM implements httpapi.Service.
func (f *Fake) ResumeVM(_ context.Context, name string) error {
	return f.change("ResumeVM", name, "", func(vm *api.VM) error {
		vm.State, vm.Wanted = model.StateRunning, model.WantRunning
		return running(vm, "a resume")
	})
}

// SetLevel implements httpapi.Service.
func (f *Fake) SetLevel(_ context.Context, name string, req api.SetLevel) error {
	return f.change("SetLevel", name, req, func(vm *api.VM) error {
		switch {
		case req.Cancel:
			return api.Errorf(api.Refused, "VM %s: the VM's level is not being changed", name)
		case vm.Level == req.Level:
			return api.Errorf(api.Conflict, "VM %s has level %s already", name, vm.Level)
		case vm.UEFI && req.Level != model.LevelNone:
			return api.Errorf(api.Refused, "VM %s has UEFI and cannot have level %s", name, req.Level)
		case vm.Mode == model.ModeStopped:
			vm.Level = req.Level
			return nil
		}
		vm.Mode, vm.Secondary, vm.SecondaryRun, vm.Term = model.ModeSimplex, "", "", vm.Term+1
		c := api.LevelChange{From: vm.Level, To: req.Level, Begun: Epoch(), Progress: model.Progress{What: "memory", Done: 256 << 20, Total: 512 << 20, ETASeconds: 2}}
		vm.LevelChange = &c
		done := c
		done.Ended, done.BlackoutMS = true, 23.4
		f.next[name] = []func(*api.VM){func(*api.VM) {}, func(vm *api.VM) { vm.LevelChange = &done }, func(vm *api.VM) { vm.Level = req.Level }}
		return nil
	})
}

// ProtectVM implements httpapi.Service.
func (f *Fake) ProtectVM(_ context.Context, name string, req api.ProtectVM) error {
	return f.change("ProtectVM", name, req, func(vm *api.VM) error {
		if !vm.Level.HasSecondary() {
			return api.Errorf(api.Refused, "VM %s has level %s, which has no second copy", name, vm.Level)
		}
		if err := running(vm, "protection"); err != nil {
			return err
		}
		if req.Off {
			vm.Mode, vm.Secondary, vm.SecondaryRun = model.ModeSimplex, "", ""
			return nil
		}
		vm.Mode, vm.Secondary = model.ModeSyncing, "hostb"
		vm.Sync = []model.Progress{{What: "memory", Done: 256 << 20, Total: 512 << 20, ETASeconds: 2}}
		nothing := func(*api.VM) {}
		f.next[name] = []func(*api.VM){nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing, func(vm *api.VM) {
			vm.Mode, vm.SecondaryRun, vm.Sync, vm.Term = model.ModeDuplex, "fedcba9876543210fedcba9876543210", nil, vm.Term+2
		}}
		return nil
	})
}

// SwitchoverVM implements httpapi.Service.
func (f *Fake) SwitchoverVM(_ context.Context, name string, req api.SwitchoverVM) error {
	return f.change("SwitchoverVM", name, req, func(vm *api.VM) error {
		if err := needsMode(vm, "a switchover", model.ModeDuplex); err != nil {
			return err
		}
		f.next[name] = []func(*api.VM){func(*api.VM) {}, func(vm *api.VM) {
			vm.Primary, vm.Secondary = vm.Secondary, vm.Primary
			vm.PrimaryRun, vm.SecondaryRun = vm.SecondaryRun, vm.PrimaryRun
			vm.Term++
		}}
		return nil
	})
}

// TakeoverRisk implements httpapi.Service.
func (f *Fake) TakeoverRisk(_ context.Context, name, host string) (api.TakeoverRisk, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.called("TakeoverRisk", name, host); err != nil {
		return api.TakeoverRisk{}, err
	}
	if _, err := f.vm(name); err != nil {
		return api.TakeoverRisk{}, err
	}
	if _, err := f.host(host); err != nil {
		return api.TakeoverRisk{}, err
	}
	r := f.Risk
	r.VM, r.Host = name, host
	return r, nil
}

// TakeoverVM implements httpapi.Service.
func (f *Fake) TakeoverVM(_ context.Context, name string, req api.TakeoverVM) error {
	return f.change("TakeoverVM", name, req, func(vm *api.VM) error {
		if !f.Risk.Safe && !req.Force {
			return api.Errorf(api.Refused, "VM %s may lose something if it goes on on %s", name, req.Host).WithAction("read what, then add --force")
		}
		vm.Primary, vm.Secondary, vm.Mode, vm.State, vm.Branch = req.Host, "", model.ModeSimplex, model.StateRunning, "b2"
		return nil
	})
}

// Events implements httpapi.Service.
func (f *Fake) Events(ctx context.Context, name string, q api.EventQuery, emit func(model.Event) error) error {
	for i := 0; ; {
		f.mu.Lock()
		if i == 0 {
			if err := f.called("Events", name); err != nil {
				f.mu.Unlock()
				return err
			}
		}
		fl := f.Fail["EventsLater"]
		todo, changed := slices.Clone(f.EventLog[i:]), f.changed
		f.mu.Unlock()
		for _, e := range todo {
			i++
			if e.VM == name && e.Time.After(q.Since) {
				if err := emit(e); err != nil {
					return err
				}
			}
		}
		if fl != nil {
			return fl.Err
		}
		if !q.Follow {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		}
	}
}

// Console implements httpapi.Service.
func (f *Fake) Console(_ context.Context, name string) (io.ReadWriteCloser, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.called("Console", name); err != nil {
		return nil, err
	}
	vm, err := f.vm(name)
	if err != nil {
		return nil, err
	}
	if vm.Mode == model.ModeStopped || f.ConsoleFunc == nil {
		return nil, api.Errorf(api.Conflict, "VM %s is stopped; it has no console", name).WithAction("perdure vm start %s", name)
	}
	return f.ConsoleFunc()
}

// Echo returns a console that sends history, then answers each line with itself
// in capitals, and ends after "bye".
func Echo(history string) (io.ReadWriteCloser, error) {
	here, there := net.Pipe()
	go func() { // ends with the pipe
		defer there.Close()
		there.Write([]byte(history)) //nolint:errcheck // the test notices
		buf := make([]byte, 256)
		for {
			n, err := there.Read(buf)
			if err != nil {
				return
			}
			there.Write(bytes.ToUpper(buf[:n])) //nolint:errcheck // as above
			if bytes.Contains(buf[:n], []byte("bye")) {
				return
			}
		}
	}()
	return here, nil
}

// Operations implements httpapi.Service.
func (f *Fake) Operations(context.Context) ([]api.Operation, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var l []api.Operation
	for _, o := range f.ops {
		l = append(l, o.op)
	}
	slices.SortFunc(l, func(a, b api.Operation) int { return strings.Compare(b.ID, a.ID) })
	return l, f.called("Operations")
}

// Operation implements httpapi.Service; an operation goes on with each look.
func (f *Fake) Operation(_ context.Context, id string) (api.Operation, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.called("Operation", id); err != nil {
		return api.Operation{}, err
	}
	o := f.ops[id]
	if o == nil {
		return api.Operation{}, api.Errorf(api.NotFound, "operation %q does not exist", id)
	}
	if o.op.State != api.OperationRunning {
		return o.op, nil
	}
	o.looks++
	o.op.Progress = slices.Clone(o.op.Progress)
	for i := range o.op.Progress {
		p := &o.op.Progress[i]
		p.Done = p.Total * int64(o.looks) / int64(max(1, f.SlowOps))
	}
	if o.looks >= f.SlowOps {
		o.op.State, o.op.Ended = api.OperationDone, Epoch()
		if err := o.end(); err != nil {
			o.op.State, o.op.Error = api.OperationFailed, api.ProblemOf(err)
		}
	}
	return o.op, nil
}

// CancelOperation implements httpapi.Service.
func (f *Fake) CancelOperation(_ context.Context, id string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.called("CancelOperation", id); err != nil {
		return err
	}
	if o := f.ops[id]; o != nil && o.op.State == api.OperationRunning {
		o.op.State, o.op.Error = api.OperationFailed, api.ProblemOf(api.Errorf(api.Conflict, "cancelled"))
	}
	return nil
}

// Upload implements httpapi.Service.
func (f *Fake) Upload(_ context.Context, name string, r io.Reader) (api.Upload, error) {
	b, err := io.ReadAll(r)
	if err != nil {
		return api.Upload{}, fmt.Errorf("receive %s: %w", name, err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	id := fmt.Sprintf("up%d", len(f.uploads)+1)
	f.uploads[id] = b
	return api.Upload{ID: id, Size: int64(len(b)), SHA256: strings.Repeat("0", 64)}, f.called("Upload", name)
}

// Blob implements httpapi.Service.
func (f *Fake) Blob(_ context.Context, sha256 string) (io.ReadCloser, int64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.called("Blob", sha256); err != nil {
		return nil, 0, err
	}
	b, found := f.Blobs[sha256]
	if !found {
		return nil, 0, api.Errorf(api.NotFound, "no file with digest %s is stored here", sha256)
	}
	return io.NopCloser(bytes.NewReader(b)), int64(len(b)), nil
}

// Protected returns a VM of level ft that runs on hosta, duplex with hostb.
func Protected(name string) *api.VM {
	spec := model.VMSpec{Name: name, UUID: "00000000-0000-4000-8000-000000000002", Level: model.LevelFT, VCPUs: 2, Memory: 2 << 30,
		Disks: []model.DiskSpec{{ID: "disk0", Size: 20 << 30}}, NICs: []model.NICSpec{{ID: "net0", Bridge: "lan", MAC: "52:54:00:12:34:56"}},
		Machine: "pc-q35-7.2", CPU: "x86-64-v2", Accel: "kvm", FT: model.DefaultFTPolicy(), Created: Epoch()}
	rec := model.Record{VM: name, Term: 7, Mode: model.ModeDuplex, Level: model.LevelFT, Wanted: model.WantRunning, Reason: "sync complete",
		Primary:   model.Seat{Host: "hosta", Run: "0123456789abcdef0123456789abcdef"},
		Secondary: model.Seat{Host: "hostb", Run: "fedcba9876543210fedcba9876543210"},
		Replicas:  map[string]model.Replica{"hosta": {State: model.UpToDate, Term: 7}, "hostb": {State: model.UpToDate, Term: 7}}}
	vm := api.FromRecord(spec, rec)
	vm.State, vm.Epoch, vm.GuestMS = model.StateRunning, 4821, 600000
	vm.Checkpoint = model.CheckpointStats{Count: 4821, IntervalMS: 98.5, PauseMS: model.Quantiles{P50: 2.6, P99: 4.1}, DirtyPages: model.Quantiles{P50: 212, P99: 1860},
		TransferBytes: model.Quantiles{P50: 84_000, P99: 1_900_000}, HeldOutputMS: model.Quantiles{P50: 3.4, P99: 9.8}, TimeLostMS: 15000}
	vm.Links = []api.PairLink{{Index: 0, Up: true, RTTMS: 0.2, Sent: 5 << 20, Recv: 64 << 10}, {Index: 1, Up: true, RTTMS: 0.3, Sent: 5 << 20, Recv: 64 << 10}}
	vm.StateAsOf = Epoch()
	return &vm
}
