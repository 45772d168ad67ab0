package httpapi_test

import (
	"testing"
	"time"

	"perdure/api"
	"perdure/internal/httpapi/apitest"
)

func TestDisks(t *testing.T) {
	f := apitest.New()
	f.VMList["web"] = apitest.Protected("web")
	c, _ := serveUnix(t, f)
	ctx := t.Context()
	must := func(op api.Operation, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		if op, err = c.Operation(ctx, op.ID, 5*time.Second); err != nil || op.State != api.OperationDone {
			t.Fatalf("operation: %+v, %v", op, err)
		}
	}
	l, err := c.AllDisks(ctx)
	if err != nil || len(l) != 1 || l[0].ID != "disk0" || len(l[0].Replicas) != 2 || l[0].Problems == nil || l[0].Sync == nil {
		t.Fatalf("%+v, %v", l, err)
	}
	must(c.AttachDisk(ctx, "web", api.AttachDisk{Size: 1 << 30, ID: "data"}))
	must(c.ResizeDisk(ctx, "web", "data", api.ResizeDisk{Size: 2 << 30}))
	d, err := c.Disk(ctx, "web", "data")
	if err != nil || d.Size != 2<<30 || d.Slot != 17 {
		t.Fatalf("%+v, %v", d, err)
	}
	must(c.ReplaceDisk(ctx, "web", "data", api.ReplaceDisk{Host: "hostb", Path: "/srv/web.raw", Overwrite: true}))
	must(c.DetachDisk(ctx, "web", "data", api.DetachDisk{Delete: true}))
	if l, err = c.Disks(ctx, "web"); err != nil || len(l) != 1 {
		t.Fatalf("%+v, %v", l, err)
	}
	for _, want := range []string{"DetachDisk web data {Delete:true}", "ReplaceDisk web data {Host:hostb Path:/srv/web.raw Overwrite:true}", "ResizeDisk web data {Size:2147483648}"} {
		found := false
		for _, call := range f.Calls {
			found = found || call == want
		}
		if !found {
			t.Errorf("no call %q among %q", want, f.Calls)
		}
	}

	_, err = c.Disk(ctx, "web", "disk9")
	wantClass(t, err, api.NotFound, `no disk "disk9"`)
	_, err = c.Disks(ctx, "none")
	wantClass(t, err, api.NotFound, "none")
	_, err = c.AttachDisk(ctx, "web", api.AttachDisk{Size: 1 << 30, ID: "disk0"})
	wantClass(t, err, api.Conflict, "already")
	_, err = c.AttachDisk(ctx, "web", api.AttachDisk{Size: 1<<30 + 1})
	wantClass(t, err, api.Invalid, "multiple of 4096")
	_, err = c.AttachDisk(ctx, "web", api.AttachDisk{})
	wantClass(t, err, api.Invalid, "out of range")
	_, err = c.AttachDisk(ctx, "web", api.AttachDisk{Image: &api.File{Path: "relative"}})
	wantClass(t, err, api.Invalid, "not absolute")
	_, err = c.ResizeDisk(ctx, "web", "disk0", api.ResizeDisk{Size: 1 << 30})
	wantClass(t, err, api.Refused, "would be lost")
	_, err = c.ResizeDisk(ctx, "web", "disk0", api.ResizeDisk{Size: 0})
	wantClass(t, err, api.Invalid, "out of range")
	_, err = c.ReplaceDisk(ctx, "web", "disk0", api.ReplaceDisk{Host: "odd name"})
	wantClass(t, err, api.Invalid, "odd name")
	_, err = c.DetachDisk(ctx, "web", "../disk0", api.DetachDisk{})
	wantClass(t, err, api.Invalid, "not allowed")
}
