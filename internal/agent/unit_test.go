package agent

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"perdure/internal/clusterstore"
	"perdure/internal/model"
	"perdure/internal/shimapi"
)

func TestSurvivorNeeded(t *testing.T) {
	up := func(n string) clusterstore.Member { return clusterstore.Member{Name: n, Up: true} }
	self := clusterstore.Member{Name: "a", Self: true}
	lost := func(n string) clusterstore.Member { return clusterstore.Member{Name: n, LostFor: 3 * time.Second} }
	ill := func(n string) clusterstore.Member { return clusterstore.Member{Name: n, LostFor: time.Second} }
	learner := clusterstore.Member{Name: "l", Learner: true}
	for name, tc := range map[string]struct {
		members      []clusterstore.Member
		needed, sure bool
	}{
		"all up":                          {[]clusterstore.Member{self, up("b"), up("w")}, false, true},
		"witness lost":                    {[]clusterstore.Member{self, up("b"), lost("w")}, true, true},
		"witness just silent":             {[]clusterstore.Member{self, up("b"), ill("w")}, false, false},
		"secondary lost":                  {[]clusterstore.Member{self, lost("b"), up("w")}, false, true},
		"two hosts":                       {[]clusterstore.Member{self, up("b")}, true, true},
		"two hosts and a learner":         {[]clusterstore.Member{self, up("b"), learner}, true, true},
		"five, one lost":                  {[]clusterstore.Member{self, up("b"), up("c"), up("d"), lost("e")}, false, true},
		"five, two lost":                  {[]clusterstore.Member{self, up("b"), up("c"), lost("d"), lost("e")}, true, true},
		"five, the secondary one of them": {[]clusterstore.Member{self, lost("b"), up("c"), up("d"), lost("e")}, false, true},
		"nothing known":                   {nil, false, false},
	} {
		needed, sure := survivorNeeded(tc.members, "b")
		if sure != tc.sure || sure && needed != tc.needed {
			t.Errorf("%s: needed %v, sure %v", name, needed, sure)
		}
	}
}

func TestOlderVersion(t *testing.T) {
	for _, tc := range []struct {
		a, b string
		want bool
	}{{"7.2.22", "10.0.2", true}, {"10.0", "7.2.22", false}, {"7.2.1", "7.2.1", false}, {"7.2", "7.2.1", true}, {"7.10.0", "7.9.9", false}} {
		if got := olderVersion(tc.a, tc.b); got != tc.want {
			t.Errorf("%s older than %s: %v", tc.a, tc.b, got)
		}
	}
}

func TestEventsOutliveTheAgentAndStayBounded(t *testing.T) {
	dir := t.TempDir()
	at := func(string) string { return dir }
	e := newEvents("a", at)
	now := time.Now()
	if err := e.add(model.Event{VM: "v", Type: "one", Time: now}); err != nil {
		t.Fatal(err)
	}
	if err := e.add(model.Event{VM: "v", Type: "one", Time: now}); err != nil { // repeated by a shim
		t.Fatal(err)
	}
	_, more := e.since("v", 1)
	if err := e.add(model.Event{VM: "v", Type: "two", Time: now}); err != nil {
		t.Fatal(err)
	}
	select {
	case <-more:
	default:
		t.Error("a new event is not announced")
	}
	path := filepath.Join(dir, shimapi.EventsFile)
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString(`{"seq":99,"type":"cut sho`); err != nil {
		t.Fatal(err)
	}
	f.Close()

	e = newEvents("a", at)
	list, _ := e.since("v", 0)
	if len(list) != 2 || list[0].Type != "one" || list[1].Seq != 2 || list[1].Host != "a" {
		t.Fatalf("%+v", list)
	}
	text := string(make([]byte, 600))
	for i := range 3000 {
		if err := e.add(model.Event{VM: "v", Type: "many", Time: now.Add(time.Duration(i)), Text: text}); err != nil {
			t.Fatal(err)
		}
	}
	var total int64
	for _, p := range []string{path, path + ".1"} {
		st, err := os.Stat(p)
		if err != nil {
			t.Fatal(err)
		}
		total += st.Size()
	}
	if total > 3*eventFileSize {
		t.Errorf("the files have %d bytes", total)
	}
	if list, _ := e.since("v", 0); len(list) > eventRing {
		t.Errorf("%d events are kept in memory", len(list))
	}
	if list, _ := e.since("v", 3001); len(list) != 1 || list[0].Seq != 3002 {
		t.Errorf("%d events after 3001", len(list))
	}
}

func TestProcID(t *testing.T) {
	me, ok := procOf(os.Getpid())
	if !ok || !me.alive() {
		t.Fatal("this test does not live")
	}
	if (procID{me.pid, me.start + 1}).alive() {
		t.Error("a pid with another start time counts as the same process")
	}
	// A stranger with the same number must never be hit.
	if err := (procID{me.pid, me.start + 1}).kill(t.Context()); err != nil {
		t.Error(err)
	}
	f := filepath.Join(t.TempDir(), "qemu.pid")
	for _, text := range []string{"", "x y\n", "1\n", "-1 5\n", "999999999 1\n"} {
		if err := os.WriteFile(f, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if p, ok := qemuOf(f); ok {
			t.Errorf("%q: %v", text, p)
		}
	}
	if isShim(os.Getpid(), "/x") {
		t.Error("this test is taken for a shim")
	}
}

func TestImageInfo(t *testing.T) {
	good := imageInfo{VirtualSize: 1 << 20, Format: "vmdk"}
	good.Specific.Data.Extents = []struct {
		Filename string `json:"filename"`
	}{{"/x/a.vmdk"}}
	if err := good.check("/x/a.vmdk"); err != nil {
		t.Error(err)
	}
	if err := good.check("/x/b.vmdk"); err == nil {
		t.Error("an extent in another file was let in")
	}
	for name, i := range map[string]imageInfo{
		"backing":   {VirtualSize: 1, Format: "qcow2", Backing: "/etc/shadow"},
		"format":    {VirtualSize: 1, Format: "vdi"},
		"size":      {VirtualSize: 0, Format: "raw"},
		"encrypted": {VirtualSize: 1, Format: "qcow2", Encrypted: true},
	} {
		if err := i.check("/x"); err == nil {
			t.Errorf("%s was let in", name)
		}
	}
	i := imageInfo{VirtualSize: 1, Format: "qcow2"}
	i.Specific.Data.DataFile = "/dev/sda"
	if err := i.check("/x"); err == nil {
		t.Error("a data file was let in")
	}
}
