// Package pki makes and checks the identities of a cluster: one certificate
// authority, one certificate per host, and the join tokens that carry the
// authority's fingerprint to a host that knows nothing yet.
//
// A host proves who it is by a certificate of the cluster's own authority that
// carries the name NAME.host.perdure; addresses are in the certificate only
// because etcd's dialer asks for them, they are never what a peer is judged by.
// All connections are TLS 1.3.
//
// Everything here is a plain value or immutable after construction and may be
// used from any goroutine. The package reads no file and no clock: bytes and
// times are arguments.
//
// Not provided: revocation (a removed host keeps a valid certificate until it
// expires; the cluster must stop listening to it by name), new keys for hosts (a
// renewal is for the same key), and rotation of the authority itself.
package pki

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"strings"
	"time"
)

const (
	// HostSuffix ends the DNS name in each host's certificate.
	HostSuffix = ".host.perdure"
	// HostCN is the common name of every host certificate; etcd's listeners
	// admit this common name only, so a later kind of certificate of the same
	// authority (operators, tools) does not open the store.
	HostCN = "perdure-host"

	// CAValidity and HostValidity are how long certificates last from the
	// moment they are made.
	CAValidity   = 20 * 365 * 24 * time.Hour
	HostValidity = 5 * 365 * 24 * time.Hour

	// backdate tolerates clocks of hosts that are behind the issuer's.
	backdate = time.Hour
)

// CA is a certificate authority with its private key.
type CA struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// NewCA makes the authority of a new cluster. cluster is its identifier, shown
// in the certificate for people.
func NewCA(cluster string, now time.Time) (*CA, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("generate CA key: %w", err)
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	tmpl := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: "perdure cluster " + cluster},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(CAValidity),
		IsCA:                  true,
		BasicConstraintsValid: true,
		MaxPathLenZero:        true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("create CA certificate: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("parse CA certificate: %w", err)
	}
	return &CA{cert: cert, key: key}, nil
}

// LoadCA reads an authority back from its PEM forms.
func LoadCA(certPEM, keyPEM []byte) (*CA, error) {
	cert, err := ParseCert(certPEM)
	if err != nil {
		return nil, fmt.Errorf("read CA certificate: %w", err)
	}
	if !cert.IsCA {
		return nil, errors.New("read CA certificate: it is not a certificate authority")
	}
	key, err := parseKey(keyPEM)
	if err != nil {
		return nil, fmt.Errorf("read CA key: %w", err)
	}
	if !key.PublicKey.Equal(cert.PublicKey) {
		return nil, errors.New("read CA key: key and certificate do not belong together")
	}
	return &CA{cert: cert, key: key}, nil
}

// CertPEM returns the authority's certificate.
func (c *CA) CertPEM() []byte { return certPEM(c.cert.Raw) }

// KeyPEM returns the authority's private key.
func (c *CA) KeyPEM() ([]byte, error) { return keyPEM(c.key) }

// IssueHost signs a request as the certificate of host name, reachable at ips,
// and returns it in PEM. Only the public key of the request is used: names and
// addresses are the issuer's word, so a joining host cannot pick them.
func (c *CA) IssueHost(csrPEM []byte, name string, ips []net.IP, now time.Time) ([]byte, error) {
	if name == "" || strings.ContainsAny(name, ". /") {
		return nil, fmt.Errorf("issue host certificate: host name %q is not allowed", name)
	}
	block, _ := pem.Decode(csrPEM)
	if block == nil || block.Type != "CERTIFICATE REQUEST" {
		return nil, errors.New("issue host certificate: no PEM certificate request given")
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("issue host certificate: parse request: %w", err)
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, fmt.Errorf("issue host certificate: check request: %w", err)
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: HostCN, SerialNumber: name},
		NotBefore:    now.Add(-backdate),
		NotAfter:     now.Add(HostValidity),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		DNSNames:     []string{HostDNS(name)},
		IPAddresses:  ips,
	}
	if tmpl.NotAfter.After(c.cert.NotAfter) {
		tmpl.NotAfter = c.cert.NotAfter
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, c.cert, csr.PublicKey, c.key)
	if err != nil {
		return nil, fmt.Errorf("issue host certificate: %w", err)
	}
	return certPEM(der), nil
}

// NewRequest makes a private key and a certificate request for it, both PEM.
func NewRequest(name string) (key, csr []byte, err error) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("generate host key: %w", err)
	}
	if csr, err = requestFor(k, name); err != nil {
		return nil, nil, err
	}
	key, err = keyPEM(k)
	return key, csr, err
}

func requestFor(k *ecdsa.PrivateKey, name string) ([]byte, error) {
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject:  pkix.Name{CommonName: HostCN, SerialNumber: name},
		DNSNames: []string{HostDNS(name)},
	}, k)
	if err != nil {
		return nil, fmt.Errorf("create certificate request: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), nil
}

// HostDNS is the name that the certificate of a host carries.
func HostDNS(name string) string { return name + HostSuffix }

// HostOf returns the host name that a certificate was issued for. It does not
// check the signature: call it on verified certificates only.
func HostOf(cert *x509.Certificate) (string, error) {
	if cert.Subject.CommonName != HostCN {
		return "", fmt.Errorf("certificate of %q is not a host's", cert.Subject.CommonName)
	}
	for _, n := range cert.DNSNames {
		if h, ok := strings.CutSuffix(n, HostSuffix); ok && h != "" {
			return h, nil
		}
	}
	return "", fmt.Errorf("certificate carries no name that ends in %s", HostSuffix)
}

// Fingerprint is the SHA-256 of a certificate's DER form, in hexadecimal.
func Fingerprint(certPEM []byte) (string, error) {
	cert, err := ParseCert(certPEM)
	if err != nil {
		return "", err
	}
	return fingerprint(cert), nil
}

func fingerprint(cert *x509.Certificate) string {
	sum := sha256.Sum256(cert.Raw)
	return hex.EncodeToString(sum[:])
}

// ParseCert reads exactly one certificate in PEM form.
func ParseCert(data []byte) (*x509.Certificate, error) {
	block, rest := pem.Decode(data)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, errors.New("parse certificate: no PEM certificate found")
	}
	if len(bytes.TrimSpace(rest)) != 0 {
		return nil, errors.New("parse certificate: more than one PEM block")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("parse certificate: %w", err)
	}
	return cert, nil
}

func parseKey(data []byte) (*ecdsa.PrivateKey, error) {
	block, _ := pem.Decode(data)
	if block == nil || block.Type != "PRIVATE KEY" {
		return nil, errors.New("parse key: no PEM private key found")
	}
	k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("parse key: %w", err)
	}
	ec, ok := k.(*ecdsa.PrivateKey)
	if !ok {
		return nil, errors.New("parse key: not an ECDSA key")
	}
	return ec, nil
}

func keyPEM(k crypto.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		return nil, fmt.Errorf("marshal key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

func certPEM(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func newSerial() (*big.Int, error) {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 126))
	if err != nil {
		return nil, fmt.Errorf("draw serial number: %w", err)
	}
	return n, nil
}
