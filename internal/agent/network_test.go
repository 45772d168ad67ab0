package agent

import (
	"testing"
)

func TestParseWord(t *testing.T) {
	w, err := parseWord([]byte(`{"version":1,"bridges":{"br0":{"offers":true,"ask":"b","serves":["c"],"later":1}}}`))
	if err != nil || !w.Bridges["br0"].Offers || w.Bridges["br0"].Ask != "b" || len(w.Bridges["br0"].Serves) != 1 {
		t.Errorf("%+v, %v", w, err)
	}
	for _, bad := range []string{"", "[]", `{"version":2}`, `{"bridges":{}}`, `{"version":1,"bridges":7}`} {
		if _, err := parseWord([]byte(bad)); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}

func FuzzParseWord(f *testing.F) {
	f.Add([]byte(`{"version":1,"bridges":{"br0":{"offers":true,"ask":"b","serves":["c"]}}}`))
	f.Fuzz(func(t *testing.T, line []byte) {
		if w, err := parseWord(line); err == nil && (w.Version != wordVersion || len(w.Bridges) > 64) {
			t.Errorf("%q was taken as %+v", line, w)
		}
	})
}
