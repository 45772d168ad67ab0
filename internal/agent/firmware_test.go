package agent

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"perdure/internal/model"
)

func TestFindFirmware(t *testing.T) {
	root := t.TempDir()
	put := func(name string, size int) {
		t.Helper()
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, make([]byte, size), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := findFirmware(root, 0); err == nil || !strings.Contains(err.Error(), "package ovmf") {
		t.Errorf("none installed: %v", err)
	}
	put("usr/share/OVMF/OVMF_CODE_4M.fd", 10) // without its variables it is none
	put("usr/share/OVMF/OVMF_CODE.fd", 10)
	put("usr/share/OVMF/OVMF_VARS.fd", 2)
	if f, err := findFirmware(root, 0); err != nil || f.vars != filepath.Join(root, "usr/share/OVMF/OVMF_VARS.fd") {
		t.Errorf("%+v, %v", f, err)
	}
	put("usr/share/OVMF/OVMF_VARS_4M.fd", 4)
	for size, want := range map[int64]string{0: "OVMF_CODE_4M.fd", 4: "OVMF_CODE_4M.fd", 2: "OVMF_CODE.fd"} {
		if f, err := findFirmware(root, size); err != nil || filepath.Base(f.code) != want {
			t.Errorf("variables of %d bytes: %+v, %v; want %s", size, f, err, want)
		}
	}
	if _, err := findFirmware(root, 3); err == nil || !strings.Contains(err.Error(), "3 bytes") {
		t.Errorf("variables of no kind: %v", err)
	}
}

func TestUEFIRefused(t *testing.T) {
	for level, refused := range map[model.Level]bool{model.LevelNone: false, model.LevelHA: true, model.LevelCA: true, model.LevelFT: true} {
		if err := uefiRefused(level); (err != nil) != refused {
			t.Errorf("level %s: %v", level, err)
		}
	}
}
