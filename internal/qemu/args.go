package qemu

import (
	"errors"
	"fmt"
	"net"
	"regexp"
	"strconv"
	"strings"

	"perdure/internal/model"
)

// PCI slots on the root bus. Slot 0 is the host bridge, 1 is taken on i440fx,
// 0x1f on q35.
const (
	slotGPU    = 0x02
	slotRNG    = 0x03
	slotSerial = 0x04
	slotNIC    = 0x08                // and the following MaxNICs-1
	slotDisk   = model.FirstDiskSlot // and the following MaxDisks-1
)

const (
	minMemory  = 16 << 20
	hugePage   = 2 << 20
	maxVCPUs   = 255 // more would need x2APIC and an IOMMU
	maxPath    = 107 // of a Unix socket
	maxIfname  = 15
	agentPort  = "org.qemu.guest_agent.0"
	nbdRetry   = 3600 // seconds that the guest waits for a shim to come back
	tcgCache   = 128  // MiB
	chardevGap = 250  // milliseconds between attempts to reach the shim
)

var (
	idRE      = regexp.MustCompile(`^[a-z][a-z0-9-]{0,14}$`)
	nameRE    = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)
	uuidRE    = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`)
	machineRE = regexp.MustCompile(`^pc-(q35|i440fx)-[0-9]+(\.[0-9]+)+$`)
	cpuRE     = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._,=+-]*$`)
)

// Args returns the command line without the program's name, or an error that
// says what in m is out of range. The guest's CPUs do not run before Cont.
func Args(m Machine) ([]string, error) {
	if err := m.validate(); err != nil {
		return nil, fmt.Errorf("build command line of %q: %w", m.Name, err)
	}
	a := &argList{bus: "pcie.0", virtio: "disable-modern=on,disable-legacy=off"}
	if m.ModernVirtio {
		a.virtio = "disable-modern=off,disable-legacy=on"
	}
	if strings.HasPrefix(m.Type, "pc-i440fx-") {
		a.bus = "pci.0"
	}
	a.base(m)
	a.memory(m)
	a.firmware(m)
	a.characters(m)
	a.add("-object", "rng-builtin,id=rng0")
	a.pci("virtio-rng-pci", slotRNG, "id=vrng0", "rng=rng0", a.virtio)
	// A guest that panics must be seen to have done so.
	a.add("-device", "pvpanic,id=panic0")
	a.display(m)
	for i, n := range m.NICs {
		a.nic(i, n)
	}
	for i, d := range m.Disks {
		if d.Slot == 0 {
			d.Slot = slotDisk + i
		}
		a.disk(d)
	}
	if m.Kernel != "" {
		a.add("-kernel", m.Kernel)
		if m.Initrd != "" {
			a.add("-initrd", m.Initrd)
		}
		if m.Append != "" {
			a.add("-append", m.Append)
		}
	}
	if m.Incoming {
		a.add("-incoming", "defer")
	}
	if m.Sandbox {
		a.add("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny")
	}
	return a.list, nil
}

func (m *Machine) validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if !nameRE.MatchString(m.Name) {
		bad("name %q is not 1 to 63 letters, digits, dots, dashes or underscores", m.Name)
	}
	if !uuidRE.MatchString(m.UUID) {
		bad("UUID %q is not in lower-case canonical form", m.UUID)
	}
	if !machineRE.MatchString(m.Type) {
		bad("machine type %q is not a versioned pc-q35 or pc-i440fx type", m.Type)
	}
	if m.Accel != KVM && m.Accel != TCG {
		bad("accelerator %q is neither kvm nor tcg", m.Accel)
	}
	if m.CPU != "" && !cpuRE.MatchString(m.CPU) {
		bad("CPU model %q has characters that no model has", m.CPU)
	}
	if m.VCPUs < 1 || m.VCPUs > maxVCPUs {
		bad("%d vCPUs: must be 1 to %d", m.VCPUs, maxVCPUs)
	}
	if m.Memory < minMemory || m.Memory%hugePage != 0 {
		bad("memory of %d bytes: must be at least 16 MiB and a multiple of 2 MiB", m.Memory)
	}
	if m.FT && m.Firmware != nil {
		bad("UEFI at Level 3 is not possible yet: the variable store would not be in the checkpoints")
	}
	if m.steady() && (m.TSCHz < 1e6 || m.TSCHz > 1e11) {
		bad("Level 3 with kvm needs a fixed TSC frequency; %d Hz is none", m.TSCHz)
	}
	if m.Kernel == "" && (m.Initrd != "" || m.Append != "") {
		bad("initrd and append need a kernel")
	}
	errs = append(errs, m.validatePaths()...)
	errs = append(errs, m.validateDevices()...)
	return errors.Join(errs...)
}

func (m *Machine) validatePaths() []error {
	var errs []error
	if m.QMPPath == "" {
		errs = append(errs, errors.New("no path for the QMP socket"))
	}
	sockets := map[string]string{"QMP": m.QMPPath, "serial": m.SerialPath, "agent": m.AgentPath, "VNC": m.VNCPath}
	for _, d := range m.Disks {
		sockets["disk "+d.ID] = d.Socket
	}
	for what, p := range sockets {
		if len(p) > maxPath {
			errs = append(errs, fmt.Errorf("%s socket path %q is longer than %d bytes", what, p, maxPath))
		}
	}
	return errs
}

func (m *Machine) validateDevices() []error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	seen := map[string]bool{}
	id := func(s string) {
		if !idRE.MatchString(s) {
			bad("device id %q is not a small letter and up to 14 small letters, digits or dashes", s)
		}
		if seen[s] {
			bad("device id %q is used twice", s)
		}
		seen[s] = true
	}
	if len(m.NICs) > MaxNICs {
		bad("%d NICs: at most %d", len(m.NICs), MaxNICs)
	}
	if len(m.Disks) > MaxDisks {
		bad("%d disks: at most %d", len(m.Disks), MaxDisks)
	}
	for _, n := range m.NICs {
		id(n.ID)
		if n.FD == 0 && n.Tap == "" || len(n.Tap) > maxIfname {
			bad("NIC %s: %q is not a device name of 1 to %d bytes", n.ID, n.Tap, maxIfname)
		}
		if hw, err := net.ParseMAC(n.MAC); err != nil || len(hw) != 6 || hw[0]&1 != 0 {
			bad("NIC %s: %q is not a unicast MAC address", n.ID, n.MAC)
		}
	}
	for _, d := range m.Disks {
		id(d.ID)
		if d.Socket == "" {
			bad("disk %s: no socket", d.ID)
		}
		if d.Slot != 0 && (d.Slot < slotDisk || d.Slot >= slotDisk+MaxDisks) {
			bad("disk %s: slot %#x is not one of %#x to %#x", d.ID, d.Slot, slotDisk, slotDisk+MaxDisks-1)
		}
	}
	return errs
}

// argList collects a command line.
type argList struct {
	list   []string
	bus    string
	virtio string // which kind of virtio devices
}

func (a *argList) add(s ...string) { a.list = append(a.list, s...) }

// opts adds an option whose value is a comma-separated list.
func (a *argList) opts(flag string, parts ...string) { a.add(flag, strings.Join(parts, ",")) }

// pci adds a device at a fixed slot.
func (a *argList) pci(device string, slot int, parts ...string) {
	p := append([]string{device}, parts...)
	a.opts("-device", append(p, "bus="+a.bus, fmt.Sprintf("addr=0x%x", slot))...)
}

// kv is one key=value of an option; a comma in the value is doubled, as
// QEMU's option parser wants it.
func kv(key, value string) string { return key + "=" + strings.ReplaceAll(value, ",", ",,") }

func (a *argList) base(m Machine) {
	a.opts("-name", kv("guest", m.Name), "debug-threads=on")
	a.add("-uuid", m.UUID, "-nodefaults", "-no-user-config", "-msg", "timestamp=on")
	// The guest's CPUs wait for Cont; a guest that powers off, panics or trips
	// its watchdog stays as it is until the shim has dealt with it.
	a.add("-S", "-no-shutdown", "-action", "panic=pause,watchdog=pause")
	a.add("-global", "migration.send-configuration=off")
	machine := []string{m.Type, "memory-backend=" + RAMBlockID, "vmport=off", "dump-guest-core=off", "mem-merge=off"}
	if m.steady() {
		// The HPET lags by the pauses, the TSC does not; a guest that compares
		// them would stop trusting the TSC.
		machine = append(machine, "hpet=off")
	}
	if m.VNCPath == "" {
		machine = append(machine, "graphics=off") // firmware and boot loader talk on the serial console
	}
	if m.Firmware != nil {
		machine = append(machine, "pflash0=fwcode", "pflash1=fwvars")
	}
	a.opts("-machine", machine...)
	if m.Accel == TCG {
		// With locked memory its whole cache of translated code is resident,
		// which would be 1 GiB by default, for each VM.
		a.add("-accel", fmt.Sprintf("tcg,tb-size=%d", tcgCache))
	} else {
		a.add("-accel", m.Accel)
	}
	a.add("-cpu", cpuModel(m))
	a.add("-smp", fmt.Sprintf("%d,sockets=1,cores=%d,threads=1,maxcpus=%d", m.VCPUs, m.VCPUs, m.VCPUs))
	a.add("-boot", "menu=off,strict=on")
	a.add("-qmp", "unix:"+strings.ReplaceAll(m.QMPPath, ",", ",,")+",server=on,wait=off")
}

// cpuModel adds the time rules of Level 3 to the CPU model.
func cpuModel(m Machine) string {
	cpu := m.CPU
	if cpu == "" {
		cpu = "max"
	}
	if m.steady() {
		// kvmclock is set back to where it stopped at each Cont: it would run
		// slow by the share of the pauses. The TSC runs through them.
		cpu += ",invtsc=on,tsc-adjust=on,kvmclock=off,kvmclock-stable-bit=off,tsc-frequency=" + strconv.FormatInt(m.TSCHz, 10)
	}
	return cpu
}

func (a *argList) memory(m Machine) {
	a.add("-m", fmt.Sprintf("size=%dk", m.Memory>>10))
	size := "size=" + strconv.FormatInt(m.Memory, 10)
	if m.MemPath == "" {
		opts := []string{"memory-backend-ram", "id=" + RAMBlockID, size}
		if m.Locked {
			a.add("-overcommit", "mem-lock=on")
			opts = append(opts, "prealloc=on")
		}
		a.opts("-object", opts...)
		return
	}
	if m.Private {
		a.opts("-object", "memory-backend-file", "id="+RAMBlockID, size, kv("mem-path", m.MemPath), "share=off", "prealloc=off")
		return
	}
	// Allocated and locked, or the next untouched page would be a SIGBUS for
	// the guest when the process that serves the file dies.
	a.add("-overcommit", "mem-lock=on")
	a.opts("-object", "memory-backend-file", "id="+RAMBlockID, size, kv("mem-path", m.MemPath), "share=on", "prealloc=on")
}

func (a *argList) firmware(m Machine) {
	if m.Firmware == nil {
		return
	}
	a.opts("-blockdev", "driver=file", "node-name=fwcode", kv("filename", m.Firmware.Code), "read-only=on")
	a.opts("-blockdev", "driver=file", "node-name=fwvars", kv("filename", m.Firmware.Vars))
}

// characters adds the serial console and the guest agent's port. QEMU is the
// one who connects, so that it finds a restarted shim again by itself.
func (a *argList) characters(m Machine) {
	retry := "reconnect=1"
	if m.QEMU.atLeast(9, 2) {
		retry = fmt.Sprintf("reconnect-ms=%d", chardevGap)
	}
	if m.SerialPath != "" {
		a.opts("-chardev", "socket", "id=serial0", kv("path", m.SerialPath), "server=off", retry)
		a.add("-device", "isa-serial,id=com1,chardev=serial0")
	}
	if m.AgentPath != "" {
		a.opts("-chardev", "socket", "id=agent0", kv("path", m.AgentPath), "server=off", retry)
		a.pci("virtio-serial-pci", slotSerial, "id=vser0", "max_ports=4", a.virtio)
		a.add("-device", "virtserialport,id=agentport0,bus=vser0.0,nr=1,chardev=agent0,name="+agentPort)
	}
}

func (a *argList) display(m Machine) {
	a.add("-display", "none")
	if m.VNCPath == "" {
		return
	}
	a.add("-vnc", "unix:"+strings.ReplaceAll(m.VNCPath, ",", ",,"))
	// Not a VGA: its memory would be a RAM block that no checkpoint holds.
	a.pci("virtio-gpu-pci", slotGPU, "id=gpu0", "max_outputs=1")
}

func (a *argList) nic(i int, n NIC) {
	// vhost would bypass the filters that hold output, and one queue is all
	// that they take.
	if n.FD != 0 {
		a.opts("-netdev", "tap", "id="+n.ID, "fd="+strconv.Itoa(n.FD), "vhost=off")
	} else {
		a.opts("-netdev", "tap", "id="+n.ID, kv("ifname", n.Tap), "script=no", "downscript=no", "vhost=off", "queues=1")
	}
	a.pci("virtio-net-pci", slotNIC+i, "id=dev-"+n.ID, "netdev="+n.ID, "mac="+n.MAC, "mq=off", "romfile=", a.virtio)
}

func (a *argList) disk(d Disk) {
	b := []string{"driver=nbd", "node-name=" + d.ID, "server.type=unix", kv("server.path", d.Socket), kv("export", d.Export),
		"reconnect-delay=" + strconv.Itoa(nbdRetry), "discard=unmap"}
	if d.ReadOnly {
		b = append(b, "read-only=on")
	}
	a.opts("-blockdev", b...)
	dev := []string{"id=dev-" + d.ID, "drive=" + d.ID, "serial=" + d.ID, "num-queues=1", "werror=stop", "rerror=stop", a.virtio}
	if d.BootIndex > 0 {
		dev = append(dev, "bootindex="+strconv.Itoa(d.BootIndex))
	}
	a.pci("virtio-blk-pci", d.Slot, dev...)
}
