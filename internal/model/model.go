// Package model holds the nouns that every layer shares: identities, terms,
// epochs, levels, modes, the authority record and the specification of a VM.
//
// It has no behaviour beyond validation and formatting, starts no goroutine
// and imports only the standard library. All types are plain values; a value
// that was handed over must not be changed by the giver any more.
package model

import (
	"time"
)

// Term numbers an authority grant of one VM. It only grows, with each change
// of mode or primary; it is the fencing token in every message and write.
type Term uint64

// Epoch numbers one checkpoint interval of a pair. Never to be confused with Term.
type Epoch uint64

// RunID names one filling of a VM's memory on a host (boot, or sync complete):
// 32 hexadecimal digits, or empty for "no memory". A host that rebooted, or a
// shim that lost its memory, does not hold the run, whatever a record says.
type RunID string

// BranchID names a line of history of a VM; a forced takeover makes a new one.
// Branches never resync with each other by themselves.
type BranchID string

// Level is the protection level of a VM.
type Level string

// The levels; LevelHA is reserved for a later release.
const (
	LevelNone Level = "none" // one copy
	LevelHA   Level = "ha"
	LevelCA   Level = "ca" // disks mirrored; a takeover boots the guest on a QEMU that stands by
	LevelFT   Level = "ft" // memory too; a takeover goes on where the guest was
)

// HasSecondary reports whether a VM of this level shall have a second copy on
// another host.
func (l Level) HasSecondary() bool { return l == LevelCA || l == LevelFT }

// Mode says how a VM runs now, as written in its record.
type Mode string

// The modes of a record.
const (
	ModeStopped  Mode = "stopped"  // no instance runs, none may let output out
	ModeStarting Mode = "starting" // a start from disk was granted to the primary
	ModeSimplex  Mode = "simplex"  // the primary runs alone
	ModeSyncing  Mode = "syncing"  // simplex, and the secondary is being filled
	ModeDuplex   Mode = "duplex"   // primary and secondary hold the same state
)

// Wanted is what a person (or the guest itself) wants of the VM.
type Wanted string

// The wanted run states.
const (
	WantRunning Wanted = "running"
	WantPaused  Wanted = "paused"
	WantStopped Wanted = "stopped"
)

// Seat is a place that runs or stands by: a host together with the run whose
// memory it holds. A seat with an empty Run holds no memory.
type Seat struct {
	Host string `json:"host,omitempty"`
	Run  RunID  `json:"run,omitempty"`
}

// Empty reports whether nobody sits here.
func (s Seat) Empty() bool { return s.Host == "" }

// ReplicaState is the state of all disks of a VM on one host, in DRBD's words.
type ReplicaState string

// The replica states.
const (
	UpToDate     ReplicaState = "UpToDate"
	Outdated     ReplicaState = "Outdated"     // consistent, but older than another replica
	Inconsistent ReplicaState = "Inconsistent" // being filled; not to be started from
)

// Replica is what the record knows of one host's copy of the disks.
type Replica struct {
	State  ReplicaState `json:"state"`
	Term   Term         `json:"term"` // as of which term
	Branch BranchID     `json:"branch,omitempty"`
}

// Record is the authority record of one VM: one etcd key, changed only by
// compare-and-swap on its revision. See docs/authority.md.
type Record struct {
	VM        string             `json:"vm"`
	Term      Term               `json:"term"`
	Mode      Mode               `json:"mode"`
	Level     Level              `json:"level"`
	Primary   Seat               `json:"primary"`
	Secondary Seat               `json:"secondary"`
	Replicas  map[string]Replica `json:"replicas,omitempty"` // by host name
	Branch    BranchID           `json:"branch,omitempty"`
	Survivor  string             `json:"survivor,omitempty"` // host that may go simplex without asking
	Wanted    Wanted             `json:"wanted"`
	Reason    string             `json:"reason,omitempty"` // why the last change was made, for people
}

// Clone returns a deep copy.
func (r Record) Clone() Record {
	m := make(map[string]Replica, len(r.Replicas))
	for k, v := range r.Replicas {
		m[k] = v
	}
	r.Replicas = m
	return r
}

// Revision is the revision of a record in the cluster store; 0 means "absent".
type Revision int64

// Versioned is a record as read, with its revision.
type Versioned struct {
	Record   Record   `json:"record"`
	Revision Revision `json:"revision"`
}

// DiskSpec describes one virtual disk.
type DiskSpec struct {
	ID   string `json:"id"`   // "disk0", "disk1", …
	Size int64  `json:"size"` // bytes, a multiple of 4096
	// Slot is the disk's PCI slot, FirstDiskSlot and the following DiskSlots-1. 0:
	// that of its place in the list, which holds as long as no disk was added or
	// taken away. The guest sees it, and saved device state fits to it only.
	Slot int `json:"slot,omitempty"`
}

// The PCI slots of disks.
const (
	FirstDiskSlot = 0x10
	DiskSlots     = 14
)

// SlotOf returns the PCI slot of disk n of a list.
func SlotOf(disks []DiskSpec, n int) int {
	if disks[n].Slot != 0 {
		return disks[n].Slot
	}
	return FirstDiskSlot + n
}

// PinSlots returns a copy of a list of disks that says of each where it is, so that
// nothing moves when disks come and go.
func PinSlots(disks []DiskSpec) []DiskSpec {
	out := make([]DiskSpec, len(disks))
	for n, d := range disks {
		d.Slot = SlotOf(disks, n)
		out[n] = d
	}
	return out
}

// NICSpec describes one virtual network card.
type NICSpec struct {
	ID     string `json:"id"`     // "net0", "net1", …
	Bridge string `json:"bridge"` // name of the bridge on every host
	MAC    string `json:"mac"`
}

// Blob names a file of a VM that every host of it needs (kernel, initrd):
// hosts fetch it from each other by digest.
type Blob struct {
	SHA256 string `json:"sha256"`
	Size   int64  `json:"size"`
	Name   string `json:"name"` // the file's name when it was given, for people
}

// VMSpec is everything that decides which virtual machine a guest sees. Both
// hosts build the same guest from it: machine type and CPU model are pinned.
type VMSpec struct {
	Name   string     `json:"name"`
	UUID   string     `json:"uuid"`
	Level  Level      `json:"level"`
	VCPUs  int        `json:"vcpus"`
	Memory int64      `json:"memory"` // bytes, a multiple of 2 MiB
	Disks  []DiskSpec `json:"disks"`
	// Places are where replicas lie that are not in the state directory of their host, at
	// most one for each disk and host.
	Places  []DiskPlace `json:"places,omitempty"`
	NICs    []NICSpec   `json:"nics"`
	Kernel  *Blob       `json:"kernel,omitempty"`
	Initrd  *Blob       `json:"initrd,omitempty"`
	Append  string      `json:"append,omitempty"`
	UEFI    bool        `json:"uefi,omitempty"`
	VNC     bool        `json:"vnc,omitempty"` // virtio-gpu with VNC; else no display
	Machine string      `json:"machine"`       // versioned machine type, e.g. pc-i440fx-7.2
	CPU     string      `json:"cpu"`           // QEMU CPU model with flags
	// Virtio is the kind of the virtio devices; empty means VirtioLegacy. It is
	// what the guest sees, so it stays as the VM was made.
	Virtio Virtio `json:"virtio,omitempty"`
	Accel  string `json:"accel"`            // "kvm" or "tcg"; both hosts must offer it
	TSCHz  int64  `json:"tsc_hz,omitempty"` // the guest's fixed TSC frequency under kvm, hertz; both hosts need it or TSC scaling
	// SteadyTime gives the guest the clock of level ft under kvm, whatever its level: the
	// TSC at a fixed frequency, no kvmclock, no HPET. It is what the guest sees, so
	// it stays as the VM was made; without it the level of a running guest cannot become ft.
	SteadyTime bool      `json:"steady_time,omitempty"`
	FT         FTPolicy  `json:"ft"`
	Created    time.Time `json:"created"`
}

// Virtio is a kind of virtio devices.
type Virtio string

// The kinds. Nearly all guests drive both; each modern device adds some 45 KB
// and half a millisecond to every checkpoint's pause.
const (
	VirtioLegacy Virtio = "legacy" // before virtio 1.0
	VirtioModern Virtio = "modern" // virtio 1.0
)

// FTPolicy bounds what protection at Level 3 may cost.
type FTPolicy struct {
	MaxOverheadPercent int `json:"max_overhead_percent"` // share of time the guest may stand still under load, 1–90, default 25
	MinIntervalMS      int `json:"min_interval_ms"`      // shortest distance of two checkpoints, 1–1000, default 5
	MaxIntervalMS      int `json:"max_interval_ms"`      // longest distance while idle, 10–5000, default 100
	DetectMS           int `json:"detect_ms"`            // silence on all A-links after which a peer counts as lost, default 300
}

// DefaultFTPolicy returns the policy of a VM that asked for nothing special.
func DefaultFTPolicy() FTPolicy {
	return FTPolicy{MaxOverheadPercent: 25, MinIntervalMS: 5, MaxIntervalMS: 100, DetectMS: 300}
}
