package agent

import (
	"fmt"
	"sort"
	"sync"
	"time"

	"perdure/internal/clusterstore"
	"perdure/internal/model"
)

// failedDiskRest is how long a host whose disk failed under a VM is not asked to
// hold that VM's second copy: a dead disk does not come back by itself, and each
// try costs the VM a copy.
const failedDiskRest = 10 * time.Minute

// failedDisks are the disks of this host that failed under a VM, as its shims
// told by events, until they are replaced. An agent that restarts has forgotten
// them; the next attempt tells.
type failedDisks struct {
	mu sync.Mutex
	by map[string]clusterstore.FailedDisk // by VM
}

// noteDisk takes in an event of a shim here.
func (a *Agent) noteDisk(ev model.Event) {
	switch ev.Type {
	case "disk-failed":
		a.failed.mu.Lock()
		if a.failed.by == nil {
			a.failed.by = map[string]clusterstore.FailedDisk{}
		}
		a.failed.by[ev.VM] = clusterstore.FailedDisk{VM: ev.VM, Text: ev.Text, Since: time.Now().UTC().Round(time.Second)}
		a.failed.mu.Unlock()
		a.hostChanged()
	case "disk-restored":
		a.diskReplaced(ev.VM)
	}
}

// diskReplaced forgets that a disk failed under a VM here.
func (a *Agent) diskReplaced(vm string) {
	a.failed.mu.Lock()
	_, had := a.failed.by[vm]
	delete(a.failed.by, vm)
	a.failed.mu.Unlock()
	if had {
		a.hostChanged()
	}
}

// failedNow lists them, for the other hosts.
func (a *Agent) failedNow() (out []clusterstore.FailedDisk) {
	a.failed.mu.Lock()
	for _, f := range a.failed.by {
		out = append(out, f)
	}
	a.failed.mu.Unlock()
	sort.Slice(out, func(i, j int) bool { return out[i].VM < out[j].VM })
	return out
}

// diskFit refuses to hold the second copy of a VM whose disk has failed here lately.
func (a *Agent) diskFit(vm string) error {
	for _, f := range a.failedNow() {
		if left := failedDiskRest - time.Since(f.Since); f.VM == vm && left > 0 {
			return fmt.Errorf("%s; it has to be replaced (perdure disk replace %s DISK --host %s), and is tried again in %v otherwise", f.Text, vm, a.cfg.Name, left.Round(time.Second))
		}
	}
	return nil
}

// diskProblems names the hosts that do not hold a copy of a VM because their disk failed.
func diskProblems(hosts []clusterstore.HostView, rec model.Record) (out []model.Problem) {
	for _, h := range hosts {
		if h.Name == rec.Primary.Host && rec.Mode != model.ModeStopped || rec.Replicas[h.Name].State == model.UpToDate {
			continue // it serves; where it runs the VM its shim has the word
		}
		for _, f := range h.FailedDisks {
			if f.VM == rec.VM {
				out = append(out, model.Problem{Code: "disk-failed", Severity: model.Critical,
					Text:   fmt.Sprintf("host %s cannot hold a copy of the VM: %s", h.Name, f.Text),
					Action: fmt.Sprintf("replace the disk of host %s, then: perdure disk replace %s DISK --host %s", h.Name, rec.VM, h.Name)})
			}
		}
	}
	return out
}
