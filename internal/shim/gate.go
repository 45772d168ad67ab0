package shim

import (
	"sync"
	"time"

	"perdure/internal/peer"
)

// bootNow is CLOCK_BOOTTIME since the host booted. Rights are measured by it,
// since it goes on while the host or this process is suspended.
func bootNow() time.Duration { return peer.Now() }

// gateSpan is how far ahead of a confirmed right the kernel's gate may stay
// open: the longest time for which a dead or frozen shim's guest is heard.
const gateSpan = 300 * time.Millisecond

// gateSlack is how much later than asked the kernel's gate may close: the time
// between reading the clock and the kernel's reading of its own.
const gateSlack = 20 * time.Millisecond

// kernelGate is the last gate (see hostnet.Gate): it closes by itself.
type kernelGate interface {
	Open(taps []string, d time.Duration) error
	Shut(taps []string) error
}

// outputRule is what the authority lets this instance do with output.
type outputRule int

const (
	ruleNone  outputRule = iota // nothing leaves
	ruleAcked                   // epochs leave when the secondary has acknowledged them
	ruleFree                    // everything leaves at once
)

// gatekeeper keeps the kernel's gate open as far as the right reaches, and no
// further.
//
// Invariant: gate renewal and the writing of released output exclude each
// other (sending), so that a process frozen between reading the clock and
// opening the gate has no output of its own waiting behind it. Closing the gate
// waits for nobody: a QEMU that hangs must not keep a right open.
type gatekeeper struct {
	gate kernelGate
	taps []string
	now  func() time.Duration

	sending sync.Mutex // before mu

	mu       sync.Mutex
	rule     outputRule
	right    time.Duration // ruleAcked: until when, CLOCK_BOOTTIME
	openTill time.Duration // what the kernel was told last
	promised time.Duration // nothing is let out before, CLOCK_BOOTTIME; see promise
	fault    error         // last failure to tell the kernel
}

func newGatekeeper(g kernelGate, taps []string) *gatekeeper {
	return &gatekeeper{gate: g, taps: taps, now: bootNow}
}

// setRule changes the rule. Unless everything may leave now, the gate is closed
// before it returns, and opens again with the next confirmation.
func (k *gatekeeper) setRule(r outputRule) {
	k.mu.Lock()
	k.rule = r
	k.right = 0
	if r != ruleFree {
		k.openTill = 0
		if len(k.taps) > 0 {
			k.fault = k.gate.Shut(k.taps)
		}
	}
	k.mu.Unlock()
	k.tick()
}

// setTaps has other taps stand for the VM from now on; the gate of the old ones is
// shut before it returns.
func (k *gatekeeper) setTaps(taps []string) {
	k.sending.Lock()
	defer k.sending.Unlock()
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.taps) > 0 {
		k.fault = k.gate.Shut(k.taps)
	}
	k.taps, k.openTill = taps, 0
	k.renewLocked()
}

// confirm extends the right of ruleAcked: the secondary answered, in this term
// and run and still acknowledging, something that was sent at sentAt.
func (k *gatekeeper) confirm(sentAt time.Duration) {
	k.mu.Lock()
	if r := sentAt + gateSpan; r > k.right {
		k.right = r
	}
	k.mu.Unlock()
	k.tick()
}

// promiseSpan is for how long a secondary of level ca lets nothing out after it
// confirmed a primary's right, which runs from when the question was sent and so
// ends before. The kernel closes that gate by its own clock, in steps of some
// milliseconds; the clocks of two hosts do not drift apart by as much as one in this time.
const promiseSpan = gateSpan + gateSlack + 30*time.Millisecond

// promise keeps everything in until promiseSpan from now, whatever rule comes to
// be in force. It is called before the answer that promises this is sent.
func (k *gatekeeper) promise() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.promised = max(k.promised, k.now()+promiseSpan)
}

// promisedUntil is when the last promise runs out.
func (k *gatekeeper) promisedUntil() time.Duration {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.promised
}

// tick renews the gate as far as the right reaches, unless output is being
// written just now.
func (k *gatekeeper) tick() {
	if !k.sending.TryLock() {
		return
	}
	defer k.sending.Unlock()
	k.mu.Lock()
	defer k.mu.Unlock()
	k.renewLocked()
}

func (k *gatekeeper) until() time.Duration {
	if k.now() < k.promised {
		return 0
	}
	switch k.rule {
	case ruleFree:
		return k.now() + gateSpan
	case ruleAcked:
		return k.right
	}
	return 0
}

// renewLocked tells the kernel when at least a third of the span was used up.
func (k *gatekeeper) renewLocked() {
	until := k.until()
	now := k.now()
	if until-now < gateSpan/10 || until-k.openTill < gateSpan/3 || len(k.taps) == 0 {
		return
	}
	err := k.gate.Open(k.taps, until-now)
	if err == nil && k.now()-now > gateSlack {
		// This process stood still between the clock and the kernel, which counts
		// from when it was told: what it opened reaches beyond the right.
		k.openTill = 0
		k.fault = k.gate.Shut(k.taps)
		return
	}
	k.fault = err
	if err == nil {
		k.openTill = until
	}
}

// whileOpen runs send if output may leave now and reports whether it did. No
// renewal happens meanwhile.
func (k *gatekeeper) whileOpen(send func() error) (bool, error) {
	k.sending.Lock()
	defer k.sending.Unlock()
	k.mu.Lock()
	k.renewLocked()
	open := k.rule != ruleNone && k.now() >= k.promised && (len(k.taps) == 0 || k.openTill-k.now() >= gateSpan/10)
	k.mu.Unlock()
	if !open {
		return false, nil
	}
	return true, send()
}

// hasRight reports whether output may leave now, as far as this side knows.
func (k *gatekeeper) hasRight() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.now() >= k.promised && (k.rule == ruleFree || k.rule == ruleAcked && k.right > k.now())
}

// lastFault returns why the kernel could not be told, if so.
func (k *gatekeeper) lastFault() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.fault
}
