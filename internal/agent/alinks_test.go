package agent

import (
	"net"
	"testing"
	"time"

	"perdure/internal/config"
)

func TestAskALink(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := l.Addr().(*net.TCPAddr).Port
	if st := askALink(t.Context(), "127.0.0.1", "127.0.0.1", port); !st.up || st.rtt <= 0 {
		t.Errorf("a listener: %+v", st)
	}
	l.Close()
	if st := askALink(t.Context(), "", "127.0.0.1", port); !st.up {
		t.Errorf("a host that refuses has answered: %+v", st)
	}
	// A local address that is not this machine's: the link has no way out.
	if st := askALink(t.Context(), "192.0.2.7", "127.0.0.1", port); st.up {
		t.Errorf("a link that is not there: %+v", st)
	}
}

func TestHostShowsALinks(t *testing.T) {
	t.Parallel()
	a := firstHost(t)
	joined(t, a, "b", config.RoleHost)
	eventually(t, "the link to b is measured", 40*time.Second, func() bool {
		h, err := a.ag.Host(t.Context(), "b")
		return err == nil && len(h.ALinks) == 1 && h.ALinks[0].Up != nil && *h.ALinks[0].Up && h.ALinks[0].RTTMS > 0
	})
	if h, err := a.ag.Host(t.Context(), "a"); err != nil || h.ALinks[0].Up != nil {
		t.Errorf("a host measured a link to itself: %+v, %v", h.ALinks, err)
	}
}
