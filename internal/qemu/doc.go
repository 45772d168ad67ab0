// Package qemu drives one unmodified QEMU process: it builds its command line
// (Args), starts it so that it outlives its starter (Start, Adopt), speaks QMP
// with it (DialQMP), saves and loads device state, and finds out by trying
// what a QEMU binary can do (Probe, ProbeAccel, ProbeSave).
//
// Concurrency: all methods may be called from any goroutine. QEMU itself
// carries out one command after the other on its main loop.
//
// Failure: when QEMU ends, or its monitor does, each pending and later call
// returns an error that wraps ErrClosed, and the channel of QMP.Done is closed.
//
// Not guaranteed: nothing here decides whether a guest may run. The callers
// hold that right, and know why they call Cont.
package qemu
