package doctor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// HostOptions of HostChecks.
type HostOptions struct {
	StateDir string   // need not exist yet; the nearest directory above it is measured then
	Peers    []string // other hosts on the A-links, IP or IP:PORT
}

// Bounds of the checks: below (or above) them a host works, but not well.
const (
	minFree    = int64(1) << 30 // bytes of memory and of disk
	goodFsync  = 10 * time.Millisecond
	slowFsync  = 50 * time.Millisecond
	fsyncCount = 32
	goodRTT    = time.Millisecond
	slowRTT    = 10 * time.Millisecond
	pingCount  = 10
	maxClock   = 50 * time.Millisecond // that two clocks may drift apart while they are compared
)

// HostChecks returns the checks that need only the kernel.
func HostChecks(o HostOptions) []Check {
	fs := hostFS{root: "/"}
	checks := []Check{
		{"root", func(context.Context) Result { return checkRoot(os.Geteuid()) }},
		{"kernel", func(context.Context) Result { return checkKernel(fs) }},
		{"fuse device", func(context.Context) Result { return checkFUSEDevice() }},
		{"bridge", func(context.Context) Result { return checkBridge(fs) }},
		{"nftables", checkNFTables},
		{"cgroup v2", func(context.Context) Result { return checkCgroup(fs) }},
		{"memlock", func(context.Context) Result { return checkMemlock() }},
		{"dirty limits", func(context.Context) Result { return checkBDI(fs) }},
		{"memory", func(context.Context) Result { return checkMemory(fs) }},
		{"disk space", func(context.Context) Result { return checkSpace(o.StateDir) }},
		{"disk fsync", func(ctx context.Context) Result { return checkFsync(ctx, o.StateDir) }},
		{"clock", checkClock},
		{"clock sync", func(context.Context) Result { return checkClockSync() }},
	}
	for _, p := range o.Peers {
		checks = append(checks, Check{"link " + p, func(ctx context.Context) Result { return checkLink(ctx, p) }})
	}
	return checks
}

// hostFS reads /proc and /sys, or what a test puts in their place.
type hostFS struct{ root string }

func (h hostFS) read(path string) (string, error) {
	b, err := os.ReadFile(filepath.Join(h.root, path))
	return strings.TrimSpace(string(b)), err
}

func (h hostFS) exists(path string) bool {
	_, err := os.Stat(filepath.Join(h.root, path))
	return err == nil
}

func checkRoot(uid int) Result {
	if uid != 0 {
		return warning(fmt.Sprintf("running as user %d: what needs root cannot be seen", uid), "run perdure doctor as root")
	}
	return ok("running as root")
}

func checkKernel(fs hostFS) Result {
	rel, err := fs.read("proc/sys/kernel/osrelease")
	if err != nil {
		return failed("kernel release cannot be read: "+err.Error(), "mount /proc")
	}
	var major, minor int
	if _, err := fmt.Sscanf(rel, "%d.%d", &major, &minor); err != nil {
		return warning("kernel release "+rel+" is not understood", "")
	}
	if major < 5 || major == 5 && minor < 10 {
		return failed("Linux "+rel+" is older than 5.10", "use a newer kernel")
	}
	return ok("Linux %s", rel)
}

func checkFUSEDevice() Result {
	f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	switch {
	case errors.Is(err, os.ErrNotExist), errors.Is(err, syscall.ENODEV), errors.Is(err, syscall.ENXIO):
		return failed("/dev/fuse is missing: no VM can be protected", "modprobe fuse; in a container, pass the device in")
	case err != nil:
		return failed("/dev/fuse cannot be opened: "+err.Error(), "run as root; in a container, allow the device")
	}
	f.Close()
	return ok("/dev/fuse can be opened")
}

func checkBridge(fs hostFS) Result {
	if fs.exists("sys/module/bridge") || fs.exists("proc/sys/net/bridge") {
		return ok("the bridge module is loaded")
	}
	rel, _ := fs.read("proc/sys/kernel/osrelease")
	for _, list := range []string{"modules.builtin", "modules.dep"} {
		s, err := fs.read(filepath.Join("lib/modules", rel, list))
		if err == nil && strings.Contains(s, "/bridge.ko") {
			return ok("the kernel has bridges")
		}
	}
	return warning("no bridge module was found", "modprobe bridge; without it VMs have no network")
}

// checkNFTables asks the kernel, not the tool: an empty answer will do.
func checkNFTables(context.Context) Result {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return failed("netfilter cannot be asked: "+err.Error(), "use a kernel with CONFIG_NETFILTER_NETLINK")
	}
	defer unix.Close(fd)
	tv := unix.NsecToTimeval(int64(2 * time.Second))
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		return failed("netfilter cannot be asked: "+err.Error(), "")
	}
	// struct nlmsghdr (length, type NFT_MSG_GETGEN, flags REQUEST, sequence, port), struct nfgenmsg.
	msg := []byte{20, 0, 0, 0, 16, unix.NFNL_SUBSYS_NFTABLES, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, unix.AF_UNSPEC, 0, 0, 0}
	if err := unix.Sendto(fd, msg, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return failed("nftables cannot be asked: "+err.Error(), "modprobe nf_tables")
	}
	buf := make([]byte, 4096)
	n, _, err := unix.Recvfrom(fd, buf, 0)
	switch {
	case err != nil:
		return failed("nftables does not answer: "+err.Error(), "modprobe nf_tables")
	case n >= 20 && buf[4] == unix.NLMSG_ERROR:
		code := syscall.Errno(-int32(uint32(buf[16]) | uint32(buf[17])<<8 | uint32(buf[18])<<16 | uint32(buf[19])<<24))
		if code == syscall.EPERM {
			return warning("nftables may not be asked without root", "run perdure doctor as root")
		}
		return failed("the kernel has no nftables ("+code.Error()+"): the gate of a VM's output cannot be built", "modprobe nf_tables")
	}
	return ok("the kernel answers for nftables")
}

func checkCgroup(fs hostFS) Result {
	s, err := fs.read("sys/fs/cgroup/cgroup.controllers")
	if err != nil {
		return warning("no cgroup v2 at /sys/fs/cgroup", "needed by perdure lab only: mount cgroup2 there")
	}
	if !slices.Contains(strings.Fields(s), "memory") {
		return warning("cgroup v2 has no memory controller here ("+s+")", "needed by perdure lab only")
	}
	return ok("cgroup v2 with %s", strings.ReplaceAll(s, " ", ", "))
}

func checkMemlock() Result {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &l); err != nil {
		return failed("the limit of locked memory cannot be read: "+err.Error(), "")
	}
	if l.Cur == unix.RLIM_INFINITY || os.Geteuid() == 0 {
		return ok("memory may be locked without limit")
	}
	return warning(fmt.Sprintf("at most %d KiB of memory may be locked", l.Cur>>10), "set LimitMEMLOCK=infinity in the service, or run as root (root is not bound by it)")
}

// checkBDI looks whether the limits of dirty pages of one device can be set.
func checkBDI(fs hostFS) Result {
	if !fs.exists("sys/class/bdi") {
		return failed("/sys/class/bdi is missing: dirty pages of guest memory would be throttled", "mount sysfs at /sys, writable")
	}
	dirs, _ := filepath.Glob(filepath.Join(fs.root, "sys/class/bdi/*/strict_limit"))
	note := ""
	if len(dirs) == 0 {
		note = "; strict_limit is set through max_ratio only (kernel before 6.2)"
	}
	if err := unix.Access(filepath.Join(fs.root, "sys/class/bdi"), unix.W_OK); errors.Is(err, unix.EROFS) {
		return failed("/sys is mounted read-only: the limits of dirty pages cannot be set", "mount -o remount,rw /sys")
	}
	ratio, err := fs.read("proc/sys/vm/dirty_ratio")
	if err != nil {
		return warning("vm.dirty_ratio cannot be read: "+err.Error(), "")
	}
	n, _ := strconv.Atoi(ratio)
	if n > 0 && n < 10 {
		return warning(fmt.Sprintf("vm.dirty_ratio is %d %%: a guest that dirties much memory is slowed down", n), "sysctl vm.dirty_ratio=20")
	}
	return ok("limits of dirty pages can be set, vm.dirty_ratio %s%s", ratio, note)
}

func checkMemory(fs hostFS) Result {
	s, err := fs.read("proc/meminfo")
	if err != nil {
		return failed("memory cannot be read: "+err.Error(), "mount /proc")
	}
	total, free := meminfo(s, "MemTotal"), meminfo(s, "MemAvailable")
	text := fmt.Sprintf("%s available of %s", gib(free), gib(total))
	if free < minFree {
		return warning(text, "a protected VM needs its memory on both hosts, and some more for checkpoints")
	}
	if swap := meminfo(s, "SwapTotal"); swap > 0 {
		return warning(text+fmt.Sprintf(", with %s of swap", gib(swap)), "guests and shims lock their memory; swap of other programs can still make a host slow: consider swapoff")
	}
	return ok("%s", text)
}

func meminfo(s, key string) int64 {
	for line := range strings.Lines(s) {
		f := strings.Fields(line)
		if len(f) >= 2 && f[0] == key+":" {
			n, _ := strconv.ParseInt(f[1], 10, 64)
			return n << 10
		}
	}
	return 0
}

func gib(n int64) string { return strconv.FormatFloat(float64(n)/(1<<30), 'f', 1, 64) + " GiB" }

// existing returns the nearest directory that is there.
func existing(dir string) string {
	for dir != "/" && dir != "." {
		if st, err := os.Stat(dir); err == nil && st.IsDir() {
			return dir
		}
		dir = filepath.Dir(dir)
	}
	return "/"
}

func checkSpace(stateDir string) Result {
	dir := existing(stateDir)
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return failed("space in "+dir+" cannot be read: "+err.Error(), "")
	}
	free := int64(st.Bavail) * st.Bsize
	text := fmt.Sprintf("%s free in %s", gib(free), dir)
	switch {
	case st.Flags&unix.ST_RDONLY != 0:
		return failed(dir+" is mounted read-only", "mount it writable, or choose another --state-dir")
	case free < 256<<20:
		return failed(text, "free some space: without it nothing can be decided in the cluster")
	case free < minFree:
		return warning(text, "free some space")
	case st.Type == unix.TMPFS_MAGIC || st.Type == unix.RAMFS_MAGIC:
		return warning(text+", which is in memory: nothing survives a reboot", "choose a --state-dir on a disk, except for trying things out")
	}
	return ok("%s", text)
}

// checkFsync measures what each commit of the cluster store and each flush of a guest costs.
func checkFsync(ctx context.Context, stateDir string) Result {
	dir := existing(stateDir)
	f, err := os.CreateTemp(dir, ".perdure-doctor-*")
	if err != nil {
		return failed("no file can be made in "+dir+": "+err.Error(), "run as root, or choose another --state-dir")
	}
	defer os.Remove(f.Name())
	defer f.Close()
	block := bytes.Repeat([]byte{0xa5}, 4096)
	var times []time.Duration
	for i := 0; i < fsyncCount && ctx.Err() == nil; i++ {
		start := time.Now()
		if _, err := f.WriteAt(block, int64(i)*4096); err != nil {
			return failed("writing in "+dir+" fails: "+err.Error(), "check the disk")
		}
		if err := unix.Fdatasync(int(f.Fd())); err != nil {
			return failed("fsync in "+dir+" fails: "+err.Error(), "check the disk")
		}
		times = append(times, time.Since(start))
	}
	if len(times) == 0 {
		return failed("no fsync ended in time", "check the disk")
	}
	slices.Sort(times)
	med, worst := times[len(times)/2], times[len(times)-1]
	text := fmt.Sprintf("4 KiB write with fdatasync in %s: median %s, worst %s of %d", dir, round(med), round(worst), len(times))
	switch {
	case med > slowFsync:
		return failed(text, "use a disk that is not this slow: leases and claims would time out")
	case med > goodFsync || worst > 10*slowFsync:
		return warning(text, "use a faster disk, or one with a protected write cache")
	}
	return ok("%s", text)
}

func round(d time.Duration) string {
	if d < time.Millisecond {
		return d.Round(time.Microsecond).String()
	}
	return d.Round(100 * time.Microsecond).String()
}

// checkClock looks for jumps: both clocks must advance alike.
func checkClock(ctx context.Context) Result {
	read := func(id int32) (time.Duration, error) {
		var ts unix.Timespec
		err := unix.ClockGettime(id, &ts)
		return time.Duration(ts.Nano()), err
	}
	r0, err0 := read(unix.CLOCK_REALTIME)
	b0, err1 := read(unix.CLOCK_BOOTTIME)
	if err := errors.Join(err0, err1); err != nil {
		return failed("clocks cannot be read: "+err.Error(), "use a kernel with CLOCK_BOOTTIME")
	}
	if r0 < time.Date(2024, 1, 1, 0, 0, 0, 0, time.UTC).Sub(time.Unix(0, 0)) {
		return failed("the clock says "+time.Unix(0, int64(r0)).UTC().Format(time.DateOnly)+": certificates will not be valid", "set the clock (chrony, systemd-timesyncd)")
	}
	t := time.NewTimer(500 * time.Millisecond)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
	r1, err0 := read(unix.CLOCK_REALTIME)
	b1, err1 := read(unix.CLOCK_BOOTTIME)
	if err := errors.Join(err0, err1); err != nil {
		return failed("clocks cannot be read: "+err.Error(), "")
	}
	diff := (r1 - r0) - (b1 - b0)
	if diff.Abs() > maxClock {
		return warning(fmt.Sprintf("the wall clock moved by %s against the time since boot within %s", round(diff), round(b1-b0)), "let the clock be slewed, not stepped (chrony: makestep only at start)")
	}
	src, _ := hostFS{"/"}.read("sys/devices/system/clocksource/clocksource0/current_clocksource")
	if src != "" && src != "tsc" && src != "kvm-clock" {
		return ok("wall clock and time since boot agree; clocksource %s", src)
	}
	return ok("wall clock and time since boot agree")
}

func checkClockSync() Result {
	var tx unix.Timex
	state, err := unix.Adjtimex(&tx)
	if err != nil {
		return warning("the state of clock synchronisation cannot be read: "+err.Error(), "")
	}
	if state == unix.TIME_ERROR || tx.Status&unix.STA_UNSYNC != 0 {
		return warning("the clock is not synchronised (no safety depends on it; times in events do)", "install and start chrony or systemd-timesyncd")
	}
	return ok("the clock is synchronised, error at most %s", round(time.Duration(tx.Maxerror)*time.Microsecond))
}

// checkLink measures the round trip to a peer: by TCP where a port is given,
// by ping otherwise.
func checkLink(ctx context.Context, peer string) Result {
	var rtts []time.Duration
	var err error
	if host, port, e := net.SplitHostPort(peer); e == nil {
		rtts, err = tcpRTTs(ctx, net.JoinHostPort(host, port))
	} else {
		rtts, err = pingRTTs(ctx, peer)
	}
	if len(rtts) == 0 {
		return failed(fmt.Sprintf("%s does not answer: %v", peer, err), "check cable, address and firewall of this link")
	}
	slices.Sort(rtts)
	med, worst := rtts[len(rtts)/2], rtts[len(rtts)-1]
	text := fmt.Sprintf("round trip to %s: median %s, worst %s, %d of %d answered", peer, round(med), round(worst), len(rtts), pingCount)
	switch {
	case len(rtts) < pingCount:
		return warning(text, "look for loss on this link")
	case med > slowRTT:
		return failed(text, "use a direct or local link: every answer of a protected VM waits for this round trip")
	case med > goodRTT:
		return warning(text, "every answer of a protected VM waits for this round trip")
	}
	return ok("%s", text)
}

// tcpRTTs measures connections; a refusal is an answer too.
func tcpRTTs(ctx context.Context, addr string) (rtts []time.Duration, last error) {
	d := net.Dialer{Timeout: time.Second}
	for range pingCount {
		start := time.Now()
		c, err := d.DialContext(ctx, "tcp", addr)
		if err != nil && !errors.Is(err, syscall.ECONNREFUSED) {
			last = err
			continue
		}
		rtts = append(rtts, time.Since(start))
		if c != nil {
			c.Close()
		}
	}
	return rtts, last
}

func pingRTTs(ctx context.Context, addr string) (rtts []time.Duration, last error) {
	if net.ParseIP(addr) == nil {
		return nil, fmt.Errorf("%q is no IP address", addr)
	}
	out, err := exec.CommandContext(ctx, "ping", "-n", "-q", "-c", "1", "-W", "1", addr).CombinedOutput()
	if errors.Is(err, exec.ErrNotFound) {
		return nil, errors.New("no ping program; give IP:PORT to measure by TCP")
	}
	if err != nil {
		return nil, fmt.Errorf("ping: %s", strings.TrimSpace(string(out)))
	}
	cmd := exec.CommandContext(ctx, "ping", "-n", "-c", strconv.Itoa(pingCount), "-i", "0.05", "-W", "1", addr)
	out, last = cmd.Output()
	for line := range strings.Lines(string(out)) {
		_, after, found := strings.Cut(line, "time=")
		if !found {
			continue
		}
		v, err := strconv.ParseFloat(strings.Fields(after)[0], 64)
		if err == nil {
			rtts = append(rtts, time.Duration(v*float64(time.Millisecond)))
		}
	}
	return rtts, last
}
