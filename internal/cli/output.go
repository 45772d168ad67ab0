package cli

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"unicode/utf8"

	"gopkg.in/yaml.v3"

	"perdure/api"
)

// style is how a piece of text stands out on a terminal.
type style int

const (
	plain style = iota
	good
	warn
	bad
	dim
	bold
)

// paint adds the colour where colours are on.
func (a *app) paint(s style, text string) string {
	if !a.colour || s == plain || text == "" {
		return text
	}
	code := map[style]string{good: "32", warn: "33", bad: "1;31", dim: "2", bold: "1"}[s]
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

// cell is one field of a table.
type cell struct {
	text string
	s    style
}

func text(format string, args ...any) cell {
	if len(args) == 0 {
		return cell{text: format}
	}
	return cell{text: fmt.Sprintf(format, args...)}
}

// table lays rows out in columns; empty fields are shown as "-".
type table struct {
	head []string
	rows [][]cell
}

func (t *table) add(cells ...cell) { t.rows = append(t.rows, cells) }

func (a *app) printTable(t *table) {
	width := make([]int, len(t.head))
	for i, h := range t.head {
		width[i] = utf8.RuneCountInString(h)
	}
	for _, r := range t.rows {
		for i := range r {
			if r[i].text == "" {
				r[i].text = "-"
			}
			width[i] = max(width[i], utf8.RuneCountInString(r[i].text))
		}
	}
	line := func(cells []cell) {
		var b strings.Builder
		for i, c := range cells {
			b.WriteString(a.paint(c.s, c.text))
			if i < len(cells)-1 {
				b.WriteString(strings.Repeat(" ", width[i]-utf8.RuneCountInString(c.text)+2))
			}
		}
		fmt.Fprintln(a.out, strings.TrimRight(b.String(), " "))
	}
	head := make([]cell, len(t.head))
	for i, h := range t.head {
		head[i] = cell{h, dim}
	}
	line(head)
	for _, r := range t.rows {
		line(r)
	}
}

// checkOutput says whether the form asked for with -o exists.
func (a *app) checkOutput() error {
	switch a.output {
	case "table", "wide", "json", "yaml":
		return nil
	}
	return api.Errorf(api.Invalid, "output %q is not known; allowed are table, wide, json and yaml", a.output)
}

// machine reports whether a program reads the output.
func (a *app) machine() bool { return a.output == "json" || a.output == "yaml" }

// printValue writes v as JSON or YAML, with the same names and order of fields.
func (a *app) printValue(v any) error {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(v); err != nil {
		return fmt.Errorf("encode output: %w", err)
	}
	if a.output == "json" {
		_, err := a.out.Write(b.Bytes())
		return err
	}
	return jsonToYAML(a.out, b.Bytes())
}

// jsonToYAML keeps the order of fields: JSON is read as the YAML it also is,
// then written in block style.
func jsonToYAML(w io.Writer, b []byte) error {
	var n yaml.Node
	if err := yaml.Unmarshal(b, &n); err != nil {
		return fmt.Errorf("encode output: %w", err)
	}
	blockStyle(&n)
	enc := yaml.NewEncoder(w)
	enc.SetIndent(2)
	if err := enc.Encode(&n); err != nil {
		return fmt.Errorf("encode output: %w", err)
	}
	return enc.Close()
}

func blockStyle(n *yaml.Node) {
	switch {
	case n.Kind == yaml.ScalarNode && n.Tag == "!!str":
		// Left in quotes unless no reader, however old, takes it for something else.
		switch strings.ToLower(n.Value) {
		case "y", "n", "yes", "no", "on", "off":
		default:
			n.Style = 0
		}
	case len(n.Content) > 0:
		n.Style = 0
	}
	for _, c := range n.Content {
		blockStyle(c)
	}
}

// say writes one line for people; nothing where a program reads the output.
func (a *app) say(format string, args ...any) {
	if !a.machine() {
		fmt.Fprintf(a.out, format+"\n", args...)
	}
}

// note writes one line beside the output.
func (a *app) note(format string, args ...any) {
	fmt.Fprintln(a.err, a.paintErr(dim, fmt.Sprintf(format, args...)))
}

// paintErr is paint for the error stream, which may be a terminal when the output is not.
func (a *app) paintErr(s style, text string) string {
	c := *a
	c.colour = a.colourErr
	return c.paint(s, text)
}
