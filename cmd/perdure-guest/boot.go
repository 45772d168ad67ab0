package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func mountBase() error {
	for _, m := range []struct{ fstype, point string }{
		{"devtmpfs", "/dev"}, {"proc", "/proc"}, {"sysfs", "/sys"}, {"tmpfs", "/run"}, {"tmpfs", "/tmp"},
	} {
		if err := os.MkdirAll(m.point, 0o755); err != nil {
			return fmt.Errorf("make %s: %w", m.point, err)
		}
		if err := unix.Mount(m.fstype, m.point, m.fstype, 0, ""); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount %s: %w", m.point, err)
		}
	}
	return nil
}

// loadModules loads what /modules/list names, in that order. A module without
// its device fails; that is no error here.
func loadModules() {
	list, err := os.ReadFile("/modules/list")
	if err != nil {
		fmt.Println("read module list:", err)
		return
	}
	for _, name := range strings.Fields(string(list)) {
		f, err := os.Open(filepath.Join("/modules", name))
		if err == nil {
			err = unix.FinitModule(int(f.Fd()), "", 0)
			f.Close()
		}
		if err != nil && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.EEXIST) {
			fmt.Printf("load module %s: %v\n", name, err)
		}
	}
}

// preferTSC chooses the only clock source that goes on during a checkpoint.
func preferTSC() {
	const dir = "/sys/devices/system/clocksource/clocksource0/"
	have, err := os.ReadFile(dir + "available_clocksource")
	if err != nil || !strings.Contains(string(have), "tsc") {
		return
	}
	if err := os.WriteFile(dir+"current_clocksource", []byte("tsc"), 0); err != nil {
		fmt.Println("choose clock source:", err)
	}
}

func setupNetwork(params map[string]string) error {
	up := func(name string) (netlink.Link, error) {
		var l netlink.Link
		var err error
		for range 50 { // cards appear a moment after their driver
			if l, err = netlink.LinkByName(name); err == nil {
				break
			}
			time.Sleep(50 * time.Millisecond)
		}
		if err != nil {
			return nil, fmt.Errorf("find %s: %w", name, err)
		}
		return l, netlink.LinkSetUp(l)
	}
	if _, err := up("lo"); err != nil {
		return err
	}
	for i := range 8 {
		key := "perdure.ip"
		if i > 0 {
			key = fmt.Sprintf("perdure.ip%d", i)
		}
		cidr, ok := params[key]
		if !ok {
			continue
		}
		l, err := up(fmt.Sprintf("eth%d", i))
		if err != nil {
			return err
		}
		a, err := netlink.ParseAddr(cidr)
		if err != nil {
			return fmt.Errorf("parse %s: %w", key, err)
		}
		if err := netlink.AddrAdd(l, a); err != nil {
			return fmt.Errorf("set address of eth%d: %w", i, err)
		}
	}
	if gw := net.ParseIP(params["perdure.gw"]); gw != nil {
		if err := netlink.RouteAdd(&netlink.Route{Gw: gw}); err != nil {
			return fmt.Errorf("set route: %w", err)
		}
	}
	return nil
}

// keyPower is KEY_POWER of linux/input-event-codes.h.
const keyPower = 116

// watchPowerButton ends the guest in order when the ACPI power button is pressed.
func watchPowerButton(m *machine) {
	devs, _ := filepath.Glob("/dev/input/event*")
	for _, d := range devs {
		f, err := os.Open(d)
		if err != nil {
			continue
		}
		go func() {
			b := make([]byte, 24) // struct input_event: time 16, type 2, code 2, value 4
			for {
				if _, err := f.Read(b); err != nil {
					return
				}
				typ, code, value := binary.LittleEndian.Uint16(b[16:]), binary.LittleEndian.Uint16(b[18:]), binary.LittleEndian.Uint32(b[20:])
				if typ == 1 && code == keyPower && value == 1 {
					fmt.Println("power button pressed")
					if err := m.PowerOff(); err != nil {
						fmt.Println("power off:", err)
					}
				}
			}
		}()
	}
}
