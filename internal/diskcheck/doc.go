// Package diskcheck is a history checker for disks: it writes unique patterns
// to an NBD export at random places, reads them back, notes when each request
// began and was answered, and decides afterwards whether some disk could have
// answered so. Whoever uses it breaks things meanwhile: ends the server, the
// connection, a host; it only needs a way to dial again.
//
// A disk is taken as many independent registers, one for each unit of Unit
// bytes, and each register's history is checked for linearizability. What a
// flush or a write with FUA covered must be there after PowerLost; what was
// not covered may be the old or the new, unit for unit. A request that was not
// answered may have happened at any time since, but not after TakenOver, or not at
// all; one that was answered with an error may have happened until then.
//
// The check is stricter than the protocol in one point: a write that was not
// answered, and that somebody had read, must not be undone, except by PowerLost or
// TakenOver.
//
// A guest whose memory is checkpointed goes back in time together with its disk: Mark,
// RollBack and what is beside them in rollback.go are for that.
//
// # Concurrency
//
// A Run may be loaded by several goroutines and over several connections at
// once; PowerLost and Check are called while nothing is under way.
//
// # Not guaranteed
//
// Requests that fail with an error are not complaints, only counted: whether a
// guest may see one is for the test to say. Units that were never written by
// the Run are expected to read as zeroes, or as what was read first.
package diskcheck
