package e2e

import (
	"context"
	"fmt"
	"net"
	"strconv"
	"strings"
	"syscall"
	"time"

	"perdure/api"
	"perdure/internal/client"
	"perdure/internal/lab"
	"perdure/internal/lab/guest"
	"perdure/internal/lab/guestsvc"
)

// VMOptions describe a demo guest. Zero values mean: level ft, 1 vCPU, 256 MiB,
// one disk of 256 MiB, one card, first copy on host a.
type VMOptions struct {
	Level  string
	VCPUs  int
	Memory string
	Disks  []string // sizes; at most two are mounted by the guest
	NICs   int      // 1 or 2
	Host   string
	Append string   // added to the kernel command line
	Flags  []string // further flags of vm create
}

// VM is a demo guest that is gone when the test ends.
type VM struct {
	w    *World
	Name string
	IP   string // on eth0
	IP1  string // on eth1, if there are two cards
}

// CreateVM creates a demo guest, starts it and waits until its services answer.
func (w *World) CreateVM(o VMOptions) *VM {
	w.T.Helper()
	v := w.DefineVM(o)
	host := o.Host
	if host == "" {
		host = w.Lab.Hosts()[0]
	}
	w.Perdure(host, "vm", "start", v.Name)
	// On a busy machine without KVM a guest takes its time to boot, the more so
	// when it is protected from its first moment.
	v.Within(4*time.Minute, "clock")
	return v
}

// DefineVM creates a demo guest without starting it.
func (w *World) DefineVM(o VMOptions) *VM {
	w.T.Helper()
	or := func(s *string, d string) {
		if *s == "" {
			*s = d
		}
	}
	or(&o.Level, "ft")
	or(&o.Memory, "256M")
	or(&o.Host, w.Lab.Hosts()[0])
	o.VCPUs = max(o.VCPUs, 1)
	o.NICs = max(o.NICs, 1)
	if o.Disks == nil {
		o.Disks = []string{"256M"}
	}
	// The name is the test's own: vm1, vm2. The address is new in the whole run,
	// so that no guest that an earlier test left can answer in its place.
	w.vms++
	suite.vms++
	last := 50 + (suite.vms-1)%50
	v := &VM{w: w, Name: fmt.Sprintf("vm%d", w.vms), IP: fmt.Sprintf("10.77.0.%d", last)}
	cidr := []string{v.IP + "/24"}
	args := []string{"vm", "create", v.Name, "--level", o.Level, "--vcpus", strconv.Itoa(o.VCPUs), "--memory", o.Memory,
		"--kernel", suite.guest.Kernel, "--initrd", suite.guest.Initrd}
	for _, d := range o.Disks {
		args = append(args, "--disk", d)
	}
	for range o.NICs {
		args = append(args, "--net", lab.BridgeName)
	}
	if o.NICs > 1 {
		v.IP1 = fmt.Sprintf("10.79.0.%d", last)
		cidr = append(cidr, v.IP1+"/24")
	}
	args = append(args, "--append", strings.TrimSpace(guest.AppendFor(cidr...)+" "+o.Append))
	w.T.Cleanup(v.remove)
	w.Perdure(o.Host, append(args, o.Flags...)...)
	return v
}

// remove is the end of each VM; a test that failed may leave it to Start of the next.
func (v *VM) remove() {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if v.w.T.Failed() {
		v.w.T.Logf("--- events of %s\n%s", v.Name, v.events(ctx))
		v.w.T.Logf("--- console of %s\n%s", v.Name, v.console())
		return
	}
	if err := removeVM(ctx, v.w.API(v.w.AnyHost()), v.Name); err != nil {
		v.w.T.Logf("remove VM %s: %v", v.Name, err)
	}
}

func (v *VM) events(ctx context.Context) string {
	for _, h := range v.w.Lab.Hosts() {
		if out, err := v.w.Lab.Output(ctx, h, "perdure", "vm", "events", v.Name); err == nil {
			return string(out)
		}
	}
	return "(no agent answers)"
}

// console returns the end of what the guest printed.
func (v *VM) console() string {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	cmd := v.w.Lab.Command(ctx, v.w.AnyHost(), "perdure", "vm", "console", v.Name)
	out, _ := cmd.CombinedOutput() // it goes on until it is killed
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	return strings.Join(lines[max(0, len(lines)-30):], "\n")
}

// Protected waits until both hosts hold the VM and nothing is wrong with it.
func (v *VM) Protected() *VM {
	v.w.T.Helper()
	v.Wait("state=running,mode=duplex", 2*time.Minute)
	return v
}

// Show asks any agent about the VM.
func (v *VM) Show() api.VM {
	v.w.T.Helper()
	vm, err := v.w.API(v.w.AnyHost()).VM(v.w.Ctx, v.Name)
	v.w.must(err, "show "+v.Name)
	return vm
}

// Wait waits until a condition of `perdure vm wait` holds, and returns the VM.
func (v *VM) Wait(cond string, limit time.Duration) api.VM {
	v.w.T.Helper()
	c, err := api.ParseCondition(cond)
	v.w.must(err, "parse condition")
	var seen api.VM
	start := time.Now()
	v.w.Eventually(limit, v.Name+" "+cond, func() error {
		ctx, cancel := context.WithTimeout(v.w.Ctx, 2*time.Second)
		defer cancel()
		vm, err := v.w.API(v.w.AnyHost()).VM(ctx, v.Name)
		if api.ClassOf(err) == api.NotFound && err != nil && c.AllowsAbsent() {
			return nil
		}
		if err != nil {
			return err
		}
		seen = vm
		if !c.Holds(&vm) {
			return fmt.Errorf("it is %s, mode %s, primary %q, secondary %q, reason %q, problems %v", vm.State, vm.Mode, vm.Primary, vm.Secondary, vm.Reason, vm.Problems)
		}
		return nil
	})
	v.w.T.Logf("%s: %s after %v", v.Name, cond, time.Since(start).Round(time.Millisecond))
	return seen
}

// Primary and Secondary are the hosts by the record.
func (v *VM) Primary() string   { v.w.T.Helper(); return v.Show().Primary }
func (v *VM) Secondary() string { v.w.T.Helper(); return v.Show().Secondary }

// KillShim and KillQEMU send a signal to the VM's process on a host.
func (v *VM) KillShim(host string, s syscall.Signal) {
	v.w.T.Helper()
	p, err := v.w.Lab.Shim(host, v.Name)
	v.w.must(err, "find shim")
	v.w.signal(p, s)
}

// KillQEMU: see KillShim.
func (v *VM) KillQEMU(host string, s syscall.Signal) {
	v.w.T.Helper()
	p, err := v.w.Lab.QEMU(host, v.Name)
	v.w.must(err, "find QEMU")
	v.w.signal(p, s)
}

func (v *VM) options(port int, interval time.Duration) client.Options {
	return client.Options{Addr: net.JoinHostPort(v.IP, strconv.Itoa(port)), Dial: v.w.Lab.Dialer(lab.Client), Interval: interval}
}

// Say sends a command to the guest's control service and returns the text of
// its answer. It waits for a guest that does not answer yet.
func (v *VM) Say(command string) string {
	v.w.T.Helper()
	_, text := v.SayLines(command)
	return text
}

// SayLines also returns the lines before the last.
func (v *VM) SayLines(command string) ([]string, string) {
	v.w.T.Helper()
	return v.Within(time.Minute, command)
}

// Within is SayLines with a limit of its own.
func (v *VM) Within(limit time.Duration, command string) ([]string, string) {
	v.w.T.Helper()
	ctx, cancel := context.WithTimeout(v.w.Ctx, limit)
	defer cancel()
	o := v.options(guestsvc.PortControl, 0)
	lines, text, err := client.Control(ctx, o.Dial, o.Addr, command)
	v.w.must(err, "guest")
	return lines, text
}

// Tell sends a command that gets no answer: poweroff, reboot, panic.
func (v *VM) Tell(command string) {
	v.w.T.Helper()
	ctx, cancel := context.WithTimeout(v.w.Ctx, 2*time.Second)
	defer cancel()
	o := v.options(guestsvc.PortControl, 0)
	client.Control(ctx, o.Dial, o.Addr, command)
}

// Boot returns the guest's boot id: another one means that it was rebooted.
func (v *VM) Boot() string { v.w.T.Helper(); return client.ParseFields(v.Say("boot"))["id"] }

// MACs returns the addresses of the VM's cards.
func (v *VM) MACs() []net.HardwareAddr {
	v.w.T.Helper()
	var out []net.HardwareAddr
	for _, n := range v.Show().NICs {
		m, err := net.ParseMAC(n.MAC)
		v.w.must(err, "parse MAC")
		out = append(out, m)
	}
	return out
}

// Counter streams requests to the guest until the test ends.
func (v *VM) Counter(interval time.Duration) *client.Counter {
	v.w.T.Helper()
	c, err := client.StartCounter(v.w.Ctx, v.options(guestsvc.PortCounter, interval))
	v.w.must(err, "start counter")
	v.w.T.Cleanup(func() { c.Abort() })
	return c
}

// Log appends to the guest's durable log until the test ends.
func (v *VM) Log(interval time.Duration) *client.Log {
	v.w.T.Helper()
	l, err := client.StartLog(v.w.Ctx, v.options(guestsvc.PortLog, interval))
	v.w.must(err, "start log")
	v.w.T.Cleanup(func() { l.Abort() })
	return l
}
