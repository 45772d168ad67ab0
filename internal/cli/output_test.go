package cli

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"perdure/internal/model"
)

func testApp(env map[string]string) (*app, *bytes.Buffer, *bytes.Buffer) {
	var out, errs bytes.Buffer
	a := newApp(Hooks{}, Streams{In: strings.NewReader(""), Out: &out, Err: &errs, Env: func(k string) string { return env[k] }})
	a.output = "table"
	return a, &out, &errs
}

func TestProgressOnATerminal(t *testing.T) {
	a, _, errs := testApp(nil)
	a.errTTY = true
	p := a.newProgress()
	p.show("copying", []model.Progress{{What: "disk0", Done: 1 << 29, Total: 1 << 30, ETASeconds: 61}, {What: "disk1", Done: 1 << 30, Total: 1 << 30, ETASeconds: 0}})
	if got, want := errs.String(), "\r\x1b[Kcopying disk0 [######################--------]  75 % 1.5GiB of 2GiB  1m1s left"; got != want {
		t.Errorf("bar %q, want %q", got, want)
	}
	p.clear()
	if !strings.HasSuffix(errs.String(), "\r\x1b[K") {
		t.Error("the bar stays")
	}
	errs.Reset()
	p.clear()
	if errs.Len() != 0 {
		t.Error("cleared twice")
	}
	// More than there is, nothing known, no time known: shown all the same.
	p.show("x", []model.Progress{{What: "m", Done: 5, Total: 4, ETASeconds: -1}})
	p.show("y", nil)
	if s := errs.String(); !strings.Contains(s, "100 %") || strings.Contains(s, "left") || !strings.HasSuffix(s, "y") {
		t.Errorf("%q", s)
	}
}

func TestProgressWithoutATerminal(t *testing.T) {
	a, _, errs := testApp(nil)
	now := time.Unix(0, 0)
	a.now = func() time.Time { return now }
	p := a.newProgress()
	for i := range 20 {
		p.show("copying", []model.Progress{{What: "disk0", Done: int64(i), Total: 20, ETASeconds: float64(20 - i)}})
		now = now.Add(time.Second)
	}
	if lines := strings.Split(strings.TrimSpace(errs.String()), "\n"); len(lines) != 4 || lines[1] != "copying disk0: 25 % (5B of 20B), 15s left" {
		t.Errorf("lines: %q", lines)
	}
	a.output = "json"
	errs.Reset()
	p.show("else", nil)
	if errs.Len() != 0 {
		t.Errorf("a program is shown progress: %q", errs)
	}
}

func TestColours(t *testing.T) {
	for _, env := range []map[string]string{{"NO_COLOR": "1"}, {"TERM": "dumb"}, {}} {
		if a, _, _ := testApp(env); a.colour || a.paint(bad, "x") != "x" {
			t.Errorf("colours without a terminal, %v", env)
		}
	}
	a, out, _ := testApp(nil)
	a.colour = true
	a.printTable(&table{head: []string{"A", "B"}, rows: [][]cell{{{"é", good}, {"x", bad}}, {{"long", plain}, {"", plain}}}})
	want := "\x1b[2mA\x1b[0m     \x1b[2mB\x1b[0m\n\x1b[32mé\x1b[0m     \x1b[1;31mx\x1b[0m\nlong  -\n"
	if out.String() != want {
		t.Errorf("table %q, want %q", out, want)
	}
}

// What a field holds comes back from YAML as it went in, whatever it looks like.
func TestYAMLKeepsText(t *testing.T) {
	a, out, _ := testApp(nil)
	a.output = "yaml"
	if err := a.printValue(map[string]any{"a": "no", "b": "12", "c": "x: y", "d": "", "e": []string{}, "f": "two\nlines", "g": 1.5}); err != nil {
		t.Fatal(err)
	}
	want := "a: \"no\"\nb: \"12\"\nc: 'x: y'\nd: \"\"\ne: []\nf: |-\n  two\n  lines\ng: 1.5\n"
	if out.String() != want {
		t.Errorf("YAML:\n%s\nwant:\n%s", out, want)
	}
}

// The console leaves out the history that was shown already, and cuts nothing else.
func TestConsoleTail(t *testing.T) {
	a, out, _ := testApp(nil)
	s := &consoleSession{a: a}
	for range 100 {
		if err := s.write([]byte("0123456789abcdef")); err != nil {
			t.Fatal(err)
		}
	}
	if len(s.tail) != tailLen || out.Len() != 1600 {
		t.Errorf("tail of %d bytes after %d", len(s.tail), out.Len())
	}
}

func FuzzDiskFlag(f *testing.F) {
	for _, s := range []string{"a.img", "a,b.img,size=4G", "x,format=raw,size=1M", ",size=1", "a,mac=1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		a, _, _ := testApp(nil)
		c := a.vmCreateCommand()
		if err := c.Flags().Set("image", s); err == nil && s == "" {
			t.Error("an empty file name was taken")
		}
	})
}

func TestProgressText(t *testing.T) {
	for want, p := range map[string]model.Progress{
		"disks 25 % (1MiB of 4MiB), 2MiB/s, 2s left": {What: "disks", Done: 1 << 20, Total: 4 << 20, ETASeconds: 1.5, Rate: 2 << 20},
		"memory 0 % (0B of 4MiB)":                    {What: "memory", Total: 4 << 20, ETASeconds: -1},
		"disks 100 % (4MiB of 4MiB)":                 {What: "disks", Done: 4 << 20, Total: 4 << 20, Rate: 2 << 20},
	} {
		if got := progressText(p); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
