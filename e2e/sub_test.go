package e2e

import "testing"

// sub is the world as a subtest sees it: same lab, same limit, its own failures.
func (w *World) sub(t *testing.T) *World {
	c := *w
	c.T = t
	return &c
}

// in is the VM as a subtest sees it.
func (v *VM) in(w *World) *VM {
	c := *v
	c.w = w
	return &c
}
