package qemu

import (
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"perdure/internal/model"
)

var update = flag.Bool("update", false, "rewrite the golden files")

const testUUID = "6f0b8c52-6f5a-4c0e-9a3b-1d2e3f405162"

func specFT() model.VMSpec {
	return model.VMSpec{
		Name: "db1", UUID: testUUID, Level: model.LevelFT, VCPUs: 2, Memory: 256 << 20, Machine: "pc-q35-7.2", Accel: TCG,
		Disks: []model.DiskSpec{{ID: "disk0", Size: 1 << 30}, {ID: "disk1", Size: 1 << 30}},
		NICs:  []model.NICSpec{{ID: "net0", Bridge: "br0", MAC: "52:54:00:77:00:10"}, {ID: "net1", Bridge: "br1", MAC: "52:54:00:77:00:11"}},
	}
}

func machineFT() Machine {
	m := FromSpec(specFT())
	m.MemPath, m.QMPPath, m.SerialPath, m.AgentPath = "/s/mem/ram", "/s/qmp.sock", "/s/serial.sock", "/s/agent.sock"
	for i := range m.Disks {
		m.Disks[i].Socket = "/s/" + m.Disks[i].ID + ".sock"
	}
	m.NICs[0].Tap, m.NICs[1].Tap = "pd0123456789a00", "pd0123456789a01"
	m.Sandbox = true
	return m
}

func TestArgsGolden(t *testing.T) {
	cases := map[string]func(*Machine){
		"ft-tcg":         func(m *Machine) { m.Kernel, m.Initrd, m.Append = "/b/vmlinuz", "/b/initrd", "console=ttyS0 quiet" },
		"ca":             func(m *Machine) { m.FT, m.MemPath, m.Locked = false, "", true },
		"ft-tcg-standby": func(m *Machine) { m.Incoming = true },
		"ft-kvm":         func(m *Machine) { m.Accel, m.CPU, m.TSCHz = KVM, "Skylake-Server,-hle", 2_400_000_000 },
		"none-vnc":       func(m *Machine) { m.FT, m.MemPath, m.VNCPath = false, "", "/s/vnc.sock" },
		"none-uefi": func(m *Machine) {
			m.FT, m.MemPath = false, ""
			m.Firmware = &Firmware{Code: "/fw/CODE.fd", Vars: "/s/VARS, odd.fd"}
		},
		"i440fx":  func(m *Machine) { m.Type = "pc-i440fx-7.2" },
		"scratch": func(m *Machine) { m.Private, m.Incoming = true, true },
		"modern":  func(m *Machine) { m.ModernVirtio = true },
		"qemu-10": func(m *Machine) { m.QEMU = Version{10, 0, 2} },
		"smallest": func(m *Machine) {
			*m = Machine{Name: "a", UUID: testUUID, Type: "pc-q35-7.2", Accel: TCG, VCPUs: 1, Memory: 16 << 20, QMPPath: "q"}
		},
	}
	for name, change := range cases {
		t.Run(name, func(t *testing.T) {
			m := machineFT()
			change(&m)
			args, err := Args(m)
			if err != nil {
				t.Fatal(err)
			}
			got := strings.Join(args, "\n") + "\n"
			file := filepath.Join("testdata", name+".args")
			if *update {
				if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("command line differs from %s (go test -update writes it anew):\n%s", file, got)
			}
		})
	}
}

// TestOneMachineAtAllLevels: what a guest can see is the same at every level, so that the level can be changed
// under a running one.
func TestOneMachineAtAllLevels(t *testing.T) {
	seen := func(accel string, level model.Level) string {
		spec := specFT()
		spec.Accel, spec.Level, spec.SteadyTime, spec.TSCHz = accel, level, true, 2_400_000_000
		m := FromSpec(spec)
		m.QMPPath, m.SerialPath, m.AgentPath, m.MemPath = "/s/qmp.sock", "/s/serial.sock", "/s/agent.sock", ""
		if level == model.LevelFT {
			m.MemPath = "/s/mem/ram"
		}
		for i := range m.Disks {
			m.Disks[i].Socket = "/s/nbd.sock"
		}
		for i := range m.NICs {
			m.NICs[i].FD = FirstFile + i
		}
		args, err := Args(m)
		if err != nil {
			t.Fatal(err)
		}
		// What holds the memory is no part of it.
		var out []string
		for i := 0; i < len(args); i += 1 {
			if args[i] == "-overcommit" || args[i] == "-object" && strings.Contains(args[i+1], "id="+RAMBlockID) {
				i++
				continue
			}
			out = append(out, args[i])
		}
		return strings.Join(out, "\n")
	}
	for _, accel := range []string{TCG, KVM} {
		want := seen(accel, model.LevelFT)
		for _, level := range []model.Level{model.LevelNone, model.LevelCA} {
			if got := seen(accel, level); got != want {
				t.Errorf("%s: a guest of level %s finds\n%s\none of level ft\n%s", accel, level, got, want)
			}
		}
	}
	m := machineFT()
	m.Accel, m.FT, m.SteadyTime, m.TSCHz = KVM, false, true, 0
	if _, err := Args(m); err == nil || !strings.Contains(err.Error(), "TSC") {
		t.Error("a steady clock without a frequency:", err)
	}
}

func TestArgsRefuse(t *testing.T) {
	cases := map[string]struct {
		change func(*Machine)
		want   string
	}{
		"name":         {func(m *Machine) { m.Name = "a b" }, "name"},
		"uuid":         {func(m *Machine) { m.UUID = "x" }, "UUID"},
		"unversioned":  {func(m *Machine) { m.Type = "q35" }, "versioned"},
		"accel":        {func(m *Machine) { m.Accel = "xen" }, "neither"},
		"cpu":          {func(m *Machine) { m.CPU = "max -device x" }, "CPU model"},
		"vcpus":        {func(m *Machine) { m.VCPUs = 0 }, "vCPUs"},
		"memory":       {func(m *Machine) { m.Memory = 100<<20 + 4096 }, "multiple"},
		"uefi":         {func(m *Machine) { m.Firmware = &Firmware{} }, "UEFI"},
		"tsc":          {func(m *Machine) { m.Accel = KVM }, "TSC"},
		"qmp":          {func(m *Machine) { m.QMPPath = "" }, "QMP"},
		"path":         {func(m *Machine) { m.SerialPath = strings.Repeat("x", 108) }, "longer"},
		"initrd":       {func(m *Machine) { m.Initrd = "x" }, "kernel"},
		"twice":        {func(m *Machine) { m.Disks[1].ID = "disk0" }, "twice"},
		"id":           {func(m *Machine) { m.NICs[0].ID = "a,b" }, "device id"},
		"tap":          {func(m *Machine) { m.NICs[0].Tap = "" }, "device name"},
		"multicast":    {func(m *Machine) { m.NICs[0].MAC = "01:00:00:00:00:01" }, "unicast"},
		"many NICs":    {func(m *Machine) { m.NICs = make([]NIC, 9) }, "9 NICs"},
		"many disks":   {func(m *Machine) { m.Disks = make([]Disk, 15) }, "15 disks"},
		"disk nowhere": {func(m *Machine) { m.Disks[0].Socket = "" }, "no socket"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			m := machineFT()
			c.change(&m)
			_, err := Args(m)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error is %v, want one about %q", err, c.want)
			}
		})
	}
}

func TestParseVersion(t *testing.T) {
	for s, want := range map[string]Version{"7.2.22": {7, 2, 22}, "10.0.2": {10, 0, 2}, "9.2": {9, 2, 0}, "": {}, "x.y": {}} {
		if got := ParseVersion(s); got != want {
			t.Errorf("%q: %v, want %v", s, got, want)
		}
	}
}
