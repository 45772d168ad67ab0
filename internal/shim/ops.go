package shim

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"time"

	"perdure/internal/authority"
	"perdure/internal/hostnet"
	"perdure/internal/model"
	"perdure/internal/shimapi"
)

// errNotRunning refuses an operation that needs the running copy.
var errNotRunning = errors.New("this host does not run the VM")

// do carries out an operation of the agent or a person.
func (s *Shim) do(ctx context.Context, op shimapi.Op) (string, error) {
	switch op.Op {
	case "protect":
		if level, changing := s.levelNow(); changing {
			return "", errLevelChanges
		} else if !level.HasSecondary() {
			return "", fmt.Errorf("the VM has level %q; only levels %q and %q have a secondary", level, model.LevelCA, model.LevelFT)
		}
		if _, changing := s.disksNow(); changing {
			return "", errDisksChange
		}
		if err := s.protectable(ctx); err != nil {
			return "", err
		}
		return "filling host " + op.Host, s.ask(ctx, authority.EvProtect{Host: op.Host})
	case "unprotect":
		if err := s.mayLeave(); err != nil {
			return "", err
		}
		return "", s.ask(ctx, authority.EvUnprotect{Reason: "asked for"})
	case "survivor":
		return "", s.ask(ctx, authority.EvSurvivor{On: op.Value == "on", Confirmed: op.Value == "on"})
	case "peer-dead":
		return "", s.ask(ctx, authority.EvPeerDead{Run: model.RunID(op.Value)})
	case "takeover":
		if !op.Force {
			return "", errors.New("a takeover that the cluster did not decide needs force")
		}
		return "", s.ask(ctx, authority.EvForce{Branch: model.BranchID(newRun()), Run: s.run()})
	case "trial":
		st := s.standby()
		if st == nil || st.target != nil {
			return "", errors.New("this shim holds no memory of the guest")
		}
		try := st.try
		if op.Value == "next" {
			try = st.tryNext
		}
		n, err := try(ctx)
		return fmt.Sprintf("epoch %d loads", n), err
	case "disk-replace":
		return s.doDisk(op)
	case "level":
		return s.changeLevel(ctx, model.Level(op.Value))
	case "level-cancel":
		return "", s.cancelChange()
	case "disks":
		return s.setDisks(ctx, op.Value)
	case "quit":
		if s.primary() != nil {
			return "", errors.New("this shim runs the VM")
		}
		s.end(errEnded{"asked to quit"})
		return "", nil
	}
	return s.doGuest(ctx, op)
}

// doGuest carries out what concerns the running guest, in the QEMU in which it is: where that
// changes meanwhile, in the new one.
func (s *Shim) doGuest(ctx context.Context, op shimapi.Op) (string, error) {
	for {
		p := s.primary()
		if p == nil {
			return "", errNotRunning
		}
		text, err := s.doIn(ctx, p, op)
		if err == nil || ctx.Err() != nil || p.ctx.Err() == nil {
			return text, err
		}
		for s.primary() == p {
			if _, changing := s.levelNow(); !changing || ctx.Err() != nil || s.ctx.Err() != nil {
				return text, err
			}
			sleep(ctx, time.Millisecond)
		}
	}
}

func (s *Shim) doIn(ctx context.Context, p *primary, op shimapi.Op) (string, error) {
	q := p.inst.qmp
	switch op.Op {
	case "pause":
		return "", p.ask(ctx, p.pause)
	case "resume":
		return "", p.ask(ctx, p.unpause)
	case "shutdown":
		return "power button pressed", q.SystemPowerdown(ctx)
	case "reset":
		return "", q.Reset(ctx)
	case "poweroff":
		return "", p.ask(ctx, func() error { p.powerOff(); return nil })
	case "switchover":
		return "handing over", p.ask(ctx, p.switchover)
	case "verify":
		var o shimapi.VerifyOptions
		if err := json.Unmarshal([]byte(op.Value), &o); err != nil {
			return "", fmt.Errorf("options of verify: %w", err)
		}
		return s.verify.start(o)
	case "verify-stop":
		return s.verify.cancel()
	}
	return "", fmt.Errorf("unknown operation %q", op.Op)
}

// protectable says in one sentence why the running guest cannot be checkpointed, if so.
func (s *Shim) protectable(ctx context.Context) error {
	p := s.primary()
	if p == nil {
		return errNotRunning
	}
	if !p.inst.ft {
		return nil
	}
	reasons, err := p.inst.qmp.Protectable(ctx)
	if err != nil {
		return fmt.Errorf("ask QEMU whether the guest can be checkpointed: %w", err)
	}
	if len(reasons) == 0 {
		s.tl.solved("not-protectable")
		return nil
	}
	s.tl.problem(model.Problem{Code: "not-protectable", Severity: model.Critical, Text: reasons[0],
		Action: "change the VM so that nothing stands against checkpoints"})
	return fmt.Errorf("the VM cannot be protected: %s", reasons[0])
}

// announce teaches the switches where the VM's network cards are now, again
// and again for d. It injects frames in the guest's name, so only what has the
// right to let output out calls it.
func (p *primary) announce(d time.Duration) {
	p.goWork(func() {
		wait := 20 * time.Millisecond
		for end := time.Now().Add(d); time.Now().Before(end) && p.ctx.Err() == nil; wait = min(2*wait, time.Second) {
			for n, nic := range p.s.cfg.Spec.NICs {
				if n >= len(p.inst.outlets) {
					break
				}
				mac, err := net.ParseMAC(nic.MAC)
				if err != nil {
					p.s.log.Error("announce", "nic", nic.ID, "error", err)
					return
				}
				_, err = p.s.gate.whileOpen(func() error { return p.inst.outlets[n].SendPlain(rarp(mac)) })
				if err != nil && p.ctx.Err() == nil {
					p.s.log.Warn("announce", "nic", nic.ID, "error", err)
				}
			}
			sleep(p.ctx, wait)
		}
	})
}

// turnSwitches makes the switches send the VM's frames here already, while the
// guest is still being loaded: they wait in its taps.
func (s *Shim) turnSwitches() {
	for n, nic := range s.cfg.Spec.NICs {
		mac, err := net.ParseMAC(nic.MAC)
		if err == nil {
			err = hostnet.Attract(tapName(s.cfg.Spec.UUID, n, 0), nic.Bridge, mac, rarp(mac))
		}
		if err != nil {
			s.log.Warn("turn the switches", "nic", nic.ID, "error", err)
		}
	}
}

// rarp builds the announcement that QEMU itself sends after a migration: a
// reverse ARP request (RFC 903) from and for the card's own address.
func rarp(hw net.HardwareAddr) []byte {
	f := make([]byte, 60)
	copy(f, []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff})
	copy(f[6:], hw)
	binary.BigEndian.PutUint16(f[12:], 0x8035) // RARP
	binary.BigEndian.PutUint16(f[14:], 1)      // Ethernet
	binary.BigEndian.PutUint16(f[16:], 0x0800) // IPv4
	f[18], f[19] = 6, 4
	binary.BigEndian.PutUint16(f[20:], 3) // request reverse
	copy(f[22:], hw)
	copy(f[32:], hw)
	return f
}

// short abbreviates a run id for people.
func short(r model.RunID) string {
	b, err := hex.DecodeString(string(r))
	if err != nil || len(b) < 4 {
		return string(r)
	}
	return hex.EncodeToString(b[:4])
}
