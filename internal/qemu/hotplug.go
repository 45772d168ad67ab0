package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"
)

// Disks of a running guest. Invariant: a QEMU that was started with a disk on its
// command line and one that was given the same disk while it ran, at the same
// slot, have the same device state: one loads what the other saved.

// ErrNoHotplug says that this kind of machine takes no disks while it runs.
var ErrNoHotplug = errors.New("a machine of type q35 takes or gives no disk while its guest runs: its root bus has no hot-plug and it was made without free root ports")

// ErrNotReleased says that the guest did not let go of a disk.
var ErrNotReleased = errors.New("the guest does not let go of the disk")

// CanHotplug says why a guest of m cannot be given disks, or have them taken, while it runs.
func (m *Machine) CanHotplug() error {
	if strings.HasPrefix(m.Type, "pc-i440fx-") {
		return nil
	}
	return ErrNoHotplug
}

// PlugDisk gives the running guest of m disk d, whose Slot is set. On failure
// nothing of it is left in QEMU.
func (q *QMP) PlugDisk(ctx context.Context, m *Machine, d Disk) error {
	if err := m.CanHotplug(); err != nil {
		return err
	}
	if !idRE.MatchString(d.ID) || d.Socket == "" || len(d.Socket) > maxPath || d.Slot < slotDisk || d.Slot >= slotDisk+MaxDisks {
		return fmt.Errorf("plug disk %q: slot %#x, socket %q: out of range", d.ID, d.Slot, d.Socket)
	}
	if err := q.addNode(ctx, d.ID, d); err != nil {
		return fmt.Errorf("plug disk %s: %w", d.ID, err)
	}
	dev := map[string]any{"driver": "virtio-blk-pci", "id": "dev-" + d.ID, "drive": d.ID, "serial": d.ID, "num-queues": 1,
		"werror": "stop", "rerror": "stop", "disable-modern": !m.ModernVirtio, "disable-legacy": "off",
		"bus": "pci.0", "addr": fmt.Sprintf("0x%x", d.Slot)}
	if m.ModernVirtio {
		dev["disable-legacy"] = "on"
	}
	if d.BootIndex > 0 {
		dev["bootindex"] = d.BootIndex
	}
	if err := q.do(ctx, "device_add", dev); err != nil {
		cctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		return fmt.Errorf("plug disk %s: %w", d.ID, errors.Join(err, q.dropNode(cctx, d.ID)))
	}
	return nil
}

func (q *QMP) addNode(ctx context.Context, node string, d Disk) error {
	b := map[string]any{"driver": "nbd", "node-name": node, "server": map[string]string{"type": "unix", "path": d.Socket},
		"export": d.Export, "reconnect-delay": nbdRetry, "discard": "unmap"}
	if d.ReadOnly {
		b["read-only"] = true
	}
	return q.do(ctx, "blockdev-add", b)
}

func (q *QMP) dropNode(ctx context.Context, node string) error {
	return q.do(ctx, "blockdev-del", map[string]string{"node-name": node})
}

// unplugAgain is the distance in which a guest is asked again: one that is just
// booting does not hear the first request.
const unplugAgain = 2 * time.Second

// UnplugDisk asks the guest to let go of a disk, waits until it has, and takes it
// out of QEMU. ErrNotReleased: it had not by the end of limit. It may still do so
// afterwards: QEMU then says DEVICE_DELETED with the device "dev-ID", and
// DropDisk takes away what is left.
func (q *QMP) UnplugDisk(ctx context.Context, m *Machine, id string, limit time.Duration) error {
	if err := m.CanHotplug(); err != nil {
		return err
	}
	events, end := q.watch("DEVICE_DELETED")
	defer end()
	del := map[string]string{"id": "dev-" + id}
	if err := q.do(ctx, "device_del", del); err != nil {
		var e *Error
		// An earlier request may be under way still.
		if !errors.As(err, &e) || !strings.Contains(err.Error(), "unplug") {
			return fmt.Errorf("unplug disk %s: %w", id, err)
		}
	}
	again := time.NewTicker(unplugAgain)
	defer again.Stop()
	late := time.NewTimer(limit)
	defer late.Stop()
	for {
		select {
		case e := <-events:
			if UnpluggedDisk(e) == id {
				return q.DropDisk(ctx, id)
			}
		case <-again.C:
			_ = q.do(ctx, "device_del", del) // refused while one is under way; the event tells
		case <-late.C:
			if gone, err := q.Unplugged(ctx, id); err == nil && gone {
				return q.DropDisk(ctx, id)
			}
			return fmt.Errorf("unplug disk %s: %w within %v", id, ErrNotReleased, limit)
		case <-q.done:
			return q.Err()
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Unplugged reports whether the guest has no such disk any more.
func (q *QMP) Unplugged(ctx context.Context, id string) (bool, error) {
	var list []struct {
		Name string `json:"name"`
	}
	if err := q.query(ctx, "qom-list", map[string]string{"path": "/machine/peripheral"}, &list); err != nil {
		return false, err
	}
	for _, o := range list {
		if o.Name == "dev-"+id {
			return false, nil
		}
	}
	return true, nil
}

// UnpluggedDisk returns the disk of which a DEVICE_DELETED event tells, or "".
func UnpluggedDisk(e Event) string {
	var d struct {
		Device string `json:"device"`
	}
	if e.Name != "DEVICE_DELETED" || json.Unmarshal(e.Data, &d) != nil {
		return ""
	}
	id, ok := strings.CutPrefix(d.Device, "dev-")
	if !ok {
		return ""
	}
	return id
}

// DropDisk takes away what is behind a disk that the guest has let go of.
func (q *QMP) DropDisk(ctx context.Context, id string) error {
	node, err := q.nodeOf(ctx, id)
	if err == nil && node != "" {
		err = q.dropNode(ctx, node)
	}
	if err != nil {
		return fmt.Errorf("drop disk %s: %w", id, err)
	}
	return nil
}

// diskNode names the nodes that may stand behind a disk: they take turns where
// the disk is exchanged under the guest.
func diskNodes(id string) [2]string { return [2]string{id, id + ".b"} }

// nodeOf finds the node of a disk; "": there is none.
func (q *QMP) nodeOf(ctx context.Context, id string) (string, error) {
	var nodes []struct {
		Node string `json:"node-name"`
	}
	if err := q.query(ctx, "query-named-block-nodes", map[string]bool{"flat": true}, &nodes); err != nil {
		return "", err
	}
	for _, n := range nodes {
		for _, name := range diskNodes(id) {
			if n.Node == name {
				return name, nil
			}
		}
	}
	return "", nil
}

// SwapDisk puts the export that d names behind a disk of the guest in place of the
// present one, and tells the guest its size, which must not be smaller. Nobody may
// use the disk meanwhile: the guest stands still. On failure the old one is as before.
func (q *QMP) SwapDisk(ctx context.Context, d Disk, size int64) error {
	fail := func(err error) error { return fmt.Errorf("exchange disk %s: %w", d.ID, err) }
	old, err := q.nodeOf(ctx, d.ID)
	if err != nil || old == "" {
		return fail(errors.Join(err, errors.New("QEMU has no such disk")))
	}
	next := diskNodes(d.ID)[0]
	if old == next {
		next = diskNodes(d.ID)[1]
	}
	if err := q.addNode(ctx, next, d); err != nil {
		return fail(err)
	}
	put := func(node string) error {
		return q.do(ctx, "qom-set", map[string]string{"path": "/machine/peripheral/dev-" + d.ID, "property": "drive", "value": node})
	}
	if err := put(next); err != nil {
		return fail(errors.Join(err, q.dropNode(ctx, next)))
	}
	if err := q.do(ctx, "block_resize", map[string]any{"node-name": next, "size": size}); err != nil {
		return fail(errors.Join(err, put(old), q.dropNode(ctx, next)))
	}
	if err := q.dropNode(ctx, old); err != nil {
		return fail(err)
	}
	return nil
}
