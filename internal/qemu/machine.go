package qemu

import "perdure/internal/model"

// Version is a version of QEMU.
type Version struct{ Major, Minor, Micro int }

// Machine describes one QEMU process. What a guest can see of it is the same
// on both hosts when everything but the paths is the same.
type Machine struct {
	Name   string
	UUID   string
	Type   string // versioned machine type, e.g. "pc-q35-7.2"
	Accel  string // "kvm" or "tcg"
	CPU    string // CPU model with flags; empty means "max"
	VCPUs  int
	Memory int64 // bytes, a multiple of 2 MiB

	// FT asks for the rules of Level 3: a clock that pauses do not slow,
	// nothing that a checkpoint would miss. TSCHz is the guest's fixed TSC
	// frequency, needed for FT with kvm.
	FT    bool
	TSCHz int64

	// MemPath is the file that holds the guest's RAM, mapped shared, allocated
	// and locked at the start. Empty means anonymous memory. The RAM block is
	// called ram0 in both cases.
	MemPath string

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

	Incoming bool    // wait for LoadDevices instead of starting at the reset vector
	Sandbox  bool    // QEMU's seccomp filter
	QEMU     Version // of the binary, for options that changed; zero means the oldest supported, 7.2
}

// Disk is an NBD export on a Unix socket.
type Disk struct {
	ID        string // "disk0"; also the node name and the serial number
	Socket    string
	Export    string
	BootIndex int // position in the boot order from 1; 0: not bootable
	ReadOnly  bool
}

// NIC is a virtio-net card on a tap device.
type NIC struct {
	ID  string // "net0"; the netdev's id, as in netbuf.Divert and SetLink
	Tap string // name of the tap device
	MAC string
}

// Firmware names the two halves of a UEFI firmware.
type Firmware struct {
	Code string // read-only image
	Vars string // this VM's variables, raw, writable
}

// FromSpec fills in what a VM's specification decides; the caller adds paths,
// taps, Incoming, Sandbox, QEMU and TSCHz. Disks get the boot order of the specification.
func FromSpec(s model.VMSpec) Machine { panic("not yet") }

// Args returns the command line without the program's name, or an error that
// says what in m is out of range. The guest's CPUs do not run before Cont.
func Args(m Machine) ([]string, error) { panic("not yet") }
