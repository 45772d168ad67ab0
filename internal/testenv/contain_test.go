package testenv

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { os.Exit(Main(m)) }

// TestNothingOutlivesTests kills a contained run of this very program outright
// while it has a child of its own session and a mount.
func TestNothingOutlivesTests(t *testing.T) {
	Root(t)
	if os.Getenv("CONTAIN_INNER") != "" {
		inner(t)
		return
	}
	fifo := t.TempDir() + "/alive"
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	var env []string
	for _, e := range os.Environ() {
		if !strings.HasPrefix(e, contained+"=") {
			env = append(env, e)
		}
	}
	cmd := exec.Command("/proc/self/exe", "-test.run", "^TestNothingOutlivesTests$", "-test.v")
	cmd.Env = append(env, "CONTAIN_INNER="+fifo)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	// Whoever lives in there holds the other end open.
	alive, err := os.Open(fifo)
	if err != nil {
		t.Fatal(err)
	}
	defer alive.Close()
	sc := bufio.NewScanner(out)
	for sc.Scan() && !strings.Contains(sc.Text(), "inner is ready") {
	}
	if pid := cmd.Process.Pid; pid <= 1 {
		t.Fatal(strconv.Itoa(pid))
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // killed
	// End of file comes when the last one is gone; else the test's time runs out.
	if n, err := alive.Read(make([]byte, 1)); n != 0 {
		t.Fatalf("%d bytes, %v", n, err)
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(mounts), fifo+".mnt") {
		t.Error("the mount outlived the tests")
	}
}

func inner(t *testing.T) {
	fifo := os.Getenv("CONTAIN_INNER")
	if os.Getpid() != 1 {
		t.Errorf("process %d is not the first of its namespace", os.Getpid())
	}
	if err := os.Mkdir(fifo+".mnt", 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", fifo+".mnt", "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	w, err := os.OpenFile(fifo, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	child := exec.Command("sleep", "1000")
	child.ExtraFiles = []*os.File{w}
	child.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	fmt.Println("inner is ready")
	_ = child.Wait() // killed with everybody
}
