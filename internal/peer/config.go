package peer

import (
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"time"
)

// Bounds of the protocol.
const (
	MaxLinks   = 4        // links of one session
	MaxMessage = 4 << 20  // bytes of one message
	MaxUrgent  = 1 << 10  // bytes of one urgent note
	MaxHello   = 32 << 10 // bytes of Config.Hello
	MinWindow  = 8 << 20  // smallest Config.Window: two messages of the largest size
	MaxWindow  = 1 << 30  // largest Config.Window
	maxReason  = 256      // bytes of the reason given to Close
	maxPayload = 64 << 10 // payload bytes of one data frame
)

// Config describes one end of a session. It is copied; the caller keeps it.
type Config struct {
	// TLS holds the certificate of this host and the cluster's CA, for both
	// directions. TLS 1.3 is forced. A listener requires ClientAuth to be
	// RequireAndVerifyClientCert; a dialler checks the chain against RootCAs
	// (ServerName, or InsecureSkipVerify together with VerifyConnection).
	TLS *tls.Config
	// Verify decides for every single connection, after the handshake, whether
	// the certificate belongs to the host this session is for. Required.
	Verify func(tls.ConnectionState) error
	// Hello is told to the peer before anything else; its meaning is the caller's.
	Hello []byte
	// Local holds, per link: for a listener the IP:port (or IP, for any port) to
	// listen on; for a dialler the local IP to dial from, "" for any.
	// A dialler may leave it empty.
	Local []string
	// Remote holds the IP:port of each link, in order; dialler only.
	Remote []string
	// Silence on all links after which the session is lost, and on one link
	// after which that link is dropped and redialled. 20 ms to 1 min, default 300 ms.
	Silence time.Duration
	// MaxSilence is how far Silence may stretch by itself: to four times the
	// longest gap between signs of life in the last ten to twenty seconds, so that
	// a link or a host that is known to stutter is not called dead for it. Default
	// twice Silence; equal to Silence: never.
	MaxSilence time.Duration
	// Ping is the distance of heartbeats on each link; default Silence/12, at most 25 ms.
	Ping time.Duration
	// Window is the credit given to the peer: bytes (payload and bookkeeping) that
	// may be on the way or wait for Recv. MinWindow to MaxWindow, default 64 MiB.
	Window int64
	// Log may be nil.
	Log *slog.Logger
	// Urgent is called for each urgent note of the peer, once, out of order, at
	// once, from the goroutine that reads a link (so possibly from several at a
	// time, and possibly before Dial or Accept returned). It must not block and
	// must not keep payload. Nil: notes are dropped.
	Urgent func(kind uint8, payload []byte)
}

// withDefaults returns a checked copy.
func (c Config) withDefaults(dialler bool) (Config, error) {
	if c.TLS == nil {
		return c, errors.New("check peer config: TLS is missing")
	}
	if c.Verify == nil {
		return c, errors.New("check peer config: Verify is missing")
	}
	if len(c.Hello) > MaxHello {
		return c, fmt.Errorf("check peer config: hello of %d bytes is longer than %d", len(c.Hello), MaxHello)
	}
	if c.Silence == 0 {
		c.Silence = 300 * time.Millisecond
	}
	if c.Silence < 20*time.Millisecond || c.Silence > time.Minute {
		return c, fmt.Errorf("check peer config: silence of %v is not within 20ms and 1m", c.Silence)
	}
	if c.MaxSilence == 0 {
		c.MaxSilence = 2 * c.Silence
	}
	if c.MaxSilence < c.Silence || c.MaxSilence > 2*time.Minute {
		return c, fmt.Errorf("check peer config: longest silence of %v is not within %v and 2m", c.MaxSilence, c.Silence)
	}
	if c.Ping == 0 {
		c.Ping = min(c.Silence/12, 25*time.Millisecond)
	}
	if c.Ping < time.Millisecond || c.Ping > c.Silence/3 {
		return c, fmt.Errorf("check peer config: ping of %v is not within 1ms and a third of the silence", c.Ping)
	}
	if c.Window == 0 {
		c.Window = 64 << 20
	}
	if c.Window < MinWindow || c.Window > MaxWindow {
		return c, fmt.Errorf("check peer config: window of %d bytes is not within %d and %d", c.Window, MinWindow, MaxWindow)
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	addrs := c.Local
	if dialler {
		addrs = c.Remote
		if len(c.Local) != 0 && len(c.Local) != len(c.Remote) {
			return c, fmt.Errorf("check peer config: %d local addresses for %d links", len(c.Local), len(c.Remote))
		}
	}
	if len(addrs) < 1 || len(addrs) > MaxLinks {
		return c, fmt.Errorf("check peer config: %d links, want 1 to %d", len(addrs), MaxLinks)
	}
	t := c.TLS.Clone()
	t.MinVersion = tls.VersionTLS13
	// Full records at once: a link is never used for interactive first bytes.
	t.DynamicRecordSizingDisabled = true
	if dialler {
		t.ClientSessionCache = nil
	} else {
		if t.ClientAuth != tls.RequireAndVerifyClientCert {
			return c, errors.New("check peer config: a listener must require and verify client certificates")
		}
		t.SessionTicketsDisabled = true
	}
	c.TLS = t
	c.Hello = append([]byte(nil), c.Hello...)
	c.Local = append([]string(nil), c.Local...)
	c.Remote = append([]string(nil), c.Remote...)
	return c, nil
}
