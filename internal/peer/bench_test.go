package peer

import (
	"context"
	"encoding/binary"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// newPair connects two sides without proxies.
func newPair(b testing.TB, links int, change func(a, b *Config)) (*Session, *Session) {
	base := testConfig(b)
	cb, ca := base, base
	if change != nil {
		change(&ca, &cb)
	}
	for range links {
		cb.Local = append(cb.Local, "127.0.0.1:0")
	}
	l, err := Listen(testCtx(b), cb)
	check(b, err)
	ca.Remote = l.Addrs()
	s, err := Dial(testCtx(b), ca)
	check(b, err)
	d, err := l.Accept(testCtx(b))
	check(b, err)
	eventually(b, "all links up", func() bool {
		for _, x := range s.Links() {
			if !x.Up || x.RTT == 0 {
				return false
			}
		}
		return true
	})
	b.Cleanup(func() { s.Close(""); d.Close(""); l.Close() })
	return s, d
}

// cpuTime is what this process has used, for figures that hold on a busy machine.
func cpuTime(b *testing.B) time.Duration {
	var u unix.Rusage
	check(b, unix.Getrusage(unix.RUSAGE_SELF, &u))
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkThroughput sends messages of 1 MiB over loopback; cpu-us/MiB is what
// both ends together cost.
func BenchmarkThroughput(b *testing.B) {
	for _, links := range []int{1, 2} {
		b.Run(fmt.Sprintf("links=%d", links), func(b *testing.B) {
			s, d := newPair(b, links, nil)
			body := make([]byte, 1<<20)
			b.SetBytes(int64(len(body)))
			b.ReportAllocs()
			b.ResetTimer()
			cpu := cpuTime(b)
			go func() {
				for range b.N {
					if s.Send(context.Background(), 1, body) != nil {
						return
					}
				}
			}()
			for range b.N {
				if _, err := d.Recv(context.Background()); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64((cpuTime(b)-cpu).Microseconds())/float64(b.N), "cpu-us/MiB")
		})
	}
}

// BenchmarkRoundTrip answers each message of 100 bytes by another.
func BenchmarkRoundTrip(b *testing.B) {
	for _, links := range []int{1, 2} {
		b.Run(fmt.Sprintf("links=%d", links), func(b *testing.B) {
			s, d := newPair(b, links, nil)
			go func() {
				for {
					m, err := d.Recv(context.Background())
					if err != nil || d.Send(context.Background(), 1, m.Payload) != nil {
						return
					}
				}
			}()
			body := make([]byte, 100)
			b.ResetTimer()
			for range b.N {
				check(b, s.Send(context.Background(), 1, body))
				_, err := s.Recv(context.Background())
				check(b, err)
			}
		})
	}
}

// BenchmarkUnderBulk measures, while 1 MiB messages flow as fast as they can:
// urgent notes in the same direction, and ordered messages of 100 bytes against it
// (as acknowledgements of epochs are). Figures are one-way times in microseconds.
func BenchmarkUnderBulk(b *testing.B) {
	for _, links := range []int{1, 2} {
		b.Run(fmt.Sprintf("links=%d", links), func(b *testing.B) {
			var mu sync.Mutex
			var urgent, back []time.Duration
			note := make(chan struct{}, 1)
			s, d := newPair(b, links, func(x, y *Config) {
				y.Urgent = func(_ uint8, p []byte) {
					mu.Lock()
					urgent = append(urgent, Now()-time.Duration(binary.BigEndian.Uint64(p)))
					mu.Unlock()
					poke(note)
				}
			})
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			go func() {
				for s.Send(ctx, 1, make([]byte, 1<<20)) == nil {
				}
			}()
			go func() {
				for {
					if _, err := d.Recv(ctx); err != nil {
						return
					}
				}
			}()
			b.ResetTimer()
			for range b.N {
				now := binary.BigEndian.AppendUint64(nil, uint64(Now()))
				check(b, s.Urgent(1, now))
				<-note
				check(b, d.Send(ctx, 1, binary.BigEndian.AppendUint64(make([]byte, 0, 100), uint64(Now()))))
				m, err := s.Recv(ctx)
				check(b, err)
				back = append(back, m.Received-time.Duration(binary.BigEndian.Uint64(m.Payload)))
			}
			b.StopTimer()
			mu.Lock()
			defer mu.Unlock()
			for name, l := range map[string][]time.Duration{"urgent": urgent, "back": back} {
				slices.Sort(l)
				b.ReportMetric(float64(l[len(l)/2].Microseconds()), name+"-p50-us")
				b.ReportMetric(float64(l[len(l)*99/100].Microseconds()), name+"-p99-us")
			}
		})
	}
}
