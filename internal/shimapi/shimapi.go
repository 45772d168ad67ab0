// Package shimapi is the protocol between an agent and the shims of its host:
// JSON over HTTP on Unix sockets, one socket per shim (agent calls shim) and
// one of the agent (shim calls agent). Either side may vanish and come back at
// any moment; there is no session, so a restarted agent simply finds its shims
// again by their sockets. Nothing here is trusted from the network.
package shimapi

import (
	"time"

	"perdure/internal/model"
)

// Layout of a VM's directory on a host, below STATE/vms/NAME.
const (
	ConfigFile = "shim.json" // Config, written by the agent before the shim starts
	SocketFile = "shim.sock" // the shim's HTTP socket
	EventsFile = "events.jsonl"
	QEMUPID    = "qemu.pid" // "PID STARTTIME" of this VM's QEMU, STARTTIME as field 22 of /proc/PID/stat
	// NextQEMUPID is the same of a second QEMU that is to become the VM's, while a
	// change of level lasts. Until it is renamed to QEMUPID its guest does not run.
	NextQEMUPID = "qemu-next.pid"
	LockFile    = "run.lock" // flock held by shim, QEMU and helper together: free means "nothing of this VM lives here"
	PIDFile     = "shim.pid" // pid of the shim, for the agent's pidfd
	LogFile     = "shim.log"
	DiskDir     = "disks"
	NVRAMFile   = "nvram.fd" // the UEFI variables of a VM that has UEFI
)

// Config tells a shim who it is. It is written atomically by the agent and
// read once at the shim's start.
type Config struct {
	Version     int          `json:"version"` // 1
	Host        string       `json:"host"`    // this host's name
	Spec        model.VMSpec `json:"spec"`
	Dir         string       `json:"dir"`          // the VM's directory
	AgentSocket string       `json:"agent_socket"` // Unix socket of the agent
	ALinkAddrs  []string     `json:"alink_addrs"`  // local IP addresses of the A-links, in order
	CertFile    string       `json:"cert_file"`    // host certificate, PEM
	KeyFile     string       `json:"key_file"`
	CAFile      string       `json:"ca_file"`
	QEMU        string       `json:"qemu"`                   // path of qemu-system-x86_64
	QEMUVersion string       `json:"qemu_version,omitempty"` // of that program, "7.2.22"; empty: not known, the oldest supported is assumed
	Sandbox     bool         `json:"sandbox,omitempty"`      // its seccomp filter was tried and works
	KernelPath  string       `json:"kernel_path"`            // local path of the kernel blob, if any
	InitrdPath  string       `json:"initrd_path"`

	// With UEFI: the firmware's code, and the variables that a VM begins with.
	// Both are empty without.
	FirmwareCode string `json:"firmware_code,omitempty"`
	FirmwareVars string `json:"firmware_vars,omitempty"`
}

// Endpoint is where the shim of a VM on one host listens for its peer; shims
// publish it through their agent, agents share it through the cluster store.
type Endpoint struct {
	Host  string   `json:"host"`
	Addrs []string `json:"addrs"` // IP:port, one per A-link, same order as ALinkAddrs
	Nonce string   `json:"nonce"` // new with each shim process
}

// Role of a shim.
type Role string

// The roles.
const (
	RoleNone    Role = "none" // just started, or ending
	RolePrimary Role = "primary"
	RoleStandby Role = "secondary"
)

// Status is what a shim says of itself (GET /v1/status).
type Status struct {
	VM         string                `json:"vm"`
	Host       string                `json:"host"`
	PID        int                   `json:"pid"`
	Role       Role                  `json:"role"`
	Run        model.RunID           `json:"run"`
	State      model.RunState        `json:"state"`
	Mode       model.Mode            `json:"mode"`
	Term       model.Term            `json:"term"`
	Epoch      model.Epoch           `json:"epoch"`
	Record     model.Versioned       `json:"record"` // newest the shim has read
	Checkpoint model.CheckpointStats `json:"checkpoint"`
	Sync       []model.Progress      `json:"sync,omitempty"`
	Links      []LinkStatus          `json:"links,omitempty"`
	Problems   []model.Problem       `json:"problems,omitempty"`
	Verify     *model.VerifyReport   `json:"verify,omitempty"` // the last one, or that under way
	Level      model.Level           `json:"level"`            // under which the guest runs, or is filled, here
	Change     *LevelChange          `json:"change,omitempty"` // of the level: under way, or the last one
	GuestMS    float64               `json:"guest_ms"`         // guest time run since start, milliseconds, for the clock metric
	Disks      []DiskStatus          `json:"disks"`            // of a primary, as QEMU has them; null: not said
}

// LevelChange is one change of the level of the running guest.
type LevelChange struct {
	Begun time.Time   `json:"begun"`
	From  model.Level `json:"from"`
	To    model.Level `json:"to"`
	Ended bool        `json:"ended"`
	// Error is why it came to nothing, once it has ended; the guest runs on as before then.
	Error      string  `json:"error,omitempty"`
	Done       int64   `json:"done_bytes"` // of the guest's memory that was copied
	Total      int64   `json:"total_bytes"`
	BlackoutMS float64 `json:"blackout_ms"` // for how long the guest stood still, when it was done
}

// LinkStatus is one A-link as seen by a shim.
type LinkStatus struct {
	Index int     `json:"index"`
	Up    bool    `json:"up"`
	RTTMS float64 `json:"rtt_ms"`
	Sent  int64   `json:"sent_bytes"`
	Recv  int64   `json:"recv_bytes"`
}

// Op is an operation asked of a shim (POST /v1/op).
type Op struct {
	// Op is one of: "pause", "resume", "shutdown" (ACPI), "poweroff" (clean end:
	// last epoch commits, record says stopped), "reset", "switchover", "takeover"
	// (of a secondary; only with Force or when the primary is known dead),
	// "protect" (fill the secondary on Host), "unprotect", "quit" (end this shim,
	// refused on a running primary), "survivor" (Value "on" or "off"), "peer-dead"
	// (Value: the run id of the peer's instance that is known to be gone for
	// sure, because its host's agent holds the run lock; Host: that host), "trial"
	// (of a standby: load its newest state in a scratch QEMU now; with Value
	// "next" the one after the last that was tried so, which holds the primary
	// back meanwhile), "disk-replace" (of a primary of level ca: make the failed
	// replica of a disk anew here and fill it from the secondary's; Value: the disk's id, or ReplaceDisk as JSON),
	// "verify" (of a running primary; Value: VerifyOptions as JSON), "verify-stop",
	// "level" (change the level of the running guest to Value: accepted, then
	// followed by Status.Change), "level-cancel",
	// "disks" (of a primary without a secondary; Value: SetDisks as JSON: make the
	// guest's disks so, by hot-plug).
	Op    string `json:"op"`
	Host  string `json:"host,omitempty"`
	Force bool   `json:"force,omitempty"`
	Value string `json:"value,omitempty"`
}

// OpResult answers an Op. Error is empty when the operation was carried out
// (or, for long ones, accepted; follow it by events).
type OpResult struct {
	Error string `json:"error,omitempty"`
	Text  string `json:"text,omitempty"`
}

// SwapRequest asks the agent to replace a record (POST /v1/record/swap).
// The agent carries it out as one linearizable compare-and-swap.
type SwapRequest struct {
	VM       string         `json:"vm"`
	Revision model.Revision `json:"revision"` // revision the caller read
	Record   model.Record   `json:"record"`
}

// SwapOutcome says what is known of a swap.
type SwapOutcome string

// The outcomes of a swap. Unknown means that the store may have carried it out
// or may still do so: the caller goes on under the stricter of both rules.
const (
	SwapDone     SwapOutcome = "done"
	SwapConflict SwapOutcome = "conflict" // not carried out and never will be; Current is the record now
	SwapUnknown  SwapOutcome = "unknown"
)

// SwapResult answers a SwapRequest.
type SwapResult struct {
	Outcome SwapOutcome     `json:"outcome"`
	Current model.Versioned `json:"current"`
	Error   string          `json:"error,omitempty"`
}

// ReadResult answers GET /v1/record?vm=NAME: a linearizable read.
type ReadResult struct {
	OK      bool            `json:"ok"` // false: no quorum, or the agent does not know
	Found   bool            `json:"found"`
	Current model.Versioned `json:"current"`
	Error   string          `json:"error,omitempty"`
}

// DiskStatus is one disk as a shim has it.
type DiskStatus struct {
	model.DiskSpec
	Missing int64 `json:"missing"` // bytes that the peer may lack, by the bitmap
}

// DisksChanging is the error of an operation that does not fit to a change of the guest's
// disks that is under way; an agent that has lost the answer to that one waits for its end.
const DisksChanging = "the VM's disks are being changed just now"

// SetDisks is the Value, as JSON, of the operation "disks": the disks that the
// running guest shall have, all of them, each with its slot.
type SetDisks struct {
	Disks []model.DiskSpec `json:"disks"`
}
