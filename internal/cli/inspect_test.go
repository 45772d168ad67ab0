package cli

import (
	"bytes"
	"context"
	"strings"
	"testing"

	"perdure/internal/blockstore"
	"perdure/internal/model"
	"perdure/internal/vfs"
)

func TestInspectDisk(t *testing.T) {
	dir := t.TempDir()
	if err := blockstore.Create(vfs.OS{}, dir, blockstore.Params{ID: "disk0", VM: "0b5c0b34", Size: 1 << 20, State: model.UpToDate}); err != nil {
		t.Fatal(err)
	}
	run := func(args ...string) (int, string, string) {
		var out, errs bytes.Buffer
		code := Main(context.Background(), Hooks{}, Streams{In: strings.NewReader(""), Out: &out, Err: &errs, Env: func(string) string { return "" }}, args)
		return code, out.String(), errs.String()
	}
	code, out, errs := run("inspect", "disk", dir+"/disk0.meta")
	for _, want := range []string{"disk0 of VM 0b5c0b34, 1048576 bytes", "UpToDate, closed in order", "version 2", "of all blocks", "0 epochs"} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is missing in\n%s%s", want, out, errs)
		}
	}
	if code != 0 {
		t.Fatal(code, errs)
	}
	if code, out, _ = run("inspect", "disk", dir+"/disk0.raw", "-o", "json"); code != 0 || !strings.Contains(out, `"version": 2`) {
		t.Fatal(code, out)
	}
	if err := blockstore.Create(vfs.OS{}, dir, blockstore.Params{ID: "disk1", VM: "0b5c0b34", Size: 1 << 20, State: model.UpToDate, Image: dir + "/web", Host: "a"}); err != nil {
		t.Fatal(err)
	}
	if code, out, _ = run("inspect", "disk", dir+"/disk1.meta"); code != 0 || !strings.Contains(out, dir+"/web, 1056768 bytes") || !strings.Contains(out, "version 3") {
		t.Fatal(code, out)
	}
	if code, _, errs = run("inspect", "disk", dir+"/web"); code == 0 || !strings.Contains(errs, "is the image of disk disk1 of the VM with the UUID 0b5c0b34, by its stamp of host a") {
		t.Fatal(code, errs)
	}
	if code, _, errs = run("inspect", "disk", dir+"/disk7.meta"); code == 0 || !strings.Contains(errs, "disk7") {
		t.Fatal(code, errs)
	}
}
