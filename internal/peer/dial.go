package peer

import "context"

// Dial connects to the peer's listener over all links and returns when the
// first link is up; the others join in the background and are redialled for as
// long as the session lives. It retries until ctx ends, except when every link
// was refused for good (certificate, version). The session outlives ctx.
func Dial(ctx context.Context, cfg Config) (*Session, error) { panic("not built yet") }
