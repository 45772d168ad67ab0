// Package peer is the connection between the two shims of one VM: ordered,
// reliable messages over one to four TCP links at once (the availability
// links), each under mutual TLS 1.3, with failover between them, and a prompt
// and honest answer to the question whether the other side is still there.
//
// A session is all links of one dialler's nonce. Messages are cut into frames
// of at most 64 KiB, each with its own CRC-32C and a sequence number, and
// spread over the links as these can take them; small messages that find little
// else on the way are sent on every link at once, so that the loss of one of two
// links costs them nothing. A frame that is not acknowledged in good time goes
// again over another link. The receiver puts frames in order, drops doubles and
// hands whole messages to Recv. Credit (Config.Window, in bytes) bounds what
// either side ever holds. docs/peer-protocol.md holds the wire format.
//
// Failure. One link that breaks, hangs or is black-holed is not a loss: its
// frames go to the others, and the dialler redials it for ever. The session is
// lost when nothing was heard on any link for Config.Silence, at once when
// every link was closed by the peer's kernel (its process died), when the peer
// said goodbye, or when it broke the protocol. A lost session never comes back;
// a new one starts from nothing, and the caller sends everything again.
//
// Time is CLOCK_BOOTTIME (see Now), compared with the time of the last word
// heard before anything received is believed. So a process that was stopped or
// a host that was suspended finds its session lost when it wakes, even though
// answers from before lie in its socket buffers and its timers have yet to fire.
//
// Concurrency. All methods may be called from any goroutine; messages of
// concurrent senders are ordered among themselves in some order, and never mixed.
//
// Not guaranteed: that a message whose Send returned has reached the peer (only
// an answer of the peer says so); that an Urgent note arrives at all; that both
// sides notice a loss at the same moment. Nothing here decides who may run a VM:
// being wrong about the peer's death must be safe, and is only impolite.
package peer
