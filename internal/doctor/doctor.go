// Package doctor runs checks of a host and collects what they found: for each
// one line that says ok, warning or failed, and what to do. It holds the checks
// that need nothing but the kernel (limits, memory, disk, clock, features,
// links); those of QEMU, the accelerator, FUSE's behaviour and dirty tracking
// are given by the assembly as functions.
//
// Run carries the checks out one after the other, in order, each bounded in
// time; a check that panics or does not end counts as failed, and the others
// go on. Checks write only below the directory they are given and remove what
// they wrote. A report says how the host is at that moment, under the load of
// that moment; it is no promise.
package doctor

import (
	"context"
	"fmt"
	"time"
)

// Level says how a check ended.
type Level string

// The levels.
const (
	OK      Level = "ok"
	Warning Level = "warning" // works, but worse or less safely than it could
	Failed  Level = "failed"  // something that Perdure needs is missing
)

// Result of one check.
type Result struct {
	Name   string  `json:"name"`
	Level  Level   `json:"level"`
	Text   string  `json:"text"`             // what was found, with figures
	Action string  `json:"action,omitempty"` // what to do; empty where there is nothing to do
	TookMS float64 `json:"took_ms"`          // filled in by Run
}

// Check is one thing to look at. Run is called with a context that ends at the
// check's time limit; the result's Name may be left empty.
type Check struct {
	Name string
	Run  func(context.Context) Result
}

// RunOptions of Run.
type RunOptions struct {
	Timeout time.Duration // bound of each check; 0: two minutes
	Before  func(name string)
	After   func(Result)
}

// Report is what all checks found.
type Report struct {
	Checks   []Result `json:"checks"`
	OK       int      `json:"ok"`
	Warnings int      `json:"warnings"`
	Failed   int      `json:"failed"`
}

// Run carries out the checks in order. It stops early when the context ends.
func Run(ctx context.Context, checks []Check, o RunOptions) Report {
	if o.Timeout == 0 {
		o.Timeout = 2 * time.Minute
	}
	r := Report{Checks: []Result{}}
	for _, c := range checks {
		if ctx.Err() != nil {
			break
		}
		if o.Before != nil {
			o.Before(c.Name)
		}
		res := runOne(ctx, c, o.Timeout)
		if ctx.Err() != nil {
			break
		}
		switch res.Level {
		case OK:
			r.OK++
		case Warning:
			r.Warnings++
		default:
			r.Failed++
		}
		r.Checks = append(r.Checks, res)
		if o.After != nil {
			o.After(res)
		}
	}
	return r
}

// runOne bounds one check. A check that ignores its context is left behind:
// its goroutine ends whenever the check does.
func runOne(ctx context.Context, c Check, timeout time.Duration) Result {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	start := time.Now()
	done := make(chan Result, 1)
	go func() {
		defer func() {
			if p := recover(); p != nil {
				done <- Result{Level: Failed, Text: fmt.Sprintf("the check itself broke: %v", p), Action: "report this as a defect"}
			}
		}()
		done <- c.Run(ctx)
	}()
	var res Result
	select {
	case res = <-done:
	case <-ctx.Done():
		// A check that honours its context has the better words.
		select {
		case res = <-done:
		case <-time.After(time.Second):
			res = Result{Level: Failed, Text: fmt.Sprintf("no result within %s", timeout), Action: "look for a device or file system that hangs"}
		}
	}
	if res.Name == "" {
		res.Name = c.Name
	}
	res.TookMS = float64(time.Since(start).Microseconds()) / 1000
	return res
}

// Summary says the report in one line.
func (r Report) Summary() string {
	switch {
	case r.Failed > 0:
		return fmt.Sprintf("%d ok, %d warnings, %d FAILED: this host is not fit as it is", r.OK, r.Warnings, r.Failed)
	case r.Warnings > 0:
		return fmt.Sprintf("%d ok, %d warnings", r.OK, r.Warnings)
	}
	return fmt.Sprintf("%d ok", r.OK)
}

func ok(format string, args ...any) Result {
	return Result{Level: OK, Text: fmt.Sprintf(format, args...)}
}

func warning(text, action string) Result { return Result{Level: Warning, Text: text, Action: action} }

func failed(text, action string) Result { return Result{Level: Failed, Text: text, Action: action} }
