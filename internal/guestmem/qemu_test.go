package guestmem

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"perdure/internal/testenv"
)

// firmware is a guest of 28 bytes in place of a BIOS: it fills 512 KiB from 0x10000 on with a running number, for ever.
func firmware() []byte {
	b := make([]byte, 64<<10)
	copy(b, []byte{
		0xB8, 0x00, 0x10, //     start: mov ax, 0x1000
		0x8E, 0xC0, //           seg:   mov es, ax
		0x31, 0xFF, //                  xor di, di
		0xB9, 0x00, 0x80, //            mov cx, 0x8000
		0x42,       //           word:  inc dx
		0x89, 0xD0, //                  mov ax, dx
		0xAB,       //                  stosw
		0xE2, 0xFA, //                  loop word
		0x8C, 0xC0, //                  mov ax, es
		0x05, 0x00, 0x10, //            add ax, 0x1000
		0x3D, 0x00, 0x90, //            cmp ax, 0x9000
		0x72, 0xE9, //                  jb seg
		0xEB, 0xE4, //                  jmp start
	})
	copy(b[0xFFF0:], []byte{0xEA, 0x00, 0x00, 0x00, 0xF0}) // reset: jmp 0xF000:0
	return b
}

// qemu is a QEMU with its RAM on ours, and QMP.
type qemu struct {
	t    testing.TB
	cmd  *exec.Cmd
	conn net.Conn
	dec  *json.Decoder
	log  bytes.Buffer
}

func startQEMU(t testing.TB, r *RAM, accel string, extra ...string) *qemu {
	t.Helper()
	dir := t.TempDir()
	rom := filepath.Join(dir, "rom")
	if err := os.WriteFile(rom, firmware(), 0o600); err != nil {
		t.Fatal(err)
	}
	sock := filepath.Join(dir, "qmp")
	q := &qemu{t: t}
	q.cmd = exec.Command(testenv.QEMU(t), append([]string{"-accel", accel, "-M", "pc,memory-backend=ram0", "-m", fmt.Sprint(r.Size() >> 20),
		"-object", fmt.Sprintf("memory-backend-file,id=ram0,size=%d,mem-path=%s,share=on,prealloc=on", r.Size(), r.Path()),
		"-overcommit", "mem-lock=on", "-nodefaults", "-display", "none", "-S", "-qmp", "unix:" + sock + ",server=on,wait=off",
		"-bios", rom}, extra...)...)
	q.cmd.Stderr = &q.log
	if err := q.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan struct{})
	go func() { _ = q.cmd.Wait(); close(exited) }()
	t.Cleanup(func() {
		_ = q.cmd.Process.Kill()
		<-exited
	})
	for {
		c, err := net.Dial("unix", sock)
		if err == nil {
			q.conn = c
			break
		}
		select {
		case <-exited:
			t.Fatalf("qemu ended: %s", q.log.String())
		case <-time.After(10 * time.Millisecond):
		}
	}
	t.Cleanup(func() { q.conn.Close() })
	q.dec = json.NewDecoder(q.conn)
	var greeting any
	if err := q.dec.Decode(&greeting); err != nil {
		t.Fatal(err)
	}
	q.do("qmp_capabilities", nil)
	return q
}

func (q *qemu) do(cmd string, args map[string]any) {
	q.t.Helper()
	m := map[string]any{"execute": cmd}
	if args != nil {
		m["arguments"] = args
	}
	if err := json.NewEncoder(q.conn).Encode(m); err != nil {
		q.t.Fatal(err)
	}
	for {
		var r map[string]any
		if err := q.dec.Decode(&r); err != nil {
			q.t.Fatalf("%s: %v: %s", cmd, err, q.log.String())
		}
		if r["error"] != nil {
			q.t.Fatalf("%s: %v", cmd, r["error"])
		}
		if _, ok := r["return"]; ok {
			return
		}
	}
}

// physical returns guest-physical memory as QEMU saves it.
func (q *qemu) physical(from, to int64) []byte {
	q.t.Helper()
	f := filepath.Join(q.t.TempDir(), "mem")
	q.do("pmemsave", map[string]any{"val": from, "size": to - from, "filename": f})
	b, err := os.ReadFile(f)
	if err != nil {
		q.t.Fatal(err)
	}
	_ = os.Remove(f)
	return b
}

// TestQEMU checkpoints an unmodified QEMU whose guest writes all the time, and compares.
func TestQEMU(t *testing.T) {
	testenv.QEMU(t)
	for _, accel := range []string{"tcg", "kvm"} {
		t.Run(accel, func(t *testing.T) {
			if accel == "kvm" {
				if _, err := os.Stat("/dev/kvm"); err != nil {
					t.Skip("no /dev/kvm: the same is shown under tcg, and doctor shows it on the user's host")
				}
			}
			testQEMU(t, accel)
		})
	}
}

func testQEMU(t *testing.T, accel string) {
	const size = 16 << 20
	a, b := openRAM(t, size), openRAM(t, size)
	q := startQEMU(t, a, accel)
	standby := startQEMU(t, b, accel, "-incoming", "defer")
	for _, r := range []*RAM{a, b} {
		if err := r.Attach(); err != nil {
			t.Fatal(err)
		}
		r.SetMode(Collect)
	}
	enc := NewEncoder(EncoderConfig{})
	send := func(f []byte) error { return DecodePages(f, size, b.Store) }
	q.do("cont", nil)
	if err := a.Sweep(t.Context(), 0, func(off int64, d []byte) error {
		_, err := enc.EncodeRun(off, d, send)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	busy := 0
	for epoch := 0; epoch < 200 && busy < 20; epoch++ {
		time.Sleep(20 * time.Millisecond) // the guest runs; any length will do
		q.do("stop", nil)
		ps := mustCut(t, a)
		if _, err := enc.Encode(ps, send); err != nil {
			t.Fatal(err)
		}
		if ps.Pages() > 0 { // not a number: under some KVMs real mode is emulated, and slow
			busy++
		}
		ps.Release()
		if epoch%10 == 9 {
			compareQEMU(t, q, standby, a, b)
		}
		q.do("cont", nil)
	}
	q.do("stop", nil)
	ps := mustCut(t, a)
	if _, err := enc.Encode(ps, send); err != nil {
		t.Fatal(err)
	}
	ps.Release()
	compareQEMU(t, q, standby, a, b)
	if busy < 20 {
		t.Errorf("the guest wrote in %d epochs only: %s", busy, q.log.String())
	}
	if ps := mustCut(t, b); ps.Pages() != 0 {
		t.Errorf("%d stored pages came back from the standby", ps.Pages())
	}
	for _, r := range []*RAM{a, b} {
		if err := r.Err(); err != nil {
			t.Error(err)
		}
	}
}

// compareQEMU compares the memory of both QEMUs, byte by byte. Between 640 KiB and 1 MiB
// the physical address space shows video memory and ROMs, not all of it RAM; there the RAM files themselves are compared.
func compareQEMU(t *testing.T, q, standby *qemu, a, b *RAM) {
	t.Helper()
	same(t, "RAM file of the standby", readFile(t, b.Path()), readFile(t, a.Path()))
	for _, r := range [][2]int64{{0, 0xA0000}, {0x100000, b.Size()}} {
		same(t, "standby", standby.physical(r[0], r[1]), q.physical(r[0], r[1]))
	}
}
