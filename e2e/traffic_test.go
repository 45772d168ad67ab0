package e2e

import (
	"net"
	"slices"
	"strings"
	"time"

	"perdure/internal/client"
	"perdure/internal/lab"
)

// Traffic is what runs while a fault is made, and the judge afterwards:
// a counter over one connection, a durable log, and a watch on the LAN.
type Traffic struct {
	v       *VM
	Counter *client.Counter
	Log     *client.Log
	sniffer *lab.Sniffer
	macs    []net.HardwareAddr
	boot    string
}

// Traffic starts talking to a VM and waits until it is well under way.
func (v *VM) Traffic() *Traffic {
	v.w.T.Helper()
	t := &Traffic{v: v, boot: v.Boot(), macs: v.MACs()}
	var err error
	t.sniffer, err = v.w.Lab.Sniff(t.macs...)
	v.w.must(err, "watch LAN")
	v.w.T.Cleanup(func() { t.sniffer.Close() })
	t.Counter = v.Counter(10 * time.Millisecond)
	t.Log = v.Log(50 * time.Millisecond)
	t.Flow(20)
	return t
}

// Flow waits until n more requests were answered and some more lines are durable.
func (t *Traffic) Flow(n int) {
	t.v.w.T.Helper()
	t.v.w.must(t.Counter.WaitOK(t.v.w.Ctx, n), "counter")
	t.v.w.must(t.Log.WaitAcked(t.v.w.Ctx, max(1, n/10)), "log")
}

// Resume waits until the guest answers requests made after the fault: the one
// that was in flight may have been answered from before.
func (t *Traffic) Resume() { t.v.w.T.Helper(); t.Flow(5) }

// Check ends the traffic and judges it: the counter went on over its one
// connection, nothing lost, nothing repeated; every acknowledged line is in the
// log, once and in order; the guest did not reboot; its file system is clean;
// and its frames came from the given hosts, one after the other, never back
// and forth. No answer took longer than limit (0: any).
func (t *Traffic) Check(limit time.Duration, moves ...string) {
	w := t.v.w
	w.T.Helper()
	c := t.Counter.Stop()
	if !c.Clean() {
		w.T.Errorf("counter: %v", c)
	}
	if limit > 0 && c.Waits.Max > limit {
		w.T.Errorf("the longest wait was %v at %s, more than %v", c.Waits.Max, c.LongestAt.Format("15:04:05.000"), limit)
	}
	w.T.Logf("counter: %v", c)
	l := t.Log.Stop()
	if l.Breaks > 0 {
		w.T.Errorf("the log's connection broke %d times", l.Breaks)
	}
	t.CheckLog()
	if boot := t.v.Boot(); boot != t.boot {
		w.T.Errorf("the guest was rebooted")
	}
	t.CheckMoves(moves...)
	t.v.CheckDisks()
}

// CheckLog compares the log with what was acknowledged.
func (t *Traffic) CheckLog() client.LogResult {
	w := t.v.w
	w.T.Helper()
	r, err := t.Log.Verify(w.Ctx)
	w.must(err, "verify log")
	if !r.Clean() {
		w.T.Errorf("log: %v; lost %v, repeated %v, foreign %v", r, r.Lost, r.Repeated, r.Foreign)
	}
	w.T.Logf("log: %v", r)
	return r
}

// CheckMoves checks "never two": the frames of each card came from these hosts
// in this order, each change final.
func (t *Traffic) CheckMoves(moves ...string) {
	w := t.v.w
	w.T.Helper()
	for i, mac := range t.macs {
		stays := t.sniffer.Stays(mac)
		got, want := lab.Moves(stays), moves
		if i > 0 { // a card that nobody spoke to is heard only when it announces itself
			want = moves[max(0, len(moves)-len(got)):]
		}
		if !slices.Equal(got, want) {
			w.T.Errorf("frames of %v came from %s; they should come from %s: %v", mac, strings.Join(got, ", "), strings.Join(moves, ", "), stays)
		}
	}
	if err := t.sniffer.Close(); err != nil {
		w.T.Error(err)
	}
}

// CheckDisks lets the guest check its file systems.
func (v *VM) CheckDisks() {
	v.w.T.Helper()
	for i := range v.Show().Disks {
		if i > 1 {
			return
		}
		if s := v.Say("fsck " + string(rune('0'+i))); s != "clean" {
			v.w.T.Errorf("file system of disk %d: %s", i, s)
		}
	}
}
