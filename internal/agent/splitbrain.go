package agent

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"perdure/api"
	"perdure/internal/authority"
	"perdure/internal/blockstore"
	"perdure/internal/clusterstore"
	"perdure/internal/model"
	"perdure/internal/replica"
	"perdure/internal/shimapi"
	"perdure/internal/vfs"
)

// discardPatience is how long a replica that is to be discarded may be in use still,
// by a standby that is ending.
const discardPatience = 10 * time.Second

// replicaFacts is what a host says of the replicas of a VM that lie there.
type replicaFacts struct {
	Lives  bool          `json:"lives"` // a shim or a QEMU of the VM is there
	Disks  []diskFacts   `json:"disks"`
	Events []model.Event `json:"events"` // the last ones
}

type diskFacts struct {
	Disk    string             `json:"disk"`
	Size    int64              `json:"size"`
	State   model.ReplicaState `json:"state"`
	Clean   bool               `json:"clean"`
	Lineage []byte             `json:"lineage"` // encoded as in the metadata
	Marked  int64              `json:"marked"`  // bytes that the other side lacks, at most
	Written time.Time          `json:"written"` // of the image's file
	Error   string             `json:"error,omitempty"`

	copy replica.Copy // decoded
}

// replicasHere looks at the replicas of a VM on this host, in use or not.
func (a *Agent) replicasHere(ctx context.Context, vm string) (replicaFacts, error) {
	v, err := a.find(ctx, vm)
	if err != nil {
		return replicaFacts{}, err
	}
	f := replicaFacts{Disks: []diskFacts{}, Lives: !lockFree(a.vmFile(vm, shimapi.LockFile))}
	dir := a.vmFile(vm, shimapi.DiskDir)
	for _, d := range v.Spec.Disks {
		if ok, err := blockstore.Exists(vfs.OS{}, dir, d.ID); err == nil && !ok {
			continue
		}
		df := diskFacts{Disk: d.ID, Size: d.Size}
		m, marked, err := blockstore.Peek(vfs.OS{}, dir, d.ID)
		if err != nil {
			df.Error = err.Error()
		} else {
			df.Size, df.State, df.Clean, df.Marked, df.Lineage = m.Size, m.State, m.Clean, marked, m.Lineage.AppendTo(nil)
		}
		image := filepath.Join(dir, d.ID+".raw")
		if m.Image != "" {
			image = m.Image
		}
		if st, err := os.Stat(image); err == nil {
			df.Written = st.ModTime().UTC()
		}
		f.Disks = append(f.Disks, df)
	}
	list, _ := a.events.since(vm, 0)
	f.Events = list[max(0, len(list)-sideEvents):]
	return f, nil
}

// sideEvents is how many events of each side are shown.
const sideEvents = 8

func (a *Agent) replicasOn(ctx context.Context, host string, v clusterstore.VMView) (f replicaFacts, err error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	if host == a.cfg.Name {
		f, err = a.replicasHere(ctx, v.Spec.Name)
	} else {
		err = a.ask(ctx, host, http.MethodGet, "replicas", v.Spec.Name, nil, &f)
	}
	for i := range f.Disks {
		d := &f.Disks[i]
		l, derr := replica.DecodeLineage(d.Lineage)
		if derr != nil && d.Error == "" {
			d.Error = derr.Error()
		}
		d.copy = replica.Copy{VM: v.Spec.UUID, Disk: d.Disk, Size: d.Size, State: d.State, Clean: d.Clean, Lineage: l}
	}
	return f, err
}

// counting is the host whose replica counts: where the VM runs, or would be started.
func counting(rec model.Record) string {
	if rec.Primary.Host != "" && rec.Replicas[rec.Primary.Host].State == model.UpToDate {
		return rec.Primary.Host
	}
	for _, h := range preferred(rec) {
		return h
	}
	return ""
}

// otherBranch reports whether a replica was left on another line of history by a
// person's decision: it is not overwritten by itself.
func otherBranch(rec model.Record, r model.Replica) bool {
	return r.Branch != rec.Branch && r.State != model.Inconsistent
}

// splitProblems names what the record alone shows of a split brain.
func splitProblems(v clusterstore.VMView) (out []model.Problem) {
	rec := v.Record.Record
	for _, h := range sortedKeys(rec.Replicas) {
		if otherBranch(rec, rec.Replicas[h]) {
			out = append(out, model.Problem{Code: "split-brain", Severity: model.Critical,
				Text:   fmt.Sprintf("host %s keeps another line of history of the VM (as of term %d): it is not overwritten before a person decides", h, rec.Replicas[h].Term),
				Action: fmt.Sprintf("perdure split-brain show %s, then perdure split-brain resolve %s --discard HOST", v.Spec.Name, v.Spec.Name)})
		}
	}
	return out
}

// SplitBrain implements httpapi.Service.
func (a *Agent) SplitBrain(ctx context.Context, name string) (api.SplitBrain, error) {
	v, err := a.find(ctx, name)
	if err != nil {
		return api.SplitBrain{}, err
	}
	if cur, err := a.store.Record(ctx, name); err == nil { // without a quorum: what is known
		v.Record = cur
	}
	rec := v.Record.Record
	hosts := map[string]bool{}
	for h := range rec.Replicas {
		hosts[h] = true
	}
	for _, h := range a.otherHosts(true) { // one that the record forgot may hold something
		hosts[h.Name] = true
	}
	if a.cfg.Role != "witness" {
		hosts[a.cfg.Name] = true
	}
	var mu sync.Mutex
	var wg sync.WaitGroup
	facts, errs := map[string]replicaFacts{}, map[string]error{}
	for h := range hosts {
		wg.Go(func() {
			f, err := a.replicasOn(ctx, h, v)
			mu.Lock()
			defer mu.Unlock()
			facts[h], errs[h] = f, err
		})
	}
	wg.Wait()
	good := counting(rec)
	out := api.SplitBrain{VM: name, Primary: good, Running: rec.Mode != model.ModeStopped, Sides: []api.SplitSide{}}
	for _, h := range sortedKeys(hosts) {
		if _, known := rec.Replicas[h]; !known && len(facts[h].Disks) == 0 {
			continue
		}
		side := makeSide(rec, h, good, facts, errs[h])
		out.Split = out.Split || side.Split
		out.Sides = append(out.Sides, side)
	}
	slices.SortStableFunc(out.Sides, func(x, y api.SplitSide) int {
		switch {
		case x.Counts == y.Counts:
			return 0
		case x.Counts:
			return -1
		}
		return 1
	})
	for i := range out.Sides {
		s := &out.Sides[i]
		s.Loses = losses(name, *s, out)
		s.WhyNot = whyKeep(rec, *s, out)
		s.CanDiscard = s.WhyNot == ""
	}
	return out, nil
}

// makeSide puts together what is known of one host.
func makeSide(rec model.Record, host, good string, facts map[string]replicaFacts, err error) api.SplitSide {
	r, f := rec.Replicas[host], facts[host]
	s := api.SplitSide{Host: host, Answers: err == nil, Counts: host == good, State: r.State, Term: r.Term, Branch: r.Branch, Disks: []api.SplitDisk{}, Events: f.Events, Loses: []string{}}
	_, known := rec.Replicas[host]
	s.Split = known && otherBranch(rec, r)
	for _, d := range f.Disks {
		out := api.SplitDisk{Disk: d.Disk, Size: d.Size, State: d.State, Written: d.Written, Error: d.Error}
		if d.Error == "" {
			l := d.copy.Lineage
			out.Line, out.Alone, out.Crashed, out.Discarded = l.Current.String(), !l.Base.IsZero(), d.copy.Crashed(), l.Discarded
			if out.Alone {
				out.Since = l.Base.String()
			}
			if out.Alone || out.Crashed {
				out.AloneBytes = d.Marked
			}
		}
		if i := slices.IndexFunc(facts[good].Disks, func(g diskFacts) bool { return g.Disk == d.Disk }); host != good && i >= 0 && d.Error == "" && facts[good].Disks[i].Error == "" {
			j := replica.Judge(facts[good].Disks[i].copy, d.copy)
			out.Verdict = j.Row
			if !j.Ancestor.IsZero() {
				out.Common = j.Ancestor.String()
			}
			switch j.Verdict {
			case replica.SplitBrain:
				s.Split = true
			case replica.Unrelated:
				s.Split = s.Split || out.Alone
			case replica.TargetByBitmap, replica.TargetFull: // against the record, and so copied by nobody
				s.Split = s.Split || known && r.State == model.Outdated
			}
		}
		s.Disks = append(s.Disks, out)
	}
	return s
}

// losses says in sentences what is gone when a side is given up.
func losses(vm string, s api.SplitSide, all api.SplitBrain) []string {
	out := []string{}
	add := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	if !s.Answers {
		add("host %s does not answer: what its replicas hold is not known", s.Host)
		return out
	}
	for _, d := range s.Disks {
		at := ""
		if !d.Written.IsZero() {
			at = ", last at " + d.Written.Format(time.RFC3339)
		}
		switch {
		case d.Error != "":
			add("%s: what it holds is not known (%s)", d.Disk, d.Error)
		case d.Discarded:
			add("%s: nothing, it was given up before", d.Disk)
		case d.State == model.Inconsistent:
			add("%s: nothing, it is no whole copy", d.Disk)
		case d.Alone:
			add("%s: what was written on host %s alone since %s: at most %s%s", d.Disk, s.Host, d.Since, api.FormatSize(d.AloneBytes), at)
		case d.Crashed:
			add("%s: what was under way on host %s when it stopped, and what it may have written since the other side heard of it last: at most %s%s", d.Disk, s.Host, api.FormatSize(d.AloneBytes), at)
		default:
			add("%s: what host %s may have written since the other side heard of it last%s; its bitmap names nothing", d.Disk, s.Host, at)
		}
	}
	if s.Counts && all.Running {
		add("everything that VM %s did on host %s since the other side heard of it last, and the running instance", vm, s.Host)
	}
	return out
}

// whyKeep says why a side is not given up; empty: it may be.
func whyKeep(rec model.Record, s api.SplitSide, all api.SplitBrain) string {
	var good api.SplitSide
	for _, o := range all.Sides {
		if o.Counts {
			good = o
		}
	}
	whole := good.Answers && len(good.Disks) > 0
	for _, d := range good.Disks {
		whole = whole && d.Error == "" && d.State == model.UpToDate && !d.Discarded
	}
	switch {
	case s.Counts && all.Running:
		return fmt.Sprintf("the VM runs from it; to keep the other side's data instead, let that side run first: perdure vm takeover %s --on HOST --force", all.VM)
	case s.Counts || s.State == model.UpToDate:
		return "it is a copy that the VM may be started from"
	case s.Host == rec.Secondary.Host:
		return "it is the VM's secondary just now"
	case !s.Answers:
		return fmt.Sprintf("host %s does not answer", s.Host)
	case !good.Answers:
		return fmt.Sprintf("host %s, which has the copy that counts, does not answer", all.Primary)
	case !whole:
		return fmt.Sprintf("no other whole copy is sure: host %s does not call its own UpToDate", all.Primary)
	case len(s.Disks) == 0:
		return "it holds no replica"
	case !s.Split:
		return "it waits for nobody's decision: it is brought up to date by itself"
	}
	return ""
}

// ResolveSplitBrain implements httpapi.Service.
func (a *Agent) ResolveSplitBrain(ctx context.Context, name string, req api.ResolveSplitBrain) error {
	s, err := a.SplitBrain(ctx, name)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(s.Sides, func(x api.SplitSide) bool { return x.Host == req.Discard })
	if i < 0 {
		return api.Errorf(api.NotFound, "host %q holds nothing of VM %q", req.Discard, name)
	}
	side := s.Sides[i]
	if !side.CanDiscard {
		class := api.Refused
		if !side.Answers {
			class = api.Unavailable
		}
		return api.Errorf(class, "the replicas of VM %q on host %s are not discarded: %s", name, side.Host, side.WhyNot)
	}
	a.event(name, "discard-ordered", 0, "%s ordered that host %s gives its replicas up; accepted: %s", orNone(api.Actor(ctx)), side.Host, joinOr(side.Loses, "nothing is lost as far as is known"))
	dctx, cancel := context.WithTimeout(ctx, discardPatience+15*time.Second)
	defer cancel()
	if side.Host == a.cfg.Name {
		err = a.discardHere(dctx, name)
	} else {
		err = a.ask(dctx, side.Host, http.MethodPost, "discard", name, nil, nil)
	}
	if err != nil {
		return err
	}
	v, err := a.find(ctx, name)
	if rec := v.Record.Record; err == nil && rec.Mode == model.ModeSimplex && v.Spec.Level.HasSecondary() && !v.Unprotected {
		// It would be found by itself; a person who waits need not wait for that.
		if err := a.ProtectVM(ctx, name, api.ProtectVM{Host: side.Host}); err != nil {
			a.log.Info("the discarded replica is filled later", "vm", name, "host", side.Host, "error", err)
		}
	}
	return nil
}

// discardHere gives the replicas of a VM on this host up, in the record first: from
// then on nobody starts from them, whatever becomes of the rest.
func (a *Agent) discardHere(ctx context.Context, vm string) error {
	discard := func(ctx context.Context) error {
		lock, ok, err := tryLock(a.vmFile(vm, shimapi.LockFile))
		if err != nil {
			return err
		}
		if !ok {
			return errInUse
		}
		defer lock.release()
		rec, err := a.change(ctx, vm, func(rec model.Record) (model.Record, error) {
			if counting(rec) == "" || counting(rec) == a.cfg.Name {
				return rec, api.Errorf(api.Refused, "host %s has the only good copy of VM %q", a.cfg.Name, vm)
			}
			if _, known := rec.Replicas[a.cfg.Name]; !known {
				return rec, nil // an earlier attempt came so far
			}
			return authority.Discard(rec, a.cfg.Name)
		})
		if err != nil {
			return refusal(vm, err)
		}
		v, err := a.find(ctx, vm)
		if err != nil {
			return err
		}
		for _, d := range v.Spec.Disks {
			if err := discardDisk(a.vmFile(vm, shimapi.DiskDir), d.ID); err != nil {
				return err
			}
		}
		a.event(vm, "replica-discarded", rec.Record.Term, "the replicas on this host were given up by a person; they are filled anew from the copy that counts")
		return nil
	}
	for end := time.Now().Add(discardPatience); ; {
		var err error
		if w := a.workerOf(vm); w != nil {
			err = w.between(ctx, discard)
		} else {
			err = discard(ctx)
		}
		if !errors.Is(err, errInUse) {
			return err
		}
		if time.Now().After(end) || !sleep(ctx, 200*time.Millisecond) {
			return api.Errorf(api.Conflict, "something of VM %q still lives on host %s", vm, a.cfg.Name).WithAction("wait until it has ended, and repeat")
		}
	}
}

var errInUse = errors.New("in use")

// discardDisk notes in a replica's own metadata that it may be overwritten.
func discardDisk(dir, id string) (err error) {
	if ok, err := blockstore.Exists(vfs.OS{}, dir, id); err != nil || !ok {
		return err
	}
	st, err := blockstore.Open(vfs.OS{}, dir, id, blockstore.Options{})
	if err != nil {
		return fmt.Errorf("discard disk %s: %w", id, err)
	}
	defer func() { err = errors.Join(err, st.Close()) }()
	// What its journal holds counts for what is to be copied.
	if _, err := st.Replay(); err != nil {
		return fmt.Errorf("discard disk %s: %w", id, err)
	}
	return st.SetMeta(func(m *blockstore.Meta) {
		m.Lineage.Discarded = true
		if m.State == model.UpToDate {
			m.State = model.Outdated
		}
	})
}
