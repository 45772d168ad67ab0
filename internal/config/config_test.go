package config

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

const good = `
name = "h1"
state_dir = "/srv/p"
boot_wait = "8s"
[lan]
address = "10.1.0.1"
[[alinks]]
address = "10.2.0.1"
[[alinks]]
address = "10.3.0.1"
`

func TestParse(t *testing.T) {
	c, err := Parse([]byte(good))
	if err != nil {
		t.Fatal(err)
	}
	if c.APIAddr() != "10.1.0.1:7400" || c.PeerAddr() != "10.1.0.1:7401" || c.ClientAddr() != "10.1.0.1:7402" {
		t.Errorf("ports: %s %s %s", c.APIAddr(), c.PeerAddr(), c.ClientAddr())
	}
	if c.BootWait.D() != 8*time.Second || c.Role != RoleHost || c.AgentSocket() != "/srv/p/run/agent.sock" {
		t.Errorf("%+v", c)
	}
	if got := c.ALinkAddrs(); !reflect.DeepEqual(got, []string{"10.2.0.1", "10.3.0.1"}) {
		t.Errorf("alinks %v", got)
	}
	data, err := c.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	again, err := Parse(data)
	if err != nil || !reflect.DeepEqual(again, c) {
		t.Errorf("round trip: %v\n%s", err, data)
	}
}

func TestErrorsNameKeyValueAllowed(t *testing.T) {
	for _, tc := range []struct{ edit, want string }{
		{`name = "H 1"`, `name = "H 1" is not allowed; allowed: 1 to 63`},
		{`name = ""`, `name = "" is not allowed`},
		{`role = "boss"`, `role = "boss" is not allowed; allowed: "host" or "witness"`},
		{`state_dir = "rel"`, `state_dir = "rel"`},
		{`state_dir = "/"`, `state_dir = "/"`},
		{`qemu = "qemu"`, `qemu = "qemu"`},
		{`boot_wait = "-1s"`, `boot_wait = "-1s"`},
		{`boot_wait = "soon"`, `not a duration`},
		{`colour = "red"`, `unknown key colour`},
		{`name = 7`, `name`},
		{`lan = {address = "1.2.3"}`, `lan.address = "1.2.3"`},
		{`lan = {address = "0.0.0.0"}`, `lan.address = "0.0.0.0"`},
		{`lan = {address = "10.0.0.1", api_port = 7401}`, `lan.etcd_peer_port = "7401"`},
		{`lan = {address = "10.0.0.1", api_port = 0}`, `lan.api_port = "0"`},
		{`lan = {address = "10.0.0.1", api_prot = 1}`, `unknown key lan.api_prot`},
		{`alinks = [{address = "10.0.0.1"}, {address = "10.0.0.1"}]`, `alinks[1].address`},
		{`alinks = [{address = "x"}]`, `alinks[0].address = "x"`},
		{`etcd = {heartbeat = "1ms"}`, `etcd.heartbeat = "1ms"`},
		{`etcd = {election = "200ms"}`, `etcd.election = "200ms"`},
	} {
		base := "name = \"h1\"\nlan = {address = \"10.1.0.1\"}\n"
		key, _, _ := strings.Cut(tc.edit, " ")
		var lines []string
		for _, l := range strings.Split(base, "\n") {
			if !strings.HasPrefix(l, key+" ") {
				lines = append(lines, l)
			}
		}
		_, err := Parse([]byte(tc.edit + "\n" + strings.Join(lines, "\n")))
		if err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: error %v, want %q in it", tc.edit, err, tc.want)
		}
	}
}

func TestWitnessNeedsNoQEMU(t *testing.T) {
	if _, err := Parse([]byte("name='w'\nrole='witness'\nqemu=''\nqemu_img=''\nlan={address='fe80::1%eth0'}\n")); err != nil {
		t.Fatal(err)
	}
}

func TestLoadNamesTheFile(t *testing.T) {
	p := filepath.Join(t.TempDir(), FileName)
	if err := os.WriteFile(p, []byte("name = "), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(p); err == nil || !strings.Contains(err.Error(), p) {
		t.Errorf("error %v does not name the file", err)
	}
	if _, err := Load(p + "x"); err == nil {
		t.Error("a missing file was read")
	}
}
