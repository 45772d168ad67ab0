package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"perdure/api"
)

// BootWait is how long a start from disk waits for the other host in a lab.
const BootWait = 8 * time.Second

// trackingProof is shared by all labs of a machine, whose kernel and QEMU are
// the same: the proof is made once per boot.
const trackingProof = "/run/perdure-lab/tracking-proof.json"

// Cluster returns the options of a lab whose hosts form one Perdure cluster:
// the shape is as given, programs and Form are filled in.
func Cluster(o Options) Options {
	o.Agent = Program{Args: []string{"perdure", "agent", "--state-dir", "{state}"}, Wait: true}
	o.Vote = Program{Args: []string{"perdure", "witness", "--state-dir", "{state}"}, Wait: true}
	o.Form = formCluster
	return o
}

// formCluster makes a cluster of the hosts as a person would: init on the
// first, join on the others, the witness last.
func formCluster(ctx context.Context, l *Lab) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	hosts := l.Hosts()
	first := hosts[0]
	l.log.Info("form cluster", "first", first)
	if _, err := l.Output(ctx, first, append([]string{"perdure", "init"}, l.hostFlags(first)...)...); err != nil {
		return err
	}
	if err := l.Supervise(first); err != nil {
		return err
	}
	if err := l.WaitMembers(ctx, first, first); err != nil {
		return err
	}
	for i, h := range hosts[1:] {
		token, err := l.token(ctx, first)
		if err != nil {
			return err
		}
		l.log.Info("join", "host", h)
		if _, err := l.Output(ctx, h, append([]string{"perdure", "join", token}, l.hostFlags(h)...)...); err != nil {
			return err
		}
		if err := l.Supervise(h); err != nil {
			return err
		}
		if err := l.WaitMembers(ctx, first, hosts[:i+2]...); err != nil {
			return err
		}
	}
	for _, w := range l.names(RoleWitness) {
		if err := l.joinWitness(ctx, first, w); err != nil {
			return err
		}
	}
	return l.WaitMembers(ctx, first, l.Members()...)
}

// hostFlags are the flags with which a host is told who it is.
func (l *Lab) hostFlags(host string) []string {
	n, err := l.st.node(host)
	if err != nil {
		return nil
	}
	f := []string{"--state-dir", l.StateDir(host), "--name", host, "--address", n.lanAddr().Addr().String()}
	if n.Role == RoleHost {
		f = append(f, "--boot-wait", BootWait.String(), "--tracking-proof", trackingProof,
			"--network", BridgeName+"=eth0", "--network-stable", "2s")
		for i := range l.st.ALinks {
			f = append(f, "--alink", n.alinkAddr(i).Addr().String())
		}
	}
	return f
}

func (l *Lab) token(ctx context.Context, host string, flags ...string) (string, error) {
	out, err := l.Output(ctx, host, append([]string{"perdure", "token", "create"}, flags...)...)
	return strings.TrimSpace(string(out)), err
}

// joinWitness runs `perdure witness --join` until the witness is a member, and
// from then on leaves it to the host's init, which runs it without a token.
func (l *Lab) joinWitness(ctx context.Context, first, w string) error {
	token, err := l.token(ctx, first, "--witness")
	if err != nil {
		return err
	}
	l.log.Info("join", "host", w)
	log, err := os.OpenFile(filepath.Join(l.hostDir(w), "agent.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return fmt.Errorf("open log: %w", err)
	}
	defer log.Close()
	var said bytes.Buffer
	cmd := l.Command(ctx, w, append([]string{"perdure", "witness", "--join", token}, l.hostFlags(w)...)...)
	cmd.Stdout = log
	cmd.Stderr = &tee{log, &said}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start witness: %w", err)
	}
	type outcome struct{ err error }
	ended, joined := make(chan outcome, 1), make(chan outcome, 1)
	go func() { ended <- outcome{cmd.Wait()} }()
	wait, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() { joined <- outcome{l.WaitMembers(wait, first, w)} }()
	select {
	case o := <-ended:
		cancel()
		<-joined
		return fmt.Errorf("join witness: it ended: %w: %s", orExited(o.err), strings.TrimSpace(said.String()))
	case o := <-joined:
		err := o.err
		// The whole process group: nothing of it may stay beside the supervised one.
		if kerr := cmd.Cancel(); err == nil && kerr != nil {
			err = fmt.Errorf("end the joining process: %w", kerr)
		}
		<-ended // killed, so it says nothing new
		if err != nil {
			return fmt.Errorf("join witness: %w", err)
		}
	}
	return l.Supervise(w)
}

func orExited(err error) error {
	if err == nil {
		return errors.New("exit status 0")
	}
	return err
}

// tee writes to a log and keeps what was written for an error message.
type tee struct {
	log  *os.File
	keep *bytes.Buffer
}

func (t *tee) Write(b []byte) (int, error) {
	if t.keep.Len() < 4096 {
		t.keep.Write(b)
	}
	return t.log.Write(b)
}

// ClusterStatus is what `perdure status -o json` prints.
type ClusterStatus struct {
	Cluster api.Cluster `json:"cluster"`
	Hosts   []api.Host  `json:"hosts"`
	VMs     []api.VM    `json:"vms"`
}

// ClusterStatus asks the agent of a host about the cluster.
func (l *Lab) ClusterStatus(ctx context.Context, host string) (ClusterStatus, error) {
	var s ClusterStatus
	out, err := l.Output(ctx, host, "perdure", "status", "-o", "json")
	if err != nil {
		return s, err
	}
	if err := json.Unmarshal(out, &s); err != nil {
		return s, fmt.Errorf("read cluster status: %w", err)
	}
	return s, nil
}

// WaitMembers waits until the agent of host answers, sees a quorum, and all
// the named members as voters that are alive.
func (l *Lab) WaitMembers(ctx context.Context, host string, members ...string) error {
	var last string
	for {
		s, err := l.ClusterStatus(ctx, host)
		if err == nil {
			if last = missing(s, members); last == "" {
				return nil
			}
		} else if ctx.Err() == nil {
			last = err.Error()
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for %s to be members: %w (%s)", strings.Join(members, ", "), context.Cause(ctx), last)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// missing says what is not as it should be, or nothing.
func missing(s ClusterStatus, members []string) string {
	if !s.Cluster.Quorum {
		return "no quorum"
	}
	for _, m := range members {
		voter, alive := false, false
		for _, v := range s.Cluster.Voters {
			voter = voter || v.Name == m && v.Alive
		}
		for _, h := range s.Hosts {
			alive = alive || h.Name == m && h.State == api.HostAlive
		}
		if !voter {
			return m + " is not a voter that answers"
		}
		if !alive {
			return m + " gives no sign of life"
		}
	}
	return ""
}
