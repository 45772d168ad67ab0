package cli

import (
	"time"

	"github.com/spf13/cobra"

	"perdure/internal/config"
	"perdure/internal/doctor"
)

func (a *app) doctorCommand() *cobra.Command {
	var o DoctorOptions
	var timeout time.Duration
	c := &cobra.Command{Use: "doctor", Short: "Check whether this host can do what Perdure needs", Args: args(),
		Long: `Checks this host, with a line for each check: ok, warning or failed, and what to
do. Needs root for most of it, and no running agent. Ends with exit code 1 when
any check failed.`}
	f := c.Flags()
	f.StringVar(&o.StateDir, "state-dir", config.DefaultStateDir, "state `DIR`, whose disk is measured")
	f.StringArrayVar(&o.Peers, "peer", nil, "another host on an A-link, `IP[:PORT]`; may be repeated")
	f.StringVar(&o.QEMU, "qemu", config.Default().QEMU, "QEMU program, `PATH`")
	f.BoolVar(&o.Quick, "quick", false, "leave out what takes longer than some seconds")
	f.DurationVar(&timeout, "timeout", 2*time.Minute, "bound of each check")
	c.RunE = func(cmd *cobra.Command, _ []string) error {
		checks := doctor.HostChecks(doctor.HostOptions{StateDir: o.StateDir, Peers: o.Peers})
		if a.Checks != nil {
			checks = append(checks, a.Checks(o)...)
		}
		p := a.newProgress()
		report := doctor.Run(cmd.Context(), checks, doctor.RunOptions{Timeout: timeout, Before: func(name string) {
			if a.errTTY {
				p.show(name, nil)
			}
		}, After: func(r doctor.Result) {
			p.clear()
			if !a.machine() {
				a.printResult(r)
			}
		}})
		p.clear()
		if err := cmd.Context().Err(); err != nil {
			return err
		}
		if a.machine() {
			if err := a.printValue(report); err != nil {
				return err
			}
		} else {
			a.say("%s", report.Summary())
		}
		if report.Failed > 0 {
			return exitCode(1)
		}
		return nil
	}
	return c
}

func (a *app) printResult(r doctor.Result) {
	s := map[doctor.Level]style{doctor.OK: good, doctor.Warning: warn, doctor.Failed: bad}[r.Level]
	pad := func(t string, n int) string {
		for len(t) < n {
			t += " "
		}
		return t
	}
	a.say("%s %s %s", a.paint(s, pad(string(r.Level), 8)), pad(r.Name, 18), r.Text)
	if r.Action != "" && r.Level != doctor.OK {
		a.say("%s to do: %s", pad("", 27), r.Action)
	}
}
