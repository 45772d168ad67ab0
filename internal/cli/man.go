package cli

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"perdure/api"
)

func (a *app) manCommand() *cobra.Command {
	var markdown bool
	c := &cobra.Command{Use: "man DIR", Short: "Write the manual pages", Hidden: true, Args: args("DIR")}
	c.Flags().BoolVar(&markdown, "markdown", false, "write one page in Markdown (cli.md) instead")
	c.RunE = func(cmd *cobra.Command, given []string) error {
		if markdown {
			return writeFile(filepath.Join(given[0], "cli.md"), func(w io.Writer) error { return Markdown(w, cmd.Root()) })
		}
		return eachCommand(cmd.Root(), func(c *cobra.Command) error {
			name := strings.ReplaceAll(c.CommandPath(), " ", "-") + ".1"
			return writeFile(filepath.Join(given[0], name), func(w io.Writer) error { return manPage(w, c, a.Version) })
		})
	}
	return c
}

func writeFile(path string, f func(io.Writer) error) error {
	out, err := os.Create(path)
	if err != nil {
		return api.Errorf(api.Invalid, "write page: %w", err)
	}
	if err := f(out); err != nil {
		out.Close()
		return fmt.Errorf("write %s: %w", path, err)
	}
	if err := out.Close(); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

// eachCommand visits what a person sees, in order.
func eachCommand(c *cobra.Command, f func(*cobra.Command) error) error {
	if c.Hidden || c.Name() == "help" || c.Name() == "completion" {
		return nil
	}
	if err := f(c); err != nil {
		return err
	}
	for _, s := range c.Commands() {
		if err := eachCommand(s, f); err != nil {
			return err
		}
	}
	return nil
}

// flagLines returns the flags of a command as name and text.
func flagLines(fs *pflag.FlagSet) [][2]string {
	var l [][2]string
	fs.VisitAll(func(f *pflag.Flag) {
		if f.Hidden || f.Name == "help" {
			return
		}
		name := "--" + f.Name
		if f.Shorthand != "" {
			name = "-" + f.Shorthand + ", " + name
		}
		kind, usage := pflag.UnquoteUsage(f)
		if kind != "" {
			name += " " + kind
		}
		zero := f.DefValue == "" || f.DefValue == "false" || f.DefValue == "0" || f.DefValue == "0s" || f.DefValue == "[]"
		if !zero && !strings.Contains(usage, "(default") {
			usage += " (default " + f.DefValue + ")"
		}
		l = append(l, [2]string{name, usage})
	})
	return l
}

// Markdown writes the reference of all commands as one page.
func Markdown(w io.Writer, root *cobra.Command) error {
	var b strings.Builder
	b.WriteString("# Command line\n\n<!-- Made from the commands themselves: perdure man --markdown docs. A test compares. -->\n\n")
	err := eachCommand(root, func(c *cobra.Command) error {
		if c != root {
			fmt.Fprintf(&b, "## %s\n\n", c.CommandPath())
		}
		text := c.Long
		if text == "" {
			text = c.Short + "."
		}
		if strings.Contains(text, "\n    ") {
			text = "```\n" + text + "\n```"
		}
		fmt.Fprintf(&b, "%s\n\n", text)
		if c.Runnable() && !c.HasSubCommands() {
			fmt.Fprintf(&b, "```\n%s\n```\n\n", c.UseLine())
		}
		if c.Example != "" {
			fmt.Fprintf(&b, "Examples:\n\n```\n%s\n```\n\n", strings.ReplaceAll("\n"+c.Example, "\n  ", "\n")[1:])
		}
		flags := c.LocalFlags()
		if c == root {
			flags = c.PersistentFlags()
			b.WriteString("Flags of every command that asks an agent:\n\n")
		}
		if l := flagLines(flags); len(l) > 0 {
			b.WriteString("| flag | |\n|---|---|\n")
			for _, f := range l {
				fmt.Fprintf(&b, "| `%s` | %s |\n", strings.ReplaceAll(f[0], "|", "\\|"), strings.ReplaceAll(f[1], "|", "\\|"))
			}
			b.WriteString("\n")
		}
		return nil
	})
	if err != nil {
		return err
	}
	_, err = io.WriteString(w, strings.TrimRight(b.String(), "\n")+"\n")
	return err
}

// manPage writes one command in man(7) form.
func manPage(w io.Writer, c *cobra.Command, version string) error {
	esc := func(s string) string {
		s = strings.NewReplacer(`\`, `\e`, `-`, `\-`).Replace(s)
		lines := strings.Split(s, "\n")
		for i, l := range lines {
			if strings.HasPrefix(l, ".") || strings.HasPrefix(l, "'") {
				lines[i] = `\&` + l
			}
		}
		return strings.Join(lines, "\n")
	}
	var b strings.Builder
	name := strings.ReplaceAll(c.CommandPath(), " ", "-")
	fmt.Fprintf(&b, ".TH %q 1 \"\" %q \"Perdure\"\n.SH NAME\n%s \\- %s\n", strings.ToUpper(name), "perdure "+version, esc(name), esc(c.Short))
	fmt.Fprintf(&b, ".SH SYNOPSIS\n.nf\n%s\n.fi\n", esc(c.UseLine()))
	if c.Long != "" {
		fmt.Fprintf(&b, ".SH DESCRIPTION\n.nf\n%s\n.fi\n", esc(c.Long))
	}
	for _, part := range []struct {
		title string
		fs    *pflag.FlagSet
	}{{"OPTIONS", c.LocalFlags()}, {"GLOBAL OPTIONS", c.InheritedFlags()}} {
		if l := flagLines(part.fs); len(l) > 0 {
			fmt.Fprintf(&b, ".SH %s\n", part.title)
			for _, f := range l {
				fmt.Fprintf(&b, ".TP\n.B %s\n%s\n", esc(f[0]), esc(f[1]))
			}
		}
	}
	if c.Example != "" {
		fmt.Fprintf(&b, ".SH EXAMPLES\n.nf\n%s\n.fi\n", esc(c.Example))
	}
	var see []string
	for _, s := range c.Commands() {
		if !s.Hidden && s.Name() != "help" && s.Name() != "completion" {
			see = append(see, esc(name+"-"+s.Name())+"(1)")
		}
	}
	if c.HasParent() {
		see = append(see, esc(strings.ReplaceAll(c.Parent().CommandPath(), " ", "-"))+"(1)")
	}
	if len(see) > 0 {
		fmt.Fprintf(&b, ".SH SEE ALSO\n%s\n", strings.Join(see, ", "))
	}
	_, err := io.WriteString(w, b.String())
	return err
}
