// Package authority decides who may run a VM and what may leave it.
//
// It has two halves, both pure: no clock, no I/O, no goroutine, no randomness.
// The transition functions (Start, Booted, Assign, Duplex, …) compute the next
// authority record from the one that was read; agents and shims write the
// result by compare-and-swap on the revision they read, and never otherwise.
// Side is the state machine of one shim: its driver feeds it events (a read
// returned, the peer fell silent, the guest ended) and carries out the actions
// it gets back, strictly in their order.
//
// Concurrency: functions are safe to call from anywhere; a Side belongs to one
// goroutine and must not be copied or shared.
//
// Failure: every event may come late, twice, or never, except that each ActRead
// and each ActSwap is answered exactly once per shim life (by "failed" or
// "unknown" if need be). A Side never gives a right to its guest that a record
// it has not read could deny: from before a swap is asked for until a newer
// revision has been read, the stricter rule of all possible records holds.
//
// What it does not guarantee: anything about time (there is no clock in Level
// 3's rules; the kernel's gate is the driver's), that a peer which is silent is
// dead (being wrong is safe, only impolite), that bytes are durable when an
// event says so (the driver's word is believed), and nothing at all about a
// person's forced takeover except that it makes a branch of its own.
package authority
