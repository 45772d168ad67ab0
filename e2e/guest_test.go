package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"perdure/api"
	"perdure/internal/shimapi"
)

// clockLag is how far the guest's clocks fell behind the host's.
type clockLag struct{ realtime, monotonic time.Duration }

// guestClocks reads the guest's clocks, and the host's as of the same moment
// (half of the round trip is the error).
func (v *VM) guestClocks() (host time.Time, real, mono time.Duration) {
	v.w.T.Helper()
	asked := time.Now()
	var r, m int64
	if _, err := fmt.Sscan(v.Say("clock"), &r, &m); err != nil {
		v.w.T.Fatalf("read the guest's clocks: %v", err)
	}
	return asked.Add(time.Since(asked) / 2), time.Duration(r), time.Duration(m)
}

// measureLag lets d pass and returns how much less of it passed in the guest.
func (v *VM) measureLag(d time.Duration) (passed time.Duration, lag clockLag) {
	v.w.T.Helper()
	h0, r0, m0 := v.guestClocks()
	v.w.Never(d, "", func() error { return nil })
	h1, r1, m1 := v.guestClocks()
	passed = h1.Sub(h0)
	return passed, clockLag{passed - (r1 - r0), passed - (m1 - m0)}
}

// TestGuestClock compares the guest's clock with the host's while checkpoints
// run at 50 requests a second. Each checkpoint stops the guest's time, so that
// the clock lags; what matters is that vm show says by how much.
func TestGuestClock(t *testing.T) {
	w := Start(t)
	v := w.CreateVM(VMOptions{})
	v.Protected()
	v.Counter(20 * time.Millisecond)
	before := v.Show()
	passed, lag := v.measureLag(10 * time.Second)
	after := v.Show()
	lost := time.Duration((after.Checkpoint.TimeLostMS - before.Checkpoint.TimeLostMS) * 1e6)
	n := after.Checkpoint.Count - before.Checkpoint.Count
	t.Logf("in %v and %d checkpoints the guest's clock fell behind by %v (monotonic %v); vm show says %v; pause %+v ms",
		passed.Round(time.Millisecond), n, lag.realtime.Round(time.Millisecond), lag.monotonic.Round(time.Millisecond),
		lost.Round(time.Millisecond), after.Checkpoint.PauseMS)
	if n == 0 || lost <= 0 || lost > passed {
		t.Errorf("%d checkpoints in %v are said to have cost %v", n, passed, lost)
	}
	// Not the accuracy of the clock, but that nothing large goes unsaid.
	if off := lag.monotonic - lost; off.Abs() > passed/10 {
		t.Errorf("the clock lags by %v, vm show says %v", lag.monotonic, lost)
	}
	if !strings.Contains(w.Perdure("a", "vm", "show", v.Name), "lost") {
		t.Error("vm show does not speak of lost time")
	}
	checkShowFields(t, []byte(w.Perdure("a", "vm", "show", v.Name, "-o", "json")))
}

// checkShowFields checks that what programs rely on is there.
func checkShowFields(t *testing.T, b []byte) {
	t.Helper()
	var all map[string]any
	if err := json.Unmarshal(b, &all); err != nil {
		t.Fatal(err)
	}
	for _, k := range []string{"name", "level", "state", "mode", "primary", "secondary", "term", "epoch", "checkpoint", "disks", "nics", "problems"} {
		if _, ok := all[k]; !ok {
			t.Errorf("vm show -o json has no %q", k)
		}
	}
	cp, _ := all["checkpoint"].(map[string]any)
	for _, k := range []string{"interval_ms", "pause_ms", "dirty_pages", "transfer_bytes", "held_output_ms", "time_lost_ms"} {
		if _, ok := cp[k]; !ok {
			t.Errorf("vm show -o json has no checkpoint.%s", k)
		}
	}
}

// shimOf returns a client of a VM's shim on a host.
func (v *VM) shimOf(host string) *shimapi.ShimClient {
	c := shimapi.NewShimClient(filepath.Join(v.w.Lab.StateDir(host), "vms", v.Name, shimapi.SocketFile))
	v.w.T.Cleanup(c.Close)
	return c
}

// agentTraffic keeps the guest-agent port busy: it sends numbered requests, as
// many at a time as window says, and checks that each is answered once and in order.
type agentTraffic struct {
	conn net.Conn
	sent chan int // room for the window
	done chan error
	n    int // answered; to be read after the end
}

func startAgentTraffic(conn net.Conn, window int) *agentTraffic {
	t := &agentTraffic{conn: conn, sent: make(chan int, window), done: make(chan error, 1)}
	go t.send()
	go func() { t.done <- t.receive() }()
	return t
}

// padding makes requests long enough to fill the port's buffers.
var padding = strings.Repeat("x", 900)

func (t *agentTraffic) send() {
	defer close(t.sent)
	for n := 1; ; n++ {
		if _, err := fmt.Fprintf(t.conn, `{"execute":"guest-sync","arguments":{"id":%d,"mode":"%s"}}`+"\n", n, padding); err != nil {
			return
		}
		t.sent <- n
	}
}

func (t *agentTraffic) receive() error {
	sc := bufio.NewScanner(t.conn)
	for n := range t.sent {
		if !sc.Scan() {
			break
		}
		var r struct {
			Return int `json:"return"`
		}
		if err := json.Unmarshal(sc.Bytes(), &r); err != nil || r.Return != n {
			t.conn.Close()
			for range t.sent { // let send see it
			}
			return fmt.Errorf("answer %d is %q", n, sc.Text())
		}
		t.n = n
	}
	for range t.sent {
	}
	return nil
}

// stop ends the traffic; an answer that was wrong is the error.
func (t *agentTraffic) stop() (answered int, err error) {
	t.conn.Close()
	err = <-t.done
	return t.n, err
}

// agentPort runs guest-agent traffic at full rate through checkpoints each of
// which is loaded in a scratch QEMU, none left out, then takes over.
func agentPort(t *testing.T, trials int) {
	w := Start(t)
	ctx, cancel := context.WithTimeout(t.Context(), testLimit+time.Duration(trials)*2*time.Second)
	t.Cleanup(cancel)
	w.Ctx = ctx
	v := w.CreateVM(VMOptions{}).Protected()
	conn, err := v.shimOf("a").Agent(w.Ctx)
	w.must(err, "open guest-agent port")
	tr := v.Traffic()
	at := startAgentTraffic(conn, 32)
	second := v.shimOf("b")
	before, began := v.Show(), time.Now()
	var worst time.Duration
	var last uint64
	for n := range trials {
		start := time.Now()
		r, err := second.Op(w.Ctx, shimapi.Op{Op: "trial", Value: "next"})
		if err != nil {
			t.Fatalf("trial %d: %v", n, err)
		}
		var epoch uint64
		if _, err := fmt.Sscanf(r.Text, "epoch %d loads", &epoch); err != nil || n > 0 && epoch != last+1 {
			t.Fatalf("trial %d: %q, the one before was of epoch %d", n, r.Text, last)
		}
		last = epoch
		worst = max(worst, time.Since(start))
		if n%100 == 99 {
			t.Logf("trial %d after %v: %s", n+1, time.Since(began).Round(time.Second), r.Text)
		}
	}
	after, took := v.Show(), time.Since(began)
	answered, err := at.stop()
	if err != nil {
		t.Errorf("guest-agent port: %v", err)
	}
	checkpoints := after.Checkpoint.Count - before.Checkpoint.Count
	t.Logf("%d states loaded one after the other in %v (longest %v), %d checkpoints; %d guest-agent requests answered, %.0f a second",
		trials, took.Round(time.Millisecond), worst.Round(time.Millisecond), checkpoints, answered, float64(answered)/took.Seconds())
	if answered < 10*trials || checkpoints < uint64(trials) {
		t.Errorf("%d answers and %d checkpoints in %d trials: the port was not busy", answered, checkpoints, trials)
	}
	if after.Term != before.Term || after.Mode != "duplex" {
		t.Errorf("mode %s, term %d: the pair did not hold (it was duplex, term %d)", after.Mode, after.Term, before.Term)
	}
	v.KillQEMU("a", syscall.SIGKILL)
	v.Wait("state=running,primary=b", 20*time.Second)
	tr.Resume()
	tr.Check(0, "a", "b")
	v.checkAgentAnswers("b")
}

// checkAgentAnswers asks the guest agent one thing; it may first have to end
// what it was told before a takeover.
func (v *VM) checkAgentAnswers(host string) {
	v.w.T.Helper()
	conn, err := v.shimOf(host).Agent(v.w.Ctx)
	v.w.must(err, "open guest-agent port")
	defer conn.Close()
	v.w.must(conn.SetDeadline(time.Now().Add(20*time.Second)), "set deadline")
	_, err = fmt.Fprint(conn, "\n\xff"+`{"execute":"guest-sync","arguments":{"id":424242}}`+"\n")
	v.w.must(err, "ask the guest agent")
	sc := bufio.NewScanner(conn)
	for sc.Scan() {
		if strings.Contains(sc.Text(), "424242") {
			return
		}
	}
	v.w.T.Errorf("the guest agent does not answer after the takeover: %v", sc.Err())
}

// TestGuestAgentPort tries the standby's state under guest-agent traffic.
func TestGuestAgentPort(t *testing.T) { agentPort(t, 50) }

// problem returns the problem of a code, or nil.
func problem(vm api.VM, code string) string {
	for _, p := range vm.Problems {
		if p.Code == code {
			return p.Text
		}
	}
	return ""
}

// TestGuestPanic crashes the guest's kernel: the VM stands still with a named
// problem, on this host and, when this one dies, on the other; only a person
// lets it go on or starts it anew.
func TestGuestPanic(t *testing.T) {
	w := Start(t)
	v := w.CreateVM(VMOptions{}).Protected()
	v.Tell("panic")
	v.Wait("state=fault,problem=guest-panic", 20*time.Second)
	if out := w.Perdure("a", "vm", "list"); !strings.Contains(out, "fault") || strings.Contains(out, "running") {
		t.Errorf("vm list says:\n%s", out)
	}
	w.Eventually(10*time.Second, "the console shows the panic", func() error {
		out, _ := w.TryPerdure("b", "vm", "console", v.Name, "--for", "1s")
		if !strings.Contains(out, "Kernel panic") {
			return fmt.Errorf("the console says:\n%s", out)
		}
		return nil
	})
	w.PowerOff("a")
	v.Wait("primary=b,state=fault,problem=guest-fault", 30*time.Second)
	w.Never(3*time.Second, "the panicked guest was let run", func() error {
		if s := v.Show().State; s != "fault" {
			return fmt.Errorf("the VM is %s", s)
		}
		return nil
	})
	w.PowerOn("a")
	v.Wait("mode=duplex,state=fault", 2*time.Minute) // what stands still is protected too
	w.Perdure("b", "vm", "kill", v.Name)
	v.Wait("state=stopped", 20*time.Second)
	w.Perdure("b", "vm", "start", v.Name)
	v.Protected()
	if vm := v.Show(); problem(vm, "guest-panic")+problem(vm, "guest-fault") != "" {
		t.Errorf("problems of the life before: %v", vm.Problems)
	}
	v.Say("clock")
	v.CheckDisks()
}
