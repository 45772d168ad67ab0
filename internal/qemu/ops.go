package qemu

import (
	"context"
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
	// WasRunning says that it was this Stop that made the guest stop. If false,
	// something else had (see Status), and the caller must not Cont on its own.
	WasRunning bool
}

// Stop stops the guest's CPUs, drains and flushes its disks, and says whether
// it was this call that did so.
func (q *QMP) Stop(ctx context.Context) (Stopped, error) { panic("not yet") }

// Cont lets the guest run. It returns when the CPUs have been told to.
func (q *QMP) Cont(ctx context.Context) error { panic("not yet") }

// Status returns the run state and whether CPUs run.
func (q *QMP) Status(ctx context.Context) (status string, running bool, err error) { panic("not yet") }

// SaveDevices returns the state of all devices and CPUs, without RAM, of a
// stopped guest, appended to buf[:0] (about 80 KiB). The result can be handed to LoadDevices
// of a QEMU with the same Machine.
func (q *QMP) SaveDevices(ctx context.Context, buf []byte) ([]byte, error) { panic("not yet") }

// LoadDevices fills a QEMU started with Machine.Incoming from data and returns
// when the state is complete; the guest does not run yet. A refused state ends
// QEMU; the error quotes its log.
func (q *QMP) LoadDevices(ctx context.Context, data []byte) error { panic("not yet") }

// AnnounceSelf lets the guest's NICs tell switches where they are now, again and again for d (at most 10 s).
// It returns at once; QEMU does the repeating. Not while output is diverted: QEMU would divert these too.
func (q *QMP) AnnounceSelf(ctx context.Context, d time.Duration) error { panic("not yet") }

// SystemPowerdown presses the ACPI power button.
func (q *QMP) SystemPowerdown(ctx context.Context) error { panic("not yet") }

// Reset presses the reset button.
func (q *QMP) Reset(ctx context.Context) error { panic("not yet") }

// Quit ends QEMU. The connection's end is no error here.
func (q *QMP) Quit(ctx context.Context) error { panic("not yet") }

// SetLink plugs or unplugs the cable of a NIC (NIC.ID).
func (q *QMP) SetLink(ctx context.Context, nic string, up bool) error { panic("not yet") }

// PMemSave writes length bytes of guest-physical memory from addr to a file
// that QEMU creates.
func (q *QMP) PMemSave(ctx context.Context, addr, length int64, path string) error { panic("not yet") }

// QueryBlockedReasons returns why QEMU thinks that this guest cannot be
// migrated; empty means nothing stands against it.
func (q *QMP) QueryBlockedReasons(ctx context.Context) ([]string, error) { panic("not yet") }

// RAMBlock is one RAM block of QEMU.
type RAMBlock struct {
	Name string
	Used int64 // bytes
}

// RAMBlocks lists all RAM blocks (info ramblock).
func (q *QMP) RAMBlocks(ctx context.Context) ([]RAMBlock, error) { panic("not yet") }

// CheckRAMBlocks returns the blocks that a checkpoint of ram0 and the device
// state would miss, with the reason for each; none means that Level 3 may be had.
func CheckRAMBlocks(blocks []RAMBlock) []string { panic("not yet") }

// Protectable returns, in one sentence each, why this running QEMU cannot be
// checkpointed: migration blockers and RAM blocks. None: it can.
func (q *QMP) Protectable(ctx context.Context) ([]string, error) { panic("not yet") }

// QueryDisks reports for each disk node whether it is in an I/O error state, by Disk.ID ("ok", "failed", "nospace").
func (q *QMP) QueryDisks(ctx context.Context) (map[string]string, error) { panic("not yet") }
