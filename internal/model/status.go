package model

import "time"

// RunState is what is known of a VM's instance right now, for people.
// "running" is only ever said by the shim that runs it, and never from memory.
type RunState string

// The run states.
const (
	StateStopped  RunState = "stopped"
	StateStarting RunState = "starting"
	StateRunning  RunState = "running"
	StatePaused   RunState = "paused"  // by a person
	StateHeld     RunState = "held"    // the guest stands still until output may leave again
	StateFault    RunState = "fault"   // guest panic, I/O error or internal error; see problems
	StateUnknown  RunState = "unknown" // the host that should run it does not answer
)

// Quantiles summarises one measured quantity over the last 1024 checkpoints.
type Quantiles struct {
	P50 float64 `json:"p50"`
	P99 float64 `json:"p99"`
}

// CheckpointStats is what a primary knows of its recent checkpoints.
type CheckpointStats struct {
	Count         uint64      `json:"count"`
	IntervalMS    float64     `json:"interval_ms"` // mean distance of recent checkpoints
	PauseMS       Quantiles   `json:"pause_ms"`
	DirtyPages    Quantiles   `json:"dirty_pages"`
	TransferBytes Quantiles   `json:"transfer_bytes"`
	HeldOutputMS  Quantiles   `json:"held_output_ms"`
	Phases        PausePhases `json:"phases_ms"`
	TimeLostMS    float64     `json:"time_lost_ms"` // guest virtual time lost to pauses since it was protected
}

// PausePhases says where the pause of a checkpoint goes, medians in milliseconds.
type PausePhases struct {
	Stop  float64 `json:"stop"`  // until the CPUs stand still and the disks are drained
	Save  float64 `json:"save"`  // devices and CPUs
	Flush float64 `json:"flush"` // dirty memory
	Rest  float64 `json:"rest"`  // held output, disk writes, audit
	Cont  float64 `json:"cont"`
}

// Severity of a problem.
type Severity string

// The severities.
const (
	Warning  Severity = "warning"
	Critical Severity = "critical"
)

// Problem is a named health problem: what is wrong, how bad it is, what to do.
type Problem struct {
	Code     string   `json:"code"` // stable, kebab-case, e.g. "secondary-lost"
	Severity Severity `json:"severity"`
	Text     string   `json:"text"`
	Action   string   `json:"action"` // what a person should do, or "none: …"
}

// Event is one entry of a VM's timeline.
type Event struct {
	Seq        uint64            `json:"seq"` // grows by one per host and VM
	Time       time.Time         `json:"time"`
	Host       string            `json:"host"`
	VM         string            `json:"vm"`
	Type       string            `json:"type"` // stable, kebab-case: "started", "duplex", "takeover", …
	Term       Term              `json:"term,omitempty"`
	Epoch      Epoch             `json:"epoch,omitempty"`
	DurationMS float64           `json:"duration_ms,omitempty"`
	Text       string            `json:"text"`
	Data       map[string]string `json:"data,omitempty"`
}

// Progress of a long operation.
type Progress struct {
	What       string  `json:"what"` // "memory", "disks", "import"
	Done       int64   `json:"done"` // bytes
	Total      int64   `json:"total"`
	ETASeconds float64 `json:"eta_seconds"`    // negative: not known yet
	Rate       int64   `json:"rate,omitempty"` // bytes per second, lately; 0: not known
}
