package blockstore

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"perdure/internal/model"
	"perdure/internal/replica"
	"perdure/internal/testenv"
	"perdure/internal/vfs"
)

// makeV1 writes a replica as release 1 did, byte for byte: two slots, image, and
// empty journals.
func makeV1(t testing.TB, fsys vfs.FS, dir string, clean byte) {
	t.Helper()
	p := testParams()
	b := make([]byte, 512)
	le := binary.LittleEndian
	copy(b, "PDRMETA\n")
	le.PutUint32(b[8:], 1)
	le.PutUint64(b[16:], 7)
	le.PutUint64(b[24:], uint64(p.Size))
	le.PutUint64(b[32:], 3)
	le.PutUint64(b[40:], 5)
	b[56], b[57] = 1, clean
	for i, s := range []string{p.VM, p.ID, "main", string(p.Run)} {
		b[64+64*i] = byte(len(s))
		copy(b[65+64*i:], s)
	}
	le.PutUint32(b[508:], crc32.Checksum(b[:508], castagnoli))
	slots := make([]byte, 8192)
	copy(slots[4096:], b)
	for name, data := range map[string][]byte{"disk0.meta": slots, "disk0.raw": filled(6, int(p.Size)), "disk0.journal0": nil, "disk0.journal1": nil} {
		f, err := fsys.Create(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt(data, 0); err != nil {
			t.Fatal(err)
		}
		if err := f.Sync(); err != nil {
			t.Fatal(err)
		}
	}
	if err := fsys.SyncDir(dir); err != nil {
		t.Fatal(err)
	}
}

func TestUpgradeFromVersion1(t *testing.T) {
	for stop := range 60 {
		for name, keep := range keeps(int64(stop)) {
			m := vfs.NewMem()
			makeV1(t, m, "/d", 0)
			base := m.Ops()
			m.SetHook(func(op vfs.Op) error {
				if op.Kind != "read" && op.Index >= base+stop {
					return vfs.ErrCrashed
				}
				return nil
			})
			if s, err := Open(m, "/d", "disk0", Options{NoAutoTrim: true}); err != nil {
				t.Fatal(err)
			} else if _, err = s.Replay(); err == nil && stop < 10 {
				t.Fatal("the upgrade takes more operations than that")
			}
			m = m.Crash(keep)
			s := openStore(t, m, "/d")
			meta := s.Meta()
			if meta.State != model.UpToDate || meta.Term != 3 || meta.Branch != "main" || !bytes.Equal(stamps(t, s), filled(6, testBlocks)) {
				t.Fatalf("operation %d, %s: %+v", stop, name, meta)
			}
			if !s.sums.on() || s.sums.complete.Load() {
				t.Fatal("checksums of an old replica are kept, and not known")
			}
			if err := s.WriteAt(filled(7, BlockSize), 0); err != nil {
				t.Fatal(err)
			}
			if err := s.SetMeta(func(m *Meta) { m.Lineage.Current = replica.Generation{Term: 4, Run: "r"} }); err != nil {
				t.Fatal(err)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			rot(t, m, 9)
			s = openStore(t, m, "/d")
			if err := s.ReadAt(make([]byte, BlockSize), 0); !errors.Is(err, ErrChecksum) {
				t.Fatal(err)
			}
			if s.Meta().Lineage.Current.Run != "r" || s.meta.version != 2 {
				t.Fatal("not version 2")
			}
		}
	}
}

// The first sector of a slot must be as release 1 expects it, with another version.
func TestReleaseBeforeSeesANewerVersion(t *testing.T) {
	m := metaRecord{version: metaVersion, seq: 1, Meta: Meta{VM: "v", Disk: "d", Size: BlockSize, State: model.UpToDate}}
	b := m.encode()
	if binary.LittleEndian.Uint32(b[508:]) != crc32.Checksum(b[:508], castagnoli) || binary.LittleEndian.Uint32(b[8:]) != 2 {
		t.Fatal("release 1 would take it for damage")
	}
	for i := range b { // every sector counts
		b[i]++
		if _, err := decodeSlot(b); err == nil {
			t.Fatal("damage not found in byte", i)
		}
		b[i]--
	}
}

func TestChecksumsOnAndOff(t *testing.T) {
	m := vfs.NewMem()
	s := openStore(t, m, "/d")
	if err := s.WriteAt(filled(5, BlockSize), 0); err != nil {
		t.Fatal(err)
	}
	for i, c := range []struct {
		set      Setting
		on, full bool
	}{{Keep, true, true}, {Off, false, false}, {Keep, false, false}, {On, true, false}, {Keep, true, false}} {
		if i%2 == 0 {
			m = m.Crash(func() bool { return true })
		} else if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		var err error
		if s, err = Open(m, "/d", "disk0", Options{Checksums: c.set, NoAutoTrim: true}); err != nil {
			t.Fatal(i, err)
		}
		if _, err := s.Replay(); err != nil {
			t.Fatal(i, err)
		}
		if s.sums.on() != c.on || s.sums.complete.Load() != c.full || stamps(t, s)[0] != byte(5+i) {
			t.Fatal(i, s.sums.on(), s.sums.complete.Load())
		}
		if err := s.WriteAt(filled(byte(6+i), BlockSize), 0); err != nil {
			t.Fatal(err)
		}
	}
	// A full copy begins with an empty image, all of whose checksums are known.
	if err := s.SetMeta(func(m *Meta) { m.State = model.Inconsistent }); err != nil {
		t.Fatal(err)
	}
	if err := s.Wipe(); err != nil || !s.sums.complete.Load() {
		t.Fatal(err)
	}
	rot(t, m, 3*BlockSize)
	if err := s.ReadAt(make([]byte, BlockSize), 3*BlockSize); !errors.Is(err, ErrChecksum) {
		t.Fatal(err)
	}
}

// A log of which no slot is whole is no crash: everything counts as different then.
func TestDamagedLog(t *testing.T) {
	m := vfs.NewMem()
	s := openStore(t, m, "/d")
	if err := s.WriteAt(filled(5, BlockSize), 0); err != nil {
		t.Fatal(err)
	}
	m = m.Crash(func() bool { return true })
	f, err := m.Open("/d/disk0.log")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(filled(1, 2*logSlot), 0); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		s = openStore(t, m, "/d")
		if s.MissingCount() != s.Chunks() || s.sums.complete.Load() || stamps(t, s)[0] != 5 {
			t.Fatal(s.MissingCount())
		}
		m = m.Crash(func() bool { return false })
	}
}

func TestOpenTwice(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, vfs.OS{}, dir)
	if _, err := Open(vfs.OS{}, dir, "disk0", Options{}); !errors.Is(err, vfs.ErrInUse) {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := openStore(t, vfs.OS{}, dir).Close(); err != nil {
		t.Fatal(err)
	}
}

func TestBlockDevice(t *testing.T) {
	testenv.Root(t)
	losetup := testenv.Tool(t, "losetup")
	dir := t.TempDir()
	back := filepath.Join(dir, "back")
	if err := os.WriteFile(back, make([]byte, 1<<20), 0o600); err != nil {
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
	p := testParams()
	p.Image, p.Device, p.Size = dev, true, 2<<20
	if err := Create(vfs.OS{}, dir, p); err == nil || !strings.Contains(err.Error(), "has 1048576 bytes, the disk 2097152") {
		t.Fatal(err)
	}
	p.Size = testParams().Size
	claim, err := os.OpenFile(dev, os.O_RDWR|syscall.O_EXCL, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := Create(vfs.OS{}, dir, p); !errors.Is(err, vfs.ErrInUse) {
		t.Fatal("a claimed device was taken:", err)
	}
	if err := claim.Close(); err != nil {
		t.Fatal(err)
	}
	if err := Create(vfs.OS{}, dir, p); err != nil {
		t.Fatal(err)
	}
	s := openStore(t, vfs.OS{}, dir)
	if f, err := os.OpenFile(dev, os.O_RDWR|syscall.O_EXCL, 0); !errors.Is(err, syscall.EBUSY) {
		if err == nil {
			_ = f.Close()
		}
		t.Fatal("the device is not claimed:", err)
	}
	if err := s.WriteAt(filled(9, 3*BlockSize), BlockSize); err != nil {
		t.Fatal(err)
	}
	for _, punch := range []bool{true, false} {
		if err := s.Zero(2*BlockSize+512, 1024, punch); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Zero(3*BlockSize, BlockSize, true); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, s.Size())
	if err := s.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	want := make([]byte, s.Size())
	copy(want[BlockSize:], filled(9, 2*BlockSize))
	clear(want[2*BlockSize+512 : 2*BlockSize+1536])
	if !bytes.Equal(got, want) {
		t.Fatal("content differs")
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if r, err := Inspect(vfs.OS{}, filepath.Join(dir, "disk0.meta")); err != nil || r.Image != dev || r.ImageSize != 1<<20 || len(r.Problems) > 0 {
		t.Fatalf("%+v %v", r, err)
	}
	if err := Remove(vfs.OS{}, dir, "disk0"); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dev); err != nil {
		t.Fatal("the device was removed")
	}
}

func TestInspect(t *testing.T) {
	m := vfs.NewMem()
	s := openStore(t, m, "/d")
	if err := s.WriteAt(filled(5, BlockSize), 0); err != nil {
		t.Fatal(err)
	}
	w := epochOf(2, 3)
	w.within = true
	if err := s.Persist(3, 9, w); err != nil {
		t.Fatal(err)
	}
	if err := s.SaveMissing(); err != nil {
		t.Fatal(err)
	}
	m = m.Crash(func() bool { return true })
	before := m.Ops()
	r, err := Inspect(m, "/d/disk0.journal1")
	if err != nil {
		t.Fatal(err)
	}
	if r.Meta.Version != 2 || r.Meta.Clean || r.Log.Extents != 1 || r.Bitmap.Chunks != 1 || r.Journal.Records != 1 ||
		r.Checksums != "complete" || len(r.Problems) != 0 || m.Ops() != before {
		t.Fatalf("%+v %+v %+v", r, r.Log, r.Bitmap)
	}
	if err := m.Remove("/d/disk0.log"); err != nil {
		t.Fatal(err)
	}
	if r, err = Inspect(m, "/d/disk0"); err != nil || len(r.Problems) != 1 {
		t.Fatal(r.Problems, err)
	}
	if _, err = Inspect(m, "/d/other.meta"); err == nil {
		t.Fatal("nothing is there")
	}
}
