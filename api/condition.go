package api

import (
	"slices"
	"strings"

	"perdure/internal/model"
)

// Condition is something about a VM that can be waited for. The zero value
// always holds.
type Condition struct {
	text  string
	terms []term
}

type term struct {
	key    string
	not    bool
	values []string
}

// conditionKeys lists what may be asked, with the values allowed (nil: any name).
func conditionKeys() map[string][]string {
	return map[string][]string{
		"state": {string(model.StateStopped), string(model.StateStarting), string(model.StateRunning), string(model.StatePaused),
			string(model.StateHeld), string(model.StateFault), string(model.StateUnknown), "absent"},
		"mode": {string(model.ModeStopped), string(model.ModeStarting), string(model.ModeSimplex), string(model.ModeSyncing),
			string(model.ModeDuplex)},
		"level":     {string(model.LevelNone), string(model.LevelHA), string(model.LevelCA), string(model.LevelFT)},
		"primary":   nil,
		"secondary": nil,
		"problem":   nil,
	}
}

// ParseCondition reads conditions such as state=running, mode=simplex|duplex,
// primary!=hosta, or several of them joined by commas, which must all hold.
// A state or mode alone is enough (running, duplex); absent means that the VM
// does not exist; problem=none that nothing is wrong, problem=CODE that the
// problem with this code is there.
func ParseCondition(s string) (Condition, error) {
	c := Condition{text: s}
	for part := range strings.SplitSeq(s, ",") {
		t, err := parseTerm(strings.TrimSpace(part))
		if err != nil {
			return Condition{}, err
		}
		c.terms = append(c.terms, t)
	}
	return c, nil
}

func parseTerm(s string) (term, error) {
	keys := conditionKeys()
	key, val, ok := strings.Cut(s, "=")
	if !ok {
		for _, k := range []string{"state", "mode"} {
			if slices.Contains(keys[k], s) {
				return term{key: k, values: []string{s}}, nil
			}
		}
		return term{}, Errorf(Invalid, "condition %q is not understood; write KEY=VALUE with state, mode, level, primary, secondary or problem, such as state=running or mode=duplex", s)
	}
	t := term{key: strings.TrimSpace(key)}
	if k, not := strings.CutSuffix(t.key, "!"); not {
		t.key, t.not = strings.TrimSpace(k), true
	}
	allowed, known := keys[t.key]
	if !known {
		return term{}, Errorf(Invalid, "condition %q: %q cannot be waited for; allowed are state, mode, level, primary, secondary and problem", s, t.key)
	}
	for v := range strings.SplitSeq(val, "|") {
		v = strings.TrimSpace(v)
		if allowed != nil && !slices.Contains(allowed, v) {
			return term{}, Errorf(Invalid, "condition %q: %s %q does not exist; allowed are %s", s, t.key, v, strings.Join(allowed, ", "))
		}
		t.values = append(t.values, v)
	}
	return t, nil
}

// String returns the condition as it was written.
func (c Condition) String() string { return c.text }

// AllowsAbsent reports whether the condition can hold for a VM that does not exist.
func (c Condition) AllowsAbsent() bool { return c.Holds(nil) }

// Holds reports whether the condition holds; nil stands for a VM that does not exist.
func (c Condition) Holds(vm *VM) bool {
	for _, t := range c.terms {
		if vm == nil {
			if t.key != "state" || slices.Contains(t.values, "absent") == t.not {
				return false
			}
			continue
		}
		if t.holds(vm) == t.not {
			return false
		}
	}
	return true
}

func (t term) holds(vm *VM) bool {
	switch t.key {
	case "state":
		return slices.Contains(t.values, string(vm.State))
	case "mode":
		return slices.Contains(t.values, string(vm.Mode))
	case "level":
		return slices.Contains(t.values, string(vm.Level))
	case "primary":
		return slices.Contains(t.values, vm.Primary)
	case "secondary":
		return slices.Contains(t.values, vm.Secondary)
	case "problem":
		return slices.ContainsFunc(t.values, func(code string) bool {
			if code == "none" {
				return len(vm.Problems) == 0
			}
			return slices.ContainsFunc(vm.Problems, func(p model.Problem) bool { return p.Code == code })
		})
	}
	return false
}
