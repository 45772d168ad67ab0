package api

import (
	"fmt"
	"net"
	"regexp"
	"strings"
	"time"

	"perdure/internal/model"
)

// Bounds of a new VM, checked before anything is made. What a host really has
// is checked by the host.
const (
	MiB         = int64(1) << 20
	MinMemory   = 16 * MiB
	MaxMemory   = int64(4) << 40
	MemoryGrain = 2 * MiB
	MaxVCPUs    = 64
	MinDisk     = MiB
	MaxDisk     = int64(64) << 40
	DiskGrain   = int64(4096)
	MaxDisks    = model.DiskSlots
	MaxNICs     = 8
	MaxName     = 40 // of a VM; bounds the length of Unix socket paths below the state directory
	MaxHostName = 63
	MaxAppend   = 2048 // the kernel's own limit on x86
	MaxTokenTTL = 30 * 24 * time.Hour
)

var (
	nameRE   = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]*[a-z0-9])?$`)
	bridgeRE = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9._-]{0,14}$`)
	cpuRE    = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.,+=-]{0,255}$`)
)

// CheckName says what is wrong with a name; what is "VM" or "host".
func CheckName(what, name string) error {
	limit := MaxName
	if what == "host" {
		limit = MaxHostName
	}
	switch {
	case name == "":
		return Errorf(Invalid, "%s name is empty", what)
	case len(name) > limit:
		return Errorf(Invalid, "%s name %q has %d characters; allowed are 1 to %d", what, name, len(name), limit)
	case !nameRE.MatchString(name):
		return Errorf(Invalid, "%s name %q is not allowed; allowed are a to z, 0 to 9 and -, beginning and ending with a letter or digit", what, name)
	}
	return nil
}

// Validate fills in defaults and checks everything that can be checked without
// a host. Errors name the thing, its value and what is allowed.
func (r *CreateVM) Validate() error {
	r.defaults()
	if err := CheckName("VM", r.Name); err != nil {
		return err
	}
	if r.Host != "" {
		if err := CheckName("host", r.Host); err != nil {
			return err
		}
	}
	if err := checkLevel(r.Level); err != nil {
		return err
	}
	if r.VCPUs < 1 || r.VCPUs > MaxVCPUs {
		return Errorf(Invalid, "vcpus %d is out of range; allowed are 1 to %d", r.VCPUs, MaxVCPUs)
	}
	if r.Memory < MinMemory || r.Memory > MaxMemory {
		return Errorf(Invalid, "memory %s is out of range; allowed are %s to %s", FormatSize(r.Memory), FormatSize(MinMemory), FormatSize(MaxMemory))
	}
	if r.Memory%MemoryGrain != 0 {
		return Errorf(Invalid, "memory %s (%d bytes) is not a multiple of 2MiB", FormatSize(r.Memory), r.Memory)
	}
	switch r.Virtio {
	case "":
		r.Virtio = model.VirtioLegacy
	case model.VirtioLegacy, model.VirtioModern:
	default:
		return Errorf(Invalid, "virtio %q is not known; allowed are legacy and modern", r.Virtio)
	}
	if r.CPU != "" && !cpuRE.MatchString(r.CPU) {
		return Errorf(Invalid, "cpu %q is no QEMU CPU model (name, then flags as ,+flag or ,-flag)", r.CPU)
	}
	if err := r.validateBoot(); err != nil {
		return err
	}
	if err := r.validateDisks(); err != nil {
		return err
	}
	if err := r.validateNICs(); err != nil {
		return err
	}
	return checkFT(r.FT)
}

func (r *CreateVM) defaults() {
	if r.Level == "" {
		r.Level = model.LevelNone
	}
	if r.VCPUs == 0 {
		r.VCPUs = 1
	}
	if r.Memory == 0 {
		r.Memory = 512 * MiB
	}
	d := model.DefaultFTPolicy()
	if r.FT.MaxOverheadPercent == 0 {
		r.FT.MaxOverheadPercent = d.MaxOverheadPercent
	}
	if r.FT.MinIntervalMS == 0 {
		r.FT.MinIntervalMS = d.MinIntervalMS
	}
	if r.FT.MaxIntervalMS == 0 {
		r.FT.MaxIntervalMS = d.MaxIntervalMS
	}
	if r.FT.DetectMS == 0 {
		r.FT.DetectMS = d.DetectMS
	}
}

func (r *CreateVM) validateBoot() error {
	if r.Kernel == nil && r.Initrd != nil {
		return Errorf(Invalid, "an initrd is given but no kernel; an initrd is only used with a kernel")
	}
	if r.Kernel == nil && r.Append != "" {
		return Errorf(Invalid, "a kernel command line is given but no kernel; it is only used with a kernel")
	}
	if len(r.Append) > MaxAppend {
		return Errorf(Invalid, "the kernel command line has %d bytes; allowed are %d", len(r.Append), MaxAppend)
	}
	if strings.ContainsAny(r.Append, "\x00\n\r") {
		return Errorf(Invalid, "the kernel command line has a line end or a zero byte in it")
	}
	if r.Kernel != nil && r.UEFI {
		return Errorf(Invalid, "a kernel booted directly and UEFI exclude each other; give one of both")
	}
	if r.Kernel != nil {
		if err := checkFile("kernel", r.Kernel); err != nil {
			return err
		}
	}
	if r.Initrd != nil {
		return checkFile("initrd", r.Initrd)
	}
	return nil
}

func (r *CreateVM) validateDisks() error {
	if len(r.Disks) > MaxDisks {
		return Errorf(Invalid, "%d disks are asked for; allowed are %d", len(r.Disks), MaxDisks)
	}
	for i, d := range r.Disks {
		what := fmt.Sprintf("disk %d", i)
		if d.Image != nil {
			if err := checkFile("image of "+what, d.Image); err != nil {
				return err
			}
		}
		if err := CheckPlaces(what, d.Paths); err != nil {
			return err
		}
		switch d.Format {
		case "", "raw", "qcow2", "vmdk":
		default:
			return Errorf(Invalid, "%s: image format %q is not known; allowed are raw, qcow2 and vmdk", what, d.Format)
		}
		if d.Size == 0 && d.Image != nil {
			continue
		}
		if d.Size < MinDisk || d.Size > MaxDisk {
			return Errorf(Invalid, "%s: size %s is out of range; allowed are %s to %s", what, FormatSize(d.Size), FormatSize(MinDisk), FormatSize(MaxDisk))
		}
		if d.Size%DiskGrain != 0 {
			return Errorf(Invalid, "%s: size %d is not a multiple of %d bytes", what, d.Size, DiskGrain)
		}
	}
	return nil
}

func (r *CreateVM) validateNICs() error {
	if len(r.NICs) > MaxNICs {
		return Errorf(Invalid, "%d network cards are asked for; allowed are %d", len(r.NICs), MaxNICs)
	}
	seen := map[string]int{}
	for i, n := range r.NICs {
		if !bridgeRE.MatchString(n.Bridge) {
			return Errorf(Invalid, "network card %d: bridge %q is no name of a network interface (1 to 15 letters, digits, '-', '_' and '.')", i, n.Bridge)
		}
		if n.MAC == "" {
			continue
		}
		hw, err := net.ParseMAC(n.MAC)
		if err != nil || len(hw) != 6 {
			return Errorf(Invalid, "network card %d: mac %q is no hardware address such as 52:54:00:12:34:56", i, n.MAC)
		}
		if hw[0]&1 != 0 {
			return Errorf(Invalid, "network card %d: mac %q is a group address; the first byte must be even", i, n.MAC)
		}
		if j, dup := seen[hw.String()]; dup {
			return Errorf(Invalid, "network card %d: mac %q is that of network card %d too", i, n.MAC, j)
		}
		seen[hw.String()] = i
	}
	return nil
}

func checkFile(what string, f *File) error {
	switch {
	case f.Path == "" && f.Upload == "":
		return Errorf(Invalid, "%s: neither a path nor an upload is given", what)
	case f.Path != "" && f.Upload != "":
		return Errorf(Invalid, "%s: both a path and an upload are given", what)
	case f.Path != "" && !strings.HasPrefix(f.Path, "/"):
		return Errorf(Invalid, "%s: path %q is not absolute", what, f.Path)
	}
	return nil
}

func checkFT(p model.FTPolicy) error {
	for _, c := range []struct {
		what     string
		v        int
		min, max int
	}{
		{"ft max_overhead_percent", p.MaxOverheadPercent, 1, 90},
		{"ft min_interval_ms", p.MinIntervalMS, 1, 1000},
		{"ft max_interval_ms", p.MaxIntervalMS, 10, 5000},
		{"ft detect_ms", p.DetectMS, 50, 60000},
	} {
		if c.v < c.min || c.v > c.max {
			return Errorf(Invalid, "%s %d is out of range; allowed are %d to %d", c.what, c.v, c.min, c.max)
		}
	}
	if p.MinIntervalMS > p.MaxIntervalMS {
		return Errorf(Invalid, "ft min_interval_ms %d is above max_interval_ms %d", p.MinIntervalMS, p.MaxIntervalMS)
	}
	return nil
}

// UsesPaths reports whether the request names files by path, which only a
// caller on the host itself may do.
func (r *CreateVM) UsesPaths() bool {
	for _, f := range r.files() {
		if f.Path != "" {
			return true
		}
	}
	return false
}

// requestFile is a file of a request and what it is for.
type requestFile struct {
	*File
	what string
}

// files returns every file of the request, for changing them in place.
func (r *CreateVM) files() []requestFile {
	var fs []requestFile
	if r.Kernel != nil {
		fs = append(fs, requestFile{r.Kernel, "kernel"})
	}
	if r.Initrd != nil {
		fs = append(fs, requestFile{r.Initrd, "initrd"})
	}
	for i := range r.Disks {
		if r.Disks[i].Image != nil {
			fs = append(fs, requestFile{r.Disks[i].Image, fmt.Sprintf("image of disk %d", i)})
		}
	}
	return fs
}

// Validate fills in defaults and checks the request.
func (r *CreateToken) Validate() error {
	if r.Role == "" {
		r.Role = RoleHost
	}
	if r.Role != RoleHost && r.Role != RoleWitness {
		return Errorf(Invalid, "role %q is not known; allowed are host and witness", r.Role)
	}
	if r.TTLMS == 0 {
		r.TTLMS = time.Hour.Milliseconds()
	}
	if ttl := time.Duration(r.TTLMS) * time.Millisecond; r.TTLMS < 1000 || r.TTLMS > MaxTokenTTL.Milliseconds() {
		return Errorf(Invalid, "token lifetime %s is out of range; allowed are 1s to %s", ttl, MaxTokenTTL)
	}
	return nil
}

// Validate checks the request.
func (r SetLevel) Validate() error {
	if r.Cancel {
		if r.Level != "" {
			return Errorf(Invalid, "level %q and cancel exclude each other", r.Level)
		}
		return nil
	}
	return checkLevel(r.Level)
}

func checkLevel(l model.Level) error {
	switch l {
	case model.LevelNone, model.LevelCA, model.LevelFT:
		return nil
	case model.LevelHA:
		return Errorf(Invalid, "level %q is not available in this release; allowed are none, ca and ft", l)
	}
	return Errorf(Invalid, "level %q is not known; allowed are none, ca and ft", l)
}
