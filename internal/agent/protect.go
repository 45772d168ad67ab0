package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"perdure/internal/authority"
	"perdure/internal/clusterstore"
	"perdure/internal/config"
	"perdure/internal/model"
	"perdure/internal/shimapi"
)

const (
	minProtectDelay = 250 * time.Millisecond
	maxProtectDelay = 30 * time.Second
	// beginWithin is how long a shim that accepted an attempt may take to say so
	// in the record before it counts as failed.
	beginWithin = 5 * time.Second
	// protectedLong is how long a pair must have held for the next attempt after
	// its end to be made at once again.
	protectedLong = 20 * time.Second
	// ftOverhead is what a host needs beside a guest's memory: QEMU, shim, epochs.
	ftOverhead = 96 << 20
)

var errNotPrimaryYet = errors.New("its shim is not the primary yet")

// protection is what a worker remembers of its attempts to find a secondary.
type protection struct {
	next    time.Time
	delay   time.Duration
	tried   map[string]time.Time // hosts that were tried, to vary
	duplex  time.Time            // since when the pair holds
	pending bool                 // an attempt was accepted and has not come to duplex yet
	term    model.Term           // of the record when it was,
	asked   time.Time            // and when
	host    string               // the host of the last attempt
	failed  bool                 // the last attempt failed, and people were told
	since   time.Time            // when protection was found missing
	hosts   string               // who was alive at the last look
}

// protect names a secondary where the VM should have one and has none.
func (w *worker) protect(ctx context.Context, v clusterstore.VMView) {
	rec, p := v.Record.Record, &w.prot
	switch {
	case rec.Mode == model.ModeDuplex:
		if p.duplex.IsZero() {
			p.duplex = time.Now()
		}
		if time.Since(p.duplex) > protectedLong {
			p.delay = 0
		}
		p.pending, p.failed, p.since = false, false, time.Time{}
		w.problem("unprotected", "", "", "")
		return
	case rec.Mode != model.ModeSimplex:
		return
	}
	p.duplex = time.Time{}
	if !rec.Level.HasSecondary() || rec.Wanted == model.WantStopped || v.Unprotected {
		p.pending, p.failed = false, false
		w.problem("unprotected", "", "", "")
		return
	}
	if p.since.IsZero() {
		p.since = time.Now()
	}
	if w.disksChanged() { // what was being filled meanwhile did not fail, and nobody is to wait for the next attempt
		p.pending, p.next, p.delay = false, time.Time{}, 0
	}
	if p.pending && rec.Term == p.term && time.Since(p.asked) < beginWithin {
		return // accepted, and not begun: the shim has yet to change the record
	}
	if p.pending { // it came back to simplex without having been duplex
		p.pending, p.failed = false, true
		w.delayProtect()
		w.problem("unprotected", model.Warning, fmt.Sprintf("the VM runs without a second copy: the last attempt to make one on host %s failed", p.host),
			"none: it is tried again by itself; perdure vm events says why it failed")
	}
	// A host that came, or came back, is tried at once.
	if hosts := w.a.aliveHosts(); hosts != p.hosts {
		p.hosts, p.next, p.delay = hosts, time.Time{}, 0
	}
	if time.Now().Before(p.next) {
		return
	}
	err := w.tryProtect(ctx, v)
	if errors.Is(err, errNotPrimaryYet) {
		return // the next look, which its swap brings about, tries again
	}
	if err != nil {
		w.delayProtect()
		// A host that is just restarting is no news; one that stays away is.
		if time.Since(p.since) > 3*time.Second {
			todo := "none: it is protected by itself as soon as a host fits"
			if strings.Contains(err.Error(), "perdure disk replace ") {
				todo = "the command that is named there; it is protected by itself afterwards"
			}
			w.problem("unprotected", model.Warning, "the VM runs without a second copy: "+err.Error(), todo)
		}
		return
	}
	if !p.failed { // what failed once is solved only by being protected
		w.problem("unprotected", "", "", "")
	}
	p.pending, p.term, p.asked = true, rec.Term, time.Now()
	p.next = time.Now().Add(minProtectDelay)
}

// aliveHosts names the other hosts that are alive, with their present lives and
// what is known of their dirty tracking.
func (a *Agent) aliveHosts() string {
	var b strings.Builder
	own, _ := a.trackingNow()
	fmt.Fprintf(&b, "%s,", own)
	for _, h := range a.otherHosts(true) {
		if h.QEMU != "" {
			fmt.Fprintf(&b, "%s %s %s,", h.Name, h.Nonce, h.Tracking)
		}
	}
	return b.String()
}

func (w *worker) delayProtect() {
	p := &w.prot
	p.delay = min(max(2*p.delay, minProtectDelay), maxProtectDelay)
	p.next = time.Now().Add(p.delay)
	w.wakeIn(p.delay)
}

// tryProtect asks the shim here to fill a secondary on the best host that says
// it has room.
func (w *worker) tryProtect(ctx context.Context, v clusterstore.VMView) error {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	c := w.a.shim(w.vm)
	defer c.Close()
	st, err := c.Status(ctx)
	if err != nil {
		return fmt.Errorf("its shim does not answer: %w", err)
	}
	if st.Role != shimapi.RolePrimary || st.Run != v.Record.Record.Primary.Run {
		return errNotPrimaryYet
	}
	hosts, why := w.a.candidates(v)
	for _, h := range w.vary(hosts) {
		if err := w.a.ask(ctx, h, "POST", "prepare", w.vm, nil, nil); err != nil {
			why = append(why, err.Error())
			continue
		}
		if w.prot.tried == nil {
			w.prot.tried = map[string]time.Time{}
		}
		w.prot.tried[h], w.prot.host = time.Now(), h
		if _, err := c.Op(ctx, shimapi.Op{Op: "protect", Host: h}); err != nil {
			return fmt.Errorf("its shim refuses host %s: %w", h, err)
		}
		w.a.event(w.vm, "protecting", st.Term, "host %s was chosen to hold the second copy", h)
		return nil
	}
	if len(why) == 0 {
		return errors.New("there is no other host")
	}
	return errors.New(strings.Join(why, "; "))
}

// vary puts hosts that were tried longest ago, or never, before those that just failed.
func (w *worker) vary(hosts []string) []string {
	sort.SliceStable(hosts, func(i, j int) bool {
		ti, tj := w.prot.tried[hosts[i]], w.prot.tried[hosts[j]]
		recent := func(t time.Time) bool { return time.Since(t) < maxProtectDelay }
		return !recent(ti) && recent(tj)
	})
	return hosts
}

// candidates lists the hosts that could hold the second copy by what they have
// published, best first, and says why the others could not.
func (a *Agent) candidates(v clusterstore.VMView) (hosts, why []string) {
	rec := v.Record.Record
	var fit []clusterstore.HostView
	var own clusterstore.HostView
	for _, h := range a.store.Hosts() {
		if h.Name == rec.Primary.Host {
			own = h
		}
	}
	if reason := untracked(own.HostInfo); reason != "" && v.Spec.Level == model.LevelFT {
		return nil, []string{fmt.Sprintf("host %s %s", own.Name, reason)}
	}
	for _, h := range a.store.Hosts() {
		if h.Role != string(config.RoleHost) || h.Name == rec.Primary.Host {
			continue
		}
		if reason := a.unfit(v, own, h); reason != "" {
			why = append(why, fmt.Sprintf("host %s %s", h.Name, reason))
			continue
		}
		fit = append(fit, h)
	}
	// A host that holds a replica already has less to copy.
	sort.SliceStable(fit, func(i, j int) bool {
		_, ri := rec.Replicas[fit[i].Name]
		_, rj := rec.Replicas[fit[j].Name]
		if ri != rj {
			return ri
		}
		return fit[i].MemoryFree > fit[j].MemoryFree
	})
	for _, h := range fit {
		hosts = append(hosts, h.Name)
	}
	return hosts, why
}

// unfit says why a host cannot hold the second copy, or "".
func (a *Agent) unfit(v clusterstore.VMView, own, h clusterstore.HostView) string {
	switch {
	case h.Name == v.Record.Record.Primary.Host:
		return "runs the VM itself"
	case !h.Alive:
		return "gives no sign of life"
	case h.QEMU == "":
		return "has no QEMU that can be used"
	case v.Spec.Accel == "kvm" && h.Accel != "kvm":
		return fmt.Sprintf("has accelerator %s, the VM needs kvm", h.Accel)
	case own.QEMU != "" && olderVersion(h.QEMU, own.QEMU):
		return fmt.Sprintf("has QEMU %s, older than %s of the primary's host", h.QEMU, own.QEMU)
	case v.Spec.Level == model.LevelFT && untracked(h.HostInfo) != "":
		return untracked(h.HostInfo)
	case h.MemoryFree > 0 && h.MemoryFree < v.Spec.Memory+ftOverhead:
		return fmt.Sprintf("has %d MiB of memory free, the VM needs %d MiB", h.MemoryFree>>20, (v.Spec.Memory+ftOverhead)>>20)
	}
	if _, err := authority.Assign(v.Record.Record, h.Name); err != nil {
		return "cannot be named: " + err.Error()
	}
	return ""
}

// olderVersion compares versions of QEMU such as 7.2.22.
func olderVersion(a, b string) bool {
	x, y := strings.Split(a, "."), strings.Split(b, ".")
	for i := range max(len(x), len(y)) {
		var m, n int
		if i < len(x) {
			m, _ = strconv.Atoi(x[i])
		}
		if i < len(y) {
			n, _ = strconv.Atoi(y[i])
		}
		if m != n {
			return m < n
		}
	}
	return false
}

// prepareSecondary checks, on the host that is to hold the second copy, that
// there is room for it, and puts everything in place that its shim will need.
func (a *Agent) prepareSecondary(ctx context.Context, vm string) error {
	spec, err := a.store.Spec(ctx, vm)
	if err != nil {
		return err
	}
	cur, err := a.store.Record(ctx, vm)
	if err != nil {
		return err
	}
	if free := memAvailable(); free > 0 && free < spec.Memory+ftOverhead {
		return fmt.Errorf("%d MiB of memory are free, the VM needs %d MiB", free>>20, (spec.Memory+ftOverhead)>>20)
	}
	if err := checkFUSE(spec); err != nil {
		return err
	}
	if spec.Level == model.LevelFT {
		if err := a.checkTracking(); err != nil {
			return err
		}
	}
	for _, n := range spec.NICs {
		if err := checkBridge(n.Bridge); err != nil {
			return err
		}
	}
	if w := a.workerOf(vm); w != nil {
		if l := w.facts(); l.qemu || l.shim {
			return errors.New("what ran of the VM here before has not ended yet")
		}
	}
	if err := a.diskFit(vm); err != nil {
		return err
	}
	if err := a.diskRoom(spec); err != nil {
		return err
	}
	if err := a.ownDir(spec); err != nil {
		return err
	}
	rec := cur.Record
	if err := a.replicas(ctx, spec, rec, true); err != nil {
		return err
	}
	return a.fetchBlobs(ctx, spec, rec)
}

// diskRoom checks that the disks of a VM fit here in full, beside what of them
// is here already.
func (a *Agent) diskRoom(spec model.VMSpec) error {
	var need int64
	for _, d := range spec.Disks {
		if _, ok := spec.Place(d.ID, a.cfg.Name); ok {
			continue // looked at when it is made
		}
		need += d.Size
		entries, err := filepath.Glob(filepath.Join(a.vmFile(spec.Name, shimapi.DiskDir), d.ID+".raw"))
		if err != nil {
			return fmt.Errorf("look for disk %s: %w", d.ID, err)
		}
		for _, e := range entries {
			var st unix.Stat_t
			if unix.Stat(e, &st) == nil {
				need -= min(st.Blocks*512, d.Size)
			}
		}
	}
	free, err := diskFree(a.cfg.Path("vms"))
	if err != nil {
		return err
	}
	if need > free {
		return fmt.Errorf("%d MiB of disk space are free in %s, the VM's disks need %d MiB more", free>>20, a.cfg.StateDir, need>>20)
	}
	return nil
}

func diskFree(dir string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, fmt.Errorf("read free disk space: %w", err)
	}
	return int64(st.Bavail) * st.Bsize, nil
}

// checkFUSE refuses a VM whose memory has to be on FUSE where there is none.
func checkFUSE(spec model.VMSpec) error {
	if spec.Level != model.LevelFT {
		return nil
	}
	const dev = "/dev/fuse"
	var st unix.Stat_t
	if err := unix.Stat(dev, &st); err != nil {
		return fmt.Errorf("level ft needs %s: %w (modprobe fuse)", dev, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFCHR || unix.Major(st.Rdev) != 10 || unix.Minor(st.Rdev) != 229 {
		return fmt.Errorf("level ft needs %s, and what is there is not the FUSE device (modprobe fuse)", dev)
	}
	return nil
}

func checkBridge(name string) error {
	if _, err := os.Stat(filepath.Join("/sys/class/net", name, "bridge")); err != nil {
		return fmt.Errorf("there is no bridge %q", name)
	}
	return nil
}
