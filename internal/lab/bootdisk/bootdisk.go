// Package bootdisk makes raw disk images that boot by themselves, under BIOS
// and under UEFI, as users' images do: a partition table, GRUB in front of the
// first partition, and an EFI system partition with GRUB in it. It needs
// neither root nor loop devices nor mounts, so nothing is left behind.
//
// Write makes a small disk that starts a given kernel and initrd; Install makes
// an image that already holds partitions bootable. Both run the distribution's
// tools (grub-mkimage, mkfs.fat, mtools) as processes and may run in several
// goroutines, on different images. A failure leaves an image that is worth nothing;
// the caller removes it. Secure Boot is not supported: nothing is signed.
package bootdisk

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
)

// Sector is the unit of partition tables, bytes.
const Sector = 512

// Types of partitions.
const (
	TypeLinux = 0x83
	TypeESP   = 0xef
)

// ESPSize is enough for an EFI system partition that holds only GRUB, bytes.
const ESPSize = 3 << 20

// FirstPartition is where the first partition may begin, bytes: what lies
// before it is GRUB's.
const FirstPartition = 1 << 20

// grubDir holds GRUB's parts, by platform.
const grubDir = "/usr/lib/grub"

// modules are built into GRUB, so that it reads none from the disk.
var modules = []string{"part_msdos", "part_gpt", "fat", "ext2", "normal", "configfile", "linux", "echo", "search", "search_fs_uuid", "test", "serial", "terminal"}

// Partition is one entry of a partition table. Offset and Size are in bytes,
// whole sectors.
type Partition struct {
	Type   byte
	Offset int64
	Size   int64
}

// WriteTable writes a DOS partition table of up to four entries; the first is
// the active one.
func WriteTable(f *os.File, parts ...Partition) error {
	if len(parts) > 4 {
		return fmt.Errorf("write partition table: %d partitions, it has room for 4", len(parts))
	}
	table := make([]byte, 4*16+2)
	for i, p := range parts {
		first, count := p.Offset/Sector, p.Size/Sector
		if p.Offset < FirstPartition || p.Offset%Sector != 0 || p.Size <= 0 || p.Size%Sector != 0 || first+count > 1<<32 {
			return fmt.Errorf("write partition table: partition %d lies at %d with %d bytes; allowed are whole sectors from %d on, below 2 TiB", i+1, p.Offset, p.Size, FirstPartition)
		}
		e := table[i*16:]
		if i == 0 {
			e[0] = 0x80
		}
		copy(e[1:4], []byte{0xfe, 0xff, 0xff}) // cylinders mean nothing any more: "use the sector numbers"
		e[4] = p.Type
		copy(e[5:8], []byte{0xfe, 0xff, 0xff})
		binary.LittleEndian.PutUint32(e[8:], uint32(first))
		binary.LittleEndian.PutUint32(e[12:], uint32(count))
	}
	table[64], table[65] = 0x55, 0xaa
	if _, err := f.WriteAt(table, 446); err != nil {
		return fmt.Errorf("write partition table: %w", err)
	}
	return nil
}

// Install makes an image bootable under BIOS and UEFI. Its partition table must
// be there; root is the partition, from 1, that holds /boot/grub/grub.cfg, esp
// the one that becomes the EFI system partition, whatever was in it.
func Install(ctx context.Context, image string, root int, esp Partition) error {
	if err := installBIOS(ctx, image, root); err != nil {
		return err
	}
	if err := makeFAT(ctx, image, esp); err != nil {
		return err
	}
	return installEFI(ctx, image, root, esp)
}

// grubImage makes GRUB for one platform, looking for its configuration on a
// partition of the first disk.
func grubImage(ctx context.Context, platform string, root int, extra ...string) ([]byte, error) {
	dir := filepath.Join(grubDir, platform)
	if _, err := os.Stat(filepath.Join(dir, "normal.mod")); err != nil {
		return nil, fmt.Errorf("find GRUB for %s: %w (Debian: grub-pc-bin, grub-efi-amd64-bin)", platform, err)
	}
	tmp, err := os.MkdirTemp("", "grub-")
	if err != nil {
		return nil, fmt.Errorf("make GRUB: %w", err)
	}
	defer os.RemoveAll(tmp)
	out := filepath.Join(tmp, "core")
	args := []string{"-O", platform, "-d", dir, "-o", out, "-p", fmt.Sprintf("(hd0,msdos%d)/boot/grub", root)}
	if err := run(ctx, nil, "grub-mkimage", append(append(args, modules...), extra...)...); err != nil {
		return nil, err
	}
	b, err := os.ReadFile(out)
	if err != nil {
		return nil, fmt.Errorf("make GRUB: %w", err)
	}
	return b, nil
}

// installBIOS puts GRUB between partition table and first partition: its first
// sector looks for the rest in the sectors after it.
func installBIOS(ctx context.Context, image string, root int) error {
	core, err := grubImage(ctx, "i386-pc", root, "biosdisk")
	if err != nil {
		return err
	}
	if len(core) > FirstPartition-Sector {
		return fmt.Errorf("install GRUB: it has %d bytes, %d fit before the first partition", len(core), FirstPartition-Sector)
	}
	boot, err := os.ReadFile(filepath.Join(grubDir, "i386-pc", "boot.img"))
	if err != nil {
		return fmt.Errorf("install GRUB: %w", err)
	}
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("install GRUB: %w", err)
	}
	_, err = f.WriteAt(boot[:min(len(boot), 440)], 0)
	_, err2 := f.WriteAt(core, Sector)
	if err := errors.Join(err, err2, f.Close()); err != nil {
		return fmt.Errorf("install GRUB: %w", err)
	}
	return nil
}

// makeFAT makes a file system of the kind that every firmware reads. Left to
// itself mkfs.fat goes by the size of the image, not of the partition.
func makeFAT(ctx context.Context, image string, p Partition) error {
	cluster := int64(1) // sectors; FAT16 has fewer than 65,525 of them
	for p.Size/Sector/cluster > 65_000 {
		cluster *= 2
	}
	return run(ctx, nil, tool("mkfs.fat"), "-F", "16", "-s", strconv.FormatInt(cluster, 10), "--offset", strconv.FormatInt(p.Offset/Sector, 10),
		"-n", "BOOT", "-i", "50455244", "--invariant", image, strconv.FormatInt(p.Size>>10, 10))
}

// installEFI puts GRUB where UEFI looks on a disk that it knows nothing about.
func installEFI(ctx context.Context, image string, root int, p Partition) error {
	core, err := grubImage(ctx, "x86_64-efi", root, "efi_gop")
	if err != nil {
		return err
	}
	return copyIn(ctx, image, p, map[string][]byte{"EFI/BOOT/BOOTX64.EFI": core})
}

// copyIn writes files into a FAT partition, with the directories they need.
func copyIn(ctx context.Context, image string, p Partition, files map[string][]byte) error {
	at := fmt.Sprintf("%s@@%d", image, p.Offset)
	made := map[string]bool{}
	for name, b := range files {
		parts := strings.Split(name, "/")
		for i := 1; i < len(parts); i++ {
			dir := strings.Join(parts[:i], "/")
			if made[dir] {
				continue
			}
			made[dir] = true
			if err := run(ctx, nil, "mmd", "-i", at, "::"+dir); err != nil {
				return err
			}
		}
		if err := run(ctx, b, "mcopy", "-i", at, "-", "::"+name); err != nil {
			return err
		}
	}
	return nil
}

// Files are what Write puts on a disk.
type Files struct {
	Kernel string // path
	Initrd string // path
	Append string // kernel command line
}

// Write makes a disk at path that starts a kernel under BIOS and UEFI, with
// GRUB's messages and the kernel's on the first serial line.
func Write(ctx context.Context, path string, files Files) error {
	kernel, err := os.ReadFile(files.Kernel)
	if err != nil {
		return fmt.Errorf("make boot disk: %w", err)
	}
	initrd, err := os.ReadFile(files.Initrd)
	if err != nil {
		return fmt.Errorf("make boot disk: %w", err)
	}
	size := (int64(len(kernel)+len(initrd)) + 8<<20 + 1<<20 - 1) &^ (1<<20 - 1)
	part := Partition{TypeESP, FirstPartition, size}
	f, err := os.Create(path)
	if err != nil {
		return fmt.Errorf("make boot disk: %w", err)
	}
	err = f.Truncate(FirstPartition + size)
	if err = errors.Join(err, WriteTable(f, part), f.Close()); err != nil {
		return fmt.Errorf("make boot disk: %w", err)
	}
	if err := Install(ctx, path, 1, part); err != nil {
		return err
	}
	return copyIn(ctx, path, part, map[string][]byte{
		"vmlinuz": kernel, "initrd.img": initrd, "boot/grub/grub.cfg": []byte(Config("/vmlinuz", "/initrd.img", files.Append)),
	})
}

// Config is a GRUB configuration that starts one kernel at once. The root is
// the partition that GRUB read it from.
func Config(kernel, initrd, cmdline string) string {
	return fmt.Sprintf(`serial --unit=0 --speed=115200
terminal_input serial
terminal_output serial
echo "GRUB starts %[1]s"
linux %[1]s %[3]s
initrd %[2]s
boot
`, kernel, initrd, cmdline)
}

// tool finds a program that may lie where a user's PATH does not lead.
func tool(name string) string {
	if p, err := exec.LookPath(name); err == nil {
		return p
	}
	return filepath.Join("/usr/sbin", name)
}

func run(ctx context.Context, stdin []byte, name string, args ...string) error {
	c := exec.CommandContext(ctx, name, args...)
	c.Env = append(os.Environ(), "MTOOLS_SKIP_CHECK=1", "LC_ALL=C")
	if stdin != nil {
		c.Stdin = bytes.NewReader(stdin)
	}
	out, err := c.CombinedOutput()
	switch {
	case errors.Is(err, exec.ErrNotFound) || errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("the program %s is missing (Debian: grub-common, dosfstools, mtools)", filepath.Base(name))
	case err != nil:
		return fmt.Errorf("run %s: %w: %s", filepath.Base(name), err, strings.TrimSpace(string(out)))
	}
	return nil
}
