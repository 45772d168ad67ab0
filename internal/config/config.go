// Package config is the configuration of one host: defaults, then the file
// read strictly, then the relations between values, all before anything else
// is touched. A Config is a plain value; the package keeps no state.
//
// It judges text only: whether an address exists on the machine or a program
// can be run is for those who use it.
package config

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/BurntSushi/toml"
)

// Role says what a host does in the cluster.
type Role string

// The roles.
const (
	RoleHost    Role = "host"    // votes and runs VMs
	RoleWitness Role = "witness" // votes, runs no VM
)

// DefaultStateDir is where a host keeps its state unless told otherwise.
const DefaultStateDir = "/var/lib/perdure"

// Duration is a time.Duration written as text in TOML ("20s", "300ms").
type Duration time.Duration

// UnmarshalText reads the form of time.ParseDuration.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	if err != nil {
		return fmt.Errorf("%q is not a duration (like 20s or 300ms)", b)
	}
	*d = Duration(v)
	return nil
}

// MarshalText writes the form of time.Duration.String.
func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

// D returns the value as a time.Duration.
func (d Duration) D() time.Duration { return time.Duration(d) }

// LAN is how a host is reached by the other hosts.
type LAN struct {
	Address        string `toml:"address"`          // IP address; required
	APIPort        int    `toml:"api_port"`         // 1–65535, default 7400
	EtcdPeerPort   int    `toml:"etcd_peer_port"`   // 1–65535, default 7401
	EtcdClientPort int    `toml:"etcd_client_port"` // 1–65535, default 7402
}

// ALink is one availability link of a host.
type ALink struct {
	Address string `toml:"address"` // IP address of this host on the link
}

// Network is a bridge that another host carries when its uplink has failed
// here. The same bridge has to be named on the other hosts.
type Network struct {
	Bridge  string   `toml:"bridge"`  // name of the bridge
	Uplinks []string `toml:"uplinks"` // ports of the bridge that lead outside; at least one
	// Probe are IPv4 addresses beyond the uplink; while none of them answers ARP
	// the uplink counts as failed, whatever its carrier says. Empty: carrier only.
	Probe  []string `toml:"probe,omitempty"`
	Stable Duration `toml:"stable,omitempty"` // how long an uplink must be good before it is used again, 100ms–1h, default 10s
}

// DefaultStable is Network.Stable where it is not given.
const DefaultStable = 10 * time.Second

// StableFor returns Stable or its default.
func (n Network) StableFor() time.Duration {
	if n.Stable == 0 {
		return DefaultStable
	}
	return n.Stable.D()
}

// Etcd holds the timings of the cluster store; all members should have the same.
type Etcd struct {
	Heartbeat Duration `toml:"heartbeat"` // 10ms–5s, default 100ms
	Election  Duration `toml:"election"`  // 5 × heartbeat – 50s, default 1s
}

// Config is the configuration of one host.
type Config struct {
	Name     string   `toml:"name"`      // see ValidName; unique in the cluster
	StateDir string   `toml:"state_dir"` // absolute path
	Role     Role     `toml:"role"`
	QEMU     string   `toml:"qemu"`      // absolute path of qemu-system-x86_64
	QEMUImg  string   `toml:"qemu_img"`  // qemu-img: absolute path, or a name to look up in PATH
	BootWait Duration `toml:"boot_wait"` // how long a start from disk waits for the other host, 0–1h, default 20s
	// TrackingProof is the file in which the proof of dirty tracking is kept, an
	// absolute path; empty: in the state directory. Hosts on one machine, as in a lab, may share it.
	TrackingProof string  `toml:"tracking_proof,omitempty"`
	LAN           LAN     `toml:"lan"`
	ALinks        []ALink `toml:"alinks"` // at most 8; empty: the LAN address is used
	Etcd          Etcd    `toml:"etcd"`

	// CarryPort is the TCP and UDP port on the A-links by which bridges are
	// carried over other hosts; the same on every host. 1–65535, default 7403.
	CarryPort int       `toml:"carry_port"`
	Networks  []Network `toml:"networks,omitempty"`
}

// Default returns the configuration of a host about which only name and
// address are missing.
func Default() Config {
	return Config{
		StateDir: DefaultStateDir,
		Role:     RoleHost,
		QEMU:     "/usr/bin/qemu-system-x86_64",
		QEMUImg:  "qemu-img",
		BootWait: Duration(20 * time.Second),
		LAN:      LAN{APIPort: 7400, EtcdPeerPort: 7401, EtcdClientPort: 7402},
		Etcd:     Etcd{Heartbeat: Duration(100 * time.Millisecond), Election: Duration(time.Second)},

		CarryPort: 7403,
	}
}

// FileName is the name of the configuration below a state directory.
const FileName = "config.toml"

// Load reads and validates a configuration file.
func Load(path string) (Config, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return Config{}, fmt.Errorf("read config: %w", err)
	}
	c, err := Parse(data)
	if err != nil {
		return Config{}, fmt.Errorf("config %s: %w", path, err)
	}
	return c, nil
}

// Parse reads a configuration strictly over the defaults and validates it.
func Parse(data []byte) (Config, error) {
	c := Default()
	md, err := toml.NewDecoder(bytes.NewReader(data)).Decode(&c)
	if err != nil {
		var pe toml.ParseError
		if errors.As(err, &pe) {
			return Config{}, fmt.Errorf("line %d: %s", pe.Position.Line, pe.Message)
		}
		return Config{}, fmt.Errorf("parse: %w", err)
	}
	if un := md.Undecoded(); len(un) > 0 {
		keys := make([]string, len(un))
		for i, k := range un {
			keys[i] = k.String()
		}
		return Config{}, fmt.Errorf("unknown key %s; allowed are name, state_dir, role, qemu, qemu_img, boot_wait, tracking_proof, [lan] address, api_port, etcd_peer_port, etcd_client_port, [[alinks]] address, [etcd] heartbeat, election, carry_port, [[networks]] bridge, uplinks, probe, stable",
			strings.Join(keys, ", "))
	}
	if err := c.Validate(); err != nil {
		return Config{}, err
	}
	return c, nil
}

// Marshal returns the TOML form that Parse reads back to an equal value.
func (c Config) Marshal() ([]byte, error) {
	var b bytes.Buffer
	if err := toml.NewEncoder(&b).Encode(c); err != nil {
		return nil, fmt.Errorf("encode config: %w", err)
	}
	return b.Bytes(), nil
}

var nameRE = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

// ValidName reports whether s may name a host or a VM.
func ValidName(s string) bool { return nameRE.MatchString(s) }

// NameRule says in words what ValidName accepts.
const NameRule = "1 to 63 of a–z, 0–9 and -, beginning and ending with a letter or digit"

func bad(key string, value any, allowed string) error {
	return fmt.Errorf("%s = %q is not allowed; allowed: %s", key, fmt.Sprint(value), allowed)
}

// Validate checks all values and their relations and does no I/O. All faults
// are reported together.
func (c Config) Validate() error {
	var errs []error
	add := func(ok bool, key string, value any, allowed string) {
		if !ok {
			errs = append(errs, bad(key, value, allowed))
		}
	}
	add(ValidName(c.Name), "name", c.Name, NameRule)
	add(filepath.IsAbs(c.StateDir) && filepath.Clean(c.StateDir) != "/", "state_dir", c.StateDir, "an absolute path, not /")
	add(c.Role == RoleHost || c.Role == RoleWitness, "role", c.Role, `"host" or "witness"`)
	if c.Role == RoleHost {
		add(filepath.IsAbs(c.QEMU), "qemu", c.QEMU, "an absolute path")
		add(c.QEMUImg != "" && (filepath.IsAbs(c.QEMUImg) || !strings.Contains(c.QEMUImg, "/")), "qemu_img", c.QEMUImg, "an absolute path or the name of a program")
	}
	add(c.BootWait >= 0 && c.BootWait.D() <= time.Hour, "boot_wait", c.BootWait.D(), "0s to 1h")
	add(c.TrackingProof == "" || filepath.IsAbs(c.TrackingProof), "tracking_proof", c.TrackingProof, "an absolute path")
	add(usableIP(c.LAN.Address), "lan.address", c.LAN.Address, "the IP address of this host on the LAN, not unspecified")

	ports := map[int]string{}
	for _, p := range []struct {
		key string
		n   int
	}{{"lan.api_port", c.LAN.APIPort}, {"lan.etcd_peer_port", c.LAN.EtcdPeerPort}, {"lan.etcd_client_port", c.LAN.EtcdClientPort}, {"carry_port", c.CarryPort}} {
		add(p.n >= 1 && p.n <= 65535, p.key, p.n, "1 to 65535")
		if other, dup := ports[p.n]; dup {
			errs = append(errs, bad(p.key, p.n, "a port other than that of "+other))
		}
		ports[p.n] = p.key
	}

	add(len(c.ALinks) <= 8, "alinks", len(c.ALinks), "at most 8 links")
	seen := map[string]bool{}
	for i, l := range c.ALinks {
		key := fmt.Sprintf("alinks[%d].address", i)
		add(usableIP(l.Address), key, l.Address, "the IP address of this host on the link, not unspecified")
		add(!seen[l.Address], key, l.Address, "an address that no other link has")
		seen[l.Address] = true
	}
	c.checkNetworks(add)
	hb, el := c.Etcd.Heartbeat.D(), c.Etcd.Election.D()
	add(hb >= 10*time.Millisecond && hb <= 5*time.Second && hb%time.Millisecond == 0, "etcd.heartbeat", hb, "10ms to 5s, whole milliseconds")
	add(el >= 5*hb && el <= 50*time.Second && el%time.Millisecond == 0, "etcd.election", el, "5 × etcd.heartbeat to 50s, whole milliseconds")
	return errors.Join(errs...)
}

// ifnameRE is what the kernel takes for the name of a device, less what would
// confuse people.
var ifnameRE = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}$`)

func (c Config) checkNetworks(add func(ok bool, key string, value any, allowed string)) {
	seen := map[string]bool{}
	once := func(key, name, what string) {
		add(ifnameRE.MatchString(name), key, name, "the name of a network device, 1 to 15 of letters, digits, _ . -")
		add(!seen[name], key, name, "a "+what+" that is not named twice")
		seen[name] = true
	}
	add(len(c.Networks) <= 32, "networks", len(c.Networks), "at most 32 networks")
	for i, n := range c.Networks {
		key := func(f string) string { return fmt.Sprintf("networks[%d].%s", i, f) }
		once(key("bridge"), n.Bridge, "bridge")
		add(len(n.Uplinks) >= 1 && len(n.Uplinks) <= 8, key("uplinks"), strings.Join(n.Uplinks, " "), "1 to 8 ports of the bridge")
		for _, u := range n.Uplinks {
			once(key("uplinks"), u, "uplink")
		}
		add(len(n.Probe) <= 4, key("probe"), len(n.Probe), "at most 4 addresses")
		for _, p := range n.Probe {
			a, err := netip.ParseAddr(p)
			add(err == nil && a.Is4() && usableIP(p), key("probe"), p, "an IPv4 address beyond the uplink")
		}
		st := n.StableFor()
		add(st >= 100*time.Millisecond && st <= time.Hour, key("stable"), st, "100ms to 1h")
	}
}

// usableIP accepts an address as a host may have it; a zone is allowed.
func usableIP(s string) bool {
	a, err := netip.ParseAddr(s)
	return err == nil && !a.IsUnspecified() && !a.IsMulticast()
}

// ALinkAddrs returns the addresses of the availability links in order; where
// none is configured the LAN serves as the only one.
func (c Config) ALinkAddrs() []string {
	if len(c.ALinks) == 0 {
		return []string{c.LAN.Address}
	}
	out := make([]string, len(c.ALinks))
	for i, l := range c.ALinks {
		out[i] = l.Address
	}
	return out
}

// APIAddr is the IP:port of the agent's API.
func (c Config) APIAddr() string { return join(c.LAN.Address, c.LAN.APIPort) }

// PeerAddr is the IP:port where etcd members reach each other.
func (c Config) PeerAddr() string { return join(c.LAN.Address, c.LAN.EtcdPeerPort) }

// ClientAddr is the IP:port of etcd's client side.
func (c Config) ClientAddr() string { return join(c.LAN.Address, c.LAN.EtcdClientPort) }

func join(addr string, port int) string { return net.JoinHostPort(addr, fmt.Sprint(port)) }

// Path returns a path below the state directory.
func (c Config) Path(elem ...string) string {
	return filepath.Join(append([]string{c.StateDir}, elem...)...)
}

// The parts of a state directory.

// AgentSocket is the agent's Unix socket for root and for shims.
func (c Config) AgentSocket() string { return c.Path("run", "agent.sock") }

// VMDir is the directory of a VM.
func (c Config) VMDir(vm string) string { return c.Path("vms", vm) }

// BlobPath is where the blob with a SHA-256 digest is kept.
func (c Config) BlobPath(digest string) string { return c.Path("blobs", digest) }

// PKIPath is a file of the host's identity: "ca.crt", "ca.key", "host.crt" or "host.key".
func (c Config) PKIPath(name string) string { return c.Path("pki", name) }

// ProofPath is the file in which the proof of dirty tracking is kept.
func (c Config) ProofPath() string {
	if c.TrackingProof != "" {
		return c.TrackingProof
	}
	return c.Path("tracking-proof.json")
}

// EtcdDir is the data directory of the embedded store.
func (c Config) EtcdDir() string { return c.Path("etcd") }
