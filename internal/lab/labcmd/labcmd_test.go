package labcmd

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"perdure/api"
	"perdure/internal/lab"
	"perdure/internal/testenv"
)

// TestMain lets the test binary be the init of the hosts.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "lab-init" {
		os.Exit(lab.InitMain(os.Args[2:]))
	}
	os.Exit(m.Run())
}

func run(t *testing.T, args ...string) (string, error) {
	t.Helper()
	c := Command()
	var out bytes.Buffer
	c.SetOut(&out)
	c.SetErr(&out)
	c.SilenceErrors, c.SilenceUsage = true, true
	c.SetArgs(args)
	err := c.ExecuteContext(t.Context())
	return out.String(), err
}

func TestCommands(t *testing.T) {
	testenv.Root(t)
	base, err := os.MkdirTemp("", "lab")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(base)
	dir := filepath.Join(base, "l")
	if _, err := run(t, "status", "--dir", dir); api.ClassOf(err) != api.NotFound {
		t.Errorf("status without a lab: %v", err)
	}
	if _, err := run(t, "down", "--dir", dir); err != nil {
		t.Errorf("down without a lab: %v", err)
	}
	out, err := run(t, "up", "--dir", dir, "--no-cluster", "--hosts", "3", "--alinks", "1")
	if err != nil {
		t.Fatal(err)
	}
	defer run(t, "down", "--dir", dir)
	if !strings.Contains(out, "10.78.0.3") || !strings.Contains(out, "lab --dir "+dir+" exec") {
		t.Errorf("up says:\n%s", out)
	}
	if _, err := run(t, "up", "--dir", dir, "--no-cluster"); api.ClassOf(err) != api.Conflict {
		t.Errorf("second up: %v", err)
	}
	for _, args := range [][]string{{"link", "b", "alink0", "down"}, {"host", "b", "freeze"}, {"host", "c", "power-off"}} {
		if out, err := run(t, append(args, "--dir", dir)...); err != nil {
			t.Errorf("%v: %v %s", args, err, out)
		}
	}
	out, err = run(t, "status", "--dir", dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"frozen", "off", "alink0", "witness", "10.77.0.200"} {
		if !strings.Contains(out, want) {
			t.Errorf("status lacks %q:\n%s", want, out)
		}
	}
	for _, tc := range []struct {
		args  []string
		class api.Class
	}{
		{[]string{"exec", "b", "--", "true"}, api.Conflict},
		{[]string{"exec", "c", "--", "true"}, api.Conflict},
		{[]string{"host", "a", "explode"}, api.Invalid},
		{[]string{"link", "a", "lan", "sideways"}, api.Invalid},
		{[]string{"host", "a", "power-on"}, api.Internal},
	} {
		args := append([]string{tc.args[0], "--dir", dir}, tc.args[1:]...)
		if _, err := run(t, args...); err == nil || api.ClassOf(err) != tc.class {
			t.Errorf("%v: %v (class %s)", tc.args, err, api.ClassOf(err))
		}
	}
	var st ExitStatus
	if _, err := run(t, "exec", "--dir", dir, "a", "--", "sh", "-c", "exit 42"); !errors.As(err, &st) || st.ExitCode() != 42 {
		t.Errorf("exit status: %v", err)
	}
	if _, err := run(t, "exec", "--dir", dir, "client", "--", "true"); err != nil {
		t.Errorf("exec on the client: %v", err)
	}
}
