package config

import (
	"strings"
	"testing"
	"time"
)

func TestNetworks(t *testing.T) {
	base := "name = \"a\"\n[lan]\naddress = \"192.0.2.1\"\n"
	c, err := Parse([]byte(base + "[[networks]]\nbridge = \"br0\"\nuplinks = [\"eth0\"]\n[[networks]]\nbridge = \"br1\"\nuplinks = [\"bond0.7\", \"eth2\"]\nprobe = [\"192.0.2.254\"]\nstable = \"3s\"\n"))
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Networks) != 2 || c.Networks[0].StableFor() != DefaultStable || c.Networks[1].StableFor() != 3*time.Second || c.CarryPort != 7403 {
		t.Errorf("%+v", c)
	}
	for want, text := range map[string]string{
		"networks[0].uplinks": "[[networks]]\nbridge = \"br0\"\n",
		"networks[0].bridge":  "[[networks]]\nbridge = \"a/b\"\nuplinks = [\"eth0\"]\n",
		"not named twice":     "[[networks]]\nbridge = \"br0\"\nuplinks = [\"eth0\"]\n[[networks]]\nbridge = \"br1\"\nuplinks = [\"eth0\"]\n",
		"networks[0].probe":   "[[networks]]\nbridge = \"br0\"\nuplinks = [\"eth0\"]\nprobe = [\"::1\"]\n",
		"networks[0].stable":  "[[networks]]\nbridge = \"br0\"\nuplinks = [\"eth0\"]\nstable = \"1ms\"\n",
		"unknown key":         "[[networks]]\nbridge = \"br0\"\nuplink = \"eth0\"\n",
	} {
		if _, err := Parse([]byte(base + text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want a word about %s", text, err, want)
		}
	}
}
