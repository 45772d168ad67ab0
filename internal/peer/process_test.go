package peer

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// childEnv makes the test binary act as a peer process: directory of its
// certificates, a space, and the addresses to dial.
const childEnv = "PERDURE_PEER_TEST_CHILD"

// childSilence is how long parent and child put up with silence.
const childSilence = 300 * time.Millisecond

func TestMain(m *testing.M) {
	if v := os.Getenv(childEnv); v != "" {
		if err := child(strings.Fields(v)); err != nil {
			fmt.Println("failed:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// child dials, sends messages without end, prints what it receives, and says
// how its session ended.
func child(args []string) error {
	cert, err := tls.LoadX509KeyPair(filepath.Join(args[0], "crt"), filepath.Join(args[0], "key"))
	if err != nil {
		return err
	}
	pool := x509.NewCertPool()
	ca, err := os.ReadFile(filepath.Join(args[0], "ca"))
	if err != nil {
		return err
	}
	pool.AppendCertsFromPEM(ca)
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	s, err := Dial(ctx, Config{
		TLS:     &tls.Config{Certificates: []tls.Certificate{cert}, RootCAs: pool, ServerName: "host"},
		Verify:  func(tls.ConnectionState) error { return nil },
		Remote:  args[1:],
		Silence: childSilence, MaxSilence: childSilence,
		Urgent: func(_ uint8, p []byte) { fmt.Println("got", string(p)) },
	})
	if err != nil {
		return err
	}
	go func() {
		for s.Send(ctx, 1, make([]byte, 1000)) == nil {
			time.Sleep(5 * time.Millisecond) // a steady trickle is what is wanted
		}
	}()
	for {
		m, err := s.Recv(ctx)
		if err != nil {
			fmt.Println("lost", CauseOf(err))
			return nil
		}
		fmt.Println("got", string(m.Payload))
	}
}

// startChild connects a child process over two links.
func startChild(t *testing.T) (*Session, *exec.Cmd, *bufio.Scanner) {
	t.Helper()
	cfg := testConfig(t)
	cfg.Silence = childSilence
	cfg.Local = []string{"127.0.0.1:0", "127.0.0.1:0"}
	dir := t.TempDir()
	chain := cfg.TLS.Certificates[0]
	key, err := x509.MarshalECPrivateKey(chain.PrivateKey.(*ecdsa.PrivateKey))
	check(t, err)
	write := func(name, typ string, der []byte) {
		check(t, os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(&pem.Block{Type: typ, Bytes: der}), 0o600))
	}
	write("crt", "CERTIFICATE", chain.Certificate[0])
	write("key", "EC PRIVATE KEY", key)
	write("ca", "CERTIFICATE", chain.Certificate[1])
	l, err := Listen(testCtx(t), cfg)
	check(t, err)
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"="+dir+" "+strings.Join(l.Addrs(), " "))
	out, err := cmd.StdoutPipe()
	check(t, err)
	cmd.Stderr = os.Stderr
	check(t, cmd.Start())
	s, err := l.Accept(testCtx(t))
	check(t, err)
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		s.Close("test ends")
		l.Close()
	})
	eventually(t, "both links up", func() bool {
		for _, k := range s.Links() {
			if !k.Up || k.RTT == 0 {
				return false
			}
		}
		return true
	})
	return s, cmd, bufio.NewScanner(out)
}

// stopped reports whether every thread of a process is stopped: the signal is
// delivered to each in its own time.
func stopped(t *testing.T, pid int) bool {
	t.Helper()
	stats, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	check(t, err)
	for _, f := range stats {
		b, err := os.ReadFile(f)
		check(t, err)
		_, rest, _ := strings.Cut(string(b), ") ")
		if !strings.HasPrefix(rest, "T") {
			return false
		}
	}
	return len(stats) > 0
}

func TestAKilledPeerProcessIsNoticedAtOnce(t *testing.T) {
	s, cmd, _ := startChild(t)
	_, err := s.Recv(testCtx(t))
	check(t, err)
	start := time.Now()
	check(t, cmd.Process.Kill())
	<-s.Lost()
	took := time.Since(start)
	t.Logf("noticed after %v: %v", took, s.Cause())
	if CauseOf(s.Cause()) != CauseDied {
		t.Errorf("cause: %v", s.Cause())
	}
	if took > 2*time.Second {
		t.Errorf("noticed after %v", took)
	}
}

// A frozen process is silent; when it is thawed it must believe nothing of what
// was sent to it meanwhile, and find its session lost.
func TestAFrozenPeerProcessIsLostAndKnowsItWhenThawed(t *testing.T) {
	s, cmd, lines := startChild(t)
	check(t, s.Send(testCtx(t), 1, []byte("before")))
	for lines.Scan() && lines.Text() != "got before" {
	}
	check(t, cmd.Process.Signal(syscall.SIGSTOP))
	start := time.Now()
	eventually(t, "all threads stand still", func() bool { return stopped(t, cmd.Process.Pid) })
	for s.Cause() == nil { // what lies in its sockets when it wakes
		if err := s.Send(testCtx(t), 1, []byte("stale")); err != nil && !errors.Is(err, ErrLost) {
			t.Fatal(err)
		}
		if err := s.Urgent(1, []byte("stale note")); err != nil && !errors.Is(err, ErrLost) && !errors.Is(err, ErrNoLink) {
			t.Fatal(err)
		}
		select {
		case <-s.Lost():
		case <-time.After(5 * time.Millisecond):
		}
	}
	took := time.Since(start)
	t.Logf("noticed after %v: %v", took, s.Cause())
	if CauseOf(s.Cause()) != CauseSilent || took > 3*time.Second {
		t.Errorf("noticed after %v: %v", took, s.Cause())
	}
	// It may have heard something a little later than this side did, and be patient for longer.
	for time.Since(start) < 2*childSilence {
		time.Sleep(2*childSilence - time.Since(start))
	}
	check(t, cmd.Process.Signal(syscall.SIGCONT))
	last := ""
	for lines.Scan() {
		last = lines.Text()
		t.Logf("thawed peer: %s", last)
		if strings.HasPrefix(last, "got") {
			t.Errorf("the thawed process believed %q", last)
		}
	}
	if !strings.HasPrefix(last, "lost") {
		t.Errorf("the thawed process said %q", last)
	}
}
