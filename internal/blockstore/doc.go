// Package blockstore keeps the local replica of a disk and the disk as the
// guest sees it.
//
// Store is one replica on this host: a raw image, crash-safe metadata and an
// epoch journal. Volume is the disk that is served to the guest: it writes in
// place while the VM runs alone (Direct), and holds writes in memory until
// their epoch commits while the VM is protected (Held). EpochWrites is what one
// epoch did to one disk; it goes to the peer and into the journal in one encoding.
//
// # Durability
//
// Invariant: while the process lives the image in place never holds a write of
// an epoch that did not commit. So an old primary has nothing to revert.
//
// Invariant: image and journal together are, at any instant, a state that a real
// disk could be in after a loss of power: everything a finished Sync or Flush
// covers is there, and of the rest any part of whole epochs and single writes.
//
// An epoch is appended to the journal before it is applied. At start every
// complete record is applied again in order, up to the first torn one. That may
// apply an epoch whose commit was never known here. It is right to do so: what a
// FLUSH in it promised was durable on both hosts before any output left, the
// epoch is whole, and unacknowledged writes may or may not survive on any disk.
//
// Direct writes may follow journaled epochs that are not trimmed yet. A replay
// would put the older blocks back, which is a loss of unflushed writes and so
// allowed; Flush and Sync therefore trim the journal before they say that a
// direct write is durable.
//
// # Concurrency
//
// All methods of Store and Volume may be called concurrently, except where a
// method says otherwise; epochs are appended, and applied, by one goroutine
// each, in order. A Store runs one goroutine, which trims the journal; Close
// waits for it.
//
// # Failure
//
// A failed sync of image, journal or metadata is fatal to the replica: the error
// sticks, every later call returns it, nothing is retried (the kernel has called
// the lost pages clean). A failed write is returned and does not stick.
//
// # Not guaranteed
//
// No block checksums yet, so bit rot of the image goes unnoticed; no incremental
// resync; nothing keeps two processes from opening one replica: the VM's lock does.
//
// Formats are in docs/disk-format.md.
package blockstore
