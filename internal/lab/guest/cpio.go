package guest

import (
	"fmt"
	"io"
	"path"
	"strings"
)

// cpioWriter writes an initramfs in the "newc" format that Linux unpacks
// (Documentation/driver-api/early-userspace/buffer-format.rst). The same
// entries always give the same bytes: no times, no owners but root.
type cpioWriter struct {
	w    io.Writer
	n    int64 // written so far, for padding
	ino  int
	dirs map[string]bool
	err  error
}

// File modes of an archive member, as in stat(2).
const (
	modeDir  = 0o040000
	modeReg  = 0o100000
	modeLink = 0o120000
	modeChar = 0o020000
)

func newCPIO(w io.Writer) *cpioWriter { return &cpioWriter{w: w, dirs: map[string]bool{}} }

// file adds a regular file and the directories above it.
func (c *cpioWriter) file(name string, perm uint32, data []byte) {
	c.parents(name)
	c.member(name, modeReg|perm, 0, 0, data)
}

func (c *cpioWriter) symlink(name, target string) {
	c.parents(name)
	c.member(name, modeLink|0o777, 0, 0, []byte(target))
}

func (c *cpioWriter) char(name string, perm uint32, major, minor int) {
	c.parents(name)
	c.member(name, modeChar|perm, major, minor, nil)
}

func (c *cpioWriter) dir(name string) {
	name = strings.Trim(name, "/")
	if name == "" || name == "." || c.dirs[name] {
		return
	}
	c.dirs[name] = true
	c.parents(name)
	c.member(name, modeDir|0o755, 0, 0, nil)
}

func (c *cpioWriter) parents(name string) { c.dir(path.Dir(strings.Trim(name, "/"))) }

// member writes one header, name and content, each padded to 4 bytes.
func (c *cpioWriter) member(name string, mode uint32, major, minor int, data []byte) {
	name = strings.Trim(name, "/")
	c.ino++
	c.printf("070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
		c.ino, mode, 0, 0, 1, 0, len(data), 0, 0, major, minor, len(name)+1, 0)
	c.printf("%s\x00", name)
	c.pad(4)
	c.write(data)
	c.pad(4)
}

// close ends the archive.
func (c *cpioWriter) close() error {
	c.ino = -1 // the trailer's is 0
	c.member("TRAILER!!!", 0, 0, 0, nil)
	c.pad(512)
	return c.err
}

func (c *cpioWriter) pad(to int64) {
	if r := c.n % to; r != 0 {
		c.write(make([]byte, to-r))
	}
}

func (c *cpioWriter) printf(format string, args ...any) { c.write(fmt.Appendf(nil, format, args...)) }

func (c *cpioWriter) write(b []byte) {
	if c.err != nil {
		return
	}
	n, err := c.w.Write(b)
	c.n += int64(n)
	c.err = err
}
