// Command perdure-guest is the program inside the demo guest: the first process
// of its initramfs, and the services that internal/lab/guestsvc describes.
//
// Kernel command line: perdure.ip=ADDR/BITS (eth0), perdure.ip1=… (eth1), …,
// perdure.gw=ADDR, perdure.tick=0 (no tick lines). It prints PERDURE-GUEST READY
// on the console once all services answer, then one tick a second; lines typed
// at the console are control commands.
//
// Outside a guest, `perdure-guest serve [BASEPORT [DIR…]]` serves the same on
// the loopback interface, for tests of clients.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"perdure/internal/lab/guestsvc"
)

func main() {
	var err error
	switch {
	case os.Getpid() == 1:
		err = runGuest()
		fmt.Println("PERDURE-GUEST FAILED:", err)
		for { // the end of the first process would be a kernel panic that hides the reason
			time.Sleep(time.Hour)
		}
	case len(os.Args) == 3 && os.Args[1] == meterArg:
		err = meterMain(os.Args[2])
	case len(os.Args) == 5 && os.Args[1] == dirtyArg:
		err = dirtyMain(os.Args[2:])
	case len(os.Args) >= 2 && os.Args[1] == "serve":
		err = serveHere(os.Args[2:])
	default:
		err = fmt.Errorf("this is the program inside the demo guest; outside: %s serve [BASEPORT [DIR…]]", os.Args[0])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "perdure-guest:", err)
		os.Exit(1)
	}
}

func serveHere(args []string) error {
	base := 17000
	if len(args) > 0 {
		n, err := strconv.Atoi(args[0])
		if err != nil {
			return fmt.Errorf("parse base port: %w", err)
		}
		base, args = n, args[1:]
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	ls, err := guestsvc.Listen("127.0.0.1", base)
	if err != nil {
		return err
	}
	fmt.Println("serving from port", base)
	s := &guestsvc.Server{Data: args}
	if err := s.Serve(ctx, ls); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// runGuest is the life of the guest; it returns only when it cannot start.
func runGuest() error {
	if err := mountBase(); err != nil {
		return err
	}
	os.Setenv("PATH", "/sbin:/bin")
	loadModules()
	preferTSC()
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return fmt.Errorf("read kernel command line: %w", err)
	}
	params := parseParams(string(cmdline))
	if err := setupNetwork(params); err != nil {
		return fmt.Errorf("set up network: %w", err)
	}
	m := &machine{}
	m.mountDisks()
	s := &guestsvc.Server{Data: m.dirs(), Machine: m}
	m.closeLogs = s.CloseLogs

	ls, err := guestsvc.Listen("", 0)
	if err != nil {
		return err
	}
	// The guest has no end but power-off, so these goroutines have none either.
	go func() { fmt.Println("services ended:", s.Serve(context.Background(), ls)) }()
	go watchPowerButton(m)
	go serveAgentPorts(s)
	console, err := os.OpenFile("/dev/console", os.O_RDWR|unix.O_NOCTTY, 0)
	if err == nil {
		go s.ServeControl(context.Background(), console)
	}
	fmt.Printf("disks: %s\n", m.BootCheck())
	fmt.Println("PERDURE-GUEST READY")
	for n := 1; ; n++ {
		if params["perdure.tick"] != "0" {
			fmt.Printf("tick %d uptime %s\n", n, uptime())
		}
		time.Sleep(time.Second)
	}
}

func parseParams(cmdline string) map[string]string {
	p := map[string]string{}
	for _, f := range strings.Fields(cmdline) {
		k, v, _ := strings.Cut(f, "=")
		p[k] = v
	}
	return p
}

func uptime() string {
	b, _ := os.ReadFile("/proc/uptime")
	up, _, _ := strings.Cut(string(b), " ")
	return up
}

// serveAgentPorts answers on every guest-agent channel that there is.
func serveAgentPorts(s *guestsvc.Server) {
	const dir = "/sys/class/virtio-ports"
	ents, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	for _, e := range ents {
		b, err := os.ReadFile(dir + "/" + e.Name() + "/name")
		if err != nil || strings.TrimSpace(string(b)) != "org.qemu.guest_agent.0" {
			continue
		}
		f, err := os.OpenFile("/dev/"+e.Name(), os.O_RDWR, 0)
		if err != nil {
			fmt.Println("open agent port:", err)
			continue
		}
		go func() {
			for {
				s.ServeAgent(&noEOF{f})
				time.Sleep(time.Second)
			}
		}()
	}
}

// noEOF waits where a virtio port says end of file: nobody is connected to it yet.
type noEOF struct{ f *os.File }

func (r *noEOF) Read(b []byte) (int, error) {
	for {
		n, err := r.f.Read(b)
		if n > 0 || err != nil && err != io.EOF {
			return n, err
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func (r *noEOF) Write(b []byte) (int, error) { return r.f.Write(b) }
