package agent

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"sort"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"perdure/api"
	"perdure/internal/blockstore"
	"perdure/internal/clusterstore"
	"perdure/internal/model"
	"perdure/internal/shimapi"
	"perdure/internal/vfs"
)

// Disks implements httpapi.Service.
func (a *Agent) Disks(ctx context.Context, vm string) ([]api.VMDisk, error) {
	var views []clusterstore.VMView
	if vm != "" {
		v, err := a.find(ctx, vm)
		if err != nil {
			return nil, err
		}
		views = append(views, v)
	} else {
		views = a.store.VMs()
	}
	lists := make([][]api.VMDisk, len(views))
	var wg sync.WaitGroup
	for i, v := range views {
		wg.Go(func() { lists[i] = a.disksOf(ctx, v) })
	}
	wg.Wait()
	var out []api.VMDisk
	for _, l := range lists {
		out = append(out, l...)
	}
	return out, nil
}

// disksOf puts together what record, shim and the hosts' files say.
func (a *Agent) disksOf(ctx context.Context, v clusterstore.VMView) []api.VMDisk {
	rec, vm := v.Record.Record, a.view(ctx, v)
	hosts := map[string]bool{rec.Primary.Host: true, rec.Secondary.Host: true}
	for h := range rec.Replicas {
		hosts[h] = true
	}
	delete(hosts, "")
	names := sortedKeys(hosts)
	answers := make([]hostReplicas, len(names))
	var wg sync.WaitGroup
	for i, h := range names {
		wg.Go(func() { answers[i] = a.diskFilesOn(ctx, h, v.Spec.Name) })
	}
	wg.Wait()
	out := make([]api.VMDisk, 0, len(v.Spec.Disks))
	for n, d := range v.Spec.Disks {
		k := api.VMDisk{VM: v.Spec.Name, ID: d.ID, Size: d.Size, Slot: model.SlotOf(v.Spec.Disks, n), Level: v.Spec.Level, Mode: vm.Mode,
			Primary: vm.Primary, Behind: -1, Sync: vm.Sync}
		for i, h := range names {
			r := replicaOf(answers[i], d.ID)
			r.Host, r.Role, r.State = h, "spare", rec.Replicas[h].State
			at, _ := v.Spec.Place(d.ID, h)
			r.Place = at.Path
			switch h {
			case rec.Primary.Host:
				r.Role = "primary"
			case rec.Secondary.Host:
				r.Role = "secondary"
			}
			k.Replicas = append(k.Replicas, r)
			if h == rec.Primary.Host {
				k.Behind = behind(vm.Mode, answers[i].Live, d.ID)
			}
		}
		// A copy that never held anything is marked nowhere.
		if k.Behind == 0 && vm.Mode != model.ModeDuplex {
			k.Behind = neverFilled(k)
		}
		for _, x := range vm.Disks {
			if x.ID == d.ID {
				k.Verified, k.Places = x.Verified, x.Places
			}
		}
		k.Problems = problemsOfDisk(vm.Problems, k)
		out = append(out, k)
	}
	return out
}

func replicaOf(h hostReplicas, id string) api.DiskReplica {
	r := api.DiskReplica{Answers: h.err == nil}
	if h.err != nil {
		r.Error = h.err.Error()
		return r
	}
	for _, x := range h.Replicas {
		if x.ID == id {
			r = x.DiskReplica
			r.Answers = true
		}
	}
	return r
}

// behind is what the other side lacks by the word of the running shim.
func behind(mode model.Mode, live []shimapi.DiskStatus, id string) int64 {
	for _, d := range live {
		switch {
		case d.ID != id:
		case mode == model.ModeDuplex:
			return 0 // at level ca the marks are not taken back before the next copy
		default:
			return d.Missing
		}
	}
	return -1
}

// neverFilled is what the other hosts lack by the record, where the running shim has marked
// nothing: all, unless one of them has held the disk; negative: there is no other.
func neverFilled(d api.VMDisk) int64 {
	others := 0
	for _, r := range d.Replicas {
		switch {
		case r.Host == d.Primary:
		case r.State == model.UpToDate || r.State == model.Outdated:
			return 0
		default:
			others++
		}
	}
	if others == 0 {
		return -1
	}
	return d.Size
}

// problemsOfDisk are the VM's problems that concern a disk, and those of its replicas.
func problemsOfDisk(of []model.Problem, d api.VMDisk) []model.Problem {
	out := []model.Problem{}
	for _, p := range of {
		switch p.Code {
		case "replica", "split-brain", "replica-contradicts-record", "disk-stuck", "disk-failed", "unprotected", "secondary-slow", "host-silent", "no-quorum", "disks-differ":
			out = append(out, p)
		default:
			if strings.Contains(p.Code, "disk") || strings.Contains(p.Text, d.ID) {
				out = append(out, p)
			}
		}
	}
	for _, r := range d.Replicas {
		switch {
		case r.Answers && len(r.Damage) > 0:
			out = append(out, model.Problem{Code: "replica-damaged", Severity: model.Critical,
				Text:   fmt.Sprintf("the replica of %s on host %s is damaged: %s", d.ID, r.Host, strings.Join(r.Damage, "; ")),
				Action: fmt.Sprintf("look at it with perdure inspect disk on %s; perdure disk replace %s %s --host %s makes it anew", r.Host, d.VM, d.ID, r.Host)})
		case r.Answers && !r.Exists && r.State == model.UpToDate:
			out = append(out, model.Problem{Code: "replica-missing", Severity: model.Critical,
				Text:   fmt.Sprintf("host %s should have a good replica of %s and has none", r.Host, d.ID),
				Action: fmt.Sprintf("look after the disk of host %s; perdure disk replace %s %s --host %s makes the replica anew", r.Host, d.VM, d.ID, r.Host)})
		}
	}
	return out
}

// hostReplicas is what one host has of a VM's disks.
type hostReplicas struct {
	Replicas []hostReplica        `json:"replicas"`
	Live     []shimapi.DiskStatus `json:"live,omitempty"` // of a running shim
	err      error
}

type hostReplica struct {
	ID string `json:"id"`
	api.DiskReplica
}

// diskFilesOn asks a host for the files of its replicas.
func (a *Agent) diskFilesOn(ctx context.Context, host, vm string) (h hostReplicas) {
	ctx, cancel := context.WithTimeout(ctx, peerTimeout)
	defer cancel()
	if host == a.cfg.Name {
		return a.replicasOfVM(ctx, vm)
	}
	h.err = a.ask(ctx, host, http.MethodGet, "disks", vm, nil, &h)
	return h
}

// replicasOfVM reads the files of this host's replicas, whoever uses them now, and
// asks the shim.
func (a *Agent) replicasOfVM(ctx context.Context, vm string) hostReplicas {
	out := hostReplicas{Replicas: []hostReplica{}}
	dir := a.vmFile(vm, shimapi.DiskDir)
	entries, err := os.ReadDir(dir)
	if err != nil && !os.IsNotExist(err) {
		out.err = err
		return out
	}
	for _, e := range entries {
		id, ok := strings.CutSuffix(e.Name(), ".meta")
		if !ok {
			continue
		}
		out.Replicas = append(out.Replicas, hostReplica{id, inspectReplica(ctx, dir, id)})
	}

	sort.Slice(out.Replicas, func(i, j int) bool { return out.Replicas[i].ID < out.Replicas[j].ID })
	if _, err := os.Stat(a.vmFile(vm, shimapi.SocketFile)); err == nil {
		for i := range out.Replicas {
			out.Replicas[i].Damage = nil // what is being written may be seen torn
		}
		c := a.shim(vm)
		defer c.Close()
		if st, err := c.Status(ctx); err == nil && st.Role == shimapi.RolePrimary {
			out.Live = st.Disks
		}
	}
	return out
}

func inspectReplica(ctx context.Context, dir, id string) api.DiskReplica {
	var r api.DiskReplica
	if answers, _ := answersIn(ctx, func() error { r = inspectFiles(dir, id); return nil }); !answers {
		return api.DiskReplica{Error: "its file or device does not answer"}
	}
	return r
}

func inspectFiles(dir, id string) api.DiskReplica {
	rep, err := blockstore.Inspect(vfs.OS{}, dir+"/"+id)
	if err != nil {
		return api.DiskReplica{Error: err.Error()}
	}
	r := api.DiskReplica{Exists: true, Path: rep.Image, Device: rep.Device, Size: rep.Meta.Size, OwnState: model.ReplicaState(rep.Meta.State), Term: model.Term(rep.Meta.Term),
		Branch: model.BranchID(rep.Meta.Branch), Line: rep.Meta.Current, Clean: rep.Meta.Clean, Checksums: rep.Checksums, JournalLen: rep.Journal.Bytes}
	if rep.Log != nil {
		r.ActiveLog = rep.Log.Bytes
	}
	if rep.Bitmap != nil {
		r.Missing = rep.Bitmap.Bytes
	}
	r.Damage = rep.Problems
	var st unix.Stat_t
	if unix.Stat(rep.Image, &st) == nil {
		if r.Allocated = st.Blocks * 512; st.Mode&unix.S_IFMT == unix.S_IFBLK {
			r.Allocated = rep.Meta.Size
		}
	}
	return r
}
