package agent

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"perdure/api"
	"perdure/internal/vfs"
)

const (
	probeImageTimeout = 20 * time.Second
	diskGrain         = 4096
)

// image is a disk image that was looked at and found fit for import.
type image struct {
	path   string
	format string
	size   int64 // of the virtual disk, bytes, rounded up to whole blocks
}

// imageInfo is the part of `qemu-img info --output=json` that matters.
type imageInfo struct {
	VirtualSize int64  `json:"virtual-size"`
	Format      string `json:"format"`
	Backing     string `json:"backing-filename"`
	Encrypted   bool   `json:"encrypted"`
	Specific    struct {
		Data struct {
			DataFile string `json:"data-file"`
			Extents  []struct {
				Filename string `json:"filename"`
			} `json:"extents"`
		} `json:"data"`
	} `json:"format-specific"`
}

// probeImage looks at an image before anything is made from it. Images that
// refer to other files are refused: they would make this host read files for
// whoever wrote the image.
func (a *Agent) probeImage(ctx context.Context, what, path, format string) (image, error) {
	st, err := os.Stat(path)
	switch {
	case err != nil:
		return image{}, api.Errorf(api.Invalid, "%s: %w", what, err)
	case !st.Mode().IsRegular():
		return image{}, api.Errorf(api.Invalid, "%s: %s is not a regular file", what, path)
	case st.Size() == 0:
		return image{}, api.Errorf(api.Invalid, "%s: %s is empty", what, path)
	}
	ctx, cancel := context.WithTimeout(ctx, probeImageTimeout)
	defer cancel()
	args := []string{"info", "--output=json"}
	if format != "" {
		args = append(args, "-f", format)
	}
	// The file: prefix keeps a name with a colon from being taken for a protocol.
	out, err := a.qemuImg(ctx, append(args, "file:"+path)...)
	if err != nil {
		return image{}, api.Errorf(api.Invalid, "%s: %s is no image that can be read: %w", what, path, err)
	}
	var info imageInfo
	if err := json.Unmarshal(out, &info); err != nil {
		return image{}, fmt.Errorf("%s: read qemu-img's answer: %w", what, err)
	}
	if err := info.check(path); err != nil {
		return image{}, api.Errorf(api.Invalid, "%s: %w", what, err)
	}
	if info.Format == "raw" && format == "" && st.Size()%512 != 0 {
		return image{}, api.Errorf(api.Invalid, "%s: %s is no disk image: no known format, and %d bytes are no whole number of sectors", what, path, st.Size()).
			WithAction("give the format if it is one all the same (format=raw)")
	}
	return image{path: path, format: info.Format, size: (info.VirtualSize + diskGrain - 1) / diskGrain * diskGrain}, nil
}

func (i *imageInfo) check(path string) error {
	switch i.Format {
	case "raw", "qcow2", "vmdk":
	default:
		return fmt.Errorf("%s has format %q; allowed are raw, qcow2 and vmdk", path, i.Format)
	}
	switch {
	case i.Backing != "":
		return fmt.Errorf("%s has the backing file %q; images with backing files are not imported (flatten it: qemu-img convert)", path, i.Backing)
	case i.Specific.Data.DataFile != "":
		return fmt.Errorf("%s keeps its data in another file, %q; such images are not imported (flatten it: qemu-img convert)", path, i.Specific.Data.DataFile)
	case i.Encrypted:
		return fmt.Errorf("%s is encrypted; encrypted images are not imported", path)
	case i.VirtualSize <= 0 || i.VirtualSize > api.MaxDisk:
		return fmt.Errorf("%s says that its disk has %d bytes; allowed are 1 to %d", path, i.VirtualSize, api.MaxDisk)
	}
	for _, e := range i.Specific.Data.Extents {
		if filepath.Clean(strings.TrimPrefix(e.Filename, "file:")) != filepath.Clean(path) {
			return fmt.Errorf("%s keeps its data in another file, %q; such images are not imported", path, e.Filename)
		}
	}
	return nil
}

// convert copies an image to a raw file and reports bytes as they are done.
func (a *Agent) convert(ctx context.Context, img image, to string, done func(int64)) error {
	protocol := "file:"
	if device, err := (vfs.OS{}).IsDevice(to); err == nil && device {
		protocol = "host_device:"
	}
	cmd := exec.CommandContext(ctx, a.cfg.QEMUImg, "convert", "-p", "-f", img.format, "-O", "raw", "file:"+img.path, protocol+to)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return fmt.Errorf("import %s: %w", img.path, err)
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("import %s: %w", img.path, err)
	}
	// Progress comes as "    (12.34/100%)\r".
	sc := bufio.NewScanner(out)
	sc.Split(func(data []byte, eof bool) (int, []byte, error) {
		if i := bytes.IndexByte(data, '\r'); i >= 0 {
			return i + 1, data[:i], nil
		}
		if eof && len(data) > 0 {
			return len(data), data, nil
		}
		return 0, nil, nil
	})
	for sc.Scan() {
		s, _, ok := strings.Cut(strings.TrimLeft(sc.Text(), " ("), "/")
		if pct, err := strconv.ParseFloat(s, 64); ok && err == nil {
			done(int64(pct / 100 * float64(img.size)))
		}
	}
	if err := cmd.Wait(); err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return fmt.Errorf("import %s: %s", img.path, oneLine(stderr.Bytes(), err))
	}
	done(img.size)
	return nil
}

func (a *Agent) qemuImg(ctx context.Context, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, a.cfg.QEMUImg, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	switch {
	case errors.Is(err, exec.ErrNotFound):
		return nil, fmt.Errorf("the program %s is missing (package qemu-utils)", a.cfg.QEMUImg)
	case err != nil && ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case err != nil:
		return nil, errors.New(oneLine(stderr.Bytes(), err))
	}
	return out, nil
}

// oneLine makes a program's complaint fit into a message.
func oneLine(stderr []byte, err error) string {
	s := strings.Join(strings.Fields(string(bytes.TrimSpace(stderr))), " ")
	s = strings.TrimPrefix(s, "qemu-img: ")
	if s == "" {
		return err.Error()
	}
	if len(s) > 300 {
		s = s[:300] + "…"
	}
	return s
}
