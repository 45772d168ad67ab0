package cli

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"perdure/api"
	"perdure/internal/model"
)

func (a *app) diskCommand() *cobra.Command {
	c := a.group("disk", "Disks of the virtual machines", "")
	c.AddCommand(
		&cobra.Command{Use: "list [VM]", Aliases: []string{"ls"}, Short: "List the disks and the state of their replicas", Args: upToOne("VM"), RunE: a.call(a.diskList), ValidArgsFunction: a.completeVMs},
		&cobra.Command{Use: "show VM DISK", Short: "Show one disk and its replicas", Args: args("VM", "DISK"), RunE: a.call(a.diskShow), ValidArgsFunction: a.completeDisks},
		&cobra.Command{Use: "status [VM]", Short: "Show what is being copied, and what is wrong", Args: upToOne("VM"), RunE: a.call(a.diskStatus), ValidArgsFunction: a.completeVMs},
		a.diskAttachCommand("attach VM"), a.diskDetachCommand("detach VM DISK"), a.diskResizeCommand(), a.diskReplaceCommand(), a.diskVerifyCommand())
	return c
}

// vmDiskCommand holds the same under the words that people look for at the VM.
func (a *app) vmDiskCommand() *cobra.Command {
	c := a.group("disk", "Give a VM disks, and take them away", "")
	c.AddCommand(
		&cobra.Command{Use: "list VM", Aliases: []string{"ls"}, Short: "List the disks of a VM", Args: args("VM"), RunE: a.call(a.diskList), ValidArgsFunction: a.completeVMs},
		a.diskAttachCommand("add VM"), a.diskDetachCommand("remove VM DISK"))
	return c
}

// upToOne allows one argument, and none.
func upToOne(name string) cobra.PositionalArgs {
	return func(c *cobra.Command, given []string) error {
		if len(given) == 0 {
			return nil
		}
		return args(name)(c, given)
	}
}

func disksOf(ctx context.Context, c *api.Client, args []string) ([]api.VMDisk, error) {
	if len(args) == 0 {
		return c.AllDisks(ctx)
	}
	return c.Disks(ctx, args[0])
}

func (a *app) diskList(ctx context.Context, c *api.Client, args []string) error {
	l, err := disksOf(ctx, c, args)
	if err != nil {
		return err
	}
	if a.machine() {
		return a.printValue(l)
	}
	if len(l) == 0 {
		a.say("no disks")
		return nil
	}
	wide := a.output == "wide"
	// Where no replica has a path of its own, nobody is bothered with paths.
	placed := wide || slices.ContainsFunc(l, func(d api.VMDisk) bool { return placesText(d.Places) != "" })
	t := &table{head: []string{"VM", "DISK", "SIZE", "USED"}}
	if wide {
		t.head = append(t.head, "LEVEL", "MODE")
	}
	if t.head = append(t.head, "REPLICAS"); placed {
		t.head = append(t.head, "PATHS")
	}
	if wide {
		t.head = append(t.head, "CHECKSUMS", "SLOT")
	}
	t.head = append(t.head, "PROBLEM")
	for _, d := range l {
		row := []cell{{text: d.VM}, {text: d.ID}, {text: api.FormatSize(d.Size)}, {text: usedText(d)}}
		if wide {
			row = append(row, cell{text: string(d.Level)}, cell{text: string(d.Mode)})
		}
		if row = append(row, replicasCell(d)); placed {
			row = append(row, cell{text: placesText(d.Places)})
		}
		if wide {
			row = append(row, cell{text: checksumsText(d)}, text("%#x", d.Slot))
		}
		t.add(append(row, problemCell(d.Problems))...)
	}
	a.printTable(t)
	return nil
}

// usedText is what the disk occupies where it is used from.
func usedText(d api.VMDisk) string {
	best := int64(-1)
	for _, r := range d.Replicas {
		if r.Exists && (best < 0 || r.Host == d.Primary) {
			best = r.Allocated
		}
	}
	if best < 0 {
		return "?"
	}
	return api.FormatSize(best)
}

// ownState is the state of one disk's replica: that of the record, which speaks of
// all disks of the host, unless the files of this one say less.
func ownState(r api.DiskReplica) (string, style) {
	switch {
	case !r.Answers:
		return string(r.State) + "?", warn
	case !r.Exists && r.Error != "":
		return "unreadable", bad
	case !r.Exists && r.State == "":
		return "none", dim
	case !r.Exists:
		return "missing", bad
	}
	st := r.State
	if r.OwnState == model.Inconsistent || st == "" {
		st = r.OwnState
	}
	switch st {
	case model.UpToDate:
		return string(st), good
	case model.Inconsistent:
		return string(st), bad
	}
	return string(st), warn
}

func replicasCell(d api.VMDisk) cell {
	var parts []string
	worst := good
	for _, r := range d.Replicas {
		s, st := ownState(r)
		parts = append(parts, r.Host+" "+s)
		if st == bad || st == warn && worst == good {
			worst = st
		}
	}
	return cell{strings.Join(parts, ", "), worst}
}

func checksumsText(d api.VMDisk) string {
	var out []string
	for _, r := range d.Replicas {
		if r.Checksums != "" && !slices.Contains(out, r.Checksums) {
			out = append(out, r.Checksums)
		}
	}
	return strings.Join(out, "/")
}

func (a *app) diskShow(ctx context.Context, c *api.Client, args []string) error {
	d, err := c.Disk(ctx, args[0], args[1])
	if err != nil {
		return err
	}
	if a.machine() {
		return a.printValue(d)
	}
	fmt.Fprintf(a.out, "%s of %s: %s, %s\n", d.ID, d.VM, api.FormatSize(d.Size), diskLine(d))
	a.printProblems(d.Problems)
	fmt.Fprintln(a.out)
	f := fields{a: a}
	f.put("VM", fmt.Sprintf("%s · level %s · mode %s", d.VM, d.Level, d.Mode))
	f.put("PCI slot", fmt.Sprintf("%#x", d.Slot))
	f.put("Behind", behindText(d))
	for _, p := range d.Sync {
		f.put("Copying", progressText(p))
	}
	f.put("Verified", verifiedText(d.Verified))
	for _, r := range d.Replicas {
		a.replicaFields(&f, r)
	}
	f.print()
	return nil
}

// diskLine says in a few words how safe the disk is.
func diskLine(d api.VMDisk) string {
	good := 0
	for _, r := range d.Replicas {
		if s, _ := ownState(r); s == string(model.UpToDate) {
			good++
		}
	}
	switch {
	case good == 1:
		return "one good replica"
	case good > 1:
		return fmt.Sprintf("%d good replicas", good)
	}
	return "no replica is known to be good"
}

// verifiedText says what the last verify found; empty: it is not known.
func verifiedText(v *model.VerifiedDisk) string {
	switch {
	case v == nil:
		return ""
	case v.Ended.IsZero():
		return fmt.Sprintf("%s of %s, not to the end", api.FormatSize(v.Checked), api.FormatSize(v.Size))
	}
	s := v.Ended.Local().Format(time.DateTime)
	if v.Mismatches == 0 {
		return s + ": no block was wrong"
	}
	return fmt.Sprintf("%s: %d blocks were wrong, %d repaired, %d written over by the guest, %d left", s, v.Mismatches, v.Repaired, v.Rewritten, v.Left)
}

func behindText(d api.VMDisk) string {
	switch {
	case d.Behind < 0:
		return ""
	case d.Behind == 0:
		return "nothing"
	}
	return api.FormatSize(d.Behind) + " that the other replica may lack"
}

func (a *app) replicaFields(f *fields, r api.DiskReplica) {
	state, st := ownState(r)
	f.put(r.Host, a.paint(st, state)+" · "+r.Role)
	if !r.Answers {
		f.put("  files", "not known: "+r.Error)
		return
	}
	if !r.Exists {
		f.put("  files", r.Error)
		return
	}
	f.put("  data", dataText(r))
	if r.Place != "" && r.Place != r.Path {
		f.put("  place", r.Place+" when it is made anew")
	}
	own := string(r.OwnState) + fmt.Sprintf(" · term %d", r.Term)
	if r.Branch != "" {
		own += " · branch " + string(r.Branch)
	}
	f.put("  metadata", own)
	f.put("  line", r.Line)
	f.put("  checksums", r.Checksums)
	f.put("  log", api.FormatSize(r.ActiveLog)+" in the activity log: compared after a crash")
	f.put("  bitmap", api.FormatSize(r.Missing)+" that the peer lacks")
	if r.JournalLen > 0 {
		f.put("  journal", api.FormatSize(r.JournalLen))
	}
	for _, d := range r.Damage {
		f.put("  damage", a.paint(bad, d))
	}
}

// dataText says where the data of a replica are.
func dataText(r api.DiskReplica) string {
	s := fmt.Sprintf("%s · %s allocated", r.Path, api.FormatSize(r.Allocated))
	if r.Device {
		s = r.Path + " · block device"
	}
	return s
}

func (a *app) diskStatus(ctx context.Context, c *api.Client, args []string) error {
	l, err := disksOf(ctx, c, args)
	if err != nil {
		return err
	}
	if a.machine() {
		return a.printValue(l)
	}
	if len(l) == 0 {
		a.say("no disks")
		return nil
	}
	t := &table{head: []string{"VM", "DISK", "MODE", "REPLICAS"}}
	placed := slices.ContainsFunc(l, func(d api.VMDisk) bool { return placesText(d.Places) != "" })
	if placed {
		t.head = append(t.head, "PATHS")
	}
	t.head = append(t.head, "BEHIND", "COPYING")
	seen := map[string]bool{}
	var problems []model.Problem
	for _, d := range l {
		behind := "?"
		if d.Behind >= 0 {
			behind = api.FormatSize(d.Behind)
		}
		copying := ""
		for _, p := range d.Sync {
			if of, one := strings.CutPrefix(p.What, "disk "); p.What == "memory" || one && of != d.ID {
				continue // another disk's, or none's
			}
			copying = strings.TrimPrefix(copying+"; "+progressText(p), "; ")
		}
		row := []cell{{text: d.VM}, {text: d.ID}, {text: string(d.Mode)}, replicasCell(d)}
		if placed {
			row = append(row, cell{text: placesText(d.Places)})
		}
		t.add(append(row, cell{text: behind}, cell{text: copying})...)
		for _, p := range d.Problems {
			if key := d.VM + p.Code + p.Text; !seen[key] {
				seen[key] = true
				p.Text = d.VM + ": " + p.Text
				problems = append(problems, p)
			}
		}
	}
	a.printTable(t)
	a.printProblems(problems)
	return nil
}

// diskDone follows an operation on disks to its end and shows the disk, or that it is gone.
func (a *app) diskDone(ctx context.Context, cl *api.Client, op api.Operation, noWait bool, vm, what string) error {
	if noWait {
		if a.machine() {
			return a.printValue(op)
		}
		a.say("%s: operation %s on %s", what, op.ID, op.Host)
		return nil
	}
	p := a.newProgress()
	defer p.clear()
	if err := a.follow(ctx, cl, op, p); err != nil {
		return err
	}
	p.clear()
	if a.machine() {
		l, err := cl.Disks(ctx, vm)
		if err != nil {
			return err
		}
		return a.printValue(l)
	}
	a.say("%s", what)
	return a.diskList(ctx, cl, []string{vm})
}

func (a *app) diskAttachCommand(use string) *cobra.Command {
	var req api.AttachDisk
	var image string
	var noWait bool
	c := &cobra.Command{Use: use, Short: "Give a VM another disk, also while it runs", Args: args("VM"), ValidArgsFunction: a.completeVMs}
	c.Long = `Gives a VM another disk: an empty one, one filled from an image (which is copied),
or one that was detached before. A running guest gets it plugged in. A VM with a
second copy runs without it meanwhile, and is protected again by itself.`
	c.Example = "  perdure disk attach web --size 20G\n  perdure disk attach web --image data.qcow2 --id data\n  perdure disk attach web --from disk1-1 --id disk1\n  perdure disk attach web --size 100G --path a:/dev/vg0/web --path b:/srv/fast/web.raw"
	f := c.Flags()
	f.Var(&sizeFlag{&req.Size}, "size", "size, such as 20G (default: that of the image)")
	f.StringVar(&image, "image", "", "`FILE` that it is filled from (qcow2, raw, vmdk)")
	f.StringVar(&req.Format, "format", "", "`FORMAT` of the image: raw, qcow2 or vmdk (default: found out)")
	f.Var(&placeFlag{&req.Paths}, "path", "where the replica on a host shall lie: a file or block device there; may be repeated (default: the state directory; without HOST: the host that runs the VM)")
	f.BoolVar(&req.Overwrite, "overwrite", false, "what the file or device at such a path holds may be lost")
	f.StringVar(&req.From, "from", "", "take up the detached disk `NAME` again")
	f.StringVar(&req.ID, "id", "", "`NAME` of the disk (default: the first free of disk0, disk1, …)")
	f.BoolVar(&noWait, "no-wait", false, "return as soon as the request was accepted")
	c.RunE = a.call(func(ctx context.Context, cl *api.Client, args []string) error {
		if image == "" && req.Size == 0 && req.From == "" {
			return api.Errorf(api.Invalid, "%s: neither --size nor --image nor --from is given", c.CommandPath()).WithAction("give the size of an empty disk, such as --size 20G")
		}
		if image != "" {
			req.Image = &api.File{Path: image}
		}
		probe := req
		if probe.Image != nil {
			probe.Image = &api.File{Path: "/"} // a relative path is made absolute below
		}
		if err := probe.Validate(); err != nil {
			return err
		}
		p := a.newProgress()
		defer p.clear()
		if err := cl.SendImage(ctx, &req, func(file string, done, total int64) {
			p.show("sending "+file, []model.Progress{{Done: done, Total: total, ETASeconds: -1}})
		}); err != nil {
			return err
		}
		p.clear()
		op, err := cl.AttachDisk(ctx, args[0], req)
		if err != nil {
			return err
		}
		if noWait {
			return a.diskDone(ctx, cl, op, noWait, args[0], args[0]+": attaching a disk")
		}
		return a.diskDone(ctx, cl, op, noWait, args[0], args[0]+": disk attached")
	})
	return c
}

// sure asks on a terminal before something that cannot be undone.
func (a *app) sure(ctx context.Context, yes bool, question, otherwise string) error {
	if !a.inTTY || yes {
		return nil
	}
	answer, err := a.ask(ctx, question+" [y/N] ")
	if err != nil {
		return err
	}
	if s := strings.ToLower(answer); s != "y" && s != "yes" {
		return api.Errorf(api.Refused, "not confirmed; %s", otherwise)
	}
	return nil
}

func (a *app) diskDetachCommand(use string) *cobra.Command {
	var req api.DetachDisk
	var noWait, yes bool
	c := &cobra.Command{Use: use, Short: "Take a disk away from a VM, also while it runs", Args: args("VM", "DISK"), ValidArgsFunction: a.completeDisks}
	c.Long = `Takes a disk away. A running guest is asked to let go of it: unmount it there first.
Linux lets go of a mounted disk too, and its file system fails then.
Its data are kept aside on the host that ran the VM, under a name that is printed
and that "disk attach --from" takes; with --delete they are removed.`
	c.Flags().BoolVar(&req.Delete, "delete", false, "remove the data of the disk")
	c.Flags().BoolVar(&noWait, "no-wait", false, "return as soon as the request was accepted")
	c.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	c.RunE = a.call(func(ctx context.Context, cl *api.Client, args []string) error {
		d, err := cl.Disk(ctx, args[0], args[1])
		if err != nil {
			return err
		}
		question := fmt.Sprintf("Take disk %s (%s) away from VM %s? If the guest runs, unmount it there first: a file system that is in use fails.", d.ID, api.FormatSize(d.Size), d.VM)
		if req.Delete {
			question = fmt.Sprintf("Remove disk %s (%s) of VM %s and its data for ever?", d.ID, api.FormatSize(d.Size), d.VM)
		}
		if err := a.sure(ctx, yes, question, "nothing was changed"); err != nil {
			return err
		}
		op, err := cl.DetachDisk(ctx, args[0], args[1], req)
		if err != nil {
			return err
		}
		if noWait {
			return a.diskDone(ctx, cl, op, noWait, args[0], "detaching "+d.ID)
		}
		p := a.newProgress()
		defer p.clear()
		if err := a.follow(ctx, cl, op, p); err != nil {
			return err
		}
		p.clear()
		end, err := cl.Operation(ctx, op.ID, 0)
		if err != nil {
			return fmt.Errorf("read operation %s: %w", op.ID, err)
		}
		if a.machine() {
			return a.printValue(end)
		}
		a.say("%s: disk %s detached%s", d.VM, d.ID, strings.TrimSuffix("; "+end.Text, "; "))
		return nil
	})
	return c
}

func (a *app) diskResizeCommand() *cobra.Command {
	var noWait bool
	c := &cobra.Command{Use: "resize VM DISK SIZE", Short: "Make a disk larger", Args: args("VM", "DISK", "SIZE"), ValidArgsFunction: a.completeDisks}
	c.Long = `Makes a disk larger, on all hosts. SIZE is the new size, such as 40G. A running guest
sees the new size at once; partition and file system are its own affair. A disk is
never made smaller.`
	c.Flags().BoolVar(&noWait, "no-wait", false, "return as soon as the request was accepted")
	c.RunE = a.call(func(ctx context.Context, cl *api.Client, args []string) error {
		size, err := parseSize(args[2])
		if err != nil {
			return api.Errorf(api.Invalid, "%s: %w", c.CommandPath(), err)
		}
		req := api.ResizeDisk{Size: size}
		if err := req.Validate(); err != nil {
			return err
		}
		op, err := cl.ResizeDisk(ctx, args[0], args[1], req)
		if err != nil {
			return err
		}
		return a.diskDone(ctx, cl, op, noWait, args[0], fmt.Sprintf("%s: disk %s has %s now", args[0], args[1], api.FormatSize(size)))
	})
	return c
}

func (a *app) diskReplaceCommand() *cobra.Command {
	var req api.ReplaceDisk
	var noWait, yes bool
	c := &cobra.Command{Use: "replace VM DISK", Short: "Give one host's replica up for a new one, which is then filled", Args: args("VM", "DISK"), ValidArgsFunction: a.completeDisks}
	c.Long = `Gives the replica of a disk on one host up, makes a new one there, and has it filled
from the other host: for a host whose disk failed or was exchanged, or to have the
replica somewhere else. The last good replica is never given up.

PATH is an absolute path on that host, of a file or of a block device (partition,
LVM volume); "default" is the host's state directory. A file is made, in a directory
that exists; a device must be 8 KiB longer than the disk. What holds data, is in use
or belongs to another disk is refused. See docs/disks.md.`
	c.Example = "  perdure disk replace web disk0 --host b\n  perdure disk replace web disk0 --host b --path /dev/vg0/web\n  perdure disk replace web disk0 --host b --path default"
	c.Flags().StringVar(&req.Host, "host", "", "`HOST` whose replica it is (default: the one that does not run the VM)")
	c.Flags().StringVar(&req.Path, "path", "", "`PATH` of the new replica on that host (default: where the old one was to be)")
	c.Flags().BoolVar(&req.Overwrite, "overwrite", false, "what the file or device at PATH holds may be lost")
	c.Flags().BoolVar(&noWait, "no-wait", false, "return as soon as the request was accepted")
	c.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	c.RunE = a.call(func(ctx context.Context, cl *api.Client, args []string) error {
		if c.Flags().Changed("path") && req.Path == "" {
			return api.Errorf(api.Invalid, "--path is empty; allowed are an absolute path and the word default")
		}
		if err := req.Validate(); err != nil {
			return err
		}
		d, err := cl.Disk(ctx, args[0], args[1])
		if err != nil {
			return err
		}
		where := req.Host
		if where == "" {
			where = "the host that does not run the VM"
		}
		question := fmt.Sprintf("Give up the replica of disk %s of VM %s on %s and fill a new one?", d.ID, d.VM, where)
		if err := a.sure(ctx, yes, question, "nothing was changed"); err != nil {
			return err
		}
		op, err := cl.ReplaceDisk(ctx, args[0], args[1], req)
		if err != nil {
			return err
		}
		return a.diskDone(ctx, cl, op, noWait, args[0], fmt.Sprintf("%s: the replica of disk %s was made anew; it is filled by itself", args[0], args[1]))
	})
	return c
}

// completeDisks completes the name of a VM, then that of one of its disks.
func (a *app) completeDisks(cmd *cobra.Command, given []string, word string) ([]string, cobra.ShellCompDirective) {
	if len(given) == 0 {
		return a.completeVMs(cmd, given, word)
	}
	if len(given) > 1 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return a.complete(cmd, nil, func(ctx context.Context, c *api.Client) []string {
		var out []string
		l, _ := c.Disks(ctx, given[0])
		for _, d := range l {
			out = append(out, d.ID)
		}
		return out
	})
}
