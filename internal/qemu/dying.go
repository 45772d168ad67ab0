package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"
)

// Dying is closed as soon as it is certain that the process ends: with Exited
// at the latest, and earlier if WatchThreads could watch.
func (p *Process) Dying() <-chan struct{} { return p.dying }

func (p *Process) markDying() { p.dyingOnce.Do(func() { close(p.dying) }) }

// WatchThreads watches threads of the process that end only with it. The kernel
// says that a process ended when its memory has been taken down, which takes
// some 100 ms per GiB of a guest's; the first thread of many is gone long before.
// At least two are needed, since the last to go waits for that too.
// Kernels before 6.9 cannot watch a thread: then Dying is Exited.
func (p *Process) WatchThreads(tids []int) {
	var fds []unix.PollFd
	for _, tid := range tids {
		fd, err := unix.PidfdOpen(tid, unix.O_EXCL) // PIDFD_THREAD
		if err == nil {
			fds = append(fds, unix.PollFd{Fd: int32(fd), Events: unix.POLLIN})
		}
	}
	if len(fds) == 0 {
		return
	}
	gone := func(f unix.PollFd) bool { return f.Revents&(unix.POLLIN|unix.POLLHUP) != 0 }
	go func() { // ends with the process
		for {
			n, err := unix.Poll(fds, -1)
			if n > 0 || err != nil && !errors.Is(err, unix.EINTR) {
				break
			}
		}
		if slices.ContainsFunc(fds, gone) { // only that counts, not a failed look
			p.markDying()
		}
		for _, f := range fds {
			unix.Close(int(f.Fd))
		}
	}()
}

// VCPUThreads returns the ids of the threads that run the guest's CPUs.
func (q *QMP) VCPUThreads(ctx context.Context) ([]int, error) {
	raw, err := q.Execute(ctx, "query-cpus-fast", nil)
	if err != nil {
		return nil, fmt.Errorf("list vCPU threads: %w", err)
	}
	var cpus []struct {
		Thread int `json:"thread-id"`
	}
	if err := json.Unmarshal(raw, &cpus); err != nil {
		return nil, fmt.Errorf("list vCPU threads: %w", err)
	}
	var tids []int
	for _, c := range cpus {
		tids = append(tids, c.Thread)
	}
	return tids, nil
}

// Abort cuts the connection: every call that waits returns with an error now.
// For a QEMU that is known to be dying.
func (q *QMP) Abort() { q.conn.Close() }
