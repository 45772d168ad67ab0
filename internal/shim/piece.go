package shim

import (
	"errors"
	"time"

	"perdure/internal/netbuf"
)

const (
	// pieceBytes is how much may be sent on one look at the gate: it takes a
	// small part of gateSpan also on a busy host.
	pieceBytes = 64 << 10
	// pieceWait is how long the rest of an epoch waits for a gate that closed
	// meanwhile. Beyond, its frames are lost as on any network.
	pieceWait = time.Second
)

// errShut says that output was lost because the right to send it ran out.
var errShut = errors.New("the right to let output out ran out")

// pieced is an outlet for use inside whileOpen: it looks at the gate again after
// each pieceBytes. Some MiB at once take longer than what is left of a right, and
// the kernel would drop the rest of what both hosts have committed to.
//
// Invariant: renewal and sending still exclude each other; here the sender
// itself renews, between two frames.
type pieced struct {
	to   netbuf.Outlet
	gate *gatekeeper
	rule outputRule // under which sending began
	left int
	shut bool // given up: what is left is lost together
}

func (k *gatekeeper) pieced(to netbuf.Outlet) *pieced {
	k.mu.Lock()
	defer k.mu.Unlock()
	return &pieced{to: to, gate: k, rule: k.rule, left: pieceBytes}
}

// Send implements netbuf.Outlet.
func (p *pieced) Send(frame []byte, header int) error {
	if p.shut {
		return errShut
	}
	if p.left <= 0 {
		for end := p.gate.now() + pieceWait; !p.gate.openNow(); time.Sleep(time.Millisecond) {
			// Under a stricter rule the right may depend on who waits for this sender.
			if p.gate.now() >= end || p.gate.isStricter(p.rule) {
				p.shut = true
				return errShut
			}
		}
		p.left = pieceBytes
	}
	p.left -= len(frame)
	return p.to.Send(frame, header)
}

// isStricter reports whether less may leave than under rule r.
func (k *gatekeeper) isStricter(r outputRule) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.rule < r
}

// openNow renews the gate if the right reaches further by now, and reports
// whether output may leave. The caller holds sending.
func (k *gatekeeper) openNow() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.renewLocked()
	return k.rule != ruleNone && (len(k.taps) == 0 || k.openTill-k.now() >= gateSpan/10)
}
