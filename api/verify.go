package api

import (
	"context"
	"net/http"
	"time"

	"perdure/internal/model"
)

// VerifyVM asks for a verify of a running VM's disks, for the end of one, or for
// another schedule.
type VerifyVM struct {
	Disk     string                `json:"disk,omitempty" doc:"One disk; default: all"`
	Rate     int64                 `json:"rate,omitempty" minimum:"0" doc:"Bytes per second, at most; default 64 MiB"`
	Stop     bool                  `json:"stop,omitempty" doc:"End the verify that is under way"`
	Schedule *model.VerifySchedule `json:"schedule,omitempty" doc:"Only change when it is done by itself"`
}

// Validate refuses what is out of range.
func (v VerifyVM) Validate() error {
	low := func(rate int64) error {
		if rate != 0 && rate < model.MinVerifyRate {
			return Errorf(Invalid, "rate %d bytes per second is not allowed; allowed are %s and more", rate, FormatSize(model.MinVerifyRate))
		}
		return nil
	}
	if err := low(v.Rate); err != nil {
		return err
	}
	if v.Stop && (v.Disk != "" || v.Rate != 0 || v.Schedule != nil) {
		return Errorf(Invalid, "stop stands alone: the verify that is under way ends, whatever it verifies")
	}
	s := v.Schedule
	if s == nil {
		return nil
	}
	if every := s.Every(); every != 0 && every < model.MinVerifyEvery {
		return Errorf(Invalid, "every %s is not allowed; allowed are %s and more, or never", every, model.MinVerifyEvery)
	}
	return low(s.Rate)
}

// VerifyStatus is what is known of the verifies of a VM.
type VerifyStatus struct {
	VM       string               `json:"vm"`
	Report   *model.VerifyReport  `json:"report,omitempty" doc:"The last one, or that of the verify under way; absent: none was made yet"`
	Schedule model.VerifySchedule `json:"schedule"`
	Due      time.Time            `json:"due,omitzero" doc:"When it is done by itself next, if the VM runs then; absent: never"`
}

// VerifyVM starts a verify, ends one or changes the schedule.
func (c *Client) VerifyVM(ctx context.Context, name string, req VerifyVM) error {
	return c.action(ctx, name, "verify", req)
}

// VerifyStatus returns the last report and the schedule.
func (c *Client) VerifyStatus(ctx context.Context, name string) (VerifyStatus, error) {
	if err := CheckName("VM", name); err != nil {
		return VerifyStatus{}, err
	}
	return get[VerifyStatus](ctx, c, vmPath(name, "verify"))
}

// SplitBrain says what each host holds of a VM whose replicas went apart.
type SplitBrain struct {
	VM      string      `json:"vm"`
	Split   bool        `json:"split" doc:"Some replica has data that the one which counts has not, and is not overwritten by itself"`
	Primary string      `json:"primary" doc:"Host whose replica counts now"`
	Running bool        `json:"running" doc:"The VM is not stopped"`
	Sides   []SplitSide `json:"sides" doc:"By host; the one that counts first"`
}

// SplitSide is one host's share.
type SplitSide struct {
	Host       string             `json:"host"`
	Answers    bool               `json:"answers" doc:"Its agent answers; else only the record is known"`
	Counts     bool               `json:"counts" doc:"The VM runs from this side, or will be started from it"`
	Split      bool               `json:"split" doc:"It has data of its own and waits for a person"`
	State      model.ReplicaState `json:"state" doc:"Of its replicas by the record; empty: the record has none"`
	Term       model.Term         `json:"term" doc:"As of which term, by the record"`
	Branch     model.BranchID     `json:"branch" doc:"Line of history, by the record"`
	Disks      []SplitDisk        `json:"disks"`
	Events     []model.Event      `json:"events" doc:"The last ones that this host has seen of the VM"`
	Loses      []string           `json:"loses" doc:"What is lost if this side is discarded, one sentence each"`
	CanDiscard bool               `json:"can_discard"`
	WhyNot     string             `json:"why_not,omitempty"`
}

// SplitDisk is one replica by its own metadata.
type SplitDisk struct {
	Disk       string             `json:"disk"`
	Size       int64              `json:"size" doc:"Bytes"`
	State      model.ReplicaState `json:"state"`
	Line       string             `json:"line" doc:"Line of data: term, branch and run under which it began"`
	Alone      bool               `json:"alone" doc:"It was written without the other side"`
	Since      string             `json:"since,omitempty" doc:"The line of the other side's copy that it was written alone since"`
	AloneBytes int64              `json:"alone_bytes" doc:"At most so much was written here that the other side lacks"`
	Crashed    bool               `json:"crashed" doc:"The guest wrote through it, and its end was not recorded"`
	Discarded  bool               `json:"discarded" doc:"A person gave it up already"`
	Written    time.Time          `json:"written,omitzero" doc:"When its image was changed last"`
	Verdict    string             `json:"verdict,omitempty" doc:"How it compares with the side that counts: row of the table in docs/replication.md"`
	Common     string             `json:"common,omitempty" doc:"The newest line that both have been in"`
	Error      string             `json:"error,omitempty" doc:"Why nothing is known of it"`
}

// ResolveSplitBrain gives one host's replicas up.
type ResolveSplitBrain struct {
	Discard string `json:"discard" doc:"Host whose replicas are given up"`
	Confirm string `json:"confirm" doc:"The VM's name, typed again"`
}

// SplitBrain says what each side holds and what each would lose.
func (c *Client) SplitBrain(ctx context.Context, name string) (SplitBrain, error) {
	if err := CheckName("VM", name); err != nil {
		return SplitBrain{}, err
	}
	return get[SplitBrain](ctx, c, vmPath(name, "split-brain"))
}

// ResolveSplitBrain gives a side up; it is filled from the other afterwards.
func (c *Client) ResolveSplitBrain(ctx context.Context, name string, req ResolveSplitBrain) error {
	if err := CheckName("VM", name); err != nil {
		return err
	}
	return c.do(ctx, http.MethodPost, vmPath(name, "split-brain", "resolve"), req, nil)
}
