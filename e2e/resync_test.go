package e2e

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

var copiedLine = regexp.MustCompile(`disk disk0: (\d+) bytes of (\d+) sent to host (\S+) \(([^)]*\)[^)]*)\)`)

// copies lists what the events say of copies of disk0, oldest first: bytes that
// went over the link, and the grounds.
func (v *VM) copies() (sent []int64, why []string) {
	v.w.T.Helper()
	for _, m := range copiedLine.FindAllStringSubmatch(v.events(v.w.Ctx), -1) {
		n, err := strconv.ParseInt(m[1], 10, 64)
		v.w.must(err, "bytes of a copy")
		sent, why = append(sent, n), append(why, m[4])
	}
	return sent, why
}

// TestResync takes the power of one host after the other while the guest writes
// little into a disk that holds much: what is copied follows what was written,
// and each copy is good to go on from.
func TestResync(t *testing.T) {
	const much, little = 48, 2 // MiB
	w := Start(t)
	v := w.CreateVM(VMOptions{Disks: []string{"256M"}})
	write := func(name string, mib int) string {
		t.Helper()
		lines, _ := v.Within(3*time.Minute, fmt.Sprintf("sh dd if=/dev/urandom of=/data/%s bs=1M count=%d 2>/dev/null && sync && md5sum /data/%s", name, mib, name))
		return strings.Join(lines, " ")
	}
	again := func(name string) string {
		t.Helper()
		lines, _ := v.Within(3*time.Minute, fmt.Sprintf("sh echo 3 >/proc/sys/vm/drop_caches; md5sum /data/%s", name))
		return strings.Join(lines, " ")
	}
	sums := map[string]string{"big": write("big", much)}
	v.Protected()
	check := func() {
		t.Helper()
		for name, want := range sums {
			if got := again(name); got != want || !strings.Contains(got, name) {
				t.Errorf("%s: %q, written %q", name, got, want)
			}
		}
	}
	before, _ := v.copies()

	p := v.Primary()
	s := w.Other(p)
	w.PowerOff(s)
	v.Wait("state=running,mode=simplex", time.Minute)
	sums["little"] = write("little", little)
	w.PowerOn(s)
	v.Protected()
	sent, why := v.copies()
	t.Logf("copies: %v %q", sent, why)
	if len(sent) <= len(before) {
		t.Fatalf("no copy of the disk was told: %v", sent)
	}
	if last := sent[len(sent)-1]; last < little<<20 || last > 10*little<<20 {
		t.Errorf("%d bytes were copied (%s); the guest wrote %d MiB meanwhile, the disk holds %d MiB", last, why[len(why)-1], little, much)
	}

	// What was resynced is good to go on from; and the old primary comes back the same way.
	w.PowerOff(p)
	v.Wait("state=running,primary="+s, time.Minute)
	check()
	sums["more"] = write("more", little)
	w.PowerOn(p)
	v.Protected()
	sent, why = v.copies()
	t.Logf("copies: %v %q", sent, why)
	if last := sent[len(sent)-1]; last < little<<20 || last > 16*little<<20 {
		t.Errorf("%d bytes were copied back (%s); the guest wrote %d MiB meanwhile, the disk holds %d MiB", last, why[len(why)-1], little, much)
	}
	w.PowerOff(s)
	v.Wait("state=running,primary="+p, time.Minute)
	check()
	v.CheckDisks()
}
