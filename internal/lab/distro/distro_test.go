package distro

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestChooseMirror(t *testing.T) {
	for name, c := range map[string]struct{ targets, want string }{
		"the suite":       {"bookworm-updates http://m/debian/\nbookworm-security http://s/\ntrixie http://t/debian/\nbookworm http://m/debian/\n", "http://m/debian/"},
		"another release": {"trixie-security http://s/\ntrixie http://t/debian/\n", "http://t/debian/"},
		"security only":   {"bookworm-security http://s/\n", ""},
		"nothing":         {"", ""},
	} {
		if got := chooseMirror(c.targets); got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

func TestDigest(t *testing.T) {
	a := digest("10.0.0.1/24")
	if a != digest("10.0.0.1/24") || a == digest("10.0.0.2/24") || len(a) != 16 {
		t.Errorf("digests: %s, %s, %s", a, digest("10.0.0.1/24"), digest("10.0.0.2/24"))
	}
}

func TestWriteTree(t *testing.T) {
	root := t.TempDir()
	files := map[string]string{"etc/a/b": "x\n", "etc/masked.timer": ""}
	for range 2 { // over what is there
		if err := writeTree(root, files); err != nil {
			t.Fatal(err)
		}
	}
	if b, err := os.ReadFile(filepath.Join(root, "etc/a/b")); err != nil || string(b) != "x\n" {
		t.Errorf("file: %q, %v", b, err)
	}
	if l, err := os.Readlink(filepath.Join(root, "etc/masked.timer")); err != nil || l != "/dev/null" {
		t.Errorf("mask: %q, %v", l, err)
	}
}

func TestBadAddress(t *testing.T) {
	_, err := Build(t.Context(), Options{Address: "10.0.0.300/24", Cache: t.TempDir()})
	if err == nil || !strings.Contains(err.Error(), "10.0.0.300/24") {
		t.Errorf("error: %v", err)
	}
}

func TestTail(t *testing.T) {
	if got := tail([]byte("a\nb\nc\n"), 2); got != "b\nc" {
		t.Errorf("%q", got)
	}
}
