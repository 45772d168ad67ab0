package shim

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"perdure/internal/authority"
	"perdure/internal/blockstore"
	"perdure/internal/guestmem"
	"perdure/internal/model"
	"perdure/internal/peer"
	"perdure/internal/pki"
	"perdure/internal/replica"
	"perdure/internal/shimapi"
)

// What the rest of a full copy may still be before the last epoch is captured,
// and how many rounds are tried to get there: a guest that dirties memory
// faster than the link carries it is caught by the epochs anyway.
const (
	restPages  = 4096
	restDisk   = 4 << 20
	fillRounds = 6
	fillLimit  = 2 * time.Minute // without a session
	// fillStall is how long nothing may move while the secondary is filled. Its
	// flush, during which nothing does, may take longer by what was sent at flushRate.
	fillStall = time.Minute
	flushRate = 10 << 20 // bytes per second: a slow disk
)

// peerTLS is this host's identity for both directions of a session.
func peerTLS(cfg shimapi.Config) (*tls.Config, error) {
	id, err := readIdentity(cfg)
	if err != nil {
		return nil, err
	}
	// The agent renews the certificate; a shim may live longer than one.
	fresh := func() {
		if now, err := readIdentity(cfg); err == nil && now.Expires().After(id.Expires()) {
			id.Adopt(now)
		}
	}
	conf := id.ServerTLS(false)
	client := id.ClientTLS("")
	conf.RootCAs = client.RootCAs
	conf.InsecureSkipVerify = true // the name is checked by verifyHost, the chain by VerifyConnection
	conf.VerifyConnection = client.VerifyConnection
	server, own := conf.GetCertificate, conf.GetClientCertificate
	conf.GetCertificate = func(h *tls.ClientHelloInfo) (*tls.Certificate, error) { fresh(); return server(h) }
	conf.GetClientCertificate = func(h *tls.CertificateRequestInfo) (*tls.Certificate, error) { fresh(); return own(h) }
	return conf, nil
}

func readIdentity(cfg shimapi.Config) (*pki.Identity, error) {
	var pem [3][]byte
	for n, f := range []string{cfg.CAFile, cfg.CertFile, cfg.KeyFile} {
		b, err := os.ReadFile(f)
		if err != nil {
			return nil, fmt.Errorf("read host identity: %w", err)
		}
		pem[n] = b
	}
	id, err := pki.NewIdentity(pem[0], pem[1], pem[2], time.Now())
	if err != nil {
		return nil, fmt.Errorf("read host identity: %w", err)
	}
	return id, nil
}

// verifyHost lets only the shim of one host in; an empty name means any host
// of the cluster but this one.
func (s *Shim) verifyHost(want string) func(tls.ConnectionState) error {
	return func(cs tls.ConnectionState) error {
		got, err := pki.PeerHost(&cs)
		if err != nil {
			return err
		}
		if want != "" && got != want {
			return fmt.Errorf("peer is host %q, not %q", got, want)
		}
		if got == s.cfg.Host {
			return errors.New("peer is this host itself")
		}
		return nil
	}
}

// hello is what this shim says of itself.
func (s *Shim) hello() hello {
	s.mu.Lock()
	defer s.mu.Unlock()
	return hello{Version: wireVersion, VM: s.cfg.Spec.Name, UUID: s.cfg.Spec.UUID, Host: s.cfg.Host, Run: s.mode.Run,
		Term: s.mode.Term, Mode: s.mode.Mode, Machine: machineDigest(s.specLocked())}
}

// fill makes the secondary a full copy while the guest runs, until the rest fits into one epoch.
func (pr *pair) fill() {
	done := make(chan struct{})
	pr.goWork(func() { pr.watchFill(done) })
	err := pr.fillAll()
	close(done)
	if err != nil {
		pr.fillFailed(err)
	}
}

// fillFailed gives the filling up and says why, once.
func (pr *pair) fillFailed(err error) {
	if pr.ctx.Err() != nil || pr.isLost() {
		return
	}
	pr.p.s.tl.add("sync-failed", 0, time.Since(pr.begun), "filling host %s failed: %v", pr.host, err)
	pr.p.s.tl.problem(model.Problem{Code: "not-protected", Severity: model.Warning, Text: fmt.Sprintf("host %s could not be filled: %v", pr.host, err),
		Action: "none: it is tried again by itself; see that host's log"})
	pr.markLost()
	pr.p.s.post(authority.EvUnprotect{Reason: "filling failed: " + err.Error()})
}

// watchFill gives up a filling in which nothing moves: a secondary whose disk
// hangs while its heartbeats go on would keep the VM without protection for ever.
func (pr *pair) watchFill(done <-chan struct{}) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	var w stallWatch
	for {
		select {
		case <-done:
			return
		case <-pr.ctx.Done():
			return
		case now := <-tick.C:
			moved := pr.moved.Load()
			limit := fillStall
			if pr.flushing.Load() {
				limit += time.Duration(moved/flushRate) * time.Second
			}
			pr.mu.Lock()
			connected := pr.sess != nil // before, connect has its own limit
			pr.mu.Unlock()
			if connected && w.stalled(moved, now, limit) {
				pr.fillFailed(fmt.Errorf("nothing moved for %v", limit))
				return
			}
		}
	}
}

// stallWatch notices a count that stands still.
type stallWatch struct {
	count int64
	since time.Time
}

// stalled reports whether count has not changed for limit.
func (w *stallWatch) stalled(count int64, now time.Time, limit time.Duration) bool {
	if w.since.IsZero() || count != w.count {
		w.count, w.since = count, now
		return false
	}
	return now.Sub(w.since) >= limit
}

func (pr *pair) fillAll() error {
	if err := pr.connect(); err != nil {
		return err
	}
	inst := pr.p.inst
	for _, v := range inst.vols {
		v.StartTracking()
	}
	if inst.ram != nil {
		inst.ram.SetMode(guestmem.Collect)
		if err := pr.copyMemory(); err != nil {
			return fmt.Errorf("copy memory: %w", err)
		}
	}
	if err := pr.awaitTarget(); err != nil {
		return fmt.Errorf("compare disks: %w", err)
	}
	if err := pr.copyDisks(); err != nil {
		return fmt.Errorf("copy disks: %w", err)
	}
	for range fillRounds {
		pages, disk, err := pr.round()
		if err != nil {
			return err
		}
		if pages < restPages && disk < restDisk {
			break
		}
	}
	if err := pr.settleCopy(); err != nil {
		return err
	}
	pr.mu.Lock()
	pr.caught = true
	pr.progress = nil
	pr.mu.Unlock()
	pr.p.s.tl.add("caught-up", 0, time.Since(pr.begun), "host %s has all but a little", pr.host)
	pr.p.s.post(authority.EvCaughtUp{})
	return nil
}

// settleCopy lets the secondary make its disks durable, which takes as long as
// they were written to, and then sends what changed meanwhile.
func (pr *pair) settleCopy() error {
	if len(pr.p.inst.stores) == 0 {
		return nil
	}
	if err := pr.sess.Send(pr.ctx, kindSyncFlush); err != nil {
		return err
	}
	pr.moved.Add(1)
	pr.flushing.Store(true)
	defer pr.flushing.Store(false)
	select {
	case <-pr.flushed:
	case <-pr.sess.Lost():
		return pr.sess.Cause()
	case <-pr.ctx.Done():
		return pr.ctx.Err()
	}
	_, _, err := pr.round()
	return err
}

// connect finds and dials the standby that the agent of the other host starts.
func (pr *pair) connect() error {
	deadline := time.Now().Add(fillLimit)
	var last error
	for time.Now().Before(deadline) && pr.ctx.Err() == nil {
		sess, h, err := pr.dial()
		if err == nil {
			pr.adopt(sess, h)
			if err := pr.meet(h); err != nil {
				return err
			}
			pr.p.s.post(authority.EvPeerUp{Host: pr.host, Run: h.Run, Term: h.Term, Mode: h.Mode})
			return nil
		}
		last = err
		sleep(pr.ctx, 50*time.Millisecond)
	}
	return fmt.Errorf("connect to the standby on host %s: %w", pr.host, last)
}

func (pr *pair) dial() (*peer.Session, hello, error) {
	s := pr.p.s
	ctx, cancel := context.WithTimeout(pr.ctx, 2*time.Second)
	defer cancel()
	eps, err := s.agent.Endpoints(ctx)
	if err != nil {
		return nil, hello{}, err
	}
	for _, e := range eps {
		if e.Host != pr.host {
			continue
		}
		me := s.hello()
		me.First = pr.p.lastEpoch() + 1
		me.Term = pr.term
		me.QEMU = pr.p.s.cfg.QEMU
		me.Disks = pr.p.disks.hello()
		cfg := peer.Config{TLS: s.tls, Verify: s.verifyHost(pr.host), Hello: me.encode(), Remote: e.Addrs,
			Silence: s.silence(), Log: s.log, Urgent: pr.onUrgent}
		if len(s.cfg.ALinkAddrs) == len(e.Addrs) {
			cfg.Local = s.cfg.ALinkAddrs
		}
		sess, err := peer.Dial(ctx, cfg)
		if err != nil {
			return nil, hello{}, err
		}
		h, err := decodeHello(sess.PeerHello())
		if err == nil {
			err = s.judge(h, pr.host)
		}
		if err == nil && h.NextRun == "" {
			err = fmt.Errorf("host %s offers no standby", pr.host)
		}
		if err != nil {
			sess.Close(err.Error())
			return nil, hello{}, err
		}
		return sess, h, nil
	}
	return nil, hello{}, errors.New("its shim has not told where it listens yet")
}

// judge refuses a peer that is not the other half of this VM.
func (s *Shim) judge(h hello, host string) error {
	switch {
	case h.VM != s.cfg.Spec.Name || h.UUID != s.cfg.Spec.UUID:
		return fmt.Errorf("host %s speaks for VM %q (%s), not %q (%s)", h.Host, h.VM, h.UUID, s.cfg.Spec.Name, s.cfg.Spec.UUID)
	case host != "" && h.Host != host:
		return fmt.Errorf("the peer calls itself host %q, not %q", h.Host, host)
	case h.Machine != machineDigest(s.spec()):
		return fmt.Errorf("host %s would build another machine for this VM (another version of its specification)", h.Host)
	}
	return nil
}

// judgePrimary refuses everybody but the primary of the very record that named
// this host as the one to be filled.
func (s *Shim) judgePrimary(h hello) error {
	s.mu.Lock()
	m := s.mode
	s.mu.Unlock()
	if m.Role != authority.RoleSecondary || m.Mode != model.ModeSyncing || h.Term != m.Term || h.Run != m.PeerRun || h.Host != m.PeerHost {
		return fmt.Errorf("host %s speaks as run %s in term %d; this standby was named for host %s, run %s, term %d", h.Host, short(h.Run), h.Term, m.PeerHost, short(m.PeerRun), m.Term)
	}
	return nil
}

func (s *Shim) silence() time.Duration {
	return time.Duration(max(s.cfg.Spec.FT.DetectMS, 50)) * time.Millisecond
}

// meter keeps the progress of one part of the copy.
type meter struct {
	pr    *pair
	idx   int
	begun time.Time
	gauge *replica.Gauge
}

func (pr *pair) newMeter(what string, total int64) *meter {
	pr.mu.Lock()
	defer pr.mu.Unlock()
	pr.progress = append(pr.progress, model.Progress{What: what, Total: total, ETASeconds: -1})
	return &meter{pr: pr, idx: len(pr.progress) - 1, begun: time.Now(), gauge: replica.NewGauge(0, total)}
}

func (m *meter) at(done int64) {
	m.pr.moved.Add(1) // looking through holes and zeros is moving, too
	m.pr.mu.Lock()
	defer m.pr.mu.Unlock()
	p := &m.pr.progress[m.idx]
	p.Done = done
	m.gauge.At(time.Since(m.begun), p.Total-done)
	p.ETASeconds, p.Rate = m.gauge.ETA(), m.gauge.Rate()
}

// copyMemory sends all memory that is not zero.
func (pr *pair) copyMemory() error {
	pr.p.ramMu.Lock()
	defer pr.p.ramMu.Unlock()
	m := pr.newMeter("memory", pr.p.s.cfg.Spec.Memory)
	err := pr.p.inst.ram.Sweep(pr.ctx, 0, func(off int64, data []byte) error {
		m.at(off + int64(len(data)))
		_, err := pr.enc.EncodeRun(off, data, pr.sendPages)
		return err
	})
	m.at(pr.p.s.cfg.Spec.Memory)
	return err
}

func (pr *pair) sendPages(frame []byte) error {
	err := pr.sess.Send(pr.ctx, kindSyncPages, frame)
	pr.moved.Add(int64(len(frame)))
	return err
}

func (pr *pair) sendChunk(c diskChunk, data []byte) error {
	err := pr.sess.Send(pr.ctx, kindSyncDisk, pack(c), data)
	pr.moved.Add(int64(len(data)))
	pr.mu.Lock()
	pr.copied[int(c.Disk)] += int64(len(data))
	pr.mu.Unlock()
	return err
}

// round sends what changed since the last one, and tells how much that was.
func (pr *pair) round() (pages int, disk int64, err error) {
	if pages, err = pr.roundPages(); err != nil {
		return 0, 0, err
	}
	for n := range pr.p.inst.vols {
		chunks := pr.dirtyChunks(n)
		if err := pr.sendChunks(chunks); err != nil {
			return 0, 0, err
		}
		disk += int64(len(chunks)) * blockstore.ChunkSize
	}
	return pages, disk, nil
}

// roundPages sends the memory that changed since the last time, where memory is
// kept on both hosts.
func (pr *pair) roundPages() (int, error) {
	inst := pr.p.inst
	if inst.ram == nil {
		return 0, nil
	}
	pr.p.ramMu.Lock()
	defer pr.p.ramMu.Unlock()
	if err := inst.ram.Flush(); err != nil {
		return 0, fmt.Errorf("collect memory: %w", err)
	}
	ps, err := inst.ram.Cut()
	if err != nil {
		return 0, fmt.Errorf("collect memory: %w", err)
	}
	defer ps.Release()
	if _, err := pr.enc.Encode(ps, pr.sendPages); err != nil {
		return 0, err
	}
	return ps.Pages(), nil
}

// dirtyChunks takes the list of chunks that the guest wrote since the last call.
func (pr *pair) dirtyChunks(n int) []diskChunk {
	size := pr.p.inst.stores[n].Size()
	var out []diskChunk
	dirty := pr.p.inst.vols[n].TakeDirty()
	for at := int64(0); ; {
		start, end, ok := dirty.Next(at, dirty.Len())
		if !ok {
			return out
		}
		for c := start; c < end; c++ {
			off := c * blockstore.ChunkSize
			out = append(out, diskChunk{Disk: uint32(n), Off: off, Len: uint32(min(blockstore.ChunkSize, size-off))})
		}
		at = end
	}
}

// sendChunks reads chunks in place and sends them.
func (pr *pair) sendChunks(chunks []diskChunk) error {
	buf := make([]byte, blockstore.ChunkSize)
	for _, c := range chunks {
		if err := pr.p.inst.stores[c.Disk].ReadAt(buf[:c.Len], c.Off); err != nil {
			return err
		}
		if err := pr.sendChunk(c, buf[:c.Len]); err != nil {
			return err
		}
	}
	return nil
}

// takeLastDisk notes what the full copy still owes. It is called while the
// guest stands still and its writes are held from now on, so that the image in
// place does not change before the first epoch, which is sent after it, commits.
func (pr *pair) takeLastDisk() error {
	pr.p.disks.attach(pr.p.lastEpoch() + 1)
	if _, err := pr.p.disks.all(replica.EvCaughtUp{}); err != nil {
		return err
	}
	pr.goWork(func() { pr.p.disks.reports(pr.ctx.Done(), pr.sess) })
	pr.owesLast = true
	for n, v := range pr.p.inst.vols {
		pr.lastDisk = append(pr.lastDisk, pr.dirtyChunks(n)...)
		v.StopTracking()
	}
	return nil
}

func (pr *pair) sendLastDisk() error {
	chunks := pr.lastDisk
	pr.lastDisk = nil
	if err := pr.sendChunks(chunks); err != nil || !pr.owesLast {
		return err
	}
	pr.owesLast = false
	words, err := pr.p.disks.all(replica.EvRestSent{})
	if err != nil {
		return err
	}
	return pr.p.disks.sendWords(words, pr.sendKind)
}

// machineDigest names what the guest sees, as far as the specification decides it.
func machineDigest(spec model.VMSpec) string {
	var b strings.Builder
	for _, s := range []string{spec.UUID, spec.Machine, spec.CPU, string(cmp.Or(spec.Virtio, model.VirtioLegacy)), spec.Accel, strconv.Itoa(spec.VCPUs), strconv.FormatInt(spec.Memory, 10)} {
		b.WriteString(s + "|")
	}
	for n, d := range spec.Disks {
		fmt.Fprintf(&b, "%s:%d", d.ID, d.Size)
		if at := model.SlotOf(spec.Disks, n); at != model.FirstDiskSlot+n { // as before where it is where it always was
			fmt.Fprintf(&b, "@%x", at)
		}
		b.WriteByte('|')
	}
	if spec.Level != model.LevelFT {
		b.WriteString(string(spec.Level) + "|") // the two sides must speak of the same
	}
	for _, n := range spec.NICs {
		fmt.Fprintf(&b, "%s:%s|", n.ID, n.MAC)
	}
	return b.String()
}
