// Package lab runs several hosts on one machine: each has its own network,
// mount, PID, UTS and cgroup namespaces and one cgroup, and runs the same agent
// and shims as a real host. A switch namespace holds the LAN and the A-links; a
// client namespace on the LAN is the outside world. Faults are made on demand:
// power-off, freeze, links.
//
// There is no daemon: everything a lab is lives in the processes of one cgroup
// (namespaces, veths and mounts end with them) and in one directory. A state
// file in that directory is written before each step, so that Down removes a
// whole lab and a half-made one alike, also from another process and also after
// this one was killed. Operations that change a lab take a lock on the directory.
//
// Concurrency: a Lab may be used by several goroutines; changes are serialised.
//
// Not guaranteed: a power-off kills every process of the host at one instant
// and no packet leaves after it, but what the host had written to files without
// fsync survives, because the kernel's page cache is shared with the machine.
// CPU, memory and clock are shared as well.
package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// DefaultDir is where a lab lives unless told otherwise. It is on a disk, not
// on tmpfs, because the hosts' disks and journals live there and an fsync
// should cost what it costs.
const DefaultDir = "/var/lib/perdure-lab"

// Errors that callers tell apart.
var (
	ErrNoLab  = errors.New("no lab here")
	ErrExists = errors.New("a lab is up here already")
	ErrOff    = errors.New("host is powered off")
	ErrFrozen = errors.New("host is frozen")
)

// Role of a node of the lab.
type Role string

// The roles.
const (
	RoleSwitch  Role = "switch"
	RoleClient  Role = "client"
	RoleHost    Role = "host"
	RoleWitness Role = "witness"
)

// Names of the nodes that are not hosts.
const (
	Switch  = "switch"
	Client  = "client"
	Witness = "w"
)

// Program is what a host runs, supervised by its init: restarted 200 ms after
// each end, as systemd would.
type Program struct {
	Args []string `json:"args"` // {state} is replaced by the host's state directory
	// Wait keeps the program from starting until Supervise is called once.
	Wait bool `json:"wait,omitempty"`
}

// Options of a lab. The zero value of a field means its default.
type Options struct {
	Dir     string  // default DefaultDir
	Hosts   int     // 1 to 16, default 2: a, b, c, …
	Witness bool    // a further host w without A-links
	ALinks  int     // 0 to 4; use DefaultALinks for the usual number
	Binary  string  // perdure, default: this executable; runs `lab-init` in each host
	Agent   Program // of the hosts
	Vote    Program // of the witness
	// Form makes a cluster of the hosts once all of them run; nil leaves them alone.
	Form func(ctx context.Context, l *Lab) error
	Log  *slog.Logger // default: discards
}

// DefaultALinks is the usual number of A-links.
const DefaultALinks = 2

func (o *Options) check() error {
	if o.Dir == "" {
		o.Dir = DefaultDir
	}
	dir, err := filepath.Abs(o.Dir)
	if err != nil {
		return fmt.Errorf("resolve lab directory: %w", err)
	}
	o.Dir = dir
	// Unix sockets of a VM lie below; their paths must fit in 107 bytes.
	if len(dir) > 48 {
		return fmt.Errorf("lab directory %s: path is longer than 48 bytes, and the sockets below it would not fit", dir)
	}
	if dir == "/" {
		return errors.New("lab directory: / is not one")
	}
	if o.Hosts == 0 {
		o.Hosts = 2
	}
	if o.Hosts < 1 || o.Hosts > 16 {
		return fmt.Errorf("number of hosts %d: must be 1 to 16", o.Hosts)
	}
	if o.ALinks < 0 || o.ALinks > 4 {
		return fmt.Errorf("number of A-links %d: must be 0 to 4", o.ALinks)
	}
	if o.Binary == "" {
		if o.Binary, err = os.Executable(); err != nil {
			return fmt.Errorf("find own executable: %w", err)
		}
	}
	if o.Binary, err = filepath.Abs(o.Binary); err != nil {
		return fmt.Errorf("resolve binary: %w", err)
	}
	if _, err := os.Stat(o.Binary); err != nil {
		return fmt.Errorf("find binary: %w", err)
	}
	if o.Log == nil {
		o.Log = slog.New(slog.NewTextHandler(io.Discard, nil))
	}
	return nil
}

// nodes lists the nodes of a lab in the order in which they are started.
func (o *Options) nodes() []node {
	ns := []node{{Name: Switch, Role: RoleSwitch}, {Name: Client, Role: RoleClient, Number: 200}}
	if o.Witness {
		ns = append(ns, node{Name: Witness, Role: RoleWitness, Number: 100})
	}
	for i := range o.Hosts {
		ns = append(ns, node{Name: string(rune('a' + i)), Role: RoleHost, Number: i + 1})
	}
	return ns
}

// Lab is one lab, made by Up or found by Open.
type Lab struct {
	dir string
	log *slog.Logger

	mu    sync.Mutex // guards st and serialises changes within this process
	st    state
	inits sync.WaitGroup // one goroutine per init that this process started
}

// Up makes a lab and returns when its cluster is formed. On an error, and when
// ctx ends, everything made so far is removed. What a killed run left in the
// same directory is cleaned first; a lab that is still up is ErrExists.
func Up(ctx context.Context, o Options) (*Lab, error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	if os.Geteuid() != 0 {
		return nil, errors.New("a lab needs root: it makes namespaces, cgroups and network links")
	}
	l := &Lab{dir: o.Dir, log: o.Log}
	unlock, err := lockDir(o.Dir, true)
	if err != nil {
		return nil, err
	}
	defer unlock()
	created, err := l.claimDir()
	if err != nil {
		return nil, err
	}
	l.st = state{Version: stateVersion, Phase: phaseMaking, CreatedDir: created, Binary: o.Binary,
		Agent: o.Agent, Vote: o.Vote, ALinks: o.ALinks, Nodes: o.nodes()}
	if err := l.make(ctx, o); err != nil {
		// Not ctx: it may be what ended.
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		if cerr := l.remove(clean); cerr != nil {
			err = errors.Join(err, fmt.Errorf("clean up: %w", cerr))
		}
		return nil, err
	}
	return l, nil
}

// claimDir makes sure that the directory is ours and empty, and says whether
// it was made just now (by lockDir) or stood there before.
func (l *Lab) claimDir() (created bool, err error) {
	switch err := l.load(); {
	case err == nil:
		if l.alive() {
			return false, fmt.Errorf("%s: %w", l.dir, ErrExists)
		}
		l.log.Info("cleaning what an earlier lab left", "dir", l.dir)
		created = l.st.CreatedDir
		if err := l.removeAll(context.Background()); err != nil {
			return false, fmt.Errorf("clean what an earlier lab left: %w", err)
		}
		return created, nil
	case !errors.Is(err, ErrNoLab):
		return false, err
	}
	ents, err := os.ReadDir(l.dir)
	if err != nil {
		return false, fmt.Errorf("read lab directory: %w", err)
	}
	for _, e := range ents {
		if e.Name() != createdMark {
			return false, fmt.Errorf("lab directory %s is not empty and holds no lab: choose another with --dir", l.dir)
		}
		created = true
	}
	return created, nil
}

func (l *Lab) make(ctx context.Context, o Options) error {
	root, err := cgroupRoot()
	if err != nil {
		return err
	}
	l.st.Cgroup = filepath.Join(root, cgroupName(o.Dir))
	if err := l.save(); err != nil { // before the first thing that would have to be undone
		return err
	}
	if err := os.MkdirAll(filepath.Join(o.Dir, "bin"), 0o755); err != nil {
		return fmt.Errorf("make directory: %w", err)
	}
	if err := os.Symlink(o.Binary, filepath.Join(o.Dir, "bin", "perdure")); err != nil {
		return fmt.Errorf("link binary: %w", err)
	}
	if err := os.Mkdir(l.st.Cgroup, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("make cgroup: %w", err)
	}
	for i := range l.st.Nodes {
		if err := l.powerOn(ctx, &l.st.Nodes[i]); err != nil {
			return err
		}
	}
	if o.Form != nil {
		if err := o.Form(ctx, l); err != nil {
			return fmt.Errorf("form cluster: %w", err)
		}
	}
	l.st.Phase = phaseUp
	return l.save()
}

// Open finds the lab in dir (DefaultDir when empty), or returns ErrNoLab.
func Open(dir string, log *slog.Logger) (*Lab, error) {
	o := Options{Dir: dir, Log: log}
	if err := o.check(); err != nil {
		return nil, err
	}
	l := &Lab{dir: o.Dir, log: o.Log}
	if err := l.load(); err != nil {
		return nil, err
	}
	return l, nil
}

// Down removes the lab in dir, whole or half-made, and everything that belongs
// to it: processes, FUSE connections, links, namespaces, cgroups, files. Where
// there is none it does nothing.
func Down(ctx context.Context, dir string, log *slog.Logger) error {
	o := Options{Dir: dir, Log: log}
	if err := o.check(); err != nil {
		return err
	}
	if _, err := os.Stat(o.Dir); errors.Is(err, os.ErrNotExist) {
		// The directory may have been removed by hand: the cgroup has a name of its own.
		root, err := cgroupRoot()
		if err != nil {
			return err
		}
		return removeCgroup(ctx, filepath.Join(root, cgroupName(o.Dir)))
	}
	unlock, err := lockDir(o.Dir, false)
	if err != nil {
		return err
	}
	defer unlock()
	l := &Lab{dir: o.Dir, log: o.Log}
	if err := l.load(); err != nil {
		if errors.Is(err, ErrNoLab) {
			return nil
		}
		return err
	}
	return l.remove(ctx)
}

// Down removes this lab; see the function of the same name.
func (l *Lab) Down(ctx context.Context) error {
	if err := Down(ctx, l.dir, l.log); err != nil {
		return err
	}
	l.inits.Wait()
	return nil
}

// remove ends all processes and takes the files away; the caller holds the lock.
func (l *Lab) remove(ctx context.Context) error {
	created := l.st.CreatedDir
	if err := l.removeAll(ctx); err != nil {
		return err
	}
	if created {
		if err := os.RemoveAll(l.dir); err != nil {
			return fmt.Errorf("remove lab directory: %w", err)
		}
	}
	return nil
}

func (l *Lab) removeAll(ctx context.Context) error {
	l.st.Phase = phaseRemoving
	if err := l.save(); err != nil {
		return err
	}
	if l.st.Cgroup != "" {
		if err := removeCgroup(ctx, l.st.Cgroup); err != nil {
			return err
		}
	}
	if err := detachMounts(l.dir); err != nil {
		return err
	}
	// The state file goes last: as long as it is there, Down can be called again.
	for _, n := range l.st.Nodes {
		if err := os.RemoveAll(l.hostDir(n.Name)); err != nil {
			return fmt.Errorf("remove files of %s: %w", n.Name, err)
		}
	}
	for _, f := range []string{"bin", "guest", "tmp", stateFile + ".new", stateFile} {
		if err := os.RemoveAll(filepath.Join(l.dir, f)); err != nil {
			return fmt.Errorf("remove %s: %w", f, err)
		}
	}
	return nil
}

// Dir returns the lab's directory.
func (l *Lab) Dir() string { return l.dir }

// Bin returns the directory that holds the program `perdure` of this lab.
func (l *Lab) Bin() string { return filepath.Join(l.dir, "bin") }

func (l *Lab) hostDir(name string) string { return filepath.Join(l.dir, name) }

// Supervise lets a host's program start that was told to wait, now and after
// each power-on from now on.
func (l *Lab) Supervise(host string) error {
	f, err := os.OpenFile(filepath.Join(l.hostDir(host), superviseFile), os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return fmt.Errorf("let the program of %s start: %w", host, err)
	}
	return f.Close()
}

// StateDir returns the state directory of a host; it survives a power-off.
func (l *Lab) StateDir(host string) string { return filepath.Join(l.dir, host, "state") }

// Hosts returns the names of the hosts that run VMs, in order.
func (l *Lab) Hosts() []string { return l.names(RoleHost) }

// Members returns the names of hosts and witness, in order.
func (l *Lab) Members() []string { return append(l.names(RoleHost), l.names(RoleWitness)...) }

func (l *Lab) names(r Role) []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []string
	for _, n := range l.st.Nodes {
		if n.Role == r {
			out = append(out, n.Name)
		}
	}
	return out
}

// Addr returns a node's address on the LAN.
func (l *Lab) Addr(name string) (netip.Addr, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	n, err := l.st.node(name)
	if err != nil {
		return netip.Addr{}, err
	}
	return n.lanAddr().Addr(), nil
}

// ALinkAddrs returns a host's addresses on the A-links, in order.
func (l *Lab) ALinkAddrs(name string) ([]netip.Addr, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	n, err := l.st.node(name)
	if err != nil {
		return nil, err
	}
	var out []netip.Addr
	if n.Role == RoleHost {
		for i := range l.st.ALinks {
			out = append(out, n.alinkAddr(i).Addr())
		}
	}
	return out, nil
}
