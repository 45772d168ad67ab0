package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"syscall"
	"testing"
	"time"

	"perdure/internal/testenv"
)

// guest is a QEMU of a test.
type guest struct {
	*Process
	q   *QMP
	dir string
}

func testCtx(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// bios is a machine without disks and NICs: SeaBIOS finds nothing to boot.
func bios(dir string) Machine {
	return Machine{Name: "t", UUID: testUUID, Type: "pc-q35-7.2", Accel: TCG, VCPUs: 1, Memory: 64 << 20, FT: true,
		QMPPath: filepath.Join(dir, "qmp"), Sandbox: true}
}

func start(t testing.TB, change func(*Machine)) *guest {
	t.Helper()
	path := testenv.QEMU(t)
	dir := t.TempDir()
	m := bios(dir)
	if change != nil {
		change(&m)
	}
	args, err := Args(m)
	if err != nil {
		t.Fatal(err)
	}
	ctx := testCtx(t)
	p, err := Start(ctx, path, args, StartOptions{LogPath: filepath.Join(dir, "log"), PIDFile: filepath.Join(dir, "pid")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Kill(); err != nil {
			t.Error(err)
		}
		<-p.Exited()
	})
	q, err := DialQMP(ctx, m.QMPPath, p.LogTail)
	if err != nil {
		t.Fatal(err, p.LogTail(1000))
	}
	t.Cleanup(func() { q.Close() })
	return &guest{Process: p, q: q, dir: dir}
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestStopSaveLoadCont(t *testing.T) {
	ctx := testCtx(t)
	a := start(t, nil)
	st, err := a.q.Stop(ctx)
	check(t, err)
	if st.WasRunning || st.Status != StatusPrelaunch {
		t.Errorf("before the first Cont: %+v", st)
	}
	check(t, a.q.Cont(ctx))
	if s, running, err := a.q.Status(ctx); err != nil || s != StatusRunning || !running {
		t.Fatal(s, running, err)
	}
	before := time.Now().Truncate(time.Microsecond)
	st, err = a.q.Stop(ctx)
	check(t, err)
	if !st.WasRunning || st.Status != StatusPaused || st.At.Before(before) || st.At.After(time.Now()) {
		t.Errorf("after Cont, told to stop at %v: %+v", before, st)
	}
	st, err = a.q.Stop(ctx)
	check(t, err)
	if st.WasRunning || st.Status != StatusPaused {
		t.Errorf("stopped twice: %+v", st)
	}
	state, err := a.q.SaveDevices(ctx, nil)
	check(t, err)
	again, err := a.q.SaveDevices(ctx, nil)
	check(t, err)
	if len(again) != len(state) {
		t.Errorf("second save has %d bytes, first %d", len(again), len(state))
	}
	t.Logf("device state: %d bytes", len(state))

	b := start(t, func(m *Machine) { m.Incoming = true })
	if s, _, err := b.q.Status(ctx); err != nil || s != StatusInMigrate {
		t.Fatal(s, err)
	}
	began := time.Now()
	check(t, b.q.LoadDevices(ctx, state))
	loaded := time.Since(began)
	if s, running, err := b.q.Status(ctx); err != nil || s != StatusPaused || running {
		t.Fatal(s, running, err)
	}
	check(t, b.q.Cont(ctx))
	t.Logf("loaded in %v, running after %v", loaded, time.Since(began))
	if s := b.LogTail(1000); s != "" {
		t.Errorf("loading left messages: %s", s)
	}
	select {
	case e := <-a.q.Events():
		t.Errorf("event %s was delivered, only own STOP and RESUME have happened", e.Name)
	default:
	}
}

func TestLoadRefused(t *testing.T) {
	ctx := testCtx(t)
	a := start(t, func(m *Machine) { m.VCPUs = 2 })
	_, err := a.q.Stop(ctx)
	check(t, err)
	state, err := a.q.SaveDevices(ctx, nil)
	check(t, err)
	for name, data := range map[string][]byte{"garbage": make([]byte, 1000), "cut": state[:len(state)/2], "other machine": state} {
		t.Run(name, func(t *testing.T) {
			b := start(t, func(m *Machine) {
				m.Incoming = true
				if name != "other machine" {
					m.VCPUs = 2
				}
			})
			err := b.q.LoadDevices(ctx, data)
			if err == nil || !strings.Contains(err.Error(), "log ends") {
				t.Fatalf("error is %v, want one that quotes QEMU's log", err)
			}
			t.Log(err)
			r, err := b.Wait(ctx)
			check(t, err)
			if r.Code != 1 || r.Stderr == "" {
				t.Errorf("exit reason %+v", r)
			}
		})
	}
}

func TestEventsOfOthersAreDelivered(t *testing.T) {
	ctx := testCtx(t)
	a := start(t, nil)
	check(t, a.q.Cont(ctx))
	// A second way to stop: not Stop, so its events are somebody else's.
	check(t, a.q.do(ctx, "stop", nil))
	check(t, a.q.do(ctx, "cont", nil))
	check(t, a.q.Reset(ctx))
	var got []string
	for len(got) < 3 {
		select {
		case e := <-a.q.Events():
			got = append(got, e.Name)
		case <-ctx.Done():
			t.Fatal("events so far:", got)
		}
	}
	if strings.Join(got, " ") != "STOP RESUME RESET" {
		t.Error("events:", got)
	}
	check(t, a.q.Quit(ctx))
	for e := range a.q.Events() {
		got = append(got, e.Name)
	}
	if got[len(got)-1] != "SHUTDOWN" {
		t.Error("events until the end:", got)
	}
	if _, err := a.q.Stop(ctx); !errors.Is(err, ErrClosed) {
		t.Error("Stop after the end:", err)
	}
	if r, err := a.Wait(ctx); err != nil || r.Code != 0 || r.Signal != "" {
		t.Error(r, err)
	}
}

func TestProtectable(t *testing.T) {
	ctx := testCtx(t)
	for name, c := range map[string]struct {
		change func(*Machine)
		want   string
	}{
		"q35":    {nil, ""},
		"i440fx": {func(m *Machine) { m.Type = "pc-i440fx-7.2" }, ""},
		"vnc":    {func(m *Machine) { m.VNCPath = m.QMPPath + ".vnc" }, ""},
		"uefi":   {func(m *Machine) { m.FT = false; m.Firmware = ovmf(t, filepath.Dir(m.QMPPath)) }, "UEFI variables"},
	} {
		t.Run(name, func(t *testing.T) {
			a := start(t, c.change)
			why, err := a.q.Protectable(ctx)
			check(t, err)
			if c.want == "" && len(why) > 0 || c.want != "" && !strings.Contains(strings.Join(why, "\n"), c.want) {
				t.Errorf("reasons %q, want %q", why, c.want)
			}
			blocks, err := a.q.RAMBlocks(ctx)
			check(t, err)
			t.Log(blocks, why)
		})
	}
}

func ovmf(t *testing.T, dir string) *Firmware {
	vars, err := os.ReadFile("/usr/share/OVMF/OVMF_VARS_4M.fd")
	testenv.Need(t, err == nil, "needs OVMF (package ovmf)")
	f := &Firmware{Code: "/usr/share/OVMF/OVMF_CODE_4M.fd", Vars: filepath.Join(dir, "vars.fd")}
	check(t, os.WriteFile(f.Vars, vars, 0o600))
	return f
}

func TestProcess(t *testing.T) {
	ctx := testCtx(t)
	a := start(t, nil)
	b, err := Adopt(filepath.Join(a.dir, "pid"), filepath.Join(a.dir, "log"))
	check(t, err)
	if b.PID() != a.PID() {
		t.Errorf("adopted %d, started %d", b.PID(), a.PID())
	}
	if sid, err := syscall.Getpgid(a.PID()); err != nil || sid != a.PID() {
		t.Error("QEMU is not in a group of its own:", sid, err)
	}
	check(t, b.Kill())
	r, err := a.Wait(ctx)
	check(t, err)
	if r.Signal != "SIGKILL" || r.Code != -1 {
		t.Errorf("exit reason %+v", r)
	}
	if r, err = b.Wait(ctx); err != nil || !r.Adopted {
		t.Error(r, err)
	}
	check(t, a.Kill())
	if _, err := Adopt(filepath.Join(a.dir, "pid"), ""); !errors.Is(err, ErrNoProcess) {
		t.Error("adopted a dead process:", err)
	}
	check(t, os.WriteFile(filepath.Join(a.dir, "pid"), fmt.Appendf(nil, "%d 1\n", os.Getpid()), 0o600))
	if _, err := Adopt(filepath.Join(a.dir, "pid"), ""); !errors.Is(err, ErrNoProcess) {
		t.Error("adopted another process:", err)
	}
}

// The lock is QEMU's too.
func TestLockIsInherited(t *testing.T) {
	path := testenv.QEMU(t)
	dir := t.TempDir()
	lock := filepath.Join(dir, "lock")
	f, err := os.Create(lock)
	check(t, err)
	check(t, syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB))
	args, err := Args(bios(dir))
	check(t, err)
	p, err := Start(testCtx(t), path, args, StartOptions{LockFile: f, LogPath: filepath.Join(dir, "log"), OOMScoreAdj: 500})
	check(t, err)
	defer func() { p.Kill(); <-p.Exited() }()
	adj, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", p.PID()))
	if err != nil || strings.TrimSpace(string(adj)) != "500" {
		t.Errorf("oom_score_adj is %q, %v", adj, err)
	}
	check(t, f.Close())
	g, err := os.Open(lock)
	check(t, err)
	defer g.Close()
	if err := syscall.Flock(int(g.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); !errors.Is(err, syscall.EWOULDBLOCK) {
		t.Error("lock is free while QEMU lives:", err)
	}
	check(t, p.Kill())
	<-p.Exited()
	check(t, syscall.Flock(int(g.Fd()), syscall.LOCK_EX|syscall.LOCK_NB))
}

func TestStartFails(t *testing.T) {
	path := testenv.QEMU(t)
	dir := t.TempDir()
	ctx := testCtx(t)
	if _, err := Start(ctx, filepath.Join(dir, "no"), nil, StartOptions{LogPath: filepath.Join(dir, "log")}); err == nil {
		t.Error("started a missing program")
	}
	p, err := Start(ctx, path, []string{"-machine", "nonsense"}, StartOptions{LogPath: filepath.Join(dir, "log")})
	check(t, err)
	r, err := p.Wait(ctx)
	check(t, err)
	if r.Code != 1 || !strings.Contains(r.String(), "unsupported machine type") {
		t.Error(r)
	}
	short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	if _, err := DialQMP(short, filepath.Join(dir, "qmp"), nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
}

// TestPauseFigures prints where the time of a checkpoint's QMP part goes.
func TestPauseFigures(t *testing.T) {
	testenv.Slow(t)
	ctx := testCtx(t)
	a := start(t, func(m *Machine) { m.VCPUs = 2; m.Memory = 256 << 20 })
	check(t, a.q.Cont(ctx))
	figures := map[string][]time.Duration{}
	var buf []byte
	for range 200 {
		t0 := time.Now()
		_, err := a.q.Stop(ctx)
		check(t, err)
		t1 := time.Now()
		buf, err = a.q.SaveDevices(ctx, buf)
		check(t, err)
		t2 := time.Now()
		check(t, a.q.Cont(ctx))
		t3 := time.Now()
		figures["stop"] = append(figures["stop"], t1.Sub(t0))
		figures["save"] = append(figures["save"], t2.Sub(t1))
		figures["cont"] = append(figures["cont"], t3.Sub(t2))
		time.Sleep(2 * time.Millisecond) // the guest's turn
	}
	for _, k := range []string{"stop", "save", "cont"} {
		t.Log(k, quantiles(figures[k]))
	}
}

func quantiles(d []time.Duration) string {
	sort.Slice(d, func(i, j int) bool { return d[i] < d[j] })
	return fmt.Sprintf("median %v p99 %v", d[len(d)/2], d[len(d)*99/100])
}

// TestStopAndSave: the pipelined form gives the same, calls back in between,
// and does not save for a guest that something else has stopped.
func TestStopAndSave(t *testing.T) {
	ctx := testCtx(t)
	a := start(t, nil)
	check(t, a.q.Cont(ctx))
	called := 0
	st, state, err := a.q.StopAndSave(ctx, nil, func(s Stopped) error {
		called++
		if !s.WasRunning {
			t.Error("callback before the guest stood still")
		}
		return nil
	})
	check(t, err)
	if !st.WasRunning || called != 1 || len(state) < 1000 || st.At.IsZero() {
		t.Errorf("%+v, %d calls, %d bytes", st, called, len(state))
	}
	b := start(t, func(m *Machine) { m.Incoming = true })
	check(t, b.q.LoadDevices(ctx, state))
	st, state, err = a.q.StopAndSave(ctx, nil, nil)
	check(t, err)
	if st.WasRunning || state != nil {
		t.Errorf("of a stopped guest: %+v, %d bytes", st, len(state))
	}
	check(t, a.q.Cont(ctx))
	if _, _, err := a.q.StopAndSave(ctx, nil, func(Stopped) error { return os.ErrInvalid }); !errors.Is(err, os.ErrInvalid) {
		t.Error(err)
	}
	// A save that nobody waited for does not spoil the next one.
	check(t, a.q.Cont(ctx))
	gone, cancel := context.WithCancel(ctx)
	cancel()
	if _, _, err := a.q.StopAndSave(gone, nil, nil); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	state, err = a.q.SaveDevices(ctx, nil)
	check(t, err)
	c := start(t, func(m *Machine) { m.Incoming = true })
	check(t, c.q.LoadDevices(ctx, state))
}
