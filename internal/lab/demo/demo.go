// Package demo is the demonstration of `make demo`: a guest under Level 3, a
// client that talks to it, the power of the primary's host taken away in the
// middle and given back later, and a verdict. It uses the command line as a
// person would, inside the lab's hosts.
//
// Run owns everything it makes and removes it before it returns, also after an
// error or the end of its context, unless it was told to keep it.
package demo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/term"

	"perdure/api"
	"perdure/internal/client"
	"perdure/internal/lab"
	"perdure/internal/lab/guest"
	"perdure/internal/lab/guestsvc"
	"perdure/internal/model"
)

// The demo's VM.
const (
	vmName  = "demo"
	guestIP = "10.77.0.50"
)

// Options of Run.
type Options struct {
	Dir  string // of the lab
	Keep bool   // leave the lab up
	Out  io.Writer
}

// stage lengths: long enough to see something, short enough to be watched.
const (
	before = 5 * time.Second
	alone  = 4 * time.Second
	after  = 3 * time.Second
)

type demo struct {
	o     Options
	out   io.Writer
	live  bool // the output is a terminal: one line moves
	start time.Time
	lab   *lab.Lab
	count *client.Counter
	log   *client.Log
}

// Run runs the demonstration and reports whether nothing was lost.
func Run(ctx context.Context, o Options) (ok bool, err error) {
	d := &demo{o: o, out: o.Out, start: time.Now()}
	if f, isFile := o.Out.(*os.File); isFile {
		d.live = term.IsTerminal(int(f.Fd()))
	}
	d.say("making a lab: hosts a and b, witness w, two availability links")
	d.lab, err = lab.Up(ctx, lab.Cluster(lab.Options{Dir: o.Dir, Hosts: 2, Witness: true, ALinks: 2}))
	if err != nil {
		return false, err
	}
	defer func() {
		if cerr := d.end(ctx, err); cerr != nil {
			err = errors.Join(err, cerr)
		}
	}()
	if err := d.protect(ctx); err != nil {
		return false, err
	}
	return d.show(ctx)
}

// end removes the lab or says how to go on with it.
func (d *demo) end(ctx context.Context, err error) error {
	if d.count != nil {
		d.count.Abort()
	}
	if d.log != nil {
		d.log.Abort()
	}
	if d.o.Keep && ctx.Err() == nil {
		d.hints()
		return nil
	}
	if err != nil {
		d.lastWords()
	}
	clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	return d.lab.Down(clean)
}

// lastWords shows the ends of the logs: the lab that holds them is about to go.
func (d *demo) lastWords() {
	files, _ := filepath.Glob(filepath.Join(d.lab.Dir(), "*", "agent.log"))
	shims, _ := filepath.Glob(filepath.Join(d.lab.Dir(), "*", "state", "vms", "*", "shim.log"))
	for _, f := range append(files, shims...) {
		b, err := os.ReadFile(f)
		if err != nil || len(b) == 0 {
			continue
		}
		lines := strings.Split(strings.TrimSpace(string(b)), "\n")
		fmt.Fprintf(d.out, "\n--- end of %s\n%s\n", f, strings.Join(lines[max(0, len(lines)-8):], "\n"))
	}
}

func (d *demo) hints() {
	at := ""
	if d.lab.Dir() != lab.DefaultDir {
		at = " --dir " + d.lab.Dir()
	}
	bin := filepath.Join(d.lab.Bin(), "perdure")
	fmt.Fprintf(d.out, "\nThe lab is still up. Try:\n")
	for _, h := range []string{
		"lab%s exec a -- perdure vm show " + vmName,
		"lab%s exec a -- perdure vm console " + vmName,
		"lab%s exec a -- perdure vm switchover " + vmName,
		"lab%s client counter " + guestIP + "          (in another terminal, then:)",
		"lab%s host a freeze",
		"lab%s link a alink0 down",
		"lab%s status",
		"lab%s down",
	} {
		fmt.Fprintf(d.out, "  %s %s\n", bin, fmt.Sprintf(h, at))
	}
}

func (d *demo) say(format string, args ...any) {
	if d.live {
		fmt.Fprint(d.out, "\r\x1b[K")
	}
	fmt.Fprintf(d.out, "%6.1fs  %s\n", time.Since(d.start).Seconds(), fmt.Sprintf(format, args...))
}

// perdure runs the command line on a host.
func (d *demo) perdure(ctx context.Context, host string, args ...string) ([]byte, error) {
	return d.lab.Output(ctx, host, append([]string{"perdure"}, args...)...)
}

// protect builds the guest, starts it and waits until both hosts hold it.
func (d *demo) protect(ctx context.Context) error {
	d.say("building the guest: Debian's kernel, busybox and one static program")
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find own executable: %w", err)
	}
	g, err := guest.Build(ctx, guest.Options{Dir: filepath.Join(d.lab.Dir(), "guest"), Program: filepath.Join(filepath.Dir(self), "perdure-guest")})
	if err != nil {
		return err
	}
	d.say("perdure vm create %s --level ft, 1 vCPU, 256 MiB, one disk; started on host a", vmName)
	if _, err := d.perdure(ctx, "a", "vm", "create", vmName, "--level", "ft", "--vcpus", "1", "--memory", "256M", "--disk", "256M", "--net", lab.BridgeName,
		"--kernel", g.Kernel, "--initrd", g.Initrd, "--append", guest.AppendFor(guestIP+"/24")); err != nil {
		return err
	}
	if _, err := d.perdure(ctx, "a", "vm", "start", vmName); err != nil {
		return err
	}
	d.say("the guest boots; its memory and disks are copied to host b while it runs")
	_, err = d.perdure(ctx, "a", "vm", "wait", vmName, "--for", "state=running,mode=duplex", "--timeout", "3m")
	return err
}

// show is the demonstration itself, from a protected guest to the verdict.
func (d *demo) show(ctx context.Context) (bool, error) {
	vm, err := d.vm(ctx, "a")
	if err != nil {
		return false, err
	}
	d.say("protected: runs on %s, every checkpoint held by %s too", vm.Primary, vm.Secondary)
	opts := func(port int, every time.Duration) client.Options {
		return client.Options{Addr: net.JoinHostPort(guestIP, strconv.Itoa(port)), Dial: d.lab.Dialer(lab.Client), Interval: every}
	}
	if d.count, err = client.StartCounter(ctx, opts(guestsvc.PortCounter, 20*time.Millisecond)); err != nil {
		return false, err
	}
	if d.log, err = client.StartLog(ctx, opts(guestsvc.PortLog, 100*time.Millisecond)); err != nil {
		return false, err
	}
	// While the guest still boots nothing can be said about waits.
	if err := d.count.WaitOK(ctx, 20); err != nil {
		return false, err
	}
	settled := d.count.Snapshot().Waits.N
	d.say("a client talks to it: a request each 20 ms over one TCP connection, a durable line each 100 ms")
	if err := d.watch(ctx, vm.Primary, before); err != nil {
		return false, err
	}
	calm := client.Summarise(d.count.Recent(settled))
	old, other := vm.Primary, vm.Secondary

	d.say("POWER OFF of host %s, which runs the guest", old)
	if err := d.lab.PowerOff(ctx, old); err != nil {
		return false, err
	}
	if err := d.count.WaitOK(ctx, 1); err != nil { // the one in flight may still be from before
		return false, err
	}
	if err := d.count.WaitOK(ctx, 2); err != nil {
		return false, err
	}
	r := d.count.Snapshot()
	d.say("the guest answers again, from host %s: longest wait %v, same connection, no reboot", other, r.Waits.Max.Round(time.Millisecond))
	if err := d.watch(ctx, other, alone); err != nil {
		return false, err
	}
	d.say("power on of host %s: it shall become the second copy by itself", old)
	if err := d.lab.PowerOn(ctx, old); err != nil {
		return false, err
	}
	if err := d.wait(ctx, other, "mode=duplex", 3*time.Minute); err != nil {
		return false, err
	}
	d.say("protected again: runs on %s, held by %s too", other, old)
	if err := d.watch(ctx, other, after); err != nil {
		return false, err
	}
	return d.verdict(ctx, other, calm)
}

// vm asks the agent of a host about the VM.
func (d *demo) vm(ctx context.Context, host string) (api.VM, error) {
	var vm api.VM
	out, err := d.perdure(ctx, host, "vm", "show", vmName, "-o", "json")
	if err != nil {
		return vm, err
	}
	if err := json.Unmarshal(out, &vm); err != nil {
		return vm, fmt.Errorf("read vm show: %w", err)
	}
	return vm, nil
}

// watch lets time pass and shows what goes on; it ends early when the client's
// connection broke.
func (d *demo) watch(ctx context.Context, host string, length time.Duration) error {
	end := time.Now().Add(length)
	for time.Now().Before(end) {
		vm, err := d.vm(ctx, host)
		if err != nil {
			return err
		}
		d.line(vm)
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-d.count.Done():
			return fmt.Errorf("the client's connection broke: %v", d.count.Snapshot())
		case <-time.After(time.Second):
		}
	}
	return nil
}

func (d *demo) line(vm api.VM) {
	r, l := d.count.Snapshot(), d.log.Snapshot()
	where := vm.Primary
	if vm.Secondary != "" {
		where += "+" + vm.Secondary
	}
	pause := "no checkpoints"
	if vm.Mode == model.ModeDuplex {
		pause = fmt.Sprintf("epoch %d, pause %.1f ms", vm.Epoch, vm.Checkpoint.PauseMS.P50)
	}
	s := fmt.Sprintf("        %-8s %-4s term %-3d %-27s %6d requests answered, %4d lines durable, median wait %.1f ms, longest %.0f ms",
		vm.Mode, where, vm.Term, pause, r.OK, l.Acked, ms(r.Waits.Median), ms(r.Waits.Max))
	if len(vm.Sync) > 0 && vm.Sync[0].Total > 0 {
		s += fmt.Sprintf(" · %s %d %%", vm.Sync[0].What, vm.Sync[0].Done*100/vm.Sync[0].Total)
	}
	if d.live {
		fmt.Fprintf(d.out, "\r\x1b[K%s", s)
		return
	}
	fmt.Fprintln(d.out, s)
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// wait watches until a condition holds.
func (d *demo) wait(ctx context.Context, host, cond string, limit time.Duration) error {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("%s did not come within %v", cond, limit))
	defer cancel()
	type outcome struct{ err error }
	done := make(chan outcome, 1)
	go func() {
		_, err := d.perdure(ctx, host, "vm", "wait", vmName, "--for", cond, "--timeout", limit.String())
		done <- outcome{err}
	}()
	for {
		if vm, err := d.vm(ctx, host); err == nil {
			d.line(vm)
		}
		select {
		case o := <-done:
			return o.err
		case <-d.count.Done():
			cancel()
			<-done
			return fmt.Errorf("the client's connection broke: %v", d.count.Snapshot())
		case <-time.After(time.Second):
		}
	}
}

func (d *demo) verdict(ctx context.Context, host string, calm client.Waits) (bool, error) {
	c := d.count.Stop()
	d.log.Stop()
	l, err := d.log.Verify(ctx)
	if err != nil {
		return false, err
	}
	if ev, err := d.perdure(ctx, host, "vm", "events", vmName); err == nil {
		d.say("what happened, by perdure vm events:")
		for line := range strings.Lines(string(ev)) {
			fmt.Fprint(d.out, "        ", line)
		}
	}
	ok := c.Clean() && l.Clean() && l.Breaks == 0
	word := "NOTHING WAS LOST"
	if !ok {
		word = "SOMETHING WAS LOST"
	}
	fmt.Fprintf(d.out, `
  %s
  requests    sent %d, answered %d, lost %d, repeated %d, wrong %d
  wait        median %.1f ms and p99 %.1f ms while all was well; longest %.0f ms, when the host lost its power
  log         acknowledged %d, lost %d, repeated %d, out of order %d
  connection  %s
`, word, c.Sent, c.OK, c.Lost, c.Repeated, c.Wrong, ms(calm.Median), ms(calm.P99), ms(c.Waits.Max),
		l.Acked, len(l.Lost), len(l.Repeated), l.Disorder, connection(c, l))
	return ok, nil
}

func connection(c client.CounterResult, l client.LogResult) string {
	if c.Err != "" || l.Breaks > 0 {
		return fmt.Sprintf("broke (%s; log: %d times)", c.Err, l.Breaks)
	}
	return "the same one from start to end"
}
