package blockstore

import (
	"fmt"

	"perdure/internal/vfs"
)

// ReadMeta reads the metadata of a replica and nothing else. It takes no lock, so of
// a replica in use they may be a moment old.
func ReadMeta(fsys vfs.FS, dir, id string) (Meta, error) {
	m, err := metaOf(fsys, dir, id)
	if err != nil {
		return Meta{}, fmt.Errorf("read metadata of disk %s: %w", id, err)
	}
	return m.Meta, nil
}

// Peek reads the metadata of a replica, and how many bytes of it the peer lacks at
// most, by bitmap and activity log. It takes no lock and changes nothing, so of a
// replica in use it may be a moment old.
func Peek(fsys vfs.FS, dir, id string) (m Meta, marked int64, err error) {
	at := paths(dir, id)
	read := func(path string, f func(vfs.File) error) {
		if err != nil {
			return
		}
		var file vfs.File
		if file, err = fsys.OpenRead(path); err != nil {
			return
		}
		err = f(file)
		_ = file.Close() // only read
	}
	var meta metaRecord
	read(at.meta, func(f vfs.File) (err error) { meta, err = readMeta(f); return err })
	if err == nil && meta.version >= 2 {
		var miss missing
		var list []uint32
		read(at.bits, func(f vfs.File) error { return miss.open(f, journalKey(meta.Meta), meta.Size) })
		read(at.log, func(f vfs.File) (err error) { list, _, err = readLog(f, journalKey(meta.Meta)); return err })
		for _, e := range list {
			if e&logSumsOnly == 0 && err == nil {
				first := int64(e) * chunksPerExtent
				miss.bits.SetRange(first, min(first+chunksPerExtent, miss.bits.Len()))
			}
		}
		if err == nil {
			marked = min(miss.bits.Count()*ChunkSize, meta.Size)
		}
	}
	if err != nil {
		return Meta{}, 0, fmt.Errorf("look at disk %s: %w", id, err)
	}
	return meta.Meta, marked, nil
}
