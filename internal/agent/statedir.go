package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"perdure/api"
	"perdure/internal/clusterstore"
	"perdure/internal/config"
)

// StateFormat is the format of the state directory that this program writes
// and reads.
const StateFormat = 1

const (
	versionFile = "version"      // format number; written last, so it marks a complete directory
	clusterFile = "cluster.json" // membership
)

// stateNames are the entries that belong to Perdure in a state directory.
var stateNames = []string{versionFile, clusterFile, config.FileName, "pki", "etcd", "run", "vms", "blobs", "uploads"}

// membership is what a host keeps of its place in the cluster store.
type membership struct {
	ID       string            `json:"id"`
	Name     string            `json:"name"`
	Initial  map[string]string `json:"initial"`  // members with peer URLs, for the first start
	Existing bool              `json:"existing"` // the first start joins
	Started  bool              `json:"started"`  // the store has been up once: its data must be there from now on
}

// checkVersion refuses a state directory that this program cannot use.
func checkVersion(dir string) error {
	data, err := os.ReadFile(filepath.Join(dir, versionFile))
	switch {
	case errors.Is(err, os.ErrNotExist):
		return api.Errorf(api.Conflict, "%s holds no host of a cluster", dir).
			WithAction("run perdure init (a new cluster) or perdure join TOKEN first, or name another --state-dir")
	case err != nil:
		return fmt.Errorf("read state directory: %w", err)
	}
	if got := strings.TrimSpace(string(data)); got != fmt.Sprint(StateFormat) {
		return api.Errorf(api.Conflict, "state directory %s has format %q; this program reads format %d only", dir, got, StateFormat).
			WithAction("run the version of Perdure that wrote it, or name another --state-dir")
	}
	return nil
}

// checkFresh refuses a directory in which there is a host already.
func checkFresh(dir string) error {
	if _, err := os.Stat(filepath.Join(dir, versionFile)); err == nil {
		if err := checkVersion(dir); err != nil {
			return err
		}
		return api.Errorf(api.Conflict, "state directory %s belongs to a host of a cluster already", dir).
			WithAction("name another --state-dir, or move this one away if its host is not needed any more")
	}
	for _, n := range stateNames {
		if n == config.FileName {
			continue // a configuration may be prepared there
		}
		if _, err := os.Lstat(filepath.Join(dir, n)); err == nil {
			return api.Errorf(api.Conflict, "state directory %s is not empty: it holds %s", dir, n).
				WithAction("name another --state-dir, or empty this one")
		}
	}
	return nil
}

// newState is a state directory in the making: files are collected in a hidden
// directory beside their places and moved there at the end, the version last.
type newState struct {
	dir     string
	stage   string
	madeDir bool
	placed  []string
}

func stageState(dir string) (*newState, error) {
	if err := checkFresh(dir); err != nil {
		return nil, err
	}
	n := &newState{dir: dir}
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		n.madeDir = true
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make state directory: %w", err)
	}
	stage, err := os.MkdirTemp(dir, ".new-")
	if err != nil {
		n.undo()
		return nil, fmt.Errorf("make state directory: %w", err)
	}
	n.stage = stage
	for _, d := range []string{"pki", "run", "vms", "blobs"} {
		if err := os.Mkdir(filepath.Join(stage, d), 0o700); err != nil {
			n.undo()
			return nil, fmt.Errorf("make state directory: %w", err)
		}
	}
	return n, nil
}

func (n *newState) write(name string, data []byte) error {
	f, err := os.OpenFile(filepath.Join(n.stage, name), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	_, err = f.Write(data)
	return errors.Join(err, f.Sync(), f.Close())
}

// commit moves everything to its place. The directory is complete when the
// version is there, and not usable before.
func (n *newState) commit() error {
	if err := n.write(versionFile, fmt.Appendf(nil, "%d\n", StateFormat)); err != nil {
		return err
	}
	for _, name := range []string{"pki", "run", "vms", "blobs", config.FileName, clusterFile, versionFile} {
		if err := os.Rename(filepath.Join(n.stage, name), filepath.Join(n.dir, name)); err != nil {
			return fmt.Errorf("complete state directory: %w", err)
		}
		n.placed = append(n.placed, name)
	}
	if err := syncDir(n.dir); err != nil {
		return fmt.Errorf("complete state directory: %w", err)
	}
	n.placed, n.madeDir = nil, false
	return os.RemoveAll(n.stage)
}

// undo takes back everything that was made here; after commit it does nothing.
func (n *newState) undo() {
	if n.stage != "" {
		os.RemoveAll(n.stage)
	}
	for _, name := range n.placed {
		os.RemoveAll(filepath.Join(n.dir, name))
	}
	if n.madeDir {
		os.Remove(n.dir) // only if nothing else is in it
	}
}

func loadMembership(dir string) (membership, error) {
	var m membership
	data, err := os.ReadFile(filepath.Join(dir, clusterFile))
	if err != nil {
		return m, fmt.Errorf("read membership: %w", err)
	}
	if err := json.Unmarshal(data, &m); err != nil {
		return m, fmt.Errorf("read membership: %w", err)
	}
	if m.Started && !clusterstore.HasData(filepath.Join(dir, "etcd")) {
		// Starting anew here would make an empty cluster store beside the real
		// one, and with it a second truth about who may run what.
		return m, api.Errorf(api.Refused, "the data of the cluster store is missing in %s although this host has been a member", filepath.Join(dir, "etcd")).
			WithAction("restore it, or remove the host from the cluster and join it anew")
	}
	return m, nil
}

func (m membership) save(dir string) error {
	data, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return fmt.Errorf("write membership: %w", err)
	}
	return writeAtomic(filepath.Join(dir, clusterFile), append(data, '\n'), 0o600)
}

// writeAtomic replaces a file so that after a crash it is the old or the new one.
func writeAtomic(path string, data []byte, mode os.FileMode) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	_, err = f.Write(data)
	err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		os.Remove(f.Name())
		return fmt.Errorf("write %s: %w", path, err)
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("sync directory: %w", err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("sync directory %s: %w", dir, err)
	}
	return nil
}
