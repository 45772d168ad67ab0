package pki

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"sync/atomic"
	"time"
)

// Identity is a host's certificate and key together with the authority it
// trusts. All but the certificate is immutable; that is replaced by Renew, also
// for the configurations that were made before.
type Identity struct {
	host  string
	ca    *x509.Certificate
	caPEM []byte
	key   []byte
	roots *x509.CertPool
	cert  atomic.Pointer[tls.Certificate]
}

// NewIdentity builds an identity from PEM forms and checks that they belong
// together at time now.
func NewIdentity(caPEM, certPEM, keyPEM []byte, now time.Time) (*Identity, error) {
	ca, err := ParseCert(caPEM)
	if err != nil {
		return nil, fmt.Errorf("read CA certificate: %w", err)
	}
	leaf, err := ParseCert(certPEM)
	if err != nil {
		return nil, fmt.Errorf("read host certificate: %w", err)
	}
	pair, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return nil, fmt.Errorf("read host key: %w", err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca)
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}); err != nil {
		return nil, fmt.Errorf("check host certificate: %w", err)
	}
	host, err := HostOf(leaf)
	if err != nil {
		return nil, fmt.Errorf("check host certificate: %w", err)
	}
	// The authority's certificate is sent along: a joining host knows nothing
	// but its fingerprint and has to see it to compare.
	pair.Certificate = append(pair.Certificate, ca.Raw)
	pair.Leaf = leaf
	id := &Identity{host: host, ca: ca, caPEM: caPEM, key: keyPEM, roots: roots}
	id.cert.Store(&pair)
	return id, nil
}

// Request returns a certificate request, PEM, for the key that this host has
// already: a renewal then changes one file, which cannot be torn.
func (id *Identity) Request() ([]byte, error) {
	k, err := parseKey(id.key)
	if err != nil {
		return nil, err
	}
	return requestFor(k, id.host)
}

// Renew takes a newer certificate of this host for the same key into use, after
// checking it at time now. Connections that stand keep the old one.
func (id *Identity) Renew(certPEM []byte, now time.Time) error {
	next, err := NewIdentity(id.caPEM, certPEM, id.key, now)
	switch {
	case err != nil:
		return fmt.Errorf("renew certificate: %w", err)
	case next.host != id.host:
		return fmt.Errorf("renew certificate: it is host %q's, not %q's", next.host, id.host)
	case !next.Expires().After(id.Expires()):
		return fmt.Errorf("renew certificate: the new one ends %s, not after the old one", next.Expires().Format(time.DateOnly))
	}
	id.cert.Store(next.cert.Load())
	return nil
}

// Adopt takes the certificate of another identity of the same host and key into use.
func (id *Identity) Adopt(other *Identity) {
	if other.host == id.host && bytes.Equal(other.key, id.key) {
		id.cert.Store(other.cert.Load())
	}
}

// NeedsRenewal reports whether half of the certificate's time is over: so early
// that a host which is off for years comes back with one that is still good.
func (id *Identity) NeedsRenewal(now time.Time) bool {
	leaf := id.cert.Load().Leaf
	return leaf.NotAfter.Sub(now) < leaf.NotAfter.Sub(leaf.NotBefore)/2
}

// present has both ends of a connection show the certificate of that moment.
func (id *Identity) present(c *tls.Config) *tls.Config {
	c.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return id.cert.Load(), nil }
	c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return id.cert.Load(), nil }
	return c
}

// Host is the host name in the certificate.
func (id *Identity) Host() string { return id.host }

// CAFingerprint is the fingerprint of the trusted authority.
func (id *Identity) CAFingerprint() string { return fingerprint(id.ca) }

// Expires is when the host certificate ends.
func (id *Identity) Expires() time.Time { return id.cert.Load().Leaf.NotAfter }

// ServerTLS is the configuration of a listener. A client certificate that is
// shown must be a host's of this cluster. With optional set, a client may show
// none (the join endpoint); the caller then has to check PeerHost itself.
func (id *Identity) ServerTLS(optional bool) *tls.Config {
	auth := tls.RequireAndVerifyClientCert
	if optional {
		auth = tls.VerifyClientCertIfGiven
	}
	return id.present(&tls.Config{
		MinVersion: tls.VersionTLS13,
		ClientAuth: auth,
		ClientCAs:  id.roots,
		VerifyConnection: func(cs tls.ConnectionState) error {
			if len(cs.PeerCertificates) == 0 && optional {
				return nil
			}
			_, err := PeerHost(&cs)
			return err
		},
	})
}

// ClientTLS is the configuration of a connection to host: it must show a
// certificate of this cluster that carries that host's name, whatever address
// was dialled. With host empty, any host of the cluster will do.
func (id *Identity) ClientTLS(host string) *tls.Config {
	cfg := id.present(&tls.Config{MinVersion: tls.VersionTLS13, RootCAs: id.roots})
	if host != "" {
		cfg.ServerName = HostDNS(host)
		cfg.VerifyConnection = func(cs tls.ConnectionState) error {
			got, err := PeerHost(&cs)
			if err == nil && got != host {
				err = fmt.Errorf("peer is host %q, not %q", got, host)
			}
			return err
		}
		return cfg
	}
	// Without a name to expect the standard check cannot be used; the chain is
	// verified here in full, only the name is free.
	cfg.InsecureSkipVerify = true
	cfg.VerifyConnection = func(cs tls.ConnectionState) error {
		return verifyHostChain(&cs, id.roots)
	}
	return cfg
}

// ErrForeign says that a server is not of the cluster that a token names.
var ErrForeign = errors.New("the server does not belong to the cluster of the token")

// JoinTLS is the configuration with which a host that has no certificate yet
// connects to a cluster of which it knows the authority's fingerprint only.
func JoinTLS(caFingerprint string) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		// The authority is not known yet, only its fingerprint: VerifyConnection
		// does the whole check, nothing is skipped.
		InsecureSkipVerify: true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			for _, c := range cs.PeerCertificates {
				if c.IsCA && fingerprint(c) == caFingerprint {
					roots := x509.NewCertPool()
					roots.AddCert(c)
					return verifyHostChain(&cs, roots)
				}
			}
			return fmt.Errorf("%w (its authority is not %.16s…)", ErrForeign, caFingerprint)
		},
	}
}

func verifyHostChain(cs *tls.ConnectionState, roots *x509.CertPool) error {
	if len(cs.PeerCertificates) == 0 {
		return errors.New("peer showed no certificate")
	}
	_, err := cs.PeerCertificates[0].Verify(x509.VerifyOptions{
		Roots:     roots,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
	if err != nil {
		return fmt.Errorf("check peer certificate: %w", err)
	}
	_, err = HostOf(cs.PeerCertificates[0])
	return err
}

// PeerHost returns the host name of the verified peer of a connection, or an
// error where it showed no certificate or none of a host.
func PeerHost(cs *tls.ConnectionState) (string, error) {
	if cs == nil || len(cs.PeerCertificates) == 0 {
		return "", errors.New("peer showed no certificate")
	}
	return HostOf(cs.PeerCertificates[0])
}
