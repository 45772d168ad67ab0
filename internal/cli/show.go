package cli

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"perdure/api"
	"perdure/internal/model"
)

// stateCell never says more than is known: an empty or unheard-of state is "unknown".
func stateCell(s model.RunState) cell {
	switch s {
	case model.StateRunning:
		return cell{string(s), good}
	case model.StateStopped:
		return cell{string(s), dim}
	case model.StateStarting, model.StatePaused, model.StateHeld:
		return cell{string(s), warn}
	case model.StateFault:
		return cell{string(s), bad}
	}
	return cell{string(model.StateUnknown), bad}
}

func modeCell(vm *api.VM) cell {
	switch {
	case vm.Mode == model.ModeDuplex:
		return cell{string(vm.Mode), good}
	case vm.Mode == model.ModeSyncing:
		return cell{string(vm.Mode), warn}
	case vm.Mode == model.ModeSimplex && vm.Level.HasSecondary():
		return cell{string(vm.Mode), warn}
	}
	return cell{string(vm.Mode), plain}
}

// problemCell names the worst problem and counts the others.
func problemCell(ps []model.Problem) cell {
	if len(ps) == 0 {
		return cell{}
	}
	ps = byseverity(ps)
	s := warn
	if ps[0].Severity == model.Critical {
		s = bad
	}
	t := ps[0].Code
	if len(ps) > 1 {
		t += fmt.Sprintf(" +%d", len(ps)-1)
	}
	return cell{t, s}
}

func byseverity(ps []model.Problem) []model.Problem {
	ps = slices.Clone(ps)
	slices.SortStableFunc(ps, func(x, y model.Problem) int {
		rank := func(p model.Problem) int {
			if p.Severity == model.Critical {
				return 0
			}
			return 1
		}
		return rank(x) - rank(y)
	})
	return ps
}

func (a *app) printProblems(ps []model.Problem) {
	for _, p := range byseverity(ps) {
		s := warn
		if p.Severity == model.Critical {
			s = bad
		}
		fmt.Fprintf(a.out, "  %s %s\n", a.paint(s, string(p.Severity)+" "+p.Code+":"), p.Text)
		if p.Action != "" {
			fmt.Fprintf(a.out, "    to do: %s\n", p.Action)
		}
	}
}

// fields prints aligned names and values, leaving out empty ones.
type fields struct {
	a    *app
	rows [][2]string
}

func (f *fields) put(name, value string) {
	if value != "" {
		f.rows = append(f.rows, [2]string{name, value})
	}
}

func (f *fields) print() {
	for _, r := range f.rows {
		fmt.Fprintf(f.a.out, "%s %s\n", f.a.paint(dim, fmt.Sprintf("%-13s", r[0])), r[1])
	}
}

func ms(v float64) string {
	switch {
	case v >= 60000:
		return time.Duration(v * float64(time.Millisecond)).Round(time.Second).String()
	case v >= 10000:
		return strconv.FormatFloat(v/1000, 'f', 1, 64) + " s"
	case v >= 100:
		return strconv.FormatFloat(v, 'f', 0, 64) + " ms"
	}
	return strings.TrimSuffix(strconv.FormatFloat(v, 'f', 1, 64), ".0") + " ms"
}

func (a *app) vmList(ctx context.Context, c *api.Client, _ []string) error {
	vms, err := c.VMs(ctx)
	if err != nil {
		return err
	}
	if a.machine() {
		return a.printValue(notNil(vms))
	}
	t := &table{head: []string{"NAME", "LEVEL", "STATE", "MODE", "PRIMARY", "SECONDARY", "PROBLEMS"}}
	wide := a.output == "wide"
	if wide {
		t.head = append(t.head, "TERM", "EPOCH", "VCPUS", "MEMORY", "DISKS", "INTERVAL", "PAUSE P50", "PAUSE P99", "ACCEL")
	}
	for i := range vms {
		vm := &vms[i]
		row := []cell{{text: vm.Name}, {text: string(vm.Level)}, stateCell(vm.State), modeCell(vm), {text: vm.Primary}, {text: vm.Secondary}, problemCell(vm.Problems)}
		if wide {
			row = append(row, text("%d", vm.Term), text("%d", vm.Epoch), text("%d", vm.VCPUs), cell{text: api.FormatSize(vm.Memory)}, text("%d", len(vm.Disks)))
			if vm.Checkpoint.Count > 0 {
				row = append(row, cell{text: ms(vm.Checkpoint.IntervalMS)}, cell{text: ms(vm.Checkpoint.PauseMS.P50)}, cell{text: ms(vm.Checkpoint.PauseMS.P99)})
			} else {
				row = append(row, cell{}, cell{}, cell{})
			}
			row = append(row, cell{text: vm.Accel})
		}
		t.add(row...)
	}
	a.printTable(t)
	return nil
}

// stateLine says in one line how a VM is, the first thing read at three in the morning.
func (a *app) stateLine(vm *api.VM) string {
	name := a.paint(bold, vm.Name) + ": "
	st := stateCell(vm.State)
	word := a.paint(st.s, st.text)
	switch vm.State {
	case model.StateRunning:
		return name + word + " on " + vm.Primary + ", " + a.protection(vm)
	case model.StateStopped:
		return name + word
	case model.StateStarting:
		return name + word + " on " + vm.Primary
	case model.StatePaused:
		return name + word + " by a person, on " + vm.Primary + ", " + a.protection(vm)
	case model.StateHeld:
		return name + word + " on " + vm.Primary + ": the guest stands still until its output may leave again"
	case model.StateFault:
		return name + word + " on " + vm.Primary + ": the guest does not go on by itself"
	}
	s := name + a.paint(bad, "state UNKNOWN")
	if vm.Primary != "" {
		s += ": " + vm.Primary + " should run it and does not answer"
		if !vm.StateAsOf.IsZero() {
			s += " since " + vm.StateAsOf.Local().Format(time.DateTime)
		}
	}
	return s
}

func (a *app) protection(vm *api.VM) string {
	switch {
	case vm.Mode == model.ModeDuplex:
		s := a.paint(good, "protected") + " by " + vm.Secondary
		if vm.Level == model.LevelCA {
			s += " (each write is there too; if " + vm.Primary + " is lost the guest boots there)"
		}
		return s
	case vm.Mode == model.ModeSyncing:
		s := a.paint(warn, "not protected yet") + ": filling " + vm.Secondary
		if p := overall(vm.Sync); p.Total > 0 {
			s += fmt.Sprintf(", %d %%", p.Done*100/p.Total)
			if p.ETASeconds >= 0 {
				s += ", " + eta(p.ETASeconds) + " left"
			}
		}
		return s
	case vm.Level == model.LevelNone:
		return "no protection asked for"
	}
	return a.paint(bad, "NOT PROTECTED") + ": it has no second copy now"
}

// overall adds the parts of a copy up; its ETA is that of the slowest.
func overall(ps []model.Progress) model.Progress {
	var t model.Progress
	for _, p := range ps {
		t.Done += p.Done
		t.Total += p.Total
		if p.ETASeconds < 0 || t.ETASeconds < 0 {
			t.ETASeconds = -1
		} else {
			t.ETASeconds = max(t.ETASeconds, p.ETASeconds)
		}
	}
	return t
}

func eta(s float64) string {
	return time.Duration(s * float64(time.Second)).Round(time.Second).String()
}

func (a *app) vmShow(ctx context.Context, c *api.Client, args []string) error {
	vm, err := c.VM(ctx, args[0])
	if err != nil {
		return err
	}
	if a.machine() {
		return a.printValue(vm)
	}
	a.printVM(&vm)
	return nil
}

func (a *app) printVM(vm *api.VM) {
	fmt.Fprintln(a.out, a.stateLine(vm))
	a.printProblems(vm.Problems)
	fmt.Fprintln(a.out)
	f := fields{a: a}
	f.put("Level", string(vm.Level)+" · mode "+modeCell(vm).text+" · term "+fmt.Sprint(vm.Term)+epochText(vm))
	if c := vm.LevelChange; c != nil && !c.Ended {
		text := "to " + string(c.To)
		if c.Progress.Total > 0 {
			text += ": " + progressText(c.Progress)
		}
		f.put("Changing", text)
	} else if c != nil && c.Error != "" {
		f.put("Level kept", fmt.Sprintf("it was to become %s: %s", c.To, c.Error))
	}
	f.put("Primary", seat(vm.Primary, vm.PrimaryRun))
	f.put("Secondary", seat(vm.Secondary, vm.SecondaryRun))
	if vm.Survivor != "" {
		f.put("Survivor", vm.Survivor+" goes on alone without asking while a voter is missing")
	}
	f.put("Last change", vm.Reason)
	if vm.Wanted != "" && string(vm.Wanted) != string(vm.State) {
		f.put("Wanted", string(vm.Wanted))
	}
	a.checkpointFields(&f, vm)
	for _, l := range vm.Links {
		state := "up, " + ms(l.RTTMS)
		if !l.Up {
			state = a.paint(bad, "DOWN")
		}
		f.put(fmt.Sprintf("A-link %d", l.Index), fmt.Sprintf("%s · sent %s · received %s", state, api.FormatSize(l.Sent), api.FormatSize(l.Recv)))
	}
	for _, p := range vm.Sync {
		label := "Copying"
		if strings.HasPrefix(p.What, "verify ") {
			label = "Verifying"
		}
		f.put(label, strings.TrimPrefix(progressText(p), "verify "))
	}
	for _, d := range vm.Disks {
		f.put(d.ID, api.FormatSize(d.Size)+replicaText(a, d.Replicas))
		f.put("", placesText(d.Places))
	}
	for _, n := range vm.NICs {
		f.put(n.ID, n.Bridge+" · "+n.MAC)
	}
	f.put("Machine", fmt.Sprintf("%d vCPU · %s · %s · %s · %s", vm.VCPUs, api.FormatSize(vm.Memory), vm.Machine, vm.CPU, vm.Accel)+extras(vm))
	if vm.Kernel != "" {
		f.put("Kernel", strings.Join(slices.DeleteFunc([]string{vm.Kernel, vm.Initrd, strconv.Quote(vm.Append)}, func(s string) bool { return s == "" || s == `""` }), " · "))
	}
	if vm.Branch != "" {
		f.put("Branch", string(vm.Branch))
	}
	f.put("UUID", vm.UUID)
	if !vm.Created.IsZero() {
		f.put("Created", vm.Created.Local().Format(time.DateTime))
	}
	f.print()
}

// epochText is empty where there are no epochs.
func epochText(vm *api.VM) string {
	if vm.Level != model.LevelFT {
		return ""
	}
	return " · epoch " + fmt.Sprint(vm.Epoch)
}

func extras(vm *api.VM) (s string) {
	if vm.UEFI {
		s += " · UEFI"
	}
	if vm.VNC {
		s += " · VNC"
	}
	return s
}

func (a *app) checkpointFields(f *fields, vm *api.VM) {
	cp := vm.Checkpoint
	if vm.Mode != model.ModeDuplex || vm.State != model.StateRunning || cp.Count == 0 { // figures of the past mislead
		return
	}
	f.put("Checkpoints", fmt.Sprintf("%d so far, every %s (median / 99 %% of the recent ones:)", cp.Count, ms(cp.IntervalMS)))
	f.put("  pause", fmt.Sprintf("%s / %s", ms(cp.PauseMS.P50), ms(cp.PauseMS.P99)))
	f.put("  held output", fmt.Sprintf("%s / %s", ms(cp.HeldOutputMS.P50), ms(cp.HeldOutputMS.P99)))
	f.put("  dirty pages", fmt.Sprintf("%.0f / %.0f", cp.DirtyPages.P50, cp.DirtyPages.P99))
	f.put("  transferred", fmt.Sprintf("%s / %s", api.FormatSize(int64(cp.TransferBytes.P50)), api.FormatSize(int64(cp.TransferBytes.P99))))
	lost := ms(cp.TimeLostMS)
	if vm.GuestMS > 0 {
		lost += fmt.Sprintf(" (%.1f %% of its time)", 100*cp.TimeLostMS/(cp.TimeLostMS+vm.GuestMS))
	}
	f.put("  time lost", lost)
}

func seat(host string, run model.RunID) string {
	if host == "" {
		return ""
	}
	if run == "" {
		return host + " (no memory yet)"
	}
	return host + " (run " + string(run[:min(8, len(run))]) + ")"
}

func replicaText(a *app, m map[string]model.ReplicaState) string {
	hosts := make([]string, 0, len(m))
	for h := range m {
		hosts = append(hosts, h)
	}
	slices.Sort(hosts)
	s := ""
	for _, h := range hosts {
		st := warn
		switch m[h] {
		case model.UpToDate:
			st = good
		case model.Inconsistent:
			st = bad
		}
		s += " · " + h + " " + a.paint(st, string(m[h]))
	}
	return s
}

func progressText(p model.Progress) string {
	s := p.What
	if p.Total > 0 {
		s += fmt.Sprintf(" %d %% (%s of %s)", p.Done*100/p.Total, api.FormatSize(p.Done), api.FormatSize(p.Total))
	} else {
		s += " " + api.FormatSize(p.Done)
	}
	if p.Rate > 0 && p.Done < p.Total {
		s += ", " + api.FormatSize(p.Rate) + "/s"
	}
	if p.ETASeconds >= 0 && p.Done < p.Total {
		s += ", " + eta(p.ETASeconds) + " left"
	}
	return s
}
