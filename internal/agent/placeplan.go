package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"perdure/api"
	"perdure/internal/blockstore"
	"perdure/internal/clusterstore"
	"perdure/internal/model"
	"perdure/internal/shimapi"
	"perdure/internal/vfs"
)

// planPlaces has every host that a request gives a path for look at it. others are the places
// that the same request gives to other disks. device: the place on this host is a block device.
// When the disk was made, or not, release is to be called.
func (a *Agent) planPlaces(ctx context.Context, spec model.VMSpec, d model.DiskSpec, paths map[string]string, overwrite bool, others []model.DiskPlace) (
	out []model.DiskPlace, device bool, release func(), err error) {
	release = func() {}
	defer func() {
		if err != nil {
			release()
			release = func() {}
		}
	}()
	for _, h := range sortedKeys(paths) {
		host, path := h, filepath.Clean(paths[h])
		if host == "" {
			host = a.cfg.Name
			if p, twice := paths[host]; twice {
				return nil, false, release, api.Errorf(api.Invalid, "disk %s: two paths are given for host %s, which makes it: %s and %s", d.ID, host, paths[h], p)
			}
		}
		ask := placeAsk{VM: spec.Name, UUID: spec.UUID, Disk: d.ID, Size: d.Size, Path: path, Overwrite: overwrite}
		for _, o := range others {
			if o.Host == host {
				ask.Others = append(ask.Others, o.Path)
			}
		}
		if host == a.cfg.Name {
			release = a.holdPlace(ask)
		}
		found, err := a.placeOn(ctx, host, ask)
		if err != nil {
			return nil, false, release, err
		}
		if host == a.cfg.Name {
			device = found.Device
		}
		out = append(out, model.DiskPlace{Disk: d.ID, Host: host, Path: path, Overwrite: overwrite})
	}
	return out, device, release, nil
}

// at is the path of the new disk's replica on a host; empty: the state directory.
func (p *attachPlan) at(host string) string {
	for _, at := range p.places {
		if at.Host == host {
			return at.Path
		}
	}
	return ""
}

// notOnto refuses to import an image onto itself.
func notOnto(what string, img *image, at string) error {
	if img == nil || at == "" {
		return nil
	}
	from, err := os.Stat(img.path)
	to, terr := os.Stat(at)
	if err == nil && terr == nil && os.SameFile(from, to) {
		return api.Errorf(api.Invalid, "%s: path %s: it is the image that the disk is to be filled from; an image is copied, never used in place", what, at)
	}
	return nil
}

// importTo fills the image of a replica that is about to be made: raw, or where a path is
// given, that. A device reads as zeroes behind what the imported image has.
func (a *Agent) importTo(ctx context.Context, img image, size int64, raw, at string, device bool, done func(int64)) error {
	switch {
	case at == "":
		return a.convert(ctx, img, raw, done)
	case !device:
		made := false
		if _, err := os.Lstat(at); errors.Is(err, os.ErrNotExist) {
			made = true
		}
		err := a.convert(ctx, img, at, done)
		if err != nil && made {
			err = errors.Join(err, os.Remove(at))
		}
		return err
	}
	if err := a.convert(ctx, img, at, done); err != nil {
		return err
	}
	f, err := vfs.OS{}.OpenLocked(at)
	if err != nil {
		return err
	}
	for off := img.size; off < size && err == nil; off += 1 << 30 {
		err = f.Zero(off, min(1<<30, size-off), true)
	}
	return errors.Join(err, f.Sync(), f.Close())
}

// removeVMFiles removes the directory of a VM and the images of its replicas that lie elsewhere.
func (a *Agent) removeVMFiles(dir string) error {
	files, err := filepath.Glob(dir + "/" + shimapi.DiskDir + "/*.meta")
	if err != nil {
		return fmt.Errorf("look for replicas: %w", err)
	}
	for _, f := range files {
		id := strings.TrimSuffix(filepath.Base(f), ".meta")
		left, err := blockstore.Release(vfs.OS{}, filepath.Dir(f), id, false)
		if err != nil {
			return err
		}
		if left != nil {
			a.log.Warn("the image of a removed VM is left behind", "dir", dir, "disk", id, "error", left)
		}
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove %s: %w", dir, err)
	}
	return nil
}

// roomToGrow checks that the replicas of a disk can become as large as size: here, and on
// the hosts where it lies at a path of its own.
func (a *Agent) roomToGrow(ctx context.Context, v clusterstore.VMView, disk string, now, size int64) error {
	hosts := []string{a.cfg.Name}
	for _, p := range v.Spec.Places {
		if p.Disk == disk && p.Host != a.cfg.Name {
			hosts = append(hosts, p.Host)
		}
	}
	for _, h := range hosts {
		at, ok := v.Spec.Place(disk, h)
		if !ok {
			free, err := diskFree(a.cfg.Path("vms"))
			if err != nil {
				return err
			}
			if size-now > free {
				return api.Errorf(api.Invalid, "disk %s needs %s more; host %s has %s free in %s", disk, api.FormatSize(size-now), h, api.FormatSize(free), a.cfg.StateDir)
			}
			continue
		}
		if _, err := a.placeOn(ctx, h, placeAsk{VM: v.Spec.Name, UUID: v.Spec.UUID, Disk: disk, Size: size, Path: at.Path, Grow: now}); err != nil {
			return err
		}
	}
	return nil
}

// growAt says why what is at a path cannot become larger.
func growAt(ask placeAsk) error {
	s, err := spotOf(ask.Path)
	if err != nil || !s.exists {
		return placeError(ask, "it is not there: %w", errors.Join(err, os.ErrNotExist))
	}
	if !s.device() {
		free, err := diskFree(filepath.Dir(s.real))
		if err != nil {
			return placeError(ask, "%w", err)
		}
		if ask.Size-ask.Grow > free {
			return placeError(ask, "%s more are needed; %s are free in %s", api.FormatSize(ask.Size-ask.Grow), api.FormatSize(free), filepath.Dir(s.real))
		}
		return nil
	}
	f, err := os.Open(s.real)
	if err != nil {
		return placeError(ask, "%w", plainPath(err))
	}
	defer f.Close()
	n, err := unix.Seek(int(f.Fd()), 0, unix.SEEK_END)
	if err != nil {
		return placeError(ask, "find its size: %w", err)
	}
	if n < ask.Size+blockstore.StampSize {
		return placeError(ask, "the device has %d bytes, the replica would need %d: the disk's new %s and %d bytes behind it", n, ask.Size+blockstore.StampSize, api.FormatSize(ask.Size), blockstore.StampSize).
			WithAction("make the device larger first, such as by lvextend")
	}
	return nil
}
