package blockstore

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"strings"

	"perdure/internal/vfs"
)

// Report is what the files of a replica say, see Inspect.
type Report struct {
	Dir       string        `json:"dir"`
	Disk      string        `json:"disk"`
	Meta      *MetaReport   `json:"meta,omitempty"`
	Log       *LogReport    `json:"activityLog,omitempty"`
	Bitmap    *BitsReport   `json:"bitmap,omitempty"`
	Checksums string        `json:"checksums"` // off, complete, partly
	Journal   JournalReport `json:"journal"`
	Image     string        `json:"image"`
	Device    bool          `json:"device,omitempty"` // the image is a block device
	ImageSize int64         `json:"imageSize"`
	Problems  []string      `json:"problems,omitempty"` // what is missing or damaged
}

// MetaReport is the metadata.
type MetaReport struct {
	Version  uint32 `json:"version"`
	Sequence uint64 `json:"sequence"`
	VM       string `json:"vm"`
	Size     int64  `json:"size"`
	State    string `json:"state"`
	Clean    bool   `json:"clean"`
	Term     uint64 `json:"term"`
	Branch   string `json:"branch"`
	Run      string `json:"run"`
	Current  string `json:"current"` // generation, in words
	Base     string `json:"base"`
	Toward   string `json:"toward"`
	Primary  bool   `json:"primary"`
}

// LogReport is the activity log.
type LogReport struct {
	Extents  int   `json:"extents"`
	SumsOnly int   `json:"sumsOnly"` // of them, only with checksums in doubt
	Bytes    int64 `json:"bytes"`
}

// BitsReport is the bitmap.
type BitsReport struct {
	Chunks  int64 `json:"chunks"` // that the peer lacks
	Bytes   int64 `json:"bytes"`
	Damaged int64 `json:"damagedPages"`
}

// JournalReport is the epoch journal.
type JournalReport struct {
	Records int   `json:"records"` // that the next start applies
	Bytes   int64 `json:"bytes"`
}

// Inspect reads the files of a replica, of which path is any one, and changes
// nothing. It is for a replica that is not in use; of one that is, what it says
// may be torn. What cannot be read is in Problems; an error means that nothing can be said.
func Inspect(fsys vfs.FS, path string) (Report, error) {
	dir, id := filepath.Split(path)
	for _, ext := range []string{".raw", ".meta", ".log", ".bitmap", ".sums", ".journal0", ".journal1"} {
		if s, ok := strings.CutSuffix(id, ext); ok {
			id = s
			break
		}
	}
	r := Report{Dir: filepath.Clean(dir), Disk: id}
	at := paths(dir, id)
	f, err := fsys.OpenRead(at.meta)
	if err != nil {
		return r, fmt.Errorf("inspect disk %s: %w", id, err)
	}
	meta, err := readMeta(f)
	_ = f.Close() // only read
	if err != nil {
		return r, fmt.Errorf("inspect disk %s: metadata: %w", id, err)
	}
	r.Meta = &MetaReport{Version: meta.version, Sequence: meta.seq, VM: meta.VM, Size: meta.Size, State: string(meta.State), Clean: meta.Clean,
		Term: uint64(meta.Term), Branch: string(meta.Branch), Run: string(meta.Run), Current: meta.Lineage.Current.String(),
		Base: meta.Lineage.Base.String(), Toward: meta.Lineage.Toward.String(), Primary: meta.Lineage.Primary}
	if meta.Disk != id {
		r.problem("the metadata are those of disk %q", meta.Disk)
	}
	r.Image = at.raw
	if meta.Image != "" {
		r.Image = meta.Image
	}
	r.Device = meta.Device
	r.inspect(fsys, r.Image, func(f vfs.File) error { return r.image(f, meta) })
	r.journal(fsys, at, meta)
	r.Checksums = "off"
	if meta.version < 2 {
		return r, nil
	}
	r.inspect(fsys, at.log, func(f vfs.File) error { return r.log(f, meta) })
	r.inspect(fsys, at.bits, func(f vfs.File) error { return r.bits(f, meta) })
	if meta.sums {
		r.Checksums = "partly"
		if meta.complete {
			r.Checksums = "complete"
		}
		r.inspect(fsys, at.sums, func(f vfs.File) error {
			n, err := f.Size()
			if want := extents(meta.Size) * blocksPerExtent * 4; err == nil && n < want {
				err = fmt.Errorf("%d bytes, %d wanted: %w", n, want, ErrCorrupt)
			}
			return err
		})
	}
	return r, nil
}

func (r *Report) problem(f string, args ...any) {
	r.Problems = append(r.Problems, fmt.Sprintf(f, args...))
}

func (r *Report) inspect(fsys vfs.FS, path string, read func(vfs.File) error) {
	f, err := fsys.OpenRead(path)
	if errors.Is(err, fs.ErrNotExist) {
		r.problem("%s is missing", path)
		return
	}
	if err == nil {
		err = read(f)
		_ = f.Close() // only read
	}
	if err != nil {
		r.problem("%s: %v", path, err)
	}
}

func (r *Report) image(f vfs.File, meta metaRecord) (err error) {
	r.ImageSize, err = f.Size()
	if err == nil && r.ImageSize < meta.Size {
		err = fmt.Errorf("%d bytes, the disk has %d: %w", r.ImageSize, meta.Size, ErrCorrupt)
	}
	if err == nil && meta.Image != "" {
		_, err = meta.fits(f)
	}
	return err
}

func (r *Report) log(f vfs.File, meta metaRecord) error {
	list, _, err := readLog(f, journalKey(meta.Meta))
	if err != nil {
		return err
	}
	r.Log = &LogReport{Extents: len(list), Bytes: int64(len(list)) * ExtentSize}
	for _, e := range list {
		if e&logSumsOnly != 0 {
			r.Log.SumsOnly++
		}
	}
	return nil
}

func (r *Report) bits(f vfs.File, meta metaRecord) error {
	var m missing
	if err := m.open(f, journalKey(meta.Meta), meta.Size); err != nil {
		return err
	}
	r.Bitmap = &BitsReport{Chunks: m.bits.Count(), Bytes: m.bits.Count() * ChunkSize, Damaged: int64(m.lost)}
	if m.lost > 0 {
		r.problem("%d pages of the bitmap are damaged, and count as all set", m.lost)
	}
	return nil
}

// journal counts the records that the next start applies.
func (r *Report) journal(fsys vfs.FS, at files, meta metaRecord) {
	s := &Store{id: r.Disk, size: meta.Size}
	s.journal.key = journalKey(meta.Meta)
	for i, p := range at.journals {
		f, err := fsys.OpenRead(p)
		if err != nil {
			r.problem("%s: %v", p, err)
			return
		}
		defer func() { _ = f.Close() }() // only read
		s.journal.areas[i].file = f
	}
	found, err := s.scanJournal(meta)
	if err != nil {
		r.problem("journal: %v", err)
		return
	}
	last := meta.trimmed
	for _, x := range found {
		if x.head.seq <= last {
			continue
		}
		if x.head.seq != last+1 {
			return
		}
		if _, err := readRecord(s.journal.areas[x.area].file, x.off, x.head, s.size); err != nil {
			if !errors.Is(err, errTorn) && !errors.Is(err, io.EOF) {
				r.problem("journal: %v", err)
			}
			return
		}
		last = x.head.seq
		r.Journal.Records++
		r.Journal.Bytes += x.head.length
	}
}
