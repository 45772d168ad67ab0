package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"
)

// Run states as QEMU names them (query-status).
const (
	StatusRunning       = "running"
	StatusPaused        = "paused"
	StatusPrelaunch     = "prelaunch"
	StatusInMigrate     = "inmigrate"
	StatusShutdown      = "shutdown"
	StatusIOError       = "io-error"
	StatusGuestPanicked = "guest-panicked"
	StatusInternalError = "internal-error"
	StatusWatchdog      = "watchdog"
	StatusSuspended     = "suspended"
)

// Stopped is the outcome of Stop.
type Stopped struct {
	// Status is the run state after the command.
	Status string
	// WasRunning says that it was this Stop that made the guest stop. If
	// false, something else had (see Status), and the caller must not Cont on
	// its own.
	WasRunning bool
	// At is when it had stopped, by QEMU's reading of the wall clock: from then on its
	// CPUs did nothing. Zero if that is not known.
	At time.Time
}

type statusReply struct {
	Status  string `json:"status"`
	Running bool   `json:"running"`
}

// Stop stops the guest's CPUs, drains and flushes its disks, and says whether
// it was this call that did so. When ctx ends first the guest may be stopped or not.
func (q *QMP) Stop(ctx context.Context) (Stopped, error) {
	q.stopMu.Lock()
	defer q.stopMu.Unlock()
	c := newCall("stop", nil, "STOP")
	if err := q.send(nil, c); err != nil {
		return Stopped{}, err
	}
	return q.stopped(ctx, c.wait(ctx))
}

// stopped judges the reply to a stop. In the common case nothing has to be
// asked: the STOP event came, and nothing else that could have been its cause.
func (q *QMP) stopped(ctx context.Context, r reply) (Stopped, error) {
	if r.err != nil {
		return Stopped{}, r.err
	}
	if r.seen && !r.suspect {
		return Stopped{Status: StatusPaused, WasRunning: true, At: r.at}, nil
	}
	// An I/O error or a panic may have been quicker by a moment, and its STOP
	// looks like ours.
	status, _, err := q.Status(ctx)
	return Stopped{Status: status, WasRunning: r.seen && status == StatusPaused}, err
}

// Cont lets the guest run. It returns when the CPUs have been told to.
func (q *QMP) Cont(ctx context.Context) error {
	q.stopMu.Lock()
	defer q.stopMu.Unlock()
	c := newCall("cont", nil, "RESUME")
	if err := q.send(nil, c); err != nil {
		return err
	}
	return c.wait(ctx).err
}

// Status returns the run state and whether CPUs run.
func (q *QMP) Status(ctx context.Context) (status string, running bool, err error) {
	var st statusReply
	if err := q.query(ctx, "query-status", nil, &st); err != nil {
		return "", false, err
	}
	return st.Status, st.Running, nil
}

// query is Execute with the result unmarshalled.
func (q *QMP) query(ctx context.Context, command string, args, result any) error {
	raw, err := q.Execute(ctx, command, args)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(raw, result); err != nil {
		return fmt.Errorf("read result of %s: %w", command, err)
	}
	return nil
}

// do is Execute for commands without a result.
func (q *QMP) do(ctx context.Context, command string, args any) error {
	_, err := q.Execute(ctx, command, args)
	return err
}

// maxAnnounce bounds AnnounceSelf; announcements must be over before output
// is diverted again.
const maxAnnounce = 10 * time.Second

// AnnounceSelf lets the guest's NICs tell switches where they are now: at once
// a few times, then every 200 ms for d (at most 10 s). It returns at once;
// QEMU does the repeating. Not while output is diverted, nor less than d before:
// QEMU's own frames have no header, and would come out of the diversion as garbage.
func (q *QMP) AnnounceSelf(ctx context.Context, d time.Duration) error {
	const initial, step, longest = 20, 50, 200 // ms
	left, rounds := min(d, maxAnnounce).Milliseconds(), 1
	for gap := int64(initial); left > 0; gap = min(gap+step, longest) {
		left -= gap
		rounds++
	}
	return q.do(ctx, "announce-self", map[string]int{"initial": initial, "max": longest, "rounds": rounds, "step": step})
}

// SystemPowerdown presses the ACPI power button.
func (q *QMP) SystemPowerdown(ctx context.Context) error { return q.do(ctx, "system_powerdown", nil) }

// Reset presses the reset button.
func (q *QMP) Reset(ctx context.Context) error { return q.do(ctx, "system_reset", nil) }

// Quit ends QEMU. The connection's end is no error here.
func (q *QMP) Quit(ctx context.Context) error {
	err := q.do(ctx, "quit", nil)
	if errors.Is(err, ErrClosed) {
		return nil
	}
	return err
}

// SetLink plugs or unplugs the cable of a NIC (NIC.ID).
func (q *QMP) SetLink(ctx context.Context, nic string, up bool) error {
	return q.do(ctx, "set_link", map[string]any{"name": "dev-" + nic, "up": up})
}

// PMemSave writes length bytes of guest-physical memory from addr to a file
// that QEMU makes. Only the first 3 GiB and what lies above 4 GiB are memory.
func (q *QMP) PMemSave(ctx context.Context, addr, length int64, path string) error {
	return q.do(ctx, "pmemsave", map[string]any{"val": addr, "size": length, "filename": path})
}

// DiskState is how a disk of the guest does.
type DiskState string

// The disk states. Other than DiskOK the guest was stopped by an I/O error.
const (
	DiskOK      DiskState = "ok"
	DiskFailed  DiskState = "failed"
	DiskNoSpace DiskState = "nospace"
)

// QueryDisks returns the state of each disk by Disk.ID.
func (q *QMP) QueryDisks(ctx context.Context) (map[string]DiskState, error) {
	var blocks []struct {
		QDev     string    `json:"qdev"`
		IOStatus DiskState `json:"io-status"`
		Inserted *struct {
			NodeName string `json:"node-name"`
		} `json:"inserted"`
	}
	if err := q.query(ctx, "query-block", nil, &blocks); err != nil {
		return nil, err
	}
	m := map[string]DiskState{}
	for _, b := range blocks {
		if b.Inserted == nil {
			continue
		}
		if b.IOStatus == "" {
			b.IOStatus = DiskOK
		}
		m[strings.TrimSuffix(b.Inserted.NodeName, ".b")] = b.IOStatus // see diskNodes
	}
	return m, nil
}

// PortOpen reports whether the guest has the guest agent's port open, that is,
// whether an agent runs in it.
func (q *QMP) PortOpen(ctx context.Context) (bool, error) {
	var devs []struct {
		Label string `json:"label"`
		Open  bool   `json:"frontend-open"`
	}
	if err := q.query(ctx, "query-chardev", nil, &devs); err != nil {
		return false, err
	}
	for _, d := range devs {
		if d.Label == "agent0" {
			return d.Open, nil
		}
	}
	return false, nil
}
