package e2e

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"perdure/api"
	"perdure/internal/model"
)

var errMissing = errors.New("not there yet")

// TestSplitBrain lets a person force a VM to go on on a host whose disks are behind,
// and brings the other one back: nothing is overwritten until a person gives one side
// up, and then the VM is protected again with the data of the other.
func TestSplitBrain(t *testing.T) {
	w := Start(t)
	v := w.CreateVM(VMOptions{Level: "ca", Disks: []string{"64M"}}).Protected()
	a, b := v.Primary(), v.Secondary()
	write := func(name string) {
		t.Helper()
		v.Within(3*time.Minute, "sh echo "+name+" >/data/"+name+" && head -c 3000000 /dev/urandom >/data/big-"+name+" && sync")
	}
	write("both")
	w.PowerOff(b)
	v.Wait("state=running,mode=simplex,primary="+a, time.Minute)
	write("alone-on-first")
	if out := w.Perdure(a, "disk", "verify", v.Name, "--rate", "1G", "--wait"); !strings.Contains(out, "all is well") || !strings.Contains(out, "its own checksum") {
		t.Errorf("verify of one copy says\n%s", out)
	}
	w.PowerOff(a)
	w.PowerOn(b)
	w.Eventually(time.Minute, "the second host answers", func() error {
		_, err := w.TryPerdure(b, "vm", "takeover", v.Name, "--on", b, "--force", "--confirm", v.Name, "--timeout", "30s")
		return err
	})
	v.Within(4*time.Minute, "clock")
	write("forced")
	w.PowerOn(a)
	w.Eventually(time.Minute, "problem split-brain", func() error {
		out, err := w.TryPerdure(b, "vm", "show", v.Name)
		if err == nil && !strings.Contains(out, "split-brain") {
			err = errMissing
		}
		return err
	})
	var s api.SplitBrain
	w.Eventually(time.Minute, "both sides answer", func() error {
		out, err := w.TryPerdure(b, "split-brain", "show", v.Name, "-o", "json")
		if err != nil {
			return err
		}
		if err := json.Unmarshal([]byte(out), &s); err != nil {
			return err
		}
		if len(s.Sides) != 2 || !s.Sides[0].Answers || !s.Sides[1].Answers || len(s.Sides[1].Events) == 0 {
			return errMissing
		}
		return nil
	})
	t.Logf("\n%s", w.Perdure(a, "split-brain", "show", v.Name))
	good, old := s.Sides[0], s.Sides[1]
	if !s.Split || good.Host != b || !good.Counts || good.CanDiscard || old.Host != a || !old.Split || !old.CanDiscard {
		t.Fatalf("it says %+v", s)
	}
	if d := old.Disks[0]; !d.Alone || d.AloneBytes < 3_000_000 || d.Verdict != "other-branch" || d.Common == "" {
		t.Errorf("of the old side it says %+v", d)
	}
	for _, discard := range []string{b, "nosuch"} {
		if out, err := w.TryPerdure(b, "split-brain", "resolve", v.Name, "--discard", discard, "--yes"); err == nil {
			t.Fatalf("to discard %s is not refused: %s", discard, out)
		}
	}
	if out, err := w.TryPerdure(b, "split-brain", "resolve", v.Name, "--discard", a); err == nil {
		t.Fatalf("it was not asked for confirmation: %s", out)
	}
	if vm := v.Show(); vm.Mode != model.ModeSimplex || vm.Primary != b {
		t.Fatalf("before anybody decided: %+v", vm)
	}
	t.Logf("\n%s", w.Perdure(a, "split-brain", "resolve", v.Name, "--discard", a, "--yes"))
	v.Wait("state=running,mode=duplex,primary="+b, 2*time.Minute)
	sent, why := v.copies()
	t.Logf("copies: %v %q", sent, why)
	if last := len(sent) - 1; !strings.Contains(why[last], "discarded") || sent[last] > 40<<20 {
		t.Errorf("%d bytes were copied, because %s: not by bitmap", sent[last], why[last])
	}
	lines, _ := v.Within(3*time.Minute, "sh ls /data")
	if l := strings.Join(lines, " "); !strings.Contains(l, "both") || !strings.Contains(l, "forced") || strings.Contains(l, "alone") {
		t.Errorf("the guest has %s", l)
	}
	v.sameDisks()
	w.Eventually(20*time.Second, "no problem is left", func() error {
		if vm := v.Show(); len(vm.Problems) > 0 {
			return errMissing
		}
		return nil
	})
	if out := w.Perdure(b, "split-brain", "show", v.Name); !strings.Contains(out, "no side waits") {
		t.Errorf("afterwards it says\n%s", out)
	}
	// Both go on as one: the host that was discarded can take over.
	w.PowerOff(b)
	v.Wait("state=running,primary="+a, time.Minute)
}
