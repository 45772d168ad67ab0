package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"perdure/api"
	"perdure/internal/model"
)

// TestBitRot flips bits in replicas under a running VM: what a read of the guest
// meets is answered from the other host and repaired, verify finds and repairs the
// rest, both are reported, and the guest never reads anything else than it wrote.
func TestBitRot(t *testing.T) {
	w := Start(t)
	for _, level := range []string{"ft", "ca"} {
		t.Run(level, func(t *testing.T) { bitRot(w.sub(t), level) })
	}
}

// A line of 16 bytes, of which a block holds 256.
const rotLine = "perdure-rot-%03d" // and the end of the line

func bitRot(w *World, level string) {
	t := w.T
	v := w.CreateVM(VMOptions{Level: level, Disks: []string{"48M"}}).Protected()
	p, s := v.Primary(), v.Secondary()
	const files, blocks = 3, 16
	v.Within(3*time.Minute, fmt.Sprintf("sh for i in 001 002 003; do yes perdure-rot-$i | head -c %d >/data/rot$i; done; sync; md5sum /data/rot*", blocks*4096))
	sums := func() string {
		t.Helper()
		lines, _ := v.Within(3*time.Minute, "sh echo 3 >/proc/sys/vm/drop_caches; md5sum /data/rot*")
		return strings.Join(lines, "\n")
	}
	want := sums()
	if strings.Count(want, "/data/rot") != files {
		t.Fatalf("the guest wrote %q", want)
	}
	log := v.Log(20 * time.Millisecond)
	w.must(log.WaitAcked(w.Ctx, 20), "log")

	// The first file rots where the guest runs and is read, the second there too, unread;
	// the third on the other host.
	read, unread := v.rot(p, 1, 5), v.rot(p, 2, 7)
	other := v.rot(s, 3, 9)
	lines, _ := v.Within(3*time.Minute, "sh echo 3 >/proc/sys/vm/drop_caches; md5sum /data/rot001")
	if got := strings.Join(lines, ""); !strings.Contains(want, got) || got == "" {
		t.Errorf("the guest read %q, wrote %q", got, want)
	}
	v.event("read-repaired")
	out := w.Perdure(p, "disk", "verify", v.Name, "--rate", "1G", "--wait", "-o", "json")
	var st api.VerifyStatus
	w.must(json.Unmarshal([]byte(out), &st), "decode report")
	_, bad, repaired, _, left := st.Report.Counts()
	if st.Report.State != model.VerifyDone || bad != repaired || left != 0 || st.Report.Peer != s {
		t.Errorf("verify says %s", out)
	}
	for off, host := range map[int64]string{unread: p, other: s} {
		found := false
		for _, g := range st.Report.Disks[0].Ranges {
			found = found || g.Off <= off && off < g.Off+g.Len && g.What == "repaired" && g.Host == host
		}
		if !found {
			t.Errorf("the block at %d of host %s is not in the report: %s", off, host, out)
		}
	}
	v.event("repaired")
	v.event("verified")
	for n, off := range []int64{read, unread, other} {
		for _, h := range []string{p, s} {
			if !v.rotBlockHolds(h, n+1, off) {
				t.Errorf("host %s: the block at %d is still wrong", h, off)
			}
		}
	}
	if got := sums(); got != want {
		t.Errorf("the guest reads\n%s, wrote\n%s", got, want)
	}
	t.Logf("\n%s", w.Perdure(s, "disk", "verify", v.Name, "--report"))
	if st.Report.Reads.Blocks != 1 {
		t.Errorf("%d blocks were repaired by reads", st.Report.Reads.Blocks)
	}
	// A second one finds nothing.
	out = w.Perdure(p, "disk", "verify", v.Name, "disk0", "--rate", "1G", "--wait")
	if !strings.Contains(out, "all is well") {
		t.Errorf("a second verify says\n%s", out)
	}
	v.bothBad(p, s)
	log.Stop()
	v.judge(log)
	v.sameDisks()
	if vm := v.Show(); vm.Mode != model.ModeDuplex || vm.Primary != p || len(vm.Problems) > 0 || vm.Disks[0].Verified == nil {
		t.Errorf("afterwards: %+v", vm)
	}
	if level == "ft" {
		v.verifyMoves(p, s)
	}
	v.remove()
}

// verifyMoves hands the VM over while a verify is under way: that is interrupted and
// known to the other host, holds nothing up, and can be made there.
func (v *VM) verifyMoves(p, s string) {
	w := v.w
	w.T.Helper()
	w.Perdure(p, "disk", "verify", v.Name, "--rate", "64K")
	w.Eventually(20*time.Second, "it shows how far it is", func() error {
		if out := w.Perdure(s, "vm", "show", v.Name); !strings.Contains(out, "Verifying") {
			return errMissing
		}
		return nil
	})
	if out, err := w.TryPerdure(s, "disk", "verify", v.Name); err == nil || !strings.Contains(err.Error(), "under way") {
		w.T.Errorf("a second one beside the first: %v %s", err, out)
	}
	start := time.Now()
	w.Perdure(p, "vm", "switchover", v.Name)
	v.Wait("state=running,primary="+s, 30*time.Second)
	if d := time.Since(start); d > 10*time.Second {
		w.T.Errorf("the VM moved after %v", d)
	}
	w.Eventually(20*time.Second, "the report says that it was interrupted", func() error {
		if out := w.Perdure(s, "disk", "verify", v.Name, "--report"); !strings.Contains(out, "interrupted") {
			return fmt.Errorf("it says %s", out)
		}
		return nil
	})
	v.Protected()
	if out := w.Perdure(p, "disk", "verify", v.Name, "--rate", "1G", "--wait"); !strings.Contains(out, "the replicas on "+s+" and "+p) || !strings.Contains(out, "all is well") {
		w.T.Errorf("on the other host verify says\n%s", out)
	}
}

// bothBad damages both copies of a block that the guest does not read: that is named,
// nothing is written over, and it is over when the guest has written the block.
func (v *VM) bothBad(p, s string) {
	w := v.w
	w.T.Helper()
	off := v.rot(p, 3, 4)
	if o := v.rot(s, 3, 4); o != off {
		w.T.Fatalf("the block is at %d here and at %d there", off, o)
	}
	out, err := w.TryPerdure(p, "disk", "verify", v.Name, "--rate", "1G", "--wait")
	if err == nil || !strings.Contains(err.Error(), "could not be repaired") {
		w.T.Errorf("both copies of a block are damaged, and verify says %v\n%s", err, out)
	}
	if vm := v.Show(); len(vm.Problems) != 1 || vm.Problems[0].Code != "verify-mismatch" || !strings.Contains(vm.Problems[0].Text, fmt.Sprintf("disk0 %d+4096", off)) {
		w.T.Errorf("problems: %+v", vm.Problems)
	}
	for _, h := range []string{p, s} {
		if v.rotBlockHolds(h, 3, off) {
			w.T.Errorf("host %s: the block was written anew from nothing that is proved", h)
		}
	}
	v.Within(3*time.Minute, "sh yes perdure-rot-003 | dd of=/data/rot003 bs=4096 count=16 iflag=fullblock conv=notrunc,fsync 2>/dev/null")
	if out := w.Perdure(p, "disk", "verify", v.Name, "--rate", "1G", "--wait"); !strings.Contains(out, "all is well") {
		w.T.Errorf("after the guest wrote the block verify says\n%s", out)
	}
}

func (v *VM) image(host string) string {
	return filepath.Join(v.w.Lab.StateDir(host), "vms", v.Name, "disks", "disk0.raw")
}

// rot flips a byte of a block of one of the files, in one host's replica, and returns
// the block's offset. Which of the file's blocks it is depends on skip.
func (v *VM) rot(host string, file, skip int) int64 {
	v.w.T.Helper()
	img, err := os.ReadFile(v.image(host))
	v.w.must(err, "read replica")
	block := bytes.Repeat([]byte(fmt.Sprintf(rotLine, file)+"\n"), 256)
	for off := 0; off+len(block) <= len(img); off += len(block) {
		if !bytes.Equal(img[off:off+len(block)], block) {
			continue
		}
		if skip--; skip >= 0 {
			continue
		}
		f, err := os.OpenFile(v.image(host), os.O_WRONLY, 0)
		v.w.must(err, "open replica")
		defer f.Close()
		_, err = f.WriteAt([]byte{img[off+1000] ^ 0x10}, int64(off)+1000)
		v.w.must(err, "write replica")
		return int64(off)
	}
	v.w.T.Fatalf("host %s has too few blocks of file %d", host, file)
	return 0
}

// rotBlockHolds reports whether a block is what the guest wrote.
func (v *VM) rotBlockHolds(host string, file int, off int64) bool {
	v.w.T.Helper()
	f, err := os.Open(v.image(host))
	v.w.must(err, "open replica")
	defer f.Close()
	p := make([]byte, 4096)
	_, err = f.ReadAt(p, off)
	v.w.must(err, "read replica")
	return bytes.Equal(p, bytes.Repeat([]byte(fmt.Sprintf(rotLine, file)+"\n"), 256))
}

// event waits until the events of the VM show one of a type.
func (v *VM) event(typ string) {
	v.w.T.Helper()
	v.w.Eventually(20*time.Second, "event "+typ, func() error {
		if !strings.Contains(v.events(v.w.Ctx), " "+typ+" ") {
			return fmt.Errorf("there is none")
		}
		return nil
	})
}
