package cli

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"perdure/api"
	"perdure/internal/model"
)

func (a *app) diskVerifyCommand() *cobra.Command {
	var o verifyFlags
	c := &cobra.Command{Use: "verify VM [DISK]", Short: "Compare the replicas of a running VM's disks, and repair them", ValidArgsFunction: a.completeVMs,
		Args: func(c *cobra.Command, given []string) error {
			if len(given) == 2 {
				return nil
			}
			return args("VM")(c, given)
		},
		RunE: a.call(func(ctx context.Context, cl *api.Client, args []string) error { return a.diskVerify(ctx, cl, args, &o) })}
	c.Long = `Compares the replicas of a VM's disks on both hosts, while the guest runs: each
piece by digest, as of one moment. A block that is wrong on one side is written
anew from the other one, if that is proved right by its checksum; what cannot be
told is left, reported, and named as a problem. Without a second copy each block is
compared with its own checksum. The rate gives way to the guest's requests.

It is done by itself when the last report is older than a week, at 16 MiB/s;
--every changes that for one VM, with --rate for the rate of it.`
	f := c.Flags()
	f.StringVar(&o.rate, "rate", "", "at most so many bytes per second, `SIZE` such as 64M (default 64M)")
	f.BoolVar(&o.wait, "wait", false, "wait for the end; exit code 1 if anything is left that could not be repaired")
	f.BoolVar(&o.report, "report", false, "show the last report and start nothing")
	f.BoolVar(&o.stop, "stop", false, "end the verify that is under way")
	f.StringVar(&o.every, "every", "", "start nothing; do it by itself when the last report is so old: `DURATION` such as 168h, never, or default")
	return c
}

type verifyFlags struct {
	rate, every        string
	wait, report, stop bool
}

func (a *app) diskVerify(ctx context.Context, cl *api.Client, args []string, o *verifyFlags) error {
	req := api.VerifyVM{Stop: o.stop}
	if len(args) > 1 {
		req.Disk = args[1]
	}
	n := 0
	for _, on := range []bool{o.report, o.stop, o.every != ""} {
		if on {
			n++
		}
	}
	switch {
	case n > 1:
		return api.Errorf(api.Invalid, "perdure disk verify: only one of --report, --stop and --every can be given")
	case n == 1 && (o.wait || req.Disk != ""):
		return api.Errorf(api.Invalid, "perdure disk verify: --wait and DISK are for a verify that is started now, not for --report, --stop or --every")
	case o.rate != "" && (o.report || o.stop):
		return api.Errorf(api.Invalid, "perdure disk verify: --rate is of no use with --report or --stop")
	}
	if o.rate != "" {
		var err error
		if req.Rate, err = api.ParseSize(o.rate); err != nil {
			return api.Errorf(api.Invalid, "perdure disk verify: --rate: %w", err)
		}
	}
	if o.every != "" {
		every, err := parseEvery(o.every)
		if err != nil {
			return err
		}
		req.Schedule = &model.VerifySchedule{EverySeconds: every, Rate: req.Rate}
		req.Rate = 0
	}
	if err := req.Validate(); err != nil {
		return err
	}
	if !o.report {
		if err := cl.VerifyVM(ctx, args[0], req); err != nil {
			return err
		}
	}
	if o.wait {
		return a.awaitVerify(ctx, cl, args[0])
	}
	st, err := cl.VerifyStatus(ctx, args[0])
	if err != nil {
		return err
	}
	if a.machine() {
		return a.printValue(st)
	}
	if !o.report && req.Schedule == nil && !o.stop {
		a.say("%s: verifying %s", args[0], against(st.Report))
		a.note("see perdure disk verify %s --report", args[0])
		return nil
	}
	a.printVerify(st)
	return nil
}

// parseEvery reads the value of --every, in the words of model.VerifySchedule.
func parseEvery(s string) (int64, error) {
	switch s {
	case "never":
		return -1, nil
	case "default":
		return 0, nil
	}
	d, err := time.ParseDuration(s)
	if err != nil || d < model.MinVerifyEvery {
		return 0, api.Errorf(api.Invalid, "perdure disk verify: --every %q is not allowed; allowed are a duration of %s or more (such as 168h), never, and default", s, model.MinVerifyEvery)
	}
	return int64(d / time.Second), nil
}

// awaitVerify follows the verify that was just started to its end.
func (a *app) awaitVerify(ctx context.Context, cl *api.Client, name string) error {
	p := a.newProgress()
	defer p.clear()
	var started time.Time
	for {
		st, err := cl.VerifyStatus(ctx, name)
		switch {
		case err != nil && api.ClassOf(err) != api.Unavailable && api.ClassOf(err) != api.Timeout:
			return err
		case err != nil || st.Report == nil: // trouble that may pass
		case st.Report.Started.Before(started): // of an earlier one
			return api.Errorf(api.Unavailable, "VM %s: the verify was lost with the host that made it", name).WithAction("start it again")
		case st.Report.State != model.VerifyRunning:
			p.clear()
			return a.verifyEnded(name, st)
		default:
			started = st.Report.Started
			p.show("verifying "+name, a.verifyProgress(st.Report))
		}
		select {
		case <-time.After(300 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (a *app) verifyEnded(name string, st api.VerifyStatus) error {
	if a.machine() {
		if err := a.printValue(st); err != nil {
			return err
		}
	} else {
		a.printVerify(st)
	}
	_, _, _, _, left := st.Report.Counts()
	switch {
	case left > 0:
		return api.Errorf(api.Internal, "VM %s: %d blocks are wrong and could not be repaired", name, left).WithAction("see where in the report: perdure disk verify %s --report", name)
	case st.Report.State == model.VerifyInterrupted:
		return api.Errorf(api.Unavailable, "VM %s: the verify was interrupted: %s", name, st.Report.Why)
	}
	return nil
}

// verifyProgress is of all disks together.
func (a *app) verifyProgress(r *model.VerifyReport) []model.Progress {
	t := model.Progress{What: "disks", ETASeconds: -1}
	for _, d := range r.Disks {
		t.Done, t.Total = t.Done+d.Checked, t.Total+d.Size
	}
	if sec := a.now().Sub(r.Started).Seconds(); t.Done > 0 && sec > 1 {
		t.Rate = int64(float64(t.Done) / sec)
		t.ETASeconds = float64(t.Total-t.Done) / float64(max(t.Rate, 1))
	}
	return []model.Progress{t}
}

func against(r *model.VerifyReport) string {
	if r == nil || r.Peer == "" {
		return "each block with its own checksum: there is no second copy now"
	}
	return "the replicas on " + r.Host + " and " + r.Peer
}

// printVerify shows a report.
func (a *app) printVerify(st api.VerifyStatus) {
	defer a.printSchedule(st)
	r := st.Report
	if r == nil {
		a.say("%s: its disks were never verified", st.VM)
		return
	}
	if len(r.Disks) == 0 {
		a.say("%s: its disks were never verified", st.VM)
	} else {
		_, bad, repaired, rewritten, left := r.Counts()
		verdict := a.paint(good, "all is well")
		switch {
		case left > 0:
			verdict = a.paint(bad2(left), fmt.Sprintf("%d BLOCKS ARE WRONG AND LEFT", left))
		case bad > 0:
			verdict = a.paint(warn, fmt.Sprintf("%d blocks were wrong: %d repaired, %d written over by the guest", bad, repaired, rewritten))
		}
		switch r.State {
		case model.VerifyRunning:
			verdict = "under way; so far " + verdict
		case model.VerifyInterrupted:
			verdict = a.paint(warn, "interrupted: "+r.Why) + "; until then " + verdict
		}
		a.say("%s: %s", st.VM, verdict)
		when := "started " + r.Started.Local().Format(time.DateTime)
		if !r.Ended.IsZero() {
			when = "ended " + r.Ended.Local().Format(time.DateTime) + " after " + r.Ended.Sub(r.Started).Round(time.Second).String()
		}
		if r.Scheduled {
			when += ", by schedule"
		}
		a.say("%s, %s, at most %s/s", against(r), when, api.FormatSize(r.Rate))
		a.printVerifiedDisks(r)
	}
	if r.Reads.Blocks > 0 {
		a.say("Reads of the guest met %d damaged blocks and had them repaired; the last one %s: %s", r.Reads.Blocks, r.Reads.Last.Local().Format(time.DateTime), r.Reads.Where)
	}
}

// bad2 is the style of a count that should be zero.
func bad2(n int64) style {
	if n == 0 {
		return plain
	}
	return bad
}

func number(n int64) cell { return cell{text: fmt.Sprint(n)} }

func (a *app) printVerifiedDisks(r *model.VerifyReport) {
	t := &table{head: []string{"DISK", "CHECKED", "OF", "WRONG", "REPAIRED", "REWRITTEN", "LEFT"}}
	for _, d := range r.Disks {
		t.add(cell{text: d.Disk}, cell{text: api.FormatSize(d.Checked)}, cell{text: api.FormatSize(d.Size)}, number(d.Mismatches), number(d.Repaired),
			number(d.Rewritten), cell{fmt.Sprint(d.Left), bad2(d.Left)})
	}
	a.printTable(t)
	w := &table{head: []string{"DISK", "OFFSET", "BYTES", "WHAT", "HOST", "WHY"}}
	for _, d := range r.Disks {
		for _, g := range d.Ranges {
			w.add(cell{text: d.Disk}, number(g.Off), number(g.Len), cell{text: g.What}, cell{text: g.Host}, cell{text: g.Why})
		}
	}
	if len(w.rows) > 0 {
		a.printTable(w)
	}
}

func (a *app) printSchedule(st api.VerifyStatus) {
	every := st.Schedule.Every()
	if every == 0 {
		a.say("Not done by itself (--every never).")
		return
	}
	due := ""
	if !st.Due.IsZero() {
		due = ", next after " + st.Due.Local().Format(time.DateTime)
	}
	a.say("Done by itself every %s at %s/s%s.", strings.TrimSuffix(strings.TrimSuffix(every.String(), "0s"), "0m"), api.FormatSize(st.Schedule.RateOr(model.DefaultVerifyRate)), due)
}
