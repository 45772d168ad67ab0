// Package nbd serves disks to QEMU and other clients by the NBD protocol (fixed
// newstyle). It declares the Backend it serves and knows nothing of what lies
// behind it.
//
// # Concurrency
//
// Each connection has a bounded number of workers. One of them at a time, the
// one that has the turn, reads requests. Quick ones it carries out itself, and
// lets their answers leave together; before any other it passes the turn on, so
// requests are pipelined and answered out of order. pace.go says how it is known
// what is quick, and what happens when that was wrong. Each connection also has
// a minder, a goroutine that sleeps while there are no requests.
//
// Order between overlapping requests is the backend's business, as is the
// promise behind CAN_MULTI_CONN: a Flush covers every write that was answered
// before, on whatever connection.
//
// # Failure
//
// An error of the backend becomes an NBD error for that request. A request that
// is wrong but well-formed gets an error; a connection whose framing is lost is
// closed. Nothing a client sends makes the server panic or use memory beyond
// Options: payload and reply buffers are charged to a budget per connection
// before they are allocated. A client that reads no answers stalls only itself.
//
// # Not guaranteed
//
// No TLS and no authentication: serve on a Unix socket that only the right user
// can reach. A client that holds its connection without ever using it is not
// disconnected after the handshake.
//
// The subset of the protocol is listed in docs/nbd.md.
package nbd
