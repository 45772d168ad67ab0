package qemu

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Marks in QEMU's migration stream.
const (
	streamMagic = 0x5145564d // "QEVM", big-endian, begins it
	streamEOF   = 0x00       // ends the sections
)

// noDescription is a vmdescription section without content: type, length,
// JSON. A QEMU that loads the state looks for one and complains without it.
var noDescription = []byte{0x06, 0, 0, 0, 2, '{', '}'}

// saver is the memory file that QEMU writes device state into. Passing it as a
// descriptor spares a file system, and works where QEMU sees other paths.
type saver struct {
	mu    sync.Mutex
	read  *os.File // memfd
	write *os.File // the same file, write-only: QEMU's fd sets match by access mode
	args  []byte
	last  *call // a save whose reply was not awaited: the file is QEMU's until it came
}

func (s *saver) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.read != nil {
		s.read.Close()
		s.write.Close()
		s.read, s.write = nil, nil
	}
}

func (q *QMP) openSaver(ctx context.Context) error {
	s := &q.save
	if s.read != nil {
		return nil
	}
	fd, err := unix.MemfdCreate("perdure-devices", unix.MFD_CLOEXEC)
	if err != nil {
		return fmt.Errorf("make memory file: %w", err)
	}
	r := os.NewFile(uintptr(fd), "memfd")
	w, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", fd), os.O_WRONLY, 0)
	if err != nil {
		r.Close()
		return fmt.Errorf("open memory file for writing: %w", err)
	}
	var set struct {
		ID int64 `json:"fdset-id"`
	}
	raw, err := q.ExecuteFile(ctx, "add-fd", map[string]string{"opaque": "device state"}, w)
	if err == nil {
		err = json.Unmarshal(raw, &set)
	}
	if err != nil {
		r.Close()
		w.Close()
		return fmt.Errorf("pass memory file: %w", err)
	}
	s.read, s.write = r, w
	s.args = fmt.Appendf(nil, `{"filename":"/dev/fdset/%d","live":false}`, set.ID)
	return nil
}

// SaveDevices returns the state of all devices and CPUs, without RAM, of a
// stopped guest, appended to buf[:0] (about 80 KiB). The result can be handed
// to LoadDevices of a QEMU with the same Machine. It flushes the disks once more.
func (q *QMP) SaveDevices(ctx context.Context, buf []byte) ([]byte, error) {
	q.save.mu.Lock()
	defer q.save.mu.Unlock()
	c, err := q.saveCall(ctx)
	if err == nil {
		err = q.send(nil, c)
	}
	if err == nil {
		err = q.save.wait(ctx)
	} else {
		q.save.last = nil
	}
	if err != nil {
		return nil, fmt.Errorf("save device state: %w", err)
	}
	return q.save.take(buf)
}

// StopAndSave is Stop and SaveDevices without a pause between them: QEMU reads
// the second command while it carries out the first. onStopped, which may be nil, is called as soon
// as the guest stands still, while QEMU saves; it may flush memory meanwhile, since
// saving does not write to it. An error of onStopped is returned. If the guest was not running (see
// Stopped) the state returned is nil.
func (q *QMP) StopAndSave(ctx context.Context, buf []byte, onStopped func(Stopped) error) (Stopped, []byte, error) {
	q.stopMu.Lock()
	defer q.stopMu.Unlock()
	q.save.mu.Lock()
	defer q.save.mu.Unlock()
	save, err := q.saveCall(ctx)
	if err != nil {
		return Stopped{}, nil, fmt.Errorf("save device state: %w", err)
	}
	stop := newCall("stop", nil, "STOP")
	if err := q.send(nil, stop, save); err != nil {
		q.save.last = nil
		return Stopped{}, nil, err
	}
	st, err := q.stopped(ctx, stop.wait(ctx))
	if err == nil && onStopped != nil {
		err = onStopped(st)
	}
	if err = errors.Join(err, q.save.wait(ctx)); err != nil {
		return st, nil, fmt.Errorf("stop and save device state: %w", err)
	}
	if !st.WasRunning {
		return st, nil, nil
	}
	state, err := q.save.take(buf)
	return st, state, err
}

// saveCall prepares the memory file and the command that fills it.
func (q *QMP) saveCall(ctx context.Context) (*call, error) {
	if err := q.openSaver(ctx); err != nil {
		return nil, err
	}
	s := &q.save
	if s.last != nil {
		_ = s.wait(ctx) // how it ended is of no interest, that it did is
		if s.last != nil {
			return nil, ctx.Err()
		}
	}
	// QEMU writes through the same open file, so this is its offset too.
	if _, err := s.write.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	s.last = newCall("xen-save-devices-state", s.args, "")
	return s.last, nil
}

// wait waits for the save that is under way.
func (s *saver) wait(ctx context.Context) error {
	r := s.last.wait(ctx)
	if ctx.Err() == nil {
		s.last = nil // else it may be under way still
	}
	return r.err
}

// take reads what QEMU has written.
func (s *saver) take(buf []byte) ([]byte, error) {
	n, err := s.write.Seek(0, io.SeekCurrent)
	if err != nil {
		return nil, fmt.Errorf("read device state: %w", err)
	}
	buf = append(buf[:0], make([]byte, n)...)
	if _, err := s.read.ReadAt(buf, 0); err != nil {
		return nil, fmt.Errorf("read device state: %w", err)
	}
	if err := checkStream(buf); err != nil {
		return nil, err
	}
	return append(buf, noDescription...), nil
}

// checkStream refuses what cannot be a whole device state.
func checkStream(b []byte) error {
	if len(b) < 16 || binary.BigEndian.Uint32(b) != streamMagic || b[len(b)-1] != streamEOF {
		return fmt.Errorf("save device state: %d bytes that do not look like one", len(b))
	}
	return nil
}

// loadPoll is the distance of looks at the state of a load, should its event not come.
const loadPoll = 20 * time.Millisecond

// LoadDevices fills a QEMU started with Machine.Incoming from data and returns
// when the state is complete; the guest does not run yet. It can be called
// once. A refused state ends QEMU; the error quotes its log.
func (q *QMP) LoadDevices(ctx context.Context, data []byte) error {
	if err := q.loadDevices(ctx, data); err != nil {
		return fmt.Errorf("load device state: %w", err)
	}
	return nil
}

func (q *QMP) loadDevices(ctx context.Context, data []byte) error {
	if len(data) < len(noDescription) {
		return errors.New("there is none")
	}
	events, end := q.watch("MIGRATION")
	defer end()
	caps := map[string]any{"capabilities": []any{map[string]any{"capability": "events", "state": true}}}
	if err := q.do(ctx, "migrate-set-capabilities", caps); err != nil {
		return err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	_, err = q.ExecuteFile(ctx, "getfd", map[string]string{"fdname": "state"}, r)
	if err != nil {
		w.Close()
		return err
	}
	written := make(chan error, 1)
	go func() {
		_, err := io.Copy(w, bytes.NewReader(data))
		written <- errors.Join(err, w.Close())
	}()
	defer func() {
		_ = w.Close() // whatever QEMU does with its end, the writer goes on
		<-written     //nolint:errcheck // QEMU tells whether the state was whole
	}()
	if err := q.do(ctx, "migrate-incoming", map[string]string{"uri": "fd:state"}); err != nil {
		return err
	}
	return q.awaitLoad(ctx, events)
}

func (q *QMP) awaitLoad(ctx context.Context, events <-chan Event) error {
	var st struct {
		Status string `json:"status"`
		Error  string `json:"error-desc"`
	}
	t := time.NewTicker(loadPoll)
	defer t.Stop()
	for {
		select {
		case e := <-events:
			if err := json.Unmarshal(e.Data, &st); err != nil {
				return fmt.Errorf("read MIGRATION event: %w", err)
			}
		case <-t.C:
			if err := q.query(ctx, "query-migrate", nil, &st); err != nil {
				return err
			}
		case <-q.done:
			return q.Err()
		case <-ctx.Done():
			return ctx.Err()
		}
		switch st.Status {
		case "completed":
			return nil
		case "failed", "cancelled":
			err := fmt.Errorf("QEMU refused the state: %s", st.Error)
			if q.logTail != nil {
				err = fmt.Errorf("%w; its log ends: %s", err, q.logTail(tailBytes))
			}
			return err
		}
	}
}
