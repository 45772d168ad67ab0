package hostnet

import (
	"bytes"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Names in the kernel's rule set (table bridge perdure).
const (
	tableName = "perdure"
	setName   = "open"
	chainName = "gate"
)

// Bounds of Open.
const (
	minOpen = time.Millisecond
	maxOpen = time.Hour
)

// ErrReinstalled is wrapped by the error of an Open that found the gate's rule
// gone and put it back: frames of all VMs of this host were unguarded for a
// while. The taps are open as asked for.
var ErrReinstalled = errors.New("tap gate was missing and has been put back")

// Gate is the kernel's gate of this host's taps. Shut is its natural state:
//
//	table bridge perdure {
//		set open { type ifname; flags timeout; }
//		chain gate {
//			type filter hook prerouting priority -300;
//			iifname "pd*" iifname != @open counter drop
//		}
//	}
//
// Invariant: whatever becomes of the process that opened a tap, the tap is
// shut when the duration of its last Open has passed.
type Gate struct {
	mu    sync.Mutex
	ns    int // the kernel connection's network namespace
	conn  *nftables.Conn
	table *nftables.Table
	set   *nftables.Set
	chain *nftables.Chain

	elements *setSocket
}

// OpenGate connects to the kernel, in the network namespace of the calling
// thread. It installs nothing.
func OpenGate() (*Gate, error) {
	ns, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open tap gate: %w", err)
	}
	g := &Gate{ns: ns}
	g.table = &nftables.Table{Name: tableName, Family: nftables.TableFamilyBridge}
	g.set = &nftables.Set{Table: g.table, Name: setName, KeyType: nftables.TypeIFName, HasTimeout: true}
	accept := nftables.ChainPolicyAccept
	g.chain = &nftables.Chain{Name: chainName, Table: g.table, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityRaw, Policy: &accept}
	if g.elements, err = openSetSocket(); err != nil {
		unix.Close(ns)
		return nil, fmt.Errorf("open tap gate: %w", err)
	}
	if err := g.connect(); err != nil {
		unix.Close(ns)
		g.elements.close()
		return nil, fmt.Errorf("open tap gate: %w", err)
	}
	return g, nil
}

func (g *Gate) connect() error {
	conn, err := nftables.New(nftables.AsLasting(), nftables.WithNetNSFd(g.ns))
	if err != nil {
		return fmt.Errorf("connect to nftables: %w", err)
	}
	g.conn = conn
	return nil
}

// flush carries out what was queued, all of it or nothing. After an error the
// connection is made anew, since answers to the failed batch may still be in it.
func (g *Gate) flush() error {
	err := g.conn.Flush()
	if err != nil {
		_ = g.conn.CloseLasting() // a new one takes its place
		err = errors.Join(err, g.connect())
	}
	return err
}

// Install puts table, set, chain and rule in place. It may be called at any
// time, by several processes, and leaves open what is open.
func (g *Gate) Install() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.install()
}

func (g *Gate) install() error {
	// One transaction: there is no moment without the rule.
	g.conn.AddTable(g.table)
	if err := g.conn.AddSet(g.set, nil); err != nil {
		return fmt.Errorf("install tap gate: %w", err)
	}
	g.conn.AddChain(g.chain)
	g.conn.FlushChain(g.chain)
	g.conn.AddRule(&nftables.Rule{Table: g.table, Chain: g.chain, Exprs: gateRule()})
	if err := g.flush(); err != nil {
		return fmt.Errorf("install tap gate: %w", err)
	}
	return nil
}

func gateRule() []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte(tapPrefix)},
		&expr.Lookup{SourceRegister: 1, SetName: setName, Invert: true},
		&expr.Counter{},
		&expr.Verdict{Kind: expr.VerdictDrop},
	}
}

// Open lets the taps' frames pass for d from now (1 ms to 1 h; the kernel
// counts in ticks of up to 10 ms), whatever was said before: a shorter d shortens.
func (g *Gate) Open(taps []string, d time.Duration) error {
	if d < minOpen || d > maxOpen {
		return fmt.Errorf("open tap gate for %v: only %v to %v are possible", d, minOpen, maxOpen)
	}
	if len(taps) == 0 {
		return nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	err := g.elements.renew(taps, d)
	if errors.Is(err, unix.ENOENT) {
		// An element that ran out between the first and the second step of the
		// batch gives this answer too, so try once more.
		err = g.elements.renew(taps, d)
	}
	if !errors.Is(err, unix.ENOENT) {
		if err != nil {
			return fmt.Errorf("open tap gate: %w", err)
		}
		return nil
	}
	if err := g.install(); err != nil {
		return err
	}
	if err := g.elements.renew(taps, d); err != nil {
		return fmt.Errorf("open tap gate: %w", err)
	}
	return fmt.Errorf("open tap gate: %w", ErrReinstalled)
}

// Shut closes the gate for the taps at once. Frames already past the rule are
// not called back.
func (g *Gate) Shut(taps []string) error {
	if len(taps) == 0 {
		return nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	err := g.elements.remove(taps)
	if errors.Is(err, unix.ENOENT) { // as in Open
		err = g.elements.remove(taps)
	}
	if err != nil {
		return fmt.Errorf("shut tap gate: %w", err)
	}
	return nil
}

// State returns for each open tap how much longer it is open.
func (g *Gate) State() (map[string]time.Duration, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	list, err := g.conn.GetSetElements(g.set)
	if err != nil {
		return nil, fmt.Errorf("read tap gate: %w", err)
	}
	m := map[string]time.Duration{}
	for _, e := range list {
		m[string(bytes.TrimRight(e.Key, "\x00"))] = e.Expires
	}
	return m, nil
}

// Check returns an error unless the rule is in force.
func (g *Gate) Check() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	rules, err := g.conn.GetRules(g.table, g.chain)
	if err != nil {
		return fmt.Errorf("check tap gate: %w", err)
	}
	for _, r := range rules {
		if isGateRule(r.Exprs) {
			return nil
		}
	}
	return fmt.Errorf("check tap gate: the rule is gone from chain %s of table bridge %s", chainName, tableName)
}

func isGateRule(e []expr.Any) bool {
	if len(e) != 5 {
		return false
	}
	cmp, ok1 := e[1].(*expr.Cmp)
	look, ok2 := e[2].(*expr.Lookup)
	v, ok3 := e[4].(*expr.Verdict)
	return ok1 && ok2 && ok3 && string(cmp.Data) == tapPrefix && look.SetName == setName && look.Invert && v.Kind == expr.VerdictDrop
}

// Uninstall takes the whole gate away; every tap is open then. For tests and
// the removal of the product.
func (g *Gate) Uninstall() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.conn.DelTable(g.table)
	if err := g.flush(); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("uninstall tap gate: %w", err)
	}
	return nil
}

// Close ends the connection to the kernel; what is open closes in its time.
func (g *Gate) Close() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return errors.Join(g.conn.CloseLasting(), g.elements.close(), unix.Close(g.ns))
}
