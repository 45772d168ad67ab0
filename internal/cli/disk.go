package cli

import "github.com/spf13/cobra"

func (a *app) diskCommand() *cobra.Command {
	c := a.group("disk", "Disks of the VMs", "")
	c.AddCommand(a.diskVerifyCommand())
	return c
}
