package shim

import (
	"encoding/json"
	"errors"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"perdure/internal/blockstore"
	"perdure/internal/model"
	"perdure/internal/shimapi"
	"perdure/internal/vfs"
)

// TestReplaceElsewhere lets the disk under a running VM of level ca fail, has its replica made anew
// somewhere else while the guest goes on, and then takes the hosts' power by turns.
func TestReplaceElsewhere(t *testing.T) {
	w := newDry(t, false)
	f := &dryFaults{t: t, w: w, l: newDryLoad(w, 7), r: rand.New(rand.NewPCG(7, 11))}
	w.untilDuplex(30 * time.Second)
	f.l.begin()
	defer func() { f.l.end() }()
	p := f.seat(true)
	const path = "/elsewhere/web"
	value, err := json.Marshal(shimapi.ReplaceDisk{Disk: "disk0", Path: path})
	if err != nil {
		t.Fatal(err)
	}
	f.disk(true, 100*time.Millisecond, 200*time.Millisecond, func(op vfs.Op) error {
		if changes(op) {
			return syscall.EIO
		}
		return nil
	})
	for end := time.Now().Add(60 * time.Second); !bothGood(w.store.get().Record) || p.imagePath() != path; time.Sleep(20 * time.Millisecond) {
		if rec := w.store.get().Record; rec.Mode == model.ModeDuplex && rec.Primary.Host == p.name {
			f.op(p, shimapi.Op{Op: "disk-replace", Value: string(value)})
		}
		if time.Now().After(end) {
			t.Fatalf("the replica of host %s lies at %q: %+v", p.name, p.imagePath(), w.store.get().Record)
		}
	}
	if ok, err := p.disk().Exists(filepath.Join(p.dir, shimapi.DiskDir, "disk0.raw")); ok || err != nil {
		t.Errorf("the old image is still there: %v", err)
	}
	for _, kill := range []bool{true, false} {
		f.round(dryFault{name: "crash", do: func(f *dryFaults) { f.crash(f.seat(true) == p, kill) }})
		if p.imagePath() != path {
			t.Errorf("the replica lies at %q now", p.imagePath())
		}
	}
}

func (h *dryHost) imagePath() string {
	m, _, err := blockstore.Peek(h.disk(), filepath.Join(h.dir, shimapi.DiskDir), "disk0")
	if err != nil {
		return err.Error()
	}
	return m.Image
}

// TestOneImageTwoShims gives two instances one image by two names: the second one does not get it, whatever
// its metadata say.
func TestOneImageTwoShims(t *testing.T) {
	place := t.TempDir()
	image, link := filepath.Join(place, "web.raw"), filepath.Join(place, "link")
	open := func(path string) (*instance, error) {
		dir, err := os.MkdirTemp("", "pshim")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		disks := filepath.Join(dir, shimapi.DiskDir)
		if err := os.Mkdir(disks, 0o700); err != nil {
			t.Fatal(err)
		}
		d := model.DiskSpec{ID: "disk0", Size: 1 << 20}
		p := blockstore.Params{ID: d.ID, VM: "vm", Size: d.Size, State: model.UpToDate, Image: path, Host: "a"}
		if err := blockstore.Create(vfs.OS{}, disks, p); err != nil {
			return nil, err
		}
		i := &instance{cfg: shimapi.Config{Dir: dir, Spec: model.VMSpec{UUID: "vm", Disks: []model.DiskSpec{d}}}, hot: new(hotDisks), closers: new(storeClosers),
			log: slog.New(slog.DiscardHandler), latency: new(latencyMeter), agentUse: new(sync.RWMutex)}
		err = i.openDisks(false)
		t.Cleanup(func() { i.close() })
		return i, err
	}
	first, err := open(image)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Link(image, link); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{image, link} {
		if _, err := open(path); !errors.Is(err, vfs.ErrInUse) {
			t.Errorf("a second shim has %s: %v", path, err)
		}
	}
	if err := first.vols[0].Flush(t.Context()); err != nil {
		t.Error(err)
	}
	// The metadata of the first, copied to where a second shim looks.
	dir := t.TempDir()
	disks := filepath.Join(dir, shimapi.DiskDir)
	if err := os.CopyFS(disks, os.DirFS(filepath.Join(first.cfg.Dir, shimapi.DiskDir))); err != nil {
		t.Fatal(err)
	}
	second := &instance{cfg: shimapi.Config{Dir: dir, Spec: first.cfg.Spec}, hot: new(hotDisks), closers: new(storeClosers),
		log: slog.New(slog.DiscardHandler), latency: new(latencyMeter), agentUse: new(sync.RWMutex)}
	defer second.close()
	if err := second.openDisks(false); !errors.Is(err, vfs.ErrInUse) {
		t.Errorf("a second shim opened the image: %v", err)
	}
}
