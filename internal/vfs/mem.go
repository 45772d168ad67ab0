package vfs

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"sync"
)

// ErrCrashed is what a crashed Mem answers, and what a Hook may use to crash it at an operation.
var ErrCrashed = errors.New("vfs: the file system has crashed")

// Sector is what a crash keeps or loses as a whole, in bytes.
const Sector = 512

// Op is one operation on a Mem, as a Hook sees it.
type Op struct {
	Index int    // counts from 0; only operations that change something durable or could
	Kind  string // "create", "rename", "remove", "syncdir", "write", "zero", "truncate", "sync"; and "read", not counted
	Path  string
	Off   int64
	Len   int64
}

// Hook is called before each operation; an error makes the operation fail with
// it. A write that fails may all the same have happened, wholly or in parts. A
// sync that fails loses, for good, what it should have made durable, while
// readers still see it: Linux marks such pages clean.
type Hook func(Op) error

// Mem is a file system in memory for tests. It keeps beside the current content
// what is durable, and the changes between the two; Crash builds the file
// system that is found after a loss of power. There is one level of
// directories, which need not be made. Safe for concurrent use.
type Mem struct {
	mu      sync.Mutex
	names   map[string]*inode // as seen now
	durable map[string]*inode // as of the last SyncDir
	dirOps  []dirOp
	hook    Hook
	lie     func(path string) bool
	ops     int
	dead    bool
}

// dirOp is one change of names that is not durable yet: to gets node, from goes.
type dirOp struct {
	from, to string
	node     *inode
}

type inode struct {
	cur, dur content
	pending  []change // since the last Sync, in order
	locked   bool
}

// change is one unsynced change of a file's content.
type change struct {
	off  int64
	data []byte // written
	zero int64  // or: zeroed length
	size int64  // or: new size, if ≥ 0
}

// content is a sparse array of pages.
type content struct {
	size  int64
	pages map[int64]*[memPage]byte
}

const memPage = 4096

// NewMem returns an empty file system.
func NewMem() *Mem {
	return &Mem{names: map[string]*inode{}, durable: map[string]*inode{}}
}

// SetHook sets or (nil) removes the hook. It is called without locks held.
func (m *Mem) SetHook(h Hook) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.hook = h
}

// SetLie makes Sync of the files that lie names succeed without making anything
// durable: for tests of tests, which must find out.
func (m *Mem) SetLie(lie func(path string) bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.lie = lie
}

// Ops is how many operations were counted so far.
func (m *Mem) Ops() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.ops
}

// Crash ends this file system: open files answer ErrCrashed. It returns what is
// found afterwards. Of what was not synced each sector of each write survives
// if keep says so, and of unsynced changes of names a prefix.
func (m *Mem) Crash(keep func() bool) *Mem {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.dead = true
	n := NewMem()
	for _, op := range m.dirOps {
		if !keep() {
			break
		}
		op.apply(m.durable)
	}
	for name, node := range m.durable {
		c := node.dur.clone()
		for _, ch := range node.pending {
			ch.apply(&c, keep)
		}
		fresh := &inode{cur: c, dur: c.clone()}
		n.names[name], n.durable[name] = fresh, fresh
	}
	return n
}

func (op dirOp) apply(names map[string]*inode) {
	if op.from != "" {
		delete(names, op.from)
	}
	if op.to != "" {
		names[op.to] = op.node
	}
}

// begin counts an operation and asks the hook.
func (m *Mem) begin(kind, path string, off, n int64) error {
	m.mu.Lock()
	if m.dead {
		m.mu.Unlock()
		return ErrCrashed
	}
	op := Op{Index: m.ops, Kind: kind, Path: path, Off: off, Len: n}
	if kind != "read" {
		m.ops++
	}
	h := m.hook
	m.mu.Unlock()
	if h != nil {
		return h(op)
	}
	return nil
}

// Open implements FS.
func (m *Mem) Open(path string) (File, error) {
	path = filepath.Clean(path)
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.dead {
		return nil, ErrCrashed
	}
	node, ok := m.names[path]
	if !ok {
		return nil, &fs.PathError{Op: "open", Path: path, Err: fs.ErrNotExist}
	}
	return &memFile{m: m, node: node, path: path}, nil
}

// OpenLocked implements FS.
func (m *Mem) OpenLocked(path string) (File, error) {
	f, err := m.Open(path)
	if err != nil {
		return nil, err
	}
	mf := f.(*memFile)
	m.mu.Lock()
	defer m.mu.Unlock()
	if mf.node.locked {
		return nil, fmt.Errorf("open %s: %w", path, ErrInUse)
	}
	mf.node.locked, mf.locks = true, true
	return mf, nil
}

// OpenRead implements FS.
func (m *Mem) OpenRead(path string) (File, error) {
	f, err := m.Open(path)
	if err != nil {
		return nil, err
	}
	f.(*memFile).readOnly = true
	return f, nil
}

// Create implements FS.
func (m *Mem) Create(path string) (File, error) {
	path = filepath.Clean(path)
	if err := m.begin("create", path, 0, 0); err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.names[path]; ok {
		return nil, &fs.PathError{Op: "create", Path: path, Err: fs.ErrExist}
	}
	node := &inode{}
	m.rename(dirOp{to: path, node: node})
	return &memFile{m: m, node: node, path: path}, nil
}

// Rename implements FS.
func (m *Mem) Rename(oldPath, newPath string) error {
	oldPath, newPath = filepath.Clean(oldPath), filepath.Clean(newPath)
	if err := m.begin("rename", newPath, 0, 0); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	node, ok := m.names[oldPath]
	if !ok {
		return &fs.PathError{Op: "rename", Path: oldPath, Err: fs.ErrNotExist}
	}
	m.rename(dirOp{from: oldPath, to: newPath, node: node})
	return nil
}

// Remove implements FS.
func (m *Mem) Remove(path string) error {
	path = filepath.Clean(path)
	if err := m.begin("remove", path, 0, 0); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.names[path]; !ok {
		return &fs.PathError{Op: "remove", Path: path, Err: fs.ErrNotExist}
	}
	m.rename(dirOp{from: path})
	return nil
}

func (m *Mem) rename(op dirOp) {
	op.apply(m.names)
	m.dirOps = append(m.dirOps, op)
}

// Exists implements FS.
func (m *Mem) Exists(path string) (bool, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	_, ok := m.names[filepath.Clean(path)]
	return ok, nil
}

// SyncDir implements FS. It makes all names durable, of whatever directory.
func (m *Mem) SyncDir(path string) error {
	if err := m.begin("syncdir", path, 0, 0); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, op := range m.dirOps {
		op.apply(m.durable)
	}
	m.dirOps = nil
	return nil
}

type memFile struct {
	m        *Mem
	node     *inode
	path     string
	locks    bool // it holds the inode's lock
	readOnly bool
}

func (f *memFile) ReadAt(p []byte, off int64) (int, error) {
	if err := f.m.begin("read", f.path, off, int64(len(p))); err != nil {
		return 0, err
	}
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	n := int(min(int64(len(p)), max(0, f.node.cur.size-off)))
	f.node.cur.read(p[:n], off)
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (f *memFile) WriteAt(p []byte, off int64) (int, error) {
	err := f.m.begin("write", f.path, off, int64(len(p)))
	if err := f.change(change{off: off, data: append([]byte(nil), p...), size: -1}, err); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (f *memFile) Zero(off, n int64, punch bool) error {
	err := f.m.begin("zero", f.path, off, n)
	return f.change(change{off: off, zero: n, size: -1}, err)
}

func (f *memFile) Truncate(size int64) error {
	err := f.m.begin("truncate", f.path, 0, size)
	return f.change(change{size: size}, err)
}

// change applies c even if the operation failed: a failed write may have happened.
func (f *memFile) change(c change, failed error) error {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if f.m.dead {
		return ErrCrashed
	}
	if f.readOnly {
		return fmt.Errorf("write %s: %w", f.path, fs.ErrPermission)
	}
	c.apply(&f.node.cur, func() bool { return true })
	f.node.pending = append(f.node.pending, c)
	if failed != nil {
		return fmt.Errorf("write %s: %w", f.path, failed)
	}
	return nil
}

func (f *memFile) Sync() error {
	err := f.m.begin("sync", f.path, 0, 0)
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if err != nil && !errors.Is(err, ErrCrashed) {
		f.node.pending = nil
	}
	if err != nil {
		return fmt.Errorf("sync %s: %w", f.path, err)
	}
	if f.m.lie != nil && f.m.lie(f.path) {
		return nil
	}
	for _, c := range f.node.pending {
		c.apply(&f.node.dur, func() bool { return true })
	}
	f.node.pending = nil
	return nil
}

func (f *memFile) Extent(off, n int64) (length int64, hole bool, err error) {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	c := &f.node.cur
	_, data := c.pages[off/memPage]
	end := (off/memPage + 1) * memPage
	for end < off+n {
		if _, d := c.pages[end/memPage]; d != data {
			break
		}
		end += memPage
	}
	return min(n, end-off), !data, nil
}

func (f *memFile) Size() (int64, error) {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	return f.node.cur.size, nil
}

func (f *memFile) Close() error {
	f.m.mu.Lock()
	defer f.m.mu.Unlock()
	if f.locks {
		f.locks, f.node.locked = false, false
	}
	return nil
}

// apply carries out the sectors of a change that keep lets through.
func (c change) apply(to *content, keep func() bool) {
	switch {
	case c.size >= 0:
		if keep() {
			to.truncate(c.size)
		}
	case c.zero > 0:
		for at := c.off; at < c.off+c.zero; {
			n := min(memPage-at%memPage, c.off+c.zero-at)
			if keep() {
				to.zero(at, n)
			}
			at += n
		}
	default:
		for p, at := c.data, c.off; len(p) > 0; {
			n := min(Sector-at%Sector, int64(len(p)))
			if keep() {
				to.write(p[:n], at)
			}
			p, at = p[n:], at+n
		}
	}
}

func (c *content) clone() content {
	n := content{size: c.size, pages: make(map[int64]*[memPage]byte, len(c.pages))}
	for i, p := range c.pages {
		q := *p
		n.pages[i] = &q
	}
	return n
}

// each calls fn for the page-wise pieces of a range.
func each(off, n int64, fn func(page, from, to int64)) {
	for at := off; at < off+n; {
		k := min(memPage-at%memPage, off+n-at)
		fn(at/memPage, at%memPage, at%memPage+k)
		at += k
	}
}

func (c *content) read(p []byte, off int64) {
	each(off, int64(len(p)), func(page, from, to int64) {
		dst := p[page*memPage+from-off : page*memPage+to-off]
		if q := c.pages[page]; q != nil {
			copy(dst, q[from:to])
		} else {
			clear(dst)
		}
	})
}

func (c *content) write(p []byte, off int64) {
	if c.pages == nil {
		c.pages = map[int64]*[memPage]byte{}
	}
	c.size = max(c.size, off+int64(len(p)))
	each(off, int64(len(p)), func(page, from, to int64) {
		q := c.pages[page]
		if q == nil {
			q = new([memPage]byte)
			c.pages[page] = q
		}
		copy(q[from:to], p[page*memPage+from-off:])
	})
}

// zero makes holes of whole pages and zeroes in parts of others.
func (c *content) zero(off, n int64) {
	each(off, min(n, c.size-off), func(page, from, to int64) {
		if from == 0 && to == memPage {
			delete(c.pages, page)
		} else if q := c.pages[page]; q != nil {
			clear(q[from:to])
		}
	})
}

func (c *content) truncate(size int64) {
	if size < c.size {
		c.zero(size, c.size-size)
		for i := range c.pages {
			if i*memPage >= size {
				delete(c.pages, i)
			}
		}
	}
	c.size = size
}
