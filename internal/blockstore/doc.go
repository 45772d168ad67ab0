// Package blockstore keeps the local replica of a disk and the disk as the
// guest sees it.
//
// Store is one replica on this host: a raw image or block device, crash-safe
// metadata, an epoch journal, and what is needed to make two replicas equal again
// after any crash without copying all: an activity log, a bitmap of chunks that
// the peer lacks, and a checksum for each block. Volume is the disk that is served to the guest: it writes in
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
// # What may differ
//
// Invariant: after any crash of either host or both, every block in which two
// replicas differ lies in the activity log or the bitmap of one of them. An extent
// of 4 MiB is in the log, durably, before the first write into it, and leaves it
// only when every write in it is durable here and reported durable by the peer, or
// durably in the bitmap. While no peer is attached each write marks its chunk in
// the bitmap in memory; the log makes up for what its file lacks.
//
// Invariant: outside of the activity log every checksum on disk is right for what
// is durable in the image. Inside, after a crash, checksums are computed anew and
// not trusted. A block that does not match is never returned; see BlockError.
//
// # Concurrency
//
// All methods of Store and Volume may be called concurrently, except where a
// method says otherwise; epochs are appended, and applied, by one goroutine
// each, in order. Changes in place that share a block are carried out in the order
// in which they came, each with its checksums; Repair, Digest and ReadStable wait
// for them as well. A Store runs one goroutine that trims the journal, and after a
// crash one that computes checksums in doubt; Close waits for both.
//
// # Failure
//
// A failed sync of image, journal or metadata is fatal to the replica: the error
// sticks, every later call returns it, nothing is retried (the kernel has called
// the lost pages clean). A failed write is returned and does not stick; its blocks
// may hold anything, so the owner must not go on as if the replicas were equal.
// Classify tells what an error means. A device that does not answer is seen by
// vfs.Watch, and given up by GiveUp; a call that the kernel holds is not ended.
//
// A write into a cold extent waits while the activity log is full of what the peer
// has not reported, see PeerWanted.
//
// # Not guaranteed
//
// A checksum guards against decay, not against somebody who changes image and
// checksum; and two damaged slots of metadata, log or bitmap are found, but the
// newer one of two being damaged is taken for a torn write. What was in flight when
// a write failed is for the owner to make equal.
//
// Formats are in docs/disk-format.md.
package blockstore
