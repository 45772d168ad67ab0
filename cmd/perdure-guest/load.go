package main

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Load is made by processes of their own: a spinning goroutine would get in the
// way of the services in the same runtime, which is not what is to be measured.
const (
	meterArg  = "meter-process"
	dirtyArg  = "dirty-process"
	meterFile = "/run/meter"
)

// Meter starts or stops the process that counts CPU work.
func (m *machine) Meter(on bool) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if on == (m.meter != nil) {
		return nil
	}
	if !on {
		stop(m.meter)
		m.meter = nil
		return nil
	}
	if err := os.WriteFile(meterFile, make([]byte, 4096), 0o644); err != nil {
		return fmt.Errorf("make meter file: %w", err)
	}
	c := exec.Command("/proc/self/exe", meterArg, meterFile)
	if err := c.Start(); err != nil {
		return fmt.Errorf("start meter: %w", err)
	}
	m.meter = c
	return nil
}

func stop(c *exec.Cmd) {
	_ = c.Process.Kill() // it may have ended by itself
	_ = c.Wait()
}

// MeterCount reads the work done since the meter was started.
func (m *machine) MeterCount() (uint64, error) {
	b, err := os.ReadFile(meterFile)
	if errors.Is(err, os.ErrNotExist) {
		return 0, errors.New("the meter is off; say: meter on")
	}
	if err != nil {
		return 0, fmt.Errorf("read meter: %w", err)
	}
	return binary.LittleEndian.Uint64(b), nil
}

// meterMain counts how many blocks of 4 KiB it hashes, in the first word of a file.
func meterMain(file string) error {
	lowestPriority()
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	mem, err := unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("map meter: %w", err)
	}
	count := (*uint64)(unsafe.Pointer(&mem[0]))
	block := make([]byte, 4096)
	for {
		sum := sha256.Sum256(block)
		copy(block, sum[:])
		atomic.AddUint64(count, 1)
	}
}

// lowestPriority lets everything else in the guest go before this goroutine,
// which it ties to its thread.
func lowestPriority() {
	runtime.LockOSThread()
	attr := unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_IDLE}
	if err := unix.SchedSetAttr(0, &attr, 0); err != nil {
		_ = unix.Setpriority(unix.PRIO_PROCESS, 0, 19) // better than nothing; the count is right either way
	}
}

// Dirty starts (or, with seconds 0, stops) the process that dirties memory.
func (m *machine) Dirty(mbs, seconds, mb int) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.dirt != nil {
		stop(m.dirt)
		m.dirt = nil
	}
	if seconds == 0 {
		return nil
	}
	c := exec.Command("/proc/self/exe", dirtyArg, strconv.Itoa(mbs), strconv.Itoa(seconds), strconv.Itoa(mb))
	if err := c.Start(); err != nil {
		return fmt.Errorf("start dirtier: %w", err)
	}
	m.dirt = c
	return nil
}

// dirtyMain writes a word into each page of its buffer, again and again, at
// the rate asked for; the content is different each time and compresses badly.
func dirtyMain(args []string) error {
	var n [3]int
	for i, a := range args {
		v, err := strconv.Atoi(a)
		if err != nil {
			return err
		}
		n[i] = v
	}
	mbs, seconds, mb := n[0], n[1], n[2]
	buf := make([]byte, mb<<20)
	start := time.Now()
	end := start.Add(time.Duration(seconds) * time.Second)
	var x uint64 = 88172645463325252
	const batch = 64 // pages between looks at the clock
	var pages int64
	for off := 0; time.Now().Before(end); {
		for range batch {
			for w := 0; w < 4096; w += 256 {
				x ^= x << 13
				x ^= x >> 7
				x ^= x << 17
				binary.LittleEndian.PutUint64(buf[off+w:], x)
			}
			off += 4096
			if off >= len(buf) {
				off = 0
			}
		}
		pages += batch
		if mbs > 0 {
			due := time.Duration(float64(pages) * 4096 / float64(mbs<<20) * float64(time.Second))
			time.Sleep(due - time.Since(start))
		}
	}
	return nil
}
