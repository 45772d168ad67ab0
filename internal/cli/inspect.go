package cli

import (
	"fmt"

	"github.com/spf13/cobra"

	"perdure/api"
	"perdure/internal/blockstore"
	"perdure/internal/vfs"
)

func (a *app) inspectCommand() *cobra.Command {
	c := a.group("inspect", "Look into files, offline", "")
	disk := &cobra.Command{Use: "disk FILE", Short: "Show what the files of a replica say", Args: args("FILE"),
		Long: `Shows metadata, activity log, bitmap, checksums and journal of a replica. FILE is
any one of its files, as in STATE-DIR/vms/NAME/disks/disk0.meta; of a file or device that
is an image elsewhere it says whose. Needs no agent and
changes nothing. While the VM runs on this host, what it shows may be out of date.`}
	disk.RunE = func(_ *cobra.Command, args []string) error {
		r, err := blockstore.Inspect(vfs.OS{}, args[0])
		if err != nil {
			if st, ok, serr := blockstore.ProbeStamp(vfs.OS{}, args[0]); serr == nil && ok {
				return api.Errorf(api.Invalid, "%s is the image of disk %s of the VM with the UUID %s, by its stamp of host %s", args[0], st.Disk, st.VM, st.Host).
					WithAction("give the metadata instead, which are in the state directory of that host: vms/NAME/disks/%s.meta", st.Disk)
			}
			return api.Errorf(api.Invalid, "%v", err)
		}
		if a.machine() {
			return a.printValue(r)
		}
		a.printReplica(r)
		return nil
	}
	c.AddCommand(disk)
	return c
}

func (a *app) printReplica(r blockstore.Report) {
	line := func(name, format string, v ...any) { fmt.Fprintf(a.out, "%-14s %s\n", name, fmt.Sprintf(format, v...)) }
	m := r.Meta
	line("Disk", "%s of VM %s, %d bytes", r.Disk, m.VM, m.Size)
	line("Image", "%s, %d bytes", r.Image, r.ImageSize)
	clean := "closed in order"
	if !m.Clean {
		clean = "in use, or its last user died"
	}
	line("State", "%s, %s", m.State, clean)
	line("Metadata", "version %d, sequence %d, term %d, branch %q, run %q", m.Version, m.Sequence, m.Term, m.Branch, m.Run)
	line("Generation", "%s", m.Current)
	if m.Base != "none" {
		line("Written alone", "since %s", m.Base)
	}
	if m.Toward != "none" {
		line("Being filled", "towards %s", m.Toward)
	}
	if r.Log != nil {
		line("Activity log", "%d extents, %d bytes; %d of them only for their checksums", r.Log.Extents, r.Log.Bytes, r.Log.SumsOnly)
	}
	if r.Bitmap != nil {
		line("Peer lacks", "%d chunks, %d bytes", r.Bitmap.Chunks, r.Bitmap.Bytes)
	}
	line("Checksums", "%s", map[string]string{"off": "off", "complete": "of all blocks", "partly": "of what was written since they were turned on"}[r.Checksums])
	line("Journal", "%d epochs to be applied at the next start, %d bytes", r.Journal.Records, r.Journal.Bytes)
	for _, p := range r.Problems {
		line("Problem", "%s", p)
	}
}
