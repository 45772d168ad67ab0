package guestsvc

import (
	"bytes"
	"encoding/json"
	"io"
	"strings"
	"testing"
	"time"
)

func TestAgent(t *testing.T) {
	in := "\xff" + `{"execute":"guest-sync-delimited","arguments":{"id":123}}` + "\n" +
		`{"execute":"guest-ping"}` + "\n" + `{"execute":"guest-get-time"}` + "\n" + "garbage\n" +
		`{"execute":"guest-shutdown","arguments":{"mode":"powerdown"}}` + "\n" + `{"execute":"guest-nonsense"}` + "\n"
	var out bytes.Buffer
	var s Server
	s.ServeAgent(struct {
		io.Reader
		io.Writer
	}{strings.NewReader(in), &out})
	got := strings.Split(strings.TrimSuffix(out.String(), "\n"), "\n")
	if len(got) != 6 {
		t.Fatalf("%d answers: %q", len(got), got)
	}
	if got[0] != "\xff"+`{"return":123}` || got[1] != `{"return":{}}` {
		t.Errorf("answers %q", got[:2])
	}
	var now struct{ Return int64 }
	if err := json.Unmarshal([]byte(got[2]), &now); err != nil || time.Since(time.Unix(0, now.Return)).Abs() > time.Minute {
		t.Errorf("time %q, %v", got[2], err)
	}
	for _, g := range got[3:] {
		if !strings.Contains(g, `"error"`) {
			t.Errorf("no error: %q", g)
		}
	}
}
