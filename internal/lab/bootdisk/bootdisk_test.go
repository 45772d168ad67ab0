package bootdisk

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"perdure/internal/testenv"
)

func TestTable(t *testing.T) {
	name := filepath.Join(t.TempDir(), "disk")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(64 << 20); err != nil {
		t.Fatal(err)
	}
	if err := WriteTable(f, Partition{TypeLinux, 4 << 20, 60 << 20}, Partition{TypeESP, FirstPartition, ESPSize}); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 512)
	if _, err := f.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	want := []byte{0x80, 0xfe, 0xff, 0xff, 0x83, 0xfe, 0xff, 0xff, 0x00, 0x20, 0, 0, 0x00, 0xe0, 1, 0,
		0x00, 0xfe, 0xff, 0xff, 0xef, 0xfe, 0xff, 0xff, 0x00, 0x08, 0, 0, 0x00, 0x18, 0, 0}
	if !bytes.Equal(b[446:478], want) || b[510] != 0x55 || b[511] != 0xaa {
		t.Errorf("partition table is % x, signature % x", b[446:478], b[510:])
	}
	for what, p := range map[string]Partition{"over GRUB": {TypeLinux, 512, 512}, "half a sector": {TypeLinux, 1 << 20, 100}, "beyond 2 TiB": {TypeLinux, 1 << 20, 2 << 40}, "empty": {TypeLinux, 1 << 20, 0}} {
		if err := WriteTable(f, p); err == nil {
			t.Errorf("%s: no error", what)
		}
	}
	if err := WriteTable(f, make([]Partition, 5)...); err == nil {
		t.Error("five partitions: no error")
	}
}

// TestWrite looks into the disk with the tools of others.
func TestWrite(t *testing.T) {
	testenv.Tool(t, "grub-mkimage")
	testenv.Tool(t, "mcopy")
	dir := t.TempDir()
	kernel, initrd := filepath.Join(dir, "k"), filepath.Join(dir, "i")
	for name, n := range map[string]int{kernel: 3 << 20, initrd: 5<<20 + 17} {
		if err := os.WriteFile(name, bytes.Repeat([]byte{byte(n)}, n), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	disk := filepath.Join(dir, "disk.img")
	if err := Write(t.Context(), disk, Files{Kernel: kernel, Initrd: initrd, Append: "console=ttyS0 x=y"}); err != nil {
		t.Fatal(err)
	}
	get := func(name string) string {
		out, err := exec.Command("mtype", "-i", disk+"@@1M", "::"+name).Output()
		if err != nil {
			t.Errorf("read %s: %v", name, err)
		}
		return string(out)
	}
	if cfg := get("boot/grub/grub.cfg"); !strings.Contains(cfg, "linux /vmlinuz console=ttyS0 x=y\ninitrd /initrd.img\n") {
		t.Errorf("grub.cfg:\n%s", cfg)
	}
	if b := get("vmlinuz"); len(b) != 3<<20 {
		t.Errorf("the kernel has %d bytes", len(b))
	}
	if b := get("initrd.img"); len(b) != 5<<20+17 {
		t.Errorf("the initrd has %d bytes", len(b))
	}
	if b := get("EFI/BOOT/BOOTX64.EFI"); !strings.HasPrefix(b, "MZ") {
		t.Error("no EFI program where UEFI looks for one")
	}
}

func TestMissingKernel(t *testing.T) {
	if err := Write(t.Context(), filepath.Join(t.TempDir(), "d"), Files{Kernel: "/nonexistent", Initrd: "/nonexistent"}); err == nil {
		t.Error("no error")
	}
}

// TestInstall makes a small EFI system partition on a large disk.
func TestInstall(t *testing.T) {
	testenv.Tool(t, "grub-mkimage")
	testenv.Tool(t, "mcopy")
	disk := filepath.Join(t.TempDir(), "disk.img")
	f, err := os.Create(disk)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	esp := Partition{TypeESP, FirstPartition, ESPSize}
	if err := f.Truncate(3 << 30); err != nil {
		t.Fatal(err)
	}
	if err := WriteTable(f, Partition{TypeLinux, 4 << 20, 1 << 30}, esp); err != nil {
		t.Fatal(err)
	}
	if err := Install(t.Context(), disk, 1, esp); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("mtype", "-i", disk+"@@1M", "::EFI/BOOT/BOOTX64.EFI").Output()
	if err != nil || !bytes.HasPrefix(out, []byte("MZ")) {
		t.Errorf("no EFI program: %v", err)
	}
	b := make([]byte, 1024)
	if _, err := f.ReadAt(b, 0); err != nil || bytes.Equal(b[:440], make([]byte, 440)) || b[510] != 0x55 || bytes.Equal(b[512:], make([]byte, 512)) {
		t.Errorf("no GRUB for BIOS, or no table: %v", err)
	}
}
