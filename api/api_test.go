package api_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"perdure/api"
	"perdure/internal/model"
)

func TestParseSize(t *testing.T) {
	for in, want := range map[string]int64{"0": 0, "65536": 65536, "512M": 512 << 20, "512m": 512 << 20, "4G": 4 << 30, "4GB": 4 << 30, "1.5GiB": 3 << 29,
		"1.5 GiB": 3 << 29, "2t": 2 << 40, "7K": 7 << 10, "10B": 10, "0.5K": 512, " 1G ": 1 << 30} {
		if got, err := api.ParseSize(in); err != nil || got != want {
			t.Errorf("ParseSize(%q) = %d, %v; want %d", in, got, err, want)
		}
	}
	for in, why := range map[string]string{"": "empty", "G": "not a number", "4X": "unit", "-1G": "negative", "1.0001K": "whole", "9999999T": "too large", "1e3": "unit",
		"1_000": "not a number", "0x10": "not a number", "4 G B": "unit", "99999999999999999999": "too large", "NaN": "unit", "infG": "unit"} {
		got, err := api.ParseSize(in)
		if err == nil || api.ClassOf(err) != api.Invalid {
			t.Errorf("ParseSize(%q) = %d, %v; want it refused (%s)", in, got, err, why)
		} else if !strings.Contains(err.Error(), fmt.Sprintf("%q", in)) {
			t.Errorf("ParseSize(%q): the error does not name it: %v", in, err)
		}
	}
}

func FuzzParseSize(f *testing.F) {
	for _, s := range []string{"512M", "1.5GiB", "", "-1", "1e9G"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := api.ParseSize(s)
		if err == nil && n < 0 {
			t.Errorf("ParseSize(%q) = %d", s, n)
		}
		if err == nil {
			api.FormatSize(n)
		}
	})
}

func TestFormatSize(t *testing.T) {
	for n, want := range map[int64]string{0: "0B", 1000: "1000B", 4096: "4KiB", 512 << 20: "512MiB", 3 << 29: "1.5GiB", 2 << 40: "2TiB"} {
		if got := api.FormatSize(n); got != want {
			t.Errorf("FormatSize(%d) = %s, want %s", n, got, want)
		}
	}
}

func TestConditions(t *testing.T) {
	vm := &api.VM{State: model.StateRunning, Mode: model.ModeDuplex, Level: model.LevelFT, Primary: "a", Secondary: "b", Problems: []model.Problem{{Code: "link-down"}}}
	for s, want := range map[string]bool{"running": true, "stopped": false, "duplex": true, "state=running": true, "state=running|paused": true, "state!=running": false,
		"mode=duplex,primary=a": true, "mode=duplex,primary=b": false, "primary!=a": false, "problem=none": false, "problem=link-down": true, "problem!=link-down": false,
		"absent": false, "level=ft": true, "secondary=b": true, "starting": false} {
		c, err := api.ParseCondition(s)
		if err != nil {
			t.Errorf("ParseCondition(%q): %v", s, err)
			continue
		}
		if c.Holds(vm) != want {
			t.Errorf("%q holds: %v", s, !want)
		}
		if c.Holds(nil) != (s == "absent" || s == "state!=running") {
			t.Errorf("%q holds for no VM: %v", s, c.Holds(nil))
		}
	}
	for _, s := range []string{"", "flying", "state=flying", "colour=red", "state", "mode=duplex,", "=x"} {
		if _, err := api.ParseCondition(s); api.ClassOf(err) != api.Invalid {
			t.Errorf("ParseCondition(%q): %v", s, err)
		}
	}
}

func TestValidate(t *testing.T) {
	base := func(change func(*api.CreateVM)) *api.CreateVM {
		r := &api.CreateVM{Name: "web"}
		change(r)
		return r
	}
	if err := base(func(*api.CreateVM) {}).Validate(); err != nil {
		t.Errorf("the smallest request: %v", err)
	}
	img := &api.File{Path: "/x"}
	for says, r := range map[string]*api.CreateVM{
		"name is empty":               base(func(r *api.CreateVM) { r.Name = "" }),
		`"Web"`:                       base(func(r *api.CreateVM) { r.Name = "Web" }),
		`"a b"`:                       base(func(r *api.CreateVM) { r.Name = "a b" }),
		`"../etc"`:                    base(func(r *api.CreateVM) { r.Name = "../etc" }),
		`"-x"`:                        base(func(r *api.CreateVM) { r.Name = "-x" }),
		"has 41 characters":           base(func(r *api.CreateVM) { r.Name = strings.Repeat("a", 41) }),
		`level "ha" is not available`: base(func(r *api.CreateVM) { r.Level = "ha" }),
		`level "x" is not known`:      base(func(r *api.CreateVM) { r.Level = "x" }),
		"vcpus -1":                    base(func(r *api.CreateVM) { r.VCPUs = -1 }),
		"vcpus 65":                    base(func(r *api.CreateVM) { r.VCPUs = 65 }),
		"memory 1MiB":                 base(func(r *api.CreateVM) { r.Memory = 1 << 20 }),
		"not a multiple of 2MiB":      base(func(r *api.CreateVM) { r.Memory = 33 << 20 }),
		"disk 0: size 0B":             base(func(r *api.CreateVM) { r.Disks = []api.CreateDisk{{}} }),
		"multiple of 4096":            base(func(r *api.CreateVM) { r.Disks = []api.CreateDisk{{Size: 1<<20 + 1}} }),
		`format "iso"`:                base(func(r *api.CreateVM) { r.Disks = []api.CreateDisk{{Image: img, Format: "iso"}} }),
		"is not absolute":             base(func(r *api.CreateVM) { r.Disks = []api.CreateDisk{{Image: &api.File{Path: "x"}}} }),
		"neither a path":              base(func(r *api.CreateVM) { r.Disks = []api.CreateDisk{{Image: &api.File{}}} }),
		`bridge ""`:                   base(func(r *api.CreateVM) { r.NICs = []api.CreateNIC{{}} }),
		`bridge "a/b"`:                base(func(r *api.CreateVM) { r.NICs = []api.CreateNIC{{Bridge: "a/b"}} }),
		`mac "zz"`:                    base(func(r *api.CreateVM) { r.NICs = []api.CreateNIC{{Bridge: "br0", MAC: "zz"}} }),
		"group address":               base(func(r *api.CreateVM) { r.NICs = []api.CreateNIC{{Bridge: "br0", MAC: "01:00:5e:00:00:01"}} }),
		"of network card 0 too": base(func(r *api.CreateVM) {
			r.NICs = []api.CreateNIC{{Bridge: "br0", MAC: "52:54:00:00:00:01"}, {Bridge: "br0", MAC: "52:54:00:00:00:01"}}
		}),
		"an initrd is given":           base(func(r *api.CreateVM) { r.Initrd = img }),
		"command line is given":        base(func(r *api.CreateVM) { r.Append = "x" }),
		"exclude each other":           base(func(r *api.CreateVM) { r.Kernel, r.UEFI = img, true }),
		`cpu "host;rm"`:                base(func(r *api.CreateVM) { r.CPU = "host;rm" }),
		"max_overhead_percent 91":      base(func(r *api.CreateVM) { r.FT.MaxOverheadPercent = 91 }),
		"min_interval_ms 500 is above": base(func(r *api.CreateVM) { r.FT.MinIntervalMS = 500 }),
		"17 disks":                     base(func(r *api.CreateVM) { r.Disks = make([]api.CreateDisk, 17) }),
		"host name":                    base(func(r *api.CreateVM) { r.Host = "A B" }),
	} {
		err := r.Validate()
		if api.ClassOf(err) != api.Invalid || err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: got %v", says, err)
		}
	}
}

func TestErrorClasses(t *testing.T) {
	seen := map[api.Class]bool{}
	for _, c := range api.Classes() {
		if seen[c.Class] || c.Exit == 0 || c.Status < 400 || c.Meaning == "" {
			t.Errorf("row %+v", c)
		}
		seen[c.Class] = true
		// An error survives the way over the wire.
		err := fmt.Errorf("start web: %w", api.Errorf(c.Class, "no %w", errors.New("room")).WithAction("make %s", "room"))
		p := api.ProblemOf(err)
		back := p.Err()
		if back.Class != c.Class || back.Message != "start web: no room" || back.Action != "make room" || p.Status != c.Status {
			t.Errorf("%s came back as %+v", c.Class, back)
		}
		// Without the class, the status says the kind of it.
		p.Class = ""
		if got := p.Err().Class.Info().Exit; got != c.Exit && c.Class != api.Refused {
			t.Errorf("%s by its status alone: exit %d", c.Class, got)
		}
	}
	if api.ClassOf(errors.New("x")) != api.Internal || api.Class("nonsense").Info().Exit != 1 {
		t.Error("unknown errors are not internal")
	}
}

// Invariant: nothing is called running because a record says so.
func TestFromRecordNeverSaysRunning(t *testing.T) {
	for _, m := range []model.Mode{model.ModeStopped, model.ModeStarting, model.ModeSimplex, model.ModeSyncing, model.ModeDuplex, ""} {
		vm := api.FromRecord(model.VMSpec{Name: "x"}, model.Record{Mode: m, Wanted: model.WantRunning})
		want := model.StateUnknown
		if m == model.ModeStopped {
			want = model.StateStopped
		}
		if vm.State != want {
			t.Errorf("mode %q shows state %q", m, vm.State)
		}
	}
}
