package nbd

import (
	"bytes"
	"encoding/json"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"perdure/internal/testenv"
)

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	var out, errs bytes.Buffer
	cmd := exec.Command(name, args...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s %s: %v\n%s%s", name, strings.Join(args, " "), err, out.String(), errs.String())
	}
	return out.String() + errs.String()
}

// TestQEMUClients runs QEMU's own tools, whose client is the one of the guest's disks.
func TestQEMUClients(t *testing.T) {
	img, qio := testenv.Tool(t, "qemu-img"), testenv.Tool(t, "qemu-io")
	d := newMemDisk(16 << 20)
	sock := serveDisks(t, map[string]Backend{"disk0": d}, Options{})
	url := "nbd+unix:///disk0?socket=" + sock

	out := run(t, qio, "-f", "raw", url, "-c", "write -P 0xa5 64k 192k", "-c", "write -P 0x5a 512 512", "-c", "write -f -P 1 1M 4k",
		"-c", "write -z 128k 64k", "-c", "write -z -u 192k 32k", "-c", "discard 224k 16k", "-c", "flush",
		"-c", "read -P 0xa5 64k 64k", "-c", "read -P 0 128k 112k", "-c", "read -P 0xa5 240k 16k", "-c", "read -P 0x5a 512 512",
		"-c", "read -P 1 1M 4k", "-c", "aio_write -P 2 2M 1M", "-c", "aio_write -P 3 4M 4M", "-c", "aio_flush",
		"-c", "read -P 2 2M 1M", "-c", "read -P 3 4M 4M", "-c", "read 0 16M")
	if strings.Contains(out, "verification failed") || strings.Contains(out, "error") {
		t.Fatal(out)
	}
	d.mu.Lock() // a client may be gone before its last request is carried out
	bad := d.flushes == 0 || d.fua == 0 || d.alloc[200<<10>>12] || !d.alloc[150<<10>>12]
	alloc := slices.Clone(d.alloc)
	d.mu.Unlock()
	if bad {
		t.Fatalf("flushes %d, fua %d, holes %v %v", d.flushes, d.fua, alloc[200<<10>>12], alloc[150<<10>>12])
	}

	var m []struct {
		Start, Length int64
		Zero, Data    bool
	}
	if err := json.Unmarshal([]byte(run(t, img, "map", "-f", "raw", "--output=json", url)), &m); err != nil {
		t.Fatal(err)
	}
	for _, e := range m {
		for b := e.Start; b < e.Start+e.Length; b += 4096 {
			if alloc[b/4096] != e.Data {
				t.Fatalf("map says data=%v at %d", e.Data, b)
			}
		}
	}

	file := t.TempDir() + "/copy.raw"
	run(t, img, "convert", "-f", "raw", "-O", "raw", url, file)
	run(t, img, "compare", "-f", "raw", "-F", "raw", url, file)
	run(t, qio, "-f", "raw", file, "-c", "write -P 9 3M 1M")
	run(t, img, "convert", "-n", "-f", "raw", "-O", "raw", file, url)
	run(t, img, "compare", "-f", "raw", "-F", "raw", url, file)
	if out := run(t, img, "info", url); !strings.Contains(out, "16 MiB") {
		t.Fatal(out)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.data[3<<20] != 9 {
		t.Fatal("convert into the export did not arrive")
	}
}
