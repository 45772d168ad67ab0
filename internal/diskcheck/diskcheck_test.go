package diskcheck_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"perdure/internal/blockstore"
	"perdure/internal/diskcheck"
	"perdure/internal/diskcheck/diskserver"
	"perdure/internal/model"
	"perdure/internal/nbd"
	"perdure/internal/vfs"
)

func TestMain(m *testing.M) {
	diskserver.Main()
	os.Exit(m.Run())
}

const limit = 2 * time.Minute // of one check; it takes far less

// brokenDisk is a disk in memory with one fault that happens now and then.
type brokenDisk struct {
	mu    sync.Mutex
	p     []byte
	old   []byte // as it was some writes ago
	fault string
	n     int
}

func (d *brokenDisk) Size() int64                 { return int64(len(d.p)) }
func (d *brokenDisk) Flush(context.Context) error { return nil }

func (d *brokenDisk) now() bool { d.n++; return d.n%97 == 0 }

func (d *brokenDisk) ReadAt(_ context.Context, p []byte, off int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.fault == "stale" && d.now():
		copy(p, d.old[off:])
	case d.fault == "misread" && d.now():
		copy(p, d.p[(off+4096)%d.Size():])
	case d.fault == "rot" && d.now():
		copy(p, d.p[off:])
		p[len(p)/2] ^= 4
	default:
		copy(p, d.p[off:])
	}
	if d.n%13 == 0 {
		copy(d.old, d.p)
	}
	return nil
}

func (d *brokenDisk) WriteAt(_ context.Context, p []byte, off int64, _ bool) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.fault == "lost" && d.now():
		return nil
	case d.fault == "misdirected" && d.now():
		copy(d.p[(off+8192)%d.Size():], p)
	case d.fault == "short" && d.now():
		copy(d.p[off:], p[:len(p)-512])
	default:
		copy(d.p[off:], p)
	}
	return nil
}

func (d *brokenDisk) Zero(_ context.Context, off, n int64, _, _ bool) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.fault != "no zeroes" {
		clear(d.p[off : off+n])
	}
	return nil
}

// serve serves a backend; stop ends the server, with nothing more to the backend.
func serve(t *testing.T, b nbd.Backend) (dial func(context.Context) (net.Conn, error), stop func()) {
	t.Helper()
	sock := filepath.Join(t.TempDir(), "s")
	ln, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- nbd.Serve(ctx, ln, map[string]nbd.Backend{diskserver.Disk: b}, nbd.Options{Grace: -1})
	}()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", sock)
	}, stop
}

// TestFaultsAreFound is what the checker is for: each fault of a disk is found,
// and a disk without fault is not accused.
func TestFaultsAreFound(t *testing.T) {
	for _, fault := range []string{"", "stale", "misread", "rot", "lost", "misdirected", "short", "no zeroes"} {
		t.Run("fault="+fault, func(t *testing.T) {
			const units = 32
			d := &brokenDisk{p: make([]byte, units*4096), old: make([]byte, units*4096), fault: fault}
			dial, _ := serve(t, d)
			r := diskcheck.New(diskcheck.Config{Dial: dial, Export: diskserver.Disk, Units: units, Seed: 1, Depth: 4, Conns: 2})
			if err := r.Load(t.Context(), 4000); err != nil {
				t.Fatal(err)
			}
			err := r.Check(limit)
			if (err == nil) != (fault == "") {
				t.Fatalf("fault %q: %v", fault, err)
			}
			if err != nil && !strings.Contains(err.Error(), "no disk answers like this") {
				t.Fatal(err)
			}
			if s := r.Stats(); s.Reads == 0 || s.Writes == 0 || s.Flushes == 0 || s.Errors+s.Lost != 0 {
				t.Fatalf("%+v", s)
			}
		})
	}
}

func create(t *testing.T, fsys vfs.FS, dir string, size int64) {
	t.Helper()
	if err := blockstore.Create(fsys, dir, blockstore.Params{ID: diskserver.Disk, Size: size, State: model.UpToDate}); err != nil {
		t.Fatal(err)
	}
}

func open(t *testing.T, fsys vfs.FS, dir string) *blockstore.Store {
	t.Helper()
	s, err := blockstore.Open(fsys, dir, diskserver.Disk, blockstore.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Replay(); err != nil {
		t.Fatal(err)
	}
	return s
}

// TestPowerLoss cuts the power of a disk in memory again and again: what was
// flushed is there, sector by sector. With a sync that does nothing, the test
// must notice.
func TestPowerLoss(t *testing.T) {
	for _, liar := range []bool{false, true} {
		found := 0
		for seed := uint64(1); seed <= 3; seed++ {
			const size = 64 << 10
			fsys := vfs.NewMem()
			create(t, fsys, "d", size)
			var dial atomic.Value
			r := diskcheck.New(diskcheck.Config{Export: diskserver.Disk, Unit: 512, Units: size / 512, Span: 16, Seed: seed, Depth: 8, Conns: 2,
				Dial: func(ctx context.Context) (net.Conn, error) {
					return dial.Load().(func(context.Context) (net.Conn, error))(ctx)
				}})
			rnd := rand.New(rand.NewPCG(seed, 0))
			for range 4 {
				s := open(t, fsys, "d")
				var b nbd.Backend = blockstore.NewVolume(s, blockstore.VolumeOptions{})
				if liar {
					b = noFlush{b}
				}
				d, stop := serve(t, b)
				dial.Store(d)
				if err := r.ReadAll(t.Context()); err != nil {
					t.Fatal(err)
				}
				if err := r.Load(t.Context(), 300); err != nil {
					t.Fatal(err)
				}
				next := fsys.Crash(func() bool { return rnd.IntN(2) == 0 })
				stop()
				_ = s.Close() // its file system is gone
				fsys = next
				r.PowerLost()
			}
			err := r.Check(limit)
			if err != nil {
				found++
			}
			if err != nil && !liar {
				t.Fatal(err)
			}
		}
		if liar && found == 0 {
			t.Fatal("a disk that flushes nothing was not found out")
		}
	}
}

// noFlush says that it has flushed.
type noFlush struct{ nbd.Backend }

func (noFlush) Flush(context.Context) error { return nil }

func (n noFlush) WriteAt(ctx context.Context, p []byte, off int64, _ bool) error {
	return n.Backend.WriteAt(ctx, p, off, false)
}

func (n noFlush) Zero(ctx context.Context, off, k int64, _, punch bool) error {
	return n.Backend.Zero(ctx, off, k, false, punch)
}

// TestDiskErrors lets the file below fail now and then: the client hears of it,
// and what it was told is good is.
func TestDiskErrors(t *testing.T) {
	fsys := vfs.NewMem()
	create(t, fsys, "d", 256<<10)
	s := open(t, fsys, "d")
	defer s.Close()
	var n atomic.Int64
	fsys.SetHook(func(op vfs.Op) error {
		if (op.Kind == "write" || op.Kind == "read" || op.Kind == "zero") && n.Add(1)%31 == 0 {
			return syscall.EIO
		}
		return nil
	})
	dial, stop := serve(t, blockstore.NewVolume(s, blockstore.VolumeOptions{}))
	r := diskcheck.New(diskcheck.Config{Dial: dial, Export: diskserver.Disk, Seed: 7, Depth: 16})
	if err := r.Load(t.Context(), 3000); err != nil {
		t.Fatal(err)
	}
	stop()
	fsys.SetHook(nil)
	if r.Stats().Errors == 0 {
		t.Fatal("no error came through")
	}
	if err := r.Check(limit); err != nil {
		t.Fatal(err)
	}
}

// TestHeldVolume checks a volume that holds writes, cuts and commits epochs.
func TestHeldVolume(t *testing.T) {
	fsys := vfs.NewMem()
	create(t, fsys, "d", 256<<10)
	s := open(t, fsys, "d")
	defer s.Close()
	v := blockstore.NewVolume(s, blockstore.VolumeOptions{})
	if err := v.SetMode(blockstore.Held); err != nil {
		t.Fatal(err)
	}
	dial, _ := serve(t, v)
	r := diskcheck.New(diskcheck.Config{Dial: dial, Export: diskserver.Disk, Seed: 3, Depth: 8, Conns: 2, Unit: 512, Units: 256, Span: 24})
	ended := make(chan error, 1)
	go func() { ended <- r.Load(t.Context(), 6000) }()
	for e := model.Epoch(1); ; e++ {
		select {
		case err := <-ended:
			if err == nil {
				err = errors.Join(v.SetMode(blockstore.Direct), r.ReadAll(t.Context()), r.Check(limit))
			}
			if err != nil {
				t.Fatal(err)
			}
			return
		case <-time.After(2 * time.Millisecond):
		}
		w := v.Cut()
		if err := errors.Join(s.Persist(1, e, w), v.Commit(w)); err != nil {
			t.Fatal(err)
		}
	}
}

// TestServerKilled kills the process of the server at random times, at several
// depths. The kernel keeps what it was given, so nothing that was answered may be missing.
func TestServerKilled(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for depth, kills := range map[int]int{1: 4, 8: 4, 32: 6} {
		dir := t.TempDir()
		create(t, vfs.OS{}, dir, 1<<20)
		sock := filepath.Join(dir, "s")
		start := func() *exec.Cmd {
			_ = os.Remove(sock)
			cmd := exec.Command(self)
			cmd.Env = append(os.Environ(), diskserver.Env(dir, sock)...)
			cmd.Stderr = os.Stderr
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			return cmd
		}
		r := diskcheck.New(diskcheck.Config{Export: diskserver.Disk, Seed: uint64(depth), Depth: depth, Conns: 2, Units: 256,
			Dial: func(ctx context.Context) (net.Conn, error) {
				for {
					if nc, err := net.Dial("unix", sock); err == nil {
						return nc, nil
					}
					select {
					case <-ctx.Done():
						return nil, ctx.Err()
					case <-time.After(2 * time.Millisecond):
					}
				}
			}})
		rnd := rand.New(rand.NewPCG(uint64(depth), 1))
		for range kills {
			cmd := start()
			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan error, 1)
			go func() { ended <- r.Load(ctx, 1<<30) }()
			before := r.Stats().Writes
			for goal := before + int64(50+rnd.IntN(400)); r.Stats().Writes < goal; time.Sleep(time.Millisecond) {
				if t.Context().Err() != nil {
					t.Fatal("the test was ended")
				}
			}
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			_ = cmd.Wait()
			cancel()
			if err := <-ended; err != nil && !errors.Is(err, context.Canceled) {
				// A handshake may have been cut too.
				t.Log(err)
			}
		}
		cmd := start()
		if err := errors.Join(r.ReadAll(t.Context()), r.Check(limit)); err != nil {
			t.Error(err)
		}
		_ = cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			t.Error("server:", err)
		}
		if s := r.Stats(); s.Lost == 0 || s.Errors != 0 {
			t.Errorf("depth %d: %+v", depth, s)
		}
	}
}
