package peer

import "context"

// Listener waits for a peer to dial. It serves one session at a time: while one
// lives, other diallers are told to come again.
type Listener struct{}

// Listen opens a listening socket per link.
func Listen(ctx context.Context, cfg Config) (*Listener, error) { panic("not built yet") }

// Addrs returns the IP:port of each link, in the order of Config.Local.
func (l *Listener) Addrs() []string { panic("not built yet") }

// Accept returns the next session, as soon as its first link is up.
func (l *Listener) Accept(ctx context.Context) (*Session, error) { panic("not built yet") }

// Close stops listening and ends a session that nobody has accepted; links of
// an accepted session stay, but can no longer be redialled. It waits.
func (l *Listener) Close() error { panic("not built yet") }
