package shim

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"time"
)

// A guest's clock stands still while the guest does, and after a takeover it is
// behind by what lay between the epoch and now. Where a guest agent runs, and
// lets its clock be set, the shim sets it then: never backwards, and never
// where the clock is so far off that the guest must mean another time. What the
// guest's own NTP would slew for hours is so done in one step.

const (
	timeStood     = time.Second            // a guest that stood still for less is left alone
	timeTolerate  = 500 * time.Millisecond // so is a clock that is behind by less
	timeForeign   = time.Hour              // and one that is behind by more: the guest lives in a time of its own
	timeTries     = 30
	timeRetry     = 2 * time.Second
	agentPatience = 5 * time.Second // for the whole talk with the guest agent
)

// keepTime sets the guest's clock right in the background, after a takeover or a
// long stop. The guest agent may be in use by somebody else, or may only begin to
// run; it is tried for about a minute.
func (p *primary) keepTime(after string) {
	if !p.timing.CompareAndSwap(false, true) {
		return // it is being done
	}
	p.goWork(func() {
		defer p.timing.Store(false)
		for range timeTries {
			sleep(p.ctx, timeRetry)
			if p.ctx.Err() != nil {
				return
			}
			behind, set, err := p.setTime()
			switch {
			case errors.Is(err, errAgentBusy) || errors.Is(err, errNoAgent):
				continue
			case err != nil:
				p.s.log.Info("the guest's clock was not looked at", "after", after, "error", err)
			case set:
				p.s.tl.add("guest-time", p.lastEpoch(), behind, "the guest's clock was %.1f s behind after %s; its agent has set it", behind.Seconds(), after)
			default:
				p.s.log.Info("the guest's clock was left as it is", "after", after, "behind", behind)
			}
			return
		}
	})
}

var (
	errAgentBusy = errors.New("the guest agent is in use")
	errNoAgent   = errors.New("no guest agent runs")
)

// setTime asks the guest agent, if one has its port open, and nobody else talks
// to it: answers go to all who listen.
func (p *primary) setTime() (behind time.Duration, set bool, err error) {
	ctx, cancel := context.WithTimeout(p.ctx, agentPatience)
	defer cancel()
	open, err := p.inst.qmp.PortOpen(ctx)
	if err != nil {
		return 0, false, err
	}
	if !open || p.inst.gagent == nil {
		return 0, false, errNoAgent
	}
	if !p.inst.agentUse.TryLock() {
		return 0, false, errAgentBusy
	}
	defer p.inst.agentUse.Unlock()
	ours, theirs := net.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = p.inst.gagent.Attach(ctx, theirs, false) // its end is seen on ours
	}()
	defer func() { ours.Close(); <-done }()
	if err := ours.SetDeadline(time.Now().Add(agentPatience)); err != nil {
		return 0, false, err
	}
	return correctClock(ours, time.Now)
}

// correctClock speaks the guest agent's protocol on conn: it compares the
// guest's clock with now, and sets it where it is behind.
func correctClock(conn net.Conn, now func() time.Time) (behind time.Duration, set bool, err error) {
	t := agentTalk{conn: conn, in: bufio.NewReaderSize(conn, 64<<10)}
	if err := t.sync(); err != nil {
		return 0, false, err
	}
	var info struct {
		Commands []struct {
			Name    string `json:"name"`
			Enabled bool   `json:"enabled"`
		} `json:"supported_commands"`
	}
	if err := t.call("guest-info", nil, &info); err != nil {
		return 0, false, err
	}
	may := 0
	for _, c := range info.Commands {
		if c.Enabled && (c.Name == "guest-get-time" || c.Name == "guest-set-time") {
			may++
		}
	}
	if may < 2 {
		return 0, false, errors.New("the guest agent does not let the clock be set")
	}
	asked := now()
	var ns int64
	if err := t.call("guest-get-time", nil, &ns); err != nil {
		return 0, false, err
	}
	answered := now()
	// The guest read its clock somewhere in between: what it is behind for sure.
	behind = asked.Sub(time.Unix(0, ns))
	if behind < timeTolerate || behind > timeForeign {
		return behind, false, nil
	}
	half := answered.Sub(asked) / 2 // about what the command takes to arrive
	return behind, true, t.call("guest-set-time", map[string]int64{"time": now().Add(half).UnixNano()}, nil)
}

// agentTalk is one talk with a guest agent.
type agentTalk struct {
	conn net.Conn
	in   *bufio.Reader
}

// sync throws away what earlier talks left: the byte 0xff ends what the agent
// may have read of a command that was cut off, and its answer begins with one.
func (t *agentTalk) sync() error {
	var b [4]byte
	if _, err := rand.Read(b[:]); err != nil {
		return fmt.Errorf("read random numbers: %w", err)
	}
	id := int64(binary.LittleEndian.Uint32(b[:]) >> 1)
	if _, err := fmt.Fprintf(t.conn, "\xff{\"execute\":\"guest-sync-delimited\",\"arguments\":{\"id\":%d}}\n", id); err != nil {
		return fmt.Errorf("ask the guest agent: %w", err)
	}
	for {
		line, err := t.in.ReadSlice('\n')
		if errors.Is(err, bufio.ErrBufferFull) {
			continue // no answer of ours is that long
		}
		if err != nil {
			return fmt.Errorf("wait for the guest agent: %w", err)
		}
		var r struct {
			Return int64 `json:"return"`
		}
		if i := bytes.LastIndexByte(line, 0xff); i >= 0 && json.Unmarshal(line[i+1:], &r) == nil && r.Return == id {
			return nil
		}
	}
}

// call carries out one command.
func (t *agentTalk) call(command string, args, result any) error {
	q := map[string]any{"execute": command}
	if args != nil {
		q["arguments"] = args
	}
	b, err := json.Marshal(q)
	if err != nil {
		return fmt.Errorf("ask the guest agent: %w", err)
	}
	if _, err := t.conn.Write(append(b, '\n')); err != nil {
		return fmt.Errorf("ask the guest agent: %w", err)
	}
	line, err := t.in.ReadSlice('\n') // bounded: what a guest says is not to be trusted
	if err != nil {
		return fmt.Errorf("wait for the guest agent: %w", err)
	}
	var r struct {
		Return json.RawMessage `json:"return"`
		Error  *struct {
			Desc string `json:"desc"`
		} `json:"error"`
	}
	if err := json.Unmarshal(line, &r); err != nil {
		return fmt.Errorf("read answer of the guest agent to %s: %w", command, err)
	}
	if r.Error != nil {
		return fmt.Errorf("guest agent: %s: %s", command, r.Error.Desc)
	}
	if result == nil {
		return nil
	}
	if err := json.Unmarshal(r.Return, result); err != nil {
		return fmt.Errorf("read answer of the guest agent to %s: %w", command, err)
	}
	return nil
}
