package shim

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"perdure/internal/blockstore"
	"perdure/internal/model"
	"perdure/internal/replica"
)

// scrub compares the replicas of a VM's disks, or one replica with its own
// checksums, while the guest runs, and repairs what is provably wrong. It is the
// core of verify, without goroutines of its own and without a clock.
//
// Two replicas are compared as of one moment: at level ft the end of an epoch that
// is still ahead (ahead), at level ca a moment in which no write is under way in the
// range on either side (still). What seems to differ is looked at once more, block by
// block and as of a later moment, before it counts.
type scrub struct {
	stores []*blockstore.Store
	peer   scrubPeer // nil: alone
	// ahead names an epoch that has not ended yet, at least lead further than the newest
	// one that was captured; nil where there are none.
	ahead func(lead model.Epoch) model.Epoch
	// still runs f while no write is under way in a range on either side; nil: epochs.
	still func(ctx context.Context, disk int, off, n int64, f func() error) error
	// pace is told how many bytes were read, and waits.
	pace func(ctx context.Context, n int64) error
	step func() int64 // chunks to compare at once

	host, peerHost string // for people
}

// scrubPeer is the other side's replicas. Epoch 0 means now; blockstore.ErrTooLate
// that the epoch has passed there.
type scrubPeer interface {
	warm(ctx context.Context, disk int, first, count int64) error
	digests(ctx context.Context, disk int, e model.Epoch, first, count int64) ([]blockstore.ChunkDigest, error)
	// look takes the place of the look before.
	look(ctx context.Context, disk int, e model.Epoch, chunk int64) (data []byte, blocks []replica.View, err error)
	// fix replaces blocks of the last look unless they were written since, and returns which.
	fix(ctx context.Context, disk int, chunk int64, mask uint32, data []byte) (done uint32, err error)
}

// maxLead bounds how far ahead an epoch is asked for, stillLimit how long writes in
// a range wait for a comparison.
const (
	maxLead    = 64
	stillLimit = 3 * time.Second
	epochLimit = 30 * time.Second // a guest that is paused makes none
)

// disk goes over one disk from rep.Checked on and adds to rep what it finds; saved
// is called now and then.
func (s *scrub) disk(ctx context.Context, n int, rep *model.VerifiedDisk, saved func()) error {
	st := s.stores[n]
	for first := rep.Checked / blockstore.ChunkSize; first < st.Chunks(); {
		count := min(max(s.step(), 1), st.Chunks()-first)
		bad, read, err := s.compare(ctx, n, first, count)
		if err != nil {
			return err
		}
		for _, c := range bad {
			if err := s.chunk(ctx, n, c, rep); err != nil {
				return err
			}
		}
		first += count
		rep.Checked = min(first*blockstore.ChunkSize, st.Size())
		saved()
		if err := s.pace(ctx, read); err != nil {
			return err
		}
	}
	return nil
}

// compare returns the chunks that have to be looked at, and how much was read.
func (s *scrub) compare(ctx context.Context, n int, first, count int64) (bad []int64, read int64, err error) {
	st := s.stores[n]
	var mine, theirs []blockstore.ChunkDigest
	g, wctx := errgroup.WithContext(ctx)
	g.Go(func() error { read = st.Warm(first, first+count); return nil })
	if s.peer != nil {
		g.Go(func() error { return s.peer.warm(wctx, n, first, count) })
	}
	if err := g.Wait(); err != nil {
		return nil, 0, err
	}
	err = s.together(ctx, n, first, count,
		func(ctx context.Context, e model.Epoch) (err error) {
			if e == 0 {
				mine = mine[:0]
				return st.Digest(first, first+count, func(d blockstore.ChunkDigest) error { mine = append(mine, d); return nil })
			}
			mine, err = st.DigestAsOf(ctx, e, first, first+count)
			return err
		},
		func(ctx context.Context, e model.Epoch) (err error) {
			theirs, err = s.peer.digests(ctx, n, e, first, count)
			return err
		})
	if err != nil {
		return nil, 0, err
	}
	for i, d := range mine {
		wrong := d.Trust == blockstore.Broken || d.Trust == blockstore.Unreadable
		if s.peer != nil {
			t := theirs[i]
			wrong = wrong || t.Trust == blockstore.Broken || t.Trust == blockstore.Unreadable || t.Sum != d.Sum
		}
		if wrong {
			bad = append(bad, d.Chunk)
		}
	}
	return bad, max(read, count*blockstore.BlockSize), nil
}

// together runs mine and theirs as of one moment: of an epoch, whose number they
// get, or while no write is under way, with number 0. Alone, mine only.
func (s *scrub) together(ctx context.Context, n int, first, count int64, mine, theirs func(context.Context, model.Epoch) error) error {
	if s.peer == nil {
		return mine(ctx, 0)
	}
	both := func(ctx context.Context, e model.Epoch) error {
		g, ctx := errgroup.WithContext(ctx)
		g.Go(func() error { return mine(ctx, e) })
		g.Go(func() error { return theirs(ctx, e) })
		return g.Wait()
	}
	if s.still != nil {
		off := first * blockstore.ChunkSize
		return s.still(ctx, n, off, min(count*blockstore.ChunkSize, s.stores[n].Size()-off), func() error {
			// The guest's writes in the range wait.
			ctx, cancel := context.WithTimeoutCause(ctx, stillLimit, fmt.Errorf("the other side took longer than %v to read", stillLimit))
			defer cancel()
			return both(ctx, 0)
		})
	}
	for lead := model.Epoch(2); ; lead = min(2*lead, maxLead) {
		err := s.asOf(ctx, s.ahead(lead), both)
		if !errors.Is(err, blockstore.ErrTooLate) || ctx.Err() != nil {
			return err
		}
	}
}

// asOf waits for an epoch, but not for ever.
func (s *scrub) asOf(ctx context.Context, e model.Epoch, both func(context.Context, model.Epoch) error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, epochLimit, fmt.Errorf("no checkpoint was taken for %v: the guest stands still", epochLimit))
	defer cancel()
	err := both(ctx, e)
	if err != nil && ctx.Err() != nil && !errors.Is(err, blockstore.ErrTooLate) {
		err = context.Cause(ctx)
	}
	return err
}

// lookTries is how often a chunk is looked at until what is repairable is repaired:
// the guest may write in between.
const lookTries = 5

// finding is what is known of a block that was found wrong.
type finding struct {
	what, host, why string
}

// chunk looks at one chunk, block by block, repairs what it can, and looks again.
func (s *scrub) chunk(ctx context.Context, n int, c int64, rep *model.VerifiedDisk) error {
	found := map[int]finding{}
	for range lookTries {
		again, err := s.lookOnce(ctx, n, c, found)
		if err != nil {
			return err
		}
		if !again {
			break
		}
	}
	blocks := make([]int, 0, len(found))
	for b := range found {
		blocks = append(blocks, b)
	}
	slices.Sort(blocks)
	for _, b := range blocks {
		note(rep, c*blockstore.ChunkSize+int64(b)*blockstore.BlockSize, found[b])
	}
	return nil
}

// The ends of a finding.
const (
	foundRepaired  = "repaired"
	foundRewritten = "rewritten"
	foundLeft      = "left"
)

// lookOnce looks at a chunk once and repairs; again says that it has to be looked at
// once more, to see that it is right now.
func (s *scrub) lookOnce(ctx context.Context, n int, c int64, found map[int]finding) (again bool, err error) {
	st := s.stores[n]
	var mine *blockstore.Look
	drop := func() {
		if mine != nil {
			mine.Close()
			mine = nil
		}
	}
	defer drop()
	var data []byte
	var theirs []replica.View
	err = s.together(ctx, n, c, 1,
		func(ctx context.Context, e model.Epoch) (err error) {
			drop()
			if e == 0 {
				mine, err = st.LookAt(c)
			} else {
				mine, err = st.LookAsOf(ctx, e, c)
			}
			return err
		},
		func(ctx context.Context, e model.Epoch) (err error) {
			data, theirs, err = s.peer.look(ctx, n, e, c)
			return err
		})
	if err != nil {
		return false, err
	}
	if s.peer != nil && (len(theirs) != len(mine.Blocks) || len(data) != len(mine.Data)) {
		return false, fmt.Errorf("look at chunk %d of disk %d: %d blocks on the other side, %d here", c, n, len(theirs), len(mine.Blocks))
	}
	// What was seen wrong before and is not any more was written over, unless it was repaired.
	for b, f := range found {
		if f.what == foundLeft {
			found[b] = finding{foundRewritten, f.host, "the guest has written it since"}
		}
	}
	var mask uint32
	repaired := false
	for b, m := range mine.Blocks {
		if s.peer == nil {
			if m.Fails() {
				found[b] = finding{foundLeft, s.host, failing(m) + ", and there is no second copy"}
			}
			continue
		}
		p := block(data, b)
		switch blame := replica.BlameBlock(m, theirs[b], bytes.Equal(block(mine.Data, b), p)); blame {
		case replica.NobodyWrong:
		case replica.MineWrong:
			found[b] = finding{foundLeft, s.host, failing(m)}
			again = true
			done, err := mine.Replace(b, p)
			if err != nil {
				// The disk does not take it: that is no reason not to go on.
				found[b] = finding{foundLeft, s.host, "it cannot be written: " + err.Error()}
			} else if done {
				found[b] = finding{foundRepaired, s.host, failing(m)}
				repaired = true
			}
		case replica.TheirsWrong:
			found[b] = finding{foundLeft, s.peerHost, failing(theirs[b])}
			mask |= 1 << b
			again = true
		default:
			found[b] = finding{foundLeft, "", blame.String()}
		}
	}
	if repaired {
		// Durable at once: after a crash the checksums here are computed anew, and would
		// take what was damaged for data.
		if err := st.Flush(); err != nil {
			return false, err
		}
	}
	if mask == 0 {
		return again, nil
	}
	done, err := s.peer.fix(ctx, n, c, mask, mine.Data)
	if err != nil {
		return false, err
	}
	for b := range mine.Blocks {
		if f := found[b]; mask&done&(1<<b) != 0 {
			found[b] = finding{foundRepaired, f.host, f.why}
		}
	}
	return again, nil
}

func block(p []byte, b int) []byte { return p[b*blockstore.BlockSize:][:blockstore.BlockSize] }

// failing says what speaks against a copy of a block.
func failing(v replica.View) string {
	switch {
	case !v.Read:
		return "it cannot be read"
	case v.Keeps:
		return "it does not match its checksum"
	}
	return "it has no checksum, and the other side's holds"
}

// note adds a block to a report.
func note(rep *model.VerifiedDisk, off int64, f finding) {
	rep.Mismatches++
	switch f.what {
	case foundRepaired:
		rep.Repaired++
	case foundRewritten:
		rep.Rewritten++
	default:
		rep.Left++
	}
	if k := len(rep.Ranges) - 1; k >= 0 {
		if r := &rep.Ranges[k]; r.Off+r.Len == off && r.What == f.what && r.Host == f.host && r.Why == f.why {
			r.Len += blockstore.BlockSize
			return
		}
	}
	if len(rep.Ranges) < model.MaxVerifiedRanges {
		rep.Ranges = append(rep.Ranges, model.VerifiedRange{Off: off, Len: blockstore.BlockSize, What: f.what, Host: f.host, Why: f.why})
	}
}

// stepFor is how many chunks are compared at once at a rate: about a quarter of a
// second's worth where each comparison waits for an epoch.
func stepFor(rate int64, epochs bool) int64 {
	if !epochs {
		return 16 // 1 MiB: writes in it wait meanwhile
	}
	return min(max(rate/4/blockstore.ChunkSize, 16), sumChunks)
}
