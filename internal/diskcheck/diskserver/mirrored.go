package diskserver

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"syscall"
	"time"

	"perdure/internal/blockstore"
	"perdure/internal/mirror"
	"perdure/internal/nbd"
	"perdure/internal/peer"
	"perdure/internal/pki"
	"perdure/internal/vfs"
)

// A disk that is mirrored write by write, as at level ca: the process with the
// socket has one replica, and a child of it, which it talks to over a session
// between hosts, on the loopback device, the other one.

const (
	peerEnv   = "PERDURE_DISKSERVER_PEER"   // directory of the second replica
	targetEnv = "PERDURE_DISKSERVER_TARGET" // identity of the process that has it
)

// EnvMirrored is Env for a disk with a second replica in the directory peer.
func EnvMirrored(dir, peer, sock string) []string { return append(Env(dir, sock), peerEnv+"="+peer) }

// Kinds of messages between the two.
const (
	kindRequest = 1
	kindDone    = 2
	kindData    = 3
	kindEcho    = 4 // is answered by as little as a request is, and nothing done
)

// identity is what one side shows the other, PEM.
type identity struct{ CA, Cert, Key []byte }

func newIdentities() (a, b identity, err error) {
	ca, err := pki.NewCA("disk server", time.Now())
	if err != nil {
		return a, b, err
	}
	for name, id := range map[string]*identity{"a": &a, "b": &b} {
		key, csr, err := pki.NewRequest(name)
		if err != nil {
			return a, b, err
		}
		cert, err := ca.IssueHost(csr, name, []net.IP{net.IPv4(127, 0, 0, 1)}, time.Now())
		if err != nil {
			return a, b, err
		}
		*id = identity{ca.CertPEM(), cert, key}
	}
	return a, b, nil
}

func (i identity) config() (peer.Config, error) {
	id, err := pki.NewIdentity(i.CA, i.Cert, i.Key, time.Now())
	if err != nil {
		return peer.Config{}, err
	}
	c, client := id.ServerTLS(false), id.ClientTLS("")
	c.RootCAs, c.InsecureSkipVerify, c.VerifyConnection = client.RootCAs, true, client.VerifyConnection
	c.GetClientCertificate = client.GetClientCertificate
	return peer.Config{TLS: c, Verify: func(tls.ConnectionState) error { return nil }, Silence: 10 * time.Second, Local: []string{"127.0.0.1"}}, nil
}

// mirrored puts a mirror between the clients and v; stop ends the other side.
func mirrored(ctx context.Context, v *blockstore.Volume, dir string) (_ nbd.Backend, stop func(), err error) {
	sess, end, err := other(ctx, dir)
	if err != nil {
		return nil, nil, err
	}
	src := mirror.NewSource([]mirror.Replica{v})
	stop = func() { src.Close(); end() }
	if err := join(ctx, src, sess, func() {}); err != nil {
		stop()
		return nil, nil, err
	}
	return src.Export(0), stop, nil
}

// join has a mirror write to the other side too. echo is called for each answer to
// a message of kindEcho.
func join(ctx context.Context, src *mirror.Source, sess *peer.Session, echo func()) error {
	go func() {
		for m, err := sess.Recv(ctx); err == nil; m, err = sess.Recv(ctx) {
			switch m.Kind {
			case kindEcho:
				echo()
			case kindDone:
				if src.Done(m.Payload) != nil {
					return
				}
			}
		}
	}()
	return src.Join(func(p ...[]byte) error { return sess.Send(ctx, kindRequest, p...) }, func() error { return nil })
}

// other begins a process with the replica in dir, and a session with it.
func other(ctx context.Context, dir string) (_ *peer.Session, stop func(), err error) {
	mine, theirs, err := newIdentities()
	if err != nil {
		return nil, nil, err
	}
	told, err := json.Marshal(theirs)
	if err != nil {
		return nil, nil, err
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), dirEnv+"="+dir, sockEnv+"=-", peerEnv+"=", profileEnv+"=", targetEnv+"="+string(told))
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, nil, err
	}
	stop = func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait() // what it has to say is on its error output
	}
	addr, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		stop()
		return nil, nil, fmt.Errorf("the other side does not listen: %w", err)
	}
	conf, err := mine.config()
	if err != nil {
		stop()
		return nil, nil, err
	}
	conf.Remote = []string{addr[:len(addr)-1]}
	sess, err := peer.Dial(ctx, conf)
	if err != nil {
		stop()
		return nil, nil, err
	}
	end := stop
	return sess, func() { sess.Close("end"); end() }, nil
}

// follow is the other side; it ends with its session, or by SIGTERM.
func follow(ctx context.Context, dir, told string) (err error) {
	var id identity
	if err := json.Unmarshal([]byte(told), &id); err != nil {
		return err
	}
	conf, err := id.config()
	if err != nil {
		return err
	}
	s, err := blockstore.Open(vfs.OS{}, dir, Disk, blockstore.Options{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	if _, err := s.Replay(); err != nil {
		return err
	}
	ln, err := peer.Listen(ctx, conf)
	if err != nil {
		return err
	}
	defer ln.Close()
	fmt.Println(ln.Addrs()[0])
	sess, err := ln.Accept(ctx)
	if err != nil {
		return err
	}
	defer sess.Close("end")
	v := blockstore.NewVolume(s, blockstore.VolumeOptions{})
	dst := mirror.NewTarget([]mirror.Replica{v}, func(p ...[]byte) error { return sess.Send(ctx, kindDone, p...) },
		func(p ...[]byte) error { return sess.Send(ctx, kindData, p...) }, func(err error) { fmt.Fprintln(os.Stderr, "disk server, other side:", err) })
	defer dst.Settle()
	for {
		m, err := sess.Recv(ctx)
		if err != nil {
			return nil // it is over
		}
		if m.Kind == kindEcho {
			err = sess.Send(ctx, kindEcho, m.Payload[:8])
		} else {
			err = dst.Take(m.Payload)
		}
		if err != nil {
			return err
		}
	}
}
