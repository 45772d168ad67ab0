package shim

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"perdure/internal/model"
	"perdure/internal/vfs"
)

// TestFTDiskUnderFaults is the disk of a VM of level ft, whose guest goes back to
// its last checkpoint together with it, while everything below it breaks.
func TestFTDiskUnderFaults(t *testing.T) {
	runDryFaults(t, model.LevelFT, 0, 15*time.Second)
}

// TestFTPairKilledAtPoints plays some cells of the crash matrix of level ft; make
// soak plays all.
func TestFTPairKilledAtPoints(t *testing.T) { playSome(t, model.LevelFT) }

// rawDisk is a connection to a disk on which a test makes one request after the other.
type rawDisk struct{ nc net.Conn }

func (w *dry) rawDisk() *rawDisk {
	w.t.Helper()
	nc, err := w.dial(w.t.Context())
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { nc.Close() })
	_ = nc.SetDeadline(time.Now().Add(time.Minute))
	_, err = io.ReadFull(nc, make([]byte, 18))
	if err == nil {
		_, err = nc.Write(append(binary.BigEndian.AppendUint32(nil, 3), "IHAVEOPT\x00\x00\x00\x01\x00\x00\x00\x05disk0"...))
	}
	if err == nil {
		_, err = io.ReadFull(nc, make([]byte, 10))
	}
	if err != nil {
		w.t.Fatal(err)
	}
	return &rawDisk{nc}
}

// do makes one request: 0 read into p, 1 write of p, 3 flush.
func (d *rawDisk) do(cmd uint16, off int64, p []byte) error {
	b := binary.BigEndian.AppendUint32(nil, 0x25609513)
	b = binary.BigEndian.AppendUint32(b, uint32(cmd))
	b = binary.BigEndian.AppendUint64(b, 1)
	b = binary.BigEndian.AppendUint64(b, uint64(off))
	b = binary.BigEndian.AppendUint32(b, uint32(len(p)))
	if cmd == 1 {
		b = append(b, p...)
	}
	_, err := d.nc.Write(b)
	if err == nil {
		_, err = io.ReadFull(d.nc, b[:16])
	}
	if e := binary.BigEndian.Uint32(b[4:]); err == nil && e != 0 {
		err = fmt.Errorf("the disk answers with error %d", e)
	}
	if err == nil && cmd == 0 {
		_, err = io.ReadFull(d.nc, p)
	}
	return err
}

// TestFTFlushAtAStop: a guest flushes, and says so, while its QEMU is being told to
// stop but runs yet. What it said leaves with this epoch; when both hosts lose
// their power then, before there is another one, what it flushed must be there.
func TestFTFlushAtAStop(t *testing.T) {
	w := newDryAt(t, model.LevelFT, false, drySize, dryOptions())
	g := w.guest
	w.begin()
	w.untilDuplex(30 * time.Second)
	d := w.rawDisk()
	data := bytes.Repeat([]byte("flushed!"), 512)
	done := make(chan error, 1)
	later := make(chan struct{})
	stops := 0
	g.mu.Lock()
	g.atStop = func() {
		if stops++; stops > 1 {
			<-later // QEMU does not react: there is no other epoch
			return
		}
		err := d.do(1, 1<<20, data)
		if err == nil {
			err = d.do(3, 0, nil)
		}
		g.speak()
		done <- err
	}
	g.mu.Unlock()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	g.mu.Lock()
	said := uint64(len(g.said))
	g.mu.Unlock()
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		g.mu.Lock()
		seen := g.seen
		g.mu.Unlock()
		if seen >= said {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("output %d does not leave, the last is %d", said, seen)
		}
	}
	nothing := func() bool { return false }
	for _, h := range w.hosts {
		h.now().silence()
	}
	g.mu.Lock()
	g.atStop = nil
	g.mu.Unlock()
	close(later)
	for _, h := range w.hosts {
		h.powerOff(false, nothing)
	}
	for _, h := range w.hosts {
		h.powerOn()
	}
	got := make([]byte, len(data))
	if err := w.rawDisk().do(0, 1<<20, got); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, data) {
		t.Error("what was flushed before it was told is gone")
	}
}

// TestFTEpochsLargerThanTheActivityLog: a takeover applies an epoch that touches
// more extents than the activity log holds, though nobody reports any more what is
// durable elsewhere. The primary ends while the secondary waits for that.
func TestFTEpochsLargerThanTheActivityLog(t *testing.T) {
	w := newDryAt(t, model.LevelFT, false, drySize, dryOptions())
	w.begin()
	for round := range 2 {
		w.untilDuplex(30 * time.Second)
		if err := w.guest.committed(20 * time.Second); err != nil {
			t.Fatal(err)
		}
		p := w.hosts[w.store.get().Record.Primary.Host]
		p.mu.Lock()
		mem := p.mem
		p.mu.Unlock()
		goOn := make(chan struct{})
		mem.SetHook(func(op vfs.Op) error {
			if op.Kind == "sync" {
				<-goOn // nothing becomes durable, so nothing is reported
			}
			return nil
		})
		d := w.rawDisk()
		for extent := int64(0); extent < drySize>>22; extent++ {
			if err := d.do(1, extent<<22, bytes.Repeat([]byte{byte(round + 1)}, 4096)); err != nil {
				t.Fatal(err)
			}
		}
		s := p.other().now().shim
		for end := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
			s.mu.Lock()
			inst := s.inst
			s.mu.Unlock()
			if inst.stores[0].PeerAwaited() {
				break
			}
			if time.Now().After(end) {
				t.Fatal("the secondary does not wait for a report: this test shows nothing")
			}
		}
		p.now().silence()
		w.allLinks(func(l *dryLink) { l.set(func() { l.hole = true }) })
		close(goOn)
		p.powerOff(true, nil)
		w.until("takeover", 20*time.Second, func(r model.Record) bool { return r.Primary.Host == p.other().name })
		if err := w.rawDisk().do(0, 0, make([]byte, 4096)); err != nil { // the guest goes on
			t.Fatal(err)
		}
		p.powerOn()
	}
	w.untilDuplex(30 * time.Second)
}
