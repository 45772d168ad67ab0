package guestsvc

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const help = `commands, one a line; each answer ends with a line "OK …" or "ERR …":
  clock               realtime and monotonic clock, nanoseconds
  boot                boot id, uptime, clock source, what the file system check at boot said
  meter [on|off]      CPU work done by a process of lowest priority
  dirty MBS S [MB]    dirty memory at MBS MB/s (0: as fast as possible) for S seconds in a buffer of MB MB; dirty stop
  bulk S              a stream of 64-bit little-endian numbers 0, 1, 2, … for S seconds, then the connection ends
  fsyncbench N        N appends of 4 KiB, each fsync-ed: per second, median and worst milliseconds
  sum [0|1]           digest and number of lines of a disk's log
  fsck [0|1]          check a disk's file system (it is away for that moment)
  sh COMMAND          run a shell command
  poweroff, reboot, panic
`

// ServeControl answers commands on rw until it ends.
func (s *Server) ServeControl(ctx context.Context, rw io.ReadWriter) {
	lines(rw, func(line []byte) error {
		f := strings.Fields(string(line))
		if len(f) == 0 {
			return nil
		}
		text, err := s.command(ctx, rw, f)
		if errors.Is(err, errHangUp) {
			return err
		}
		if err != nil {
			_, err = fmt.Fprintf(rw, "ERR %v\n", err)
			return err
		}
		_, err = fmt.Fprintln(rw, strings.TrimSpace("OK "+text))
		return err
	})
}

var (
	errHangUp    = errors.New("end of connection")
	errNoMachine = errors.New("not inside a guest")
	errUsage     = errors.New("wrong arguments; see help")
)

func (s *Server) command(ctx context.Context, w io.Writer, f []string) (string, error) {
	switch f[0] {
	case "help":
		_, err := io.WriteString(w, help)
		return "", err
	case "clock":
		var mono unix.Timespec
		if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &mono); err != nil {
			return "", err
		}
		return fmt.Sprintf("%d %d", time.Now().UnixNano(), mono.Nano()), nil
	case "bulk":
		return "", bulk(ctx, w, f[1:])
	case "fsyncbench":
		return s.fsyncBench(f[1:])
	case "sum":
		return s.sum(f[1:])
	}
	if s.Machine == nil {
		return "", errNoMachine
	}
	switch f[0] {
	case "boot":
		return bootText(s.Machine), nil
	case "meter":
		return s.meter(f[1:])
	case "dirty":
		return "", s.dirty(f[1:])
	case "fsck":
		return s.fsck(f[1:])
	case "sh":
		return "", s.Machine.Shell(ctx, strings.Join(f[1:], " "), w)
	case "poweroff":
		return "", s.Machine.PowerOff()
	case "reboot":
		return "", s.Machine.Reboot()
	case "panic":
		return "", s.Machine.Panic()
	}
	return "", fmt.Errorf("unknown command %q; see help", f[0])
}

func bootText(m Machine) string {
	read := func(name string) string {
		b, err := os.ReadFile(name)
		if err != nil {
			return "?"
		}
		fs := strings.Fields(string(b))
		if len(fs) == 0 {
			return "?"
		}
		return fs[0]
	}
	return fmt.Sprintf("id=%s uptime=%s clocksource=%s fsck=%s", read("/proc/sys/kernel/random/boot_id"), read("/proc/uptime"),
		read("/sys/devices/system/clocksource/clocksource0/current_clocksource"), strings.ReplaceAll(m.BootCheck(), " ", "_"))
}

func (s *Server) meter(args []string) (string, error) {
	if len(args) == 1 {
		if args[0] != "on" && args[0] != "off" {
			return "", errUsage
		}
		return "", s.Machine.Meter(args[0] == "on")
	}
	n, err := s.Machine.MeterCount()
	return strconv.FormatUint(n, 10), err
}

func (s *Server) dirty(args []string) error {
	if len(args) == 1 && args[0] == "stop" {
		return s.Machine.Dirty(0, 0, 0)
	}
	n := []int{0, 0, 64}
	if len(args) < 2 || len(args) > 3 {
		return errUsage
	}
	for i, a := range args {
		v, err := strconv.Atoi(a)
		if err != nil || v < 0 || i == 2 && v == 0 {
			return errUsage
		}
		n[i] = v
	}
	return s.Machine.Dirty(n[0], n[1], n[2])
}

// bulk streams numbers, so that the receiver notices every lost or repeated byte.
func bulk(ctx context.Context, w io.Writer, args []string) error {
	if len(args) != 1 {
		return errUsage
	}
	sec, err := strconv.ParseFloat(args[0], 64)
	if err != nil || sec < 0 {
		return errUsage
	}
	buf := make([]byte, 1<<16)
	var n uint64
	for end := time.Now().Add(time.Duration(sec * float64(time.Second))); time.Now().Before(end) && ctx.Err() == nil; {
		for i := 0; i < len(buf); i += 8 {
			binary.LittleEndian.PutUint64(buf[i:], n)
			n++
		}
		if _, err := w.Write(buf); err != nil {
			break
		}
	}
	return errHangUp
}

func disk(args []string) (int, error) {
	switch {
	case len(args) == 0:
		return 0, nil
	case len(args) == 1 && (args[0] == "0" || args[0] == "1"):
		return int(args[0][0] - '0'), nil
	}
	return 0, errUsage
}

func (s *Server) sum(args []string) (string, error) {
	i, err := disk(args)
	if err != nil {
		return "", err
	}
	path, err := s.logPath(i)
	if err != nil {
		return "", err
	}
	l := &s.logs[i]
	h := sha256.New()
	if err := l.list(path, h); err != nil {
		return "", err
	}
	return fmt.Sprintf("%x %d", h.Sum(nil), l.n), nil
}

func (s *Server) fsck(args []string) (string, error) {
	i, err := disk(args)
	if err != nil {
		return "", err
	}
	if i >= len(s.Data) {
		return "", errNoDisk
	}
	l := &s.logs[i]
	l.mu.Lock() // appends wait until the disk is back; one that is under way must not open the file again
	defer l.mu.Unlock()
	l.closeLocked()
	return s.Machine.Fsck(s.Data[i])
}

func (s *Server) fsyncBench(args []string) (string, error) {
	if len(args) != 1 {
		return "", errUsage
	}
	n, err := strconv.Atoi(args[0])
	if err != nil || n < 1 || n > 1e6 {
		return "", errUsage
	}
	if len(s.Data) == 0 {
		return "", errNoDisk
	}
	name := filepath.Join(s.Data[0], "bench")
	f, err := os.Create(name)
	if err != nil {
		return "", err
	}
	defer os.Remove(name)
	defer f.Close()
	b := make([]byte, 4096)
	waits := make([]time.Duration, 0, n)
	start := time.Now()
	for i := range n {
		binary.LittleEndian.PutUint64(b, uint64(i))
		t := time.Now()
		if _, err := f.Write(b); err != nil {
			return "", err
		}
		if err := f.Sync(); err != nil {
			return "", err
		}
		waits = append(waits, time.Since(t))
	}
	all := time.Since(start)
	slices.Sort(waits)
	ms := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
	return fmt.Sprintf("per_second=%.1f median_ms=%.3f worst_ms=%.3f", float64(n)/all.Seconds(), ms(waits[n/2]), ms(waits[n-1])), nil
}
