package client

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Log appends lines to the guest's durable log and keeps the ledger of those
// that were acknowledged. Where the connection breaks it connects again and
// goes on with a new line; the one that was due then is uncertain.
type Log struct {
	*life
	o Options

	mu        sync.Mutex
	acked     []string
	uncertain map[string]bool
	waits     []time.Duration
	breaks    int
	refused   string
}

// LogResult is what a Log saw, and what Verify found.
type LogResult struct {
	Acked     int    `json:"acked"`
	Uncertain int    `json:"uncertain"` // sent, no answer: may be there or not
	Breaks    int    `json:"breaks"`    // connections that ended
	Refused   string `json:"refused,omitempty"`
	Waits     Waits  `json:"waits"`

	Verified bool     `json:"verified"`
	Lost     []string `json:"lost,omitempty"`     // acknowledged and not there
	Repeated []string `json:"repeated,omitempty"` // there more than once
	Foreign  []string `json:"foreign,omitempty"`  // under our key, never sent
	Disorder int      `json:"disorder"`           // acknowledged lines that stand before an earlier one
}

// Clean reports whether a verified log is what it must be.
func (r LogResult) Clean() bool {
	return r.Verified && r.Acked > 0 && len(r.Lost) == 0 && len(r.Repeated) == 0 && len(r.Foreign) == 0 && r.Disorder == 0 && r.Refused == ""
}

func (r LogResult) String() string {
	s := fmt.Sprintf("acknowledged %d, uncertain %d, lost %d, repeated %d, foreign %d, out of order %d, connections broken %d; %v",
		r.Acked, r.Uncertain, len(r.Lost), len(r.Repeated), len(r.Foreign), r.Disorder, r.Breaks, r.Waits)
	if r.Refused != "" {
		s += "; refused: " + r.Refused
	}
	return s
}

// StartLog connects, waiting until the guest answers, and starts appending.
func StartLog(ctx context.Context, o Options) (*Log, error) {
	ctx, conn, life, err := begin(ctx, &o)
	if err != nil {
		return nil, err
	}
	l := &Log{life: life, o: o, uncertain: map[string]bool{}}
	go l.run(ctx, conn)
	return l, nil
}

func (l *Log) run(ctx context.Context, conn net.Conn) {
	defer close(l.done)
	br := bufio.NewReader(conn)
	unhook := context.AfterFunc(ctx, func() { conn.Close() })
	defer func() { unhook(); conn.Close() }()
	for i := 1; ; i++ {
		start := time.Now()
		line := fmt.Sprintf("%s %d", l.o.Key, i)
		l.mu.Lock()
		l.uncertain[line] = true
		l.mu.Unlock()
		err := l.append(conn, br, line, start)
		if errors.Is(err, errRefused) {
			return
		}
		if err != nil {
			l.mu.Lock()
			l.breaks++
			l.mu.Unlock()
			unhook()
			conn.Close()
			again, cancel := context.WithCancel(ctx)
			off := make(chan struct{})
			go func() { // Stop ends a vain search for the guest too
				defer close(off)
				select {
				case <-l.stop:
					cancel()
				case <-again.Done():
				}
			}()
			c, err := dialUntil(again, l.o.Dial, l.o.Addr)
			cancel()
			<-off
			if err != nil {
				return
			}
			conn, br = c, bufio.NewReader(c)
			unhook = context.AfterFunc(ctx, func() { c.Close() })
		}
		if !pace(ctx, l.stop, start, l.o.Interval) {
			return
		}
	}
}

var errRefused = errors.New("the guest refuses to append")

func (l *Log) append(conn net.Conn, br *bufio.Reader, line string, start time.Time) error {
	if err := conn.SetDeadline(start.Add(l.o.Timeout)); err != nil {
		return err
	}
	if _, err := fmt.Fprintln(conn, line); err != nil {
		return err
	}
	reply, err := br.ReadString('\n')
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.waits = append(l.waits, time.Since(start))
	if _, err := strconv.Atoi(strings.TrimSpace(reply)); err != nil {
		l.refused = strings.TrimSpace(reply)
		return errRefused
	}
	delete(l.uncertain, line)
	l.acked = append(l.acked, line)
	return nil
}

// Stop appends no more and waits for the answer that is due.
func (l *Log) Stop() LogResult {
	l.halt()
	return l.Snapshot()
}

// Abort breaks off at once; the line that is due becomes uncertain.
func (l *Log) Abort() LogResult {
	l.abort()
	return l.Snapshot()
}

// Snapshot returns what was seen up to now, unverified.
func (l *Log) Snapshot() LogResult {
	l.mu.Lock()
	defer l.mu.Unlock()
	return LogResult{Acked: len(l.acked), Uncertain: len(l.uncertain), Breaks: l.breaks, Refused: l.refused, Waits: Summarise(l.waits)}
}

// WaitAcked waits until n more lines were acknowledged.
func (l *Log) WaitAcked(ctx context.Context, n int) error {
	return l.await(ctx, n, "acknowledged lines", func() int { return l.Snapshot().Acked }, func() string { return l.Snapshot().String() })
}

// Verify reads the whole log back and compares it with the ledger. Lines of
// other clients are left aside. Call it after Stop or Abort, or while it runs:
// then only what was acknowledged before is judged as lost.
func (l *Log) Verify(ctx context.Context) (LogResult, error) {
	l.mu.Lock()
	acked := append([]string(nil), l.acked...)
	l.mu.Unlock()
	lines, err := ListLog(ctx, l.o.Dial, l.o.Addr)
	if err != nil {
		return l.Snapshot(), err
	}
	r := l.Snapshot()
	l.mu.Lock()
	known := map[string]bool{}
	for _, s := range l.acked {
		known[s] = true
	}
	for s := range l.uncertain {
		known[s] = true
	}
	l.mu.Unlock()
	count, at := map[string]int{}, map[string]int{}
	for i, s := range lines {
		if !strings.HasPrefix(s, l.o.Key+" ") {
			continue
		}
		if count[s]++; count[s] == 2 {
			r.Repeated = append(r.Repeated, s)
		}
		if !known[s] {
			r.Foreign = append(r.Foreign, s)
		}
		at[s] = i
	}
	last := -1
	for _, s := range acked {
		i, ok := at[s]
		switch {
		case !ok:
			r.Lost = append(r.Lost, s)
		case i < last:
			r.Disorder++
		default:
			last = i
		}
	}
	r.Verified = true
	return r, nil
}

// ListLog reads the whole log of the guest.
func ListLog(ctx context.Context, dial Dial, addr string) ([]string, error) {
	o := Options{Dial: dial}
	o.fill()
	conn, err := dialUntil(ctx, o.Dial, addr)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	if _, err := conn.Write([]byte("LIST\n")); err != nil {
		return nil, fmt.Errorf("list log: %w", err)
	}
	var lines []string
	sc := bufio.NewScanner(conn)
	for sc.Scan() {
		s := sc.Text()
		if n, ok := strings.CutPrefix(s, "END "); ok {
			if n != strconv.Itoa(len(lines)) {
				return nil, fmt.Errorf("list log: %d lines came, the guest says %s", len(lines), n)
			}
			return lines, nil
		}
		if strings.HasPrefix(s, "ERR ") {
			return nil, fmt.Errorf("list log: the guest says: %s", s)
		}
		lines = append(lines, s)
	}
	if err := sc.Err(); err != nil {
		return nil, fmt.Errorf("list log: %w", err)
	}
	return nil, errors.New("list log: the connection ended before the end of the list")
}
