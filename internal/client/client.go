// Package client talks to the services of the demo guest from outside and
// keeps the books: what was sent, what was answered, what was lost or came
// twice, and how long each answer took. Tests, the demo and the benchmarks draw
// their verdicts from it.
//
// A Counter or Log owns one goroutine from Start to Stop; its methods may be
// called by any goroutine. The end of the context given to Start breaks off at
// once; Stop ends in order and waits for the answer that is due.
//
// What it cannot see: whether a request without an answer was carried out. Such
// a line of the log is "uncertain", and allowed to be there or not.
package client

import (
	"context"
	"crypto/rand"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"
)

// Dial opens a TCP connection; (*net.Dialer).DialContext without the network's name.
type Dial func(ctx context.Context, addr string) (net.Conn, error)

// Options are common to the clients.
type Options struct {
	Addr     string        // IP:port
	Dial     Dial          // default: from here
	Key      string        // names the client at the server; one word; default: random
	Interval time.Duration // between the starts of two requests; 0: the next one at once
	Timeout  time.Duration // until an answer counts as lost; default 30 s
}

func (o *Options) fill() {
	if o.Dial == nil {
		o.Dial = func(ctx context.Context, addr string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "tcp", addr)
		}
	}
	if o.Key == "" {
		o.Key = "c" + rand.Text()[:10]
	}
	if o.Timeout == 0 {
		o.Timeout = 30 * time.Second
	}
}

// dialUntil dials again and again until it works or ctx ends: a guest that is
// just booting refuses at first.
func dialUntil(ctx context.Context, dial Dial, addr string) (net.Conn, error) {
	for {
		once, cancel := context.WithTimeout(ctx, 2*time.Second)
		c, err := dial(once, addr)
		cancel()
		if err == nil {
			return c, nil
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("reach %s: %w (last try: %w)", addr, context.Cause(ctx), err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// life is a client's one goroutine from Start to Stop.
type life struct {
	cancel context.CancelFunc
	stop   chan struct{} // closed: no further request
	once   sync.Once
	done   chan struct{} // closed by the goroutine at its end
}

// begin connects, waiting until the guest answers. The context returned ends
// with abort.
func begin(ctx context.Context, o *Options) (context.Context, net.Conn, *life, error) {
	o.fill()
	conn, err := dialUntil(ctx, o.Dial, o.Addr)
	if err != nil {
		return nil, nil, nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	return ctx, conn, &life{cancel: cancel, stop: make(chan struct{}), done: make(chan struct{})}, nil
}

// halt lets no further request begin and waits for the answer that is due.
func (l *life) halt() {
	l.once.Do(func() { close(l.stop) })
	<-l.done
	l.cancel()
}

// abort breaks off at once.
func (l *life) abort() {
	l.cancel()
	<-l.done
}

// Done is closed when the client has ended, by Stop or because it cannot go on.
func (l *life) Done() <-chan struct{} { return l.done }

// await waits until count has grown by n; what and seen are for the error.
func (l *life) await(ctx context.Context, n int, what string, count func() int, seen func() string) error {
	for target := count() + n; count() < target; {
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for %d %s: %w (%s)", n, what, context.Cause(ctx), seen())
		case <-l.done:
			return fmt.Errorf("wait for %d %s: ended: %s", n, what, seen())
		case <-time.After(5 * time.Millisecond):
		}
	}
	return nil
}

// Waits summarises how long answers took.
type Waits struct {
	N      int           `json:"n"`
	Median time.Duration `json:"median_ns"`
	P95    time.Duration `json:"p95_ns"`
	P99    time.Duration `json:"p99_ns"`
	Max    time.Duration `json:"max_ns"`
}

// Summarise sorts a copy of the waits and picks the quantiles.
func Summarise(waits []time.Duration) Waits {
	n := len(waits)
	if n == 0 {
		return Waits{}
	}
	s := slices.Clone(waits)
	slices.Sort(s)
	return Waits{N: n, Median: s[n/2], P95: s[n*95/100], P99: s[n*99/100], Max: s[n-1]}
}

func (w Waits) String() string {
	ms := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
	return fmt.Sprintf("n %d, median %.1f ms, p95 %.1f ms, p99 %.1f ms, longest %.1f ms", w.N, ms(w.Median), ms(w.P95), ms(w.P99), ms(w.Max))
}

// pace waits for the next tick of an interval that began at start; false when stopped.
func pace(ctx context.Context, stop <-chan struct{}, start time.Time, interval time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-stop:
		return false
	default:
	}
	d := interval - time.Since(start)
	if d <= 0 {
		return true
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-stop:
		return false
	case <-t.C:
		return true
	}
}
