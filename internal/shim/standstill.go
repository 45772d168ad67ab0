package shim

import (
	"context"
	"errors"
	"fmt"
	"time"

	"perdure/internal/authority"
	"perdure/internal/model"
	"perdure/internal/qemu"
)

// What makes a guest stand still or end: a person, or the guest itself. All of
// it runs in the runner.

// powerOff takes a guest that is off, or shall be, to its recorded end.
func (p *primary) powerOff() {
	if p.offAsked {
		return
	}
	var c *captured
	if p.held {
		if c = p.checkpoint(flagOff, true); c == nil {
			// The pair is being given up; the guest is off all the same.
			time.AfterFunc(beatInterval, func() { p.do(p.powerOff) })
			return
		}
	} else {
		_, err := p.stop()
		if err != nil {
			p.guestEnded(err.Error())
			return
		}
		p.pass()
		for _, d := range p.inst.exports() {
			if err := d.Flush(p.ctx); err != nil {
				p.s.log.Error("flush disk at power-off", "error", err)
			}
		}
	}
	p.standing, p.offAsked = standsOff, true
	p.setState(model.StateStopped)
	p.whenReleased(c, func() { p.s.post(authority.EvPoweredOff{}) })
}

// whenReleased runs f when all output of epoch c has left, at once if c is nil.
// If the pair ends before, f runs when the VM is simplex and c was released by that.
func (p *primary) whenReleased(c *captured, f func()) {
	if c == nil {
		f()
		return
	}
	p.goWork(func() {
		select {
		case <-c.released:
			f()
		case <-p.ctx.Done():
		}
	})
}

// ask runs f in the runner and waits for its answer.
func (p *primary) ask(ctx context.Context, f func() error) error {
	done := make(chan error, 1)
	select {
	case p.cmds <- func() { done <- f() }:
	case <-ctx.Done():
		return ctx.Err()
	case <-p.ctx.Done():
		return errors.New("the VM is ending")
	}
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	case <-p.ctx.Done():
		select {
		case err := <-done: // what was done was done before
			return err
		default:
		}
		return errors.New("the VM is ending")
	}
}

// pause and unpause are a person's; the wanted state travels in the epoch.
func (p *primary) pause() error {
	switch {
	case p.standing == standsPaused:
		return nil
	case p.standing != "" && p.standing != standsBound:
		return fmt.Errorf("the guest does not run: %s", p.standing)
	}
	if p.held {
		if p.checkpoint(flagPaused, true) == nil {
			return errors.New("the last checkpoint failed; see events")
		}
	} else {
		_, err := p.stop()
		if err != nil {
			return err
		}
	}
	p.standing = standsPaused
	p.setState(model.StatePaused)
	p.s.tl.add("paused", 0, 0, "paused by a person")
	return nil
}

func (p *primary) unpause() error {
	switch p.standing {
	case "", standsBound:
		return nil
	case standsOff, standsFinal:
		return fmt.Errorf("the guest cannot go on: %s", p.standing)
	}
	if err := p.resume(); err != nil {
		return err
	}
	if p.held {
		p.checkpoint(0, false) // the secondary must not find it paused
	}
	for _, code := range []string{"guest-panic", "disk-error", "watchdog", "guest-fault"} {
		p.s.tl.solved(code)
	}
	p.s.tl.add("resumed", 0, 0, "resumed by a person")
	p.kick()
	return nil
}

// switchover captures the final epoch; the authority hears when its output has left.
func (p *primary) switchover() error {
	if p.inst.mirror != nil {
		return errors.New("level ca keeps no memory of the guest on the other host, so a planned move would cut its power: shut the guest down, and start the VM on the other host")
	}
	if !p.held {
		return errors.New("the VM has no secondary now")
	}
	paused := p.standing == standsPaused
	if p.standing != "" && p.standing != standsBound && !paused {
		return fmt.Errorf("the guest does not run: %s", p.standing)
	}
	flags := flagFinal
	if paused {
		flags |= flagPaused
	}
	if p.standing == standsBound {
		if err := p.resume(); err != nil {
			return err
		}
	}
	c := p.checkpoint(flags, true)
	if c == nil {
		return errors.New("the final checkpoint failed; see events")
	}
	if p.standing == standsOff {
		p.powerOff()
		return errors.New("the guest has just powered itself off")
	}
	p.standing, p.finalPaused = standsFinal, paused
	p.setState(model.StateHeld)
	p.kept = c.frames
	p.s.tl.add("switchover", c.epoch, time.Since(c.at), "final epoch captured, handing over")
	p.carryDuring(p.pair)
	p.whenReleased(c, func() { p.s.post(authority.EvSwitchedOver{}) })
	return nil
}

// onEvent handles what QEMU tells by itself.
func (p *primary) onEvent(ev qemu.Event) {
	switch ev.Name {
	case "SHUTDOWN":
		p.s.tl.add("guest-off", 0, 0, "the guest powered itself off")
		p.powerOff()
	case "RESET":
		p.s.tl.add("guest-reset", 0, 0, "the guest was reset")
	case "GUEST_PANICKED":
		p.fault("guest-panic", "the guest's kernel panicked")
	case "BLOCK_IO_ERROR":
		if p.held && p.pair != nil && !p.pair.isLost() {
			// The other host's disk works, and there the request is made again. (At level
			// ca the mirror turns to it by itself: what it reports failed on both.)
			p.s.noteGuestError(ev.Data)
			p.guestEnded("disk of this host: " + string(ev.Data))
			return
		}
		p.fault("disk-error", diskError(ev.Data))
	case "DEVICE_DELETED":
		p.guestLetGo(qemu.UnpluggedDisk(ev))
	case "WATCHDOG":
		p.fault("watchdog", "the guest's watchdog ran out")
	}
}

// fault notes that the guest stands still by itself; the next cont is a person's.
func (p *primary) fault(code, text string) {
	ctx, cancel := context.WithTimeout(p.ctx, qmpTimeout)
	defer cancel()
	if _, running, err := p.inst.qmp.Status(ctx); err != nil || running || p.isFaulted() {
		return
	}
	p.standing = text
	p.inst.noteRunning(false)
	p.s.tl.problem(model.Problem{Code: code, Severity: model.Critical, Text: text,
		Action: "look at the console, then perdure vm resume, or vm kill and vm start"})
	p.setState(model.StateFault)
	if p.held {
		// The secondary must know, and what the guest said at last must leave. If
		// the pair is being given up, leaving it does both.
		p.checkpoint(flagFault, true)
	}
}

// faulted is run for a guest that stood still by itself where it comes from:
// nobody but a person lets it go on.
func (p *primary) faulted() {
	p.do(func() {
		p.standing = "it stood still by a panic or an I/O error before it came here"
		p.setState(model.StateFault)
		p.s.tl.problem(model.Problem{Code: "guest-fault", Severity: model.Critical,
			Text:   "the guest stood still by a panic or an I/O error on its last host, and does so here",
			Action: "look at the console and the events, then perdure vm resume, or vm kill and vm start"})
	})
}

func (p *primary) isFaulted() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.state == model.StateFault
}

// stands interprets a stop that found the guest stopped already.
func (p *primary) stands(status string) {
	switch status {
	case qemu.StatusShutdown:
		p.standing = standsOff
	case qemu.StatusPaused, qemu.StatusPrelaunch:
	default:
		p.standing = "QEMU is in state " + status
		p.setState(model.StateFault)
	}
}
