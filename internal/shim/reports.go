package shim

import (
	"encoding/binary"
	"time"

	"perdure/internal/model"
	"perdure/internal/peer"
)

// Each side tells the other what is durable, so that extents may leave the
// activity logs. What waits for that is the applying of epochs, behind which in
// turn the ordered messages wait: so reports are urgent notes, which wait for nothing. They may
// get lost and overtake each other; numbers only grow, and are told again.

// reportEvery is the distance in which each side tells the other what is durable
// without being asked.
const reportEvery = time.Second

// takeReport notes what the peer has made durable, or that it waits for something
// to be so here. It never blocks for long.
func (d *disks) takeReport(kind uint8, p []byte) {
	if kind == urgentWant {
		select {
		case d.want <- struct{}{}:
		default: // it will be done
		}
		return
	}
	stores := d.inst.stores
	if len(p) != 8*len(stores) {
		d.s.log.Warn("report of what is durable", "bytes", len(p), "disks", len(stores))
		return
	}
	for n, st := range stores {
		st.PeerDurable(model.Epoch(binary.LittleEndian.Uint64(p[8*n:])))
	}
}

// report tells the peer what is durable here.
func (d *disks) report(sess *peer.Session) {
	var b []byte
	for _, st := range d.inst.stores {
		b = binary.LittleEndian.AppendUint64(b, uint64(st.DurableThrough()))
	}
	_ = sess.Urgent(urgentDurable, b) // a lost session needs no report, and a lost note is followed by others
}

// reports tells the peer what is durable here, until done is closed or the
// session is lost, and has each side make durable what the other one waits for.
func (d *disks) reports(done <-chan struct{}, sess *peer.Session) {
	if len(d.list) == 0 || d.inst.mirror != nil {
		return
	}
	wanted := make(chan struct{}, 1) // by a store here
	stop := make(chan struct{})
	defer close(stop)
	for _, st := range d.inst.stores {
		d.s.goWork(func() {
			for {
				select {
				case <-st.PeerWanted():
					select {
					case wanted <- struct{}{}:
					default:
					}
				case <-stop:
					return
				}
			}
		})
	}
	d.s.goWork(func() {
		for {
			select {
			case <-d.want:
				d.serveWant(sess)
			case <-stop:
				return
			}
		}
	})
	t := time.NewTicker(reportEvery)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			d.report(sess)
			for _, st := range d.inst.stores {
				if st.PeerAwaited() {
					_ = sess.Urgent(urgentWant, nil) // asked again with the next tick
					break
				}
			}
		case <-wanted:
			_ = sess.Urgent(urgentWant, nil)
		case <-sess.Lost():
			return
		case <-done:
			return
		}
	}
}

// serveWant makes everything durable here and says so.
func (d *disks) serveWant(sess *peer.Session) {
	for _, st := range d.inst.stores {
		if err := st.Flush(); err != nil {
			return // the replica is given up; whoever writes next is told
		}
	}
	d.report(sess)
}
