package agent

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"time"

	"perdure/api"
	"perdure/internal/config"
	"perdure/internal/pki"
)

// Init makes cfg.StateDir the state directory of the first host of a new
// cluster. Nothing is left behind where it fails.
func Init(cfg config.Config, cluster string) (err error) {
	if cfg.Role != config.RoleHost {
		return api.Errorf(api.Invalid, "the first host of a cluster cannot be a witness")
	}
	st, key, csr, err := prepare(cfg)
	if err != nil {
		return err
	}
	defer st.undo()
	id := randomID(16)
	now := time.Now()
	ca, err := pki.NewCA(cluster+" "+id[:8], now)
	if err != nil {
		return fmt.Errorf("init: %w", err)
	}
	cert, err := ca.IssueHost(csr, cfg.Name, hostIPs(cfg.LAN.Address, cfg.ALinkAddrs()), now)
	if err != nil {
		return fmt.Errorf("init: %w", err)
	}
	caKey, err := ca.KeyPEM()
	if err != nil {
		return fmt.Errorf("init: %w", err)
	}
	return st.finish(cfg, identityFiles{ca: ca.CertPEM(), caKey: caKey, cert: cert, key: key},
		membership{ID: id, Name: cluster, Initial: map[string]string{cfg.Name: peerURL(cfg)}})
}

// Join makes cfg.StateDir the state directory of a further member of the
// cluster that made the token; cfg.Role says whether as a host or as a witness.
// Nothing is left behind here where it fails, and the token stays usable unless
// the cluster had accepted it.
func Join(ctx context.Context, cfg config.Config, token, version string) error {
	tok, err := pki.ParseToken(token, time.Now())
	if err != nil {
		return api.Errorf(api.Invalid, "%w", err)
	}
	if tok.Witness != (cfg.Role == config.RoleWitness) {
		have := map[bool]string{true: "a witness", false: "a host"}
		return api.Errorf(api.Invalid, "the token lets %s in, this is to be %s", have[tok.Witness], have[cfg.Role == config.RoleWitness]).
			WithAction("make a token of the other kind (perdure token create [--witness])")
	}
	st, key, csr, err := prepare(cfg)
	if err != nil {
		return err
	}
	defer st.undo()
	c, err := api.New(api.Options{Servers: tok.Addrs, TLS: pki.JoinTLS(tok.CA)})
	if err != nil {
		return fmt.Errorf("join: %w", err)
	}
	defer c.Close()
	rep, err := c.Join(ctx, api.JoinRequest{
		TokenID: tok.ID, Secret: tok.Secret, Name: cfg.Name, Role: api.HostRole(cfg.Role), CSRPEM: string(csr),
		Addrs: []string{cfg.APIAddr()}, ALinks: cfg.ALinkAddrs(), PeerURL: peerURL(cfg), ClientURL: "https://" + cfg.ClientAddr(),
		Version: version, StateFormat: StateFormat,
	})
	if errors.Is(err, pki.ErrForeign) {
		return api.Errorf(api.Forbidden, "join cluster: %w", err).WithAction("nothing was sent to it; check the addresses, or make a new token")
	}
	if err != nil {
		return fmt.Errorf("join cluster: %w", err)
	}
	fp, err := pki.Fingerprint([]byte(rep.CAPEM))
	if err != nil || fp != tok.CA {
		return api.Errorf(api.Forbidden, "the cluster answered with another authority than the token names")
	}
	if _, err := pki.NewIdentity([]byte(rep.CAPEM), []byte(rep.CertPEM), key, time.Now()); err != nil {
		return fmt.Errorf("join cluster: the certificate given is of no use here (are the clocks right?): %w", err)
	}
	return st.finish(cfg, identityFiles{ca: []byte(rep.CAPEM), caKey: []byte(rep.CAKeyPEM), cert: []byte(rep.CertPEM), key: key},
		membership{ID: rep.ClusterID, Name: rep.ClusterName, Initial: rep.InitialCluster, Existing: true})
}

// prepare does everything that can fail on this machine before anybody else is asked.
func prepare(cfg config.Config) (st *newState, key, csr []byte, err error) {
	if err := cfg.Validate(); err != nil {
		return nil, nil, nil, api.Errorf(api.Invalid, "%w", err)
	}
	if err := checkPorts(cfg); err != nil {
		return nil, nil, nil, err
	}
	st, err = stageState(cfg.StateDir)
	if err != nil {
		return nil, nil, nil, err
	}
	key, csr, err = pki.NewRequest(cfg.Name)
	if err != nil {
		st.undo()
		return nil, nil, nil, err
	}
	return st, key, csr, nil
}

// checkPorts tries the addresses that the agent will listen on, so that a wrong
// one is said now and not at the first start.
func checkPorts(cfg config.Config) error {
	for key, addr := range map[string]string{"lan.api_port": cfg.APIAddr(), "lan.etcd_peer_port": cfg.PeerAddr(), "lan.etcd_client_port": cfg.ClientAddr()} {
		l, err := net.Listen("tcp", addr)
		if err != nil {
			return api.Errorf(api.Conflict, "cannot listen on %s (%s): %w", addr, key, err).
				WithAction("free the port, or give another one; the address must be this machine's own")
		}
		l.Close()
	}
	return nil
}

type identityFiles struct{ ca, caKey, cert, key []byte }

func (n *newState) finish(cfg config.Config, id identityFiles, m membership) error {
	text, err := cfg.Marshal()
	if err != nil {
		return err
	}
	mem, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return fmt.Errorf("write membership: %w", err)
	}
	files := []struct {
		name string
		data []byte
	}{
		{"pki/ca.crt", id.ca}, {"pki/ca.key", id.caKey}, {"pki/host.crt", id.cert}, {"pki/host.key", id.key},
		{config.FileName, text}, {clusterFile, append(mem, '\n')},
	}
	for _, f := range files {
		if f.name == "pki/ca.key" && len(f.data) == 0 {
			continue
		}
		if err := n.write(f.name, f.data); err != nil {
			return err
		}
	}
	return n.commit()
}

func peerURL(cfg config.Config) string { return "https://" + cfg.PeerAddr() }

// hostIPs are the addresses for a host's certificate; loopback for tools on the host.
func hostIPs(lan string, alinks []string) []net.IP {
	var out []net.IP
	seen := map[string]bool{}
	for _, s := range append([]string{lan, "127.0.0.1"}, alinks...) {
		ip := net.ParseIP(s)
		if ip != nil && !seen[ip.String()] {
			seen[ip.String()] = true
			out = append(out, ip)
		}
	}
	return out
}

// randomID returns n random bytes in hexadecimal.
func randomID(n int) string {
	b := make([]byte, n)
	rand.Read(b) // never fails
	return hex.EncodeToString(b)
}
