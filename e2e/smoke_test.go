package e2e

import (
	"testing"
	"time"
)

// TestLevelNone runs an unprotected VM through agent and shim.
func TestLevelNone(t *testing.T) {
	w := Start(t)
	v := w.CreateVM(VMOptions{Level: "none"})
	v.Wait("state=running,mode=simplex", time.Minute)
	tr := v.Traffic()
	tr.Flow(50)
	tr.Check(0, "a")
	w.Perdure("a", "vm", "stop", v.Name)
	v.Wait("state=stopped", 30*time.Second)
}

// TestPowerOffOfPrimary is the product's promise in its simplest form.
func TestPowerOffOfPrimary(t *testing.T) {
	w := Start(t)
	v := w.CreateVM(VMOptions{}).Protected()
	tr := v.Traffic()
	w.PowerOff("a")
	tr.Resume()
	v.Wait("state=running,primary=b", 10*time.Second)
	tr.Flow(50)
	w.PowerOn("a")
	v.Protected()
	tr.Flow(50)
	tr.Check(2*time.Second, "a", "b")
}
