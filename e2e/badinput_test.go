package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"perdure/api"
	"perdure/internal/lab"
	"perdure/internal/pki"
)

// refusal is one command that must fail, how, and what it must say.
type refusal struct {
	name string
	args []string
	exit int
	say  []string
}

// said runs the command line on a host and returns its streams and exit code.
func (w *World) said(host string, args ...string) (out, problem string, exit int) {
	w.T.Helper()
	cmd := w.Lab.Command(w.Ctx, host, append([]string{"perdure"}, args...)...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var ee *exec.ExitError
	if err != nil && !errors.As(err, &ee) {
		w.T.Fatalf("perdure %s: %v", strings.Join(args, " "), err)
	}
	return stdout.String(), strings.TrimSpace(stderr.String()), cmd.ProcessState.ExitCode()
}

// refuse runs a command that must fail as said.
func (w *World) refuse(host string, r refusal) {
	w.T.Helper()
	_, problem, exit := w.said(host, r.args...)
	w.judge(r, problem, exit)
}

func (w *World) judge(r refusal, problem string, exit int) {
	w.T.Helper()
	w.T.Logf("exit %d: %s", exit, problem)
	if exit != r.exit {
		w.T.Errorf("exit code %d, want %d", exit, r.exit)
	}
	for _, s := range r.say {
		if !strings.Contains(problem, s) {
			w.T.Errorf("it does not say %q", s)
		}
	}
	for _, s := range []string{"panic:", "goroutine ", "%!"} {
		if strings.Contains(problem, s) {
			w.T.Errorf("it says %q", s)
		}
	}
}

// on runs a shell script on a host.
func (w *World) on(host, script string) string {
	w.T.Helper()
	out, err := w.Lab.Output(w.Ctx, host, "/bin/sh", "-c", script)
	w.must(err, "shell")
	return string(out)
}

// footprint lists what VMs leave behind on a host: directories, mounts, network
// devices, processes. The same before and after says that nothing is half-made.
func (w *World) footprint(host string) string {
	w.T.Helper()
	s := w.Lab.StateDir(host)
	out := w.on(host, fmt.Sprintf(`cd %s && ls -A vms uploads && { ls -A left 2>/dev/null; ls vms/*/disks; grep " %s/" /proc/self/mountinfo | cut -d' ' -f5; ls /sys/class/net; true; }`, s, s))
	ps, err := w.Lab.Processes(host)
	w.must(err, "list processes")
	var procs []string
	for _, p := range ps {
		base := filepath.Base(p.Args[0])
		if strings.HasPrefix(base, "qemu") || len(p.Args) > 1 && (p.Args[1] == "shim" || p.Args[1] == "flusher") {
			procs = append(procs, base+" "+strings.Join(p.Args[1:2], ""))
		}
	}
	slices.Sort(procs)
	return out + strings.Join(procs, "\n")
}

// untouched remembers all hosts and returns a check that they are as before.
func (w *World) untouched() func(*World) {
	w.T.Helper()
	look := func(w *World) string {
		w.T.Helper()
		s := w.Perdure(w.AnyHost(), "vm", "list")
		for _, h := range w.Lab.Hosts() {
			s += "--- " + h + "\n" + w.footprint(h) + "\n"
		}
		return s
	}
	before := look(w)
	return func(w *World) {
		w.T.Helper()
		w.Eventually(15*time.Second, "nothing is left half-made", func() error {
			if now := look(w); now != before {
				return fmt.Errorf("before:\n%s\nnow:\n%s", before, now)
			}
			return nil
		})
	}
}

// aside makes a directory for further hosts and their files, short enough for
// Unix sockets below it.
func aside(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp(suite.dir, "x")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// badImages makes files that are no images to import, in dir.
func badImages(t *testing.T, dir string) {
	t.Helper()
	write := func(name string, b []byte) {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("letter.img", []byte("this is no disk image\n"))
	write("empty.img", nil)
	write("base.img", make([]byte, 2<<20))
	cmd := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", filepath.Join(dir, "base.img"), filepath.Join(dir, "over.qcow2"))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("make image: %v: %s", err, out)
	}
	b, err := os.ReadFile(filepath.Join(dir, "over.qcow2"))
	if err != nil {
		t.Fatal(err)
	}
	b = bytes.Clone(b[:4096]) // the header is whole, the rest is not there
	b[7] = 99                 // and its version is not known
	write("torn.qcow2", b)
}

// refusedCreates are requests for a new VM that must be refused. Each gets the
// flags of a good one, and its own after them.
func refusedCreates(dir, mac string) []refusal {
	file := func(n string) string { return filepath.Join(dir, n) }
	return []refusal{
		{"unknown host", []string{"new", "--host", "nowhere"}, 3, []string{`no host "nowhere"`}},
		{"the witness as host", []string{"new", "--host", "w"}, 4, []string{"w is a witness", "runs no VMs"}},
		{"unknown level", []string{"new", "--level", "gold"}, 2, []string{`level "gold"`, "allowed are none, ca and ft"}},
		{"reserved level ha", []string{"new", "--level", "ha"}, 2, []string{`level "ha"`, "not available in this release", "none, ca and ft"}},
		{"no memory", []string{"new", "--memory", "0"}, 2, []string{"memory", `"0"`, "above 0"}},
		{"too little memory", []string{"new", "--memory", "3M"}, 2, []string{"memory 3MiB", "16MiB to 4TiB"}},
		{"odd memory", []string{"new", "--memory", "257M"}, 2, []string{"memory 257MiB", "multiple of 2MiB"}},
		{"negative memory", []string{"new", "--memory", "-1G"}, 2, []string{"memory", `"-1G"`, "negative"}},
		{"memory without a number", []string{"new", "--memory", "much"}, 2, []string{"memory", `"much"`, "512M"}},
		{"more memory than the host has", []string{"new", "--memory", "1T"}, 2, []string{"memory 1TiB", "beyond host a", "which has"}},
		{"more memory than any host has", []string{"new", "--memory", "5T"}, 2, []string{"memory 5TiB", "16MiB to 4TiB"}},
		{"no vCPU", []string{"new", "--vcpus", "0"}, 2, []string{"vcpus 0", "1 to 64"}},
		{"too many vCPUs", []string{"new", "--vcpus", "65"}, 2, []string{"vcpus 65", "1 to 64"}},
		{"no overhead", []string{"new", "--ft-max-overhead", "0"}, 2, []string{`"0"`, "1 to 90"}},
		{"CPU model with odd characters", []string{"new", "--cpu", "max;id"}, 2, []string{`cpu "max;id"`, "CPU model"}},
		{"disk of no size", []string{"new", "--disk", "0"}, 2, []string{"disk", `"0"`, "above 0"}},
		{"disk of odd size", []string{"new", "--disk", "1048577"}, 2, []string{"disk 0", "1048577", "multiple of 4096"}},
		{"disk beyond the space", []string{"new", "--disk", "60T"}, 2, []string{"60TiB", "host a has", "free"}},
		{"disk beyond all bounds", []string{"new", "--disk", "65T"}, 2, []string{"disk 0", "65TiB", "1MiB to 64TiB"}},
		{"image that is none", []string{"new", "--image", file("letter.img")}, 2, []string{"image of disk0", "letter.img", "no disk image"}},
		{"image that is empty", []string{"new", "--image", file("empty.img")}, 2, []string{"image of disk0", "empty.img", "is empty"}},
		{"image that is torn", []string{"new", "--image", file("torn.qcow2")}, 2, []string{"image of disk0", "torn.qcow2"}},
		{"image with a backing file", []string{"new", "--image", file("over.qcow2")}, 2, []string{"over.qcow2", "backing file", "base.img", "qemu-img convert"}},
		{"image that is missing", []string{"new", "--image", file("gone.img")}, 2, []string{"gone.img", "no such file"}},
		{"image that is a directory", []string{"new", "--image", dir}, 2, []string{dir, "not a regular file"}},
		{"image of unknown format", []string{"new", "--image", file("base.img") + ",format=vhd"}, 2, []string{`"vhd"`, "raw, qcow2 and vmdk"}},
		{"disk smaller than its image", []string{"new", "--image", file("base.img") + ",size=1M"}, 2, []string{"disk0", "1MiB", "2MiB"}},
		{"kernel that is missing", []string{"new", "--kernel", file("gone")}, 2, []string{"kernel", "gone", "no such file"}},
		{"kernel that is a directory", []string{"new", "--kernel", dir}, 2, []string{"kernel", dir, "regular file"}},
		{"name in capitals", []string{"Web"}, 2, []string{`"Web"`, "a to z, 0 to 9 and -"}},
		{"name with a slash", []string{"a/../b"}, 2, []string{`"a/../b"`, "a to z, 0 to 9 and -"}},
		{"name that is a path", []string{".."}, 2, []string{`".."`, "a to z, 0 to 9 and -"}},
		{"name with a quote", []string{`a"b`}, 2, []string{`a\"b`, "a to z, 0 to 9 and -"}},
		{"name with letters of another script", []string{"büro"}, 2, []string{"büro", "a to z, 0 to 9 and -"}},
		{"name that is empty", []string{""}, 2, []string{"VM name is empty"}},
		{"name that is too long", []string{strings.Repeat("n", 41)}, 2, []string{"has 41 characters", "1 to 40"}},
		{"name that is taken", []string{"vm1"}, 4, []string{`a VM "vm1" already`}},
		{"bridge that is missing", []string{"new", "--net", "br77"}, 2, []string{`no bridge "br77"`, "host a"}},
		{"bridge with odd characters", []string{"new", "--net", "br 0;"}, 2, []string{`bridge "br 0;"`, "1 to 15 letters"}},
		{"hardware address that is none", []string{"new", "--net", lab.BridgeName + ",mac=12:34"}, 2, []string{`mac "12:34"`, "52:54:00:12:34:56"}},
		{"hardware address of a group", []string{"new", "--net", lab.BridgeName + ",mac=01:00:5e:00:00:01"}, 2, []string{"01:00:5e:00:00:01", "even"}},
		{"hardware address of another VM", []string{"new", "--net", lab.BridgeName + ",mac=" + mac}, 4, []string{mac, `VM "vm1"`}},
		{"UEFI at level ft", []string{"new", "--uefi", "--level", "ft", "--kernel="}, 4, []string{"UEFI", "level ft", "variable"}},
		{"UEFI and a kernel", []string{"new", "--uefi"}, 2, []string{"kernel", "UEFI", "exclude each other"}},
		{"flag that is unknown", []string{"new", "--colour", "red"}, 2, []string{"--colour", "--help"}},
	}
}

// TestBadInput gives the command line what is wrong: each time the answer names
// the thing, its value and what is allowed, and nothing is made. The cluster
// works on.
func TestBadInput(t *testing.T) {
	w := Start(t)
	v := w.DefineVM(VMOptions{Disks: []string{"64M"}})
	dir := aside(t)
	badImages(t, dir)
	check := w.untouched()
	t.Run("create", func(t *testing.T) {
		for _, r := range refusedCreates(dir, v.Show().NICs[0].MAC) {
			t.Run(r.name, func(t *testing.T) {
				r.args = append([]string{"vm", "create", "--kernel", suite.guest.Kernel}, r.args...)
				w.sub(t).refuse("a", r)
			})
		}
		check(w.sub(t))
	})
	t.Run("commands", func(t *testing.T) {
		for _, r := range refusedCommands {
			t.Run(r.name, func(t *testing.T) { w.sub(t).refuse("a", r) })
		}
		check(w.sub(t))
	})
	t.Run("tokens", func(t *testing.T) { w.sub(t).badTokens(dir) })
	t.Run("certificates", func(t *testing.T) { w.sub(t).badCertificates(dir) })
	t.Run("state directories", func(t *testing.T) { w.sub(t).badStateDirs(dir) })
	t.Run("host without QEMU", func(t *testing.T) { w.sub(t).badQEMU(dir) })
	check(w)
	t.Run("the cluster works on", func(t *testing.T) {
		sub := w.sub(t)
		sub.Perdure("b", "vm", "start", v.Name)
		v.in(sub).Protected()
		for _, r := range refusedOfRunning {
			t.Run(r.name, func(t *testing.T) { w.sub(t).refuse("b", r) })
		}
		tr := v.in(sub).Traffic()
		tr.Check(0, "a")
	})
}

var refusedCommands = []refusal{
	{"start of an unknown VM", []string{"vm", "start", "nobody"}, 3, []string{`no VM "nobody"`}},
	{"show of an unknown VM", []string{"vm", "show", "nobody"}, 3, []string{`no VM "nobody"`}},
	{"delete of an unknown VM", []string{"vm", "delete", "-y", "nobody"}, 3, []string{`no VM "nobody"`}},
	{"start on an unknown host", []string{"vm", "start", "vm1", "--host", "nowhere"}, 3, []string{`no host "nowhere"`}},
	{"start on a host without its disks", []string{"vm", "start", "vm1", "--host", "b"}, 4, []string{`"vm1"`, "on b", "UpToDate"}},
	{"protection by an unknown host", []string{"vm", "protect", "vm1", "--host", "nowhere"}, 3, []string{`no host "nowhere"`}},
	{"protection by the witness", []string{"vm", "protect", "vm1", "--host", "w"}, 4, []string{"w is a witness"}},
	{"takeover by an unknown host", []string{"vm", "takeover", "vm1", "--on", "nowhere"}, 3, []string{`no host "nowhere"`}},
	{"switchover of a stopped VM", []string{"vm", "switchover", "vm1"}, 4, []string{`"vm1"`, "stopped"}},
	{"stop of a stopped VM", []string{"vm", "stop", "vm1"}, 4, []string{`"vm1"`, "stopped"}},
	{"pause of a stopped VM", []string{"vm", "pause", "vm1"}, 4, []string{`"vm1"`, "stopped"}},
	{"console of a stopped VM", []string{"vm", "console", "vm1"}, 4, []string{`"vm1"`, "stopped"}},
	{"unknown condition", []string{"vm", "wait", "vm1", "--for", "colour=red"}, 2, []string{`"colour"`, "state"}},
	{"wait that ends", []string{"vm", "wait", "vm1", "--for", "running", "--timeout", "1s"}, 6, []string{"vm1", "1s", "stopped"}},
	{"unknown form of output", []string{"vm", "list", "-o", "xml"}, 2, []string{`"xml"`, "table, wide, json"}},
	{"unknown command", []string{"vm", "paint", "vm1"}, 2, []string{`"paint"`}},
	{"no VM named", []string{"vm", "start"}, 2, []string{"NAME"}},
	{"unknown host shown", []string{"host", "show", "nowhere"}, 3, []string{`no host "nowhere"`}},
	{"agent that does not answer", []string{"vm", "list", "--socket", "/nonexistent/agent.sock"}, 5, []string{"/nonexistent/agent.sock"}},
	{"token for too long", []string{"token", "create", "--ttl", "9000h"}, 2, []string{"9000h", "720h"}},
}

var refusedOfRunning = []refusal{
	{"start of what runs", []string{"vm", "start", "vm1"}, 4, []string{`"vm1" is not stopped`}},
	{"delete of what runs", []string{"vm", "delete", "-y", "vm1"}, 4, []string{`"vm1" is not stopped`, "vm stop vm1"}},
	{"protection by an unknown host", []string{"vm", "protect", "vm1", "--host", "nowhere"}, 3, []string{`no host "nowhere"`}},
	{"protection by its own host", []string{"vm", "protect", "vm1", "--host", "a"}, 4, []string{`"vm1"`, "second copy on b already", "--off"}},
	{"switchover to an unknown host", []string{"vm", "switchover", "vm1", "--to", "nowhere"}, 3, []string{`no host "nowhere"`}},
}

// extra describes a further host, made on a lab host beside what runs there:
// its state directory and the ports it uses.
func (w *World) extra(host, dir, name string, base int) []string {
	addr, err := w.Lab.Addr(host)
	w.must(err, "find address")
	return []string{"--state-dir", filepath.Join(dir, name), "--name", name, "--address", addr.String(),
		"--api-port", fmt.Sprint(base), "--etcd-peer-port", fmt.Sprint(base + 1), "--etcd-client-port", fmt.Sprint(base + 2)}
}

// absent fails where something was left in a directory that should not have been made.
func absent(t *testing.T, dir string) {
	t.Helper()
	if ents, err := os.ReadDir(dir); err == nil {
		t.Errorf("%s was left behind with %v", dir, ents)
	}
}

// agent runs an agent in the background until the test ends, and returns its client.
func (w *World) agent(host, state string) *api.Client {
	w.T.Helper()
	ctx, cancel := context.WithCancel(w.Ctx)
	cmd := w.Lab.Command(ctx, host, "perdure", "agent", "--state-dir", state)
	log := &bytes.Buffer{}
	cmd.Stdout, cmd.Stderr = log, log
	w.must(cmd.Start(), "start agent")
	c, err := api.New(api.Options{Socket: filepath.Join(state, "run", "agent.sock")})
	w.must(err, "make API client")
	w.T.Cleanup(func() {
		c.Close()
		cancel()
		_ = cmd.Wait() // killed
		if w.T.Failed() {
			w.T.Logf("--- agent of %s\n%s", state, log)
		}
	})
	w.Eventually(30*time.Second, "agent of "+state+" answers", func() error {
		got, err := c.Cluster(w.Ctx)
		if err == nil && !got.Quorum {
			err = errors.New("no quorum yet")
		}
		return err
	})
	return c
}

// badTokens joins with tokens that let nobody in. The good one is spent in a
// small cluster beside that of the lab.
func (w *World) badTokens(dir string) {
	w.T.Helper()
	token := func(args ...string) string {
		return strings.TrimSpace(w.Perdure("a", append([]string{"token", "create"}, args...)...))
	}
	good := token()
	short := token("--ttl", "1s")
	forge := func(change func(*pki.Token)) string {
		t, err := pki.ParseToken(good, time.Now())
		w.must(err, "parse token")
		change(&t)
		return t.String()
	}
	stranger, err := pki.NewCA("stranger", time.Now())
	w.must(err, "make CA")
	print, err := pki.Fingerprint(stranger.CertPEM())
	w.must(err, "take fingerprint")
	t, err := pki.ParseToken(short, time.Now())
	if err == nil { // else it has ended already
		w.Eventually(5*time.Second, "the token ends", func() error {
			if time.Now().Before(t.Expires) {
				return errors.New("it is valid yet")
			}
			return nil
		})
	}
	for _, c := range []struct {
		refusal
		token string
	}{
		{refusal{"malformed", nil, 2, []string{"token is malformed", "perdure-join-"}}, "gibberish"},
		{refusal{"cut off", nil, 2, []string{"token is malformed"}}, good[:len(good)-7]},
		{refusal{"of another version", nil, 2, []string{"version", `"9"`}}, strings.Replace(good, "join-1-", "join-9-", 1)},
		{refusal{"expired", nil, 2, []string{"expired", "make a new one"}}, short},
		{refusal{"for a witness", nil, 2, []string{"a witness", "a host"}}, token("--witness")},
		{refusal{"of an authority that is not the cluster's", nil, 7, []string{"authority", "nothing was sent"}}, forge(func(t *pki.Token) { t.CA = print })},
		{refusal{"that nobody made", nil, 7, []string{"unknown or was used"}}, forge(func(t *pki.Token) { t.ID = "0123456789ab" })},
		{refusal{"with a wrong secret", nil, 7, []string{"token"}}, forge(func(t *pki.Token) { t.Secret = strings.Repeat("0", len(t.Secret)) })},
		{refusal{"of a cluster that does not answer", nil, 5, []string{"10.77.0.251:7400"}}, forge(func(t *pki.Token) { t.Addrs = []string{"10.77.0.251:7400"} })},
	} {
		w.T.Run(c.name, func(t *testing.T) {
			c.args = append([]string{"join", c.token}, w.extra("b", dir, "never", 7500)...)
			w.sub(t).refuse("b", c.refusal)
			absent(t, filepath.Join(dir, "never"))
		})
	}
	w.T.Run("used twice", func(t *testing.T) { w.sub(t).spentToken(dir) })
	w.WaitCluster()
	if out := w.Perdure("a", "host", "list"); strings.Contains(out, "never") {
		w.T.Errorf("a host that was refused is listed:\n%s", out)
	}
}

// spentToken lets one host into a cluster, and with the same token a second.
func (w *World) spentToken(dir string) {
	w.T.Helper()
	first, second, third := filepath.Join(dir, "one"), filepath.Join(dir, "two"), filepath.Join(dir, "three")
	w.Perdure("a", append([]string{"init"}, w.extra("a", dir, "one", 7500)...)...)
	w.agent("a", first)
	token := strings.TrimSpace(w.Perdure("a", "token", "create", "--socket", filepath.Join(first, "run", "agent.sock")))
	w.Perdure("b", append([]string{"join", token}, w.extra("b", dir, "two", 7500)...)...)
	w.agent("b", second)
	w.refuse("b", refusal{"", append([]string{"join", token}, w.extra("b", dir, "three", 7600)...), 7, []string{"unknown or was used already", "make a new one"}})
	absent(w.T, third)
}

// badCertificates asks the cluster over TLS with certificates and authorities
// of another one, and starts a host that has another's authority.
func (w *World) badCertificates(dir string) {
	w.T.Helper()
	stranger := filepath.Join(dir, "stranger")
	w.Perdure("a", append([]string{"init"}, w.extra("a", dir, "stranger", 7900)...)...)
	own, theirs := filepath.Join(w.Lab.StateDir("a"), "pki"), filepath.Join(stranger, "pki")
	addr, err := w.Lab.Addr("a")
	w.must(err, "find address")
	server := addr.String() + ":7400"
	// The lab's environment names the socket, which a flag overrules.
	ask := func(cert, key, ca string) []string {
		return []string{"host", "list", "--server", server, "--cert", cert, "--key", key, "--ca", ca}
	}
	crt, key, ca := filepath.Join(own, "host.crt"), filepath.Join(own, "host.key"), filepath.Join(own, "ca.crt")
	if out := w.Perdure("b", ask(crt, key, ca)...); !strings.Contains(out, "alive") {
		w.T.Errorf("with the right certificates it says:\n%s", out)
	}
	odd := filepath.Join(theirs, "ca.crt")
	for _, r := range []refusal{
		{"certificate of another cluster", ask(filepath.Join(theirs, "host.crt"), filepath.Join(theirs, "host.key"), ca), 7, []string{"no client certificate of this cluster", "to do:"}},
		{"authority of another cluster", ask(crt, key, odd), 7, []string{server, "certificate of another cluster", "--ca"}},
		{"key of another certificate", ask(crt, filepath.Join(theirs, "host.key"), ca), 2, []string{"client certificate", "does not match"}},
		{"authority that is none", ask(crt, key, filepath.Join(stranger, "version")), 2, []string{"version", "no certificate"}},
		{"authority that is missing", ask(crt, key, "/nonexistent/ca.crt"), 2, []string{"/nonexistent/ca.crt", "no such file"}},
		{"no certificate", []string{"host", "list", "--server", server}, 2, []string{"--cert, --key and --ca"}},
	} {
		w.T.Run(r.name, func(t *testing.T) { w.sub(t).refuse("b", r) })
	}
	w.T.Run("agent with the authority of another cluster", func(t *testing.T) {
		sub := w.sub(t)
		b, err := os.ReadFile(ca)
		sub.must(err, "read authority")
		sub.must(os.WriteFile(odd, b, 0o600), "replace authority")
		sub.refuse("a", refusal{"", []string{"agent", "--state-dir", stranger}, 4, []string{theirs, "do not belong together", "to do:"}})
	})
}

// badStateDirs starts agents from, and makes hosts in, directories that are of no use.
func (w *World) badStateDirs(dir string) {
	w.T.Helper()
	other, none, used, busy := filepath.Join(dir, "other"), filepath.Join(dir, "none"), filepath.Join(dir, "used"), filepath.Join(dir, "busy")
	for _, n := range []string{"other", "busy"} {
		w.Perdure("a", append([]string{"init"}, w.extra("a", dir, n, 7700)...)...)
	}
	w.must(os.WriteFile(filepath.Join(other, "version"), []byte("99\n"), 0o600), "write version")
	w.must(os.MkdirAll(filepath.Join(used, "etcd"), 0o700), "make directory")
	version := []string{other, `format "99"`, "reads format 1 only", "to do:"}
	for _, r := range []refusal{
		{"agent on another version", []string{"agent", "--state-dir", other}, 4, version},
		{"witness on another version", []string{"witness", "--state-dir", other}, 4, version},
		{"init on another version", append([]string{"init"}, w.extra("a", dir, "other", 7700)...), 4, version},
		{"agent without a state directory", []string{"agent", "--state-dir", none}, 4, []string{none, "no host of a cluster", "perdure init", "perdure join"}},
		{"agent on a directory in use", []string{"agent", "--state-dir", w.Lab.StateDir("a")}, 4, []string{"another agent", w.Lab.StateDir("a")}},
		{"init on a host", append([]string{"init"}, w.extra("a", dir, "busy", 7700)...), 4, []string{busy, "belongs to a host", "--state-dir"}},
		{"init in a directory that is used", append([]string{"init"}, w.extra("a", dir, "used", 7700)...), 4, []string{used, "not empty", "etcd"}},
		{"init without an address", []string{"init", "--name", "x", "--state-dir", none}, 2, []string{"address", "--address IP"}},
		{"init with an address that is none", []string{"init", "--name", "x", "--state-dir", none, "--address", "hosta"}, 2, []string{"lan.address", "hosta"}},
		{"init with another machine's address", []string{"init", "--name", "x", "--state-dir", none, "--address", "192.0.2.1"}, 4, []string{"192.0.2.1", "this machine's own"}},
		{"init on a port that is taken", append([]string{"init"}, w.extra("a", dir, "none", 7400)...), 4, []string{":740", "address already in use", "free the port"}},
		{"init with a name that is not allowed", append([]string{"init"}, append(w.extra("a", dir, "none", 7700), "--name", "Host A")...), 2, []string{`Host A`}},
	} {
		w.T.Run(r.name, func(t *testing.T) {
			sub := w.sub(t)
			sub.refuse("a", r)
			absent(t, none)
		})
	}
	w.T.Run("agent whose port is taken", func(t *testing.T) {
		sub := w.sub(t)
		for _, port := range []int{7700, 7701, 7702} {
			addr, err := sub.Lab.Addr("a")
			sub.must(err, "find address")
			var l io.Closer
			sub.must(sub.Lab.InNetNS("a", func() (err error) { l, err = listen(addr.String(), port); return err }), "take port")
			sub.refuse("a", refusal{"", []string{"agent", "--state-dir", busy}, 4, []string{fmt.Sprintf("%v:%d", addr, port), "address already in use"}})
			l.Close()
		}
		sub.agent("a", busy) // what did not start before starts now
	})
}

// badQEMU makes a host whose QEMU is not there.
func (w *World) badQEMU(dir string) {
	w.T.Helper()
	state := filepath.Join(dir, "noqemu")
	w.Perdure("a", append([]string{"init", "--qemu", "/nonexistent/qemu"}, w.extra("a", dir, "noqemu", 7800)...)...)
	w.agent("a", state)
	sock := filepath.Join(state, "run", "agent.sock")
	w.refuse("a", refusal{"", []string{"vm", "create", "new", "--kernel", suite.guest.Kernel, "--socket", sock}, 4,
		[]string{"host noqemu", "no QEMU that can be used", "/nonexistent/qemu", "perdure doctor"}})
	w.refuse("a", refusal{"", []string{"vm", "start", "new", "--socket", sock}, 3, []string{`no VM "new"`}})
	if ents, err := os.ReadDir(filepath.Join(state, "vms")); err != nil || len(ents) > 0 {
		w.T.Errorf("left in vms: %v, %v", ents, err)
	}
	out, _, exit := w.said("a", "doctor", "--quick", "--qemu", "/nonexistent/qemu", "--state-dir", state)
	if exit != 1 || !regexp.MustCompile(`(?m)^.*qemu.*failed.*/nonexistent/qemu`).MatchString(out) && !strings.Contains(out, "/nonexistent/qemu") {
		w.T.Errorf("doctor: exit %d:\n%s", exit, out)
	}
}

func listen(addr string, port int) (io.Closer, error) {
	return net.Listen("tcp4", net.JoinHostPort(addr, fmt.Sprint(port)))
}

// cover mounts something over a path in a host's mount namespace, until the
// test ends or uncover is called.
func (w *World) cover(host, path, mount string) (uncover func()) {
	w.T.Helper()
	w.on(host, mount+" "+path)
	gone := false
	uncover = func() {
		w.T.Helper()
		if gone {
			return
		}
		gone = true
		// Not by w.Ctx: it has ended when a test cleans up.
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if _, err := w.Lab.Output(ctx, host, "umount", "-l", path); err != nil {
			w.T.Errorf("uncover %s: %v", path, err)
		}
	}
	w.T.Cleanup(uncover)
	return uncover
}

// failStart starts a stopped VM that cannot start: it says why. Given up, the VM
// is stopped with nothing left of the attempts.
func (v *VM) failStart(host string, exit int, say ...string) {
	v.w.T.Helper()
	check := v.w.untouched()
	v.w.refuse(host, refusal{"", []string{"vm", "start", v.Name, "--timeout", "30s"}, exit, say})
	if ps := v.Show().Problems; len(ps) == 0 {
		v.w.T.Error("the VM that did not start has no problem named")
	}
	v.w.Perdure(host, "vm", "kill", v.Name) // else it is tried again and again
	v.Wait("state=stopped,mode=stopped,problem=none", 20*time.Second)
	check(v.w)
}

// TestBadInputHosts takes from the hosts what VMs need there: each time the
// failure names it, and the VM starts, or is protected, as soon as it is back.
func TestBadInputHosts(t *testing.T) {
	w := Start(t)
	v := w.DefineVM(VMOptions{Disks: []string{"64M"}})
	t.Run("QEMU that does not run", func(t *testing.T) {
		sub := w.sub(t)
		defer sub.cover("a", "/usr/bin/qemu-system-x86_64", "mount --bind /dev/null")()
		v.in(sub).failStart("a", 1, v.Name, "did not start", "/usr/bin/qemu-system-x86_64", "permission denied")
	})
	t.Run("no FUSE on the primary's host", func(t *testing.T) {
		sub := w.sub(t)
		defer sub.cover("a", "/dev/fuse", "mount --bind /dev/null")()
		v.in(sub).failStart("a", 1, v.Name, "did not start", "/dev/fuse")
	})
	t.Run("no bridge on the primary's host", func(t *testing.T) {
		sub := w.sub(t)
		sub.on("a", "ip link set br0 name br9 2>/dev/null || { ip link set br0 down && ip link set br0 name br9; }")
		defer sub.on("a", "ip link set br9 down; ip link set br9 name br0 && ip link set br0 up")
		v.in(sub).failStart("a", 1, v.Name, "did not start", "br0")
	})
	t.Run("CPU model that QEMU does not know", func(t *testing.T) {
		sub := w.sub(t)
		odd := sub.DefineVM(VMOptions{Disks: []string{"1M"}, Flags: []string{"--cpu", "abacus"}})
		odd.failStart("a", 1, odd.Name, "did not start", "abacus")
	})
	t.Run("no FUSE on the secondary's host", func(t *testing.T) {
		sub := w.sub(t)
		v := v.in(sub)
		uncover := sub.cover("b", "/dev/fuse", "mount --bind /dev/null")
		sub.Perdure("a", "vm", "start", v.Name)
		v.named("host b", "level ft needs /dev/fuse")
		v.Say("clock")
		uncover()
		v.Protected()
		if ps := v.Show().Problems; len(ps) > 0 {
			t.Errorf("problems left: %v", ps)
		}
	})
}

// named waits until a problem of a VM has all these words.
func (v *VM) named(words ...string) {
	v.w.T.Helper()
	v.w.Eventually(30*time.Second, fmt.Sprintf("a problem that names %q", words), func() error {
		ps := v.Show().Problems
		for _, p := range ps {
			if !slices.ContainsFunc(words, func(s string) bool { return !strings.Contains(p.Text, s) }) {
				v.w.T.Logf("problem %s: %s (to do: %s)", p.Code, p.Text, p.Action)
				return nil
			}
		}
		return fmt.Errorf("problems: %+v", ps)
	})
}

// TestBadInputDiskFull fills the disk of a host under a VM.
func TestBadInputDiskFull(t *testing.T) {
	const small = "mount -t tmpfs -o size=40m,mode=700 none"
	w := Start(t)
	vms := func(h string) string { return filepath.Join(w.Lab.StateDir(h), "vms") }
	grow := func(w *World, h, size string) { w.on(h, "mount -o remount,size="+size+" "+vms(h)) }
	ballast := func(w *World, h string) func() {
		w.on(h, fmt.Sprintf("dd if=/dev/zero of=%s/.ballast bs=64k 2>/dev/null; true", vms(h)))
		return func() { w.on(h, fmt.Sprintf("rm -f %s/.ballast", vms(h))) }
	}
	for _, h := range w.Lab.Hosts() {
		w.cover(h, vms(h), small)
	}
	t.Run("no room for a new VM", func(t *testing.T) {
		sub := w.sub(t)
		check := sub.untouched()
		sub.refuse("a", refusal{"", []string{"vm", "create", "new", "--disk", "64M"}, 2, []string{"need 64MiB", "host a has", "free", sub.Lab.StateDir("a")}})
		check(sub)
	})
	grow(w, "a", "200m")
	v := w.DefineVM(VMOptions{Disks: []string{"64M"}})
	w.Perdure("a", "vm", "start", v.Name)
	t.Run("no room for the second copy", func(t *testing.T) {
		sub := w.sub(t)
		v.in(sub).named("without a second copy", "40 MiB", "64 MiB")
		v.in(sub).Say("clock")
		grow(sub, "b", "200m")
		v.in(sub).Protected()
	})
	t.Run("the secondary's disk full", func(t *testing.T) {
		sub := w.sub(t)
		v := v.in(sub)
		tr := v.Traffic()
		relieve := ballast(sub, "b")
		v.SayLines("sh busybox dd if=/dev/urandom of=/data/fill bs=64k count=160 && busybox sync")
		v.named("without a second copy", "host b", "disk space are free")
		tr.Resume()
		relieve()
		v.Protected()
		tr.Flow(20)
		tr.Check(0, "a")
	})
	if t.Failed() {
		return // the next need a whole pair
	}
	t.Run("the primary's disk full", func(t *testing.T) {
		sub := w.sub(t)
		v := v.in(sub)
		tr := v.Traffic()
		relieve := ballast(sub, "a")
		v.SayLines("sh busybox dd if=/dev/urandom of=/data/fill2 bs=64k count=160 && busybox sync")
		tr.Resume()
		v.Wait("state=running,primary=b", 20*time.Second)
		relieve()
		v.Protected()
		tr.Flow(20)
		tr.Check(0, "a", "b")
	})
	if t.Failed() {
		return
	}
	t.Run("the only disk full", func(t *testing.T) {
		sub := w.sub(t)
		v := v.in(sub)
		sub.Perdure("b", "vm", "protect", v.Name, "--off")
		v.Wait("state=running,mode=simplex", 20*time.Second)
		tr := v.Traffic()
		relieve := ballast(sub, "b")
		v.Tell("sh busybox dd if=/dev/urandom of=/data/fill3 bs=64k count=160; busybox sync")
		v.Wait("state=fault", 30*time.Second)
		v.named("disk0", "o space left")
		relieve()
		sub.Perdure("b", "vm", "resume", v.Name)
		v.Wait("state=running,problem!=disk-error", 20*time.Second)
		tr.Resume()
		tr.Check(0, "b")
	})
}
