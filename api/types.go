// Package api holds what travels over Perdure's REST interface: the wire
// types, the error classes, the conditions that can be waited for, and a typed
// Go client.
//
// The types are plain values, documented for the OpenAPI page through their
// `doc` tags. Sizes are bytes, durations are milliseconds and say so in their
// names, times are RFC 3339 in UTC. Fields may be added within version 1 of
// the interface; none is removed or changes its meaning.
//
// A Client may be used by several goroutines at once. It retries nothing that
// could be carried out twice; reading calls may be repeated freely. Nothing
// here guarantees that a state that was just read still holds: a VM may be
// taken over between two calls.
package api

import (
	"cmp"
	"time"

	"perdure/internal/model"
)

// Prefix is the path under which version 1 of the interface lives. Paths
// outside it belong to others (the shims' calls under /v1, /metrics).
const Prefix = "/api/v1"

// Cluster is what one host knows of the whole cluster.
type Cluster struct {
	ID       string          `json:"id" doc:"Random identity of the cluster"`
	Name     string          `json:"name" doc:"Name given at perdure init"`
	Host     string          `json:"host" doc:"Name of the host that answers"`
	Version  string          `json:"version" doc:"Version of Perdure on the host that answers"`
	Quorum   bool            `json:"quorum" doc:"Whether a majority of voters answers, so that claims can be decided"`
	Leader   string          `json:"leader" doc:"Voter that leads the cluster store; empty when there is none"`
	Voters   []Voter         `json:"voters" doc:"Hosts and witness that vote"`
	CASHA256 string          `json:"ca_sha256" doc:"SHA-256 fingerprint of the cluster's certificate authority, hexadecimal"`
	Problems []model.Problem `json:"problems" doc:"Health problems of the cluster as a whole"`
}

// Voter is one member of the cluster store.
type Voter struct {
	Name   string `json:"name"`
	Alive  bool   `json:"alive" doc:"Whether it answered the host that was asked"`
	Leader bool   `json:"leader"`
}

// HostRole says what a member of the cluster is for.
type HostRole string

// The roles of a host.
const (
	RoleHost    HostRole = "host"    // runs VMs and votes
	RoleWitness HostRole = "witness" // votes, runs no VM
)

// HostState is what is known of a host now.
type HostState string

// The states of a host.
const (
	HostAlive   HostState = "alive"   // its sign of life in the cluster store is fresh
	HostSilent  HostState = "silent"  // it is known, but gives no sign of life
	HostUnknown HostState = "unknown" // the host that was asked cannot tell (no quorum)
)

// Host is one member of the cluster.
type Host struct {
	Name            string          `json:"name"`
	Role            HostRole        `json:"role" enum:"host,witness"`
	State           HostState       `json:"state" enum:"alive,silent,unknown"`
	Voter           bool            `json:"voter"`
	Leader          bool            `json:"leader" doc:"Leads the cluster store"`
	Addrs           []string        `json:"addrs" doc:"Addresses of its API, IP:port"`
	ALinks          []ALink         `json:"alinks" doc:"Its availability links, in order"`
	CPUs            int             `json:"cpus"`
	MemoryTotal     int64           `json:"memory_total" doc:"Bytes"`
	MemoryFree      int64           `json:"memory_free" doc:"Bytes left for further VMs"`
	Accel           string          `json:"accel" doc:"Accelerator that runs a 64-bit guest here: kvm or tcg"`
	QEMU            string          `json:"qemu" doc:"Version of QEMU; empty when there is none"`
	Tracking        Tracking        `json:"tracking,omitempty" enum:"pending,proved,failed" doc:"Whether its dirty tracking, on which level ft rests, is proved; absent: not said (an older version, a witness)"`
	TrackingText    string          `json:"tracking_text,omitempty" doc:"What the proof found"`
	Version         string          `json:"version" doc:"Version of Perdure"`
	StateDir        string          `json:"state_dir"`
	CertificateEnds time.Time       `json:"certificate_ends,omitzero" doc:"When its certificate ends; it is renewed by itself at half of its time"`
	VMs             []string        `json:"vms" doc:"Names of the VMs whose primary or secondary sits here, by the records"`
	Problems        []model.Problem `json:"problems"`
}

// Tracking is the state of a host's proof of dirty tracking.
type Tracking string

// The states of a proof.
const (
	TrackingPending Tracking = "pending"
	TrackingProved  Tracking = "proved"
	TrackingFailed  Tracking = "failed"
)

// ALink is one availability link of a host as the answering host sees it.
type ALink struct {
	Addr  string  `json:"addr" doc:"IP address on this link"`
	Up    *bool   `json:"up,omitempty" doc:"Whether the other side answers; absent: not measured"`
	RTTMS float64 `json:"rtt_ms,omitempty"`
}

// CreateToken asks for a join token.
type CreateToken struct {
	Role  HostRole `json:"role,omitempty" enum:"host,witness" doc:"What may be joined with it; default host"`
	TTLMS int64    `json:"ttl_ms,omitempty" minimum:"0" doc:"How long it is valid, milliseconds; default one hour"`
}

// Token is a join token. Text is shown once and stored nowhere in clear.
type Token struct {
	ID      string    `json:"id"`
	Text    string    `json:"token" doc:"What to give to perdure join or perdure witness --join"`
	Role    HostRole  `json:"role"`
	Expires time.Time `json:"expires"`
}

// JoinRequest is sent by a machine that wants to join, over TLS whose server
// certificate it has checked against the fingerprint in its token.
type JoinRequest struct {
	TokenID     string   `json:"token_id"`
	Secret      string   `json:"secret" doc:"The token's one-time secret"`
	Name        string   `json:"name" doc:"Name of the new host"`
	Role        HostRole `json:"role" enum:"host,witness"`
	CSRPEM      string   `json:"csr_pem" doc:"Certificate request for the host's key"`
	Addrs       []string `json:"addrs" doc:"Addresses of its API, IP:port"`
	ALinks      []string `json:"alinks" doc:"Its addresses on the availability links"`
	PeerURL     string   `json:"peer_url" doc:"Where its cluster store will listen for the other voters"`
	ClientURL   string   `json:"client_url,omitempty"`
	Version     string   `json:"version" doc:"Version of Perdure"`
	StateFormat int      `json:"state_format,omitempty"`
}

// JoinReply makes the asker a member.
type JoinReply struct {
	ClusterID      string            `json:"cluster_id"`
	ClusterName    string            `json:"cluster_name"`
	CAPEM          string            `json:"ca_pem"`
	CAKeyPEM       string            `json:"ca_key_pem,omitempty" doc:"Given to voters that may sign, never to a witness"`
	CertPEM        string            `json:"cert_pem" doc:"The host's certificate"`
	InitialCluster map[string]string `json:"initial_cluster" doc:"Voters by name with their peer URLs, the new one included"`
	Peers          []string          `json:"peers" doc:"Addresses of the API of the other members"`
}

// VM is everything known of one virtual machine: what was asked for, what the
// authority record says, and what the shims that hold it say now.
type VM struct {
	Name    string       `json:"name"`
	UUID    string       `json:"uuid"`
	Level   model.Level  `json:"level" enum:"none,ha,ca,ft"`
	VCPUs   int          `json:"vcpus"`
	Memory  int64        `json:"memory" doc:"Bytes"`
	CPU     string       `json:"cpu" doc:"QEMU CPU model with flags"`
	Virtio  model.Virtio `json:"virtio" enum:"legacy,modern" doc:"Kind of the virtio devices"`
	Machine string       `json:"machine" doc:"Versioned machine type"`
	Accel   string       `json:"accel" doc:"kvm or tcg"`
	UEFI    bool         `json:"uefi"`
	VNC     bool         `json:"vnc"`
	Kernel  string       `json:"kernel,omitempty" doc:"File name of the kernel booted directly, for people"`
	Initrd  string       `json:"initrd,omitempty"`
	Append  string       `json:"append,omitempty"`
	Created time.Time    `json:"created"`

	State  model.RunState `json:"state" doc:"What is known of the instance now; running is only said when its shim says so"`
	Wanted model.Wanted   `json:"wanted" doc:"What a person, or the guest itself, wants"`

	Mode         model.Mode     `json:"mode" doc:"Mode of the authority record"`
	Primary      string         `json:"primary" doc:"Host of the running copy; empty: none"`
	PrimaryRun   model.RunID    `json:"primary_run,omitempty"`
	Secondary    string         `json:"secondary" doc:"Host of the standing-by copy; empty: none"`
	SecondaryRun model.RunID    `json:"secondary_run,omitempty"`
	Term         model.Term     `json:"term"`
	Epoch        model.Epoch    `json:"epoch"`
	Survivor     string         `json:"survivor,omitempty" doc:"Host that may go on alone without asking"`
	Branch       model.BranchID `json:"branch,omitempty" doc:"Line of history; changed by a forced takeover"`
	Reason       string         `json:"reason,omitempty" doc:"Why the record was changed last"`
	RecordAsOf   time.Time      `json:"record_as_of,omitzero" doc:"When the record was read from the cluster store"`
	StateAsOf    time.Time      `json:"state_as_of,omitzero" doc:"When the shim was last heard; absent: not since this agent started"`

	Checkpoint model.CheckpointStats `json:"checkpoint"`
	GuestMS    float64               `json:"guest_ms" doc:"Guest time run since the start, milliseconds"`
	FT         model.FTPolicy        `json:"ft" doc:"What protection may cost"`
	Sync       []model.Progress      `json:"sync" doc:"Copies to the secondary that run now"`
	// LevelChange is the last change of the level of this instance, or the one under way.
	LevelChange *LevelChange    `json:"level_change,omitempty" doc:"Change of the level of the running guest: under way, or the last one"`
	Links       []PairLink      `json:"links" doc:"A-links as the primary sees them"`
	Disks       []Disk          `json:"disks"`
	NICs        []model.NICSpec `json:"nics"`
	Problems    []model.Problem `json:"problems"`
}

// Disk is one virtual disk with the state of its replicas.
type Disk struct {
	ID       string                        `json:"id"`
	Size     int64                         `json:"size" doc:"Bytes"`
	Replicas map[string]model.ReplicaState `json:"replicas" doc:"State of the replica by host"`
	Places   map[string]string             `json:"places,omitempty" doc:"Path of the replica by host, where somebody chose one; else it is in the state directory"`
	Verified *model.VerifiedDisk           `json:"verified,omitempty" doc:"What the last verify found, as the running instance tells"`
}

// PairLink is one A-link between the two hosts of a VM.
type PairLink struct {
	Index int     `json:"index"`
	Up    bool    `json:"up"`
	RTTMS float64 `json:"rtt_ms"`
	Sent  int64   `json:"sent_bytes"`
	Recv  int64   `json:"recv_bytes"`
}

// File is a file given to an operation: either a path on the host that is
// asked (only over its Unix socket) or the identity of an Upload.
type File struct {
	Path   string `json:"path,omitempty" doc:"Absolute path on the host that is asked; only over its Unix socket"`
	Upload string `json:"upload,omitempty" doc:"Identity returned by POST /uploads"`
	Name   string `json:"name,omitempty" doc:"The file's own name, for people"`
}

// CreateDisk describes one disk of a new VM: empty with Size, or filled from Image.
type CreateDisk struct {
	Size   int64  `json:"size,omitempty" minimum:"0" doc:"Bytes, a multiple of 4096; with an image: at least the image's size, default the image's size"`
	Image  *File  `json:"image,omitempty"`
	Format string `json:"format,omitempty" enum:"raw,qcow2,vmdk" doc:"Format of the image; default: probed, raw only if nothing else fits"`

	Paths     map[string]string `json:"paths,omitempty" doc:"Where its replicas shall lie, by host (empty name: the host of the first replica): absolute path of a file or block device there; default: the state directory"`
	Overwrite bool              `json:"overwrite,omitempty" doc:"What is at these paths may be lost"`
}

// CreateNIC describes one network card of a new VM.
type CreateNIC struct {
	Bridge string `json:"bridge" doc:"Name of the bridge on every host"`
	MAC    string `json:"mac,omitempty" doc:"Hardware address; default: one made at random, 52:54:00:…"`
}

// CreateVM asks for a new VM. Zero values mean the default.
type CreateVM struct {
	Name   string         `json:"name"`
	Level  model.Level    `json:"level,omitempty" doc:"none, ca or ft; default none"`
	VCPUs  int            `json:"vcpus,omitempty" doc:"Default 1"`
	Memory int64          `json:"memory,omitempty" doc:"Bytes, a multiple of 2 MiB; default 512 MiB"`
	Disks  []CreateDisk   `json:"disks,omitempty" doc:"In the order in which the guest sees them"`
	NICs   []CreateNIC    `json:"nics,omitempty"`
	Kernel *File          `json:"kernel,omitempty" doc:"Kernel booted directly"`
	Initrd *File          `json:"initrd,omitempty"`
	Append string         `json:"append,omitempty" doc:"Kernel command line"`
	UEFI   bool           `json:"uefi,omitempty"`
	VNC    bool           `json:"vnc,omitempty"`
	CPU    string         `json:"cpu,omitempty" doc:"QEMU CPU model with flags; default: one that every host offers"`
	Virtio model.Virtio   `json:"virtio,omitempty" enum:"legacy,modern" doc:"Kind of the virtio devices; default legacy, whose state is saved faster"`
	FT     model.FTPolicy `json:"ft,omitzero" doc:"Zero fields mean the default"`
	Host   string         `json:"host,omitempty" doc:"Host of the first replica; default: the host that is asked"`
	Start  bool           `json:"start,omitempty" doc:"Start it as soon as it exists"`
}

// StartVM asks for a start.
type StartVM struct {
	Host string `json:"host,omitempty" doc:"Where; default: the host whose replica is UpToDate, the last primary first"`
}

// DeleteVM asks for a VM and its disks to be removed.
type DeleteVM struct {
	Force bool `json:"force,omitempty" doc:"Also when replicas on hosts that do not answer have to be left behind"`
}

// ProtectVM asks for protection to be set up now, or taken away.
type ProtectVM struct {
	Host string `json:"host,omitempty" doc:"Where the secondary shall be; default: any host with room"`
	Off  bool   `json:"off,omitempty" doc:"Give the secondary up; the VM goes on simplex until protected again"`
}

// SetLevel asks for another level of protection. A running guest keeps running; follow
// VM.LevelChange. Of a stopped VM it is done at once.
type SetLevel struct {
	Level  model.Level `json:"level,omitempty" doc:"none, ca or ft"`
	Cancel bool        `json:"cancel,omitempty" doc:"Give up the change that is under way instead"`
}

// LevelChange is one change of the level of a running guest.
type LevelChange struct {
	From       model.Level    `json:"from"`
	To         model.Level    `json:"to"`
	Begun      time.Time      `json:"begun"`
	Ended      bool           `json:"ended"`
	Error      string         `json:"error,omitempty" doc:"Why it came to nothing, once it has ended; the guest runs on as before then"`
	Progress   model.Progress `json:"progress" doc:"Copy of the guest's memory; total 0: none is needed, or it has not begun"`
	BlackoutMS float64        `json:"blackout_ms" doc:"For how long the guest stood still, once it has ended"`
}

// SwitchoverVM asks for a planned change of primary.
type SwitchoverVM struct {
	Host string `json:"host,omitempty" doc:"The new primary; default and only choice now: the secondary"`
}

// TakeoverVM makes the given host run the VM although the cluster did not
// decide so. Without Force only what is safe is done.
type TakeoverVM struct {
	Host    string `json:"host" doc:"Where the VM shall go on"`
	Force   bool   `json:"force,omitempty" doc:"Also where something could be lost: a new branch"`
	Confirm string `json:"confirm,omitempty" doc:"The VM's name, typed again; needed with force"`
}

// TakeoverRisk says what a forced takeover could lose, before it is done.
type TakeoverRisk struct {
	VM             string             `json:"vm"`
	Host           string             `json:"host"`
	Safe           bool               `json:"safe" doc:"Nothing can be lost: no force is needed"`
	Possible       bool               `json:"possible" doc:"There is something on that host to go on from"`
	From           string             `json:"from" enum:"memory,disk,nothing" doc:"What it would go on from"`
	Replica        model.ReplicaState `json:"replica" doc:"State of that host's replica; empty: none"`
	ReplicaTerm    model.Term         `json:"replica_term"`
	RecordTerm     model.Term         `json:"record_term"`
	Primary        string             `json:"primary" doc:"Who may still be running it"`
	PrimaryAnswers bool               `json:"primary_answers"`
	BehindMS       int64              `json:"behind_ms" doc:"Age of what it would go on from; negative: not known"`
	LastEpoch      model.Epoch        `json:"last_epoch,omitempty" doc:"Last complete epoch held there"`
	Losses         []string           `json:"losses" doc:"What could be lost, one sentence each"`
}

// OperationState says how far an operation is.
type OperationState string

// The states of an operation.
const (
	OperationRunning OperationState = "running"
	OperationDone    OperationState = "done"
	OperationFailed  OperationState = "failed"
)

// Operation is something that takes longer than a request, such as an import.
// The host that carries it out remembers it for some time after its end.
type Operation struct {
	ID       string           `json:"id"`
	Kind     string           `json:"kind" doc:"create"`
	VM       string           `json:"vm"`
	Host     string           `json:"host" doc:"Host that carries it out"`
	State    OperationState   `json:"state" enum:"running,done,failed"`
	Text     string           `json:"text,omitempty" doc:"What is being done, for people"`
	Progress []model.Progress `json:"progress" doc:"One per thing being copied"`
	Error    *Problem         `json:"error,omitempty" doc:"Why it failed"`
	Started  time.Time        `json:"started"`
	Ended    time.Time        `json:"ended,omitzero"`
}

// Upload is a file received, kept until an operation uses it or an hour passes.
type Upload struct {
	ID     string `json:"id"`
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"`
}

// EventQuery selects events of a VM.
type EventQuery struct {
	Follow bool      // go on with events as they happen, until the caller cancels
	Since  time.Time // only events later than this; zero: all that are known
}

// StreamItem is one line of an event stream. A line with none of its fields is
// a sign of life, sent every few seconds.
type StreamItem struct {
	Event *model.Event `json:"event,omitempty"`
	Error *Problem     `json:"error,omitempty" doc:"The stream ends after this"`
}

// WaitResult answers a wait.
type WaitResult struct {
	Met bool `json:"met" doc:"Whether the condition holds; false: the time was up"`
	VM  *VM  `json:"vm,omitempty" doc:"The VM as it was seen last; absent: it does not exist"`
}

// HostList answers GET /hosts.
type HostList struct {
	Hosts []Host `json:"hosts"`
}

// VMList answers GET /vms.
type VMList struct {
	VMs []VM `json:"vms"`
}

// OperationList answers GET /operations.
type OperationList struct {
	Operations []Operation `json:"operations"`
}

// FromRecord fills a VM with what its specification and its authority record
// say. State is "stopped" only where the record says so, else "unknown": the
// caller replaces it with what a shim says.
func FromRecord(spec model.VMSpec, rec model.Record) VM {
	vm := VM{
		Name: spec.Name, UUID: spec.UUID, Level: spec.Level, VCPUs: spec.VCPUs, Memory: spec.Memory,
		CPU: spec.CPU, Virtio: cmp.Or(spec.Virtio, model.VirtioLegacy), Machine: spec.Machine, Accel: spec.Accel, UEFI: spec.UEFI, VNC: spec.VNC,
		Append: spec.Append, Created: spec.Created, FT: spec.FT,
		State: model.StateUnknown, Wanted: rec.Wanted, Mode: rec.Mode,
		Primary: rec.Primary.Host, PrimaryRun: rec.Primary.Run,
		Secondary: rec.Secondary.Host, SecondaryRun: rec.Secondary.Run,
		Term: rec.Term, Survivor: rec.Survivor, Branch: rec.Branch, Reason: rec.Reason,
		Sync: []model.Progress{}, Links: []PairLink{}, Disks: []Disk{},
		NICs: append([]model.NICSpec{}, spec.NICs...), Problems: []model.Problem{},
	}
	if spec.Kernel != nil {
		vm.Kernel = spec.Kernel.Name
	}
	if spec.Initrd != nil {
		vm.Initrd = spec.Initrd.Name
	}
	if rec.Mode == model.ModeStopped {
		vm.State = model.StateStopped
	}
	for _, d := range spec.Disks {
		disk := Disk{ID: d.ID, Size: d.Size, Replicas: make(map[string]model.ReplicaState, len(rec.Replicas))}
		for h, r := range rec.Replicas {
			disk.Replicas[h] = r.State
		}
		for _, p := range spec.Places {
			if p.Disk == d.ID {
				if disk.Places == nil {
					disk.Places = map[string]string{}
				}
				disk.Places[p.Host] = p.Path
			}
		}
		vm.Disks = append(vm.Disks, disk)
	}
	return vm
}
