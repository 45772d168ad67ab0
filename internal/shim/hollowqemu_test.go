package shim

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// hollowSocket is where a test that plays the guest listens, beside the hollow
// QEMU's program. Without it the QEMU is nobody's.
const hollowSocket = "guest.sock"

// hollow is a QEMU without a guest. It answers what the shim asks of its monitor,
// and keeps its memory and device state as a real one does: memory is a file that it
// maps, where it is given one, and what it saves is loaded by another. What a guest
// would do is done by the test, at the other end of line.
type hollow struct {
	qmp, serial, mem, nbd string // paths
	private, incoming     bool
	size                  int64

	out  sync.Mutex // one message to the monitor at a time
	conn *net.UnixConn
	fds  []int // that came with commands and were not taken yet
	file *os.File

	do      sync.Mutex // one command, or error of a disk, at a time
	running bool
	status  string
	load    string // state of the load, as query-migrate has it
	state   uint64 // the guest's, as of the last stop or load

	ram  []byte
	com  net.Conn // serial line
	line *hollowLine
	disk net.Conn

	devices hollowDevices // given while it ran
}

// qemuMain answers QMP until its last client has gone.
func qemuMain(args []string) error {
	q := &hollow{status: "prelaunch"}
	q.devices = hollowDevices{event: q.event, list: map[string]bool{}}
	q.parse(args)
	if err := q.plug(); err != nil {
		return err
	}
	_ = os.Remove(q.qmp) // a predecessor's, as QEMU does
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: q.qmp, Net: "unix"})
	if err != nil {
		return err
	}
	if q.conn, err = ln.AcceptUnix(); err != nil {
		return err
	}
	q.say(map[string]any{"QMP": map[string]any{"version": map[string]any{"qemu": map[string]int{"major": 7, "minor": 2, "micro": 22}}, "capabilities": []string{}}})
	failed := make(chan os.Signal, 1)
	signal.Notify(failed, syscall.SIGUSR1) // its disk answered with an error
	go func() {
		for range failed {
			q.diskFailed()
		}
	}()
	thrown := make(chan os.Signal, 1)
	signal.Notify(thrown, syscall.SIGUSR2) // the guest throws out what it was given
	go func() {
		for range thrown {
			q.devices.throwOut()
		}
	}()
	for d := json.NewDecoder(readerFunc(q.read)); ; {
		var c struct {
			Execute   string          `json:"execute"`
			Arguments json.RawMessage `json:"arguments"`
		}
		if d.Decode(&c) != nil {
			break // its shim is gone; a QEMU stays, and keeps the lock
		}
		q.command(c.Execute, c.Arguments)
	}
	for {
		time.Sleep(time.Hour)
	}
}

type readerFunc func(p []byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// parse finds what matters in a command line.
func (q *hollow) parse(args []string) {
	option := func(s, key string) string {
		for _, kv := range strings.Split(s, ",") {
			if v, ok := strings.CutPrefix(kv, key+"="); ok {
				return v
			}
		}
		return ""
	}
	for n, a := range args[:len(args)-1] {
		v := args[n+1]
		switch {
		case a == "-qmp":
			q.qmp, _, _ = strings.Cut(strings.TrimPrefix(v, "unix:"), ",")
		case a == "-incoming":
			q.incoming, q.status = true, "inmigrate"
		case a == "-object" && strings.HasPrefix(v, "memory-backend-file"):
			q.mem, q.private = option(v, "mem-path"), option(v, "share") == "off"
			_, _ = fmt.Sscan(option(v, "size"), &q.size)
		case a == "-chardev" && option(v, "id") == "serial0":
			q.serial = option(v, "path")
		case a == "-blockdev" && strings.Contains(v, "driver=nbd"):
			q.nbd = option(v, "server.path")
		}
	}
}

// plug opens what the command line names.
func (q *hollow) plug() (err error) {
	if q.mem != "" {
		f, err := os.OpenFile(q.mem, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		flags := unix.MAP_SHARED | unix.MAP_POPULATE // what is allocated ahead is dirty, as with QEMU
		if q.private {
			flags = unix.MAP_PRIVATE
		}
		q.ram, err = unix.Mmap(int(f.Fd()), 0, int(q.size), unix.PROT_READ|unix.PROT_WRITE, flags)
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
	line := filepath.Join(filepath.Dir(os.Args[0]), hollowSocket)
	if _, err := os.Stat(line); err != nil || q.private {
		return nil // it is nobody's guest, or on trial
	}
	if q.com, err = net.Dial("unix", q.serial); err != nil {
		return err
	}
	q.line, err = dialLine(line, lineMessage{Do: "hello", Dir: filepath.Dir(q.nbd), Incoming: q.incoming}, q.com, q.diskFailed)
	return err
}

// read receives from the monitor's client, and the files that come along.
func (q *hollow) read(p []byte) (int, error) {
	oob := make([]byte, 64)
	n, on, _, _, err := q.conn.ReadMsgUnix(p, oob)
	if on > 0 {
		msgs, merr := unix.ParseSocketControlMessage(oob[:on])
		for _, m := range msgs {
			fds, _ := unix.ParseUnixRights(&m) // none, then
			q.fds = append(q.fds, fds...)
		}
		err = errors.Join(err, merr)
	}
	if n == 0 && err == nil {
		err = io.EOF
	}
	return n, err
}

// takeFile is the oldest file that was passed.
func (q *hollow) takeFile() *os.File {
	if len(q.fds) == 0 {
		return nil
	}
	fd := q.fds[0]
	q.fds = q.fds[1:]
	return os.NewFile(uintptr(fd), "passed")
}

func (q *hollow) say(v any) {
	q.out.Lock()
	defer q.out.Unlock()
	_ = json.NewEncoder(q.conn).Encode(v) // a client that left is noticed by reading
}

func (q *hollow) event(name string, data any) {
	now := time.Now()
	q.say(map[string]any{"event": name, "data": data, "timestamp": map[string]int64{"seconds": now.Unix(), "microseconds": int64(now.Nanosecond() / 1000)}})
}

func (q *hollow) command(name string, args json.RawMessage) {
	q.do.Lock()
	defer q.do.Unlock()
	var answer any = struct{}{}
	var err error
	switch name {
	case "stop":
		q.stop("paused")
	case "cont":
		if q.line != nil {
			_, _ = q.line.ask(lineMessage{Do: "cont"}) // a test that ended has no guest
		}
		q.running, q.status = true, "running"
		q.event("RESUME", struct{}{})
	case "query-status":
		answer = map[string]any{"status": q.status, "running": q.running}
	case "query-cpus-fast":
		answer = []map[string]int{{"thread-id": os.Getpid(), "cpu-index": 0}}
	case "query-block", "query-chardev":
		answer = []int{}
	case "query-migrate":
		answer = map[string]any{"blocked-reasons": []string{}, "status": q.load}
	case "human-monitor-command": // info ramblock
		answer = fmt.Sprintf("              Block Name    PSize              Offset               Used              Total\n"+
			"                    ram0    4 KiB  0x0000000000000000 0x%016x 0x%016x\n", q.size, q.size)
	case "add-fd":
		q.file = q.takeFile()
		answer = map[string]int{"fdset-id": 1, "fd": 3}
	case "getfd":
		q.file = q.takeFile()
	case "xen-save-devices-state":
		_, err = q.file.Write(q.save())
	case "device_add", "device_del", "qom-list":
		var a struct {
			ID string `json:"id"`
		}
		if err = json.Unmarshal(args, &a); err != nil {
			break
		}
		switch name {
		case "qom-list":
			answer = q.devices.named("name")
		case "device_add":
			time.Sleep(hollowPlug)
			q.devices.set(a.ID, true)
		default:
			q.devices.set(a.ID, false)
		}
	case "query-named-block-nodes":
		answer = []int{}
	case "migrate-incoming":
		q.say(map[string]any{"return": answer})
		q.incomingState()
		return
	}
	if err != nil {
		q.say(map[string]any{"error": map[string]string{"class": "GenericError", "desc": err.Error()}})
		return
	}
	q.say(map[string]any{"return": answer})
}

// stop makes the guest stand still; what it did until then is on its disk and in
// its memory when this returns.
func (q *hollow) stop(status string) {
	if !q.running {
		return
	}
	if q.line != nil {
		q.state, _ = q.line.ask(lineMessage{Do: "stop"}) // nobody's guest goes nowhere
	}
	q.touch()
	q.running, q.status = false, status
	q.event("STOP", struct{}{})
	if q.line != nil {
		q.flushDisk()
	}
}

// diskFailed is what happens where a request fails with werror=stop.
func (q *hollow) diskFailed() {
	q.do.Lock()
	defer q.do.Unlock()
	if q.running {
		q.event("BLOCK_IO_ERROR", map[string]string{"node-name": "disk0", "operation": "write", "action": "stop", "reason": "as the test says"})
		q.stop("io-error")
	}
}

// flushDisk is what QEMU does for every disk when it has stopped the guest.
func (q *hollow) flushDisk() {
	for range 2 { // a connection that has died is made anew
		if q.disk == nil {
			c, err := net.Dial("unix", q.nbd)
			if err != nil {
				return // its shim is gone
			}
			_ = c.SetDeadline(time.Now().Add(10 * time.Second))
			hello := append(binary.BigEndian.AppendUint32(nil, 3), "IHAVEOPT\x00\x00\x00\x01\x00\x00\x00\x05disk0"...)
			_, err = io.ReadFull(c, make([]byte, 18))
			if err == nil {
				_, err = c.Write(hello)
			}
			if err == nil {
				_, err = io.ReadFull(c, make([]byte, 10))
			}
			if err != nil {
				c.Close()
				return
			}
			q.disk = c
		}
		_ = q.disk.SetDeadline(time.Now().Add(10 * time.Second))
		req := make([]byte, 28)
		binary.BigEndian.PutUint32(req, 0x25609513)
		binary.BigEndian.PutUint16(req[6:], 3)
		_, err := q.disk.Write(req)
		if err == nil {
			_, err = io.ReadFull(q.disk, make([]byte, 16))
		}
		if err == nil {
			return
		}
		q.disk.Close()
		q.disk = nil
	}
}

// The guest's memory: its first page tells how often the guest was stopped and its
// state then, the others hold the last so many stops each.
const (
	hollowPage  = 4096
	hollowSlots = 100
)

func mix(n uint64) uint64 { return n*0x9e3779b97f4a7c15 ^ n>>7 }

// touch dirties memory in a way that tells of the guest's state.
func (q *hollow) touch() {
	if q.ram == nil {
		return
	}
	le := binary.LittleEndian
	n := le.Uint64(q.ram) + 1
	slot := q.ram[(1+n%hollowSlots)*hollowPage:]
	le.PutUint64(slot, n)
	le.PutUint64(slot[hollowPage-8:], mix(n))
	le.PutUint64(q.ram[8:], q.state)
	le.PutUint64(q.ram, n)
}

// save is the state of the devices.
func (q *hollow) save() []byte {
	b := append([]byte("QEVM"), make([]byte, 96)...) // ends with 0, as a stream must
	binary.LittleEndian.PutUint64(b[8:], q.state)
	if q.ram != nil {
		copy(b[16:], q.ram[:8])
	}
	return b
}

// check compares memory with the device state that came with it.
func (q *hollow) check(dev []byte) error {
	if len(dev) < 100 || !bytes.HasPrefix(dev, []byte("QEVM")) {
		return fmt.Errorf("%d bytes are no device state", len(dev))
	}
	le := binary.LittleEndian
	state, stops := le.Uint64(dev[8:]), le.Uint64(dev[16:])
	if n, s := le.Uint64(q.ram), le.Uint64(q.ram[8:]); n != stops || s != state {
		return fmt.Errorf("the devices are as of stop %d and state %d, the memory as of stop %d and state %d", stops, state, n, s)
	}
	for n := stops; n > 0 && n+hollowSlots > stops; n-- {
		slot := q.ram[(1+n%hollowSlots)*hollowPage:]
		if a, b := le.Uint64(slot), le.Uint64(slot[hollowPage-8:]); a != n || b != mix(n) {
			return fmt.Errorf("as of stop %d a page holds stop %d instead of %d", stops, a, n)
		}
	}
	q.state = state
	return nil
}

// incomingState loads what comes from the file that was passed.
func (q *hollow) incomingState() {
	dev, err := io.ReadAll(q.file)
	if err == nil {
		err = q.check(dev)
	}
	if err == nil && q.line != nil {
		_, err = q.line.ask(lineMessage{Do: "load", State: q.state})
	}
	_ = q.file.Close()
	if err != nil {
		fmt.Fprintln(os.Stderr, "hollow QEMU: load:", err)
		q.load = "failed"
	} else {
		q.load, q.status = "completed", "paused"
	}
	q.event("MIGRATION", map[string]string{"status": q.load})
}

// lineMessage is one message between a hollow QEMU and the test that is its guest.
type lineMessage struct {
	Do       string // of the QEMU: hello, stop, cont, load; each is answered
	Dir      string `json:",omitempty"` // hello: of its host
	Incoming bool   `json:",omitempty"`
	State    uint64 `json:",omitempty"` // of the guest: to be loaded, or of this stop
	Error    string `json:",omitempty"`
	Say      string `json:",omitempty"` // of the test: what the guest says on its serial line
	Fail     bool   `json:",omitempty"` // of the test: a disk answered with an error
}

// hollowLine is the QEMU's end.
type hollowLine struct {
	enc     *json.Encoder
	answers chan lineMessage
}

func dialLine(path string, hello lineMessage, com io.Writer, failed func()) (*hollowLine, error) {
	c, err := net.Dial("unix", path)
	if err != nil {
		return nil, err
	}
	l := &hollowLine{enc: json.NewEncoder(c), answers: make(chan lineMessage, 1)}
	go func() {
		defer close(l.answers)
		for d := json.NewDecoder(c); ; {
			var m lineMessage
			if d.Decode(&m) != nil {
				return
			}
			switch {
			case m.Say != "":
				_, _ = io.WriteString(com, m.Say) // a shim that is gone hears nothing
			case m.Fail:
				go failed()
			default:
				l.answers <- m
			}
		}
	}()
	_, err = l.ask(hello)
	return l, err
}

// ask sends a message and waits for its answer.
func (l *hollowLine) ask(m lineMessage) (uint64, error) {
	if err := l.enc.Encode(m); err != nil {
		return 0, err
	}
	a, ok := <-l.answers
	if !ok {
		return 0, errors.New("the guest is gone")
	}
	if a.Error != "" {
		return 0, errors.New(a.Error)
	}
	return a.State, nil
}
