package guest

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"perdure/internal/testenv"
)

func TestModuleOrder(t *testing.T) {
	dir := t.TempDir()
	dep := "kernel/a/one.ko: kernel/b/two-x.ko kernel/b/three.ko\nkernel/b/two-x.ko: kernel/b/three.ko\nkernel/b/three.ko:\nkernel/c/four.ko.xz: kernel/b/three.ko\n"
	if err := os.WriteFile(filepath.Join(dir, "modules.dep"), []byte(dep), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "modules.builtin"), []byte("kernel/fs/in-side.ko\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	m, err := readModules(dir)
	if err != nil {
		t.Fatal(err)
	}
	got, err := m.order([]string{"one", "in_side", "two_x", "absent?", "four"})
	want := []string{"kernel/b/three.ko", "kernel/b/two-x.ko", "kernel/a/one.ko", "kernel/c/four.ko.xz"}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("order: %v, %v", got, err)
	}
	if _, err := m.order([]string{"absent"}); err == nil || !strings.Contains(err.Error(), "absent") {
		t.Errorf("a missing module: %v", err)
	}
}

// TestCPIO lets the real cpio read what is written here.
func TestCPIO(t *testing.T) {
	cpio := testenv.Tool(t, "cpio")
	var b bytes.Buffer
	c := newCPIO(&b)
	c.file("a/b/c", 0o755, []byte("hello"))
	c.file("/a/b/d", 0o600, nil)
	c.symlink("a/l", "b/c")
	c.char("dev/console", 0o600, 5, 1)
	if err := c.close(); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(cpio, "-tv")
	cmd.Stdin = &b
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	var names []string
	for line := range strings.Lines(string(out)) {
		f := strings.Fields(line)
		if len(f) >= 9 {
			names = append(names, f[0]+" "+strings.Join(f[8:], " "))
		}
	}
	want := []string{"drwxr-xr-x a", "drwxr-xr-x a/b", "-rwxr-xr-x a/b/c", "-rw------- a/b/d", "lrwxrwxrwx a/l -> b/c", "drwxr-xr-x dev"}
	if len(names) != 7 || !slices.Equal(names[:6], want) || !strings.HasPrefix(names[6], "crw------- ") {
		t.Errorf("cpio lists %q", names)
	}
}

func TestAppend(t *testing.T) {
	if got := AppendFor("1.2.3.4/24", "5.6.7.8/16"); got != Append+" perdure.ip=1.2.3.4/24 perdure.ip1=5.6.7.8/16" {
		t.Error(got)
	}
}

func TestMissingProgram(t *testing.T) {
	_, err := Build(t.Context(), Options{Dir: t.TempDir(), Program: "/nonexistent", Cache: t.TempDir()})
	if err == nil || !strings.Contains(err.Error(), "make build") {
		t.Errorf("build without the guest's program: %v", err)
	}
}
