package guestmem

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"perdure/internal/testenv"
)

// The test binary plays the other processes too.
const roleEnv = "PERDURE_GUESTMEM_TEST_ROLE"

func TestMain(m *testing.M) {
	switch os.Getenv(roleEnv) {
	case "helper":
		os.Exit(HelperMain(nil))
	case "guest":
		guestMain(os.Args[1])
	case "server":
		serverMain(os.Args[1])
	default:
		os.Exit(testenv.Main(m))
	}
}

// openRAM opens a RAM that is closed with the test.
func openRAM(t testing.TB, size int64, change ...func(*Config)) *RAM {
	t.Helper()
	testenv.Root(t)
	_, err := os.Stat("/dev/fuse")
	testenv.Need(t, err == nil, "needs /dev/fuse")
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cfg := Config{Dir: t.TempDir() + "/mem", Size: size, Helper: []string{"/usr/bin/env", roleEnv + "=helper", exe}}
	for _, f := range change {
		f(&cfg)
	}
	r, err := Open(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return r
}

// guest is a process that maps the RAM file as QEMU does: shared, touched, locked.
type guest struct {
	t   testing.TB
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

func startGuest(t testing.TB, path string, size int64) *guest {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	g := &guest{t: t, cmd: exec.Command(exe, path)}
	g.cmd.Env = append(os.Environ(), roleEnv+"=guest")
	g.cmd.Stderr = os.Stderr
	g.in, _ = g.cmd.StdinPipe()
	out, _ := g.cmd.StdoutPipe()
	g.out = bufio.NewReader(out)
	if err := g.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = g.cmd.Process.Kill()
		_ = g.cmd.Wait()
	})
	g.do("map %d", size)
	return g
}

// do runs a command in the guest and returns its answer.
func (g *guest) do(format string, a ...any) string {
	g.t.Helper()
	s, err := g.try(format, a...)
	if err != nil {
		g.t.Fatalf("guest: "+format+": %v", append(a, err)...)
	}
	return s
}

func (g *guest) try(format string, a ...any) (string, error) {
	fmt.Fprintf(g.in, format+"\n", a...)
	s, err := g.out.ReadString('\n')
	return strings.TrimSpace(s), err
}

// guestMain is the guest process.
func guestMain(path string) {
	die := func(err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, "guest:", err)
			os.Exit(1)
		}
	}
	var mem []byte
	var stop atomic.Bool
	var stall atomic.Int64
	var wg sync.WaitGroup
	in := bufio.NewReader(os.Stdin)
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			os.Exit(0)
		}
		var a, b, c int64
		var s string
		switch cmd, rest, _ := strings.Cut(strings.TrimSpace(line), " "); cmd {
		case "map": // size
			fmt.Sscan(rest, &a)
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			die(err)
			mem, err = unix.Mmap(int(f.Fd()), 0, int(a), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
			die(err)
			die(unix.Madvise(mem, unix.MADV_POPULATE_WRITE))
			die(unix.Mlock(mem))
		case "dirty": // count, stride in pages, value: one word of each
			fmt.Sscan(rest, &a, &b, &c)
			for i := range a {
				o := i * b % int64(len(mem)/PageSize) * PageSize
				mem[o+8*(c%512)] = byte(c)
			}
		case "rewrite": // count, stride, seed: whole pages
			fmt.Sscan(rest, &a, &b, &c)
			rnd := rand.New(rand.NewPCG(uint64(c), 1))
			for i := range a {
				o := i * b % int64(len(mem)/PageSize) * PageSize
				for j := int64(0); j < PageSize; j += 8 {
					v := rnd.Uint64()
					mem[o+j], mem[o+j+1], mem[o+j+2], mem[o+j+3] = byte(v), byte(v>>8), byte(v>>16), byte(v>>24)
					mem[o+j+4], mem[o+j+5], mem[o+j+6], mem[o+j+7] = byte(v>>32), byte(v>>40), byte(v>>48), byte(v>>56)
				}
			}
		case "run": // threads, seed
			fmt.Sscan(rest, &a, &b)
			stop.Store(false)
			for i := range a {
				wg.Add(1)
				go func() {
					defer wg.Done()
					scribble(mem, uint64(b*100+i), &stop, &stall)
				}()
			}
		case "pace": // pages a second, scattered
			fmt.Sscan(rest, &a)
			stop.Store(false)
			wg.Add(1)
			go func() {
				defer wg.Done()
				r := rand.New(rand.NewPCG(3, 4))
				for start, n := time.Now(), int64(0); !stop.Load(); time.Sleep(time.Millisecond) {
					for want := int64(time.Since(start).Seconds() * float64(a)); n < want; n++ {
						mem[r.IntN(len(mem))]++
					}
				}
			}()
		case "halt":
			stop.Store(true)
			wg.Wait()
			fmt.Fprintf(os.Stdout, "%d\n", stall.Swap(0))
			continue
		case "dump": // file
			fmt.Sscan(rest, &s)
			die(os.WriteFile(s, mem, 0o600))
		case "byte": // offset
			fmt.Sscan(rest, &a)
			fmt.Fprintf(os.Stdout, "%d\n", mem[a])
			continue
		}
		fmt.Println("ok")
	}
}

// scribble writes random words, short runs and page runs all over until stop, and keeps the longest time that one write took.
func scribble(mem []byte, seed uint64, stop *atomic.Bool, stall *atomic.Int64) {
	r := rand.New(rand.NewPCG(seed, 7))
	for n := 0; !stop.Load(); n++ {
		t := time.Now()
		o := r.IntN(len(mem) - 64<<10)
		switch n % 64 {
		case 0: // a run over many pages
			for i := range 32 << 10 {
				mem[o+i] = byte(seed + uint64(i*n))
			}
		case 1, 2, 3: // zero a page
			o &^= PageSize - 1
			clear(mem[o : o+PageSize])
		default:
			for i := range 40 {
				mem[o+i] = byte(r.Uint32())
			}
		}
		d := int64(time.Since(t))
		for {
			old := stall.Load()
			if d <= old || stall.CompareAndSwap(old, d) {
				break
			}
		}
	}
}

// serverMain serves a RAM in a process of its own, which a test can kill.
func serverMain(dir string) {
	exe, _ := os.Executable()
	r, err := Open(context.Background(), Config{Dir: dir, Size: testSize, Helper: []string{"/usr/bin/env", roleEnv + "=helper", exe}})
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println(r.help.cmd.Process.Pid)
	in := bufio.NewReader(os.Stdin)
	for {
		if _, err := in.ReadString('\n'); err != nil {
			os.Exit(0)
		}
		err := r.Attach()
		r.SetMode(Collect)
		if err == nil {
			err = r.Flush()
		}
		fmt.Println(err)
	}
}

// memory returns the guest's memory as it sees it.
func (g *guest) memory() []byte {
	g.t.Helper()
	f := g.t.TempDir() + "/dump"
	g.do("dump %s", f)
	b, err := os.ReadFile(f)
	if err != nil {
		g.t.Fatal(err)
	}
	_ = os.Remove(f)
	return b
}

// dropCache asks the kernel, from another process, to forget the clean pages of a file.
func dropCache(t testing.TB, path string) {
	t.Helper()
	out, err := exec.Command(testenv.Tool(t, "dd"), "if="+path, "iflag=nocache", "count=0").CombinedOutput()
	if err != nil {
		t.Fatalf("dd: %v: %s", err, out)
	}
}

// readFile reads a RAM file in another process, as this one must not hold it.
func readFile(t testing.TB, path string) []byte {
	t.Helper()
	b, err := exec.Command(testenv.Tool(t, "cat"), path).Output()
	if err != nil {
		t.Fatal(err)
	}
	return b
}
