package blockstore

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"perdure/internal/model"
	"perdure/internal/testenv"
	"perdure/internal/vfs"
)

const placed = "/p/web"

// paramsAt describes a replica whose image lies in the state directory (""), in a "file"
// or on a "device" of some bytes, which is made then and holds something.
func paramsAt(t testing.TB, fsys vfs.FS, where string, size int64) Params {
	t.Helper()
	p := testParams()
	if where == "" {
		return p
	}
	p.Image, p.Host = placed, "a"
	if where == "file" {
		return p
	}
	p.Device = true
	f, err := fsys.Create(placed)
	if err == nil {
		err = f.Truncate(size)
	}
	if err == nil {
		_, err = f.WriteAt(filled(8, BlockSize), 2*BlockSize)
	}
	if err == nil {
		_, err = f.WriteAt(filled(7, StampSize), stampPlace(size))
	}
	if err = errors.Join(err, f.Sync(), f.Close(), fsys.SyncDir("/p")); err != nil {
		t.Fatal(err)
	}
	return p
}

func contentOf(t testing.TB, fsys vfs.FS, path string) []byte {
	t.Helper()
	f, err := fsys.OpenRead(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	n, err := f.Size()
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, n)
	if _, err := f.ReadAt(b, 0); err != nil && n > 0 {
		t.Fatal(err)
	}
	return b
}

// putContent makes a file be there and hold just this.
func putContent(t testing.TB, fsys vfs.FS, path string, b []byte) {
	t.Helper()
	if err := fsys.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	f, err := fsys.Create(path)
	if err == nil {
		_, err = f.WriteAt(b, 0)
	}
	if err = errors.Join(err, f.Sync(), f.Close(), fsys.SyncDir(filepath.Dir(path))); err != nil {
		t.Fatal(err)
	}
}

// TestWrongImage exchanges what lies under the path of an image, and the metadata, in every way: nothing
// is opened that is not as the replica left it, and nothing is written there.
func TestWrongImage(t *testing.T) {
	size := testParams().Size
	type state struct{ image, meta []byte }
	for _, where := range []string{"file", "device"} {
		m := vfs.NewMem()
		if err := Create(m, "/d", paramsAt(t, m, where, size+StampSize)); err != nil {
			t.Fatal(err)
		}
		now := func() state { return state{contentOf(t, m, placed), contentOf(t, m, "/d/disk0.meta")} }
		set := func(s state) {
			putContent(t, m, placed, s.image)
			putContent(t, m, "/d/disk0.meta", s.meta)
		}
		write := func(s *Store, v byte) {
			t.Helper()
			if err := s.WriteAt(filled(v, BlockSize), 0); err != nil {
				t.Fatal(err)
			}
			if err := s.Flush(); err != nil {
				t.Fatal(err)
			}
		}
		made := now()
		s := openStore(t, m, "/d")
		write(s, 1)
		during := now() // a snapshot of a running guest
		write(s, 2)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		closed := now()
		s = openStore(t, m, "/d")
		write(s, 3)
		crashed := now()
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		good := now()

		// Another replica of the same disk, one of another VM's, and a stamp of a newer release.
		other := func(change func(p *Params)) []byte {
			f := vfs.NewMem()
			p := paramsAt(t, f, where, size+StampSize)
			change(&p)
			if err := Create(f, "/d", p); err != nil {
				t.Fatal(err)
			}
			return contentOf(t, f, placed)
		}
		newer := bytes.Clone(good.image)
		for at := size; at < size+StampSize; at += stampSlot {
			slot := newer[at:][:stampUsed]
			slot[8] = stampVersion + 1
			binary.LittleEndian.PutUint32(slot[stampUsed-4:], crc32.Checksum(slot[:stampUsed-4], castagnoli))
		}
		cut := func(b []byte, n int64) []byte { return bytes.Clone(b[:n]) }
		zeroed := append(cut(good.image, size), make([]byte, StampSize)...)
		for what, c := range map[string]struct {
			s    state
			want error
			part string
		}{
			"as it was left":                 {good, nil, ""},
			"as a crash left it":             {crashed, nil, ""},
			"as it was left the time before": {closed, nil, ""},
			"a new device":                   {state{make([]byte, size+StampSize), good.meta}, ErrImage, "does not carry the stamp"},
			"the data without the stamp":     {state{zeroed, good.meta}, ErrImage, "does not carry the stamp"},
			"cut off":                        {state{cut(good.image, size), good.meta}, ErrImage, "does not carry the stamp"},
			"smaller":                        {state{cut(good.image, size-BlockSize), good.meta}, ErrImage, "does not carry the stamp"},
			"as it was made":                 {state{made.image, good.meta}, ErrImage, "older than the metadata"},
			"a snapshot from long ago":       {state{during.image, good.meta}, ErrImage, "older than the metadata"},
			"a backup of when it was closed": {state{closed.image, good.meta}, ErrImage, "older than the metadata"},
			"a snapshot from the last run":   {state{crashed.image, good.meta}, nil, ""}, // see below
			"the metadata set back":          {state{good.image, closed.meta}, ErrImage, "newer than the metadata"},
			"the metadata as they were made": {state{good.image, made.meta}, ErrImage, "newer than the metadata"},
			"another replica of the disk":    {state{other(func(*Params) {}), good.meta}, ErrImage, "another replica of this disk (host a)"},
			"another disk":                   {state{other(func(p *Params) { p.VM = "other" }), good.meta}, ErrImage, `disk "disk0" of the VM other`},
			"a newer release":                {state{newer, good.meta}, ErrVersion, "stamp version 2"},
		} {
			if what == "a snapshot from the last run" {
				// The last close in order gave the stamp another number, so it is told too.
				c.want, c.part = ErrImage, "older than the metadata"
			}
			set(c.s)
			err := CheckImage(m, "/d", "disk0")
			st, oerr := Open(m, "/d", "disk0", Options{})
			if oerr == nil {
				_, oerr = st.Replay()
				oerr = errors.Join(oerr, st.Close())
			}
			rep, _ := Inspect(m, "/d/disk0")
			for by, err := range map[string]error{"CheckImage": err, "Open": oerr} {
				if (c.want == nil) != (err == nil) || !errors.Is(err, c.want) && c.want != nil || err != nil && !strings.Contains(err.Error(), c.part) {
					t.Errorf("%s, %s: %s: %v", where, what, by, err)
				}
			}
			if c.want == nil {
				continue
			}
			if len(rep.Problems) == 0 {
				t.Errorf("%s, %s: Inspect finds nothing wrong", where, what)
			}
			left, err := Release(m, "/d", "disk0", false)
			if left == nil || err != nil {
				t.Errorf("%s, %s: Release: left %v, error %v", where, what, left, err)
			}
			if !bytes.Equal(contentOf(t, m, placed), c.s.image) {
				t.Errorf("%s, %s: it was written to", where, what)
			}
			// Release has taken the rest away.
			putContent(t, m, placed, nil)
			if err := m.Remove(placed); err != nil {
				t.Fatal(err)
			}
			p := paramsAt(t, m, where, size+StampSize)
			if err := Create(m, "/d", p); err != nil {
				t.Fatal(err)
			}
		}
		set(good)
		if err := m.Remove(placed); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(m, "/d", "disk0", Options{}); !errors.Is(err, ErrImage) || !strings.Contains(err.Error(), "is its file system mounted") {
			t.Errorf("%s: no image: %v", where, err)
		}
		if ok, err := m.Exists(placed); ok || err != nil {
			t.Errorf("an image was made: %v", err)
		}
	}
}

// TestCrashWithStamp takes the power at each operation of a life: what is found then is no replica, or
// one that opens, with all that was flushed.
func TestCrashWithStamp(t *testing.T) {
	size := testParams().Size
	for _, where := range []string{"file", "device"} {
		cases := 0
		for stop := 0; ; stop++ {
			done := false
			for name, keep := range keeps(int64(stop)) {
				m := vfs.NewMem()
				p := paramsAt(t, m, where, size+StampSize+3*512)
				first := m.Ops()
				m.SetHook(func(op vfs.Op) error {
					if op.Kind != "read" && op.Index >= first+stop {
						return vfs.ErrCrashed
					}
					return nil
				})
				flushed := byte(0)
				err := func() error {
					if err := Create(m, "/d", p); err != nil {
						return err
					}
					for v := byte(1); v <= 2; v++ {
						s, err := Open(m, "/d", "disk0", Options{NoAutoTrim: true})
						if err != nil {
							return err
						}
						if _, err := s.Replay(); err != nil {
							return err
						}
						if err := s.WriteAt(filled(v, BlockSize), 0); err != nil {
							return err
						}
						if err := s.Flush(); err != nil {
							return err
						}
						flushed = v
						if err := s.Close(); err != nil {
							return err
						}
					}
					return nil
				}()
				done = err == nil
				m = m.Crash(keep)
				cases++
				ok, eerr := Exists(m, "/d", "disk0")
				if eerr != nil || !ok && flushed > 0 {
					t.Fatalf("%s, operation %d, %s: it is gone: %v", where, stop, name, eerr)
				}
				if !ok {
					if err := Remove(m, "/d", "disk0"); err != nil {
						t.Fatal(err)
					}
					if err := Create(m, "/d", p); err != nil {
						t.Fatalf("%s, operation %d, %s: once more: %v", where, stop, name, err)
					}
				}
				s, err := Open(m, "/d", "disk0", Options{NoAutoTrim: true})
				if err == nil {
					_, err = s.Replay()
				}
				if err != nil {
					t.Fatalf("%s, operation %d, %s: %v", where, stop, name, err)
				}
				b := make([]byte, BlockSize)
				if err := s.ReadAt(b, 0); err != nil {
					t.Fatalf("%s, operation %d, %s: %v", where, stop, name, err)
				}
				for n, v := range b { // the next write may be torn
					if v != filled(flushed, BlockSize)[n] && v != filled(flushed+1, BlockSize)[n] && flushed > 0 {
						t.Fatalf("%s, operation %d, %s: a flushed write is lost", where, stop, name)
					}
				}
				if err := s.Close(); err != nil {
					t.Fatal(err)
				}
			}
			if done {
				break
			}
		}
		t.Logf("%s: %d crashes", where, cases)
	}
}

// TestImageElsewhere looks at what making and removing leave of an image.
func TestImageElsewhere(t *testing.T) {
	size := testParams().Size
	for _, where := range []string{"file", "device"} {
		for _, keep := range []bool{true, false} {
			m := vfs.NewMem()
			p := paramsAt(t, m, where, size+StampSize)
			if err := Create(m, "/d", p); err != nil {
				t.Fatal(err)
			}
			s := openStore(t, m, "/d")
			got := make([]byte, size)
			if err := s.ReadAt(got, 0); err != nil || !IsZero(got) {
				t.Errorf("%s: a new disk is not empty: %v", where, err)
			}
			if st, ok, err := ProbeStamp(m, placed); err != nil || !ok || st != (Stamp{p.VM, p.ID, "a"}) {
				t.Errorf("%s: stamp %+v %v %v", where, st, ok, err)
			}
			if _, err := Open(m, "/d", "disk0", Options{}); !errors.Is(err, vfs.ErrInUse) {
				t.Errorf("%s: opened twice: %v", where, err)
			}
			q := p
			q.ID = "disk1"
			if err := Create(m, "/d", q); !errors.Is(err, vfs.ErrInUse) {
				t.Errorf("%s: another replica is made of an image in use: %v", where, err)
			}
			if err := s.WriteAt(filled(5, BlockSize), 0); err != nil {
				t.Fatal(err)
			}
			if left, err := Release(m, "/d", "disk0", keep); left == nil || err != nil {
				t.Errorf("%s: an image in use was removed: %v", where, err)
			}
			if err := s.Close(); err == nil {
				t.Log("closed without its files") // they are open still
			}

			if err := Create(m, "/d", p); err != nil {
				t.Fatal(err)
			}
			s = openStore(t, m, "/d")
			if err := s.WriteAt(filled(5, BlockSize), 0); err != nil {
				t.Fatal(err)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			if left, err := Release(m, "/d", "disk0", keep); left != nil || err != nil {
				t.Errorf("%s: %v %v", where, left, err)
			}
			ok, err := m.Exists(placed)
			if err != nil || ok != (keep || where == "device") {
				t.Fatalf("%s, keep %v: is there: %v %v", where, keep, ok, err)
			}
			if !ok {
				continue
			}
			b := contentOf(t, m, placed)
			if want := map[string]int64{"file": size, "device": size + StampSize}[where]; int64(len(b)) != want {
				t.Errorf("%s: %d bytes are left, want %d", where, len(b), want)
			}
			if !bytes.Equal(b[:BlockSize], filled(5, BlockSize)) || !IsZero(b[BlockSize:]) {
				t.Errorf("%s: what is left is not the disk", where)
			}
		}
	}
}

// TestInconsistentDevice: a device that is about to be filled is not emptied twice, and its
// checksums are not believed.
func TestInconsistentDevice(t *testing.T) {
	m := vfs.NewMem()
	p := paramsAt(t, m, "device", testParams().Size+StampSize)
	p.State = model.Inconsistent
	if err := Create(m, "/d", p); err != nil {
		t.Fatal(err)
	}
	s := openStore(t, m, "/d")
	got := make([]byte, BlockSize)
	if err := s.ReadAt(got, 2*BlockSize); err != nil || !bytes.Equal(got, filled(8, BlockSize)) {
		t.Errorf("%v", err)
	}
	if err := s.Wipe(); err != nil {
		t.Fatal(err)
	}
	if err := s.ReadAt(got, 2*BlockSize); err != nil || !IsZero(got) {
		t.Errorf("%v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := CheckImage(m, "/d", "disk0"); err != nil {
		t.Error(err)
	}
}

// TestOtherNames opens an image by all names that it has: one user at a time has it.
func TestOtherNames(t *testing.T) {
	testenv.Root(t)
	losetup := testenv.Tool(t, "losetup")
	dir := t.TempDir()
	back := filepath.Join(dir, "back")
	if err := os.WriteFile(back, make([]byte, testParams().Size+StampSize), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(losetup, "--find", "--show", back).Output()
	testenv.Need(t, err == nil, fmt.Sprintf("needs loop devices: %v", err))
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command(losetup, "-d", dev).CombinedOutput(); err != nil {
			t.Errorf("losetup -d %s: %v %s", dev, err, out)
		}
	})
	var n int
	if _, err := fmt.Sscanf(dev, "/dev/loop%d", &n); err != nil {
		t.Fatal(err)
	}
	node := filepath.Join(dir, "node")
	if out, err := exec.Command("mknod", node, "b", "7", fmt.Sprint(n)).CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	file, hard, soft := filepath.Join(dir, "file"), filepath.Join(dir, "hard"), filepath.Join(dir, "soft")
	for _, c := range []struct {
		path   string
		device bool
		names  []string
	}{{file, false, []string{file, hard, soft}}, {dev, true, []string{dev, node}}} {
		d := t.TempDir()
		p := testParams()
		p.Image, p.Device, p.Host = c.path, c.device, "a"
		if err := Create(vfs.OS{}, d, p); err != nil {
			t.Fatal(err)
		}
		if !c.device {
			if err := errors.Join(os.Link(file, hard), os.Symlink(file, soft)); err != nil {
				t.Fatal(err)
			}
		}
		s := openStore(t, vfs.OS{}, d)
		for _, name := range c.names {
			if _, err := (vfs.OS{}).OpenLocked(name); !errors.Is(err, vfs.ErrInUse) {
				t.Errorf("%s was opened a second time as %s: %v", c.path, name, err)
			}
			q := p
			q.Image, q.ID = name, "disk1"
			if err := Create(vfs.OS{}, d, q); !errors.Is(err, vfs.ErrInUse) {
				t.Errorf("another replica was made of %s as %s: %v", c.path, name, err)
			}
		}
		if err := s.WriteAt(filled(1, BlockSize), 0); err != nil {
			t.Fatal(err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		// Another one made of it by another name takes it away from the first.
		q := p
		q.Image, q.ID = c.names[1], "disk1"
		if err := Create(vfs.OS{}, d, q); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(vfs.OS{}, d, "disk0", Options{}); !errors.Is(err, ErrImage) {
			t.Errorf("%s: the first replica still opens: %v", c.path, err)
		}
	}
}

// TestTornSlot reads slots of which some sectors are of one write and some of another.
func TestTornSlot(t *testing.T) {
	older := metaRecord{version: 2, seq: 4, incarnation: 1, Meta: Meta{VM: "v", Disk: "d", Size: BlockSize, State: model.UpToDate}}
	newer := older
	newer.seq, newer.State, newer.trimmed = 6, model.Outdated, 9
	newer.Lineage.Primary = true
	placed := newer
	placed.seq, placed.version, placed.Image, placed.stampAt, placed.stampSeq = 8, placedVersion, "/p/web", BlockSize, 3
	for _, pair := range [][2]metaRecord{{older, newer}, {newer, older}, {older, placed}, {placed, newer}} {
		a, b := pair[0].encode(), pair[1].encode()
		for mask := range 1 << (slotSize / vfs.Sector) {
			torn := bytes.Clone(a)
			for n := range slotSize / vfs.Sector {
				if mask>>n&1 != 0 {
					copy(torn[n*vfs.Sector:][:vfs.Sector], b[n*vfs.Sector:])
				}
			}
			m, err := decodeSlot(torn)
			if err == nil && m != pair[0] && m != pair[1] {
				t.Errorf("sectors %08b of slot %d in slot %d: read as slot %d: %+v", mask, pair[1].seq, pair[0].seq, m.seq, m)
			}
		}
	}
}
