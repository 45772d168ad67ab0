package pki

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

func mustIdentity(t *testing.T, ca *CA, name string, now time.Time) *Identity {
	t.Helper()
	key, csr, err := NewRequest(name)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := ca.IssueHost(csr, name, []net.IP{net.IPv4(127, 0, 0, 1)}, now)
	if err != nil {
		t.Fatal(err)
	}
	id, err := NewIdentity(ca.CertPEM(), cert, key, now)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func mustCA(t *testing.T) *CA {
	t.Helper()
	ca, err := NewCA("c1", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

// talk runs one TLS connection and returns what each side made of it.
func talk(t *testing.T, server, client *tls.Config) (peer string, serverErr, clientErr error) {
	t.Helper()
	l, err := tls.Listen("tcp", "127.0.0.1:0", server)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	type res struct {
		err  error
		peer string
	}
	ch := make(chan res, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			ch <- res{err: err}
			return
		}
		defer c.Close()
		tc := c.(*tls.Conn)
		if err := tc.Handshake(); err != nil {
			ch <- res{err: err}
			return
		}
		cs := tc.ConnectionState()
		h, _ := PeerHost(&cs)
		_, err = c.Write([]byte("x"))
		ch <- res{err: err, peer: h}
	}()
	c, err := tls.Dial("tcp", l.Addr().String(), client)
	if err == nil {
		// In TLS 1.3 a client learns of its refused certificate with the first read.
		_, err = io.ReadFull(c, make([]byte, 1))
		c.Close()
	}
	r := <-ch
	return r.peer, r.err, err
}

func TestMutualTLSByName(t *testing.T) {
	ca, now := mustCA(t), time.Now()
	a, b := mustIdentity(t, ca, "a", now), mustIdentity(t, ca, "b", now)
	peer, serr, cerr := talk(t, a.ServerTLS(false), b.ClientTLS("a"))
	if serr != nil || cerr != nil || peer != "b" {
		t.Fatalf("server %v, client %v, peer %q", serr, cerr, peer)
	}
	if _, _, cerr = talk(t, a.ServerTLS(false), b.ClientTLS("c")); cerr == nil {
		t.Fatal("the wrong host was accepted: certificates must be judged by name")
	}
	if _, _, cerr = talk(t, a.ServerTLS(false), b.ClientTLS("")); cerr != nil {
		t.Fatal(cerr)
	}
}

func TestWrongCAAndNoCertificate(t *testing.T) {
	ca, other, now := mustCA(t), mustCA(t), time.Now()
	a, evil := mustIdentity(t, ca, "a", now), mustIdentity(t, other, "b", now)
	if _, serr, _ := talk(t, a.ServerTLS(false), &tls.Config{GetClientCertificate: evil.ClientTLS("a").GetClientCertificate, InsecureSkipVerify: true}); serr == nil {
		t.Fatal("a client of another authority was accepted")
	}
	if _, _, cerr := talk(t, evil.ServerTLS(true), a.ClientTLS("b")); cerr == nil {
		t.Fatal("a server of another authority was accepted")
	}
	if _, _, cerr := talk(t, evil.ServerTLS(true), a.ClientTLS("")); cerr == nil {
		t.Fatal("a server of another authority was accepted where any host would do")
	}
	if _, serr, _ := talk(t, a.ServerTLS(false), JoinTLS(a.CAFingerprint())); serr == nil {
		t.Fatal("a client without a certificate was accepted")
	}
	if _, serr, _ := talk(t, a.ServerTLS(false), &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12}); serr == nil {
		t.Fatal("TLS 1.2 was accepted")
	}
}

func TestJoinTLS(t *testing.T) {
	ca, other, now := mustCA(t), mustCA(t), time.Now()
	a, evil := mustIdentity(t, ca, "a", now), mustIdentity(t, other, "a", now)
	peer, serr, cerr := talk(t, a.ServerTLS(true), JoinTLS(a.CAFingerprint()))
	if serr != nil || cerr != nil || peer != "" {
		t.Fatalf("server %v, client %v, peer %q", serr, cerr, peer)
	}
	if _, _, cerr := talk(t, evil.ServerTLS(true), JoinTLS(a.CAFingerprint())); cerr == nil {
		t.Fatal("a server of another authority was joined")
	}
}

func TestExpiredCertificate(t *testing.T) {
	long := time.Now().Add(-HostValidity - 24*time.Hour)
	ca, err := NewCA("old", long)
	if err != nil {
		t.Fatal(err)
	}
	old := mustIdentity(t, ca, "a", long)
	fresh := mustIdentity(t, ca, "b", time.Now())
	if _, _, cerr := talk(t, old.ServerTLS(false), fresh.ClientTLS("a")); cerr == nil {
		t.Fatal("an expired server certificate was accepted")
	}
	if _, serr, _ := talk(t, fresh.ServerTLS(false), old.ClientTLS("b")); serr == nil {
		t.Fatal("an expired client certificate was accepted")
	}
}

func TestIssueHostChoosesTheName(t *testing.T) {
	ca := mustCA(t)
	_, csr, err := NewRequest("mallory")
	if err != nil {
		t.Fatal(err)
	}
	pemCert, err := ca.IssueHost(csr, "bob", nil, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	cert, err := ParseCert(pemCert)
	if err != nil {
		t.Fatal(err)
	}
	if h, err := HostOf(cert); err != nil || h != "bob" {
		t.Fatalf("host %q, %v: the request must not choose the name", h, err)
	}
	for _, bad := range []string{"", "a.b", "a/b"} {
		if _, err := ca.IssueHost(csr, bad, nil, time.Now()); err == nil {
			t.Errorf("name %q was accepted", bad)
		}
	}
	if _, err := ca.IssueHost([]byte("nonsense"), "bob", nil, time.Now()); err == nil {
		t.Error("nonsense was signed")
	}
}

func TestLoadCA(t *testing.T) {
	ca, other := mustCA(t), mustCA(t)
	key, err := ca.KeyPEM()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := LoadCA(ca.CertPEM(), key); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadCA(other.CertPEM(), key); err == nil {
		t.Fatal("key and certificate of two authorities were taken for one")
	}
	fp, err := Fingerprint(ca.CertPEM())
	if err != nil || len(fp) != 64 {
		t.Fatalf("fingerprint %q, %v", fp, err)
	}
}

func TestToken(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	tok, err := NewToken(strings.Repeat("ab", 32), []string{"10.0.0.1:7400"}, true, now.Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	got, err := ParseToken(" "+tok.String()+"\n", now)
	if err != nil || got.Secret != tok.Secret || !got.Witness || got.Addrs[0] != "10.0.0.1:7400" {
		t.Fatalf("%+v, %v", got, err)
	}
	if _, err := ParseToken(tok.String(), now.Add(time.Hour)); !errors.Is(err, ErrTokenExpired) {
		t.Errorf("expired: %v", err)
	}
	s := tok.String()
	for _, bad := range []string{"", "hello", s[:len(s)-3], s[:20] + "x" + s[21:], s + "A", tokenPrefix + "1-", tokenPrefix + "1-AAAAAAAAAAAAAA"} {
		if _, err := ParseToken(bad, now); !errors.Is(err, ErrTokenMalformed) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	if _, err := ParseToken(strings.Replace(s, tokenPrefix+"1", tokenPrefix+"2", 1), now); !errors.Is(err, ErrTokenVersion) {
		t.Errorf("version: %v", err)
	}
}

func FuzzParseToken(f *testing.F) {
	tok, _ := NewToken(strings.Repeat("ab", 32), []string{"10.0.0.1:7400"}, false, time.Now().Add(time.Hour))
	f.Add(tok.String())
	f.Fuzz(func(t *testing.T, s string) { _, _ = ParseToken(s, time.Now()) })
}

func TestRenew(t *testing.T) {
	ca, now := mustCA(t), time.Now()
	b := mustIdentity(t, ca, "b", now)
	key, csr, err := NewRequest("a")
	if err != nil {
		t.Fatal(err)
	}
	aged, err := ca.IssueHost(csr, "a", []net.IP{net.IPv4(127, 0, 0, 1)}, now.Add(-HostValidity*3/4))
	if err != nil {
		t.Fatal(err)
	}
	a, err := NewIdentity(ca.CertPEM(), aged, key, now)
	if err != nil {
		t.Fatal(err)
	}
	server := a.ServerTLS(false) // made before the renewal
	if !a.NeedsRenewal(now) || b.NeedsRenewal(now) {
		t.Fatalf("needs renewal: a %v, b %v", a.NeedsRenewal(now), b.NeedsRenewal(now))
	}
	issue := func(id *Identity, name string) []byte {
		t.Helper()
		csr, err := id.Request()
		if err != nil {
			t.Fatal(err)
		}
		cert, err := ca.IssueHost(csr, name, nil, now)
		if err != nil {
			t.Fatal(err)
		}
		return cert
	}
	for what, cert := range map[string][]byte{"another host's": issue(a, "b"), "for another key": issue(b, "a"), "rubbish": []byte("x")} {
		if err := a.Renew(cert, now); err == nil {
			t.Errorf("%s certificate was taken", what)
		}
	}
	old := a.Expires()
	if err := a.Renew(issue(a, "a"), now); err != nil || !a.Expires().After(old) || a.NeedsRenewal(now) {
		t.Fatalf("renewed: %v, ends %v", err, a.Expires())
	}
	seen := time.Time{}
	client := b.ClientTLS("a")
	judge := client.VerifyConnection
	client.VerifyConnection = func(cs tls.ConnectionState) error {
		seen = cs.PeerCertificates[0].NotAfter
		return judge(cs)
	}
	if _, serr, cerr := talk(t, server, client); serr != nil || cerr != nil {
		t.Fatal(serr, cerr)
	}
	if !seen.Equal(a.Expires()) {
		t.Errorf("a listener made before shows a certificate until %v, want %v", seen, a.Expires())
	}
}
