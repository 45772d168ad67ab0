package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"perdure/internal/clusterstore"
)

// proofRetry is how long a host whose proof failed waits before it tries again:
// what failed may have been short of memory and nothing worse.
const proofRetry = 10 * time.Minute

// proofPoll is how often a host looks whether another one, with which it shares
// its proof, has finished.
const proofPoll = 200 * time.Millisecond

// Proof is what the proof of dirty tracking found (see package selftest, which
// the agent must not reach: it runs as a program of its own).
type Proof struct {
	OK   bool   `json:"ok"`
	Text string `json:"text"` // what was compared, or what differed
}

// proofOf is what a proof holds for: it is worth nothing on another boot, kernel
// or QEMU.
type proofOf struct {
	Boot   string `json:"boot"`
	Kernel string `json:"kernel"`
	QEMU   string `json:"qemu"` // path, version, size and time of change
	Accel  string `json:"accel"`
	Type   string `json:"type"`
	By     string `json:"by"` // version of Perdure, whose helper is under proof too
}

// keptProof is the file in which a proof is kept.
type keptProof struct {
	For   proofOf   `json:"for"`
	Proof Proof     `json:"proof"`
	At    time.Time `json:"at"`
}

// proveTracking finds out whether dirty tracking can be trusted here, from the
// kept proof or by running it, and goes on until it can or ctx ends. Nothing
// waits for it but protection.
func (a *Agent) proveTracking(ctx context.Context, m Machine) {
	if a.opts.Prove == nil {
		return
	}
	for {
		p, err := a.proof(ctx, m)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			p = Proof{Text: err.Error()}
			a.log.Error("dirty tracking could not be proved; no VM is protected at level ft here", "error", err)
		case !p.OK:
			a.log.Error("dirty tracking failed its proof; no VM is protected at level ft here", "found", p.Text)
		default:
			a.log.Info("dirty tracking is proved", "found", p.Text)
		}
		a.tracking.Store(&p)
		a.kickAll() // those that waited for it
		if p.OK || !sleep(ctx, proofRetry) {
			return
		}
	}
}

// proof returns a good proof that still holds, or makes one. Hosts that keep it
// in the same file (those of a lab) make it one after the other, so all but the
// first find it.
func (a *Agent) proof(ctx context.Context, m Machine) (Proof, error) {
	what, err := a.proofOf(m)
	if err != nil {
		return Proof{}, err
	}
	path := a.cfg.ProofPath()
	if kept, ok := readProof(path, what); ok && kept.OK {
		return kept, nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return Proof{}, fmt.Errorf("keep proof: %w", err)
	}
	lock, ok, err := tryLock(path + ".lock")
	for ; err == nil && !ok; lock, ok, err = tryLock(path + ".lock") {
		if !sleep(ctx, proofPoll) {
			return Proof{}, ctx.Err()
		}
	}
	if err != nil {
		return Proof{}, fmt.Errorf("keep proof: %w", err)
	}
	defer lock.release()
	if kept, ok := readProof(path, what); ok && kept.OK {
		return kept, nil
	}
	p, err := a.opts.Prove(ctx, a.cfg.QEMU, m, a.cfg.Path("run"))
	if err != nil {
		return Proof{}, err
	}
	return p, writeProof(path, keptProof{For: what, Proof: p, At: time.Now().UTC()})
}

func (a *Agent) proofOf(m Machine) (proofOf, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return proofOf{}, fmt.Errorf("tell this boot from others: %w", err)
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return proofOf{}, fmt.Errorf("read version of the kernel: %w", err)
	}
	st, err := os.Stat(a.cfg.QEMU)
	if err != nil {
		return proofOf{}, fmt.Errorf("look at QEMU: %w", err)
	}
	return proofOf{Boot: strings.TrimSpace(string(boot)), Kernel: unix.ByteSliceToString(u.Release[:]) + " " + unix.ByteSliceToString(u.Version[:]),
		QEMU:  fmt.Sprintf("%s %s, %d bytes of %s", a.cfg.QEMU, m.QEMU, st.Size(), st.ModTime().UTC().Format(time.RFC3339)),
		Accel: m.Accel, Type: m.Type, By: a.opts.Version}, nil
}

// readProof returns the kept proof where there is one for just this.
func readProof(path string, what proofOf) (Proof, bool) {
	data, err := os.ReadFile(path)
	if err != nil {
		return Proof{}, false
	}
	var k keptProof
	if json.Unmarshal(data, &k) != nil || k.For != what {
		return Proof{}, false // another boot's, or torn: it is made anew
	}
	return k.Proof, true
}

func writeProof(path string, k keptProof) error {
	data, err := json.MarshalIndent(k, "", "  ")
	if err != nil {
		return fmt.Errorf("keep proof: %w", err)
	}
	tmp := path + ".new"
	if err := os.WriteFile(tmp, append(data, '\n'), 0o600); err != nil {
		return fmt.Errorf("keep proof: %w", errors.Join(err, os.Remove(tmp)))
	}
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("keep proof: %w", err)
	}
	return nil
}

// trackingNow is what this host publishes of its proof.
func (a *Agent) trackingNow() (state clusterstore.Tracking, text string) {
	switch p := a.tracking.Load(); {
	case a.opts.Prove == nil:
		return clusterstore.TrackingUnknown, ""
	case p == nil:
		return clusterstore.TrackingPending, ""
	case p.OK:
		return clusterstore.TrackingProved, p.Text
	default:
		return clusterstore.TrackingFailed, p.Text
	}
}

// untracked says why a host cannot take part in level ft by its proof, or "".
// A host of an older version says nothing, and is let in as it was before.
func untracked(h clusterstore.HostInfo) string {
	switch h.Tracking {
	case clusterstore.TrackingFailed:
		return "failed the proof of dirty tracking that level ft rests on: " + h.TrackingText
	case clusterstore.TrackingPending:
		return "is still proving its dirty tracking"
	}
	return ""
}

// checkTracking refuses level ft on this host where its proof failed. One that
// is not done yet refuses nothing: protection waits for it.
func (a *Agent) checkTracking() error {
	if state, text := a.trackingNow(); state == clusterstore.TrackingFailed {
		return fmt.Errorf("host %s %s", a.cfg.Name, untracked(clusterstore.HostInfo{Tracking: state, TrackingText: text}))
	}
	return nil
}
