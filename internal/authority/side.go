package authority

import "perdure/internal/model"

// Config of a Side.
type Config struct {
	Host         string // this host's name
	ClaimDelayMS int    // how much longer than a primary a secondary waits before it claims: one round trip, ≥ 0
	RetryMS      int    // pause before a failed read or an unresolved swap is tried again, > 0
	PollMS       int    // distance of the slow checks of the record; 0: none
}

// Side is the authority state machine of one shim, from its start to its end.
type Side struct {
	cfg Config
	u   rules
}

// New returns a Side that has done nothing yet; feed it EvStart first.
func New(cfg Config) *Side { return &Side{cfg: cfg} }

// Step handles one event and returns what the driver must do, in this order.
func (s *Side) Step(ev Event) []Action { return nil }

// Record returns the newest record read, revision 0 before the first.
func (s *Side) Record() model.Versioned { return model.Versioned{} }

// Role returns what this side is now.
func (s *Side) Role() Role { return RoleNone }

// Run returns the run held here, empty before EvFilled.
func (s *Side) Run() model.RunID { return "" }

// Output returns the output rule in force.
func (s *Side) Output() OutputRule { return OutputNone }

// Acking reports whether complete epochs are acknowledged.
func (s *Side) Acking() bool { return false }

// Ended reports whether ActEnd was given.
func (s *Side) Ended() bool { return true }
