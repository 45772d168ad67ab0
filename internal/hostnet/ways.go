package hostnet

import (
	"bytes"
	"errors"
	"fmt"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

const (
	waysTable = "perdure_net"
	shutSet   = "shut"
	drainSet  = "drain"
	uplinkSet = "uplink"
)

// Ways is the kernel's switch between the ways out of this host's bridges:
//
//	table bridge perdure_net {
//		set shut   { type ifname; }   # ports that pass nothing
//		set drain  { type ifname; }   # ports that only take frames to one address
//		set uplink { type ifname; }
//		chain in  { type filter hook prerouting priority -290;
//			iifname @shut drop
//			iifname @drain ether daddr & 01:00:00:00:00:00 != 00:00:00:00:00:00 drop }
//		chain fwd { type filter hook forward priority -290;
//			oifname @shut drop
//			oifname @drain drop
//			iifname "pxc*" oifname @uplink drop
//			iifname @uplink oifname "pxc*" drop
//			iifname "pxc*" oifname "pxs*" drop
//			iifname "pxs*" oifname "pxc*" drop
//			iifname "pxc*" oifname "pxc*" drop }
//		chain out { type filter hook output priority -290;
//			oifname @shut drop
//			oifname @drain drop }
//	}
//
// The rules with "pxc*" never change: no frame passes between a client end and
// another way out. The sets are replaced all at once, so that of an uplink and
// its client end never both forward. The rules outlive the process.
//
// One goroutine at a time.
type Ways struct {
	conn   *nftables.Conn
	table  *nftables.Table
	chains []*nftables.Chain
}

// WaySets is the content of the sets: names of ports, of all bridges.
type WaySets struct{ Shut, Drain, Uplinks []string }

// OpenWays connects to the kernel, in the network namespace of the calling
// thread. It installs nothing.
func OpenWays() (*Ways, error) {
	conn, err := nftables.New()
	if err != nil {
		return nil, fmt.Errorf("open ways: %w", err)
	}
	w := &Ways{conn: conn, table: &nftables.Table{Name: waysTable, Family: nftables.TableFamilyBridge}}
	accept := nftables.ChainPolicyAccept
	prio := nftables.ChainPriorityRef(-290)
	for _, c := range []struct {
		name string
		hook *nftables.ChainHook
	}{{"in", nftables.ChainHookPrerouting}, {"fwd", nftables.ChainHookForward}, {"out", nftables.ChainHookOutput}} {
		w.chains = append(w.chains, &nftables.Chain{Name: c.name, Table: w.table, Type: nftables.ChainTypeFilter, Hooknum: c.hook, Priority: prio, Policy: &accept})
	}
	return w, nil
}

func (w *Ways) set(name string) *nftables.Set {
	return &nftables.Set{Table: w.table, Name: name, KeyType: nftables.TypeIFName, KeyByteOrder: binaryutil.NativeEndian}
}

// Set puts table and rules in place, where they are not, and replaces the
// content of the sets, all in one transaction.
func (w *Ways) Set(s WaySets) error {
	w.conn.AddTable(w.table)
	for name, ports := range map[string][]string{shutSet: s.Shut, drainSet: s.Drain, uplinkSet: s.Uplinks} {
		set := w.set(name)
		if err := w.conn.AddSet(set, nil); err != nil {
			return fmt.Errorf("set ways: %w", err)
		}
		w.conn.FlushSet(set)
		var el []nftables.SetElement
		for _, p := range ports {
			el = append(el, nftables.SetElement{Key: ifname(p)})
		}
		if len(el) > 0 {
			if err := w.conn.SetAddElements(set, el); err != nil {
				return fmt.Errorf("set ways: %w", err)
			}
		}
	}
	for i, rules := range waysRules() {
		w.conn.AddChain(w.chains[i])
		w.conn.FlushChain(w.chains[i])
		for _, r := range rules {
			w.conn.AddRule(&nftables.Rule{Table: w.table, Chain: w.chains[i], Exprs: append(r, &expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop})})
		}
	}
	if err := w.conn.Flush(); err != nil {
		return fmt.Errorf("set ways: %w", err)
	}
	return nil
}

// waysRules are the rules of the chains in, fwd and out.
func waysRules() [3][][]expr.Any {
	in := func(set string) []expr.Any { return lookup(expr.MetaKeyIIFNAME, set) }
	out := func(set string) []expr.Any { return lookup(expr.MetaKeyOIFNAME, set) }
	group := []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseLLHeader, Offset: 0, Len: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{1}, Xor: []byte{0}},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: []byte{0}},
	}
	pair := func(a, b []expr.Any) []expr.Any { return append(a, b...) }
	cin, cout := prefix(expr.MetaKeyIIFNAME, clientPrefix), prefix(expr.MetaKeyOIFNAME, clientPrefix)
	sin, sout := prefix(expr.MetaKeyIIFNAME, serverPrefix), prefix(expr.MetaKeyOIFNAME, serverPrefix)
	return [3][][]expr.Any{
		{in(shutSet), pair(in(drainSet), group)},
		{out(shutSet), out(drainSet),
			pair(cin(), out(uplinkSet)), pair(in(uplinkSet), cout()),
			pair(cin(), sout()), pair(sin(), cout()), pair(cin(), cout())},
		{out(shutSet), out(drainSet)},
	}
}

func lookup(key expr.MetaKey, set string) []expr.Any {
	return []expr.Any{&expr.Meta{Key: key, Register: 1}, &expr.Lookup{SourceRegister: 1, SetName: set}}
}

func prefix(key expr.MetaKey, p string) func() []expr.Any {
	return func() []expr.Any {
		return []expr.Any{&expr.Meta{Key: key, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte(p)}}
	}
}

func ifname(n string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, n)
	return b
}

// Get reads the sets back. installed says that the table is there with all its
// rules.
func (w *Ways) Get() (s WaySets, installed bool, err error) {
	tables, err := w.conn.ListTablesOfFamily(nftables.TableFamilyBridge)
	if err != nil {
		return s, false, fmt.Errorf("read ways: %w", err)
	}
	if !slices.ContainsFunc(tables, func(t *nftables.Table) bool { return t.Name == waysTable }) {
		return s, false, nil
	}
	installed = true
	for name, to := range map[string]*[]string{shutSet: &s.Shut, drainSet: &s.Drain, uplinkSet: &s.Uplinks} {
		el, err := w.conn.GetSetElements(w.set(name))
		if err != nil {
			return s, false, fmt.Errorf("read ways: %w", err)
		}
		for _, e := range el {
			*to = append(*to, string(bytes.TrimRight(e.Key, "\x00")))
		}
	}
	for i, want := range waysRules() {
		rules, err := w.conn.GetRules(w.table, w.chains[i])
		if err != nil {
			return s, false, fmt.Errorf("read ways: %w", err)
		}
		if len(rules) != len(want) {
			installed = false
		}
	}
	return s, installed, nil
}

// Uninstall takes the table away.
func (w *Ways) Uninstall() error {
	w.conn.DelTable(w.table)
	if err := w.conn.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove ways: %w", err)
	}
	return nil
}
