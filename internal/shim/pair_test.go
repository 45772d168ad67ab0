package shim

import (
	"fmt"
	"testing"
	"time"

	"perdure/internal/model"
	"perdure/internal/shimapi"
)

// TestTakeover is the product in one test: a guest is protected, its QEMU is
// killed, and it goes on where it was on the other host.
func TestTakeover(t *testing.T) {
	w := newWorld(t, 256, 1)
	a, b := w.hosts["a"], w.hosts["b"]
	w.protect()
	st := a.untilStatus("20 checkpoints", 20*time.Second, func(s shimapi.Status) bool { return s.Checkpoint.Count >= 20 })
	t.Logf("checkpoints: %+v", st.Checkpoint)
	before := st.Epoch
	b.op(shimapi.Op{Op: "trial"})
	for range 3 { // and each of three in a row: it waits for a fourth when the primary dies
		b.op(shimapi.Op{Op: "trial", Value: "next"})
	}

	a.shim.inst.proc.Kill()
	w.until("takeover", 10*time.Second, func(r model.Record) bool { return r.Mode == model.ModeSimplex && r.Primary.Host == "b" })
	st = b.untilStatus("running on b", 20*time.Second, func(s shimapi.Status) bool {
		return s.Role == shimapi.RolePrimary && s.State == model.StateRunning
	})
	if st.Epoch < before {
		t.Errorf("b goes on as of epoch %d, a had reported %d", st.Epoch, before)
	}
	k := b.console()
	var tick int
	k.until(t, "tick", 20*time.Second)
	text := k.String()
	fmt.Sscanf(text[lastIndex(text, "tick"):], "tick %d", &tick)
	k.until(t, fmt.Sprintf("tick %d ", tick+3), 20*time.Second)
	select {
	case err := <-a.done:
		if err != nil {
			t.Errorf("shim of a ended with %v", err)
		}
		a.done <- nil
	case <-time.After(10 * time.Second):
		t.Error("shim of a does not end after it lost its VM")
	}
}

func lastIndex(s, sub string) int {
	for i := len(s) - len(sub); i >= 0; i-- {
		if s[i:i+len(sub)] == sub {
			return i
		}
	}
	return len(s)
}

// protect boots the guest on host a and waits until host b holds it too.
func (w *world) protect() {
	t, a, b := w.t, w.hosts["a"], w.hosts["b"]
	t.Helper()
	a.start()
	w.until("simplex", 60*time.Second, func(r model.Record) bool { return r.Mode == model.ModeSimplex })
	a.untilStatus("running", 20*time.Second, func(s shimapi.Status) bool { return s.State == model.StateRunning })
	a.console().until(t, "PERDURE-GUEST READY", 60*time.Second)

	a.op(shimapi.Op{Op: "protect", Host: "b"})
	w.until("syncing", 10*time.Second, func(r model.Record) bool { return r.Mode == model.ModeSyncing })
	b.start()
	w.until("duplex", 60*time.Second, func(r model.Record) bool { return r.Mode == model.ModeDuplex })
}

// TestSwitchover hands the guest over by plan.
func TestSwitchover(t *testing.T) {
	w := newWorld(t, 128, 1)
	w.protect()
	a, b := w.hosts["a"], w.hosts["b"]
	a.op(shimapi.Op{Op: "switchover"})
	w.until("switchover", 20*time.Second, func(r model.Record) bool { return r.Mode == model.ModeSimplex && r.Primary.Host == "b" })
	b.untilStatus("running on b", 20*time.Second, func(s shimapi.Status) bool {
		return s.Role == shimapi.RolePrimary && s.State == model.StateRunning
	})
}
