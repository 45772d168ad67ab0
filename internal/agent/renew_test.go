package agent

import (
	"os"
	"testing"
	"time"

	"perdure/internal/config"
	"perdure/internal/pki"
)

// age gives a host that is off a certificate most of whose time is over.
func (h *host) age(ca *host) {
	t := h.t
	t.Helper()
	read := func(of *host, name string) []byte {
		b, err := os.ReadFile(of.cfg.PKIPath(name))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	auth, err := pki.LoadCA(read(ca, "ca.crt"), read(ca, "ca.key"))
	if err != nil {
		t.Fatal(err)
	}
	id, err := pki.NewIdentity(read(h, "ca.crt"), read(h, "host.crt"), read(h, "host.key"), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	csr, err := id.Request()
	if err != nil {
		t.Fatal(err)
	}
	cert, err := auth.IssueHost(csr, h.cfg.Name, hostIPs(h.cfg.LAN.Address, h.cfg.ALinkAddrs()), time.Now().Add(-pki.HostValidity*4/5))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(h.cfg.PKIPath("host.crt"), cert, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestCertificatesRenew: one that holds the authority's key renews its own, the
// witness, which does not, has another do it.
func TestCertificatesRenew(t *testing.T) {
	t.Parallel()
	a := firstHost(t)
	w := joined(t, a, "w", config.RoleWitness)
	eventually(t, "both are known", 40*time.Second, func() bool {
		_, aw := a.ag.hostKnown("w")
		_, wa := w.ag.hostKnown("a")
		return aw && wa
	})
	for _, h := range []*host{w, a} {
		h.off()
		h.age(a)
		h.on()
		if !h.ag.id.NeedsRenewal(time.Now()) {
			t.Fatalf("%s: certificate was not aged", h.cfg.Name)
		}
	}
	for _, h := range []*host{a, w} {
		eventually(t, h.cfg.Name+" has a new certificate, on disk too", 60*time.Second, func() bool {
			data, err := os.ReadFile(h.cfg.PKIPath("host.crt"))
			if err != nil {
				return false
			}
			cert, err := pki.ParseCert(data)
			return err == nil && cert.NotAfter.Equal(h.ag.id.Expires()) && !h.ag.id.NeedsRenewal(time.Now())
		})
	}
	// It serves: both find each other again with it.
	for _, h := range []*host{w, a} {
		h.off()
		h.on()
	}
	eventually(t, "a quorum", 40*time.Second, func() bool { return a.ag.store.Quorum() && w.ag.store.Quorum() })
}
