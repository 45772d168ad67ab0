package agent

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"perdure/internal/clusterstore"
	"perdure/internal/config"
	"perdure/internal/hostnet"
	"perdure/internal/model"
	"perdure/internal/netpath"
)

const (
	netTick    = 50 * time.Millisecond  // between two looks at all bridges
	probeEvery = 250 * time.Millisecond // between two requests
	probeLost  = time.Second            // without an answer the uplink counts as failed
	netCheck   = 2 * time.Second        // between two looks whether the kernel's rules still stand
)

// announceAt are the times after a change of the way at which the addresses
// behind a bridge are announced.
var announceAt = []time.Duration{0, 50 * time.Millisecond, 150 * time.Millisecond, 400 * time.Millisecond, time.Second, 2 * time.Second, 3 * time.Second, 5 * time.Second}

// networks makes the bridges of this host go over another host when their
// uplinks fail. What to do is decided by netpath; what is done stands in the
// kernel and stays there when the agent dies.
type networks struct {
	a       *Agent
	words   *netWords
	wake    chan struct{}
	ways    *hostnet.Ways
	gate    *hostnet.Gate
	bridges []*bridgeNet
	began   time.Time
	checked time.Time

	mu   sync.Mutex
	said []clusterstore.HostNetwork // as published
}

// bridgeNet is one bridge; the goroutine of networks owns it.
type bridgeNet struct {
	n       *networks
	cfg     config.Network
	m       *netpath.Machine
	have    netpath.Kernel
	plan    netpath.Plan
	carrier bool
	good    bool
	probe   *hostnet.Probe
	asked   time.Time

	since    time.Time // of the present way
	badSince time.Time
	lost     bool // nobody carries, and that was said
	port     string
	due      []time.Time // announcements
	fault    string      // what the kernel refused
	setup    string      // what is wrong with the configuration
	mtu      string
}

func newNetworks(a *Agent) *networks {
	n := &networks{a: a, wake: make(chan struct{}, 1), began: time.Now()}
	n.words = newNetWords(a, n.poke)
	for _, c := range a.cfg.Networks {
		p := netpath.DefaultPolicy()
		p.Stable = c.StableFor()
		n.bridges = append(n.bridges, &bridgeNet{n: n, cfg: c, m: netpath.New(p), since: time.Now()})
	}
	return n
}

func (n *networks) poke() {
	select {
	case n.wake <- struct{}{}:
	default:
	}
}

// run works until ctx ends, and leaves the kernel as it is then.
func (n *networks) run(ctx context.Context) {
	// The connections to the kernel stay in the network namespace of a thread.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	log := n.a.log
	for {
		err := n.open()
		if err == nil {
			break
		}
		if len(n.bridges) == 0 {
			log.Debug("what an earlier agent may have carried is not known", "error", err)
			return
		}
		log.Error("networks cannot be watched; it is tried again", "error", err)
		if !sleep(ctx, 5*time.Second) {
			return
		}
	}
	defer n.gate.Close()
	if len(n.bridges) == 0 {
		return
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	wg.Go(func() { n.words.run(ctx) })
	wg.Go(func() {
		for ctx.Err() == nil {
			if err := hostnet.Changes(ctx, n.poke); err != nil {
				log.Warn("devices are looked at by the clock only", "error", err)
				sleep(ctx, 5*time.Second)
			}
		}
	})
	tick := time.NewTicker(netTick)
	defer tick.Stop()
	for {
		n.look(ctx, &wg)
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-n.wake:
		}
	}
}

// open connects to the kernel and takes over what an earlier agent left there.
func (n *networks) open() (err error) {
	if n.ways == nil {
		if n.ways, err = hostnet.OpenWays(); err != nil {
			return err
		}
	}
	if n.gate == nil {
		if n.gate, err = hostnet.OpenGate(); err != nil {
			return err
		}
	}
	return n.adopt()
}

// adopt reads from the kernel what it does for each bridge. What belongs to no
// bridge of this configuration any more goes.
func (n *networks) adopt() error {
	sets, installed, err := n.ways.Get()
	if err != nil {
		return err
	}
	ends, err := hostnet.Ends()
	if err != nil {
		return err
	}
	if len(n.bridges) == 0 && len(ends) == 0 {
		if len(sets.Uplinks) > 0 {
			return n.ways.Uninstall()
		}
		return nil
	}
	for _, e := range ends {
		b := n.bridge(e.Bridge)
		mine := b != nil && e.Joined && e.Port == n.a.cfg.CarryPort && (e.Client && e.Tunnel.Client == n.a.cfg.Name || !e.Client && e.Server == n.a.cfg.Name)
		switch {
		case !mine:
			var up []string
			if b != nil {
				up = b.cfg.Uplinks
			}
			if err := hostnet.Leave(e.Name, up); err != nil {
				return err
			}
		case !e.Client:
			b.have.Serving = append(b.have.Serving, e.Tunnel.Client)
		default:
			b.have.Client, b.have.State = e.Server, netpath.Shut
			switch {
			case slices.Contains(sets.Drain, e.Name):
				b.have.State = netpath.Drain
			case installed && !slices.Contains(sets.Shut, e.Name) && slices.Contains(sets.Shut, b.cfg.Uplinks[0]):
				b.have.State = netpath.Open
			}
		}
	}
	for _, b := range n.bridges {
		slices.Sort(b.have.Serving)
		if via := b.have.Carried(); via != "" {
			n.a.log.Info("the bridge is carried by another host, as an earlier agent left it", "bridge", b.cfg.Bridge, "by", via)
		}
	}
	return n.sets()
}

func (n *networks) bridge(name string) *bridgeNet {
	for _, b := range n.bridges {
		if b.cfg.Bridge == name {
			return b
		}
	}
	return nil
}

// sets writes what the bridges have into the kernel, in one step.
func (n *networks) sets() error {
	var s hostnet.WaySets
	for _, b := range n.bridges {
		s.Uplinks = append(s.Uplinks, b.cfg.Uplinks...)
		client := b.client(b.have.Client).ClientName()
		switch b.have.State {
		case netpath.Open:
			s.Shut = append(s.Shut, b.cfg.Uplinks...)
		case netpath.Drain:
			s.Drain = append(s.Drain, client)
		case netpath.Shut:
			s.Shut = append(s.Shut, client)
		}
	}
	return n.ways.Set(s)
}

func (b *bridgeNet) client(server string) hostnet.Tunnel {
	return hostnet.Tunnel{Bridge: b.cfg.Bridge, Client: b.n.a.cfg.Name, Server: server, Port: b.n.a.cfg.CarryPort}
}

func (b *bridgeNet) server(client string) hostnet.Tunnel {
	return hostnet.Tunnel{Bridge: b.cfg.Bridge, Client: client, Server: b.n.a.cfg.Name, Port: b.n.a.cfg.CarryPort}
}

// look is one round over all bridges.
func (n *networks) look(ctx context.Context, wg *sync.WaitGroup) {
	now := time.Now()
	if now.Sub(n.checked) >= netCheck {
		n.checked = now
		if _, ok, err := n.ways.Get(); err != nil || !ok {
			n.a.log.Warn("the rules that guard the ways of bridges were gone; they are put back", "error", err)
			if err := n.sets(); err != nil {
				n.a.log.Error("put back the rules of bridges", "error", err)
			}
		}
		for _, b := range n.bridges {
			b.inspect()
		}
	}
	words := map[string]netpath.Word{}
	for _, b := range n.bridges {
		b.look(ctx, wg, now)
		words[b.cfg.Bridge] = b.m.Say(b.have, b.plan)
	}
	n.words.say(words)
	n.publish()
}

// look decides and acts for one bridge.
func (b *bridgeNet) look(ctx context.Context, wg *sync.WaitGroup, now time.Time) {
	good := b.uplink(ctx, wg, now)
	if !good && (b.good || b.badSince.IsZero()) {
		b.badSince = now
	}
	b.good = good
	b.plan = b.m.Step(netpath.Inputs{Now: now.Sub(b.n.began), Uplink: good, Peers: b.n.words.peers(b.cfg.Bridge), Have: b.have})
	for range 10 { // more steps than any plan has
		a := netpath.Next(b.have, b.plan)
		if a.Kind == netpath.Nothing {
			b.fault = ""
			break
		}
		if err := b.do(a); err != nil {
			if b.fault == "" {
				b.n.a.log.Error("change the way of a bridge; it is tried again", "bridge", b.cfg.Bridge, "step", a.Kind.String(), "host", a.Host, "error", err)
			}
			b.fault = err.Error()
			break
		}
	}
	b.retarget()
	b.announce(now)
	b.tell(now)
}

// uplink reports whether the uplink works.
func (b *bridgeNet) uplink(ctx context.Context, wg *sync.WaitGroup, now time.Time) bool {
	b.carrier = hostnet.Carrier(b.cfg.Uplinks)
	if len(b.cfg.Probe) == 0 {
		return b.carrier
	}
	if b.probe == nil && b.carrier {
		var to []netip.Addr
		for _, p := range b.cfg.Probe {
			if a, err := netip.ParseAddr(p); err == nil {
				to = append(to, a)
			}
		}
		p, err := hostnet.OpenProbe(b.cfg.Uplinks[0], b.n.a.cfg.Name, to)
		if err != nil {
			return b.carrier
		}
		b.probe = p
		wg.Go(func() { p.Run(ctx) })
	}
	if !b.carrier {
		return false
	}
	if now.Sub(b.asked) >= probeEvery {
		b.asked = now
		_ = b.probe.Ask() // what is not sent is not answered
	}
	return b.probe.Age() < probeLost
}

// do carries out one step and notes what the kernel does then. The order
// within a step is such that the kernel is between before and after at worst.
func (b *bridgeNet) do(a netpath.Action) error {
	was := b.have
	client := b.client(a.Host)
	remote := b.n.words.remote(a.Host)
	set := func() error {
		b.have = was.After(a)
		if err := b.n.sets(); err != nil {
			b.have = was
			return err
		}
		return nil
	}
	switch a.Kind {
	case netpath.JoinClient:
		if remote == nil {
			return fmt.Errorf("join %s: host %s has no A-link that answers", b.cfg.Bridge, a.Host)
		}
		// The name is shut before the device is there.
		if err := set(); err != nil {
			return err
		}
		if err := client.JoinClient(b.cfg.Uplinks, remote); err != nil {
			b.have = was
			return err
		}
	case netpath.OpenClient:
		if err := set(); err != nil {
			return err
		}
		for _, u := range b.cfg.Uplinks {
			hostnet.Forget(u, true)
		}
		hostnet.Forget(client.ClientName(), true)
		b.turned(client.ClientName())
	case netpath.DrainClient, netpath.ShutClient:
		// First no address is looked for behind the tunnel any more.
		hostnet.Forget(client.ClientName(), false)
		if err := set(); err != nil {
			return err
		}
		if was.State == netpath.Open {
			b.turned(b.cfg.Uplinks[0])
		}
	case netpath.LeaveClient:
		if err := hostnet.Leave(client.ClientName(), b.cfg.Uplinks); err != nil {
			return err
		}
		return set()
	case netpath.JoinServer:
		if remote == nil {
			return fmt.Errorf("join %s: host %s has no A-link that answers", b.cfg.Bridge, a.Host)
		}
		if err := b.server(a.Host).JoinServer(remote); err != nil {
			return err
		}
		b.have = was.After(a)
	case netpath.LeaveServer:
		if err := hostnet.Leave(b.server(a.Host).ServerName(), nil); err != nil {
			return err
		}
		b.have = was.After(a)
	}
	return nil
}

// turned begins to announce the addresses behind the bridge at its new way out.
func (b *bridgeNet) turned(port string) {
	b.port, b.due = port, nil
	for _, d := range announceAt {
		b.due = append(b.due, time.Now().Add(d))
	}
}

func (b *bridgeNet) announce(now time.Time) {
	if len(b.due) == 0 || now.Before(b.due[0]) {
		return
	}
	for len(b.due) > 0 && !now.Before(b.due[0]) {
		b.due = b.due[1:]
	}
	open, err := b.n.gate.State()
	if err != nil {
		b.n.a.log.Warn("announce addresses: read tap gate", "error", err)
	}
	macs, err := hostnet.Locals(b.cfg.Bridge, b.cfg.Uplinks, func(tap string) bool { return open[tap] > 0 })
	if err == nil {
		err = hostnet.Announce(b.port, macs)
	}
	if err != nil {
		b.n.a.log.Warn("announce addresses", "bridge", b.cfg.Bridge, "port", b.port, "error", err)
	}
}

// retarget turns the tunnels to an A-link that works.
func (b *bridgeNet) retarget() {
	turn := func(name, host string) {
		if to := b.n.words.remote(host); to != nil && b.n.words.moved(name, to) {
			if err := hostnet.SetRemote(name, to); err != nil {
				b.n.a.log.Warn("turn a tunnel to another A-link", "bridge", b.cfg.Bridge, "error", err)
			}
		}
	}
	if b.have.Client != "" {
		turn(b.client(b.have.Client).ClientName(), b.have.Client)
	}
	for _, h := range b.have.Serving {
		turn(b.server(h).ServerName(), h)
	}
}

// inspect looks at what changes seldom.
func (b *bridgeNet) inspect() {
	b.setup, b.mtu = "", ""
	for _, u := range b.cfg.Uplinks {
		if err := hostnet.CheckUplink(b.cfg.Bridge, u); err != nil {
			b.setup = err.Error()
			return
		}
	}
	if len(b.n.a.cfg.ALinks) == 0 {
		b.setup = "this host has no A-link over which another could carry the bridge"
		return
	}
	mtu, err := hostnet.MTU(b.cfg.Bridge)
	if err != nil {
		return
	}
	for _, l := range b.n.a.cfg.ALinks {
		if have, dev := mtuOf(l.Address); have > 0 && have < mtu+hostnet.VXLANOverhead {
			b.mtu = fmt.Sprintf("A-link %s (%s) takes packets of %d bytes; frames of bridge %s would need %d", l.Address, dev, have, b.cfg.Bridge, mtu+hostnet.VXLANOverhead)
		}
	}
}

// mtuOf returns the MTU of the device that has an address.
func mtuOf(addr string) (int, string) {
	ip := net.ParseIP(addr)
	ifs, err := net.Interfaces()
	if err != nil {
		return 0, ""
	}
	for _, i := range ifs {
		addrs, err := i.Addrs()
		if err != nil {
			continue
		}
		for _, a := range addrs {
			if n, ok := a.(*net.IPNet); ok && n.IP.Equal(ip) {
				return i.MTU, i.Name
			}
		}
	}
	return 0, ""
}

func (b *bridgeNet) what() string {
	up := "uplink " + strings.Join(b.cfg.Uplinks, ", ") + " of bridge " + b.cfg.Bridge + " on host " + b.n.a.cfg.Name
	if b.carrier {
		return up + " reaches none of " + strings.Join(b.cfg.Probe, ", ")
	}
	return up + " has no carrier"
}

// tell makes events out of changes.
func (b *bridgeNet) tell(now time.Time) {
	via := b.have.Carried()
	was := b.carriedBefore()
	switch {
	case via != "" && via != was:
		b.event("network-carried", "%s; its frames go by host %s, %v after the failure was noticed", b.what(), via, now.Sub(b.badSince).Round(time.Millisecond))
		b.since, b.lost = now, false
	case via == "" && was != "" && b.good:
		b.event("network-back", "bridge %s on host %s goes by its own uplink again; host %s carried it for %v", b.cfg.Bridge, b.n.a.cfg.Name, was, now.Sub(b.since).Round(time.Millisecond))
		b.since, b.lost = now, false
	case via == "" && !b.good && !b.lost && now.Sub(b.badSince) > time.Second:
		b.event("network-lost", "%s, and no other host carries it", b.what())
		b.lost = true
		b.since = now
	case via == "" && b.good && b.lost:
		b.event("network-back", "bridge %s on host %s goes by its own uplink again after %v without any", b.cfg.Bridge, b.n.a.cfg.Name, now.Sub(b.badSince).Round(time.Millisecond))
		b.lost = false
		b.since = now
	}
}

// carriedBefore is who carried when that was published last.
func (b *bridgeNet) carriedBefore() string {
	b.n.mu.Lock()
	defer b.n.mu.Unlock()
	for _, s := range b.n.said {
		if s.Bridge == b.cfg.Bridge {
			return s.CarriedBy
		}
	}
	return ""
}

// event notes it for each VM that runs here on the bridge.
func (b *bridgeNet) event(typ, text string, args ...any) {
	a := b.n.a
	a.log.Warn(fmt.Sprintf(text, args...), "event", typ)
	for _, v := range a.store.VMs() {
		rec := v.Record.Record
		if rec.Mode == model.ModeStopped || rec.Primary.Host != a.cfg.Name || !slices.ContainsFunc(v.Spec.NICs, func(c model.NICSpec) bool { return c.Bridge == b.cfg.Bridge }) {
			continue
		}
		a.event(v.Spec.Name, typ, rec.Term, text, args...)
		a.statuses.drop(v.Spec.Name)
	}
}

func (b *bridgeNet) problems() (out []model.Problem) {
	add := func(code string, sev model.Severity, text, action string) {
		out = append(out, model.Problem{Code: code, Severity: sev, Text: text, Action: action})
	}
	via := b.have.Carried()
	switch {
	case via != "" && !b.good:
		add("uplink-down", model.Warning, fmt.Sprintf("%s since %s; its frames go over the A-link and out of host %s", b.what(), b.badSince.Format(time.TimeOnly), via),
			fmt.Sprintf("mend the uplink (cable, switch port); it is used again by itself once it was good for %v", b.m.Hold()))
	case via != "":
		add("uplink-returning", model.Warning, fmt.Sprintf("bridge %s on host %s still goes by host %s: its own uplink has to be good for %v first", b.cfg.Bridge, b.n.a.cfg.Name, via, b.m.Hold()), "none: it goes back by itself")
	case !b.good && b.lost:
		add("uplink-down", model.Critical, b.what()+" since "+b.badSince.Format(time.TimeOnly)+", and no other host can carry it: its VMs are not reached from outside",
			"mend this uplink or another host's, or the A-link between them; everything else follows by itself")
	}
	if b.fault != "" {
		add("network-fault", model.Critical, "the way of bridge "+b.cfg.Bridge+" cannot be changed: "+b.fault, "see the agent's log; it is tried again by itself")
	}
	if b.setup != "" {
		add("network-setup", model.Warning, "bridge "+b.cfg.Bridge+" cannot be carried by another host: "+b.setup, "correct [[networks]] and [[alinks]] in config.toml, or the bridge, and restart the agent")
	}
	if b.mtu != "" {
		add("network-mtu", model.Warning, b.mtu, "raise the MTU of the A-link (9000 where the switches allow it); until then large packets are fragmented or answered with \"fragmentation needed\" while the bridge is carried")
	}
	return out
}

// publish makes the state of the bridges known to the cluster when it changed.
func (n *networks) publish() {
	var out []clusterstore.HostNetwork
	for _, b := range n.bridges {
		out = append(out, clusterstore.HostNetwork{Bridge: b.cfg.Bridge, Uplinks: b.cfg.Uplinks, Good: b.good,
			CarriedBy: b.have.Carried(), Carries: b.have.Serving, Since: b.since.UTC().Round(time.Second), Problems: b.problems()})
	}
	n.mu.Lock()
	same := fmt.Sprint(n.said) == fmt.Sprint(out)
	n.said = out
	n.mu.Unlock()
	if !same {
		n.a.hostChanged()
	}
}

// now returns what is known of this host's bridges.
func (n *networks) now() []clusterstore.HostNetwork {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.said)
}
