package client

import (
	"bufio"
	"context"
	"encoding/hex"
	"fmt"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"

	"perdure/internal/lab/guestsvc"
)

// Counter sends requests to the guest's counter over one TCP connection, one
// after the other, and checks that each answer continues the last: the number
// grows by one, and the hash chain over all lines is the one computed here. A
// guest that lost a moment of its memory, or went on from an older state after
// its output was seen, or that runs twice, cannot answer so.
type Counter struct {
	*life
	o    Options
	conn net.Conn

	mu      sync.Mutex
	res     CounterResult
	waits   []time.Duration
	waiting time.Time // since when an answer is due; zero: none is
}

// CounterResult is what a Counter saw.
type CounterResult struct {
	Sent      int           `json:"sent"`
	OK        int           `json:"ok"`       // answered, in order, with the right chain
	Lost      int           `json:"lost"`     // never answered, or skipped by the guest's count
	Repeated  int           `json:"repeated"` // the guest's count stood still or went back
	Wrong     int           `json:"wrong"`    // answers whose chain is not the one of what was sent
	Waits     Waits         `json:"waits"`
	LongestAt time.Time     `json:"longest_at"` // when the longest wait began
	Waiting   time.Duration `json:"-"`          // how long an answer is due at this moment
	Err       string        `json:"error,omitempty"`
}

// Clean reports whether nothing was lost, repeated or wrong, and anything was sent.
func (r CounterResult) Clean() bool {
	return r.OK > 0 && r.Sent == r.OK && r.Lost == 0 && r.Repeated == 0 && r.Wrong == 0 && r.Err == ""
}

func (r CounterResult) String() string {
	s := fmt.Sprintf("sent %d, ok %d, lost %d, repeated %d, wrong %d; %v", r.Sent, r.OK, r.Lost, r.Repeated, r.Wrong, r.Waits)
	if r.Err != "" {
		s += "; " + r.Err
	}
	return s
}

// StartCounter connects, waiting until the guest answers, and starts sending.
func StartCounter(ctx context.Context, o Options) (*Counter, error) {
	ctx, conn, l, err := begin(ctx, &o)
	if err != nil {
		return nil, err
	}
	c := &Counter{life: l, o: o, conn: conn}
	go c.run(ctx)
	return c, nil
}

func (c *Counter) run(ctx context.Context) {
	defer close(c.done)
	defer c.conn.Close()
	unhook := context.AfterFunc(ctx, func() { c.conn.Close() })
	defer unhook()
	br := bufio.NewReader(c.conn)
	var chain [32]byte
	n := 0
	for i := 1; ; i++ {
		line := fmt.Appendf(nil, "%s %d\n", c.o.Key, i)
		start := time.Now()
		c.mu.Lock()
		c.res.Sent++
		c.waiting = start
		c.mu.Unlock()
		err := c.conn.SetDeadline(start.Add(c.o.Timeout))
		if err == nil {
			_, err = c.conn.Write(line)
		}
		var reply string
		if err == nil {
			reply, err = br.ReadString('\n')
		}
		if err != nil {
			c.fail(err)
			return
		}
		chain = guestsvc.NextChain(chain, line)
		got, sum := c.answered(start, reply, n+1, hex.EncodeToString(chain[:]))
		if sum != nil { // go on from what the guest says, so that one fault is counted once
			n, chain = got, *sum
		} else {
			n = got
		}
		if !pace(ctx, c.stop, start, c.o.Interval) {
			return
		}
	}
}

// answered judges one reply; when it is not the one expected it returns the
// count and chain to go on from.
func (c *Counter) answered(start time.Time, reply string, want int, wantSum string) (n int, sum *[32]byte) {
	wait := time.Since(start)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.waiting = time.Time{}
	c.waits = append(c.waits, wait)
	if wait > c.res.Waits.Max {
		c.res.Waits.Max, c.res.LongestAt = wait, start
	}
	num, hexSum, _ := strings.Cut(strings.TrimSpace(reply), " ")
	n, err := strconv.Atoi(num)
	raw, err2 := hex.DecodeString(hexSum)
	if err != nil || err2 != nil || len(raw) != 32 {
		c.res.Wrong++
		return want, nil
	}
	if n == want && hexSum == wantSum {
		c.res.OK++
		return n, nil
	}
	switch {
	case n > want:
		c.res.Lost += n - want // others' lines under our key, or answers that never came
	case n < want:
		c.res.Repeated += want - n
	default:
		c.res.Wrong++
	}
	var s [32]byte
	copy(s[:], raw)
	return n, &s
}

func (c *Counter) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.res.Lost++
	c.res.Err = err.Error()
}

// Stop sends no more, waits for the answer that is due and closes the connection.
func (c *Counter) Stop() CounterResult {
	c.halt()
	return c.Snapshot()
}

// Abort breaks off at once.
func (c *Counter) Abort() CounterResult {
	c.abort()
	return c.Snapshot()
}

// Snapshot returns what was seen up to now.
func (c *Counter) Snapshot() CounterResult {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := c.res
	r.Waits = Summarise(c.waits)
	if !c.waiting.IsZero() {
		r.Waiting = time.Since(c.waiting)
	}
	return r
}

// Recent returns the waits from the i-th answer on, in order.
func (c *Counter) Recent(i int) []time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	if i >= len(c.waits) {
		return nil
	}
	return append([]time.Duration(nil), c.waits[i:]...)
}

// WaitOK waits until n more requests were answered.
func (c *Counter) WaitOK(ctx context.Context, n int) error {
	return c.await(ctx, n, "answers", func() int { return c.Snapshot().OK }, func() string { return c.Snapshot().String() })
}
