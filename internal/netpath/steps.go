package netpath

import "slices"

// Kind of an Action.
type Kind uint8

// The actions. Each is one step of the kernel, done whole or not at all; the
// owner may crash after any of them.
const (
	Nothing     Kind = iota
	JoinClient       // make the client end to Host and put it into the bridge, shut
	OpenClient       // in one step: shut the uplink and open the client end
	DrainClient      // in one step: open the uplink and let the client end only take late frames
	ShutClient       // in one step: open the uplink and shut the client end
	LeaveClient      // take the client end, which is shut, out of the bridge
	JoinServer       // put the server end for Host into the bridge
	LeaveServer      // take it out
)

func (k Kind) String() string {
	return [...]string{"nothing", "join-client", "open-client", "drain-client", "shut-client", "leave-client", "join-server", "leave-server"}[k]
}

// Action is one step towards a Plan.
type Action struct {
	Kind Kind
	Host string // the other end
}

// Next returns the next step from what the kernel does to what it is to do;
// Nothing when it is there.
//
// Invariant: after every step, and so wherever the owner may die, the uplink or
// the client end forwards, never both, and no client end is in a bridge together
// with a server end.
func Next(have Kernel, want Plan) Action { return next(have, want, rules{}) }

func next(have Kernel, want Plan, r rules) Action {
	if want.Via != "" {
		return toCarried(have, want.Via, r)
	}
	if have.Client != "" {
		switch {
		case want.Drain == have.Client && have.State == Open:
			return Action{DrainClient, have.Client}
		case want.Drain == have.Client && have.State == Drain:
			return Action{}
		case have.State != Shut:
			return Action{ShutClient, have.Client}
		}
		return Action{LeaveClient, have.Client}
	}
	return toServing(have, want.Serve)
}

func toCarried(have Kernel, via string, r rules) Action {
	if len(have.Serving) > 0 && !r.broken("serve-while-carried") {
		return Action{LeaveServer, have.Serving[0]}
	}
	switch {
	case have.Client != "" && have.Client != via && have.State != Shut:
		return Action{ShutClient, have.Client}
	case have.Client != "" && have.Client != via:
		return Action{LeaveClient, have.Client}
	case have.Client == "":
		return Action{JoinClient, via}
	case have.State != Open:
		return Action{OpenClient, via}
	}
	return Action{}
}

func toServing(have Kernel, want []string) Action {
	for _, h := range have.Serving {
		if !slices.Contains(want, h) {
			return Action{LeaveServer, h}
		}
	}
	for _, h := range want {
		if !slices.Contains(have.Serving, h) {
			return Action{JoinServer, h}
		}
	}
	return Action{}
}

// After returns what the kernel does after a step.
func (k Kernel) After(a Action) Kernel {
	switch a.Kind {
	case JoinClient:
		k.Client, k.State = a.Host, Shut
	case OpenClient:
		k.State = Open
	case DrainClient:
		k.State = Drain
	case ShutClient:
		k.State = Shut
	case LeaveClient:
		k.Client, k.State = "", None
	case JoinServer:
		k.Serving = append(slices.Clone(k.Serving), a.Host)
		slices.Sort(k.Serving)
	case LeaveServer:
		k.Serving = slices.DeleteFunc(slices.Clone(k.Serving), func(h string) bool { return h == a.Host })
	}
	return k
}
