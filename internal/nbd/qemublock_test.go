package nbd_test

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"perdure/internal/testenv"
)

// These tests let QEMU's block layer work on exports, without a guest: quorum,
// mirror, reconnecting, and many clients at once.

// daemon is a qemu-storage-daemon and its QMP.
type daemon struct {
	t   *testing.T
	cmd *exec.Cmd
	in  *json.Encoder
	out *bufio.Scanner

	early []map[string]any // events that came before the answer to a command
}

func startDaemon(t *testing.T, args ...string) *daemon {
	t.Helper()
	bin := testenv.Tool(t, "qemu-storage-daemon")
	cmd := exec.Command(bin, append([]string{"--chardev", "stdio,id=c", "--monitor", "chardev=c"}, args...)...)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = stdin.Close()
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	d := &daemon{t: t, cmd: cmd, in: json.NewEncoder(stdin), out: bufio.NewScanner(stdout)}
	if !d.out.Scan() {
		t.Fatal("no greeting of qemu-storage-daemon")
	}
	d.do("qmp_capabilities", nil)
	return d
}

// next returns the next message.
func (d *daemon) next() map[string]any {
	d.t.Helper()
	if !d.out.Scan() {
		d.t.Fatal("qemu-storage-daemon is gone")
	}
	var m map[string]any
	if err := json.Unmarshal(d.out.Bytes(), &m); err != nil {
		d.t.Fatal(err)
	}
	return m
}

func (d *daemon) do(command string, args any) any {
	d.t.Helper()
	c := map[string]any{"execute": command}
	if args != nil {
		c["arguments"] = args
	}
	if err := d.in.Encode(c); err != nil {
		d.t.Fatal(err)
	}
	for {
		m := d.next()
		if e, bad := m["error"]; bad {
			d.t.Fatalf("%s: %v", command, e)
		}
		if r, ok := m["return"]; ok {
			return r
		}
		d.early = append(d.early, m)
	}
}

// wait reads events up to one of the given name and returns its data.
func (d *daemon) wait(event string) map[string]any {
	d.t.Helper()
	for {
		var m map[string]any
		if len(d.early) > 0 {
			m, d.early = d.early[0], d.early[1:]
		} else {
			m = d.next()
		}
		if m["event"] == event {
			data, _ := m["data"].(map[string]any)
			return data
		}
	}
}

type dict = map[string]any

func nbdNode(name, sock string, delay int) dict {
	return dict{"node-name": name, "driver": "nbd", "export": "disk0", "reconnect-delay": delay, "server": dict{"type": "unix", "path": sock}}
}

// serveNode exports a node of the daemon and returns its URI.
func (d *daemon) serveNode(node string) string {
	d.t.Helper()
	sock := filepath.Join(d.t.TempDir(), "q")
	d.do("nbd-server-start", dict{"addr": dict{"type": "unix", "data": dict{"path": sock}}})
	d.do("block-export-add", dict{"id": "e", "type": "nbd", "node-name": node, "name": "top", "writable": true})
	return "nbd+unix:///top?socket=" + sock
}

func compare(t *testing.T, a, b string) {
	t.Helper()
	must(t, testenv.Tool(t, "qemu-img"), "compare", "-f", "raw", "-F", "raw", a, b)
}

// TestQuorum has an export as one of two children of QEMU's quorum, as people
// mirror disks who have nothing better. Both children get everything.
func TestQuorum(t *testing.T) {
	_, sock1, uri1 := exported(t, 16<<20)
	_, sock2, uri2 := exported(t, 16<<20)
	d := startDaemon(t)
	d.do("blockdev-add", nbdNode("a", sock1, 0))
	d.do("blockdev-add", nbdNode("b", sock2, 0))
	d.do("blockdev-add", dict{"node-name": "q", "driver": "quorum", "vote-threshold": 2, "children": []string{"a", "b"}})
	top := d.serveNode("q")
	io(t, top, "aio_write -P 1 0 4M", "aio_write -P 2 4M 1M", "aio_flush", "write -z 1M 512k", "discard 2M 64k", "write -f -P 3 15M 4k", "flush",
		"read -P 1 0 1M", "read -P 0 1M 512k", "read -P 2 4M 1M", "read -P 3 15M 4k")
	compare(t, uri1, uri2)
	compare(t, top, uri2)
	// One child is changed behind the other's back: the vote must fail, not answer.
	io(t, uri2, "write -P 9 5M 4k", "flush")
	if out, err := try(t, testenv.Tool(t, "qemu-io"), "-f", "raw", top, "-c", "read 5M 4k"); err == nil && !strings.Contains(out, "failed") {
		t.Fatal("two children differ, and the read succeeds:", out)
	}
}

// TestMirror copies a running disk from one export to another by blockdev-mirror,
// with writes meanwhile, in both copy modes.
func TestMirror(t *testing.T) {
	for _, mode := range []string{"background", "write-blocking"} {
		t.Run(mode, func(t *testing.T) {
			_, src, uriSrc := exported(t, 32<<20)
			_, dst, uriDst := exported(t, 32<<20)
			io(t, uriSrc, "write -P 1 0 8M", "write -P 2 20M 4M")
			io(t, uriDst, "write -P 7 10M 4M") // must go
			d := startDaemon(t)
			d.do("blockdev-add", nbdNode("src", src, 0))
			d.do("blockdev-add", nbdNode("dst", dst, 0))
			top := d.serveNode("src")
			d.do("blockdev-mirror", dict{"job-id": "m", "device": "src", "target": "dst", "sync": "full", "copy-mode": mode})
			io(t, top, "aio_write -P 3 1M 2M", "aio_write -P 4 30M 1M", "aio_flush", "write -z 21M 1M", "write -P 5 512 512")
			d.wait("BLOCK_JOB_READY")
			io(t, top, "write -P 6 25M 64k", "flush", "read -P 6 25M 64k")
			d.do("block-job-complete", dict{"device": "m"})
			if e := d.wait("BLOCK_JOB_COMPLETED"); e["error"] != nil {
				t.Fatal(e)
			}
			compare(t, uriSrc, uriDst)
			io(t, uriDst, "read -P 5 512 512", "read -P 3 1M 2M", "read -P 0 21M 1M", "read -P 4 30M 1M", "read -P 0 10M 4M")
		})
	}
}

// TestReconnect ends the server under a client with reconnect-delay and starts
// it again: the client's request succeeds, late.
func TestReconnect(t *testing.T) {
	v := newVolume(t, 8<<20)
	sock := filepath.Join(t.TempDir(), "s")
	stop := export(t, sock, v)
	d := startDaemon(t)
	d.do("blockdev-add", nbdNode("n", sock, 60))
	top := d.serveNode("n")
	io(t, top, "write -P 1 0 1M", "flush")
	for round := range 3 {
		stop()
		done := make(chan string, 1)
		go func() {
			out, err := try(t, testenv.Tool(t, "qemu-io"), "-f", "raw", top, "-c", fmt.Sprintf("write -P %d 1M 64k", round+10), "-c", "flush", "-c", fmt.Sprintf("read -P %d 1M 64k", round+10))
			if err != nil || strings.Contains(out, "failed") || strings.Contains(out, "error") {
				done <- fmt.Sprint(err, out)
			}
			close(done)
		}()
		select {
		case why, bad := <-done:
			t.Fatal("a write ended without a server: ", why, bad)
		case <-time.After(100 * time.Millisecond):
		}
		stop = export(t, sock, v)
		if why, bad := <-done; bad {
			t.Fatal(why)
		}
	}
	compare(t, top, uriOf(sock))
}

// TestBackup takes the changes of a running disk away by blockdev-backup to an export.
func TestBackup(t *testing.T) {
	_, src, uriSrc := exported(t, 16<<20)
	_, dst, uriDst := exported(t, 16<<20)
	io(t, uriSrc, "write -P 1 0 6M", "write -P 2 9M 1M")
	image := filepath.Join(t.TempDir(), "then.raw")
	must(t, testenv.Tool(t, "qemu-img"), "convert", "-f", "raw", "-O", "raw", uriSrc, image)
	d := startDaemon(t)
	d.do("blockdev-add", nbdNode("src", src, 0))
	d.do("blockdev-add", nbdNode("dst", dst, 0))
	top := d.serveNode("src")
	d.do("blockdev-backup", dict{"job-id": "b", "device": "src", "target": "dst", "sync": "full"})
	io(t, top, "write -P 3 0 1M", "write -P 4 5M 64k") // not in the backup
	if e := d.wait("BLOCK_JOB_COMPLETED"); e["error"] != nil {
		t.Fatal(e)
	}
	compare(t, image, uriDst)
}
