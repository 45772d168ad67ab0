//go:build soak

package e2e

import (
	"bufio"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"perdure/internal/lab"
	"perdure/internal/lab/distro"
	"perdure/internal/testenv"
)

// distroIP is the address of the one guest with a real distribution.
const distroIP = "10.77.0.150"

// distroImage builds the image, or takes it from the cache.
func distroImage(t *testing.T) distro.Image {
	t.Helper()
	testenv.Root(t)
	testenv.Tool(t, "debootstrap")
	img, err := distro.Build(t.Context(), distro.Options{Address: distroIP + "/24", Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// long gives the test more time than others have: the guest is emulated.
func (w *World) long(d time.Duration) {
	w.T.Helper()
	ctx, cancel := context.WithTimeoutCause(w.T.Context(), d, fmt.Errorf("the test took longer than %v", d))
	w.T.Cleanup(cancel)
	w.Ctx = ctx
}

// CreateDistro makes and starts a VM from an image of the distribution. It does
// not wait for anything in it.
func (w *World) CreateDistro(level string, flags ...string) *VM {
	w.T.Helper()
	v := w.DefineDistro(level, flags...)
	w.Perdure("a", "vm", "start", v.Name)
	return v
}

// DefineDistro makes such a VM and does not start it.
func (w *World) DefineDistro(level string, flags ...string) *VM {
	w.T.Helper()
	w.vms++
	v := &VM{w: w, Name: fmt.Sprintf("distro%d", w.vms), IP: distroIP}
	w.T.Cleanup(v.remove)
	w.Perdure("a", append([]string{"vm", "create", v.Name, "--level", level, "--memory", "384M", "--net", lab.BridgeName}, flags...)...)
	return v
}

// guestAgent speaks with a real guest agent through the VM's shim.
type guestAgent struct {
	v    *VM
	conn net.Conn
	in   *bufio.Reader
}

// Agent connects to the guest agent on the VM's primary, and waits until it answers.
func (v *VM) Agent(limit time.Duration) *guestAgent {
	v.w.T.Helper()
	g := &guestAgent{v: v}
	v.w.T.Cleanup(g.close)
	v.w.Eventually(limit, "the guest agent answers", g.connect)
	return g
}

func (g *guestAgent) close() {
	if g.conn != nil {
		g.conn.Close()
	}
}

// connect opens the port and throws away what is left of earlier talks: the
// answer to guest-sync-delimited begins with a byte that occurs nowhere else.
func (g *guestAgent) connect() error {
	g.close()
	ctx, cancel := context.WithTimeout(g.v.w.Ctx, 5*time.Second)
	defer cancel()
	conn, err := g.v.shimOf(g.v.Primary()).Agent(ctx)
	if err != nil {
		return err
	}
	g.conn, g.in = conn, bufio.NewReader(conn)
	id := rand.Int32()
	if err := conn.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return err
	}
	if _, err := fmt.Fprintf(conn, "\xff{\"execute\":\"guest-sync-delimited\",\"arguments\":{\"id\":%d}}\n", id); err != nil {
		return err
	}
	for {
		if _, err := g.in.ReadString(0xff); err != nil {
			return err
		}
		line, err := g.in.ReadString('\n')
		if err != nil {
			return err
		}
		if strings.Contains(line, strconv.Itoa(int(id))) {
			return nil
		}
	}
}

// Call carries out one command of the guest agent.
func (g *guestAgent) Call(command string, args, result any) {
	t := g.v.w.T
	t.Helper()
	b, err := json.Marshal(map[string]any{"execute": command, "arguments": args})
	g.v.w.must(err, "guest agent")
	g.v.w.must(g.conn.SetDeadline(time.Now().Add(2*time.Minute)), "set deadline")
	_, err = g.conn.Write(append(b, '\n'))
	g.v.w.must(err, "ask the guest agent")
	line, err := g.in.ReadBytes('\n')
	g.v.w.must(err, "guest agent: "+command)
	var r struct {
		Return json.RawMessage
		Error  *struct{ Desc string }
	}
	g.v.w.must(json.Unmarshal(line, &r), "read answer of the guest agent")
	if r.Error != nil {
		t.Fatalf("guest agent: %s: %s", command, r.Error.Desc)
	}
	if result != nil {
		g.v.w.must(json.Unmarshal(r.Return, result), "read answer of the guest agent")
	}
}

// Run runs a shell script in the guest and returns its output and exit code.
func (g *guestAgent) Run(limit time.Duration, script string) (string, int) {
	g.v.w.T.Helper()
	var started struct{ PID int }
	g.Call("guest-exec", map[string]any{"path": "/bin/sh", "arg": []string{"-c", "exec 2>&1; " + script}, "capture-output": true,
		"env": []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8"}}, &started)
	var st struct {
		Exited   bool
		Exitcode int
		OutData  string `json:"out-data"`
	}
	g.v.w.Eventually(limit, "in the guest: "+script, func() error {
		g.Call("guest-exec-status", map[string]any{"pid": started.PID}, &st)
		if !st.Exited {
			return errors.New("still running")
		}
		return nil
	})
	out, err := base64.StdEncoding.DecodeString(st.OutData)
	g.v.w.must(err, "read output")
	return strings.TrimSpace(string(out)), st.Exitcode
}

// Must is Run for what has to succeed.
func (g *guestAgent) Must(limit time.Duration, script string) string {
	g.v.w.T.Helper()
	out, code := g.Run(limit, script)
	if code != 0 {
		g.v.w.T.Errorf("in the guest: %s: exit code %d: %s", script, code, out)
	}
	return out
}

// CheckConsole types a command on the serial console and waits for its result.
func (v *VM) CheckConsole(host string) {
	v.w.T.Helper()
	ctx, cancel := context.WithTimeout(v.w.Ctx, 2*time.Minute)
	defer cancel()
	cmd := v.w.Lab.Command(ctx, host, "perdure", "vm", "console", v.Name, "--for", "2m")
	in, err := cmd.StdinPipe()
	v.w.must(err, "open console")
	out, err := cmd.StdoutPipe()
	v.w.must(err, "open console")
	v.w.must(cmd.Start(), "open console")
	defer func() { cancel(); _ = cmd.Wait() }() // killed
	a, b := rand.IntN(10000), rand.IntN(10000)
	want := fmt.Sprintf("sum=%d.", a+b)
	seen := make(chan string, 1)
	go func() {
		var all strings.Builder
		buf := make([]byte, 4096)
		for {
			n, err := out.Read(buf)
			all.Write(buf[:n])
			if err != nil || strings.Contains(all.String(), want) {
				seen <- all.String()
				return
			}
		}
	}()
	for {
		_, err := fmt.Fprintf(in, "\necho sum=$((%d+%d)).\n", a, b)
		if err != nil && !errors.Is(err, io.ErrClosedPipe) {
			v.w.T.Logf("type on the console: %v", err)
		}
		select {
		case got := <-seen:
			if !strings.Contains(got, want) {
				v.w.T.Errorf("the console does not answer %q:\n%s", want, got[max(0, len(got)-2000):])
			}
			return
		case <-time.After(20 * time.Second): // it may not have read the line: no shell yet
		}
	}
}

// CheckReplica looks at a host's copy of the disk of a stopped VM from outside:
// its file system is clean. The host must have run the VM last: the other one
// may still have to apply its journal, which it does when it opens the disk.
func (v *VM) CheckReplica(host string) {
	v.w.T.Helper()
	path := filepath.Join(v.w.Lab.StateDir(host), "vms", v.Name, "disks", "disk0.raw")
	out, err := exec.Command("/sbin/e2fsck", "-f", "-n", fmt.Sprintf("%s?offset=%d", path, distro.RootOffset)).CombinedOutput()
	if err != nil {
		v.w.T.Errorf("file system on host %s: %v\n%s", host, err, out)
	}
}

// TestSoakDistroBoots boots the distribution from images as users have them, at
// both levels, and by its kernel given directly.
func TestSoakDistroBoots(t *testing.T) {
	img := distroImage(t)
	dir := t.TempDir()
	for _, f := range []string{"qcow2", "vmdk"} {
		if out, err := exec.Command("qemu-img", "convert", "-O", f, img.Disk, filepath.Join(dir, "disk."+f)).CombinedOutput(); err != nil {
			t.Fatalf("make %s: %v: %s", f, err, out)
		}
	}
	file := func(f string) string { return filepath.Join(dir, "disk."+f) }
	for _, c := range []struct {
		name, level string
		flags       []string
		efi         bool
	}{
		{"qcow2 at none", "none", []string{"--image", file("qcow2")}, false},
		{"vmdk at ft", "ft", []string{"--image", file("vmdk")}, false},
		{"raw with UEFI at none", "none", []string{"--image", img.Disk, "--uefi"}, true},
		{"raw with kernel at ft", "ft", []string{"--image", img.Disk, "--kernel", img.Kernel, "--initrd", img.Initrd, "--append", distro.Append}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := Start(t)
			w.long(20 * time.Minute)
			v := w.CreateDistro(c.level, c.flags...)
			g := v.Agent(10 * time.Minute)
			if c.level == "ft" {
				v.Protected()
				g.v.w.must(g.connect(), "guest agent while protected")
			}
			_, code := g.Run(time.Minute, "test -d /sys/firmware/efi")
			if (code == 0) != c.efi {
				t.Errorf("booted by UEFI: %v, want %v", code == 0, c.efi)
			}
			t.Logf("%s", g.Must(time.Minute, "systemd-analyze time | head -n 1; uname -r"))
			v.CheckConsole("a")
			w.Perdure("a", "vm", "stop", v.Name)
			v.Wait("state=stopped", 2*time.Minute)
		})
	}
}
