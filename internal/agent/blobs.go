package agent

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"

	"perdure/api"
	"perdure/internal/model"
)

const (
	uploadLife  = time.Hour
	spareSpace  = 256 << 20 // bytes of the state directory's file system that uploads leave free
	blobTimeout = 2 * time.Minute
)

var digestRE = regexp.MustCompile(`^[0-9a-f]{64}$`)

// storeBlob keeps what r gives by its digest.
func (a *Agent) storeBlob(r io.Reader, name string) (model.Blob, error) {
	f, err := os.CreateTemp(a.cfg.Path("blobs"), ".new-")
	if err != nil {
		return model.Blob{}, fmt.Errorf("store %s: %w", name, err)
	}
	defer os.Remove(f.Name())
	h := sha256.New()
	n, err := io.Copy(io.MultiWriter(f, h), r)
	err = errors.Join(err, f.Sync(), f.Close())
	if err != nil {
		return model.Blob{}, fmt.Errorf("store %s: %w", name, err)
	}
	b := model.Blob{SHA256: hex.EncodeToString(h.Sum(nil)), Size: n, Name: name}
	if err := os.Rename(f.Name(), a.cfg.BlobPath(b.SHA256)); err != nil {
		return model.Blob{}, fmt.Errorf("store %s: %w", name, err)
	}
	return b, syncDir(a.cfg.Path("blobs"))
}

// fetchBlobs makes the kernel and the initrd of a VM be here, from whichever
// host has them.
func (a *Agent) fetchBlobs(ctx context.Context, spec model.VMSpec, rec model.Record) error {
	for _, b := range []*model.Blob{spec.Kernel, spec.Initrd} {
		if b == nil {
			continue
		}
		if !digestRE.MatchString(b.SHA256) {
			return fmt.Errorf("fetch %s: malformed digest %q", b.Name, b.SHA256)
		}
		if st, err := os.Stat(a.cfg.BlobPath(b.SHA256)); err == nil && st.Size() == b.Size {
			continue
		}
		if err := a.fetchBlob(ctx, *b, rec); err != nil {
			return err
		}
	}
	return nil
}

func (a *Agent) fetchBlob(ctx context.Context, b model.Blob, rec model.Record) error {
	ctx, cancel := context.WithTimeout(ctx, blobTimeout)
	defer cancel()
	var errs []error
	// The primary's host first: it runs from it.
	for _, first := range []bool{true, false} {
		for _, h := range a.otherHosts(true) {
			if (h.Name == rec.Primary.Host) != first {
				continue
			}
			err := a.fetchBlobFrom(ctx, b, h.Name)
			if err == nil {
				return nil
			}
			errs = append(errs, fmt.Errorf("host %s: %w", h.Name, err))
		}
	}
	if len(errs) == 0 {
		errs = append(errs, errors.New("no other host is alive"))
	}
	return fmt.Errorf("fetch %s (%.12s…): %w", b.Name, b.SHA256, errors.Join(errs...))
}

func (a *Agent) fetchBlobFrom(ctx context.Context, b model.Blob, host string) error {
	p, _, err := a.peer(host)
	if err != nil {
		return err
	}
	r, _, err := p.api.Blob(api.WithForwarded(ctx), b.SHA256)
	if err != nil {
		return err
	}
	defer r.Close()
	got, err := a.storeBlob(io.LimitReader(r, b.Size+1), b.Name)
	if err != nil {
		return err
	}
	if got.SHA256 != b.SHA256 {
		os.Remove(a.cfg.BlobPath(got.SHA256))
		return fmt.Errorf("what it sent has another digest (%.12s…)", got.SHA256)
	}
	return nil
}

// sweepBlobs removes files that no VM has named for an hour. It does so only
// with a quorum: an old copy of the store may not know the newest VM.
func (a *Agent) sweepBlobs(now time.Time) {
	if !a.store.Quorum() || !a.store.Loaded() {
		return
	}
	used := map[string]bool{}
	for _, v := range a.store.VMs() {
		for _, b := range []*model.Blob{v.Spec.Kernel, v.Spec.Initrd} {
			if b != nil {
				used[b.SHA256] = true
			}
		}
	}
	entries, err := os.ReadDir(a.cfg.Path("blobs"))
	if err != nil {
		return
	}
	for _, e := range entries {
		st, err := e.Info()
		if err == nil && !used[e.Name()] && now.Sub(st.ModTime()) > uploadLife {
			os.Remove(a.cfg.BlobPath(e.Name()))
		}
	}
}

// Blob implements httpapi.Service.
func (a *Agent) Blob(_ context.Context, digest string) (io.ReadCloser, int64, error) {
	if !digestRE.MatchString(digest) {
		return nil, 0, api.Errorf(api.Invalid, "digest %q is not 64 hexadecimal digits", digest)
	}
	f, err := os.Open(a.cfg.BlobPath(digest))
	if errors.Is(err, os.ErrNotExist) {
		return nil, 0, api.Errorf(api.NotFound, "no file with digest %s is here", digest)
	}
	if err != nil {
		return nil, 0, fmt.Errorf("open blob: %w", err)
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, 0, fmt.Errorf("open blob: %w", err)
	}
	return f, st.Size(), nil
}

// uploads are files received for a later operation.
type uploads struct {
	dir string
	mu  sync.Mutex
	use map[string]int // operations that read it now
}

func (u *uploads) path(id string) string { return filepath.Join(u.dir, id) }

// Upload implements httpapi.Service.
func (a *Agent) Upload(_ context.Context, name string, r io.Reader) (api.Upload, error) {
	free, err := diskFree(a.uploads.dir)
	if err != nil {
		return api.Upload{}, err
	}
	limit := free - spareSpace
	if limit <= 0 {
		return api.Upload{}, api.Errorf(api.Refused, "upload %q: host %s has no disk space left for it", name, a.cfg.Name)
	}
	f, err := os.CreateTemp(a.uploads.dir, ".new-")
	if err != nil {
		return api.Upload{}, fmt.Errorf("upload %q: %w", name, err)
	}
	defer os.Remove(f.Name())
	h := sha256.New()
	n, err := io.Copy(io.MultiWriter(f, h), io.LimitReader(r, limit+1))
	if err = errors.Join(err, f.Close()); err != nil {
		return api.Upload{}, api.Errorf(api.Unavailable, "upload %q broke off: %w", name, err)
	}
	if n > limit {
		return api.Upload{}, api.Errorf(api.Refused, "upload %q is larger than the disk space left on host %s (%s)", name, a.cfg.Name, api.FormatSize(limit))
	}
	up := api.Upload{ID: randomID(12), Size: n, SHA256: hex.EncodeToString(h.Sum(nil))}
	if err := os.Rename(f.Name(), a.uploads.path(up.ID)); err != nil {
		return api.Upload{}, fmt.Errorf("upload %q: %w", name, err)
	}
	return up, nil
}

// take returns the path of a file of a request and a function that gives it
// back; an upload is removed then.
func (u *uploads) take(what string, f *api.File) (path string, release func(), err error) {
	if f.Upload == "" {
		return f.Path, func() {}, nil
	}
	if strings.ContainsAny(f.Upload, "/.") {
		return "", nil, api.Errorf(api.Invalid, "%s: upload %q is malformed", what, f.Upload)
	}
	path = u.path(f.Upload)
	u.mu.Lock()
	defer u.mu.Unlock()
	if _, err := os.Stat(path); err != nil {
		return "", nil, api.Errorf(api.NotFound, "%s: there is no upload %q (each lives for an hour and is used once)", what, f.Upload)
	}
	if u.use == nil {
		u.use = map[string]int{}
	}
	u.use[f.Upload]++
	return path, func() {
		u.mu.Lock()
		defer u.mu.Unlock()
		u.use[f.Upload]--
		if u.use[f.Upload] <= 0 {
			delete(u.use, f.Upload)
			os.Remove(path)
		}
	}, nil
}

// sweep removes uploads that nobody used within their hour, and rests of broken ones.
func (u *uploads) sweep(now time.Time) {
	u.mu.Lock()
	defer u.mu.Unlock()
	entries, err := os.ReadDir(u.dir)
	if err != nil {
		return
	}
	for _, e := range entries {
		st, err := e.Info()
		if err == nil && u.use[e.Name()] == 0 && now.Sub(st.ModTime()) > uploadLife {
			os.Remove(u.path(e.Name()))
		}
	}
}
