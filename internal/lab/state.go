package lab

import (
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	stateVersion  = 1
	stateFile     = "lab.json"
	superviseFile = "supervise"    // in a host's directory, made by Supervise
	createdMark   = ".made-by-lab" // in a directory that Up itself made
)

// Phases of a lab's life. Only phaseUp is a lab that can be used.
const (
	phaseMaking   = "making"
	phaseUp       = "up"
	phaseRemoving = "removing"
)

// state is the content of the state file: everything that Down needs to know.
// Whether a host runs or is frozen is not written here: its cgroup says so.
type state struct {
	Version    int     `json:"version"`
	Phase      string  `json:"phase"`
	CreatedDir bool    `json:"created_dir"` // the directory was made by Up and goes with the lab
	Cgroup     string  `json:"cgroup"`
	Binary     string  `json:"binary"`
	Agent      Program `json:"agent"`
	Vote       Program `json:"vote"`
	ALinks     int     `json:"alinks"`
	Nodes      []node  `json:"nodes"`
}

type node struct {
	Name   string          `json:"name"`
	Role   Role            `json:"role"`
	Number int             `json:"number"`         // last part of its addresses
	PID    int             `json:"pid,omitempty"`  // of its init, in the machine's PID namespace
	Down   map[string]bool `json:"down,omitempty"` // links taken down; they stay so over a power-off
}

func (s *state) node(name string) (*node, error) {
	var known []string
	for i := range s.Nodes {
		if s.Nodes[i].Name == name {
			return &s.Nodes[i], nil
		}
		if s.Nodes[i].Role != RoleSwitch {
			known = append(known, s.Nodes[i].Name)
		}
	}
	return nil, fmt.Errorf("no host %q in this lab (there are: %s)", name, strings.Join(known, ", "))
}

func (n *node) lanAddr() netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 77, 0, byte(n.Number)}), 24)
}

func (n *node) alinkAddr(i int) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 78, byte(i), byte(n.Number)}), 24)
}

func (l *Lab) load() error {
	b, err := os.ReadFile(filepath.Join(l.dir, stateFile))
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%s: %w", l.dir, ErrNoLab)
	}
	if err != nil {
		return fmt.Errorf("read lab state: %w", err)
	}
	var s state
	if err := json.Unmarshal(b, &s); err != nil {
		return fmt.Errorf("read lab state %s: %w", filepath.Join(l.dir, stateFile), err)
	}
	if s.Version != stateVersion {
		return fmt.Errorf("lab in %s was made by another version of perdure (format %d, this one knows %d)", l.dir, s.Version, stateVersion)
	}
	l.st = s
	return nil
}

// fresh finds a node as it is now: another process may have powered it off and
// on. The caller holds the lock.
func (l *Lab) fresh(name string) (*node, error) {
	if err := l.load(); err != nil {
		return nil, err
	}
	return l.st.node(name)
}

func (l *Lab) save() error {
	b, err := json.MarshalIndent(&l.st, "", "  ")
	if err != nil {
		return fmt.Errorf("encode lab state: %w", err)
	}
	name := filepath.Join(l.dir, stateFile)
	if err := os.WriteFile(name+".new", append(b, '\n'), 0o644); err != nil {
		return fmt.Errorf("write lab state: %w", err)
	}
	if err := os.Rename(name+".new", name); err != nil {
		return fmt.Errorf("write lab state: %w", err)
	}
	return nil
}

// change runs fn under the lock of the directory, on a freshly read state.
func (l *Lab) change(fn func() error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.st.Phase == phaseMaking { // Up of this very process forms the cluster and holds the lock
		return fn()
	}
	unlock, err := lockDir(l.dir, false)
	if err != nil {
		return err
	}
	defer unlock()
	if err := l.load(); err != nil {
		return err
	}
	if l.st.Phase != phaseUp {
		return fmt.Errorf("the lab in %s is only half there: remove it with `perdure lab down`", l.dir)
	}
	return fn()
}

// alive reports whether any process of the lab lives.
func (l *Lab) alive() bool {
	pids, err := cgroupPIDs(l.st.Cgroup)
	return err == nil && len(pids) > 0
}

// cgroupName is the same for the same directory, so that even a lab whose
// directory was deleted by hand is found again.
func cgroupName(dir string) string {
	h := fnv.New32a()
	h.Write([]byte(dir))
	return fmt.Sprintf("perdure-lab-%08x", h.Sum32())
}

// lockDir takes the lock of a lab, which is a flock on its directory itself:
// it cannot be left behind. With create, a missing directory is made and marked.
func lockDir(dir string, create bool) (unlock func(), err error) {
	for {
		if create {
			if err := makeMarkedDir(dir); err != nil {
				return nil, err
			}
		}
		f, err := os.Open(dir)
		if err != nil {
			if errors.Is(err, os.ErrNotExist) {
				return nil, fmt.Errorf("%s: %w", dir, ErrNoLab)
			}
			return nil, fmt.Errorf("open lab directory: %w", err)
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
			f.Close()
			return nil, fmt.Errorf("lock lab directory: %w", err)
		}
		// The one who held the lock may have removed the directory.
		held, err1 := f.Stat()
		now, err2 := os.Stat(dir)
		if err1 == nil && err2 == nil && os.SameFile(held, now) {
			return func() { f.Close() }, nil
		}
		f.Close()
		if !create {
			return nil, fmt.Errorf("%s: %w", dir, ErrNoLab)
		}
	}
}

func makeMarkedDir(dir string) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return fmt.Errorf("make lab directory: %w", err)
	}
	err := os.Mkdir(dir, 0o755)
	if errors.Is(err, os.ErrExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("make lab directory: %w", err)
	}
	if err := os.WriteFile(filepath.Join(dir, createdMark), nil, 0o644); err != nil {
		return fmt.Errorf("mark lab directory: %w", err)
	}
	return nil
}
