//go:build soak

package e2e

import "testing"

// TestSoakGuestAgentPort is TestGuestAgentPort for a long time.
func TestSoakGuestAgentPort(t *testing.T) { agentPort(t, 1000) }
