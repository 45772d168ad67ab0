package chardev_test

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"perdure/internal/chardev"
	"perdure/internal/qemu/qemutest"
	"perdure/internal/testenv"
)

// rig is the test guest with its memory in a file, and both its ports.
type rig struct {
	*qemutest.Guest
	serial, agent *chardev.Port
	mem           string
}

// newRig makes one; mem is copied if given, and the guest then waits for LoadDevices.
func newRig(t *testing.T, command, mem string) *rig {
	t.Helper()
	testenv.QEMU(t)
	m := qemutest.Machine(t, command)
	dir := filepath.Dir(m.QMPPath)
	r := &rig{}
	shm, err := os.MkdirTemp("/dev/shm", "perdure-chardev-")
	check(t, err)
	t.Cleanup(func() { os.RemoveAll(shm) })
	r.mem = filepath.Join(shm, "ram")
	if mem != "" {
		b, err := os.ReadFile(mem)
		check(t, err)
		check(t, os.WriteFile(r.mem, b, 0o600))
		m.Incoming = true
	}
	m.MemPath, m.SerialPath, m.AgentPath = r.mem, filepath.Join(dir, "serial"), filepath.Join(dir, "agent")
	for path, p := range map[string]**chardev.Port{m.SerialPath: &r.serial, m.AgentPath: &r.agent} {
		*p, err = chardev.Listen(path, chardev.Options{MaxHeld: 4 << 20, History: 1 << 20})
		check(t, err)
		port := *p
		t.Cleanup(func() { check(t, port.Close()) })
	}
	r.Guest = qemutest.Start(t, m)
	return r
}

func (r *rig) ports() []*chardev.Port { return []*chardev.Port{r.serial, r.agent} }

// epoch is one checkpoint; then is called while the guest stands still.
func (r *rig) epoch(t *testing.T, ctx context.Context, then func()) (state []byte, out [2][]byte) {
	t.Helper()
	for _, p := range r.ports() {
		check(t, p.Hold(ctx))
	}
	st, err := r.Q.Stop(ctx)
	check(t, err)
	if !st.WasRunning {
		t.Fatal("guest was ", st.Status)
	}
	for _, p := range r.ports() {
		check(t, p.Settle(ctx, func(ctx context.Context) error { _, _, err := r.Q.Status(ctx); return err }))
	}
	state, err = r.Q.SaveDevices(ctx, nil)
	check(t, err)
	then()
	for i, p := range r.ports() {
		out[i] = p.Cut()
	}
	check(t, r.Q.Cont(ctx))
	for _, p := range r.ports() {
		p.Unhold()
	}
	return state, out
}

// TestCheckpointsUnderTraffic runs agent and console at full rate, both ways,
// through many checkpoints, and loads some of them in a second QEMU. At the end the
// second goes on where the last checkpoint left off: no line is lost or seen twice.
func TestCheckpointsUnderTraffic(t *testing.T) {
	testenv.Slow(t)
	ctx := qemutest.Context(t)
	r := newRig(t, "serial agent gap=1000000", "")
	for _, p := range r.ports() {
		p.SetHeld(true)
	}
	check(t, r.Q.Cont(ctx))
	flood, stop := context.WithCancel(ctx)
	defer stop()
	inputEnded := make(chan struct{}, 2)
	for i, p := range r.ports() {
		go func() {
			// The console takes a byte at a time: it is never read up to the end.
			for p.Write(flood, bytes.Repeat([]byte("."), 64<<(5*i))) == nil {
			}
			inputEnded <- struct{}{}
		}()
	}
	var state []byte
	var out [2][]byte
	var pause time.Duration
	loads := 0
	var last string
	const epochs = 60
	for i := range epochs {
		for end := time.Now().Add(3 * time.Millisecond); time.Now().Before(end); {
			<-r.agent.Arrived()
		}
		try := i%10 == 5 || i == epochs-1
		began := time.Now()
		s, o := r.epoch(t, ctx, func() {
			if try {
				last = copyFile(t, r.mem)
			}
		})
		if !try {
			pause = max(pause, time.Since(began))
		}
		state = s
		for k, p := range r.ports() {
			out[k] = append(out[k], o[k]...)
			p.Release(o[k])
		}
		if try && i < epochs-1 {
			scratch := newRig(t, "", last)
			checkLoad(t, scratch.Q.LoadDevices(ctx, state))
			check(t, scratch.Kill())
			<-scratch.Exited()
			loads++
		}
	}
	stop()
	<-inputEnded
	<-inputEnded
	b := newRig(t, "", last)
	check(t, r.Kill())
	checkLoad(t, b.Q.LoadDevices(ctx, state))
	check(t, b.Q.Cont(ctx))
	for k, p := range b.ports() {
		name := []string{"tick ", "agent "}[k]
		_, n := lines(t, name, out[k])
		until(t, "the second QEMU goes on", func() bool { return bytes.Count(p.History(), []byte(name)) > 20 })
		all := append(append([]byte(nil), out[k]...), p.History()...)
		first, total := lines(t, name, all)
		if first != 1 || total <= n {
			t.Errorf("%s: %d lines, then %d, first is %d", name, n, total, first)
		}
		t.Logf("%s: %d lines before, %d in all; %d bytes of output", name, n, total, len(all))
	}
	t.Logf("%d checkpoints loaded, longest pause %v", loads, pause)
}

func checkLoad(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal("a checkpoint cannot be loaded: ", err)
	}
}

func copyFile(t *testing.T, path string) string {
	b, err := os.ReadFile(path)
	check(t, err)
	to := path + ".copy"
	check(t, os.WriteFile(to, b, 0o600))
	return to
}

// lines checks that the numbered lines, among the guest's echo of dots, follow
// each other without gap or repeat.
func lines(t *testing.T, name string, b []byte) (first, count int) {
	t.Helper()
	next := 0
	b = b[:bytes.LastIndexByte(b, '\n')+1] // the last line may be cut
	for _, l := range bytes.Split(bytes.ReplaceAll(b, []byte("."), nil), []byte("\n")) {
		i := bytes.Index(l, []byte(name))
		if i < 0 {
			continue
		}
		n, err := strconv.Atoi(string(l[i+len(name):]))
		check(t, err)
		if count > 0 && n != next {
			t.Fatalf("%sline %d comes after %d", name, n, next-1)
		}
		if count == 0 {
			first = n
		}
		next, count = n+1, count+1
	}
	return first, count
}
