//go:build bench

package e2e

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"perdure/api"
	"perdure/internal/client"
	"perdure/internal/lab/guestsvc"
	"perdure/internal/model"
)

var (
	benchOut     = flag.String("bench-out", "", "directory for the results")
	benchTries   = flag.Int("bench-tries", 20, "how often each blackout is measured")
	benchSeconds = flag.Int("bench-seconds", 20, "how long each steady state is measured")
)

// figure is one line of the table. Unit and goal say how to read the value.
type figure struct {
	Name   string    `json:"name"`
	Value  float64   `json:"value"`
	Unit   string    `json:"unit"`
	Goal   string    `json:"goal"` // as text, for people
	Met    bool      `json:"met"`
	Detail string    `json:"detail,omitempty"`
	Series []float64 `json:"series,omitempty"`
}

type results struct {
	Version string    `json:"version"`
	Time    time.Time `json:"time"`
	Machine string    `json:"machine"`
	Accel   string    `json:"accel"`
	Figures []figure  `json:"figures"`
}

type bench struct {
	t   *testing.T
	res results
}

// atMost and atLeast note a figure and whether its goal was met.
func (b *bench) atMost(name string, v, goal float64, unit, detail string, series ...float64) {
	b.res.Figures = append(b.res.Figures, figure{name, v, unit, fmt.Sprintf("<= %g", goal), v <= goal, detail, series})
}

func (b *bench) atLeast(name string, v, goal float64, unit, detail string, series ...float64) {
	b.res.Figures = append(b.res.Figures, figure{name, v, unit, fmt.Sprintf(">= %g", goal), v >= goal, detail, series})
}

// noted notes a figure without a goal, which explains another.
func (b *bench) noted(name string, v float64, unit, detail string, series ...float64) {
	b.res.Figures = append(b.res.Figures, figure{name, v, unit, "", true, detail, series})
}

// TestBench measures what the table of the README names. Goals that are missed
// are said, not failed: they depend on the machine.
func TestBench(t *testing.T) {
	b := &bench{t: t, res: results{Time: time.Now().UTC()}}
	defer b.write()
	for _, part := range []struct {
		name string
		run  func(*World)
	}{
		{"Idle", b.idle}, {"Dirty", b.dirty}, {"RequestResponse", b.requestResponse}, {"CPU", b.cpu}, {"Bulk", b.bulk}, {"Fsync", b.fsync},
		{"Switchover", b.switchover}, {"Killed", b.killed}, {"PoweredOff", b.poweredOff},
	} {
		t.Run(part.name, func(t *testing.T) {
			w := Start(t)
			// These take as long as they take.
			ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
			t.Cleanup(cancel)
			w.Ctx = ctx
			b.describe(w)
			part.run(w)
		})
	}
}

// describe notes what is measured and on what.
func (b *bench) describe(w *World) {
	w.T.Helper()
	host := w.AnyHost()
	h, err := w.API(host).Host(w.Ctx, host)
	w.must(err, "show host")
	b.res.Version, b.res.Accel = h.Version, h.Accel+", QEMU "+h.QEMU
}

func (b *bench) write() {
	var uts unix.Utsname
	_ = unix.Uname(&uts)
	b.res.Machine = fmt.Sprintf("%d CPUs, Linux %s", runtime.NumCPU(), unix.ByteSliceToString(uts.Release[:]))
	slices.SortStableFunc(b.res.Figures, func(x, y figure) int { return strings.Compare(x.Name, y.Name) })
	var out strings.Builder
	tw := tabwriter.NewWriter(&out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "FIGURE\tVALUE\tUNIT\tGOAL\tMET\tDETAIL")
	for _, f := range b.res.Figures {
		met := "yes"
		switch {
		case f.Goal == "":
			met = ""
		case !f.Met:
			met = "NO"
		}
		fmt.Fprintf(tw, "%s\t%.2f\t%s\t%s\t%s\t%s\n", f.Name, f.Value, f.Unit, f.Goal, met, f.Detail)
	}
	tw.Flush()
	fmt.Printf("\n%s, %s, %s\n%s\n", b.res.Version, b.res.Accel, b.res.Machine, out.String())
	data, err := json.MarshalIndent(b.res, "", "  ")
	if err == nil {
		err = os.MkdirAll(*benchOut, 0o755)
	}
	if err == nil {
		name := filepath.Join(*benchOut, b.res.Time.Format("2006-01-02T150405Z")+".json")
		err = os.WriteFile(name, append(data, '\n'), 0o644)
	}
	if err != nil {
		b.t.Errorf("write results: %v", err)
	}
}

func (b *bench) seconds() time.Duration { return time.Duration(*benchSeconds) * time.Second }

// both makes an unprotected guest and, after it, a protected one, and measures each.
func (b *bench) both(w *World, measure func(v *VM) float64) (plain, ft float64) {
	w.T.Helper()
	return b.bothWith(w, "", measure)
}

// bothWith is both with guests of so much memory.
func (b *bench) bothWith(w *World, memory string, measure func(v *VM) float64) (plain, ft float64) {
	w.T.Helper()
	v := w.CreateVM(VMOptions{Level: "none", Memory: memory, Append: "perdure.tick=0"})
	v.settle()
	plain = measure(v)
	v.remove()
	v = w.CreateVM(VMOptions{Memory: memory, Append: "perdure.tick=0"}).Protected()
	v.settle()
	ft = measure(v)
	v.remove()
	return plain, ft
}

// settle lets a guest come to rest after its boot or its first copy.
func (v *VM) settle() {
	v.w.T.Helper()
	c := v.Counter(20 * time.Millisecond)
	v.w.must(c.WaitOK(v.w.Ctx, 100), "settle")
	c.Stop()
}

func msOf(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// window is how many checkpoints the quantiles of vm show cover: that many have to
// pass before they speak of nothing but the load, and no more of the first epochs
// and the trial of the new standby.
const window = 1024

func (b *bench) idle(w *World) {
	var p50 [2]float64
	for i, mem := range []string{"256M", "4G"} {
		v := w.CreateVM(VMOptions{Memory: mem, Append: "perdure.tick=0"}).Protected()
		v.settle()
		before := v.Show()
		start := time.Now()
		w.Eventually(5*time.Minute, "checkpoints", func() error {
			n := v.Show().Checkpoint.Count - before.Checkpoint.Count
			if n < window || time.Since(start) < b.seconds() {
				return fmt.Errorf("%d of %d", n, window)
			}
			return nil
		})
		after, sec := v.Show(), time.Since(start).Seconds()
		cp := after.Checkpoint
		p50[i] = cp.PauseMS.P50
		detail := fmt.Sprintf("%d checkpoints, %.0f dirty pages p50", cp.Count, cp.DirtyPages.P50)
		b.atMost("pause, idle "+mem+", median", cp.PauseMS.P50, 4, "ms", detail)
		b.atMost("pause, idle "+mem+", p99", cp.PauseMS.P99, 12, "ms", detail)
		var sent int64
		for j, l := range after.Links {
			sent += l.Sent
			if j < len(before.Links) {
				sent -= before.Links[j].Sent
			}
		}
		b.atMost("A-link, idle "+mem, float64(sent)/sec/1e6, 1, "MB/s", "")
		v.remove()
	}
	b.atMost("pause, idle, 4 GiB over 256 MiB", p50[1]/p50[0], 1.3, "x", "")
}

// dirty measures the pause under a load that dirties some 2,000 pages in each
// epoch: it writes into each page of 8 MiB, again and again, without a break.
func (b *bench) dirty(w *World) {
	v := w.CreateVM(VMOptions{Append: "perdure.tick=0"}).Protected()
	v.settle()
	v.Say("dirty 0 600 8")
	start := v.Show().Checkpoint.Count
	w.Eventually(8*time.Minute, "checkpoints under load", func() error {
		if n := v.Show().Checkpoint.Count - start; n < window {
			return fmt.Errorf("%d of %d", n, window)
		}
		return nil
	})
	cp := v.Show().Checkpoint
	detail := fmt.Sprintf("%.0f dirty pages p50, interval %.0f ms; of the pause the flush takes %.1f ms, the devices %.1f; p99 %.1f ms", cp.DirtyPages.P50, cp.IntervalMS, cp.Phases.Flush, cp.Phases.Save, cp.PauseMS.P99)
	name := "pause, 2,000 dirty pages per epoch"
	if cp.DirtyPages.P50 < 1900 {
		name = fmt.Sprintf("pause, %.0f dirty pages per epoch (2,000 not reached)", cp.DirtyPages.P50)
	}
	b.atMost(name+", median", cp.PauseMS.P50, 8, "ms", detail)
}

func (b *bench) requestResponse(w *World) {
	var p99 []float64
	plain, ft := b.both(w, func(v *VM) float64 {
		c := v.Counter(20 * time.Millisecond)
		w.must(c.WaitOK(w.Ctx, *benchSeconds*50), "requests")
		r := c.Stop()
		p99 = append(p99, msOf(r.Waits.P99))
		return msOf(r.Waits.Median)
	})
	b.atMost("request/response, added, median", ft-plain, 5, "ms", fmt.Sprintf("%.2f protected, %.2f not", ft, plain))
	b.atMost("request/response, added, p99", p99[1]-p99[0], 20, "ms", fmt.Sprintf("%.2f protected, %.2f not", p99[1], p99[0]))
}

func (b *bench) cpu(w *World) {
	var loaded []float64
	rate := func(v *VM) float64 {
		n := func() float64 { x, _ := strconv.ParseFloat(v.Say("meter"), 64); return x }
		a, start := n(), time.Now()
		select {
		case <-time.After(b.seconds()):
		case <-w.Ctx.Done():
		}
		return (n() - a) / time.Since(start).Seconds()
	}
	var still string
	plain, ft := b.both(w, func(v *VM) float64 {
		v.Say("meter on")
		idle := rate(v)
		c := v.Counter(10 * time.Millisecond)
		before, start := v.Show().Checkpoint, time.Now()
		loaded = append(loaded, rate(v))
		after := v.Show().Checkpoint
		perSecond := float64(after.Count-before.Count) / time.Since(start).Seconds()
		still = fmt.Sprintf("of unprotected; %.0f checkpoints a second of %.1f ms: the guest stands still %.0f %% of the time", perSecond, after.PauseMS.P50, perSecond*after.PauseMS.P50/10)
		c.Stop()
		return idle
	})
	b.atLeast("guest CPU work, idle network", 100*ft/plain, 95, "%", "of unprotected")
	b.atLeast("guest CPU work, 100 requests/s", 100*loaded[1]/loaded[0], 75, "%", still)
}

// bulk measures with two sizes of guest: what is on its way to the client, held
// output included, must fit into the guest's send buffer, and Linux bounds that by the
// guest's memory (tcp_wmem: 2 MiB with 256 MiB, 4 MiB from 512 MiB on).
func (b *bench) bulk(w *World) {
	for _, memory := range []string{"256M", "1G"} {
		plain, ft := b.bothWith(w, memory, func(v *VM) float64 {
			o := v.options(guestsvc.PortControl, 0)
			r, err := client.Bulk(w.Ctx, o.Dial, o.Addr, b.seconds()/2)
			w.must(err, "bulk")
			return r.Rate() / 1e6
		})
		b.atLeast("bulk TCP out, guest of "+memory, 100*ft/plain, 60, "%", fmt.Sprintf("%.1f MB/s protected, %.1f not", ft, plain))
	}
}

func (b *bench) fsync(w *World) {
	measure := func(v *VM) float64 {
		x, err := strconv.ParseFloat(client.ParseFields(v.Say("fsyncbench 300"))["per_second"], 64)
		w.must(err, "fsyncbench")
		return x
	}
	v := w.CreateVM(VMOptions{Level: "ca", Append: "perdure.tick=0"}).Protected()
	v.settle()
	ca := measure(v)
	v.remove()
	plain, ft := b.both(w, measure)
	b.noted("fsync-ed 4 KiB appends, level ca", 100*ca/plain, "%", fmt.Sprintf("%.0f/s mirrored, %.0f/s not: each is durable on both hosts before it is answered", ca, plain))
	b.atLeast("fsync-ed 4 KiB appends", 100*ft/plain, 60, "%", fmt.Sprintf("%.0f/s protected, %.0f/s not", ft, plain))
}

// blackouts lets fault happen again and again and notes the longest wait of a
// client around each.
func (b *bench) blackouts(w *World, tries int, fault func(v *VM, primary string), repair func(host string)) (client, standstill []float64) {
	v := w.CreateVM(VMOptions{Append: "perdure.tick=0"}).Protected()
	v.settle()
	for i := range tries {
		vm := v.Show()
		c := v.Counter(5 * time.Millisecond)
		w.must(c.WaitOK(w.Ctx, 50), "before the fault")
		n, began := len(c.Recent(0)), time.Now()
		fault(v, vm.Primary)
		w.must(c.WaitOK(w.Ctx, 20), "after the fault")
		v.Wait("primary="+vm.Secondary, 30*time.Second)
		w.must(c.WaitOK(w.Ctx, 20), "after the takeover")
		waits := c.Recent(n)
		if r := c.Stop(); !r.Clean() {
			w.T.Fatalf("try %d: %v", i, r)
		}
		client = append(client, msOf(slices.Max(waits)))
		standstill = append(standstill, msOf(v.stoodStill(began)))
		repair(vm.Primary)
		v.Wait("state=running,mode=duplex", 3*time.Minute)
	}
	return client, standstill
}

// stoodStill is how long no guest ran around a fault that began then: until the
// takeover, from the final stop of a switchover if there was one. The lab's hosts have one clock.
func (v *VM) stoodStill(began time.Time) time.Duration {
	v.w.T.Helper()
	var end time.Time
	stopped := began
	err := v.w.API(v.w.AnyHost()).Events(v.w.Ctx, v.Name, api.EventQuery{Since: began}, func(e model.Event) error {
		switch e.Type {
		case "switchover":
			stopped = e.Time.Add(-time.Duration(e.DurationMS * float64(time.Millisecond)))
		case "takeover":
			end = e.Time
		}
		return nil
	})
	v.w.must(err, "read events")
	if end.IsZero() {
		v.w.T.Fatal("no takeover among the events")
	}
	return end.Sub(stopped)
}

func median(x []float64) float64 {
	s := slices.Clone(x)
	slices.Sort(s)
	return s[len(s)/2]
}

func (b *bench) killed(w *World) {
	x, still := b.blackouts(w, *benchTries, func(v *VM, p string) { v.KillQEMU(p, syscall.SIGKILL) }, func(string) {})
	b.noted("blackout, QEMU killed: until the guest runs again, median", median(still), "ms", "", still...)
	b.atMost("blackout, QEMU killed, median", median(x), 100, "ms", fmt.Sprintf("%d tries", len(x)), x...)
	b.atMost("blackout, QEMU killed, worst", slices.Max(x), 1000, "ms", "")
}

func (b *bench) poweredOff(w *World) {
	x, still := b.blackouts(w, *benchTries, func(_ *VM, p string) { w.PowerOff(p) }, w.PowerOn)
	b.noted("blackout, host powered off: until the guest runs again, median", median(still), "ms", "", still...)
	b.atMost("blackout, host powered off, median", median(x), 500, "ms", fmt.Sprintf("%d tries", len(x)), x...)
	b.atMost("blackout, host powered off, worst", slices.Max(x), 1000, "ms", "")
}

func (b *bench) switchover(w *World) {
	x, still := b.blackouts(w, min(*benchTries, 10), func(v *VM, p string) { w.Perdure(p, "vm", "switchover", v.Name) }, func(string) {})
	b.atMost("switchover, pause of the guest, median", median(still), 60, "ms", fmt.Sprintf("%d tries", len(still)), still...)
	b.noted("switchover, client's longest wait, median", median(x), "ms", "", x...)
}
