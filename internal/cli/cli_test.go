package cli_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spf13/cobra"

	"perdure/api"
	"perdure/internal/cli"
	"perdure/internal/doctor"
	"perdure/internal/httpapi"
	"perdure/internal/httpapi/apitest"
	"perdure/internal/model"
)

// hooks stand in for what main injects; they say what they were given.
func hooks() cli.Hooks {
	return cli.Hooks{
		Version: "0.1.0", Revision: "abc123",
		Init: func(_ context.Context, o cli.InitOptions) error {
			fmt.Fprintf(o.Out, "init %s %s %s %v %s\n", o.Cluster, o.Config.Name, o.Config.LAN.Address, o.Config.ALinkAddrs(), o.Config.StateDir)
			return nil
		},
		Join: func(_ context.Context, o cli.JoinOptions) error {
			if o.Token != "good" {
				return api.Errorf(api.Forbidden, "token has expired").WithAction("make a new one: perdure token create")
			}
			fmt.Fprintf(o.Out, "join %s\n", o.Config.Name)
			return nil
		},
		Witness: func(_ context.Context, o cli.WitnessOptions) error {
			fmt.Fprintf(o.Log.Out, "witness token=%q state=%s role=%s\n", o.Token, o.StateDir, o.Config.Role)
			return nil
		},
		Agent: func(ctx context.Context, o cli.AgentOptions) error {
			fmt.Fprintf(o.Log.Out, "agent %s %s\n", o.StateDir, o.Log.Level)
			return nil
		},
		Shim: func(_ context.Context, o cli.ShimOptions) error {
			fmt.Fprintln(o.Log.Out, "shim", o.Dir)
			return nil
		},
		Flusher: func(_ context.Context, args []string) error {
			fmt.Println("flusher", strings.Join(args, " "))
			return nil
		},
		Checks: func(o cli.DoctorOptions) []doctor.Check {
			return []doctor.Check{{Name: "qemu", Run: func(context.Context) doctor.Result {
				if o.QEMU == "/nonexistent" {
					return doctor.Result{Level: doctor.Failed, Text: "QEMU is not at /nonexistent", Action: "make setup installs it"}
				}
				return doctor.Result{Level: doctor.OK, Text: "QEMU 7.2"}
			}}}
		},
		Commands: []*cobra.Command{{Use: "lab", Short: "Several hosts on one machine", Run: func(*cobra.Command, []string) { fmt.Println("lab") }}},
	}
}

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"perdure": func() {
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
		defer stop()
		os.Exit(cli.Main(ctx, hooks(), cli.StdStreams(), os.Args[1:]))
	}})
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: false,
		UpdateScripts:       os.Getenv("UPDATE_SCRIPTS") == "1",
		Setup: func(env *testscript.Env) error {
			f := apitest.New()
			sock := filepath.Join(env.WorkDir, "agent.sock")
			ln, err := net.Listen("unix", sock)
			if err != nil {
				return err
			}
			ctx, cancel := context.WithCancel(context.Background())
			done := make(chan error, 1)
			go func() { done <- httpapi.New(httpapi.Options{Service: f, Version: "0.1.0"}).Serve(ctx, ln) }()
			env.Defer(func() { cancel(); <-done })
			env.Setenv("PERDURE_SOCKET", sock)
			env.Setenv("TZ", "UTC")
			env.Values["fake"] = f
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"fake": fakeCommand, "exitcode": exitCode},
	})
}

// exitCode runs a command that must end with the given code: exitcode N CMD ARG….
func exitCode(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exitcode N CMD ARG…")
	}
	err := ts.Exec(args[1], args[2:]...)
	code := 0
	if err != nil {
		e, ok := err.(interface{ ExitCode() int })
		if !ok {
			ts.Fatalf("%v", err)
		}
		code = e.ExitCode()
	}
	if want, _ := strconv.Atoi(args[0]); code != want {
		ts.Fatalf("exit code %d, want %d", code, want)
	}
}

// fakeCommand changes the cluster behind the command line.
func fakeCommand(ts *testscript.TestScript, _ bool, args []string) {
	f := ts.Value("fake").(*apitest.Fake)
	f.Update(func(f *apitest.Fake) {
		switch args[0] {
		case "protected": // NAME: a VM of level ft, duplex
			f.VMList[args[1]] = apitest.Protected(args[1])
		case "set": // NAME KEY=VALUE…
			for _, kv := range args[2:] {
				set(ts, f.VMList[args[1]], kv)
			}
		case "fail": // METHOD CLASS TEXT
			f.Fail[args[1]] = &apitest.Failure{Err: api.Errorf(api.Class(args[2]), "%s", args[3]).WithAction("look again"), Count: -1}
		case "ok": // METHOD
			delete(f.Fail, args[1])
		case "quorum":
			f.Info.Quorum, f.Info.Leader = args[1] == "yes", ""
		case "host": // NAME STATE
			for i := range f.HostList {
				if f.HostList[i].Name == args[1] {
					f.HostList[i].State = api.HostState(args[2])
				}
			}
		case "event": // VM HOST TYPE SEQ MS TEXT
			seq, _ := strconv.ParseUint(args[4], 10, 64)
			took, _ := strconv.ParseFloat(args[5], 64)
			f.EventLog = append(f.EventLog, model.Event{Seq: seq, Time: apitest.Epoch().Add(time.Duration(seq) * time.Second), Host: args[2], VM: args[1], Type: args[3], Term: 7, Epoch: 12, DurationMS: took, Text: args[6]})
		case "console": // HISTORY
			f.ConsoleFunc = func() (io.ReadWriteCloser, error) { return apitest.Echo(args[1] + "\n") }
		case "risk": // SAFE POSSIBLE FROM
			f.Risk = api.TakeoverRisk{Safe: args[1] == "yes", Possible: args[2] == "yes", From: args[3], Replica: model.Outdated, ReplicaTerm: 5, RecordTerm: 9, Primary: "hosta",
				BehindMS: 83_000, LastEpoch: 411, Losses: []string{"writes of the last 83 s on disk0 (about 120 MiB)"}}
		case "finds": // WHAT…: the next verify finds blocks that end so
			whats := args[1:]
			f.Finds = func(d *model.VerifiedDisk) {
				for n, what := range whats {
					d.Mismatches++
					switch what {
					case "repaired":
						d.Repaired++
					case "rewritten":
						d.Rewritten++
					default:
						d.Left++
					}
					d.Ranges = append(d.Ranges, model.VerifiedRange{Off: int64(n) << 16, Len: 4096, What: what, Host: "hostb", Why: "it does not match its checksum"})
				}
			}
		case "split":
			f.Split = fakeSplit()
		case "slow": // N
			f.SlowOps, _ = strconv.Atoi(args[1])
		case "called": // TEXT: fails unless a call begins with it
			for _, c := range f.Calls {
				if strings.HasPrefix(c, args[1]) {
					return
				}
			}
			ts.Fatalf("%q was not called: %q", args[1], f.Calls)
		default:
			ts.Fatalf("fake %s is not known", args[0])
		}
	})
}

func set(ts *testscript.TestScript, vm *api.VM, kv string) {
	key, v, _ := strings.Cut(kv, "=")
	switch key {
	case "state":
		vm.State = model.RunState(v)
	case "mode":
		vm.Mode = model.Mode(v)
	case "level":
		vm.Level = model.Level(v)
	case "primary":
		vm.Primary = v
	case "secondary":
		vm.Secondary, vm.SecondaryRun = v, ""
	case "wanted":
		vm.Wanted = model.Wanted(v)
	case "sync":
		vm.Sync = []model.Progress{{What: "memory", Done: 1 << 30, Total: 2 << 30, ETASeconds: 12}, {What: "disks", Done: 5 << 30, Total: 10 << 30, ETASeconds: 80}}
	case "resync":
		vm.Sync = []model.Progress{{What: "memory", Done: 1 << 30, Total: 2 << 30, ETASeconds: 12}, {What: "disks", Done: 5 << 30, Total: 10 << 30, ETASeconds: 80, Rate: 64 << 20}}
	case "problem":
		vm.Problems = append(vm.Problems, model.Problem{Code: "note", Severity: model.Warning, Text: "one A-link is down", Action: "check the cable of alink1"},
			model.Problem{Code: v, Severity: model.Critical, Text: "hostb does not answer on any A-link", Action: "look at hostb; it is protected again by itself"})
	default:
		ts.Fatalf("key %q is not known", key)
	}
}

// The page about the command line is what the commands say of themselves.
func TestMarkdownIsCurrent(t *testing.T) {
	h := hooks()
	h.Commands = nil // mounted by main, described elsewhere
	var b bytes.Buffer
	if err := cli.Markdown(&b, cli.Root(h, cli.Streams{Env: func(string) string { return "" }})); err != nil {
		t.Fatal(err)
	}
	const page = "../../docs/cli.md"
	if os.Getenv("UPDATE_SCRIPTS") == "1" {
		if err := os.WriteFile(page, b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(have, b.Bytes()) {
		t.Errorf("%s is not current; UPDATE_SCRIPTS=1 go test ./internal/cli writes it", page)
	}
}

// A console survives a takeover: it connects again, shows only what is new,
// and leaves when the VM has stopped.
func TestConsoleReconnects(t *testing.T) {
	f := apitest.New()
	f.VMList["web"] = apitest.Protected("web")
	type line struct {
		mu sync.Mutex
		n  int
	}
	var l line
	history := "booting the machine\nservice started on port 7\n"
	f.ConsoleFunc = func() (io.ReadWriteCloser, error) {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.n++
		here, there := net.Pipe()
		n := l.n
		go func() { // ends with its writes
			defer there.Close()
			io.WriteString(there, history)
			fmt.Fprintf(there, "line %d after it\n", n)
			if n == 2 {
				f.Update(func(f *apitest.Fake) {
					f.VMList["web"].Mode, f.VMList["web"].State = model.ModeStopped, model.StateStopped
				})
			}
		}()
		return here, nil
	}
	sock := filepath.Join(t.TempDir(), "s")
	ln, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- httpapi.New(httpapi.Options{Service: f}).Serve(ctx, ln) }()
	defer func() { cancel(); <-done }()
	var out, errs bytes.Buffer
	code := cli.Main(t.Context(), hooks(), cli.Streams{In: strings.NewReader(""), Out: &out, Err: &errs, Env: func(string) string { return "" }},
		[]string{"--socket", sock, "vm", "console", "web"})
	if code != 0 {
		t.Errorf("exit code %d", code)
	}
	want := history + "line 1 after it\n" + history + "line 2 after it\n"
	// The history of the second host does not hold "line 1": nothing can be
	// recognised in it, so it is shown whole rather than cut wrongly.
	if out.String() != want {
		t.Errorf("shown:\n%s\nwant:\n%s", &out, want)
	}
	for _, s := range []string{"connection to the console ended", "connected again on hosta", "web has stopped"} {
		if !strings.Contains(errs.String(), s) {
			t.Errorf("not said: %q in\n%s", s, &errs)
		}
	}
}

// Following goes on through an agent that goes away and comes back, and
// repeats nothing.
func TestEventsFollowThroughARestart(t *testing.T) {
	f := apitest.New()
	f.VMList["web"] = apitest.Protected("web")
	event := func(seq uint64) model.Event {
		return model.Event{Seq: seq, Time: apitest.Epoch().Add(time.Duration(seq) * time.Second), Host: "hosta", VM: "web", Type: fmt.Sprintf("e%d", seq)}
	}
	f.EventLog = []model.Event{event(1)}
	sock := filepath.Join(t.TempDir(), "s")
	start := func() (stop func()) {
		ln, err := net.Listen("unix", sock)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- httpapi.New(httpapi.Options{Service: f}).Serve(ctx, ln) }()
		return func() { cancel(); <-done }
	}
	stop := start()
	r, w := io.Pipe()
	ctx, interrupt := context.WithCancel(t.Context())
	var errs bytes.Buffer
	code := make(chan int, 1)
	go func() {
		code <- cli.Main(ctx, hooks(), cli.Streams{In: strings.NewReader(""), Out: w, Err: &errs, Env: func(string) string { return "" }},
			[]string{"--socket", sock, "vm", "events", "web", "-f", "-o", "json"})
		w.Close()
	}()
	dec := json.NewDecoder(r)
	next := func(want string) {
		t.Helper()
		var e model.Event
		if err := dec.Decode(&e); err != nil || e.Type != want {
			t.Fatalf("event %q, %v; want %s", e.Type, err, want)
		}
	}
	next("e1")
	stop()
	f.Update(func(f *apitest.Fake) { f.EventLog = append(f.EventLog, event(2)) })
	stop = start()
	defer func() { stop() }()
	next("e2")
	f.Update(func(f *apitest.Fake) { f.EventLog = append(f.EventLog, event(3)) })
	next("e3")
	interrupt()
	if c := <-code; c != cli.ExitInterrupted {
		t.Errorf("exit code %d", c)
	}
	if !strings.Contains(errs.String(), "asking again") {
		t.Errorf("nothing was said: %s", &errs)
	}
}

// Interrupting a create undoes it.
func TestCreateInterrupted(t *testing.T) {
	f := apitest.New()
	f.SlowOps = 1 << 20
	sock := filepath.Join(t.TempDir(), "s")
	ln, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	sctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- httpapi.New(httpapi.Options{Service: f}).Serve(sctx, ln) }()
	defer func() { cancel(); <-done }()
	ctx, interrupt := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer interrupt()
	cctx, cut := context.WithCancel(t.Context())
	defer cut()
	context.AfterFunc(ctx, cut)
	var errs bytes.Buffer
	code := cli.Main(cctx, hooks(), cli.Streams{In: strings.NewReader(""), Out: io.Discard, Err: &errs, Env: func(string) string { return "" }},
		[]string{"--socket", sock, "vm", "create", "web", "--disk", "1G"})
	if code != cli.ExitInterrupted || !strings.Contains(errs.String(), "cancelled") {
		t.Errorf("exit code %d: %s", code, &errs)
	}
	var cancelled bool
	f.Update(func(f *apitest.Fake) {
		for _, c := range f.Calls {
			cancelled = cancelled || c == "CancelOperation op1"
		}
	})
	if !cancelled {
		t.Error("the operation was not cancelled")
	}
}

// fakeSplit is a VM that was forced to go on on hosta.
func fakeSplit() api.SplitBrain {
	disk := api.SplitDisk{Disk: "disk0", Size: 8 << 20, State: model.UpToDate, Line: "term 7 branch d4909f27 run 46db05e3", Alone: true, Since: "term 3 run 949813fb",
		AloneBytes: 4 << 20, Crashed: true, Written: apitest.Epoch()}
	old := disk
	old.Line, old.AloneBytes, old.Verdict, old.Common = "term 5 run 949813fb", 1<<20, "other-branch", "term 3 run 949813fb"
	return api.SplitBrain{Split: true, Sides: []api.SplitSide{
		{Host: "hosta", Answers: true, Counts: true, State: model.UpToDate, Term: 7, Branch: "d4909f274f2806c9", Disks: []api.SplitDisk{disk},
			Events: []model.Event{{Time: apitest.Epoch(), Host: "hosta", Type: "started", Text: "the guest runs on host hosta"}},
			Loses:  []string{"everything that VM web did on host hosta"}, WhyNot: "the VM runs from it"},
		{Host: "hostb", Answers: true, Split: true, State: model.Outdated, Term: 5, Disks: []api.SplitDisk{old},
			Loses: []string{"disk0: what was written on host hostb alone since term 3 run 949813fb: at most 1MiB"}, CanDiscard: true}}}
}
