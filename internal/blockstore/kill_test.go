package blockstore

import (
	"bufio"
	"context"
	"encoding/binary"
	"fmt"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"perdure/internal/model"
	"perdure/internal/vfs"
)

// killPoints are all places at which the store lets a test end the process.
var killPoints = []string{"image.write", "image.written", "image.sync", "image.synced", "log.write", "log.written", "log.synced", "log.leave",
	"sums.written", "bitmap.save", "bitmap.saved", "journal.write", "journal.synced", "journal.apply", "meta.write", "meta.written", "repair.write", "stamp.write", "stamp.written"}

const (
	killEnv    = "PERDURE_TEST_KILL"
	killBlocks = 3 // used per extent
)

// TestMain runs the tests, or the process that TestKilledAtEachPoint kills.
func TestMain(m *testing.M) {
	if arg := os.Getenv(killEnv); arg != "" {
		fmt.Fprintln(os.Stderr, "killChild:", killChild(strings.Split(arg, ",")))
		os.Exit(3) // it should not get here
	}
	os.Exit(m.Run())
}

// killChild is the process that is killed: it says on its output what it is
// about to do and what it has done.
func killChild(arg []string) error {
	if len(arg) != 4 {
		return fmt.Errorf("%d words in %s, want 4", len(arg), killEnv)
	}
	dir, point := arg[0], arg[1]
	after, _ := strconv.Atoi(arg[2])
	seed, _ := strconv.ParseInt(arg[3], 10, 64)
	s, err := Open(vfs.OS{}, dir, "disk0", Options{Activity: 4, JournalLimit: 64 << 10, NoAutoTrim: true, At: func(p string) {
		if p != point {
			return
		}
		if after--; after < 0 {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	}})
	if err != nil {
		return err
	}
	if _, err := s.Replay(); err != nil {
		return err
	}
	rng := rand.New(rand.NewSource(seed))
	v := NewVolume(s, VolumeOptions{})
	say := func(f string, a ...any) { fmt.Fprintf(os.Stdout, "@"+f+"\n", a...) }
	ctx := context.Background()
	for i := range 400 {
		n := rng.Int63n(twinExtents)*blocksPerExtent + rng.Int63n(killBlocks)
		stamp := uint32(seed)*1000 + uint32(i)
		say("try %d %d", n, stamp)
		data := stampBlock(int(stamp))
		switch i % 8 {
		case 5: // through the journal
			l := newLayer()
			l.blocks[n] = (*block)(data)
			w := &EpochWrites{layer: l, within: i%16 == 5}
			err = s.Persist(1, model.Epoch(i+1), w)
			if err == nil {
				err = s.Apply(model.Epoch(i + 1))
			}
		case 6:
			if f, ferr := os.OpenFile(dir+"/elsewhere", os.O_RDWR, 0); ferr == nil {
				_, _ = f.WriteAt([]byte("rot"), n*BlockSize)
				_ = f.Close()
			}
			// Damaged, and in doubt perhaps, so that it may count as right: written again whole.
			err = s.Repair(n*BlockSize, BlockSize, func(p []byte, _ int64) error { copy(p, data); return nil })
			if err == nil {
				err = v.WriteAt(ctx, data, n*BlockSize, false)
			}
		default:
			err = v.WriteAt(ctx, data, n*BlockSize, i%8 == 7)
		}
		if err == nil && i%50 == 49 {
			err = s.SaveMissing()
		}
		if err != nil {
			return err
		}
		say("did %d %d", n, stamp)
	}
	return nil
}

func TestKilledAtEachPoint(t *testing.T) {
	dir := t.TempDir()
	params := twinParams()
	params.Image, params.Host = filepath.Join(dir, "elsewhere"), "a" // so that it has a stamp
	if err := Create(vfs.OS{}, dir, params); err != nil {
		t.Fatal(err)
	}
	done, tried := map[int64]uint32{}, map[int64]uint32{} // by block
	seed := 0
	for _, point := range killPoints {
		for _, after := range []int{0, 3} {
			if after > 0 && strings.HasPrefix(point, "stamp.") {
				continue // once in a life
			}
			seed++
			cmd := exec.Command(os.Args[0])
			cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s,%s,%d,%d", killEnv, dir, point, after, seed))
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			var other []string
			for lines := bufio.NewScanner(out); lines.Scan(); {
				var what string
				var n int64
				var stamp uint32
				text := lines.Text()
				at := strings.Index(text, "@")
				if at < 0 {
					other = append(other, text)
					continue
				}
				if _, err := fmt.Sscanf(text[at:], "@%s %d %d", &what, &n, &stamp); err != nil {
					t.Fatal(text, err)
				}
				if what == "try" {
					tried[n] = stamp
				} else {
					done[n] = stamp
				}
			}
			err = cmd.Wait()
			if st, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || !st.Signaled() {
				t.Fatalf("%s, %d: not killed: %v %s", point, after, err, strings.Join(other, "\n"))
			}
			checkKilled(t, dir, fmt.Sprintf("%s, %d", point, after), done, tried)
		}
	}
}

// checkKilled opens what a killed process left. A process that dies loses nothing
// that it wrote, so each block is as written last, or as it was about to be.
func checkKilled(t *testing.T, dir, where string, done, tried map[int64]uint32) {
	t.Helper()
	s, err := openTwinOn(vfs.OS{}, dir)
	if err != nil {
		t.Fatal(where, err)
	}
	defer func() {
		if err := s.Close(); err != nil {
			t.Fatal(where, err)
		}
	}()
	lacks := s.Missing()
	p := make([]byte, BlockSize)
	for n, stamp := range tried {
		if err := s.ReadAt(p, n*BlockSize); err != nil {
			if done[n] != stamp {
				// Under repair, or being written: damage found is right as well.
				if err := s.WriteAt(stampBlock(int(stamp)), n*BlockSize); err == nil {
					done[n] = stamp
					continue
				}
			}
			t.Fatal(where, err)
		}
		got := binary.LittleEndian.Uint32(p[8:])
		if got != stamp && got != done[n] {
			t.Fatalf("%s: block %d has %d; %d was written, %d tried", where, n, got, done[n], stamp)
		}
		if done[n] != 0 && !lacks.Test(n*BlockSize/ChunkSize) {
			t.Fatalf("%s: block %d was written alone, and the bitmap does not say so", where, n)
		}
		if got != stamp {
			tried[n] = got
		}
		if got != 0 {
			done[n] = got
		}
	}
}
