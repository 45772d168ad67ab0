package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"perdure/api"
	"perdure/internal/lab"
	"perdure/internal/testenv"
)

// World is the lab as one test sees it. Its methods end the test when they fail.
type World struct {
	T   *testing.T
	Ctx context.Context // ends with the test
	Lab *lab.Lab

	vms int // made by this test

	apis map[string]*api.Client // by host
}

// testLimit bounds one test, so that a stuck one shows where it is stuck
// instead of taking the others' time.
const testLimit = 8 * time.Minute

// Start gives the test a whole lab: every host on, every link up, three voters
// alive, no VM. On failure of the test the ends of all logs are shown.
func Start(t *testing.T) *World {
	t.Helper()
	testenv.QEMU(t)
	testenv.Tool(t, "nsenter")
	testenv.Slow(t)
	began := time.Now()
	if err := suite.build(); err != nil {
		t.Fatal(err)
	}
	built := time.Since(began)
	ctx, cancel := context.WithTimeoutCause(t.Context(), testLimit, fmt.Errorf("the test took longer than %v", testLimit))
	t.Cleanup(cancel)
	w := &World{T: t, Ctx: ctx, apis: map[string]*api.Client{}}
	w.makeWhole()
	if d := time.Since(began); d > 5*time.Second {
		t.Logf("built in %v, lab whole after %v", built.Round(time.Millisecond), d.Round(time.Millisecond))
	}
	t.Cleanup(func() {
		if t.Failed() {
			w.showLogs()
		}
	})
	return w
}

// makeWhole repairs the shared lab, or makes a new one where that fails.
func (w *World) makeWhole() {
	w.T.Helper()
	for try := range 2 {
		err := suite.up(w.Ctx)
		if err != nil {
			w.T.Fatalf("make lab: %v", err)
		}
		w.Lab = suite.lab
		if err = w.heal(); err == nil {
			return
		}
		w.T.Logf("the lab cannot be made whole (try %d): %v", try, err)
		w.showLogs()
		if err := suite.lab.Down(w.Ctx); err != nil {
			w.T.Fatalf("remove lab: %v", err)
		}
		suite.lab = nil
	}
	w.T.Fatal("two labs could not be made whole")
}

func (w *World) heal() error {
	st, err := w.Lab.Status()
	if err != nil {
		return err
	}
	for _, s := range st {
		for _, link := range s.DownLinks {
			if err := w.Lab.SetLink(s.Name, link, true); err != nil {
				return err
			}
		}
		switch s.Power {
		case "frozen":
			err = w.Lab.Thaw(w.Ctx, s.Name)
		case "off":
			err = w.Lab.PowerOn(w.Ctx, s.Name)
		}
		if err != nil {
			return err
		}
	}
	ctx, cancel := context.WithTimeout(w.Ctx, time.Minute)
	defer cancel()
	for _, h := range w.Lab.Hosts() {
		if err := w.Lab.WaitMembers(ctx, h, w.Lab.Members()...); err != nil {
			return err
		}
	}
	return w.removeVMs(ctx)
}

func (w *World) removeVMs(ctx context.Context) error {
	c := w.API(w.Lab.Hosts()[0])
	vms, err := c.VMs(ctx)
	if err != nil {
		return err
	}
	for _, vm := range vms {
		if err := removeVM(ctx, c, vm.Name); err != nil {
			return err
		}
	}
	return nil
}

func removeVM(ctx context.Context, c *api.Client, name string) error {
	patience := time.Now().Add(10 * time.Second) // for what is still ending by itself
	for {
		vm, err := c.VM(ctx, name)
		if err != nil && api.ClassOf(err) == api.NotFound {
			return nil
		}
		if err == nil && vm.Mode == "stopped" {
			err = c.DeleteVM(ctx, name, api.DeleteVM{Force: time.Now().After(patience)})
		} else if err == nil {
			err = c.KillVM(ctx, name)
		}
		if err != nil && ctx.Err() != nil {
			return fmt.Errorf("remove VM %s: %w", name, err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("remove VM %s: %w", name, context.Cause(ctx))
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// showLogs prints the end of every log of the lab.
func (w *World) showLogs() {
	if w.Lab == nil {
		return
	}
	var files []string
	for _, p := range []string{"*/agent.log", "*/state/vms/*/shim.log"} {
		m, _ := filepath.Glob(filepath.Join(w.Lab.Dir(), p))
		files = append(files, m...)
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil || len(b) == 0 {
			continue
		}
		lines := strings.Split(strings.TrimSpace(string(b)), "\n")
		rel, _ := filepath.Rel(w.Lab.Dir(), f)
		w.T.Logf("--- %s (last of %d lines)\n%s", rel, len(lines), strings.Join(lines[max(0, len(lines)-40):], "\n"))
	}
}

// must ends the test on an error.
func (w *World) must(err error, what string) {
	w.T.Helper()
	if err != nil {
		w.T.Fatalf("%s: %v", what, err)
	}
}

// API returns a client of a host's agent, over its socket.
func (w *World) API(host string) *api.Client {
	w.T.Helper()
	if c := w.apis[host]; c != nil {
		return c
	}
	c, err := api.New(api.Options{Socket: filepath.Join(w.Lab.StateDir(host), "run", "agent.sock")})
	w.must(err, "make API client")
	w.apis[host] = c
	w.T.Cleanup(c.Close)
	return c
}

// AnyHost returns a host that is on and not frozen.
func (w *World) AnyHost() string {
	w.T.Helper()
	st, err := w.Lab.Status()
	w.must(err, "read lab status")
	for _, s := range st {
		if s.Role == lab.RoleHost && s.Power == "on" && !slices.Contains(s.DownLinks, lab.LAN) {
			return s.Name
		}
	}
	w.T.Fatal("no host is on and connected")
	return ""
}

// Other returns the host that is not this one.
func (w *World) Other(host string) string {
	for _, h := range w.Lab.Hosts() {
		if h != host {
			return h
		}
	}
	return ""
}

// Perdure runs the command line on a host and returns what it printed.
func (w *World) Perdure(host string, args ...string) string {
	w.T.Helper()
	out, err := w.TryPerdure(host, args...)
	w.must(err, "perdure "+strings.Join(args, " "))
	return out
}

// TryPerdure is Perdure for what may fail; the error holds what was said.
func (w *World) TryPerdure(host string, args ...string) (string, error) {
	out, err := w.Lab.Output(w.Ctx, host, append([]string{"perdure"}, args...)...)
	return string(out), err
}

// Eventually waits until fn returns nil.
func (w *World) Eventually(limit time.Duration, what string, fn func() error) {
	w.T.Helper()
	ctx, cancel := context.WithTimeout(w.Ctx, limit)
	defer cancel()
	for {
		err := fn()
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			w.T.Fatalf("%s: not within %v: %v", what, limit, err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// Never fails the test when fn returns an error at any time during d.
func (w *World) Never(d time.Duration, what string, fn func() error) {
	w.T.Helper()
	for end := time.Now().Add(d); time.Now().Before(end); {
		if err := fn(); err != nil {
			w.T.Fatalf("%s: %v", what, err)
		}
		select {
		case <-w.Ctx.Done():
			w.T.Fatal(context.Cause(w.Ctx))
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// PowerOff takes a host's power.
func (w *World) PowerOff(host string) {
	w.T.Helper()
	w.must(w.Lab.PowerOff(w.Ctx, host), "power off")
}

// PowerOn gives it back.
func (w *World) PowerOn(host string) {
	w.T.Helper()
	w.must(w.Lab.PowerOn(w.Ctx, host), "power on")
}

// Freeze lets a host hang.
func (w *World) Freeze(host string) { w.T.Helper(); w.must(w.Lab.Freeze(w.Ctx, host), "freeze") }

// Thaw lets it go on.
func (w *World) Thaw(host string) { w.T.Helper(); w.must(w.Lab.Thaw(w.Ctx, host), "thaw") }

// Link takes a host's links down or up.
func (w *World) Link(up bool, host string, links ...string) {
	w.T.Helper()
	for _, l := range links {
		w.must(w.Lab.SetLink(host, l, up), "set link")
	}
}

// CutOff takes all links of a host down, and Reconnect up.
func (w *World) CutOff(host string)    { w.T.Helper(); w.Link(false, host, allLinks...) }
func (w *World) Reconnect(host string) { w.T.Helper(); w.Link(true, host, allLinks...) }

var allLinks = []string{lab.LAN, "alink0", "alink1"}

// KillAgent kills the agent of a host and waits until its successor answers.
func (w *World) KillAgent(host string) {
	w.T.Helper()
	p, err := w.Lab.Agent(host)
	w.must(err, "find agent")
	w.signal(p, syscall.SIGKILL)
	w.must(p.Gone(w.Ctx), "wait for the agent's end")
	w.Eventually(30*time.Second, "agent of "+host+" answers again", func() error {
		_, err := w.API(host).Cluster(w.Ctx)
		return err
	})
}

func (w *World) signal(p lab.Process, s syscall.Signal) {
	w.T.Helper()
	w.must(p.Signal(s), "send signal")
}

// WaitCluster waits until all members are alive again.
func (w *World) WaitCluster() {
	w.T.Helper()
	ctx, cancel := context.WithTimeout(w.Ctx, time.Minute)
	defer cancel()
	w.must(w.Lab.WaitMembers(ctx, w.AnyHost(), w.Lab.Members()...), "cluster")
}
