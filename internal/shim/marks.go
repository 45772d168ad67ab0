package shim

import (
	"perdure/internal/authority"
	"perdure/internal/blockstore"
	"perdure/internal/model"
)

// The replicas' own metadata follow the record: when the store behind the
// record had to be restored, they are all that tells which copy is the newest,
// by the higher term.

// markMode writes a new mode's term into this side's replicas, if they are good
// by that mode. Run carries out actions; the writing has a goroutine of its own.
func (s *Shim) markMode(a authority.ActMode) {
	s.mu.Lock()
	inst, prim, stby, branch := s.inst, s.prim, s.stby, s.record.Record.Branch
	none := inst == nil || len(inst.stores) == 0
	s.mu.Unlock()
	if none {
		return
	}
	switch {
	case prim != nil && a.Role == authority.RolePrimary && (a.Mode == model.ModeSimplex || a.Mode == model.ModeDuplex):
	case stby != nil && a.Role == authority.RoleSecondary && a.Mode == model.ModeDuplex:
	default:
		return
	}
	s.mu.Lock()
	mine := s.record.Record.Replicas[s.cfg.Host].State
	s.mu.Unlock()
	if mine != model.UpToDate {
		return // given up, see carry.go
	}
	s.goWork(func() {
		s.markMu.Lock()
		defer s.markMu.Unlock()
		for _, st := range inst.storeList() {
			if m := st.Meta(); m.State != model.UpToDate || m.Term > a.Term {
				continue // a later mode was faster
			}
			err := st.SetMeta(func(m *blockstore.Meta) { m.Term, m.Branch, m.Run = a.Term, branch, a.Run })
			if err != nil && s.ctx.Err() == nil {
				s.log.Error("mark replica", "disk", st.Meta().Disk, "term", a.Term, "error", err)
			}
		}
	})
}

// markOutdated notes in replicas that the record went on without them. The
// record is what counts; the mark is for the day when it is lost.
func (s *Shim) markOutdated(inst *instance) {
	s.mu.Lock()
	rec := s.record.Record
	s.mu.Unlock()
	if r, ok := rec.Replicas[s.cfg.Host]; !ok || r.State != model.Outdated {
		return
	}
	s.markMu.Lock()
	defer s.markMu.Unlock()
	for _, st := range inst.stores {
		if st.Meta().State != model.UpToDate {
			continue
		}
		if err := st.SetMeta(func(m *blockstore.Meta) { m.State = model.Outdated }); err != nil {
			s.log.Error("mark replica outdated", "disk", st.Meta().Disk, "error", err)
		}
	}
}
