package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"perdure/api"
	"perdure/internal/clusterstore"
)

const (
	// renewRetry and renewRetryMax bound the distance of attempts, which doubles.
	renewRetry    = 3 * time.Second
	renewRetryMax = 30 * time.Minute
	// certificateWarn is the time left at which people are told that renewing
	// does not work: it has been tried for years by then.
	certificateWarn = 60 * 24 * time.Hour
)

// renewing is what housekeep remembers of attempts to renew the certificate.
type renewing struct {
	next  time.Time
	delay time.Duration
}

// renewal asks for a certificate for the key that the asking host has already.
type renewal struct {
	CSR string `json:"csr"` // PEM; the issuer takes the public key from it and nothing else
}

type renewed struct {
	Cert string `json:"cert"` // PEM
}

// renewCertificate has the host's certificate renewed when half of its time is
// over: here, if this host holds the authority's key, else by one that does.
func (a *Agent) renewCertificate(ctx context.Context, now time.Time) {
	if now.Before(a.renewal.next) || !a.store.Loaded() {
		return
	}
	cert, err := a.newCertificate(ctx, now)
	if err == nil {
		err = a.useCertificate(cert, now)
	}
	if err != nil {
		a.renewal.delay = min(max(2*a.renewal.delay, renewRetry), renewRetryMax)
		a.renewal.next = now.Add(a.renewal.delay)
		a.log.Warn("the certificate of this host could not be renewed yet", "ends", a.id.Expires(), "error", err)
		return
	}
	a.renewal = renewing{}
	a.log.Info("the certificate of this host was renewed", "ends", a.id.Expires())
}

// useCertificate puts a new certificate in the place of the old one. The key
// stays, so the one file that changes always fits it.
func (a *Agent) useCertificate(cert []byte, now time.Time) error {
	if err := a.id.Renew(cert, now); err != nil {
		return err
	}
	return writeAtomic(a.cfg.PKIPath("host.crt"), cert, 0o600)
}

func (a *Agent) newCertificate(ctx context.Context, now time.Time) ([]byte, error) {
	csr, err := a.id.Request()
	if err != nil {
		return nil, err
	}
	cert, err := a.issueRenewal(a.cfg.Name, csr, now)
	if err == nil {
		return cert, nil
	}
	errs := []error{err}
	for _, h := range a.otherHosts(true) {
		hctx, cancel := context.WithTimeout(ctx, 10*time.Second)
		var r renewed
		err := a.ask(hctx, h.Name, "POST", "renew", "", renewal{string(csr)}, &r)
		cancel()
		if err == nil {
			return []byte(r.Cert), nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

// issueRenewal signs a new certificate for a member of the cluster. The name is
// that of the certificate with which it asked, the addresses are those that it
// has published: a removed host gets none.
func (a *Agent) issueRenewal(name string, csr []byte, now time.Time) ([]byte, error) {
	ca, _, err := a.authority()
	if err != nil {
		return nil, api.Errorf(api.Unavailable, "host %s does not hold the authority's key: %w", a.cfg.Name, err)
	}
	h, ok := a.hostKnown(name)
	if !ok {
		return nil, api.Errorf(api.Forbidden, "there is no host %q in the cluster", name)
	}
	lan := hostOfAddr(h.API)
	if lan == "" {
		return nil, fmt.Errorf("host %q has published no address", name)
	}
	cert, err := ca.IssueHost(csr, name, hostIPs(lan, h.ALinks), now)
	if err != nil {
		return nil, err
	}
	a.log.Info("certificate renewed", "for", name)
	return cert, nil
}

// hostOfAddr is the address of IP:port.
func hostOfAddr(addr string) string {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return ""
	}
	return host
}

// hostKnown returns what a host has published, if it is in the cluster.
func (a *Agent) hostKnown(name string) (clusterstore.HostView, bool) {
	for _, h := range a.store.Hosts() {
		if h.Name == name {
			return h, true
		}
	}
	return clusterstore.HostView{}, false
}

// stranger reports whether a host that shows a good certificate is no member
// (any more): one that was removed keeps its certificate until that ends.
func (a *Agent) stranger(name string) bool {
	if _, ok := a.hostKnown(name); ok || !a.store.Loaded() {
		return false
	}
	for _, m := range a.store.Members() { // one that has just joined
		if m.Name == name || m.Name == "" {
			return false
		}
	}
	return true
}
