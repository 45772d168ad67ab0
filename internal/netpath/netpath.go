// Package netpath decides which way the frames of a bridge leave a host: by
// its own uplink, or, when that has failed, over the A-link and out of another
// host's uplink. One Machine is one bridge of one host.
//
// Purpose. A bridge has at most two ways: its uplink, and a tunnel to a host
// that carries it. A tunnel has a client end, at the host that is carried, and
// a server end, at the host that carries. Three rules make loops impossible,
// and each is about one host alone, so that no message, no clock and no
// agreement with another host is needed for it:
//
//   - uplink and client end never forward at the same time, and no frame goes
//     from one to the other;
//   - a host never has a client end and a server end in its bridge;
//   - the kernel changes from uplink to client end, and back, in one step.
//
// A loop would need a bridge that passes frames between its client end and
// another way out; there is none. What the machine decides by messages is only
// where frames go, never whether they can go round.
//
// Concurrency: none; values are changed by their methods and belong to one
// goroutine. Time is an argument.
//
// Failure. The kernel's state is an input (Kernel): an owner that crashed at
// any point reads it again and goes on from there. A Machine keeps nothing that
// may not be forgotten; after a restart it waits for stability once more.
//
// Not guaranteed: that frames arrive. With both uplinks cut nothing is carried;
// frames that are on their way while an uplink fails are lost.
package netpath

import (
	"slices"
	"time"
)

// State of a host's client end.
type State uint8

// The states of a client end. The uplink forwards in all of them but Open.
const (
	None  State = iota // not in the bridge
	Shut               // in the bridge, passes nothing
	Open               // forwards; the uplink is shut
	Drain              // lets in single-address frames that are still on their way, lets nothing out
)

func (s State) String() string {
	return [...]string{"none", "shut", "open", "drain"}[s]
}

// Kernel is what the kernel of a host does for one bridge, as read from it.
type Kernel struct {
	Client  string // host that the client end leads to; empty: there is none
	State   State  // of the client end; None exactly where Client is empty
	Serving []string
}

// UplinkForwards reports whether frames go by the host's own uplink.
//
// Invariant: the uplink or the client end, never both. It holds by form: one
// value of the kernel's rule set is both answers.
func (k Kernel) UplinkForwards() bool { return k.State != Open }

// Carried returns the host that carries this one's frames, if any.
func (k Kernel) Carried() string {
	if k.State == Open {
		return k.Client
	}
	return ""
}

// Word is what a host tells the others about one bridge.
type Word struct {
	Offers bool     `json:"offers"`           // its uplink works and is in use: it could carry others
	Ask    string   `json:"ask,omitempty"`    // host that is to carry it
	Serves []string `json:"serves,omitempty"` // hosts whose server ends are in its bridge
}

// Peer is another host as this one knows it.
type Peer struct {
	Name   string
	Alive  bool // its words come in over an A-link
	Offers bool
	Asks   bool // it asks this host
	Serves bool // it serves this host
}

// PeerOf turns a host's last word into what it means for the host me.
func PeerOf(name, me string, alive bool, w Word) Peer {
	return Peer{Name: name, Alive: alive, Offers: w.Offers, Asks: w.Ask == me, Serves: slices.Contains(w.Serves, me)}
}

// Inputs of a step.
type Inputs struct {
	Now    time.Duration // of a clock that never goes back; the zero is of no meaning
	Uplink bool          // carrier, and an answer to probes where there are any
	Peers  []Peer        // hosts that have this bridge, in an order that stays
	Have   Kernel
}

func (in *Inputs) peer(name string) Peer {
	for _, p := range in.Peers {
		if p.Name == name {
			return p
		}
	}
	return Peer{Name: name}
}

// Plan is what the kernel is to do, and whom to ask.
type Plan struct {
	Via   string   // host that is to carry the frames; empty: the own uplink
	Drain string   // host over whose tunnel late frames are still taken
	Serve []string // hosts to carry; never together with Via or Drain
	Ask   string   // goes into the Word
}

// Policy holds the times of a Machine; all are positive.
type Policy struct {
	Down     time.Duration // how long an uplink must be bad before another way is sought
	Stable   time.Duration // how long it must be good before it is used again
	Drain    time.Duration // how long late frames are taken after that
	Patience time.Duration // how long a host that was asked may take
	Silent   time.Duration // how long a carrying host may be silent before another is sought
	Doubling int           // how often Stable doubles at most for an uplink that keeps failing, 0–10
}

// DefaultPolicy returns the times used where nothing else is configured.
func DefaultPolicy() Policy {
	return Policy{Down: 50 * time.Millisecond, Stable: 10 * time.Second, Drain: time.Second, Patience: time.Second, Silent: 5 * time.Second, Doubling: 4}
}

// rules lets the tests break a rule on purpose.
type rules struct{ mut string }

func (r rules) broken(name string) bool { return r.mut == name }

// Machine is one bridge of one host.
type Machine struct {
	policy Policy
	rules  rules

	known    bool // the uplink was looked at
	good     bool
	since    time.Duration // when good became what it is
	failed   bool          // bad for longer than Policy.Down
	returned time.Duration // when the uplink was taken into use again
	wasBack  bool
	flaps    int

	ask        string
	askedAt    time.Duration
	drainUntil time.Duration
	silent     string // carrying host that is silent
	silentAt   time.Duration
}

// New returns a Machine that knows nothing yet.
func New(p Policy) *Machine { return &Machine{policy: p} }

// Hold returns how long the uplink must be good before it is used again: it
// doubles with each failure that comes soon after a return.
func (m *Machine) Hold() time.Duration { return m.policy.Stable << m.flaps }

// Good returns since when the uplink has been good, and whether it is.
func (m *Machine) Good() (since time.Duration, good bool) { return m.since, m.good }

// Step looks at everything anew and says what is to be done. The owner carries
// it out (Next), at its own pace, and calls Step again after each change and at
// least every few dozen milliseconds.
func (m *Machine) Step(in Inputs) Plan {
	m.watch(&in)
	if in.Have.State == Open {
		return m.carried(&in)
	}
	return m.local(&in)
}

// Say returns the word for the others, as of what the kernel does now.
func (m *Machine) Say(have Kernel, p Plan) Word {
	return Word{Offers: m.known && m.good && have.Client == "" && p.Via == "", Ask: p.Ask, Serves: have.Serving}
}

func (m *Machine) watch(in *Inputs) {
	if !m.known || in.Uplink != m.good {
		m.known, m.good, m.since = true, in.Uplink, in.Now
	}
	was := m.failed
	m.failed = !m.good && in.Now-m.since >= m.policy.Down
	if m.failed && !was && m.wasBack {
		if in.Now-m.returned < 4*m.Hold() {
			m.flaps = min(m.flaps+1, m.policy.Doubling)
		} else {
			m.flaps = 0
		}
		m.wasBack = false
	}
	p := in.peer(in.Have.Client)
	switch {
	case in.Have.Client == "" || p.Alive:
		m.silent = ""
	case m.silent != p.Name:
		m.silent, m.silentAt = p.Name, in.Now
	}
}

// carried decides while frames go over another host.
func (m *Machine) carried(in *Inputs) Plan {
	via := in.Have.Client
	p := in.peer(via)
	// A host that says it cannot carry is believed at once. Silence alone proves
	// nothing: the tunnel is the kernel's and needs no agent at either end.
	refuses := p.Alive && !(p.Offers && p.Serves)
	if m.good {
		stable := in.Now-m.since >= m.Hold() || m.rules.broken("no-stable")
		switch {
		case stable && p.Alive && !refuses:
			m.back(in)
			m.drainUntil = in.Now + m.policy.Drain
			return Plan{Drain: via, Ask: via}
		case stable || refuses || !p.Alive:
			m.back(in)
			return Plan{}
		}
		return Plan{Via: via, Ask: via}
	}
	if refuses {
		return Plan{Ask: m.seek(in, via)}
	}
	if m.silent == via && in.Now-m.silentAt >= m.policy.Silent {
		if other := m.seek(in, via); other != "" {
			if in.peer(other).Serves {
				return Plan{Via: other, Ask: other}
			}
			return Plan{Via: via, Ask: other}
		}
	}
	return Plan{Via: via, Ask: via}
}

func (m *Machine) back(in *Inputs) {
	m.returned, m.wasBack = in.Now, true
	m.ask = ""
}

// local decides while frames go by the own uplink, if anywhere.
func (m *Machine) local(in *Inputs) Plan {
	if m.failed {
		p := Plan{Ask: m.seek(in, "")}
		if p.Ask == "" || m.rules.broken("serve-while-carried") {
			p.Serve = m.serve(in)
		}
		if p.Ask != "" && in.peer(p.Ask).Serves {
			p.Via = p.Ask
		}
		return p
	}
	m.ask = ""
	if in.Have.State == Drain && in.Now < m.drainUntil && in.peer(in.Have.Client).Alive {
		return Plan{Drain: in.Have.Client, Ask: in.Have.Client}
	}
	return Plan{Serve: m.serve(in)}
}

// seek returns the host to ask: the one that was asked, for as long as it may
// take, then the next that offers, in turn.
func (m *Machine) seek(in *Inputs, not string) string {
	can := func(p Peer) bool { return p.Alive && p.Offers && p.Name != not }
	if m.ask != "" && can(in.peer(m.ask)) && (in.peer(m.ask).Serves || in.Now-m.askedAt < m.policy.Patience) {
		return m.ask
	}
	at := slices.IndexFunc(in.Peers, func(p Peer) bool { return p.Name == m.ask })
	m.ask = ""
	if m.rules.broken("ask-nobody") {
		return ""
	}
	for i := range in.Peers {
		if p := in.Peers[(at+1+i)%len(in.Peers)]; can(p) {
			m.ask, m.askedAt = p.Name, in.Now
			break
		}
	}
	return m.ask
}

// serve lists the hosts to carry. One that fell silent is carried on: its
// agent may be away, its frames are not. While the uplink is bad nobody new is
// taken.
func (m *Machine) serve(in *Inputs) (out []string) {
	if in.Have.Client != "" && !m.rules.broken("serve-while-carried") {
		return nil
	}
	if m.rules.broken("never-serve") {
		return nil
	}
	for _, p := range in.Peers {
		has := slices.Contains(in.Have.Serving, p.Name)
		if p.Alive && p.Asks && (m.good || has) || !p.Alive && has || has && m.rules.broken("serve-while-carried") {
			out = append(out, p.Name)
		}
	}
	return out
}
