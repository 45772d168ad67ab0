package qemu

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// A guest moves from one QEMU of a host to another, memory and all, while it runs: by QEMU's own
// live migration over a Unix socket. The order is
//
//	target.AcceptMigration   it was started with Machine.Incoming
//	source.Migrate           copies while the guest runs
//	source.AwaitSwitchover   the guest stands still, its devices are not saved yet
//	source.FinishMigration   the rest is sent; the guest is the target's from here on
//	target.AwaitMigrated     it holds everything, stopped
//	target.Cont
//
// Until FinishMigration returned nil the guest is the source's: CancelMigration has it go on there.
// After that the source must be ended, and only then may the target run.

// States of a migration (query-migrate).
const (
	migrateSwitchover = "pre-switchover"
	migrateCompleted  = "completed"
	migrateFailed     = "failed"
	migrateCancelled  = "cancelled"
)

// Migration is how far a migration has come.
type Migration struct {
	Status    string
	Error     string
	Total     int64 // bytes of memory
	Remaining int64 // bytes not sent, or changed again since
	Rounds    int64 // how often all of it was gone through
}

// MigrateOptions of Migrate.
type MigrateOptions struct {
	// Downtime is how long the guest may stand still for the rest of its memory.
	Downtime time.Duration
}

// QueryMigration returns how far a migration has come. An idle QEMU has an empty Status.
func (q *QMP) QueryMigration(ctx context.Context) (Migration, error) {
	var r struct {
		Status string `json:"status"`
		Error  string `json:"error-desc"`
		RAM    struct {
			Total     int64 `json:"total"`
			Remaining int64 `json:"remaining"`
			Rounds    int64 `json:"dirty-sync-count"`
		} `json:"ram"`
	}
	if err := q.query(ctx, "query-migrate", nil, &r); err != nil {
		return Migration{}, err
	}
	return Migration{Status: r.Status, Error: r.Error, Total: r.RAM.Total, Remaining: r.RAM.Remaining, Rounds: r.RAM.Rounds}, nil
}

func capability(name string, on bool) map[string]any {
	return map[string]any{"capability": name, "state": on}
}

// AcceptMigration has a QEMU that was started with Machine.Incoming listen at path for its guest.
func (q *QMP) AcceptMigration(ctx context.Context, path string) error {
	caps := map[string]any{"capabilities": []any{capability("events", true)}}
	if err := q.do(ctx, "migrate-set-capabilities", caps); err != nil {
		return fmt.Errorf("accept migration: %w", err)
	}
	if err := q.do(ctx, "migrate-incoming", map[string]string{"uri": "unix:" + path}); err != nil {
		return fmt.Errorf("accept migration: %w", err)
	}
	return nil
}

// Migrate begins to copy the guest to the QEMU that listens at path. A guest that changes its memory
// faster than it is copied is slowed down by QEMU until it does not.
func (q *QMP) Migrate(ctx context.Context, path string, o MigrateOptions) error {
	caps := map[string]any{"capabilities": []any{capability("events", true), capability("pause-before-switchover", true), capability("auto-converge", true)}}
	params := map[string]any{"max-bandwidth": int64(1) << 40, "downtime-limit": o.Downtime.Milliseconds()}
	for _, c := range []struct {
		command string
		args    any
	}{{"migrate-set-capabilities", caps}, {"migrate-set-parameters", params}, {"migrate", map[string]string{"uri": "unix:" + path}}} {
		if err := q.do(ctx, c.command, c.args); err != nil {
			return fmt.Errorf("begin migration: %w", err)
		}
	}
	return nil
}

// migratePoll is the distance of looks at a migration.
const migratePoll = 2 * time.Millisecond

// AwaitSwitchover waits until QEMU has stopped the guest and nothing but the rest of its memory
// and its devices is left to send, and returns since when the guest stands still.
// report, which may be nil, is told now and then how far it is.
func (q *QMP) AwaitSwitchover(ctx context.Context, report func(Migration)) (since time.Time, err error) {
	stops, end := q.watch("STOP")
	defer end()
	if err := q.awaitMigration(ctx, migrateSwitchover, 10*migratePoll, report); err != nil {
		return since, err
	}
	for since = time.Now(); ; {
		select {
		case e := <-stops:
			since = e.Time
		default:
			return since, nil
		}
	}
}

// FinishMigration sends what is left and returns when the target has been given everything. After
// an error the guest is the source's (CancelMigration makes sure of that).
func (q *QMP) FinishMigration(ctx context.Context) error {
	if err := q.do(ctx, "migrate-continue", map[string]string{"state": migrateSwitchover}); err != nil {
		return fmt.Errorf("finish migration: %w", err)
	}
	return q.awaitMigration(ctx, migrateCompleted, migratePoll, nil)
}

// AwaitMigrated is for the target: it returns when the guest is here whole. It stands still.
func (q *QMP) AwaitMigrated(ctx context.Context) error {
	return q.awaitMigration(ctx, migrateCompleted, migratePoll, nil)
}

func (q *QMP) awaitMigration(ctx context.Context, want string, poll time.Duration, report func(Migration)) error {
	t := time.NewTicker(poll)
	defer t.Stop()
	events, end := q.watch("MIGRATION")
	defer end()
	for {
		m, err := q.QueryMigration(ctx)
		if err != nil {
			return fmt.Errorf("follow migration: %w", err)
		}
		switch m.Status {
		case want:
			return nil
		case migrateFailed, migrateCancelled:
			err := fmt.Errorf("migration %s: %s", m.Status, m.Error)
			if m.Error == "" && q.logTail != nil {
				err = fmt.Errorf("migration %s; QEMU's log ends: %s", m.Status, q.logTail(tailBytes))
			}
			return err
		case migrateCompleted: // want is an earlier state
			return errors.New("migration completed without waiting for its last step")
		}
		if report != nil {
			report(m)
		}
		select {
		case <-t.C:
		case <-events:
		case <-q.done:
			return fmt.Errorf("follow migration: %w", q.Err())
		case <-ctx.Done():
			return fmt.Errorf("follow migration: %w", context.Cause(ctx))
		}
	}
}

// ErrMigrated says that a migration cannot be cancelled any more: the guest is the target's.
var ErrMigrated = errors.New("the guest has left already")

// CancelMigration ends a migration that is under way or has failed, and returns when the guest is
// the source's alone, run state as before: one that ran does so again. ErrMigrated: it is too late.
func (q *QMP) CancelMigration(ctx context.Context) error {
	m, err := q.QueryMigration(ctx)
	if err == nil && m.Status == migrateCompleted {
		return ErrMigrated
	}
	if err == nil {
		err = q.do(ctx, "migrate_cancel", nil)
	}
	for err == nil {
		m, err = q.QueryMigration(ctx)
		if err != nil {
			break
		}
		switch m.Status {
		case migrateCompleted:
			return ErrMigrated
		case migrateFailed, migrateCancelled, "", "none":
			return q.awaitReturn(ctx)
		}
		select {
		case <-time.After(migratePoll):
		case <-ctx.Done():
			err = context.Cause(ctx)
		}
	}
	return fmt.Errorf("cancel migration: %w", err)
}

// awaitReturn waits until QEMU has left its states of migration: it lets the guest go on a moment
// after it calls the migration over.
func (q *QMP) awaitReturn(ctx context.Context) error {
	for {
		status, _, err := q.Status(ctx)
		if err != nil {
			return fmt.Errorf("cancel migration: %w", err)
		}
		if status != statusFinishMigrate {
			return nil
		}
		select {
		case <-time.After(migratePoll):
		case <-ctx.Done():
			return fmt.Errorf("cancel migration: QEMU stays in state %s: %w", status, context.Cause(ctx))
		}
	}
}

// Run states of a QEMU whose guest moves.
const (
	statusFinishMigrate = "finish-migrate"
	// StatusMigrated is that of a QEMU whose guest has left.
	StatusMigrated = "postmigrate"
)
