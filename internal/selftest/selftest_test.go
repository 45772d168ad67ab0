package selftest

import (
	"os"
	"testing"

	"perdure/internal/guestmem"
	"perdure/internal/testenv"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "flusher" {
		os.Exit(guestmem.HelperMain(os.Args[2:]))
	}
	os.Exit(testenv.Main(m))
}

// TestProve runs the proof under TCG, which every machine has.
func TestProve(t *testing.T) {
	path := testenv.QEMU(t)
	r, err := Prove(t.Context(), t.TempDir(), Options{QEMU: path, Accel: "tcg", Type: "pc-q35-7.2", Helper: []string{"/proc/self/exe", "flusher"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d checkpoints, %d dirty pages, %d bytes compared, mean pause %v", r.Rounds, r.Pages, r.Compare, r.Pause)
}
