package cli

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"perdure/api"
	"perdure/internal/model"
)

// diskFlag is --disk or --image: both append to one list, so that the order on
// the command line is the order in which the guest sees the disks.
type diskFlag struct {
	disks *[]api.CreateDisk
	image bool
}

func (d *diskFlag) String() string { return "" }

func (d *diskFlag) Type() string {
	if d.image {
		return "FILE[,size=SIZE][,format=F][,path=[HOST:]PATH][,overwrite]"
	}
	return "SIZE[,path=[HOST:]PATH][,overwrite]"
}

func (d *diskFlag) Set(s string) error {
	// A comma may be part of the file's name: options are only taken off the end.
	disk := api.CreateDisk{}
	for {
		i := strings.LastIndexByte(s, ',')
		if i < 0 {
			break
		}
		known, err := d.option(&disk, s[i+1:])
		if err != nil {
			return err
		}
		if !known {
			break
		}
		s = s[:i]
	}
	if !d.image {
		if i := strings.IndexByte(s, ','); i >= 0 {
			return fmt.Errorf("disk %q: option %q is not known; allowed are path=[HOST:]PATH and overwrite", s, s[i+1:])
		}
		n, err := parseSize(s)
		if err != nil {
			return err
		}
		disk.Size = n
		*d.disks = append(*d.disks, disk)
		return nil
	}
	if s == "" {
		return fmt.Errorf("the file name of the image is empty")
	}
	disk.Image = &api.File{Path: s}
	*d.disks = append(*d.disks, disk)
	return nil
}

// option takes in one option of a disk; false: it is none.
func (d *diskFlag) option(disk *api.CreateDisk, s string) (bool, error) {
	key, val, has := strings.Cut(s, "=")
	switch {
	case key == "overwrite" && !has:
		disk.Overwrite = true
	case !has:
		return false, nil
	case key == "path":
		return true, addPlace(&disk.Paths, val)
	case key == "format" && d.image:
		disk.Format = val
	case key == "size" && d.image:
		n, err := parseSize(val)
		if err != nil {
			return false, err
		}
		disk.Size = n
	default:
		return false, nil
	}
	return true, nil
}

// netFlag is --net BRIDGE[,mac=…].
type netFlag struct{ nics *[]api.CreateNIC }

func (n *netFlag) String() string { return "" }
func (n *netFlag) Type() string   { return "BRIDGE[,mac=MAC]" }
func (n *netFlag) Set(s string) error {
	parts := strings.Split(s, ",")
	nic := api.CreateNIC{Bridge: parts[0]}
	for _, p := range parts[1:] {
		key, val, _ := strings.Cut(p, "=")
		if key != "mac" {
			return fmt.Errorf("network %q: option %q is not known; allowed is mac=ADDRESS", s, key)
		}
		nic.MAC = val
	}
	*n.nics = append(*n.nics, nic)
	return nil
}

// sizeFlag is a size such as 512M.
type sizeFlag struct{ n *int64 }

func (s *sizeFlag) String() string { return "" }
func (s *sizeFlag) Type() string   { return "SIZE" }
func (s *sizeFlag) Set(v string) (err error) {
	*s.n, err = parseSize(v)
	return err
}

// parseSize reads a size that was given: none at all would mean the default.
func parseSize(v string) (int64, error) {
	n, err := api.ParseSize(v)
	if err == nil && n == 0 {
		err = fmt.Errorf("size %q is not allowed; it must be above 0", v)
	}
	return n, err
}

var (
	_ pflag.Value = (*diskFlag)(nil)
	_ pflag.Value = (*netFlag)(nil)
	_ pflag.Value = (*sizeFlag)(nil)
)

func (a *app) vmCreateCommand() *cobra.Command {
	var req api.CreateVM
	var level, kernel, initrd, overhead string
	var noWait bool
	var timeout time.Duration
	c := &cobra.Command{Use: "create NAME", Short: "Create a VM", Args: args("NAME"),
		Long: `Creates a VM with its disks on the host that is asked (or --host). Images are
copied, never used in place; --disk and --image may be repeated and mixed, the
order given is the order in which the guest sees the disks. A disk's replica lies
in the state directory of its host, or where path= says: a file or a block device
(partition, LVM volume) on that host, without HOST on the one that makes the VM.
Interrupting the command undoes what it has made.`,
		Example: `  perdure vm create web --level ft --vcpus 2 --memory 2G --image debian.qcow2 --disk 20G --net lan --start
  perdure vm create db --level ca --memory 4G --disk 100G,path=a:/dev/vg0/db,path=b:/srv/fast/db.raw --net lan
  perdure vm create test --memory 256M --kernel vmlinuz --initrd initrd.gz --append "console=ttyS0" --net lan`}
	f := c.Flags()
	f.StringVar(&level, "level", string(model.LevelNone), "protection `LEVEL`: none, ca (mirrored disks; the guest boots on the other host), or ft (fault tolerance); can be changed later, see perdure vm level")
	f.IntVar(&req.VCPUs, "vcpus", 1, "number `N` of virtual CPUs")
	f.Var(&sizeFlag{&req.Memory}, "memory", "memory, such as 512M or 4G (default 512M)")
	f.Var(&diskFlag{disks: &req.Disks}, "disk", "add an empty disk")
	f.Var(&diskFlag{disks: &req.Disks, image: true}, "image", "add a disk filled from an image (qcow2, raw, vmdk)")
	f.Var(&netFlag{&req.NICs}, "net", "add a network card on a bridge that every host has")
	f.StringVar(&kernel, "kernel", "", "Linux kernel `FILE` to boot directly")
	f.StringVar(&initrd, "initrd", "", "its initial RAM disk, `FILE`")
	f.StringVar(&req.Append, "append", "", "its command line, `TEXT`")
	f.BoolVar(&req.UEFI, "uefi", false, "UEFI firmware (OVMF, package ovmf) instead of BIOS; level none only")
	f.StringVar((*string)(&req.Virtio), "virtio", "", "`KIND` of the virtio devices, legacy or modern (default legacy: checkpoints are faster; modern for guests that drive nothing else)")
	f.StringVar(&req.CPU, "cpu", "", "CPU `MODEL` of QEMU with flags (default: one that every host offers)")
	f.BoolVar(&req.VNC, "vnc", false, "virtio-gpu display, reached by VNC (default: no display)")
	f.StringVar(&overhead, "ft-max-overhead", "", "share of time the guest may stand still for checkpoints, `PERCENT`, 1 to 90 % (default 25)")
	f.IntVar(&req.FT.MinIntervalMS, "ft-min-interval", 0, "shortest distance of two checkpoints, `MS` (default 5)")
	f.IntVar(&req.FT.MaxIntervalMS, "ft-max-interval", 0, "longest distance while idle, `MS` (default 100)")
	f.IntVar(&req.FT.DetectMS, "ft-detect", 0, "silence after which the other host counts as lost, `MS` (default 300)")
	f.StringVar(&req.Host, "host", "", "`HOST` of the first copy (default: the one that is asked)")
	f.BoolVar(&req.Start, "start", false, "start it as soon as it exists")
	f.BoolVar(&noWait, "no-wait", false, "return as soon as the request was accepted")
	f.DurationVar(&timeout, "timeout", 2*time.Minute, "how long to wait for the start (the copying may take any time)")
	c.RunE = a.call(func(ctx context.Context, cl *api.Client, args []string) error {
		req.Name, req.Level = args[0], model.Level(level)
		if overhead != "" {
			n, err := parsePercent(overhead)
			if err != nil {
				return err
			}
			req.FT.MaxOverheadPercent = n
		}
		if c.Flags().Changed("vcpus") && req.VCPUs == 0 {
			return api.Errorf(api.Invalid, "vcpus 0 is out of range; allowed are 1 to %d", api.MaxVCPUs)
		}
		if kernel != "" {
			req.Kernel = &api.File{Path: kernel}
		}
		if initrd != "" {
			req.Initrd = &api.File{Path: initrd}
		}
		return a.vmCreate(ctx, cl, req, noWait, timeout)
	})
	return c
}

func parsePercent(s string) (int, error) {
	var n int
	if _, err := fmt.Sscanf(strings.TrimSuffix(strings.TrimSpace(s), "%")+"\n", "%d\n", &n); err != nil || n < 1 || n > 90 {
		return 0, api.Errorf(api.Invalid, "--ft-max-overhead %q is not allowed; allowed are 1 to 90 (percent)", s)
	}
	return n, nil
}

func (a *app) vmCreate(ctx context.Context, cl *api.Client, req api.CreateVM, noWait bool, timeout time.Duration) error {
	p := a.newProgress()
	defer p.clear()
	// Everything that can be seen to be wrong here is said before files are sent;
	// relative paths are made absolute by Send, so they are checked after it.
	probe := req
	probe.Kernel, probe.Initrd, probe.Disks = nil, nil, nil
	probe.Append = ""
	if err := probe.Validate(); err != nil {
		return err
	}
	if err := cl.Send(ctx, &req, func(file string, done, total int64) {
		p.show("sending "+file, []model.Progress{{Done: done, Total: total, ETASeconds: -1}})
	}); err != nil {
		return err
	}
	if err := req.Validate(); err != nil {
		return err
	}
	op, err := cl.CreateVM(ctx, req)
	if err != nil {
		return err
	}
	if noWait {
		if a.machine() {
			return a.printValue(op)
		}
		a.say("creating %s: operation %s on %s", req.Name, op.ID, op.Host)
		return nil
	}
	if err := a.follow(ctx, cl, op, p); err != nil {
		return err
	}
	if req.Start {
		if err := a.waitStart(ctx, cl, req.Name, timeout, p); err != nil {
			return err
		}
	}
	p.clear()
	return a.report(ctx, cl, req.Name, "created")
}

// report ends a command that changed a VM: with the VM for programs, with one line for people.
func (a *app) report(ctx context.Context, cl *api.Client, name, what string) error {
	vm, err := cl.VM(ctx, name)
	if err != nil {
		return err
	}
	if a.machine() {
		return a.printValue(vm)
	}
	if what != "" {
		a.say("%s", what)
	}
	fmt.Fprintln(a.out, a.stateLine(&vm))
	a.printProblems(vm.Problems)
	return nil
}

// follow waits for the end of an operation; interrupted, it cancels it.
func (a *app) follow(ctx context.Context, cl *api.Client, op api.Operation, p *progress) error {
	for op.State == api.OperationRunning {
		what := op.Text
		if what == "" {
			what = op.Kind
		}
		p.show(what, op.Progress)
		next, err := cl.Operation(ctx, op.ID, 500*time.Millisecond)
		if ctx.Err() != nil {
			p.clear()
			// The caller's context is over; the undoing needs one of its own.
			end, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
			defer cancel()
			if err := cl.CancelOperation(end, op.ID); err != nil {
				a.note("operation %s could not be cancelled: %v", op.ID, err)
			} else {
				a.note("cancelled; what was made is removed")
			}
			return ctx.Err()
		}
		if err != nil {
			return fmt.Errorf("follow operation %s: %w", op.ID, err)
		}
		op = next
	}
	if op.State == api.OperationFailed {
		if op.Error != nil {
			return op.Error.Err()
		}
		return api.Errorf(api.Internal, "operation %s failed without saying why", op.ID)
	}
	return nil
}
