package cli

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"perdure/api"
	"perdure/internal/model"
)

func (a *app) hostCommand() *cobra.Command {
	c := a.group("host", "Hosts of the cluster", "")
	c.AddCommand(
		&cobra.Command{Use: "list", Aliases: []string{"ls"}, Short: "List the hosts and the witness", Args: args(), RunE: a.call(a.hostList)},
		&cobra.Command{Use: "show NAME", Short: "Show one host", Args: args("NAME"), RunE: a.call(a.hostShow), ValidArgsFunction: a.completeHosts},
		a.hostRemoveCommand(),
	)
	return c
}

func (a *app) hostRemoveCommand() *cobra.Command {
	var yes bool
	c := &cobra.Command{Use: "remove NAME", Aliases: []string{"rm"}, Short: "Take a host that does not come back out of the cluster", Args: args("NAME"), ValidArgsFunction: a.completeHosts,
		Long: `Takes a host or the witness that is off for good out of the cluster: it does not
vote any more, its certificate is not accepted any more, and copies on it that
nobody may start from are forgotten. Refused, with the reason, while a VM still
needs the host or the rest would be no majority. Afterwards a new machine may
join under the same name. Asks first on a terminal.`}
	c.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	c.RunE = a.call(func(ctx context.Context, cl *api.Client, given []string) error {
		name := given[0]
		h, err := cl.Host(ctx, name)
		if err != nil {
			return err
		}
		if a.inTTY && !yes {
			answer, err := a.ask(ctx, fmt.Sprintf("Remove %s %s from the cluster for good? [y/N] ", h.Role, name))
			if err != nil {
				return err
			}
			if s := strings.ToLower(answer); s != "y" && s != "yes" {
				return api.Errorf(api.Refused, "not confirmed; nothing was removed")
			}
		}
		if err := cl.RemoveHost(ctx, name); err != nil {
			return err
		}
		a.say("%s: removed", name)
		if a.machine() {
			return nil
		}
		fmt.Fprintf(a.err, "To put another machine in its place:\n")
		if h.Role == api.RoleWitness {
			fmt.Fprintf(a.err, "  1. here:  perdure token create --witness\n  2. there: perdure witness --join TOKEN --name %s --address IP\n", name)
			return nil
		}
		fmt.Fprintf(a.err, "  1. here:  perdure token create\n  2. there: perdure join TOKEN --name %s --address IP%s\n  3. there: perdure agent\nVMs of level ca and ft that lack their second copy are then protected by themselves.\n",
			name, strings.Repeat(" --alink IP", len(h.ALinks)))
		return nil
	})
	return c
}

func hostState(s api.HostState) cell {
	switch s {
	case api.HostAlive:
		return cell{string(s), good}
	case api.HostSilent:
		return cell{string(s), bad}
	}
	return cell{string(api.HostUnknown), warn}
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

func (a *app) hostList(ctx context.Context, c *api.Client, _ []string) error {
	hosts, err := c.Hosts(ctx)
	if err != nil {
		return err
	}
	if a.machine() {
		return a.printValue(notNil(hosts))
	}
	t := &table{head: []string{"NAME", "ROLE", "STATE", "VOTER", "ADDRESS", "ACCEL", "CPUS", "MEMORY FREE", "VMS", "PROBLEMS"}}
	wide := a.output == "wide"
	if wide {
		t.head = append(t.head, "A-LINKS", "QEMU", "VERSION", "STATE DIR")
	}
	for _, h := range hosts {
		voter := yesNo(h.Voter)
		if h.Leader {
			voter = "leader"
		}
		row := []cell{{text: h.Name}, {text: string(h.Role)}, hostState(h.State), {text: voter}, {text: strings.Join(h.Addrs, " ")}}
		if h.Role == api.RoleWitness {
			row = append(row, cell{}, cell{}, cell{}, cell{})
		} else {
			row = append(row, cell{text: h.Accel}, text("%d", h.CPUs),
				text("%s of %s", api.FormatSize(h.MemoryFree), api.FormatSize(h.MemoryTotal)), text("%d", len(h.VMs)))
		}
		row = append(row, problemCell(h.Problems))
		if wide {
			row = append(row, cell{text: alinkText(h.ALinks)}, cell{text: h.QEMU}, cell{text: h.Version}, cell{text: h.StateDir})
		}
		t.add(row...)
	}
	a.printTable(t)
	return nil
}

func alinkText(links []api.ALink) string {
	var l []string
	for _, k := range links {
		s := k.Addr
		if k.Up != nil && !*k.Up {
			s += " (down)"
		} else if k.RTTMS > 0 {
			s += fmt.Sprintf(" (%s)", ms(k.RTTMS))
		}
		l = append(l, s)
	}
	return strings.Join(l, " ")
}

func (a *app) hostShow(ctx context.Context, c *api.Client, args []string) error {
	h, err := c.Host(ctx, args[0])
	if err != nil {
		return err
	}
	if a.machine() {
		return a.printValue(h)
	}
	st := hostState(h.State)
	fmt.Fprintf(a.out, "%s: %s %s", a.paint(bold, h.Name), h.Role, a.paint(st.s, st.text))
	if h.Leader {
		fmt.Fprint(a.out, ", leads the cluster store")
	} else if h.Voter {
		fmt.Fprint(a.out, ", votes")
	}
	fmt.Fprintln(a.out)
	a.printProblems(h.Problems)
	fmt.Fprintln(a.out)
	f := fields{a: a}
	f.put("Address", strings.Join(h.Addrs, ", "))
	f.put("A-links", alinkText(h.ALinks))
	if h.Role != api.RoleWitness {
		f.put("CPUs", strconv.Itoa(h.CPUs))
		f.put("Memory", fmt.Sprintf("%s free of %s", api.FormatSize(h.MemoryFree), api.FormatSize(h.MemoryTotal)))
		f.put("QEMU", strings.TrimSpace(h.QEMU+" "+h.Accel))
		f.put("Level ft", trackingText(h))
		f.put("VMs", strings.Join(h.VMs, ", "))
	}
	f.put("Perdure", h.Version)
	f.put("State dir", h.StateDir)
	f.print()
	return nil
}

// trackingText says whether a host can take part in level ft by its proof.
func trackingText(h api.Host) string {
	switch h.Tracking {
	case api.TrackingPending:
		return "dirty tracking is being proved"
	case api.TrackingProved:
		return "dirty tracking proved: " + h.TrackingText
	case api.TrackingFailed:
		return "refused, dirty tracking failed its proof: " + h.TrackingText
	}
	return ""
}

func (a *app) tokenCommand() *cobra.Command {
	c := a.group("token", "Join tokens", "")
	var witness bool
	var ttl time.Duration
	create := &cobra.Command{Use: "create", Short: "Make a token with which one machine may join", Args: args(),
		Long: `Prints a token for "perdure join" (or, with --witness, "perdure witness --join").
Whoever has it can join until it expires or was used: treat it like a password.`}
	create.Flags().BoolVar(&witness, "witness", false, "for the witness")
	create.Flags().DurationVar(&ttl, "ttl", time.Hour, "how long it is valid, 1s to 720h")
	create.RunE = a.call(func(ctx context.Context, c *api.Client, _ []string) error {
		req := api.CreateToken{Role: api.RoleHost, TTLMS: ttl.Milliseconds()}
		if witness {
			req.Role = api.RoleWitness
		}
		if ttl <= 0 {
			req.TTLMS = -1
		}
		if err := req.Validate(); err != nil {
			return err
		}
		t, err := c.CreateToken(ctx, req)
		if err != nil {
			return err
		}
		if a.machine() {
			return a.printValue(t)
		}
		fmt.Fprintln(a.out, t.Text)
		if a.outTTY {
			a.note("valid until %s", t.Expires.Local().Format(time.DateTime))
		}
		return nil
	})
	c.AddCommand(create)
	return c
}

// statusReport is what perdure status prints for programs.
type statusReport struct {
	Cluster api.Cluster `json:"cluster"`
	Hosts   []api.Host  `json:"hosts"`
	VMs     []api.VM    `json:"vms"`
}

func (a *app) statusCommand() *cobra.Command {
	return &cobra.Command{Use: "status", Short: "The whole cluster at a glance: what is wrong first", Args: args(),
		RunE: a.call(func(ctx context.Context, c *api.Client, _ []string) error {
			var r statusReport
			var err error
			if r.Cluster, err = c.Cluster(ctx); err != nil {
				return err
			}
			if r.Hosts, err = c.Hosts(ctx); err != nil {
				return err
			}
			if r.VMs, err = c.VMs(ctx); err != nil {
				return err
			}
			if a.machine() {
				return a.printValue(r)
			}
			a.printStatus(r)
			return nil
		})}
}

func (a *app) printStatus(r statusReport) {
	cl := r.Cluster
	fmt.Fprintf(a.out, "Cluster %s: ", a.paint(bold, cl.Name))
	alive := 0
	for _, v := range cl.Voters {
		if v.Alive {
			alive++
		}
	}
	if cl.Quorum {
		fmt.Fprintf(a.out, "%s, %d of %d voters answer", a.paint(good, "quorum"), alive, len(cl.Voters))
	} else {
		fmt.Fprint(a.out, a.paint(bad, "NO QUORUM"), fmt.Sprintf(", %d of %d voters answer: nothing can be decided", alive, len(cl.Voters)))
	}
	if cl.Leader != "" {
		fmt.Fprintf(a.out, ", %s leads", cl.Leader)
	}
	fmt.Fprintf(a.out, " (seen from %s)\n", cl.Host)
	a.printProblems(cl.Problems)
	running, protected, ft := 0, 0, 0
	for _, vm := range r.VMs {
		if vm.State == model.StateRunning {
			running++
		}
		if vm.Level.HasSecondary() && vm.Mode != model.ModeStopped {
			ft++
			if vm.Mode == model.ModeDuplex && vm.State == model.StateRunning {
				protected++
			}
		}
	}
	fmt.Fprintf(a.out, "VMs: %d of %d running, %d of %d that ask for protection have it\n", running, len(r.VMs), protected, ft)
	for _, h := range r.Hosts {
		if h.State == api.HostAlive && len(h.Problems) == 0 {
			continue
		}
		st := hostState(h.State)
		fmt.Fprintf(a.out, "%s %s: %s\n", h.Role, h.Name, a.paint(st.s, st.text))
		a.printProblems(h.Problems)
	}
	for i := range r.VMs {
		if len(r.VMs[i].Problems) == 0 && r.VMs[i].State != model.StateUnknown {
			continue
		}
		fmt.Fprintf(a.out, "VM %s\n", a.stateLine(&r.VMs[i]))
		a.printProblems(r.VMs[i].Problems)
	}
}

func notNil[T any](l []T) []T {
	if l == nil {
		return []T{}
	}
	return l
}

// completeHosts and completeVMs offer names to the shell's completion; a silent
// agent must not make the shell wait.
func (a *app) completeHosts(cmd *cobra.Command, given []string, _ string) ([]string, cobra.ShellCompDirective) {
	return a.complete(cmd, given, func(ctx context.Context, c *api.Client) (names []string) {
		hosts, _ := c.Hosts(ctx)
		for _, h := range hosts {
			names = append(names, h.Name)
		}
		return names
	})
}

func (a *app) completeVMs(cmd *cobra.Command, given []string, _ string) ([]string, cobra.ShellCompDirective) {
	return a.complete(cmd, given, func(ctx context.Context, c *api.Client) (names []string) {
		vms, _ := c.VMs(ctx)
		for _, v := range vms {
			names = append(names, v.Name+"\t"+string(v.State))
		}
		return names
	})
}

func (a *app) complete(cmd *cobra.Command, given []string, f func(context.Context, *api.Client) []string) ([]string, cobra.ShellCompDirective) {
	if len(given) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	c, err := a.client()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), 2*time.Second)
	defer cancel()
	return f(ctx, c), cobra.ShellCompDirectiveNoFileComp
}
