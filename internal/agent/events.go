package agent

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"

	"perdure/internal/model"
	"perdure/internal/shimapi"
)

const (
	eventRing     = 1024    // events kept in memory per VM
	eventFileSize = 1 << 20 // bytes after which the file is turned over; one old file is kept
)

// events keeps the timelines of this host's share of each VM: a ring in memory,
// and a file that outlives the agent.
type events struct {
	dir  func(vm string) string
	host string

	mu  sync.Mutex
	vms map[string]*timeline
}

type timeline struct {
	list   []model.Event
	seq    uint64
	change chan struct{} // closed and replaced with each event
	size   int64
	cut    bool  // the file ends in the middle of a line
	err    error // of the file, so that it is said once
}

func newEvents(host string, dir func(vm string) string) *events {
	return &events{dir: dir, host: host, vms: map[string]*timeline{}}
}

// get returns the timeline of a VM, read from its file at first. The caller
// holds the lock.
func (e *events) get(vm string) *timeline {
	t := e.vms[vm]
	if t != nil {
		return t
	}
	t = &timeline{change: make(chan struct{})}
	path := filepath.Join(e.dir(vm), shimapi.EventsFile)
	for _, p := range []string{path + ".1", path} {
		t.load(p)
	}
	if data, err := os.ReadFile(path); err == nil {
		t.size = int64(len(data))
		t.cut = len(data) > 0 && data[len(data)-1] != '\n'
	}
	e.vms[vm] = t
	return t
}

func (t *timeline) load(path string) {
	f, err := os.Open(path)
	if err != nil {
		return
	}
	defer f.Close()
	r := bufio.NewReader(f)
	for {
		line, err := r.ReadBytes('\n')
		var ev model.Event
		// A line cut short by a crash is left out.
		if err == nil && json.Unmarshal(line, &ev) == nil {
			t.keep(ev)
			t.seq = max(t.seq, ev.Seq)
		}
		if err != nil {
			return
		}
	}
}

func (t *timeline) keep(ev model.Event) {
	t.list = append(t.list, ev)
	if len(t.list) > eventRing {
		t.list = append(t.list[:0:0], t.list[len(t.list)-eventRing:]...)
	}
}

// add numbers and keeps an event. It returns an error where the file cannot be
// written, once; the event is kept in memory anyway.
func (e *events) add(ev model.Event) error {
	if ev.Time.IsZero() {
		ev.Time = time.Now()
	}
	ev.Time = ev.Time.UTC()
	if ev.Host == "" {
		ev.Host = e.host
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	t := e.get(ev.VM)
	// A shim repeats an event whose answer it did not get.
	if n := len(t.list); n > 0 && ev.Type == t.list[n-1].Type && ev.Time.Equal(t.list[n-1].Time) && ev.Text == t.list[n-1].Text {
		return nil
	}
	t.seq++
	ev.Seq = t.seq
	t.keep(ev)
	close(t.change)
	t.change = make(chan struct{})
	err := t.write(filepath.Join(e.dir(ev.VM), shimapi.EventsFile), ev)
	if (err == nil) == (t.err == nil) {
		return nil
	}
	t.err = err
	return err
}

func (t *timeline) write(path string, ev model.Event) error {
	line, err := json.Marshal(ev)
	if err != nil {
		return fmt.Errorf("write event: %w", err)
	}
	if t.size > eventFileSize {
		if err := os.Rename(path, path+".1"); err != nil {
			return fmt.Errorf("write event: %w", err)
		}
		t.size = 0
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("write event: %w", err)
	}
	defer f.Close()
	line = append(line, '\n')
	if t.cut {
		line = append([]byte{'\n'}, line...)
		t.cut = false
	}
	n, err := f.Write(line)
	t.size += int64(n)
	if err != nil {
		return fmt.Errorf("write event: %w", err)
	}
	return nil
}

// since returns the events of a VM that are later than a number, and a channel
// that is closed when there are more.
func (e *events) since(vm string, seq uint64) ([]model.Event, <-chan struct{}) {
	e.mu.Lock()
	defer e.mu.Unlock()
	t := e.get(vm)
	i := len(t.list)
	for i > 0 && t.list[i-1].Seq > seq {
		i--
	}
	return append([]model.Event(nil), t.list[i:]...), t.change
}

// forget drops the timeline of a VM from memory.
func (e *events) forget(vm string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if t := e.vms[vm]; t != nil {
		close(t.change)
		delete(e.vms, vm)
	}
}

// readLimited reads a whole small body.
func readLimited(r io.Reader, limit int64) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("longer than %d bytes", limit)
	}
	return b, nil
}
