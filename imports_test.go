// Package perdure has no code of its own; the tests here hold the rules about
// who may import whom (docs/ARCHITECTURE.md) as data, and check them.
package perdure_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "perdure/"

// edge allows one import: a package of this module, or a module from outside.
type edge struct {
	to  string
	why string // needed where the import does not go down a layer, or leaves the module
}

// row is one package: its layer and what it may import besides the standard
// library and internal/model.
type row struct {
	layer int
	may   []edge
}

// Layers, see docs/ARCHITECTURE.md.
const (
	nouns      = iota // L0
	pure              // L1: events in, actions out
	mechanisms        // L2: one outside thing each
	assemblies        // L3: agent and shim
	surfaces          // L4
)

const (
	sysUnix = "golang.org/x/sys/unix"
	sysWhy  = "system calls that the standard library lacks"
)

// table is who may import whom. A new package gets a row; a new import gets an
// edge, with its reason where it is not simply downwards.
func table() map[string]row {
	sys := edge{sysUnix, sysWhy}
	down := func(names ...string) (es []edge) {
		for _, n := range names {
			es = append(es, edge{to: n})
		}
		return es
	}
	return map[string]row{
		"internal/model":  {nouns, nil},
		"internal/bitmap": {nouns, nil},

		"internal/authority": {pure, nil},
		"internal/epoch":     {pure, nil},
		"internal/replica":   {pure, nil},
		"internal/netpath":   {pure, nil},

		"internal/config": {mechanisms, []edge{{"github.com/BurntSushi/toml", "configuration files are TOML"}}},
		"internal/pki":    {mechanisms, nil},
		"internal/clusterstore": {mechanisms, []edge{{"internal/shimapi", "the endpoints it stores are the shims' own words"},
			{"go.etcd.io", "the cluster store is etcd, embedded"}, {"go.uber.org/zap", "etcd logs through it; it is bridged to slog"}}},
		"internal/shimapi": {mechanisms, nil},
		"internal/vfs":     {mechanisms, []edge{sys}},
		"internal/blockstore": {mechanisms, append(down("internal/bitmap", "internal/replica"), edge{"internal/vfs", "all its I/O goes through the file seam, so that crashes can be tested"},
			edge{"github.com/zeebo/xxh3", "verify compares chunks by digest"}, sys)},
		"internal/nbd":     {mechanisms, []edge{sys}},
		"internal/chardev": {mechanisms, []edge{sys}},
		"internal/guestmem": {mechanisms, append(down("internal/bitmap"), sys, edge{"github.com/hanwen/go-fuse/v2", "guest memory is a FUSE file"},
			edge{"github.com/klauspost/compress", "pages are compressed when that is cheaper than sending"}, edge{"github.com/zeebo/xxh3", "the audit compares pages by digest"})},
		"internal/netbuf":   {mechanisms, []edge{sys}},
		"internal/hostnet":  {mechanisms, []edge{sys, {"github.com/vishvananda/netlink", "bridges and taps"}, {"github.com/google/nftables", "the gate of a tap"}, {"golang.org/x/net/bpf", "the filter of frames for a guest"}}},
		"internal/qemu":     {mechanisms, []edge{sys}},
		"internal/mirror":   {mechanisms, nil},
		"internal/peer":     {mechanisms, []edge{sys, {"github.com/klauspost/compress", "frames are compressed"}}},
		"internal/doctor":   {mechanisms, []edge{sys}},
		"internal/selftest": {assemblies, append(down("internal/guestmem", "internal/qemu"), sys)},

		"internal/agent": {assemblies, append(down("internal/authority", "internal/clusterstore", "internal/config", "internal/pki", "internal/shimapi", "internal/vfs", "internal/bitmap", "internal/hostnet", "internal/netpath"),
			sys, edge{"api", "it implements what httpapi asks for, whose words are the wire types; it does not import httpapi"},
			edge{"internal/blockstore", "it makes and removes the disks of a VM; their metadata says what may be started from"},
			edge{"internal/replica", "split-brain show judges copies as the shims do"},
			edge{"github.com/prometheus/client_golang", "metrics"}, edge{"github.com/coreos/go-systemd/v22", "readiness"}, edge{"golang.org/x/sync", "groups of goroutines"})},
		"internal/shim": {assemblies, append(down("internal/authority", "internal/epoch", "internal/replica", "internal/bitmap", "internal/blockstore", "internal/chardev", "internal/guestmem", "internal/hostnet", "internal/mirror", "internal/nbd", "internal/netbuf",
			"internal/peer", "internal/pki", "internal/qemu", "internal/shimapi", "internal/vfs"), sys,
			edge{"internal/selftest", "a new standby is tried with the same probe as the host"},
			edge{"github.com/klauspost/compress", "pages are compressed"}, edge{"golang.org/x/sync", "groups of goroutines"})},

		"api": {surfaces, nil},
		"internal/httpapi": {surfaces, []edge{{"api", "it serves the wire types"},
			{"github.com/danielgtaylor/huma/v2", "OpenAPI and problem+json made from the code"}}},
		"internal/cli": {surfaces, append(down("internal/config", "internal/doctor", "internal/blockstore", "internal/vfs"), edge{"api", "it is a client of the REST interface"},
			edge{"github.com/spf13/cobra", "commands"}, edge{"github.com/spf13/pflag", "flags whose order counts"}, edge{"golang.org/x/term", "the console"}, edge{"gopkg.in/yaml.v3", "-o yaml"})},
		"internal/client": {surfaces, []edge{{"internal/lab/guestsvc", "it speaks to the services of the demo guest"}}},

		"internal/lab":          {surfaces, append(down("internal/config"), sys, edge{"api", "it asks agents whether they are up"}, edge{"github.com/vishvananda/netlink", "virtual switches and links"}, edge{"github.com/vishvananda/netns", "each host is a network namespace"})},
		"internal/lab/guest":    {surfaces, []edge{sys}},
		"internal/lab/bootdisk": {surfaces, nil},
		"internal/lab/distro":   {surfaces, []edge{sys, {"internal/lab/bootdisk", "its disk boots by itself"}}},
		"internal/lab/guestsvc": {surfaces, []edge{sys}},
		"internal/lab/demo": {surfaces, []edge{sys, {"api", "it follows the VM's events"}, {"internal/client", "it keeps the books about requests"}, {"internal/lab", "it needs hosts"},
			{"internal/lab/guest", "and a guest"}, {"internal/lab/guestsvc", "and its services"}, {"golang.org/x/term", "the live timeline"}}},
		"internal/lab/labcmd": {surfaces, append(down("internal/config"), sys, edge{"api", "names of errors and exit codes"}, edge{"internal/client", "perdure lab client"}, edge{"internal/lab", "it is its command line"}, edge{"internal/lab/demo", "perdure lab demo"},
			edge{"internal/lab/guest", "perdure lab guest build"}, edge{"internal/lab/guestsvc", "ports of the demo guest"}, edge{"github.com/spf13/cobra", "commands"}, edge{"golang.org/x/term", "the live timeline"})},

		"cmd/perdure": {surfaces, append(down("internal/agent", "internal/shim", "internal/config", "internal/doctor", "internal/guestmem", "internal/qemu", "internal/selftest", "internal/hostnet", "internal/pki"), sys,
			edge{"api", "error classes"}, edge{"internal/cli", "the command line"}, edge{"internal/httpapi", "joins it with the agent"}, edge{"internal/lab", "the lab"}, edge{"internal/lab/labcmd", "the lab's command line"},
			edge{"github.com/spf13/cobra", "mounts the lab's commands"})},
		"cmd/perdure-guest": {surfaces, []edge{sys, {"internal/lab/guestsvc", "runs inside the demo guest"}, {"github.com/vishvananda/netlink", "sets the guest's address"}}},
	}
}

// testOnly lists packages that only tests import; they may import anything below them.
func testOnly() []string {
	return []string{"internal/testenv", "internal/diskcheck", "internal/httpapi/apitest", "internal/qemu/qemutest", "e2e", "bench"}
}

// ban forbids reaching something at all, on whatever way.
type ban struct {
	from []string
	to   []string // prefixes
	why  string
}

func bans() []ban {
	fuse := []string{"github.com/hanwen/go-fuse", module + "internal/guestmem"}
	etcd := []string{"go.etcd.io", module + "internal/clusterstore"}
	return []ban{
		{[]string{"internal/agent"}, append([]string{module + "internal/nbd", module + "internal/qemu", module + "internal/shim", module + "internal/netbuf"}, fuse...),
			"the agent may be upgraded or crash at any moment: nothing of a running guest may hang on it"},
		{[]string{"internal/agent"}, []string{module + "internal/httpapi", "github.com/danielgtaylor/huma"}, "main joins agent and surface"},
		{[]string{"internal/shim"}, append([]string{module + "internal/agent", module + "api", "github.com/danielgtaylor/huma", "google.golang.org/grpc"}, etcd...),
			"trouble in the cluster store must not reach a running guest; shims ask their agent"},
		{[]string{"internal/cli", "api", "internal/httpapi"}, append(append([]string{module + "internal/agent", module + "internal/shim", module + "internal/qemu", module + "internal/nbd"}, fuse...), etcd...),
			"surfaces are clients; main injects what is more"},
		{[]string{"internal/lab", "internal/lab/labcmd", "internal/lab/demo"}, append([]string{module + "internal/agent", module + "internal/shim"}, etcd...),
			"the lab runs the same binary as a real host, as processes"},
		{[]string{"internal/model", "internal/bitmap"}, []string{"github.com/", "golang.org/", "go.etcd.io/", "os", "net", "log"}, "nouns have no outside"},
	}
}

// pkg is what go list says of a package.
type pkg struct {
	ImportPath string
	Dir        string
	GoFiles    []string
	Imports    []string
	Standard   bool
	Module     *struct{ Path string }
}

func list(t *testing.T) map[string]*pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-deps", "-e", "-json=ImportPath,Dir,GoFiles,Imports,Standard,Module", "./...")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, &stderr)
	}
	all := map[string]*pkg{}
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		p := new(pkg)
		if err := dec.Decode(p); err == io.EOF {
			return all
		} else if err != nil {
			t.Fatalf("go list: %v", err)
		}
		all[p.ImportPath] = p
	}
}

// name returns the path inside the module, or "" for a package from outside.
func name(importPath string) string {
	n, ours := strings.CutPrefix(importPath, module)
	if !ours {
		return ""
	}
	return n
}

func isTestOnly(n string) bool {
	return slices.ContainsFunc(testOnly(), func(t string) bool { return n == t || strings.HasPrefix(n, t+"/") })
}

func TestImports(t *testing.T) {
	all, rows := list(t), table()
	for path, p := range all {
		n := name(path)
		if n == "" || isTestOnly(n) {
			continue
		}
		r, known := rows[n]
		if !known {
			t.Errorf("%s has no row in the table of imports_test.go: give it a layer and what it may import", n)
			continue
		}
		for _, imp := range p.Imports {
			if err := allowed(all, rows, n, r, imp); err != nil {
				t.Error(err)
			}
		}
	}
	for n := range rows {
		if all[module+n] == nil {
			t.Errorf("the table has a row for %s, which does not exist", n)
		}
	}
}

func allowed(all map[string]*pkg, rows map[string]row, from string, r row, imp string) error {
	if q := all[imp]; imp == "C" || imp == "unsafe" && r.layer < mechanisms {
		return fmt.Errorf("%s imports %s", from, imp)
	} else if q != nil && q.Standard || imp == "unsafe" || imp == module+"internal/model" {
		return nil
	}
	to := name(imp)
	if to != "" && isTestOnly(to) {
		return fmt.Errorf("%s imports %s, which is for tests", from, to)
	}
	for _, e := range r.may {
		if to != "" && e.to == to || to == "" && (imp == e.to || strings.HasPrefix(imp, e.to+"/")) {
			return nil
		}
	}
	if to == "" {
		to = imp
	}
	return fmt.Errorf("%s imports %s, which the table does not allow: go another way, or add an edge with its reason", from, to)
}

// Invariant: every edge that does not go down has its reason.
func TestEdgesHaveReasons(t *testing.T) {
	rows := table()
	for n, r := range rows {
		for _, e := range r.may {
			to, ours := rows[e.to]
			if (!ours || to.layer >= r.layer) && e.why == "" {
				t.Errorf("%s may import %s without a reason", n, e.to)
			}
		}
	}
}

func TestBans(t *testing.T) {
	all := list(t)
	for _, b := range bans() {
		for _, from := range b.from {
			start := all[module+from]
			if start == nil {
				t.Errorf("%s does not exist", from)
				continue
			}
			for _, to := range b.to {
				if way := reach(all, start.ImportPath, to); way != nil {
					t.Errorf("%s reaches %s: %s\n\twhy not: %s", from, to, strings.Join(way, " → "), b.why)
				}
			}
		}
	}
}

// reach returns a shortest way from one package to one that begins with
// prefix, or nil. A prefix without a dot or slash is one package of the
// standard library.
func reach(all map[string]*pkg, from, prefix string) []string {
	match := func(p string) bool {
		if strings.HasSuffix(prefix, "/") {
			return strings.HasPrefix(p, prefix)
		}
		return p == prefix || strings.HasPrefix(p, prefix+"/")
	}
	before := map[string]string{from: ""}
	for queue := []string{from}; len(queue) > 0; queue = queue[1:] {
		p := all[queue[0]]
		if p == nil || p.Standard {
			continue // what the standard library does inside is not ours
		}
		for _, imp := range p.Imports {
			if _, seen := before[imp]; seen {
				continue
			}
			before[imp] = queue[0]
			if match(imp) {
				way := []string{strings.TrimPrefix(imp, module)}
				for q := queue[0]; q != ""; q = before[q] {
					way = append([]string{strings.TrimPrefix(q, module)}, way...)
				}
				return way
			}
			queue = append(queue, imp)
		}
	}
	return nil
}

// TestPure keeps layer 1 free of everything that a test could not repeat.
func TestPure(t *testing.T) {
	all := list(t)
	for n, r := range table() {
		p := all[module+n]
		if r.layer != pure && n != "internal/model" && n != "internal/bitmap" || p == nil {
			continue
		}
		fset := token.NewFileSet()
		for _, f := range p.GoFiles {
			src, err := os.ReadFile(filepath.Join(p.Dir, f))
			if err != nil {
				t.Fatal(err)
			}
			for _, fault := range impure(t, fset, filepath.Join(n, f), src) {
				t.Error(fault)
			}
		}
	}
}

// impure returns what is forbidden in layer 1 and found in a file.
func impure(t *testing.T, fset *token.FileSet, file string, src []byte) (faults []string) {
	t.Helper()
	f, err := parser.ParseFile(fset, file, src, parser.SkipObjectResolution)
	if err != nil {
		t.Fatal(err)
	}
	fault := func(pos token.Pos, what string) {
		faults = append(faults, fmt.Sprintf("%s: %s is not allowed in a pure package", fset.Position(pos), what))
	}
	timeName := ""
	for _, imp := range f.Imports {
		path, err := strconv.Unquote(imp.Path.Value)
		if err != nil {
			t.Fatal(err)
		}
		for _, b := range []string{"os", "net", "syscall", "log", "math/rand", "crypto/rand", "runtime", "sync"} {
			if path == b || strings.HasPrefix(path, b+"/") {
				fault(imp.Pos(), "import of "+path)
			}
		}
		if path == "time" {
			timeName = "time"
			if imp.Name != nil {
				timeName = imp.Name.Name
			}
			if timeName == "." {
				fault(imp.Pos(), "dot import of time")
			}
		}
	}
	ast.Inspect(f, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.GoStmt:
			fault(n.Pos(), "a go statement")
		case *ast.SelectorExpr:
			x, ok := n.X.(*ast.Ident)
			if !ok || timeName == "" || x.Name != timeName {
				return true
			}
			switch n.Sel.Name {
			case "Now", "Sleep", "After", "AfterFunc", "Since", "Until", "Tick", "NewTimer", "NewTicker":
				fault(n.Pos(), "time."+n.Sel.Name)
			}
		}
		return true
	})
	return faults
}

func TestImpureFindsAll(t *testing.T) {
	src := `package x
import ("os"; "log/slog"; "math/rand/v2"; "net/http"; clock "time")
func f() { go f(); clock.Sleep(1); _ = clock.Now(); <-clock.After(1); var d clock.Duration; _ = d }`
	got := strings.Join(impure(t, token.NewFileSet(), "x.go", []byte(src)), "\n")
	for _, want := range []string{"import of os", "import of log/slog", "import of math/rand/v2", "import of net/http", "a go statement", "time.Sleep", "time.Now", "time.After"} {
		if !strings.Contains(got, want) {
			t.Errorf("not found: %s\n%s", want, got)
		}
	}
	if strings.Contains(got, "Duration") {
		t.Errorf("a type was taken for a clock:\n%s", got)
	}
}

func TestArchitecturePageNamesEveryPackage(t *testing.T) {
	page, err := os.ReadFile("docs/ARCHITECTURE.md")
	if err != nil {
		t.Fatal(err)
	}
	for n := range table() {
		if !bytes.Contains(page, []byte("`"+n+"`")) {
			t.Errorf("docs/ARCHITECTURE.md does not name %s", n)
		}
	}
}

func TestReach(t *testing.T) {
	all := map[string]*pkg{
		"perdure/a": {Imports: []string{"perdure/b", "fmt"}}, "perdure/b": {Imports: []string{"go.x.io/y/z"}},
		"go.x.io/y/z": {Imports: []string{"os"}}, "fmt": {Standard: true, Imports: []string{"net"}},
	}
	for prefix, want := range map[string]string{"go.x.io": "a b go.x.io/y/z", "perdure/b": "a b", "net": "", "os": "a b go.x.io/y/z os", "go.x": "", "go.x.io/y/z": "a b go.x.io/y/z"} {
		if got := strings.Join(reach(all, "perdure/a", prefix), " "); got != want {
			t.Errorf("reach %s: %q, want %q", prefix, got, want)
		}
	}
}
