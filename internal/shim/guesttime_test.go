package shim

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"
)

// fakeAgent answers like a guest agent whose clock is off.
func fakeAgent(t *testing.T, conn net.Conn, off time.Duration, now func() time.Time, enabled bool, rubbish string) (set *time.Time, done chan struct{}) {
	t.Helper()
	set, done = new(time.Time), make(chan struct{})
	go func() {
		defer close(done)
		sc := bufio.NewScanner(conn)
		for sc.Scan() {
			var q struct {
				Execute   string
				Arguments struct{ ID, Time int64 }
			}
			if err := json.Unmarshal([]byte(strings.TrimPrefix(sc.Text(), "\xff")), &q); err != nil {
				fmt.Fprintf(conn, `{"error":{"desc":"%v"}}`+"\n", err)
				continue
			}
			switch q.Execute {
			case "guest-sync-delimited":
				if rubbish != "" {
					fmt.Fprint(conn, rubbish)
				}
				fmt.Fprintf(conn, "\xff{\"return\":%d}\n", q.Arguments.ID)
			case "guest-info":
				fmt.Fprintf(conn, `{"return":{"supported_commands":[{"name":"guest-get-time","enabled":true},{"name":"guest-set-time","enabled":%v}]}}`+"\n", enabled)
			case "guest-get-time":
				fmt.Fprintf(conn, `{"return":%d}`+"\n", now().Add(off).UnixNano())
			case "guest-set-time":
				*set = time.Unix(0, q.Arguments.Time)
				fmt.Fprint(conn, `{"return":{}}`+"\n")
			}
		}
	}()
	return set, done
}

func TestCorrectClock(t *testing.T) {
	at := time.Unix(1_900_000_000, 0)
	now := func() time.Time { return at }
	for name, c := range map[string]struct {
		off      time.Duration
		disabled bool
		rubbish  string
		set      bool
	}{
		"behind":                {off: -3 * time.Second, set: true},
		"behind, old answers":   {off: -3 * time.Second, rubbish: "{\"return\":5}\n\xff{\"return\":6}\n" + strings.Repeat("x", 100<<10) + "\n", set: true},
		"right":                 {off: -100 * time.Millisecond},
		"ahead":                 {off: time.Minute},
		"in a time of its own":  {off: -48 * time.Hour},
		"not allowed by the VM": {off: -3 * time.Second, disabled: true},
	} {
		t.Run(name, func(t *testing.T) {
			ours, theirs := net.Pipe()
			set, done := fakeAgent(t, theirs, c.off, now, !c.disabled, c.rubbish)
			if err := ours.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
				t.Fatal(err)
			}
			behind, did, err := correctClock(ours, now)
			ours.Close()
			<-done
			if (err != nil) != c.disabled {
				t.Fatalf("error: %v", err)
			}
			if did != c.set || !set.IsZero() != c.set {
				t.Errorf("set: %v, to %v; want %v", did, set, c.set)
			}
			if c.set && (!set.Equal(at) || behind != -c.off) {
				t.Errorf("%v behind, set to %v; want %v, %v", behind, set, -c.off, at)
			}
		})
	}
}

// TestAgentGoesSilent ends a talk in the middle.
func TestAgentGoesSilent(t *testing.T) {
	ours, theirs := net.Pipe()
	go func() {
		bufio.NewReader(theirs).ReadString('\n')
		theirs.Close()
	}()
	if _, set, err := correctClock(ours, time.Now); err == nil || set {
		t.Errorf("set %v, error %v", set, err)
	}
}
