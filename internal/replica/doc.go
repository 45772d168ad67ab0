// Package replica decides how two copies of one disk relate, and what each side
// of a pair has to do so that they become and stay the same.
//
// It knows nothing of files, sockets or time: metadata and events go in,
// verdicts and actions come out. The local store (internal/blockstore) keeps a
// Lineage in its metadata, the assembly (internal/shim) exchanges it with the
// peer and carries out what is decided here.
//
// Who may run the VM, and so who may be written to, is the authority record's
// matter (internal/authority). What is decided here never gives that right. The
// two are compared, and a contradiction is said aloud; it is never resolved
// silently in favour of either.
//
// Concurrency: functions and plain values are safe to use from anywhere; a
// value with methods that change it belongs to one goroutine.
//
// What it does not guarantee: that bytes are durable when an event says so (the
// driver's word is believed), and nothing about a copy that was changed or
// restored behind the product's back, except by the checksum-compare mode.
//
// The table of generations and the protocol are in docs/replication.md.
package replica
