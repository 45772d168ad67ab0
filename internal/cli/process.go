package cli

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"perdure/api"
	"perdure/internal/config"
)

// hostFlags are the flags of init, join and witness that make a host's configuration.
type hostFlags struct {
	file, name, stateDir, address, qemu, qemuImg string
	alinks, networks                             []string
	apiPort, peerPort, clientPort                int
	bootWait, networkStable                      time.Duration
	proof                                        string
}

func (h *hostFlags) add(c *cobra.Command) {
	f := c.Flags()
	f.StringVar(&h.file, "config", "", "configuration `FILE` (TOML); flags go over it")
	f.StringVar(&h.name, "name", "", "`NAME` of this host (default: the machine's name)")
	f.StringVar(&h.stateDir, "state-dir", "", "`DIR` where everything is kept (default "+config.DefaultStateDir+")")
	f.StringVar(&h.address, "address", "", "`IP` address of this host on the LAN")
	f.StringArrayVar(&h.alinks, "alink", nil, "`IP` address of this host on an availability link; once per link, in the same order on every host")
	f.StringArrayVar(&h.networks, "network", nil, "bridge that another host is to carry when its uplink fails here: `BRIDGE=UPLINK[,UPLINK…]`; once per bridge")
	f.DurationVar(&h.networkStable, "network-stable", 0, "how long an uplink must be good before it is used again (default 10s)")
	f.IntVar(&h.apiPort, "api-port", 0, "TCP `PORT` of the API (default 7400)")
	f.IntVar(&h.peerPort, "etcd-peer-port", 0, "TCP `PORT` of the cluster store, between voters (default 7401)")
	f.IntVar(&h.clientPort, "etcd-client-port", 0, "TCP `PORT` of the cluster store, for its clients (default 7402)")
	f.StringVar(&h.qemu, "qemu", "", "QEMU program, `PATH` (default /usr/bin/qemu-system-x86_64)")
	f.StringVar(&h.qemuImg, "qemu-img", "", "qemu-img program, `PATH`")
	f.DurationVar(&h.bootWait, "boot-wait", 0, "how long a start from disk waits for the other host (default 20s)")
	f.StringVar(&h.proof, "tracking-proof", "", "`FILE` that keeps the proof of dirty tracking (default in the state directory); hosts on one machine may share it")
}

// config puts defaults, file and flags together and checks the result.
func (h *hostFlags) config(c *cobra.Command, role config.Role) (config.Config, error) {
	conf := config.Default()
	if h.file != "" {
		var err error
		if conf, err = config.Load(h.file); err != nil {
			return conf, api.Errorf(api.Invalid, "%w", err)
		}
	}
	conf.Role = role
	set := func(flag string, to *string, v string) {
		if c.Flags().Changed(flag) {
			*to = v
		}
	}
	set("name", &conf.Name, h.name)
	set("state-dir", &conf.StateDir, h.stateDir)
	set("address", &conf.LAN.Address, h.address)
	set("qemu", &conf.QEMU, h.qemu)
	set("qemu-img", &conf.QEMUImg, h.qemuImg)
	set("tracking-proof", &conf.TrackingProof, h.proof)
	for flag, p := range map[string]struct {
		to *int
		v  int
	}{"api-port": {&conf.LAN.APIPort, h.apiPort}, "etcd-peer-port": {&conf.LAN.EtcdPeerPort, h.peerPort}, "etcd-client-port": {&conf.LAN.EtcdClientPort, h.clientPort}} {
		if c.Flags().Changed(flag) {
			*p.to = p.v
		}
	}
	if c.Flags().Changed("boot-wait") {
		conf.BootWait = config.Duration(h.bootWait)
	}
	if c.Flags().Changed("alink") {
		conf.ALinks = nil
		for _, addr := range h.alinks {
			conf.ALinks = append(conf.ALinks, config.ALink{Address: addr})
		}
	}
	if c.Flags().Changed("network") {
		conf.Networks = nil
		for _, n := range h.networks {
			bridge, uplinks, ok := strings.Cut(n, "=")
			if !ok || uplinks == "" {
				return conf, api.Errorf(api.Invalid, "--network %q names no uplink", n).WithAction("write it like --network br0=eth0")
			}
			conf.Networks = append(conf.Networks, config.Network{Bridge: bridge, Uplinks: strings.Split(uplinks, ","), Stable: config.Duration(h.networkStable)})
		}
	}
	if conf.Name == "" {
		host, err := os.Hostname()
		if err != nil {
			return conf, fmt.Errorf("read the machine's name: %w", err)
		}
		host, _, _ = strings.Cut(strings.ToLower(host), ".")
		conf.Name = host
	}
	if conf.LAN.Address == "" {
		return conf, api.Errorf(api.Invalid, "the address of this host on the LAN is missing").WithAction("give --address IP")
	}
	if abs, err := filepath.Abs(conf.StateDir); err == nil {
		conf.StateDir = abs
	}
	if err := conf.Validate(); err != nil {
		return conf, api.Errorf(api.Invalid, "%w", err)
	}
	return conf, nil
}

func (a *app) initCommand() *cobra.Command {
	if a.Init == nil {
		return nil
	}
	var h hostFlags
	var cluster string
	c := &cobra.Command{Use: "init --address IP [--alink IP]…", Short: "Make this machine the first host of a new cluster", Args: args(),
		Long: `Makes the certificate authority of a new cluster and the state directory of its
first host. Start "perdure agent" afterwards; "perdure token create" then makes
the tokens with which other machines join.`,
		Example: "  perdure init --name a --address 192.0.2.1 --alink 10.0.0.1 --alink 10.0.1.1"}
	h.add(c)
	c.Flags().StringVar(&cluster, "cluster", "perdure", "`NAME` of the cluster")
	c.RunE = func(cmd *cobra.Command, _ []string) error {
		conf, err := h.config(cmd, config.RoleHost)
		if err != nil {
			return err
		}
		if err := api.CheckName("cluster", cluster); err != nil {
			return err
		}
		return a.Init(cmd.Context(), InitOptions{Config: conf, Cluster: cluster, Out: a.out})
	}
	return c
}

func (a *app) joinCommand() *cobra.Command {
	if a.Join == nil {
		return nil
	}
	var h hostFlags
	c := &cobra.Command{Use: "join TOKEN --address IP [--alink IP]…", Short: "Make this machine a further host of a cluster", Args: args("TOKEN"),
		Long: `Joins the cluster that the token was made by ("perdure token create" on one of
its hosts). The token holds the fingerprint of the cluster's authority, so a
stranger's host is recognised before anything secret is sent to it. Start
"perdure agent" afterwards.`}
	h.add(c)
	c.RunE = func(cmd *cobra.Command, given []string) error {
		conf, err := h.config(cmd, config.RoleHost)
		if err != nil {
			return err
		}
		return a.Join(cmd.Context(), JoinOptions{Config: conf, Token: given[0], Out: a.out})
	}
	return c
}

func (a *app) witnessCommand() *cobra.Command {
	if a.Witness == nil {
		return nil
	}
	var h hostFlags
	var token string
	var l LogOptions
	c := &cobra.Command{Use: "witness [--join TOKEN --address IP]", Short: "Run the witness: it votes and runs no VM", Args: args(),
		Long: `Runs the third vote where there are two hosts. With --join it joins first; the
token is made by "perdure token create --witness". Without --join it runs from
the state directory of an earlier join.`}
	h.add(c)
	l.add(c)
	c.Flags().StringVar(&token, "join", "", "join with this `TOKEN` before running")
	c.RunE = func(cmd *cobra.Command, _ []string) error {
		log, err := l.check(a)
		if err != nil {
			return err
		}
		o := WitnessOptions{Token: token, StateDir: h.stateDir, Log: log}
		if o.StateDir == "" {
			o.StateDir = config.DefaultStateDir
		}
		if token != "" {
			if o.Config, err = h.config(cmd, config.RoleWitness); err != nil {
				return err
			}
			o.StateDir = o.Config.StateDir
		}
		return a.Witness(cmd.Context(), o)
	}
	return c
}

func (l *LogOptions) add(c *cobra.Command) {
	c.Flags().StringVar(&l.Level, "log-level", "info", "`LEVEL`: debug, info, warn or error")
	c.Flags().StringVar(&l.Format, "log-format", "text", "`FORMAT`: text or json")
}

func (l *LogOptions) check(a *app) (LogOptions, error) {
	switch l.Level {
	case "debug", "info", "warn", "error":
	default:
		return *l, api.Errorf(api.Invalid, "--log-level %q is not known; allowed are debug, info, warn and error", l.Level)
	}
	if l.Format != "text" && l.Format != "json" {
		return *l, api.Errorf(api.Invalid, "--log-format %q is not known; allowed are text and json", l.Format)
	}
	r := *l
	r.Out = a.err
	return r, nil
}

func (a *app) agentCommand() *cobra.Command {
	if a.Agent == nil {
		return nil
	}
	var dir string
	var l LogOptions
	c := &cobra.Command{Use: "agent", Short: "Run the agent of this host", Args: args(),
		Long: `Runs the agent: membership, authority records, the API. It may be stopped,
crash or be upgraded at any moment; VMs go on without it and are found again.`}
	c.Flags().StringVar(&dir, "state-dir", config.DefaultStateDir, "state `DIR` made by init or join")
	l.add(c)
	c.RunE = func(cmd *cobra.Command, _ []string) error {
		log, err := l.check(a)
		if err != nil {
			return err
		}
		abs, err := filepath.Abs(dir)
		if err != nil {
			return fmt.Errorf("find state directory: %w", err)
		}
		return a.Agent(cmd.Context(), AgentOptions{StateDir: abs, Log: log})
	}
	return c
}

func (a *app) shimCommand() *cobra.Command {
	if a.Shim == nil {
		return nil
	}
	var dir string
	var l LogOptions
	c := &cobra.Command{Use: "shim --dir DIR", Short: "Run one VM on this host (started by the agent)", Hidden: true, Args: args()}
	c.Flags().StringVar(&dir, "dir", "", "`DIR` of the VM")
	l.add(c)
	c.RunE = func(cmd *cobra.Command, _ []string) error {
		log, err := l.check(a)
		if err != nil {
			return err
		}
		if dir == "" {
			return api.Errorf(api.Invalid, "--dir is missing")
		}
		return a.Shim(cmd.Context(), ShimOptions{Dir: dir, Log: log})
	}
	return c
}

func (a *app) flusherCommand() *cobra.Command {
	if a.Flusher == nil {
		return nil
	}
	return &cobra.Command{Use: "flusher", Short: "Flush guest memory (started by the shim)", Hidden: true, DisableFlagParsing: true,
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, given []string) error { return a.Flusher(cmd.Context(), given) }}
}
