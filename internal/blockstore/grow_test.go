package blockstore

import (
	"bytes"
	"errors"
	"fmt"
	"testing"

	"perdure/internal/vfs"
)

// grown opens the replica and checks that its first testBlocks blocks are those of
// stamp, that the rest is zero, and that it can be written to its end.
func grown(m *vfs.Mem, sizes ...int64) (size int64, err error) {
	st, err := Open(m, "/d", "disk0", Options{})
	if err != nil {
		return 0, err
	}
	defer st.Close()
	if _, err := st.Replay(); err != nil {
		return 0, err
	}
	size = st.Size()
	ok := false
	for _, s := range sizes {
		ok = ok || s == size
	}
	if !ok {
		return size, fmt.Errorf("size %d, wanted one of %d", size, sizes)
	}
	b := make([]byte, size)
	if err := st.ReadAt(b, 0); err != nil {
		return size, err
	}
	for n := range size / BlockSize {
		want := make([]byte, BlockSize)
		if n < testBlocks {
			want = bytes.Repeat([]byte{byte(n + 1)}, BlockSize)
		}
		if !bytes.Equal(b[n*BlockSize:][:BlockSize], want) {
			return size, fmt.Errorf("block %d holds something else", n)
		}
	}
	if c := st.MissingCount(); c > testBlocks*BlockSize/ChunkSize+1 {
		return size, fmt.Errorf("%d chunks are marked", c)
	}
	last := bytes.Repeat([]byte{0xee}, BlockSize)
	if err := st.WriteAt(last, size-BlockSize); err != nil {
		return size, err
	}
	if err := st.Flush(); err != nil {
		return size, err
	}
	got := make([]byte, BlockSize)
	if err := st.ReadAt(got, size-BlockSize); err != nil || !bytes.Equal(got, last) {
		return size, fmt.Errorf("the last block reads otherwise: %v", err)
	}
	return size, nil
}

func toGrow(t *testing.T, where string) *vfs.Mem {
	t.Helper()
	m := vfs.NewMem()
	if err := Create(m, "/d", paramsAt(t, m, where, growLarge+StampSize)); err != nil {
		t.Fatal(err)
	}
	st := openStore(t, m, "/d")
	for n := range int64(testBlocks) {
		if err := st.WriteAt(bytes.Repeat([]byte{byte(n + 1)}, BlockSize), n*BlockSize); err != nil {
			t.Fatal(err)
		}
	}
	if err := st.Close(); err != nil {
		t.Fatal(err)
	}
	return m
}

// TestCrashInGrow takes the power at each operation: the replica has its old size or
// the new one, and all its data, and can be made larger once more.
func TestCrashInGrow(t *testing.T) {
	for _, where := range []string{"", "file", "device"} {
		t.Run("image in "+where, func(t *testing.T) { crashInGrow(t, where) })
	}
}

// growLarge is beyond a page of checksums and one of the bitmap.
const growLarge = testBlocks*BlockSize + 5<<30

func crashInGrow(t *testing.T, where string) {
	old, large := testParams().Size, int64(growLarge)
	if where != "" {
		large = old + 96<<20 // what is written is the same, and takes less time
	}
	cases, olds, news := 0, 0, 0
	for stop := 0; ; stop++ {
		done := false
		for name, keep := range keeps(int64(stop)) {
			m := toGrow(t, where)
			first := m.Ops()
			m.SetHook(func(op vfs.Op) error {
				if op.Index >= first+stop {
					return vfs.ErrCrashed
				}
				return nil
			})
			err := Grow(m, "/d", "disk0", large)
			done = err == nil
			m = m.Crash(keep)
			rep, ierr := Inspect(m, "/d/disk0")
			if ierr != nil || len(rep.Problems) > 0 {
				t.Fatalf("operation %d, %s: %v %v", stop, name, ierr, rep.Problems)
			}
			size := rep.Meta.Size
			if size != old && size != large || err == nil && size != large {
				t.Fatalf("operation %d, %s: size %d after %v", stop, name, size, err)
			}
			if size == old {
				olds++
			} else {
				news++
			}
			// Made larger by less than the attempt that broke off: nothing of it shines through.
			again := max(size, old+64<<20)
			if err := Grow(m, "/d", "disk0", again); err != nil {
				t.Fatalf("operation %d, %s: once more: %v", stop, name, err)
			}
			if again < large {
				if _, err := grown(m, again); err != nil {
					t.Fatalf("operation %d, %s: %v", stop, name, err)
				}
			}
			cases++
		}
		if done {
			break
		}
	}
	if olds == 0 || news == 0 {
		t.Errorf("%d crashes left the old size, %d the new one", olds, news)
	}
	t.Logf("%d crashes, %d left the old size", cases, olds)
}

func TestGrowRefuses(t *testing.T) {
	m := toGrow(t, "")
	size := testParams().Size
	if err := Grow(m, "/d", "disk0", size-BlockSize); !errors.Is(err, ErrState) {
		t.Errorf("made smaller: %v", err)
	}
	if err := Grow(m, "/d", "disk0", size+1); err == nil {
		t.Error("an odd size")
	}
	if err := Grow(m, "/d", "disk0", size); err != nil {
		t.Errorf("the same size: %v", err)
	}
	if err := Grow(m, "/d", "disk9", size); err == nil {
		t.Error("a disk that is not there")
	}
	st := openStore(t, m, "/d")
	if err := Grow(m, "/d", "disk0", 2*size); !errors.Is(err, vfs.ErrInUse) {
		t.Errorf("made larger while it is open: %v", err)
	}
	if err := st.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := grown(m, size); err != nil {
		t.Error(err)
	}
}
