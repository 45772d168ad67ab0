package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"perdure/api"
	"perdure/internal/model"
	"perdure/internal/shimapi"
)

// firmware is a UEFI firmware as a distribution ships it: code that every guest
// uses, and empty variables that each guest gets a copy of.
type firmware struct{ code, vars string }

// firmwares are where distributions keep OVMF, the larger kind first. Those
// with Secure Boot are left out: they need system management mode and enrolled keys.
func firmwares() []firmware {
	return []firmware{
		{"usr/share/OVMF/OVMF_CODE_4M.fd", "usr/share/OVMF/OVMF_VARS_4M.fd"}, // Debian, Ubuntu
		{"usr/share/OVMF/OVMF_CODE.fd", "usr/share/OVMF/OVMF_VARS.fd"},
		{"usr/share/edk2/x64/OVMF_CODE.4m.fd", "usr/share/edk2/x64/OVMF_VARS.4m.fd"}, // Arch
		{"usr/share/edk2/ovmf/OVMF_CODE.fd", "usr/share/edk2/ovmf/OVMF_VARS.fd"},     // Fedora
		{"usr/share/qemu/ovmf-x86_64-4m-code.bin", "usr/share/qemu/ovmf-x86_64-4m-vars.bin"},
		{"usr/share/qemu/ovmf-x86_64-code.bin", "usr/share/qemu/ovmf-x86_64-vars.bin"}, // openSUSE
	}
}

// findFirmware returns the first firmware below root that is there. A guest that
// has variables (size of its file, 0: none yet) keeps the kind that they are of.
func findFirmware(root string, size int64) (firmware, error) {
	found := false
	for _, f := range firmwares() {
		f = firmware{filepath.Join(root, f.code), filepath.Join(root, f.vars)}
		code, err := os.Stat(f.code)
		if err != nil || !code.Mode().IsRegular() {
			continue
		}
		vars, err := os.Stat(f.vars)
		if err != nil || !vars.Mode().IsRegular() {
			continue
		}
		found = true
		if size == 0 || vars.Size() == size {
			return f, nil
		}
	}
	if found {
		return firmware{}, fmt.Errorf("find UEFI firmware: none here has variables of %d bytes, as this VM has", size)
	}
	return firmware{}, errors.New("find UEFI firmware: OVMF is not installed (package ovmf on Debian and Ubuntu, edk2-ovmf on Fedora and Arch)")
}

// uefiRefused says why a level cannot have UEFI, or returns nil. What a guest writes
// into its variables lies in flash memory of this host only: no checkpoint and
// no replica holds it.
func uefiRefused(level model.Level) error {
	switch level {
	case model.LevelNone:
		return nil
	case model.LevelFT:
		return errors.New("the variable store would not be part of the checkpoints, so a takeover could meet other variables than the guest had written")
	default:
		return errors.New("the variable store would not be on the other host, so a restart there could meet other variables than the guest had written")
	}
}

// checkUEFI refuses a VM with UEFI that could not be started here.
func (a *Agent) checkUEFI(req api.CreateVM) error {
	if !req.UEFI {
		return nil
	}
	if err := uefiRefused(req.Level); err != nil {
		return api.Errorf(api.Refused, "UEFI for VM %q of level %s is refused: %w", req.Name, req.Level, err).
			WithAction("create it with --level none, or without --uefi")
	}
	if _, err := findFirmware("/", 0); err != nil {
		return api.Errorf(api.Refused, "UEFI for VM %q is refused: %w on host %s", req.Name, err, a.cfg.Name).
			WithAction("install the package, or create the VM without --uefi")
	}
	return nil
}

// setFirmware names the firmware of a VM to its shim.
func (a *Agent) setFirmware(spec model.VMSpec, sc *shimapi.Config) error {
	if !spec.UEFI {
		return nil
	}
	if err := uefiRefused(spec.Level); err != nil {
		return fmt.Errorf("UEFI at level %s: %w", spec.Level, err)
	}
	var size int64
	st, err := os.Stat(a.vmFile(spec.Name, shimapi.NVRAMFile))
	switch {
	case err == nil:
		size = st.Size()
	case !errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("look for UEFI variables: %w", err)
	}
	f, err := findFirmware("/", size)
	if err != nil {
		return err
	}
	sc.FirmwareCode, sc.FirmwareVars = f.code, f.vars
	return nil
}
