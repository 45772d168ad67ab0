package model

import "time"

// VerifyState says how far a verify is.
type VerifyState string

// The states of a verify.
const (
	VerifyRunning     VerifyState = "running"
	VerifyDone        VerifyState = "done"
	VerifyInterrupted VerifyState = "interrupted" // before its end; a scheduled one goes on where it was
)

// VerifyReport is the report of one verify of the disks of a VM, and what reads
// of the guest have found since. It is kept in the VM's directory.
type VerifyReport struct {
	Started   time.Time      `json:"started"`
	Ended     time.Time      `json:"ended,omitzero"`
	State     VerifyState    `json:"state" enum:"running,done,interrupted"`
	Why       string         `json:"why,omitempty" doc:"Why it was interrupted"`
	Scheduled bool           `json:"scheduled,omitempty" doc:"Started by the schedule, not by a person"`
	Host      string         `json:"host" doc:"Host that ran the VM"`
	Peer      string         `json:"peer,omitempty" doc:"Host whose replica was compared; empty: each block with its own checksum only"`
	Rate      int64          `json:"rate" doc:"Bytes per second, at most"`
	Disks     []VerifiedDisk `json:"disks"`
	Reads     ReadRepairs    `json:"reads" doc:"Damage that the guest's reads met, since the VM was made"`
}

// VerifiedDisk is what a verify found on one disk. Blocks are of 4096 bytes.
type VerifiedDisk struct {
	Disk       string          `json:"disk"`
	Ended      time.Time       `json:"ended,omitzero" doc:"When its end was reached; absent: it was not"`
	Size       int64           `json:"size" doc:"Bytes"`
	Checked    int64           `json:"checked" doc:"Bytes, from the beginning of the disk on"`
	Mismatches int64           `json:"mismatches" doc:"Blocks that differed, or did not match their checksum"`
	Repaired   int64           `json:"repaired" doc:"Of them, written anew from the side whose checksum holds"`
	Rewritten  int64           `json:"rewritten" doc:"Of them, written over by the guest meanwhile"`
	Left       int64           `json:"left" doc:"Of them, left as they are: nothing tells which side is right"`
	Ranges     []VerifiedRange `json:"ranges" doc:"Where they are; the first ones"`
}

// VerifiedRange is a run of blocks that were found wrong in the same way.
type VerifiedRange struct {
	Off  int64  `json:"offset" doc:"Bytes"`
	Len  int64  `json:"length" doc:"Bytes"`
	What string `json:"what" enum:"repaired,rewritten,left"`
	Host string `json:"host,omitempty" doc:"Host whose replica was wrong, where that is known"`
	Why  string `json:"why" doc:"In words"`
}

// VerifyStoppedByPerson is the Why of a verify that a person ended: the schedule does
// not go on with it.
const VerifyStoppedByPerson = "stopped by a person"

// MaxVerifiedRanges is how many ranges a report lists for one disk.
const MaxVerifiedRanges = 64

// ReadRepairs counts blocks that a read of the guest found damaged on the host
// where the guest ran, and that were read from the other host and written anew.
type ReadRepairs struct {
	Blocks int64     `json:"blocks"`
	Last   time.Time `json:"last,omitzero"`
	Where  string    `json:"where,omitempty" doc:"The last one: disk, offset and host"`
}

// Counts sums up all disks of the report.
func (r *VerifyReport) Counts() (checked, mismatches, repaired, rewritten, left int64) {
	for _, d := range r.Disks {
		checked, mismatches, repaired = checked+d.Checked, mismatches+d.Mismatches, repaired+d.Repaired
		rewritten, left = rewritten+d.Rewritten, left+d.Left
	}
	return checked, mismatches, repaired, rewritten, left
}

// VerifySchedule is when a VM's disks are verified by themselves.
type VerifySchedule struct {
	EverySeconds int64 `json:"every_seconds" doc:"Age of the last report after which it is done again; negative: never; 0: the default, a week"`
	Rate         int64 `json:"rate" doc:"Bytes per second, at most; 0: the default, 16 MiB/s"`
}

// The default schedule, and the bounds of what may be asked for.
const (
	DefaultVerifyEvery = 7 * 24 * time.Hour
	MinVerifyEvery     = time.Minute
	DefaultVerifyRate  = 16 << 20 // bytes per second, scheduled
	AskedVerifyRate    = 64 << 20 // bytes per second, where a person asks and says nothing else
	MinVerifyRate      = 64 << 10
)

// Every is the age of the last report after which the disks are due; 0: never.
func (s VerifySchedule) Every() time.Duration {
	switch {
	case s.EverySeconds < 0:
		return 0
	case s.EverySeconds == 0:
		return DefaultVerifyEvery
	}
	return time.Duration(s.EverySeconds) * time.Second
}

// RateOr is the rate, or a default.
func (s VerifySchedule) RateOr(other int64) int64 {
	if s.Rate > 0 {
		return s.Rate
	}
	return other
}
