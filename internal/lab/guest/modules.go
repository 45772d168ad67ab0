package guest

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// moduleIndex is what depmod wrote about the modules of one kernel.
type moduleIndex struct {
	dir     string              // …/lib/modules/VERSION
	files   map[string]string   // by module name: path below dir
	deps    map[string][]string // by path: paths of what must be loaded first
	builtin map[string]bool
}

// moduleName is a module's name as the kernel knows it: no path, no suffixes,
// underscores.
func moduleName(file string) string {
	base := filepath.Base(file)
	if i := strings.Index(base, ".ko"); i >= 0 {
		base = base[:i]
	}
	return strings.ReplaceAll(base, "-", "_")
}

// readModules parses modules.dep and modules.builtin of a kernel.
func readModules(dir string) (*moduleIndex, error) {
	m := &moduleIndex{dir: dir, files: map[string]string{}, deps: map[string][]string{}, builtin: map[string]bool{}}
	dep, err := os.ReadFile(filepath.Join(dir, "modules.dep"))
	if err != nil {
		return nil, fmt.Errorf("read module dependencies: %w", err)
	}
	for line := range strings.Lines(string(dep)) {
		file, rest, ok := strings.Cut(strings.TrimSpace(line), ":")
		if !ok {
			continue
		}
		m.files[moduleName(file)] = file
		m.deps[file] = strings.Fields(rest)
	}
	builtin, err := os.ReadFile(filepath.Join(dir, "modules.builtin"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("read built-in modules: %w", err)
	}
	for line := range strings.Lines(string(builtin)) {
		m.builtin[moduleName(strings.TrimSpace(line))] = true
	}
	return m, nil
}

// order lists the files to load for the wanted modules, each after what it
// needs. A wanted module that is built into the kernel needs no file; one that
// does not exist is an error unless it is optional (its name ends in "?").
func (m *moduleIndex) order(wanted []string) ([]string, error) {
	var out []string
	for _, w := range wanted {
		name, optional := strings.CutSuffix(w, "?")
		name = moduleName(name)
		file, ok := m.files[name]
		if !ok {
			if m.builtin[name] || optional {
				continue
			}
			return nil, fmt.Errorf("find kernel module %s: this kernel has none of that name", name)
		}
		need := slices.Clone(m.deps[file])
		slices.Reverse(need) // modules.dep names the nearest first
		for _, f := range append(need, file) {
			if !slices.Contains(out, f) {
				out = append(out, f)
			}
		}
	}
	return out, nil
}

// read returns a module, unpacked: some distributions ship them compressed.
func (m *moduleIndex) read(file string) ([]byte, error) {
	b, err := os.ReadFile(filepath.Join(m.dir, file))
	if err != nil {
		return nil, fmt.Errorf("read module: %w", err)
	}
	var cmd *exec.Cmd
	switch filepath.Ext(file) {
	case ".ko":
		return b, nil
	case ".xz":
		cmd = exec.Command("xz", "-dc")
	case ".zst":
		cmd = exec.Command("zstd", "-dc")
	case ".gz":
		cmd = exec.Command("gzip", "-dc")
	default:
		return nil, fmt.Errorf("read module %s: unknown compression", file)
	}
	cmd.Stdin = bytes.NewReader(b)
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("unpack module %s: %w", file, err)
	}
	return out, nil
}
