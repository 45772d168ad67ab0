package api

import "context"

type ctxKey int

const (
	keyForwarded ctxKey = iota
	keyActor
)

// ForwardedHeader marks a request that one agent passes on for another. The
// receiver answers from what it holds itself and passes nothing on, so that two
// hosts never ask each other in a circle.
const ForwardedHeader = "Perdure-Forwarded"

// WithForwarded returns a context whose calls are marked as passed on. The
// client sets the header from it; the server sets it from the header.
func WithForwarded(ctx context.Context) context.Context {
	return context.WithValue(ctx, keyForwarded, true)
}

// Forwarded reports whether the request was passed on by another agent.
func Forwarded(ctx context.Context) bool {
	v, _ := ctx.Value(keyForwarded).(bool)
	return v
}

// WithActor notes who asks, for the audit trail.
func WithActor(ctx context.Context, actor string) context.Context {
	return context.WithValue(ctx, keyActor, actor)
}

// Actor returns who asks: "local" for the Unix socket, else the name in the
// client's certificate; empty where nobody was noted.
func Actor(ctx context.Context) string {
	v, _ := ctx.Value(keyActor).(string)
	return v
}
