package qemu

import (
	"strconv"
	"strings"

	"perdure/internal/model"
)

// Version is a version of QEMU.
type Version struct{ Major, Minor, Micro int }

// atLeast reports whether v is major.minor or newer.
func (v Version) atLeast(major, minor int) bool {
	return v.Major > major || v.Major == major && v.Minor >= minor
}

// The accelerators that Machine.Accel takes.
const (
	KVM = "kvm"
	TCG = "tcg"
)

// Limits of a Machine. They follow from the fixed PCI slots: a device keeps
// its slot whatever else the machine has, so that two hosts always agree.
const (
	MaxNICs  = 8
	MaxDisks = model.DiskSlots
)

// RAMBlockID is the name of the block that holds the guest's memory, also
// where that memory is not a file, so that state can move between both kinds.
const RAMBlockID = "ram0"

// Machine describes one QEMU process. What a guest can see of it is the same
// on both hosts when everything but the paths is the same.
type Machine struct {
	Name   string
	UUID   string
	Type   string // versioned machine type, e.g. "pc-q35-7.2"
	Accel  string // KVM or TCG
	CPU    string // CPU model with flags; empty means "max"
	VCPUs  int
	Memory int64 // bytes, a multiple of 2 MiB

	// FT asks for the rules of Level 3: a clock that pauses do not slow,
	// nothing that a checkpoint would miss. TSCHz is the guest's fixed TSC
	// frequency, needed for FT with KVM.
	FT    bool
	TSCHz int64

	// SteadyTime asks for the clock of Level 3 alone, so that a guest sees the
	// same machine at every level.
	SteadyTime bool

	// MemPath is the file that holds the guest's RAM, mapped shared, allocated
	// and locked at the start. Empty means anonymous memory.
	MemPath string

	// Locked allocates and locks anonymous memory at the start, so that a guest
	// that waits for its boot cannot lack it then.
	Locked bool

	// Private maps MemPath copy-on-write instead: a scratch QEMU that tries a
	// state without touching what the file holds.
	Private bool

	Disks []Disk
	NICs  []NIC

	QMPPath    string // Unix socket on which QEMU listens for one client
	SerialPath string // Unix socket on which the shim listens for the serial console; empty: none
	AgentPath  string // the same for the guest agent's port; empty: none
	VNCPath    string // Unix socket on which QEMU offers VNC, with a virtio-gpu; empty: no display

	Kernel string
	Initrd string
	Append string

	Firmware *Firmware // UEFI; nil means SeaBIOS. Refused with FT.

	// ModernVirtio gives the guest virtio 1.0 devices. Without it they are of
	// the older kind, which nearly all guests drive too: QEMU saves some 45 KB of
	// state for each modern device and takes half a millisecond for it, at each
	// checkpoint, and next to nothing for the others. It is what a guest sees, so it
	// must not change with the level.
	ModernVirtio bool

	Incoming bool    // wait for LoadDevices instead of starting at the reset vector
	Sandbox  bool    // QEMU's seccomp filter
	QEMU     Version // of the binary, for options that changed; zero means the oldest supported, 7.2
}

// steady reports whether the guest's clock has to be the TSC at a fixed frequency.
func (m *Machine) steady() bool { return (m.FT || m.SteadyTime) && m.Accel == KVM }

// Disk is an NBD export on a Unix socket. QEMU connects to it when it starts.
type Disk struct {
	ID        string // "disk0"; also the node's name and the serial number that the guest sees
	Socket    string
	Export    string
	BootIndex int // position in the boot order from 1; 0: not bootable
	ReadOnly  bool
	Slot      int // PCI slot on the root bus; 0: that of its place in the list
}

// NIC is a virtio-net card on a tap device.
type NIC struct {
	ID  string // "net0"; the netdev's id, as in netbuf.Divert and SetLink
	Tap string // name of the tap device, which QEMU opens
	FD  int    // or, if not 0: the inherited descriptor of an open tap
	MAC string
}

// Firmware names the two halves of a UEFI firmware.
type Firmware struct {
	Code string // read-only image
	Vars string // this VM's variables, raw, writable
}

// ParseVersion reads a version such as "7.2.22"; what is missing or no number is 0.
func ParseVersion(s string) Version {
	var v Version
	p := strings.SplitN(s, ".", 3)
	for i, n := range []*int{&v.Major, &v.Minor, &v.Micro} {
		if i < len(p) {
			*n, _ = strconv.Atoi(p[i])
		}
	}
	return v
}

// FromSpec fills in what a VM's specification decides. The caller adds paths,
// taps, Incoming, Sandbox and QEMU. Disks boot in the order
// of the specification and export under their own names.
func FromSpec(s model.VMSpec) Machine {
	m := Machine{
		Name: s.Name, UUID: s.UUID, Type: s.Machine, Accel: s.Accel, CPU: s.CPU,
		VCPUs: s.VCPUs, Memory: s.Memory, FT: s.Level == model.LevelFT, Locked: s.Level == model.LevelCA, TSCHz: s.TSCHz, SteadyTime: s.SteadyTime, Append: s.Append,
		ModernVirtio: s.Virtio == model.VirtioModern,
	}
	for i, d := range s.Disks {
		// The place in the boot order goes with the slot: two disks never have the
		// same one, whatever was added and taken away.
		slot := model.SlotOf(s.Disks, i)
		m.Disks = append(m.Disks, Disk{ID: d.ID, Export: d.ID, BootIndex: slot - slotDisk + 1, Slot: slot})
	}
	for _, n := range s.NICs {
		m.NICs = append(m.NICs, NIC{ID: n.ID, MAC: n.MAC})
	}
	return m
}
