package client

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"
)

// Control sends one command to the guest's control service and returns the
// lines of its answer: those before the last, and the text of the last. An
// answer "ERR …" is an error.
func Control(ctx context.Context, dial Dial, addr, command string) (lines []string, text string, err error) {
	o := Options{Dial: dial}
	o.fill()
	conn, err := dialUntil(ctx, o.Dial, addr)
	if err != nil {
		return nil, "", err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	if _, err := fmt.Fprintln(conn, command); err != nil {
		return nil, "", fmt.Errorf("say %q: %w", command, err)
	}
	sc := bufio.NewScanner(conn)
	for sc.Scan() {
		s := sc.Text()
		if s == "OK" || strings.HasPrefix(s, "OK ") {
			return lines, strings.TrimSpace(s[2:]), nil
		}
		if e, ok := strings.CutPrefix(s, "ERR "); ok {
			return lines, "", fmt.Errorf("say %q: the guest says: %s", command, e)
		}
		lines = append(lines, s)
	}
	err = sc.Err()
	if err == nil {
		err = io.ErrUnexpectedEOF
	}
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return lines, "", fmt.Errorf("say %q: %w", command, err)
}

// ParseFields reads the answers that have the form "key=value key=value".
func ParseFields(text string) map[string]string {
	m := map[string]string{}
	for _, f := range strings.Fields(text) {
		k, v, _ := strings.Cut(f, "=")
		m[k] = v
	}
	return m
}

// BulkResult is what came of a stream out of the guest.
type BulkResult struct {
	Bytes   int64         `json:"bytes"`
	Elapsed time.Duration `json:"elapsed_ns"`
	Gap     time.Duration `json:"gap_ns"` // longest time without a byte
}

// Rate returns bytes per second.
func (r BulkResult) Rate() float64 { return float64(r.Bytes) / r.Elapsed.Seconds() }

// Bulk receives a stream from the guest for the given time and checks every
// word of it: a byte lost or repeated is an error.
func Bulk(ctx context.Context, dial Dial, addr string, d time.Duration) (BulkResult, error) {
	o := Options{Dial: dial}
	o.fill()
	var r BulkResult
	conn, err := dialUntil(ctx, o.Dial, addr)
	if err != nil {
		return r, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	if _, err := fmt.Fprintf(conn, "bulk %s\n", strconv.FormatFloat(d.Seconds(), 'f', 3, 64)); err != nil {
		return r, fmt.Errorf("ask for a stream: %w", err)
	}
	buf := make([]byte, 1<<20)
	var next uint64
	have := 0
	start := time.Now()
	last := start
	for {
		n, err := conn.Read(buf[have:])
		now := time.Now()
		r.Gap = max(r.Gap, now.Sub(last))
		last = now
		r.Bytes += int64(n)
		have += n
		i := 0
		for ; i+8 <= have; i += 8 {
			if v := binary.LittleEndian.Uint64(buf[i:]); v != next {
				return r, fmt.Errorf("stream broken after %d bytes: word %d where %d belongs", r.Bytes, v, next)
			}
			next++
		}
		have = copy(buf, buf[i:have])
		if err != nil {
			r.Elapsed = time.Since(start)
			if errors.Is(err, io.EOF) && next > 0 {
				return r, nil
			}
			return r, fmt.Errorf("receive stream: %w", err)
		}
	}
}
