package guestmem

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"perdure/internal/testenv"
)

// TestServerKilled kills the serving process: the guest, whose memory is
// touched and locked, must go on, the helper must end, and the mount point must be usable again.
func TestServerKilled(t *testing.T) {
	testenv.Root(t)
	dir := t.TempDir() + "/mem"
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	srv := exec.Command(exe, dir)
	srv.Env = append(os.Environ(), roleEnv+"=server")
	srv.Stderr = os.Stderr
	in, _ := srv.StdinPipe()
	pipe, _ := srv.StdoutPipe()
	out := bufio.NewReader(pipe)
	if err := srv.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = srv.Process.Kill()
		_ = srv.Wait()
		_ = unix.Unmount(dir, unix.MNT_FORCE|unix.MNT_DETACH)
	})
	line, _ := out.ReadString('\n')
	var helper int
	if n, _ := fmt.Sscan(line, &helper); n != 1 {
		t.Fatal("server: ", line)
	}
	g := startGuest(t, dir+"/ram", testSize)
	fmt.Fprintln(in, "attach")
	if line, _ = out.ReadString('\n'); strings.TrimSpace(line) != "<nil>" {
		t.Fatal("attach: ", line)
	}
	g.do("run 2 1")
	if err := srv.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = srv.Wait()
	g.do("halt")
	g.do("rewrite %d 1 1", testSize/PageSize) // every page can still be written
	before := g.memory()
	waitFor(t, "the helper ends", func() bool { return ended(helper) })

	r := openRAM(t, testSize, func(c *Config) { c.Dir = dir })
	g2 := startGuest(t, r.Path(), testSize)
	if err := r.Attach(); err != nil {
		t.Fatal(err)
	}
	r.SetMode(Collect)
	g2.do("dirty 5 1 1")
	if ps := mustCut(t, r); ps.Pages() != 5 {
		t.Errorf("%d pages on the new mount", ps.Pages())
	}
	same(t, "old guest beside the new mount", g.memory(), before)
}

// TestConnectionAborted pulls the connection away under a running guest.
func TestConnectionAborted(t *testing.T) {
	r := openRAM(t, testSize)
	g := startGuest(t, r.Path(), testSize)
	if err := r.Attach(); err != nil {
		t.Fatal(err)
	}
	r.SetMode(Collect)
	g.do("dirty 100 1 1")
	if err := abortConnection(r.devn); err != nil {
		t.Fatal(err)
	}
	select {
	case <-r.Failed():
	case <-time.After(5 * time.Second):
		t.Fatal("not noticed")
	}
	if err := r.Flush(); err == nil {
		t.Error("flush after abort succeeded")
	}
	g.do("dirty 4000 1 1")
	if err := r.Close(); err != nil {
		t.Error(err)
	}
}

// TestCloseInterruptsFlush closes while the server withholds a reply.
func TestCloseInterruptsFlush(t *testing.T) {
	r := openRAM(t, testSize)
	g := startGuest(t, r.Path(), testSize)
	if err := r.Attach(); err != nil {
		t.Fatal(err)
	}
	release, entered := make(chan struct{}), make(chan struct{}, 64)
	hold := func(int64, int) unix.Errno {
		entered <- struct{}{}
		<-release
		return 0
	}
	r.dev.hook.Store(&hold)
	g.do("dirty 1 1 1")
	res := make(chan error, 1)
	go func() { res <- r.Flush() }()
	<-entered
	closed := make(chan error, 1)
	go func() { closed <- r.Close() }()
	select {
	case err := <-res:
		if err == nil {
			t.Error("flush succeeded without its reply")
		}
	case <-time.After(5 * time.Second):
		t.Error("flush hangs after close")
	}
	close(release)
	select {
	case <-closed:
	case <-time.After(10 * time.Second):
		t.Fatal("close hangs")
	}
}

// TestCloseDuringSweep closes while the function of a sweep does not return.
func TestCloseDuringSweep(t *testing.T) {
	r := openRAM(t, testSize)
	g := startGuest(t, r.Path(), testSize)
	if err := r.Attach(); err != nil {
		t.Fatal(err)
	}
	g.do("dirty 3000 1 1")
	entered, release, swept := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	go func() {
		swept <- r.Sweep(context.Background(), 0, func(int64, []byte) error {
			close(entered)
			<-release
			return context.Canceled
		})
	}()
	<-entered
	start := time.Now()
	if err := r.Close(); err != nil || time.Since(start) > 2*helperGrace {
		t.Errorf("close: %v after %v", err, time.Since(start))
	}
	close(release)
	if err := <-swept; err == nil {
		t.Error("sweep of closed memory succeeded")
	}
}

func ended(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return true
	}
	_, rest, _ := strings.Cut(string(b), ") ")
	return strings.HasPrefix(rest, "Z")
}

func waitFor(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("waited in vain: ", what)
		}
	}
}
